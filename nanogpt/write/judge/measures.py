"""What is counted in texts: shares with intervals, distinct n-grams, copied passages and known pairs of characters."""

# 评估用的几把尺：比例与区间、distinct-n、照抄与见过的字对；只数字符，不碰模型
# TrainingTexts 给训练文本编两张排好序的索引，之后每段文字几次二分就查完；evaluate 与 judges 用这里的函数
# 区间都是 95%，平均的区间由各自的区间合成，不假设各标签一样准

import math
import re
from collections.abc import Iterable, Sequence

import numpy as np

from nanogpt.data.splitting import RUN, run_hashes

# 汉字：基本区、扩展 A 及其后、兼容区
HAN = "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# 切分时把同源的放在一起，凭的也是这么多字
COPY = RUN
"""A text copies where it shares so many characters in a row with one training text."""
# 少于这么多对汉字时，见过的比例没有意义
FEWEST_PAIRS = 8


# ---- 比例与区间 ----


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The 95% score interval of a share (Wilson 1927, doi:10.1080/01621459.1927.10502953)."""
    # scipy 随 scikit-learn 而来，载入要近一秒：只有评估用它
    from scipy.stats import binomtest

    if not n:
        return 0.0, 1.0
    found = binomtest(hits, n).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def share(hits: int, n: int) -> dict:
    """hits, n, their quotient and its interval, for a record."""
    low, high = wilson(hits, n)
    return {"hits": hits, "n": n, "rate": hits / n if n else None, "low": low, "high": high}


def mean_share(shares: Sequence[dict]) -> dict:
    """The mean of several shares, each counting alike, with a 95% interval from theirs.

    The interval is MOVER's (Zou and Donner 2008, doi:10.1002/sim.3095).
    """
    rate = sum(s["rate"] for s in shares) / len(shares)
    # 各自的一侧距离平方相加：区间必含均值，也不会越过 0 与 1
    def reach(side: str) -> float:
        return math.sqrt(sum((s[side] - s["rate"]) ** 2 for s in shares)) / len(shares)

    hits, n = sum(s["hits"] for s in shares), sum(s["n"] for s in shares)
    return {"hits": hits, "n": n, "rate": rate, "low": rate - reach("low"), "high": rate + reach("high")}


# ---- 多样 ----


def without_space(text: str) -> str:
    """The text without white space: what lengths, n-grams and copies are counted in."""
    return "".join(text.split())


def is_chinese(text: str) -> bool:
    """Whether a text has more Chinese characters than Latin letters."""
    return len(re.findall(f"[{HAN}]", text)) > len(re.findall("[A-Za-z]", text))


def distinct(texts: Iterable[str], n: int) -> float | None:
    """Different n-grams of characters / all of them, within texts (Li et al. 2016, arXiv:1510.03055).

    None where there is no n-gram. The value falls as texts are added: compare only equal numbers of them.
    """
    seen, total = set(), 0
    for text in map(without_space, texts):
        grams = [text[i : i + n] for i in range(len(text) - n + 1)]
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else None


# ---- 与训练文本相同的 ----


class TrainingTexts:
    """The training texts, indexed for passages of COPY characters and pairs of Chinese characters."""

    # 存 64 位指纹而不存片段本身：几百万字的训练集也放得下，查到之后再核对原文

    def __init__(self, texts: Iterable[str]):
        # 文章之间隔一个不会出现在别处的字符：跨篇的不算
        self.text = "\0".join(map(without_space, texts))
        codes = _codes(self.text)
        self.chinese = is_chinese(self.text)
        # 400 万字的指纹 32 MB，排序不到一秒；查找是二分，重复的不碍事
        self._passages = np.sort(run_hashes(codes))
        self._pairs = np.sort(_pairs(codes))

    def copies(self, text: str) -> bool:
        """Whether the text shares COPY characters in a row with a training text; white space does not count."""
        text = without_space(text).replace("\0", "")
        found = _among(run_hashes(_codes(text)), self._passages)
        # 指纹相同还要文字真的相同，结果才是精确的
        return any(text[i : i + COPY] in self.text for i in found.nonzero()[0])

    def known_pairs(self, text: str) -> float | None:
        """Share of the pairs of neighbouring Chinese characters that training texts have too, None for few pairs."""
        pairs = _pairs(_codes(without_space(text)))
        return float(_among(pairs, self._pairs).mean()) if len(pairs) >= FEWEST_PAIRS else None


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32).astype(np.uint64)


def _pairs(codes: np.ndarray) -> np.ndarray:
    han = np.zeros(len(codes), dtype=bool)
    for first, last in re.findall("(.)-(.)", HAN):
        han |= (codes >= ord(first)) & (codes <= ord(last))
    both = han[:-1] & han[1:]
    return (codes[:-1] << np.uint64(21) | codes[1:])[both]


def _among(wanted: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which of `wanted` are in the sorted `known`."""
    if not len(known):
        return np.zeros(len(wanted), dtype=bool)
    return known[np.searchsorted(known, wanted).clip(max=len(known) - 1)] == wanted
