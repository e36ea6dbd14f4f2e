"""Predicted against measured memory under the caps of small cards; large models really train there.

A plan needs no card and some seconds of a CPU: `make_plans` makes them beforehand.
"""

import functools
from collections.abc import Iterator

from card_parts.kit import GIB, GPT2_VOCAB, Case, Lab, profile

from nanogpt.base.config import TrainConfig
from nanogpt.core.compilation import compile_updates
from nanogpt.plan.plan import BATCHES, Planner
from nanogpt.sweep.child import verdict_of
from nanogpt.sweep.trial_trainer import TrialTrainer

CARD = ("hardware=rtx3060_12gb", "optimizer=adamw")
# 名字 -> (overrides, 步数)
SETTINGS = {
    "gpt2_xl minimal 1, 8 GB": (("experiment=gpt2_xl_8gb",), 10),
    "gpt2 bf16 8": ((*CARD, "model=gpt2", "precision=bf16", "batch_size=8"), 3),
    "gpt2 bf16 12": ((*CARD, "model=gpt2", "precision=bf16", "batch_size=12"), 3),
    "gpt2 bf16 16": ((*CARD, "model=gpt2", "precision=bf16", "batch_size=16"), 3),
    "gpt2 fp32 12": ((*CARD, "model=gpt2", "precision=fp32", "batch_size=12"), 3),
    "gpt2 bf16 12, dropout": ((*CARD, "model=gpt2", "precision=bf16", "batch_size=12", "dropout=0.1"), 3),
    "gpt2 bf16 lean 32": ((*CARD, "model=gpt2", "precision=bf16", "memory=lean", "batch_size=32"), 3),
    "medium fp16 16": ((*CARD, "model=medium", "precision=fp16", "batch_size=16"), 3),
    "gpt2_medium bf16 4": ((*CARD, "model=gpt2_medium", "precision=bf16", "batch_size=4"), 3),
    "gpt2_medium bf16 lean 16": ((*CARD, "model=gpt2_medium", "precision=bf16", "memory=lean", "batch_size=16"), 3),
    "large bf16 3": ((*CARD, "model=large", "precision=bf16", "batch_size=3"), 3),
    "gpt2_large minimal 16": ((*CARD, "model=gpt2_large", "precision=bf16", "memory=minimal", "batch_size=16"), 3),
    "gpt2_xl minimal 24": ((*CARD, "model=gpt2_xl", "precision=bf16", "memory=minimal", "batch_size=24"), 3),
    "gpt_3b minimal 1": (("experiment=gpt_3b_12gb",), 4),
    "gpt_3b minimal 2": (("experiment=gpt_3b_12gb", "batch_size=2"), 3),
}
# 每个的最大批量由计划说了算：它要能训，再大一档要真的放不下；计划按会累积来算
LARGEST = {
    "gpt2 bf16": (*CARD, "model=gpt2", "precision=bf16"),
    "gpt2 bf16 lean": (*CARD, "model=gpt2", "precision=bf16", "memory=lean"),
    "medium bf16": (*CARD, "model=medium", "precision=bf16"),
    "gpt2_medium bf16 lean8": (*CARD, "model=gpt2_medium", "precision=bf16", "memory=lean8"),
}
TWICE = "gradient_accumulation_steps=2"
TINY = ("model.n_layer=2", "model.n_embd=32", "model.n_head=2", "model.block_size=16", "precision=bf16", "batch_size=2")
TOY = {"tiny bf16 2": (("hardware=rtx3060_8gb", *TINY), 2)}


def settings(lab: Lab) -> dict[str, tuple[tuple[str, ...], int]]:
    """Name -> (overrides, steps)."""
    return TOY if lab.pretend else SETTINGS


def config(lab: Lab, overrides: tuple[str, ...]) -> TrainConfig:
    """The config of a setting at GPT-2's vocabulary."""
    data, vocab = ("letters", 64) if lab.pretend else ("gpt2", GPT2_VOCAB)
    return lab.config(*overrides, f"model.vocab_size={vocab}", data=data)


# ---- 计划 ----


def make_plans(lab: Lab, say=print) -> dict[str, dict]:
    """The plan of every setting, and of the largest batches and the next ones, under their names."""
    made = {}
    for name, (overrides, _) in settings(lab).items():
        made[name] = planned(config(lab, overrides))
        say(f"{name:26s} {made[name]['reserved'] / GIB:6.2f} GiB  {made[name]['verdict']}")
    for name, overrides in {} if lab.pretend else LARGEST.items():
        cfg = config(lab, (*overrides, "batch_size=1", TWICE))
        cfg.device = "auto"
        rows = Planner(cfg).largest_batch(cfg, BATCHES) or 0
        following = next((batch for batch in BATCHES if batch > rows), None)
        made[f"largest {name}"] = {"batch_size": rows, "next": following}
        for batch in filter(None, (rows, following)):
            made[f"{name} {batch}, accumulated"] = planned(config(lab, (*overrides, f"batch_size={batch}", TWICE)))
        say(f"{name:26s} {rows} rows fit, then {following}: {made[f'{name} {following}, accumulated']['verdict']}")
    return made


def planned(cfg: TrainConfig) -> dict:
    """What is compared of a plan."""
    cfg.device = "auto"
    plan = Planner(cfg).predict(cfg)
    return {
        "allocated": plan.allocated, "reserved": plan.reserved, "verdict": plan.verdict,
        "tokens_per_s": plan.tokens_per_s,
        "capacity": plan.budget.capacity,
    }


# ---- 实测 ----


def cases(lab: Lab) -> Iterator[Case]:
    """Every quick setting, the largest batches, then the large models."""
    # 大模型每个要十几秒到半分钟：时间不够时，宁可少量一个大的
    slow = [name for name in settings(lab) if name.startswith(("gpt2_xl", "gpt_3b", "gpt2_large"))]
    for name, (overrides, steps) in settings(lab).items():
        if name not in slow:
            yield name, functools.partial(measured, lab, name, overrides, steps)
    for name, overrides in {} if lab.pretend else LARGEST.items():
        for which, words in (("batch_size", "largest"), ("next", "one step more")):
            if rows := lab.plans.get(f"largest {name}", {}).get(which):
                more = (*overrides, f"batch_size={rows}", TWICE)
                yield f"{name} {rows}, {words}", functools.partial(measured, lab, f"{name} {rows}, accumulated", more, 3)
    for name in slow:
        yield name, functools.partial(measured, lab, name, *settings(lab)[name])


def measured(lab: Lab, name: str, overrides: tuple[str, ...], steps: int) -> dict:
    """Steps, an evaluation and a short sample under the cap, beside what the plan said."""
    cfg = config(lab, overrides)
    expected = lab.plans.get(name) or planned(config(lab, overrides))
    if lab.total < expected["capacity"]:
        return {"skipped": f"the card has {lab.total / GIB:.1f} GiB, this needs {expected['capacity'] / GIB:.1f}"}
    found = train(lab, cfg, steps)
    ran = found.get("ran")
    # 说放得下就要放得下；说放不下的，放不下才对；tight 两样都行
    ok = ran if expected["verdict"] == "fits" else expected["verdict"] == "tight" or not ran or lab.pretend
    return {"ok": bool(ok), "expected": expected, **found, **errors(expected, found)}


def train(lab: Lab, cfg: TrainConfig, steps: int) -> dict:
    """Whether it ran, peak bytes, tokens/s."""
    try:
        trainer = lab.trainer(cfg, TrialTrainer)
        # 与 compile=auto 一样：只有 8 位的更新要编，几秒而已
        compile_updates(trainer.optimizer, "auto", lab.device, trainer.console)
        lab.forget_peak()
        trainer.step()
        seconds = lab.seconds(trainer.step, count=max(1, steps - 3))
        trainer.evaluate_once()
        trainer.short_sample(8)
    except Exception as error:
        if verdict_of(error) != "oom":
            raise
        return {"ran": False, **lab.peaks(), "said": str(error).splitlines()[0][:200]}
    found = {"ran": True, **lab.peaks(), "step_s": seconds}
    found["tokens_per_s"] = trainer.global_rows * trainer.block_size / seconds
    # 大模型的一步花在哪里
    return {**found, **profile(lab, trainer.step, 1)} if steps >= 10 else found


def errors(expected: dict, found: dict) -> dict[str, float]:
    """Predicted over measured, less one, where it ran."""
    kinds = [kind for kind in ("allocated", "reserved") if found["ran"] and found[kind]]
    return {f"error_{kind}": expected[kind] / found[kind] - 1 for kind in kinds}
