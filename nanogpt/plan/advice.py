"""Which overrides to type when a setting does not fit, each one checked by a full prediction."""

# 一个设置放不下时，算出改哪几个键就放得下，按速度排好
# 先找同样有效 batch 下更小的微批，再试成套设置与 memory= 的各个键，都不行才缩短上下文；每条建议都完整追踪过
# show 由 plan=true 用，presets 与 changed 由 autopsy 用；找到够用的、或用了 SECONDS 秒的 CPU 时间就停
# 一条也没有时到 LONGEST 为止，不求穷尽

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace

from nanogpt.base.config import MemoryConfig, TrainConfig, check
from nanogpt.base.console import Console
from nanogpt.base.language import ConfigError, text
from nanogpt.plan.plan import TIGHT, Plan, Planner, parallels
from nanogpt.weights.build import memory_options

LINES = 5
SECONDS, LONGEST = 4.0, 8.0
"""No further candidate is looked at after so much CPU time, or so much where none was found: a busy machine gives the
same advice, only later."""
USEFUL = 0.995
"""A change counts where it brings the peak below this part of what it was."""


@dataclass(frozen=True)
class Change:
    """Fields of memory= that trade something for memory, and how they are typed."""

    # 敲法与字段放在一起：试的与劝人敲的不会两样

    typed: str
    fields: dict[str, object]


# 新的 memory 键在 MemoryConfig 里写上 lean= 就会被考虑
KEYS = tuple(
    Change(f"memory.{key.name}={str(value).lower()}", {key.name: value})
    for key in fields(MemoryConfig) if (value := key.metadata.get("lean")) is not None
)
BLOCKS = (2, 4, 8)
"""Divisors of block_size, tried last: a shorter context is another model."""


@dataclass(frozen=True)
class Advice:
    """Overrides that make it fit."""

    # 附上整份 Plan：autopsy 还要说出改了之后的峰值

    typed: str
    speed: float
    """Tokens/s relative to the setting that does not fit."""
    plan: Plan


def presets() -> list[Change]:
    """The options of conf/memory beside the default, each with all its fields, from cheap to thorough."""
    # yaml 里没写的字段取默认值：换成套设置时，原先单独写的键不会留下来
    return [Change(f"memory={name}", asdict(node)) for name, node in list(memory_options().items())[1:]]


def advise(plan: Plan, planner: Planner, looked: Callable[[float], None] = lambda seconds: None) -> list[Advice]:
    """At most LINES ways to make plan.cfg fit, the fastest first: a smaller batch, one key, a preset.

    Where none of them fits, those that fit tightly; where there are none either, a single row, which is another
    effective batch; and then a shorter context.
    looked(seconds since the beginning) is called on the way.
    """
    began = time.process_time()

    def late(limit: float = LONGEST) -> bool:
        seconds = time.process_time() - began
        looked(seconds)
        return seconds > limit

    found, whole = _ways(plan, planner, ()) + sharded(plan, planner), presets()
    # 次序：最便宜的成套设置；还不够，就更彻底的；再是各个单项，先粗估有没有用
    for change in (*whole, *KEYS):
        if late(SECONDS) or len(found) >= LINES:
            break
        # 已经有够用的，不必再劝人用更重的成套设置
        if not (found and change in whole[1:]) and (change in whole or _is_useful(change, plan, planner)):
            found += _ways(plan, planner, (change,))
    for change in () if found else whole:
        if not late():
            found += _ways(plan, planner, (change,), accepted=("fits", "tight"))
    levels = [(), *((change,) for change in whole)]
    if not found:
        found = _one_row(plan, planner, levels, late)
    if not found:
        found = _shorter(plan, planner, levels, late)
    return sorted((a for a in found if not any(_beats(b, a) for b in found)), key=lambda a: -a.speed)[:LINES]


def sharded(plan: Plan, planner: Planner) -> list[Advice]:
    """How to share out the model, where several processes train it."""
    before = plan.cfg.parallel
    for parallel in parallels(replace(plan.cfg, parallel=replace(before, mode="auto"))):
        typed = ["parallel=fsdp"] if parallel.mode != before.mode else []
        typed += ["parallel.sum_gradients=every"] if parallel.sum_gradients != before.sum_gradients else []
        if parallel.mode == "ddp" or not typed:
            continue
        outcome = planner.judge(replace(plan.cfg, parallel=parallel), plan.vocab_source)
        if outcome.verdict == "fits":
            return [Advice(" ".join(typed), outcome.tokens_per_s / plan.tokens_per_s, outcome)]
    return []


def _beats(one: Advice, other: Advice) -> bool:
    """Whether fewer overrides are at least as fast."""
    return set(one.typed.split()) < set(other.typed.split()) and one.speed >= other.speed


def show(plan: Plan, planner: Planner, console: Console) -> None:
    """Print the advice for a plan that does not fit."""
    if not console.live:
        console.line("looking for settings that fit, at most about {seconds:.0f} s …", seconds=LONGEST)
    # 找到够用的就停，所以进度条走的是时间：走到头也就不再找了
    with console.progress(round(LONGEST), title="progress_advice") as advance:
        found = advise(plan, planner, lambda seconds: advance(round(min(seconds, LONGEST)), left=LONGEST - seconds))
    console.line(
        "to make it fit, fastest first (speed relative to the setting above):",
    ) if found else console.line(
        "no combination of batch_size, memory=… and block_size that was tried fits; choose a smaller model",
    )
    for advice in found:
        note = f"   # {text('plan_tight')}" if advice.plan.verdict == "tight" else ""
        console.plain(f"  {advice.speed:.2f}x  {advice.typed}{note}")


def changed(cfg: TrainConfig, changes: tuple[Change, ...]) -> TrainConfig | None:
    """cfg with the changes; None where the parts contradict each other."""
    fields = {key: value for change in changes for key, value in change.fields.items()}
    candidate = replace(cfg, memory=replace(cfg.memory, **fields))
    if "activation_checkpointing" in fields:
        candidate.memory.activation_budget_mib = None
    if changes and candidate.memory == cfg.memory:
        return None
    try:
        check(candidate)
    except ConfigError:
        return None
    return candidate


def _is_useful(change: Change, plan: Plan, planner: Planner) -> bool:
    candidate = changed(_alone(plan.cfg), (change,))
    if candidate is None:
        return False
    rows = plan.batch_size
    return planner.estimate(candidate).live(rows) < USEFUL * planner.estimate(_alone(plan.cfg)).live(rows)


def _alone(cfg: TrainConfig) -> TrainConfig:
    """cfg without accumulation, so that every part of memory= is legal."""
    return replace(cfg, gradient_accumulation_steps=1, global_batch_size=None)


def _ways(
    plan: Plan, planner: Planner, changes: tuple[Change, ...], accepted: tuple[str, ...] = ("fits",)
) -> list[Advice]:
    """The changes at the present batch size, or else at the largest smaller one with the same effective batch."""
    total = plan.batch_size * plan.accumulation if plan.cfg.global_batch_size is None else plan.cfg.global_batch_size
    sizes = [b for b in range(plan.batch_size, 0, -1) if total % b == 0 or b == plan.batch_size]
    part = TIGHT if len(accepted) == 1 else TIGHT * 1.1
    alone, tried = changed(_alone(plan.cfg), changes), 0
    # 最小的都放不下，大的不必一个个估
    if alone is None:
        return []
    budget = planner.budget_of(alone)
    if not planner.estimate(alone).fits(sizes[-1], budget, part):
        return []
    for rows in sizes:
        accumulation = -(-total // rows)
        batch = {} if rows == plan.batch_size else {
            "batch_size": rows, "gradient_accumulation_steps": accumulation, "global_batch_size": None,
        }
        candidate = changed(replace(plan.cfg, **batch), changes)
        # 粗估就放不下的不去追踪：完整追踪一次要几秒
        if candidate is None or not planner.estimate(candidate).fits(rows, budget, part):
            continue
        outcome = planner.judge(candidate, plan.vocab_source)
        if outcome.verdict in accepted:
            return [Advice(_typed(batch, plan.cfg, changes), outcome.tokens_per_s / plan.tokens_per_s, outcome)]
        tried += 1
        # 粗估说行、追踪说不行：再给更小的一档一次机会，就不再追踪
        if tried == 2:
            break
    return []


def _typed(batch: dict[str, int | None], cfg: TrainConfig, changes: tuple[Change, ...]) -> str:
    """The overrides as one pastes them; global_batch_size only where it was set."""
    keys = [key for key in batch if key != "global_batch_size" or cfg.global_batch_size]
    values = [f"{key}={'null' if batch[key] is None else batch[key]}" for key in keys]
    return " ".join([*values, *(change.typed for change in changes)])


def _one_row(
    plan: Plan, planner: Planner, levels: list[tuple[Change, ...]], late: Callable[[], bool]
) -> list[Advice]:
    """The cheapest changes with which a single row fits that is not accumulated."""
    # 反向里更新的不能累积：批量小了，模型还是那个模型
    batch = {"batch_size": 1, "gradient_accumulation_steps": 1, "global_batch_size": None}
    for changes in levels:
        candidate = changed(replace(plan.cfg, **batch), changes)
        if candidate and not late() and planner.estimate(candidate).fits(1, planner.budget_of(candidate), 1.0):
            outcome = planner.judge(candidate, plan.vocab_source)
            if outcome.verdict != "does_not_fit":
                speed = outcome.tokens_per_s / plan.tokens_per_s
                return [Advice(_typed(batch, plan.cfg, changes), speed, outcome)]
    return []


def _shorter(
    plan: Plan, planner: Planner, levels: list[tuple[Change, ...]], late: Callable[[], bool]
) -> list[Advice]:
    """The longest shorter context that fits with one of the changes."""
    for divisor in BLOCKS:
        block = plan.cfg.model.block_size // divisor
        shorter = replace(plan, cfg=replace(plan.cfg, model=replace(plan.cfg.model, block_size=block)))
        for changes in levels:
            if block and not late() and (ways := _ways(shorter, planner, changes)):
                return [replace(way, typed=f"model.block_size={block} {way.typed}".strip()) for way in ways]
    return []
