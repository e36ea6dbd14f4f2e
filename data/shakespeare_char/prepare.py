"""tiny-shakespeare as characters, split 9:1 as nanoGPT does."""

# tiny-shakespeare 逐字符（dataset=shakespeare_char）：nanoGPT 的标准对比数据，约一百万字符
# 也是写自己的 prepare.py 时最短的样子：取文字、做词表、切分、write_dataset

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
        folder, name="shakespeare_char", source=f"tiny-shakespeare, SHA-256 {assets.TINY_SHAKESPEARE.sha256}",
        tokenizer=tokenizer,
        train=[tokenizer.encode(text[:cut])], val=[tokenizer.encode(text[cut:])],
    )


if __name__ == "__main__":
    from nanogpt.data.corpus import run_prepare

    run_prepare("shakespeare_char")
