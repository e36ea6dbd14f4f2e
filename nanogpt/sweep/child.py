"""What the child process of one trial does: predict, limit its memory, train a few steps and report.

It is started by nanogpt.sweep.process with a job (JSON) on stdin and reports in lines of JSON that its parent merges.
"""

# 子进程里做的事：打开数据，预测，给自己的内存封顶，照真的训练造出训练器，走几步，量速度与峰值
# 由 process 启动，任务（JSON）从 stdin 来，结果一行行写进 report.jsonl，父进程把各行合起来；被杀在哪里，之前的都在
# 任何异常都变成一行结论，从不抛出；父进程一没，它和它启动的一切立刻结束
# 配置是使用者在父进程里敲的，里面的 _target_ 与在那里一样可信

import json
import math
import os
import select
import signal
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanogpt.base.config import TrainConfig
from nanogpt.base.hardware import GIB, allocator_cap, device_memory, free_ram
from nanogpt.base.language import ConfigError, set_language, text
from nanogpt.base.saved_config import typed_node
from nanogpt.plan.budget import process_bytes
from nanogpt.sweep.process import limit_memory, wait_for_end_of
from nanogpt.sweep.result import STEPS_FOR_LOSS

# 够量出采样的峰值，又不花时间
SAMPLE_TOKENS = 32
# 预测通常几秒；等不到就不要预测了
PREDICTION_S = 120
Emit = Callable[..., None]


@dataclass(frozen=True)
class Prediction:
    """What the planner says of a setting."""

    # 只有几个数：要从 fork 出的分身经管道送回来

    predicted_gib: float
    """Reserved by the CUDA allocator, or the whole process on a CPU; to compare with budget_gib."""
    budget_gib: float
    tokens_per_s: float | None
    fits: bool


def prediction(cfg: TrainConfig, device_type: str) -> Prediction | None:
    """The planner's verdict, or None where it has none for this setting on this device.

    A trial runs without a prediction too.
    """
    try:
        from nanogpt.plan.plan import predict

        plan = predict(cfg)
    except Exception:
        # 预测只是参考：出错就记进日志，照样试跑
        traceback.print_exc()
        return None
    if plan.budget.device_type != device_type:
        # 为一张这里没有的卡做的计划，与这次试跑无关
        return None
    # 上下文与桌面不归分配器管：显存比的是 reserved，内存比的是整个进程
    on_cuda = device_type == "cuda"
    needed, available = (plan.reserved, plan.budget.capacity) if on_cuda else (plan.total, plan.budget.total)
    return Prediction(needed / GIB, available / GIB, plan.tokens_per_s, plan.verdict != "does_not_fit")


def prediction_aside(cfg: TrainConfig, device_type: str) -> Prediction | None:
    """The same from a forked copy of this process (Linux, CPU).

    What the planner loads would otherwise count into the peak of the trial.
    """
    if device_type != "cpu" or sys.platform != "linux":
        # 显存的峰值不受影响；没有安全的 fork 就在这里算
        return prediction(cfg, device_type)
    # 在分身之前量：分身里只有碰过的页才算常驻
    process_bytes(cfg)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            plan = prediction(cfg, device_type)
            os.write(writer, json.dumps(asdict(plan) if plan else None).encode("ascii"))
        finally:
            sys.stderr.flush()
            os._exit(0)
    os.close(writer)
    try:
        ready, _, _ = select.select([reader], [], [], PREDICTION_S)
        answer = os.read(reader, 65536) if ready else b""
    finally:
        os.close(reader)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    values = json.loads(answer or b"null")
    return Prediction(**values) if values else None


def run(job: dict[str, Any]) -> None:
    """Entry point: carry out the job and leave; never raises."""
    _leave_with_parent(job.get("parent"))
    set_language(job["lang"])
    with open(job["report"], "a", encoding="utf-8", newline="\n") as file:

        def emit(**values) -> None:
            file.write(json.dumps(values) + "\n")
            file.flush()

        try:
            measure(typed_node(TrainConfig, job["config"]), job["overrides"], Path(job["folder"]), emit)
        except BaseException as error:
            # 子进程的结局就是报告：任何异常都要变成一行
            traceback.print_exc()
            emit(status=verdict_of(error), reason=_reason(error))
    sys.stdout.flush()
    sys.stderr.flush()
    # 不等 torch 的清理：CUDA 出错之后它可能挂住
    os._exit(0)


def _leave_with_parent(parent: int | None = None) -> None:
    """End this process and all that it started when its parent (a process id) has ended or was killed."""
    leads = os.name != "nt" and os.getpgrp() == os.getpid()
    if leads and sys.platform == "linux":
        _end_group_with_pipe(sys.stdin.fileno())

    def watch() -> None:
        wait_for_end_of(parent)
        if leads:
            # 数据进程、预测的分身都在这一组里
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _end_group_with_pipe(descriptor: int) -> None:
    """Let the kernel end the whole group, by SIGIO, when the other end of a pipe is closed (Linux)."""
    import fcntl

    # 卡在 C 代码里又不放 GIL 的进程，自己的线程醒不过来
    fcntl.fcntl(descriptor, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_ASYNC)


def verdict_of(error: BaseException) -> str:
    """oom, diverged, invalid or crashed."""
    from nanogpt.base.errors import OutOfMemory, is_out_of_memory, says_out_of_memory
    from nanogpt.run.health import Diverged

    if isinstance(error, ConfigError):
        # 更新、评估、样本里的显存不足已经变成一句话，但仍是显存不足
        oom = isinstance(error, OutOfMemory) or error.message == "sample_oom"
        return "oom" if oom else "diverged" if isinstance(error, Diverged) else "invalid"
    # 限额之下，开线程、映射文件也会先失败
    words = str(error)
    return "oom" if is_out_of_memory(error) or says_out_of_memory(words) or "start new thread" in words else "crashed"


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, ConfigError):
        return lines[0]
    # “[enforce fail at …] err == 0. ” 这类前缀对使用者没有意义
    line = lines[0].rpartition("] ")[2].removeprefix("err == 0. ") if lines else ""
    return line if isinstance(error, MemoryError) and line else f"{type(error).__name__}: {line}".rstrip(": ")


# ---- 试跑 ----


def measure(
    cfg: TrainConfig, overrides: list[str], folder: Path, emit: Emit, *, predict=prediction_aside, limit=limit_memory
) -> None:
    """Open the data, predict, set the memory limit, train a few steps, and emit what was found."""
    import torch

    from nanogpt.run.session import Session
    from nanogpt.run.summary import device_name
    from nanogpt.sweep import learning

    emit(phase="data")
    learns = cfg.objective != "tokens_per_s"
    if learns and not cfg.trial.again and (found := learning.finished(cfg, folder)):
        # 上次训完了，还没来得及记下
        emit(**found, status="ok")
        return
    session = learning.session(cfg, folder, overrides) if learns else Session.new(cfg, folder, overrides)
    device = session.device
    free, total = _free_and_total(device)
    budget = _budget(cfg, device.type, free)
    emit(
        device=device_name(device), free_gib=free / GIB, total_gib=total / GIB, budget_gib=budget,
        device_type=device.type, phase="prediction",
    )
    plan = predict(cfg, device.type)
    if plan:
        emit(predicted_gib=plan.predicted_gib, predicted_tokens_per_s=plan.tokens_per_s)
        if cfg.trial.skip_predicted and not plan.fits:
            emit(status="skipped", reason=text(
                "predicted {predicted:.1f} GiB > {budget:.1f}",
                predicted=plan.predicted_gib, budget=plan.budget_gib,
            ))
            return
    if device.type == "cpu":
        # 显存由分配器封顶；内存由操作系统封顶，父进程再看一道
        limit(budget)
        emit(watch_gib=budget)
    _forget_peak()
    emit(phase="build")
    try:
        if learns:
            emit(phase="training")
            emit(**learning.train(session, cfg, folder))
        else:
            emit(**_time(session, cfg, emit))
    finally:
        # 显存不足时也要说峰值到了哪里
        emit(**_peaks(device, torch))
    emit(status="ok")


def _time(session, cfg: TrainConfig, emit: Emit) -> dict[str, float]:
    """Warm up, time the steps, then touch the other peaks: one evaluation, one short sample."""
    from nanogpt.core.machine import synchronize
    from nanogpt.sweep.trial_trainer import TrialTrainer

    trainer = session.build_trial(TrialTrainer)
    emit(micro_batch=trainer.micro_batch, effective_batch=trainer.global_rows, precision=trainer.precision.label)
    emit(phase="warmup")
    for _ in range(cfg.trial.warmup_steps):
        trainer.step()
    emit(phase="steps")
    seconds, result = [], None
    for _ in range(cfg.trial.steps):
        started = time.perf_counter()
        result = trainer.step()
        # 不同步只量到把任务排进队列的时间
        synchronize(trainer.device)
        seconds.append(time.perf_counter() - started)
    # 中位数：机器上别的程序偶尔插进来，不该算在这个设置头上
    typical = statistics.median(seconds)
    found = {"step_ms": typical * 1000, "tokens_per_s": trainer.global_rows * trainer.block_size / typical}
    emit(phase="evaluation", **found)
    long_enough = cfg.trial.warmup_steps + cfg.trial.steps >= STEPS_FOR_LOSS
    val_loss = trainer.evaluate() if long_enough else trainer.evaluate_once()
    if long_enough:
        losses = {"train_loss": result.loss, "val_loss": val_loss}
        found |= {name: loss for name, loss in losses.items() if math.isfinite(loss)}
    emit(phase="sample")
    trainer.short_sample(min(cfg.sample_tokens, SAMPLE_TOKENS))
    return found


# ---- 内存 ----


def _free_and_total(device) -> tuple[int, int]:
    """Bytes free and in all on the device, now."""
    import psutil

    if device.type != "cpu":
        return device_memory(device)
    return free_ram(), psutil.virtual_memory().total


def _budget(cfg: TrainConfig, device_type: str, free: int) -> float:
    """GiB that this trial may use, where the planner has not said."""
    if device_type == "cpu":
        return cfg.hardware.ram_gib or free / GIB
    # 大卡按小卡的显存封顶时，此刻空闲的也可能更少
    cap = allocator_cap(cfg.hardware)
    return (free if cap is None else min(cap, free)) / GIB


def _forget_peak() -> None:
    """Start the peak of resident memory anew: preparing data is no part of training (Linux only)."""
    if sys.platform == "linux":
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            # 有的容器不许写；峰值就包含准备数据
            pass


def _peaks(device, torch) -> dict[str, float | None]:
    from nanogpt.run.metrics import memory_gib, peak_resident

    if device.type == "mps":
        found = memory_gib(device)
        return {"peak_gib": found["allocated"], "reserved_gib": found["peak"]}
    if device.type != "cpu":
        card = getattr(torch, device.type)
        return {
            "peak_gib": card.max_memory_allocated(device) / GIB, "reserved_gib": card.max_memory_reserved(device) / GIB,
        }
    return {"peak_gib": peak_resident() / GIB}
