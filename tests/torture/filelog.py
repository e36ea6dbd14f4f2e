"""What a program does to the files below a folder, operation by operation, and the states that a loss of power may leave of it."""

# 文件系统只保证同步过的：fsync 一个文件，内容在；fsync 一个文件夹，里面的名字在；其余随便怎样都可能，只有同一文件夹里的改名是原子的
# 这比 ext4、XFS、Btrfs、NTFS 保证的都少：在这里成立的，在它们上面也成立

import builtins
import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from unittest import mock

# 一棵树：相对路径 -> 内容，文件夹是 None
Tree = dict[str, bytes | None]
KINDS = ("nothing unsynced", "names kept, contents lost", "names kept, contents zeroed", "names kept, contents torn", "in order", "out of order")


@dataclass(frozen=True)
class Entry:
    """Names of a folder that change together; None takes a name away."""

    # 改名是一去一来，一次做完
    folder: int
    names: tuple[tuple[str, int | None], ...]


@dataclass(frozen=True)
class Write:
    """Bytes that come to stand at an offset; None: the file is cut or grown to it."""

    # 文件的内容由它们一个接一个拼出来
    file: int
    offset: int
    content: bytes | None

    def applied(self, before: bytes) -> bytes:
        """The content of the file afterwards."""
        kept = before[: self.offset].ljust(self.offset, b"\0")
        return kept if self.content is None else kept + self.content + before[self.offset + len(self.content) :]


@dataclass(frozen=True)
class Sync:
    """fsync of a file or folder."""

    # 之前对它做的，从此掉电也在
    node: int


@dataclass(frozen=True)
class Mark:
    """Something that the program has reached, for the judge."""

    # 不改动文件，只标出时刻
    reached: tuple


class FileLog:
    """Records below `root` inside recording(); nothing there may be changed by other processes meanwhile."""

    # 文件与文件夹都用号码记：名字会变，号码不变；0 是根
    def __init__(self, root: Path):
        self.root = str(root.resolve())
        self.operations: list[Entry | Write | Sync | Mark] = []
        self.entries: dict[int, dict[str, int]] = {0: {}}
        self.descriptors: dict[int, int] = {}
        self.nodes = 0
        self.before: dict[int, bytes] = {}
        for path in sorted(root.rglob("*")):
            folder, name = self._place(path)
            self.entries[folder][name] = self._node(folder=path.is_dir())
            if path.is_file():
                self.before[self.nodes] = path.read_bytes()
        self.entries_before = {node: dict(names) for node, names in self.entries.items()}

    # ---- 记录 ----

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Note every change of a file or folder below the root by this process (Python's own functions, without numpy's and C's)."""
        changes = {
            "mkdir": lambda path, *_: self._named(path, lambda: self._node(folder=True)), "rename": self._renamed, "replace": self._renamed,
            **dict.fromkeys(("rmdir", "unlink", "remove"), lambda path, *_: self._named(path, lambda: None)),
        }
        with contextlib.ExitStack() as patches:
            for name, noted in changes.items():
                patches.enter_context(mock.patch.object(os, name, self._noting(getattr(os, name), noted)))
            for module, name, stand_in in (
                (os, "open", self._opening(os.open)), (os, "fsync", self._synced), (builtins, "open", self._file(builtins.open)),
                (io, "open", self._file(io.open)), (os, "write", self._written(os.write)), (os, "ftruncate", self._cut(os.ftruncate)),
                # 这两条捷径绕过上面的函数
                (shutil, "_use_fd_functions", False), (shutil, "_USE_CP_SENDFILE", False),
            ):
                patches.enter_context(mock.patch.object(module, name, stand_in, create=True))
            yield
        assert self.state(len(self.operations)) == tree_of(Path(self.root)), "a change was not recorded"

    def _node(self, *, folder: bool) -> int:
        self.nodes += 1
        if folder:
            self.entries[self.nodes] = {}
        return self.nodes

    def _place(self, path) -> tuple[int, str] | None:
        """(folder, name) of a path below the root, None elsewhere."""
        absolute = os.path.abspath(os.fsdecode(path))
        if not absolute.startswith(self.root + os.sep):
            return None
        *around, name = os.path.relpath(absolute, self.root).split(os.sep)
        folder = 0
        for part in around:
            folder = self.entries[folder][part]
        return folder, name

    def _rename(self, folder: int, *names: tuple[str, int | None]) -> None:
        self.operations.append(Entry(folder, names))
        for name, node in names:
            self.entries[folder].pop(name, None)
            if node is not None:
                self.entries[folder][name] = node

    def _named(self, path, node) -> None:
        if place := self._place(path):
            self._rename(place[0], (place[1], node()))

    def _noting(self, real, noted):
        def call(*arguments, **options):
            real(*arguments, **options)
            noted(*arguments)

        return call

    def _renamed(self, old, new, *_) -> None:
        source, target = self._place(old), self._place(new)
        assert (source and source[0]) == (target and target[0]), "only renames within a folder are known to be atomic"
        if source:
            self._rename(source[0], (source[1], None), (target[1], self.entries[source[0]][source[1]]))

    def _opening(self, real):
        def call(path, flags, *arguments, **options):
            descriptor = real(path, flags, *arguments, **options)
            self.descriptors.pop(descriptor, None)
            place = self._place(path)
            if place and flags & os.O_CREAT:
                self.created(place)
            node = 0 if os.path.abspath(os.fsdecode(path)) == self.root else place and self.entries[place[0]].get(place[1])
            if node is not None:
                self.descriptors[descriptor] = node
            return descriptor

        return call

    def created(self, place: tuple[int, str]) -> int:
        """The node of a file that is open for writing, new or not."""
        folder, name = place
        if name not in self.entries[folder]:
            self._rename(folder, (name, self._node(folder=False)))
        return self.entries[folder][name]

    def _synced(self, descriptor: int) -> None:
        # 不真的等磁盘：记下来就够
        if (node := self.descriptors.get(descriptor)) is not None:
            self.operations.append(Sync(node))

    def _written(self, real):
        def call(descriptor, content):
            node = self.descriptors.get(descriptor)
            at = None if node is None else os.lseek(descriptor, 0, os.SEEK_CUR)
            written = real(descriptor, content)
            if node is not None:
                self.operations.append(Write(node, at, bytes(content)[:written]))
            return written

        return call

    def _cut(self, real):
        def call(descriptor, size):
            real(descriptor, size)
            if (node := self.descriptors.get(descriptor)) is not None:
                self.operations.append(Write(node, size, None))

        return call

    def _file(self, real):
        def call(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
            place = self._place(file) if isinstance(file, str | bytes | os.PathLike) else None
            if place is None or not set(mode) & set("wax+"):
                return real(file, mode, buffering, encoding, errors, newline, closefd, opener)
            raw = _Recorded(self, place, file, mode, opener)
            if not buffering:
                return raw
            buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

        return call

    # ---- 断电 ----

    def state(self, at: int, kind: str = "", chance: Random | None = None) -> Tree:
        """What may be there when the power goes after the first `at` operations; without a kind everything is."""
        done = self.operations[:at]
        synced = {operation.node: number for number, operation in enumerate(done) if isinstance(operation, Sync)}
        kept = self._kept(done, synced, kind, chance)
        entries = {node: dict(names) for node, names in self.entries_before.items()}
        for number, operation in enumerate(done):
            if isinstance(operation, Entry) and (number in kept or number < synced.get(operation.folder, -1)):
                for name, node in operation.names:
                    entries.setdefault(operation.folder, {}).pop(name, None)
                    if node is not None:
                        entries[operation.folder][name] = node
        found: Tree = {}
        self._collect(0, "", entries, self._contents(done, kind, chance), found)
        return found

    def _kept(self, done: list, synced: dict[int, int], kind: str, chance: Random | None) -> set[int]:
        """Which changes of names that were not synced are there all the same."""
        pending = [n for n, operation in enumerate(done) if isinstance(operation, Entry) and n > synced.get(operation.folder, -1)]
        if kind == "nothing unsynced":
            return set()
        if kind == "in order":
            return set(pending[: chance.randrange(len(pending) + 1)])
        if kind == "out of order":
            return {number for number in pending if chance.choice([False, True])}
        return set(pending)

    def _contents(self, done: list, kind: str, chance: Random | None) -> dict[int, bytes]:
        """What each file holds."""
        files = [node for node in range(1, self.nodes + 1) if node not in self.entries]
        now = {node: self.before.get(node, b"") for node in files}
        durable = dict(now)
        for operation in done:
            if isinstance(operation, Write):
                now[operation.file] = operation.applied(now[operation.file])
            elif isinstance(operation, Sync) and operation.node in now:
                durable[operation.node] = now[operation.node]
        ways = {"nothing unsynced": "lost", "contents lost": "lost", "contents zeroed": "zeroed", "contents torn": "torn"}
        for node in files:
            if kind and now[node] != durable[node]:
                way = ways.get(kind.rpartition(", ")[2]) or chance.choice(["lost", "zeroed", "torn", "kept"])
                now[node] = damaged(durable[node], now[node], way, chance)
        return now

    def _collect(self, folder: int, prefix: str, entries: dict, contents: dict[int, bytes], found: Tree) -> None:
        for name, node in sorted(entries.get(folder, {}).items()):
            found[prefix + name] = contents.get(node)
            if node in self.entries:
                self._collect(node, f"{prefix}{name}/", entries, contents, found)


class _Recorded(io.FileIO):
    """A file whose changes are noted."""

    # 在缓冲之下：记的是真正交给系统的每一次写
    def __init__(self, log: FileLog, place: tuple[int, str], path, mode: str, opener):
        super().__init__(path, mode.replace("b", "").replace("t", ""), opener=opener)
        self.log, self.node, self.appends = log, log.created(place), "a" in mode
        log.descriptors[self.fileno()] = self.node
        if "w" in mode:
            log.operations.append(Write(self.node, 0, None))

    def write(self, content) -> int:
        at = os.fstat(self.fileno()).st_size if self.appends else self.tell()
        written = super().write(content)
        self.log.operations.append(Write(self.node, at, bytes(content)[:written]))
        return written

    def truncate(self, size: int | None = None) -> int:
        size = super().truncate(size)
        self.log.operations.append(Write(self.node, size, None))
        return size


def damaged(durable: bytes, now: bytes, way: str, chance: Random | None) -> bytes:
    """What a file may hold whose last changes were not synced."""
    if way == "lost":
        return durable
    if way == "zeroed":
        # 没有变的开头还在；其余只有大小，没有内容
        same = next((at for at, (old, new) in enumerate(zip(durable, now, strict=False)) if old != new), min(len(durable), len(now)))
        return now[:same].ljust(len(now), b"\0")
    return now[: chance.randrange(len(now))] if way == "torn" and now else now


def tree_of(root: Path) -> Tree:
    """Everything below a folder."""
    return {path.relative_to(root).as_posix(): None if path.is_dir() else path.read_bytes() for path in sorted(root.rglob("*"))}


def write_tree(root: Path, tree: Tree) -> None:
    """Make a folder hold this and nothing else."""
    for path in root.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, content in tree.items():
        path = root / name
        path.mkdir() if content is None else path.write_bytes(content)
