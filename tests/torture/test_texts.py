"""Bad texts: each is prepared, trained on and decoded back exactly, or refused by one clear line that names the file and leaves nothing behind."""

# 案例分三类：奇怪但有效的、坏的、文件系统里的怪东西；坏的必须一行话拒绝，留不下任何东西
# 准备在这个进程里做；几个 GiB 的文件、几十万个小文件、读的时候还在变的文件只在长的形式里，各在自己的进程里，内存有上限

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
from nanogpt.data.documents import open_data
from nanogpt.data.source_text import iter_text
from nanogpt.data.tokens import TokenData
from nanogpt.write.loading import prompt_text, prompts_of_file

pytestmark = pytest.mark.torture
WORKS, REFUSED, EITHER = "works", "refused", "either"
OPTIONS = {
    "text_file": {"tokenizer": "char", "encoding": "auto", "val_fraction": 0.1, "vocab_size": 300},
    "labelled": {"tokenizer": "char", "encoding": "auto", "val_fraction": 0.2, "judge_fraction": 0.1, "vocab_size": 300},
}
PLAIN = "".join(f"{i} times the king speaks of love, and the queen of {i * 7}.\n" for i in range(120))
HAN = "".join(chr(0x4E00 + i * 7 % 5000) + "，。\n"[i % 3] for i in range(1200))
GBK, UTF8 = HAN.encode("gb18030"), HAN.encode()
ROWS = [{"text": f"text {i} of {i * i % 97} kings and {i * 31} queens", "style": "ab"[i % 2]} for i in range(80)]
GOOD = "".join(json.dumps(row) + "\n" for row in ROWS)


@dataclass(frozen=True)
class Case:
    """A text that someone gives; content: one file, several by their names, or a function that makes what lies at a path."""

    # text：备好的数据必须解码成什么；None 是不知道
    what: str
    content: bytes | dict | Callable[[Path], object]
    expect: str = REFUSED
    text: str | None = None
    dataset: str = "text_file"
    name: str = "a.txt"
    options: dict = field(default_factory=dict, hash=False)

    def make(self, folder: Path) -> Path:
        """Write it; the path to give."""
        path = folder / ("texts" if isinstance(self.content, dict) else self.name)
        if callable(self.content):
            return self.content(path) or path
        for name, content in (self.content if isinstance(self.content, dict) else {path.name: self.content}).items():
            inside = path / os.fsdecode(name) if isinstance(self.content, dict) else path
            inside.parent.mkdir(parents=True, exist_ok=True)
            inside.write_bytes(content)
        return path


# ---- 奇怪但有效 ----

STRANGE = {
    "one line": "a b " * 800, "NUL between letters": "a\0b" * 400, "NULs": "\0" * 500, "escape sequences": "\x1b[31mred\x1b[0m" * 80,
    "old Mac line ends": "a\rb\r" * 200, "Windows line ends": "ab\r\ncd\r\n" * 100, "blank lines": "\n" * 300, "spaces and tabs": " \t\n" * 100,
    "line separators": "a\u2028b\u2029" * 90, "emoji": "😀👨‍👩‍👧" * 90, "combining": "e\u0301\u0302" * 120, "right to left": "\u202eabc\u202c" * 60,
    "replacement characters": "a\ufffd" * 150, "last code point": "\U0010ffff\U0001fffe" * 90, "private use": "\ue000\uf8ff" * 150,
    "non-characters": "\ufdd0\uffff" * 150, "all ASCII": "".join(map(chr, range(128))) * 4, "Chinese": HAN, "marks inside": "a\ufeffb" * 150,
    "every Han character": "".join(map(chr, range(0x4E00, 0x9FA6))), "form feeds": "a\f\v\x1c\x1d\x1e\x85" * 60, "labels": "<|endoftext|><|style:a|>" * 30,
}
NAMES = ("中文 名字.txt", "x" * 250, "a'b.txt", "a\nb.txt", "a\x1b[31mb.txt", "-x.txt", ".hidden", "no suffix", "a=b,c.txt", "${seed}.txt")
SPLIT = {"a.txt": PLAIN.encode(), "b.txt": GBK, "c.md": HAN.encode("utf-16"), "d.text": HAN.encode("utf-8-sig")}


def read(text: str) -> str:
    """A text with the line ends that reading makes of its own."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


VALID = [
    *(Case(f"{what}, {e}", text.encode(e), WORKS, read(text)) for what, text in STRANGE.items() for e in ("utf-8", "utf-8-sig", "utf-16")),
    *(Case(f"{what}, {e} named", text.encode(e), WORKS, read(text), options={"encoding": e}) for what, text in STRANGE.items() for e in ("utf-16-be", "gb18030", "utf-32")),
    *(Case(f"{what}, bytes", text.encode(), WORKS, read(text), options={"tokenizer": "byte"}) for what, text in STRANGE.items()),
    *(Case(f"named {name[:20]!r}", PLAIN.encode(), EITHER, PLAIN, name=name) for name in NAMES),
    Case("Han in GB18030", GBK, WORKS, HAN), Case("ASCII in UTF-16 without a mark", PLAIN.encode("utf-16-le"), WORKS, PLAIN),
    Case("another encoding in each file", SPLIT, WORKS, PLAIN + HAN * 3), Case("a folder named a.txt", {"a.txt/b.txt": PLAIN.encode()}, WORKS, PLAIN),
    Case("names that are no UTF-8", {b"\xff\xfe.txt": PLAIN.encode(), "b.txt": UTF8}, WORKS), Case("deep folders", {"/".join("d" * 50) + "/a.txt": UTF8}, WORKS, HAN),
    *(Case(f"labelled, {e}", GOOD.encode(e), WORKS, dataset="labelled", name="a.jsonl") for e in ("gb18030", "utf-16", "utf-8-sig")),
    *(Case(f"labelled, indent={i}", json.dumps(ROWS, indent=i).encode(), WORKS, dataset="labelled", name="a.jsonl") for i in (None, 1)),
    Case("labelled, odd characters, no line end", "\n".join(json.dumps({**r, "text": r["text"] + "\0\u2028\ufeff😀"}) for r in ROWS).encode(), WORKS,
         dataset="labelled", name="a.jsonl"),
]

# ---- 坏的 ----

DAMAGED = {
    "one bad byte in UTF-8": UTF8[:1500] + b"\xff" + UTF8[1500:], "one byte lost in UTF-8": UTF8[:1501] + UTF8[1502:], "UTF-8 cut at the end": UTF8[:1000],
    "UTF-8, then GB18030": UTF8 + GBK, "GB18030, then UTF-8": GBK + UTF8, "lines of both": b"\n".join([GBK[:300], UTF8[:300]] * 5),
    "UTF-8, then UTF-16": UTF8 + HAN.encode("utf-16"), "a lone surrogate": PLAIN.encode() + b"\xed\xa0\x80" + PLAIN.encode(),
    "surrogate pairs (CESU-8)": UTF8 + b"\xed\xa0\xbd\xed\xb8\x80" * 9, "overlong": PLAIN.encode() + b"\xc0\x80\xe0\x80\x80" + PLAIN.encode(),
    "beyond Unicode": PLAIN.encode() + b"\xf5\x80\x80\x80", "0xff": b"\xff" * 500, "0x80": b"\x80" * 500, "UTF-16 of odd length": PLAIN.encode("utf-16") + b"a",
    "UTF-16 cut in a pair": ("😀" * 300).encode("utf-16")[:-2], "a lone surrogate in UTF-16": codecs.BOM_UTF16_LE + b"a\0" * 300 + b"\0\xd8" + b"b\0" * 300,
    "GB18030 cut at the end": GBK[:401],
}
WRONG = (
    ("utf-8", GBK), ("ascii", UTF8), ("utf-16", PLAIN.encode() + b"a"), ("gb2312", UTF8), ("utf-32", PLAIN.encode()), ("utf-7", "é".encode("latin-1") * 90),
    ("utf-7", b"+2AA-" * 90), ("shift_jis", GBK), ("cp1252", b"\x81" * 90), ("utf-8", HAN.encode("utf-16")),
)
NO_TEXT = ("base64", "zlib", "bz2", "hex", "quopri", "uu", "rot13", "idna", "punycode", "unicode_escape", "raw_unicode_escape", "undefined", "nope", "a\0b", " ")
HEADS = (
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"PK\x03\x04\x14\0\0\0\x08\0", b"\x7fELF\x02\x01\x01" + bytes(9), b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", b"\x1f\x8b\x08\0",
    b"\xff\xd8\xff\xe0\0\x10JFIF", b"MZ\x90\0\x03\0\0\0\x04\0\0\0\xff\xff\0\0", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", b"SQLite format 3\0", b"\x93NUMPY\x01\0v\0",
    b"\x80\x05\x95", b"RIFF\x24\x08\0\0WAVE", b"",
)
BAD_LINES = (
    '{"text": "a", "style"', "text", "[1, 2]", "5", "null", "NaN", '{"style": "a"}', '{"text": null}', '{"text": 5}', '{"text": ["a"]}', '{"text": {"a": "b"}}',
    '{"text": NaN}', '{"text": true}', '{"text": ""}', '{"text": " \\n\\t"}', '{"text": "a\\ud800b"}', '{"text": "a", "style": "\\ud83d"}',
    '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", '{"a":' * 60_000 + "1" + "}" * 60_000, '{"text": ' + "9" * 5000 + "}", '{"text": "a", "text": "b"}',
    '{"text": "abc", "x": {"a": 1, "a": 2}}', '{"text": "a", "style": 5}', '{"text": "a", "style": ["a"]}', '{"text": "a", "emotion": {}}',
    '{"text": "a", "style": "a|b"}', '{"text": "a", "style": "a\\nb"}', json.dumps({"text": "a", "style": "x" * 65}), '{"text": "a", "style": "a\\u0000"}',
    '{"text": "a"}{"text": "b"}', '{"text": "a"},', "{'text': 'a'}", "// a comment", '{"text": "a', '{"text": "a\tb\x01"}', '\ufeff{"text": "a"}',
    '{"text": Infinity}', "   {", "{text: None}",
)
BAD_TABLES = (
    "title,style\na,b\n", "text,style\na,b\nc,d,e\n", "text,style\na\n", 'text,style\n"a,b\n' + "c,d\n" * 50, 'text,style\n"a"b,c\n', "text,style\n", "",
    "\n\n\n", "text,text\na,b\n", "\0\0\0", "te\0xt,style\na,b\n", "text,style\n ,b\n", "text,style\na," + "x" * 70 + "\n", "text,style\na,b\n", "text;style\na;b\n",
    *(("text,style\n" + "x" * 40_000_000 + ",a\n", 'text,style\n"' + "x\n" * 20_000_000 + '",a\n') if LONG else ()),
)
BAD_LABELLED = (
    "  \n \n", GOOD.splitlines()[0], (json.dumps(ROWS[0]) + "\n") * 50, '{"text": "...!"}\n' * 60, json.dumps(ROWS)[:-1], "[[1], [2]]", PLAIN,
    "".join(json.dumps({"text": row["text"], "style": row["text"]}) + "\n" for row in ROWS),
)
PROMPTS = {
    "p.txt": (b"", b" \n\n \t\n", b"abc\xff\xff", b"\x89PNG\r\n\x1a\n" + bytes(50), UTF8 + GBK, *((b"abc \n" * 20_000_000,) if LONG else ())),
    "p.jsonl": (b'{"prompt": "a"\n', b'{"text": "a"}\n', b"5\n", b'["a"]\n', b"null\n", b'{"prompt": {"a": 1}}\n', b'"\\ud800"\n', b"[" * 100_000, b"9" * 5000),
}


def fifo(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as place:
        place.bind(str(path))


def linked(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def beside(target: str, name: str = "a.txt") -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        folder = path.with_name("texts")
        folder.mkdir()
        (folder / name).symlink_to(target)
        (folder / "b.txt").write_text(PLAIN, encoding="utf-8")
        return folder

    return make


def short(text: bytes) -> str:
    return ascii(text[:30])


def jsonl(bad: str, at: int) -> bytes:
    """Good lines with a bad one as number `at`."""
    good = [json.dumps(row) for row in ROWS]
    return ("\n".join([*good[: at - 1], bad, *good[at - 1 :]]) + "\n").encode("utf-8", "surrogatepass")


DEVICES = ("/dev/zero", "/dev/null", "/dev/tty", "/dev/full", "/proc/self/mem")
KINDS = {
    "too little": [
        *(Case(f"{text!r} in {e}", text.encode(e)) for text in ("", "a", "中", "\0", "\n", "ab", "abc") for e in ("utf-8", "utf-8-sig", "utf-16")),
        *(Case(f"val_fraction {f}", PLAIN.encode(), options={"val_fraction": f}) for f in (1e-9, 0.9999999, 1e-300)),
        Case("empty files", {"a.txt": b"", "b.txt": b""}), Case("nothing but marks", {"a.txt": codecs.BOM_UTF8, "b.txt": codecs.BOM_UTF16_LE}),
        Case("a folder without texts", {"a.bin": b"x", "b.jpg": b"y"}),
    ],
    "damaged encoding": [
        *(Case(what, content) for what, content in DAMAGED.items()), *(Case(f"{what}, in a folder", {"a.txt": PLAIN.encode(), "b/c.txt": c}) for what, c in DAMAGED.items()),
        Case("labelled", GOOD.encode() + b'{"text": "\xff\xff"}\n', dataset="labelled", name="a.jsonl"), Case("in a file named so", {b"\xff\n.txt": b"\xff\xff\xff"}),
    ],
    "wrong encoding named": [
        *(Case(named, content, options={"encoding": named}) for named, content in WRONG), *(Case(repr(n), PLAIN.encode(), options={"encoding": n}) for n in NO_TEXT),
    ],
    "binary": [
        *(Case(short(head), head + random.Random(i).randbytes(200 + 400 * i)) for i, head in enumerate(HEADS)), Case("PDF of plain letters", b"%PDF-1.7\n" + PLAIN.encode()),
        Case("ELF of zeros", b"\x7fELF\x02\x01\x01" + bytes(4000)),
    ],
    "bad line": [Case(f"{short(bad.encode('utf-8', 'replace'))}, line {at}", jsonl(bad, at), dataset="labelled", name="a.jsonl") for bad in BAD_LINES for at in (2, 41)],
    "bad labelled file": [
        *(Case(short(table.encode()), table.encode(), dataset="labelled", name="a.csv") for table in BAD_TABLES),
        *(Case(short(text.encode()), text.encode(), dataset="labelled", name="a.jsonl") for text in BAD_LABELLED),
        *(Case(f"val_fraction {f}", GOOD.encode(), dataset="labelled", name="a.jsonl", options={"val_fraction": f, "judge_fraction": 0.0}) for f in (1e-9, 0.9999999)),
    ],
    "prompts": [
        *(Case(short(content), content, dataset="prompts", name=name) for name, contents in PROMPTS.items() for content in contents),
        *(Case(short(content), content, dataset="start", name="p.txt") for content in PROMPTS["p.txt"][2:]),
        *(Case(f"{d}: a device", lambda path: Path("/dev/zero"), dataset=d) for d in ("prompts", "start")), *(Case("a folder", lambda path: path.parent, dataset=d) for d in ("prompts", "start")),
    ],
    "file system": [] if os.name == "nt" else [
        Case("a socket", listening), *(Case(f"a pipe, {d}", fifo, dataset=d, name="a.jsonl") for d in ("text_file", "labelled", "prompts", "start")),
        *(Case(d, lambda path, d=d: Path(d)) for d in DEVICES), *(Case(f"a link to {d}", linked(d)) for d in DEVICES),
        *(Case(f"a link to {d} beside a text", beside(d), EITHER if "proc" in d else WORKS, PLAIN) for d in DEVICES), Case("a link to itself", linked("a.txt")),
        Case("a link to nothing", linked("nowhere")), Case("a link to itself beside a text", beside("a.txt"), WORKS, PLAIN),
        Case("a folder that links to itself", beside(".", "loop"), WORKS, PLAIN), Case("a folder that links to its parent", beside("..", "loop"), EITHER),
        Case("an empty folder", lambda path: path.parent), Case("a path that is no UTF-8", PLAIN.encode(), name=os.fsdecode(b"\xff.txt")),
        Case("nothing there", lambda path: path / "nope.txt"), Case("a name too long", lambda path: path.with_name("x" * 300)),
    ],
    "strange but valid": VALID,
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


def assert_refused(case: Case, path: Path, work: Path, output: str) -> None:
    """One clear line that names the file, and nothing left behind."""
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    assert case.expect != WORKS and len(errors) == 1 and len(errors[0]) < 1500 and errors[0].isprintable(), ascii(output[:500])
    assert any(name and name in errors[0] for name in ("dataset.", "start=", "prompts=", path.name[:20], path.parent.name)), errors
    assert not list(work.iterdir()) and not [p for name in OPTIONS for p in (ROOT / "data" / name).iterdir() if p.name.startswith(".")]


def assert_decodes(case: Case, folder: Path) -> None:
    """An accepted text decodes back exactly."""
    assert case.expect != REFUSED, "was accepted"
    if case.dataset == "labelled":
        found = [document for split in ("train", "val") for document in open_data(folder).documents(split)]
        assert found and all(document.text for document in found)
    elif case.dataset == "text_file":
        data = TokenData(folder)
        # 字节词表：两部分可以从一个字的中间分开
        text = data.tokenizer.decode([token for split in ("train", "val") for token in data.tokens[split].tolist()])
        assert case.text in (None, text)


@pytest.mark.parametrize("kind", KINDS)
@cases(12, 150)
@given(data=st.data())
def test_a_text_is_decoded_back_exactly_or_refused_in_one_line(tmp_path_factory, kind, data):
    case, place = data.draw(st.sampled_from(KINDS[kind])), tmp_path_factory.mktemp("text")
    for name in ("source", "work"):
        (place / name).mkdir()
    try:
        path = case.make(place / "source")
    except (OSError, ValueError):
        # 有的文件系统写不下这样的名字
        return
    code, output = prepared(case, path, place / "work/prepared")
    if code:
        return assert_refused(case, path, place / "work", output)
    assert_decodes(case, place / "work/prepared")
    if LONG and case.dataset == "text_file":
        with contextlib.chdir(place / "work"), contextlib.redirect_stdout(io.StringIO()):
            small = ["model.block_size=4", "max_iters=2", "batch_size=2", "eval_tokens=8", "sample_tokens=4", "logger=none", "device=cpu"]
            assert fit(new_trainer([*TINY, *small, "dataset=text_file", "dataset.path=unused.txt", f"dataset.dir={place / 'work/prepared'}"])) is None


# ---- 大的、会变的、读不到的 ----

LIMIT_GIB = 2
# 峰值由它自己在结束时说：wait4 给的还算着 fork 之前父进程的大小
LIMITED = f"""
import atexit, os, resource, sys
resource.setrlimit(resource.RLIMIT_DATA, ({LIMIT_GIB * 2**30},) * 2)
sys.path.insert(0, {str(ROOT)!r})
status = open("/proc/self/status", encoding="ascii")
told = open("peak", "w", encoding="ascii")
atexit.register(lambda: told.write(status.read().partition("VmHWM:")[2].split()[0]))
from nanogpt.data import corpus
corpus._script(sys.argv[1])
"""


def in_its_own(dataset: str, path: Path, work: Path, *, user: int = 0, during: Callable[[], None] | None = None, **options) -> tuple[int, str]:
    """data/<name>/prepare.py in a process whose private memory is limited; `during` runs beside it."""
    given = {**OPTIONS[dataset], **options}
    # 先导入再换用户：解释器本身往往在 root 的家里
    become = f"os.setgroups([]); os.setuid({user})\n" if user else ""
    arguments = [f"path={json.dumps(str(path))}", f"dir={work / 'prepared'}", *(f"{key}={json.dumps(value)}" for key, value in given.items())]
    code = f"{LIMITED}{become}name = sys.argv.pop(1)\ncorpus.run_prepare(name)"
    if during:
        threading.Thread(target=during, daemon=True).start()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(work), "TMPDIR": str(work), "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code, dataset, *arguments], cwd=work, env=environment, capture_output=True, timeout=3600)
    peak = work / "peak"
    assert int(peak.read_text(encoding="ascii") or 0) < LIMIT_GIB * 2**20
    peak.unlink()
    output = (done.stdout + done.stderr).decode("utf-8", "replace")
    assert done.returncode in (0, 2) and "Traceback" not in output, output
    return done.returncode, output


@pytest.fixture
def work(tmp_path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


ONLY_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="limits and measures its memory as Linux does")


@ONLY_LONG
@ONLY_LINUX
@pytest.mark.parametrize(("line", "name", "refused", "options", "end"), [
    (PLAIN.encode(), "big.txt", False, {}, b""), (PLAIN.replace("\n", " ").encode(), "big.txt", False, {"tokenizer": "byte"}, b""),
    (GBK, "big.txt", False, {}, b""), (bytes(1000), "big.txt", False, {}, b""), (PLAIN.encode(), "damaged.txt", True, {}, b"\xff\xff"),
    (GOOD.splitlines()[0].encode() + b"\n", "big.jsonl", True, {}, b""), (b'{"text": "' + b"a" * 1000, "big.jsonl", True, {}, b""),
])
def test_a_file_larger_than_the_memory_allowed_is_decoded_back_exactly_or_refused(tmp_path, work, line, name, refused, options, end):
    path, piece = tmp_path / name, line * (2**22 // len(line) + 1)
    with path.open("wb") as file:
        while file.tell() < 2**30:
            file.write(piece)
        file.write(end)
    code, output = in_its_own("labelled" if name.endswith("jsonl") else "text_file", path, work, **options)
    assert (code == 2) == refused, output
    if refused:
        return assert_refused(Case("", b""), path, work, output)
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
def test_a_folder_of_very_many_small_files_is_read_in_order(tmp_path, work):
    for i in range(100_000):
        folder = tmp_path / f"many/{i // 1000:04}"
        if i % 1000 == 0:
            folder.mkdir(parents=True)
        (folder / f"{i:06}.txt").write_bytes(b"%d times the king speaks\n" % i)
    code, output = in_its_own("text_file", tmp_path / "many", work)
    assert code == 0, output
    assert_decodes(Case("", b"", WORKS, "".join(f"{i} times the king speaks\n" for i in range(100_000))), work / "prepared")


def appended(path: Path) -> None:
    with path.open("ab") as file:
        file.write("more 中文\n".encode())


def replaced(path: Path) -> None:
    path.with_suffix(".new").write_bytes(PLAIN.encode() * (20_000 if LONG else 1))
    os.replace(path.with_suffix(".new"), path)


CHANGES = {"appended to": appended, "cut": lambda path: os.truncate(path, 2**20), "emptied": lambda path: os.truncate(path, 0), "removed": Path.unlink, "replaced": replaced}


@ONLY_LONG
@ONLY_LINUX
@pytest.mark.parametrize(("how", "dataset"), itertools.product(CHANGES, OPTIONS))
@cases(1, 3)
@given(ms=st.integers(300, 3000))
def test_a_file_that_changes_while_it_is_read_is_refused_or_was_read_before(tmp_path_factory, how, dataset, ms):
    place = tmp_path_factory.mktemp("changing")
    path, work = place / ("a.txt" if dataset == "text_file" else "a.jsonl"), place / "work"
    work.mkdir()
    row = b'{"text": "%d times the king speaks of love", "style": "a"}\n'
    path.write_bytes(PLAIN.encode() * 10_000 if dataset == "text_file" else b"".join(row % i for i in range(200_000)))

    def during() -> None:
        time.sleep(ms / 1000)
        with contextlib.suppress(OSError):
            CHANGES[how](path)

    code, output = in_its_own(dataset, path, work, during=during)
    if code:
        assert_refused(Case("", b""), path, work, output)


@ONLY_LONG
@ONLY_LINUX
@pytest.mark.skipif(os.name != "nt" and os.geteuid() != 0, reason="needs root to become nobody")
@pytest.mark.parametrize(("mode", "folder_mode"), [(0o000, 0o755), (0o644, 0o700)])
def test_a_file_that_permissions_shut_off_is_refused(tmp_path, work, mode, folder_mode):
    path = tmp_path / "private/a.txt"
    path.parent.mkdir()
    path.write_text(PLAIN, encoding="utf-8")
    path.chmod(mode)
    path.parent.chmod(folder_mode)
    work.chmod(0o777)
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(folder.stat().st_mode | 0o055)
    code, output = in_its_own("text_file", path, work, user=65534)
    assert code == 2
    assert_refused(Case("", b""), path, work, output)


# ---- 在这个进程里改 ----


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be replaced there")
@pytest.mark.parametrize("way", ["appended", "replaced"])
def test_a_text_that_changes_between_two_readings_is_refused(in_tmp, monkeypatch, way):
    path = in_tmp / "a.txt"
    path.write_text(PLAIN, encoding="utf-8")

    def changing(*given):
        yield from iter_text(*given)
        appended(path) if way == "appended" else replaced(path)

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
