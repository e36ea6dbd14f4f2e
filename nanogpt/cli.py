"""Between the command line and the run scripts: compose with Hydra, turn mistakes into one line."""

import contextlib
import difflib
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

from nanogpt import rundir
from nanogpt.config import ROOT, TrainConfig
from nanogpt.messages import ConfigError, language_from_arguments, say, set_language, text
from nanogpt.mistakes import EXIT_INTERRUPTED, EXIT_PIPE_CLOSED, EXIT_USER_ERROR, explained, leave_quietly, one_line_each
from nanogpt.sample_config import SampleConfig, register_schemas
from nanogpt.user_yaml import checked_yaml
from nanogpt.values import check_values, wanted_type

__all__ = ["EXIT_INTERRUPTED", "EXIT_PIPE_CLOSED", "EXIT_USER_ERROR", "composing", "forgive_output", "one_line", "quoted", "run_script"]

SCHEMAS = {"train": TrainConfig, "sample": SampleConfig}
# 值是文字的键：逗号、空格都属于内容
FREE_TEXT = ("sample_prompt", "start", "control.style", "control.emotion")
# 再长的话，Hydra 的语法分析要好几秒；长的文字放进文件
LONGEST_ARGUMENT = 8000
# 括号套得更深、逗号更多的，语法分析的时间会成倍增长
DEEPEST, MOST_ITEMS = 60, 500
# 已经带引号的一段，照原样
QUOTED = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\""""
# 列表或扫描里含有非 ASCII 字符的一项
NON_ASCII_ITEM = r"[^,\[\]{}()'\"]*[^\x00-\x7f][^,\[\]{}()'\"]*"
# 内容随选项而变的配置组；model 一类形状固定的不在内
SWAPPABLE = ("optimizer", "dataset", "logger")


# ---- 组合时的错误 ----


def known_keys(config_name: str) -> list[str]:
    """All dotted keys of the schema of conf/<config_name>.yaml."""

    def walk(node, prefix):
        for key, value in node.items():
            yield prefix + key
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")

    container = OmegaConf.to_container(OmegaConf.structured(SCHEMAS[config_name]), throw_on_missing=False)
    return list(walk(container, ""))


def group_options(group: str) -> str:
    """The options of a config group, in one line."""
    return ", ".join(sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml")))


def one_line(error: Exception, config_name: str) -> ConfigError:
    """Turn what Hydra or OmegaConf raised while composing into a ConfigError that names the key."""
    message = str(error)
    if isinstance(error, MissingConfigException) and error.options:
        group, _, got = (error.missing_cfg_file or "").rpartition("/")
        return ConfigError("unknown_option", group=group, got=got, options=", ".join(error.options))
    # Hydra 的“找不到配置”也是一种 OSError
    if not isinstance(error, HydraException) and (found := explained(error)):
        return found
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause, OmegaConfBaseException):
        if found := _of_a_value(cause, error, config_name):
            return found
    if isinstance(error, OverrideParseException):
        reason = next((line for line in message.splitlines() if line.strip()), "")
        return ConfigError("unreadable", argument=error.override, reason=reason)
    if several := re.search(r"Ambiguous value for argument '(.+)'\n|Sweep parameters '(.+)' requires", message):
        return ConfigError("sweep_without_m", argument=several[1] or several[2])
    unknown = re.search(r"Could not (?:override|append|delete)[^']*'([^'=@]+)", message)
    if unknown:
        key = unknown[1]
        close = difflib.get_close_matches(key, known_keys(config_name), n=1)
        guess = text("did_you_mean", guess=close[0]) if close and close[0] != key else ""
        return ConfigError("unknown_key", key=key, guess=guess, config=config_name)
    if found := _of_a_group(message):
        return found
    # 其余情形：后面的行是 Hydra 的内部细节，压成一行
    return ConfigError("compose", line=" ".join(line.strip() for line in message.splitlines() if line.strip()) or type(error).__name__)


def _of_a_value(cause: OmegaConfBaseException, error: Exception, config_name: str) -> ConfigError | None:
    """The line for a value that does not fit its key."""
    key, first = cause.full_key or "?", str(cause).partition("\n")[0]
    if isinstance(cause, InterpolationKeyError | InterpolationResolutionError) or "ecursive interpolation" in first:
        return ConfigError("interpolation", key=key, reason=first)
    if isinstance(cause, MissingMandatoryValue):
        return ConfigError("nothing_chosen", group=key, options=group_options(key))
    if "could not be converted" in first and cause.full_key:
        want = re.search(r"could not be converted to (\w+)", first)
        return ConfigError("wrong_type", key=key, got=cause.value, want=want[1] if want else "?")
    typed = re.match(r"Error merging override [+~]*([^=]+)=(.*)", str(error), flags=re.DOTALL)
    if typed and (want := wanted_type(SCHEMAS[config_name], typed[1])):
        return ConfigError("wrong_type", key=typed[1], got=typed[2], want=want)
    if want := cause.full_key and wanted_type(SCHEMAS[config_name], cause.full_key):
        return ConfigError("wrong_type", key=key, got=cause.value, want=want)
    return None


def _of_a_group(message: str) -> ConfigError | None:
    """The line for what Hydra says of a group without naming it."""
    if "Config group override must be" not in message:
        return None
    for argument in sys.argv[1:]:
        group, _, got = argument.partition("=")
        if group and (ROOT / "conf" / group).is_dir() and f"{got}.yaml" not in {path.name for path in (ROOT / "conf" / group).iterdir()}:
            return ConfigError("unknown_option", group=group, got=got, options=group_options(group))
    return None


@contextlib.contextmanager
def composing(config_name: str) -> Iterator[None]:
    """Turn whatever is raised inside, while Hydra reads and composes, into a ConfigError."""
    try:
        with checked_yaml():
            yield
    except (KeyboardInterrupt, SystemExit, BrokenPipeError):
        raise
    except RecursionError:
        raise ConfigError("compose", line=text("too_deep")) from None
    except Exception as error:
        # 这里还没有我们自己的代码在跑：无论 Hydra 抛什么，都是写法的问题
        raise one_line(error, config_name) from None


# ---- 命令行 ----


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
    except (ConfigError, OSError, KeyError, TypeError, ValueError, yaml.YAMLError, RecursionError):
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


def arranged(arguments: list[str]) -> tuple[list[str], list[str]]:
    """(flags with their values, overrides): Hydra wants the flags together, people write them anywhere. Refuses what cannot be read."""
    check_arguments(arguments)
    parser = get_args_parser()

    def refuse(reason: str):
        raise ConfigError("unreadable_flag", reason=reason)

    parser.error = refuse
    typed = parser.parse_intermixed_args(arguments)
    if typed.experimental_rerun:
        # 它会载入 pickle：文件里的代码不执行
        refuse("--experimental-rerun would run code from a pickle")
    overrides = typed.overrides
    flags, left = [], list(overrides)
    for argument in arguments:
        if left and argument == left[0]:
            del left[0]
        else:
            flags.append(argument)
    return flags, overrides


def check_arguments(arguments: list[str]) -> None:
    """Refuse what Hydra would chew on for minutes."""
    for argument in arguments:
        key, _, value = argument.partition("=")
        if len(argument) > LONGEST_ARGUMENT:
            raise ConfigError("long_argument", key=key[:60], got=len(argument), most=LONGEST_ARGUMENT)
        if key in FREE_TEXT:
            continue
        if digits := re.search(r"\d{400,}", value):
            # Python 不肯读几千位的整数
            raise ConfigError("large_number", key=key, got=f"{digits[0][:20]}…")
        if value.startswith("glob(") and not (ROOT / "conf" / key).is_dir():
            # 只有配置组有可以列举的选项；别的键会得到零个任务，什么也不做就成功
            raise ConfigError("unreadable", argument=argument, reason=text("glob_of_a_value"))
        depth = itertools.accumulate((c in "[{(") - (c in ")}]") for c in value)
        if max(depth, default=0) > DEEPEST or value.count(",") > MOST_ITEMS:
            raise ConfigError("unreadable", argument=argument, reason=text("too_deep"))


def forgive_output() -> None:
    """Print ? for a character that the terminal cannot show."""
    # 重定向到 GBK 终端时，打不出的字符也不该让程序崩溃
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")


# ---- 运行 ----


def typed_config(cfg: DictConfig, config_name: str) -> TrainConfig | SampleConfig:
    """The typed configuration of a composed one, with the option chosen in each group; refuses keys taken away and values that cannot be right."""
    check_whole(cfg, SCHEMAS[config_name])
    typed = OmegaConf.to_object(cfg)
    for name in typed.groups:
        # 由程序自己填写
        raise ConfigError("unread_key", key=f"groups.{name}")
    choices = {g: o for g, o in HydraConfig.get().runtime.choices.items() if o and not g.startswith("hydra/")}
    for group, option in choices.items():
        if not isinstance(option, str):
            raise ConfigError("one_option", group=group, got=OmegaConf.to_container(option))
    typed.groups = choices
    check_values(typed)
    return typed


def check_whole(cfg: DictConfig, schema: type, prefix: str = "") -> None:
    """Refuse a configuration from which ~key took a part of the schema."""
    for field in fields(schema):
        if field.name not in cfg:
            if (ROOT / "conf" / field.name).is_dir():
                raise ConfigError("nothing_chosen", group=field.name, options=group_options(field.name))
            # 悄悄换成 schema 的默认值，会与 yaml 里写的不一样
            raise ConfigError("removed_key", key=prefix + field.name)
        if is_dataclass(field.type):
            check_whole(cfg[field.name], field.type, f"{prefix}{field.name}.")


def run_script(config_name: str, task: Callable[[TrainConfig | SampleConfig, list[str]], float | None]) -> None:
    """Compose conf/<config_name>.yaml with the command line and call task(cfg, overrides); exit 2 on a mistake."""
    forgive_output()
    set_language(language_from_arguments(sys.argv))
    register_schemas()
    # 让 Hydra 把异常原样抛出，由下面统一压成一行
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with one_line_each():
        with composing(config_name):
            flags, overrides = arranged(sys.argv[1:])
        _Script(config_name, task, overrides).run(flags)


class _Script:
    """One run of hydra.main: the job, and what has been said about its mistakes."""

    def __init__(self, config_name: str, task: Callable, overrides: list[str]):
        self.config_name, self.task = config_name, task
        self.remembered = remembered_groups(overrides)
        self.overrides = [*map(quoted, overrides), *self.remembered]
        self.started = False
        self.reported: list[Exception] = []

    def run(self, flags: list[str]) -> None:
        """Compose and run every job; SystemExit on a mistake."""
        sys.argv[1:] = [*flags, *self.overrides]
        try:
            with checked_yaml():
                # Hydra 会看函数定义在哪个文件：要给它一个函数，而不是方法
                hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name=self.config_name)(lambda cfg: self.job(cfg))()
        except Exception as error:
            if error in self.reported:
                sys.exit(EXIT_USER_ERROR)
            if self.started and not isinstance(error, OmegaConfBaseException):
                # 任务里的异常：是错误就一行，是缺陷就留着 traceback
                raise
            with composing(self.config_name):
                raise

    def job(self, cfg: DictConfig) -> float | None:
        """One job, or the only one."""
        self.started = True
        hydra_config = HydraConfig.get()
        try:
            with composing(self.config_name):
                typed, overrides = self.composed(cfg, hydra_config)
            # 扫描器（Optuna 等）要这个返回值
            return self.task(typed, overrides)
        except BrokenPipeError:
            leave_quietly()
        except Exception as error:
            line = one_line(error, self.config_name) if isinstance(error, OmegaConfBaseException) else explained(error)
            if line is None:
                raise
            say("error", line=line)
            self.reported.append(error)
            # 多任务时只算这一个失败，其余照跑；单任务直接退出
            if hydra_config.mode == RunMode.MULTIRUN:
                raise
            sys.exit(EXIT_USER_ERROR)

    def composed(self, cfg: DictConfig, hydra_config: DictConfig) -> tuple[TrainConfig | SampleConfig, list[str]]:
        """(typed configuration, the overrides that were typed) of a job."""
        # 不解析：override 里的 ${…} 属于配置，不属于这张清单
        overrides = [o for o in OmegaConf.to_container(hydra_config.overrides.task, resolve=False) if o not in self.remembered]
        # 先定语言：下面的错误才用它说
        lang = cfg.get("lang")
        set_language(lang if lang in ("zh", "en") else "auto")
        typed = typed_config(cfg, self.config_name)
        trial = isinstance(typed, TrainConfig) and typed.trial.enabled
        if hydra_config.mode == RunMode.MULTIRUN and (typed.out_dir is None or trial):
            # 每个任务一个目录，不会互相覆盖
            typed.out_dir = str(Path(hydra_config.sweep.dir) / hydra_config.sweep.subdir)
        return typed, overrides
