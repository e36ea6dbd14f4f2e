"""Writes files and folders so that a crash leaves the old or the new content, never half of it."""

# 写文件与文件夹的规矩：断电、被杀、磁盘满，留下的不是旧的就是新的，没有半截
# 做法都一样：写在旁边的临时名字下，fsync，再用 os.replace 换上去；名字记在上一级文件夹里，也要 fsync
# checkpoint、数据集、下载、run.json、sweep 的结果都经过这里；被杀留下的 .名字.*.tmp 由 remove_leftovers 清
# 这里只抛 OSError，怎样对人说由 errors.explained 决定

import contextlib
import errno
import glob
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

# Windows 拒绝改名、删除开着的文件：ERROR_ACCESS_DENIED、ERROR_SHARING_VIOLATION
HELD_OPEN = (5, 32)
# folder_aside 挪开的旧文件夹
MOVED = re.compile(r"\.(.+)\.[0-9a-f]{8}\.old\.tmp")
# Finder 与资源管理器在打开过的文件夹里留下的：不是谁的内容
LITTER = (".DS_Store", "desktop.ini", "Thumbs.db")
# 刚写好的文件，杀毒与索引的程序会打开一小会儿：等这么多秒再试
PAUSES_S = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)


def sha256(path: Path, each: Callable[[bytes], None] | None = None) -> str:
    """Hex SHA-256 of a file, read in pieces of 4 MiB; each(piece) sees them too, so that a large file is read once."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**22):
            digest.update(piece)
            if each:
                each(piece)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk; folders only where the system can."""
    folder = path.is_dir()
    # Windows 不能对文件夹 fsync，改名本身由 NTFS 日志保证
    if folder and os.name == "nt":
        return
    try:
        descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
        try:
            _flush(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # 只能写、不能列的上级目录打不开；有的网络文件系统不认文件夹的 fsync
        if not folder or error.errno not in (errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTSUP):
            raise


def _flush(descriptor: int) -> None:
    if sys.platform == "darwin":
        # Mac 的 fsync 只送到硬盘的缓存里，断电仍会丢；有的文件系统不认这个命令
        import fcntl

        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def is_litter(path: Path) -> bool:
    """Whether a system's own file manager left this in the folder that it showed."""
    return path.name in LITTER or path.name.startswith("._")


def remove_empty(folder: Path) -> None:
    """Delete a folder in which there is nothing but litter; OSError if there is more."""
    if all(map(is_litter, folder.iterdir())):
        for path in folder.iterdir():
            path.unlink()
    folder.rmdir()


def is_held_open(error: OSError) -> bool:
    """Whether Windows refused because another program has the file, or one in the folder, open."""
    return getattr(error, "winerror", None) in HELD_OPEN


def replace(source: Path, target: Path) -> None:
    """os.replace; where Windows refuses because another program has one of them open, again for some seconds."""
    for pause in PAUSES_S:
        try:
            os.replace(source, target)
            return
        except PermissionError as error:
            if not is_held_open(error):
                raise
        time.sleep(pause)
    os.replace(source, target)


def sync_names(path: Path) -> None:
    """Flush the names in a folder, and those by which it is found: its own and its parents'."""
    for folder in (path, *path.absolute().parents):
        if not os.access(folder, os.W_OK):
            # 这里的名字不是这个人建的，再往上也不是
            break
        sync(folder)


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents, so that each is still there after a loss of power."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        # 名字记在上一级里：同步自己没有用
        sync(folder.parent)


def write_text(path: Path, content: str) -> None:
    """Replace a text file atomically (UTF-8, LF)."""
    with _aside(path) as aside:
        aside.write_text(content, encoding="utf-8", newline="\n")


def write_json(path: Path, content: dict) -> None:
    """Write a json file that people may read, as write_text does."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling; on success it is synced and becomes `path`, on failure it is removed."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield aside
        sync(aside)
        replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def own_content(path: Path) -> None:
    """Separate a file that is to be changed in place from its hard links, which keep the old content."""
    if path.is_file() and path.stat().st_nlink > 1:
        with _aside(path) as aside:
            shutil.copyfile(path, aside)


def numbered(path: Path) -> Iterator[Path]:
    """The path, then path-2, path-3 …: names for what starts in the same second."""
    yield path
    for n in itertools.count(2):
        yield path.with_name(f"{path.name}-{n}")


def refuse_file(folder: Path) -> None:
    """Raise OSError if the name that a folder is to get is taken by anything else, a dangling link included."""
    if os.path.lexists(folder) and not folder.is_dir():
        # 换上新文件夹时，它会被当成旧的那一份删掉
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))


@contextlib.contextmanager
def folders_around(path: Path) -> Iterator[None]:
    """Make the parent folders of `path`; those that were made and are empty at the end are removed again."""
    # 不解析就会先造出 nope/../x 里的 nope
    around = path.parent.resolve()
    made = [folder for folder in (around, *around.parents) if not folder.exists()]
    try:
        make_folder(around)
        yield
    finally:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def check_writable(path: Path) -> None:
    """Raise OSError if `path` cannot be written; neither changes what is there nor leaves anything behind."""
    # 断了的链接：试写的是它所指的，删的也不能是链接
    path = path.resolve()
    existed = path.exists()
    with folders_around(path):
        path.open("ab").close()
        if not existed:
            path.unlink()


@contextlib.contextmanager
def folder_aside(final: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder; on success it becomes `final`, on failure it is removed.

    Raises OSError if `final` is a file.
    """
    refuse_file(final)
    make_folder(final.parent)
    aside = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.tmp")
    aside.mkdir()
    try:
        yield aside
        # 先落盘内容再改名：断电后不会出现名字在、内容空的文件夹
        for path in (*aside.rglob("*"), aside):
            sync(path)
        if final.exists():
            # 新的已完整落盘，才把旧的挪开
            replace(final, final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.old.tmp"))
        replace(aside, final)
        sync(final.parent)
        # 只清同名的：目标旁边可能是使用者自己的文件
        remove_leftovers(final.parent, final.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Delete the temporary files and folders that a killed process left in `folder`: all, or those of `name`.

    A folder that was moved away for a new one that has not come takes its place again.
    """
    for path in folder.glob(f".{glob.escape(name)}.*.tmp" if name else ".*.tmp"):
        if path.is_dir():
            moved = MOVED.fullmatch(path.name)
            if moved and not (folder / moved[1]).exists():
                # 停在两次改名之间：名字下面什么也没有，旧的还完整
                replace(path, folder / moved[1])
            else:
                shutil.rmtree(path, ignore_errors=True)
        else:
            try:
                path.unlink(missing_ok=True)
            except PermissionError as error:
                # 别的程序还开着：留给下一次
                if not is_held_open(error):
                    raise
