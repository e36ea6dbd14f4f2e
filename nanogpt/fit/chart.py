"""Memory against speed, and loss, as plain chart data and as SVG that we draw ourselves."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from nanogpt.fit.ranking import key_of_override, names, pareto, series_name
from nanogpt.fit.result import TrialResult
from nanogpt.messages import text_in

# 画布与留白，SVG 用户单位
WIDTH, HEIGHT = 880, 440
LEFT, RIGHT, TOP, BOTTOM = 74, 26, 40, 54
# 颜色多于它就分不清了，只靠标注
COLOURS = 8
# 预测超出预算很多的失败，画在预算的这一倍处，不让它把图压扁
FAR = 1.3


@dataclass(frozen=True)
class Point:
    """One mark; kind is ok, best, spilled or failed."""

    x: float
    y: float
    series: int
    label: str
    title: str
    kind: str = "ok"


@dataclass(frozen=True)
class Chart:
    """Everything that SVG and PNG draw."""

    x_label: str
    y_label: str
    points: list[Point]
    series: list[str]
    limit: float | None = None
    """The budget, on the x axis."""
    limit_label: str = ""
    front: list[tuple[float, float]] = field(default_factory=list)
    from_zero: bool = True


def memory_chart(found: Sequence[TrialResult], best: TrialResult | None, language: str | None = None) -> Chart:
    """Tokens/s against memory with the budget and the Pareto front; failures on the floor, where their memory is known."""
    labels = names(found)
    series = sorted({series_name(name) for name in labels})
    points = []
    for result, name in zip(found, labels):
        fast = result.status in ("ok", "spilled") and result.tokens_per_s
        x = result.held_gib if fast else result.predicted_gib or result.held_gib
        if x is None:
            continue
        kind = "best" if result is best else result.status if fast else "failed"
        batch = [part for part in name.split(" ") if key_of_override(part) == "batch_size"]
        label = batch[0].split("=", 1)[1] if batch else ""
        title = f"{name or '-'}\n{result.tokens_per_s:,.0f} tokens/s, {x:.2f} GiB" if fast else f"{name or '-'}\n{result.reason}"
        points.append(Point(x, result.tokens_per_s if fast else 0.0, series.index(series_name(name)), label, title, kind))
    budgets = [result.budget_gib for result in found if result.budget_gib is not None]
    limit = min(budgets) if budgets else None
    cuda = any(result.reserved_gib is not None for result in found)
    return Chart(
        x_label=text_in(language, "chart_vram" if cuda else "chart_ram"), y_label="tokens/s", points=points, series=series, limit=limit,
        limit_label=text_in(language, "chart_budget", gib=limit) if limit else "",
        front=pareto([(p.x, p.y) for p in points if p.kind in ("ok", "best")]),
    )


def loss_chart(found: Sequence[TrialResult], best: TrialResult | None, language: str | None = None) -> Chart | None:
    """Validation loss against tokens/s, where at least two trials were long enough to have one."""
    labels = names(found)
    series = sorted({series_name(name) for name in labels})
    points = [
        Point(r.tokens_per_s, r.val_loss, series.index(series_name(n)), "", f"{n or '-'}\n{r.val_loss:.4f}", "best" if r is best else r.status)
        for r, n in zip(found, labels) if r.val_loss is not None and r.tokens_per_s
    ]
    if len(points) < 2:
        return None
    return Chart(x_label="tokens/s", y_label=text_in(language, "chart_loss"), points=points, series=series, from_zero=False)


# ---- 坐标 ----


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About `count` round numbers from low to just beyond high."""
    span = (high - low) or 1.0
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough)
    first, last = math.floor(low / step), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, max(last, first + 1) + 1)]


def axes(chart: Chart) -> tuple[list[float], list[float]]:
    """Ticks of x and y; the outermost ones are the borders."""
    xs = [shown_x(chart, p) for p in chart.points] + ([chart.limit] if chart.limit else [])
    ys = [p.y for p in chart.points]
    lows = (0.0, 0.0) if chart.from_zero else (min(xs, default=0.0), min(ys, default=0.0))
    # 上方留一点空，最快的点不贴边
    return ticks(lows[0], max(xs, default=1.0) * 1.02), ticks(lows[1], max(ys, default=1.0) * 1.06 or 1.0)


def shown_x(chart: Chart, point: Point) -> float:
    """Where a point is drawn: a failure far beyond the budget stays in sight, just beyond it."""
    return min(point.x, FAR * chart.limit) if chart.limit and point.kind == "failed" else point.x


def number(value: float) -> str:
    """12,000 or 0.25: as short as it stays exact."""
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:g}"


def to_canvas(x_ticks: list[float], y_ticks: list[float]):
    """Functions from data to canvas units, x and y."""

    def px(x: float) -> float:
        return LEFT + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (HEIGHT - TOP - BOTTOM)

    return px, py


def lift(point: Point) -> int:
    """How far a label stands above its point, canvas units."""
    return 16 if point.kind == "best" else 11


def labelled(chart: Chart) -> list[Point]:
    """The points whose labels have room; the best point chooses first, then the faster ones."""
    px, py = to_canvas(*axes(chart))
    taken: list[tuple[float, float]] = []
    out = []
    for point in sorted(chart.points, key=lambda p: (p.kind != "best", -p.y)):
        x, y = px(shown_x(chart, point)), py(point.y) - lift(point)
        # 既不压住别的标注，也不压住别的点
        dots = [(px(shown_x(chart, p)), py(p.y)) for p in chart.points if p is not point and p.kind != "failed"]
        if not point.label or any(abs(x - ox) < 20 and abs(y - oy) < 13 for ox, oy in taken):
            continue
        if point.kind != "best" and any(abs(x - ox) < 8 and abs(y - 4 - oy) < 9 for ox, oy in dots):
            continue
        taken.append((x, y))
        out.append(point)
    return out


# ---- SVG ----


def svg(chart: Chart, title: str) -> str:
    """The chart as an inline SVG; colours come from the page's CSS variables."""
    x_ticks, y_ticks = axes(chart)
    px, py = to_canvas(x_ticks, y_ticks)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    parts += _grid(chart, x_ticks, y_ticks, px, py)
    parts += _limit(chart, px)
    parts += _front(chart, px, py)
    parts += _series_lines(chart, px, py)
    parts += [_mark(chart, point, px(shown_x(chart, point)), py(point.y)) for point in sorted(chart.points, key=lambda p: p.kind == "best")]
    parts += _labels(chart, px, py)
    return "\n".join([*parts, "</svg>"])


def _grid(chart: Chart, x_ticks, y_ticks, px, py) -> list[str]:
    floor = HEIGHT - BOTTOM
    out = []
    for tick in y_ticks:
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(tick):.1f}" y2="{py(tick):.1f}"/>')
        out.append(f'<text class="tick" x="{LEFT - 10}" y="{py(tick) + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in x_ticks:
        out.append(f'<text class="tick" x="{px(tick):.1f}" y="{floor + 20}" text-anchor="middle">{number(tick)}</text>')
    out.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>')
    out.append(f'<text class="name" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{escape(chart.x_label)}</text>')
    out.append(f'<text class="name" x="14" y="{TOP - 20}">{escape(chart.y_label)}</text>')
    return out


def _limit(chart: Chart, px) -> list[str]:
    if not chart.limit:
        return []
    x = px(chart.limit)
    # 线靠右时文字写在左边
    anchor, shift = ("end", -8) if x > WIDTH * 0.6 else ("start", 8)
    return [
        f'<rect class="beyond" x="{x:.1f}" y="{TOP}" width="{max(WIDTH - RIGHT - x, 0):.1f}" height="{HEIGHT - TOP - BOTTOM}"/>',
        f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{HEIGHT - BOTTOM}"/>',
        f'<text class="limit-name" x="{x + shift:.1f}" y="{TOP + 4}" text-anchor="{anchor}">{escape(chart.limit_label)}</text>',
    ]


def _front(chart: Chart, px, py) -> list[str]:
    if len(chart.front) < 2:
        return []
    # 阶梯：两点之间，多给一点显存也只能跑左边那个设置
    path = f"M{px(chart.front[0][0]):.1f},{py(chart.front[0][1]):.1f}"
    path += "".join(f" H{px(x):.1f} V{py(y):.1f}" for x, y in chart.front[1:])
    return [f'<path class="front" d="{path}"/>']


def _series_lines(chart: Chart, px, py) -> list[str]:
    out = []
    for index in range(len(chart.series)):
        row = sorted((p.x, p.y) for p in chart.points if p.series == index and p.kind != "failed")
        if len(row) > 1 and len(chart.series) <= COLOURS and chart.from_zero:
            points = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in row)
            out.append(f'<polyline class="line c{index}" points="{points}"/>')
    return out


def _mark(chart: Chart, point: Point, x: float, y: float) -> str:
    title = f"<title>{escape(point.title)}</title>"
    colour = f"c{point.series}" if len(chart.series) <= COLOURS else "c0"
    if point.kind == "failed":
        arms = f"M{x - 5:.1f},{y - 5:.1f} l10,10 m0,-10 l-10,10"
        return f'<g class="mark"><path class="failed" d="{arms}"/>{title}</g>'
    ring = f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="11"/>' if point.kind == "best" else ""
    hollow = " hollow" if point.kind == "spilled" else ""
    return f'<g class="mark">{ring}<circle class="dot {colour}{hollow}" cx="{x:.1f}" cy="{y:.1f}" r="6"/>{title}</g>'


def _labels(chart: Chart, px, py) -> list[str]:
    return [
        f'<text class="label" x="{px(shown_x(chart, p)):.1f}" y="{py(p.y) - lift(p):.1f}" text-anchor="middle">{escape(p.label)}</text>'
        for p in labelled(chart)
    ]
