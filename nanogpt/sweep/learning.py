"""What a trial does whose objective is a loss: a real training in a folder of its own, begun or gone on with."""

# 目标是损失的试跑：一次真的短训练，与 run_train.py 的完全一样，在自己的训练目录里
# 子进程（child）调用：目录里已有 checkpoint 就接着走，中断过的、晋级到更长预算的，都是同一条路
# 结果取自训练自己写下的 metrics.jsonl 与 summary.json：被杀之前的那一段也在里面

import contextlib
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from nanogpt.base.config import TrainConfig, effective_batch
from nanogpt.base.hashed_json import DamagedError, read_object
from nanogpt.base.language import ConfigError
from nanogpt.base.saved_config import saved_in
from nanogpt.run.loggers import history

# 晋级时会变的键：走多远，以及平台之后怎样收尾；其余的与开始时一样
BUDGET = (
    "max_iters", "max_tokens", "max_minutes", "lr_schedule", "lr_decay_iters", "decay_fraction", "eval_interval",
    "save_interval",
)
# 没有、没走完、读不了的训练目录
NOT_THERE = (OSError, DamagedError, ValueError, KeyError, TypeError, ConfigError)


def budget_of(cfg: TrainConfig) -> dict[str, Any]:
    """The keys that say how long a training is."""
    known = {field.name for field in fields(cfg)}
    return {key: getattr(cfg, key) for key in BUDGET if key in known}


def session(cfg: TrainConfig, run_dir: Path, overrides: list[str]):
    """The training in run_dir: a new one, or the one that is there with this budget laid over it."""
    from nanogpt.run.session import Hooks, Session
    from nanogpt.weights.checkpoint import listed

    # 存下的是一次普通的训练：往后也能照常接着训；latest 仍是人自己训的那一次
    again = cfg.trial.again
    cfg, hooks = replace(cfg, trial=replace(cfg.trial, enabled=False, again=False)), Hooks(remember=False)
    # 已经走到更远的级里去了：那里的权重不是这一级的，重测才从头来
    beyond = cfg.max_iters is not None and any(one.iteration > cfg.max_iters for one in listed(run_dir).good)
    anew = again and (beyond or _trained_before(cfg, run_dir))

    def begun(overwrite: bool) -> Session:
        return Session.new(replace(cfg, out_dir=str(run_dir), overwrite=overwrite), run_dir, overrides, hooks)

    if anew or not (run_dir / "run.json").is_file():
        return begun(anew)
    if not _is_over(cfg, run_dir):
        # 有总结，就是这个预算走完了：见 finished
        (run_dir / "summary.json").unlink(missing_ok=True)
    typed = [f"{key}={'null' if value is None else value}" for key, value in budget_of(cfg).items()]
    # 同一条命令再来一次：死在最后一个 checkpoint 与总结之间的，补上总结就是
    same = None if beyond else str(run_dir)
    try:
        return Session.resume(replace(cfg, resume=str(run_dir), out_dir=same), typed, run_dir, hooks)
    except ConfigError:
        if not _is_damaged(run_dir):
            raise
        # 接不下去的试训不必问人，从头再来
        return begun(True)


def _is_damaged(run_dir: Path) -> bool:
    """Whether the checkpoint from which the training there would go on cannot be used."""
    from nanogpt.weights.checkpoint import find

    try:
        find(run_dir, "last")
    except ConfigError:
        return any((run_dir / "ckpt").glob("iter_*"))
    return False


def _trained_before(cfg: TrainConfig, run_dir: Path) -> bool:
    """Whether the training that is there has come to the end of this budget, or went beyond it."""
    # 下一级的预算更长：重测的那一次，也是从上一级接着走
    try:
        reached = saved_in(run_dir)["max_iters"]
    except NOT_THERE:
        return False
    return (run_dir / "summary.json").is_file() and (None in (reached, cfg.max_iters) or reached >= cfg.max_iters)


def train(begun, cfg: TrainConfig, run_dir: Path) -> dict[str, Any]:
    """Train to the end of the budget; what a TrialResult holds of it."""
    from nanogpt.sweep.trial_trainer import LearningTrainer

    summary = begun.run(LearningTrainer)
    if summary["stopped_by"] == "interrupted":
        # 被人叫停的不是结果：不记，下次接着训
        raise InterruptedError(f"told to end at iteration {summary['iters']}")
    # 不从文件里读：总结写不下的，那一眼也不白看
    return outcome(cfg, run_dir, summary)


def finished(cfg: TrainConfig, run_dir: Path) -> dict[str, Any] | None:
    """The outcome of a training that has already come to the end of this budget, else None."""
    from nanogpt.sweep.trial_trainer import looks

    try:
        summary = _summary(cfg, run_dir)
        # 训完了，还没来得及看一眼验证部分：再来一次，一步也不训，只看
        return None if looks(cfg, summary) and "validation" not in summary else outcome(cfg, run_dir, summary)
    except NOT_THERE:
        # 还没有、没走完、读不了：照常训练
        return None


def _is_over(cfg: TrainConfig, run_dir: Path) -> bool:
    """Whether all of this budget is trained, looked at the validation split or not."""
    with contextlib.suppress(*NOT_THERE):
        return bool(_summary(cfg, run_dir))
    return False


def _summary(cfg: TrainConfig, run_dir: Path) -> dict[str, Any]:
    """summary.json of a training to the end of this budget; what is no such training raises."""
    saved = saved_in(run_dir)
    if any(saved[key] != value for key, value in budget_of(cfg).items()):
        raise DamagedError("another budget")
    summary = read_object(run_dir / "summary.json")
    if summary["stopped_by"] == "interrupted":
        raise DamagedError("not over")
    return summary


def outcome(cfg: TrainConfig, run_dir: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """What a finished training reached; ConfigError where there is no number for the objective."""
    iters = max(1, summary["iters"])
    curve = [
        # 步子一样长：第几步就是几分之几的时间
        (record["tokens"], summary["train_s"] / 60 * record["iteration"] / iters, record["val/loss"])
        for record in history(run_dir)[0] if "val/loss" in record
    ]
    found = {"val_loss": summary["best_val_loss"], "val_bpb": summary.get("best_val_bpb")}
    value = found[cfg.objective]
    if value is None or not math.isfinite(value):
        raise ConfigError(
            "objective={objective} never appeared: no evaluation within the budget gave a finite number; raise the "
            "budget, lower learning_rate or choose another objective",
            objective=cfg.objective,
        )
    return {
        **found, "curve": curve, "iters": summary["iters"], "tokens": summary["tokens"],
        "minutes": summary["train_s"] / 60, "tokens_per_s": summary["tokens_per_s"],
        "step_ms": summary["train_s"] * 1000 / iters, "micro_batch": summary["micro_batch"],
        "effective_batch": effective_batch(cfg),
        "precision": summary["precision"], "run_dir": run_dir.as_posix(),
        "validation": summary.get("validation", {}).get(cfg.objective),
    }
