"""What is typed arrives as it was typed, what is printed works when pasted: through Hydra's grammar and three shells."""

import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import make_config, make_sample_config
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from nanogpt.base import quoting
from nanogpt.base.cli import at_home
from nanogpt.base.config import ROOT
from nanogpt.base.language import ConfigError
from nanogpt.base.quoting import QUOTED, quoted
from nanogpt.base.user_yaml import checked_yaml
from nanogpt.base.value_checks import check_value, unescaped
from nanogpt.data import corpus
from nanogpt.run.session import Session

# 人们这样敲过的，与语法里的每个字符随机拼成的
PATHS = (
    "outputs/我的模型", r"D:\文 本\a.txt", r"\\nas\share\x.txt", r"D:\a\=b", "novel (1).txt", "novel, final.txt", "[draft] x.txt",
    "a=b.txt", "it's mine.txt", "R&D #2.txt", r"C:\Program Files (x86)\x", "~me/x.txt", "2024", "1e5", "true", "it's, it's", "'a' or 'b'",
    "{a: b}", "choice(a,b)", "C:\\x\\",
)
TEXTS = (
    *PATHS, "To be, or not to be", "it's 春天，", "春\\", "'tis the house", '"Hello"', "[Exit, pursued by a bear]",
    "'x'", "${seed}", "\\${a}\\\\${b", "a\\'b\\\\'", "x\ny", "😀", " ", "",
)


def random_texts(count):
    draw = random.Random(0)
    letters = "\\\\\\''\"\",=[](){}${}:~#&%+ \tx5春"
    return ["".join(draw.choices(letters, k=draw.randrange(1, 12))) for _ in range(count)]


def as_hydra_reads(argument, **how):
    """The value that a job gets, through the parsers of the command line and of a sweep."""
    override = OverridesParser.create().parse_override(quoted(argument, **how))
    again = OverridesParser.create().parse_override(f"x={override.get_value_element_as_str()}")
    return OmegaConf.to_container(OmegaConf.create({"x": again.value()}), resolve=True)["x"]


def test_a_text_arrives_as_it_was_typed():
    for text in [*TEXTS, *random_texts(400)]:
        for sweep in (False, True):
            assert as_hydra_reads(f"sample_prompt={text}", sweep=sweep) == text
    assert make_sample_config(quoted("start='tis")).start == "'tis"
    assert make_sample_config(quoted("stop='\\n")).stop == ["'\\n"]


def test_a_path_arrives_as_it_was_typed():
    for path in [*PATHS, *random_texts(400)]:
        # ${…} 仍是引用，整个在引号里的是 Hydra 的写法
        if "${" not in path and not re.fullmatch(QUOTED, path):
            assert as_hydra_reads(f"dataset.path={path}") == path
    assert as_hydra_reads("out_dir='a, b'") == "a, b" and make_config(quoted("out_dir=a-${seed}")).out_dir == "a-1337"


def test_commas_separate_the_paths_of_a_sweep_unless_they_stand_in_quotes():
    def swept(value):
        read = OverridesParser.create().parse_override
        override = read(quoted(f"dataset.path={value}", sweep=True))
        swept = override.is_sweep_override()
        return [read(f"x={v}").value() for v in override.sweep_string_iterator()] if swept else [override.value()]

    assert swept(r"novel (1).txt, D:\x.txt,it's.txt , 'a, b'") == ["novel (1).txt", r"D:\x.txt", "it's.txt", "a, b"]
    assert swept("'novel, final.txt'") == ["novel, final.txt"]
    assert swept("choice(a,b)") == ["a", "b"] and swept("a.txt") == ["a.txt"]


def test_the_home_folder_stands_for_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    cfg = make_config(quoted("dataset=text_file"), quoted("dataset.path=~/x.txt"), quoted("out_dir=~x"))
    at_home(cfg)
    assert (cfg.dataset["path"], cfg.out_dir) == (f"{tmp_path}/x.txt", "~x")
    options = corpus.typed_options("text_file", ["path=~/[a] #1: b.txt", "val_fraction=0.2"])
    assert options["path"] == f"{tmp_path}/[a] #1: b.txt" and options["val_fraction"] == 0.2


def test_a_text_that_no_config_file_can_hold_is_refused():
    with pytest.raises(ConfigError, match=r"sample_prompt=.*reference"):
        check_value("sample_prompt", "${seed}")


def test_a_line_break_is_typed_as_two_characters():
    for typed, text in ((r"a\nb\t", "a\nb\t"), (r"\\nabla", r"\nabla"), (r"C:\x\\y", r"C:\x\\y"), ("\\", "\\")):
        assert unescaped(typed) == text


def test_lists_and_sweeps_of_chinese_words_stay_lists_and_sweeps():
    assert quoted("stop=['。', \"a，b\",夏]") == "stop=['。', \"a，b\",'夏']"
    assert quoted("x=春,夏") == "x='春','夏'" and quoted("x=[春,a]") == "x=['春',a]"
    assert quoted("batch_size=4,8") == "batch_size=4,8"


# ---- 打印的命令 ----


def read_by_sh(line):
    """The words that a real sh makes of a line."""
    done = subprocess.run(["sh", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True)
    return done.stdout.decode("utf-8").split("\0")[:-1]


def read_by_powershell(line):
    """The same by the rules of PowerShell: quotes of five kinds, doubled inside."""
    words = re.findall(r"(?:[^ '‘’‚‛]|['‘’‚‛](?:[^'‘’‚‛]|['‘’‚‛]{2})*['‘’‚‛])+", line)
    return [re.sub(r"(['‘’‚‛])\1", r"\1", w[1:-1]) if w[0] == "'" else w for w in words]


def read_by_cmd(line):
    """The same by the rules of Windows' C library, after cmd has taken its carets away outside of quotes."""
    out, inside = "", False
    for char in line:
        inside ^= char == '"'
        out += "" if char == "^" and not inside else char
    words, current, i, inside = [], "", 0, False
    while i < len(out):
        slashes = re.match(r"(\\+)(?=(\")?)", out[i:])
        if slashes and slashes[2]:
            current += "\\" * (len(slashes[1]) // 2)
            i += len(slashes[1])
            if len(slashes[1]) % 2:
                current, i = current + '"', i + 1
        elif out[i] == '"' and inside and out[i + 1 : i + 2] == '"':
            # 引号里的两个是一个
            current, i = current + '"', i + 2
        elif out[i] == '"':
            inside, i = not inside, i + 1
        elif out[i] == " " and not inside:
            words, current, i = [*words, current], "", i + 1
        else:
            current, i = current + out[i], i + 1
    return [*words, current]


READERS = {"sh": read_by_sh, "powershell": read_by_powershell, "cmd": read_by_cmd}


@pytest.mark.skipif(sys.platform == "win32", reason="sh")
@pytest.mark.parametrize("shell", READERS)
def test_a_printed_path_is_read_back_by_the_shell_and_by_hydra(shell):
    paths = ["null", "'x'", "~/x", "it’s.txt", "100% %PATH%.txt", "a b", "!x", *PATHS, *random_texts(300)]
    # Windows 的文件名里没有双引号
    paths = [path for path in paths if shell != "cmd" or '"' not in path]
    line = " ".join(quoting.word(quoting.override("dataset.path", path), shell) for path in paths)
    typed = READERS[shell](line)
    assert len(typed) == len(paths)
    for word, path in zip(typed, paths):
        assert as_hydra_reads(word).removeprefix("./") == path, word


@pytest.mark.parametrize("typed", ['He said "yes" & left', 'a"b & del c', '"x" > y', '"', 'a\\"b|c', 'x"%PATH%"y', "a\\", *random_texts(200)])
def test_cmd_runs_nothing_out_of_a_text_with_quotes(typed):
    typed = re.sub(r"[\r\n]", "", typed) + " &"
    line = quoting.word(typed, "cmd")
    assert read_by_cmd(line) == [typed]
    # cmd 数引号：每个 & | < > 前面都是奇数个
    assert all(line.count('"', 0, found.start()) % 2 for found in re.finditer("[&|<>]", line))


def test_a_quoted_program_is_run_by_powershell(monkeypatch):
    monkeypatch.setattr(quoting, "shell_in_use", lambda: "powershell")
    monkeypatch.setattr(quoting, "started", lambda name: [r"C:\My Tools\nanogpt.exe", "train"])
    assert quoting.command("run_train.py", "max_iters=5") == r"& 'C:\My Tools\nanogpt.exe' train max_iters=5"


def test_values_and_scripts_are_named_as_they_have_to_be_typed(in_tmp, monkeypatch):
    assert quoting.override("max_iters", 5) == "max_iters=5"
    assert quoting.override("experiment", "my own") == "experiment='my own'"
    assert quoting.override("output", None) == "output=null" and quoting.override("output", "null") == "output=./null"
    assert as_hydra_reads(quoting.override("control.style", "'tis ${x}")) == "'tis ${x}"
    beside = {"run_train.py": "run_sample.py", "../n/run_sample.py": "../n/run_sample.py", "pytest": str(ROOT / "run_sample.py")}
    for typed, expected in beside.items():
        monkeypatch.setattr(sys, "argv", [typed])
        assert quoting.script("run_sample.py") == expected
    assert quoting.word("resume=outputs/我的", "sh") == "resume=outputs/我的"
    assert quoting.word("a='b c'", "sh") == '"a=\'b c\'"'


@pytest.mark.parametrize(("data", "labels", "stopped_by", "curves", "expected"), [
    (["dataset=plays_char"], {}, "max_iters", True, [
        "run_sample.py 'out_dir=runs/a b'", "'resume=runs/a b' max_iters=10", "tensorboard --logdir 'runs/a b'", "dataset.path=my.txt",
    ]),
    (["dataset=text_file", "dataset.path=x"], {}, "interrupted", False, ["run_sample.py", "run_train.py 'resume=runs/a b'"]),
    (["dataset=text_file", "dataset.path=x"], {}, "early_stop", False, ["out_dir", "'resume=runs/a b' early_stop_evals=0"]),
    (["dataset=labelled", "dataset.path=x", "max_iters=60"], {"style": {"it's": (1,)}}, "target_reached", False, [
        '"control.style=it\'s"', "max_iters=120 target_val_loss=null",
    ]),
    (["dataset=text_file", "dataset.path=x", "lr_decay_iters=5"], {}, "max_iters", False, ["out_dir", "max_iters=10 lr_decay_iters=10"]),
    (["dataset=text_file", "dataset.path=x", "lr_decay_iters=10"], {}, "max_iters", False, ["out_dir", "max_iters=10"]),
])
def test_what_is_said_to_come_next_fits_the_run(data, labels, stopped_by, curves, expected):
    cfg = make_config(*data, checked=False)
    tokenizer = SimpleNamespace(labels=labels)
    run = object.__new__(Session)
    run.run_dir, run.cfg, run.data = Path("runs/a b"), cfg, SimpleNamespace(tokenizer=tokenizer, marked=False)
    commands = list(run._next({"iters": 5, "stopped_by": stopped_by}, curves=curves).values())
    assert len(commands) == len(expected)
    assert all(part in command for part, command in zip(expected, commands)), commands


def test_whole_floats_in_a_yaml_of_ones_own_are_integers(tmp_path):
    recipe = "# @package _global_\nmax_iters: 1e3\nlearning_rate: 1e0\nmodel: {n_layer: 2.0}\n"
    for name, content in {"experiment/mine": recipe, "model/mini": "defaults: [tiny, _self_]\nn_head: 2e0\n"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.yaml").write_text(content, encoding="utf-8")
    with checked_yaml():
        cfg = make_config(f"hydra.searchpath=[file://{tmp_path.as_posix()}]", "model=mini", "experiment=mine")
    assert (cfg.max_iters, cfg.learning_rate, cfg.model.n_layer, cfg.model.n_head) == (1000, 1.0, 2, 2)


@pytest.mark.parametrize(("name", "environment", "shell"), [
    ("posix", {}, "sh"), ("posix", {"PSModulePath": "x"}, "powershell"), ("nt", {"PSModulePath": "x"}, "powershell"),
    ("nt", {"PROMPT": "$P$G", "PSModulePath": "x"}, "cmd"),
    ("nt", {"MSYSTEM": "MINGW64", "PROMPT": "$P$G"}, "sh"),
])
def test_the_shell_in_use_is_told_by_the_environment(monkeypatch, name, environment, shell):
    system = type("System", (), {"name": name, "environ": environment})
    monkeypatch.setattr(quoting, "os", system)
    assert quoting.shell_in_use() == shell
