"""The run scripts' command line: composes each job with Hydra and reports a mistake in one line."""

# 两个运行脚本的入口：命令行交给 Hydra 拼成配置，逐个任务去跑，错误压成一行
# 敲下的先整理（arranged、with_integers、quoting），再由 hydra.main 拼；查过值之后才交给 run_train 或 run_sample
# 扫描（-m）先查完所有任务再跑第一个，免得半夜里第三个才说写错了
# 这里不导入 torch：写错一个键，一秒内就有回答

import contextlib
import copy
import difflib
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import hydra
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from nanogpt.base import run_names
from nanogpt.base.composing import SCHEMAS, check_whole, composing, one_line, refuse_unknown_hydra_keys
from nanogpt.base.config import PATH_KEYS, RECORD_SUFFIXES, ROOT, TEXT_KEYS, TrainConfig
from nanogpt.base.console import Console, duration
from nanogpt.base.errors import EXIT_USER_ERROR, explained, forgive_output, leave_quietly, one_line_each
from nanogpt.base.help import help_page, versions
from nanogpt.base.language import ConfigError, language_from_arguments, say, set_language, show, text
from nanogpt.base.quoting import QUOTED, in_quotes, override, quoted, typed_override, word
from nanogpt.base.sample_config import SampleConfig, register_schemas
from nanogpt.base.sweep_folder import Job, naming_jobs, tidy_latest
from nanogpt.base.user_yaml import checked_yaml, group_options, is_group
from nanogpt.base.value_checks import check_values, expanded, in_digits, wanted_type

# 写得出整数的浮点数；1e-3、1.5e3 里未必是整数，换算时再看
EXPONENT = r"(?<![\w.])[+-]?\d[\d_]*(?:\.\d*)?[eE]\+?\d{1,3}(?![\w.])"
WHOLE_FLOAT = rf"(?:{EXPONENT}|(?<![\w.])[+-]?\d[\d_]*\.0*(?![\w.]))"
# 内容随选项而变的配置组；model 一类形状固定的不在内
SWAPPABLE = ("optimizer", "dataset", "logger")
# 扫描还要这么久（秒）才值得说一声
WORTH_SAYING_S = 5
# 没有写 hydra.mode 时，Hydra 自己添的一句
SINGLE = "hydra.mode=RUN"
# 我们自己的帮助；Hydra 的在 --hydra-help
HELP = {"--help", "-h"}
# 命令行原来的样子：交给别的机器的，一个字也不改
TYPED: list[str] = []


# ---- 命令行 ----


def remembered_groups(arguments: list[str]) -> list[str]:
    """On resume, the run's own choice of every swappable group that was not typed again.

    Without them `resume=… optimizer.weight_decay=0` would be composed against the default optimizer.
    """
    named = [a.removeprefix("resume=") for a in arguments if a.startswith("resume=")]
    if not named or named[-1] in ("null", ""):
        return []
    try:
        saved = yaml.safe_load((run_names.locate(named[-1]) / "config.yaml").read_text(encoding="utf-8"))["groups"]
        typed = {a.split("=")[0] for a in arguments}
        # 只认自己的 yaml 里确实有的选项：运行目录可能来自陌生人
        return [f"{g}={saved[g]}" for g in SWAPPABLE if g not in typed and saved[g] in group_options(g)]
    except (ConfigError, OSError, KeyError, TypeError, ValueError, yaml.YAMLError, RecursionError):
        # 目录不对或配置损坏：稍后由真正的加载来说明
        return []


def gone_on(arguments: list[str]) -> list[str]:
    """The same with resume=auto decided: it goes on in out_dir where a training has begun, else begins one there.

    A command that torchrun starts again after a failure does so without the word.
    """
    again = any(int(os.environ.get(f"TORCHELASTIC_{name}", 0)) for name in ("MAX_RESTARTS", "RESTART_COUNT"))
    named = [argument for argument in arguments if argument.startswith("resume=")]
    if named[-1:] != ["resume=auto"] and not (again and not named):
        return arguments
    folders = [argument.partition("=")[2] for argument in arguments if argument.startswith("out_dir=")]
    if not folders or folders[-1] in ("", "null"):
        raise ConfigError(
            "resume=auto, and torchrun --max-restarts, need a folder in which to find the training again; add "
            "out_dir=outputs/my-run",
        )
    begun = (Path(expanded(folders[-1])) / "run.json").is_file()
    # 配方、overwrite、起点的 checkpoint 只对开头有意义；其余的照敲的盖上去，与存下的相同就什么也不改
    # out_dir 留着：与 resume 相同，就是“没有剩下的也算成功”
    dropped = ("resume", "overwrite", "experiment", "checkpoint") if begun else ("resume",)
    left = [argument for argument in arguments if argument.partition("=")[0] not in dropped]
    return [*left, f"resume={folders[-1]}"] if begun else left


def implied_dataset(arguments: list[str]) -> list[str]:
    """The data set that dataset.path=… implies when none is named: labelled for files of records, else text_file."""
    typed = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    # 配方与旧的训练自己定了数据集；试跑与搜索没有，用哪份文字都行
    decided = typed.keys() & {"dataset", "resume"} or typed.get("experiment") not in (None, "fit", "search")
    if "dataset.path" not in typed or decided:
        return []
    return ["dataset=labelled" if typed["dataset.path"].lower().endswith(RECORD_SUFFIXES) else "dataset=text_file"]


def arranged(arguments: list[str]) -> tuple[list[str], list[str], bool]:
    """Return (flags with their values, overrides, whether it is a sweep); refuse what cannot be read.

    Hydra wants the flags together, people write them anywhere.
    """
    refuse_glob_of_values(arguments)
    parser = get_args_parser()

    def refuse(reason: str):
        close = difflib.get_close_matches(reason.split()[-1], parser._option_string_actions, n=1)
        guess = text("did_you_mean", guess=close[0]) if close else ""
        raise ConfigError("unreadable_flag", reason=reason + guess)

    # 缩写也不认：--vers 会是 Hydra 的版本
    parser.error, parser.allow_abbrev = refuse, False
    typed = parser.parse_intermixed_args(arguments)
    if typed.experimental_rerun:
        # 它会载入 pickle：文件里的代码不执行
        refuse("--experimental-rerun would run code from a pickle")
    for flag in ("config_dir", "config_path", "config_name"):
        if getattr(typed, flag) == "":
            # 空的 --config-dir 就是当前文件夹：多半是没有设好的变量
            raise ConfigError(
                "{flag}= is empty; write what it names, or leave it out",
                flag="--" + flag.replace("_", "-"),
            )
    overrides = typed.overrides
    flags, left = [], list(overrides)
    for argument in arguments:
        if left and argument == left[0]:
            del left[0]
        else:
            flags.append(argument)
    return flags, overrides, typed.multirun or "hydra.mode=MULTIRUN" in overrides


def with_integers(argument: str, schema: type) -> str:
    """The argument with whole numbers such as 1e3 written as 1000 where the key takes, or may take, integers."""
    key, equals, value = argument.partition("=")
    wanted = wanted_type(schema, key.lstrip("+"))
    if key.lstrip("+") in (*PATH_KEYS, *TEXT_KEYS) or (wanted and not re.search(r"\bint\b", wanted)):
        return argument
    # 选项的类型写在它自己的函数里：那里只改 1e3，不动 1.0
    form = WHOLE_FLOAT if wanted else EXPONENT
    return key + equals + re.sub(rf"({QUOTED})|{form}", lambda found: found[1] or in_digits(found[0]), value)


def refuse_glob_of_values(arguments: list[str]) -> None:
    """Refuse glob(…) as the value of a key that is not a config group: only groups have options to go through."""
    for argument in arguments:
        key, _, value = argument.partition("=")
        if value.startswith("glob(") and key not in (*PATH_KEYS, *TEXT_KEYS) and not is_group(key):
            # 会得到零个任务：什么也不做就成功
            remedy = text("write the values: {key}=a,b,c", key=key)
            raise ConfigError(
                "unreadable", argument=argument,
                reason=text(
                "only groups have options to go through",
            ), remedy=remedy,
            )


def searched(typed: list[str]) -> list[str]:
    """Beside experiment=search a key with several values is one search over them, not several jobs.

    Such keys go into search.typed, in Hydra's words.
    """
    if "experiment=search" not in typed:
        return typed
    several = [word for word in typed if word.startswith("shape=") or _is_swept(word)]
    listed = ",".join(map(in_quotes, several))
    return [*(word for word in typed if word not in several), *([f"search.typed=[{listed}]"] if several else [])]


def _is_swept(word: str) -> bool:
    try:
        return OverridesParser.create().parse_override(word).is_sweep_override()
    except HydraException:
        # 读不懂的，由拼配置的那一步去说
        return False


# ---- 运行 ----


def typed_config(cfg: DictConfig, config_name: str) -> TrainConfig | SampleConfig:
    """The typed form of a composed configuration, with the option chosen in each group.

    Refuses keys that were taken away and values that cannot be right.
    """
    check_whole(cfg, SCHEMAS[config_name])
    typed = OmegaConf.to_object(cfg)
    for name in typed.groups:
        # 由程序自己填写
        raise ConfigError("unread_key", key=f"groups.{name}")
    choices = {g: o for g, o in HydraConfig.get().runtime.choices.items() if o and not g.startswith("hydra/")}
    for group, option in choices.items():
        if not isinstance(option, str):
            raise ConfigError(
                "{group}={got}: one option is wanted here, not several; choose one, or put both into a yaml of your "
                "own under conf/{group}",
                group=group, got=OmegaConf.to_container(option),
            )
    if "finetune=full" in HydraConfig.get().overrides.task and choices.get("memory") == "lora4":
        # lora4 自带 LoRA，会悄悄盖过敲下的 full
        raise ConfigError(
            "finetune=full contradicts memory=lora4, which trains LoRA beside frozen weights of 4 bits; leave out "
            "finetune=full, or take memory=minimal, which trains all weights in little memory",
        )
    for typed_key in HydraConfig.get().overrides.task:
        key = typed_key.removeprefix("~").partition("=")[0]
        if typed_key.startswith("~") and re.match(r"(sampler|control|optimizer|dataset)\.|logger\.\w+\.", key):
            # 悄悄换成函数的默认值，会与 yaml 里写的不一样
            raise ConfigError("removed_key", key=key)
        if key == "model.arch":
            # 标题里的名字而已：敲它的人要的是另一种结构
            raise ConfigError(
                "model.arch={got} changes the name in the titles and nothing else; choose an architecture with "
                "arch={got}",
                got=typed.model.arch,
            )
    typed.groups = choices
    at_home(typed)
    check_values(typed)
    return typed


def at_home(cfg: TrainConfig | SampleConfig) -> None:
    """Expand the ~ of every path to the home folder; a shell does so only at the beginning of a word."""
    for key in PATH_KEYS:
        group, _, name = key.rpartition(".")
        node = getattr(cfg, group, None) if group else vars(cfg)
        if isinstance(node, dict) and isinstance(path := node.get(name), str):
            node[name] = expanded(path)


def run_script(
    config_name: str, task: Callable[[TrainConfig | SampleConfig, list[str]], float | None],
    before_sweep: Callable[[TrainConfig | SampleConfig], Path | None] = lambda cfg: None,
    after_sweep: Callable[[list[Job]], None] = lambda jobs: None,
) -> None:
    """Compose conf/<config_name>.yaml with the command line and call task(cfg, overrides); exit 2 on a mistake.

    before_sweep(cfg) is called for every job of a sweep before the first one runs: it refuses mistakes and returns
    the folder that only this job may use. after_sweep(jobs) is called with those that had one, however they ended.
    """
    forgive_output()
    set_language(language_from_arguments(sys.argv))
    TYPED[:] = sys.argv[1:]
    register_schemas()
    # 让 Hydra 把异常原样抛出，由下面统一压成一行
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with one_line_each():
        if HELP & set(sys.argv[1:]):
            show(help_page(config_name))
            return
        if "--version" in sys.argv[1:]:
            show(versions())
            return
        with composing(config_name):
            flags, overrides, sweep = arranged(sys.argv[1:])
            overrides = gone_on(overrides) if config_name == "train" else overrides
        _Script(config_name, task, before_sweep, after_sweep, overrides, sweep=sweep).run(flags)


@contextlib.contextmanager
def composed_once() -> Iterator[None]:
    """Let Hydra compose a single job once inside, which of itself it does twice, at first only to read hydra.mode."""
    # 敲错一个键时，多拼的一次占三成时间；有扫描的，两次拼出的不一样，照旧
    load = ConfigLoaderImpl.load_configuration
    first: list[tuple[list[str], DictConfig | Exception]] = []

    def once(loader, config_name: str, overrides: list[str], run_mode: RunMode, **how) -> DictConfig:
        asks_for_mode = run_mode is RunMode.MULTIRUN and not how.get("validate_sweep_overrides", True)
        if asks_for_mode and not any(map(_is_swept, overrides)):
            try:
                found = load(loader, config_name, overrides, RunMode.RUN)
            except Exception as error:
                found = error
            first.append((list(overrides), found))
        elif run_mode is RunMode.RUN and first and overrides in (first[0][0], [*first[0][0], SINGLE]):
            before, found = first.pop()
            if isinstance(found, DictConfig) and len(before) < len(overrides):
                found.hydra.mode = RunMode.RUN
                found.hydra.overrides.hydra.append(SINGLE)
        else:
            return load(loader, config_name, overrides, run_mode, **how)
        if isinstance(found, Exception):
            raise found
        return found

    ConfigLoaderImpl.load_configuration = once
    try:
        yield
    finally:
        ConfigLoaderImpl.load_configuration = load


class _Script:
    """One run of hydra.main: the job, and what has been said about its mistakes."""

    # Hydra 只认一个函数，又在几处回调它：命令行、任务与已报过的错误放在一个对象里，同一个错误只说一次

    def __init__(
        self, config_name: str, task: Callable, before_sweep: Callable, after_sweep: Callable, overrides: list[str], *,
        sweep: bool,
    ):
        self.config_name, self.task = config_name, task
        self.before_sweep, self.after_sweep = before_sweep, after_sweep
        # 只有训练能接着：写作时敲了 resume=，错的是它
        self.remembered = remembered_groups(overrides) if config_name == "train" else []
        exact = [with_integers(argument, SCHEMAS[config_name]) for argument in overrides]
        typed = [quoted(argument, sweep=sweep) for argument in exact]
        self.overrides = [*searched(typed), *self.remembered, *implied_dataset(overrides)]
        self.sweep, self.started = sweep, False
        self.reported: list[Exception] = []
        self.jobs: dict[int, Job] = {}
        self.checked = 0
        self.swept: list[str] = []
        """Of each job what not all of them share, where the number of jobs is known before the end."""
        self.began = 0.0

    def run(self, flags: list[str]) -> None:
        """Compose and run every job; SystemExit on a mistake."""
        sys.argv[1:] = [*flags, *self.overrides, *(naming_jobs(self.overrides) if self.sweep else [])]
        try:
            with checked_yaml(), composed_once(), self.checked_sweeps():
                # Hydra 会看函数定义在哪个文件：要给它一个函数，而不是方法
                main = hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name=self.config_name)
                main(lambda cfg: self.job(cfg))()
        except Exception as error:
            if error in self.reported:
                sys.exit(EXIT_USER_ERROR)
            if self.started and not isinstance(error, OmegaConfBaseException):
                # 任务里的异常：是错误就一行，是缺陷就留着 traceback
                raise
            with composing(self.config_name):
                raise
        finally:
            if self.jobs:
                self.after_sweep(list(self.jobs.values()))
            tidy_latest()

    def job(self, cfg: DictConfig) -> float | None:
        """Run one job of a sweep, or the only one."""
        self.started = True
        hydra_config = HydraConfig.get()
        # hydra.job.chdir=true 会换目录：写下的相对路径仍从敲命令的地方算起，运行目录自有 out_dir
        os.chdir(hydra_config.runtime.cwd)
        try:
            with composing(self.config_name):
                typed, overrides = self.composed(cfg, hydra_config)
            # 扫描器（Optuna 等）要这个返回值
            with self.in_sight(typed, hydra_config.job.get("num")):
                return self.task(typed, overrides)
        except BrokenPipeError:
            leave_quietly()
        except Exception as error:
            line = one_line(error, self.config_name) if isinstance(error, OmegaConfBaseException) else explained(error)
            if line is None:
                raise
            say("error", line=line)
            self.reported.append(error)
            if job := self.jobs.get(hydra_config.job.get("num")):
                self.jobs[hydra_config.job.num] = replace(job, reason=str(line))
            # 多任务时只算这一个失败，其余照跑；单任务直接退出
            if hydra_config.mode == RunMode.MULTIRUN:
                raise
            sys.exit(EXIT_USER_ERROR)

    @contextlib.contextmanager
    def in_sight(self, cfg: TrainConfig | SampleConfig, number: int | None) -> Iterator[None]:
        """Say which job of a sweep begins, or show a bar where it is a trial; behind it, how long the others take."""
        if not self.swept:
            yield
            return
        count = len(self.swept)

        def left(done: int) -> float | None:
            return (time.time() - self.began) / done * (count - done) if done else None

        # 训练有自己的进度条；试跑在子进程里，没有声响，做完了才说结果
        trial = isinstance(cfg, TrainConfig) and cfg.trial.enabled
        if not trial:
            say("{number} of {count}: {what}", number=number + 1, count=count, what=self.swept[number])
        with Console(stream="stderr", quiet=not trial).progress(count, number, title="progress_trials") as advance:
            advance(number, left=left(number))
            yield
        if (seconds := left(number + 1)) > WORTH_SAYING_S:
            say("so_far", done=number + 1, count=count, time=duration(seconds))

    @contextlib.contextmanager
    def checked_sweeps(self) -> Iterator[None]:
        """Check all jobs of a sweep before the first one is launched, where Hydra itself only composes them."""
        # Hydra 没有留下插口，只在这里逐个拼一遍：换下这个函数，离开时放回去
        composes = Sweeper.validate_batch_is_legal
        Sweeper.validate_batch_is_legal = lambda sweeper, batch: self.check_jobs(sweeper, batch)
        try:
            yield
        finally:
            Sweeper.validate_batch_is_legal = composes

    def check_jobs(self, sweeper: Sweeper, batch: Sequence[Sequence[str]]) -> None:
        """Print every mistake of the jobs once, and raise if there was one; no two jobs may use the same folder."""
        loader, known = sweeper.hydra_context.config_loader, HydraConfig.instance().cfg
        said: set[str] = set()
        used: set[Path] = set()
        jobs: dict[int, Job] = {}
        try:
            # hydra.sweeper.max_batch_size：一批一批地来，号码接着数
            for number, overrides in enumerate(batch, self.checked):
                composed = loader.load_sweep_config(sweeper.config, list(overrides))
                with open_dict(composed):
                    composed.hydra.job.id = composed.hydra.job.num = number
                # 与 Hydra 一样，任务看到的是不带 hydra 的一份
                HydraConfig.instance().set_config(copy.deepcopy(composed))
                try:
                    if folder := self.check_job(composed, used):
                        jobs[number] = Job(tuple(overrides), folder)
                except (ConfigError, OSError) as error:
                    self.reported.append(error)
                    if (line := str(explained(error))) not in said:
                        said.add(line)
                        say("error", line=line)
        finally:
            HydraConfig.instance().cfg = known
        if said:
            raise self.reported[-1]
        self.jobs |= jobs
        self.checked += len(batch)
        # Optuna 与分批的扫描，到最后才知道有多少
        # Hydra 把插件另载一遍，类不是同一个，只能看名字
        if type(sweeper).__name__ == "BasicSweeper" and not sweeper.max_batch_size:
            if len(batch) > 1:
                shared = set.intersection(*map(set, batch))
                self.swept = [", ".join(word for word in words if word not in shared) for words in batch]
                self.began = time.time()
            # 它会打出每个任务的整串命令；一行放得下的，只有扫的那几项
            logging.getLogger("hydra._internal.core_plugins.basic_launcher").setLevel(logging.WARNING)

    def check_job(self, composed: DictConfig, used: set[Path]) -> Path | None:
        """Add the folder of a job to `used`, and return it.

        ConfigError for a mistake, and where an earlier job uses that folder.
        """
        with read_write(composed), open_dict(composed):
            del composed["hydra"]
        with composing(self.config_name):
            cfg, _ = self.composed(composed, HydraConfig.get())
        if not (folder := self.before_sweep(cfg)):
            return None
        if folder.resolve() in used:
            # 否则第一个训完，其余的才被拒绝
            if cfg.resume:
                remedy = text("start each from its weights instead: {apart}", apart=typed_override("init_from", folder))
            else:
                remedy = text(
                    "leave out_dir out, which gives each a folder of its own, or write {apart}",
                    apart=word(override("out_dir", folder) + "-${hydra:job.num}"),
                )
            raise ConfigError(
                "{key}={path}: several jobs of this sweep would train in this one folder; {remedy}",
                key="resume" if cfg.resume else "out_dir", path=folder, remedy=remedy,
            )
        used.add(folder.resolve())
        return folder

    def composed(self, cfg: DictConfig, hydra_config: DictConfig) -> tuple[TrainConfig | SampleConfig, list[str]]:
        """(typed configuration, the overrides that were typed) of a job."""
        refuse_unknown_hydra_keys()
        # 不解析：override 里的 ${…} 属于配置，不属于这张清单
        typed_words = OmegaConf.to_container(hydra_config.overrides.task, resolve=False)
        overrides = [argument for argument in typed_words if argument not in self.remembered]
        # 先定语言：下面的错误才用它说
        lang = cfg.get("lang")
        set_language(lang if lang in ("zh", "en") else "auto")
        typed = typed_config(cfg, self.config_name)
        trial = isinstance(typed, TrainConfig) and typed.trial.enabled
        if hydra_config.mode == RunMode.MULTIRUN and (typed.out_dir is None or trial):
            # 每个任务一个目录，不会互相覆盖
            typed.out_dir = str(Path(hydra_config.sweep.dir) / hydra_config.sweep.subdir)
        return typed, overrides
