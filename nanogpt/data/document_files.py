"""Reads the documents of large corpora, in ranges of bytes that any number of processes can share.

Files are .parquet, .jsonl (.ndjson, .json: one object in each line) or .txt (.md, .text: each file is one document), in
UTF-8; they lie in a local folder, behind an address of fsspec (s3://…) or in a data set of the Hugging Face hub.
"""

# 大语料的原文：本机文件夹、对象存储、hub 上的数据集，读法只有一种：一个文件的一段字节
# 一条记录属于它的第一个字节所在的那一段（parquet 是 row group）：段怎么切只看文件大小，各段可以分给任意多个进程
# hub 的数据集由 datasets 说出是哪些文件（钉在一个 commit 上），文件仍在这里读：数据集自带的代码从不执行
# jsonl 与 txt 不需要别的库；parquet 要 pyarrow，远处的要 fsspec 与它那一种存储的库

import codecs
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from nanogpt.base.hashed_json import reason_of
from nanogpt.base.language import ConfigError
from nanogpt.data.source_text import text_files

# 一个文件夹里有几种时，只取排在前面的一种：旁边的 README、LICENSE 不是语料
KINDS = {"parquet": (".parquet",), "jsonl": (".jsonl", ".ndjson", ".json"), "txt": (".txt", ".text", ".md")}
# 压缩的从头解到尾，切不成段
PACKED = (".gz", ".bz2", ".xz", ".zst")
# 远处的文件一次取这么多；txt 一段文字约这么长（字节）；更长的一行不是一篇文章
FETCHED, PIECE, LONGEST_LINE = 2**23, 2**16, 2**27
# 没有换行的 txt，到这么多个 PIECE 就切
MOST_PIECES = 64
# 从 parquet 里一次取这么多行
ROWS = 256


class Range(NamedTuple):
    """Bytes begin … end - 1 of a file; end None: to its end, however long it is."""

    # 压缩的文件解开有多长，事先不知道：end 才可以是 None

    file: str
    begin: int
    end: int | None


class Found(NamedTuple):
    """A piece of text, whether a document ends with it, and how many bytes of the file it took."""

    # txt 的一篇可以有几 GB，一段一段地给；字节数只用于进度

    text: str
    ends: bool
    size: int


@dataclass(frozen=True)
class Corpus:
    """Files of one kind, (address, size in bytes) each, and the column of their text."""

    # 进程之间传的就是它：几千个名字，不是内容

    files: tuple[tuple[str, int], ...]
    kind: str
    column: str
    named: str
    """What people call it."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size in self.files)

    @property
    def revision(self) -> str | None:
        """The commit of a data set on the hub."""
        found = re.search(r"@([0-9a-f]{40})/", self.files[0][0])
        return found and found[1]

    def parts(self, size: int) -> list[list[Range]]:
        """The corpus in pieces of `size` bytes, each of one or more ranges; a packed file is not divided."""
        found, room = [[]], size
        for file, total in self.files:
            at, whole = 0, file.endswith(PACKED)
            while at < total:
                if not room:
                    found.append([])
                    room = size
                end = total if whole else min(total, at + room)
                found[-1].append(Range(file, at, None if whole else end))
                room, at = max(0, room - (end - at)), end
        return found

    def documents(self, part: Iterable[Range]) -> Iterator[Found]:
        """The texts of a piece, in their order; ConfigError names a place that cannot be read."""
        read = {"jsonl": _records, "txt": _texts, "parquet": _rows}[self.kind]
        for span in part:
            try:
                with opened(span.file) as stream:
                    yield from read(stream, span, self.column)
            except ConfigError:
                raise
            except Exception as error:
                # 网络、解压、parquet 的错误类型由各自的库决定，都意味着读不到
                raise unreadable("dataset.path", span.file, error) from None


def unreadable(key: str, got: str, error: Exception) -> ConfigError:
    """That something cannot be read, in one line."""
    return ConfigError(
        "{key}: {got} cannot be read ({reason}); check its name, the network and your access to it",
        key=key, got=got, reason=reason_of(error),
    )


def opened(file: str) -> BinaryIO:
    """A local file or one behind an address of fsspec, for reading; packed ones are unpacked as they are read."""
    if "://" not in file and not file.endswith(PACKED):
        return open(file, "rb")
    import fsspec

    # fsspec 自己的 readline 是 Python 写的，慢
    return io.BufferedReader(fsspec.open(file, "rb", compression="infer").open(), FETCHED)


# ---- 三种文件 ----


def _lines(stream: BinaryIO, span: Range, longest: int) -> Iterator[tuple[int, bytes]]:
    """(place, line with its end) of the lines that begin in a range; one longer than `longest` comes in pieces."""
    at = span.begin
    if at:
        # 前一段读完了它的最后一行：从下一行的开头起
        at = stream.seek(at - 1)
        while line := stream.readline(longest):
            at += len(line)
            if line.endswith(b"\n"):
                break
    whole = True
    while (not whole or span.end is None or at < span.end) and (line := stream.readline(longest)):
        yield at, line
        at, whole = at + len(line), line.endswith(b"\n")


def _records(stream: BinaryIO, span: Range, column: str) -> Iterator[Found]:
    for at, line in _lines(stream, span, LONGEST_LINE):
        if not line.strip():
            continue
        try:
            if len(line) == LONGEST_LINE:
                raise ValueError(f"longer than {LONGEST_LINE:,} bytes")
            row = json.loads(line.removeprefix(codecs.BOM_UTF8) if not at else line)
            if not isinstance(row, dict):
                raise ValueError(f"a {type(row).__name__}")
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                "labelled_json", file=span.file, line=_number(span.file, at), reason=str(error).partition("\n")[0],
                example=json.dumps({column: "…"}, ensure_ascii=False),
            ) from None
        if column not in row:
            raise without_column(f"{span.file}:{_number(span.file, at)}", column, row)
        yield Found(_text(row[column], span.file, column), True, len(line))


def _number(file: str, at: int) -> int:
    """The number of the line that begins at a place."""
    with opened(file) as stream:
        pieces = iter(lambda: stream.read(min(PIECE, at - stream.tell())), b"")
        return 1 + sum(piece.count(b"\n") for piece in pieces)


def without_column(place: str, column: str, have: Iterable[str]) -> ConfigError:
    """That records have no such column."""
    return ConfigError(
        "dataset.column={got}: {place} has no such column; choose one of: {have}",
        got=column, place=place, have=", ".join(map(str, have)) or "-",
    )


def _text(value: Any, file: str, column: str) -> str:
    if not isinstance(value, str | None):
        raise ConfigError(
            "dataset.column={got}: {file} holds a value of type {kind} there, no text; choose another column",
            got=column, file=file, kind=type(value).__name__,
        )
    return value or ""


def _texts(stream: BinaryIO, span: Range, column: str) -> Iterator[Found]:
    decoder, kept, size, first = codecs.getincrementaldecoder("utf-8")(), [], 0, not span.begin

    def decoded(line: bytes, at: int, *, final: bool = False) -> str:
        pending = len(decoder.getstate()[0])
        try:
            return decoder.decode(line, final)
        except UnicodeDecodeError as error:
            raise ConfigError(
                "{path}: byte {offset} is not UTF-8; save the file as UTF-8, or read it with dataset=text_file, which "
                "knows other encodings",
                path=span.file, offset=at - pending + error.start,
            ) from None

    at = span.begin
    for at, line in _lines(stream, span, PIECE):
        kept.append(decoded(line, at))
        size += len(line)
        # 没有换行的文件也要切，内存才有上限；恰好到了文件末尾的，留给下面
        if size >= PIECE and (line.endswith(b"\n") or size >= MOST_PIECES * PIECE) and stream.peek(1):
            yield Found(_plain(kept, first), False, size)
            kept, size, first = [], 0, False
    if kept:
        ends = not stream.peek(1)
        kept.append(decoded(b"", at + size, final=ends))
        yield Found(_plain(kept, first), ends, size)


def _plain(kept: list[str], first: bool) -> str:
    found = "".join(kept).replace("\r\n", "\n").replace("\r", "\n")
    return found.removeprefix("\ufeff") if first else found


def _rows(stream: BinaryIO, span: Range, column: str) -> Iterator[Found]:
    parquet = _parquet()
    # 不预读整个 row group、不另开线程：内存有上限，中途停下也不留线程
    file = parquet.ParquetFile(stream, pre_buffer=False, buffer_size=PIECE)
    names = file.schema_arrow.names
    if column not in names:
        raise without_column(span.file, column, names)
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        first = group.column(0)
        begin = min(first.data_page_offset, first.dictionary_page_offset or first.data_page_offset)
        if begin < span.begin or (span.end is not None and begin >= span.end):
            continue
        size = sum(group.column(i).total_compressed_size for i in range(group.num_columns))
        for batch in file.iter_batches(ROWS, row_groups=[number], columns=[column], use_threads=False):
            for value in batch.column(0).to_pylist():
                yield Found(_text(value, span.file, column), True, size // group.num_rows)


def _parquet() -> Any:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ConfigError("missing_package", what=".parquet", package="datasets") from None
    return parquet


# ---- 有哪些文件 ----


def find_corpus(path: str, subset: str | None, split: str, revision: str | None, column: str) -> Corpus:
    """The corpus that dataset.path names: a local file or folder, an address of fsspec, or OWNER/NAME on the hub."""
    if "://" in path:
        files = _remote_files(path)
    elif Path(path).exists():
        files = [(str(file), file.stat().st_size) for file in text_files(Path(path), None)]
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not path.startswith((".", "/")):
        files = _hub_files(path, subset, split, revision)
    else:
        raise ConfigError("missing_file", key="dataset.path", got=path)
    return _of_one_kind(path, files, column)


def _of_one_kind(path: str, files: list[tuple[str, int]], column: str) -> Corpus:
    for kind, suffixes in KINDS.items():
        chosen = tuple(one for one in files if one[1] and _suffix(one[0]) in suffixes)
        if kind == "parquet" and any(file.endswith(PACKED) for file, _ in chosen):
            continue
        if chosen:
            if kind == "parquet":
                # 少了库，一开始就说，不等几个进程各说一遍
                _parquet()
            return Corpus(chosen, kind, column, path)
    kinds = " ".join(suffix for suffixes in KINDS.values() for suffix in suffixes)
    raise ConfigError(
        "dataset.path={got} has no file with text in it ({kinds}, perhaps with {packed} behind that); give another "
        "path",
        got=path, kinds=kinds, packed=" ".join(PACKED),
    )


def _suffix(file: str) -> str:
    """The suffix that says what is in a file, without that of its packing."""
    name, last = os.path.splitext(file.lower())
    return os.path.splitext(name)[1] if last in PACKED else last


def _remote_files(path: str) -> list[tuple[str, int]]:
    try:
        import fsspec

        filesystem, inside = fsspec.core.url_to_fs(path)
        found = filesystem.find(inside, detail=True)
        return [(filesystem.unstrip_protocol(name), int(found[name]["size"])) for name in sorted(found)]
    except Exception as error:
        # 哪一种存储，错误就是哪一种库的：没装的库、没有的桶、断了的网
        raise unreadable("dataset.path", path, error) from None


def _hub_files(path: str, subset: str | None, split: str, revision: str | None) -> list[tuple[str, int]]:
    """The files of a data set on the hub, at one commit."""
    try:
        import datasets
    except ImportError:
        raise ConfigError("missing_package", what=f"dataset.path={path}", package="datasets") from None
    try:
        # 4.0 起不执行数据集自带的脚本：有脚本的在这里就被拒绝
        chosen = datasets.load_dataset_builder(path, subset, revision=revision).config.data_files or {}
        if split not in chosen:
            raise ValueError(f"dataset.split={split}: choose one of {', '.join(map(str, chosen)) or '-'}")
        return _with_sizes([str(file) for file in chosen[split]])
    except Exception as error:
        raise unreadable("dataset.path", path, error) from None


def _with_sizes(files: list[str]) -> list[tuple[str, int]]:
    import fsspec

    filesystem, _ = fsspec.core.url_to_fs(files[0])
    names = [filesystem._strip_protocol(file) for file in files]
    # 一个文件夹问一次，而不是一个文件一次
    folders = {name.rpartition("/")[0] for name in names}
    sizes = {one["name"]: one["size"] for folder in sorted(folders) for one in filesystem.ls(folder, detail=True)}
    return [(file, int(sizes.get(name) or filesystem.size(name))) for file, name in zip(files, names)]
