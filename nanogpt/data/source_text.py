"""Reads text files as people have them: finds the files, guesses the encoding, yields the text piece by piece."""

# 使用者手里的文本：有哪些文件、是什么编码、一段一段地读，读的几遍之间没有被改过
# 编码先看 BOM 与 UTF-8、UTF-16，再认中文的 GB18030，最后请 charset-normalizer 在 OTHERS 里选，都不像就让人自己说
# “解得开”不等于“是”：GB18030 读得通很多别的编码，所以还要看读出来的像不像文字
# 大文件从不整个进内存；data/*/prepare.py 与数据集的指纹（corpus.identity_of）都用它
# 里面的比例与门槛是拿真实文件试出来的，改动之前先跑 tests/test_texts_as_people_have_them.py

import codecs
import contextlib
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from nanogpt.base.console import Console
from nanogpt.base.files import sha256
from nanogpt.base.language import ConfigError, say, text

# 每次读这么多字节：大文件不进内存
PIECE = 4 * 2**20
# 有这么多段，才看得出进度条在走
MANY = 4
TEXT_SUFFIXES = (".txt", ".md", ".text")
# 常被当成文本给进来的文件，按开头几个字节认
BINARY = {
    b"%PDF-": "PDF", b"PK\x03\x04": "ZIP / DOCX / EPUB", b"\xd0\xcf\x11\xe0": "DOC", b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG", b"GIF8": "GIF", b"\x1f\x8b": "GZIP", b"7z\xbc\xaf\x27": "7Z", b"Rar!\x1a": "RAR",
    b"\xfd7zXZ": "XZ", b"BZh": "BZIP2", b"\x7fELF": "ELF", b"SQLite format 3\0": "SQLite",
}
# UTF-32 的记号以 UTF-16 的开头，要先看
MARKS = {
    "utf-8": (codecs.BOM_UTF8,), "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
# 大于 127 的字节
HIGH = bytes(range(128, 256))
# GB18030 的文字里，连着这么多这样的字节恰好都合乎 UTF-8 的机会不到十亿分之一
STRETCH = 48
# 既不是 UTF 又不是明显的 GB18030 时，让 charset-normalizer 在这些里面选；一样像、或读出来一样时，取排在前面的
OTHERS = {
    "gb18030": "GB18030", "cp1252": "Windows-1252", "cp1250": "Windows-1250", "cp1251": "Windows-1251",
    "cp1253": "Windows-1253", "cp1254": "Windows-1254", "cp1255": "Windows-1255", "cp1256": "Windows-1256",
    "koi8_r": "KOI8-R", "big5": "Big5", "cp932": "Shift-JIS", "euc_jp": "EUC-JP", "cp949": "EUC-KR",
    "tis_620": "TIS-620",
}
# 这些把一半的字节都当成字母，几个坏字节也读得通：不到这么多字节不作数
ALL_LETTERS, ENOUGH = ("cp1251", "cp1253", "cp1255", "cp1256", "koi8_r", "tis_620"), 16
# 把更多的字也收进来的版本
WIDER = {"big5": ("big5", "cp950", "big5hkscs"), "tis_620": ("tis_620", "cp874")}
# 词与词之间的：引号、破折号、省略号、不换行的空格，以及中日韩的标点
TYPOGRAPHY = frozenset("‘’‚“”„‹›«»–—…·•¿¡§°\xa0、。，．・：；？！（）「」『』《》【】〈〉～ー　")
# 判断时看这么多字节的非 ASCII 的行；再多，结论也不变
SAMPLE = 2**16
# 混乱程度与语言的相符程度差在这以内，就算一样像
AS_CHAOTIC, AS_COHERENT = 0.01, 0.03
UTF8_CHARACTER = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
GB18030_CHARACTER = re.compile(rb"[\x81-\xfe][0-9][\x81-\xfe][0-9]|[\x81-\xfe][\x40-\xfe]")
GB18030_MARKS = {mark.encode("gb18030") for mark in "，。、！？"}
HALF = re.compile("[\ud800-\udfff]")
NO_TEXTS = ("idna", "punycode", "unicode-escape", "raw-unicode-escape", "undefined")
# 这些解码器不会给出半个代理对
WHOLE = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the path into every OSError raised inside: read() alone does not say which file it was."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def digest(path: Path) -> str:
    """Hex SHA-256 of a text file."""
    with naming(path):
        return sha256(path)


def detect_encoding(path: Path, *, key: str | None = "dataset.encoding") -> str:
    """The encoding of a text, decided by reading the whole file; ConfigError if none is plausible.

    UTF-8 and UTF-16 (with or without a byte-order mark) come first, then what the bytes look like (likely_encoding).
    `key` is where a person can name the encoding, if anywhere.
    """
    with naming(path), path.open("rb") as file:
        head = file.read(PIECE)
    if kind := next((kind for magic, kind in BINARY.items() if head.startswith(magic)), None):
        raise ConfigError("{path} is a {kind} file, no text; save its text as UTF-8", path=path, kind=kind)
    if name := next((name for name, marks in MARKS.items() if head.startswith(marks)), None):
        # 以 NUL 开头的 UTF-16 也是这几个字节
        return "utf-16" if name == "utf-32" and not is_whole(path, name) else name
    # 没有 BOM 的 UTF-16：英文里一半字节是 0，位置的奇偶说明字节序
    zeros = [head[0::2].count(0), head[1::2].count(0)]
    if max(zeros) > len(head) // 8 and max(zeros) > 10 * min(zeros):
        return "utf-16-le" if zeros[1] > zeros[0] else "utf-16-be"
    try:
        for _ in decode_pieces(path, "utf-8"):
            pass
        return "utf-8"
    except UnicodeDecodeError as utf8_error:
        # 只差最后半个字，或只多出半个代理对（CESU-8）：是坏了的 UTF-8，不是碰巧能读通的别的编码
        damaged = is_cut_utf8(path, utf8_error) or is_whole(path, "utf-8", "surrogatepass")
        if not damaged and is_whole(path, "gb18030") and (line := stretch_of_utf8(path)):
            raise ConfigError(
                "{path}: the lines up to {line} hold UTF-8, but byte {offset} does not: the file mixes encodings; "
                "save all of it as UTF-8",
                path=path, line=line, offset=utf8_error.start,
            ) from None
        if not damaged and (found := likely_encoding(path)):
            return found
        remedy = text(
            "save it as UTF-8, or name its encoding: {key}=…",
            key=key,
        ) if key else text("save_as_utf8")
        raise ConfigError(
            "{path}: byte {offset} is not UTF-8, and the file is not plausible in any other encoding that is known "
            "here; {remedy}",
            path=path, offset=utf8_error.start, remedy=remedy,
        ) from None


def likely_encoding(path: Path) -> str | None:
    """The encoding other than UTF-8 and UTF-16 that the bytes look like, or None.

    The whole file is valid in the encoding that is returned.
    """
    sample = lines_beyond_ascii(path)
    high = len(sample) - len(sample.translate(None, HIGH))
    if 4 * sum(map(len, UTF8_CHARACTER.findall(sample))) > 3 * high:
        # 坏了几个字节的 UTF-8：单字节的编码样样都读得通，读出来是乱码
        return None
    candidates = [name for name in OTHERS if high >= ENOUGH or name not in ALL_LETTERS]
    chinese = how_chinese(sample)
    if chinese > 0 and is_whole(path, "gb18030"):
        return "gb18030"
    if chinese < 0:
        candidates.remove("gb18030")
    # 只有不是 UTF 的文件才用得着，导入要 0.1 秒
    from charset_normalizer import from_bytes

    # 没有一个 ASCII 字节的文件，取样可能断在半个字上
    found = next(filter(None, (list(from_bytes(part, cp_isolation=candidates)) for part in (sample, sample[:-1]))), [])
    alike = [
        match for match in found
        if match.chaos <= found[0].chaos + AS_CHAOTIC and match.coherence >= found[0].coherence - AS_COHERENT
    ]
    names = {name for match in alike for name in match.could_be_from_charset}
    ranked = [name for candidate in candidates if candidate in names for name in WIDER.get(candidate, (candidate,))]
    for name in ranked:
        if is_whole(path, name) and is_writing(sample.decode(name, errors="ignore")):
            return name
    return None


def is_writing(text: str) -> bool:
    """Whether most of the characters beyond ASCII are letters or the marks between words."""
    beyond = [c for c in text if not c.isascii()]
    # ÿ 几乎没有词用，而 0xFF 正是坏文件里最常见的字节
    return 2 * sum((c.isalpha() and c != "ÿ") or c in TYPOGRAPHY for c in beyond) >= len(beyond)


def lines_beyond_ascii(path: Path) -> bytes:
    """The first SAMPLE bytes or so of the lines that are not ASCII."""
    found, size = [], 0
    with naming(path), path.open("rb") as file:
        while size < SAMPLE and (line := file.readline(PIECE)):
            if not line.isascii():
                found.append(line[:SAMPLE])
                size += len(found[-1])
                if len(line) > SAMPLE:
                    # 切在空格、换行之类的地方：它们不会是哪个字的后一半
                    found[-1] = found[-1][: max(map(found[-1].rfind, b" \r\n")) + 1] or found[-1]
    return b"".join(found)


def how_chinese(sample: bytes) -> int:
    """1 if the bytes are certainly Chinese in GB18030, -1 if they are certainly not, 0 if they may be something else.

    Chinese has its own comma and full stop; or almost all characters are of GB 2312, where the common ones are sorted
    by pinyin and so lie from end to end. Korean syllables fill only the first quarter of these codes, and Japanese has
    kana.
    """
    found = GB18030_CHARACTER.findall(sample)
    pairs = [pair for pair in found if len(pair) == 2 and pair[1] >= 0xA1]
    if 7 * sum(pair[0] in (0xA4, 0xA5) for pair in pairs) > len(found):
        return -1
    hanzi = [pair for pair in pairs if 0xB0 <= pair[0] <= 0xF7]
    marks = sum(0xA1 <= pair[0] <= 0xA3 for pair in pairs)
    in_2312 = 20 * (len(hanzi) + marks) >= 19 * len(found)
    common = in_2312 and 8 * sum(pair[0] >= 0xC9 for pair in hanzi) >= max(1, len(hanzi))
    return int(common or 20 * sum(pair in GB18030_MARKS for pair in pairs) >= max(1, len(found)))


def resolved(
    files: list[Path], encoding: str = "auto", *, key: str | None = "dataset.encoding"
) -> list[tuple[Path, str]]:
    """(file, encoding) of each file; says what was taken if auto met something other than UTF-8 and UTF-16."""
    check_encoding(encoding)
    found = [(file, detect_encoding(file, key=key) if encoding == "auto" else encoding) for file in files]
    for name in dict.fromkeys(name for _, name in found if encoding == "auto" and not name.startswith("utf")):
        taken = [file for file, taken in found if taken == name]
        more = text(" and {count} more", count=len(taken) - 1) if len(taken) > 1 else ""
        label = next((label for candidate, label in OTHERS.items() if name in WIDER.get(candidate, (candidate,))), name)
        remedy = text(
            "if that is wrong, name another encoding ({key}={got} is what was taken)",
            key=key, got=name,
        ) if key else text("save_as_utf8")
        say("{path}{more}: not UTF-8, read as {name}; {remedy}", path=taken[0], more=more, name=label, remedy=remedy)
    return found


def is_whole(path: Path, encoding: str, errors: str = "strict") -> bool:
    """Whether the file is valid in this encoding from end to end."""
    try:
        for _ in decode_pieces(path, encoding, errors):
            pass
        return True
    except UnicodeDecodeError:
        return False


def is_cut_utf8(path: Path, error: UnicodeDecodeError) -> bool:
    """Whether the file is UTF-8 with non-ASCII characters that only breaks off within its last character."""
    if error.reason != "unexpected end of data" or error.start < path.stat().st_size - 3:
        return False
    with path.open("rb") as file:
        head = file.read(min(error.start, PIECE))
    return not head.isascii()


def stretch_of_utf8(path: Path) -> int:
    """The number of the line up to which successive lines hold more UTF-8 than GB18030 text can look like, else 0."""
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
    """Refuse a name that is not an encoding of text."""
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
    read, size = 0, path.stat().st_size
    # 读得快的不值得显示
    bar = Console(stream="stderr", quiet=size < MANY * PIECE)
    with naming(path), path.open("rb") as file, bar.progress(size // PIECE, title="progress_preparing") as advance:
        while piece := file.read(PIECE):
            pending = len(decoder.getstate()[0])
            try:
                yield decoder.decode(piece)
            except UnicodeDecodeError as error:
                error.start += read - pending
                raise
            read += len(piece)
            advance(read // PIECE)
        pending = len(decoder.getstate()[0])
        try:
            yield decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            error.start += read - pending
            raise


def iter_text(path: Path, encoding: str) -> Iterator[str]:
    """Yield the text of one file in pieces that end at line breaks where there are any.

    Line ends of every kind (LF, CRLF, CR) become LF; a byte-order mark at the beginning is dropped.
    """
    pending, first, newlines = "", True, io.IncrementalNewlineDecoder(None, translate=True)
    try:
        for piece in decode_pieces(path, encoding):
            if encoding not in WHOLE and HALF.search(piece):
                # UTF-7 等能写出半个代理对，之后没有文件存得下它
                raise ConfigError(
                    "{path}: as {encoding} it holds half a character; save the file as UTF-8 or set dataset.encoding",
                    path=path, encoding=encoding,
                )
            if first and piece:
                piece, first = piece.removeprefix("\ufeff"), False
            pending += newlines.decode(piece)
            # 切在换行处，BPE 的词不会被劈开
            cut = pending.rfind("\n") + 1
            if not cut and len(pending) > 2 * PIECE:
                # 整个文件一行也没有换行：按长度切，内存才有上限
                cut = PIECE
            if cut:
                yield pending[:cut]
                pending = pending[cut:]
        if pending := pending + newlines.decode("", final=True):
            yield pending
    except UnicodeDecodeError as error:
        raise ConfigError("undecodable", path=path, offset=error.start, encoding=encoding) from None
    except UnicodeError as error:
        # UTF-16 之类的解码器有时不说位置
        raise ConfigError("undecodable", path=path, offset="?", encoding=f"{encoding} ({error})") from None


def own_source(path: str | None, *, unnamed: str) -> Path:
    """The file or folder that dataset.path names; ConfigError if it does not exist, or (`unnamed`) if it is not set."""
    if path is None:
        raise ConfigError(unnamed)
    if not Path(path).exists():
        raise ConfigError("missing_file", key="dataset.path", got=path)
    return Path(path)


def text_files(path: Path, suffixes: tuple[str, ...] | None = TEXT_SUFFIXES) -> list[Path]:
    """The file itself, or all files with these suffixes (None: any) below a folder, sorted, without hidden ones."""
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
    """Around several passes over some files; yields a check that refuses the text if one was written to meanwhile."""
    before = state_of(files)

    def check() -> None:
        for file, then, now in zip(files, before, state_of(files)):
            if then != now:
                raise ConfigError("{path} was changed while it was read; start again", path=file)

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
