"""Splitting documents: no duplicates, near duplicates together, labels in proportion, little moved by more texts."""

import random
from collections import Counter

import pytest

from nanogpt.data import splitting
from nanogpt.data.documents import Document
from nanogpt.data.splitting import DISTINCT, RUN, bare, groups_of, split_documents, without_duplicates, without_rare

FRACTIONS = {"train": 0.8, "val": 0.05, "judge": 0.15}
HAN = [chr(0x4E00 + i) for i in range(400)]


def texts(count, seed=0, length=(15, 60)):
    """Random texts; about every third borrows a passage from an earlier one."""
    source, made = random.Random(seed), []
    for _ in range(count):
        text = "".join(source.choices(HAN, k=source.randint(*length)))
        if made and source.random() < 0.3:
            other = source.choice(made)
            at = source.randrange(max(1, len(other) - 10))
            text = text[: source.randint(0, 20)] + other[at : at + source.randint(RUN - 3, RUN + 5)] + text[20:]
        made.append(text)
    return made


def labelled(count, seed=0):
    source = random.Random(seed)
    return [Document(text, style=source.choice("甲乙丙")) for text in texts(count, seed)]


def partition(group):
    return {frozenset(i for i, g in enumerate(group) if g == number) for number in set(group)}


def slowly(made):
    """The same groups, every pair compared by the definition."""
    runs = [{t[i : i + RUN] for i in range(len(t) - RUN + 1) if len(set(t[i : i + RUN])) >= DISTINCT} for t in made]
    group = list(range(len(made)))
    for i in range(len(made)):
        for j in range(i):
            if runs[i] & runs[j]:
                group = [group[j] if g == group[i] else g for g in group]
    return group


@pytest.mark.parametrize("piece", [2**21, 100])
def test_groups_are_those_of_the_definition(monkeypatch, piece):
    monkeypatch.setattr(splitting, "PIECE", piece)
    made = texts(150)
    groups = partition(groups_of(made))
    assert groups == partition(slowly(made)) and 1 < max(map(len, groups)) < len(made)


def test_common_fillers_do_not_chain_texts_together():
    made = [f"{c * 7}哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈" for c in HAN[:20]]
    assert len(set(groups_of(made))) == len(made)


def test_every_text_is_in_one_part_and_its_kin_in_the_same():
    documents = labelled(600)
    parts = split_documents(documents, FRACTIONS)
    where = {bare(d.text): name for name, listed in parts.items() for d in listed}
    kept, kept_texts = without_duplicates(documents)
    assert len(where) == sum(map(len, parts.values())) == len(kept)
    owners = [where[text] for text in kept_texts]
    for members in partition(groups_of(kept_texts)):
        assert len({owners[i] for i in members}) == 1


def test_fractions_are_met_within_one_percent_of_each_label():
    documents = [Document("".join(random.Random(i).choices(HAN, k=30)), style="甲乙"[i % 3 == 0], emotion="喜悲"[i % 2]) for i in range(4000)]
    parts = split_documents(documents, FRACTIONS)
    for style in "甲乙":
        for emotion in "喜悲":
            counts = {name: sum((d.style, d.emotion) == (style, emotion) for d in listed) for name, listed in parts.items()}
            for name, fraction in FRACTIONS.items():
                assert counts[name] / sum(counts.values()) == pytest.approx(fraction, abs=0.01)


def test_order_changes_nothing_and_more_texts_move_few():
    documents = labelled(2000)
    first = {d.text: name for name, listed in split_documents(documents, FRACTIONS).items() for d in listed}
    shuffled = random.Random(1).sample(documents, len(documents))
    assert {d.text: name for name, listed in split_documents(shuffled, FRACTIONS).items() for d in listed} == first
    more = [*documents, *labelled(100, seed=9)]
    again = {d.text: name for name, listed in split_documents(more, FRACTIONS).items() for d in listed}
    assert sum(again[text] != name for text, name in first.items()) < 0.02 * len(first)
    other = {d.text: name for name, listed in split_documents(documents, FRACTIONS, seed=1).items() for d in listed}
    assert sum(other[text] != name for text, name in first.items()) > 0.2 * len(first)


def test_duplicates_are_dropped_by_their_words_and_contradictions_altogether():
    documents = [
        Document("春眠，不觉晓！", style="诗"), Document("春眠不觉 晓。", emotion="positive"), Document("甲乙", emotion="positive"),
        Document("甲，乙", emotion="negative"), Document("甲乙。", emotion="positive"), Document("！！"), Document("ok"),
    ]
    assert without_duplicates(documents)[0] == [Document("春眠，不觉晓！", style="诗", emotion="positive"), Document("ok")]
    assert split_documents([], FRACTIONS) == {"train": [], "val": [], "judge": []}


def test_what_is_left_has_no_rare_characters():
    # 每九篇带一个生字，其中有的成对出现
    made = [text + chr(0x8000 + i // 18) * (i % 9 == 0) for i, text in enumerate(texts(400))]
    parts = split_documents([Document(text) for text in made], FRACTIONS)
    least = 4
    fewer = without_rare(parts, least)
    seen = Counter("".join(d.text for d in fewer["train"]))
    assert 0 < len(fewer["train"]) < len(parts["train"]) and min(seen.values()) >= least
    assert all(set(d.text) <= set(seen) for d in fewer["val"]) and fewer["judge"] == parts["judge"]
