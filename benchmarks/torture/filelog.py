"""What a program does to the files below a folder, operation by operation, and the states that a loss of power may leave of it.

A file system owes nothing but what was synced: fsync of a file keeps its content, fsync of a folder keeps the names in it. Of everything
else any part may be there after the cut: names lost, kept in order or out of it, contents lost, zeroed or torn. Renaming within a
folder is atomic. That is less than ext4, XFS, Btrfs or NTFS promise: what holds here holds on them.
"""

import builtins
import contextlib
import io
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

# 一棵树：相对路径 -> 内容，文件夹是 None
Tree = dict[str, bytes | None]
KINDS = ("nothing unsynced", "names kept, contents lost", "names kept, contents zeroed", "names kept, contents torn", "in order", "out of order")


@dataclass(frozen=True)
class Entry:
    """Names of a folder that change together; None takes a name away."""

    folder: int
    names: tuple[tuple[str, int | None], ...]


@dataclass(frozen=True)
class Write:
    """Bytes that come to stand at an offset."""

    file: int
    offset: int
    content: bytes


@dataclass(frozen=True)
class Cut:
    """A file gets this size."""

    file: int
    size: int


@dataclass(frozen=True)
class Sync:
    """fsync of a file or folder."""

    node: int


@dataclass(frozen=True)
class Mark:
    """Something that the program has reached, for the judge."""

    reached: object


def changed(content: bytes, operation: Write | Cut) -> bytes:
    """The content of a file after an operation."""
    if isinstance(operation, Cut):
        return content[: operation.size].ljust(operation.size, b"\0")
    end = operation.offset + len(operation.content)
    return content[: operation.offset].ljust(operation.offset, b"\0") + operation.content + content[end:]


class FileLog:
    """Records below `root` inside recording(); nothing there may be changed by other processes meanwhile."""

    def __init__(self, root: Path):
        self.root = str(root.resolve())
        self.operations: list[Entry | Write | Cut | Sync | Mark] = []
        self.entries: dict[int, dict[str, int]] = {0: {}}
        """Names in each folder as they are now; 0 is the root."""
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

    def mark(self, reached: object) -> None:
        """Note that the program has got so far."""
        self.operations.append(Mark(reached))

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Note every change of a file or folder below the root by this process (Python's own functions, without numpy's and C's)."""
        changes = {
            "mkdir": self._made, "rmdir": self._removed, "unlink": self._removed, "remove": self._removed, "rename": self._renamed,
            "replace": self._renamed,
        }
        with contextlib.ExitStack() as patches:
            for name, noted in changes.items():
                patches.enter_context(mock.patch.object(os, name, self._noting(getattr(os, name), noted)))
            for module, name, stand_in in (
                (os, "open", self._opening(os.open)), (os, "fsync", self._synced), (builtins, "open", self._file(builtins.open)),
                (io, "open", self._file(io.open)),
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

    def _at(self, path) -> int | None:
        """The node of a path."""
        if os.path.abspath(os.fsdecode(path)) == self.root:
            return 0
        place = self._place(path)
        return place and self.entries[place[0]].get(place[1])

    def _rename(self, folder: int, *names: tuple[str, int | None]) -> None:
        self.operations.append(Entry(folder, names))
        for name, node in names:
            self.entries[folder].pop(name, None)
            if node is not None:
                self.entries[folder][name] = node

    def _noting(self, real, noted):
        def call(*arguments, **options):
            real(*arguments, **options)
            noted(*arguments)

        return call

    def _made(self, path, *_) -> None:
        if place := self._place(path):
            self._rename(place[0], (place[1], self._node(folder=True)))

    def _removed(self, path, *_) -> None:
        if place := self._place(path):
            self._rename(place[0], (place[1], None))

    def _renamed(self, old, new, *_) -> None:
        source, target = self._place(old), self._place(new)
        assert (source and source[0]) == (target and target[0]), "only renames within a folder are known to be atomic"
        if source:
            self._rename(source[0], (source[1], None), (target[1], self.entries[source[0]][source[1]]))

    def _opening(self, real):
        def call(path, flags, *arguments, **options):
            descriptor = real(path, flags, *arguments, **options)
            self.descriptors.pop(descriptor, None)
            if (place := self._place(path)) and flags & os.O_CREAT:
                self.created(place)
            if (node := self._at(path)) is not None:
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

    def state(self, at: int, kind: str = "", chance: random.Random | None = None) -> Tree:
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

    def _kept(self, done: list, synced: dict[int, int], kind: str, chance: random.Random | None) -> set[int]:
        """Which changes of names that were not synced are there all the same."""
        pending = [n for n, operation in enumerate(done) if isinstance(operation, Entry) and n > synced.get(operation.folder, -1)]
        if kind == "nothing unsynced":
            return set()
        if kind == "in order":
            return set(pending[: chance.randrange(len(pending) + 1)])
        if kind == "out of order":
            return {number for number in pending if chance.random() < 0.5}
        return set(pending)

    def _contents(self, done: list, kind: str, chance: random.Random | None) -> dict[int, bytes]:
        """What each file holds."""
        files = [node for node in range(1, self.nodes + 1) if node not in self.entries]
        now = {node: self.before.get(node, b"") for node in files}
        durable = dict(now)
        for operation in done:
            if isinstance(operation, Write | Cut):
                now[operation.file] = changed(now[operation.file], operation)
            elif isinstance(operation, Sync) and operation.node in now:
                durable[operation.node] = now[operation.node]
        ways = {"nothing unsynced": "lost", "contents lost": "lost", "contents zeroed": "zeroed", "contents torn": "torn"}
        way = ways.get(kind.rpartition(", ")[2])
        for node in files:
            if kind and now[node] != durable[node]:
                drawn = way or chance.choice(["lost", "zeroed", "torn", "kept"])
                now[node] = damaged(durable[node], now[node], drawn, chance)
        return now

    def _collect(self, folder: int, prefix: str, entries: dict, contents: dict[int, bytes], found: Tree) -> None:
        for name, node in sorted(entries.get(folder, {}).items()):
            found[prefix + name] = contents.get(node)
            if node in self.entries:
                self._collect(node, f"{prefix}{name}/", entries, contents, found)


class _Recorded(io.FileIO):
    """A file whose changes are noted."""

    def __init__(self, log: FileLog, place: tuple[int, str], path, mode: str, opener):
        super().__init__(path, mode.replace("b", "").replace("t", ""), opener=opener)
        self.log, self.node, self.appends = log, log.created(place), "a" in mode
        log.descriptors[self.fileno()] = self.node
        if "w" in mode:
            log.operations.append(Cut(self.node, 0))

    def write(self, content) -> int:
        at = os.fstat(self.fileno()).st_size if self.appends else self.tell()
        written = super().write(content)
        self.log.operations.append(Write(self.node, at, bytes(content)[:written]))
        return written

    def truncate(self, size: int | None = None) -> int:
        size = super().truncate(size)
        self.log.operations.append(Cut(self.node, size))
        return size


def damaged(durable: bytes, now: bytes, way: str, chance: random.Random | None) -> bytes:
    """What a file may hold whose last changes were not synced."""
    if way == "lost":
        return durable
    if way == "zeroed":
        # 没有变的开头还在；其余只有大小，没有内容
        same = next((at for at, (old, new) in enumerate(zip(durable, now, strict=False)) if old != new), min(len(durable), len(now)))
        return now[:same].ljust(len(now), b"\0")
    if way == "torn":
        return now[: chance.randrange(len(now))] if now else now
    return now


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
