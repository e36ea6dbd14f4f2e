"""Reads files of records, one JSON object a line or a JSON list of them, each with the number of its line."""

# 一条条记录的文件：JSON Lines，或整个是一个 JSON 列表；错在第几行说得准
# data/labelled 与 data/chat 的 prepare.py 都用它，各自的例子（example）由它们给；编码与 BOM 由 source_text 认

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from nanogpt.base.language import ConfigError
from nanogpt.data.source_text import iter_text

BLANK = re.compile(r"[ \t\n\r]*")
# 一篇至多这么多字：十部长篇小说；再长就不是一篇，而是少了换行或引号
LONGEST_TEXT = 2**25


def lines_of(file: Path, pieces: Iterable[str]) -> Iterator[str]:
    """The lines of a file's text with their ends."""
    pending, number = "", 1
    for piece in pieces:
        # 不用 splitlines：JSON 字符串里可以有 U+2028 之类
        *whole, pending = (pending + piece).split("\n")
        yield from (line + "\n" for line in whole)
        number += len(whole)
        if len(pending) > LONGEST_TEXT:
            # 多半是整个文件没有换行：再读下去只会吃光内存
            raise ConfigError(
                "{file}, line {line}: longer than {most:,} characters, too many for a single text; put each text on "
                "a line of its own",
                file=file, line=number, most=LONGEST_TEXT,
            )
    if pending:
        yield pending


def rows_of_json(file: Path, encoding: str, example: str) -> Iterator[tuple[int, dict]]:
    """(line number, object) of each line that is not blank, or of each item where the whole file is one list."""
    pieces = iter_text(file, encoding)
    first = next(pieces, "")
    if first.lstrip().startswith("["):
        yield from rows_of_list(file, first + "".join(pieces), example)
        return
    for number, line in enumerate(lines_of(file, itertools.chain([first], pieces)), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=without_repeats)
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                "labelled_json", file=file, line=number, reason=str(error).partition("\n")[0], example=example,
            ) from None
        yield number, as_object(file, number, row, example)


def rows_of_list(file: Path, content: str, example: str) -> Iterator[tuple[int, dict]]:
    """(line number, object) of each item of a JSON list."""
    # 一项一项地解：错在第几行说得准
    decoder = json.JSONDecoder(object_pairs_hook=without_repeats)
    at, line, counted = content.index("[") + 1, 1, 0
    while True:
        at = BLANK.match(content, at).end()
        line, counted = line + content.count("\n", counted, at), at
        try:
            if content[at : at + 1] == "]":
                if content[at + 1 :].strip():
                    raise ValueError("there is more behind the list")
                return
            row, at = decoder.raw_decode(content, at)
            at = BLANK.match(content, at).end()
            if content[at : at + 1] not in ("]", ","):
                raise ValueError("no comma, no ]")
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                "{file}, line {line}: the list of records breaks off here ({reason}); correct it, or write one object "
                "in each line, for example {example}",
                file=file, line=line, reason=getattr(error, "msg", error), example=example,
            ) from None
        yield line, as_object(file, line, row, example)
        at += content[at] == ","


def as_object(file: Path, line: int, row, example: str) -> dict:
    """The row, if it is an object."""
    if not isinstance(row, dict):
        raise ConfigError("labelled_json", file=file, line=line, reason=f"a {type(row).__name__}", example=example)
    return row


def without_repeats(pairs: list[tuple[str, object]]) -> dict:
    """The object of these pairs; ValueError if a name occurs twice, since one of its values would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(n for n in names if names.count(n) > 1)!r} stands twice")
    return found
