"""A short subset of benchmarks/torture/overrides.py and texts.py: whatever is typed or given, one clear line or exact data."""

import contextlib
import io
import sys
from pathlib import Path

import pytest
from conftest import torture

from nanogpt.base import language
from nanogpt.base.cli import run_script
from nanogpt.base.errors import one_line_each
from nanogpt.base.language import ConfigError
from nanogpt.base.user_yaml import check_yaml
from nanogpt.data.source_text import iter_text

torture("ledger")
bad_overrides, bad_texts = torture("bad_overrides"), torture("bad_texts")
overrides, texts = torture("overrides"), torture("texts")


class Stream(io.StringIO):
    def reconfigure(self, **kept):
        """A terminal has this."""


def typed(monkeypatch, case):
    """The answer to a command of run_train.py or run_sample.py in this process, for what is refused before torch is needed."""
    import run_sample
    import run_train

    main = {"train": run_train.main, "sample": run_sample.main}[case.program]
    stream, code = Stream(), 0
    monkeypatch.setattr(sys, "argv", ["run", *overrides.arguments_of(case)])
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        try:
            run_script(case.program, main)
        except SystemExit as error:
            code = error.code
    return overrides.Answer(code, stream.getvalue())


# 每种一两个；都在导入 torch 之前就该有答复
COMMANDS = [
    ("train", "+nothing.reads=this"), ("train", "~max_iters"), ("train", "model.n_layer=1" + "0" * 30), ("train", "max_iters=${nope}"), ("train", "out_dir=${hydra:runtime.nope}"),
    ("train", "--config-dir="),
    ("train", "resume="), ("train", "out_dir=\udcff"), ("train", "--nope"), ("train", "--experimental-rerun=x"), ("train", "max_iters=" + "[" * 5000),
    ("train", "out_dir=" + "x" * 5_000), ("train", "+logger.mine=5"), ("sample", "sampler=null"), ("sample", "~control.templates"), ("train", "~optimizer.weight_decay"), ("train", "lr=1e-3"), ("sample", "stop=[[a]]"), ("train", "model.ngrams=[[2]]"),
]


@pytest.mark.parametrize(("program", "argument"), COMMANDS, ids=lambda value: value[:25])
def test_a_wrong_command_is_one_clear_line_and_writes_nothing(in_tmp, monkeypatch, program, argument):
    case = overrides.Case("any", program, (argument,))
    answer = typed(monkeypatch, case)
    assert overrides.complaint(case, answer, sorted(overrides.listing(in_tmp))) is None and answer.code == 2


YAMLS = {
    "model": b"n_layer: [1\n", "deep": b"a: " + b"[" * 5000,
    "list": b"- 1\n", "GBK": "name: 小模型\n".encode("gbk"), "python": b"n_layer: !!python/object/apply:os.system [x]\n",
}


@pytest.mark.parametrize("name", YAMLS)
def test_a_yaml_that_cannot_be_used_is_named(in_tmp, name):
    (in_tmp / "mine.yaml").write_bytes(YAMLS[name])
    with pytest.raises(ConfigError, match=r"^mine\.yaml: this is no yaml that can be used \(.+\); correct it$"):
        check_yaml(Path("mine.yaml"))


def test_hydra_takes_no_yaml_in_that_has_not_been_looked_at(in_tmp, monkeypatch):
    (in_tmp / "mine" / "model").mkdir(parents=True)
    (in_tmp / "mine" / "model" / "mine.yaml").write_bytes(YAMLS["GBK"])
    case = overrides.Case("yaml", "train", ("--config-dir=mine", "model=mine"), "mine.yaml")
    assert overrides.complaint(case, typed(monkeypatch, case), []) is None


def test_there_are_hundreds_of_cases():
    commands = bad_overrides.all_cases(0)
    assert len(commands) >= 500 and len(bad_texts.all_cases(0)) >= 200


TEXTS = ("too little", "damaged encoding", "wrong encoding named", "no encoding of text", "binary", "file system", "bad table", "prompts")


def test_bad_texts_are_refused_in_one_line_that_leaves_nothing(monkeypatch):
    ledger = texts.Ledger("texts", texts.PROMISE)
    # 几十 MB 的表格留给长的那一份
    small = [case for kind in TEXTS for case in texts.chosen_cases(None, 0, [kind]) if "MB" not in case.what and "labels" not in case.what]
    for case in small[::3]:
        texts.judged(ledger, case, texts.in_process, train=False)
    assert ledger.cases > 50 and not ledger.broken


def test_bad_lines_are_named_wherever_they_stand():
    ledger = texts.Ledger("texts", texts.PROMISE)
    for case in texts.chosen_cases(30, 1, ["bad line"]):
        texts.judged(ledger, case, texts.in_process, train=False)
    assert ledger.cases == 30 and not ledger.broken


def test_strange_but_valid_texts_decode_back_exactly():
    ledger = texts.Ledger("texts", texts.PROMISE)
    for case in texts.chosen_cases(40, 0, ["strange but valid"]):
        texts.judged(ledger, case, texts.in_process, train=False)
    assert ledger.cases == 40 and not ledger.broken


@pytest.mark.skipif(sys.platform == "win32", reason="the program itself needs POSIX")
@pytest.mark.parametrize("way", ["appended", "replaced"])
def test_a_text_that_changes_while_it_is_read_is_refused(in_tmp, monkeypatch, way):
    path = in_tmp / "a.txt"
    path.write_text(bad_texts.PLAIN, encoding="utf-8")
    def changing(*given):
        yield from iter_text(*given)
        with path.open("a", encoding="utf-8") as file:
            file.write("more\n") if way == "appended" else None
        if way == "replaced":
            (in_tmp / "b").write_text(bad_texts.PLAIN, encoding="utf-8")
            (in_tmp / "b").replace(path)

    module = texts.corpus._script("text_file")
    monkeypatch.setattr(module, "iter_text", changing)
    with pytest.raises(ConfigError, match="was changed while it was read"):
        module.prepare(in_tmp / "prepared", path=str(path), tokenizer="char", encoding="auto", val_fraction=0.1)
    assert not list(in_tmp.glob("*prepared*"))


def test_labelled_texts_that_the_memory_cannot_hold_are_refused_before_they_are_read(in_tmp, monkeypatch):
    module = texts.corpus._script("labelled")
    (in_tmp / "a.jsonl").write_text("x" * 100, encoding="utf-8")
    monkeypatch.setattr(module, "free_ram", lambda: 500)
    with pytest.raises(ConfigError, match="compared with each other in memory"):
        module.sources(path="a.jsonl", tokenizer="char", vocab_size=300, encoding="auto", val_fraction=0.1, judge_fraction=0.1)


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

    stream = Stream()
    monkeypatch.setattr(sys, "argv", ["run_train.py"])
    with contextlib.redirect_stderr(stream), contextlib.redirect_stdout(stream), pytest.raises(ends_with):
        run_script("train", task)
    assert ("the system refuses" in stream.getvalue()) == (ends_with is SystemExit)


def test_a_value_is_shown_so_that_the_line_stays_one_line():
    shown = language.presentable
    assert (shown("a\nb\x1b\0\ud800"), shown("　中"), shown(5), shown(True)) == ("a\\nb\\x1b\\x00\\ud800", "　中", 5, True)
    assert len(shown("x" * 10**6)) < 600 and len(str(shown(10**5000))) < 600
    assert "\n" not in str(ConfigError("missing_file", key="dataset.path", got="a\nb"))
