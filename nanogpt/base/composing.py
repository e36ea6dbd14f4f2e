"""Turns what Hydra and OmegaConf raise while composing a configuration into one line that names the key."""

# Hydra 与 OmegaConf 拼配置时的各种异常，翻成一行：哪个键、写了什么、该怎么写
# 它们的异常类型不够细，只好认消息里的字样（见 one_line）；换 Hydra 版本时先看这里
# cli 与 groups 把拼配置的那一段放进 composing()；不认得的消息也压成一行，从不让 traceback 出来
# OTHER_NAMES 是别的程序里的键名，敲错时猜得出他想要什么

import contextlib
import difflib
import re
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    InterpolationKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from nanogpt.base.config import ROOT, TrainConfig, keys
from nanogpt.base.errors import explained
from nanogpt.base.language import ConfigError, text
from nanogpt.base.quoting import in_quotes, word
from nanogpt.base.sample_config import SampleConfig
from nanogpt.base.user_yaml import checked_yaml, group_options, is_group
from nanogpt.base.value_checks import wanted_type

SCHEMAS = {"train": TrainConfig, "sample": SampleConfig}
# OmegaConf 的类型名 -> 别处都用的名字
OMEGACONF_TYPES = {"Integer": "int", "Float": "float", "Boolean": "bool", "String": "str"}
# 别的程序（先是 nanoGPT）里的名字 -> 这里该写的
OTHER_NAMES = {
    "train": {
        "dtype": "precision=bf16", "fp16": "precision=fp16", "bf16": "precision=bf16", "lr": "learning_rate",
        "weight_decay": "optimizer.weight_decay", "decay_lr": "lr_schedule=constant", "warmup_steps": "warmup_iters",
        "beta1": "optimizer.beta1", "beta2": "optimizer.beta2", "wandb_log": "logger=wandb",
        "wandb_project": "logger.wandb.project", "wandb_run_name": "out_dir", "output_dir": "out_dir",
        **dict.fromkeys(("epochs", "num_epochs", "num_train_epochs", "max_steps", "steps", "iters"), "max_iters"),
        "eval_iters": "eval_tokens", "patience": "early_stop_evals", "always_save_checkpoint": "keep",
        "context_length": "model.block_size", **dict.fromkeys(("data", "data_dir", "input", "file"), "dataset.path"),
        # 配方选的数据集没有这个键
        "dataset.path": "dataset=text_file dataset.path",
    },
    "sample": {
        "dtype": "precision=bf16", "top_k": "sampler=top_k sampler.top_k", "top_p": "sampler=top_p sampler.top_p",
        "min_p": "sampler=min_p sampler.min_p", "repetition_penalty": "sampler.repetition_penalty",
        "prompt": "start", "text": "start", "n": "num_samples", "samples": "num_samples",
        **dict.fromkeys(("max_tokens", "max_length", "length"), "max_new_tokens"),
        "style": "control.style", "emotion": "control.emotion", "guidance": "control.guidance", "resume": "out_dir",
    },
}


def known_keys(config_name: str) -> list[str]:
    """All dotted keys of the schema of conf/<config_name>.yaml."""
    return [key for key, _ in keys(SCHEMAS[config_name])]


def options_of(schema: type, group: str) -> list[str]:
    """The options of a config group that a script with this schema takes: only writing knows precision=int8."""
    choices = {key: one.metadata["choices"] for key, one in keys(schema) if "choices" in one.metadata}
    taken = []
    for option in group_options(group):
        file = ROOT / "conf" / group / f"{option}.yaml"
        # 使用者自己的选项由拼配置时去查；none.yaml 是空的
        content = (file.is_file() and yaml.safe_load(file.read_text(encoding="utf-8"))) or {}
        given = {f"{group}.{name}": "null" if value is None else str(value).lower() for name, value in content.items()}
        if all(value in choices.get(key, (value,)) for key, value in given.items()):
            taken.append(option)
    return taken


def _own_keys(group: str) -> list[str]:
    """The keys that the yaml files of a group have between them."""
    # 只在猜错字时读：数据集一类的组，schema 里没有它们各自的键
    contents = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in (ROOT / "conf" / group).glob("*.yaml")]
    return sorted({name for content in contents for name in content or {} if name.isidentifier()})


def guess_of(key: str, config_name: str) -> str | None:
    """What an unknown key may mean: its name here if another program has it, a key ending in it, or a similar one."""
    known = known_keys(config_name)
    if elsewhere := OTHER_NAMES[config_name].get(key.lower()):
        return elsewhere
    group, _, name = key.rpartition(".")
    if is_group(group):
        # 组里的键只与组里的比：最像 dataset.paht 的不是 dataset
        inside = [one.removeprefix(f"{group}.") for one in known if one.startswith(f"{group}.")]
        close = difflib.get_close_matches(name, [*inside, *_own_keys(group)], n=1)
        return f"{group}.{close[0]}" if close else None
    ends = [name for name in known if name.endswith(f".{key}")]
    close = ends[:1] or difflib.get_close_matches(key, known, n=1)
    return close[0] if close and close[0] != key else None


def one_line(error: Exception, config_name: str) -> ConfigError:
    """Turn what Hydra or OmegaConf raised while composing into a ConfigError that names the key."""
    message = str(error)
    if isinstance(error, MissingConfigException) and error.options:
        return _of_an_option(error.missing_cfg_file or "", error.options, config_name)
    # Hydra 的“找不到配置”也是一种 OSError
    if not isinstance(error, HydraException) and (found := explained(error)):
        return found
    # Hydra 把 OmegaConf 的异常包了一层，键名在里层
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause, OmegaConfBaseException):
        if found := _of_a_value(cause, error, config_name):
            return found
    if isinstance(error, OverrideParseException):
        if error.override and "=" not in error.override:
            # 最常见的是值里有空格，shell 把它拆成了两个
            return ConfigError(
                "{argument}: this is no key=value; a value with a blank in it is put in quotes as a whole: {typed}",
                argument=error.override, typed=word("dataset.path=my text.txt"),
            )
        reason = next((line for line in message.splitlines() if line.strip()), "")
        return ConfigError("unreadable", argument=error.override, reason=reason, remedy=_readable(error.override or ""))
    if several := re.search(r"Ambiguous value for argument '(.+)'\n|Sweep parameters '(.+)' requires", message):
        key, _, value = (argument := several[1] or several[2]).partition("=")
        listed, one = word(f"{key}=[{value}]"), word(f"{key}={in_quotes(value)}")
        return ConfigError(
            "{argument}: this means several values; add -m to try each; a list is written {listed}, a text {typed}",
            argument=argument, listed=listed, typed=one,
        )
    unknown = re.search(r"Could not (?:override|append|delete)[^']*'([^'=@]+)", message)
    if unknown:
        key = unknown[1]
        guess = text("did_you_mean", guess=close) if (close := guess_of(key, config_name)) else ""
        return ConfigError(
            "{key}: there is no such key{guess}; see conf/{config}.yaml or run with --cfg job",
            key=key, guess=guess, config=config_name,
        )
    if found := _of_a_group(message, config_name):
        return found
    # 其余情形：后面的行是 Hydra 的内部细节，压成一行
    return ConfigError(
        "{line}",
        line=" ".join(line.strip() for line in message.splitlines() if line.strip()) or type(error).__name__,
    )


def _of_an_option(file: str, options: list[str], config_name: str) -> ConfigError:
    """The line for an option that a group does not have; Hydra names both as one path."""
    parts = file.split("/")
    # 敲的值里也可以有斜杠：组是最前面认得出的那一段
    group = next((one for n in range(1, len(parts)) if is_group(one := "/".join(parts[:n]))), file.rpartition("/")[0])
    got = file[len(group) + 1 :]
    if group == "dataset" and got and (re.search(r"[./\\]", got) or Path(got).exists()):
        return ConfigError(
            "dataset={got}: there is no such option; for a text of your own type {typed}",
            got=got, typed=word(f"dataset.path={got}"),
        )
    known = options_of(SCHEMAS[config_name], group) or options
    return ConfigError("unknown_option", group=group, got=got, options=", ".join(known))


def _readable(argument: str) -> str:
    """What to type in place of an argument that Hydra's grammar does not read."""
    key, equals, value = argument.partition("=")
    typed = f"{key}={in_quotes(value)}"
    try:
        OverridesParser.create().parse_override(typed)
    except HydraException:
        # 键就不对：给值加引号也没用
        return text("remedy_key")
    return text("put the value in quotes: {typed}", typed=word(typed)) if equals else text("remedy_key")


def _of_a_value(cause: OmegaConfBaseException, error: Exception, config_name: str) -> ConfigError | None:
    """The line for a value that does not fit its key."""
    key, first = cause.full_key or "?", str(cause).partition("\n")[0]
    if isinstance(cause, InterpolationKeyError | InterpolationResolutionError) or "ecursive interpolation" in first:
        return ConfigError(
            "{key}: {reason}; write the value itself",
            key=key, reason=first.removeprefix("ConfigError raised while resolving interpolation: "),
        )
    if isinstance(cause, MissingMandatoryValue):
        return ConfigError("nothing_chosen", group=key, options=", ".join(options_of(SCHEMAS[config_name], key)))
    if "could not be converted" in first and cause.full_key:
        if "，" in str(cause.value):
            return ConfigError(
                "{key}={got}: values are parted by an ASCII comma: {typed}",
                key=key, got=cause.value, typed=f"{key}={str(cause.value).replace('，', ',')}",
            )
        want = re.search(r"could not be converted to (\w+)", first)
        name = OMEGACONF_TYPES.get(want[1], want[1]) if want else "?"
        return ConfigError("wrong_type", key=key, got=cause.value, want=name)
    typed = re.match(r"Error merging override [+~]*([^=]+)=(.*)", str(error), flags=re.DOTALL)
    if typed and (want := wanted_type(SCHEMAS[config_name], typed[1])):
        return ConfigError("wrong_type", key=typed[1], got=typed[2], want=want)
    if want := cause.full_key and wanted_type(SCHEMAS[config_name], cause.full_key):
        return ConfigError("wrong_type", key=key, got=cause.value, want=want)
    return None


def _of_a_group(message: str, config_name: str) -> ConfigError | None:
    """The line for what Hydra says about a group without naming it."""
    # 消息里没有组名：从命令行里找出那个选项不存在的组
    if "Config group override must be" not in message:
        return None
    for argument in sys.argv[1:]:
        group, _, got = argument.partition("=")
        if is_group(group) and got not in group_options(group):
            return ConfigError(
                "unknown_option", group=group, got=got, options=", ".join(options_of(SCHEMAS[config_name], group))
            )
    return None


@contextlib.contextmanager
def composing(config_name: str) -> Iterator[None]:
    """Turn whatever is raised inside, while Hydra reads and composes, into a ConfigError."""
    try:
        with checked_yaml():
            yield
    except (KeyboardInterrupt, SystemExit, BrokenPipeError):
        raise
    except Exception as error:
        # 这里还没有我们自己的代码在跑：无论 Hydra 抛什么，都是写法的问题
        raise one_line(error, config_name) from None


def refuse_unknown_hydra_keys() -> None:
    """Make ${hydra:…} an error when Hydra's config has no such key; Hydra itself reads it as null."""

    def value_of(path: str = ""):
        missing = object()
        if not path or (found := OmegaConf.select(HydraConfig.get(), path, default=missing)) is missing:
            raise ConfigError("Hydra has no key {key}", key=path)
        return found

    OmegaConf.register_new_resolver("hydra", value_of, replace=True)


def check_whole(cfg: DictConfig, schema: type, prefix: str = "") -> None:
    """Refuse a configuration from which ~key removed a part of the schema."""
    for field in fields(schema):
        if field.name not in cfg:
            if is_group(field.name):
                raise ConfigError("nothing_chosen", group=field.name, options=", ".join(group_options(field.name)))
            # 悄悄换成 schema 的默认值，会与 yaml 里写的不一样
            raise ConfigError("removed_key", key=prefix + field.name)
        if is_dataclass(field.type):
            check_whole(cfg[field.name], field.type, f"{prefix}{field.name}.")
