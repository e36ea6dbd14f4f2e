"""Find the fastest micro-batch that fits for batch_size=auto, by real trials that start from the prediction."""

# batch_size=auto：用试跑找出放得下的最快的微批，每步的总行数不变
# 先由预测挑出值得试的几档，从大到小试跑，连着变慢就停；结论按机器、驱动、版本、配置记在 outputs/fit/auto
# choose 由 run_train.py 递给训练，settled 包着每次试跑；第一次要等几次试跑，之后直接读记下的；trial.again=true 重测

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanogpt.base.config import TrainConfig, check
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
# 与快慢、内存无关的键，都写成一样的：学习率、种子不同的设置只量一次，用同一档微批
ALIKE = {"learning_rate": 1e-3, "min_lr": 0.0, "seed": 0}


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


class Sizes:
    """The micro-batches of one config: each measured by a trial, the fastest remembered."""

    # 训练之前（choose）与试跑之前（settled）找的是同一个数：先试哪几档各有各的问法，量与记只有这一份

    def __init__(
        self, cfg: TrainConfig, overrides: list[str], console: Console, run: Callable[..., TrialResult],
        *, skip_predicted: bool = False,
    ):
        """`run` is run_trial or its like; `skip_predicted`: it measures nothing that it predicts not to fit."""
        # 试的是整个优化器步：累积几次、更新一次，快慢才与真正训练时一样
        how = replace(cfg.trial, enabled=True, warmup_steps=WARMUP_STEPS, steps=STEPS, skip_predicted=False)
        cfg = replace(cfg, **ALIKE, gradient_accumulation_steps=1, objective="tokens_per_s", trial=how)
        self.file = FOLDER / f"{known_results.key_of(cfg)}.json"
        self.cfg = replace(cfg, trial=replace(how, skip_predicted=skip_predicted))
        self.overrides, self.console, self.run, self.rows = overrides, console, run, cfg.global_batch_size
        self.all = candidates(self.rows, whole=cfg.memory.optimizer_in_backward)
        self.tried: dict[int, TrialResult] = {}

    def known(self) -> dict[str, Any] | None:
        """The verdict of an earlier time; None: there is none, it cannot be read, or it is to be measured anew."""
        if self.cfg.trial.again:
            return None
        try:
            known = json.loads(self.file.read_text(encoding="utf-8"))
            return known if isinstance(known["batch_size"], int) and known["batch_size"] > 0 else None
        except (OSError, ValueError, KeyError, TypeError):
            # 读不了就重测：只是费些时间
            return None

    def begin(self) -> None:
        """Say what is looked for."""
        self.console.line(
            "batch_size=auto: looking for the fastest micro-batch for {rows} rows per step; candidates: {sizes}",
            rows=self.rows, sizes=", ".join(map(str, self.all)),
        )

    def config(self, size: int) -> TrainConfig:
        """A trial of this micro-batch."""
        return replace(self.cfg, batch_size=size)

    def measure(self, size: int) -> TrialResult:
        """What a trial of this micro-batch led to, said in a line the first time."""
        if size in self.tried:
            return self.tried[size]
        result = self.run(self.config(size), self.overrides, self.file.with_suffix("") / f"batch_{size}")
        what = f"{result.tokens_per_s:.0f} tokens/s" if result.status == "ok" else result.reason
        self.console.line(
            "  {batch} x {pieces}: {status}, {what}, peak {peak:.2f} GiB",
            batch=size, pieces=math.ceil(self.rows / size), status=text(STATUS_MESSAGES[result.status]), what=what,
            peak=result.held_gib or 0.0,
        )
        self.tried[size] = result
        return result

    def keep(self, best: TrialResult) -> int:
        """Remember the verdict; returns the micro-batch."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        verdict = {"batch_size": best.micro_batch, "tokens_per_s": best.tokens_per_s, "peak_gib": best.held_gib}
        write_text(self.file, json.dumps(verdict) + "\n")
        self.console.line(
            "batch_size={batch}, {pieces} micro-batches for {rows} rows, {speed:.0f} tokens/s; remembered "
            "(trial.again=true measures anew)",
            batch=best.micro_batch, pieces=math.ceil(self.rows / best.micro_batch), rows=self.rows,
            speed=best.tokens_per_s,
        )
        return best.micro_batch


def choose(cfg: TrainConfig, overrides: list[str], *, processes: int, console: Console) -> int:
    """The micro-batch for cfg.global_batch_size rows per step; remembered per machine, driver, versions and config."""
    rows = math.ceil(cfg.global_batch_size / processes)
    sizes = Sizes(replace(cfg, global_batch_size=rows), overrides, console, run_trial)
    if known := sizes.known():
        console.line(
            "batch_size=auto: {batch}, measured before at {speed:.0f} tokens/s ({file}; trial.again=true measures "
            "anew)",
            batch=known["batch_size"], speed=known["tokens_per_s"], file=sizes.file,
        )
        return known["batch_size"]
    sizes.begin()
    plans: dict[int, Any] = {}

    def promising(size: int) -> bool:
        plans[size] = predict(sizes.config(size), overrides)
        return plans[size].total <= plans[size].budget.total * HOPEFUL

    hopeful = worth_trying(sizes.all, promising)
    if hopeful:
        console.line(
            "at most {count} trials, each a process of its own and about {time} of training by the prediction …",
            count=len(hopeful), time=duration((WARMUP_STEPS + STEPS) * plans[hopeful[0]].step_s),
        )
    best = fastest(hopeful, in_sight(sizes.measure, len(hopeful), console), cfg.trial.margin)
    if best is None:
        least = sizes.all[-1]
        smallest = plans.get(least) or predict(sizes.config(least), overrides)
        raise ConfigError(
            "batch_size=auto: not even {size} rows fit (predicted {need:.1f} GiB, budget {budget:.1f} GiB); run the "
            "same with plan=true batch_size={size} for what to change",
            size=least, need=smallest.total / GIB, budget=smallest.budget.total / GIB,
        )
    return sizes.keep(best)


def settled(
    run: Callable[..., TrialResult], cfg: TrainConfig, overrides: list[str], folder: Path, **where: Any
) -> TrialResult:
    """run(…) of a trial; with batch_size=auto after the fastest micro-batch that fits was found, if there is one."""
    if cfg.batch_size == "auto" and _is_right(cfg):
        sizes = Sizes(cfg, overrides, Console(), run, skip_predicted=cfg.trial.skip_predicted)
        known = sizes.known()
        best = None if known else _by_trials(sizes)
        if best and best.status != "ok":
            return replace(best, overrides=tuple(overrides), objective=cfg.objective)
        cfg = replace(cfg, batch_size=sizes.keep(best) if best else known["batch_size"])
    return run(cfg, overrides, folder, **where)


def _is_right(cfg: TrainConfig) -> bool:
    try:
        check(cfg)
    except ConfigError:
        # 写错的设置由 run 说：也是一个结果
        return False
    return True


def _by_trials(sizes: Sizes) -> TrialResult:
    """The fastest that fits, else what the smallest led to."""
    # 扫描的父进程不导入 torch，问不了预测：对半找放得下的最大一档，放不下的由子进程自己的预测挡住
    sizes.begin()
    margin = sizes.cfg.trial.margin

    def fits(size: int) -> bool:
        return sizes.measure(size).fits(margin)

    # 多半全都放得下：那就不必先去试小的
    hopeful = sizes.all if fits(sizes.all[0]) else worth_trying(sizes.all, fits)
    return fastest(hopeful, sizes.measure, margin) or sizes.measure(sizes.all[-1])
