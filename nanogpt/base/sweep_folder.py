"""The folder that Hydra makes for a sweep: one for each sweep, removed again if nothing was put into it.

A job's own folder in it is named after its number and the values that it was given.
"""

# 一次扫描（-m）的文件夹：同一秒开始的两次各有各的，什么也没写下的不留
# conf/ 把 SweepFolder 登记为 Hydra 的回调，开始时记下原来有什么；结束由 cli 调 tidy_latest 清掉 Hydra 造的空壳
# 只删空文件夹与 Hydra 自己的 multirun.yaml：有任何别的东西就一个也不动

import contextlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from nanogpt.base.files import numbered

# Hydra 为每次扫描写下的，只有它自己的配置
OWN = "multirun.yaml"
KEY = "hydra.sweep.dir"
# 给名字里的值留的长度：Windows 的整条路径不过 260 个字符
LONGEST_NAME = 60


class SweepFolder(Callback):
    """Hydra callback that gives a sweep a folder of its own.

    It remembers what was there before, so that `tidy` knows what Hydra made.
    """

    # Hydra 自己造回调，又不交出来：结束时只能从这里找
    latest: ClassVar["SweepFolder | None"] = None

    def __init__(self) -> None:
        SweepFolder.latest = self
        self.folder = Path()
        self.new: list[Path] = []
        self.before: set[Path] = set()

    def on_multirun_start(self, config: DictConfig, **_kwargs: Any) -> None:
        self.folder = Path(config.hydra.sweep.dir)
        # 由里到外：先删里面的，外面的才会空
        self.new = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        # 建不了就由 Hydra 去说
        with contextlib.suppress(OSError):
            # 名字由时间而来才另选；自己起的名字照用
            if "${now:" in str(OmegaConf.to_container(config.hydra.sweep, resolve=False)["dir"]):
                self._choose(config)
        self.before = set(self.folder.iterdir()) if self.folder.is_dir() else set()

    def _choose(self, config: DictConfig) -> None:
        """Make the folder, under another name if a sweep that started in the same second has made it."""
        named = self.folder
        for self.folder in numbered(named):
            with contextlib.suppress(FileExistsError):
                self.folder.mkdir(parents=True)
                break
        if self.folder != named:
            self.new = [self.folder]
            with read_write(config), open_dict(config):
                config.hydra.sweep.dir = str(self.folder)
                # 每个任务的配置都重新拼一次，只认命令行
                config.hydra.overrides.hydra.append(f"{KEY}='{self.folder.as_posix()}'")

    def tidy(self) -> None:
        """Remove empty job folders, multirun.yaml and the folders around them, if the sweep left nothing else."""
        made = set(self.folder.iterdir()) - self.before if self.folder.is_dir() else set()
        if any(any(path.iterdir()) if path.is_dir() else path.name != OWN for path in made):
            return
        for path in itertools.chain(made, self.new):
            with contextlib.suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()


@dataclass(frozen=True)
class Job:
    """One job of a sweep that trains."""

    # 任务也许在别的进程里跑，也许没开成：从命令行知道该有哪些，结果都到目录里去看

    overrides: tuple[str, ...]
    folder: Path
    reason: str = ""
    """Why it failed, where that is known."""


def swept_name(overrides: str) -> str:
    """What a job's overrides add to the name of its folder; only characters that every system takes."""
    name = re.sub(r"[^\w.=+-]+", "_", overrides)[:LONGEST_NAME].strip("_. ")
    return f"_{name}" if name else ""


OmegaConf.register_new_resolver("swept_name", swept_name, replace=True)


def naming_jobs(overrides: Sequence[str]) -> list[str]:
    """The override of Hydra that keeps what all jobs share out of the names of their folders."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException:
        # 写错的由 Hydra 去说
        return []
    given = {o.key_or_group for o in parsed if o.is_sweep_override()}
    shared = sorted({o.key_or_group for o in parsed} - given)
    return [f"hydra.job.config.override_dirname.exclude_keys=[{','.join(shared)}]"] if shared else []


def tidy_latest() -> None:
    """Tidy up behind the sweep of this process, if there was one."""
    if SweepFolder.latest:
        SweepFolder.latest.tidy()
        SweepFolder.latest = None
