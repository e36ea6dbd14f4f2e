"""How OpenMP's idle threads wait: they spin while the cores are free, and sleep while other programs want them."""

# 并行一段算完，OpenMP 的线程先空转着等下一段：机器空闲时这样最快，别的程序也要这些核时，两边互相拖慢几倍到几十倍
# libgomp 每次等之前都看一眼：自己管的线程多过核数，就只转一百次便睡。所以机器一忙就多养几池不干活的线程，闲了再放掉
# 忙不忙看自己的线程排队等核的时间（Linux 的 schedstat）；线程数与分工不变，算出的数一位也不变
# machine.set_up 在 CPU 上启动它；别的系统、别的 OpenMP、使用者自己定了怎么等的，一概照旧

import contextlib
import os
import sys
import threading
import time
from pathlib import Path

import torch

from nanogpt.base.before_torch import SPINS

PERIOD_S = 0.5
# 半秒里排队等核的时间，占一个线程的这么多就是忙；降到后一个数以下才算闲：别人一停就回落，不会来回跳
CROWDED, FREE = 0.15, 0.05
MOST_POOLS = 16
TASKS = Path("/proc/self/task")
POOL = "nanogpt-pool"


class Waiting:
    """Lets idle threads sleep at once while this process waits for cores."""

    # 状态只有一份：此刻多养着的池，各由一个线程拿着，放手就散

    def __init__(self, threads: int, cores: int):
        self.threads = threads
        # 一池多出 threads - 1 个：总数要超过核数，libgomp 才少转
        self.pools = max(0, -(-(cores - threads + 1) // (threads - 1)))
        self._leave: threading.Event | None = None

    @property
    def asleep(self) -> bool:
        """Whether idle threads sleep instead of spinning."""
        return self._leave is not None

    def look(self, queued: float) -> None:
        """Decide anew: `queued` is the time that threads waited for a core, as a part of one thread's time."""
        if not self.asleep and queued > CROWDED:
            self._leave = threading.Event()
            for _ in range(self.pools):
                threading.Thread(target=self._hold, args=(self._leave,), name=POOL, daemon=True).start()
        elif self.asleep and queued < FREE:
            self._leave.set()
            self._leave = None

    def _hold(self, leave: threading.Event) -> None:
        # 够大才会并行；池随这个线程生灭
        torch.empty(self.threads << 16).zero_()
        leave.wait()

    def watch(self) -> None:
        """Look again and again, for as long as the process lives."""
        then, before = time.monotonic(), queued_s()
        while True:
            time.sleep(PERIOD_S)
            now, after = time.monotonic(), queued_s()
            self.look((after - before) / (now - then))
            then, before = now, after


def queued_s() -> float:
    """Seconds that the threads of this process were ready to run and had no core (Linux)."""
    total = 0
    for task in TASKS.iterdir():
        # 线程可以在这中间结束
        with contextlib.suppress(OSError):
            total += int((task / "schedstat").read_bytes().split()[1])
    return total / 1e9


_watching: list[threading.Thread] = []


def watch_the_machine() -> None:
    """Begin to watch, once in a process, where OpenMP is GNU's and nobody has said how its threads wait."""
    said = "OMP_WAIT_POLICY" in os.environ or os.environ.get("GOMP_SPINCOUNT", SPINS) != SPINS
    threads = torch.get_num_threads()
    if sys.platform != "linux" or said or threads < 2 or _watching or not Path("/proc/self/schedstat").is_file():
        return
    waiting = Waiting(threads, len(os.sched_getaffinity(0)))
    # 核多而线程少，少有人来抢，要养的池却多
    if waiting.pools <= MOST_POOLS and "libgomp" in Path("/proc/self/maps").read_text(encoding="utf-8"):
        _watching.append(threading.Thread(target=waiting.watch, name="nanogpt-waiting", daemon=True))
        _watching[0].start()
