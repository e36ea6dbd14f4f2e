"""Config groups and values while the program runs: what the command line would have made of them."""

import difflib
import re
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nanogpt.composing import check_whole, composing
from nanogpt.config import ROOT
from nanogpt.messages import ConfigError, text
from nanogpt.sample_config import SampleConfig, register_schemas
from nanogpt.values import check_values, in_digits


def parsed(key: str, value: str) -> Any:
    """A typed value read by the rules of yaml (1e-2 is a number, 1e3 an integer)."""
    if re.fullmatch(r"\d+(\.\d*)?[eE]\+?\d{1,3}", value):
        value = in_digits(value)
    try:
        return OmegaConf.to_container(OmegaConf.create(f"value: {value}"))["value"]
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, KeyError):
        raise ConfigError("unreadable_value", key=key, got=value) from None


def _composed(overrides: list[str]):
    # 在 hydra.main 里面：沿用它的搜索路径，--config-dir 里自己的 yaml 也找得到
    if GlobalHydra.instance().is_initialized():
        return compose("sample", overrides)
    register_schemas()
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
        return compose("sample", overrides)


def sample_config(overrides: list[str]) -> SampleConfig:
    """The config that run_sample.py would see for these overrides, for other programs that write; not checked."""
    with composing("sample"):
        composed = _composed(overrides)
        check_whole(composed, SampleConfig)
        cfg = OmegaConf.to_object(composed)
        check_values(cfg)
    return cfg


def options(group: str) -> list[str]:
    """The yamls of a group."""
    if GlobalHydra.instance().is_initialized():
        return GlobalHydra.instance().config_loader().get_group_options(group)
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))


def option(group: str, name: str, temperature: float) -> dict[str, Any]:
    """The node that `group=name temperature=…` would give on the command line."""
    if name not in (names := options(group)):
        close = difflib.get_close_matches(name, names, n=1)
        guess = text("did_you_mean", guess=close[0]) if close else ""
        raise ConfigError("unknown_option", group=group, got=f"{name}{guess}", options=", ".join(names))
    with composing("sample"):
        return OmegaConf.to_container(_composed([f"{group}={name}", f"temperature={temperature}"])[group], resolve=True)
