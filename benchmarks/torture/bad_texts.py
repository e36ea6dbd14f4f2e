"""The cases of texts.py: texts that are damaged, mislabelled, enormous or only strange, and what must come of each."""

import itertools
import json
import os
import random as randomness
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

WORKS, REFUSED, EITHER = "works", "refused", "either"


@dataclass(frozen=True)
class Case:
    """A text that someone gives to dataset=<dataset>; `make(folder)` writes it and returns the path to give."""

    kind: str
    what: str
    make: Callable[[Path], Path]
    expect: str = EITHER
    text: str | None = None
    """What the data must decode to; None: it is not known."""
    dataset: str = "text_file"
    options: dict = field(default_factory=dict)


PLAIN = "".join(f"{i} times the king speaks of love, and the queen of {i * 7}.\n" for i in range(120))
HAN = "".join(chr(0x4E00 + i * 7 % 5000) + "，。\n"[i % 3] for i in range(1200))


def file(content: bytes | str | Callable[[], bytes], name: str = "a.txt", encoding: str = "utf-8") -> Callable[[Path], Path]:
    """A single file."""

    def make(folder: Path) -> Path:
        path = folder / name
        # 大的到用时才造
        made = content() if callable(content) else content
        path.write_bytes(made if isinstance(made, bytes) else made.encode(encoding, errors="surrogatepass"))
        return path

    return make


def files(contents: dict[str | bytes, bytes]) -> Callable[[Path], Path]:
    """A folder of files; names may be bytes that are no UTF-8."""

    def make(folder: Path) -> Path:
        (folder / "texts").mkdir()
        for name, content in contents.items():
            path = folder / "texts" / os.fsdecode(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return folder / "texts"

    return make


# ---- 奇怪但有效 ----

STRANGE = {
    "one line": "a b " * 800, "one line of Chinese": "中文" * 800, "NUL between letters": "a\0b" * 400, "NULs": "\0" * 500,
    "escape sequences": "\x1b[31mred\x1b[0m" * 80,
    "old Mac line ends": "a\rb\r" * 200, "Windows line ends": "ab\r\ncd\r\n" * 100, "blank lines": "\n" * 300, "spaces": " " * 400,
    "spaces and tabs": " \t\n" * 100,
    "line separators": "a\u2028b\u2029" * 90, "emoji": "😀👨‍👩‍👧" * 90, "combining": "e\u0301\u0302" * 120, "right to left": "\u202eabc\u202c" * 60,
    "replacement characters": "a\ufffd" * 150,
    "last code point": "\U0010ffff\U0001fffe" * 90, "private use": "\ue000\uf8ff" * 150, "non-characters": "\ufdd0\uffff" * 150,
    "all ASCII": "".join(map(chr, range(128))) * 4,
    "a byte-order mark inside": PLAIN + "\ufeff" + PLAIN, "every Han character": "".join(map(chr, range(0x4E00, 0x9FA6))),
    "form feeds": "a\f\v\x1c\x1d\x1e\x85" * 60,
    "literal tokens": "<|endoftext|><|style:a|>" * 30, "a JSON file": json.dumps({"a": [1, 2, {"b": None}]}) * 20, "two letters": "ab" * 100,
    "few tokens": "abcdefgh" * 4, "Han": HAN, "plain": PLAIN,
}


def strange() -> Iterator[Case]:
    for what, text in STRANGE.items():
        read = text.replace("\r\n", "\n").replace("\r", "\n")
        for encoding in ("utf-8", "utf-8-sig", "utf-16"):
            yield Case("strange but valid", f"{what}, {encoding}", file(text, encoding=encoding), WORKS, read)
        for encoding in ("utf-16-be", "gb18030", "utf-32"):
            yield Case("strange but valid", f"{what}, {encoding} named", file(text, encoding=encoding), WORKS, read, options={"encoding": encoding})
        yield Case("strange but valid", f"{what}, bytes", file(text), WORKS, read, options={"tokenizer": "byte"})
    yield Case("strange but valid", "Han in GB18030", file(HAN, encoding="gb18030"), WORKS, HAN)
    yield Case("strange but valid", "ASCII in UTF-16 without a mark", file(PLAIN, encoding="utf-16-le"), WORKS, PLAIN)
    for name in ("中文 名字.txt", "x" * 250, "a b.txt", "a'b.txt", "a\nb.txt", "a\x1b[31mb.txt", "-x.txt", ".hidden", "no suffix", "a=b,c.txt",
        "${seed}.txt"):
        yield Case("strange but valid", f"named {name[:20]!r}", file(PLAIN, name), EITHER, PLAIN)


# ---- 太少 ----


def too_little() -> Iterator[Case]:
    for text, encoding in itertools.product(("", "a", "中", "\0", "\n", "ab", "abc"), ("utf-8", "utf-8-sig", "utf-16")):
        yield Case("too little", f"{text!r} in {encoding}", file(text, encoding=encoding), REFUSED)
    for fraction in (1e-9, 0.9999999, 1e-300):
        yield Case("too little", f"val_fraction {fraction}", file(PLAIN), REFUSED, options={"val_fraction": fraction})
    yield Case("too little", "empty files", files({"a.txt": b"", "b.txt": b""}), REFUSED)
    yield Case("too little", "nothing but marks", files({"a.txt": b"\xef\xbb\xbf", "b.txt": b"\xff\xfe"}), REFUSED)


# ---- 编码 ----

TEXT_CODECS = ("base64", "zlib", "bz2", "hex", "quopri", "uu", "rot13", "idna", "punycode", "unicode_escape", "raw_unicode_escape", "undefined",
    "nope", "utf-9", "a\0b", " ")


def encodings() -> Iterator[Case]:
    gbk, utf8 = HAN.encode("gb18030"), HAN.encode()
    damaged = {
        "one bad byte in UTF-8": utf8[:1500] + b"\xff" + utf8[1500:], "one byte lost in UTF-8": utf8[:1501] + utf8[1502:],
        "UTF-8 cut at the end": utf8[: 3 * 333 + 1],
        "a short one cut at the end": "中文字中文字中文字".encode()[:-1], "UTF-8, then GB18030": utf8 + gbk, "GB18030, then UTF-8": gbk + utf8,
        "lines of both": b"\n".join([gbk[:300], utf8[:300]] * 5),
        "UTF-8, then UTF-16": utf8 + HAN.encode("utf-16"), "a lone surrogate": PLAIN.encode() + b"\xed\xa0\x80" + PLAIN.encode(),
        "surrogate pairs (CESU-8)": PLAIN.encode() + b"\xed\xa0\xbd\xed\xb8\x80" * 9,
        "CESU-8 in Chinese": utf8 + b"\xed\xa0\xbd\xed\xb8\x80" + utf8, "overlong": PLAIN.encode() + b"\xc0\x80\xe0\x80\x80" + PLAIN.encode(),
        "beyond Unicode": PLAIN.encode() + b"\xf5\x80\x80\x80", "0xff": b"\xff" * 500,
        "0x80": b"\x80" * 500, "UTF-16 of odd length": PLAIN.encode("utf-16") + b"a", "UTF-16 cut in a pair": ("😀" * 300).encode("utf-16")[:-2],
        "a lone surrogate in UTF-16": b"\xff\xfe" + b"a\0" * 300 + b"\0\xd8" + b"b\0" * 300,
        "UTF-16 BE of odd length": b"\xfe\xff" + PLAIN.encode("utf-16-be") + b"\0", "GB18030 cut at the end": gbk[:401],
    }
    for what, content in damaged.items():
        yield Case("damaged encoding", what, file(content), REFUSED)
        yield Case("damaged encoding", f"{what}, in a folder", files({"a.txt": PLAIN.encode(), "b/c.txt": content}), REFUSED)
    for named, content in (("utf-8", gbk), ("ascii", utf8), ("utf-16", PLAIN.encode() + b"a"), ("gb2312", utf8), ("utf-32", PLAIN.encode()),
        ("utf-7", "é".encode("latin-1") * 90), ("utf-7", b"+2AA-" * 90),
                           ("shift_jis", gbk), ("cp1252", b"\x81" * 90), ("utf-8", HAN.encode("utf-16"))):
        yield Case("wrong encoding named", f"{named}", file(content), REFUSED, options={"encoding": named})
    for named in TEXT_CODECS:
        yield Case("no encoding of text", repr(named), file(PLAIN), REFUSED, options={"encoding": named})
    mixed = {"a.txt": PLAIN.encode(), "b.txt": HAN.encode("gb18030"), "c.md": HAN.encode("utf-16"), "d.text": HAN.encode("utf-8-sig")}
    yield Case("strange but valid", "another encoding in each file", files(mixed), WORKS, PLAIN + HAN * 3)


def binaries(random: randomness.Random) -> Iterator[Case]:
    heads = {
        "PNG": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "ZIP": b"PK\x03\x04\x14\0\0\0\x08\0", "ELF": b"\x7fELF\x02\x01\x01" + bytes(9),
        "PDF": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "GZIP": b"\x1f\x8b\x08\0", "JPEG": b"\xff\xd8\xff\xe0\0\x10JFIF",
        "EXE": b"MZ\x90\0\x03\0\0\0\x04\0\0\0\xff\xff\0\0", "DOC": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "SQLite": b"SQLite format 3\0",
        "numpy": b"\x93NUMPY\x01\0v\0", "pickle": b"\x80\x05\x95", "WAV": b"RIFF\x24\x08\0\0WAVE",
    }
    for what, head in heads.items():
        yield Case("binary", what, file(head + random.randbytes(4000)), REFUSED)
    yield Case("binary", "PDF of plain letters", file(b"%PDF-1.7\n" + PLAIN.encode()), REFUSED)
    yield Case("binary", "ELF of zeros", file(b"\x7fELF\x02\x01\x01" + bytes(4000)), REFUSED)
    for i in range(10):
        yield Case("binary", f"random bytes {i}", file(random.randbytes(200 + 700 * i)), REFUSED)


# ---- 文件系统 ----


def _fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def _listening(path: Path) -> Path:
    place = socket.socket(socket.AF_UNIX)
    place.bind(str(path))
    place.close()
    return path


def _linked(target: str, name: str = "a.txt", beside: bytes | None = None) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "texts").mkdir()
        (folder / "texts" / name).symlink_to(target)
        if beside is not None:
            (folder / "texts" / "b.txt").write_bytes(beside)
        return folder / "texts" if beside is not None else folder / "texts" / name

    return make


def places() -> Iterator[Case]:
    """Things of the file system that are no plain files."""
    if os.name == "nt":
        return
    yield Case("file system", "a pipe", lambda folder: _fifo(folder / "a.txt"), REFUSED)
    yield Case("file system", "a socket", lambda folder: _listening(folder / "a.txt"), REFUSED)
    for device in ("/dev/zero", "/dev/null", "/dev/tty", "/dev/full", "/proc/self/mem"):
        yield Case("file system", device, lambda folder, device=device: Path(device), REFUSED)
        yield Case("file system", f"a link to {device}", _linked(device), REFUSED)
        yield Case("file system", f"a link to {device} beside a text", _linked(device, beside=PLAIN.encode()),
            WORKS if "proc" not in device else EITHER, PLAIN)
    yield Case("file system", "a link to itself", _linked("a.txt"), REFUSED)
    yield Case("file system", "a link to nothing", _linked("nowhere"), REFUSED)
    yield Case("file system", "a link to itself beside a text", _linked("a.txt", beside=PLAIN.encode()), WORKS, PLAIN)
    yield Case("file system", "a folder that links to itself", _linked(".", "loop", beside=PLAIN.encode()), WORKS, PLAIN)
    yield Case("file system", "a folder that links to its parent", _linked("..", "loop", beside=PLAIN.encode()), EITHER)
    yield Case("file system", "a folder without texts", files({"a.bin": b"x", "b.jpg": b"y"}), REFUSED)
    yield Case("file system", "an empty folder", files({}), REFUSED)
    yield Case("file system", "a folder named a.txt", files({"a.txt/b.txt": PLAIN.encode()}), WORKS, PLAIN)
    yield Case("file system", "names that are no UTF-8", files({b"\xff\xfe.txt": PLAIN.encode(), "b.txt": HAN.encode()}), WORKS)
    yield Case("file system", "a damaged file with such a name", files({b"\xff\n.txt": b"\xff\xff\xff"}), REFUSED)
    yield Case("file system", "a path that is no UTF-8", file(PLAIN, os.fsdecode(b"\xff.txt")), REFUSED)
    yield Case("file system", "nothing there", lambda folder: folder / "nope.txt", REFUSED)
    yield Case("file system", "a file as a folder", lambda folder: file(PLAIN)(folder) / "b.txt", REFUSED)
    yield Case("file system", "a name too long", lambda folder: folder / ("x" * 300), REFUSED)
    yield Case("file system", "deep folders", files({"/".join("d" * 50) + "/a.txt": PLAIN.encode()}), WORKS, PLAIN)


# ---- 带标签的 ----

ROWS = [{"text": f"text {i} of {i * i % 97} kings and {i * 31} queens", "style": "ab"[i % 2]} for i in range(80)]


def lines_with(bad: str, at: int) -> str:
    """Good lines with a bad one as number `at`."""
    good = [json.dumps(row) for row in ROWS]
    return "\n".join([*good[: at - 1], bad, *good[at - 1 :]]) + "\n"


BAD_LINES = {
    "broken": '{"text": "a", "style"', "a word": "text", "a list": "[1, 2]", "a number": "5", "null": "null", "NaN": "NaN",
    "no text": '{"style": "a"}', "text null": '{"text": null}',
    "text a number": '{"text": 5}', "text a list": '{"text": ["a"]}', "text an object": '{"text": {"a": "b"}}', "text NaN": '{"text": NaN}',
    "text true": '{"text": true}', "text empty": '{"text": ""}',
    "text blank": '{"text": " \\n\\t"}', "half a character": '{"text": "a\\ud800b"}', "half a character behind": '{"text": "a\\udc00\\ud800"}',
    "a label of half a character": '{"text": "a", "style": "\\ud83d"}',
    "deep lists": '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "deep objects": '{"a":' * 60_000 + "1" + "}" * 60_000,
    "a long number": '{"text": ' + "9" * 5000 + "}", "a name twice": '{"text": "a", "text": "b"}',
    "a name twice inside": '{"text": "abc", "x": {"a": 1, "a": 2}}', "label a number": '{"text": "a", "style": 5}',
    "label a list": '{"text": "a", "style": ["a"]}', "label an object": '{"text": "a", "emotion": {}}',
    "label with a bar": '{"text": "a", "style": "a|b"}', "label with a line break": '{"text": "a", "style": "a\\nb"}',
    "label too long": json.dumps({"text": "a", "style": "x" * 65}), "label with NUL": '{"text": "a", "style": "a\\u0000"}',
    "two objects": '{"text": "a"}{"text": "b"}', "a comma behind": '{"text": "a"},', "single quotes": "{'text': 'a'}", "a comment": "// a comment",
    "an open string": '{"text": "a', "a control character": '{"text": "a\tb\x01"}',
    "a mark inside": '\ufeff{"text": "a"}', "infinity": '{"text": Infinity}', "nothing but spaces and a brace": "   {", "Python": "{text: None}",
}
BAD_TABLES = {
    "no text column": "title,style\na,b\n", "a row too long": "text,style\na,b\nc,d,e\n", "a row too short": "text,style\na\n",
    "an open quote": 'text,style\n"a,b\n' + "c,d\n" * 50, "a quote inside": 'text,style\n"a"b,c\n',
    "no rows": "text,style\n", "nothing": "", "blank": "\n\n\n", "a name twice": "text,text\na,b\n", "only NUL": "\0\0\0",
    "NUL in the header": "te\0xt,style\na,b\n", "a field of 40 MB": lambda: b"text,style\n" + b"x" * 40_000_000 + b",a\n",
    "a quoted field of 40 MB": lambda: b'text,style\n"' + b"x\n" * 20_000_000 + b'",a\n', "an empty text": "text,style\n ,b\n",
    "a label too long": "text,style\na," + "x" * 70 + "\n", "one row": "text,style\na,b\n", "semicolons": "text;style\na;b\n",
}


def labelled() -> Iterator[Case]:
    for (what, bad), at in itertools.product(BAD_LINES.items(), (2, 41)):
        yield Case("bad line", f"{what}, line {at}", file(lines_with(bad, at), "a.jsonl"), REFUSED, dataset="labelled")
    for what, content in BAD_TABLES.items():
        yield Case("bad table", what, file(content, "a.csv"), REFUSED, dataset="labelled")
    good = "".join(json.dumps(row) + "\n" for row in ROWS)
    for what, content in {
        "only spaces": "  \n \n", "one text": good.splitlines()[0], "all the same": json.dumps(ROWS[0]) * 1 + ("\n" + json.dumps(ROWS[0])) * 50,
        "punctuation only": '{"text": "...!"}\n' * 60,
        "a label for each": "".join(json.dumps({"text": row["text"], "style": row["text"]}) + "\n" for row in ROWS),
        "half a list": json.dumps(ROWS)[:-1], "a list of lists": "[[1], [2]]", "not JSON at all": PLAIN,
        "half a million labels": lambda: "".join(f'{{"text": "{i} and {i * i}", "style": "{i}"}}\n' for i in range(500_000)).encode(),
    }.items():
        yield Case("bad labelled file", what, file(content, "a.jsonl"), REFUSED, dataset="labelled")
    for encoding in ("gb18030", "utf-16", "utf-8-sig"):
        yield Case("strange but valid", f"labelled, {encoding}", file(good, "a.jsonl", encoding), WORKS, dataset="labelled")
    yield Case("damaged encoding", "labelled", file(good.encode() + b'{"text": "\xff\xff"}\n', "a.jsonl"), REFUSED, dataset="labelled")
    yield Case("strange but valid", "labelled, NUL and odd characters", file("".join(json.dumps({**r,
        "text": r["text"] + "\0\u2028\ufeff😀"}) + "\n" for r in ROWS), "a.jsonl"), WORKS, dataset="labelled")
    yield Case("strange but valid", "labelled, no line end", file(good.rstrip("\n"), "a.jsonl"), WORKS, dataset="labelled")
    for fraction in (1e-9, 0.9999999):
        yield Case("bad labelled file", f"val_fraction {fraction}", file(good, "a.jsonl"), REFUSED, dataset="labelled",
            options={"val_fraction": fraction, "judge_fraction": 0.0})
    for what, content in {"a whole list": json.dumps(ROWS), "indented": json.dumps(ROWS, indent=1)}.items():
        yield Case("strange but valid", f"labelled, {what}", file(content, "a.jsonl"), WORKS, dataset="labelled")
    if os.name != "nt":
        yield Case("file system", "a pipe of labelled texts", lambda folder: _fifo(folder / "a.jsonl"), REFUSED, dataset="labelled")


# ---- 开头的文件 ----

BAD_PROMPTS = {
    "empty": (b"", "p.txt"), "blank": (b" \n\n \t\n", "p.txt"), "no encoding": (b"abc\xff\xff", "p.txt"), "a PNG": (b"\x89PNG\r\n\x1a\n" + bytes(50),
    "p.txt"), "broken JSON": (b'{"prompt": "a"\n', "p.jsonl"),
    "no prompt": (b'{"text": "a"}\n', "p.jsonl"), "a number": (b"5\n", "p.jsonl"), "a list": (b'["a"]\n', "p.jsonl"), "null": (b"null\n", "p.jsonl"),
    "an object as prompt": (b'{"prompt": {"a": 1}}\n', "p.jsonl"),
    "half a character": (b'"\\ud800"\n', "p.jsonl"), "deep": (b"[" * 100_000 + b"]" * 100_000, "p.jsonl"), "a long number": (b"9" * 5000, "p.jsonl"),
    "100 MB": (lambda: b"abc \n" * 20_000_000, "p.txt"),
    "100 MB in one line": (lambda: b"abc " * 25_000_000, "p.jsonl"), "mixed encodings": (HAN.encode() + HAN.encode("gb18030"), "p.txt"),
}


def prompts() -> Iterator[Case]:
    for what, (content, name) in BAD_PROMPTS.items():
        yield Case("prompts", what, file(content, name), REFUSED, dataset="prompts")
        if what not in ("empty", "blank") and name == "p.txt":
            yield Case("start", what, file(content, name), REFUSED, dataset="start")
    if os.name != "nt":
        for dataset in ("prompts", "start"):
            yield Case(dataset, "a pipe", lambda folder: _fifo(folder / "p.txt"), REFUSED, dataset=dataset)
            yield Case(dataset, "a device", lambda folder: Path("/dev/zero"), REFUSED, dataset=dataset)
            yield Case(dataset, "a folder", lambda folder: folder, REFUSED, dataset=dataset)


def all_cases(seed: int) -> list[Case]:
    """Every small case, in a fixed order for a seed."""
    random = randomness.Random(seed)
    return [*strange(), *too_little(), *encodings(), *binaries(random), *places(), *labelled(), *prompts()]
