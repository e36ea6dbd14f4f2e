"""Compare whole trainings: which settings differ, what each reached, and their curves in one page.

`nanogpt compare A B …`, and what a plain sweep leaves at its end. Needs no torch.
"""

# 几次完整的训练放在一起比：哪些设置不同，各走到哪里，曲线画在一张图里
# compared 把各目录的设置与结果排成行；show_table 印在屏幕上，write_page 写成一页自成一体的 html
# nanogpt compare 与普通 -m 扫描的结尾用的是同一套；试跑的扫描另有 report
# 没训成的任务也占一行：少了一行，人会以为没有安排它

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanogpt.base import report
from nanogpt.base.console import Console, aligned, clock, short
from nanogpt.base.errors import Arguments, run_command
from nanogpt.base.files import check_writable, write_text
from nanogpt.base.language import ConfigError, say, show, text
from nanogpt.base.report import formatted
from nanogpt.base.run_names import OUTPUTS
from nanogpt.base.sweep_folder import Job
from nanogpt.run import folders
from nanogpt.run.folders import Run

PAGE = "compare.html"
# 每次训练都不同，或只管怎样运行的，不是设置
NO_SETTING = ("out_dir", "overwrite", "resume", "checkpoint", "lang", "plan", "device", "groups", "logger")
# 再多的就不做列，另成一表
MOST_COLUMNS = 4
FIGURES = ("column_loss", "column_last", "column_bpb", "column_tokens", "column_speed", "column_took", "column_state")


@dataclass(frozen=True)
class Row:
    """One training of a comparison."""

    # 没训成的没有 run：只有它的设置与原因

    name: str
    settings: tuple[str, ...]
    """The value of each key of the comparison."""
    run: Run | None
    reason: str = ""

    def figures(self) -> list[str]:
        """What it reached, in the order of FIGURES."""
        if self.run is None:
            return ["–"] * (len(FIGURES) - 1) + [text("state_failed")]
        run = self.run
        return [
            formatted(run.loss, ".4f"), formatted(run.last("val/loss"), ".4f"), formatted(run.bpb, ".3f"),
            short(run.tokens), formatted(run.tokens_per_s, ",.0f"), clock(run.seconds),
            text("state_failed" if self.reason else folders.STATES[run.state]),
        ]


def differing(runs: Sequence[Run]) -> list[str]:
    """The keys of the saved configs in which the runs differ."""
    keys = sorted({key for run in runs for key in run.settings if key.split(".")[0] not in NO_SETTING})
    return [key for key in keys if len({repr(run.settings.get(key)) for run in runs}) > 1]


def shown_value(value: Any) -> str:
    """A setting as it would be typed."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def compared(runs: Sequence[Run]) -> tuple[list[str], list[Row]]:
    """(the keys that differ, one row for each run)."""
    keys = differing(runs)
    return keys, [Row(
        folders.shown_name(run), tuple(shown_value(run.settings[k]) if k in run.settings else "–" for k in keys), run,
    ) for run in runs]


def swept(jobs: Sequence[Job]) -> tuple[list[str], list[Row]]:
    """(the keys that were swept, one row for each job, the lowest validation loss first and failures last)."""
    typed = [dict(override.lstrip("+").partition("=")[::2] for override in job.overrides) for job in jobs]
    every = dict.fromkeys(key for one in typed for key in one)
    keys = [key for key in every if len({one.get(key) for one in typed}) > 1]
    rows = []
    for job, one in zip(jobs, typed):
        run = folders.look(job.folder) if folders.is_run(job.folder) else None
        rows.append(Row(job.folder.name, tuple(one.get(key, "–") for key in keys), run, job.reason))

    def order(row: Row) -> tuple:
        loss = row.run.loss if row.run else None
        return (loss is None, loss or 0.0)

    return keys, sorted(rows, key=order)


# ---- 屏幕 ----


def show_table(keys: Sequence[str], rows: Sequence[Row]) -> None:
    """Print the rows; many keys get a table of their own below."""
    beside = len(keys) <= MOST_COLUMNS
    heads, cells = _figures(rows)
    if beside:
        # 名字最长，放在最后：窄终端上别的列仍在一行里
        table = [[*row.settings, *figures, row.name] for row, figures in zip(rows, cells)]
        lines = aligned([*keys, *heads, text("column_run")], table, sides="r" * (len(keys) + len(heads)) + "l")
    else:
        numbers = [f"#{n}" for n in range(1, len(rows) + 1)]
        table = [[f"{n} {row.name}", *figures] for n, row, figures in zip(numbers, rows, cells)]
        by_key = [[key, *(row.settings[i] for row in rows)] for i, key in enumerate(keys)]
        lines = aligned([text("column_run"), *heads], table)
        lines += ["", *aligned([text("column_setting"), *numbers], by_key)]
    for line in lines:
        show(line)
    for row in rows:
        if row.reason:
            show(f"{row.name}: {row.reason}")


def _figures(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """(heads, cells) of the figures that at least one row has, and of what is not the same as usual for all."""
    cells = [row.figures() for row in rows]
    kept = [i for i in range(len(FIGURES)) if {line[i] for line in cells} - {"–", text("state_finished")}]
    if len({row.run.tokens for row in rows if row.run}) == 1:
        # 80 列要放得下：都一样的不占地方
        kept = [i for i in kept if FIGURES[i] != "column_tokens"]
    return [text(FIGURES[i]) for i in kept], [[line[i] for i in kept] for line in cells]


# ---- 一页 ----


def write_page(keys: Sequence[str], rows: Sequence[Row], path: Path) -> None:
    """Write the comparison as one html file that needs nothing else."""
    heads, cells = _figures(rows)
    write_text(path, report.page(
        Path(__file__).with_name(PAGE), title=text("Trainings compared"), tiles=[],
        subtitle=text("{count} trainings", count=len(rows)), charts=_charts(rows), keys=keys, heads=heads,
        rows=list(zip(rows, cells)), alike=_same_data(rows),
    ))


def _charts(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(title, SVG) of every metric that some run has a curve of, over the tokens that were trained on."""
    # 批量不同的，迭代数没法比；看过多少 token 才公平
    titles = {"val/loss": text("validation_loss"), "val/bpb": text("bits per byte"), "train/loss": text("train loss")}
    drawn = []
    for metric, title in titles.items():
        lines = {}
        for row in rows:
            records = row.run.curve if row.run else []
            points = [(record["tokens"], record[metric]) for record in records if {"tokens", metric} <= record.keys()]
            if points:
                lines[row.name] = points
        if lines:
            drawn.append((title, report.curves(lines, title, x_label=text("tokens trained on"), y_label=title)))
    return drawn


def _same_data(rows: Sequence[Row]) -> bool:
    """Whether the losses may be compared: other data, or another vocabulary, and the same loss means something else."""
    keys = ("dataset.name", "dataset.path", "dataset.dir", "model.vocab_size", "eval_tokens", "eval_stride")
    told = [[row.run.settings.get(key) for key in keys] for row in rows if row.run]
    return all(one == told[0] for one in told)


def finish(keys: Sequence[str], rows: Sequence[Row], path: Path) -> None:
    """Show the comparison and write its page."""
    show_table(keys, rows)
    if not _same_data(rows):
        Console().line("compare_data")
    write_page(keys, rows, path)
    show(text("the curves are in {path}", path=path))


def report_sweep(jobs: Sequence[Job]) -> None:
    """What a plain sweep leaves: a table of its trainings, and compare.html beside their folders."""
    if len(jobs) < 2 or not any(folders.is_run(job.folder) for job in jobs):
        return
    keys, rows = swept(jobs)
    path = jobs[0].folder.parent / PAGE
    try:
        finish(keys, rows, path)
    except OSError as error:
        # 都训完了：少一页报告不改变结果
        say("error", line=text("not_writable", path=path, reason=error.strerror))


# ---- nanogpt compare ----


def parser() -> Arguments:
    """The parser of `nanogpt compare`."""
    program = Arguments(prog="nanogpt compare", description=text("Compare trainings: settings, figures and curves"))
    program.add_argument("runs", nargs="+", metavar="RUN", help=text("run folders, folders of them, or latest"))
    page = OUTPUTS / PAGE
    program.add_argument("--output", type=Path, default=page, help=text("the page (default {path})", path=page))
    return program


def main(arguments: list[str] | None = None) -> None:
    """The command line of `nanogpt compare`; exit code 2 on a mistake."""
    run_command(parser, compare, arguments)


def compare(typed: argparse.Namespace) -> None:
    """Show the runs side by side and write the page."""
    runs = [folders.look(path) for path in folders.named(typed.runs)]
    if len(runs) < 2:
        raise ConfigError("nanogpt compare wants at least two trainings; `nanogpt runs` lists what there is")
    if typed.output.suffix != ".html":
        raise ConfigError("--output {path}: the page is html; give a name that ends in .html", path=typed.output)
    typed.output.parent.mkdir(parents=True, exist_ok=True)
    check_writable(typed.output)
    finish(*compared(runs), typed.output)
