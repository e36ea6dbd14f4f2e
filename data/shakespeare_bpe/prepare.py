"""tiny-shakespeare in GPT-2's byte-pair encoding, split 9:1 as nanoGPT does."""

# tiny-shakespeare 用 GPT-2 的 BPE（dataset=shakespeare_bpe）：微调 GPT-2 用，与 nanoGPT 的 shakespeare 同一份
# 按字符切成前九后一，再分别编码：与 nanoGPT 的切法一致，loss 才能比

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
        folder, name="shakespeare_bpe", source=f"tiny-shakespeare, SHA-256 {assets.TINY_SHAKESPEARE.sha256}",
        tokenizer=tokenizer,
        train=[tokenizer.encode(text[:cut])], val=[tokenizer.encode(text[cut:])],
    )


if __name__ == "__main__":
    from nanogpt.data.corpus import run_prepare

    run_prepare("shakespeare_bpe")
