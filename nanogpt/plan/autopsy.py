"""What to show when a training step ran out of memory: the largest part, the shortage and what to type."""

# 训练步显存不足、又不能再分小时，打印一屏：哪一部分最大、差多少、接着训要敲什么
# 由 run_train.py 作为 explain 递给训练，失败之后才导入；它重新做一次规划，再从成套的 memory= 里挑最温和又放得下的
# 规划不了也照样结束：少一张表，不掩盖真正的错误

import re
from dataclasses import asdict, replace

from nanogpt.base.config import TrainConfig, effective_batch
from nanogpt.base.console import Console
from nanogpt.base.errors import PHASES, OutOfMemory
from nanogpt.base.hardware import GIB
from nanogpt.base.language import first_line, text
from nanogpt.base.quoting import command
from nanogpt.plan.advice import Advice, changed, presets
from nanogpt.plan.plan import Plan, Planner
from nanogpt.plan.show import NAMES, table

UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
AMOUNT = r"([\d.]+) (bytes|KiB|MiB|GiB)"
# 占预算不到这么多却不够用：多半是别的程序占着
UNEXPECTED = 0.9
# 只省下一点点的不值得劝人去试
CLEARLY_LESS = 0.95


def wanted_and_free(detail: str) -> tuple[float | None, float | None]:
    """(GiB asked for, GiB that were free) as an out-of-memory message says, None for what it does not say."""
    asked = re.search(rf"(?:[Tt]ry(?:ing)?|[Tt]ried|[Uu]nable) to allocate {AMOUNT}", detail)
    free = re.search(rf"{AMOUNT} is free", detail)
    return tuple(float(found[1]) * UNITS[found[2]] / GIB if found else None for found in (asked, free))


def show(error: OutOfMemory, cfg: TrainConfig, console: Console, *, resume: list[str]) -> None:
    """Print one screen about the failed step of cfg.

    `resume` is what to type to go on, empty when there is no checkpoint.
    """
    wanted, free = wanted_and_free(error.detail)
    console.line(
        "---- out of memory in the {phase}, with {rows} rows at a time: this cannot be divided further ----",
        phase=text(PHASES[error.phase]), rows=error.rows,
    )
    if wanted is not None:
        console.line("oom_wanted" if free is not None else "oom_wanted_only", wanted=wanted, free=free or 0.0)
    try:
        plan, way = _planned(cfg, error.rows)
    except Exception as reason:
        # 追踪不了的模型，或连追踪的内存也没有：少一张表，结局照说
        console.line(
            "no prediction for this model ({reason}); try memory=lean, or a smaller model.block_size",
            reason=first_line(reason),
        )
        return
    for row in table(plan):
        console.plain(row)
    _judge(plan, console)
    if way:
        console.line(
            "add this (predicted peak {peak:.2f} GiB, {speed:.2f}x the speed): {typed}",
            typed=way.typed, speed=way.speed, peak=way.plan.total / GIB,
        )
        if resume:
            console.plain(f"  {command('run_train.py', *resume, *way.typed.split())}")
    else:
        console.line("no memory=… that was tried makes it fit: choose a smaller model or model.block_size")


def _planned(cfg: TrainConfig, rows: int) -> tuple[Plan, Advice | None]:
    """The plan of the failed step, and the mildest preset of memory= that takes clearly less and fits."""
    total = effective_batch(cfg)
    # 模型的形状此时已经定了：不必再去读 init_from 的权重
    failed = replace(
        cfg, batch_size=min(rows, total), gradient_accumulation_steps=1, global_batch_size=total, init_from=None
    )
    planner = Planner(failed)
    plan = planner.predict(failed)
    for change in presets():
        candidate = changed(plan.cfg, (change,))
        if candidate is None:
            continue
        outcome = planner.judge(candidate, plan.vocab_source)
        saves = outcome.total - outcome.parts.context < CLEARLY_LESS * (plan.total - plan.parts.context)
        if outcome.verdict != "does_not_fit" and saves:
            return plan, Advice(change.typed, outcome.tokens_per_s / plan.tokens_per_s, outcome)
    return plan, None


def _judge(plan: Plan, console: Console) -> None:
    """Name the largest part, and say by how much the prediction is above the budget or that it is not."""
    parts = {key: size for key, size in asdict(plan.parts).items() if key not in ("context", "desktop", "rounding")}
    largest = max(parts, key=parts.get)
    console.line("largest part: {part}, {gib:.2f} GiB", part=text(NAMES[largest]), gib=parts[largest] / GIB)
    if plan.total > UNEXPECTED * plan.budget.total:
        console.line(
            "predicted peak {total:.2f} GiB, budget {budget:.2f} GiB: {over:.2f} GiB too much",
            total=plan.total / GIB, budget=plan.budget.total / GIB, over=max(0.0, plan.total - plan.budget.total) / GIB,
        )
    else:
        # 按预测放得下却失败了：预算里被别人占走一块
        console.line(
            "predicted peak {total:.2f} GiB of {budget:.2f} GiB: it should fit; other programs seem to hold memory "
            "(close them, or say so with hardware.desktop_gib=…)",
            total=plan.total / GIB, budget=plan.budget.total / GIB,
        )
