"""What the console shows at 80 columns, in both languages, with the largest values that occur."""

import io
import re
import time

import pytest
from conftest import make_config
from rich.cells import cell_len
from rich.console import Console as RichConsole

from nanogpt.base import language
from nanogpt.base.cli import _Script
from nanogpt.base.console import Console, _bars, duration, rounded
from nanogpt.base.language import PIECE, set_language, text, wrapped

WIDTH = 80
TITLES = [name for name in language.NAMED if name.startswith("progress_")]
RECORD = {
    "train/loss": 10.1234, "learning_rate": 1.25e-4, "tokens_per_s": 1234567.0, "mfu": 0.9999, "val/loss": 10.9876,
    "val/bpb": 10.1234,
    "memory/allocated_gib": 99.99, "memory/reserved_gib": 99.99, "memory/peak_gib": 99.99,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(params=["en", "zh"])
def spoken(request):
    set_language(request.param)
    yield request.param
    set_language("en")


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", str(WIDTH))


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_log_interval_is_one_line_of_80_columns_and_an_evaluation_a_second_one(spoken, device, capsys):
    Console().iteration(100_000, RECORD, device)
    Console().evaluation(100_000, RECORD, device, best=10.1234, peak=RECORD["memory/peak_gib"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(cell_len(line) < WIDTH for line in lines), lines
    memory = {"cuda": {"en": "VRAM", "zh": "显存"}, "cpu": {"en": "RAM", "zh": "内存"}}[device][spoken]
    assert re.search(rf"1234567 tok/s[,，] ?MFU 100\.0%[,，] ?{memory} 99\.99GB$", lines[0]) and memory in lines[1]
    assert "10.123 bpb" in lines[1]


def test_bars_fit_beside_each_other_into_80_columns_and_their_time_runs_while_they_stand_still(spoken, monkeypatch):
    now, hours = [5.0], 99 * 3600
    monkeypatch.setattr("nanogpt.base.console.monotonic", lambda: now[0])
    shown = Terminal()
    bar = _bars(RichConsole(file=shown, width=WIDTH, color_system=None))
    note = text("loss {loss:.4f}, {speed:.0f} tok/s", loss=10.1234, speed=1234567)
    bar.add_task(text("progress"), total=100_000, completed=100_000, note=note, ends=now[0] + hours + 59)
    for title in TITLES:
        bar.add_task(text(title), total=100_000, completed=99_999, note="", ends=None)

    def lines(after: float) -> list[str]:
        now[0] += after
        shown.seek(0)
        shown.truncate()
        bar.console.print(bar.make_tasks_table(bar.tasks))
        return shown.getvalue().splitlines()

    first = lines(0)
    assert len(first) == 1 + len(TITLES) and all(cell_len(line.rstrip()) < WIDTH for line in first)
    assert f"100000/100000 {note} ETA 99:00:59" in first[0]
    assert "ETA 98:59:59" in lines(60)[0] and "ETA 0:00" in lines(hours)[0]


def test_a_bar_below_a_bar_goes_away_with_its_work_and_without_a_terminal_there_is_none(monkeypatch, capsys):
    Console().plain("to a file")
    with Console().progress(3) as advance:
        advance(1, "note", left=1.0)
    assert capsys.readouterr().out == "to a file\n" and not Console().live
    monkeypatch.setattr("sys.stdout", Terminal())
    console = Console()
    with console.progress(3) as advance:
        advance(1)
        with console.progress(5, title="progress_evaluating") as inner:
            inner(5)
            assert [task.completed for task in console._bar.tasks] == [1, 5]
        assert [task.completed for task in console._bar.tasks] == [1]
    assert console._bar is None


def test_times_have_two_significant_parts():
    assert [duration(s) for s in (0.25, 30, 600, 7260, 400000)] == ["250 ms", "30.0 s", "10 min", "2 h 01 min", "4.6 d"]


def test_a_sweep_says_which_job_begins_and_how_long_the_others_take(capsys):
    script = _Script("train", None, None, None, [], sweep=True)
    with script.in_sight(make_config(), 0):
        pass
    assert capsys.readouterr().err == ""
    script.swept, script.began = [f"learning_rate={n}" for n in range(24)], time.time() - 7 * 42
    with script.in_sight(make_config(), 6):
        assert capsys.readouterr().err == "7 of 24: learning_rate=6\n"
    assert capsys.readouterr().err == "7 of 24 done, about 12 min more\n"


def test_a_sentence_is_broken_between_words_and_keeps_every_character(spoken, narrow):
    for message in language.chinese():
        said = text_of(message)
        for sentence in re.sub(r"{[^{}]*}", "outputs/plays_char-tiny-20261122-101500", said).split("\n"):
            lines = wrapped(sentence, Terminal()).split("\n")
            assert "".join("".join(lines).split()) == "".join(sentence.split())
            # 命令与表（以空格开头的行）不动；没有空格的一长串自己占一行
            whole = sentence.startswith(" ")
            assert all(cell_len(line) < WIDTH or whole or len(PIECE.findall(line.strip())) == 1 for line in lines), lines


def text_of(message):
    return language.chinese()[message] if language.current_language() == "zh" else message


def test_a_command_is_never_broken_and_a_file_gets_each_sentence_on_one_line(narrow):
    command = "  python run_sample.py out_dir=outputs/plays_char-tiny-20261122-101500 start='To be, or not to be' num_samples=3"
    assert wrapped(f"next:\n{command}", Terminal()) == f"next:\n{command}"
    assert wrapped("word " * 40, io.StringIO()) == "word " * 40
    assert wrapped("word " * 40, Terminal()).count("\n  word") == 2
    # 文件名不从中间断
    for words in range(25, 45):
        assert "我的小说.txt" in wrapped("字" * words + " 我的小说.txt 准备而成", Terminal())


CHINESE = "[\u3400-\u9fff（）“”，。；：、！？]"
# 敲的、写在文件里的：引号里的、style:…| 这样的开头、文件名
TYPED = re.compile(r"'\[[^\]]*\]'|(?:style|emotion|modelscope):[^\s；、]*|文件\.txt\|\.jsonl")


def test_chinese_sentences_have_full_width_punctuation():
    half = re.compile(rf"(?:{CHINESE}|}}) ?[,:;!?()](?: |$|{CHINESE})|[,;:!?(] ?{CHINESE}|{CHINESE}\.(?:\s|$)")
    wrong = {zh for zh in language.chinese().values() if re.search(CHINESE, zh) and half.search(TYPED.sub("", zh))}
    assert not wrong


def test_a_list_of_ones_own_words_is_joined_as_the_language_does(spoken):
    assert language.joined(["宋词", "元曲"]) == {"en": "宋词, 元曲", "zh": "宋词、元曲"}[spoken]
    assert text("{kind}: {names}", kind="style", names="宋词") == {"en": "style: 宋词", "zh": "style：宋词"}[spoken]


def test_rounded_numbers_are_never_in_exponents():
    assert [rounded(value) for value in (0.0012, 0.284, 1, 12.4, 284, 1250)] == ["0.0012", "0.28", "1", "12", "280", "1,200"]
