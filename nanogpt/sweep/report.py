"""What a sweep leaves when its last trial is done: a ranked table, trials.jsonl, report.html, PNGs and best.yaml."""

# 扫描的报告：屏幕上的名次表、trials.jsonl、report.html、两张 PNG，以及可以直接拿来训练的 best.yaml
# write_report 是唯一入口，只在扫描结束时走一次：先存最要紧的（结果与最佳设置），再画图、写网页
# 网页的样子全在旁边的模板 report.html 里，这里只备好它要的数；jinja2 与 matplotlib 用到才载入

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from nanogpt.base import quoting, report
from nanogpt.base.console import duration
from nanogpt.base.files import write_text
from nanogpt.base.language import current_language, sentence, show, shown, text
from nanogpt.base.report import formatted
from nanogpt.base.user_yaml import conf_folders, is_group
from nanogpt.sweep import chart
from nanogpt.sweep.result import FIT, STATUS_MESSAGES, TrialResult, best_of, names, ranked

# ---- best.yaml ----

# 试跑自己的，或会拦住正常训练的键
LEFT_OUT = (
    "experiment", "trial", "hydra", "out_dir", "overwrite", "resume", "checkpoint", "plan", "lang",
    "objective", "search", "launch", "holdout",
)


def recipe(result: TrialResult) -> str:
    """The yaml of one result: group choices as overrides of the defaults list, everything else as plain keys."""
    groups, values = [], {}
    for override in OverridesParser.create().parse_overrides(list(result.overrides)):
        key = override.key_or_group
        if key.split(".")[0].split("/")[0] in LEFT_OUT or override.is_delete():
            continue
        if is_group(key):
            # 新加的组（+组=项）不在默认列表里，不能写成 override
            groups.append({key if override.is_add() else f"override /{key}": override.value()})
        else:
            _put(values, key.split("."), plain(override.value()))
    if result.micro_batch:
        # 没有敲过的也写明：换了默认值，这份设置仍是测过的那个
        values["batch_size"] = result.micro_batch
    # 设备名里若有换行，注释就断成了配置
    header = " ".join((text(
        "The fastest setting of a sweep: {speed:,.0f} tokens/s, {held:.2f} GiB on {device}",
        speed=result.tokens_per_s or 0.0, held=result.held_gib or 0.0, device=result.device or "-",
    ) if result.objective == "tokens_per_s" else text(
        "The best setting of a sweep: {objective} {value:.4f} after {time} on {device}",
        objective=result.objective, value=result.value or 0.0, time=duration(60 * (result.minutes or 0.0)),
        device=result.device or "-",
    )).split())
    body = yaml.safe_dump({**({"defaults": groups} if groups else {}), **values}, allow_unicode=True, sort_keys=False)
    return f"# @package _global_\n# {header}\n{body}"


def _put(node: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        node = node.setdefault(part, {})
    node[path[-1]] = value


def plain(value: Any) -> Any:
    """Hydra's own parsed types (quoted strings) as plain values."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return value if isinstance(value, int | float | bool | None) else str(getattr(value, "text", value))


def write_recipe(result: TrialResult, folders: list[Path]) -> None:
    """Write <folder>/fit/best.yaml into every folder."""
    for folder in folders:
        (folder / "fit").mkdir(parents=True, exist_ok=True)
        write_text(folder / "fit" / "best.yaml", recipe(result))


def command(result: TrialResult, folder: Path) -> str:
    """What to type to train with the recipe in `folder`."""
    under = [quoting.override("experiment", result.experiment)] if result.experiment else []
    # --config-dir 只能写一个：自己的 yaml 所在的，另外给出
    others = [own for own in conf_folders()[1:] if own.resolve() != folder.resolve()]
    own = [quoting.in_quotes(f"file://{other.absolute()}") for other in others]
    searched = [f"hydra.searchpath=[{','.join(own)}]"] if own else []
    return quoting.command("run_train.py", "--config-dir", folder.as_posix(), *searched, *under, "+fit=best")


# 放不下的几种
OF_MEMORY = ("oom", "skipped", "spilled")
# 屏幕上与网页里的表说的是同样的词
STATUS, STEP = sentence("status"), sentence("step ms")
PEAK, PREDICTED, BATCH = sentence("peak / budget GiB"), sentence("predicted GiB"), sentence("effective batch")
# 图的名字 -> 它在网页里的标题与说明
TITLES = {"report": ("report_chart", "report_chart_note"), "loss": ("report_loss", "report_loss_note")}
# 输出到文件或管道时的表宽
PLAIN_WIDTH = 160
# 所有的列并排所需的终端宽度
WIDE = 110


def keep(found: Sequence[TrialResult], best: TrialResult | None, folder: Path) -> str | None:
    """Write trials.jsonl into `folder` and the best setting as a recipe; returns the command that uses that."""
    write_text(folder / "trials.jsonl", "".join(result.to_json() + "\n" for result in found))
    if best is None:
        return None
    write_recipe(best, [folder, FIT])
    return command(best, FIT)


def write_report(found: Sequence[TrialResult], folder: Path, *, margin: float) -> None:
    """Rank the results, print the table, write every file of the report into `folder`."""
    order, best = ranked(found, margin), best_of(found, margin)
    print_table(order, margin)
    use = keep(order, best, folder)
    created = time.strftime("%Y-%m-%d %H:%M")
    write_text(folder / "report.html", page(found, margin=margin, command=use, created=created))
    drawn = write_pictures(order, best, folder)
    known = sum(result.known for result in found)
    for line in (
        text(
            "{known} of {count} trials known from before; trial.again=true measures anew",
            known=known, count=len(found),
        ) if known else "",
        text(
            "the report is in {path}: report.html, trials.jsonl{pictures}",
            path=folder, pictures="".join(f", {name}" for name in drawn),
        ),
        text("train with the fastest setting:\n  {command}", command=use) if use else text(
            "no setting fits; try a smaller batch_size, memory=lean or a smaller model",
        ) if any(result.status in OF_MEMORY for result in found) else text("none_trained"),
    ):
        if line:
            show(line)


def write_pictures(order: Sequence[TrialResult], best: TrialResult | None, folder: Path) -> list[str]:
    """The charts as PNG; returns the names of the files."""
    # 没有中文字体时写英文，总比一排方块好
    font = chart.chinese_font() if current_language() == "zh" else None
    charts = charts_of(order, best, current_language() if font else "en")
    for name, one in charts.items():
        chart.save(one, folder / f"{name}.png", font=font)
    return [f"{name}.png" for name in charts]


def charts_of(order: Sequence[TrialResult], best: TrialResult | None, language: str) -> dict[str, chart.Chart]:
    """The charts for which there are results, by name: report (memory and speed) and loss."""
    made = {"report": chart.memory_chart(order, best, language), "loss": chart.loss_chart(order, best, language)}
    return {name: one for name, one in made.items() if one and one.points}


def page(found: Sequence[TrialResult], *, margin: float, command: str | None, created: str) -> str:
    """report.html: self-contained, light and dark, in the console's language; every text is escaped."""
    order, best = ranked(found, margin), best_of(found, margin)
    named = list(zip(order, names(order)))
    device = next((result.device for result in order if result.device), "-")
    known = sum(result.known for result in found)
    return report.page(
        Path(__file__).with_name("report.html"), title=text("report_title"), statuses=STATUS_MESSAGES,
        heads=[text("column_setting"), text(STATUS), "tokens/s", *map(text, (STEP, PEAK, PREDICTED, BATCH))],
        subtitle=text(
            "{device} · {created} · {count} trials, {known} of them known from before",
            device=device, created=created, known=known, count=len(found),
        ),
        tiles=tiles(found, best), command=command, margin=margin, order=named, best=best,
        charts=[(*TITLES[name], chart.svg(one, text(TITLES[name][0])))
                for name, one in charts_of(order, best, current_language()).items()],
        failed=[(result, name) for result, name in named if result.status != "ok"],
    )


def tiles(found: Sequence[TrialResult], best: TrialResult | None) -> list[tuple[str, str]]:
    """The figures at the top of the page and the messages that name them."""
    # 溢出的也测到了速度
    done = sum(result.status in ("ok", "spilled") for result in found)
    made = [(f"{done} / {len(found)}", "tile_done")]
    if best:
        made = [
            (formatted(best.tokens_per_s or 0, ",.0f"), "tile_speed"), (f"{best.step_ms or 0:,.0f} ms", "tile_step"),
            (f"{best.held_gib or 0:.2f} / {best.budget_gib or 0:.2f}", "tile_memory"), *made,
        ]
    return made


def print_table(order: Sequence[TrialResult], margin: float) -> None:
    """The ranked table on the console; the reason of a failure stands below its setting."""
    from rich.console import Console
    from rich.table import Table

    plain = {"highlight": False, "markup": False, "emoji": False}
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else PLAIN_WIDTH, **plain)
    # 窄终端上少后三列：report.html 里都有，而设置与原因要看得全
    count = 8 if console.width >= WIDE else 5
    heads = ("#", text("column_setting"), text(STATUS), "tokens/s", *map(text, (PEAK, STEP, PREDICTED, BATCH)))
    table = Table(title=text("report_title"), title_justify="left", box=None, padding=(0, 2, 0, 0))
    for index, head in enumerate(heads[:count]):
        # 数字列不许折行
        text_column = index in (1, 2)
        table.add_column(head, justify="left" if text_column else "right", no_wrap=not text_column, overflow="fold")
    best = best_of(order, margin)
    for rank, (result, name) in enumerate(zip(order, names(order)), 1):
        setting = f"{name or text('trial_defaults')}\n{why(result, margin)}".rstrip()
        cells = (str(rank), shown(setting, sys.stdout), text(STATUS_MESSAGES[result.status]),
                 formatted(result.tokens_per_s, ",.0f"), peak_of_budget(result), formatted(result.step_ms, ",.1f"),
                 formatted(result.predicted_gib, ".2f"), formatted(result.effective_batch, "d"))
        style = "bold green" if result is best else None if result.status == "ok" else "dim"
        table.add_row(*cells[:count], style=style)
    console.print(table)


def peak_of_budget(result: TrialResult) -> str:
    """3.20 / 12.00"""
    return f"{formatted(result.held_gib, '.2f')} / {formatted(result.budget_gib, '.2f')}"


def why(result: TrialResult, margin: float) -> str:
    """The reason of a failure, or what keeps a success from being the best."""
    tight = result.status == "ok" and not result.fits(margin)
    return text(
        "leaves less than {margin:.0f}% of the budget free (trial.margin)",
        margin=margin * 100,
    ) if tight else result.reason
