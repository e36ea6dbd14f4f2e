"""Choose, protect and find run folders, and compose the config of a run that is resumed.

A run folder holds run.json (its id, and the config it began with), config.yaml, tokenizer.json, metrics.jsonl,
logs/, ckpt/, data/ (small data sets), lock (held while the run lives) and, at the end, summary.json and report.html.
Needs no torch.
"""

# 训练目录：选名字、占住、不覆盖别人的东西，以及续训时把存下的配置与这次敲的合起来
# 目录里有 run.json（编号与起始的配置）、config.yaml、tokenizer.json、metrics.jsonl、logs/、ckpt/、data/（小数据集），
# 训练着的还有 lock，结束了的还有 summary.json 与 report.html，交给集群的还有 job/
# choose 只看不写，hold 加锁，claim 造目录并清掉旧的，abandon 收回没开成的
# 续训：存下的配置为底，只有这次敲了的键盖上去；改了就不再是同一次训练的键，一律拒绝
# 不导入 torch：写错了要马上说

import contextlib
import os
import re
import shutil
import time
from dataclasses import asdict
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nanogpt.base.composing import one_line
from nanogpt.base.config import FinetuneConfig, ModelConfig, TrainConfig, plain, targets, trusted_targets
from nanogpt.base.files import folders_around, is_litter, make_folder, numbered, remove_leftovers, sync
from nanogpt.base.groups import keys_of
from nanogpt.base.hashed_json import DamagedError, NewerError, reason_of
from nanogpt.base.language import ConfigError, say, text
from nanogpt.base.lock import Lock
from nanogpt.base.moved import present_name
from nanogpt.base.quoting import key_of_override, typed_override
from nanogpt.base.run_names import OUTPUTS, RunRecord, recorded
from nanogpt.base.saved_config import read_saved, refuse_unnamed_code, schema_node, typed_node
from nanogpt.base.user_yaml import is_group

# 属于一次训练的名字；清空目录时只认这些
RUN_FILES = {
    "run.json", "config.yaml", "tokenizer.json", "metrics.jsonl", "summary.json", "logs", "ckpt", "data", "wandb",
    "swanlog", "report.html",
}
# 别的程序也爱用这两个名字：里面的也要是训练写的
INSIDE = {"ckpt": r"(replaced_)?iter_\d+(-\d+)?", "data": r".+\.(bin|json)"}
LOCK = "lock"
# 交给集群的任务：它的文件与日志。比训练先有，清空目录时留着
JOB = "job"
# 其中训练会往里写的：data 只读
WRITTEN = RUN_FILES - {"data"}
# 继续训练时不可改：改了就不再是同一次训练
FIXED_ON_RESUME = ("model", "dataset", "seed", "init_from", "finetune", "holdout")
# 其中这些例外：不影响参数的形状
CHANGEABLE = {("model", "dropout"), ("dataset", "dir"), ("finetune", "dropout")}
# 优化器可以调，不能换一种：存下的状态是这一种的
FIXED_PART = {"optimizer": "_target_"}
# 后来才有的键，更早的训练目录没有它们：不能取这次写的，那时就是这样
ADDED_LATER = {"init_from": None, "finetune": asdict(FinetuneConfig()), "groups": {}, "holdout": 0.0}
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
        raise ConfigError("not_writable", path=path, reason=text("not a folder"))
    refuse_contents(path, overwrite=cfg.overwrite)
    # 找到最近的已存在的上级，看能否写入
    parent = next(p for p in [path, *path.absolute().parents] if p.exists())
    if not parent.is_dir():
        raise ConfigError("not_writable", path=path, reason=text("{path} is not a folder", path=parent))
    if not os.access(parent, os.W_OK):
        raise ConfigError("not_writable", path=path, reason=text("{path} is read-only", path=parent))
    return path


def refuse_contents(path: Path, *, overwrite: bool) -> None:
    """ConfigError when a run may not begin in this folder, which need not be there yet."""
    there = {p.name for p in path.iterdir() if not _left_behind(p)} if path.is_dir() else set()
    if there and foreign(path):
        raise ConfigError("out_dir={path} holds files that are not a run's; choose an empty or new folder", path=path)
    if there and not overwrite:
        raise ConfigError("out_dir_exists", path=path, resume=typed_override("resume", path))


def foreign(path: Path) -> set[Path]:
    """What lies in a run folder, its ckpt/ or its data/ and was not written by a run, nor by what started it."""
    begun = (path / "run.json").exists() or any((path / "ckpt").glob("*iter_*"))
    if not begun and not all((path / name).exists() for name in ("tokenizer.json", "metrics.jsonl")):
        # 名字一样还不够：config.yaml、logs 谁都会有；run.json 丢了的，另两个也认得出
        return {p for p in path.iterdir() if not _left_behind(p)}
    strange = {p for p in path.iterdir() if p.name not in RUN_FILES and not _left_behind(p)}
    return strange | {
        p for name, ours in INSIDE.items() for p in (path / name).glob("*")
        if not re.fullmatch(ours, p.name) and not _left_behind(p)
    }


def _left_behind(path: Path) -> bool:
    """Whether this is only what may be there before there is a run: a job's, a killed start's, a file manager's."""
    empty = path.name in RUN_FILES and path.is_dir() and not any(path.iterdir())
    aside = re.fullmatch(r"\..+\.tmp", path.name) is not None
    return path.name in (LOCK, JOB) or empty or aside or is_litter(path)


def hold(path: Path) -> Lock:
    """The lock of a run folder; ConfigError while another process trains in it.

    What a killed process left half-written is removed.
    """
    # 陌生人的目录里，链接可以指向你的任何文件；整个目录是链接（放到别的盘上）则是你自己定的
    if links := sorted(name for name in (*WRITTEN, LOCK, JOB) if (path / name).is_symlink()):
        raise ConfigError(
            "{path}: {name} in it is a link, through which a run would write elsewhere; put what it points at in its "
            "place (the run folder itself may be a link)",
            path=path, name=links[0],
        )
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
    # 认得出是训练的两样最后删：删到一半被杀，同一条命令还能接着清
    for name in sorted(RUN_FILES, key=("run.json", "ckpt").count):
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


def read_record(path: Path) -> RunRecord | None:
    """run.json of a run folder; None in one of an earlier version, and, after a word about it, where it is damaged."""
    file = path / "run.json"
    if not file.is_file():
        return None
    try:
        return recorded(path)
    except NewerError as error:
        raise ConfigError("damaged_checkpoint", file=file, reason=error, remedy=text("update nanogpt")) from None
    except DamagedError as error:
        # 里面的编号与配置别处都有：不必为它停下
        say(
            "{file} is damaged ({reason}); what it held is taken from the rest of the folder, and it is written anew",
            file=file, reason=error,
        )
        return None


def begun_with(path: Path, record: RunRecord | None) -> tuple[str, Path]:
    """(config of a run without a checkpoint, the file that it is in): run.json, or config.yaml where that is lost."""
    if record:
        return record.config_text, path / "run.json"
    file = path / "config.yaml"
    try:
        content = file.read_text(encoding="utf-8")
        read_saved(content)
        return content, file
    except (OSError, ValueError) as error:
        # 认不出是训练的文件夹不覆盖：那就换一个
        anew = "unreadable_foreign" if foreign(path) else "unreadable_run"
        raise ConfigError(anew, path=path, reason=reason_of(error)) from None


def saved_settings(path: Path) -> tuple[str, Path]:
    """(the newest config of a run, the file that it is in)."""
    file = path / "config.yaml"
    return (file.read_text(encoding="utf-8"), file) if file.is_file() else begun_with(path, read_record(path))


def resumed_config(saved_text: str, typed: TrainConfig, overrides: list[str], source: Path) -> TrainConfig:
    """The saved config with what was typed on this command line laid over it; `source` is where it comes from."""
    try:
        saved = _completed(read_saved(saved_text), typed)
        OmegaConf.merge(schema_node(TrainConfig), saved)
    except (OmegaConfBaseException, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        # 摘要对得上、内容却合不上：另一个版本写的，或者有人改过
        reason, remedy = f"config.yaml: {reason_of(error)}", text("no_older_checkpoint")
        raise ConfigError("damaged_checkpoint", file=source, reason=reason, remedy=remedy) from None
    try:
        return _with_typed(saved, typed, overrides, source)
    except OmegaConfBaseException as error:
        # 存下的没有问题，合不上的是这次写的
        raise one_line(error, "train") from None


def _completed(saved: dict, typed: TrainConfig) -> dict:
    """The same with the keys that older runs do not have yet, as conf/train.yaml has them."""
    fresh = plain(typed)
    defaults = {key: value for key, value in fresh.items() if key not in FIXED_ON_RESUME}
    whole = {**defaults, **ADDED_LATER, **saved}
    if missing := sorted({*FIXED_ON_RESUME} - {*whole}):
        raise KeyError(missing[0])
    # 早先的训练在 CPU 上只有 fp32 与舍入：不能一接着训就换格式；finetune 后来也添了键
    precision = {"cpu_bf16": "none", **whole["precision"]}
    finetune = {**ADDED_LATER["finetune"], **whole["finetune"]}
    trial = {**fresh["trial"], **whole["trial"]}
    return {**whole, "trial": trial, "precision": precision, "finetune": finetune}


def _with_typed(saved: dict, typed: TrainConfig, overrides: list[str], source: Path) -> TrainConfig:
    fresh = plain(typed)
    refuse_unnamed_code(saved, fresh, source)
    before = fixed_part(saved)
    merged, fresh_node = OmegaConf.create(saved), OmegaConf.create(fresh)
    for override in OverridesParser.create().parse_overrides(overrides):
        if override.key_or_group == "experiment":
            # 一套配方会改动许多键，说不清哪些该变
            raise ConfigError("resume_changes", key="experiment", old="-", new=override.value())
        _lay(merged, override, saved, fresh_node)
        if merged.model.vocab_size is None:
            # 重新写出的 model=… 没有词表大小，它由数据决定，沿用原来的
            merged.model.vocab_size = before["model"]["vocab_size"]
        # 逐个看：说得出是敲的哪一个要改它
        for key, after in fixed_part(OmegaConf.to_container(merged)).items():
            refuse_change(key, before[key], after, override.input_line)
    return typed_node(TrainConfig, merged)


def fixed_part(config: dict) -> dict:
    """What cannot change on resume of a config."""
    parts = {key: {name: present_name(str(config[key].get(name)))} for key, name in FIXED_PART.items()}
    return {key: config[key] for key in FIXED_ON_RESUME} | parts


def _lay(merged: DictConfig, override: Override, saved: dict, fresh_node: DictConfig) -> None:
    """Put what one override decides into the saved config."""
    key = override.key_or_group
    keys = {key}
    if is_group(key):
        if _only_names(key, override.value(), saved, fresh_node):
            return
        # 以后再接着训时，知道选的是哪一项
        merged.groups[key] = override.value()
        keys = {key} if key in fresh_node else keys_of(override)
    for one in sorted(keys):
        for target in ALIASES.get(one, (one,)):
            parent, _, name = target.rpartition(".")
            if override.is_delete():
                (OmegaConf.select(merged, parent) if parent else merged).pop(name, None)
            elif parent or name in fresh_node:
                OmegaConf.update(merged, target, OmegaConf.select(fresh_node, target), merge=False)


def _only_names(group: str, option: str, saved: dict, fresh_node: DictConfig) -> bool:
    """Whether a typed group only names the model or the class of one's own that the run has.

    None of its values is taken then.
    """
    own = targets(saved.get(group))
    return (group in ("model", "arch") and option == saved["groups"].get(group)) or bool(
        own - trusted_targets() and own == targets(OmegaConf.to_container(fresh_node)[group])
    )


def typed_model_fields(overrides: list[str], model: ModelConfig) -> set[str]:
    """Fields of the model that a person chose: typed here, or set by an experiment or another group."""
    # 选了 model=… 等于写出形状，选了 arch=… 等于写出结构；自己的类只是指名
    shape = {"_target_"} if model._target_ not in trusted_targets() else {"_target_", "n_layer", "n_head", "n_embd"}
    groups = {"model": shape, "arch": {"arch"}}
    fields: set[str] = set()
    for override in OverridesParser.create().parse_overrides(overrides):
        key = override.key_or_group
        for one in [key] if key in groups or not is_group(key) else keys_of(override):
            fields |= groups.get(one, {one.split(".")[1]} if one.startswith("model.") else set())
    return fields


def refuse_change(key: str, old, new, typed: str) -> None:
    """Raise when what was typed changes a fixed key."""
    if not isinstance(old, dict):
        old, new, key, parent = {key: old}, {key: new}, "", ""
    else:
        parent = key
    for name in sorted(set(old) | set(new)):
        if old.get(name) != new.get(name) and (parent, name) not in CHANGEABLE:
            changed = {"key": f"{parent}.{name}".strip("."), "old": old.get(name), "new": new.get(name)}
            if key_of_override(typed) == changed["key"]:
                raise ConfigError("resume_changes", **changed)
            raise ConfigError(
                "{typed}: {key} cannot change on resume ({old} -> {new}); leave {typed} out or start a new run",
                typed=typed, **changed,
            )
