"""The charts of a sweep's report, memory against speed and loss against speed, as SVG or PNG."""

# 扫描的两张图：先把结果整理成点与曲线（memory_chart、loss_chart），再由 figure 画成一张 matplotlib 图
# svg 嵌进 report.html，save 存成 PNG，两者都由 report 调用；同样的结果画出同样的字节
# matplotlib 载入要近一秒，所以只在画图的函数里 import

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nanogpt.base import report
from nanogpt.base.language import text_in
from nanogpt.base.quoting import key_of_override
from nanogpt.base.report import BAD, CARD, INK, PALETTE, SOFT, printable
from nanogpt.sweep.result import TrialResult, names, pareto, series_name

# 预测超出预算很多的失败，画在预算的这一倍处，不让它把图压扁
FAR = 1.3
# 坐标区大约多少点（1/72 英寸），排标注用
AREA = (640, 300)
# 常见系统自带的中文字体；一个也没有就写英文
CJK_FONTS = (
    "Noto Sans CJK SC", "Source Han Sans SC", "Microsoft YaHei", "SimHei", "PingFang SC", "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
)


@dataclass(frozen=True)
class Point:
    """One mark; kind is ok, best, spilled or failed."""

    # 图与数据分开：测试不必看像素，就能知道画了什么

    x: float
    y: float
    series: int
    label: str
    title: str
    kind: str = "ok"


@dataclass(frozen=True)
class Chart:
    """Everything that a figure shows."""

    # 同一张图要画两次：网页里是界面语言，PNG 没有中文字体时是英文

    x_label: str
    y_label: str
    points: list[Point]
    series: list[str]
    limit: float | None = None
    """The budget, on the x axis."""
    limit_label: str = ""
    front: list[tuple[float, float]] = field(default_factory=list)
    from_zero: bool = True

    def shown_x(self, point: Point) -> float:
        """Where a point is drawn: a failure far beyond the budget stays in sight, just beyond it."""
        return min(point.x, FAR * self.limit) if self.limit and point.kind == "failed" else point.x


def _named(found: Sequence[TrialResult]) -> tuple[list[str], list[str]]:
    """The name of every result, and those of the curves: what distinguishes results besides the micro-batch."""
    labels = [printable(name) for name in names(found)]
    return labels, sorted(set(map(series_name, labels)))


def memory_chart(found: Sequence[TrialResult], best: TrialResult | None, language: str | None = None) -> Chart:
    """Tokens/s against memory with the budget and the Pareto front; failures of known memory on the floor."""
    labels, series = _named(found)
    points = []
    for result, name in zip(found, labels):
        fast = result.status in ("ok", "spilled") and result.tokens_per_s
        x = result.held_gib if fast else result.predicted_gib or result.held_gib
        if x is None:
            continue
        kind = "best" if result is best else result.status if fast else "failed"
        batch = [part for part in name.split(", ") if key_of_override(part) == "batch_size"]
        label = batch[0].split("=", 1)[1] if batch else ""
        said = f"{result.tokens_per_s:,.0f} tokens/s, {x:.2f} GiB" if fast else printable(result.reason)
        y = result.tokens_per_s if fast else 0.0
        points.append(Point(x, y, series.index(series_name(name)), label, f"{name or '-'}\n{said}", kind))
    limit = min((result.budget_gib for result in found if result.budget_gib is not None), default=None)
    cuda = any(result.reserved_gib is not None for result in found)
    return Chart(
        x_label=text_in(language, "chart_vram" if cuda else "chart_ram"), y_label="tokens/s", points=points,
        series=series, limit=limit, limit_label=text_in(language, "budget {gib:.1f} GiB", gib=limit) if limit else "",
        front=pareto([(p.x, p.y) for p in points if p.kind in ("ok", "best")]),
    )


def loss_chart(found: Sequence[TrialResult], best: TrialResult | None, language: str | None = None) -> Chart | None:
    """Validation loss against tokens/s, where at least two trials were long enough to have one."""
    labels, series = _named(found)
    points = [
        Point(r.tokens_per_s, r.val_loss, series.index(series_name(name)), "", f"{name or '-'}\n{r.val_loss:.4f}",
              "best" if r is best else r.status)
        for r, name in zip(found, labels) if r.val_loss is not None and r.tokens_per_s
    ]
    if len(points) < 2:
        return None
    return Chart("tokens/s", text_in(language, "validation_loss"), points, series, from_zero=False)


# ---- 画 ----


def chinese_font() -> str | None:
    """An installed font that has Chinese characters."""
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return next((name for name in CJK_FONTS if name in installed), None)


def save(chart: Chart, path: Path, *, font: str | None = None) -> None:
    """Draw the chart into a PNG file, the same bytes every time."""
    with report.style(*([font] if font else [])):
        figure(chart).savefig(path, facecolor="white", dpi=150, metadata={"Software": None})


def svg(chart: Chart, title: str) -> str:
    """The chart as an inline SVG, the same text every time; its colours are the page's CSS variables."""
    with report.style():
        return report.svg(figure(chart), title, [point.title for point in chart.points])


def figure(chart: Chart):
    """The matplotlib figure of a chart."""
    ax = report.empty(chart.x_label, chart.y_label)
    coloured = len(chart.series) <= len(PALETTE)
    if len(chart.front) > 1:
        # 阶梯：两点之间，多给一点显存也只能跑左边那个设置
        ax.step(*zip(*chart.front), where="post", color=SOFT, linewidth=5, alpha=0.2, solid_capstyle="round")
    for index, name in enumerate(chart.series if coloured else ()):
        row = sorted((p.x, p.y) for p in chart.points if p.series == index and p.kind != "failed")
        if row:
            line = "-" if chart.from_zero else "none"
            ax.plot(*zip(*row), linestyle=line, marker="o", color=PALETTE[index], alpha=0.65, label=name or "-")
    for index, point in enumerate(chart.points):
        _mark(ax, chart, point, PALETTE[point.series] if coloured else PALETTE[0], gid=f"point{index}")
    _frame(ax, chart)
    _labels(ax, chart)
    if coloured and len(chart.series) > 1:
        ax.figure.legend(loc="outside lower center", frameon=False, ncols=2, fontsize=9, labelcolor=INK)
    return ax.figure


def _mark(ax, chart: Chart, point: Point, colour: str, *, gid: str) -> None:
    # clip_on：贴着坐标轴的点也要完整
    x, common = chart.shown_x(point), {"gid": gid, "clip_on": False, "zorder": 4}
    if point.kind == "failed":
        ax.plot(x, point.y, "x", color=BAD, markersize=8, markeredgewidth=2, **common)
        return
    hollow = point.kind == "spilled"
    face, edge = (CARD, colour) if hollow else (colour, CARD)
    ax.plot(x, point.y, "o", markerfacecolor=face, markeredgecolor=edge, markersize=9, markeredgewidth=1.5, **common)
    if point.kind == "best":
        ax.plot(x, point.y, "o", color=INK, markersize=16, fillstyle="none", clip_on=False, zorder=5)


def _frame(ax, chart: Chart) -> None:
    """Limits and budget, once the marks are there."""
    ax.margins(0.05, 0.1)
    if chart.from_zero:
        ax.set_xlim(0, max([1e-9, *(1.05 * chart.shown_x(p) for p in chart.points), 1.05 * (chart.limit or 0)]))
        ax.set_ylim(0, 1.1 * max([p.y for p in chart.points if p.y], default=1.0))
    if chart.limit:
        right = ax.get_xlim()[1]
        ax.axvline(chart.limit, color=BAD, linewidth=1.4, linestyle=(0, (5, 3)))
        ax.axvspan(chart.limit, right, color=BAD, alpha=0.05, linewidth=0)
        # 线靠右时文字写在左边
        aside, side = (-6, "right") if chart.limit > 0.6 * right else (6, "left")
        ax.annotate(chart.limit_label, (chart.limit, 1), xycoords=("data", "axes fraction"), xytext=(aside, -8),
                    textcoords="offset points", ha=side, color=BAD, fontsize=9)


def _labels(ax, chart: Chart) -> None:
    """Write the labels that have room; the best point chooses first, then the faster ones."""
    places = {id(p): ax.transLimits.transform((chart.shown_x(p), p.y)) * AREA for p in chart.points}
    taken = []
    for point in sorted((p for p in chart.points if p.label), key=lambda p: (p.kind != "best", -p.y)):
        up = 12 if point.kind == "best" else 8
        x, y = places[id(point)] + (0, up)
        dots = [places[id(p)] for p in chart.points if p is not point and p.kind != "failed"]
        # 既不压住别的标注，也不压住别的点
        crowded = any(abs(x - ox) < 16 and abs(y - oy) < 10 for ox, oy in taken)
        covers = point.kind != "best" and any(abs(x - ox) < 7 and abs(y + 3 - oy) < 7 for ox, oy in dots)
        if not crowded and not covers:
            taken.append((x, y))
            ax.annotate(point.label, (chart.shown_x(point), point.y), xytext=(0, up), textcoords="offset points",
                        ha="center", fontsize=9, color=INK)
