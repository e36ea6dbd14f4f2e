"""Run folders: choosing, protecting and finding them; the config of a run that goes on.

A run folder holds run.json (its id, and the config it began with), config.yaml, tokenizer.json, metrics.jsonl, logs/, ckpt/,
data/ (small data sets), lock (held while the run lives) and, at the end, summary.json. Needs no torch.
"""

import contextlib
import os
import re
import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nanogpt.config import ROOT, TrainConfig, untrusted_targets
from nanogpt.files import folders_around, make_folder, numbered, remove_leftovers, sync, write_text
from nanogpt.lock import Lock
from nanogpt.messages import ConfigError, text
from nanogpt.quoting import typed_override
from nanogpt.saved_config import read_saved
from nanogpt.sealed import DamagedError, read_sealed, reason_of, write_sealed

OUTPUTS = Path("outputs")
# 文件而不是符号链接：Windows 建链接要特权
LATEST = OUTPUTS / "latest"
# 属于一次训练的名字；清空目录时只认这些
RUN_FILES = {"run.json", "config.yaml", "tokenizer.json", "metrics.jsonl", "summary.json", "logs", "ckpt", "data", "wandb"}
LOCK = "lock"
# 其中训练会往里写的：data 只读
WRITTEN = RUN_FILES - {"data"}
# 从 2 起带摘要
FORMAT = 2
# 继续训练时不可改：改了就不再是同一次训练
FIXED_ON_RESUME = ("model", "dataset", "seed", "init_from", "finetune")
# 其中这些例外：不影响参数的形状
CHANGEABLE = {("model", "dropout"), ("dataset", "dir"), ("finetune", "dropout")}
# 后来才有的键：更早的训练目录没有它们，取默认值
ADDED_LATER = ("init_from", "finetune")
# 写进 model 节点的配置组
GROUP_NODES = {"arch": "model"}
# 顶层的短名字同时决定的键
ALIASES = {"dropout": ("dropout", "model.dropout")}


def choose(cfg: TrainConfig) -> Path:
    """The folder of a new run; refuses one that holds anything, unless overwrite=true and it is a run."""
    if cfg.out_dir is None:
        # 微调的形状来自权重，名字也跟着它
        model = re.sub(r"\W+", "-", Path(cfg.init_from).stem).strip("-") if cfg.init_from else cfg.model.name
        stem = OUTPUTS / f"{cfg.dataset['name']}-{model}-{time.strftime('%Y%m%d-%H%M%S')}"
        # 同一秒启动两次训练时加序号
        return next(p for p in numbered(stem) if not p.exists())
    path = Path(cfg.out_dir)
    if ".." in path.parts:
        # 不解析就会先造出 nope/../x 里的 nope
        path = path.resolve()
    if path.exists() and not path.is_dir():
        raise ConfigError("not_writable", path=path, reason="not a folder")
    refuse_contents(path, overwrite=cfg.overwrite)
    # 找到最近的已存在的上级，看能否写入
    parent = next(p for p in [path, *path.absolute().parents] if p.exists())
    if not os.access(parent, os.W_OK):
        raise ConfigError("not_writable", path=path, reason=f"{parent} is read-only")
    return path


def refuse_contents(path: Path, *, overwrite: bool) -> None:
    """ConfigError when a run may not begin in this folder, which need not be there yet."""
    there = {p.name for p in path.iterdir() if not _left_behind(p)} if path.is_dir() else set()
    if there - RUN_FILES:
        raise ConfigError("out_dir_foreign", path=path)
    if there and not overwrite:
        raise ConfigError("out_dir_exists", path=path, resume=typed_override("resume", path))


def _left_behind(path: Path) -> bool:
    """Whether this is no content, but what a start leaves that was killed, or lost its power, before there was a run."""
    empty = path.name in RUN_FILES and path.is_dir() and not any(path.iterdir())
    return path.name == LOCK or empty or re.fullmatch(r"\..+\.tmp", path.name) is not None


def hold(path: Path) -> Lock:
    """The lock of a run folder; ConfigError while another process trains in it. What a killed process left half-written is removed."""
    # 陌生人的目录里，链接可以指向你的任何文件；整个目录是链接（放到别的盘上）则是你自己定的
    if links := sorted(name for name in (*WRITTEN, LOCK) if (path / name).is_symlink()):
        raise ConfigError("run_links", path=path, name=links[0])
    lock = Lock(path / LOCK)
    try:
        if not lock.take():
            raise ConfigError("run_in_use", path=path, process=lock.holder())
        remove_leftovers(path)
        # 被杀在最后一刻的，没有下一次保存来清
        remove_leftovers(path / "ckpt")
    except OSError as error:
        raise ConfigError("not_writable", path=path, reason=error.strerror) from None
    return lock


def claim(path: Path, *, overwrite: bool) -> Lock:
    """Make and lock the folder of a new run, emptying an old run if told to."""
    try:
        with folders_around(path):
            make_folder(path)
        lock = hold(path)
        try:
            # 从检查到这里过了几秒：别的进程可能也选了它
            refuse_contents(path, overwrite=overwrite)
            _empty(path)
        except BaseException:
            lock.release(remove=lock.made)
            raise
        return lock
    except OSError as error:
        raise ConfigError("not_writable", path=path, reason=error.strerror) from None


def _empty(path: Path) -> None:
    for name in RUN_FILES:
        if (path / name).is_dir():
            shutil.rmtree(path / name)
        else:
            (path / name).unlink(missing_ok=True)
    # 断电后不能又冒出一半：旧的 checkpoint 配上新的 run.json
    sync(path)


def abandon(path: Path, lock: Lock) -> None:
    """Remove what claim() and a run that could not begin have left in its folder."""
    with contextlib.suppress(OSError):
        _empty(path)
        remove_leftovers(path)
        lock.release(remove=True)
        # 里面还有别的，就留着
        path.rmdir()


@dataclass(frozen=True)
class RunRecord:
    """run.json: what a run is from its first moment on."""

    id: str
    """Stands in every checkpoint of the run, so that those of two runs cannot be mixed up."""
    config_text: str
    """The resolved config that it began with."""


def write_record(path: Path, config_text: str, known: str | None = None) -> RunRecord:
    """Write run.json, with a new id where none is known."""
    record = RunRecord(known or uuid.uuid4().hex, config_text)
    write_sealed(path / "run.json", {"format": FORMAT, "id": record.id, "config": record.config_text})
    return record


def read_record(path: Path) -> RunRecord | None:
    """run.json of a run folder, None in one of an earlier version; ConfigError when it is damaged."""
    file = path / "run.json"
    if not file.is_file():
        return None
    try:
        values = read_sealed(file, FORMAT)
        if not all(isinstance(values.get(key), str) for key in ("id", "config")):
            raise DamagedError("no id, no config")
        return RunRecord(values["id"], values["config"])
    except DamagedError as error:
        raise ConfigError("damaged_checkpoint", file=file, reason=error, remedy=text("remove_record")) from None


def remember(path: Path) -> None:
    """Make `path` the run that resume=latest means."""
    make_folder(OUTPUTS)
    # 被杀时留下的，不能越积越多
    remove_leftovers(OUTPUTS, LATEST.name)
    with contextlib.suppress(FileNotFoundError):
        # 同时启动的另一次训练把没写完的当成了剩下的：latest 会是它的
        write_text(LATEST, str(path.absolute()) + "\n")
    sync(OUTPUTS)


def locate(named: str, key: str = "resume") -> Path:
    """The run folder that a person named: a path, or `latest`."""
    if named == "latest":
        if not LATEST.is_file():
            raise ConfigError("no_run", key=key, path=LATEST)
        # 早先的版本没有同步它：断电后可能是空的，或者一串 NUL；空的名字就是当前文件夹
        named = LATEST.read_text(encoding="utf-8", errors="replace").strip().replace("\0", "?")
        if not named:
            raise ConfigError("no_run", key=key, path=LATEST)
    path = Path(named)
    if not (path / "ckpt").is_dir() and not (path / "run.json").is_file():
        raise ConfigError("no_run", key=key, path=path)
    return path


def resumed_config(saved_text: str, typed: TrainConfig, overrides: list[str], source: Path) -> TrainConfig:
    """The saved config with what was typed on this command line laid over it; `source` is where it comes from."""
    try:
        return _resumed(read_saved(saved_text), typed, overrides, source)
    except ConfigError:
        raise
    except (OmegaConfBaseException, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        # 摘要对得上、内容却合不上：另一个版本写的，或者有人改过
        raise ConfigError("damaged_checkpoint", file=source, reason=f"config.yaml: {reason_of(error)}", remedy=text("no_older_checkpoint")) from None


def _resumed(saved: dict, typed: TrainConfig, overrides: list[str], source: Path) -> TrainConfig:
    fresh = OmegaConf.to_container(OmegaConf.structured(typed))
    defaults = OmegaConf.to_container(OmegaConf.structured(TrainConfig), throw_on_missing=False)
    foreign = untrusted_targets(saved, fresh)
    if foreign:
        raise ConfigError("untrusted", path=source, targets=", ".join(foreign))
    for key in ADDED_LATER:
        saved.setdefault(key, defaults[key])
    before = {key: saved[key] for key in FIXED_ON_RESUME}
    merged, typed_node = OmegaConf.create(saved), OmegaConf.create(fresh)
    for override in OverridesParser.create().parse_overrides(overrides):
        key = override.key_or_group
        if key == "experiment":
            # 一套配方会改动许多键，说不清哪些该变
            raise ConfigError("resume_changes", key="experiment", old="-", new=override.value())
        if (ROOT / "conf" / key).is_dir():
            key = GROUP_NODES.get(key, key)
        for target in ALIASES.get(key, (key,)):
            OmegaConf.update(merged, target, OmegaConf.select(typed_node, target), merge=False)
    if merged.model.vocab_size is None:
        # 重新写出的 model=… 没有词表大小，它由数据决定，沿用原来的
        merged.model.vocab_size = before["model"]["vocab_size"]
    after = OmegaConf.to_container(merged)
    for key in FIXED_ON_RESUME:
        refuse_change(key, before[key], after[key])
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), merged))


def typed_model_fields(overrides: list[str], experiment: str | None) -> set[str]:
    """Fields of the model that a person chose: typed here, or set by the experiment."""
    # 选了 model=… 等于写出形状，选了 arch=… 等于写出结构
    groups = {"model": {"_target_", "n_layer", "n_head", "n_embd"}, "arch": {"arch"}}
    fields: set[str] = set()
    for override in OverridesParser.create().parse_overrides(overrides):
        key = override.key_or_group
        fields |= groups.get(key, {key.split(".")[1]} if key.startswith("model.") else set())
    if experiment:
        recipe = yaml.safe_load((ROOT / "conf" / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8"))
        fields |= set(recipe.get("model") or {})
    return fields


def refuse_change(key: str, old, new) -> None:
    """Raise when a fixed key changed."""
    if not isinstance(old, dict):
        old, new, key, parent = {key: old}, {key: new}, "", ""
    else:
        parent = key
    for name in sorted(set(old) | set(new)):
        if old.get(name) != new.get(name) and (parent, name) not in CHANGEABLE:
            raise ConfigError("resume_changes", key=f"{parent}.{name}".strip("."), old=old.get(name), new=new.get(name))
