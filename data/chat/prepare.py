"""Conversations of your own, to train a model that answers: messages, ShareGPT's conversations, or instructions.

Objects {"messages": [{"role": "user", "content": …}, …]}, {"conversations": [{"from": "human", "value": …}, …]} or
{"instruction": …, "input": …, "output": …}, one a line or in one JSON list; one file, or all such files of a folder.
"""

# 自己的对话（dataset=chat）：读（写法由 data.conversations 认）-> 去重切分 -> 词表与对话模板 -> 写成数据集
# 微调（init_from）时用模型的词表与它的模板；从零训练时词表长出四个特殊 token，用我们自己的模板
# 全部读进内存再切分：放不下的先拒绝，不等系统来杀

from pathlib import Path

from nanogpt.base.hardware import free_ram
from nanogpt.base.language import ConfigError
from nanogpt.data.chat import with_template
from nanogpt.data.conversations import conversations, split_conversations, write_conversations
from nanogpt.data.corpus import check_tokenizer, tokenizer_for
from nanogpt.data.source_text import check_encoding, own_source, text_files, unchanged
from nanogpt.data.tokenizer import Tokenizer

SUFFIXES = (".jsonl", ".ndjson", ".json")
# 每字节文件要这么多内存：一句一个 dict，查重时又写成一行
BYTES_EACH = 6


def sources(
    path: str | None, tokenizer: str | Tokenizer, vocab_size: int | None, encoding: str, val_fraction: float
) -> list[Path]:
    """The files to read; ConfigError for options that cannot be right, and for more text than the memory holds."""
    source = own_source(path, unnamed="no_chat_path")
    check_tokenizer(tokenizer, vocab_size)
    check_encoding(encoding)
    if not 0 < val_fraction < 1:
        raise ConfigError("out_of_range", key="dataset.val_fraction", got=val_fraction, wanted="> 0, < 1")
    files = text_files(source, SUFFIXES)
    size = sum(file.stat().st_size for file in files)
    if not size:
        raise ConfigError("empty_labelled", got=path, kinds=" ".join(SUFFIXES))
    if size * BYTES_EACH > (free := free_ram()):
        raise ConfigError(
            "dataset.path={got}: {size:,.0f} MiB of conversations take over {need:.1f} GiB of memory to be compared, "
            "and {have:.1f} are free: give fewer",
            got=path, size=size / 2**20, need=size * BYTES_EACH / 2**30, have=free / 2**30,
        )
    return files


def prepare(
    folder: Path, path: str | None, tokenizer: str | Tokenizer, vocab_size: int, encoding: str, val_fraction: float,
) -> None:
    """Read, check, split and write the data set folder."""
    files = sources(path, tokenizer, vocab_size, encoding, val_fraction)
    with unchanged(files) as check:
        parts = split_conversations(conversations(files, encoding), val_fraction)
        check()
    for split, listed in parts.items():
        if not listed:
            raise ConfigError("no_documents", split=split, path=path)
    coder = tokenizer_for(
        tokenizer, lambda: (message["content"] for one in parts["train"] for message in one.messages), vocab_size
    )
    coder = with_template(coder, grow=isinstance(tokenizer, str))
    write_conversations(folder, name="chat", source=Path(path).name, tokenizer=coder, parts=parts)


if __name__ == "__main__":
    from nanogpt.data.corpus import run_prepare

    run_prepare("chat")
