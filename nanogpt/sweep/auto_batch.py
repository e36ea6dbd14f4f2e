"""Find the fastest micro-batch that fits for batch_size=auto, by real trials that start from the prediction."""

# batch_size=auto：用试跑找出放得下的最快的微批，每步的总行数不变
# 先由预测挑出值得试的几档，从大到小试跑，连着变慢就停；结论按机器、驱动、版本、配置记在 outputs/fit/auto
# choose 由 run_train.py 递给训练，第一次要等几次试跑，之后直接读记下的；trial.again=true 重测

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanogpt.base.config import TrainConfig
from nanogpt.base.console import Console, duration
from nanogpt.base.files import write_text
from nanogpt.base.hardware import GIB
from nanogpt.base.language import ConfigError, text
from nanogpt.sweep import earlier_results as known_results
from nanogpt.sweep.result import FIT, STATUS_MESSAGES
from nanogpt.sweep.trial import TrialResult, run_trial

FOLDER = FIT / "auto"
# 预测略高于预算的也值得一试：编译之后的实际占用常比预测低
HOPEFUL = 1.15
# 每一档都是完整的优化器步，少几步就够分出快慢
WARMUP_STEPS, STEPS = 1, 3
# 连续这么多档都更慢，再小也不会更快
SLOWER_IN_A_ROW = 2


def candidates(rows: int, *, whole: bool) -> list[int]:
    """Micro-batches to consider for `rows` rows per step, largest first; only all rows at once if `whole`.

    For k micro-batches the smallest size that does with k: an even split needs the least memory.
    """
    # 1、2、3、4、6、8、12、16…：每档比上一档小三成左右，再密也分不出快慢
    ladder = {base << power for base in (2, 3) for power in range(rows.bit_length())}
    pieces = {1} if whole else {1, rows} | {k for k in ladder if k <= rows}
    return sorted({math.ceil(rows / k) for k in pieces}, reverse=True)


def worth_trying(sizes: list[int], promising: Callable[[int], bool]) -> list[int]:
    """The sizes (largest first) from the largest promising one down; memory grows with size, so that few are asked."""
    low, high = 0, len(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if promising(sizes[middle]) else (middle + 1, high)
    return sizes[low:]


def fastest(sizes: list[int], measure: Callable[[int], TrialResult], margin: float) -> TrialResult | None:
    """The fastest of those that fit with `margin` of the budget free; None when none does.

    The sizes are tried from the largest down until smaller ones only get slower.
    """
    best, slower = None, 0
    for size in sizes:
        result = measure(size)
        if not result.fits(margin):
            continue
        if best is None or result.tokens_per_s > best.tokens_per_s:
            best, slower = result, 0
        else:
            slower += 1
        if slower == SLOWER_IN_A_ROW:
            break
    return best


def in_sight(measure: Callable[[int], TrialResult], count: int, console: Console) -> Callable[[int], TrialResult]:
    """measure() with a bar while it runs and a line behind it: how much of at most `count` is to come."""
    # 连着变慢就停：只说得出上限
    began, done = time.monotonic(), 0

    def left() -> float:
        return (time.monotonic() - began) / done * (count - done)

    def seen(size: int) -> TrialResult:
        nonlocal done
        with console.progress(count, done, title="progress_trials") as advance:
            advance(done, left=left() if done else None)
            result = measure(size)
        done += 1
        if done < count:
            console.line(
                "  {done} of at most {count} tried, at most about {time} more",
                done=done, count=count, time=duration(left()),
            )
        return result

    return seen


def predict(cfg: TrainConfig, overrides: list[str]) -> Any:
    """The Plan of a setting."""
    # 搜索的父进程也用 candidates 与 fastest，它不导入 torch：到用时才导入
    from nanogpt.plan import plan

    return plan.predict(cfg, overrides)


def choose(cfg: TrainConfig, overrides: list[str], *, processes: int, console: Console) -> int:
    """The micro-batch for cfg.global_batch_size rows per step; remembered per machine, driver, versions and config."""
    rows = math.ceil(cfg.global_batch_size / processes)
    memory_file = FOLDER / f"{known_results.key_of(cfg)}.json"
    if not cfg.trial.again and (known := _remembered(memory_file)):
        console.line(
            "batch_size=auto: {batch}, measured before at {speed:.0f} tokens/s ({file}; trial.again=true measures "
            "anew)",
            batch=known["batch_size"], speed=known["tokens_per_s"], file=memory_file,
        )
        return known["batch_size"]

    def trial_config(size: int) -> TrainConfig:
        # 试的是整个优化器步：累积几次、更新一次，快慢才与真正训练时一样
        return replace(
            cfg, batch_size=size, gradient_accumulation_steps=1, global_batch_size=rows, objective="tokens_per_s",
            trial=replace(cfg.trial, enabled=True, warmup_steps=WARMUP_STEPS, steps=STEPS, skip_predicted=False),
        )

    def measure(size: int) -> TrialResult:
        result = run_trial(trial_config(size), overrides, memory_file.with_suffix("") / f"batch_{size}")
        what = f"{result.tokens_per_s:.0f} tokens/s" if result.status == "ok" else result.reason
        console.line(
            "  {batch} x {pieces}: {status}, {what}, peak {peak:.2f} GiB",
            batch=size, pieces=math.ceil(rows / size), status=text(STATUS_MESSAGES[result.status]), what=what,
            peak=result.held_gib or 0.0,
        )
        return result

    sizes = candidates(rows, whole=cfg.memory.optimizer_in_backward)
    console.line(
        "batch_size=auto: looking for the fastest micro-batch for {rows} rows per step; candidates: {sizes}",
        rows=rows, sizes=", ".join(map(str, sizes)),
    )
    plans: dict[int, Any] = {}

    def promising(size: int) -> bool:
        plans[size] = predict(trial_config(size), overrides)
        return plans[size].total <= plans[size].budget.total * HOPEFUL

    hopeful = worth_trying(sizes, promising)
    if hopeful:
        console.line(
            "at most {count} trials, each a process of its own and about {time} of training by the prediction …",
            count=len(hopeful), time=duration((WARMUP_STEPS + STEPS) * plans[hopeful[0]].step_s),
        )
    best = fastest(hopeful, in_sight(measure, len(hopeful), console), cfg.trial.margin)
    if best is None:
        smallest = plans.get(sizes[-1]) or predict(trial_config(sizes[-1]), overrides)
        raise ConfigError(
            "batch_size=auto: not even {size} rows fit (predicted {need:.1f} GiB, budget {budget:.1f} GiB); run the "
            "same with plan=true batch_size={size} for what to change",
            size=sizes[-1], need=smallest.total / GIB, budget=smallest.budget.total / GIB,
        )
    memory_file.parent.mkdir(parents=True, exist_ok=True)
    verdict = {"batch_size": best.micro_batch, "tokens_per_s": best.tokens_per_s, "peak_gib": best.held_gib}
    write_text(memory_file, json.dumps(verdict) + "\n")
    console.line(
        "batch_size={batch}, {pieces} micro-batches for {rows} rows, {speed:.0f} tokens/s; remembered "
        "(trial.again=true measures anew)",
        batch=best.micro_batch, pieces=math.ceil(rows / best.micro_batch), rows=rows, speed=best.tokens_per_s,
    )
    return best.micro_batch


def _remembered(file: Path) -> dict | None:
    """The verdict in `file`, None when there is none or it cannot be read."""
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        return known if isinstance(known["batch_size"], int) and known["batch_size"] > 0 else None
    except (OSError, ValueError, KeyError, TypeError):
        # 读不了就重测：只是费些时间
        return None

