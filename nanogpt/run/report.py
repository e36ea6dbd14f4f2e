"""Write report.html: what a run reached, its curve, its samples and its settings, as one page that opens offline."""

# 一次训练的报告：曲线、各次评估写出的样本、与默认不同的设置、速度、内存、时间，以及接下来可以敲什么
# session 在结束时调用，被中断的也写；接着训的，从 metrics.jsonl 读回整个过程
# 样子在旁边的 report.html 与各种报告共用的 base/report 里，这里只备好它要的内容

import functools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanogpt.base.config import TrainConfig, plain, span_of
from nanogpt.base.console import clock
from nanogpt.base.files import write_text
from nanogpt.base.groups import leaves, train_config
from nanogpt.base.language import text
from nanogpt.base.report import curves, formatted, page, printable
from nanogpt.run.loggers import history, points

# 样本多了，从头到尾均匀取这么多段
MOST_SAMPLES = 6
# 说的是在哪里、怎么开始，不是训练的设置；词表与分隔符由数据决定，各组的值都已逐项列出
LEFT_OUT = {"out_dir", "overwrite", "resume", "checkpoint", "lang", "plan", "model.vocab_size", "model.separator",
            "model.marked"}


def write_report(
    run_dir: Path, cfg: TrainConfig, summary: Mapping[str, Any], *, model: str, commands: Mapping[str, str]
) -> None:
    """Write <run>/report.html in the console's language.

    `model` is the model in one line, `commands` what may be typed now: the name of what it does -> the command.
    """
    records, samples = history(run_dir)
    keys = {text("curve_train"): "train/loss", text("curve_val"): "val/loss"}
    lines = {name: drawn for name, key in keys.items() if (drawn := points(records, key))}
    title, axes = run_dir.absolute().name, {"x_label": text("column_iteration"), "y_label": text("report_loss")}
    html = page(
        Path(__file__).with_name("report.html"), title=printable(title),
        subtitle=f"{model} · {summary['device']} · {time.strftime('%Y-%m-%d %H:%M')}",
        tiles=_tiles(records, summary, span_of(cfg).iters), commands=commands,
        curves=curves(lines, title, **axes) if lines else "",
        samples=[(at, "\n".join(map(printable, sample.strip("\n").split("\n")))) for at, sample in _spread(samples)],
        settings=[tuple(map(printable, row)) for row in changed(cfg)],
    )
    write_text(run_dir / "report.html", html)


def _tiles(records: list[dict], summary: Mapping[str, Any], planned: int | None) -> list[tuple[str, str]]:
    """The figures at the top of the page and the messages that name them."""
    done, bits = summary["iters"], [value for _, value in points(records, "val/bpb")]
    peaks = [value for _, value in points(records, "memory/peak_gib")]
    return [
        (formatted(summary["best_val_loss"], ".4f"), "tile_loss"),
        *([(f"{min(bits):.3f}", "tile_bpb")] if bits else []),
        (f"{summary['tokens_per_s']:,.0f}", "tokens/s"),
        (formatted(max(peaks, default=None), ".2f"), "chart_ram" if summary["peak_vram_gib"] is None else "chart_vram"),
        # wall_s 只是这一次的，train_s 是全程的，但不含评估
        (clock(max(summary["wall_s"], summary["train_s"])), "tile_time"),
        (f"{done:,}" + (f" / {planned:,}" if planned and planned != done else ""), "tile_iterations"),
    ]


def _spread(samples: Mapping[int, str]) -> list[tuple[int, str]]:
    """At most MOST_SAMPLES of them by iteration, the first and the last among them."""
    found = sorted(samples.items())
    if len(found) <= MOST_SAMPLES:
        return found
    return [found[round(i * (len(found) - 1) / (MOST_SAMPLES - 1))] for i in range(MOST_SAMPLES)]


def changed(cfg: TrainConfig) -> list[tuple[str, str, str]]:
    """(key, value, default) of every setting that differs from what run_train.py takes when nothing is typed."""
    own, usual = leaves(plain(cfg)), _defaults()
    return [
        (key, _written(value), _written(usual[key]) if key in usual else "–") for key, value in own.items()
        if key not in LEFT_OUT and not key.startswith("groups.") and (key not in usual or usual[key] != value)
    ]


@functools.cache
def _defaults() -> dict[str, Any]:
    return leaves(plain(train_config([])))


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
