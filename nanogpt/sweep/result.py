"""The plain result of one trial: what a sweep collects, keeps on disk and ranks.

Neither torch nor NaN occurs in it.
"""

# 一次试跑的结果是一张平的表：父子进程之间、磁盘上、报告里都是它；怎样排名次也在这里
# made 从任意的值造出它（子进程写的不可全信），read 与 write 管磁盘，collect 收齐一次扫描，ranked 与 best_of 排名次
# 不含 torch，也不含 NaN：NaN 会让 JSON 不合规，也会让 Optuna 崩溃

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from nanogpt.base.config import TrainConfig, choices_of
from nanogpt.base.files import write_text
from nanogpt.base.language import sentence
from nanogpt.base.quoting import key_of_override

# 状态 -> 屏幕上的词；ok 测到了，spilled 测到了但显存溢到内存，其余没有测到速度
STATUS_MESSAGES = {
    "ok": sentence("ok"), "spilled": sentence("spilled"), "oom": sentence("out of memory"),
    "skipped": sentence("skipped"), "diverged": sentence("diverged"), "timeout": sentence("timeout"),
    "crashed": sentence("crashed"), "invalid": sentence("invalid"), "pruned": "state_pruned",
}
STATUSES = tuple(STATUS_MESSAGES)
# 扫描里意料之中的结果；其余说明有东西坏了，退出码要说出来
EXPECTED = ("ok", "spilled", "oom", "skipped", "diverged", "invalid", "pruned")
# 值得记住、下次不再测的；崩溃可能已被修好，invalid 重查不花时间
LASTING = ("ok", "spilled", "oom", "skipped", "diverged", "timeout")
# 试跑与搜索的目录；不论哪次扫描，最近的最佳设置总在这里
FIT = Path("outputs") / "fit"
# 少于这么多步的损失说明不了什么，不报告
STEPS_FOR_LOSS = 100
# 没有测到的排在最后，又是有限数：NaN 与无穷会让扫描器崩溃
WORST_LOSS = 1e9


@dataclass(frozen=True)
class TrialResult:
    """One setting, how it ended and what was measured; None where nothing was."""

    # 字段名就是 trials.jsonl 里的名字：加字段可以，改名会让以前的结果读不回来

    overrides: tuple[str, ...]
    """As typed for this job of the sweep."""
    status: str
    """One of STATUSES."""
    reason: str = ""
    """Why it is not ok; one line."""
    key: str = ""
    """Hash of everything that the result depends on; see nanogpt.sweep.earlier_results."""
    known: bool = False
    """Taken from an earlier sweep."""
    tokens_per_s: float | None = None
    step_ms: float | None = None
    """Median of the timed optimizer steps."""
    peak_gib: float | None = None
    """Most allocated at once (CUDA), or largest resident size of the process (CPU)."""
    reserved_gib: float | None = None
    """Most that the CUDA allocator held; None on a CPU."""
    budget_gib: float | None = None
    free_gib: float | None = None
    """Free on the device before the run."""
    predicted_gib: float | None = None
    predicted_tokens_per_s: float | None = None
    train_loss: float | None = None
    val_loss: float | None = None
    """Both only after STEPS_FOR_LOSS steps; with a loss as objective, the best evaluation of the training."""
    val_bpb: float | None = None
    """The same in bits per byte of text."""
    validation: float | None = None
    """The objective on the validation split, where holdout kept it out of sight: one look, when the training ended."""
    objective: str = "tokens_per_s"
    """What the trial was run for; see the key objective."""
    iters: int | None = None
    tokens: int | None = None
    """Trained on."""
    minutes: float | None = None
    """In training steps, evaluation and saving not included."""
    curve: tuple[tuple[float, ...], ...] = ()
    """(tokens, minutes, val_loss) of every evaluation."""
    run_dir: str | None = None
    """Of the trial's own training."""
    micro_batch: int | None = None
    effective_batch: int | None = None
    """Rows per optimizer step."""
    precision: str | None = None
    device: str | None = None
    wall_s: float | None = None
    experiment: str | None = None
    """Recipe under the overrides, other than fit itself."""

    @property
    def held_gib(self) -> float | None:
        """What the device had to hold: reserved on CUDA, resident on a CPU."""
        return self.peak_gib if self.reserved_gib is None else self.reserved_gib

    @property
    def value(self) -> float | None:
        """What was measured of the objective."""
        return getattr(self, self.objective)

    @property
    def score(self) -> float:
        """The objective for Hydra's sweepers; a failure is the worst, and finite: NaN would crash them."""
        measured = self.value if self.status == "ok" else None
        if self.objective == "tokens_per_s":
            return measured or 0.0
        return WORST_LOSS if measured is None else measured

    @property
    def place(self) -> float:
        """The smaller, the better."""
        return -self.score if self.objective == "tokens_per_s" else self.score

    def fits(self, margin: float) -> bool:
        """True for a success that leaves `margin` of the budget free."""
        if self.status != "ok":
            return False
        return self.budget_gib is None or self.held_gib is None or self.held_gib <= self.budget_gib * (1 - margin)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False)


def _number(value: Any, kind: type) -> float | int | None:
    # 子进程写出的东西不可全信：不是有限数就当没有
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return kind(value)


def _points(value: Any) -> tuple[tuple[float, ...], ...]:
    try:
        points = [tuple(_number(number, float) for number in point) for point in value]
    except TypeError:
        return ()
    return tuple(point for point in points if None not in point)


def made(values: dict[str, Any]) -> TrialResult:
    """A TrialResult of loose values: unknown names are dropped, and what is no finite number becomes None."""
    clean: dict[str, Any] = {}
    for field in fields(TrialResult):
        if field.name not in values:
            continue
        value, kind = values[field.name], str(field.type)
        if field.name == "overrides":
            value = tuple(str(item) for item in value)
        elif field.name == "curve":
            value = _points(value)
        elif "float" in kind or "int" in kind:
            value = _number(value, float if "float" in kind else int)
        elif field.type is bool:
            value = bool(value)
        elif value is not None or field.type is str:
            value = " ".join(str(value or "").split())[:400]
        clean[field.name] = value
    if clean.get("objective", "tokens_per_s") not in choices_of(TrainConfig, "objective"):
        del clean["objective"]
    if clean.get("status") not in STATUSES:
        clean.update(status="crashed", reason=clean.get("reason") or f"status {clean.get('status')!r}")
    return TrialResult(**clean)


def write(result: TrialResult, path: Path) -> None:
    """Save a result atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, result.to_json() + "\n")


def read(path: Path) -> TrialResult | None:
    """A saved result, or None where there is none that can be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return made(values) if {"overrides", "status"} <= set(values) else None
    except (OSError, ValueError, TypeError):
        # 断电留下的半个文件：当作没测过
        return None


def collect(folder: Path) -> list[TrialResult]:
    """The results of all jobs below a sweep's folder, in the order of the jobs; the same setting counts once."""

    def number(path: Path) -> tuple[int, str]:
        name = path.parent.name
        return (int(name) if name.isdigit() else 10**9, name)

    found: dict[str, TrialResult] = {}
    for path in sorted(folder.glob("*/trial.json"), key=number):
        result = read(path)
        if result:
            found.setdefault(result.key or " ".join(result.overrides), result)
    return list(found.values())


# ---- 名次 ----


# 只改变微批的键：同一条曲线上的点
BATCH_KEYS = ("batch_size", "gradient_accumulation_steps")
# 只说明“这是试跑”的键
TRIAL_KEYS = ("experiment", "trial", "lang", "out_dir", "hydra", "launch")


def ranked(found: Sequence[TrialResult], margin: float) -> list[TrialResult]:
    """Best first; successes that leave no margin, spilled ones and failures behind them."""

    def order(result: TrialResult) -> tuple:
        # 没有测到的按预测的显存排：离放得下最近的在前；被淘汰的、溢出的也有数，照数排
        found = replace(result, status="ok").place
        return (not result.fits(margin), STATUSES.index(result.status), found, result.predicted_gib or 0.0)

    return sorted(found, key=order)


def best_of(found: Sequence[TrialResult], margin: float) -> TrialResult | None:
    """The best success within the margin."""
    fitting = [result for result in found if result.fits(margin)]
    return min(fitting, key=lambda result: result.place, default=None)


def names(found: Sequence[TrialResult]) -> list[str]:
    """For each result the overrides that not all of them share, as one string."""
    shared = set.intersection(*(set(result.overrides) for result in found)) if len(found) > 1 else set()

    def told(override: str) -> bool:
        return override not in shared and key_of_override(override).split(".")[0] not in TRIAL_KEYS

    return [", ".join(override for override in result.overrides if told(override)) for result in found]


def series_name(name: str) -> str:
    """A result's name without the keys that only change the micro-batch."""
    return ", ".join(part for part in name.split(", ") if key_of_override(part) not in BATCH_KEYS)


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (memory, speed) that no other beats in both, by rising memory."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front
