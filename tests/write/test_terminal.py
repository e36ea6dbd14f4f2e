"""interactive=true: commands, a terminal that is a pipe, a pipe that is a pipe, Ctrl-C at every place."""

import contextlib
import io
import json
import os
import re
import select
import signal
import sys

import pytest
from conftest import make_sample_config, wild_model
from rich.cells import cell_len
from test_engine import Scripted
from typed import typed

from nanogpt.base import language as messages
from nanogpt.base.config import ROOT
from nanogpt.base.groups import option
from nanogpt.base.language import ConfigError
from nanogpt.base.sample_config import check_sample
from nanogpt.base.user_yaml import group_options
from nanogpt.data.tokenizer import ByteTokenizer, CharTokenizer
from nanogpt.write import commands
from nanogpt.write.commands import InteractiveSession
from nanogpt.write.control import prefixes
from nanogpt.write.engine import Writer
from nanogpt.write.loading import Model
from nanogpt.write.samples import SEPARATOR, write_samples
from nanogpt.write.terminal import (
    at_the_terminal,
    completer,
    decoded,
    from_a_pipe,
    obey,
    prompt_session,
    toolbar,
    unechoed,
)

LETTERS = "\n !',.:|/ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-春天花朵"
SPRING = "春天来了，花儿都开了。"


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NANOGPT_CACHE", str(tmp_path / "cache"))
    prefixes._said.clear()


@pytest.fixture(scope="module")
def model():
    tokens = CharTokenizer(LETTERS)
    return Model("tiny", wild_model(std=0.2, vocab_size=tokens.vocab_size, block_size=64), tokens, contextlib.nullcontext)


@pytest.fixture(scope="module")
def cfg():
    return make_sample_config("max_new_tokens=12", "interactive=true")


@pytest.fixture
def session(model, cfg):
    return InteractiveSession(cfg, model, piped=False)


def piped(session, *lines):
    return from_a_pipe(session, [line.encode() + b"\n" for line in lines])


# ---- 写作 ----


def test_a_pipe_of_prompts_writes_what_a_batch_writes(model, cfg, tmp_path, capsys):
    prompts = ["So it", "emotion:sad| It was", "春天"]
    (tmp_path / "p.txt").write_text("\n".join(prompts), encoding="utf-8")
    batch = make_sample_config("max_new_tokens=12", f"prompts={tmp_path / 'p.txt'}")
    write_samples(batch, model)
    expected = capsys.readouterr().out
    assert piped(InteractiveSession(cfg, model, piped=True), *prompts[:2], "", prompts[2]) == 0
    assert capsys.readouterr().out == expected and expected.count(SEPARATOR) == 2


def test_a_wrong_line_is_said_and_the_others_are_still_written(model, cfg, capsys):
    assert piped(InteractiveSession(cfg, model, piped=True), "So", "/tempratur 3", "wéird", "/temperature hot", "/temperature 0", "So") == 2
    done = capsys.readouterr()
    first, second = done.out.split(f"{SEPARATOR}\n")
    assert first.startswith("So") and second.startswith("So") and len(second) == 2 + 12 + 1
    lines = done.err.splitlines()
    assert lines[0] == "error: /tempratur: there is no such command (did you mean /temperature?); /help shows them all"
    assert "'é'" in lines[1] and "sampler.temperature=hot has the wrong type" in lines[2] and lines[3] == "sampler.temperature=0" and len(lines) == 4


def test_a_slash_begins_a_command_and_two_begin_a_text(session, capsys):
    assert piped(session, "//So", "／tokens 3") == 0
    assert capsys.readouterr().out.startswith("/So") and session.settings.max_new_tokens == 3


def test_quit_ends_the_input(session, capsys):
    assert piped(session, "/quit", "So") == 0 and capsys.readouterr().out == ""


def test_lines_of_other_encodings_are_read(monkeypatch):
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "gbk")
    assert decoded("春天".encode("gbk")) == decoded("春天".encode()) == "春天"


@pytest.mark.parametrize("tokens", range(1, 34))
def test_no_chinese_character_is_ever_split(cfg, monkeypatch, tokens):
    """A byte model that writes one sentence, cut off anywhere: only whole characters are printed, piece by piece."""
    network = Scripted(list(SPRING.encode()), 256)
    session = InteractiveSession(cfg, Model("bytes", network, ByteTokenizer(), contextlib.nullcontext), piped=False)
    pieces = []
    monkeypatch.setattr(commands, "show", lambda piece, end="\n": pieces.append(piece + end))
    assert piped(session, f"/tokens {tokens}", "花") == 0
    shown = "".join(pieces)
    assert shown == "花" + SPRING.encode()[:tokens].decode(errors="ignore") + "\n" and "\ufffd" not in shown
    assert session.written[-1].shown + "\n" == shown


def test_more_goes_on_and_again_takes_the_next_seed(session, capsys):
    assert piped(session, "emotion:sad| So it", "/more", "/again") == 0
    first, more, again = session.written
    assert more.result.request.prompt == first.shown and more.shown.startswith(first.shown) and len(more.shown) == len(first.shown) + 12
    assert more.result.request.control.emotion == again.result.request.control.emotion == "sad"
    assert again.result.request.prompt == "So it" and [w.result.request.seed for w in session.written] == [1337, 1338, 1339]
    out = capsys.readouterr().out
    assert out == f"{first.shown}\n{more.shown[len(first.shown):]}\n{again.shown}\n"


def test_more_than_one_sample_stand_apart(session, capsys):
    assert piped(session, "/samples 3", "So") == 0
    texts = capsys.readouterr().out.split(f"{SEPARATOR}\n")
    assert len(texts) == 3 == len(set(texts)) and len(session.written) == 3
    piped(session, "/again")
    assert session.written[-1].number == 5


# ---- 命令 ----


@pytest.mark.parametrize(("line", "got"), [
    ("/temperature 0.5", lambda s: s.settings.sampler["temperature"] == 0.5 == s.temperature),
    ("/temperature 1e-1", lambda s: s.settings.sampler["temperature"] == 0.1),
    ("/TOP_K 40", lambda s: s.settings.sampler["top_k"] == 40),
    ("/top_p 0.9", lambda s: s.settings.sampler["top_p"] == 0.9),
    ("/min_p 0.05", lambda s: s.settings.sampler["min_p"] == 0.05),
    ("/repetition_penalty 1.2", lambda s: s.settings.sampler["repetition_penalty"] == 1.2),
    ("/tokens 200", lambda s: s.settings.max_new_tokens == 200),
    ("/seed 7", lambda s: s.settings.seed == 7),
    ("/samples 3", lambda s: s.samples == 3),
    ("/stop \\n\\n", lambda s: s.settings.stop == ["\n\n"]),
    ('/stop ["a", "b c"]', lambda s: s.settings.stop == ["a", "b c"]),
    ("/stop", lambda s: s.settings.stop == []), ("/tokens 1e2", lambda s: s.settings.max_new_tokens == 100), ("/unknown skip", lambda s: s.settings.unknown == "skip"),
    ("/style 充满诗意", lambda s: s.settings.control["style"] == "充满诗意"),
    ("/emotion happy", lambda s: s.settings.control["emotion"] == "happy"),
    ("/control emotion sad", lambda s: s.settings.control["emotion"] == "sad"),
    ("/control strength 3.5", lambda s: s.settings.control["strength"] == 3.5),
    ("/control bias false", lambda s: s.settings.control["bias"] is False),
    ("/control none", lambda s: s.settings.control == {"_target_": "nanogpt.write.control.NoControl"} and s.chosen["control"] == "none"),
    ("/sampler top_p", lambda s: s.settings.sampler["top_p"] == 0.9 and s.settings.sampler["temperature"] == 0.8),
    ("/sampler greedy", lambda s: s.settings.sampler["temperature"] == 0 and s.temperature == 0.8),
])
def test_every_setting_can_be_changed_and_says_its_new_value(session, capsys, line, got):
    assert piped(session, line) == 0 and got(session)
    done = capsys.readouterr()
    assert done.out == "" and done.err.count("\n") == 1 and "=" in done.err


@pytest.mark.parametrize(("line", "message"), [
    ("/tempratur 1", "did you mean /temperature?"), ("/xyzzy", "/xyzzy: there is no such command; /help"), ("/", "/: there is no such command"),
    ("/temperature -1", "sampler.temperature=-1 is out of range"), ("/temperature", "sampler.temperature=None has the wrong type"), ("/temperature [", "cannot be read"),
    ("/temperature a: b", "sampler.temperature"), ("/top_k 1.5", "sampler.top_k=1.5 has the wrong type"), ("/top_p 7", "sampler.top_p=7 is out of range"),
    ("/tokens 0", "max_new_tokens=0 is out of range"), ("/tokens many", "max_new_tokens=many has the wrong type"), ("/tokens true", "max_new_tokens"), ("/seed -1", "seed=-1"),
    ("/samples 0", "num_samples=0"), ('/stop ["a", ""]', "stop holds an empty string"), ("/stop [1]", "stop=[1] has the wrong type"), ("/stop [a", "cannot be read"),
    ("/sampler top_q", "did you mean top_p?"), ("/sampler", "choose one of: greedy, min_p"), ("/sampler ../train", "there is no such option"),
    ("/control strength much", "control.strength=much"), ("/control strength", "control=strength"), ("/control bogus 3", "choose one of: codes none prefix strength bias guidance"),
    ("/control emotions 3", "control.emotions: there is no such setting"), ("/control _target_ os.system", "there is no such setting"),
    ("/again", "no text has been written yet"), ("/more", "no text has been written yet"), ("/save x.txt", "no text has been written yet"), ("/save all", "no text has been written yet"),
    ("/unknown", "unknown= is not known"), ("Ж", "pass over them with /unknown skip"), ("/save x.py", ".txt or .jsonl"), ("/save x", ".txt or .jsonl"),
])
def test_a_mistake_is_one_line_and_changes_nothing(session, capsys, line, message):
    before = (session.settings, session.samples, session.temperature, dict(session.chosen))
    assert piped(session, line) == 2
    done = capsys.readouterr()
    assert done.out == "" and done.err.count("\n") == 1 and message in done.err
    assert (session.settings, session.samples, session.temperature, session.chosen) == before
    messages.set_language("zh")
    assert piped(session, line) == 2 and capsys.readouterr().err.startswith("错误：")


def test_what_was_typed_stays_when_the_sampler_changes(session):
    piped(session, "/temperature 0.3", "/repetition_penalty 1.3", "/sampler top_k")
    assert session.settings.sampler == {**option("sampler", "top_k", 0.3), "repetition_penalty": 1.3}
    piped(session, "/sampler greedy", "/sampler min_p")
    assert session.settings.sampler["temperature"] == 0.3 and session.settings.sampler["min_p"] == 0.05


def test_the_command_lines_sampler_comes_back_with_its_values(model):
    session = InteractiveSession(make_sample_config("sampler=top_p", "sampler.top_p=0.5", "interactive=true"), model, piped=False)
    piped(session, "/sampler greedy", "/temperature 0.4", "/sampler top_p")
    assert session.settings.sampler["top_p"] == 0.5 and session.settings.sampler["temperature"] == 0.4


def test_style_and_emotion_are_cleared_by_nothing_and_kept_across_controls(session, capsys):
    piped(session, "/style 诗意", "/emotion sad", "/emotion", "/control none")
    assert piped(session, "/emotion sad") == 2 and "type /control codes first" in capsys.readouterr().err
    piped(session, "/control prefix", "/style a, b: c", "So")
    assert session.settings.control["emotion"] is None and session.settings.control["style"] == "a, b: c"
    assert "without words to lead the text to" in capsys.readouterr().err


def test_help_and_settings_and_control_tell_everything(session, capsys):
    for language in ("en", "zh"):
        messages.set_language(language)
        assert piped(session, "/help", "/settings", "/control") == 0
        done = capsys.readouterr()
        assert done.out == "" and max(cell_len(line) for line in done.err.splitlines() if line.startswith("  ")) < 80
        for name in session.names():
            assert f"/{name}" in done.err, name
        for expected in ("sampler=temperature", "sampler.top_k=0", "control.strength=2.0", "control.emotion=null", "max_new_tokens=12", "seed=1337", "num_samples=1", "stop=[]", "unknown=error", "开心", "happy"):
            assert expected in done.err
        assert "templates" not in done.err
    piped(session, '/stop ["KING:", "a b"]', "/settings")
    assert "stop=['KING:','a b']" in capsys.readouterr().err


def test_saving_appends_and_never_overwrites(session, tmp_path, capsys):
    (tmp_path / "diary.txt").write_text("mine\n", encoding="utf-8")
    piped(session, "So", "emotion:sad| It", "/save diary.txt", "/save all new folder/all.jsonl", "/save", "/save all")
    diary = (tmp_path / "diary.txt").read_text(encoding="utf-8")
    assert diary == f"mine\n{session.written[-1].shown}\n{SEPARATOR}\n"
    records = [json.loads(line) for line in (tmp_path / "new folder" / "all.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(r["prompt"], r["prompt"] + r["text"], r["settings"]["control"]["emotion"]) for r in records] == [
        ("So", session.written[0].shown, None), ("It", session.written[1].shown, "sad"),
    ]
    assert (tmp_path / "samples.txt").read_text(encoding="utf-8").count(SEPARATOR) == 3
    assert "2 text(s) appended to new folder" in capsys.readouterr().err
    (tmp_path / "folder.txt").mkdir()
    assert piped(session, "/save folder.txt") == 2 and "cannot be written" in capsys.readouterr().err


def test_every_text_is_recorded_with_output(model, tmp_path):
    session = InteractiveSession(make_sample_config("max_new_tokens=5", "interactive=true", f"output={tmp_path / 'o.jsonl'}"), model, piped=False)
    piped(session, "So", "/temperature 0.5", "emotion:sad| It", "/more")
    records = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(r["prompt"], r["settings"]["sampler"]["temperature"]) for r in records] == [("So", 0.8), ("It", 0.5), ("It" + records[1]["text"], 0.5)]
    assert [r["tokens"] for r in records] == [5, 5, 5]


@pytest.mark.parametrize("changes", [{"start": "x"}, {"prompts": "p.txt"}])
def test_prompts_of_the_command_line_are_refused(changes):
    with pytest.raises(ConfigError, match=f"leave out {next(iter(changes))}="):
        check_sample(make_sample_config("interactive=true", *(f"{k}={v}" for k, v in changes.items())))


# ---- Ctrl-C ----


def interrupt_at(monkeypatch, number):
    """Writer.step as if Ctrl-C were pressed during its number-th call."""
    step, calls = Writer.step, []

    def interrupted(writer):
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        return step(writer)

    monkeypatch.setattr(Writer, "step", interrupted)


@pytest.mark.parametrize(("number", "shown"), [(1, ""), (2, "So"), (6, "So")])
def test_ctrl_c_stops_the_text_and_not_the_program(session, monkeypatch, capsys, number, shown):
    interrupt_at(monkeypatch, number)
    assert obey(session, "So") and obey(session, "It")
    out, err = capsys.readouterr()
    assert err == "[stopped]\n" and len(session.written) == (2 if shown else 1)
    if shown:
        assert session.written[0].result.finish == "interrupted" and len(session.written[0].shown) == 2 + number - 1
        assert out.startswith(session.written[0].shown + "\nIt")


def test_ctrl_c_among_several_samples_keeps_what_was_shown(session, monkeypatch, tmp_path):
    session.cfg.batch_size, before = 1, session.cfg.batch_size
    try:
        interrupt_at(monkeypatch, 12 + 4)
        assert all(obey(session, line) for line in ("/samples 3", "So", "/more"))
    finally:
        session.cfg.batch_size = before
    assert [len(w.shown) for w in session.written] == [2 + 12, 2 + 3, 2 + 3 + 12]


def test_ctrl_c_ends_a_pipe(model, cfg, monkeypatch, capsys):
    interrupt_at(monkeypatch, 5)
    session = InteractiveSession(cfg, model, piped=True)
    assert piped(session, "So", "It") == 130
    assert capsys.readouterr().out == session.written[0].shown + "\n" and len(session.written) == 1


def test_an_interrupted_text_ends_with_a_whole_character(cfg, monkeypatch, capsys):
    interrupt_at(monkeypatch, 6)
    session = InteractiveSession(cfg, Model("bytes", Scripted(list(SPRING.encode()), 256), ByteTokenizer(), contextlib.nullcontext), piped=False)
    obey(session, "花")
    assert capsys.readouterr().out == "花春\n"


# ---- 终端 ----


@pytest.fixture
def terminal(session):
    """Keys in, the session behind them out; what was drawn is not looked at."""
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    def typed(keys):
        with create_pipe_input() as keyboard:
            keyboard.send_text(keys)
            code = at_the_terminal(session, prompt_session(session, input=keyboard, output=DummyOutput()))
        return code

    return typed


def test_a_terminal_writes_remembers_and_leaves(terminal, session, capsys):
    from prompt_toolkit.output import DummyOutput

    assert terminal("So it\r/temperature 0.5\r/tempratur\r\r/quit\rnot read") == 0
    out, err = capsys.readouterr()
    assert out == session.written[0].shown + "\n" and session.settings.sampler["temperature"] == 0.5
    assert "/help" in err and "did you mean /temperature?" in err
    history = prompt_session(session, output=DummyOutput()).history
    assert list(history.load_history_strings()) == ["/quit", "/tempratur", "/temperature 0.5", "So it"]


def test_ctrl_c_clears_the_line_and_ctrl_d_leaves(terminal, session):
    assert terminal("forget me\x03So\r\x03\x04") == 0
    assert [w.typed for w in session.written] == ["So"]


def test_ctrl_c_during_a_text_leaves_the_terminal_alive(terminal, session, monkeypatch):
    interrupt_at(monkeypatch, 3)
    assert terminal("So\rIt\r\x04") == 0
    assert [w.result.finish for w in session.written] == ["interrupted", "length"]


def test_lines_are_edited_pasted_and_broken(terminal, session):
    # Ctrl-A、删除；括号粘贴里的换行；Alt-Enter
    assert terminal("xSo\x01\x1b[3~\r\x1b[200~one\ntwo\x1b[201~\rthree\x1b\rfour\r春天的花\x7f花朵\r\x04") == 0
    assert [w.typed for w in session.written[:3]] == ["So", "one\ntwo", "three\nfour"]


def test_commands_and_their_values_are_completed(session):
    from prompt_toolkit.completion import CompleteEvent
    from prompt_toolkit.document import Document

    completes = completer(session)

    def words(typed):
        return [c.text for c in completes.get_completions(Document(typed), CompleteEvent())]

    assert words("/te") == ["temperature"] and "top_p" in words("/sampler ") and words("/sampler gr") == ["greedy"] and words("So /te") == []
    assert "开心" in words("/emotion ") and words("/emotion hap") == ["happy"] and {"none", "prefix", "strength"} <= set(words("/control "))
    assert words("/quit now") == []


def test_the_toolbar_shows_the_settings(session):
    piped(session, "/temperature 0.5", "/emotion 开心", "/samples 2")
    for expected in ("temperature=0.5", "tokens=12", "seed=1337", "samples=2", "emotion=开心", "/help"):
        assert expected in toolbar(session)


def test_a_home_that_cannot_be_written_costs_only_the_history(session, tmp_path, monkeypatch):
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.output import DummyOutput

    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("NANOGPT_CACHE", str(tmp_path / "file" / "cache"))
    assert isinstance(prompt_session(session, output=DummyOutput()).history, InMemoryHistory)


def test_options_are_those_of_conf():
    assert group_options("sampler") == sorted(p.stem for p in (ROOT / "conf" / "sampler").glob("*.yaml"))
    assert option("sampler", "top_p", 0.25)["temperature"] == 0.25


# ---- 像使用者那样启动 ----


def test_the_command_reads_prompts_from_a_pipe_with_sampler_and_controls_of_ones_own(tmp_path, own_run):
    (tmp_path / "mine" / "sampler").mkdir(parents=True)
    (tmp_path / "mine" / "sampler" / "odd.yaml").write_text("_target_: my_sampler.only\nid: 3\n", encoding="utf-8")
    (tmp_path / "my_sampler.py").write_text(
        "import torch\n\ndef only(logits, *, id):\n    out = torch.full_like(logits, -torch.inf)\n    out[:, id] = 0\n    return out\n", encoding="utf-8"
    )
    (tmp_path / "mine" / "control").mkdir()
    code, yamls = (re.findall(rf"```{kind}\n(.*?)```", (ROOT / "docs/interactive.md").read_text(encoding="utf-8"), flags=re.DOTALL) for kind in ("python", "yaml"))
    (tmp_path / "my_control.py").write_text(code[0], encoding="utf-8")
    for name, content in zip(("mine", "title"), yamls, strict=True):
        (tmp_path / "mine" / "control" / f"{name}.yaml").write_text(content, encoding="utf-8")
    command = [f"--config-dir={tmp_path / 'mine'}", "interactive=true", "max_new_tokens=6", "sampler=odd", "output=o.jsonl", "fast=false"]
    lines = "the king\n/id 4\nthe king\n/sampler top_p\n/sampler odd\nthe king\n/control mine\n/emotion sleepy\n/control title\n/control\n/control mark queen\nstyle:love| the king\n/oops\n"
    done = typed("run_sample.py", tmp_path, *command, expect=2, python_path=tmp_path, lines=lines)
    texts = [t.removesuffix("\n") for t in done.stdout.split(f"{SEPARATOR}\n")]
    assert [len(set(t.removeprefix("the king"))) for t in texts] == [1, 1, 1, 1] and texts[0] == texts[2] == texts[3] != texts[1]
    assert "Traceback" not in done.stderr and "style: ballad letter" in done.stderr and done.stderr.splitlines()[-1].startswith("error: /oops")
    assert len((tmp_path / "o.jsonl").read_text(encoding="utf-8").splitlines()) == 4
    records = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [r["prompt_tokens"] for r in records] == [8, 8, 8, 8 + len("queen love\n")] and records[-1]["settings"]["control"]["style"] == "love"


def test_standard_input_that_is_closed_is_an_end(session):
    assert from_a_pipe(session, io.BytesIO(b"")) == 0


@pytest.mark.parametrize("end", [None, KeyboardInterrupt, "SIGTERM"])
def test_what_is_typed_during_a_text_is_not_echoed_and_kept_for_the_next_prompt(end):
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    master, slave = pty.openpty()
    with open(slave, encoding="utf-8") as stdin, open(master, "rb", buffering=0) as terminal:
        before, handler = termios.tcgetattr(stdin), signal.getsignal(signal.SIGTERM)
        ended = {None: contextlib.nullcontext(), KeyboardInterrupt: pytest.raises(KeyboardInterrupt), "SIGTERM": pytest.raises(SystemExit)}[end]
        with ended, unechoed(stdin):
            os.write(master, b"a\x1b[D\r/quit\r")
            assert os.read(slave, 100) == b"a\x1b[D\r/quit\r" and not select.select([terminal], [], [], 0)[0]
            assert termios.tcgetattr(stdin)[3] & termios.ISIG
            if end == "SIGTERM":
                os.kill(os.getpid(), signal.SIGTERM)
            elif end:
                raise end
        assert termios.tcgetattr(stdin) == before and signal.getsignal(signal.SIGTERM) is handler


def test_a_pipe_and_windows_need_no_change_of_the_terminal(monkeypatch):
    with unechoed(io.StringIO("So")):
        pass
    monkeypatch.setitem(sys.modules, "termios", None)
    with unechoed(sys.stdin):
        pass
