"""Remembers which large files were hashed already, so that opening a data set does not read it whole again."""

# 核对过的大文件不再从头读一遍：记下大小、修改时间与 inode，三样都没变就沿用上次的结果
# 与 make、rsync 一样只看这三样；硬盘悄悄坏掉的一个比特它看不出来，verify=true 才全部重算
# 记在缓存文件夹的一个 json 里，不写进使用者的文件夹：那里可能只读；坏了、删了都只是多读一遍

import contextlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nanogpt.base.files import write_text
from nanogpt.data.assets import cache_folder
from nanogpt.data.source_text import digest, state_of

# 再小的，读一遍比查一遍快
WORTH = 2**20
# 刚写过的不记：同一个时钟刻度里可能又被改过一次（FAT 的刻度是 2 秒）
SETTLED_S = 3
MOST = 1000


def _file() -> Path:
    return cache_folder() / "hashed.json"


def _read() -> dict[str, list]:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if isinstance(found := json.loads(_file().read_text(encoding="utf-8")), dict):
            return found
    return {}


class Hashed:
    """Some files as they are now, and what was found out about them when they were last like this."""

    # 先看状态，再去读文件：读的时候被改了，记下的就是旧状态，下次对不上

    def __init__(self, files: Iterable[Path]):
        self.files = [file.absolute() for file in files]
        self.state = [list(state) for state in state_of(self.files)]
        self.name = "|".join(map(str, self.files))

    @property
    def large(self) -> bool:
        """Whether they are large enough to be remembered."""
        return sum(size for size, *_ in self.state) >= WORTH

    def recall(self) -> Any:
        """What remember() was told, None if that is not known or a file was written to since."""
        found = _read().get(self.name) if self.large else None
        return found[1] if isinstance(found, list) and len(found) == 2 and found[0] == self.state else None

    def remember(self, finding: Any) -> None:
        """Keep a finding, which json can hold, for the next time."""
        newest = max(written for _, written, _ in self.state)
        if not self.large or newest > time.time_ns() - SETTLED_S * 10**9:
            return
        known = _read()
        known.pop(self.name, None)
        known[self.name] = [self.state, finding]
        # 缓存写不了：只是下次再读一遍
        with contextlib.suppress(OSError):
            _file().parent.mkdir(parents=True, exist_ok=True)
            write_text(_file(), json.dumps(dict(list(known.items())[-MOST:])))


def digest_of_text(path: Path, *, verify: bool = False) -> str:
    """Hex SHA-256 of a text file, from memory where it has not changed since, unless `verify`."""
    hashed = Hashed([path])
    if isinstance(known := None if verify else hashed.recall(), str):
        return known
    hashed.remember(found := digest(path))
    return found
