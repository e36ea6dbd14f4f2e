"""What each job of a sweep of trials does, and what happens when the last one is done.

Needs no torch.
"""

# 扫描与 Hydra 的接口：trial_job 是每个任务做的事，SweepReport 是 Hydra 的回调，最后一个任务之后写报告
# 任务之间只靠各自目录里的 trial.json 相通：结束时收齐、认出溢出的、排名次，退出码说明有没有意外
# 这里不导入 torch：扫描的父进程要小，也不能先占住显存

import functools
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from nanogpt.base.config import TrainConfig
from nanogpt.base.console import duration
from nanogpt.base.errors import EXIT_INTERRUPTED, leave
from nanogpt.base.language import ConfigError, say, show, text, wrapped
from nanogpt.sweep import result as results
from nanogpt.sweep.auto_batch import settled
from nanogpt.sweep.result import EXPECTED, FIT, STATUS_MESSAGES, TrialResult
from nanogpt.sweep.spill import judge_all
from nanogpt.sweep.trial import run_trial


def trial_job(cfg: TrainConfig, overrides: list[str]) -> float:
    """Run one trial, leave its result in cfg.out_dir/trial.json, and return what the objective asks for.

    Outside a sweep the process ends with the exit code that a sweep of this one trial would have.
    """
    folder = Path(cfg.out_dir) if cfg.out_dir else FIT / time.strftime("%Y-%m-%d_%H-%M-%S")
    try:
        result = runner(cfg)(cfg, overrides, folder)
        results.write(result, folder / "trial.json")
    except KeyboardInterrupt:
        say("search_interrupted")
        sys.exit(EXIT_INTERRUPTED)
    except OSError as error:
        raise ConfigError("not_writable", path=folder, reason=error.strerror) from None
    show(wrapped(line_of(result), sys.stdout))
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.RUN and (code := exit_code([result])):
        sys.exit(code)
    return result.score


@functools.cache
def _on_ray(one_kind: bool) -> Callable[..., TrialResult]:
    from nanogpt.sweep.ray_trials import RayTrials

    return RayTrials(one_kind=one_kind)


def runner(cfg: TrainConfig, *, one_kind: bool = False) -> Callable[..., TrialResult]:
    """What runs trials: run_trial here, or its like on a Ray cluster; one_kind: all of them on one kind of card.

    With batch_size=auto the micro-batch is settled first.
    """
    return functools.partial(settled, _on_ray(one_kind) if cfg.launch.name == "ray" else run_trial)


def line_of(result: TrialResult) -> str:
    """What the console says of one trial when it is done."""
    # 说明“这是试跑、怎样试”的不必说
    typed = [o for o in result.overrides if not o.startswith(("experiment=fit", "trial.", "lang=", "objective="))]
    # 敲下时就已写死的，每个任务都一样，不必重复
    what = ", ".join([o for o in typed if o not in sys.argv] or typed) or text("trial_defaults")
    if result.status == "ok" and result.objective != "tokens_per_s":
        line = text(
            "trial {what}: {objective} {value:.4f} after {time}, {tokens:,} tokens",
            what=what, objective=result.objective, value=result.value, time=duration(60 * (result.minutes or 0.0)),
            tokens=result.tokens or 0,
        )
    elif result.status == "ok":
        line = text(
            "trial {what}: {speed:,.0f} tokens/s, {held:.2f} of {budget:.2f} GiB",
            what=what, speed=result.tokens_per_s, held=result.held_gib or 0.0, budget=result.budget_gib or 0.0,
        )
    else:
        line = text(
            "trial {what}: {status}: {reason}",
            what=what, status=text(STATUS_MESSAGES[result.status]), reason=result.reason,
        )
    return line + (text(" (known from before)") if result.known else "")


def exit_code(found: list[TrialResult]) -> int:
    """0 when every trial ended in an expected way and at least one is ok, else 1."""
    return int(not (any(r.status == "ok" for r in found) and all(r.status in EXPECTED for r in found)))


class SweepReport(Callback):
    """Hydra callback: when a sweep of trials is done, report it and let the exit code tell the truth."""

    # 普通的 -m 训练也会经过它：没有 trial.json 就什么也不做

    def on_multirun_start(self, config: DictConfig, **_kwargs: Any) -> None:
        if swept := [word for word in config.hydra.overrides.task if re.match(r"\+*objective=.*,", word)]:
            # 损失与速度排不成一列
            leave(ConfigError(
                "{got}: a sweep is ranked by one objective; type one of val_bpb | val_loss | tokens_per_s",
                got=swept[0],
            ))
        # 自己指定了 hydra.sweep.dir 时，上一次扫描留下的不能算进这一次
        for stale in Path(config.hydra.sweep.dir).glob("*/trial.json"):
            stale.unlink()

    def on_multirun_end(self, config: DictConfig, **_kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        found = judge_all(results.collect(folder))
        if not found:
            # 普通的 -m 训练，没有试跑
            return
        try:
            if found[0].objective == "tokens_per_s":
                from nanogpt.sweep.report import write_report as write
            else:
                from nanogpt.sweep.learning_report import write_trials as write
            write(found, folder, margin=config.trial.margin)
        except OSError as error:
            # Hydra 会把回调里的异常压成警告；写不出报告要让退出码知道
            say("error", line=text("not_writable", path=folder, reason=error.strerror))
            raise SystemExit(1) from None
        code = exit_code(found)
        sys.stdout.flush()
        if code:
            raise SystemExit(code)
