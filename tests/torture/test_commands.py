"""Whatever is typed or written into a config file, a wrong command is one clear line and exit code 2; nothing is written."""

# 每一类错误一个策略：键与选项取自真正的配置树再弄错，其余的由 hypothesis 乱写
# 命令在 fork 里跑，前后列出工作目录、家目录、临时目录，必须一样；万一没有拒绝，也只训一步

import contextlib
import dataclasses
import io
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from attack import POSIX, cases, train
from conftest import ROOT, TINY, composed, corpus_text, shipped_options
from hypothesis import given
from hypothesis import strategies as st

from nanogpt.base import language
from nanogpt.base.cli import run_script
from nanogpt.base.composing import known_keys
from nanogpt.base.errors import one_line_each
from nanogpt.base.language import ConfigError
from nanogpt.base.user_yaml import check_yaml

pytestmark = pytest.mark.torture
PROGRAMS = {
    "train": ("run_train.py",), "sample": ("run_sample.py",), "evaluate": ("-m", "nanogpt.control", "evaluate"),
    "export": ("-m", "nanogpt.huggingface", "export"), "prepare": ("data/text_file/prepare.py",),
    "prepare labelled": ("data/labelled/prepare.py",),
}
SHORT = (
    *TINY, "dataset=text_file", "dataset.path=text.txt", "dataset.dir=prepared", "logger=none", "device=cpu", "max_iters=1",
    "batch_size=2", "eval_tokens=64", "sample_tokens=0", "hardware.peak_tflops_fp32=1",
)
# 说明正在做什么的行，不是错误；扫描里的任务失败时，Hydra 自己还会加一行
NOTE = re.compile(
    r"preparing the data set|fetching |not used: |\[20|training a vocabulary|serving|compiling the fast|[\d,]+ texts: |\w+: uses |"
    "Error executing job"
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One command that must be refused."""

    # names：那一行必须提到什么；file：工作目录里另有的文件与内容
    program: str
    arguments: tuple[str, ...]
    names: str = ""
    file: tuple[str, bytes] | None = None


# ---- 错误的种类 ----


def leaves(node: dict, prefix: str = ""):
    """(dotted key, value) of all values that are no dicts."""
    for name, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


# 这些节点里的键不固定；groups 由程序填写
OPEN = ("groups", "model.extra", "logger", "control.templates", "control.styles", "control.emotions", "control.aliases")
CONFIGS = {"train": composed("train", ["dataset=text_file"]), "sample": composed("sample", [])}
KEYS = {p: {k: v for k, v in leaves(dataclasses.asdict(cfg)) if not k.startswith(OPEN)} for p, cfg in CONFIGS.items()}
ALL = [(program, key, value) for program, keys in KEYS.items() for key, value in keys.items()]
FLAGS = [(p, k) for p, k, v in ALL if isinstance(v, bool)]
NUMBERS = [(p, k) for p, k, v in ALL if isinstance(v, int | float) and not isinstance(v, bool)]
WORDS = [(p, k) for p, k, v in ALL if isinstance(v, str)]
FILLED = [one for one in (*NUMBERS, *WORDS, *FLAGS) if not one[1].startswith(("control.", "hardware.name", "model.name", "model.arch"))]
OF_SAMPLE = ("sampler", "control")
GROUPS = [("sample" if group in OF_SAMPLE else "train", group) for group in shipped_options()] + [("sample", "precision")]


@st.composite
def slip(draw, word: str, have: set[str]) -> str:
    """The last part of a dotted word with one slip of the finger."""
    head, dot, last = word.rpartition(".")
    i = draw(st.integers(0, len(last) - 1))
    slips = [last[:i] + "x" + last[i + 1 :], last[: i + 1] + last[i:], last[:i] + last[i + 1 :], last + "s", last.title(), last + "_"]
    return draw(st.sampled_from([head + dot + s for s in slips if s and head + dot + s not in have] or [head + dot + "x_x"]))


@st.composite
def misspelt_keys(draw) -> Case:
    program, key, _ = draw(st.sampled_from(ALL))
    wrong = draw(slip(key, {*known_keys(program), *KEYS[program]}))
    return Case(program, (draw(st.sampled_from(["{}=1", "+{}=1", "++{}=1", "~{}"])).format(wrong),), wrong.rpartition(".")[2])


@st.composite
def misspelt_options(draw) -> Case:
    program, group = draw(st.sampled_from(GROUPS))
    options = shipped_options()[group]
    wrong = slip(draw(st.sampled_from(options)), set(options))
    return Case(program, (f"{group}={draw(wrong | st.sampled_from(['null', '5', repr(''), '../train', '[nope]', 'True']))}",))


def values(keys, *wrong: str, named: bool = True):
    """A key of one of the programs with one of the values."""
    pairs = st.tuples(st.sampled_from(keys), st.sampled_from(wrong))
    return pairs.map(lambda t: Case(t[0][0], (f"{t[0][1]}={t[1]}",), t[0][1].rpartition(".")[2] if named else ""))


def lines(program: str, *typed: str, names: str = ""):
    """Any of these command lines, words separated by spaces."""
    return st.sampled_from([Case(program, tuple(line.split(" ")), names) for line in typed])


def keyed(train_key: str, sample_key: str, typed):
    """What was drawn, with KEY standing for a key of either program."""
    both = st.sampled_from([("train", train_key), ("sample", sample_key)])
    return st.tuples(both, typed).map(lambda t: Case(t[0][0], (t[1].replace("KEY", t[0][1]),)))


# 没有数字与字母，就不会碰巧是一个对的值
SCRIBBLE = st.text(st.sampled_from("[]{}()'\"$,=:@~+-.\\%#&!`; \t\n中😀\udcff\x00\x1b"), min_size=1, max_size=12)
HUGE = st.sampled_from(["[" * 300, "{a:" * 300, "(" * 15000, "'" * 1001, "1" * 4000, "${" * 200 + "}" * 200, "[" + "1," * 1000 + "1]"])
REFERENCES = [f"KEY='{v}'" for v in (
    "${nope}", "${oc.env:NOT_SET}", "${KEY}", "${oc.env:}", "${oc.nope:1}", "${oc.select:}", "${..x}", "${oc.decode:'['}",
    "${oc.env:${nope}}", "${oc.create:{a: 1}}", "${precision}", "${now:}", "${hydra:runtime.nope}",
)]
HYDRA = [
    "hydra.nope=1", "hydra.mode=NOPE", "hydra.run.dir=a_file", "hydra.run.dir=/dev/null/x", "hydra.run.dir='${nope}'", "hydra=5",
    "hydra.job.chdir=maybe", "hydra/launcher=nope", "hydra/help=nope", "hydra.searchpath=5", "hydra.callbacks.x.y=1", "~hydra.run.dir",
    "+hydra.callbacks.x._target_=os.system", "hydra.run.dir=" + "x" * 300, "hydra.searchpath=[nope://x]", "--nope", "-x", "--cfg",
    "--cfg=nope", "--resolve", "--config-dir=nope", "--config-dir=a_file", "--config-name=nope", "--config-name=../train",
    "--config-dir=", "--multirun=yes", "-cd", "--experimental-rerun=nope", "--shell-completion", "--config-dir=\udcff", "-sc",
]
TARGETS = [f"KEY='{target}'" for target in (
    "os.system", "builtins.exec", "builtins.print", "nanogpt.base.cli.run_script", "subprocess.Popen", "shutil.rmtree", "nope.Nope",
    ".", "os", "", "os.", ".system", "torch.nn.Linear", "sys.exit", "os._exit", "nanogpt.core.model", "a b.c", "sys.path", "торч.Модуль",
)]
STRANGE = [f"KEY={value}" for value in ("\udcff", "\x00", "\ud83d", "'\x00'", "x" * 100_000, "\x1b[2J", "x" * 300, "y/" * 4000)]
PATHS = ("nope", "a_file/x", "/dev/null", "x" * 300, "[a]", "5", "null", "empty.txt", "~", "$HOME")
CHECKPOINTS = ("nope", "iter_1", "iter_99999999", "LAST", "[last]", "../best", "5", "best/..", "x" * 400, "last.pt")
YAMLS = {
    "model": [
        b"n_layer: [1\nn_head: 3\n", b"n_layer:\n\t- 1\n", b"n_layer: 1\nn_layer: 2\n", b"- 1\n- 2\n", b"tiny\n", bytes(range(256)),
        "# 中文注释\nname: 小模型\n".encode("gbk"), "n_layer: 1\n".encode("utf-16"), b"a: " + b"[" * 5000, b"n_layer: 1\0\n", b"a: *b\n",
        b"n_layer: !!python/object/apply:os.system ['echo hacked > hacked']\n", b"a: &a [*a]\n", b"n_layer: 1\n---\nn_head: 1\n",
        b"n_layer: many\n", b"n_layers: 3\n", b"mlp_ratio: -3\n", b"mlp_ratio: ${nope}\n", b"defaults:\n  - nope\n", b"defaults: 5\n",
        b"defaults:\n  - mine\n", b"defaults:\n  - /optimizer: nope\n", b'name: "\\ud800"\n', b"_target_: os.system\n",
    ],
    "optimizer": [b"lr: 3\n", b"- 1\n", b"_target_: nanogpt.core.optimizers.adamw\n", b""],
    "logger": [b"x: 5\n", b"x: {_target_: os.system}\n"], "dataset": [b"path: x\n", b"", b"name: nope\ndir: null\n", b"name: [a]\ndir: null\n"],
    "experiment": [b"# @package _global_\n" + c for c in (b"defaults:\n  - /experiment: mine\n", b"learning_rate: -1\n", b"modle: 3\n")],
    "sampler": [b"x: 1\n", b"_target_: os.system\n", b"[]", b"\xff\xfe"], "control": [b"_target_: builtins.print\n", b"5"],
}


def own_yaml(group: str, content: bytes) -> Case:
    more = ("out_dir=run", "start=a") if group in OF_SAMPLE else ()
    program = "sample" if group in OF_SAMPLE else "train"
    return Case(program, ("--config-dir=mine", f"{group}=mine", *more), file=(f"mine/{group}/mine.yaml", content))


DATA, LABELLED = "dataset=text_file dataset.path=text.txt dataset.", "dataset=labelled dataset.path=labelled.jsonl dataset."
FRACTIONS = ("0", "1", "-1", "nan", "abc", "[0.1]", "null", "1e-9", "0.999999999")
CODECS = ("nope", "5", "[utf-8]", "null", "base64", "zlib", "rot13", "idna", "punycode", "unicode_escape", "undefined")
KINDS = {
    "misspelt key": misspelt_keys(), "misspelt option": misspelt_options(),
    "wrong type": values(NUMBERS, "many", "[1]", "{a: 1}", "true") | values(WORDS, "[a]", "{a: 1}", "[[]]") | values(FLAGS, "maybe", "7.5"),
    "out of range": values(NUMBERS, "nan", "-inf", "1e400", f"-{10**30}", "9" * 400), "empty value": values(FILLED, "", "''", named=False),
    "grammar": keyed("max_iters", "max_new_tokens", (SCRIBBLE | HUGE).map("KEY={}".format)) | keyed("", "", SCRIBBLE),
    "reference": keyed("max_iters", "num_samples", st.sampled_from(REFERENCES)) | keyed("out_dir", "out_dir", st.sampled_from(REFERENCES)),
    "hydra": keyed("", "", st.sampled_from(HYDRA)), "argument": keyed("out_dir", "init_from", st.sampled_from(STRANGE)),
    "target": keyed("model._target_", "sampler._target_", st.sampled_from(TARGETS))
    | keyed("optimizer._target_", "control._target_", st.sampled_from(TARGETS)) | lines("train", "+logger.mine=5", "+model.extra=5"),
    "path": st.one_of(
        lines("train", *(f"out_dir={v} overwrite=false" for v in ("a_file", "a_file/x", "a_folder", "/dev/null", "x" * 256, "run"))),
        lines("train", *(f"{key}={v}" for key in ("resume", "init_from") for v in ("a_file", "/dev/null", "..", "nope/nope/nope"))),
        lines("sample", *(f"out_dir={v}" for v in ("nope", "a_file", "a_folder", "/dev/null", "..", "LATEST"))),
        lines("train", *(f"resume=run checkpoint={v}" for v in CHECKPOINTS)), lines("sample", *(f"out_dir=run checkpoint={v}" for v in CHECKPOINTS)),
        lines("train", *(f"dataset={d} dataset.path={v}" for v in PATHS for d in ("text_file", "labelled"))),
        lines("prepare", *(f"path={v}" for v in PATHS)), lines("prepare labelled", *(f"path={v}" for v in PATHS)),
        lines("sample", *(f"out_dir=run {key}{v}" for v in PATHS[:5] for key in ("start=FILE:", "prompts="))),
        lines("sample", *(f"out_dir=run start=a output={v}" for v in ("a_folder", "a_file/x", "x" * 300, "new/../a_folder"))),
        # 前面的都对，错在后面：不能已经造好了文件夹
        lines("sample", "out_dir=run output=new/new/out.jsonl prompts=nope.txt", names="nope.txt"),
        lines("train", "dataset=labelled dataset.path=bad.jsonl dataset.dir=new/new/prepared", names="bad.jsonl"),
    ),
    "dataset": st.one_of(
        lines("train", *(f"{DATA}val_fraction={v}" for v in FRACTIONS), names="val_fraction"),
        lines("train", *(f"{DATA}encoding={v}" for v in CODECS), names="encoding"),
        lines("train", *(f"{DATA}tokenizer={v}" for v in ("nope", "5", "[char]", "null", "Char")), names="tokenizer"),
        lines("train", *(f"{DATA}tokenizer=bpe dataset.vocab_size={v}" for v in ("abc", "1.5", "true", "-5", "0")), names="vocab_size"),
        lines("train", *(f"{LABELLED}judge_fraction={v}" for v in ("-1", "1", "nan", "abc", "0.96")), names="judge_fraction"),
        lines("prepare", "val_fraction=2 path=text.txt", "tokenizer=nope path=text.txt", "pth=3", "path", "=", "path=[", "path=${nope}"),
    ),
    "sweep": lines("train", *(f"-m {v}" for v in (
        "batch_size=", "batch_size=0", "batch_size=0,-1", "batch_size=a,b", "nope=1,2", "model=nope,tinny", "batch_size=1,",
        "max_iters=range(1)", "seed=nan,inf", "out_dir=a_file", "model.n_head=7,9", "hydra.sweep.dir=a_file/x", f"{DATA}val_fraction=5,6",
    ))),
    "yaml": st.sampled_from([own_yaml(group, content) for group, contents in YAMLS.items() for content in contents]),
    # 有了模型才看得到的
    "sampling": lines("sample", *(f"out_dir=run {v}" for v in (
        "starts=[a] start=b", "sampler.temperature=-1", "sampler=top_p sampler.top_p=2", "+sampler.nope=1", "control.guidance=99",
        "start=中", "starts=['']", "stop=['']", "stop=[[a]]", "prompts=bad.jsonl", "device=cuda:99", "unknown=maybe",
        "interactive=true prompts=text.txt", "serve=true server.host=0.0.0.0", "serve=true server.token=x", "precision.dtype=fp8",
    ))),
    "evaluate": lines("evaluate", *(f"run {v}" for v in (
        "--samples=abc", "--samples=0", "--guidance=nan", "--guidance=1e400", "--kind=nope", "--nope", "--output=a_folder", "--lang=fr",
        "--output=a_file/x.json", "--plot=x.txt", "seed=-1", "sampler=nope", "+x=1", "~seed", "seed=[", "seed=\udcff", "seed=\x00",
    )), "run", "nope", "a_file", "a_folder", "\udcff", "a\x00b"),
    "export": lines(
        "export", "run", "run a_folder", "run a_file", "run a_file/x", "run /dev/null", "run " + "x" * 300, "run t --checkpoint=nope",
        "run t --nope", "run t --lang=fr", "run t extra", "run a\x00b", "run \udcff", "nope t", "a_file t", "a_folder t",
    ),
}


# ---- 审判 ----


def command(case: Case) -> list[str]:
    """The whole command line: short and harmless but for what is attacked."""
    arguments = list(case.arguments)
    if case.program == "sample":
        # 采样与控制的设置要有模型才看得到；快速解码器要先编译，这里用不着
        own = any(a.lstrip("+~").startswith(OF_SAMPLE) for a in arguments) and "out_dir=run" not in arguments
        return [*(("out_dir=run", "start=a", "max_new_tokens=2") if own else ()), "fast=false", *arguments]
    if case.program != "train" or "resume=run" in arguments:
        return arguments
    named = {a.lstrip("+~").partition("=")[0] for a in arguments}
    own_data = any(key.partition(".")[0] == "dataset" for key in named)
    base = [s for s in SHORT if s.partition("=")[0] not in named and not (own_data and s.startswith("dataset.dir"))]
    return [*(s for s in base if "dataset" not in named or not s.startswith("dataset")), *arguments]


def listing(*folders: Path) -> dict[str, tuple]:
    """Everything below some folders, files with size and time; what a lock or a cache leaves does not count."""
    found = {path: path.lstat() for folder in folders for path in folder.rglob("*") if not {"__pycache__", "lock", ".cache"} & set(path.parts)}
    return {str(path): (s.st_mode, *((s.st_size, s.st_mtime_ns) if path.is_file() else ())) for path, s in found.items()}


def complaint(case: Case, code: int, output: str) -> str | None:
    """Why an answer breaks the promise, else None."""
    said = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in said if line.startswith("error: ")]
    if "Traceback" in output or code != 2:
        return f"exit code {code}: {said[-1:]}"
    # 扫描里每个任务一行
    if not 1 <= len(errors) <= (2 if case.arguments[:1] == ("-m",) else 1):
        return f"{len(errors)} lines: {output[:300]!r}"
    if noise := [line for line in said if line not in errors and not NOTE.match(line)]:
        return f"more than the line: {noise[0]!r}"
    if len(errors[0]) > 1500 or not errors[0].isprintable():
        return f"no clear line: {errors[0][:200]!r}"
    return None if case.names in errors[0] else f"does not name {case.names}: {errors[0]!r}"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with what cases name and a trained run (work), an empty home and an empty folder for temporary files."""
    place = tmp_path_factory.mktemp("commands")
    for name in ("work/a_folder", "home", "tmp"):
        (place / name).mkdir(parents=True)
    work = place / "work"
    labelled = "".join(f'{{"text": "number {i} of {i * i} about {i % 7} kings", "style": "{"ab"[i % 2]}"}}\n' for i in range(120))
    contents = {"a_file": "x", "empty.txt": "", "bad.jsonl": '{"no": 1}\n', "text.txt": corpus_text(2000), "labelled.jsonl": labelled}
    for name, content in {**contents, "a_folder/x.bin": "x"}.items():
        (work / name).write_text(content, encoding="utf-8")
    ended = train([*SHORT, "out_dir=run"], work)
    assert ended.code == 0, ended.output
    shutil.rmtree(work / "outputs", ignore_errors=True)
    return place


class Elsewhere:
    """In the child: a home and a folder for temporary files of its own, and nothing is fetched."""

    # 类而不是闭包：另起进程来 fork 时，它要能打包送过去
    def __init__(self, place: Path):
        self.place = place

    def __call__(self) -> None:
        os.environ.update(HOME=str(self.place / "home"), TMPDIR=str(self.place / "tmp"), HF_HUB_OFFLINE="1", LANG="C.UTF-8")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(self.place / "home/.cache/inductor")
        tempfile.tempdir = None
        language.set_language("en")


@POSIX
@pytest.mark.parametrize("kind", KINDS)
@cases(1, 150)
@given(data=st.data())
def test_a_wrong_command_is_one_clear_line_and_leaves_nothing(place, kind, data):
    case = data.draw(KINDS[kind])
    if case.file:
        path = place / "work" / case.file[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(case.file[1])
    watched = (place, ROOT / "data", ROOT / "outputs")
    before = listing(*watched)
    ended = train(command(case), place / "work", program=PROGRAMS[case.program], before=Elsewhere(place))
    wrong, after = complaint(case, ended.code, ended.output), listing(*watched)
    changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    shutil.rmtree(place / "work/mine", ignore_errors=True)
    assert wrong is None and not changed, (ascii(case)[:500], wrong, changed)


# ---- 在这个进程里 ----


class Terminal(io.StringIO):
    """A stream that can be told how to write, as a terminal can."""

    # run_script 一开始就要它改编码
    def reconfigure(self, **kept):
        """Do nothing."""


@pytest.mark.parametrize("argument", ["+nothing.reads=this", "~max_iters", "--config-dir=", "max_iters=${nope}", "out_dir=" + "x" * 5000])
def test_a_wrong_command_is_refused_in_the_process_that_it_is_typed_in(in_tmp, monkeypatch, argument):
    import run_train

    stream, case = Terminal(), Case("train", (argument,))
    monkeypatch.setattr(sys, "argv", ["run", *command(case)])
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream), pytest.raises(SystemExit) as left:
        run_script("train", run_train.main)
    assert complaint(case, left.value.code, stream.getvalue()) is None and not os.listdir(in_tmp)


@pytest.mark.parametrize("content", [*YAMLS["model"][:4:3], YAMLS["model"][6], YAMLS["model"][11]])
def test_a_yaml_that_cannot_be_used_is_named(in_tmp, content):
    (in_tmp / "mine.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"^mine\.yaml: this yaml cannot be used \(.+\); correct it$"):
        check_yaml(Path("mine.yaml"))


@pytest.mark.parametrize(("error", "line"), [
    (OSError(28, "No space left on device", "a.bin"), "a.bin: the system refuses (No space left on device); free some disk space"),
    (OSError(30, "Read-only", b"x"), "x: the system refuses (Read-only); change its permissions or choose another place"),
    (OSError(24, "Too many open files"), "too many files are open"), (MemoryError(), "out of memory"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
])
def test_what_the_system_refuses_is_one_line_with_a_remedy(capsys, error, line):
    with pytest.raises(SystemExit) as left, one_line_each():
        raise error
    said = capsys.readouterr().err
    assert left.value.code == 2 and line in said and said.count("\n") == 1


@pytest.mark.parametrize(("error", "ends_with"), [(OSError(28, "No space left", "x"), SystemExit), (ZeroDivisionError("a bug"), ZeroDivisionError)])
def test_in_a_run_too_while_a_bug_keeps_its_traceback(in_tmp, monkeypatch, error, ends_with):
    def task(cfg, given):
        raise error

    stream = Terminal()
    monkeypatch.setattr(sys, "argv", ["run_train.py"])
    with contextlib.redirect_stderr(stream), contextlib.redirect_stdout(stream), pytest.raises(ends_with):
        run_script("train", task)
    assert ("the system refuses" in stream.getvalue()) == (ends_with is SystemExit)


def test_a_value_is_shown_so_that_the_line_stays_one_line():
    shown = language.presentable
    assert (shown("a\nb\x1b\0\ud800"), shown("　中"), shown(5), shown(True)) == ("a\\nb\\x1b\\x00\\ud800", "　中", 5, True)
    assert len(shown("x" * 10**6)) < 600 and len(str(shown(10**5000))) < 600
    assert "\n" not in str(ConfigError("missing_file", key="dataset.path", got="a\nb"))
