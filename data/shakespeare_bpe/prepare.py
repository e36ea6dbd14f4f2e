"""tiny-shakespeare in GPT-2's byte-pair encoding, split 9:1 like nanoGPT."""

from pathlib import Path

from nanogpt.data import assets
from nanogpt.data.corpus import write_dataset
from nanogpt.data.tokenizer import gpt2_tokenizer


def prepare(folder: Path) -> None:
    """Fetch text and vocabulary and write the data set folder."""
    text = assets.fetch(assets.TINY_SHAKESPEARE).read_text(encoding="utf-8")
    tokenizer = gpt2_tokenizer()
    cut = int(len(text) * 0.9)
    write_dataset(
        folder, name="shakespeare_bpe", source=f"tiny-shakespeare, SHA-256 {assets.TINY_SHAKESPEARE.sha256}", tokenizer=tokenizer,
        train=[tokenizer.encode(text[:cut])], val=[tokenizer.encode(text[cut:])],
    )


if __name__ == "__main__":
    from nanogpt.data.corpus import run_prepare

    run_prepare("shakespeare_bpe")
