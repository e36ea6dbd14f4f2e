"""One trial at a time per device: parallel jobs of a sweep wait for each other instead of spoiling each other's timings."""

import contextlib
import getpass
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

POLL_S = 0.1


def lock_path(device: str) -> Path:
    """The lock file of the device that `device=…` means here; GPUs that a launcher handed out have files of their own."""
    # auto 与 cuda 都是第一张看得见的卡；父进程不导入 torch，只能按名字分
    named = device if re.fullmatch(r"cuda:[1-9]\d*", device) else "first"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return Path(tempfile.gettempdir()) / ("nanogpt-trial-" + re.sub(r"\W+", "-", f"{_user()}-{visible}-{named}") + ".lock")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        # 容器里没有用户名
        return "nobody"


@contextlib.contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Hold an operating system's lock on the file `path`; it goes with the process, however that ends."""
    # 文件留着不删：删掉再建，两个进程就可能各锁各的
    with path.open("a+b") as file:
        while not _try(file):
            # 轮询而不是阻塞：Windows 上阻塞时按不出 Ctrl-C
            time.sleep(POLL_S)
        try:
            yield
        finally:
            _release(file)


if sys.platform == "win32":
    import msvcrt

    def _try(file) -> bool:
        try:
            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            return True
        except OSError:
            return False

    def _release(file) -> None:
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
else:
    import fcntl

    def _try(file) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False

    def _release(file) -> None:
        fcntl.flock(file, fcntl.LOCK_UN)
