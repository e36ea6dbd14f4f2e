"""Pages and charts of reports: one html file that needs nothing else, curves in it as SVG, light and dark."""

# 报告共用的零件：扫描的、一次训练的、几次训练相比的，样子都一样，只在这里写一遍
# page 填好一个模板（各自的模板 extends page.html，颜色与版式在那里）；
# curves 把曲线写成 SVG，svg 把 matplotlib 的图写成网页里的 SVG
# 每次训练结束都画曲线：matplotlib 要载入一秒多，第一次用还要先建字体的索引；几条折线自己写成 SVG，毫秒就好
# 同样的内容画出同样的字节；jinja2 与 matplotlib 载入要近一秒，用到才 import

import contextlib
import functools
import io
import math
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from nanogpt.base.console import scaled
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
DASHES = ("none", "8 4", "2 4", "10 4 2 4")
# 一条曲线最多画这么多点
MOST_POINTS = 500


def page(template: Path, **values: Any) -> str:
    """The html of a template that extends page.html, in the console's language; every text is escaped."""
    common = {"text": text, "formatted": formatted, "language": current_language(), "variables": VARIABLES}
    return _loaded(template).render(**common, **values)


@functools.cache
def _loaded(template: Path):
    # 扫描里每个任务都写一页：模板只编译一次
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader([template.parent, Path(__file__).parent])
    neat = {"trim_blocks": True, "lstrip_blocks": True}
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, **neat).get_template(template.name)


def formatted(value: float | None, form: str) -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None else format(value, form)


def printable(written: str) -> str:
    """The text without control characters, which no XML can hold; settings and reasons may have any."""
    return "".join(c if c.isprintable() else "?" for c in written)


def curves(lines: Mapping[str, Sequence[tuple[float, float]]], title: str, *, x_label: str, y_label: str) -> str:
    """Named curves, each a list of (x, y) with at least one, as an inline SVG, the same text every time."""
    every = [point for points in lines.values() for point in points]
    across, x_ticks = _axis([x for x, _ in every], 70, 980)
    up, y_ticks = _axis([y for _, y in every], 370, 20)
    rows = (len(lines) + 1) // 2 if len(lines) > 1 else 0
    drawn = [f'<svg viewBox="0 0 1000 {430 + 24 * rows}" role="img" aria-label="{escape(printable(title))}">']

    def rule(x1, y1, x2, y2, style: str) -> None:
        drawn.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" style="{style}"/>')

    def write(x, y, words: str, side: str = "middle", more: str = "") -> None:
        style = f"fill:var(--soft);font-size:14px;text-anchor:{side}"
        drawn.append(f'<text x="{x:.1f}" y="{y:.1f}" style="{style}"{more}>{escape(printable(words))}</text>')

    for y in y_ticks:
        rule(60, up(y), 990, up(y), "stroke:var(--faint)")
        write(50, up(y) + 5, tick(y), "end")
    rule(60, 380, 990, 380, "stroke:var(--soft)")
    for x in x_ticks:
        write(across(x), 400, tick(x))
    write(525, 424, x_label)
    write(16, 195, y_label, more=' transform="rotate(-90 16 195)"')
    for index, (name, points) in enumerate(lines.items()):
        dash = DASHES[index // (len(PALETTE) - 1) % len(DASHES)]
        colour = f"var(--c{index % (len(PALETTE) - 1)})"
        stroke = f"fill:none;stroke:{colour};stroke-width:2;stroke-dasharray:{dash}"
        path = [(across(x), up(y)) for x, y in _thinned(points)]
        drawn.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in path)}" style="{stroke}"/>')
        for x, y in path if len(path) < 12 else ():
            drawn.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" style="fill:{colour}"/>')
        if rows:
            left, below = 70 + 460 * (index % 2), 444 + 24 * (index // 2)
            rule(left, below - 5, left + 28, below - 5, stroke)
            write(left + 36, below, name, "start")
    return "".join([*drawn, "</svg>"])


def _axis(values: Sequence[float], start: float, end: float) -> tuple[Callable[[float], float], list[float]]:
    """(value -> place between start and end, round values to write beside it)."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 1, high + 1
    step = 10 ** math.floor(math.log10(high - low))
    step *= next(part for part in (0.2, 0.5, 1, 2) if (high - low) / (step * part) <= 6)
    ticks = [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return lambda value: start + (end - start) * (value - low) / (high - low), ticks


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS points: each the last x and the mean y of its share."""
    # 几万个点的折线几 MB，画出来也只是一团
    size = math.ceil(len(points) / MOST_POINTS)
    shares = [points[i : i + size] for i in range(0, len(points), size)]
    return [(share[-1][0], sum(y for _, y in share) / len(share)) for share in shares]


def tick(value: float) -> str:
    """The number at a tick of an axis: 0.25, 2,500, 30k, 12M."""
    # 长的数在图的右边会被切掉
    if value >= 1e4:
        size, unit = scaled(value, ("", "k", "M"))
        return f"{size:g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:g}"


def empty(x_label: str, y_label: str):
    """The axes of a new figure."""
    # 不用 pyplot：它要找图形后端，还会留下全局状态
    from matplotlib.figure import Figure

    ax = Figure(figsize=(10, 5.4), layout="constrained").add_subplot()
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(lambda value, _: tick(value))
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
