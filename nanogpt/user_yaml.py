"""Yaml files on Hydra's search path, people's own included: each is looked at before Hydra takes it in."""

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

from nanogpt.config import TrainConfig
from nanogpt.messages import ConfigError, text
from nanogpt.sample_config import SampleConfig
from nanogpt.values import wanted_type

# 自带的 yaml 不必再查：少解析一遍
OWN = Path(__file__).resolve().parent.parent / "conf"
# 最长的自带 yaml 有几 KiB；纯 Python 的 yaml 解析器每秒只读约 100 KB
LARGEST = 256 * 1024
# 别名展开之后的节点数：OmegaConf 会逐个抄一遍
MOST_NODES = 100_000


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
    """Whether a key of an override is a config group, of the program or of one's own."""
    return bool(re.fullmatch(r"\w[\w/-]*", key)) and any((folder / key).is_dir() for folder in conf_folders())


def group_options(group: str) -> list[str]:
    """The yamls of a config group, one's own included."""
    return sorted({path.stem for folder in conf_folders() for path in (folder / group).glob("*.yaml")})


def check_yaml(path: Path) -> None:
    """Refuse a file that is no yaml mapping of a sensible size in UTF-8; ConfigError names it."""
    size = path.stat().st_size
    if size > LARGEST:
        raise ConfigError("bad_yaml", file=path, reason=text("yaml_size", got=size // 1024, most=LARGEST // 1024))
    try:
        content = path.read_bytes().decode("utf-8")
        if "*" in content and _nodes(yaml.compose(content, yaml.SafeLoader), {}) > MOST_NODES:
            raise ConfigError("bad_yaml", file=path, reason=text("yaml_aliases"))
        if not isinstance(yaml.safe_load(content), dict | None):
            raise ConfigError("bad_yaml", file=path, reason=text("yaml_mapping"))
    except UnicodeDecodeError as error:
        raise ConfigError("bad_yaml", file=path, reason=text("yaml_encoding", offset=error.start)) from None
    except RecursionError:
        raise ConfigError("bad_yaml", file=path, reason=text("too_deep")) from None
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError("bad_yaml", file=path, reason=_reason(error)) from None


def _reason(error: Exception) -> str:
    """What is wrong and in which line, in one line."""
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or str(error).partition("\n")[0]
    return what if mark is None else text("yaml_line", line=mark.line + 1) + f": {what}"


def _nodes(node: yaml.Node | None, seen: dict[int, int]) -> int:
    """How many nodes this one is when every alias is written out."""
    if node is None:
        return 0
    if id(node) not in seen:
        # 自己引用自己的别名：先记成无穷多
        seen[id(node)] = MOST_NODES + 1
        inner = [] if isinstance(node, yaml.ScalarNode) else node.value
        pairs = [n for pair in inner for n in pair] if isinstance(node, yaml.MappingNode) else inner
        seen[id(node)] = 1 + sum(_nodes(n, seen) for n in pairs)
    return seen[id(node)]


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
