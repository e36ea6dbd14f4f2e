"""Locks on a file that end with the process however it ends, so that no stale lock is ever left behind."""

# 文件上的锁：进程怎么死都会放开，不会有人被上次留下的锁挡住
# 操作系统的锁由 filelock 拿（Windows 与 Unix 各一套）；这里只加三样：文件里写着谁拿了锁，
# 锁着的时候就能删掉文件，以及等别人时先说一声
# 训练目录、准备数据、轮流试跑都用它

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

POLL_S = 0.1


class Lock:
    """A lock on the file `path`, which is made if missing and names the process that took it last.

    The file stays unless release() is told to remove it.
    """

    # 不继承 FileLock：它可重入，而同一进程的第二次训练也要被挡住

    def __init__(self, path: Path):
        self.path = path
        self._held = None
        self.made = False
        """Whether take() had to make the file."""

    def take(self) -> bool:
        """Try once; False while another process or Lock holds it. OSError where no file can be made."""
        from filelock import FileLock, Timeout

        made = not self.path.exists()
        lock = FileLock(self.path, timeout=0, thread_local=False, preserve_lock_file=True, on_acquired=_sign)
        try:
            lock.acquire()
        except Timeout:
            return False
        self._held, self.made = lock, made
        return True

    def release(self, *, remove: bool = False) -> None:
        """Release the lock; does nothing if it is not held."""
        if self._held:
            held, self._held = self._held, None
            if remove and os.name != "nt":
                # 还锁着时删：后来的人建的是新文件，等着的人会发觉
                self.path.unlink(missing_ok=True)
            held.release()
            if remove and os.name == "nt":
                # Windows 删不了开着的文件：松开之后才删；别人这时已经拿到了，就留给他
                with contextlib.suppress(OSError):
                    self.path.unlink()

    def holder(self) -> str:
        """The process id in the file, or ? if there is none."""
        try:
            with self.path.open("rb") as file:
                file.seek(1)
                content = file.read(20).decode("ascii").strip()
        except (OSError, ValueError):
            return "?"
        return content if content.isdigit() else "?"


def _sign(descriptor: int) -> None:
    # 硬链接：同一份内容还有别的名字，可能是你的文件；锁得住，但不写
    if os.fstat(descriptor).st_nlink == 1:
        with contextlib.suppress(OSError):
            # 只为给人看；磁盘满时写不进，锁照样有效。空出第一个字节：Windows 上锁着的正是它，别人读不了
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 1, os.SEEK_SET)
            os.write(descriptor, f"{os.getpid()}\n".encode("ascii"))


@contextlib.contextmanager
def only_one(path: Path, *, waiting=None) -> Iterator[None]:
    """Hold the lock on `path` inside and remove the file afterwards; call waiting() once if another holds it."""
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


@contextlib.contextmanager
def if_free(path: Path) -> Iterator[bool]:
    """Hold the lock on `path` inside, unless another does, and remove the file afterwards; yields whether it is."""
    lock, held = Lock(path), False
    with contextlib.suppress(OSError):
        held = lock.take()
    try:
        yield held
    finally:
        with contextlib.suppress(OSError):
            lock.release(remove=True)


def remove_stale(path: Path) -> None:
    """Remove a lock file of only_one() that a killed process left behind; one that is held stays."""
    if path.is_file():
        with if_free(path):
            pass


def is_held(path: Path) -> bool:
    """Whether a process holds the lock `path`; makes no file and leaves the name of its holder in it."""
    from filelock import FileLock, Timeout

    with contextlib.suppress(OSError):
        try:
            # 只问一下：不签名，拿到也马上放开
            if path.is_file():
                with FileLock(path, timeout=0, thread_local=False, preserve_lock_file=True):
                    return False
        except Timeout:
            return True
    return False
