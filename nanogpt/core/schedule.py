# 学习率随迭代怎么变：预热、平台、衰减；只由迭代数决定，所以续训不必存任何东西
"""Learning-rate schedules."""

import math


def learning_rate_at(iteration: int, schedule) -> float:
    """Learning rate of a 0-based iteration under a base.config.Schedule."""
    s = schedule
    if iteration < s.warmup_iters:
        # 从 1 而不是 0 起步，第一步不白跑；nanoGPT 除以 warmup_iters + 1，改成那样，旧的训练接着跑就不再逐位一致
        return s.learning_rate * (iteration + 1) / s.warmup_iters
    if s.lr_schedule == "constant":
        return s.learning_rate
    end = s.lr_decay_iters
    # wsd：平台期之后只在最后一段下降，中途的 checkpoint 可以接着训
    start = s.warmup_iters
    if s.lr_schedule not in ("cosine", "linear"):
        start = max(start, round(end * (1 - s.decay_fraction)))
    if iteration >= end:
        return s.min_lr
    if iteration < start:
        return s.learning_rate
    progress = (iteration - start) / max(1, end - start)
    weight = 0.5 * (1 + math.cos(math.pi * progress)) if s.lr_schedule == "cosine" else 1 - progress
    return s.min_lr + weight * (s.learning_rate - s.min_lr)
