"""Which of several processes hangs or is gone: said in one line by one of the others, which all end.

A collective says at most that it failed. So every process looks once a second whether one of them has raised the
alarm, and answers with what it does; who does not answer, or does not wait as the others do, is the one.
"""

# torchrun 只会说“某个 worker 失败了”，gloo 与 NCCL 各说各的；这里问出是哪一个、停在哪里
# 问答都经 torchrun 的 TCPStore，与梯度不是一条路：卡在通信里的进程，由旁边的线程来答
# distributed 的每次通信都在 waiting() 里；平时只花每秒一次查询

import atexit
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist

from nanogpt.base.errors import EXIT_USER_ERROR, is_out_of_memory
from nanogpt.base.language import ConfigError, say, sentence, text

ALARM, ANSWER = "alarm", "answer"
PACKAGE = str(Path(__file__).resolve().parents[1])
REMEDY = sentence("type the command again with resume=<run folder>")


class Watch:
    """Ends this process with one line where another one hangs or is gone."""

    # 一个进程一个；线程是守护的，异常结束时不拖住进程
    # 正常结束时先停下它：解释器收尾时还在 store 的 C++ 里的线程拿不回 GIL，会以 abort（134）结束整个进程，
    # torchrun 便以为训练失败了

    def __init__(self, store: dist.Store, rank: int, world: int, timeout_s: float):
        self.store, self.rank, self.world, self.timeout_s = store, rank, world, timeout_s
        self.every_s = min(1.0, timeout_s / 4)
        self.since: float | None = None
        self.ending = False
        """Whether the training is lost: nothing can be sent any more."""
        self.remedy = text(REMEDY)
        """What to type to go on."""
        self.left_alone: Callable[[], None] = lambda: None
        """Called where the process that holds the store is gone: torchrun's agent, or process 0 without one."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        atexit.register(self._stop)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around everything that waits for the other processes."""
        self.since = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            if line := self._who(slow=False):
                raise line from None
            raise
        finally:
            self.since = None

    def _stop(self) -> None:
        self._over.set()
        # 一次查询远短于此；store 那头卡住了也不必陪它
        self._thread.join(5)

    def _look(self) -> None:
        while not self._over.wait(self.every_s):
            since = self.since
            try:
                if self.ending:
                    continue
                if since is not None and time.monotonic() - since > self.timeout_s:
                    self._leave()
                elif self.store.check([ALARM]):
                    self._answer()
            except RuntimeError:
                # store 已不在：管它的那个进程走了；若是 torchrun，训练自己还走得下去，却没有人管了
                self.left_alone()
                return

    def _leave(self) -> None:
        """End this process, whose main thread is stuck in a collective."""
        try:
            if line := self._who(slow=True):
                say("error", line=line)
            sys.stderr.flush()
        finally:
            # 主线程停在 C++ 里，抛不了异常；已存的都落了盘
            os._exit(EXIT_USER_ERROR)

    def _answer(self) -> None:
        frame = sys._current_frames().get(threading.main_thread().ident)
        while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
            frame = frame.f_back
        where = f"{frame.f_code.co_name}, {Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else ""
        state = {"waiting": self.since is not None or self.ending, "where": where}
        self.store.set(f"{ANSWER}/{self.rank}", json.dumps(state))

    def _who(self, *, slow: bool) -> ConfigError | None:
        """The line to be said, None if every process waits; SystemExit where another process says it."""
        self.ending = True
        try:
            self._answer()
            first = self.store.add(ALARM, 1) == 1
            # 别的进程每秒看一次；一个人说就够，先走的话，torchrun 会把还没说完的也结束掉
            time.sleep((3 if first else 5) * self.every_s)
            if not first:
                sys.exit(EXIT_USER_ERROR)
            keys = {rank: f"{ANSWER}/{rank}" for rank in range(self.world)}
            answers = {rank: json.loads(self.store.get(key)) for rank, key in keys.items() if self.store.check([key])}
        except RuntimeError:
            return ConfigError("another process is gone; what is saved is kept: {remedy}", remedy=self.remedy)
        gone = [rank for rank in keys if rank not in answers]
        busy = [rank for rank in answers if slow and not answers[rank]["waiting"]]
        if not gone and not busy:
            return None if not slow else ConfigError(
                "the processes have waited {seconds:g} s (parallel.timeout_s) for each other: look at the network "
                "between them; what is saved is kept: {remedy}",
                seconds=self.timeout_s, remedy=self.remedy,
            )
        if not slow:
            return ConfigError(
                "process {rank} is gone; what is saved is kept: {remedy}", rank=gone[0], remedy=self.remedy,
            )
        who = (gone or busy)[0]
        return ConfigError(
            "process {rank} has not answered for {seconds:g} s (parallel.timeout_s){where}; what is saved is kept: "
            "{remedy}",
            rank=who, seconds=self.timeout_s, remedy=self.remedy,
            where=text(", it is in {where}", where=answers[who]["where"]) if who in answers else "",
        )
