"""Text in: encodings, folders, line ends, the text_file data set and the plays' clean-up."""

import importlib.util
import json
from unittest import mock

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from nanogpt.base.config import ROOT
from nanogpt.base.language import ConfigError
from nanogpt.base.lock import only_one
from nanogpt.data import bpe, corpus, source_text
from nanogpt.data.source_text import iter_text, resolved, text_files
from nanogpt.data.tokenizer import GPT2_PATTERN, BPETokenizer, ByteTokenizer
from nanogpt.data.tokens import TokenData

CHINESE = "春眠不觉晓，处处闻啼鸟。\n夜来风雨声，花落知多少。\n"
OPTIONS = {"tokenizer": "char", "encoding": "auto", "val_fraction": 0.1}


def script(name):
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", ROOT / "data" / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(path, encoding="auto"):
    return "".join(iter_text(*resolved([path], encoding)[0]))


@pytest.fixture
def text_root(tmp_path, monkeypatch):
    """text_file with its prepared folders below tmp_path."""
    module = script("text_file")
    monkeypatch.setattr("nanogpt.base.config.ROOT", tmp_path)
    # 那里没有脚本：准备好的数据落在当前文件夹的 data/ 里，不能是仓库自己的
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(corpus, "_script", lambda name: module)

    def prepare(path, **options):
        return TokenData(corpus.prepare("text_file", None, {**OPTIONS, "path": str(path), **options}))

    return prepare


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "gb18030"])
@pytest.mark.parametrize("text", [CHINESE, "To be, or not to be: that is the question.\n" * 3])
def test_common_encodings_are_detected(tmp_path, encoding, text):
    if encoding in ("utf-16-le", "utf-16-be") and text is CHINESE:
        pytest.skip("纯汉字的 UTF-16 没有 BOM 时无从分辨")
    path = tmp_path / "t.txt"
    path.write_bytes(text.encode(encoding))
    assert read(path) == text


def test_undecodable_bytes_are_named_with_their_offset(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes("好".encode() * 5 + b"\xff\xfe\xff" + "好".encode())
    with pytest.raises(ConfigError, match=r"byte 15 is not UTF-8, .*name its encoding: dataset\.encoding="):
        read(path)
    with pytest.raises(ConfigError, match=r"byte 15 is not utf-8"):
        list(iter_text(path, "utf-8"))


def test_the_offset_counts_from_the_start_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(source_text, "PIECE", 4)
    path = tmp_path / "t.txt"
    path.write_bytes("好好好".encode() + b"\xff")
    with pytest.raises(ConfigError, match=r"byte 9 is not utf-8"):
        list(iter_text(path, "utf-8"))


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 64])
def test_pieces_never_split_a_character_or_a_line_end(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(source_text, "PIECE", piece)
    path = tmp_path / "t.txt"
    path.write_bytes((CHINESE + "a\r\nb\r\n\r\nc\rd\r").encode("utf-8"))
    assert "".join(iter_text(path, "utf-8")) == CHINESE + "a\nb\n\nc\nd\n"


def test_unknown_encoding_is_one_line(tmp_path):
    (tmp_path / "t.txt").write_text("x", encoding="utf-8")
    with pytest.raises(ConfigError, match="dataset.encoding=klingon"):
        read(tmp_path / "t.txt", "klingon")


def test_a_folder_gives_its_text_files_in_a_fixed_order(tmp_path):
    for name in ("b.txt", "a.md", "sub/c.TXT", "ignored.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    assert [p.name for p in text_files(tmp_path)] == ["a.md", "b.txt", "c.TXT"]


@pytest.mark.parametrize("cut", [0, 1, 4, 5, 9, 10])
def test_splitting_a_stream_keeps_every_token_in_order(tmp_path, cut):
    stream, totals = [np.arange(4), np.arange(4, 5), np.arange(5, 10)], []
    corpus.write_split(
        tmp_path / "d", name="n", source="s", tokenizer=ByteTokenizer(), stream=stream,
        train_tokens=lambda total: totals.append(total) or cut,
    )
    data = TokenData(tmp_path / "d")
    assert {split: ids.tolist() for split, ids in data.tokens.items()} == {
        "train": list(range(cut)), "val": list(range(cut, 10)),
    } and totals == [10]


def test_encoding_on_all_cores_keeps_the_order_and_the_ids_of_each_piece():
    coder = BPETokenizer("b", GPT2_PATTERN, {bytes((i,)): i for i in range(256)} | {b"ab": 256}, {})
    pieces = [f"{n} ab\nab春{'' if n % 3 else chr(0xd800)} <|endoftext|>" * (50 - n) for n in range(50)]
    wanted = [coder._encoding.encode_ordinary(piece) for piece in pieces]
    # 每个线程各用各的编码器：共用的一个，线程之间要抢
    coder._encoding = None
    found = list(corpus.encoded(coder, pieces))
    assert [ids.tolist() for ids in found] == wanted and found[0].dtype == np.int64


@given(st.text(alphabet="ab1 _.'，。汉字\n\t\u3000\x1c\x85", max_size=120))
def test_a_vocabulary_is_made_from_the_same_words_in_parts_as_in_whole(piece):
    words = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    with mock.patch.object(bpe, "PART", 5):
        found = list(bpe.parts(piece))
    assert "".join(found) == piece
    assert [word for part in found for word, _ in words(part)] == [word for word, _ in words(piece)]


@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_text_file_round_trips_the_text(text_root, tmp_path, tokenizer):
    path = tmp_path / "诗.txt"
    path.write_text(CHINESE * 20, encoding="gb18030")
    data = text_root(path, tokenizer=tokenizer)
    ids = np.concatenate([data.tokens["train"], data.tokens["val"]])
    assert data.tokenizer.decode(ids) == CHINESE * 20
    assert len(data.tokens["val"]) == round(len(ids) * 0.1)


def test_changed_text_or_options_give_another_folder(text_root, tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("abc\n" * 50, encoding="utf-8")
    first = text_root(path).folder
    assert text_root(path, val_fraction=0.2).folder != first
    path.write_text("abd\n" * 50, encoding="utf-8")
    assert text_root(path).folder != first and (first / "meta.json").is_file()


BAD_TEXT = {
    "missing": ({}, "dataset.path=.*there is no such file"),
    "empty": ({}, "no text in it"),
    "unset": ({"path": None}, "dataset.path is not set"),
    "tokenizer": ({"tokenizer": "wordpiece"}, "dataset.tokenizer=wordpiece is not known; choose one of: char"),
    "fraction": ({"val_fraction": 1.5}, "dataset.val_fraction=1.5"),
}


@pytest.mark.parametrize("case", BAD_TEXT)
def test_bad_text_input_is_one_line_and_writes_nothing(tmp_path, case):
    path = tmp_path / "t.txt"
    if case != "missing":
        path.write_text("" if case == "empty" else "text\n" * 9, encoding="utf-8")
    before = set(tmp_path.rglob("*"))
    changes, message = BAD_TEXT[case]
    with pytest.raises(ConfigError, match=message) as error:
        script("text_file").sources(**{**OPTIONS, "path": str(path), **changes})
    assert "\n" not in str(error.value) and set(tmp_path.rglob("*")) == before


def test_plays_are_cleaned_to_speakers_and_lines():
    markdown = (
        "# A Play\n\n## ACT I\n\n_Enter A,\nB, and C_\n\n**FIRST LORD**  \nNow, _aside_ go—stay:  \nIt\\'s *done*.\n\n[Exit]\n\n**B**  \nAy.\n"
    )
    assert script("plays_char").plain_text(markdown) == "FIRST LORD:\nNow,  go--stay:\nIt's done.\n\nB:\nAy.\n\n"


def test_openwebtext_streams_a_local_stand_in(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    source = tmp_path / "docs"
    source.mkdir()
    rows = [json.dumps({"text": f"document number {n}"}) for n in range(10)]
    (source / "train.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    module = script("openwebtext")
    module.prepare(tmp_path / "owt", str(source), val_every=5, max_documents=None)
    data = TokenData(tmp_path / "owt")
    text = {s: data.tokenizer.decode(data.tokens[s]).split("<|endoftext|>")[:-1] for s in ("train", "val")}
    assert text["val"] == ["document number 4", "document number 9"]
    assert len(text["train"]) == 8 and text["train"][0] == "document number 0"
    with pytest.raises(ConfigError, match="val_every"):
        module.prepare(tmp_path / "owt2", str(source), val_every=1, max_documents=None)


def test_openwebtext_says_what_is_wrong_with_its_source(tmp_path):
    pytest.importorskip("datasets")
    source = tmp_path / "docs"
    source.mkdir()
    (source / "train.jsonl").write_text('{"body": "x"}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="no column named text"):
        script("openwebtext").prepare(tmp_path / "owt", str(source), val_every=5, max_documents=None)
    assert not (tmp_path / "owt").exists()


def test_preparing_beside_a_persons_files_deletes_none_of_them(tmp_path):
    (tmp_path / "t.txt").write_text("some text to learn from\n" * 50, encoding="utf-8")
    (tmp_path / ".notes.tmp").write_text("mine", encoding="utf-8")
    torn = tmp_path / ".prepared.abcd.tmp"
    torn.mkdir()
    folder = corpus.prepare("text_file", str(tmp_path / "prepared"), {**OPTIONS, "path": str(tmp_path / "t.txt")})
    assert (folder / "meta.json").is_file() and (tmp_path / ".notes.tmp").read_text(encoding="utf-8") == "mine" and not torn.exists()


def test_what_a_killed_preparation_left_goes_with_the_next_one_though_the_text_was_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "home_of", lambda name: tmp_path / "home")
    (tmp_path / "home" / ".t-0123.abcd.tmp").mkdir(parents=True)
    (tmp_path / "home" / ".busy-0123.abcd.tmp").mkdir()
    (tmp_path / "home" / ".t-0123.lock").touch()
    (tmp_path / "t.txt").write_text("some text to learn from\n" * 50, encoding="utf-8")
    # 另一份文字正由别人准备着
    with only_one(tmp_path / "home" / ".busy-0123.lock"):
        folder = corpus.prepare("text_file", None, {**OPTIONS, "path": str(tmp_path / "t.txt")})
        assert {path.name for path in (tmp_path / "home").iterdir()} == {folder.name, ".busy-0123.abcd.tmp", ".busy-0123.lock"}


def test_a_data_set_takes_the_place_of_a_data_set_alone(tmp_path):
    def write(folder, ids=(1, 2), **more):
        made = {"name": "m", "source": "s", "tokenizer": ByteTokenizer(), "train": [list(ids) * 9], "val": [np.array(ids)]}
        return corpus.write_dataset(folder, **{**made, **more})

    mine = tmp_path / "home"
    (mine / "sub").mkdir(parents=True)
    (mine / "sub" / "work.py").write_text("x", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds sub, which is no file of a data set"):
        write(mine)
    # 已是数据集的照旧换成新的，除非里面放进了别的东西
    write(str(tmp_path / "d"))
    write(tmp_path / "d", (3, 4))
    assert TokenData(tmp_path / "d").tokens["val"].tolist() == [3, 4]
    (tmp_path / "d" / "notes.txt").write_text("x", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds notes.txt"):
        write(tmp_path / "d", (5, 6))
    assert TokenData(tmp_path / "d").tokens["val"].tolist() == [3, 4]
    assert (mine / "sub" / "work.py").read_text(encoding="utf-8") == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "home"]


@pytest.mark.parametrize(("ids", "said"), [
    ([1, 300], "the id 300 cannot be written: its tokenizer has 256 ids"), ([1, -3], "the id -3"), ([1, 0.5], "not from .* of float64"),
    ([[1, 2], [3, 4]], r"not from \(2, 2\)"), ("text", "not from"),
])
def test_what_is_no_row_of_ids_is_not_written(tmp_path, ids, said):
    # 换成窄的整数会绕回来：300 会变成 44，训练照样跑完
    with pytest.raises(ConfigError, match=said):
        corpus.write_dataset(tmp_path / "d", name="m", source="s", tokenizer=ByteTokenizer(), train=[ids], val=[[1]])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("lines", "said"), [
    ("def prepar(folder): ...", r"there is no function prepare\(folder"), ("def prepare(folder): ...", r"prepare\(\) has left no data set"),
])
def test_a_script_that_makes_no_data_set_is_named(tmp_path, monkeypatch, lines, said):
    folder = tmp_path / "data" / "mine"
    folder.mkdir(parents=True)
    (folder / "prepare.py").write_text(lines, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"prepare\.py: {said}"):
        corpus.prepare("mine", None, {})


def test_nobody_is_told_to_delete_a_folder_that_is_no_data_set(tmp_path):
    (tmp_path / "thesis.txt").write_text(CHINESE, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"has no meta\.json and is no data set; name another folder"):
        TokenData(tmp_path)
