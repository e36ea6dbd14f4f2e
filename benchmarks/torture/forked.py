"""run_train.py in a fork of this process: torch is imported once, and a run starts, or dies, within milliseconds (POSIX only)."""

import contextlib
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ledger import ROOT

sys.path.insert(0, str(ROOT))


import torch

# fork 之前就导入：子进程不必各自再花几秒
import nanogpt.run.session  # noqa: F401
import run_train
from nanogpt.base.cli import run_script

# 改动文件的审计事件；fsync 没有事件，它前后总有别的
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")
GIVEN_UP_S = 120


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    code: int
    """Exit code, negative: by that signal."""
    output: str
    seconds: float

    @property
    def killed(self) -> bool:
        """Whether it was killed, or ended otherwise before."""
        return self.code == -signal.SIGKILL

    @property
    def traced(self) -> bool:
        """Whether a traceback was shown."""
        return "Traceback (most recent call last)" in self.output


class Running:
    """A run that has been started."""

    def __init__(self, arguments: list[str], folder: Path, *, before: Callable[[], None] | None = None, kill_at_change: int | None = None):
        """`python run_train.py ARGUMENTS` in `folder`; before() is called in the child first, which may be killed before a change of a file."""
        self.started = time.perf_counter()
        handle, named = tempfile.mkstemp(suffix=".log")
        os.close(handle)
        self.log = Path(named)
        self.status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _child(arguments, folder, self.log, kill_at_change, before)

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        if self.status is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = status if ended else None
        return self.status is not None

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.started

    def kill(self) -> None:
        """SIGKILL."""
        if not self.over:
            os.kill(self.pid, signal.SIGKILL)

    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait(self) -> Ended:
        """Until it ends; one that takes too long is killed."""
        while not self.over:
            if self.seconds > GIVEN_UP_S:
                self.kill()
            time.sleep(0.002)
        ended = Ended(os.waitstatus_to_exitcode(self.status), self.output(), self.seconds)
        self.log.unlink()
        return ended


def train(
    arguments: list[str], folder: Path, *, kill_after_s: float | None = None, kill_at_change: int | None = None,
    watch: Callable[[], bool] | None = None, before: Callable[[], None] | None = None,
) -> Ended:
    """Run `python run_train.py ARGUMENTS` in `folder` and wait for it.

    It is killed after so many seconds, counted from the moment that watch() first says so, or right before its
    n-th change of a file below `folder`.
    """
    running = Running(arguments, folder, before=before, kill_at_change=kill_at_change)
    due = kill_after_s if watch is None else None
    while kill_after_s is not None and not running.over:
        if due is None and watch():
            due = running.seconds + kill_after_s
        if due is not None and running.seconds >= due:
            running.kill()
            break
        time.sleep(0.0002)
    return running.wait()


def _child(arguments: list[str], folder: Path, log: Path, kill_at_change: int | None, before: Callable[[], None] | None) -> None:
    """What the fork does; never returns."""
    code = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.chdir(folder)
        # fork 出来的进程里线程池已不在：只用一个线程
        torch.set_num_threads(1)
        sys.argv = ["run_train.py", *arguments]
        if kill_at_change is not None:
            sys.addaudithook(_Killer(folder, kill_at_change))
        if before:
            before()
        # fork 来的那两个还记着原来的终端：照着现在的重新打开
        sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
        run_script("train", run_train.main)
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(code & 0xFF)


class _Killer:
    """An audit hook that kills this process right before its n-th change of a file below a folder."""

    def __init__(self, folder: Path, at: int):
        self.folder, self.left = str(folder), at

    def __call__(self, event: str, arguments: tuple) -> None:
        if event not in CHANGES or not arguments:
            return
        path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else ""
        if event == "open" and not (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
            return
        if not (path.startswith(self.folder) or not os.path.isabs(path)):
            return
        self.left -= 1
        if self.left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)


def changes_of(arguments: list[str], folder: Path) -> int:
    """How many changes of files a whole run makes, to choose from for kill_at_change."""
    found = folder / ".changes"

    def count() -> None:
        class Counter(_Killer):
            def __call__(self, event: str, given: tuple) -> None:
                self.left = 10**9
                super().__call__(event, given)
                if self.left < 10**9:
                    os.write(descriptor, b".")

        descriptor = os.open(found, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        sys.addaudithook(Counter(folder, 10**9))

    train(arguments, folder, before=count)
    number = found.stat().st_size
    found.unlink()
    return number
