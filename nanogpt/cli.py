"""Between the command line and the run scripts: compose with Hydra, turn mistakes into one line."""

import difflib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nanogpt import rundir
from nanogpt.config import ROOT, TrainConfig
from nanogpt.messages import ConfigError, language_from_arguments, say, set_language, text
from nanogpt.oom import told_in_one_line
from nanogpt.sample_config import SampleConfig, register_schemas

EXIT_USER_ERROR = 2
# 与被 SIGINT 结束的程序相同：128 + 2
EXIT_INTERRUPTED = 130
# 与被 SIGPIPE 结束的程序相同：128 + 13
EXIT_PIPE_CLOSED = 141
# 值是文字的键：逗号、空格都属于内容
FREE_TEXT = ("sample_prompt", "start", "control.style", "control.emotion")
# 已经带引号的一段，照原样
QUOTED = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\""""
# 列表或扫描里含有非 ASCII 字符的一项
NON_ASCII_ITEM = r"[^,\[\]{}()'\"]*[^\x00-\x7f][^,\[\]{}()'\"]*"
# 内容随选项而变的配置组；model 一类形状固定的不在内
SWAPPABLE = ("optimizer", "dataset", "logger")


def known_keys(config_name: str) -> list[str]:
    """All dotted keys of the schema of conf/<config_name>.yaml."""

    def walk(node, prefix):
        for key, value in node.items():
            yield prefix + key
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")

    container = OmegaConf.to_container(OmegaConf.structured({"train": TrainConfig, "sample": SampleConfig}[config_name]), throw_on_missing=False)
    return list(walk(container, ""))


def one_line(error: Exception, config_name: str) -> ConfigError:
    """Turn what Hydra or OmegaConf raised while composing into a ConfigError that names the key."""
    if isinstance(error, ConfigError):
        return error
    message = str(error)
    if isinstance(error, MissingConfigException) and error.options:
        group, _, got = (error.missing_cfg_file or "").rpartition("/")
        return ConfigError("unknown_option", group=group, got=got, options=", ".join(error.options))
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause, OmegaConfBaseException) and cause.full_key and "could not be converted" in str(cause):
        want = re.search(r"could not be converted to (\w+)", str(cause))
        return ConfigError("wrong_type", key=cause.full_key, got=cause.value, want=want[1] if want else "?")
    if isinstance(error, OverrideParseException):
        reason = next((line for line in message.splitlines() if line.strip()), "")
        return ConfigError("unreadable", argument=error.override, reason=reason)
    unknown = re.search(r"Could not (?:override|append|delete)[^']*'([^'=@]+)", message)
    if unknown:
        key = unknown[1]
        close = difflib.get_close_matches(key, known_keys(config_name), n=1)
        guess = text("did_you_mean", guess=close[0]) if close else ""
        return ConfigError("unknown_key", key=key, guess=guess, config=config_name)
    # 其余情形：第一行足以说明问题，后面是 Hydra 的内部细节
    return ConfigError("compose", line=" ".join(line.strip() for line in message.splitlines() if line.strip()))


def remembered_groups(arguments: list[str]) -> list[str]:
    """On resume, the run's own choice of every swappable group that was not typed again.

    Without them `resume=… optimizer.weight_decay=0` would be composed against the default optimizer.
    """
    named = [a.removeprefix("resume=") for a in arguments if a.startswith("resume=")]
    if not named or named[-1] in ("null", ""):
        return []
    try:
        saved = yaml.safe_load((rundir.locate(named[-1]) / "config.yaml").read_text(encoding="utf-8"))["groups"]
        typed = {a.split("=")[0] for a in arguments}
        # 只认 conf/ 里确实有的选项：运行目录可能来自陌生人
        return [f"{g}={saved[g]}" for g in SWAPPABLE if g not in typed and (ROOT / "conf" / g / f"{saved[g]}.yaml").is_file()]
    except (ConfigError, OSError, KeyError, TypeError, yaml.YAMLError):
        # 目录不对或配置损坏：稍后由真正的加载来说明
        return []


def quoted(argument: str) -> str:
    """A command-line argument that Hydra's grammar reads: text in quotes, Chinese included.

    Unquoted, its lexer knows ASCII only and takes commas for a sweep.
    """
    key, equals, value = argument.partition("=")
    if not equals or not value or value[0] in "'\"":
        return argument
    # 说明里写的 null 是“没有”，不是文字；要写这个词就加引号
    if key in FREE_TEXT and value[0] not in "[{" and value != "null":
        return f"{key}={_in_quotes(value)}"
    # 逗号与括号留给 Hydra：列表、扫描里的每个中文项分别加引号
    items = re.compile(f"({QUOTED})|{NON_ASCII_ITEM}")
    return f"{key}={items.sub(lambda item: item[1] or _in_quotes(item[0]), value)}"


def _in_quotes(value: str) -> str:
    # 末尾的反斜杠会吃掉右引号，要双写
    tail = len(value) - len(value.rstrip("\\"))
    return "'" + value.replace("'", "\\'") + "\\" * tail + "'"


def forgive_output() -> None:
    """Print ? for a character that the terminal cannot show."""
    # 重定向到 GBK 终端时，打不出的字符也不该让程序崩溃
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")


def run_script(config_name: str, task: Callable[[TrainConfig | SampleConfig, list[str]], float | None]) -> None:
    """Compose conf/<config_name>.yaml with the command line and call task(cfg, overrides); exit 2 on a mistake."""
    forgive_output()
    set_language(language_from_arguments(sys.argv))
    register_schemas()
    # 让 Hydra 把异常原样抛出，由下面统一压成一行
    os.environ["HYDRA_FULL_ERROR"] = "1"
    reported: list[Exception] = []
    remembered = remembered_groups(sys.argv[1:])
    sys.argv[1:] = [*map(quoted, sys.argv[1:]), *remembered]

    def job(cfg):
        hydra_config = HydraConfig.get()
        overrides = [o for o in hydra_config.overrides.task if o not in remembered]
        try:
            set_language(cfg.lang if cfg.lang in ("zh", "en") else "auto")
            typed = OmegaConf.to_object(cfg)
            typed.groups = {g: o for g, o in hydra_config.runtime.choices.items() if o and not g.startswith("hydra/")}
            trial = isinstance(typed, TrainConfig) and typed.trial.enabled
            if hydra_config.mode == RunMode.MULTIRUN and (typed.out_dir is None or trial):
                # 每个任务一个目录，不会互相覆盖
                typed.out_dir = str(Path(hydra_config.sweep.dir) / hydra_config.sweep.subdir)
            # 载入模型、准备数据时内存不足，也只用一行说；扫描器（Optuna 等）要这个返回值
            with told_in_one_line():
                return task(typed, overrides)
        except (ConfigError, OmegaConfBaseException) as error:
            say("error", line=one_line(error, config_name))
            reported.append(error)
            # 多任务时只算这一个失败，其余照跑；单任务直接退出
            if hydra_config.mode == RunMode.MULTIRUN:
                raise
            sys.exit(EXIT_USER_ERROR)
        except BrokenPipeError:
            # 读的一方先走了（… | head）：不是错误，安静地结束；解释器退出时还会再刷一次 stdout
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(EXIT_PIPE_CLOSED)

    try:
        hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name=config_name)(job)()
    except (HydraException, ConfigCompositionException, OverrideParseException, OmegaConfBaseException, ConfigError) as error:
        if error not in reported:
            say("error", line=one_line(error, config_name))
        sys.exit(EXIT_USER_ERROR)
