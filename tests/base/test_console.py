"""What the console shows at 80 columns, in both languages, with the largest values that occur."""

import io
import re

import pytest
from rich.cells import cell_len

from nanogpt.base import language
from nanogpt.base.console import Console
from nanogpt.base.language import PIECE, set_language, text, wrapped

WIDTH = 80
RECORD = {
    "train/loss": 10.1234, "learning_rate": 1.25e-4, "tokens_per_s": 1234567.0, "mfu": 0.9999, "val/loss": 10.9876,
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
    Console().iteration(100_000, RECORD, device, best=10.1234)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(cell_len(line) < WIDTH for line in lines), lines
    memory = {"cuda": {"en": "VRAM", "zh": "显存"}, "cpu": {"en": "RAM", "zh": "内存"}}[device][spoken]
    assert re.search(rf"1234567 tok/s[,，] ?MFU 100\.0%[,，] ?{memory} 99\.99GB$", lines[0]) and memory in lines[1]
    # 旁边还放得下另一个数
    assert cell_len(lines[1]) + cell_len(", bpb 10.1234") < WIDTH


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


CHINESE = "[\u3400-\u9fff（）“”，。；：、！？]"
# 敲的、写在文件里的：引号里的、style:…| 这样的开头、文件名
TYPED = re.compile(r"'\[[^\]]*\]'|\w+:[^|\s]*\||文件\.txt\|\.jsonl")


def test_chinese_sentences_have_full_width_punctuation():
    half = re.compile(rf"(?:{CHINESE}|}}) ?[,:;!?()](?: |$|{CHINESE})|[,;:!?(] ?{CHINESE}|{CHINESE}\.(?:\s|$)")
    wrong = {zh for zh in language.chinese().values() if re.search(CHINESE, zh) and half.search(TYPED.sub("", zh))}
    assert not wrong


def test_a_list_of_ones_own_words_is_joined_as_the_language_does(spoken):
    assert language.joined(["宋词", "元曲"]) == {"en": "宋词, 元曲", "zh": "宋词、元曲"}[spoken]
    assert text("{kind}: {names}", kind="style", names="宋词") == {"en": "style: 宋词", "zh": "style：宋词"}[spoken]
