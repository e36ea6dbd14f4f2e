"""Large corpora: a data set of the Hugging Face hub, or your own .parquet, .jsonl or .txt files, in files of tokens."""

# 大语料（dataset=hf）：hub 上的数据集，或自己的一个文件夹，几个进程一起编码成许多个 token 文件
# 先准备、后训练，而不是边取边训：样本的次序由全部文件的长度定，这样才能逐个样本地重来与接着训
# 只想先试一试，用 dataset.max_tokens 取开头的一部分；中断了，同一条命令接着做
# 凭文件的名字、大小与修改时间认原文：几百 GB 不为此读一遍；hub 上的凭名字与 dataset.revision

import itertools
from collections.abc import Iterator
from pathlib import Path

from nanogpt.base.console import file_size
from nanogpt.base.language import ConfigError, say
from nanogpt.data.bpe import check_vocab_size
from nanogpt.data.corpus import tokenizer_for
from nanogpt.data.document_files import Corpus, find_corpus
from nanogpt.data.shard_writer import split_of, write_shards
from nanogpt.data.source_text import text_files, unchanged
from nanogpt.data.tokenizer import Tokenizer

# 词表在开头这么多字上学
LEARNED_ON = 10**8
KINDS = ("gpt2", "byte", "bpe", "auto")


def sources(
    path: str | None, tokenizer: str | Tokenizer, subset: str | None, split: str, revision: str | None, column: str,
    vocab_size: int, shard_tokens: int | None, val_fraction: float, max_tokens: int | None,
    processes: int | None = None,
) -> list[Path]:
    """No files to compare by their contents (see facts); ConfigError for options that cannot be right."""
    if path is None:
        raise ConfigError(
            "dataset.path is not set; type dataset=hf dataset.path=OWNER/NAME, or a folder of .parquet, .jsonl or .txt"
        )
    if isinstance(tokenizer, str) and tokenizer not in KINDS:
        raise ConfigError(
            "dataset.tokenizer={got} is not for large corpora; choose one of: {allowed}",
            got=tokenizer, allowed=" | ".join(KINDS),
        )
    if tokenizer == "bpe":
        check_vocab_size(vocab_size)
    if not 0 < val_fraction < 1:
        raise ConfigError("out_of_range", key="dataset.val_fraction", got=val_fraction, wanted="> 0, < 1")
    counts = {"shard_tokens": (shard_tokens, 1000), "max_tokens": (max_tokens, 1), "processes": (processes, 1)}
    for key, (got, least) in counts.items():
        if got is not None and got < least:
            raise ConfigError("out_of_range", key=f"dataset.{key}", got=got, wanted=f">= {least}")
    return []


def facts(path: str, **options) -> list:
    """Name, size and time of each file of a local corpus."""
    files = local(path)
    around = Path(path) if Path(path).is_dir() else Path(path).parent
    states = ((file.relative_to(around).as_posix(), file.stat()) for file in files)
    return [[name, state.st_size, state.st_mtime_ns] for name, state in states]


def local(path: str) -> list[Path]:
    """The files of a corpus on this machine; none if it lies elsewhere."""
    return [] if "://" in path or not Path(path).exists() else text_files(Path(path), None)


def coder_for(wanted: str | Tokenizer, corpus: Corpus, vocab_size: int, val_fraction: float) -> Tokenizer:
    """The tokenizer that dataset.tokenizer names, or the one given; bpe is made from the first texts."""

    def pieces() -> Iterator[str]:
        left = LEARNED_ON
        for found in corpus.documents(itertools.chain.from_iterable(corpus.parts(corpus.size))):
            # 合并规则只能取自训练部分，否则验证偏低
            if split_of(found.text, val_fraction) == "train":
                yield found.text
                left -= len(found.text)
            if left <= 0:
                return

    return tokenizer_for("gpt2" if wanted == "auto" else wanted, pieces, vocab_size)


def prepare(
    folder: Path, path: str | None, tokenizer: str | Tokenizer, subset: str | None, split: str, revision: str | None,
    column: str, vocab_size: int, shard_tokens: int | None, val_fraction: float, max_tokens: int | None,
    processes: int | None = None,
) -> None:
    """Tokenise the corpus in parallel processes and write the data set folder."""
    sources(
        path, tokenizer, subset, split, revision, column, vocab_size, shard_tokens, val_fraction, max_tokens, processes,
    )
    corpus = find_corpus(path, subset, split, revision, column)
    say("{path}: {size} in {files:,} files", path=path, size=file_size(corpus.size), files=len(corpus.files))
    with unchanged(local(path)) as check:
        write_shards(
            folder, name="hf", source=" ".join(filter(None, (path, subset, corpus.revision))), corpus=corpus,
            tokenizer=coder_for(tokenizer, corpus, vocab_size, val_fraction), shard_tokens=shard_tokens,
            val_fraction=val_fraction, max_tokens=max_tokens, processes=processes, check=check,
        )


if __name__ == "__main__":
    from nanogpt.data.corpus import run_prepare

    run_prepare("hf")
