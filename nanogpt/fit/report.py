"""What a sweep leaves when its last trial is done: a ranked table, trials.jsonl, report.html, PNGs and best.yaml."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from nanogpt.files import write_text
from nanogpt.fit import picture
from nanogpt.fit.chart import loss_chart, memory_chart
from nanogpt.fit.ranking import best_of, names, ranked
from nanogpt.fit.recipe import command, write_recipe
from nanogpt.fit.report_page import figure, page
from nanogpt.fit.result import STATUS_MESSAGES, TrialResult
from nanogpt.messages import current_language, show, shown, text

# 不论哪次扫描，最近的最佳设置总在这里
FIT = Path("outputs") / "fit"
# 输出到文件或管道时的表宽
PLAIN_WIDTH = 160


def write_report(found: Sequence[TrialResult], folder: Path, *, margin: float) -> None:
    """Rank the results, print the table, write every file of the report into `folder`."""
    order, best = ranked(found, margin), best_of(found, margin)
    print_table(order, margin)
    write_text(folder / "trials.jsonl", "".join(result.to_json() + "\n" for result in order))
    use = None
    if best:
        write_recipe(best, [folder, FIT])
        use = command(best, FIT)
    write_text(folder / "report.html", page(found, margin=margin, command=use, created=time.strftime("%Y-%m-%d %H:%M")))
    drawn = write_pictures(order, best, folder)
    known = sum(result.known for result in found)
    for line in (
        text("report_known", known=known, count=len(found)) if known else "",
        text("report_where", path=folder, pictures="".join(f", {name}" for name in drawn)),
        "" if picture.available() else text("report_no_pictures"),
        text("report_best", command=use) if use else text("report_none"),
    ):
        if line:
            show(line)


def write_pictures(order: Sequence[TrialResult], best: TrialResult | None, folder: Path) -> list[str]:
    """The charts as PNG; returns the names of the files."""
    if not picture.available():
        return []
    # 没有中文字体时写英文，总比一排方块好
    font = picture.chinese_font() if current_language() == "zh" else None
    language = current_language() if font else "en"
    charts = {"report.png": memory_chart(order, best, language), "loss.png": loss_chart(order, best, language)}
    drawn = []
    for name, chart in charts.items():
        if chart and chart.points:
            picture.save(chart, folder / name, font=font)
            drawn.append(name)
    return drawn


def print_table(order: Sequence[TrialResult], margin: float) -> None:
    """The ranked table on the console."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False, markup=False)
    table = Table(title=text("report_title"), title_justify="left")
    for head, side in (("#", "right"), (text("column_setting"), "left"), (text("column_status"), "left"), ("tokens/s", "right"),
                       (text("column_step"), "right"), (text("column_peak"), "right"), (text("column_predicted"), "right"),
                       (text("column_batch"), "right"), (text("column_reason"), "left")):
        # 数字列不许折行，窄终端上先折原因
        table.add_column(head, justify=side, no_wrap=side == "right", overflow="fold")
    best = best_of(order, margin)
    for rank, (result, name) in enumerate(zip(order, names(order)), 1):
        table.add_row(
            str(rank), shown(name, sys.stdout) or text("trial_defaults"), text(STATUS_MESSAGES[result.status]), figure(result.tokens_per_s, ",.0f"),
            figure(result.step_ms, ",.1f"), peak_of_budget(result), figure(result.predicted_gib, ".2f"), figure(result.effective_batch, "d"),
            shown(why(result, margin), sys.stdout), style="bold green" if result is best else None if result.status == "ok" else "dim",
        )
    console.print(table)


def peak_of_budget(result: TrialResult) -> str:
    """3.20 / 12.00"""
    return f"{figure(result.held_gib, '.2f')} / {figure(result.budget_gib, '.2f')}"


def why(result: TrialResult, margin: float) -> str:
    """The reason of a failure, or what keeps a success from being the best."""
    tight = result.status == "ok" and not result.fits(margin)
    return text("report_tight", margin=margin * 100) if tight else result.reason
