"""Draw hit rate and perplexity against guidance from the record of an evaluation."""

# 评估的图：上半是各标签的命中率与区间，下半是困惑度
# draw 只用记录里的数，所以旧记录随时可以重画；同样的记录画出同样的字节
# 放在单独的模块里，因为 matplotlib 载入要近一秒，只有 --plot 与 plot 用得着

from collections.abc import Sequence
from pathlib import Path

from nanogpt.base.files import folders_around
from nanogpt.base.language import ConfigError

SUFFIXES = (".png", ".svg")
# 图里只用英文：装有中文字体的机器并不多
ENGLISH = {
    "五言绝句": "quatrain, 4 × 5", "七言绝句": "quatrain, 4 × 7", "五言律诗": "octave, 8 × 5",
    "七言律诗": "octave, 8 × 7", "宋词": "ci (Song)", "元曲": "qu (Yuan)",
}
# 色盲也分得清的八色（Okabe 与 Ito）
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#999999")
MEAN = "mean of labels (95%)"
INK, MUTED, GRID = "#111827", "#6b7280", "#e5e7eb"
# 标签更多时，各自的区间会叠成一团，只画平均的
MOST_INTERVALS = 3


def check_picture(path: Path) -> None:
    """Refuse what cannot be drawn before hours of writing."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError("--plot {got}: the file's name must end in .png or .svg", got=path)


def draw(record: dict, path: Path) -> None:
    """Draw the record of an evaluation into a PNG or SVG file, the same bytes every time."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    entries = sorted((e for e in record["results"] if e["control"] == "codes"), key=lambda e: e["guidance"])
    style = {"font.family": "DejaVu Sans", "font.size": 10, "svg.hashsalt": "nanogpt", "svg.fonttype": "path"}
    with rc_context(style):
        figure = Figure(figsize=(9, 6.4), dpi=150, layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1.7, 1))
        _hit_rates(above, record, entries)
        _perplexities(below, record, entries)
        figure.get_layout_engine().set(hspace=0.06)
        figure.align_ylabels()
        # matplotlib 总把带区间的排在最后：按画的次序重排，平均在前
        named = dict(zip(*reversed(above.get_legend_handles_labels())))
        order = [MEAN, *(_english(label, index) for index, label in enumerate(record["labels"])), *named]
        order = list(dict.fromkeys(order))
        figure.legend([named[name] for name in order], order, loc="outside right upper", frameon=False, fontsize=9)
        # 日期会让每次画出的文件都不同
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else {"Software": None}
        with folders_around(path):
            figure.savefig(path, facecolor="white", metadata=metadata)


def _hit_rates(ax, record: dict, entries: list[dict]) -> None:
    count = len(record["labels"])
    for index, label in enumerate(record["labels"]):
        # 各自的区间错开一点才看得清
        aside = (index // 2 + 1) * (-1) ** index / 100 if count <= MOST_INTERVALS else None
        shares, colour = [e["labels"][label] for e in entries], PALETTE[index % len(PALETTE)]
        _line(ax, entries, shares, colour=colour, name=_english(label, index), width=1.2, aside=aside)
    _line(ax, entries, [e["total"] for e in entries], colour=INK, name=MEAN, width=2.2, aside=0)
    accuracy = record["judge"]["accuracy"]
    ax.axhspan(accuracy["low"], accuracy["high"], color=MUTED, alpha=0.15, linewidth=0)
    ax.axhline(accuracy["rate"], color=MUTED, linestyle="--", linewidth=1.2, label="the judge on real texts")
    names = {"prefix": ("text prefix only", (0, (4, 2, 1, 2))), "none": ("nothing asked", (0, (1, 2)))}
    for entry in record["results"]:
        if entry["control"] in names:
            name, dashes = names[entry["control"]]
            ax.axhline(entry["total"]["rate"], color=INK, linestyle=dashes, linewidth=1.2, label=name)
    # 0 与 1 处的点要完整露出来
    ax.set_ylim(-0.03, 1.03)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.set_ylabel("hit rate")
    ax.set_title(f"{record['kind']}: {record['samples']} texts per label", loc="left", fontsize=11)
    _frame(ax)
    ax.spines["bottom"].set_visible(False)


def _perplexities(ax, record: dict, entries: list[dict]) -> None:
    x, y = [e["guidance"] for e in entries], [e["perplexity"] for e in entries]
    ax.plot(x, y, "o-", color=INK, linewidth=2.2, markersize=5)
    without = record["perplexity_without_labels"]
    ax.axhline(without, color=MUTED, linestyle="--", linewidth=1.2)
    ax.annotate("without labels", (1, without), xycoords=("axes fraction", "data"), xytext=(-4, 4),
                textcoords="offset points", ha="right", color=MUTED, fontsize=9)
    ax.set_ylabel("perplexity of real\nvalidation texts, per token")
    ax.set_xlabel("guidance")
    ax.set_xticks(x, [f"{value:g}" for value in x])
    ax.margins(y=0.15)
    _frame(ax)


def _line(
    ax, entries: list[dict], shares: Sequence[dict], *, colour: str, name: str, width: float, aside: float | None,
) -> None:
    """Rates over guidance; with intervals, moved aside by this share of the axis, unless that is None."""
    x, y = [e["guidance"] for e in entries], [s["rate"] for s in shares]
    if aside is None:
        ax.plot(x, y, "o-", color=colour, linewidth=width, markersize=3.5, label=name)
        return
    x = [value + aside * (max(x) - min(x)) for value in x]
    reach = [[s["rate"] - s["low"] for s in shares], [s["high"] - s["rate"] for s in shares]]
    ax.errorbar(x, y, yerr=reach, fmt="o-", color=colour, linewidth=width, markersize=5, capsize=3, elinewidth=1.2,
                label=name)


def _frame(ax) -> None:
    ax.grid(axis="y", color=GRID)
    ax.set_axisbelow(True)
    ax.tick_params(length=0, colors=MUTED)
    ax.spines[["top", "right", "left"]].set_visible(False)


def _english(label: str, index: int) -> str:
    """A name that any font can show."""
    return ENGLISH.get(label, label if label.isascii() else f"label {index + 1}")
