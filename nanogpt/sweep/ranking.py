"""The order of a sweep's results and what distinguishes them."""

from collections.abc import Sequence

from nanogpt.sweep.result import STATUSES, TrialResult

# 只改变微批的键：同一条曲线上的点
BATCH_KEYS = ("batch_size", "gradient_accumulation_steps")
# 只说明“这是试跑”的键
TRIAL_KEYS = ("experiment", "trial", "lang", "out_dir", "hydra")


def ranked(found: Sequence[TrialResult], margin: float) -> list[TrialResult]:
    """Fastest first; successes that leave no margin, spilled ones and failures behind them."""

    def order(result: TrialResult) -> tuple:
        return (not result.fits(margin), STATUSES.index(result.status), -(result.tokens_per_s or 0.0), result.predicted_gib or 0.0)

    return sorted(found, key=order)


def best_of(found: Sequence[TrialResult], margin: float) -> TrialResult | None:
    """The fastest success within the margin."""
    fitting = [result for result in found if result.fits(margin)]
    return max(fitting, key=lambda result: result.tokens_per_s or 0.0, default=None)


def key_of_override(override: str) -> str:
    """`+model.extra.x=1` -> `model.extra.x`."""
    return override.split("=", 1)[0].lstrip("+~").split("@")[0]


def names(found: Sequence[TrialResult]) -> list[str]:
    """For each result the overrides that not all of them share, as one string."""
    shared = set.intersection(*(set(result.overrides) for result in found)) if len(found) > 1 else set()

    def told(override: str) -> bool:
        return override not in shared and key_of_override(override).split(".")[0] not in TRIAL_KEYS

    return [" ".join(override for override in result.overrides if told(override)) for result in found]


def series_name(name: str) -> str:
    """A result's name without the keys that only change the micro-batch."""
    return " ".join(part for part in name.split(" ") if key_of_override(part) not in BATCH_KEYS)


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (memory, speed) that no other beats in both, by rising memory."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front
