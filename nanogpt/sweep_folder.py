"""The folder that Hydra makes for a sweep: one in which nothing came to lie is taken away again."""

import contextlib
from pathlib import Path
from typing import Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

# Hydra 为每次扫描写下的，只有它自己的配置
OWN = "multirun.yaml"


class SweepFolder(Callback):
    """Hydra callback: remembers what lay there before a sweep, so that `tidy` can tell what Hydra made."""

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
        self.before = set(self.folder.iterdir()) if self.folder.is_dir() else set()

    def tidy(self) -> None:
        """Take away empty job folders, multirun.yaml and the folders around it, if the sweep left nothing else."""
        made = set(self.folder.iterdir()) - self.before if self.folder.is_dir() else set()
        if any(any(path.iterdir()) if path.is_dir() else path.name != OWN for path in made):
            return
        for path in [*made, *self.new]:
            with contextlib.suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()


def tidy_latest() -> None:
    """Tidy up behind the sweep of this process, if there was one."""
    if SweepFolder.latest:
        SweepFolder.latest.tidy()
        SweepFolder.latest = None
