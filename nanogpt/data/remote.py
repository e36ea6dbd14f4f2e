"""Prepared data sets behind an address (s3://…, file:///mnt/…), read through a local cache of limited size."""

# 准备好的数据集放在别处（dataset.dir=s3://bucket/corpus）：本机缓存里有一个同样的文件夹
# 小文件打开时就取来，训练部分的文件用到时才取（bring），连同接下来要用的；每个都核对 SHA-256 才改名到位
# 缓存有上限：放不下时先删最久没用的。同一台机器上的几个进程用一个缓存，由锁排队，一个文件只取一次
# 断了的网会再试几次；一直不通，错误是一行，训练从最近的 checkpoint 接着来

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from nanogpt.base.files import folder_aside, replace, sync
from nanogpt.base.hashed_json import DamagedError, read_sealed, write_sealed
from nanogpt.base.language import ConfigError, say
from nanogpt.base.lock import only_one
from nanogpt.data.assets import cache_folder
from nanogpt.data.document_files import unreadable
from nanogpt.data.source_text import stem_of

ORIGIN, FORMAT = "origin.json", 1
# 试这么多次，第一次失败之后等这么久（秒），此后每次加倍
TRIES, PAUSE_S = 6, 1.0
# 再试也没有用的
FINAL = (FileNotFoundError, PermissionError, ImportError, ValueError)
PIECE = 2**22


def is_address(path: str | None) -> bool:
    """Whether a path is an address of fsspec."""
    return path is not None and "://" in path


def folder_of_address(address: str) -> Path:
    """The folder of the local cache for a data set behind an address."""
    name = f"{stem_of(Path(address))}-{hashlib.sha256(address.encode('utf-8')).hexdigest()[:12]}"
    return cache_folder() / "shards" / name


def fetch_small(address: str, newest: int) -> Path:
    """The local folder of a data set behind an address, with all its files but shards; `newest` format of meta.json.

    What is cached is used where the address cannot be reached.
    """
    folder = folder_of_address(address)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with only_one(folder.with_name(f".{folder.name}.lock")):
        there = (folder / "meta.json").is_file()
        try:
            content = _content(f"{address}/meta.json", tries=2)
        except ConfigError as error:
            if not there:
                raise
            say("{error}; what is cached in {path} is used", error=error, path=folder)
            return folder
        if there and content == (folder / "meta.json").read_bytes():
            return folder
        with folder_aside(folder) as aside:
            (aside / "meta.json").write_bytes(content)
            _fetch_all(address, aside, newest)
            write_sealed(aside / ORIGIN, {"format": FORMAT, "address": address})
    return folder


def _fetch_all(address: str, aside: Path, newest: int) -> None:
    try:
        meta = read_sealed(aside / "meta.json", newest)
        digests, shards = meta["sha256"], meta.get("shards", {})
        # 文件名只能是同一个文件夹里的
        if any(Path(file).name != file for file in digests):
            raise DamagedError("files")
    except (DamagedError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError("not_a_dataset", path=address, reason=str(error)) from None
    for file in digests.keys() - shards.keys():
        download(f"{address}/{file}", aside / file, digests[file])


def origin_of(folder: Path) -> str | None:
    """The address that a folder of the cache belongs to; None for any other folder."""
    if not (folder / ORIGIN).is_file():
        return None
    try:
        return str(read_sealed(folder / ORIGIN, FORMAT)["address"])
    except (DamagedError, KeyError) as error:
        raise ConfigError("damaged_dataset", path=folder / ORIGIN, reason=str(error), folder=folder) from None


class Cache:
    """Brings the shards of one data set into its folder, and keeps all such folders within a size."""

    # 上限管的是整个缓存：几个语料轮流用，也不会越积越多

    def __init__(self, folder: Path, address: str, meta: dict[str, Any], limit: float):
        """limit: in bytes."""
        self.folder, self.address, self.digests, self.limit = folder, address, meta["sha256"], limit

    def bring(self, file: str, size: int, keep: Collection[str]) -> None:
        """Have a file of so many bytes in the folder; those in `keep` are not deleted for it."""
        path = self.folder / file
        with only_one(self.folder / f".{file}.lock"):
            if not path.is_file():
                self._make_room(size, {self.folder / name for name in keep})
                download(f"{self.address}/{file}", path, self.digests[file])
            with contextlib.suppress(OSError):
                # 只改读的时间：写的时间是 digests 认文件的依据
                os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))

    def _make_room(self, size: int, keep: Collection[Path]) -> None:
        found = []
        for path in self.folder.parent.glob("*/train-*.bin"):
            # 别的进程也在删
            with contextlib.suppress(FileNotFoundError):
                found.append((path, path.stat()))
        excess = sum(state.st_size for _, state in found) + size - self.limit
        for path, state in sorted(found, key=lambda one: one[1].st_atime_ns):
            if excess <= 0:
                return
            if path not in keep:
                # 别的进程正用着的：Unix 上它照样读得到，Windows 上删不掉
                with contextlib.suppress(OSError):
                    path.unlink()
                    excess -= state.st_size


def download(address: str, path: Path, digest: str) -> None:
    """Fetch a file, compared with its SHA-256 before it gets its name; ConfigError if that is not possible."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:

            def fetch() -> str:
                file.seek(0)
                file.truncate()
                return _copied(address, file.write)

            if _tried(address, fetch) != digest:
                raise ConfigError(
                    "{path} is not what meta.json beside it says (SHA-256 differs); put the right file there",
                    path=address,
                )
        sync(aside)
        replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _content(address: str, tries: int) -> bytes:
    pieces: list[bytes] = []

    def fetch() -> bytes:
        pieces.clear()
        _copied(address, pieces.append)
        return b"".join(pieces)

    return _tried(address, fetch, tries)


def _copied(address: str, write: Callable[[bytes], Any]) -> str:
    """Hand over what is behind an address piece by piece; its SHA-256."""
    import fsspec

    digest = hashlib.sha256()
    with fsspec.open(address, "rb") as source:
        while piece := source.read(PIECE):
            digest.update(piece)
            write(piece)
    return digest.hexdigest()


def _tried(address: str, fetch: Callable[[], Any], tries: int = TRIES) -> Any:
    """What fetch() gives; repeated where it fails, with growing pauses."""
    for number in range(tries):
        try:
            return fetch()
        except Exception as error:
            # 哪一种存储，错误就是哪一种库的
            if number == tries - 1 or isinstance(error, FINAL):
                raise unreadable("dataset.dir", address, error) from None
            time.sleep(PAUSE_S * 2**number)
    raise AssertionError
