"""Locks of the operating system on a file: they go with the process, however that ends, so that none is ever left behind."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

POLL_S = 0.1
# 锁在内容之外的一个字节上：Windows 上被锁的字节别人读不了，而内容要能读
LOCKED_BYTE = 2**30


class Lock:
    """A lock on the file `path`, which is made where it is missing and holds the process id of whoever took it last.

    The file stays unless release() is told to remove it.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = None
        self.made = False
        """Whether take() had to make the file."""

    def take(self) -> bool:
        """Try once; False while another process (or another Lock of this one) holds it. OSError where no file can be made."""
        missing = not self.path.exists()
        # 不用缓冲：磁盘满时，攒着的字节会让关闭文件也失败；不跟随链接：陌生人的目录、公用的 /tmp 里，它可以指向你的文件
        file = open(self.path, "a+b", buffering=0, opener=lambda path, flags: os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666))
        if not _try(file) or not self._is(file):
            file.close()
            return False
        self._file, self.made = file, missing
        # 硬链接：同一份内容还有别的名字，可能是你的文件；锁得住，但不写
        if os.fstat(file.fileno()).st_nlink == 1:
            with contextlib.suppress(OSError):
                # 只为给人看；磁盘满时写不进，锁照样有效
                file.truncate(0)
                file.write(f"{os.getpid()}\n".encode("ascii"))
        return True

    def _is(self, file) -> bool:
        # 等锁时文件可能已被删掉重建：锁着旧的那个，谁也挡不住
        try:
            return os.path.samestat(os.fstat(file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    def release(self, *, remove: bool = False) -> None:
        """Let others have it; nothing happens where it is not held."""
        if self._file:
            file, self._file = self._file, None
            if remove and os.name != "nt":
                # 还锁着时删：后来的人建的是新文件，等着的人会发觉
                self.path.unlink(missing_ok=True)
            _release(file)
            file.close()

    def holder(self) -> str:
        """The process id in the file, ? where there is none."""
        try:
            content = self.path.read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return "?"
        return content if content.isdigit() else "?"


@contextlib.contextmanager
def only_one(path: Path, *, waiting=None) -> Iterator[None]:
    """Hold the lock on `path` inside, and remove the file behind it; waits for whoever holds it, after calling waiting() once."""
    lock = Lock(path)
    while not lock.take():
        if waiting:
            waiting()
            waiting = None
        # 轮询而不是阻塞：Windows 上阻塞时按不出 Ctrl-C
        time.sleep(POLL_S)
    try:
        yield
    finally:
        lock.release(remove=True)


def remove_stale(path: Path) -> None:
    """Remove a lock file of only_one() that a killed process left behind; one that is held stays."""
    with contextlib.suppress(OSError):
        if path.is_file() and (lock := Lock(path)).take():
            lock.release(remove=True)


if sys.platform == "win32":
    import msvcrt

    def _try(file) -> bool:
        try:
            file.seek(LOCKED_BYTE)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            return True
        except OSError:
            return False

    def _release(file) -> None:
        file.seek(LOCKED_BYTE)
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
