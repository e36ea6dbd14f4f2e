"""Judges of style and emotion, what is measured of texts, and the guided perplexity."""

import contextlib
import math
import time

import numpy as np
import pytest
import torch
from conftest import wild_model

from nanogpt.base.language import ConfigError
from nanogpt.data.corpus import build_char_tokenizer
from nanogpt.data.documents import Document, DocumentData, write_documents
from nanogpt.write.judge import judges, measures
from nanogpt.write.judge.evaluate import guided_perplexity, judged
from nanogpt.write.judge.judges import FormJudge, TextJudge, Verdict, build_judge, form_of, lengths, problem, segments
from nanogpt.write.judge.measures import TrainingTexts, distinct, mean_share, share, wilson
from nanogpt.write.loading import Model

QUATRAIN = "春眠不觉晓，处处闻啼鸟。\n夜来风雨声，花落知多少？"
SEVENS = "朝辞白帝彩云间，千里江陵一日还。\n两岸猿声啼不住，轻舟已过万重山。"
OCTAVE = "国破山河在，城春草木深。\n感时花溅泪，恨别鸟惊心。\n烽火连三月，家书抵万金。\n白头搔更短，浑欲不胜簪。"
LONG_OCTAVE = "风急天高猿啸哀，渚清沙白鸟飞回。\n无边落木萧萧下，不尽长江滚滚来。\n万里悲秋常作客，百年多病独登台。\n艰难苦恨繁霜鬓，潦倒新停浊酒杯。"
CHARACTERS = "天地人你我他一二三四五上下左右东西南北春夏秋冬风花雪月山水云雨日夜江湖海河草木鸟兽鱼虫"


# ---- 形式 ----


@pytest.mark.parametrize(("text", "form"), [(QUATRAIN, "五言绝句"), (SEVENS, "七言绝句"), (OCTAVE, "五言律诗"), (LONG_OCTAVE, "七言律诗")])
def test_a_regular_form_is_named_whatever_marks_and_line_breaks_it_has(text, form):
    assert form_of(text) == form
    assert form_of(text.replace("\n", "")) == form and form_of(text.replace("，", "\n").replace("。", "")) == form
    assert form_of("\n " + text.replace("。", "！”").replace("，", "，“") + "\n") == form


@pytest.mark.parametrize("text", [QUATRAIN, SEVENS, OCTAVE, LONG_OCTAVE])
def test_whatever_breaks_a_form_by_one_character_or_segment_has_none(text):
    parts = segments(text)
    for at, (words, end) in enumerate(parts):
        for other in (words[1:], words + "新", words[:2] + "，" + words[2:], words[1:] + "x", words[1:] + "囗", words[1:] + "8", ""):
            broken = "".join(w + e for w, e in [*parts[:at], (other, end), *parts[at + 1 :]])
            assert form_of(broken) is None, broken
    # 少最后一段、多一段、多一个字
    assert form_of("".join(w + e for w, e in parts[:-1])) is None
    assert form_of(text + parts[0][0]) is None and form_of(text + "完") is None and form_of(text + text) != form_of(text)
    assert form_of("") is None and form_of("。，\n") is None


def test_segments_know_what_ends_them_and_quotes_do_not_part():
    assert segments("“道可道”，非常道。？\n名、\n可名") == [("道可道", "，"), ("非常道", "。"), ("名", "、"), ("可名", "")]
    assert lengths("一二三\n四五……") == (3, 2) and [end for _, end in segments("一二三\n四五……")] == ["|", "…"]


@pytest.mark.parametrize(("text", "why"), [
    ("", "empty"), ("，。\n", "empty"), ("春春春春春，" * 4, "repetitive"), ("春花秋月何，" * 4, "repetitive"), ("山水山水山，水山水山水。" * 2, "repetitive"),
    ("the same word " * 6, "repetitive"), (QUATRAIN, ""), (OCTAVE, ""), ("不错", ""), ("哈哈哈，很好看", ""), ("It was the best of times, it was the worst of times.", ""),
])
def test_a_text_that_is_empty_or_turns_in_circles_is_none(text, why):
    assert problem(text) == why


def test_a_text_that_begins_well_and_then_turns_in_circles_is_found_out():
    random = np.random.default_rng(0)
    good = "".join(chr(0x4E00 + int(c)) for c in random.integers(0, 3000, 150))
    assert problem(good) == "" and problem(good + "好看" * 60) == "repetitive"


def song(random, pattern):
    """A text of these segment lengths: characters drawn at random, every second segment ends a line."""
    return "".join("".join(random.choice(list(CHARACTERS), n)) + "，。"[i % 2] + "\n" * (i % 2) for i, n in enumerate(pattern))


TUNES = ((6, 6, 7, 6, 6, 6, 7, 6), (7, 5, 7, 5, 4, 4, 5), (4, 4, 7, 7, 7, 4, 4, 7, 7, 7))


def poetry(count, seed=0):
    """Ci in three tunes, qu with long segments and question marks, quatrains."""
    random = np.random.default_rng(seed)
    texts = [Document(song(random, TUNES[i % 3]), style="宋词") for i in range(count)]
    texts += [Document(song(random, random.integers(6, 14, random.integers(5, 12))).replace("。", "？"), style="元曲") for _ in range(count)]
    return texts + [Document(song(random, (5, 5, 5, 5)), style="五言绝句") for _ in range(count)]


@pytest.fixture(scope="module")
def form_judge():
    return build_judge("style", ["五言绝句", "元曲", "宋词"], poetry(120))


def test_the_form_judge_tells_ci_from_qu_and_from_poems_with_a_fault(form_judge):
    judge, accuracy = form_judge
    assert isinstance(judge, FormJudge) and all(found["rate"] > 0.9 for found in accuracy.values())
    fresh = poetry(20, seed=1)
    right = [v.label == d.style for d, v in zip(fresh, judge.verdicts([d.text for d in fresh]))]
    assert np.mean(right) > 0.9
    random = np.random.default_rng(2)
    faults = [song(random, pattern) for pattern in ((5, 5, 5, 6), (5, 5, 5), (7, 7, 6, 7), (5, 5, 5, 5, 5), (7, 7, 7, 7, 7, 7, 7), (5, 5, 4, 5, 5, 5, 5, 5)) * 5]
    assert np.mean([v == Verdict(None, "formless") for v in judge.verdicts(faults)]) > 0.8
    moved = [song(random, pattern) for pattern in ((6, 7, 6, 6, 6, 6, 6, 7), (5, 4, 7, 5, 4, 7, 5), (7, 4, 4, 7, 7, 4, 7, 4, 7, 7)) * 5]
    assert np.mean([v.label == "宋词" for v in judge.verdicts(moved)]) < 0.2


def test_no_text_without_chinese_characters_alone_has_a_form(form_judge):
    judge, _ = form_judge
    ci = poetry(1)[0].text
    texts = [ci, ci.replace(ci[0], "A", 1), ci.replace(ci[0], "�", 1), ci.replace(ci[0], "囗", 1), "天天天天天天，" * 8, "", "春。"]
    assert [v.label for v in judge.verdicts(texts)] == ["宋词", *[None] * 6]


def test_an_unfinished_and_a_repeated_poem_are_no_hits(form_judge):
    judge, _ = form_judge
    got = judged(judge, [QUATRAIN, QUATRAIN.replace("\n", ""), QUATRAIN, SEVENS], [True, True, False, True])
    assert got == [Verdict("五言绝句"), Verdict(None, "repeated"), Verdict(None, "unfinished"), Verdict("七言绝句")]


def test_the_form_judge_is_the_same_every_time(form_judge):
    again, accuracy = build_judge("style", ["五言绝句", "元曲", "宋词"], poetry(120))
    fresh = [d.text for d in poetry(20, seed=3)]
    assert again.verdicts(fresh) == form_judge[0].verdicts(fresh) and accuracy == form_judge[1]


# ---- 文字 ----


GOOD = ("房间干净", "服务热情", "很喜欢", "值得推荐", "物美价廉", "非常满意")
BAD = ("房间很脏", "态度恶劣", "很失望", "不再来了", "又贵又差", "非常后悔")


def reviews(count, seed=0):
    random = np.random.default_rng(seed)
    return [Document("，".join(random.choice(words, 3, replace=False)) + f"，第{i}次。", emotion=label)
            for i in range(count) for label, words in (("positive", GOOD), ("negative", BAD))]


def test_the_text_judge_learns_two_classes_and_reports_what_it_has_not_seen():
    documents = reviews(60)
    judge, accuracy = build_judge("emotion", ["negative", "positive"], documents)
    assert isinstance(judge, TextJudge) and all(found["rate"] == 1 for found in accuracy.values())
    learned, held_out = judges.parted(documents, "emotion")
    assert {label: found["n"] for label, found in accuracy.items()} == {"negative": 12, "positive": 12} and len(held_out) == 24
    assert sorted(d.text for d in [*learned, *held_out]) == sorted(d.text for d in documents) and judges.parted(documents[::-1], "emotion") == (learned, held_out)
    got = judge.verdicts(["房间干净，很喜欢", "又贵又差，很失望", "很喜欢" * 20, ""])
    assert got == [Verdict("positive"), Verdict("negative"), Verdict(None, "repetitive"), Verdict(None, "empty")]
    # 截断的评论仍看得出好恶
    assert judged(judge, ["房间干净，很喜欢，"], [False]) == [Verdict("positive")]


def test_labels_that_are_no_forms_get_a_text_judge_in_english_too():
    words = {"calm": ("quiet river", "gentle evening", "still water"), "angry": ("burning rage", "bitter quarrel", "violent storm")}
    documents = [Document(f"a {w} and a {v}, number {i}", style=label) for i in range(20) for label, listed in words.items() for w in listed for v in listed if w != v]
    judge, accuracy = build_judge("style", ["angry", "calm"], documents)
    assert isinstance(judge, TextJudge) and min(found["rate"] for found in accuracy.values()) > 0.9
    assert [v.label for v in judge.verdicts(["the quiet water in the evening", "a storm of bitter rage"])] == ["calm", "angry"]


def test_a_label_without_texts_for_the_judge_is_one_line():
    with pytest.raises(ConfigError, match=r"judge.jsonl .* has 3 texts labelled neutral, a judge needs 10"):
        build_judge("emotion", ["negative", "neutral", "positive"], [*reviews(20), *[Document(f"一般{i}", emotion="neutral") for i in range(3)]])


# ---- 量 ----


@pytest.mark.parametrize(("hits", "n", "low", "high"), [
    (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662), (1, 29, 0.0061, 0.1718), (95, 100, 0.8882, 0.9785),
])
def test_the_wilson_interval_has_its_known_values(hits, n, low, high):
    """Values of Newcombe (1998, Statistics in Medicine 17:857-872) where n = 263 and 29."""
    assert wilson(hits, n) == pytest.approx((low, high), abs=5e-5)


def test_the_mean_of_shares_has_an_interval_like_that_of_their_sum():
    mean, (low, high) = mean_share([share(41, 50), share(39, 50)]), wilson(80, 100)
    assert mean["rate"] == pytest.approx(0.8) and (mean["hits"], mean["n"]) == (80, 100)
    assert (mean["low"], mean["high"]) == pytest.approx((low, high), abs=0.02)
    assert mean_share([share(7, 9)]) == pytest.approx(share(7, 9))
    for hits in (0, 30):
        edge = mean_share([share(hits, 30)] * 4)
        assert edge["low"] <= edge["rate"] <= edge["high"] and 0 <= edge["low"] < edge["high"] <= 1


def test_distinct_n_by_hand():
    texts = ["ab ab\n", "ba"]
    # abab 与 ba：字 4+2，二元 ab ba ab ba，三元 aba bab
    assert distinct(texts, 1) == 2 / 6 and distinct(texts, 2) == 2 / 4 and distinct(texts, 3) == 1.0 and distinct(texts, 9) is None


PASSAGE = "白日依山尽黄河入海流欲穷千里目更上一层楼"


def test_copies_begin_at_exactly_twenty_characters_across_line_breaks_and_at_the_edges():
    seen = TrainingTexts(["前面的话，" + PASSAGE[:10] + "\n " + PASSAGE[10:], "第二篇" + CHARACTERS])
    assert len(PASSAGE) == 20
    for text in (PASSAGE, "头" + PASSAGE, PASSAGE + "尾", "头 " + "\n".join(PASSAGE) + " 尾"):
        assert seen.copies(text), text
    for text in (PASSAGE[1:], PASSAGE[:-1], "头" + PASSAGE[1:] + "尾", PASSAGE[:10] + "，" + PASSAGE[10:], "", "短"):
        assert not seen.copies(text), text
    # 跨两篇的不算；训练文本的开头与结尾都算
    assert not seen.copies(PASSAGE[-10:] + "第二篇" + CHARACTERS[:10]) and seen.copies(CHARACTERS[-20:]) and seen.copies("第二篇" + CHARACTERS[:17])


def test_copies_agree_with_a_plain_search():
    random = np.random.default_rng(0)
    training = ["".join(random.choice(list("甲乙"), 400)) for _ in range(30)]
    seen = TrainingTexts(training)
    for _ in range(200):
        text = "".join(random.choice(list("甲乙"), 24))
        assert seen.copies(text) == any(text[i : i + 20] in other for i in range(5) for other in training)


def test_four_million_characters_are_indexed_in_seconds():
    random = np.random.default_rng(0)
    codes = random.integers(0x4E00, 0x5E00, 4_000_000).astype("<u4")
    text = codes.tobytes().decode("utf-32-le")
    start = time.process_time()
    seen = TrainingTexts([text])
    assert seen.copies("外" + text[1_000_000:1_000_020]) and not any(seen.copies(text[i : i + 19]) for i in range(100))
    assert time.process_time() - start < 20 and seen._passages.nbytes <= 32_000_000


def test_known_pairs_are_counted_among_chinese_neighbours_only():
    seen = TrainingTexts(["甲乙丙丁戊己庚辛壬癸"])
    assert seen.known_pairs("甲乙丙丁戊己庚辛壬癸") == 1.0 and seen.known_pairs("癸壬辛庚己戊丁丙乙甲") == 0.0
    assert seen.known_pairs("甲乙，丙丁。戊己") is None and seen.known_pairs("english words only here") is None
    assert seen.known_pairs("甲乙丙丁戊己庚辛壬癸，甲丙") == 9 / 10


# ---- 困惑度 ----


@pytest.fixture(scope="module")
def labelled_model(tmp_path_factory):
    random = np.random.default_rng(0)
    texts = [Document("".join(random.choice(list("abcdef"), random.integers(3, 40))), style=["x", "y", None][i % 3], emotion=["p", "q"][i % 2]) for i in range(60)]
    folder = write_documents(
        tmp_path_factory.mktemp("labelled") / "data", name="text_file", source="test", tokenizer=build_char_tokenizer(d.text for d in texts),
        parts={"train": texts[:40], "val": texts[40:]},
    )
    data = DocumentData(folder)
    network = wild_model(vocab_size=data.vocab_size, separator=data.separator, block_size=16, ngrams=[2], ngram_buckets=97)
    return Model("tiny", network, data.tokenizer, contextlib.nullcontext), data


def plain_perplexity(network, data, **how):
    """exp of the model's own loss over the validation rows."""
    total = count = 0
    for start, length in data.val_windows(16, None):
        x, y = data.rows("val", np.array([start]), length, **how)
        total += network.loss(x, y).item() * int((y >= 0).sum())
        count += int((y >= 0).sum())
    return math.exp(total / count)


@torch.no_grad()
def test_guided_perplexity_at_one_is_the_validation_loss_and_at_zero_that_without_labels(labelled_model):
    model, data = labelled_model
    none, half, one, two = guided_perplexity(model, data, [0.0, 0.5, 1.0, 2.0], limit=None)
    assert one == pytest.approx(plain_perplexity(model.network, data), rel=1e-5)
    assert none == pytest.approx(plain_perplexity(model.network, data, labelled=False), rel=1e-5)
    assert len({round(p, 6) for p in (none, half, one, two)}) == 4


def test_rows_without_labels_hold_the_same_targets_in_the_same_order(labelled_model):
    _, data = labelled_model
    labels = {i for listed in data.tokenizer.labels.values() for ids in listed.values() for i in ids}
    for start, length in data.val_windows(16, None):
        (_, y), (bare_x, bare_y) = (data.rows("val", np.array([start]), length, labelled=labelled) for labelled in (True, False))
        assert torch.equal(y[y >= 0], bare_y[bare_y >= 0]) and not labels & set(bare_x.flatten().tolist())
    assert any(labels & set(data.rows("val", np.array([start]), length)[0].flatten().tolist()) for start, length in data.val_windows(16, None))


def test_the_judges_and_measures_know_the_same_characters():
    assert all(judges.CHINESE.match(c) for c in "㐀一龥〇𠀀") and not any(judges.CHINESE.match(c) for c in "囗□あAｱ，�") and measures.COPY == 20
