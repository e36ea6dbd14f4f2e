"""Checks yaml files on Hydra's search path, users' own included, before Hydra loads them."""

# conf/ 与使用者自己的 yaml：Hydra 载入之前先看一眼，错在哪个文件、第几行说得出来
# checked_yaml() 换下 Hydra 读文件的那个函数；自带的不查，别处的要是 UTF-8 的键值表，1e3 之类换成整数
# 哪些文件夹在搜索路径上由命令行决定（conf_folders）；配置组就是其中的子文件夹，没有登记的表

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf

from nanogpt.base.config import ROOT, TrainConfig
from nanogpt.base.language import ConfigError, text
from nanogpt.base.sample_config import SampleConfig
from nanogpt.base.value_checks import wanted_type

# 自带的 yaml 不必再查：少解析一遍
OWN = ROOT / "conf"


def conf_folders() -> list[Path]:
    """conf/ and the folders that --config-dir and hydra.searchpath=[…] of this command line add to the search path."""
    found = []
    for argument, following in zip(sys.argv[1:], [*sys.argv[2:], ""]):
        name, equals, value = argument.partition("=")
        if name in ("--config-dir", "-cd"):
            found.append(value if equals else following)
        elif name == "hydra.searchpath":
            found += re.findall(r"file://([^,'\"\]]+)", value)
    return [OWN, *(Path(folder) for folder in found if Path(folder).is_dir())]


def is_group(key: str) -> bool:
    """Whether a key is a config group, the program's or the user's own."""
    return bool(re.fullmatch(r"\w[\w/-]*", key)) and any((folder / key).is_dir() for folder in conf_folders())


def group_options(group: str) -> list[str]:
    """The options of a config group, the user's own included."""
    return sorted({path.stem for folder in conf_folders() for path in (folder / group).glob("*.yaml")})


def check_yaml(path: Path) -> None:
    """Refuse a file that is not a yaml mapping in UTF-8; ConfigError names it."""
    try:
        if isinstance(yaml.safe_load(path.read_bytes().decode("utf-8")), dict | None):
            return
        reason = text("keys with values are wanted: key: value")
    except UnicodeDecodeError as error:
        reason = text("byte {offset} is not UTF-8; save it as UTF-8", offset=error.start)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = _reason(error)
    raise ConfigError("{file}: this yaml cannot be used ({reason}); correct it", file=path, reason=reason)


def _reason(error: Exception) -> str:
    """What is wrong and in which line, in one line."""
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or str(error).partition("\n")[0]
    return what if mark is None else text("line {line}", line=mark.line + 1) + f": {what}"


def write_integers(node: DictConfig, prefix: str) -> None:
    """Make a whole float such as 1e3 an integer where the key takes one."""
    for name in node:
        if OmegaConf.is_interpolation(node, name) or OmegaConf.is_missing(node, name):
            continue
        value, key = node[name], f"{prefix}{name}"
        if isinstance(value, DictConfig):
            write_integers(value, f"{key}.")
        elif isinstance(value, float) and value.is_integer():
            wanted = [wanted_type(schema, key) or "" for schema in (TrainConfig, SampleConfig)]
            node[name] = int(value) if re.search(r"\bint\b", " ".join(wanted)) else value


@contextlib.contextmanager
def checked_yaml() -> Iterator[None]:
    """Check every yaml file that Hydra loads inside."""
    # 插件由 Hydra 自己再导入一遍：要改的是登记在册的那个类
    Plugins.instance()
    source = SourcesRegistry.instance().resolve("file")
    load = source.load_config

    def checked(self, config_path: str):
        path = Path(os.path.realpath(os.path.join(self.path, self._normalize_file_name(config_path))))
        if not path.is_file() or path.is_relative_to(OWN):
            return load(self, config_path)
        check_yaml(path)
        loaded = load(self, config_path)
        # 没有写 package 的，放在它所在的组下面
        package = loaded.header.get("package") or os.path.dirname(config_path).replace("/", ".")
        if isinstance(loaded.config, DictConfig):
            write_integers(loaded.config, "" if package in ("", "_global_") else f"{package}.")
        return loaded

    source.load_config = checked
    try:
        yield
    finally:
        source.load_config = load
