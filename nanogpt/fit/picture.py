"""The charts of a report as PNG, with matplotlib (extra `report`)."""

from importlib.util import find_spec
from pathlib import Path

from nanogpt.fit.chart import COLOURS, Chart, axes, labelled, lift, number, shown_x

# 与网页同一套颜色（浅色）
PALETTE = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2", "#65a30d", "#dc2626")
# 常见系统自带的中文字体；一个也没有就写英文
CJK_FONTS = ("Noto Sans CJK SC", "Source Han Sans SC", "Microsoft YaHei", "SimHei", "PingFang SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei")


def available() -> bool:
    """True where matplotlib is installed."""
    return find_spec("matplotlib") is not None


def chinese_font() -> str | None:
    """An installed font that has Chinese characters."""
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return next((name for name in CJK_FONTS if name in installed), None)


def save(chart: Chart, path: Path, *, font: str | None = None) -> None:
    """Draw the chart into a PNG file."""
    # 不用 pyplot：它要找图形后端，还会留下全局状态
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"font.family": [font, "DejaVu Sans"] if font else ["DejaVu Sans"], "font.size": 11}):
        figure = Figure(figsize=(10, 5.4), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        ax = figure.add_subplot()
        _frame(ax, chart)
        _draw(ax, chart)
        if 1 < len(chart.series) <= COLOURS:
            ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=2, fontsize=9)
        figure.savefig(path, facecolor="white")


def _frame(ax, chart: Chart) -> None:
    x_ticks, y_ticks = axes(chart)
    ax.set_xlim(x_ticks[0], x_ticks[-1])
    ax.set_ylim(y_ticks[0], y_ticks[-1])
    ax.set_xticks(x_ticks, [number(t) for t in x_ticks])
    ax.set_yticks(y_ticks, [number(t) for t in y_ticks])
    ax.set_xlabel(chart.x_label)
    ax.set_ylabel(chart.y_label)
    ax.grid(axis="y", color="#e5e7eb")
    ax.set_axisbelow(True)
    ax.tick_params(length=0, colors="#4b5563")
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    if chart.limit:
        ax.axvline(chart.limit, color="#dc2626", linewidth=1.4, linestyle=(0, (5, 3)))
        ax.axvspan(chart.limit, x_ticks[-1], color="#dc2626", alpha=0.05, linewidth=0)
        left = chart.limit > 0.6 * x_ticks[-1]
        ax.annotate(chart.limit_label, (chart.limit, 1), xycoords=("data", "axes fraction"), xytext=(-6 if left else 6, -12),
                    textcoords="offset points", ha="right" if left else "left", color="#dc2626", fontsize=9)


def _draw(ax, chart: Chart) -> None:
    if len(chart.front) > 1:
        ax.step(*zip(*chart.front), where="post", color="#9ca3af", linewidth=5, alpha=0.35, solid_capstyle="round")
    coloured = len(chart.series) <= COLOURS
    for index, name in enumerate(chart.series):
        colour = PALETTE[index] if coloured else PALETTE[0]
        row = sorted((p for p in chart.points if p.series == index and p.kind != "failed"), key=lambda p: p.x)
        if row:
            line = "-" if coloured and chart.from_zero else "none"
            ax.plot([p.x for p in row], [p.y for p in row], line, color=colour, linewidth=1.6, alpha=0.7, label=name or "-")
        for p in row:
            ax.plot(p.x, p.y, "o", color=colour, markersize=8, fillstyle="none" if p.kind == "spilled" else "full", zorder=3)
            if p.kind == "best":
                ax.plot(p.x, p.y, "o", color="#111827", markersize=15, fillstyle="none", zorder=4)
    for p in labelled(chart):
        ax.annotate(p.label, (shown_x(chart, p), p.y), xytext=(0, 0.8 * lift(p)), textcoords="offset points", ha="center", fontsize=9)
    failed = [(shown_x(chart, p), p.y) for p in chart.points if p.kind == "failed"]
    if failed:
        ax.plot(*zip(*failed), "x", color="#dc2626", markersize=8, markeredgewidth=2, clip_on=False, zorder=5)
