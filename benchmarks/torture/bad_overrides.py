"""The cases of overrides.py: what people mistype, and what nobody should be able to type; every one of them must be refused."""

import functools
import random as randomness
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from ledger import ROOT
from omegaconf import OmegaConf

from nanogpt.base.composing import known_keys
from nanogpt.base.config import CHOICES, RANGES
from nanogpt.base.sample_config import SAMPLE_CHOICES, SAMPLE_RANGES, register_schemas


@dataclass(frozen=True)
class Case:
    """One command that must be refused."""

    kind: str
    program: str
    """A key of overrides.PROGRAMS."""
    arguments: tuple[str, ...]
    names: str = ""
    """What the line must name."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Files that lie in the working folder."""


@functools.cache
def composed(program: str) -> dict:
    """Everything that conf/<program>.yaml says, with the values as they are."""
    register_schemas()
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
        return OmegaConf.to_container(compose(program, ["dataset=text_file"] if program == "train" else []), resolve=True)


def leaves(node: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(dotted key, value) of all values that are no dicts."""
    for name, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def misspelt(word: str, random: randomness.Random) -> str:
    """The last part of a dotted key with one slip of the finger."""
    head, dot, last = word.rpartition(".")
    i = random.randrange(len(last))
    slips = [last[:i] + last[i + 1 :], last[: i + 1] + last[i:], last[:i] + random.choice("abcxyz") + last[i + 1 :], last + "s", last.title(),
    last + "_"]
    return head + dot + (random.choice(slips) or "x")


GROUPS = {
    "train": ("arch", "model", "precision", "optimizer", "memory", "finetune", "hardware", "dataset", "logger", "experiment"),
    "sample": ("precision", "sampler", "control"),
}
# 这些节点里的键不固定；groups 由程序填写
OPEN = ("groups", "model.extra", "logger", "control.templates", "control.styles", "control.emotions", "control.aliases")


def keys_of(program: str) -> dict[str, object]:
    return {key: value for key, value in leaves(composed(program)) if not key.startswith(OPEN)}


def misspelt_keys(program: str, random: randomness.Random) -> Iterator[Case]:
    have = {*known_keys(program), *keys_of(program)}
    for key in keys_of(program):
        wrong = misspelt(key, random)
        if wrong not in have:
            sign = random.choice(["", "", "+", "++", "~"])
            yield Case("misspelt key", program, (f"{sign}{wrong}=1" if sign != "~" else f"~{wrong}",), wrong.rpartition(".")[2])


def misspelt_options(program: str, random: randomness.Random) -> Iterator[Case]:
    for group in GROUPS[program]:
        options = sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))
        for option in random.sample(options, min(2, len(options))):
            wrong = misspelt(option, random)
            if wrong not in options:
                yield Case("misspelt option", program, (f"{group}={wrong}",), group)
        for value in ("null", "5", "''", "../train", "[nope]", "True"):
            yield Case("misspelt option", program, (f"{group}={value}",), "")


def wrong_types(program: str, random: randomness.Random) -> Iterator[Case]:
    """Words and lists where numbers belong, lists where words belong."""
    checked = {**RANGES, **SAMPLE_RANGES, **CHOICES, **SAMPLE_CHOICES}
    for key, value in keys_of(program).items():
        if isinstance(value, bool):
            bad = ["maybe", "[true]", "{a: true}", "7.5"]
        elif isinstance(value, int | float) or key in RANGES or key in SAMPLE_RANGES:
            bad = ["many", "[1]", "{a: 1}", "true"]
        elif isinstance(value, str) or key in checked:
            bad = ["[a]", "{a: 1}", "[[]]"]
        else:
            continue
        for typed in random.sample(bad, 2):
            yield Case("wrong type", program, (f"{key}={typed}",), key.rpartition(".")[2])


def out_of_range(program: str, random: randomness.Random) -> Iterator[Case]:
    ranges = RANGES if program == "train" else SAMPLE_RANGES
    for key, (low, high) in {**ranges, **({"batch_size": (1, 10**6), "learning_rate": (1e-300, 1000)} if program == "train" else {})}.items():
        bad = ["nan", "1e400", "-inf", str(10**30), "-1", str(10**25 + random.randrange(10**20)), "9" * 400]
        bad += ["0"] if low > 0 else []
        bad += [str(high * 10)] if high is not None and high < 10**20 else []
        # 装得进浮点数的大数，对有的键是对的
        bad = [typed for typed in bad if high is None or not low <= float(typed) <= high]
        for typed in random.sample(bad, 3):
            yield Case("out of range", program, (f"{key}={typed}",), key.rpartition(".")[2])


def empty(program: str, random: randomness.Random) -> Iterator[Case]:
    for key, value in keys_of(program).items():
        if isinstance(value, str | bool | int | float) and not key.startswith(("control.", "hardware.name", "model.name", "model.arch")):
            yield Case("empty value", program, (f"{key}={random.choice(['', '  '])}".strip() if random.random() < 0.5 else f"{key}=''",), "")


def grammar(program: str, random: randomness.Random) -> Iterator[Case]:
    key = "max_iters" if program == "train" else "max_new_tokens"
    for typed in (
        "[", "]", "{", "}", "(", "'", '"', "[1,", "{a:", "'5", '5"', "[[[[", "${", "${}", "${a", "$", "5 5", "=5", "==", ",", "1,", ",1", "1,2",
        "choice(1,2)",
        "range(1,3)", "nope(3)", "int()", "int(a)", "sort(3,1)", "glob(*)", "extend_list(1)", "\\", "%", "#", "&", "@", "!x", "`ls`", "$(ls)", ";ls",
        "[" * 300, "{a:" * 300, "(" * 15000, "[" * 15000, "'" * 1001, "1" * 4000, "${" * 200 + "}" * 200,
    ):
        yield Case("grammar", program, (f"{key}={typed}",), "")
    for typed in ("", " ", "=", "==", "=5", key, f"{key} =5", "+", "~", "++", "+=", "~=", ".=1", "a..b=1", ".a=1", "a.=1", "@=1", "a@b=1", "a@b@c=1",
        "a:b=1", "5", "[a]=1",
                  "'=1", '"', "😀=1", "键=1", "a\nb=1", "a\tb=1", f"{key}[0]=1", f"{key}.x=1", "model@arch=tiny", "arch@model.x=modern"):
        yield Case("grammar", program, (typed,), "")


def interpolations(program: str, random: randomness.Random) -> Iterator[Case]:
    number, word = ("max_iters", "out_dir") if program == "train" else ("num_samples", "out_dir")
    for key in (number, word):
        for typed in ("${nope}", "${oc.env:NOT_SET}", f"${{{key}}}", "${oc.env:}", "${oc.nope:1}", "${oc.select:}", "${..x}", "${.nope}",
            "${oc.decode:'['}",
                      "${oc.env:${nope}}", "${oc.create:{a: 1}}", "${precision}", "${now:}", "${hydra:runtime.nope}",
                      "${oc.dict.keys:precision}"):
            yield Case("interpolation", program, (f"{key}='{typed}'",), "")
    yield Case("interpolation", program, (f"{number}=${{seed}}", f"seed=${{{number}}}"), "")


def hydra_keys(program: str, random: randomness.Random) -> Iterator[Case]:
    for typed in (
        "hydra.nope=1", "hydra.mode=NOPE", "hydra.run.dir=a_file", "hydra.run.dir=/dev/null/x", "hydra.run.dir='${nope}'", "hydra.sweep=5",
        "hydra.job.chdir=maybe",
        "hydra/launcher=nope", "hydra/sweeper=nope", "hydra/job_logging=nope", "hydra/help=nope", "hydra.verbose={", "hydra.job.nope=1",
        "hydra.searchpath=5",
        "hydra.callbacks.x.y=1", "hydra.run=[]", "hydra=5", "~hydra.run.dir", "hydra.output_subdir=[a]", "+hydra.callbacks.x._target_=nope.Nope",
        "+hydra.callbacks.x._target_=os.system", "+hydra.callbacks.x._target_=builtins.exec", "hydra.run.dir=" + "x" * 300,
        "hydra.searchpath=[nope://x]",
    ):
        yield Case("hydra key", program, (typed,), "")
    for typed in ("--nope", "-x", "--cfg", "--cfg=nope", "--resolve", "--info=nope", "--config-dir=nope", "--config-dir=a_file",
        "--config-name=nope", "--config-path=nope",
                  "--config-name=../train", "--config-dir=", "--multirun=yes", "--config-name=", "-cd", "--experimental-rerun=nope",
                  "--shell-completion", "-sc"):
        yield Case("flag", program, (typed,), "")


TARGETS = (
    "os.system", "builtins.exec", "builtins.eval", "builtins.print", "builtins.dict", "builtins.list", "nanogpt.base.cli.main",
    "nanogpt.base.cli.run_script",
    "subprocess.run",
    "subprocess.Popen", "shutil.rmtree", "nope", "nope.Nope", ".", "..", "os", "", "os.", ".system", "torch.nn.Linear", "pathlib.Path", "sys.exit",
    "os._exit", "antigravity.x",
    "nanogpt.core.model", "nanogpt.core.model.gpt", "a b.c", "os.path", "sys.path", "builtins.None", "торч.Модуль", "nanogpt..model.GPT",
    "http.server.test",
)


def targets(program: str, random: randomness.Random) -> Iterator[Case]:
    keys = ["model._target_", "optimizer._target_", "+logger.mine._target_"] if program == "train" else ["sampler._target_", "control._target_"]
    for key in keys:
        for target in random.sample(TARGETS, 12):
            yield Case("target", program, (f"{key}='{target}'",), "")
    if program == "train":
        for typed in ("+logger.mine=5", "+logger.mine=[1]", "+logger.mine.level=3", "optimizer._target_=[a]", "+model.extra=5", "model._target_=5"):
            yield Case("target", program, (typed,), "")


def strange_arguments(program: str, random: randomness.Random) -> Iterator[Case]:
    key = "out_dir" if program == "train" else "init_from"
    for typed in ("\udcff", "a\udcc3b", "\x00", "a\x00b", "\ud83d", "\udcff\udcfe" * 50, "'\x00'", "x" * 100_000,
        "[" + "1," * 50_000 + "1]", "x/" * 40_000,
                  "\x1b[2J", "'\x1b]0;x\x07'", "'\u2028'", "x" * 300, "x" * 5000, "y/" * 4000):
        yield Case("argument", program, (f"{key}={typed}", *(("resume=null",
            ) if program == "train" else ())) if len(typed) < 299 or len(typed) > 5000 else (
            f"{'resume' if program == 'train' else 'out_dir'}={typed}",), "")
    for typed in ("\udcff=1", "\x00=1", "max\x00_iters=1", "\udcff", "seed=\udcff1", "seed='1\x00'", "-\udcff", "--config-dir=\udcff",
        "--config-dir=a\x00b", "device=\udcff"):
        yield Case("argument", program, (typed,), "")


def paths(random: randomness.Random) -> Iterator[Case]:
    for value in ("a_file", "a_file/x", "a_folder", "/dev/null", "/dev/null/x", "''", "nope/../a_file", "x" * 256, "y/" * 2200, "/proc/nope",
        "/dev/full/x", "run", "text.txt"):
        yield Case("path", "train", (f"out_dir={value}", "overwrite=false"), "")
    for value in ("nope", "a_file", "a_folder", "''", "/dev/null", "x" * 300, "run/config.yaml", "..", "~", "latest", "LATEST"):
        yield Case("path", "train", (f"resume='{value}'",), "")
        yield Case("path", "sample", (f"out_dir='{value}'",), "")
    for value in ("nope/nope/nope", "a_file", "a_folder", "/dev/null", "x" * 300, "nope.pt", "text.txt", "http://x/y", "a b", "../..", "-", "nope"):
        yield Case("path", "train", (f"init_from='{value}'",), "")
        yield Case("path", "sample", (f"init_from='{value}'",), "")
    for value in ("nope", "iter_1", "iter_99999999", "LAST", "[last]", "../best", "5", "best/..", "x" * 400, "last.pt"):
        yield Case("path", "train", ("resume=run", f"checkpoint='{value}'"), "checkpoint" if value != "[last]" else "")
        yield Case("path", "sample", ("out_dir=run", f"checkpoint='{value}'"), "checkpoint" if value != "[last]" else "")
    for value in ("nope", "a_folder_2", "/dev/null", "''", "x" * 300, "[a]", "{a: b}", "5", "null", "a_file/x", "empty.txt", "~", "$HOME",
        "nope.txt"):
        yield Case("path", "train", ("dataset=text_file", f"dataset.path={value}"), "")
        yield Case("path", "train", ("dataset=labelled", f"dataset.path={value}"), "")
        yield Case("path", "prepare", (f"path={value}",), "")
        yield Case("path", "prepare labelled", (f"path={value}",), "")
    for value in ("nope", "a_folder", "/dev/null", "x" * 300, "a_file/x", "empty.txt"):
        yield Case("path", "sample", ("out_dir=run", f"start=FILE:{value}"), "")
        yield Case("path", "sample", ("out_dir=run", f"prompts={value}"), "")
    for value in ("a_folder", "a_file/x", "/proc/x", "x" * 300, "new/../a_folder", "new/new/" + "x" * 300):
        yield Case("path", "sample", ("out_dir=run", "start=a", f"output={value}"), "")
        yield Case("path", "train", ("dataset=text_file", "dataset.path=text.txt", f"dataset.dir={value}"))
    yield Case("path", "train", ("dataset=text_file", "dataset.path=text.txt", "dataset.dir=a_file"), "a_file")
    yield Case("path", "train", ("dataset=labelled", "dataset.path=labelled.jsonl", "dataset.dir=a_file"), "a_file")
    # 前面的都对，错在后面：不能已经造好了文件夹
    yield Case("path", "sample", ("out_dir=run", "output=new/new/out.jsonl", "prompts=nope.txt"), "nope.txt")
    yield Case("path", "train", ("dataset=text_file", "dataset.path=empty.txt", "dataset.dir=new/new/prepared"), "empty.txt")
    yield Case("path", "train", ("dataset=labelled", "dataset.path=bad.jsonl", "dataset.dir=new/new/prepared"), "bad.jsonl")


def datasets(random: randomness.Random) -> Iterator[Case]:
    for dataset, program in (("text_file", "prepare"), ("labelled", "prepare labelled")):
        path = "text.txt" if dataset == "text_file" else "labelled.jsonl"
        for key, values in {
            "val_fraction": ("0", "1", "-1", "2", "nan", "inf", "abc", "[0.1]", "null", "1e400", "true", "1e-9", "0.999999999"),
            "tokenizer": ("nope", "5", "[char]", "null", "''", "Char"),
            "encoding": ("nope", "5", "[utf-8]", "null", "''", "base64", "zlib", "rot13", "idna", "punycode", "unicode_escape", "undefined"),
            "vocab_size": ("abc", "[1]", "1.5", "true", str(10**30), "-5", "0"), "judge_fraction": ("-1", "1", "nan", "abc", "0.96"),
            "name": ("nope", "../x", "[a]", "''"),
            "nope": ("1",),
        }.items():
            if dataset == "text_file" and key == "judge_fraction":
                continue
            for value in values:
                extra = ("dataset.tokenizer=bpe",) if key == "vocab_size" else ()
                yield Case("dataset", "train", (f"dataset={dataset}", f"dataset.path={path}", *extra, f"dataset.{key}={value}"), key)
                if random.random() < 0.6:
                    yield Case("dataset", program, (f"path={path}", *(e.removeprefix("dataset.") for e in extra), f"{key}={value}"), key)
    for dataset, typed in (("openwebtext", "dataset.val_every=1"), ("openwebtext", "dataset.val_every=abc"), ("openwebtext",
        "dataset.max_documents=abc"), ("plays_char", "dataset.tokenizer=nope"),
                           ("chinese_poetry", "dataset.song=5"), ("chinese_poetry", "dataset.tokenizer=nope"), ("openwebtext", "dataset.source=[a]")):
        yield Case("dataset", "train", (f"dataset={dataset}", typed), typed.partition("=")[0].partition(".")[2])


def sweeps(random: randomness.Random) -> Iterator[Case]:
    for typed in ("batch_size=", "batch_size=0", "batch_size=0,-1", "batch_size=a,b", "nope=1,2", "model=nope,tinny", "batch_size=1,",
        "batch_size=,", "max_iters=range(1)",
                  "seed=nan,inf", "max_iters=choice()", "out_dir=a_file", "model.n_head=7,9", "hydra/sweeper=nope", "hydra/launcher=nope",
                  "hydra.sweep.dir=a_file/x", "batch_size=glob(nope)",
                  "learning_rate=interval(1)", "dataset.val_fraction=5,6"):
        yield Case("sweep", "train", ("-m", *(("dataset=text_file", "dataset.path=text.txt") if "dataset" in typed else ()), typed), "")


def yaml_files(random: randomness.Random) -> Iterator[Case]:
    contents = {
        "broken": b"n_layer: [1\nn_head: 3\n", "tabs": b"n_layer:\n\t- 1\n", "twice": b"n_layer: 1\nn_layer: 2\n",
        "list": b"- 1\n- 2\n",
        "word": b"tiny\n", "number": b"5\n", "binary": bytes(range(256)), "gbk": "# 中文注释\nname: 小模型\n".encode("gbk"),
        "utf16": "n_layer: 1\n".encode("utf-16"),
        "deep": b"a: " + b"[" * 5000 + b"]" * 5000,
        "python": b"n_layer: !!python/object/apply:os.system ['echo hacked > hacked']\n", "nul": b"n_layer: 1\0\n", "self": b"a: &a [*a]\n",
        "unknown anchor": b"a: *b\n",
        "two documents": b"n_layer: 1\n---\nn_head: 1\n", "wrong type": b"n_layer: many\n", "unknown key": b"n_layers: 3\n",
        "nested": b"n_layer: {a: 1}\n", "range": b"mlp_ratio: -3\n",
        "interpolation": b"mlp_ratio: ${nope}\n", "huge": b"mlp_ratio: 1" + b"0" * 30 + b"\n", "no defaults": b"defaults:\n  - nope\n",
        "defaults number": b"defaults: 5\n",
        "defaults itself": b"defaults:\n  - mine\n", "defaults dict": b"defaults: {a: b}\n", "defaults other": b"defaults:\n  - /optimizer: nope\n",
        "override": b"defaults:\n  - override /optimizer: nope\n",
        "crlf tab": b"n_layer: 1\r\n\tn_head: 2\r\n", "colon": b"n_layer: 1: 2\n", "escape": b'name: "\\ud800"\n',
        "target": b"_target_: os.system\n", "nan": b"logit_softcap: .nan\n",
    }
    for content in contents.values():
        yield Case("yaml", "train", ("--config-dir=mine", "model=mine"), "", {"mine/model/mine.yaml": content})
    for group, name, content in (
        ("experiment", "loop", b"# @package _global_\ndefaults:\n  - /experiment: loop\n"), ("experiment", "top",
        b"# @package _global_\nlearning_rate: -1\n"),
        ("experiment", "bad", b"# @package _global_\nmodle: 3\n"), ("experiment", "members",
        b"# @package _global_\ndefaults:\n  - override /model: nope\n"),
        ("experiment", "package", b"# @package a.b.c\nx: 1\n"), ("optimizer", "mine", b"lr: 3\n"), ("optimizer", "mine", b"- 1\n"), ("dataset",
        "mine", b"path: x\n"),
        ("optimizer", "mine", b"_target_: nanogpt.core.optimizers.adamw\n"), ("optimizer", "mine", b""), ("dataset", "mine", b""), ("dataset", "mine",
        b"name: nope\ndir: null\n"),
        ("dataset", "mine", b"name: text_file\ndir: null\npath: 5\n"), ("logger", "mine", b"x: 5\n"), ("logger", "mine",
        b"x: {_target_: os.system}\n"), ("dataset", "mine", b"name: [a]\ndir: null\n"),
        ("dataset", "mine", b"name: text_file\ndir: null\npath: \"a\\0b\"\n"), ("experiment", "nul", b"# @package _global_\nout_dir: \"a\\0b\"\n"),
    ):
        yield Case("yaml", "train", ("--config-dir=mine", f"{group}={name}"), "", {f"mine/{group}/{name}.yaml": content})
    for group, content in (("sampler", b"x: 1\n"), ("sampler", b"_target_: os.system\n"), ("sampler", b"[]"), ("control",
        b"_target_: builtins.print\n"), ("control", b"5"), ("sampler", b"\xff\xfe")):
        yield Case("yaml", "sample", ("--config-dir=mine", f"{group}=mine", "out_dir=run", "start=a"), "", {f"mine/{group}/mine.yaml": content})
    for content in (b"max_iters: [", b"- 1", b"\xff", b"nope: 1\n", b"defaults:\n  - train_schema\n  - nope\n", b""):
        yield Case("yaml", "train", ("--config-dir=mine", "--config-name=mine"), "", {"mine/mine.yaml": content})


def sampling(random: randomness.Random) -> Iterator[Case]:
    """What is only seen with the model at hand."""
    for typed in ("sampler.temperature=-1", "sampler.temperature=nan", "sampler=top_k sampler.top_k=-1", "sampler=top_p sampler.top_p=2",
        "sampler=top_p sampler.top_p=abc", "+sampler.nope=1",
                  "control.guidance=99", "control.guidance=abc", "+control.nope=1", "control.strength=1e9", "start=中", "starts=['']",
                  "starts={a: 1}", "starts=[a] start=b",
                  "stop=['']", "stop=[[a]]", "prompts=bad.jsonl",
                  "prompts=empty.txt", "device=cuda:99", "device=tpu", "unknown=maybe", "start=''", "interactive=true prompts=text.txt",
                  "serve=true server.host=0.0.0.0",
                  "serve=true server.token=x", "serve=true server.port=70000", "serve=true server.host=nope.invalid", "precision=nope",
                  "precision.dtype=fp8"):
        yield Case("sampling", "sample", ("out_dir=run", *typed.split(" ")) if "{" not in typed else ("out_dir=run", typed), "")


def other_programs(random: randomness.Random) -> Iterator[Case]:
    for typed in ("", "--samples=abc", "--samples=0", "--samples=-5", "--samples=1" + "0" * 30, "--guidance=abc", "--guidance=nan", "--guidance=-1",
        "--guidance=1e400", "--kind=nope", "--nope",
                  "--output=a_folder", "--output=a_file/x.json", "--output=", "--plot=x.txt", "--plot=a_folder", "--lang=fr", "start=abc",
                  "seed=nope", "seed=-1", "sampler=nope", "max_new_tokens=0",
                  "+x=1", "~seed", "seed=[", "temperature=nan", "batch_size=10**9", "out_dir=x", "control=none", "checkpoint=nope", "seed=${nope}",
                  "batch_size=5000", "seed=\udcff", "seed=\x00"):
        yield Case("evaluate", "evaluate", ("run", typed) if typed else ("run",), "")
    for where in ("nope", "", "a_file", "a_folder", "x" * 300, "\udcff", "a\x00b"):
        yield Case("evaluate", "evaluate", (where,), "")
        yield Case("export", "export", (where, "target"), "")
    for arguments in ((), ("run",), ("run", "a_folder"), ("run", "a_file"), ("run", "a_file/x"), ("run", "/dev/null"), ("run", "x" * 300), ("run",
        ""), ("run", "/proc/x"), ("run", "t", "--checkpoint=nope"),
                      ("run", "t", "--checkpoint="), ("run", "t", "--nope"), ("run", "t", "--lang=fr"), ("run", "t", "extra"), ("run", "a\x00b"),
                      ("run", "\udcff"), ("run", "y/" * 3000)):
        yield Case("export", "export", arguments, "")
    for typed in ("pth=3", "path", "=", "==", "", "path=[", "path=${nope}", "name=x", "--help=5", "-x", "path=text.txt dir=a_file", "+path=x",
        "path=\udcff", "path=a\x00b", "path.x=1", "path=" + "x" * 5000):
        yield Case("prepare", "prepare", tuple(typed.split(" ")), "")


def all_cases(seed: int) -> list[Case]:
    """Every case, in a fixed order for a seed."""
    random = randomness.Random(seed)
    made: list[Case] = []
    for program in ("train", "sample"):
        for kind in (misspelt_keys, misspelt_options, wrong_types, out_of_range, empty, grammar, interpolations, hydra_keys, targets,
            strange_arguments):
            made += kind(program, random)
    for kind in (paths, datasets, sweeps, yaml_files, sampling, other_programs):
        made += kind(random)
    return made


def furnish(folder: Path) -> None:
    """The files that cases name."""
    (folder / "a_folder").mkdir(parents=True)
    (folder / "a_folder" / "x.bin").write_bytes(b"x")
    (folder / "a_file").write_text("x", encoding="utf-8")
    (folder / "empty.txt").write_text("", encoding="utf-8")
    (folder / "bad.jsonl").write_text('{"no": 1}\n', encoding="utf-8")
    (folder / "text.txt").write_text("".join(f"{i} times the king speaks of love, and the queen of {i * 7}.\n" for i in range(200)), encoding="utf-8")
    lines = (f'{{"text": "text number {i} of {i * i} about {i % 7} kings", "style": "{"ab"[i % 2]}"}}\n' for i in range(120))
    (folder / "labelled.jsonl").write_text("".join(lines), encoding="utf-8")
