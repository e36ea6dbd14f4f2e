"""What the attacks share: how many cases, run_train.py in a fork, bit-exact comparison of two runs."""

# 攻击分两种长度：平时的 pytest 每种只攻几次，抽到的案例固定；pytest -m torture 每种攻几百次，每回都不同
# 案例由 hypothesis 抽取，出错时它会印出那一个案例；长的形式用 --hypothesis-seed=… 重做同一轮
# 训练在 fork 出来的子进程里跑：torch 不必重新导入，一次训练只要零点几秒，随时可以杀掉

import contextlib
import json
import math
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import ROOT, corpus_text, tiny
from hypothesis import settings

# fork 之前就导入：子进程不必各自再花几秒
import nanogpt.run.session  # noqa: F401
from nanogpt.base.language import ConfigError
from nanogpt.weights import checkpoint
from nanogpt.weights.tensors import floating, read_tensors

LONG = settings.get_current_profile_name() == "long"
POSIX = pytest.mark.skipif(os.name == "nt", reason="the attack forks")
ONLY_LONG = pytest.mark.skipif(not LONG, reason="takes minutes: pytest -m torture")
# 已经用过 CUDA 的进程不能 fork：有显卡的机器上另起一个干净的进程来 fork
FORKS = None if os.name == "nt" else multiprocessing.get_context("forkserver" if torch.cuda.is_available() else "fork")
GIVEN_UP_S = 600 if LONG else 120
# 改动文件的审计事件；fsync 没有事件，它前后总有别的
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")
RUN = Path("outputs/run")
SAVE_INTERVAL = 3
TINY = (
    "dataset=text_file", "dataset.path=my.txt", "dataset.dir=prepared", "model.n_layer=1", "model.n_head=2", "model.n_embd=16",
    "model.block_size=16", "model.ngrams=[2]", "model.ngram_buckets=31", "batch_size=4", "logger=none", "sample_tokens=0", "eval_tokens=64",
    "eval_interval=5", f"save_interval={SAVE_INTERVAL}", "log_interval=1", f"max_iters={30 if LONG else 12}", "warmup_iters=2", "dropout=0.1", "lang=en",
    "device=cpu", "hardware.peak_tflops_fp32=1", "hardware.peak_tflops_half=1",
)


def cases(short: int, long: int) -> settings:
    """How many cases hypothesis draws in the short form and in the long one."""
    return settings(max_examples=long if LONG else short)


# ---- 子进程里的训练 ----


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    # 判断只看外面看得到的：退出码、输出、改动文件的次数
    code: int
    """Exit code, negative: by that signal."""
    output: str
    seconds: float
    changes: int

    @property
    def killed(self) -> bool:
        """Whether it was killed."""
        return self.code == -signal.SIGKILL

    @property
    def traced(self) -> bool:
        """Whether a traceback was shown."""
        return "Traceback (most recent call last)" in self.output

    @property
    def refused(self) -> bool:
        """Whether it ended with exit code 2 and one line that says why."""
        lines = [line for line in self.output.splitlines() if line.startswith("error:")]
        return self.code == 2 and len(lines) == 1 and not self.traced


TRAIN = ("run_train.py",)


class Running:
    """`python PROGRAM ARGUMENTS` in a folder; before() runs in the child first, which dies right before its n-th change of a file."""

    # 与命令行上的程序只差一点：torch 已经导入
    def __init__(
        self, arguments, folder: Path, *, program: tuple[str, ...] = TRAIN, before: Callable[[], None] | None = None, kill_at_change: int | None = None,
    ):
        self.started = time.perf_counter()
        handle, named = tempfile.mkstemp(suffix=".log")
        os.close(handle)
        self.log = Path(named)
        self.process = FORKS.Process(target=_child, args=(program, list(arguments), folder, self.log, before, kill_at_change))
        self.process.start()

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return not self.process.is_alive()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.started

    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def until(self, said: Callable[[], bool]) -> None:
        """Wait for something, or for its end."""
        while not self.over and not said():
            time.sleep(0.002)

    def wait(self) -> Ended:
        """Until it ends; one that takes too long is killed."""
        self.process.join(GIVEN_UP_S)
        if not self.over:
            self.process.kill()
            self.process.join()
        counted = self.log.with_suffix(".changes")
        changes = counted.stat().st_size if counted.exists() else 0
        ended = Ended(self.process.exitcode, self.output(), self.seconds, changes)
        self.log.unlink()
        counted.unlink(missing_ok=True)
        return ended


def train(arguments, folder: Path, *, kill_after_s: float | None = None, watch: Callable[[], bool] | None = None, **how) -> Ended:
    """A run from start to end, killed so many seconds after watch() first says so (None: after the start)."""
    running = Running(arguments, folder, **how)
    due = kill_after_s if watch is None else None
    while kill_after_s is not None and not running.over:
        if due is None and watch():
            due = running.seconds + kill_after_s
        if due is not None and running.seconds >= due:
            running.process.kill()
            break
        time.sleep(0.0002)
    return running.wait()


def _child(program: tuple, arguments: list, folder: Path, log: Path, before: Callable[[], None] | None, kill_at_change: int | None) -> None:
    """What the fork does; never returns."""
    code = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.chdir(folder)
        # fork 出来的进程里线程池已不在：只用一个线程
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        if kill_at_change is not None:
            sys.addaudithook(_killer(folder, log.with_suffix(".changes"), kill_at_change))
        if before:
            before()
        # fork 来的那两个还记着原来的终端：照着现在的重新打开
        sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
        if program[0] == "-m":
            sys.argv = [program[1], *program[2:], *arguments]
            runpy.run_module(program[1], run_name="__main__")
        else:
            sys.argv = [str(ROOT / program[0]), *arguments]
            runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code & 0xFF)


def _killer(folder: Path, counted: Path, at: int) -> Callable[[str, tuple], None]:
    """An audit hook that counts the changes of files below a folder and kills this process right before number `at`."""
    descriptor, left, below = os.open(counted, os.O_WRONLY | os.O_CREAT), [at], str(folder)

    def hook(event: str, arguments: tuple) -> None:
        if event not in CHANGES or not arguments:
            return
        path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else ""
        writes = event != "open" or (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"))
        if not writes or (os.path.isabs(path) and not path.startswith(below)):
            return
        os.write(descriptor, b".")
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


# ---- 训练的材料与结果 ----


def new_place(folder: Path) -> Path:
    """A folder with the text that the runs of TINY train on."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "my.txt").write_text(corpus_text(3000), encoding="utf-8")
    return folder


def empty(folder: Path) -> None:
    """Remove all but the text: the next run has to prepare its data, too."""
    for name in ("outputs", "prepared"):
        shutil.rmtree(folder / name, ignore_errors=True)


def litter(folder: Path) -> list[str]:
    """Temporary files and folders below a folder."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob(".*") if p.name.endswith((".tmp", ".lock")))


def outcome(run: Path) -> tuple:
    """Everything that two equal runs must have in common: weights, optimizer and counters of the last checkpoint."""
    last = checkpoint.find(run, "last")
    # 用时不同，其余逐位相同
    progress = {key: value for key, value in last.load_state()["progress"].items() if key not in ("train_s", "wall_s")}
    return last.iteration, last.val_loss, last.sha256["model.safetensors"], last.sha256["state.safetensors"], json.dumps(progress)


def finished(ended: Ended) -> bool:
    """Whether a run went to its end, now or before: killed behind its last save, it says so."""
    return not ended.traced and (ended.code == 0 or "already stands at iteration" in ended.output)


# ---- 在这个进程里的训练 ----


def quick(corpus_folder, *more: str) -> list[str]:
    """Overrides of a training of 12 steps with three checkpoints."""
    return [
        *tiny(corpus_folder), "hardware.peak_tflops_fp32=1", "hardware.peak_tflops_half=1", "max_iters=12", "eval_interval=4", "log_interval=4",
        "sample_tokens=0", *more,
    ]


def fit(trainer) -> ConfigError | None:
    """Train to the end; the one line with which it ended otherwise."""
    try:
        trainer.fit()
    except ConfigError as error:
        assert "\n" not in str(error)
        return error
    return None


def snapshot(trainer) -> dict[str, torch.Tensor]:
    """Copies of every weight and optimizer state, 8-bit codes included."""
    tensors = {name: t.detach().clone() for name, t in trainer.model.state_dict().items()}
    for name, state in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{name}.{key}": t.detach().clone() for key, t in state.items()}
    return tensors


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Both hold the same tensors, bit for bit."""
    assert set(a) == set(b) and not [name for name in a if not torch.equal(a[name], b[name])]


def assert_good_checkpoints(run_dir: Path) -> list[checkpoint.Checkpoint]:
    """Its checkpoints: whole, every number in them finite, the best really the best."""
    found = checkpoint.checkpoints(run_dir)
    for one in found:
        assert one.problem() is None and (one.val_loss is None or math.isfinite(one.val_loss))
        for name, tensor in [*floating(read_tensors(one.folder / "model.safetensors")), *floating(one.load_state())]:
            assert torch.isfinite(tensor).all(), f"{one.name}: {name} is not finite"
    if losses := [one.val_loss for one in found if one.val_loss is not None]:
        assert checkpoint.best_of(found).val_loss == min(losses)
    return found


def raising(error: BaseException) -> Callable:
    """A function that raises."""

    def raise_it(*_, **__):
        raise error

    return raise_it
