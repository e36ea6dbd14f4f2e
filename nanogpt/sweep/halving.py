"""Successive halving: many settings for a short time, the best of them for longer, the very best with several seeds."""

# 搜索的循环：Optuna 的 TPE 提设置，逐级减半来淘汰；不知道一次试跑怎么做，由 search 把 run 递进来
# 学习率随预算衰减的两次短训练没法比，也没法接着走：衰减过的权重再走下去，就不是那个更长预算的训练了
# 所以各级都停在 wsd 的平台上：预热相同、学习率相同，同样的时间比同样的位置，晋级的从自己的 checkpoint 接着走，
# 只有走到最后一级的才在末尾衰减，它的损失才是这个预算的损失
# 平台上的名次不完全是衰减之后的名次：高学习率在平台上吃亏，所以第一级之后还留 1/eta，而不只留第一名
# 循环只由种子与各次的结果决定，结果都记着：中断之后同样的命令重放一遍，测过的立刻有答案，从断处接着走

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from typing import Any

from nanogpt.base.language import ConfigError, text
from nanogpt.sweep.beside import Beside
from nanogpt.sweep.result import TrialResult
from nanogpt.sweep.space import Dimension

# 第一级至少训这么久，否则比的只是预热
LEAST_MINUTES = 0.3
# 评估与保存在训练之外的时间，按训练的几成算
BESIDE = 1.25
# 少于这么多个设置，看不出哪个键要紧
LEAST_SETTINGS = 8
# 这一代里放不下、崩溃、重复的不算数，另提一个；至多提这么多倍
MOST_ASKED = 3


@dataclass(frozen=True)
class Schedule:
    """How a search divides its time."""

    # 时间更多时，各次训得更久，而不是试得更多：短训练的名次偏爱学得快的，训得越久越接近真正的训练

    rungs: tuple[float, ...]
    """Minutes of training at the end of each rung."""
    generations: int
    eta: int
    top: int
    """So many settings are trained with all seeds at the end."""
    seeds: int
    start_minutes: float
    """That a trial takes besides training: its process, the data, the compiler."""
    jobs: int = 1
    """Trials beside each other."""

    @property
    def size(self) -> int:
        """Settings of a generation."""
        return self.eta ** (len(self.rungs) - 1)

    @property
    def generation_minutes(self) -> float:
        """Of one generation; survivors go on, so that only the difference to the rung before counts."""
        total, before = 0.0, 0.0
        for rung, minutes in enumerate(self.rungs):
            count = math.ceil(self.size // self.eta**rung / self.jobs)
            # 第一级之前，每个设置还要量一次快慢
            total += count * ((minutes - before) * BESIDE + self.start_minutes * (2 if rung == 0 else 1))
            before = minutes
        return total

    @property
    def final_minutes(self) -> float:
        """Of the other seeds of the best settings."""
        count = math.ceil(self.top * (self.seeds - 1) / self.jobs)
        return count * (self.rungs[-1] * BESIDE + self.start_minutes)

    @property
    def waves(self) -> int:
        """How many generations follow each other; those of a single setting run beside each other."""
        return math.ceil(self.generations / self.jobs) if self.size == 1 else self.generations

    def settings(self, wave: int) -> int:
        """How many settings a wave begins with, the first being wave 0."""
        return self.size if self.size > 1 else min(self.jobs, self.generations - wave * self.jobs)

    @property
    def minutes(self) -> float:
        return self.waves * self.generation_minutes + self.final_minutes


def divide(
    minutes: float, start_minutes: float, *, trials: int, eta: int, rungs: int, top: int, seeds: int, jobs: int = 1,
    spent: float = 0.0,
) -> Schedule:
    """The division of `minutes`, `spent` of which are gone: as many settings as `trials` allows, each long enough.

    With less time there are fewer settings, then fewer rungs, then fewer seeds; ConfigError where no two settings can
    be compared.
    """
    left, least = minutes - spent, min(2, trials)
    for count_rungs in range(rungs, 0, -1):
        size = eta ** (count_rungs - 1)
        for generations in range(max(1, trials // size), math.ceil(least / size) - 1, -1):
            for count_seeds, count_top in ((seeds, min(top, generations)), (min(seeds, 2), 1), (1, 1)):
                shares = tuple(1 / eta ** (count_rungs - 1 - rung) for rung in range(count_rungs))
                one = Schedule(shares, generations, eta, count_top, count_seeds, start_minutes, jobs)
                none = replace(one, rungs=(0.0,) * count_rungs)
                # 总时间是最后一级长度的一次函数
                longest = (left - none.minutes) / (one.minutes - none.minutes)
                # 时间少时先比几个设置，再问种子
                worth = generations == 1 or count_seeds == seeds or count_rungs == 1
                if longest * shares[0] >= LEAST_MINUTES and size * generations <= trials and worth:
                    return replace(one, rungs=tuple(share * longest for share in shares))
    shortest = Schedule((LEAST_MINUTES,), least, eta, 1, 1, start_minutes, jobs)
    raise ConfigError(
        "search.minutes={got:g} is too short to compare settings: a trial takes {each:.1f} min here; give at least "
        "{least:.0f}",
        got=minutes, each=shortest.generation_minutes, least=math.ceil(1.2 * (spent + shortest.minutes)),
    )


@dataclass
class Candidate:
    """One setting and what became of it."""

    # 名次表的一行：走到第几级、为什么停下，都在这里

    number: int
    setting: dict[str, str]
    """Key of the space -> its value, as typed."""
    results: list[TrialResult] = field(default_factory=list)
    """Of each rung that it reached."""
    others: list[TrialResult] = field(default_factory=list)
    """Of the other seeds at the last rung."""
    tried: list[TrialResult] = field(default_factory=list)
    """Every piece of training, failures too."""
    status: str = "ok"
    reason: str = ""

    @property
    def rung(self) -> int:
        """The last rung that it finished, from 0; -1 for none."""
        return len(self.results) - 1

    @property
    def values(self) -> list[float]:
        """At the last rung that it finished, one for each seed."""
        finished = [*self.results[-1:], *self.others]
        return [one.value for one in finished if one.status == "ok" and one.value is not None]

    @property
    def mean(self) -> float:
        return fmean(self.values) if self.values else math.inf

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None for one seed."""
        return stdev(self.values) if len(self.values) > 1 else None


Run = Callable[[dict[str, str], int, int], TrialResult]
Say = Callable[[Candidate, TrialResult, int, float], None]


class Search:
    """The loop; deterministic in its seed and in what `run` returns."""

    # 一个对象只为少传几个参数：study、已用的时间与各个设置

    def __init__(
        self, space: Sequence[Dimension], schedule: Schedule, run: Run, *, minutes: float, seed: int, say: Say,
        first: dict[str, Any] | None = None, prune: Callable[[Candidate], None] = lambda candidate: None,
        spent: float = 0.0, beside: Beside | None = None,
    ):
        """`run(setting, rung, seed)` trains to the end of a rung; `first` is the setting that is tried first.

        `prune` is told of settings that go no further; `spent` minutes are used already; `beside` runs several.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.states = optuna.trial.TrialState
        # 默认的前十次随机太多：一代九个随机的之后就用 TPE
        self.beside = beside or Beside([""])
        # 并排提出的几个还没有结果：当作不好的，才不会提到一处去
        liar = {"constant_liar": True} if self.beside.count > 1 else {}
        first_few = min(10, schedule.size)
        # numpy 的种子只有 32 位
        sampler = optuna.samplers.TPESampler(seed=seed % 2**32, multivariate=True, n_startup_trials=first_few, **liar)
        self.study = optuna.create_study(direction="minimize", sampler=sampler)
        if first:
            # 先试配置里本来的设置：搜出来的至少不比它差，报告也有得比
            self.study.enqueue_trial(first)
        self.starts_as_typed = bool(first) and len(first) == len(space)
        """Whether the first setting is the one without a search."""
        self.space = {one.key: one for one in space}
        self.distributions = {key: one.distribution() for key, one in self.space.items()}
        self.schedule, self.run_one, self.minutes, self.say, self.prune = schedule, run, minutes, say, prune
        self.spent, self.candidates = spent, list[Candidate]()
        self.best: list[Candidate] = []

    def run(self) -> list[Candidate]:
        """Search until the time or the number of settings is used up; every setting that was tried."""
        schedule = self.schedule
        for wave in range(schedule.waves):
            left = self.minutes - self.spent
            # 第一代总要走：否则什么也没有
            if wave and left < schedule.generation_minutes + schedule.final_minutes:
                break
            self._generation(schedule.settings(wave))
        finished = [one for one in self.candidates if one.status == "ok" and one.values]
        furthest = max((one.rung for one in finished), default=-1)
        ranked = sorted((one for one in finished if one.rung == furthest), key=lambda one: one.mean)
        self.best, others = ranked[: schedule.top], ranked[schedule.top :]
        if furthest == len(schedule.rungs) - 1:
            self._seeds(self.best)
            # 个个换了种子就发散：下一名也许不会
            while others and all(one.status != "ok" for one in self.best):
                self.best.append(others.pop(0))
                self._seeds(self.best[-1:])
        # 换个种子就发散的，均值再好也排在后面
        self.best.sort(key=lambda one: (one.status != "ok", one.mean))
        return self.candidates

    def _step(self, candidates: Sequence[Candidate], rung: int, seeds: Sequence[int] = ()) -> list[TrialResult | None]:
        """One more piece of training of each, beside each other; None when the time is over."""
        # 至少有一个走完第一级，时间再短也有个结果
        if self.spent >= self.minutes and self.candidates:
            return [None] * len(candidates)
        pieces = list(zip(candidates, seeds or [0] * len(candidates), strict=True))
        results = self.beside.all(lambda piece: self.run_one(piece[0].setting, rung, piece[1]), pieces)
        # 时间按结果里记着的算：重放时与当时做同样的决定
        self.spent += max(result.wall_s or 0.0 for result in results) / 60
        for (candidate, seed), result in zip(pieces, results, strict=True):
            candidate.tried.append(result)
            self.say(candidate, result, seed, self.spent)
            if seed:
                candidate.others.append(result)
                if result.status != "ok":
                    candidate.status = result.status
                    candidate.reason = text("with another of its seeds: {reason}", reason=result.reason)
        return results

    def _asked(self, count: int, most: int) -> tuple[list, int]:
        """(at most `count` new settings with Optuna's trials of them, how often it was asked: at most `most` times)."""
        new, asked = [], 0
        while len(new) < count and asked < most:
            asked += 1
            trial = self.study.ask(self.distributions)
            setting = {key: one.word(trial.params[key]) for key, one in self.space.items()}
            if not self._tried(setting, trial, [*self.candidates, *(candidate for candidate, _ in new)]):
                new.append((Candidate(len(self.candidates) + len(new), setting), trial))
        return new, asked

    def _generation(self, size: int) -> None:
        alive, left = [], MOST_ASKED * size
        while len(alive) < size:
            new, asked = self._asked(min(self.beside.count, size - len(alive)), left)
            left -= asked
            if not new:
                break
            results = self._step([candidate for candidate, _ in new], 0)
            for (candidate, trial), result in zip(new, results, strict=True):
                if result is None:
                    self.study.tell(trial, state=self.states.FAIL)
                    left = 0
                    continue
                self.candidates.append(candidate)
                if self._ended(candidate, result):
                    # 没有中间值的 PRUNED 在 TPE 眼里最差：发散的、放不下的附近少去；FAIL 则什么也学不到
                    self.study.tell(trial, state=self.states.PRUNED)
                    continue
                trial.report(result.place, 0)
                alive.append((candidate, trial))
        for rung in range(1, len(self.schedule.rungs)):
            alive = self._promote(alive, rung)
        for candidate, trial in alive:
            self.study.tell(trial, candidate.results[-1].place)

    def _tried(self, setting: dict[str, str], trial, known: Sequence[Candidate]) -> bool:
        """Whether this setting was tried before; the study hears again what came out."""
        # 空间小时常会重提：两个候选不能共用一个训练目录，其中一个被淘汰，另一个的权重也就没了
        same = next((one for one in known if one.setting == setting), None)
        if same is None:
            return False
        if same.results:
            trial.report(same.results[0].place, 0)
        self.study.tell(trial, state=self.states.PRUNED)
        return True

    def _promote(self, alive: list, rung: int) -> list:
        """Train the best 1/eta to the end of the next rung, the next best for one that fails; prune the others."""
        alive = sorted(alive, key=lambda pair: pair[0].results[-1].place)
        count, waiting = max(1, len(alive) // self.schedule.eta), list(alive)
        survivors, late = [], 0
        while waiting and (missing := count - len(survivors) - late) > 0:
            some = [waiting.pop(0) for _ in range(min(self.beside.count, missing, len(waiting)))]
            results = self._step([candidate for candidate, _ in some], rung)
            for (candidate, trial), result in zip(some, results, strict=True):
                if result is None:
                    # 没有时间了：到这里为止，仍参加排名
                    self.study.tell(trial, candidate.results[-1].place)
                    late += 1
                elif self._ended(candidate, result):
                    self.study.tell(trial, state=self.states.PRUNED)
                else:
                    trial.report(result.place, rung)
                    survivors.append((candidate, trial))
        # 到这时才删：晋级的失败了，还要它们来补
        for place, (candidate, trial) in enumerate(waiting, len(alive) - len(waiting) + 1):
            self._drop(candidate, trial, text(
                "{objective} {value:.4f} after {minutes:.1f} min: place {place} of {all}, the best {count} went on",
                objective=candidate.results[-1].objective, value=candidate.results[-1].value,
                minutes=self.schedule.rungs[rung - 1], place=place, all=len(alive), count=len(alive) - len(waiting),
            ))
        return survivors

    def _batches(self, pieces: Sequence) -> Iterator[Sequence]:
        """As many at a time as run beside each other."""
        for begin in range(0, len(pieces), self.beside.count):
            yield pieces[begin : begin + self.beside.count]

    def _drop(self, candidate: Candidate, trial, reason: str) -> None:
        candidate.status, candidate.reason = "pruned", reason
        self.study.tell(trial, state=self.states.PRUNED)
        self.prune(candidate)

    def _ended(self, candidate: Candidate, result: TrialResult) -> bool:
        """Keep a result; whether it is the end of this setting."""
        if result.status == "ok" and result.value is not None:
            candidate.results.append(result)
            return False
        candidate.status, candidate.reason = result.status, result.reason
        return True

    def _seeds(self, best: Sequence[Candidate]) -> None:
        """Train settings with the other seeds; one setting after the other, so that each has as many."""
        pieces = [(candidate, seed) for seed in range(1, self.schedule.seeds) for candidate in best]
        for some in self._batches(pieces):
            if self.spent + self.schedule.rungs[-1] > self.minutes:
                return
            candidates, seeds = zip(*some, strict=True)
            self._step(candidates, len(self.schedule.rungs) - 1, seeds)


def importance(candidates: Sequence[Candidate], space: Sequence[Dimension]) -> dict[str, float]:
    """How much each key mattered, from 0 to 1 in all, by functional ANOVA (Hutter et al., 2014) over the first rung.

    All settings are compared there after the same time; empty where too few were tried.
    """
    # 九个、二十几个设置：PED-ANOVA 只看最好的几个，会把功劳全给一个键；随机森林的 fANOVA 用上全部
    import optuna

    distributions = {one.key: one.distribution() for one in space}
    study = optuna.create_study(direction="minimize")
    for candidate in candidates:
        if candidate.results:
            # 四位数字的词，会比写得更细的边界略大或略小
            params = {
                key: word if one.choices else min(max((int if one.whole else float)(word), one.low), one.high)
                for (key, word), one in zip(candidate.setting.items(), space)
            }
            value = candidate.results[0].value
            study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=value))
    if len(study.trials) < LEAST_SETTINGS:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    try:
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    except (RuntimeError, ValueError):
        # 个个一样，分不出功劳：报告不能因此写不成
        return {}
    return {key: float(share) for key, share in shares.items()}
