"""Run one isolated, bounded trial: a setting goes into a child process, a plain result comes out.

Needs no torch: the parent of a sweep stays small and idle while a child measures.
"""

# 一次试跑：查配置，占住它，查以前测过没有，拿到设备的锁，起子进程，把它的结局变成一个 TrialResult
# jobs 与 auto_batch 都经 run_trial；无论子进程怎样结束，这里都给出一个状态和一行原因，classified 是全部的规则
# 同一设备上同一个人的试跑排队，否则互相弄坏计时；父进程不导入 torch，测量时它又小又闲

import contextlib
import os
import platform
import re
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nanogpt.base import language, run_names
from nanogpt.base.config import TrainConfig, check, plain
from nanogpt.base.errors import says_out_of_memory
from nanogpt.base.language import ConfigError, text
from nanogpt.base.lock import only_one
from nanogpt.data.assets import cache_folder
from nanogpt.sweep import earlier_results
from nanogpt.sweep.claims import claimed
from nanogpt.sweep.process import CHILD, Ended, place, run_child
from nanogpt.sweep.result import FIT, TrialResult, made
from nanogpt.sweep.spill import judge

# 没能变成 Python 异常的内存不足，日志里留下的话
ABORT_PHRASES = ("MemoryError", "Thread creation failed")


# 目标是损失的试跑，各有自己的训练目录：中断了从 checkpoint 接着走，晋级的也从这里走下去
RUNS = FIT / "runs"


def run_trial(
    cfg: TrainConfig, overrides: list[str], folder: Path, *, run_dir: Path | None = None,
    command: Sequence[str] = CHILD,
) -> TrialResult:
    """Measure one setting, or take what an earlier sweep measured; `folder` gets the child's log.

    With a loss as objective it trains in `run_dir` (None: one that only this setting and budget have), and goes on
    with what is there. A mistake in the config is a result too (status invalid). KeyboardInterrupt ends the child and
    is passed on, and nothing is recorded.
    """
    named = cfg.groups.get("experiment")
    common = {
        "overrides": overrides, "experiment": None if named in ("fit", "search") else named, "objective": cfg.objective,
    }
    try:
        check(cfg)
        refuse(cfg)
        if cfg.init_from and run_names.is_latest(cfg.init_from):
            # 记下真正的目录，结果才认得是哪些权重
            cfg.init_from = str(run_names.locate(cfg.init_from, key="init_from"))
    except ConfigError as error:
        return made({**common, "status": "invalid", "reason": str(error)})
    folder.mkdir(parents=True, exist_ok=True)
    key = earlier_results.key_of(cfg)
    # 先占试跑，再排队等设备：等别人量完时，不占着空闲的卡；记下之后才放开，等着的才找得到
    with claimed(earlier_results.claim_of(key)), _turn(cfg.device):
        # 占到了再查：别的进程、别的机器可能刚测完同一个
        earlier = None if cfg.trial.again else earlier_results.find(key)
        if earlier:
            return made({**vars(earlier), **common, "known": True})
        started, learns = time.perf_counter(), cfg.objective != "tokens_per_s"
        where = (run_dir or RUNS / key) if learns else folder
        job = {
            "config": plain(cfg), "overrides": overrides, "folder": where.as_posix(),
            "lang": language.current_language(),
        }
        signs = [where / "metrics.jsonl"] if learns else []
        ended = run_child(job, folder, timeout_s=cfg.trial.timeout_s, signs=signs, command=command)
        status, reason = classified(ended, cfg.trial.timeout_s)
        result = judge(made({**common, **ended.values, "key": key, "status": status, "reason": reason, "known": False,
                             "peak_gib": _peak(ended, status), "wall_s": time.perf_counter() - started}))
        earlier_results.keep(result)
        return result


def refuse(cfg: TrainConfig) -> None:
    """Refuse what a trial cannot try."""
    if cfg.resume:
        raise ConfigError("trial_not_with", key="resume", got=cfg.resume)
    if not isinstance(cfg.batch_size, int):
        raise ConfigError("trial_not_with", key="batch_size", got=cfg.batch_size)


def _peak(ended: Ended, status: str) -> Any:
    """What the child said, or, where it was killed on a CPU, what was seen from outside."""
    said = ended.values.get("peak_gib")
    outside = ended.rss_gib if status == "oom" and ended.values.get("device_type") == "cpu" else None
    return outside if said is None else said


def classified(ended: Ended, timeout_s: float) -> tuple[str, str]:
    """(status, reason in one line) of a child that has ended."""
    said = ended.values.get("status")
    if isinstance(said, str):
        # 它自己下了结论，之后怎么退出都不要紧
        return said, str(ended.values.get("reason", ""))
    phase = ended.values.get("phase", "start")
    if ended.killed == "timeout":
        return "timeout", text(
            "not done after {seconds:.0f} s (during: {phase}); raise trial.timeout_s if it was only slow",
            seconds=timeout_s, phase=phase,
        )
    if ended.killed == "memory":
        return "oom", text("ended at {rss:.2f} GiB, above the budget (during: {phase})", rss=ended.rss_gib, phase=phase)
    if says_out_of_memory(ended.log) or any(phrase in ended.log for phrase in ABORT_PHRASES):
        return "oom", ended.last_line
    if ended.returncode == -9 and ended.oom_kills != 0:
        # 不是我们杀的 SIGKILL：内核的 OOM killer
        return "oom", text("killed by the system, which was out of memory (during: {phase})", phase=phase)
    if ended.returncode == -9:
        # 内核没有为内存杀过谁：是人或别的程序，不能当成结论记下来
        return "crashed", text(
            "SIGKILL (during: {phase}): ended by someone, or by a program that guards the memory; the system itself "
            "ended nothing for want of memory",
            phase=phase,
        )
    return "crashed", text(
        "{how} (during: {phase}): {line}",
        how=_how(ended.returncode), phase=phase, line=ended.last_line or "-",
    )


def _how(returncode: int) -> str:
    """SIGABRT, or exit code 3."""
    if returncode < 0:
        try:
            return signal.Signals(-returncode).name
        except ValueError:
            # 实时信号没有名字
            return f"signal {-returncode}"
    return text("exit code {code}", code=returncode)


@contextlib.contextmanager
def _turn(device: str) -> Iterator[None]:
    """Wait until no other trial of this person is on the device."""
    path = lock_path(device)
    with contextlib.ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(only_one(path))
        except OSError as error:
            raise ConfigError(
                "the lock of trials {path} cannot be taken ({reason}); name a folder of your own with the environment "
                "variable NANOGPT_CACHE",
                path=path, reason=error.strerror,
            ) from None
        yield


def lock_path(device: str) -> Path:
    """The lock file of the device that `device=…` means here.

    GPUs that a launcher handed out have files of their own.
    """
    # auto 与 cuda 都是第一张看得见的卡；父进程不导入 torch，只能按名字分
    named = device if re.fullmatch(r"(cuda|xpu):[1-9]\d*", device) else "first"
    # Slurm 隔开各任务的卡之后，每个任务看自己的都是 0 号
    visible = place.get() or os.environ.get("SLURM_JOB_GPUS") or os.environ.get("CUDA_VISIBLE_DEVICES", "")
    # 不放公用的临时文件夹：谁都能先占住那个名字；主目录可能几台机器共用，名字里要有机器
    return cache_folder() / ("trial-" + re.sub(r"\W+", "-", f"{platform.node()}-{visible}-{named}") + ".lock")
