"""Recognise a trial that only fitted because the driver paged video memory out to RAM (Windows, WSL)."""

# 认出“假的成功”：Windows 与 WSL 的驱动在显存不够时不报错，而是把显存换到内存里，跑得慢几倍
# 判断只看数：占的比空闲的还多，或者显存快满而速度远低于预测、远低于更小的微批
# trial 对单个结果用 judge，扫描结束时 jobs 用 judge_all 再比一遍各档微批；溢出的不参加最佳设置的评选

from collections.abc import Sequence
from dataclasses import replace

from nanogpt.base.language import text
from nanogpt.sweep.result import BATCH_KEYS, TrialResult

# 显存用到预算的这么多以上，溢出才有可能
NEARLY_FULL = 0.85
# 低于屋顶线（roofline）的这一份：再差的内核也不至于
SLOW_AGAINST_PREDICTION = 0.25
# 微批变大只应更快；掉到小微批的一半以下，不是计算的缘故
SLOW_AGAINST_SMALLER = 0.5


def spill_reason(result: TrialResult, smaller: float | None = None) -> str | None:
    """Why this measurement must have spilled into RAM, or None.

    The rule, with peak = the larger of held (reserved by the allocator) and predicted:
    1. held is above what was free on the card before the run: it cannot all have been in VRAM; or
    2. peak is above 85% of the budget, and the speed is below 1/4 of the predicted one or below 1/2 of `smaller`,
       that of the fastest of the smaller micro-batches with otherwise equal settings.
    """
    held, speed, predicted = result.held_gib, result.tokens_per_s, result.predicted_tokens_per_s
    if held is not None and result.free_gib is not None and held > result.free_gib:
        return text(
            "held {held:.1f} GiB, but only {free:.1f} were free before the run: the driver paged VRAM to RAM",
            held=held, free=result.free_gib,
        )
    peak = max((value for value in (held, result.predicted_gib) if value is not None), default=None)
    if speed is None or peak is None or result.budget_gib is None or peak <= NEARLY_FULL * result.budget_gib:
        return None
    if predicted and speed < SLOW_AGAINST_PREDICTION * predicted:
        return text(
            "{speed:,.0f} tokens/s with nearly all VRAM in use, {predicted:,.0f} were predicted: the driver paged "
            "VRAM to RAM",
            speed=speed, predicted=predicted,
        )
    if smaller and speed < SLOW_AGAINST_SMALLER * smaller:
        return text(
            "{speed:,.0f} tokens/s with nearly all VRAM in use, a smaller micro-batch made {smaller:,.0f}: the driver "
            "paged VRAM to RAM",
            speed=speed, smaller=smaller,
        )
    return None


def judge(result: TrialResult, others: Sequence[TrialResult] = ()) -> TrialResult:
    """The result, marked as spilled when it must have spilled; a CPU has no VRAM to page out."""
    if result.status != "ok" or result.reserved_gib is None:
        return result
    reason = spill_reason(result, max((o.tokens_per_s for o in others if _smaller(o, result)), default=None))
    return replace(result, status="spilled", reason=reason) if reason else result


def judge_all(results: Sequence[TrialResult]) -> list[TrialResult]:
    """All results of a sweep, each also compared with its smaller micro-batches."""
    return [judge(result, results) for result in results]


def _smaller(other: TrialResult, result: TrialResult) -> bool:
    """True for an unspilled success with a smaller micro-batch and otherwise the same overrides."""

    def rest(one: TrialResult) -> set[str]:
        return {o for o in one.overrides if o.split("=")[0] not in BATCH_KEYS}

    if other.micro_batch is None or result.micro_batch is None or other.micro_batch >= result.micro_batch:
        return False
    return other.status == "ok" and bool(other.tokens_per_s) and rest(other) == rest(result)
