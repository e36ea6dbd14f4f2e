"""How a run is named: `latest` or a path as people type it, and the id in run.json."""

# 人怎样指一次训练：latest、目录、里面的 ckpt/ 或某个 checkpoint；程序怎样认出它：run.json 里的编号
# 命令行、权重与训练都要用，所以放在最底下；目录里的其余内容见 run/rundir.py
# outputs/latest 是写着路径的文件；编号写在每个 checkpoint 里，两次训练的混在一起时认得出来

import contextlib
import re
import uuid
from dataclasses import dataclass
from pathlib import Path

from nanogpt.base.files import make_folder, remove_leftovers, sync, write_text
from nanogpt.base.hashed_json import DamagedError, read_sealed, write_sealed
from nanogpt.base.language import ConfigError

OUTPUTS = Path("outputs")
# 文件而不是符号链接：Windows 建链接要特权
LATEST = OUTPUTS / "latest"
# 从 2 起带摘要
FORMAT = 2


def is_latest(named: str) -> bool:
    """Whether a person means the latest run: `latest`, or the file that says which one it is."""
    return named == "latest" or (Path(named).name == LATEST.name and Path(named).is_file())


def names_run(named: str) -> bool:
    """Whether a name means a run of ours (its folder, ckpt/, a checkpoint, or latest), not weights of another kind."""
    path = Path(named)
    return is_latest(named) or (path / "ckpt").is_dir() or _inside(path) != path or (path / "manifest.json").is_file()


def _inside(path: Path) -> Path:
    """The run folder around a path that is its ckpt/ or one of its checkpoints; else the path."""
    if re.fullmatch(r"iter_\d+", path.name) and path.absolute().parent.name == "ckpt" and path.is_dir():
        # 在 ckpt/ 里敲的只有一截
        return (path if len(path.parts) > 1 else path.absolute()).parent.parent
    return path.parent if path.name == "ckpt" and path.is_dir() and not (path / "ckpt").is_dir() else path


def locate(named: str, key: str = "resume") -> Path:
    """The run folder that a person named: `latest`, or a path to it, to its ckpt/ or to one of its checkpoints."""
    if is_latest(named):
        file = LATEST if named == "latest" else Path(named)
        if not file.is_file():
            raise ConfigError("no_run", key=key, path=file)
        # 早先的版本没有同步它：断电后可能是空的，或者一串 NUL；空的名字就是当前文件夹
        named = file.read_text(encoding="utf-8", errors="replace").strip().replace("\0", "?")
        if not named:
            raise ConfigError("no_run", key=key, path=file)
    path = _inside(Path(named))
    if not (path / "ckpt").is_dir() and not any((path / file).is_file() for file in ("run.json", "config.yaml")):
        raise ConfigError("no_run", key=key, path=path)
    return path


def checkpoint_in(named: str, which: str | None, usual: str) -> str:
    """The checkpoint to use: the one whose folder was named, else `which`, else the usual one."""
    folder = Path(named)
    if is_latest(named) or _inside(folder) == folder or folder.name == "ckpt":
        return which or usual
    if which not in (None, usual, folder.name):
        raise ConfigError(
            "checkpoint={got} is not the checkpoint {named} that was named; type one of them",
            named=named, got=which,
        )
    return folder.name


def remember(path: Path) -> None:
    """Make `path` the run that resume=latest means."""
    make_folder(OUTPUTS)
    # 被杀时留下的，不能越积越多
    remove_leftovers(OUTPUTS, LATEST.name)
    with contextlib.suppress(FileNotFoundError):
        # 同时启动的另一次训练把没写完的当成了剩下的：latest 会是它的
        write_text(LATEST, str(path.absolute()) + "\n")
    sync(OUTPUTS)


# ---- run.json ----


@dataclass(frozen=True)
class RunRecord:
    """run.json: what a run is from its first moment on."""

    # 比第一个 checkpoint 早：训练还没存过就被杀，目录也认得出是谁、按什么配置开始

    id: str
    """Stands in every checkpoint of the run, so that those of two runs cannot be mixed up."""
    config_text: str
    """The resolved config that the run began with."""


def write_record(path: Path, config_text: str, known: str | None = None) -> RunRecord:
    """Write run.json, with a new id where none is known."""
    record = RunRecord(known or uuid.uuid4().hex, config_text)
    write_sealed(path / "run.json", {"format": FORMAT, "id": record.id, "config": record.config_text})
    return record


def recorded(path: Path) -> RunRecord:
    """Read run.json of a run folder; DamagedError if it is missing or cannot be used."""
    values = read_sealed(path / "run.json", FORMAT)
    if not all(isinstance(values.get(key), str) for key in ("id", "config")):
        raise DamagedError("no id, no config")
    return RunRecord(values["id"], values["config"])
