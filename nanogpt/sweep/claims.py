"""Claims on trials, by files that all machines of a cluster see: who holds one measures, the others wait.

Needs no torch.
"""

# 一个试跑只由一个进程量：它在共享的文件夹里占一个文件，活着时一直改它的时间；别的等着，等到结果就直接用
# 不只靠操作系统的锁：网络盘上的锁，有的集群没有，有的要等很久才放开
# 不比较时钟：各机器的钟不一样，只看别人的文件在自己的这段时间里变没变；同一台机器上的，进程没了马上就知道
# 占的人死了，接手的占下一个号码：建文件只有一个能成功，删文件却会误删刚刚接手的

import contextlib
import os
import platform
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from nanogpt.sweep.process import changed_ns, ending

# 多久改一次时间，多久没有变就算死了（秒）：网络盘上别人的改动要几十秒才看得到
BEAT_S, STALE_S = 10.0, 150.0
POLL_S = 0.5


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Hold the claim `path` inside; waits while another process has it and is alive, on whatever machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = _taken(path)
    done = threading.Event()
    beating = threading.Thread(target=_beat, args=(mine, done), daemon=True)
    beating.start()
    try:
        yield
    finally:
        done.set()
        beating.join()
        for number, file in _numbered(path):
            # 更大的号码是别人的：以为这里死了
            if number <= int(mine.suffix[1:]):
                with contextlib.suppress(PermissionError):
                    # Windows：等着的人正在读它；再没有心跳，他就当这里走了
                    file.unlink(missing_ok=True)


def _taken(path: Path) -> Path:
    """The file of the claim that this process has won."""
    seen, since = None, 0.0
    while True:
        number, latest = max(_numbered(path), default=(0, None))
        if latest is None or _process_is_gone(latest):
            alive = False
        else:
            if (mark := (latest, changed_ns(latest))) != seen:
                seen, since = mark, time.monotonic()
            alive = time.monotonic() - since < STALE_S
        if alive:
            if ending.wait(POLL_S):
                raise KeyboardInterrupt
            continue
        file = path.with_name(f"{path.name}.{number + 1}")
        # 有人先建了：再看一遍
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            os.write(descriptor, f"{machine()} {os.getpid()}".encode())
            os.close(descriptor)
            return file


def _numbered(path: Path) -> list[tuple[int, Path]]:
    """The files of a claim by their numbers; the highest one counts."""
    found = path.parent.glob(f"{path.name}.*")
    return [(int(file.suffix[1:]), file) for file in found if re.fullmatch(r"\.\d+", file.suffix)]


def _process_is_gone(file: Path) -> bool:
    """Whether the process that holds a claim was one of this machine and has ended."""
    try:
        where, _, pid = file.read_text(encoding="utf-8").rpartition(" ")
        return where == machine() and not psutil.pid_exists(int(pid))
    except (OSError, ValueError):
        # 刚建，还没写；或者正好删了
        return False


def machine() -> str:
    """A name of this machine, other in each container."""
    try:
        return f"{platform.node()}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return platform.node()


def _beat(file: Path, done: threading.Event) -> None:
    while not done.wait(BEAT_S):
        # 被当作死了、让人接了手的：照样量完，结果是一样的
        with contextlib.suppress(OSError):
            os.utime(file)
