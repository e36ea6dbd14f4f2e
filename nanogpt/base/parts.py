"""Builds the object that a yaml node with `_target_` describes: an optimizer, a logger, a control, a sampler."""

# 可换的部分（优化器、记录、控制、采样）由 yaml 里的 _target_ 指名，在这里变成对象
# 名字来自配置：先看它是不是该做的那种东西，再去调用；调用之后再看一遍，函数也可能返回别的
# 加一个自己的部分不必登记：写一个类或函数，再写一个指名它的 yaml

import inspect
from importlib import import_module
from typing import Any

from nanogpt.base.language import ConfigError
from nanogpt.base.moved import present_name
from nanogpt.base.value_checks import check_types

# 各部分必须会做的事；不会的在执行之前就拒绝，os.system 之类不会被当作优化器来调用
METHODS = {
    "optimizer": ("step", "zero_grad", "state_dict", "load_state_dict"), "logger": ("open", "log", "text", "close"),
    "control": ("apply", "known"),
}


def locate_class(target: str, key: str) -> Any:
    """The class or function that a dotted name refers to."""
    module, _, name = present_name(target).rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except Exception as error:
        # 使用者自己的模块在导入时可能抛出任何异常
        raise ConfigError(
            "{key}={got} cannot be imported ({reason}); put its module beside run_train.py or correct the name",
            key=key, got=target, reason=f"{type(error).__name__}: {error}",
        ) from None
    if not callable(found) or inspect.isbuiltin(found):
        raise ConfigError("not_a_part", key=key, got=target, want=key.removesuffix("._target_"))
    return found


def build_part(node: dict, key: str, *arguments) -> Any:
    """Call a node's `_target_` with the given arguments and the node's other keys."""
    if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
        raise ConfigError("missing_key", key=f"{key}._target_")
    kind = locate_class(node["_target_"], f"{key}._target_")
    settings = {name: value for name, value in node.items() if name != "_target_"}
    part = key.partition(".")[0]
    if isinstance(kind, type):
        check_part(kind, part, key, node["_target_"])
    elif part == "logger":
        raise ConfigError("not_a_part", key=f"{key}._target_", got=node["_target_"], want=_wanted(part))
    try:
        check_types(kind, key, settings)
        built = kind(*arguments, **settings)
    except ConfigError:
        raise
    except (TypeError, ValueError, NameError) as error:
        raise ConfigError("bad_part", key=key, reason=error) from None
    check_part(built, part, key, node["_target_"])
    return built


def check_part(made: Any, part: str, key: str, named: str) -> None:
    """Refuse a class or object that cannot do what its part of the program must do."""
    if not all(callable(getattr(made, method, None)) for method in METHODS.get(part, ())):
        raise ConfigError("not_a_part", key=f"{key}._target_", got=named, want=_wanted(part))


def _wanted(part: str) -> str:
    return f"{part}: {' '.join(METHODS[part])}"
