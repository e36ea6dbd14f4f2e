"""Texts, tables and lists of prompts as people have them, each read as what it is or named for it."""

import json
import random

import pytest
from test_corpus import read, script

from nanogpt.base.cli import implied_dataset
from nanogpt.base.composing import guess_of
from nanogpt.base.language import ConfigError
from nanogpt.data.source_text import detect_encoding, resolved, text_files
from nanogpt.write.loading import prompt_text, prompts_of_file

WORDS = "the old house by the river was quiet when she came home and nobody knew why the lamp still burned in the upper window".split()


def story(lines, apostrophe="’", quotes=None):
    chosen = random.Random(0)
    rows = [[chosen.choice(WORDS) for _ in range(12)] for _ in range(lines)]
    for row in rows:
        row[3], row[7] = f"she{apostrophe}s", f"didn{apostrophe}t"
    text = "".join(" ".join(row).capitalize() + ".\n" for row in rows)
    return text.replace("lamp", quotes) if quotes else text


def lines_of(letters, end, count=400):
    chosen = random.Random(0)
    return "".join("".join(chosen.choice(letters) for _ in range(24)) + end + "\n" for _ in range(count))


BIG5 = "春眠不覺曉處處聞啼鳥夜來風雨聲花落知多少白日依山盡黃河入海流欲窮千里目更上一層樓國學說話這裡為什麼時間過得真快"
CAT = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。何でも薄暗いじめじめした所でニャーニャー泣いていた事だけは記憶している。\n"
HANGUL = "가나다라마바사아자차카타파하한국어문장오늘"
FOREIGN = {
    "cp1252": (story(400), "cp1252"), "cp1252 with quotes": (story(400, quotes="“lamp”"), "cp1252"), "big5": (lines_of(BIG5, "。"), "big5"),
    "shift-jis": (20 * CAT, "cp932"), "euc-kr": (lines_of(HANGUL, "."), "cp949"),
    "gb18030": (lines_of("春眠不觉晓处闻啼鸟夜来风雨声花落知多少这是中国的一个人", "。"), "gb18030"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_texts_in_other_encodings_are_read_as_what_they_are_and_it_is_said(tmp_path, capsys, case):
    text, encoding = FOREIGN[case]
    (path := tmp_path / "t.txt").write_bytes(text.encode(encoding))
    assert detect_encoding(path) == encoding and read(path) == text
    said = capsys.readouterr().err
    assert str(path) in said and f"dataset.encoding={encoding}" in said


def test_one_line_says_the_encoding_of_a_whole_folder(tmp_path, capsys):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_bytes(story(20).encode("cp1252"))
    resolved(text_files(tmp_path))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "a.txt and 2 more: not UTF-8, read as Windows-1252" in said


# 多是生僻字、只有标点常见；一半是外文；以 NUL 开头：都要认得
RARE = {
    "rare": ("".join(chr(0x4E00 + 7 * i % 5000) + "，。\n"[i % 3] for i in range(600)), "gb18030"),
    "mixed": (20 * "Model accuracy 准确率 is reported in table 3, see 附录 for details.\n", "gb18030"),
    "traditional": (20 * "他昨天在學校裡遇到了一位老朋友，兩個人聊了很久，說起小時候的日子\n", "gb18030"), "NUL": ("\0" * 9 + "abc", "utf-16"),
    "one quote": (story(40, "'").replace("didn't", "didn’t", 1), "cp1252"), "russian": (20 * "Все счастливые семьи похожи друг на друга.\n", "cp1251"),
}


@pytest.mark.parametrize("case", RARE)
def test_texts_with_little_to_go_by_are_read_as_what_they_are(tmp_path, case):
    text, encoding = RARE[case]
    (path := tmp_path / "t.txt").write_bytes(text.encode(encoding))
    assert detect_encoding(path) == encoding and read(path) == text


DAMAGED = {
    "UTF-8": "春眠不觉晓".encode() * 20 + b"\xff" + "处处闻啼鸟".encode() * 20, "cut": "中文字中文字".encode()[:-1], "nothing": b"abc\xff\xff", "0x80": b"\x80" * 500,
    "GB18030": "春眠不觉晓，处处闻啼鸟。".encode("gb18030") * 20 + b"\xff\n", "beyond": b"all the king's men" + b"\xf5\x80\x80\x80", "random": random.Random(1).randbytes(500),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_bytes_that_are_plausible_in_no_encoding_are_refused_with_the_way_to_name_one(tmp_path, case):
    (path := tmp_path / "t.txt").write_bytes(DAMAGED[case])
    with pytest.raises(ConfigError, match=r"t\.txt: byte \d+ is not UTF-8.*name its encoding: dataset\.encoding=") as error:
        detect_encoding(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("encoding", ["auto", "utf-8"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_byte_order_mark_and_the_kind_of_line_ends_leave_nothing_in_the_text(tmp_path, encoding, end):
    text = story(30, "'")
    (path := tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", end).encode())
    assert read(path, encoding) == text


def test_files_that_a_mac_leaves_beside_the_texts_are_passed_over(tmp_path):
    (tmp_path / "a.txt").write_text("x", encoding="utf-8")
    (tmp_path / "._a.txt").write_bytes(b"\0\5\x16\7" + bytes(range(256)))
    assert [path.name for path in text_files(tmp_path)] == ["a.txt"]


ROWS = [{"text": f"{story(1)[:-1]} number {i}", "style": ("diary", "letter")[i % 2]} for i in range(20)]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def table(delimiter, *, head="", tail="", end="\n"):
    return head + end.join([f"text{delimiter}style", *(f'"{row["text"]}"{delimiter}{row["style"]}' for row in ROWS), ""]) + tail


RECORDS = {
    "ok.jsonl": JSONL, "bom.JSONL": "\ufeff" + JSONL.replace("\n", "\r\n"), "ok.ndjson": JSONL, "array.json": json.dumps(ROWS, indent=1),
    "excel_bom.csv": "\ufeff" + table(",", end="\r\n"), "semicolon.csv": table(";"), "sep.csv": table("|", head="sep=|\n"),
    "trailing.csv": table(",", tail=",\n,\n"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_records_are_read_from_lines_lists_and_tables_of_every_kind(tmp_path, name):
    (path := tmp_path / name).write_bytes(RECORDS[name].encode())
    got = [{"text": row.text, "style": row.style} for row in script("labelled").documents([path])]
    assert got == ROWS


def test_a_text_file_of_records_asks_for_the_data_set_that_reads_them(tmp_path):
    (path := tmp_path / "ok.jsonl").write_text(JSONL, encoding="utf-8")
    for named in (path, tmp_path):
        with pytest.raises(ConfigError, match=f"ok.jsonl holds records.*dataset=labelled dataset.path={named}"):
            script("text_file").sources(str(named), "char", "auto", 0.1)


@pytest.mark.parametrize("typed, implied", [
    (["dataset.path=my.txt"], ["dataset=text_file"]), (["dataset.path=D:\\a=b.JSONL", "seed=1"], ["dataset=labelled"]), (["seed=1"], []),
    (["dataset=labelled", "dataset.path=my.txt"], []), (["resume=outputs/run", "dataset.path=my.txt"], []), (["experiment=mine", "dataset.path=my.txt"], []),
])
def test_a_path_alone_says_which_data_set_is_meant(typed, implied):
    assert implied_dataset(typed) == implied
    # 配方选了别的数据集时，报错里说该怎么写
    assert guess_of("dataset.path", "train") == "dataset=text_file dataset.path"


PROMPTS = {
    "bom_crlf.txt": ("\ufeffThe old\r\nShe came\r\n\r\n", ["The old", "She came"]), "nel.txt": ("The old\x85house\nShe\n", ["The old\x85house", "She"]),
    "u2028.jsonl": ('{"prompt": "The old\u2028house"}\n{"prompt": "She"}\n', ["The old\u2028house", "She"]),
    "PROMPTS.JSONL": ('{"prompt": "The old"}\n"She"\n', ["The old", "She"]), "list.json": ('["The old", {"prompt": "She"}]\n', ["The old", "She"]),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_lists_of_prompts_end_at_line_feeds_only(tmp_path, name):
    content, prompts = PROMPTS[name]
    (path := tmp_path / name).write_bytes(content.encode())
    assert prompts_of_file(path) == prompts


def test_the_last_line_break_of_a_prompt_file_is_no_part_of_the_prompt(tmp_path):
    (path := tmp_path / "p.txt").write_text("the old house\n", encoding="utf-8")
    assert prompt_text(f"FILE:{path}") == "the old house" and resolved([path])[0][1] == "utf-8"
