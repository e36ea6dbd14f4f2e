# 学习率怎么变：预热、平台、衰减；由迭代数（有时间预算的，还由用去的份额）决定，所以续训不必另存什么
"""Learning-rate schedules."""

import math

# 不知道会有多少步时，预热至多占预算的这一份
WARMUP_SHARE = 0.02


def learning_rate_at(iteration: int, schedule, spent: float = 0.0) -> float:
    """Learning rate of a 0-based iteration under a base.config.Schedule; spent: the share of the budget used up so far.

    Where the schedule names no iteration for its end, the share takes the place of the iteration, and the warm-up,
    which counts iterations but is over after 2% of the budget, is a factor on top.
    """
    s = schedule
    # wsd：平台期之后只在最后一段下降，中途的 checkpoint 可以接着训
    plateau = s.lr_schedule not in ("cosine", "linear")
    if s.lr_decay_iters is None:
        warm = max((iteration + 1) / s.warmup_iters, spent / WARMUP_SHARE) if s.warmup_iters else 1.0
        return min(1.0, warm) * _decayed(s, spent, 1 - s.decay_fraction if plateau else 0.0, 1.0)
    if iteration < s.warmup_iters:
        # 从 1 而不是 0 起步，第一步不白跑；nanoGPT 除以 warmup_iters + 1，改成那样，旧的训练接着跑就不再逐位一致
        return s.learning_rate * (iteration + 1) / s.warmup_iters
    start, end = s.warmup_iters, s.lr_decay_iters
    return _decayed(s, iteration, max(start, round(end * (1 - s.decay_fraction))) if plateau else start, end)


def _decayed(s, at: float, start: float, end: float) -> float:
    """The rate at a place behind the warm-up; the decay goes from `start` to `end`."""
    if s.lr_schedule == "constant":
        return s.learning_rate
    if at >= end:
        return s.min_lr
    if at < start:
        return s.learning_rate
    progress = (at - start) / (end - start)
    weight = 0.5 * (1 + math.cos(math.pi * progress)) if s.lr_schedule == "cosine" else 1 - progress
    return s.min_lr + weight * (s.learning_rate - s.min_lr)
