"""Text files as people have them: which files, in which encoding, read piece by piece and checked not to change meanwhile."""

import codecs
import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from nanogpt.files import sha256
from nanogpt.messages import ConfigError

# 每次读这么多字节：大文件不进内存
PIECE = 4 * 2**20
TEXT_SUFFIXES = (".txt", ".md", ".text")
# 常被当成文本给进来的文件，按开头几个字节认
BINARY = {
    b"%PDF-": "PDF", b"PK\x03\x04": "ZIP / DOCX / EPUB", b"\xd0\xcf\x11\xe0": "DOC", b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG", b"GIF8": "GIF",
    b"\x1f\x8b": "GZIP", b"7z\xbc\xaf\x27": "7Z", b"Rar!\x1a": "RAR", b"\xfd7zXZ": "XZ", b"BZh": "BZIP2", b"\x7fELF": "ELF",
    b"SQLite format 3\0": "SQLite",
}
# 大于 127 的字节
HIGH = bytes(range(128, 256))
# GB18030 的文字里，连着这么多这样的字节恰好都合乎 UTF-8 的机会不到十亿分之一
STRETCH = 48
HALF = re.compile("[\ud800-\udfff]")
NO_TEXTS = ("idna", "punycode", "unicode-escape", "raw-unicode-escape", "undefined")
# 这些解码器不会给出半个代理对
WHOLE = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let what the system refuses inside name this file: read() alone does not say which."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def digest(path: Path) -> str:
    """Hex SHA-256 of a text file."""
    with naming(path):
        return sha256(path)


def detect_encoding(path: Path) -> str:
    """UTF-8, UTF-16 (with or without a byte-order mark) or GB18030, decided by reading the whole file; ConfigError for anything else."""
    with naming(path), path.open("rb") as file:
        head = file.read(PIECE)
    if kind := next((kind for magic, kind in BINARY.items() if head.startswith(magic)), None):
        raise ConfigError("binary_file", path=path, kind=kind)
    for mark, name in ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")):
        if head.startswith(mark):
            return name
    # 没有 BOM 的 UTF-16：英文里一半字节是 0，位置的奇偶说明字节序
    zeros = [head[0::2].count(0), head[1::2].count(0)]
    if max(zeros) > len(head) // 8 and max(zeros) > 10 * min(zeros):
        return "utf-16-le" if zeros[1] > zeros[0] else "utf-16-be"
    try:
        for _ in decode_pieces(path, "utf-8"):
            pass
        return "utf-8"
    except UnicodeDecodeError as utf8_error:
        # 只差最后半个字，或只多出半个代理对（CESU-8）：是坏了的 UTF-8，不是碰巧能读通的 GB18030
        damaged = is_cut_utf8(path, utf8_error) or is_whole(path, "utf-8", "surrogatepass")
        line = stretch_of_utf8(path) if not damaged and is_whole(path, "gb18030") else None
        if line == 0:
            return "gb18030"
        if line:
            raise ConfigError("mixed_encodings", path=path, line=line, offset=utf8_error.start) from None
        raise ConfigError("undecodable", path=path, offset=utf8_error.start, encoding="UTF-8 / UTF-16 / GB18030") from None


def is_whole(path: Path, encoding: str, errors: str = "strict") -> bool:
    """Whether the file is of this encoding from end to end."""
    try:
        for _ in decode_pieces(path, encoding, errors):
            pass
        return True
    except UnicodeDecodeError:
        return False


def is_cut_utf8(path: Path, error: UnicodeDecodeError) -> bool:
    """Whether the file is UTF-8 with characters beyond ASCII up to half a character at its very end."""
    if error.reason != "unexpected end of data" or error.start < path.stat().st_size - 3:
        return False
    with path.open("rb") as file:
        head = file.read(min(error.start, PIECE))
    return not head.isascii()


def stretch_of_utf8(path: Path) -> int:
    """The number of a line up to which successive lines hold so much UTF-8 that GB18030 text cannot look like it; 0 where there is none."""
    run = number = 0
    with path.open("rb") as file:
        # 没有换行的文件也一段一段地读
        while line := file.readline(PIECE):
            number += 1
            high = len(line) - len(line.translate(None, HIGH))
            if not high:
                continue
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                run = 0
                continue
            run += high
            if run >= STRETCH:
                return number
    return 0


def check_encoding(encoding: str) -> None:
    """Refuse what is no encoding of text."""
    try:
        found = codecs.lookup(encoding) if encoding != "auto" else None
    except (LookupError, ValueError):
        raise ConfigError("unknown_encoding", got=encoding) from None
    # base64、zlib、rot13 之类不是文字的编码；idna、punycode 等也解不出一篇文章
    if found and (not found._is_text_encoding or found.name in NO_TEXTS):
        raise ConfigError("unknown_encoding", got=encoding)


def decode_pieces(path: Path, encoding: str, errors: str = "strict") -> Iterator[str]:
    """Yield a file's text in pieces; UnicodeDecodeError.start is the offset in the file."""
    decoder = codecs.getincrementaldecoder(encoding)(errors)
    read = 0
    with naming(path), path.open("rb") as file:
        while piece := file.read(PIECE):
            pending = len(decoder.getstate()[0])
            try:
                yield decoder.decode(piece)
            except UnicodeDecodeError as error:
                error.start += read - pending
                raise
            read += len(piece)
        pending = len(decoder.getstate()[0])
        try:
            yield decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            error.start += read - pending
            raise


def iter_text(path: Path, encoding: str = "auto") -> Iterator[str]:
    """Yield the text of one file in pieces that end at line breaks where there are any; LF line ends."""
    check_encoding(encoding)
    if encoding == "auto":
        encoding = detect_encoding(path)
    pending = ""
    try:
        for piece in decode_pieces(path, encoding):
            if encoding not in WHOLE and HALF.search(piece):
                # UTF-7 等能写出半个代理对，之后没有文件存得下它
                raise ConfigError("half_character", path=path, encoding=encoding)
            pending += piece
            # 切在换行处，BPE 的词不会被劈开；\r\n 也不会被分到两段
            cut = pending.rfind("\n") + 1
            if not cut and len(pending) > 2 * PIECE:
                # 整个文件一行也没有换行：按长度切，内存才有上限
                cut = PIECE
            if cut:
                yield pending[:cut].replace("\r\n", "\n")
                pending = pending[cut:]
        if pending:
            yield pending.replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ConfigError("undecodable", path=path, offset=error.start, encoding=encoding) from None
    except UnicodeError as error:
        # UTF-16 之类的解码器有时不说位置
        raise ConfigError("undecodable", path=path, offset="?", encoding=f"{encoding} ({error})") from None


def own_source(path: str | None, *, unnamed: str) -> Path:
    """The file or folder that dataset.path names; ConfigError where there is none, with the message `unnamed` where it names nothing."""
    if path is None:
        raise ConfigError(unnamed)
    if not Path(path).exists():
        raise ConfigError("missing_file", key="dataset.path", got=path)
    return Path(path)


def text_files(path: Path, suffixes: tuple[str, ...] | None = TEXT_SUFFIXES) -> list[Path]:
    """The file itself, or all files of these kinds (None: of any) below a folder in a fixed order; hidden ones are passed over."""
    if not path.is_dir():
        # 管道与设备读不到头：不算文件
        return [path] if path.is_file() else []
    def wanted(name: str) -> bool:
        # macOS 在别的文件系统上给每个文件配一个 ._ 开头的，里面不是文字
        return not name.startswith(".") and (suffixes is None or os.path.splitext(name)[1].lower() in suffixes)

    # os.walk 比 rglob 快几倍，一百万个文件时差一分钟；它不进入链接指向的文件夹，不会绕圈
    found = []
    for folder, inner, names in os.walk(path):
        inner[:] = [name for name in inner if not name.startswith(".")]
        found += [os.path.join(folder, name) for name in names if wanted(name)]
    return [Path(p) for p in sorted(found, key=lambda p: p.split(os.sep)) if os.path.isfile(p)]


def state_of(files: Iterable[Path]) -> list[tuple[int, int, int]]:
    """What changes when a file is written to or replaced."""
    return [(stat.st_size, stat.st_mtime_ns, stat.st_ino) for stat in map(os.stat, files)]


@contextlib.contextmanager
def unchanged(files: list[Path]) -> Iterator[Callable[[], None]]:
    """Around the several passes over some files; yields the check that nobody has written to them since, which refuses the text otherwise."""
    before = state_of(files)

    def check() -> None:
        for file, then, now in zip(files, before, state_of(files)):
            if then != now:
                raise ConfigError("text_changed", path=file)

    try:
        yield check
    except (ConfigError, OSError):
        # 读到一半被改的，错误会说别的事：词表里没有的字、半个字
        check()
        raise


def stem_of(source: Path) -> str:
    """The name of a source as the beginning of a folder's name."""
    # 名字很长的文件：后面还要加指纹与临时后缀，255 字节装得下
    return re.sub(r"[^\w-]", "_", source.resolve().stem)[:40]
