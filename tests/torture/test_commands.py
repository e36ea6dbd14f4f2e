"""Whatever is typed or written into a config file, a wrong command is one clear line and exit code 2; nothing is written, no traceback shown."""

# 每一类错误一个策略，从真正的配置树里取键与选项来弄错；命令在 fork 里跑，前后列出工作目录、家目录、临时目录，必须一样
# 万一没有拒绝，也只训一步：数据已经备好

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
    "export": ("-m", "nanogpt.huggingface", "export"), "prepare": ("data/text_file/prepare.py",), "prepare labelled": ("data/labelled/prepare.py",),
}
SHORT = (
    *TINY, "dataset=text_file", "dataset.path=text.txt", "dataset.dir=prepared", "logger=none", "device=cpu", "max_iters=1", "batch_size=2",
    "eval_tokens=64", "sample_tokens=0", "hardware.peak_tflops_fp32=1",
)
# 说明正在做什么的行，不是错误；扫描里的任务失败时，Hydra 自己还会加一行
NOTE = re.compile(r"preparing the data set|fetching |not used: |\[20|training a vocabulary|serving|compiling the fast|[\d,]+ texts: |\w+: uses |Error executing job")


@dataclasses.dataclass(frozen=True)
class Case:
    """One command that must be refused."""

    # names：那一行必须提到什么；files：工作目录里另有的文件
    program: str
    arguments: tuple[str, ...]
    names: str = ""
    files: dict[str, bytes] = dataclasses.field(default_factory=dict, hash=False)


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
KEYS = {program: {k: v for k, v in leaves(dataclasses.asdict(cfg)) if not k.startswith(OPEN)} for program, cfg in CONFIGS.items()}
GROUPS = [(program, group) for program, named in (("train", ("sampler", "control")), ("sample", ())) for group in shipped_options() if group not in named
          and (program == "train" or group in ("precision", "sampler", "control"))]
NUMBERS = [(p, k) for p, keys in KEYS.items() for k, v in keys.items() if isinstance(v, int | float) and not isinstance(v, bool)]
WORDS = [(p, k) for p, keys in KEYS.items() for k, v in keys.items() if isinstance(v, str)]
FLAGS = [(p, k) for p, keys in KEYS.items() for k, v in keys.items() if isinstance(v, bool)]
FILLED = [(p, k) for p, k in (*NUMBERS, *WORDS, *FLAGS) if not k.startswith(("control.", "hardware.name", "model.name", "model.arch"))]
BOTH = st.sampled_from(["train", "sample"])


def pairs(keys, values):
    """A key of one of the programs with one of the values."""
    return st.tuples(st.sampled_from(keys), st.sampled_from(values)).map(lambda t: Case(t[0][0], (f"{t[0][1]}={t[1]}",), t[0][1].rpartition(".")[2]))


@st.composite
def misspelt(draw, words: list[str], have: set[str]) -> str:
    """The last part of a dotted word with one slip of the finger."""
    head, dot, last = draw(st.sampled_from(words)).rpartition(".")
    i = draw(st.integers(0, len(last) - 1))
    slips = [last[:i] + "x" + last[i + 1 :], last[: i + 1] + last[i:], last[:i] + last[i + 1 :], last + "s", last.title(), last + "_"]
    return draw(st.sampled_from([head + dot + slip for slip in slips if slip and head + dot + slip not in have] or [head + dot + "x_x"]))


@st.composite
def misspelt_keys(draw) -> Case:
    program = draw(BOTH)
    wrong = draw(misspelt(list(KEYS[program]), {*known_keys(program), *KEYS[program]}))
    typed = draw(st.sampled_from([f"{wrong}=1", f"+{wrong}=1", f"++{wrong}=1", f"~{wrong}"]))
    return Case(program, (typed,), wrong.rpartition(".")[2])


@st.composite
def misspelt_options(draw) -> Case:
    program, group = draw(st.sampled_from(GROUPS))
    options = shipped_options()[group]
    wrong = draw(misspelt(options, set(options)) | st.sampled_from(["null", "5", "''", "../train", "[nope]", "True"]))
    return Case(program, (f"{group}={wrong}",))


def typed(*lines: str, program: str = "train", names: str = ""):
    """Any of these command lines, words separated by spaces."""
    return st.sampled_from([Case(program, tuple(line.split(" ")), names) for line in lines])


def in_both(train_key: str, sample_key: str, values) -> st.SearchStrategy:
    """A key of each program with any of the values."""
    keys = {"train": train_key, "sample": sample_key}
    return st.tuples(BOTH, st.sampled_from(values)).map(lambda t: Case(t[0], (t[1].replace("KEY", keys[t[0]]),)))


GRAMMAR = [
    *("KEY=" + v for v in ("[", "{", "(", "'", '"', "[1,", "{a:", "'5", "[[[[", "${", "${}", "${a", "$", "5 5", "=5", ",", "1,", "1,2", "choice(1,2)",
      "range(1,3)", "nope(3)", "int(a)", "sort(3,1)", "glob(*)", "extend_list(1)", "\\", "%", "#", "&", "@", "`ls`", "$(ls)", ";ls", "[" * 300, "{a:" * 300,
      "(" * 15000, "'" * 1001, "1" * 4000, "${" * 200 + "}" * 200)),
    "", " ", "=", "==", "=5", "KEY", "KEY =5", "+", "~", "++", "+=", "~=", ".=1", "a..b=1", ".a=1", "a.=1", "@=1", "a@b=1", "a@b@c=1", "a:b=1", "5", "[a]=1",
    "'=1", '"', "😀=1", "键=1", "a\nb=1", "a\tb=1", "KEY[0]=1", "KEY.x=1", "model@arch=tiny", "arch@model.x=modern",
]
INTERPOLATIONS = [f"KEY='{v}'" for v in (
    "${nope}", "${oc.env:NOT_SET}", "${KEY}", "${oc.env:}", "${oc.nope:1}", "${oc.select:}", "${..x}", "${.nope}", "${oc.decode:'['}",
    "${oc.env:${nope}}", "${oc.create:{a: 1}}", "${precision}", "${now:}", "${hydra:runtime.nope}", "${oc.dict.keys:precision}",
)]
HYDRA = [
    "hydra.nope=1", "hydra.mode=NOPE", "hydra.run.dir=a_file", "hydra.run.dir=/dev/null/x", "hydra.run.dir='${nope}'", "hydra.sweep=5", "hydra.job.chdir=maybe",
    "hydra/launcher=nope", "hydra/sweeper=nope", "hydra/job_logging=nope", "hydra/help=nope", "hydra.verbose={", "hydra.searchpath=5", "hydra=5",
    "hydra.callbacks.x.y=1", "hydra.run=[]", "~hydra.run.dir", "hydra.output_subdir=[a]", "+hydra.callbacks.x._target_=nope.Nope", "hydra.run.dir=" + "x" * 300,
    "+hydra.callbacks.x._target_=os.system", "+hydra.callbacks.x._target_=builtins.exec", "hydra.searchpath=[nope://x]", "--nope", "-x", "--cfg", "--cfg=nope",
    "--resolve", "--info=nope", "--config-dir=nope", "--config-dir=a_file", "--config-name=nope", "--config-path=nope", "--config-name=../train", "--config-dir=",
    "--multirun=yes", "--config-name=", "-cd", "--experimental-rerun=nope", "--shell-completion", "-sc",
]
TARGETS = (
    "os.system", "builtins.exec", "builtins.print", "builtins.dict", "nanogpt.base.cli.run_script", "subprocess.Popen", "shutil.rmtree", "nope",
    "nope.Nope", ".", "..", "os", "", "os.", ".system", "torch.nn.Linear", "pathlib.Path", "sys.exit", "os._exit", "antigravity.x", "nanogpt.core.model", "a b.c",
    "os.path", "sys.path", "builtins.None", "торч.Модуль", "nanogpt.core..model.GPT", "http.server.test",
)
STRANGE = [
    "KEY=\udcff", "KEY=a\udcc3b", "KEY=\x00", "KEY=a\x00b", "KEY=\ud83d", "KEY='\x00'", "KEY=" + "x" * 100_000, "KEY=[" + "1," * 50_000 + "1]", "KEY=\x1b[2J",
    "KEY='\x1b]0;x\x07'", "KEY=" + "x" * 300, "KEY=" + "y/" * 4000, "\udcff=1", "\x00=1", "max\x00_iters=1", "\udcff", "seed=\udcff1", "seed='1\x00'", "-\udcff",
    "--config-dir=\udcff", "--config-dir=a\x00b", "device=\udcff",
]
PATHS = ("nope", "a_file/x", "''", "/dev/null", "x" * 300, "[a]", "{a: b}", "5", "null", "empty.txt", "~", "$HOME", "nope.txt")
CHECKPOINTS = ("nope", "iter_1", "iter_99999999", "LAST", "[last]", "../best", "5", "best/..", "x" * 400, "last.pt")
YAMLS = {"mine/model/mine.yaml": [
    b"n_layer: [1\nn_head: 3\n", b"n_layer:\n\t- 1\n", b"n_layer: 1\nn_layer: 2\n", b"- 1\n- 2\n", b"tiny\n", b"5\n", bytes(range(256)),
    "# 中文注释\nname: 小模型\n".encode("gbk"), "n_layer: 1\n".encode("utf-16"), b"a: " + b"[" * 5000 + b"]" * 5000,
    b"n_layer: !!python/object/apply:os.system ['echo hacked > hacked']\n", b"n_layer: 1\0\n", b"a: &a [*a]\n",
    b"a: *b\n", b"n_layer: 1\n---\nn_head: 1\n", b"n_layer: many\n", b"n_layers: 3\n", b"n_layer: {a: 1}\n", b"mlp_ratio: -3\n", b"mlp_ratio: ${nope}\n",
    b"mlp_ratio: 1" + b"0" * 30 + b"\n", b"defaults:\n  - nope\n", b"defaults: 5\n", b"defaults:\n  - mine\n", b"defaults: {a: b}\n", b"n_layer: 1: 2\n",
    b"defaults:\n  - /optimizer: nope\n", b"defaults:\n  - override /optimizer: nope\n", b'name: "\\ud800"\n', b"_target_: os.system\n", b"logit_softcap: .nan\n",
], "mine/optimizer/mine.yaml": [b"lr: 3\n", b"- 1\n", b"_target_: nanogpt.core.optimizers.adamw\n", b""], "mine/logger/mine.yaml": [b"x: 5\n", b"x: {_target_: os.system}\n"],
   "mine/dataset/mine.yaml": [b"path: x\n", b"", b"name: nope\ndir: null\n", b"name: text_file\ndir: null\npath: 5\n", b"name: [a]\ndir: null\n"],
   "mine/experiment/mine.yaml": [b"# @package _global_\n" + c for c in (b"defaults:\n  - /experiment: mine\n", b"learning_rate: -1\n", b"modle: 3\n",
   b"defaults:\n  - override /model: nope\n", b'out_dir: "a\\0b"\n')] + [b"# @package a.b.c\nx: 1\n"],
   "mine/sampler/mine.yaml": [b"x: 1\n", b"_target_: os.system\n", b"[]", b"\xff\xfe"], "mine/control/mine.yaml": [b"_target_: builtins.print\n", b"5"]}


def yaml_case(named: tuple[str, bytes]) -> Case:
    name, content = named
    group = name.split("/")[1]
    sample = group in ("sampler", "control")
    more = ("out_dir=run", "start=a") if sample else ()
    return Case("sample" if sample else "train", ("--config-dir=mine", f"{group}=mine", *more), files={name: content})


DATA = "dataset=text_file dataset.path=text.txt"
KINDS = {
    "misspelt key": misspelt_keys(), "misspelt option": misspelt_options(),
    "wrong type": st.one_of(pairs(NUMBERS, ["many", "[1]", "{a: 1}", "true"]), pairs(WORDS, ["[a]", "{a: 1}", "[[]]"]), pairs(FLAGS, ["maybe", "[true]", "7.5"])),
    "out of range": pairs(NUMBERS, ["nan", "-inf", "1e400", f"-{10**30}", "9" * 400]),
    "empty value": pairs(FILLED, ["", "''"]).map(lambda case: dataclasses.replace(case, names="")),
    "grammar": in_both("max_iters", "max_new_tokens", GRAMMAR), "interpolation": in_both("max_iters", "num_samples", INTERPOLATIONS) | in_both("out_dir", "out_dir", INTERPOLATIONS),
    "hydra": in_both("", "", HYDRA), "argument": in_both("out_dir", "init_from", STRANGE),
    "target": in_both("model._target_", "sampler._target_", [f"KEY='{t}'" for t in TARGETS]) | in_both("optimizer._target_", "control._target_", [f"KEY='{t}'" for t in TARGETS])
    | st.sampled_from([f"+logger.mine._target_='{t}'" for t in TARGETS] + ["+logger.mine=5", "+logger.mine=[1]", "+model.extra=5", "model._target_=5"]).map(lambda t: Case("train", (t,))),
    "path": st.one_of(
        typed(*(f"out_dir={v} overwrite=false" for v in ("a_file", "a_file/x", "a_folder", "/dev/null", "''", "nope/../a_file", "x" * 256, "/proc/nope", "run", "text.txt"))),
        typed(*(f"resume={v}" for v in ("nope", "a_file", "a_folder", "''", "/dev/null", "run/config.yaml", "..", "LATEST"))),
        typed(*(f"out_dir={v}" for v in ("nope", "a_file", "a_folder", "''", "/dev/null", "..", "LATEST")), program="sample"),
        typed(*(f"init_from={v}" for v in ("nope/nope/nope", "a_file", "/dev/null", "nope.pt", "text.txt", "http://x/y", "../..", "-"))),
        typed(*(f"resume=run checkpoint={v}" for v in CHECKPOINTS)), typed(*(f"out_dir=run checkpoint={v}" for v in CHECKPOINTS), program="sample"),
        typed(*(f"dataset={d} dataset.path={v.replace(' ', '')}" for v in PATHS for d in ("text_file", "labelled"))),
        typed(*(f"path={v.replace(' ', '')}" for v in PATHS), program="prepare"), typed(*(f"path={v.replace(' ', '')}" for v in PATHS), program="prepare labelled"),
        typed(*(f"out_dir=run {key}{v}" for v in (*PATHS[:6], "empty.txt") if v != "''" for key in ("start=FILE:", "prompts=")), program="sample"),
        typed(*(f"out_dir=run start=a output={v}" for v in ("a_folder", "a_file/x", "/proc/x", "x" * 300, "new/../a_folder")), program="sample"),
        # 前面的都对，错在后面：不能已经造好了文件夹
        typed("out_dir=run output=new/new/out.jsonl prompts=nope.txt", program="sample", names="nope.txt"),
        typed("dataset=text_file dataset.path=empty.txt dataset.dir=new/new/prepared", names="empty.txt"),
        typed("dataset=labelled dataset.path=bad.jsonl dataset.dir=new/new/prepared", names="bad.jsonl"),
    ),
    "dataset": st.one_of(
        *(typed(*(f"{DATA} dataset.{key}={v}" for v in values), names=key) for key, values in {
            "val_fraction": ("0", "1", "-1", "2", "nan", "inf", "abc", "[0.1]", "null", "1e400", "true", "1e-9", "0.999999999"),
            "tokenizer": ("nope", "5", "[char]", "null", "''", "Char"), "name": ("nope", "../x", "[a]", "''"), "nope": ("1",),
            "encoding": ("nope", "5", "[utf-8]", "null", "''", "base64", "zlib", "rot13", "idna", "punycode", "unicode_escape", "undefined"),
        }.items()),
        typed(*(f"{DATA} dataset.tokenizer=bpe dataset.vocab_size={v}" for v in ("abc", "[1]", "1.5", "true", str(10**30), "-5", "0")), names="vocab_size"),
        typed(*(f"dataset=labelled dataset.path=labelled.jsonl dataset.judge_fraction={v}" for v in ("-1", "1", "nan", "abc", "0.96")), names="judge_fraction"),
        typed("dataset=openwebtext dataset.val_every=1", "dataset=openwebtext dataset.val_every=abc", "dataset=plays_char dataset.tokenizer=nope"),
        typed("val_fraction=2 path=text.txt", "tokenizer=nope path=text.txt", "pth=3", "path", "=", "path=[", "path=${nope}", "name=x", "--help=5", program="prepare"),
    ),
    "sweep": typed(*(f"-m {v}" for v in (
        "batch_size=", "batch_size=0", "batch_size=0,-1", "batch_size=a,b", "nope=1,2", "model=nope,tinny", "batch_size=1,", "batch_size=,", "max_iters=range(1)",
        "seed=nan,inf", "max_iters=choice()", "out_dir=a_file", "model.n_head=7,9", "hydra/sweeper=nope", "hydra/launcher=nope", "hydra.sweep.dir=a_file/x",
        "batch_size=glob(nope)", "learning_rate=interval(1)", f"{DATA} dataset.val_fraction=5,6",
    ))),
    "yaml": st.sampled_from([yaml_case((name, content)) for name, contents in YAMLS.items() for content in contents]),
    # 有了模型才看得到的
    "sampling": typed(*(f"out_dir=run {v}" for v in (
        "starts=[a] start=b", "sampler.temperature=-1", "sampler.temperature=nan", "sampler=top_k sampler.top_k=-1", "sampler=top_p sampler.top_p=2", "sampler=top_p sampler.top_p=abc",
        "+sampler.nope=1", "control.guidance=99", "control.guidance=abc", "+control.nope=1", "start=中", "starts=['']", "stop=['']",
        "stop=[[a]]", "prompts=bad.jsonl", "prompts=empty.txt", "device=cuda:99", "device=tpu", "unknown=maybe", "interactive=true prompts=text.txt",
        "serve=true server.host=0.0.0.0", "serve=true server.token=x", "serve=true server.port=70000", "serve=true server.host=nope.invalid", "precision.dtype=fp8",
    )), program="sample"),
    "evaluate": typed(*(f"run {v}" for v in (
        "--samples=abc", "--samples=0", "--samples=1" + "0" * 30, "--guidance=abc", "--guidance=nan", "--guidance=1e400", "--kind=nope", "--nope",
        "--output=a_folder", "--output=a_file/x.json", "--plot=x.txt", "--lang=fr", "start=abc", "seed=nope", "seed=-1", "sampler=nope", "max_new_tokens=0",
        "+x=1", "~seed", "seed=[", "out_dir=x", "control=none", "checkpoint=nope", "batch_size=5000", "seed=\udcff", "seed=\x00",
    )), "run", "nope", "a_file", "a_folder", "x" * 300, "\udcff", "a\x00b", program="evaluate"),
    "export": typed(
        "run", "run a_folder", "run a_file", "run a_file/x", "run /dev/null", "run " + "x" * 300, "run /proc/x", "run t --checkpoint=nope", "run t --checkpoint=",
        "run t --nope", "run t --lang=fr", "run t extra", "run a\x00b", "run \udcff", "run " + "y/" * 3000, "nope t", "a_file t", "a_folder t", program="export",
    ),
}


# ---- 审判 ----


def command(case: Case) -> list[str]:
    """The whole command line: short and harmless but for what is attacked."""
    arguments = list(case.arguments)
    if case.program == "sample":
        # 采样与控制的设置要有模型才看得到；快速解码器要先编译，这里用不着
        own = any(a.lstrip("+~").startswith(("sampler", "control")) for a in arguments) and "out_dir=run" not in arguments
        return [*(("out_dir=run", "start=a", "max_new_tokens=2") if own else ()), "fast=false", *arguments]
    if case.program != "train" or "resume=run" in arguments:
        return arguments
    named = {a.lstrip("+~").partition("=")[0] for a in arguments}
    own_data = any(key.partition(".")[0] == "dataset" for key in named)
    base = [s for s in SHORT if s.partition("=")[0] not in named and not (own_data and s.startswith("dataset.dir"))]
    return [*(s for s in base if "dataset" not in named or not s.startswith("dataset")), *arguments]


def listing(*folders: Path) -> dict[str, tuple]:
    """Everything below some folders, files with size and time; what a lock leaves does not count."""
    found = {path: path.lstat() for folder in folders for path in folder.rglob("*") if "__pycache__" not in path.parts and path.name != "lock"}
    return {str(path): (s.st_mode, *((s.st_size, s.st_mtime_ns) if path.is_file() else ())) for path, s in found.items()}


def complaint(case: Case, code: int, output: str) -> str | None:
    """Why an answer breaks the promise, else None."""
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    if "Traceback" in output or code != 2:
        return f"exit code {code}: {lines[-1:]}"
    # 扫描里每个任务一行
    if not 1 <= len(errors) <= (2 if case.arguments[:1] == ("-m",) else 1):
        return f"{len(errors)} lines: {output[:300]!r}"
    if noise := [line for line in lines if line not in errors and not NOTE.match(line)]:
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
    (work / "a_folder/x.bin").write_bytes(b"x")
    labelled = "".join(f'{{"text": "text number {i} of {i * i} about {i % 7} kings", "style": "{"ab"[i % 2]}"}}\n' for i in range(120))
    contents = {"a_file": "x", "empty.txt": "", "bad.jsonl": '{"no": 1}\n', "text.txt": corpus_text(2000), "labelled.jsonl": labelled}
    for name, content in contents.items():
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
        os.environ.pop("XDG_CACHE_HOME", None)
        tempfile.tempdir = None
        language.set_language("en")


@POSIX
@pytest.mark.parametrize("kind", KINDS)
@cases(1, 150)
@given(data=st.data())
def test_a_wrong_command_is_one_clear_line_and_leaves_nothing(place, kind, data):
    case = data.draw(KINDS[kind])
    for name, content in case.files.items():
        (place / "work" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "work" / name).write_bytes(content)
    watched = (place, ROOT / "data", ROOT / "outputs")
    before = listing(*watched)
    ended = train(command(case), place / "work", program=PROGRAMS[case.program], before=Elsewhere(place))
    wrong = complaint(case, ended.code, ended.output)
    # 本机测出的峰值留给以后的训练，不是这条命令留下的痕迹
    after = listing(*watched)
    changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name) and ".cache" not in name]
    shutil.rmtree(place / "work/mine", ignore_errors=True)
    assert wrong is None and not changed, (ascii(case)[:500], wrong, changed)


# ---- 在这个进程里 ----


class Terminal(io.StringIO):
    """A stream that can be told how to write, as a terminal can."""

    # run_script 一开始就要它改编码
    def reconfigure(self, **kept):
        """Do nothing."""


@pytest.mark.parametrize("argument", ["+nothing.reads=this", "~max_iters", "--config-dir=", "resume=", "max_iters=${nope}", "out_dir=" + "x" * 5000], ids=lambda a: a[:20])
def test_a_wrong_command_is_refused_in_the_process_that_it_is_typed_in(in_tmp, monkeypatch, argument):
    import run_train

    stream, case = Terminal(), Case("train", (argument,))
    monkeypatch.setattr(sys, "argv", ["run", *command(case)])
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream), pytest.raises(SystemExit) as left:
        run_script("train", run_train.main)
    assert complaint(case, left.value.code, stream.getvalue()) is None and not os.listdir(in_tmp)


@pytest.mark.parametrize("number", [0, 3, 7, 9, 10])
def test_a_yaml_that_cannot_be_used_is_named(in_tmp, number):
    (in_tmp / "mine.yaml").write_bytes(YAMLS["mine/model/mine.yaml"][number])
    with pytest.raises(ConfigError, match=r"^mine\.yaml: this is no yaml that can be used \(.+\); correct it$"):
        check_yaml(Path("mine.yaml"))


@pytest.mark.parametrize(("error", "line"), [
    (OSError(28, "No space left on device", "x/a.bin"), "x/a.bin: the system refuses (No space left on device); free some disk space"),
    (OSError(30, "Read-only file system", b"x"), "x: the system refuses (Read-only file system); change its permissions or choose another place"),
    (OSError(24, "Too many open files"), "too many files are open"), (MemoryError(), "out of memory"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
])
def test_what_the_system_refuses_is_one_line_with_a_remedy(capsys, error, line):
    with pytest.raises(SystemExit) as left, one_line_each():
        raise error
    said = capsys.readouterr().err
    assert left.value.code == 2 and line in said and said.count("\n") == 1


@pytest.mark.parametrize(("error", "ends_with"), [(OSError(28, "No space left on device", "x"), SystemExit), (ZeroDivisionError("a bug"), ZeroDivisionError)])
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
