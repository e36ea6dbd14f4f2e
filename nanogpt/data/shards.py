"""Reads a training split that lies in many files as one array; the files to come are checked and read ahead."""

# 训练部分分成许多 .bin（shard）时，用起来仍像一个数组：Shards[起:止]、Shards[位置]
# 每个文件第一次用到时才核对 SHA-256 与 id：几百 GB 的语料不必读完一遍才开始训练
# 接下来要用的由一个线程先读一遍（ahead）：慢的硬盘与网络盘上，训练读的都已在内存里；远处的先取到本机缓存
# 映射只留正在用与马上要用的几个文件：打开的文件与内存都有上限

import threading
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from nanogpt.base.files import sha256
from nanogpt.base.hashed_json import reason_of
from nanogpt.base.language import ConfigError
from nanogpt.data.digests import Hashed


def verified(path: Path, expected: str, folder: Path, dtype: np.dtype | None = None, count: int = 0) -> int:
    """Refuse a file of a data set that is not what meta.json says; the largest id in a file of `count` tokens, else 0.

    ConfigError names the file and what is wrong with it.
    """
    largest = [0]
    # 先看大小：几十 GB 的文件不必读完才知道不对
    check_there(path, folder, count * dtype.itemsize if dtype else None)

    def look(piece: bytes) -> None:
        # 几十 GB 只读一遍：边算摘要边看 id
        if dtype:
            largest.append(int(np.frombuffer(piece, dtype).max()))

    try:
        reason = "SHA-256 differs" if sha256(path, look) != expected else ""
    except (OSError, ValueError) as error:
        # 坏扇区读不出来；正被截短的，末尾不是整个的 id
        reason = reason_of(error)
    if reason:
        raise ConfigError("damaged_dataset", path=path, reason=reason, folder=folder)
    return max(largest)


def check_there(path: Path, folder: Path, size: int | None = None) -> None:
    """Refuse a file of a data set that is missing, or whose size is another one."""
    if not path.is_file():
        raise ConfigError("damaged_dataset", path=path, reason="missing", folder=folder)
    if size is not None and (found := path.stat().st_size) != size:
        raise ConfigError("damaged_dataset", path=path, reason=f"{found} bytes, not {size}", folder=folder)


class Opener:
    """Opens the shards of one data set folder, each checked before its first use, and keeps those that are wanted."""

    # 几个 Shards（训练的、留出的）共用一个：同一个文件只映射一次

    def __init__(
        self, folder: Path, meta: dict, *, verify: bool = False,
        bring: Callable[[str, int, Collection[str]], None] | None = None,
    ):
        """bring(file, its bytes, files that are wanted) fetches a file of the folder that lies elsewhere."""
        self.folder, self.meta, self.verify, self.bring = folder, meta, verify, bring
        self.dtype = np.dtype(meta["dtype"])
        self._opened: dict[str, Future[np.ndarray]] = {}
        self._one_by_one = threading.Lock()
        if not bring:
            # 少了一个、短了一截，一开始就说
            for file, count in meta["shards"].items():
                check_there(folder / file, folder, count * self.dtype.itemsize)

    def ahead(self, files: Iterable[str]) -> None:
        """Keep these files open and no others; those that are new are checked and read in a thread, in this order."""
        files = list(files)
        self._opened = {file: opened for file, opened in self._opened.items() if file in files}
        if new := {file: Future() for file in files if file not in self._opened}:
            self._opened |= new
            # daemon：训练停下时不等一个还在下载的文件
            threading.Thread(target=self._open_all, args=(new,), daemon=True).start()

    def tokens(self, file: str) -> np.ndarray:
        """The ids in a file, (n,); waits until it is checked. ConfigError if it is damaged or cannot be fetched."""
        if file not in self._opened:
            self.ahead([*self._opened, file])
        return self._opened[file].result()

    def _open_all(self, files: dict[str, Future]) -> None:
        for file, opened in files.items():
            # 已不要的就不读了
            if self._opened.get(file) is not opened:
                opened.cancel()
                continue
            try:
                # 一次一个：否则上一批的线程腾地方时，会删掉刚取来、还没映射的
                with self._one_by_one:
                    opened.set_result(self._open(file))
            except BaseException as error:
                # 留给用到它的线程去抛
                opened.set_exception(error)

    def _open(self, file: str) -> np.ndarray:
        path, digest, count = self.folder / file, self.meta["sha256"][file], self.meta["shards"][file]
        if self.bring:
            self.bring(file, count * self.dtype.itemsize, self._opened.keys())
        check_there(path, self.folder, count * self.dtype.itemsize)
        hashed = Hashed([path])
        known = None if self.verify else hashed.recall()
        if isinstance(known, list) and known[:1] == [digest]:
            # 核对过的也从头读一遍：之后训练零散地读，读到的都在系统的缓存里
            with path.open("rb") as stream:
                while stream.read(2**22):
                    pass
            largest = known[1]
        else:
            largest = verified(path, digest, self.folder, self.dtype, count)
            hashed.remember([digest, largest])
        if largest >= self.meta["vocab_size"]:
            raise ConfigError("damaged_dataset", path=path, reason=f"id {largest}", folder=self.folder)
        return np.memmap(path, self.dtype, mode="r")


class Shards:
    """The tokens of many files, one behind the other: an array of which slices and places can be read."""

    # 只有用得着的那点数组接口；整个读进内存的写法在这里不存在

    def __init__(self, opener: Opener, parts: list[tuple[str, int, int]] | None = None):
        """parts: (file, first token, number of tokens); None: all of each file."""
        self.opener = opener
        self.parts = [(file, 0, n) for file, n in sorted(opener.meta["shards"].items())] if parts is None else parts
        self.sizes = np.array([count for _, _, count in self.parts], dtype=np.int64)
        self.offsets = self.sizes.cumsum() - self.sizes
        self.dtype = opener.dtype

    def __len__(self) -> int:
        return int(self.sizes.sum())

    @property
    def nbytes(self) -> int:
        return len(self) * self.dtype.itemsize

    def __getitem__(self, key: slice | np.ndarray) -> np.ndarray:
        """The tokens of a slice without a step, (n,), or at places of any shape, as a new array."""
        places = np.arange(*key.indices(len(self))) if isinstance(key, slice) else key
        found = np.empty(places.shape, self.dtype)
        owner = np.searchsorted(self.offsets, places, side="right") - 1
        for number in np.unique(owner):
            here = owner == number
            file, first, _ = self.parts[number]
            found[here] = self.opener.tokens(file)[places[here] - self.offsets[number] + first]
        return found

    def ahead(self, numbers: Iterable[int]) -> None:
        """Read these shards ahead, and let go of all others."""
        self.opener.ahead(dict.fromkeys(self.parts[number][0] for number in numbers))

    def part(self, start: int, stop: int) -> "Shards":
        """The tokens from start to stop, without reading any."""
        cut = [
            (file, first + max(0, start - at), min(count, stop - at) - max(0, start - at))
            for (file, first, count), at in zip(self.parts, self.offsets.tolist())
            if at < stop and at + count > start
        ]
        return Shards(self.opener, cut)
