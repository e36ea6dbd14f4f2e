"""Judges of written texts: a poem's style by its form alone, any other label by a trained classifier.

A judge learns from the judge part of a data set, which no generator trains on, and is measured on a fifth of it that
it has not seen. It says for each text which label it has, or why it has none: a text that repeats itself has no label,
however well its form or its words would do.
"""

# 评判：给一段文字认出标签，或说出它为什么没有；它从不参与生成，也不看是谁写的
# 诗的四种近体只看形式，准确无误；宋词与元曲靠形状上的小分类器，别的标签靠字符 n-gram 的小分类器
# 学的是数据集里单独留出、任何训练都不看的那一份（judge.jsonl），其中五分之一又留下来量它自己有多准
# build_judge 是入口，evaluate 用它；打转重复的文字不论标签都算没有

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from nanogpt.base.language import ConfigError
from nanogpt.data.documents import Document
from nanogpt.data.labels import CI, FORMS, QU
from nanogpt.write.judge.measures import HAN, is_chinese, share

POETRY = {*FORMS.values(), CI, QU}

# 没有标签的原因
EMPTY, REPETITIVE, FORMLESS = "empty", "repetitive", "formless"
# 每种标签最多学这么多篇：再多也不更准，只是更慢
MOST = 4000
FEWEST = 10
"""Texts of each label that the judge part must have."""

# 引号与书名号不断开句子；其余标点与空白都断开
QUOTES = re.compile("[“”‘’「」『』\"'《》〈〉]")
SEGMENT = re.compile(r"([^\s，。、；：？！,.;:?!…—～]+)([\s，。、；：？！,.;:?!…—～]*)")
# 囗、□ 是缺字的记号，不是字
CHINESE = re.compile(f"(?!囗)[{HAN}〇]")
ENDS = (("。", "。．."), ("？", "？！?!"), ("；", "；：;:"), ("，", "，,"), ("、", "、"), ("…", "…—～"))
# 一个汉字或一个词
UNIT = re.compile(rf"[{HAN}〇]|[^\W{HAN}〇]+")
# 重复按每百字看：写到后来才打转的也逃不掉
WINDOW = 100
# 真实的诗词曲里，不同的相邻两字低于这个比例的不到两千分之一
DIFFERENT = 0.6


@dataclass(frozen=True)
class Verdict:
    """The label of a text, or why it has none."""

    # 原因也要数：没写完、打转、不成形，各说明控制的一种毛病

    label: str | None
    why: str = ""


# ---- 成不成文 ----


def problem(text: str) -> str:
    """EMPTY or REPETITIVE for what is no text, whatever the label; else nothing."""
    units = UNIT.findall(text)
    return EMPTY if not units else REPETITIVE if _repetitive(units) else ""


def _repetitive(units: list[str]) -> bool:
    for start in range(0, len(units), WINDOW):
        window = units[start : start + WINDOW]
        pairs = list(pairwise(window))
        if len(pairs) >= 4 and len(set(pairs)) < DIFFERENT * len(pairs):
            return True
    return False


# ---- 形式 ----


def segments(text: str) -> list[tuple[str, str]]:
    """The (characters, end) between punctuation and white space.

    `end` is one of 。？；，、… or | for a line break, "" for nothing.
    """
    return [(words, _end(marks)) for words, marks in SEGMENT.findall(QUOTES.sub("", text))]


def _end(marks: str) -> str:
    # “？。”“！，”这样连写的，取其中语气最重的
    return next((name for name, members in ENDS if any(c in members for c in marks)), "|" if marks else "")


def chinese_only(text: str) -> bool:
    """Whether all but punctuation and white space is Chinese characters."""
    return all(CHINESE.match(c) for words, _ in segments(text) for c in words)


def lengths(text: str) -> tuple[int, ...]:
    """Characters of each segment."""
    return tuple(len(words) for words, _ in segments(text))


def form_of(text: str) -> str | None:
    """The regular form of a poem, None for everything else.

    A regular form is an exact number of segments with the same exact number of Chinese characters each.
    """
    found = lengths(text)
    form = FORMS.get((len(found), found[0])) if len(set(found)) == 1 else None
    return form if form and chinese_only(text) else None


def shape(text: str) -> list[tuple[int, str]]:
    """What is left of a text without its words: the length of each segment and what ends it."""
    return [(len(words), end) for words, end in segments(text)]


def features(found: list[tuple[int, str]]) -> list[str]:
    """A shape as a bag of words.

    The words are n-grams of lengths (up to 6) and of lengths with ends (up to 3), segments of each sentence, and size.
    """
    bare, ended = ["^", *(f"{n}" for n, _ in found), "$"], ["^", *(f"{n}{end}" for n, end in found), "$"]
    words = [f"{kind}{' '.join(row[i : i + n])}" for kind, row, most in (("n", bare, 6), ("e", ended, 3))
             for n in range(1, most + 1) for i in range(len(row) - n + 1)]
    in_sentence = 0
    for _, end in found:
        in_sentence += 1
        if end in ("。", "？"):
            words.append(f"s{in_sentence}")
            in_sentence = 0
    # 段数按倍数分档
    return [*words, f"size{(len(found) + 1).bit_length()}", f"longest{max((n for n, _ in found), default=0)}"]


class FormJudge:
    """Style by form: the four regular forms exactly, 宋词, 元曲 or neither by a logistic regression on shapes.

    "Neither" is learned from shapes that are made up: regular poems with faults, ci whose segments changed places,
    noise. So a poem that missed its form by a character is not taken for a ci.
    """

    # 只看形状不看字：写得像不像词由困惑度去量，这里只问格律对不对

    name = "form"

    def __init__(self, documents: Sequence[Document]):
        free = [d for d in documents if d.style in (CI, QU) and not form_of(d.text) and chinese_only(d.text)]
        known = [(d.style, shape(d.text)) for d in free]
        known = [pair for label in (CI, QU) for pair in [p for p in known if p[0] == label][:MOST]]
        self._classify = None
        if known:
            shapes = [found for _, found in known]
            made_up = faulty_shapes([found for label, found in known if label == CI], len(known))
            labels = [label for label, _ in known] + [FORMLESS] * len(made_up)
            self._classify = _trained(shapes + made_up, labels, _shape_vectors())

    def verdicts(self, texts: Sequence[str]) -> list[Verdict]:
        """One verdict for each text."""
        found: list[Verdict | None] = [self._exact(text) for text in texts]
        open_ones = [i for i, verdict in enumerate(found) if verdict is None]
        if self._classify and open_ones:
            labels = self._classify([shape(texts[i]) for i in open_ones])
        else:
            labels = [FORMLESS] * len(open_ones)
        for i, label in zip(open_ones, labels):
            found[i] = Verdict(None, FORMLESS) if label == FORMLESS else Verdict(label)
        return found

    def _exact(self, text: str) -> Verdict | None:
        if why := problem(text):
            return Verdict(None, why)
        if not chinese_only(text):
            return Verdict(None, FORMLESS)
        form = form_of(text)
        return Verdict(form) if form else None


def faulty_shapes(ci: list[list[tuple[int, str]]], count: int) -> list[list[tuple[int, str]]]:
    """`count` regular poems with a fault, each given ci with its lengths in another order, and noise.

    They are the same every time.
    """
    random = np.random.default_rng(0)
    regular = [[(length, "，。"[i % 2]) for i in range(number)] for number, length in FORMS]
    found = [_with_fault(list(regular[i % len(regular)]), random) for i in range(count)]
    for shape_of_one in ci:
        numbers = [n for n, _ in shape_of_one]
        if len(set(numbers)) > 1:
            moved = random.permutation(numbers).tolist()
            found.append([(n, end) for n, (_, end) in zip(moved, shape_of_one)])
    ends = list("，。？、；|")
    for _ in range(count // 3):
        longest = random.choice([3, 8, 12, 20])
        size = int(2 ** random.uniform(0, 6))
        found.append([(int(random.integers(1, longest + 1)), str(random.choice(ends))) for _ in range(size)])
    return found


def _with_fault(poem: list[tuple[int, str]], random: np.random.Generator) -> list[tuple[int, str]]:
    """A regular poem with up to three segments too long or too short, its end missing, or something behind it."""
    poem = [(n, end if random.random() < 0.9 else "？") for n, end in poem]
    kind = random.random()
    if kind < 0.5:
        for at in random.integers(0, len(poem), random.integers(1, 4)):
            poem[at] = (max(1, poem[at][0] + int(random.choice([-2, -1, 1, 2]))), poem[at][1])
        return poem
    few = int(random.integers(1, 4))
    return poem[:-few] if kind < 0.75 else poem + poem[:few]


# ---- 文字 ----


class TextJudge:
    """Any labels: TF-IDF of characters' 1- to 3-grams and logistic regression."""

    # 小而快，几千篇几秒钟学完；它有多准，随每份记录一起报告

    name = "text"

    def __init__(self, documents: Sequence[Document], kind: str):
        counts: Counter[str] = Counter()
        kept = []
        for document in documents:
            label = getattr(document, kind)
            counts[label] += 1
            if counts[label] <= MOST:
                kept.append((document.text, label))
        texts = [text for text, _ in kept]
        self._classify = _trained(texts, [label for _, label in kept], _text_vectors(texts))

    def verdicts(self, texts: Sequence[str]) -> list[Verdict]:
        """One verdict for each text."""
        labels = self._classify(texts)
        return [Verdict(None, why) if (why := problem(text)) else Verdict(label) for text, label in zip(texts, labels)]


Judge = FormJudge | TextJudge


def _shape_vectors():
    from sklearn.feature_extraction.text import TfidfVectorizer

    # 次数取对数；不做 idf 与归一：形式特征没有“常见而无用”的
    return TfidfVectorizer(analyzer=features, min_df=2, sublinear_tf=True, use_idf=False, norm=None)


def _text_vectors(texts: list[str]):
    from sklearn.feature_extraction.text import TfidfVectorizer

    # 英文的 n-gram 不跨词，中文没有词界
    analyzer = "char" if is_chinese("".join(texts)) else "char_wb"
    return TfidfVectorizer(analyzer=analyzer, ngram_range=(1, 3), min_df=2, sublinear_tf=True)


def _trained(examples: list, labels: list[str], vectors) -> Callable[[Sequence], list[str]]:
    """A function from examples to labels."""
    from sklearn.linear_model import LogisticRegression

    # 各标签一样重：篇数多的不占便宜
    regression = LogisticRegression(max_iter=300, class_weight="balanced").fit(vectors.fit_transform(examples), labels)
    return lambda new: regression.predict(vectors.transform(new)).tolist() if len(new) else []


# ---- 评判用的文本 ----


def parted(documents: Sequence[Document], kind: str) -> tuple[list[Document], list[Document]]:
    """(to learn from, held out): the fifth of each label with the lowest hashes is held out.

    So the split depends on the texts alone.
    """
    by_hash = sorted(documents, key=lambda d: hashlib.sha256(d.text.encode("utf-8")).digest())
    counts, before = Counter(getattr(d, kind) for d in documents), Counter()
    parts: tuple[list[Document], list[Document]] = [], []
    for document in by_hash:
        label = getattr(document, kind)
        before[label] += 1
        parts[5 * before[label] <= counts[label]].append(document)
    return parts


def build_judge(kind: str, labels: Sequence[str], documents: Sequence[Document]) -> tuple[Judge, dict[str, dict]]:
    """The judge that these labels of "style" or "emotion" call for, and its accuracy.

    That is, per label, the share of held-out real texts that it gets right.
    """
    documents = [d for d in documents if getattr(d, kind) in labels]
    for label in labels:
        count = sum(getattr(d, kind) == label for d in documents)
        if count < FEWEST:
            raise ConfigError(
                "judge.jsonl of the data set has {count} texts labelled {label}, a judge needs {need}; prepare it "
                "with more texts or a larger judge part",
                label=label, count=count, need=FEWEST,
            )
    check_package()
    learned, test = parted(documents, kind)
    judge = FormJudge(learned) if kind == "style" and set(labels) <= POETRY else TextJudge(learned, kind)
    verdicts = judge.verdicts([d.text for d in test])
    right = Counter(getattr(d, kind) for d, verdict in zip(test, verdicts) if verdict.label == getattr(d, kind))
    return judge, {label: share(right[label], sum(getattr(d, kind) == label for d in test)) for label in labels}


def check_package() -> None:
    """Say how to install scikit-learn where it is missing."""
    try:
        import sklearn  # noqa: F401
    except ImportError:
        what = "python -m nanogpt.control evaluate"
        raise ConfigError("missing_package", what=what, package="scikit-learn") from None
