"""Write the table of rooms and files in docs/code.md and docs/code.zh-CN.md: python docs/code_map.py."""
# 地图不另写一遍：英文取每个文件 docstring 的第一句，中文取文件开头注释的第一行
# 改了文件的开头，就跑一遍这个脚本；忘了的话，tests/test_rooms.py 会说

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nanogpt"
PAGES = {"en": ROOT / "docs" / "code.md", "zh": ROOT / "docs" / "code.zh-CN.md"}
BEGIN, END = "<!-- files -->", "<!-- end of files -->"


def english(source: str) -> str:
    """The first sentence of a module's docstring."""
    words = " ".join((ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0].split())
    return re.split(r"\.\s", words)[0].removesuffix(".")


def chinese(source: str) -> str:
    """The first line of the comment that a file opens with, before or behind its docstring."""
    return next((line[1:].strip() for line in source.splitlines() if re.match(r"#.*[\u4e00-\u9fff]", line)), "")


def table(lang: str) -> str:
    """A heading for each room and a row for each of its files."""
    lines = []
    for room in sorted({path.parent for path in PACKAGE.rglob("*.py")}):
        files = [path for path in sorted(room.glob("*.py")) if path.read_text(encoding="utf-8").strip()]
        if not files:
            continue
        lines += [f"### `{room.relative_to(ROOT).as_posix()}/`", "", "| | |", "|---|---|"]
        for path in files:
            source = path.read_text(encoding="utf-8")
            said = (english if lang == "en" else chinese)(source).replace("|", "\\|")
            lines.append(f"| `{path.name}` | {said} |")
        lines.append("")
    return "\n".join(lines)


def written(lang: str) -> str:
    """The page as it should be."""
    page = PAGES[lang].read_text(encoding="utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    return f"{before}{BEGIN}\n\n{table(lang)}\n{END}{after}"


if __name__ == "__main__":
    for lang, page in PAGES.items():
        page.write_text(written(lang), encoding="utf-8", newline="\n")
