"""Splits documents into parts: drops duplicates, keeps near duplicates together, keeps labels in proportion.

Texts are compared by their letters and digits alone. Which part a text falls into follows from a hash of the text
itself, so that more texts, or another order, move few of the others.
"""

# 文章分成训练、验证、评判几份：去重，同源的放在一起，各标签按比例
# 否则同一首诗的两个版本分落两边，验证损失与评判都虚高；判断只看字与数字，标点与空格不算
# 落在哪一份由文章自己的 hash 决定：多几篇、换个次序，别的不挪位
# 全程是 numpy 的数组，按 PIECE 分块：几十万篇也不必两两比较；用者是带标签数据集的 prepare.py

import hashlib
import re
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from nanogpt.base.console import in_sight
from nanogpt.base.language import say
from nanogpt.data.documents import Document
from nanogpt.data.labels import LABEL_KINDS

# 连着这么多字相同就算同源
RUN = 20
# 这些字里至少这么多种不同：“哈哈哈哈”之类不算
DISTINCT = 8
# 一次处理这么多字：中间数组只占几百 MB
PIECE = 2**21


def split_documents(
    documents: Iterable[Document], fractions: dict[str, float], *, seed: int = 0
) -> dict[str, list[Document]]:
    """Parts with about these fractions of each label's documents; says what was dropped and what was kept together.

    Documents that share RUN characters in a row, directly or through others, fall into the same part.
    """
    # 有多少篇，读完才知道
    documents = list(in_sight(documents, None))
    kept, texts = without_duplicates(documents)
    group = groups_of(texts)
    sizes = np.bincount(group) if len(group) else np.zeros(1, dtype=int)
    say(
        "{documents:,} texts: {dropped:,} duplicates dropped, {groups:,} groups with common passages kept together "
        "(the largest: {largest:,})",
        documents=len(documents), dropped=len(documents) - len(kept), groups=int((sizes > 1).sum()),
        largest=int(sizes.max()),
    )
    part = _parts_of(kept, texts, group, fractions, seed)
    return {name: [document for document, p in zip(kept, part) if p == name] for name in fractions}


def bare(text: str) -> str:
    """The letters and digits of a text."""
    return re.sub(r"[\W_]+", "", text)


def without_duplicates(documents: list[Document]) -> tuple[list[Document], list[str]]:
    """(the first document of each text, its bare text), without contradictory labels and texts of punctuation only."""
    first: dict[str, Document | None] = {}
    for document in documents:
        text = bare(document.text)
        if text:
            first[text] = _merged(first[text], document) if text in first else document
    kept = {text: document for text, document in first.items() if document}
    return list(kept.values()), list(kept)


def _merged(first: Document | None, again: Document) -> Document | None:
    """The first document with the labels of both; None when they contradict each other."""
    if first is None:
        return None
    labels = {}
    for kind in LABEL_KINDS:
        named = {label for label in (getattr(first, kind), getattr(again, kind)) if label is not None}
        if len(named) > 1:
            return None
        labels[kind] = next(iter(named), None)
    return replace(first, **labels)


# ---- 同源的放在一起 ----


def groups_of(texts: list[str]) -> np.ndarray:
    """The group number of each text, (n,), from 0; texts that share a run of RUN characters have the same.

    Texts are also of one group if others link them.
    """
    hashes, owners = _runs(texts)
    order = np.argsort(hashes, kind="stable")
    hashes, owners = hashes[order], owners[order]
    same = (hashes[1:] == hashes[:-1]) & (owners[1:] != owners[:-1])
    links = np.unique(np.stack((owners[:-1][same], owners[1:][same]), axis=1), axis=0)
    # 并查集：同一个 hash 的相邻两篇连起来，再由此传开
    root = list(range(len(texts)))

    def find(i: int) -> int:
        while root[i] != i:
            # 顺手把路径压短
            root[i] = root[root[i]]
            i = root[i]
        return i

    for left, right in links.tolist():
        root[find(right)] = find(left)
    return np.unique([find(i) for i in range(len(texts))], return_inverse=True)[1].reshape(-1)


def _runs(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(hash, index of its text) of every run of RUN characters with enough distinct ones."""
    found: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(0, np.uint64), np.zeros(0, np.int64))]
    begin = length = 0
    for i, text in enumerate(texts):
        length += len(text)
        if length > PIECE or i == len(texts) - 1:
            hashes, owners = _runs_of_piece(texts[begin : i + 1])
            found.append((hashes, owners + begin))
            begin, length = i + 1, 0
    return np.concatenate([h for h, _ in found]), np.concatenate([o for _, o in found])


def _runs_of_piece(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    codes = np.frombuffer("".join(texts).encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)
    owner = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    starts = len(codes) - RUN + 1
    if starts <= 0:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    # 上一个相同的字在哪里：早于这一串的开头，就是串里新的一种
    order = np.argsort(codes, kind="stable")
    previous = np.full(len(codes), -1)
    again = codes[order][1:] == codes[order][:-1]
    previous[order[1:][again]] = order[:-1][again]
    hashes = run_hashes(_mixed(codes.astype(np.uint64)))
    distinct = np.zeros(starts, dtype=np.uint8)
    for k in range(RUN):
        distinct += previous[k : k + starts] < np.arange(starts)
    inside = (owner[:starts] == owner[RUN - 1 :]) & (distinct >= DISTINCT)
    return hashes[inside], owner[:starts][inside]


def run_hashes(codes: np.ndarray) -> np.ndarray:
    """A 64-bit polynomial hash of every run of RUN codes (uint64)."""
    count = max(len(codes) - RUN + 1, 0)
    hashes = np.zeros(count, dtype=np.uint64)
    # 所有起点一起滚动；无符号整数溢出时回绕，正是模 2^64
    for at in range(RUN):
        hashes *= np.uint64(0x9E3779B97F4A7C15)
        hashes += codes[at : at + count]
    return hashes


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """64 well-spread bits for each number (the finaliser of splitmix64, Steele et al. 2014)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


# ---- 分配 ----


def _parts_of(
    documents: list[Document], texts: list[str], group: np.ndarray, fractions: dict[str, float], seed: int
) -> list[str]:
    """The part of each document: its label's groups in the order of their hashes, cut at the fractions."""
    seeded = (f"{seed} {text}".encode("utf-8", errors="surrogatepass") for text in texts)
    place = [hashlib.blake2b(content, digest_size=8).digest() for content in seeded]
    # 一组由其中 hash 最小的一篇代表：位置与标签都取它的
    leader: dict[int, int] = {}
    for i in sorted(range(len(texts)), key=place.__getitem__):
        leader.setdefault(int(group[i]), i)
    sizes = np.bincount(group) if len(group) else []
    strata: dict[tuple, list[int]] = {}
    for number, i in leader.items():
        strata.setdefault(tuple(getattr(documents[i], kind) for kind in LABEL_KINDS), []).append(number)
    ends = np.cumsum(list(fractions.values()))
    names = list(fractions)
    part_of_group: dict[int, str] = {}
    for numbers in strata.values():
        counts = np.array([sizes[n] for n in numbers])
        middle = (counts.cumsum() - counts / 2) / counts.sum() * ends[-1]
        for number, at in zip(numbers, np.searchsorted(ends, middle)):
            part_of_group[number] = names[min(int(at), len(names) - 1)]
    return [part_of_group[int(number)] for number in group]


# ---- 生僻字 ----


def without_rare(parts: dict[str, list[Document]], least: int) -> dict[str, list[Document]]:
    """The parts without documents whose characters are too rare to learn; says how many.

    "train" loses those with a character that occurs fewer than `least` times in it, "val" those with one that "train"
    then lacks. "judge" stays whole: no vocabulary is made from it.
    """
    texts = [document.text for document in parts["train"]]
    codes = np.frombuffer("".join(texts).encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)
    owner = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    kept = np.ones(len(texts), dtype=bool)
    while True:
        seen = np.bincount(codes[kept[owner]], minlength=int(codes.max(initial=0)) + 1)
        losers = np.unique(owner[(seen[codes] < least) & kept[owner]])
        if not len(losers):
            break
        # 去掉一批，又会有字变得少见：直到不再变
        kept[losers] = False
    known = {chr(code) for code in np.flatnonzero(seen)}
    train = [document for document, keep in zip(parts["train"], kept) if keep]
    fewer = {**parts, "train": train, "val": [document for document in parts["val"] if known.issuperset(document.text)]}
    say(
        "{dropped:,} texts left out: a character in them occurs fewer than {least} times in the training texts",
        dropped=sum(len(parts[name]) - len(fewer[name]) for name in parts), least=least,
    )
    return fewer
