"""Reads a run's config.yaml as plain values: nothing in it is looked up, expanded or built."""

# 读训练目录里的 config.yaml：它可能来自陌生人，只当普通的值读，不展开引用，不造对象
# 读出来的先换成现在的类名（moved）；里面自己的类，要在命令行指名才执行（refuse_unnamed_code）
# resume、写作、服务、导出都经过这里：旧版本写的目录也要读得懂

import functools
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from nanogpt.base.config import untrusted_targets
from nanogpt.base.groups import naming
from nanogpt.base.hashed_json import DamagedError, reason_of
from nanogpt.base.language import ConfigError
from nanogpt.base.moved import present_name
from nanogpt.base.quoting import word

# 写着类名的部分：自己的类要在命令行指名才执行
PARTS = ("model", "optimizer", "logger")


class _NoAliases(yaml.SafeLoader):
    """A yaml loader that refuses *aliases: a few lines of them can stand for billions of values."""

    # SafeLoader 不执行代码，却照样展开别名：几行就能吃光内存

    def compose_node(self, parent, index):
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        return super().compose_node(parent, index)


def read_saved(content: str) -> dict[str, Any]:
    """The resolved config that a run wrote; DamagedError says why it cannot be read."""
    try:
        saved = yaml.load(content, Loader=_NoAliases)
        _refuse_lookups(saved)
        _rename(saved)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DamagedError(f"config.yaml: {reason_of(error)}") from None
    if not isinstance(saved, dict) or not isinstance(saved.get("model"), dict):
        raise DamagedError("config.yaml: no model")
    return saved


def saved_in(run_dir: Path) -> dict[str, Any]:
    """The same of the config.yaml in a run folder; OSError where there is none."""
    return read_saved((run_dir / "config.yaml").read_text(encoding="utf-8"))


def refuse_unnamed_code(saved: dict, typed: dict, source: Path, parts: tuple[str, ...] = PARTS) -> None:
    """Refuse a saved config that names classes which are neither the program's own nor typed; says what to type."""
    nodes = saved if parts == PARTS else {part: saved.get(part) for part in parts}
    if foreign := untrusted_targets(nodes, typed):
        chosen = saved.get("groups")
        words = naming(saved, chosen if isinstance(chosen, dict) else {}, parts)
        naming_them = " ".join(map(word, words)) or f"{parts[0]}=…"
        raise ConfigError(
            "{path} names code of its own ({targets}); a checkpoint's code is run only when you name it: add {typed}",
            path=source, targets=", ".join(foreign), typed=naming_them,
        )


def _refuse_lookups(node: Any) -> None:
    # 存下的值都已求好；陌生人写的 ${oc.env:…} 会把环境变量读出来
    if isinstance(node, dict):
        for key, value in node.items():
            _refuse_lookups(key)
            _refuse_lookups(value)
    elif isinstance(node, list):
        for value in node:
            _refuse_lookups(value)
    elif isinstance(node, str) and "${" in node:
        raise ValueError(f"{node[:40]!r} is no value")


def _rename(node: Any) -> None:
    # 模块搬家之前写下的名字，只按固定的表换
    if isinstance(node, dict):
        if isinstance(node.get("_target_"), str):
            node["_target_"] = present_name(node["_target_"])
        for value in node.values():
            _rename(value)
    elif isinstance(node, list):
        for value in node:
            _rename(value)


@functools.cache
def schema_node(schema: type) -> DictConfig:
    """A dataclass as OmegaConf checks values by it; to be merged with them, which leaves it as it is."""
    # 造一次要 50 ms
    return OmegaConf.structured(schema)


def typed_node(schema: type, node: dict) -> Any:
    """The dataclass `schema` with the values of a saved config node."""
    return OmegaConf.to_object(OmegaConf.merge(schema_node(schema), node))
