"""What to type when a setting does not fit: the cheapest overrides, each traced in full and priced."""

import time
from dataclasses import dataclass, replace

from nanogpt.config import TrainConfig, check
from nanogpt.console import Console
from nanogpt.fit.plan import TIGHT, Plan, Planner
from nanogpt.messages import ConfigError

LINES = 5
SECONDS = 25.0
"""No further candidate is looked at after that long."""
USEFUL = 0.995
"""A change counts where it brings the peak below this part of what it was."""


@dataclass(frozen=True)
class Change:
    """Fields of memory= that trade something for memory, and how they are typed."""

    typed: str
    fields: dict[str, object]


IN_BACKWARD = Change("memory.optimizer_in_backward=true", {"optimizer_in_backward": True})
LEAN = Change("memory=lean", {"activation_checkpointing": "every_block", "loss_chunk_mib": 16})
INT8 = Change("memory.optimizer_state=int8", {"optimizer_state": "int8"})
BF16 = Change("memory.weights=bf16", {"weights": "bf16"})
OFFLOAD = Change("memory.offload_optimizer=true", {"offload_optimizer": True})
# 单项：新的 memory 键在这里加一行就会被考虑；这一版还没实现的不会降低峰值，自然落选
SINGLE = (
    LEAN,
    Change("memory.activation_checkpointing=selective", {"activation_checkpointing": "selective"}),
    IN_BACKWARD, INT8, BF16, OFFLOAD,
    Change("memory.loss_chunk_mib=16", {"loss_chunk_mib": 16}),
)
# 单项都不够时依次加码
COMBINED = (
    (LEAN, INT8), (LEAN, OFFLOAD), (LEAN, INT8, BF16), (LEAN, INT8, IN_BACKWARD), (LEAN, INT8, BF16, IN_BACKWARD),
    (LEAN, BF16, IN_BACKWARD, OFFLOAD),
)
BLOCKS = (2, 4, 8)
"""Divisors of block_size, tried last: a shorter context is another model."""


@dataclass(frozen=True)
class Advice:
    """Overrides that make it fit."""

    typed: str
    speed: float
    """Tokens/s relative to the setting that does not fit."""
    plan: Plan


def advise(plan: Plan, planner: Planner) -> list[Advice]:
    """At most LINES ways to make plan.cfg fit, the fastest first; single changes before combinations."""
    until = time.monotonic() + SECONDS
    found = _ways(plan, planner, ())
    useful = [change for change in SINGLE if time.monotonic() < until and _is_useful(change, plan, planner)]
    combined = [changes for changes in COMBINED if all(c in useful for c in changes)]
    for level in ([(c,) for c in useful], combined):
        for changes in level:
            if len(found) < LINES and time.monotonic() < until:
                found += _ways(plan, planner, changes)
        if found:
            break
    if not found:
        found = _shorter(plan, planner, [(), *combined, *((c,) for c in useful)], until)
    return sorted((a for a in found if not any(_beats(b, a) for b in found)), key=lambda a: -a.speed)[:LINES]


def _beats(one: Advice, other: Advice) -> bool:
    """Whether fewer overrides are at least as fast."""
    return set(one.typed.split()) < set(other.typed.split()) and one.speed >= other.speed


def show(plan: Plan, planner: Planner, console: Console) -> None:
    """Print the advice for a plan that does not fit."""
    found = advise(plan, planner)
    console.line("plan_advice" if found else "plan_no_advice")
    for advice in found:
        console.plain(f"  {advice.speed:.2f}x  {advice.typed}")


def changed(cfg: TrainConfig, changes: tuple[Change, ...]) -> TrainConfig | None:
    """cfg with the changes; None where the parts contradict each other."""
    fields = {key: value for change in changes for key, value in change.fields.items()}
    if any(getattr(cfg.memory, key) == value and len(change.fields) == 1 for change in changes for key, value in change.fields.items()):
        return None
    candidate = replace(cfg, memory=replace(cfg.memory, **fields))
    if fields.get("activation_checkpointing"):
        candidate.memory.activation_budget_mib = None
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


def _ways(plan: Plan, planner: Planner, changes: tuple[Change, ...]) -> list[Advice]:
    """The changes at the present batch size, or else at the largest smaller one with the same effective batch."""
    total = plan.batch_size * plan.accumulation if plan.cfg.global_batch_size is None else plan.cfg.global_batch_size
    sizes = [b for b in range(plan.batch_size, 0, -1) if total % b == 0 or b == plan.batch_size]
    tried = 0
    for rows in sizes:
        accumulation = -(-total // rows)
        batch = {} if rows == plan.batch_size else {"batch_size": rows, "gradient_accumulation_steps": accumulation, "global_batch_size": None}
        candidate = changed(replace(plan.cfg, **batch), changes)
        if candidate is None or not planner.estimate(candidate).fits(rows, planner.budget, TIGHT):
            continue
        outcome = planner.judge(candidate, plan.vocab_source)
        if outcome.verdict == "fits":
            return [Advice(_typed(batch, plan.cfg, changes), outcome.tokens_per_s / plan.tokens_per_s, outcome)]
        tried += 1
        if tried == 2:
            break
    return []


def _typed(batch: dict[str, int | None], cfg: TrainConfig, changes: tuple[Change, ...]) -> str:
    """The overrides as one pastes them; global_batch_size only where it was set."""
    keys = [key for key in batch if key != "global_batch_size" or cfg.global_batch_size]
    return " ".join([*(f"{key}={'null' if batch[key] is None else batch[key]}" for key in keys), *(change.typed for change in changes)])


def _shorter(plan: Plan, planner: Planner, levels: list[tuple[Change, ...]], until: float) -> list[Advice]:
    """The longest shorter context that fits with one of the changes."""
    for divisor in BLOCKS:
        block = plan.cfg.model.block_size // divisor
        shorter = replace(plan, cfg=replace(plan.cfg, model=replace(plan.cfg.model, block_size=block)))
        for changes in levels:
            if block and time.monotonic() < until and (ways := _ways(shorter, planner, changes)):
                return [replace(way, typed=f"model.block_size={block} {way.typed}".strip()) for way in ways]
    return []
