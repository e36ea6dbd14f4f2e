"""Bad texts: each is prepared, trained on and decoded back exactly, or refused by one clear line that leaves nothing behind."""

# 有效的文本由 hypothesis 乱写：任何字符、任何编码，解码回来必须一字不差；坏的必须一行话拒绝，指名文件
# 准备在这个进程里做；比内存还大的、很多个的、读的时候还在变的只在长的形式里，各在自己的进程里，内存有上限

import codecs
import contextlib
import io
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from attack import LONG, ONLY_LONG, cases, fit
from conftest import ROOT, TINY, new_trainer
from hypothesis import given
from hypothesis import strategies as st

from nanogpt.base import language
from nanogpt.base.errors import explained
from nanogpt.base.language import ConfigError
from nanogpt.data import corpus
from nanogpt.data.opening import open_data
from nanogpt.data.source_text import iter_text
from nanogpt.data.tokens import TokenData
from nanogpt.write.loading import prompt_text, prompts_of_file

pytestmark = pytest.mark.torture
OPTIONS = {
    "text_file": {"tokenizer": "char", "encoding": "auto", "val_fraction": 0.1, "vocab_size": 300},
    "labelled": {"tokenizer": "char", "encoding": "auto", "val_fraction": 0.2, "judge_fraction": 0.1, "vocab_size": 300},
}
PLAIN = "".join(f"{i} times the king speaks of love, and the queen of {i * 7}.\n" for i in range(120))
HAN = "".join(chr(0x4E00 + i * 7 % 5000) + "，。\n"[i % 3] for i in range(1200))
GBK, UTF8, ASCII = HAN.encode("gb18030"), HAN.encode(), PLAIN.encode()
ROWS = [{"text": f"text {i} of {i * i % 97} kings and {i * 31} queens", "style": "ab"[i % 2]} for i in range(80)]
GOOD = "".join(json.dumps(row) + "\n" for row in ROWS)


@dataclass(frozen=True)
class Case:
    """A text that someone gives: the content of one file, of several by their names, or a function that makes what lies at a path."""

    # text：接受的话必须解码成什么，None 是不知道；either：接受或拒绝都可以
    content: bytes | dict | Callable[[Path], Path | None]
    text: str | None = None
    dataset: str = "text_file"
    name: str = "a.txt"
    options: dict = field(default_factory=dict)
    either: bool = False

    def make(self, folder: Path) -> Path:
        """Write it; the path to give."""
        path = folder / self.name
        if callable(self.content):
            return self.content(path) or path
        several = isinstance(self.content, dict)
        for name, content in (self.content if several else {self.name: self.content}).items():
            inside = folder / "texts" / os.fsdecode(name) if several else path
            inside.parent.mkdir(parents=True, exist_ok=True)
            inside.write_bytes(content)
        return folder / "texts" if several else path


# ---- 有效的 ----

# 几个字符重复到够长：词表小，怪字符却一个不少
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).map(lambda piece: (piece + "\n") * (500 // len(piece)))
NAMES = ("中文 名字.txt", "x" * 250, "a'b.txt", "a\nb.txt", "a\x1b[31mb.txt", "-x.txt", ".hidden", "no suffix", "a=b,c.txt", "${seed}.txt")


def read(text: str) -> str:
    """A text with the line ends that reading makes of its own."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def labelled(content: bytes, name: str = "a.jsonl", **more) -> Case:
    return Case(content, dataset="labelled", name=name, **more)


VALID = st.one_of(
    st.builds(lambda t, e: Case(t.encode(e), read(t)), TEXTS, st.sampled_from(["utf-8-sig", "utf-16"])),
    st.builds(lambda t, e: Case(t.encode(e), read(t), options={"encoding": e}), TEXTS, st.sampled_from(["utf-8", "utf-16-be", "gb18030", "utf-32"])),
    TEXTS.map(lambda t: Case(t.encode(), read(t), options={"encoding": "utf-8", "tokenizer": "byte"})),
    st.sampled_from([
        *(Case(ASCII, PLAIN, name=name, either=True) for name in NAMES), Case(GBK, HAN), Case(PLAIN.encode("utf-16-le"), PLAIN),
        Case({"a.txt": ASCII, "b.txt": GBK, "c.md": HAN.encode("utf-16"), "d.text": HAN.encode("utf-8-sig")}, PLAIN + HAN * 3),
        Case({"a.txt/b.txt": ASCII}, PLAIN), Case({b"\xff\xfe.txt": ASCII, "b.txt": UTF8}), Case({"/".join("d" * 50) + "/a.txt": UTF8}, HAN),
        *(labelled(GOOD.encode(e)) for e in ("gb18030", "utf-16", "utf-8-sig")), *(labelled(json.dumps(ROWS, indent=i).encode()) for i in (None, 1)),
        labelled("\n".join(json.dumps({**r, "text": r["text"] + "\0\u2028\ufeff😀"}) for r in ROWS).encode()),
    ]),
)

# ---- 坏的 ----

DAMAGED = (
    UTF8[:1500] + b"\xff" + UTF8[1500:], UTF8[:1501] + UTF8[1502:], UTF8[:1000], UTF8 + GBK, GBK + UTF8, GBK[:401], UTF8 + HAN.encode("utf-16"),
    b"\n".join([GBK[:300], UTF8[:300]] * 5), ASCII + b"\xed\xa0\x80" + ASCII, UTF8 + b"\xed\xa0\xbd\xed\xb8\x80" * 9, ASCII + b"\xc0\x80\xe0\x80\x80" + ASCII,
    ASCII + b"\xf5\x80\x80\x80", b"\xff" * 500, b"\x80" * 500, PLAIN.encode("utf-16") + b"a", ("😀" * 300).encode("utf-16")[:-2],
    codecs.BOM_UTF16_LE + b"a\0" * 300 + b"\0\xd8" + b"b\0" * 300,
)
WRONG = (
    ("utf-8", GBK), ("ascii", UTF8), ("utf-16", ASCII + b"a"), ("gb2312", UTF8), ("utf-32", ASCII), ("utf-7", b"+2AA-" * 90), ("shift_jis", GBK),
    ("cp1252", b"\x81" * 90), ("utf-8", HAN.encode("utf-16")),
    *((codec, ASCII) for codec in ("base64", "zlib", "hex", "rot13", "idna", "punycode", "unicode_escape", "undefined", "nope", "a\0b", " ")),
)
HEADS = (
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"PK\x03\x04\x14\0\0\0\x08\0", b"\x7fELF\x02\x01\x01" + bytes(9), b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", b"\x1f\x8b\x08\0",
    b"\xff\xd8\xff\xe0\0\x10JFIF", b"MZ\x90\0\x03\0\0\0\x04\0\0\0\xff\xff\0\0", b"SQLite format 3\0", b"\x93NUMPY\x01\0v\0", b"\x80\x05\x95", b"",
)
# 一行 JSON 该是 {"text": …}：不是对象的、缺的、错的、重复的、深得没底的
NO_TEXT = ("null", "5", '["a"]', '{"a": "b"}', "NaN", "true", '""', '" \\n\\t"', '"a\\ud800b"', "[" * 100_000 + "]" * 100_000, "9" * 5000, '"a\tb\x01"', '"a')
NO_LABEL = ("5", '["a"]', "{}", '"a|b"', '"a\\nb"', f'"{"x" * 65}"', '"a\\u0000"', '"\\ud83d"')
BAD_LINES = (
    "text", "[1, 2]", "5", "null", '{"style": "a"}', '{"text": "a", "style"', '{"a":' * 60_000 + "1" + "}" * 60_000, '{"text": "a", "text": "b"}',
    '{"text": "a"}{"text": "b"}', '{"text": "a"},', "{'text': 'a'}", "// a comment", '\ufeff{"text": "a"}', "   {",
    *(f'{{"text": {value}}}' for value in NO_TEXT), *(f'{{"text": "a", "style": {value}}}' for value in NO_LABEL),
)
BAD_TABLES = (
    "title,style\na,b\n", "text,style\na,b\nc,d,e\n", "text,style\na\n", 'text,style\n"a,b\n' + "c,d\n" * 50, 'text,style\n"a"b,c\n', "text,style\n",
    "", "\n\n\n", "text,text\na,b\n", "\0\0\0", "te\0xt,style\na,b\n", "text,style\n ,b\n", "text,style\na," + "x" * 70 + "\n", "text;style\na;b\n",
    *(("text,style\n" + "x" * 40_000_000 + ",a\n", 'text,style\n"' + "x\n" * 20_000_000 + '",a\n') if LONG else ()),
)
BAD_LABELLED = ("  \n \n", GOOD.splitlines()[0], (json.dumps(ROWS[0]) + "\n") * 50, '{"text": "...!"}\n' * 60, json.dumps(ROWS)[:-1], "[[1], [2]]", PLAIN)
PROMPTS = {
    "p.txt": (b"abc\xff\xff", b"\x89PNG\r\n\x1a\n" + bytes(50), UTF8 + GBK, b"", b" \n\n \t\n", *((b"abc \n" * 20_000_000,) if LONG else ())),
    "p.jsonl": (b'{"prompt": "a"\n', b'{"text": "a"}\n', b"5\n", b'["a"]\n', b'{"prompt": {"a": 1}}\n', b'"\\ud800"\n', b"[" * 100_000, b"9" * 5000),
}


def jsonl(bad: str, at: int) -> bytes:
    """Good lines with a bad one as number `at`."""
    good = [json.dumps(row) for row in ROWS]
    return ("\n".join([*good[: at - 1], bad, *good[at - 1 :]]) + "\n").encode("utf-8", "surrogatepass")


# ---- 文件系统里的怪东西 ----


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as place:
        place.bind(str(path))


def linked(target: str, name: str = "a.txt") -> Callable[[Path], Path]:
    """A folder of a text and of a link."""

    def make(path: Path) -> Path:
        folder = path.with_name("texts")
        folder.mkdir()
        (folder / name).symlink_to(target)
        (folder / "b.txt").write_text(PLAIN, encoding="utf-8")
        return folder

    return make


DEVICES = ("/dev/zero", "/dev/null", "/dev/tty", "/dev/full", "/proc/self/mem")
THINGS = [] if os.name == "nt" else [
    Case(listening), *(Case(os.mkfifo, dataset=d, name="a.jsonl") for d in ("text_file", "labelled", "prompts", "start")),
    *(Case(lambda path, d=d: Path(d)) for d in DEVICES), *(Case(lambda path, d=d: path.symlink_to(d)) for d in (*DEVICES, "a.txt", "nowhere")),
    *(Case(lambda path: Path("/dev/zero"), dataset=d) for d in ("prompts", "start")), Case(lambda path: path.parent, dataset="prompts"),
    Case(lambda path: path.parent), Case(ASCII, name=os.fsdecode(b"\xff.txt")), Case({b"\xff\n.txt": b"\xff\xff\xff"}),
    Case(lambda path: path / "nope.txt"), Case(lambda path: path.with_name("x" * 300)), Case({"a.bin": b"x", "b.jpg": b"y"}),
]
LINKS = [] if os.name == "nt" else [
    *(Case(linked(d), PLAIN) for d in (*DEVICES[:4], "a.txt", "nowhere")), Case(linked(".", "loop"), PLAIN),
    Case(linked(DEVICES[4]), PLAIN, either=True), Case(linked("..", "loop"), either=True),
]
SHORT = [Case(t.encode(e)) for t in ("", "a", "中", "\0", "\n", "abc") for e in ("utf-8", "utf-8-sig", "utf-16")]
SMALL_PARTS = [{"val_fraction": f} for f in (1e-9, 0.9999999, 1e-300)]
REFUSED: dict[str, list[Case]] = {
    "too little": [*SHORT, Case({"a.txt": b"", "b.txt": codecs.BOM_UTF8}), *(Case(ASCII, options=o) for o in SMALL_PARTS)],
    "damaged encoding": [*(Case(c) for c in DAMAGED), *(Case({"a.txt": ASCII, "b/c.txt": c}) for c in DAMAGED), labelled(GOOD.encode() + b'{"text": "\xff"}\n')],
    "wrong encoding named": [Case(content, options={"encoding": named}) for named, content in WRONG],
    "binary": [Case(head + random.Random(i).randbytes(200 + 400 * i)) for i, head in enumerate(HEADS)] + [Case(b"%PDF-1.7\n" + ASCII)],
    "bad line": [labelled(jsonl(bad, at)) for bad in BAD_LINES for at in (2, 41)],
    "bad labelled file": [
        *(labelled(table.encode(), "a.csv") for table in BAD_TABLES), *(labelled(text.encode()) for text in BAD_LABELLED),
        *(labelled(GOOD.encode(), options={**o, "judge_fraction": 0.0}) for o in SMALL_PARTS[:2]),
    ],
    "prompts": [
        *(Case(content, dataset="prompts", name=name) for name, contents in PROMPTS.items() for content in contents),
        *(Case(content, dataset="start", name="p.txt") for content in PROMPTS["p.txt"][:3]),
    ],
    "file system": THINGS,
}


# ---- 审判 ----


def prepared(case: Case, path: Path, folder: Path) -> tuple[int, str]:
    """(0 or 2, what was said): the same as data/<name>/prepare.py in this process; an error that it does not explain is raised."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            if case.dataset in OPTIONS:
                corpus.prepare(case.dataset, str(folder), {**OPTIONS[case.dataset], **case.options, "path": str(path)})
            else:
                prompts_of_file(path) if case.dataset == "prompts" else prompt_text(f"FILE:{path}")
        except Exception as error:
            if (line := explained(error)) is None:
                raise
            language.say("error", line=line)
            return 2, said.getvalue()
    return 0, said.getvalue()


def assert_refused(path: Path, work: Path, output: str) -> None:
    """One clear line that names the file, and nothing left behind."""
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and len(errors[0]) < 1500 and errors[0].isprintable(), ascii(output[:500])
    assert any(name and name in errors[0] for name in ("dataset.", "start=", "prompts=", path.name[:20], path.parent.name)), errors
    assert not list(work.iterdir()) and not [p for name in OPTIONS for p in (ROOT / "data" / name).iterdir() if p.name.startswith(".")]


def assert_decodes(case: Case, folder: Path) -> None:
    """An accepted text decodes back exactly."""
    if case.dataset == "labelled":
        found = [document for split in ("train", "val") for document in open_data(folder).documents(split)]
        assert found and all(document.text for document in found)
        return
    data = TokenData(folder)
    # 字节词表：两部分可以从一个字的中间分开
    text = data.tokenizer.decode([token for split in ("train", "val") for token in data.tokens[split].tolist()])
    assert case.text in (None, text)


def outcome(case: Case, place: Path) -> tuple[int, str, Path]:
    """(exit code, what was said, the file); skipped where the file cannot be made."""
    for name in ("source", "work"):
        (place / name).mkdir()
    try:
        path = case.make(place / "source")
    except (OSError, ValueError):
        pytest.skip("this file system does not know such names")
    return *prepared(case, path, place / "work/prepared"), path


@pytest.mark.parametrize("kind", REFUSED)
@cases(12, 150)
@given(data=st.data())
def test_what_is_no_text_is_refused_in_one_line_that_leaves_nothing(tmp_path_factory, kind, data):
    place = tmp_path_factory.mktemp("text")
    code, output, path = outcome(data.draw(st.sampled_from(REFUSED[kind])), place)
    assert code == 2, "was accepted"
    assert_refused(path, place / "work", output)


@cases(30, 600)
@given(case=VALID | st.sampled_from(LINKS))
def test_strange_but_valid_texts_decode_back_exactly_and_can_be_trained_on(tmp_path_factory, case):
    place = tmp_path_factory.mktemp("text")
    code, output, path = outcome(case, place)
    if code:
        assert case.either, output
        return assert_refused(path, place / "work", output)
    assert_decodes(case, place / "work/prepared")
    if LONG and case.dataset == "text_file":
        small = [*TINY, "model.block_size=4", "max_iters=2", "batch_size=2", "eval_tokens=8", "sample_tokens=4", "logger=none", "device=cpu"]
        with contextlib.chdir(place / "work"), contextlib.redirect_stdout(io.StringIO()):
            assert fit(new_trainer([*small, "dataset=text_file", "dataset.path=unused.txt", f"dataset.dir={place / 'work/prepared'}"])) is None


# ---- 大的与会变的 ----

LIMIT_GIB = 2
# 峰值由它自己在结束时说：wait4 给的还算着 fork 之前父进程的大小
LIMITED = f"""
import atexit, resource, sys
resource.setrlimit(resource.RLIMIT_DATA, ({LIMIT_GIB * 2**30},) * 2)
sys.path.insert(0, {str(ROOT)!r})
status, told = open("/proc/self/status", encoding="ascii"), open("peak", "w", encoding="ascii")
atexit.register(lambda: told.write(status.read().partition("VmHWM:")[2].split()[0]))
from nanogpt.data import corpus
corpus.run_prepare(sys.argv.pop(1))
"""
ONLY_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="limits and measures its memory as Linux does")


def in_its_own(dataset: str, path: Path, work: Path, *, during: Callable[[], None] | None = None, **options) -> tuple[int, str]:
    """data/<name>/prepare.py in a process whose private memory is limited; `during` runs beside it."""
    given = {**OPTIONS[dataset], **options, "path": str(path), "dir": str(work / "prepared")}
    work.mkdir()
    if during:
        threading.Thread(target=during, daemon=True).start()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(work), "TMPDIR": str(work), "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", LIMITED, dataset, *(f"{key}={json.dumps(value)}" for key, value in given.items())]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, timeout=3600)
    assert int((work / "peak").read_text(encoding="ascii")) < LIMIT_GIB * 2**20
    (work / "peak").unlink()
    output = (done.stdout + done.stderr).decode("utf-8", "replace")
    assert done.returncode in (0, 2) and "Traceback" not in output, output
    return done.returncode, output


@ONLY_LONG
@ONLY_LINUX
@pytest.mark.parametrize(("line", "name", "end"), [
    (ASCII, "big.txt", b""), (PLAIN.replace("\n", " ").encode(), "big.txt", b""), (GBK, "big.txt", b""), (bytes(1000), "big.txt", b""),
    (ASCII, "damaged.txt", b"\xff\xff"), (GOOD.splitlines()[0].encode() + b"\n", "big.jsonl", b""), (b'{"text": "' + b"a" * 1000, "big.jsonl", b""),
])
def test_a_file_larger_than_the_memory_allowed_is_decoded_back_exactly_or_refused(tmp_path, line, name, end):
    path, work, piece = tmp_path / name, tmp_path / "work", line * (2**22 // len(line) + 1)
    with path.open("wb") as file:
        while file.tell() < 2**30:
            file.write(piece)
        file.write(end)
    code, output = in_its_own("labelled" if name.endswith("jsonl") else "text_file", path, work)
    assert (code == 2) == (name != "big.txt"), output
    if code:
        return assert_refused(path, work, output)
    data = TokenData(work / "prepared")
    stream, pending = iter_text(path, "auto"), ""
    for tokens, first in ((t, i) for t in (data.tokens["train"], data.tokens["val"]) for i in range(0, len(t), 2**22)):
        text = data.tokenizer.decode(tokens[first : first + 2**22].tolist())
        while len(pending) < len(text) and (more := next(stream, None)) is not None:
            pending += more
        assert pending.startswith(text)
        pending = pending[len(text) :]
    assert not pending and next(stream, None) is None


@ONLY_LONG
@ONLY_LINUX
def test_a_folder_of_very_many_small_files_is_read_in_order(tmp_path):
    for i in range(100_000):
        path = tmp_path / f"many/{i // 1000:04}/{i:06}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"%d times the king speaks\n" % i)
    code, output = in_its_own("text_file", tmp_path / "many", tmp_path / "work")
    assert code == 0, output
    assert_decodes(Case(b"", "".join(f"{i} times the king speaks\n" for i in range(100_000))), tmp_path / "work/prepared")


def appended(path: Path) -> None:
    with path.open("ab") as file:
        file.write("more 中文\n".encode())


def replaced(path: Path) -> None:
    path.with_suffix(".new").write_bytes(ASCII * (20_000 if LONG else 1))
    os.replace(path.with_suffix(".new"), path)


CHANGES = {
    "appended to": appended, "replaced": replaced, "cut": lambda path: os.truncate(path, 2**20), "emptied": lambda path: os.truncate(path, 0),
    "removed": Path.unlink,
}


@ONLY_LONG
@ONLY_LINUX
@pytest.mark.parametrize(("how", "dataset"), itertools.product(CHANGES, OPTIONS))
@cases(1, 3)
@given(ms=st.integers(300, 3000))
def test_a_file_that_changes_while_it_is_read_is_refused_or_was_read_before(tmp_path_factory, how, dataset, ms):
    place = tmp_path_factory.mktemp("changing")
    path, row = place / ("a.txt" if dataset == "text_file" else "a.jsonl"), b'{"text": "%d times the king speaks of love", "style": "a"}\n'
    path.write_bytes(ASCII * 10_000 if dataset == "text_file" else b"".join(row % i for i in range(200_000)))

    def during() -> None:
        time.sleep(ms / 1000)
        with contextlib.suppress(OSError):
            CHANGES[how](path)

    code, output = in_its_own(dataset, path, place / "work", during=during)
    if code:
        assert_refused(path, place / "work", output)


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be replaced there")
@pytest.mark.parametrize("how", ["appended to", "replaced"])
def test_a_text_that_changes_between_two_readings_is_refused(in_tmp, monkeypatch, how):
    path = in_tmp / "a.txt"
    path.write_text(PLAIN, encoding="utf-8")

    def changing(*given):
        yield from iter_text(*given)
        CHANGES[how](path)

    module = corpus._script("text_file")
    monkeypatch.setattr(module, "iter_text", changing)
    with pytest.raises(ConfigError, match="was changed while it was read"):
        module.prepare(in_tmp / "prepared", path=str(path), tokenizer="char", encoding="auto", val_fraction=0.1)
    assert not list(in_tmp.glob("*prepared*"))


def test_labelled_texts_that_the_memory_cannot_hold_are_refused_before_they_are_read(in_tmp, monkeypatch):
    module = corpus._script("labelled")
    (in_tmp / "a.jsonl").write_text("x" * 100, encoding="utf-8")
    monkeypatch.setattr(module, "free_ram", lambda: 500)
    with pytest.raises(ConfigError, match="compared with each other in memory"):
        module.sources(path="a.jsonl", tokenizer="char", vocab_size=300, encoding="auto", val_fraction=0.1, judge_fraction=0.1)
