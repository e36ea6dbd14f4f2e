"""Config groups and values while the program runs, read as the command line would read them."""

# 程序跑起来之后还要读配置组：互动写作里换 sampler，resume 时看敲下的组管哪些键，告诉人怎样指名自己的类
# 做法是照命令行再拼一次（_composed），或只问 Hydra 这一项带来了哪些 yaml（_brought）
# 要拼许多份、只差几个值的（搜索），用 Composer：各组只拼一次
# 用者是 run/、write/、sweep/、导出与 saved_config；它们与命令行因此永远一致，没有第二份规则

import copy
import difflib
import re
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from nanogpt.base.composing import SCHEMAS, check_whole, composing
from nanogpt.base.config import ROOT, TrainConfig, targets, trusted_targets
from nanogpt.base.language import ConfigError, text
from nanogpt.base.sample_config import SampleConfig, register_schemas
from nanogpt.base.user_yaml import conf_folders, group_options, is_group
from nanogpt.base.value_checks import check_values, in_digits


def parsed(key: str, value: str) -> Any:
    """A typed value read by the rules of yaml (1e-2 is a number, 1e3 an integer)."""
    if re.fullmatch(r"\d+(\.\d*)?[eE]\+?\d{1,3}", value):
        value = in_digits(value)
    try:
        return OmegaConf.to_container(OmegaConf.create(f"value: {value}"))["value"]
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, KeyError):
        raise ConfigError("{key}={got!r} cannot be read; give one value, e.g. a number", key=key, got=value) from None


def _composed(config_name: str, overrides: list[str]) -> tuple[DictConfig, dict[str, str]]:
    """(what conf/<config_name>.yaml and the overrides give, the option chosen in each group)."""
    # 在 hydra.main 里面：沿用它的搜索路径，--config-dir 里自己的 yaml 也找得到
    if GlobalHydra.instance().is_initialized():
        composed = compose(config_name, overrides, return_hydra_config=True)
    else:
        register_schemas()
        searched = ",".join(f"'file://{folder.absolute()}'" for folder in conf_folders()[1:])
        with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
            composed = compose(config_name, [*overrides, f"hydra.searchpath=[{searched}]"], return_hydra_config=True)
    with open_dict(composed):
        choices = composed.pop("hydra").runtime.choices
    return composed, {group: option for group, option in choices.items() if option and not group.startswith("hydra/")}


class Composer:
    """Composes configurations that differ in values; what the groups give is composed once."""

    # 拼各组要几百毫秒；其余的值，由 Hydra 自己的函数随后写入

    def __init__(self, config_name: str):
        self.config_name = config_name
        self.nodes: dict[tuple[str, ...], tuple[DictConfig, dict[str, str]]] = {}

    def composed(self, overrides: list[str]) -> tuple[DictConfig, dict[str, str]]:
        """(what these overrides give, the option chosen in each group)."""
        values = [one for one in overrides if _is_value(one)]
        others = tuple(one for one in overrides if not _is_value(one))
        if others not in self.nodes:
            self.nodes[others] = _composed(self.config_name, list(others))
        node, choices = copy.deepcopy(self.nodes[others])
        try:
            ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(values), node)
        except HydraException:
            # 写错了的：报错要与整个拼的一样
            return _composed(self.config_name, overrides)
        return node, choices


def _is_value(override: str) -> bool:
    """Whether Hydra applies it behind the groups: a plain value, no group, nothing added or removed."""
    key = override.partition("=")[0]
    return key[0] not in "+~" and not key.startswith("hydra") and "@" not in key and not is_group(key)


def sample_config(overrides: list[str]) -> SampleConfig:
    """The config that run_sample.py would see for these overrides; combinations of values are not checked."""
    return _typed("sample", overrides)


def train_config(overrides: list[str]) -> TrainConfig:
    """The same for run_train.py."""
    return _typed("train", overrides)


def _typed(config_name: str, overrides: list[str]) -> TrainConfig | SampleConfig:
    with composing(config_name):
        composed, choices = _composed(config_name, overrides)
        check_whole(composed, SCHEMAS[config_name])
        cfg = OmegaConf.to_object(composed)
        cfg.groups = choices
        check_values(cfg)
    return cfg


def option(group: str, name: str, temperature: float) -> dict[str, Any]:
    """The node that `group=name temperature=…` would give on the command line."""
    if name not in (names := group_options(group)):
        close = difflib.get_close_matches(name, names, n=1)
        guess = text("did_you_mean", guess=close[0]) if close else ""
        raise ConfigError("unknown_option", group=group, got=f"{name}{guess}", options=", ".join(names))
    with composing("sample"):
        return OmegaConf.to_container(
            _composed("sample", [f"{group}={name}", f"temperature={temperature}"])[0][group], resolve=True
        )


# ---- 一个选项里写了什么 ----


def keys_of(override: Override) -> set[str]:
    """Dotted keys of conf/train.yaml that a typed group decides: those of its yaml and of the yamls it brings along.

    If one of them chooses an option of another group, that whole group counts.
    """
    keys = set()
    for package, content, chosen in _brought(override.input_line):
        keys |= {f"{package}.{key}".strip(".") for key in leaves(content)} | set(chosen)
    return {key for key in keys if key.partition(".")[0] != "hydra"}


def naming(nodes: dict[str, Any], chosen: dict[str, str], parts: tuple[str, ...]) -> list[str]:
    """The words that a command needs to run a user's own classes in these nodes, e.g. --config-dir=conf model=gated.

    A checkpoint's code is run only if it is named. `chosen` is the option of each group.
    """
    words, shipped = [], conf_folders()[0]
    for part in parts:
        own, option = targets(nodes.get(part)) - trusted_targets(), chosen.get(part)
        if not own:
            continue
        if option in group_options(part) and own <= _named_by(part, option):
            words.append(f"{part}={option}")
            folder = next(folder for folder in reversed(conf_folders()) if (folder / part / f"{option}.yaml").is_file())
            if folder != shipped and (searched := f"--config-dir={folder}") not in words:
                words.insert(0, searched)
        elif part != "logger" and len(own) == 1:
            # 类是直接在命令行写的，或者它的 yaml 不在这里
            words.append(f"{part}._target_={min(own)}")
    return words


def _named_by(group: str, option: str) -> set[str]:
    """The classes named by a yaml and by the yamls that it brings along."""
    return {target for _, content, _ in _brought(f"{group}={option}") for target in targets(content)}


def _brought(typed: str) -> list[tuple[str, dict[str, Any], list[str]]]:
    """(package, content, groups whose option it chooses) of every yaml that a typed group adds to conf/train.yaml."""
    register_schemas()
    path = create_config_search_path(str(ROOT / "conf"))
    for folder in conf_folders()[1:]:
        path.append("command-line", f"file://{folder.absolute()}")
    loader = ConfigLoaderImpl(config_search_path=path)
    group, _, option = typed.lstrip("+").partition("=")
    # 敲与不敲各算一遍 defaults list，多出来的就是它带来的
    untyped = loader.compute_defaults_list("train", [], RunMode.RUN).defaults
    usual = {(entry.config_path, entry.package) for entry in untyped}
    brought = []
    for entry in loader.compute_defaults_list("train", [typed], RunMode.RUN).defaults:
        # 默认就选中的那一项也算：写出来就是要它
        if (entry.config_path, entry.package) in usual and entry.config_path != f"{group}/{option}":
            continue
        loaded = loader.repository.load_config(entry.config_path)
        chosen = [default.group.lstrip("/") for default in loaded.defaults_list if getattr(default, "override", False)]
        brought.append((entry.package, OmegaConf.to_container(loaded.config, resolve=False), chosen))
    return brought


def leaves(node: Any, key: str = "") -> dict[str, Any]:
    """The values of nested dicts by their dotted keys; an empty dict counts as a value."""
    if not isinstance(node, dict) or not node:
        return {key: node}
    below = (leaves(value, f"{key}.{name}" if key else str(name)) for name, value in node.items())
    return {name: value for one in below for name, value in one.items()}
