"""Checks that hold for every key of a configuration: unknown keys, wrong types, unwritable text, NaN."""

# 任何键都不许有的值：没人读的键、类型不对的项、存不进文件的文字、NaN 与大得离谱的数
# 与键的意义无关，所以和 config 的范围检查分开；命令行、数据集的选项与可换部分的参数都经过这里
# 值最终要存进 config.yaml：写不进 UTF-8 的、会变成引用的，现在就拒绝，免得以后 resume 不了
# wanted_type 说一个键要什么类型，给错误消息用，也决定 1e3 该不该换成 1000

import math
import os
import re
import typing
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from decimal import Decimal
from typing import Any

from nanogpt.base.config import PATH_KEYS, TEXT_KEYS
from nanogpt.base.language import ConfigError, text
from nanogpt.base.quoting import key_of_override

LARGEST = 2**63 - 1
# 消息里写得出名字的类型
PLAIN = (int, float, str, bool, type(None))


def leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in nested dataclasses, dicts and lists."""
    if is_dataclass(node):
        node = {f.name: getattr(node, f.name) for f in fields(node)}
    if isinstance(node, dict):
        for name, value in node.items():
            yield from leaves(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from leaves(value, f"{key}[{i}]")
    else:
        yield key, node


def check_values(cfg: Any) -> None:
    """Refuse what cannot be right anywhere in a typed configuration; one line that names the key."""
    for key in unread_keys(cfg):
        raise ConfigError("unread_key", key=key)
    check_lists(cfg)
    for key, value in leaves(cfg):
        check_value(key, value)


def check_lists(cfg: Any, prefix: str = "") -> None:
    """Refuse a list with an item of another type than its field names: OmegaConf lets lists and tables in."""
    hints = typing.get_type_hints(type(cfg))
    for field in fields(cfg):
        value, key, hint = getattr(cfg, field.name), f"{prefix}{field.name}", hints[field.name]
        if is_dataclass(value):
            check_lists(value, f"{key}.")
        elif typing.get_origin(hint) is list and not all(isinstance(item, typing.get_args(hint)) for item in value):
            raise ConfigError("wrong_type", key=key, got=value, want=f"[{typing.get_args(hint)[0].__name__}, …]")


def check_value(key: str, value: Any) -> None:
    """Refuse a value that cannot be right under any key."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError("{key}={got} is not a finite number; write one", key=key, got=value)
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ConfigError("{key}={got} is too large; write a smaller number", key=key, got=value)
    if not isinstance(value, str):
        return
    # 配置要存成 UTF-8 的 yaml：写不进去的现在就说
    if "\0" in value:
        raise ConfigError("unwritable_text", key=key, got=value, what=text("a NUL character"))
    if re.search("[\ud800-\udfff]", value):
        what = text("bytes that are not UTF-8, or half a character")
        raise ConfigError("unwritable_text", key=key, got=value, what=what)
    # 目录名里的转义序列会在屏幕上作怪；要写作的文字则由人
    if key in PATH_KEYS and re.search("[\x01-\x1f\x7f]", value):
        raise ConfigError("unwritable_text", key=key, got=value, what=text("a control character"))
    if key == "sample_prompt" and "${" in value:
        # 它要存进 config.yaml，在那里就成了引用
        raise ConfigError("unwritable_text", key=key, got=value, what=text(
            "${{, which a config file takes for a reference",
        ))
    # 空值多半是没有展开的 shell 变量：resume=$RUN 不该变成从头训练；文字可以从空的写起
    needed = re.fullmatch(r"[a-z_]+|(dataset|model|server|precision|finetune|hardware)\.\w+", key)
    if needed and not value.strip() and key not in TEXT_KEYS:
        raise ConfigError("empty_value", key=key)


def in_digits(number: str) -> str:
    """A whole number such as 1e3 written as an integer; any other number unchanged."""
    value = Decimal(number.replace("_", ""))
    return str(int(value)) if value == value.to_integral_value() else number


def expanded(path: str) -> str:
    """The path with the home folder in place of a leading ~/."""
    return os.path.expanduser(path) if re.match(r"~[/\\]", path) else path


def unescaped(typed: str) -> str:
    r"""A typed text in which \n and \t are the characters they stand for; \\n and \\t are those two letters."""
    # 命令行与 Hydra 都不解释 \n，而开头与停止词里最常用的就是它；别的反斜杠照原样
    return re.sub(r"\\\\?[nt]", lambda found: {r"\n": "\n", r"\t": "\t"}.get(found[0], found[0][1:]), typed)


def check_path(key: str, typed: str) -> None:
    """Refuse an empty path, and one that no file of the program can hold."""
    check_value(key, typed)
    if not typed.strip():
        raise ConfigError("empty_value", key=key)


def unread_keys(cfg: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys, added with +key=…, that the schema does not know."""
    if not is_dataclass(cfg):
        return
    known = {f.name for f in fields(cfg)}
    yield from (prefix + name for name in vars(cfg) if name not in known)
    for name in known:
        yield from unread_keys(getattr(cfg, name), f"{prefix}{name}.")


def check_types(function: Callable, prefix: str, values: dict[str, Any]) -> None:
    """Refuse values whose type is not that of the function's parameter, unless that has no simple type."""
    hints = typing.get_type_hints(function.__init__ if isinstance(function, type) else function)
    for name, got in values.items():
        kinds = typing.get_args(hints.get(name)) or (hints.get(name),)
        if not all(isinstance(kind, type) for kind in kinds):
            continue
        # 整数可以当小数用；Python 里 True 也是整数，却不是数
        fits = isinstance(got, tuple(kinds)) or (float in kinds and isinstance(got, int))
        if not fits or (isinstance(got, bool) and bool not in kinds):
            names = " | ".join(kind.__name__ for kind in kinds if kind in PLAIN).replace("NoneType", "null")
            raise ConfigError("wrong_type", key=f"{prefix}.{name}", got=got, want=names or "?")


def refuse_keys(overrides: tuple[str, ...], keys: tuple[str, ...], message: str) -> None:
    """ConfigError where one of the overrides is of one of the keys."""
    for key in (key_of_override(one).partition(".")[0] for one in overrides):
        if key in keys:
            raise ConfigError(message, key=key)


def wanted_type(schema: type, key: str) -> str | None:
    """What a dotted key of a schema takes, in words; None where that is not fixed."""
    kind: Any = schema
    for part in re.sub(r"\[.*", "", key).split("."):
        if not is_dataclass(kind) or part not in (hints := typing.get_type_hints(kind)):
            return None
        kind = hints[part]
    if is_dataclass(kind):
        return "{…}"
    if kind is Any:
        return None
    named = kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
    return named.replace("None", "null").replace("typing.", "")
