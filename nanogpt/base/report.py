"""Pages and charts of reports: one html file that needs nothing else, curves in it as SVG, light and dark."""

# 报告共用的零件：扫描的、一次训练的、几次训练相比的，样子都一样，只在这里写一遍
# page 填好一个模板（各自的模板 extends page.html，颜色与版式在那里）；curves 画曲线，svg 把一张图写成网页里的 SVG
# 同样的内容画出同样的字节；jinja2 与 matplotlib 载入要近一秒，用到才 import

import contextlib
import io
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nanogpt.base.language import current_language, text

# 浅色一套；网页里换成同名的 CSS 变量，才能随系统变深色
BAD = "#dc2626"
PALETTE = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2", "#65a30d", BAD)
INK, SOFT, FAINT, CARD = "#111827", "#4b5563", "#e5e7eb", "#ffffff"
VARIABLES = {f"c{index}": colour for index, colour in enumerate(PALETTE[:-1])} | {
    "bad": BAD, "ink": INK, "soft": SOFT, "faint": FAINT, "card": CARD,
}
# 文件里没有随机的 id：同样的结果画出同样的字节；设置里的 $ 不是数学公式；SVG 里文字留作文字，由浏览器用自己的字体写
STYLE = {"text.parse_math": False, "svg.hashsalt": "nanogpt", "svg.fonttype": "none"}
# 多于颜色的曲线换一种线
DASHES = ("-", "--", ":", "-.")


def page(template: Path, **values: Any) -> str:
    """The html of a template that extends page.html, in the console's language; every text is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader([template.parent, Path(__file__).parent])
    neat = {"trim_blocks": True, "lstrip_blocks": True}
    templates = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, **neat)
    common = {"text": text, "formatted": formatted, "language": current_language(), "variables": VARIABLES}
    return templates.get_template(template.name).render(**common, **values)


def formatted(value: float | None, form: str) -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None else format(value, form)


def printable(written: str) -> str:
    """The text without control characters, which no XML can hold; settings and reasons may have any."""
    return "".join(c if c.isprintable() else "?" for c in written)


def curves(lines: Mapping[str, Sequence[tuple[float, float]]], *, x_label: str, y_label: str):
    """A matplotlib figure of named curves, each a list of (x, y) with at least one."""
    # 字体与 $ 怎样读，造的时候就定下了
    with style():
        ax = empty(x_label, y_label)
        for index, (name, points) in enumerate(lines.items()):
            dash = DASHES[index // (len(PALETTE) - 1) % len(DASHES)]
            few = {"marker": "o", "markersize": 4} if len(points) < 12 else {}
            colour, label = PALETTE[index % (len(PALETTE) - 1)], printable(name)
            ax.plot(*zip(*points), dash, color=colour, linewidth=1.6, label=label, **few)
        ax.margins(0.02, 0.06)
        if len(lines) > 1:
            ax.figure.legend(loc="outside lower center", frameon=False, ncols=2, fontsize=9, labelcolor=INK)
    return ax.figure


def empty(x_label: str, y_label: str):
    """The axes of a new figure."""
    # 不用 pyplot：它要找图形后端，还会留下全局状态
    from matplotlib.figure import Figure

    ax = Figure(figsize=(10, 5.4), layout="constrained").add_subplot()
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.0f}" if abs(value) >= 100 else f"{value:g}")
    ax.set_xlabel(x_label, color=SOFT)
    ax.set_ylabel(y_label, color=SOFT)
    ax.grid(axis="y", color=FAINT)
    ax.set_axisbelow(True)
    ax.tick_params(length=0, pad=6, colors=SOFT)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color(SOFT)
    return ax


@contextlib.contextmanager
def style(*fonts: str) -> Iterator[None]:
    """Inside, matplotlib draws and writes as every report does; DejaVu Sans stands behind the fonts."""
    from matplotlib import rc_context

    with rc_context(STYLE | {"font.family": [*fonts, "DejaVu Sans"]}), warnings.catch_warnings():
        # 网页里浏览器会补上缺的字；PNG 里缺的只会是设置中的路径
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield


def svg(figure, title: str, marks: Sequence[str] = ()) -> str:
    """A figure as an inline SVG, the same text every time; its colours are the page's CSS variables.

    marks[i] is shown when the mouse is over the element whose gid is point<i>.
    """
    drawn = io.BytesIO()
    with style():
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(drawn, format="svg", transparent=True, metadata=nothing)
    root = ElementTree.fromstring(drawn.getvalue())
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for name in [name for name in element.attrib if "}" in name]:
            element.set(name.rpartition("}")[2], element.attrib.pop(name))
        # id 只在画的时候有用：一页里两张图会重名
        given = element.attrib.pop("id", "") if element.tag == "g" else ""
        if given.startswith("point"):
            mark = ElementTree.Element("title")
            mark.text = marks[int(given.removeprefix("point"))]
            element.insert(0, mark)
    root.attrib = {"viewBox": root.get("viewBox"), "role": "img", "aria-label": title}
    written = ElementTree.tostring(root, encoding="unicode")
    for name, colour in VARIABLES.items():
        written = written.replace(f": {colour}", f": var(--{name})")
    return written
