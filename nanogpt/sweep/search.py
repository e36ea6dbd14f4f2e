"""Find the settings that learn most in a given time: experiment=search.

Needs no torch: the trials train in child processes.
"""

# 搜索的一头一尾：把空间、时间、真的试跑接到 halving 的循环上，再把结果交给报告
# 先用配置里本来的设置量一次快慢：由它知道起一个进程要多久、每级有多少步、评估能用多少 token，再把时间分好，说给人听
# 每个设置先照 experiment=fit 量几步（放不下的到此为止，绝不训练），步时把分钟换成步数：
# 从此一切由步数决定，同样的设置、同样的种子得到同样的结果，续训逐位一致；时间预算只在换算的那一刻进来
# 微批只找一次：在最大的批量上量出最快的那档，其余设置用它与自己批量中较小的；放不下的（更宽、更深）再减半，批量不变

import math
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from nanogpt.base.cli import at_home
from nanogpt.base.composing import composing
from nanogpt.base.config import TrainConfig, auto_tokens, check
from nanogpt.base.errors import EXIT_INTERRUPTED, explained, leave
from nanogpt.base.groups import Composer
from nanogpt.base.hashed_json import read_sealed
from nanogpt.base.language import ConfigError, say, show, text, wrapped
from nanogpt.base.value_checks import check_values
from nanogpt.data import corpus
from nanogpt.data import tokenizer as tokenizers
from nanogpt.sweep import earlier_results, result
from nanogpt.sweep.auto_batch import candidates as batch_sizes
from nanogpt.sweep.auto_batch import fastest
from nanogpt.sweep.beside import Beside, places
from nanogpt.sweep.halving import Candidate, Schedule, Search, divide
from nanogpt.sweep.jobs import runner
from nanogpt.sweep.result import FIT, STATUS_MESSAGES, TrialResult
from nanogpt.sweep.space import Dimension, default_of, overrides_of, space_of, with_own, without_model
from nanogpt.sweep.trial import RUNS

# 量快慢：预热一步，计时的各步合起来约这么久，取中位数；别的程序偶尔插进来就不算数
TIMED_S, TIMED_STEPS = 2.0, (2, 30)
# 这一版起的 ask 与 tell
OPTUNA = 4
# 短于这么久的搜索不去找最快的微批：量它要几次试跑
MINUTES_FOR_BATCH = 20
# 一级里至少走这么多步的批量才进空间
LEAST_STEPS = 20
# 每级评估几次，以及评估至多占这一级的几成
EVALUATIONS, EVALUATING = 3, 0.15
# 前向比一整步快约三倍
FORWARD = 3
# 平台之后衰减的一段：wsd 论文与 train.yaml 都用五分之一
DECAY = 0.2
LEAST_EVAL_TOKENS = 2048
# 开始之前试拼这么多个设置
DRAWN = 64


def search_job(cfg: TrainConfig, overrides: list[str]) -> float:
    """Search, leave the report and best.yaml, and return the best mean of the objective."""
    folder = _folder()
    try:
        return _search(cfg, overrides, folder)
    except KeyboardInterrupt:
        say("search_interrupted")
        sys.exit(EXIT_INTERRUPTED)
    except ConfigError as error:
        # 交给 Hydra，它会另说一行是哪个任务：搜索只有一个
        leave(error)
    except OSError as error:
        # 写报告时满了的盘，不说是哪个文件
        error.filename = error.filename or str(folder)
        leave(explained(error))


def _search(cfg: TrainConfig, overrides: list[str], folder: Path) -> float:
    from nanogpt.sweep.learning_report import write_search

    check_search(cfg)
    if cfg.objective == "tokens_per_s":
        return _fastest(cfg, overrides, folder)
    space = searched(cfg, overrides)
    dataset = {k: v for k, v in cfg.dataset.items() if k not in ("name", "dir")}
    # 准备数据不算进搜索的时间，也不算进哪次试跑
    prepared = corpus.prepare(cfg.dataset["name"], cfg.dataset["dir"], dataset)
    if cfg.objective == "val_bpb" and tokenizers.byte_counts(tokenizers.load(prepared / "tokenizer.json")) is None:
        # 否则每次试训训完才说没有这个数
        raise ConfigError(
            "objective=val_bpb: the tokens of this vocabulary stand for no fixed number of bytes; type "
            "objective=val_loss",
        )
    # 报告要估计的那次训练，读多少与真的一样
    if cfg.max_tokens == "auto":
        read = read_sealed(prepared / "meta.json", corpus.FORMAT)["tokens"]["train"]
        cfg = replace(cfg, max_tokens=auto_tokens(cfg.model, read))
    trials = Trials(cfg, overrides, folder)
    trials.refuse_impossible(space)
    schedule, space = trials.prepared(space)
    announce(cfg, space, schedule)
    search = Search(
        space, schedule, trials.run, minutes=cfg.search.minutes, seed=cfg.seed, say=partial(tell, cfg),
        first=default_of(space, cfg), prune=trials.forget, spent=trials.spent, beside=trials.beside,
    )
    search.run()
    write_search(cfg, space, search, trials.folder)
    if not search.best:
        sys.exit(1)
    return search.best[0].mean


def _fastest(cfg: TrainConfig, overrides: list[str], folder: Path) -> float:
    """The search for speed: TPE alone over what was typed, a few steps of each; there is nothing to go on with."""
    from nanogpt.sweep.report import write_report

    space = searched(cfg, overrides)
    trials = Trials(cfg, overrides, folder)
    schedule = Schedule((0.0,), cfg.search.trials, cfg.search.eta, 1, 1, 0.0, trials.beside.count)
    search = Search(
        space, schedule, lambda setting, rung, seed: trials.trial(overrides_of(setting, cfg.model)),
        minutes=cfg.search.minutes, seed=cfg.seed, say=partial(tell, cfg), beside=trials.beside,
    )
    search.run()
    # 不成立的设置没有键：一个也不能并掉
    found = list({got.key or id(got): got for one in search.candidates for got in one.tried}.values())
    trials.folder.mkdir(parents=True, exist_ok=True)
    write_report(found, trials.folder, margin=cfg.trial.margin)
    if not any(got.status == "ok" for got in found):
        sys.exit(1)
    return max(got.score for got in found)


def searched(cfg: TrainConfig, overrides: Sequence[str] = ()) -> list[Dimension]:
    """The space of a search; for speed only what was typed, the micro-batch too."""
    if cfg.objective == "tokens_per_s":
        return space_of([], cfg.search.typed, overrides, own=())
    given = without_model(cfg.search.space) if cfg.init_from else cfg.search.space
    return with_own(space_of(given, cfg.search.typed, overrides), cfg.search.typed, cfg)


def check_search(cfg: TrainConfig) -> None:
    """ConfigError for what cannot be searched, before anything begins, and where no recent Optuna is installed."""
    check(cfg)
    if cfg.resume:
        raise ConfigError("trial_not_with", key="resume", got=cfg.resume)
    searched(cfg, HydraConfig.get().overrides.task if HydraConfig.initialized() else ())
    places(cfg)
    try:
        import optuna
        import sklearn  # noqa: F401 - optuna 的 fANOVA 用它
    except ImportError:
        optuna = None
    if optuna is None or int(optuna.__version__.split(".")[0]) < OPTUNA:
        raise ConfigError("missing_package", what="experiment=search", package="'optuna>=4' scikit-learn")


def _folder() -> Path:
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN:
        return Path(hydra_config.sweep.dir)
    return FIT / time.strftime("%Y-%m-%d_%H-%M-%S")


def announce(cfg: TrainConfig, space: Sequence[Dimension], schedule: Schedule) -> None:
    """Say what is searched and how the time will be divided."""
    # 只写了一个值的，不是在搜
    lines = [text("searching {space}", space="; ".join(str(one) for one in space if len(one.choices) != 1))]
    minutes = [f"{minutes:.1f}" for minutes in schedule.rungs]
    kept = [schedule.generations * (schedule.size // schedule.eta**rung) for rung in range(len(minutes))]
    steps = text("{count} settings for {minutes} min each", count=kept[0], minutes=minutes[0])
    for count, longer in zip(kept[1:], minutes[1:]):
        steps += text(" → the best {count} on to {minutes} min", count=count, minutes=longer)
    if schedule.seeds > 1:
        steps += text(", then the best {top} with {seeds} seeds each", top=schedule.top, seeds=schedule.seeds)
    lines.append(text(
        "{minutes:g} minutes: {steps}; about {all:.0f} min in all",
        minutes=cfg.search.minutes, steps=steps, all=schedule.minutes,
    ))
    if cfg.holdout:
        lines.append(text(
            "chosen on {part:.0%} of the training split, which is held out; only trainings that have come to their end "
            "look at the validation split, once, and nothing is chosen by it",
            part=cfg.holdout,
        ))
    for line in lines:
        show(wrapped(line, sys.stdout))


def tell(cfg: TrainConfig, candidate: Candidate, got: TrialResult, seed: int, spent: float) -> None:
    """One line on the console for every piece of training, and how much of the time is used up."""
    words = " ".join(f"{key}={word}" for key, word in candidate.setting.items())
    what = f"{text(STATUS_MESSAGES[got.status])}: {got.reason}"
    if got.status == "ok":
        what = f"{got.value:,.0f} tokens/s" if got.objective == "tokens_per_s" else f"{got.objective} {got.value:.4f}"
    show(wrapped(text(
        "setting {number}{trained}{seed}: {words}: {what} ({spent:.1f} of {minutes:g} min)", number=candidate.number,
        trained=text(" for {minutes:.1f} min", minutes=got.minutes) if got.minutes else "",
        seed=text(", seed {seed}", seed=cfg.seed + seed) if seed else "", words=words, what=what, spent=spent,
        minutes=cfg.search.minutes,
    ), sys.stdout))


@dataclass(frozen=True)
class Steps:
    """Optimizer steps of one setting at every rung."""

    # 分钟换成了步数：同一个设置的步时只量一次

    rungs: tuple[int, ...]

    def keys(self, rung: int) -> dict[str, Any]:
        """Of the training up to the end of a rung."""
        whole, end = self.rungs[-1], self.rungs[rung]
        before = self.rungs[rung - 1] if rung else 0
        return {
            "max_iters": end, "max_tokens": None, "max_minutes": None, "lr_decay_iters": whole, "lr_schedule": "wsd",
            "decay_fraction": DECAY, "eval_interval": max(1, -(-(end - before) // EVALUATIONS)), "save_interval": None,
            "warmup_iters": None,
        }


class Trials:
    """The real trials of a search."""

    # Search 只知道 run(设置, 级, 种子)；怎样拼配置、量快慢、接着训，都在这里

    def __init__(self, cfg: TrainConfig, overrides: list[str], folder: Path):
        self.cfg, self.folder = cfg, folder
        self.base = [word for word in overrides if not word.startswith(("search.", "+search."))]
        self.spent, self.number = 0.0, 0
        self.row_ms: float | None = None
        """Of the setting from which the search starts."""
        self.micro_batch = cfg.batch_size if isinstance(cfg.batch_size, int) else None
        self.evaluated: list[str] = []
        self.measured: dict[tuple, TrialResult] = {}
        """The speed of every setting that was met."""
        self.schedule: Schedule | None = None
        self.beside = Beside(places(cfg))
        self.run_trial = runner(cfg, one_kind=True)
        # Hydra 的拼装只有一份全局的状态
        self.composer, self.composing = Composer("train"), threading.Lock()

    # ---- 配置 ----

    def composed(self, more: Sequence[str]) -> TrainConfig:
        """The configuration with these overrides behind the typed ones, checked."""
        with self.composing, composing("train"):
            node, choices = self.composer.composed([*self.base, *more])
            cfg = OmegaConf.to_object(node)
        cfg.groups = choices
        at_home(cfg)
        check_values(cfg)
        return replace(cfg, search=replace(cfg.search, enabled=False), trial=replace(cfg.trial, enabled=True))

    def words(self, setting: dict[str, str], micro_batch: int | None = None) -> list[str]:
        """The overrides of a setting with this micro-batch; None: that of the search."""
        words = overrides_of(setting, self.cfg.model)
        return [*words, *batch_words(self.rows_of(setting), None if self.whole else micro_batch or self.micro_batch)]

    def rows_of(self, setting: dict[str, str]) -> int:
        """Rows per step of a setting."""
        return int(setting.get("global_batch_size") or self.rows)

    @property
    def rows(self) -> int:
        """Rows per step of the configuration itself."""
        cfg = self.cfg
        return cfg.global_batch_size or (cfg.batch_size if isinstance(cfg.batch_size, int) else 16) * (
            cfg.gradient_accumulation_steps
        )

    def refuse_impossible(self, space: Sequence[Dimension]) -> None:
        """ConfigError where none of some settings drawn from the space is a possible configuration."""
        # 合法的只是其中几种组合，也照搜；一种也没有的，不要等量完了快慢才知道
        random, own = Random(self.cfg.seed), default_of(space, self.cfg)
        for number in range(DRAWN):
            # 第一个试的，是不搜索时的那个
            drawn = {one.key: one.word(one.drawn(random)) for one in space}
            if number == 0:
                drawn |= {one.key: one.word(own[one.key]) for one in space if one.key in own}
            try:
                check(self.composed(self.words(drawn)))
                return
            except ConfigError as error:
                reason = str(error)
        raise ConfigError(
            "the search space contradicts itself: of {count} settings drawn from it none is possible; the last: "
            "{reason}",
            count=DRAWN, reason=reason,
        )

    # ---- 试跑 ----

    def trial(self, more: list[str], steps: Steps | None = None, rung: int = 0) -> TrialResult:
        """One child process with these overrides behind the typed ones; a mistake in them is a result.

        With `steps` it trains to the end of a rung, in the folder that the setting and seed have at every rung.
        """
        with self.composing:
            self.number += 1
            folder = self.folder / str(self.number)
        keys = steps.keys(rung) if steps else {}
        shown = [*self.base, *more, *(f"{key}={'null' if value is None else value}" for key, value in keys.items())]
        try:
            cfg = self.composed(more)
            run_dir = RUNS / earlier_results.key_of(replace(cfg, **steps.keys(len(steps.rungs) - 1))) if steps else None
            return self.run_trial(replace(cfg, **keys), shown, folder, run_dir=run_dir)
        except ConfigError as error:
            return result.made({"overrides": shown, "status": "invalid", "reason": str(error)})

    def speed(self, words: list[str]) -> TrialResult:
        """Whether a setting fits, and how long its steps are; not trained at all where the plan says no."""
        # 学习率与种子不影响快慢：写成一样的，量过的就认得
        alike = [word for word in words if not word.startswith("learning_rate=")]
        rows = next(int(word.split("=")[1]) for word in words if word.startswith("global_batch_size="))
        least, most = TIMED_STEPS
        steps = max(least, min(most, int(TIMED_S * 1000 / (self.row_ms * rows)))) if self.row_ms else least
        # 真的训练有多长，也不影响：换个预算再敲，不必从头量起、从头训起
        alike += ["max_iters=250", "max_tokens=null", "max_minutes=null", "warmup_iters=null", "lr_decay_iters=null"]
        return self.trial([*alike, "objective=tokens_per_s", "trial.warmup_steps=1", f"trial.steps={steps}"])

    @property
    def typed_pieces(self) -> bool:
        """Whether the micro-batch was typed: then no other one is tried."""
        return self._typed("batch_size") and self.cfg.batch_size != "auto"

    @property
    def whole(self) -> bool:
        """Whether a batch is one micro-batch, as it must be where gradients are used up in the backward pass."""
        return self.cfg.memory.optimizer_in_backward and not self.typed_pieces

    def fitting(self, setting: dict[str, str]) -> TrialResult:
        """speed() with half of the micro-batch, and half of that, until the setting fits; the batch stays as it is."""
        rows, wall_s = self.rows_of(setting), 0.0
        size = rows if self.whole else min(rows, self.micro_batch or rows)
        fixed = self.typed_pieces or self.whole
        while True:
            got = self.speed(self.words(setting, size))
            wall_s += got.wall_s or 0.0
            if got.status not in ("oom", "skipped") or size == 1 or fixed:
                return replace(got, wall_s=wall_s)
            size = math.ceil(size / 2)

    def prepared(self, space: list[Dimension]) -> tuple[Schedule, list[Dimension]]:
        """Measure the default setting and the fastest micro-batch; the division of the time, and what can be searched.

        Batches of which a rung would hold only a few steps leave the space, unless they were typed.
        """
        search = self.cfg.search
        show(wrapped(text("measuring how long the steps of the present setting take …"), sys.stdout))
        first = self.fitting({})
        # 设置有误的，原因里已经说了怎么改
        if first.status == "invalid":
            raise ConfigError(
                "the setting from which the search starts cannot be trained: {reason}", reason=first.reason,
            )
        if first.status != "ok":
            raise ConfigError(
                "the setting from which the search starts cannot be trained ({status}: {reason}); choose a smaller "
                "model or batch_size, or memory=lean",
                status=text(STATUS_MESSAGES[first.status]), reason=first.reason,
            )
        self.spent, self.row_ms = (first.wall_s or 0.0) / 60, first.step_ms / self.rows
        start = max(0.0, self.spent - 3 * first.step_ms / 60_000)
        rows_per_minute = first.tokens_per_s * 60 / self.cfg.model.block_size
        most = self._divided(start).rungs[0] * rows_per_minute / LEAST_STEPS
        typed = {line.partition("=")[0] for line in search.typed}
        space = [one if one.key in typed else fewer(one, max(most, self.rows)) for one in space]
        if first.micro_batch and first.micro_batch < min(self.rows, self.micro_batch or self.rows):
            self.micro_batch = first.micro_batch
        pieces = self.cfg.batch_size == "auto" or (search.minutes >= MINUTES_FOR_BATCH and not self.typed_pieces)
        if pieces and not self.whole:
            self._find_micro_batch(space)
        # 找微批用掉的时间也是搜索的时间：剩下的才分
        self.schedule = self._divided(start)
        # 重叠的窗口，每个 token 要读几遍
        again = (self.cfg.eval_stride or self.cfg.model.block_size) / self.cfg.model.block_size
        tokens = int(EVALUATING / EVALUATIONS * self.schedule.rungs[0] * 60 * first.tokens_per_s * FORWARD * again)
        tokens = max(LEAST_EVAL_TOKENS, tokens)
        self.evaluated = [f"eval_tokens={min(tokens, self.cfg.eval_tokens or tokens)}"]
        return self.schedule, space

    def _divided(self, start_minutes: float) -> Schedule:
        search = self.cfg.search
        return divide(
            search.minutes, start_minutes, trials=search.trials, eta=search.eta, rungs=search.rungs, top=search.top,
            seeds=search.seeds, jobs=search.jobs, spent=self.spent,
        )

    def _typed(self, key: str) -> bool:
        return any(word.startswith(f"{key}=") for word in self.base)

    def _find_micro_batch(self, space: Sequence[Dimension]) -> None:
        """Take the fastest micro-batch at the largest batch of the space."""
        rows = max([self.rows, *(int(w) for one in space if one.key == "global_batch_size" for w in one.choices)])

        def measure(size: int) -> TrialResult:
            got = self.speed(batch_words(rows, size))
            self.spent += (got.wall_s or 0.0) / 60
            return got

        best = fastest([size for size in batch_sizes(rows, whole=False) if size * 8 >= self.rows], measure,
                       self.cfg.trial.margin)
        if best:
            self.micro_batch = best.micro_batch
            show(text("micro-batch {batch}: the fastest that fits, of {rows} rows", batch=best.micro_batch, rows=rows))

    def run(self, setting: dict[str, str], rung: int, seed: int) -> TrialResult:
        """Train a setting to the end of a rung, from where the rung before ended."""
        asked = tuple(setting.items())
        measured = self.measured[asked] = self.measured.get(asked) or self.fitting(setting)
        if measured.status != "ok":
            return measured
        steps = steps_of(self.schedule, measured.step_ms)
        setting_words = self.words(setting, measured.micro_batch)
        words = [*setting_words, *self.evaluated, f"seed={self.cfg.seed + seed}"]
        got = self.trial(words, steps, rung)
        # 量快慢的时间记在第一级上
        beside = measured.wall_s or 0.0 if rung == 0 and seed == 0 else 0.0
        # 中断过的，记下的只是后来的一段：这一级训了多久，训练自己知道
        before = steps.rungs[rung - 1] if rung and not seed else 0
        trained_s = (got.minutes or 0.0) * 60 * (1 - before / steps.rungs[rung])
        # 配方里要有的：设置与学习率怎样走；训多久由人另说
        schedule = ("lr_schedule=wsd", f"decay_fraction={DECAY}")
        return replace(got, overrides=(*self.base, *setting_words, *schedule),
                       wall_s=max(got.wall_s or 0.0, trained_s) + beside)

    def forget(self, candidate: Candidate) -> None:
        """Delete the weights of a setting that goes no further: a search would fill the disk; its curve stays."""
        run_dir = candidate.results[-1].run_dir
        if run_dir:
            shutil.rmtree(Path(run_dir) / "ckpt", ignore_errors=True)


def batch_words(rows: int, micro_batch: int | None) -> list[str]:
    """The overrides of a batch of `rows` in pieces of at most `micro_batch`."""
    size = min(rows, micro_batch or rows)
    return [f"global_batch_size={rows}", f"batch_size={size}", "gradient_accumulation_steps=1"]


def steps_of(schedule: Schedule, step_ms: float) -> Steps:
    """The minutes of every rung in steps of this length; every rung has at least one more than the one before."""
    steps = [int(minutes * 60_000 / step_ms) for minutes in schedule.rungs]
    return Steps(tuple(max(count, number) for number, count in enumerate(steps, 1)))


def fewer(one: Dimension, most: float) -> Dimension:
    """The batch sizes of at most `most` rows; any other key as it is."""
    if one.key != "global_batch_size" or not one.choices:
        return one
    kept = tuple(word for word in one.choices if int(word) <= most)
    return replace(one, choices=kept or one.choices[:1])


