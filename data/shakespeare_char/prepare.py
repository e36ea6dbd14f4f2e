"""tiny-shakespeare as characters, split 9:1 like nanoGPT."""

from pathlib import Path

from nanogpt.data import assets
from nanogpt.data.corpus import build_char_tokenizer, write_dataset


def prepare(folder: Path) -> None:
    """Fetch the text and write the data set folder."""
    text = assets.fetch(assets.TINY_SHAKESPEARE).read_text(encoding="utf-8")
    tokenizer = build_char_tokenizer([text])
    # 与 nanoGPT 一致：前 90% 训练，后 10% 验证，才能比较 loss
    cut = int(len(text) * 0.9)
    write_dataset(
        folder, name="shakespeare_char", source=f"tiny-shakespeare, SHA-256 {assets.TINY_SHAKESPEARE.sha256}", tokenizer=tokenizer,
        train=[tokenizer.encode(text[:cut])], val=[tokenizer.encode(text[cut:])],
    )


if __name__ == "__main__":
    from nanogpt.data.corpus import run_prepare

    run_prepare("shakespeare_char")
