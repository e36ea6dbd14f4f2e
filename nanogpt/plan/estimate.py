"""A quick guess of the peak at any number of rows, from shallow traces; full traces decide, this only saves some.

Blocks are alike, so that every phase's peak is affine in the depth and, on either side of the number of rows whose logits fill one
chunk of the loss, in the rows, apart from rounding.
"""

from collections.abc import Callable
from dataclasses import replace

from nanogpt.base.config import TrainConfig
from nanogpt.core.memory_budget import Budget
from nanogpt.plan.trace import Shape, Trace, trace

DEPTHS = (1, 2)
# 碎片与取整的常见比例
RESERVED = 1.04


def bilinear(corner: Callable[[int, int], float], x: float, y: float, rows: tuple[int, int]) -> float:
    """The bilinear function through corner(i, j) at DEPTHS[i], rows[j], at depth x and y rows."""
    u = (x - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
    v = (y - rows[0]) / (rows[1] - rows[0])
    return (1 - u) * ((1 - v) * corner(0, 0) + v * corner(0, 1)) + u * ((1 - v) * corner(1, 0) + v * corner(1, 1))


class Estimate:
    """Traces of a config at two depths and two numbers of rows."""

    def __init__(self, cfg: TrainConfig, device_type: str):
        self.cfg = cfg
        # 自己的模型各层可以不同：照原来的层数追踪
        self.shallow = cfg.model._target_ == "nanogpt.core.model.GPT" and cfg.model.n_layer > 2 * DEPTHS[1]
        self.device_type = device_type
        self._corners: dict[tuple[int, int], Trace] = {}
        # 到这么多条，输出层的一块 logits 正好装满；再多就分块，临时张量不再增长
        tokens = cfg.memory.loss_chunk_mib * 2**20 // (4 * cfg.model.vocab_size)
        self.full_chunk = max(1, -(-tokens // cfg.model.block_size))

    def rows(self, wanted: int) -> tuple[int, int]:
        """The two numbers of rows whose traces say something about `wanted` rows."""
        # 峰值是几条直线的最大值，隔得太远会换一条：取离得近的两点
        near = 1 if wanted <= 8 else 8 if wanted <= 64 else 64
        first = max(near, self.full_chunk) if wanted > self.full_chunk else min(near, self.full_chunk)
        return first, 2 * first

    def corner(self, i: int, rows: int) -> Trace:
        """The trace at DEPTHS[i] (or the full depth) and `rows` rows, made when first asked for."""
        key = (i if self.shallow else 0, rows)
        if key not in self._corners:
            model = replace(self.cfg.model, n_layer=DEPTHS[key[0]]) if self.shallow else self.cfg.model
            total = self.cfg.global_batch_size
            accumulation = 1 if self.cfg.memory.optimizer_in_backward or total == 1 else 2
            self._corners[key] = trace(replace(self.cfg, model=model), Shape(rows, accumulation, self.cfg.eval_batch_size or rows, self.device_type))
        return self._corners[key]

    def live(self, rows: int) -> float:
        """Peak of the live bytes."""
        at, depth = self.rows(rows), self.cfg.model.n_layer
        phases = self.corner(0, at[0]).events
        return max(bilinear(lambda i, j, phase=phase: self.corner(i, at[j]).peaks()[phase], depth, rows, at) for phase in phases)

    def fits(self, rows: int, budget: Budget, part: float) -> bool:
        """Whether `part` of the capacity probably suffices."""
        return self.live(rows) * (RESERVED if budget.device_type == "cuda" else 1) <= budget.capacity * part
