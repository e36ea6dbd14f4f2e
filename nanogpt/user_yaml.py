"""Yaml files on Hydra's search path, people's own included: each is looked at before Hydra takes it in."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import yaml
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins

from nanogpt.messages import ConfigError, text

# 自带的 yaml 不必再查：少解析一遍
OWN = Path(__file__).resolve().parent.parent / "conf"
# 最长的自带 yaml 有几 KiB；纯 Python 的 yaml 解析器每秒只读约 100 KB
LARGEST = 256 * 1024
# 别名展开之后的节点数：OmegaConf 会逐个抄一遍
MOST_NODES = 100_000


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


@contextlib.contextmanager
def checked_yaml() -> Iterator[None]:
    """Check every yaml file that Hydra loads inside."""
    # 插件由 Hydra 自己再导入一遍：要改的是登记在册的那个类
    Plugins.instance()
    source = SourcesRegistry.instance().resolve("file")
    load = source.load_config

    def checked(self, config_path: str):
        path = Path(os.path.realpath(os.path.join(self.path, self._normalize_file_name(config_path))))
        if path.is_file() and not path.is_relative_to(OWN):
            check_yaml(path)
        return load(self, config_path)

    source.load_config = checked
    try:
        yield
    finally:
        source.load_config = load
