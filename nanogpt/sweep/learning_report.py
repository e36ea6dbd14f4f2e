"""What a sweep or search with a loss as objective leaves: a ranked table, report.html, trials.jsonl and best.yaml."""

# 目标是损失的扫描与搜索的报告：名次、每条曲线、平行坐标、哪个键要紧、谁在哪一级为什么停下，以及再训久一些会到多少
# 与 report（速度的扫描）分开：那里说的是放不放得下、多快，这里说的是学得多好；best.yaml 与命令由 report 造
# 两个入口：write_trials 给 experiment=fit objective=val_…，write_search 给 experiment=search

import contextlib
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from nanogpt.base import report
from nanogpt.base.config import TrainConfig, auto_tokens, span_of
from nanogpt.base.console import aligned
from nanogpt.base.files import write_text
from nanogpt.base.groups import leaves
from nanogpt.base.language import show, text, wrapped
from nanogpt.base.saved_config import saved_in
from nanogpt.sweep.extrapolation import Estimate, estimate
from nanogpt.sweep.halving import Candidate, Search, importance
from nanogpt.sweep.report import LEFT_OUT, keep, plain
from nanogpt.sweep.result import STATUS_MESSAGES, TrialResult, best_of, names, ranked
from nanogpt.sweep.space import Dimension

# 屏幕上只列这么多行，其余的在网页里
MOST_ROWS = 12
# 平台占训练的这么多，见 search.DECAY
PLATEAU = 0.8
# 短训练的预算不进 best.yaml：用它训练的人另有打算
LENGTH = ("max_iters=", "max_minutes=", "max_tokens=")
# 学成什么样由这些键定；其中照读几遍文字来定的，训得久就不同，照机器量的也不算
LEARNING = (
    "model", "optimizer", "memory", "finetune", "init_from", "learning_rate", "min_lr", "grad_clip", "label_dropout",
    "precision", "dataset",
)
DECIDED = (
    "model.dropout", "model.ngrams", "optimizer.head_weight_decay", "optimizer.ngram_lr_scale", "model.name",
    "dataset.dir", "precision.cpu_bf16",
)
BUDGET = (*LENGTH, "lr_decay_iters=", "eval_interval=", "save_interval=")


@dataclass(frozen=True)
class Row:
    """One setting in the ranking."""

    # 扫描的一次试跑、搜索的一个设置，在报告里是同样的一行

    number: str
    name: str
    status: str
    reason: str
    value: float | None
    spread: float | None
    seeds: int
    last: TrialResult | None
    """The longest training of it."""

    @property
    def minutes(self) -> float | None:
        return self.last and self.last.minutes

    @property
    def tokens(self) -> int | None:
        return self.last and self.last.tokens

    @property
    def speed(self) -> float | None:
        return self.last and self.last.tokens_per_s

    @property
    def rows(self) -> str:
        """The micro-batch that was chosen, times how many of them make a step."""
        if not (self.last and self.last.micro_batch and self.last.effective_batch):
            return "–"
        return f"{self.last.micro_batch} x {math.ceil(self.last.effective_batch / self.last.micro_batch)}"


def curve(result: TrialResult, axis: int) -> list[tuple[float, float]]:
    """(tokens or minutes, the objective) of every evaluation; axis 0 is tokens, 1 minutes."""
    # 同一份文字上，两种单位只差一个常数
    unit = result.value / result.val_loss if result.value and result.val_loss else 1.0
    return [(point[axis], point[2] * unit) for point in result.curve]


# ---- 扫描 ----


def write_trials(found: Sequence[TrialResult], folder: Path, *, margin: float) -> None:
    """Rank trials with a loss as objective, print the table and write the report into `folder`."""
    order, best = ranked(found, margin), best_of(found, margin)
    rows = [
        Row(str(place), name, one.status, one.reason, one.value if one.status == "ok" else None, None,
            int(one.status == "ok"), one if one.curve else None)
        for place, (one, name) in enumerate(zip(order, names(order)), 1)
    ]
    if best:
        best = without(best, BUDGET)
    _write(folder, rows, order, best, objective=order[0].objective, charts=curve_charts(rows))


def without(best: TrialResult, keys: tuple[str, ...]) -> TrialResult:
    """A result whose overrides leave out some keys."""
    return replace(best, overrides=tuple(word for word in best.overrides if not word.startswith(keys)))


# ---- 搜索 ----


def write_search(cfg: TrainConfig, space: Sequence[Dimension], search: Search, folder: Path) -> None:
    """The report of a search, and best.yaml of the setting with the best mean over its seeds."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = rows_of(search)
    every = [result for one in search.candidates for result in one.tried]
    best, budget = (search.best[0].results[-1] if search.best else None), []
    if best:
        # 搜索旁边写的预算是给真的那次训练的：写进命令，不写进配方，照着配方才想训多久就多久
        budget = [word for word in best.overrides if word.startswith(LENGTH)]
        best = without(best, LENGTH)
    notes = notes_of(cfg, search) if search.best else []
    charts = curve_charts(rows)
    several = [one for one in space if len(one.choices) != 1]
    if several and (compared := [one for one in search.candidates if one.results]):
        title = text("Every setting")
        charts.append((title, text(
            "One line for each setting through its values to what it reached after the first rung; dark is good.",
        ), parallel(compared, several, title)))
    _write(
        folder, rows, every, best, objective=cfg.objective, charts=charts, notes=notes, budget=budget,
        shares=list(importance(search.candidates, space).items()),
    )


def rows_of(search: Search) -> list[Row]:
    """The settings of a search: those with all seeds first, then by how far they came and how good they were."""
    finalists = {one.number: place for place, one in enumerate(search.best)}

    def order(one: Candidate) -> tuple:
        return finalists.get(one.number, math.inf), -one.rung, one.mean

    return [
        Row(
            str(one.number), " ".join(f"{key}={word}" for key, word in one.setting.items()), one.status, one.reason,
            one.mean if one.values else None, one.spread, len(one.values), one.results[-1] if one.results else None,
        )
        for one in sorted(search.candidates, key=order)
    ]


def notes_of(cfg: TrainConfig, search: Search) -> list[str]:
    """What the best setting gained, reaches on the validation split and should reach with the full budget."""
    best, first = search.best[0], search.candidates[0]
    lines = []
    if best.status != "ok":
        lines.append(text(
            "beware of the best setting: {status} {reason}", status=text(STATUS_MESSAGES[best.status]),
            reason=best.reason,
        ))
    # 写下的空间里没有不搜索时的那个设置：第一个试的，就不是它
    if search.starts_as_typed and first is not best and first.results:
        # 第一个走得更远却没走完的，比最好的走到的那一级
        rung = min(first.rung, best.rung)
        lines.append(text(
            "the setting without a search: {default:.4f} after {minutes:.1f} min; the best one then: {best:.4f}",
            default=first.results[rung].value, minutes=search.schedule.rungs[rung], best=best.results[rung].value,
        ))
    if seen := validations(best):
        several = len(seen) > 1 and text(" (spread {spread:.4f}, {count} seeds)", spread=stdev(seen), count=len(seen))
        lines.append(text(
            "on the validation split, looked at once: {value:.4f}{spread}", value=fmean(seen), spread=several or "",
        ))
    if expected := expectation(cfg, search):
        lines.append(text(
            "after {tokens:,.0f} tokens {objective} {value:.3f} is expected, between {low:.3f} and {high:.3f}, if the "
            "curve goes on as it did, by a power law; a small text that is learnt by heart ends above it",
            tokens=expected.tokens, objective=cfg.objective, value=expected.value, low=expected.low,
            high=expected.high,
        ))
    for name, tokens, value in trained(best.results[-1], cfg):
        if at := expectation(cfg, search, tokens):
            lines.append(text(
                "{name} was trained with it: {value:.4f} on the validation split after {tokens:,.0f} tokens; expected "
                "for these were {low:.3f} to {high:.3f}",
                name=name, value=value, tokens=tokens, low=at.low, high=at.high,
            ))
    return lines


def validations(best: Candidate) -> list[float]:
    """What the trainings of a setting reach on the validation split; empty unless all of them looked."""
    seen = [one.validation for one in (*best.results[-1:], *best.others)]
    return [] if None in seen else seen


def expectation(cfg: TrainConfig, search: Search, tokens: float | None = None) -> Estimate | None:
    """The estimate for the best setting after `tokens`; None: after the budget that was typed beside the search."""
    best = search.best[0]
    results = [*best.results[-1:], *best.others]
    full = tokens or full_budget(cfg, results[0])
    if not tokens and full <= (results[0].tokens or 0):
        # 试跑已经比它久：没有什么可估计的
        return None
    found = estimate([curve(one, 0) for one in results if one.curve], full, plateau=PLATEAU)
    seen = validations(best)
    # 曲线在留出的那份上；验证部分是另一段文字，难一些或容易一些，差多少在末尾看过一次
    return found.moved(fmean(seen) - fmean(curve(one, 0)[-1][1] for one in results)) if found and seen else found


def full_budget(cfg: TrainConfig, best: TrialResult) -> float:
    """Tokens that the best setting would be trained on with the budget of the configuration, at its own speed."""
    a_step = (best.effective_batch or 1) * cfg.model.block_size
    span = span_of(replace(cfg, max_tokens=None, gradient_accumulation_steps=1, batch_size=1))
    limits = [span.iters * a_step] if span.iters and (cfg.max_iters or not cfg.max_tokens) else []
    limits += [span.seconds * (best.tokens_per_s or 0.0)] if span.seconds else []
    limits += [auto_tokens(cfg.model) if cfg.max_tokens == "auto" else cfg.max_tokens] if cfg.max_tokens else []
    return min(limits)


def trained(best: TrialResult, cfg: TrainConfig) -> list[tuple[str, int, float]]:
    """(run folder, tokens, what it reached) of finished trainings with this best.yaml and nothing else, in outputs/."""
    # 训多久由人另说，微批只看放不放得下；照文字定的（null），存下的是定出来的那个
    # 没有写进配方的键，照试训的那一次：命令行上另写的 optimizer=adamw，就不是它了
    ours: dict[str, Any] = {}
    if best.run_dir:
        with contextlib.suppress(OSError, ValueError):
            ours = learned_with(saved_in(Path(best.run_dir)))
    words = [word for word in best.overrides if not word.startswith((*BUDGET, "batch_size=", "eval_"))]
    overrides = OverridesParser.create().parse_overrides(words)
    wanted = {f"dataset.{key}": cfg.dataset.get(key) for key in ("name", "path")}
    wanted |= {one.key_or_group: plain(one.value()) for one in overrides if not one.is_delete()}
    wanted = {key: value for key, value in wanted.items() if value is not None and key.split(".")[0] not in LEFT_OUT}
    found = []
    for file in sorted(Path("outputs").glob("*/summary.json")):
        try:
            saved, summary = saved_in(file.parent), json.loads(file.read_text(encoding="utf-8"))
            node, theirs = OmegaConf.create(saved), learned_with(saved)
            same = all(_alike(OmegaConf.select(node, key), value) for key, value in wanted.items())
            same = same and all(theirs[key] == value for key, value in ours.items() if key in theirs)
            value = summary[f"best_{cfg.objective}"]
            # 留出一份来评估的，不是在验证部分上
            if saved["groups"].get("fit") == "best" and same and value is not None and not saved.get("holdout"):
                found.append((file.parent.as_posix(), summary["tokens"], value))
        except (OSError, ValueError, KeyError, TypeError):
            # 别的训练，或者不完整的
            continue
    return found


def learned_with(saved: dict[str, Any]) -> dict[str, Any]:
    """What decides what a run learns, by dotted keys, of its config; not what the length of a training decides."""
    flat = leaves({key: saved[key] for key in LEARNING if key in saved})
    return {key: value for key, value in flat.items() if key not in DECIDED}


def _alike(saved: object, typed: object) -> bool:
    """Whether a saved value is what was typed; groups are no values."""
    if saved is None or isinstance(saved, DictConfig):
        return True
    try:
        return float(saved) == float(typed)
    except (TypeError, ValueError):
        return saved == typed


# ---- 写出来 ----


def curve_charts(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """(title, note, SVG) of the loss against minutes and against tokens."""
    drawn = [row for row in rows if row.last and row.last.curve]
    if not drawn:
        return []
    made = []
    for axis, title, label in ((1, text("Loss against minutes"), text("column_minutes")),
                               (0, text("Loss against tokens"), "tokens")):
        lines = {f"{row.number}: {report.formatted(row.value, '.4f')}": curve(row.last, axis) for row in drawn}
        note = text("The points are evaluations; the numbers in the legend are those of the ranking, the best first.")
        made.append((title, note, report.curves(lines, title, x_label=label, y_label=drawn[0].last.objective)))
    return made


def parallel(candidates: Sequence[Candidate], space: Sequence[Dimension], title: str) -> str:
    """Parallel coordinates as an inline SVG: an axis for each key and one for the objective at the first rung."""
    values = [one.results[0].value for one in candidates]
    low, high = min(values), max(values)
    axes = [*(one.key for one in space), candidates[0].results[0].objective]
    across = [90 + 820 * index / (len(axes) - 1) for index in range(len(axes))]
    drawn = [f'<svg viewBox="0 0 1000 400" role="img" aria-label="{report.escape(report.printable(title))}">']

    def write(x: float, y: float, words: str, size: int = 13) -> None:
        # 字描一圈底色，压在线上也看得清
        halo = "paint-order:stroke;stroke:var(--card);stroke-width:5px;stroke-linejoin:round"
        style = f"fill:var(--soft);font-size:{size}px;text-anchor:middle;{halo}"
        drawn.append(f'<text x="{x:.1f}" y="{y:.1f}" style="{style}">{report.escape(report.printable(words))}</text>')

    for x, name in zip(across, axes):
        drawn.append(f'<line x1="{x:.1f}" y1="50" x2="{x:.1f}" y2="350" style="stroke:var(--faint);stroke-width:2"/>')
        write(x, 390, name)
    # 差的先画，好的盖在上面
    for one in sorted(candidates, key=lambda one: -one.results[0].value):
        value = one.results[0].value
        share = (value - low) / ((high - low) or 1.0)
        places = [*(place(dimension, one.setting[dimension.key]) for dimension in space), 1 - share]
        path = " ".join(f"{x:.1f},{350 - 300 * up:.1f}" for x, up in zip(across, places))
        style = f"fill:none;stroke:var(--c0);stroke-width:{3 - 2 * share:.1f};opacity:{1 - 0.85 * share:.2f}"
        drawn.append(f'<polyline points="{path}" style="{style}"><title>{one.number}: {value:.4f}</title></polyline>')
    for x, dimension in zip(across, space):
        for word in dimension.choices or (f"{dimension.low:g}", f"{dimension.high:g}"):
            write(x, 354 - 300 * place(dimension, word), word, 12)
    write(across[-1], 366, f"{high:.3f}", 12)
    write(across[-1], 44, f"{low:.3f}", 12)
    return "".join([*drawn, "</svg>"])


def place(one: Dimension, word: str) -> float:
    """Where a value lies on its axis, 0 to 1."""
    if one.choices:
        return one.choices.index(word) / max(1, len(one.choices) - 1)
    scale = math.log if one.log else float
    return (scale(float(word)) - scale(one.low)) / (scale(one.high) - scale(one.low))


def _write(
    folder: Path, rows: Sequence[Row], every: Sequence[TrialResult], best: TrialResult | None, *, objective: str,
    charts: list, notes: Sequence[str] = (), shares: Sequence[tuple[str, float]] = (), budget: Sequence[str] = (),
) -> None:
    print_rows(rows, objective)
    use = keep(every, best, folder)
    use = use and " ".join([use, *budget])
    device = next((one.device for one in every if one.device), "-")
    try:
        write_text(folder / "report.html", report.page(
            Path(__file__).with_name("learned.html"), title=text("What learns most"), statuses=STATUS_MESSAGES,
            subtitle=f"{device} · {time.strftime('%Y-%m-%d %H:%M')}", tiles=[], command=use, notes=notes,
            charts=charts, importance=shares, rows=rows, objective=objective,
            note=text("Smaller is better; the spread is the standard deviation over the seeds."),
        ))
        show(text("the report is in {path}: report.html, trials.jsonl", path=folder))
    finally:
        # 网页写不下，结论也要说
        for line in notes:
            show(wrapped(line, sys.stdout))
        show(text("train with the best setting:\n  {command}", command=use) if use else text("none_trained"))


def print_rows(rows: Sequence[Row], objective: str) -> None:
    """The ranking on the console, and below it why the failures failed."""
    names = ("column_spread", "column_minutes", "column_rows", "column_status", "column_setting")
    heads = ("#", objective, *map(text, names))
    cells = [
        (row.number, report.formatted(row.value, ".4f"), report.formatted(row.spread, ".4f"),
         report.formatted(row.minutes, ".1f"), row.rows, text(STATUS_MESSAGES[row.status]), row.name)
        for row in rows[:MOST_ROWS]
    ]
    for line in aligned(heads, cells, sides="lrrrrll"):
        show(line)
    if len(rows) > MOST_ROWS:
        show(text("… and {count} more, in report.html", count=len(rows) - MOST_ROWS))
    for row in rows:
        if row.status not in ("ok", "pruned"):
            show(f"  {row.name or row.number}: {row.reason}")
