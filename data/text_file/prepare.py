"""Text of your own: one file, or all .txt, .md and .text files of a folder; the last part is held out."""

# 使用者自己的文字（dataset=text_file）：一个文件或一个文件夹，编码自己认，最后一段留作验证
# 大文件从不整个进内存：边读边编码边写，写完才切出末尾；几遍之间文件被改就拒绝
# 留最后一段而不是随机抽：随机切分会让同一段的两半分落两边，验证损失虚低

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from nanogpt.base.config import RECORD_SUFFIXES
from nanogpt.base.language import ConfigError
from nanogpt.data.corpus import check_tokenizer, encoded, tokenizer_for, write_split
from nanogpt.data.source_text import check_encoding, iter_text, own_source, resolved, text_files, unchanged
from nanogpt.data.tokenizer import Tokenizer

# 一个输入加一个目标：再少就没有可学、可验证的
SHORTEST = 2


def sources(
    path: str | None, tokenizer: str | Tokenizer, encoding: str, val_fraction: float, vocab_size: int | None = None
) -> list[Path]:
    """The files to read; ConfigError for options that cannot be right."""
    source = own_source(path, unnamed="no_text_path")
    check_tokenizer(tokenizer, vocab_size)
    check_encoding(encoding)
    if not 0 < val_fraction < 1:
        raise ConfigError("out_of_range", key="dataset.val_fraction", got=val_fraction, wanted="> 0, < 1")
    files = text_files(source)
    if source.suffix.lower() in RECORD_SUFFIXES and not source.is_dir():
        records = files
    else:
        # 文件夹里一个文本也没有，才看是不是一条条的记录
        records = [] if files else text_files(source, RECORD_SUFFIXES)
    if records:
        raise ConfigError(
            "dataset.path={got}: {file} holds records, no running text; type dataset=labelled dataset.path={got}, or "
            "rename it to .txt to learn it as it stands",
            got=path, file=records[0].name,
        )
    if not any(file.stat().st_size for file in files):
        raise ConfigError("empty_text", key="dataset.path", got=path)
    return files


def pieces(files: list[tuple[Path, str]]) -> Iterator[str]:
    """The text of all (file, encoding), one after the other."""
    for file, encoding in files:
        yield from iter_text(file, encoding)


def first(stream: Iterable[str], characters: int) -> Iterator[str]:
    """The first `characters` characters of a text."""
    for piece in stream:
        if characters <= 0:
            return
        yield piece[:characters]
        characters -= len(piece)


def prepare(
    folder: Path, path: str | None, tokenizer: str | Tokenizer, encoding: str, val_fraction: float,
    vocab_size: int | None = None,
) -> None:
    """Tokenise the text piece by piece and write the data set folder."""
    # 给了 dataset.dir 就没有人替它核对过
    paths = sources(path, tokenizer, encoding, val_fraction, vocab_size)
    with unchanged(paths) as check:
        write(folder, Path(path), paths, tokenizer, encoding, val_fraction, vocab_size, check)


def write(
    folder: Path, source: Path, paths: list[Path], tokenizer, encoding: str, val_fraction: float,
    vocab_size: int | None, check: Callable[[], None],
) -> None:
    """Write the data set folder from checked options; check() is called before the folder appears."""
    # 判断编码要通读文件，下面还要读两三遍：只判断一次
    files = resolved(paths, encoding)

    def made_from() -> Iterator[str]:
        if tokenizer != "bpe":
            return pieces(files)
        # 合并规则只能取自训练部分，否则验证偏低
        return first(pieces(files), round(sum(map(len, pieces(files))) * (1 - val_fraction)))

    coder = tokenizer_for(tokenizer, made_from, vocab_size)

    def ids() -> Iterator[np.ndarray]:
        yield from encoded(coder, pieces(files))
        # 最后一段写完、还没改名之前：读的几遍必须是同一份文字
        check()

    def train_tokens(total: int) -> int:
        train = total - round(total * val_fraction)
        if not total:
            raise ConfigError("empty_text", key="dataset.path", got=source)
        if train < SHORTEST or total - train < SHORTEST:
            raise ConfigError(
                "dataset.path={got}: {tokens} tokens, {val} of them for validation, are too few (at least {least} "
                "each); give more text or another dataset.val_fraction",
                got=source, tokens=total, val=total - train, least=SHORTEST,
            )
        return train

    write_split(
        folder, name="text_file", source=source.name, tokenizer=coder, stream=ids(), train_tokens=train_tokens,
    )


if __name__ == "__main__":
    from nanogpt.data.corpus import run_prepare

    run_prepare("text_file")
