"""A quick guess of peak and speed at any number of rows, from shallow traces; full traces decide, this only saves some.

Blocks are alike, so that every phase's peak is affine in the depth and in the rows, apart from rounding.
"""

from collections.abc import Callable
from dataclasses import replace

from nanogpt.config import TrainConfig
from nanogpt.fit.budget import Budget
from nanogpt.fit.roofline import Rates, step_seconds
from nanogpt.fit.trace import Shape, Trace, trace

DEPTHS = (1, 2)
ROWS = (1, 2)
# 碎片与取整的常见比例
RESERVED = 1.04


def bilinear(corner: Callable[[int, int], float], x: float, y: float) -> float:
    """The bilinear function through corner(i, j) at DEPTHS[i], ROWS[j], at depth x and y rows."""
    u = (x - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
    v = (y - ROWS[0]) / (ROWS[1] - ROWS[0])
    return (1 - u) * ((1 - v) * corner(0, 0) + v * corner(0, 1)) + u * ((1 - v) * corner(1, 0) + v * corner(1, 1))


class Estimate:
    """Traces of a config at two depths and two numbers of rows."""

    def __init__(self, cfg: TrainConfig, device_type: str):
        self.cfg = cfg
        # 自己的模型各层可以不同：照原来的层数追踪
        self.shallow = cfg.model._target_ == "nanogpt.model.GPT" and cfg.model.n_layer > 2 * DEPTHS[1]
        self.device_type = device_type
        self._corners: dict[tuple[int, int], Trace] = {}

    def corner(self, i: int, j: int) -> Trace:
        """The trace at DEPTHS[i] (or the full depth) and ROWS[j], made when first asked for."""
        key = (i if self.shallow else 0, j)
        if key not in self._corners:
            model = replace(self.cfg.model, n_layer=DEPTHS[key[0]]) if self.shallow else self.cfg.model
            rows, total = ROWS[j], self.cfg.global_batch_size
            accumulation = 1 if self.cfg.memory.optimizer_in_backward or total == 1 else 2
            self._corners[key] = trace(replace(self.cfg, model=model), Shape(rows, accumulation, self.cfg.eval_batch_size or rows, self.device_type))
        return self._corners[key]

    def live(self, rows: int) -> float:
        """Peak of the live bytes."""
        phases = self.corner(0, 0).events
        depth = self.cfg.model.n_layer
        return max(bilinear(lambda i, j, phase=phase: self.corner(i, j).peaks()[phase], depth, rows) for phase in phases)

    def fits(self, rows: int, budget: Budget, part: float) -> bool:
        """Whether `part` of the capacity probably suffices."""
        return self.live(rows) * (RESERVED if budget.device_type == "cuda" else 1) <= budget.capacity * part

    def step_s(self, rows: int, total: int, rates: Rates) -> float:
        """Probable seconds of a step over `total` rows in micro-batches of `rows`."""
        count = max(1.0, total / rows)
        return bilinear(lambda i, j: step_seconds(self.corner(i, j), rates, count * ROWS[j]), self.cfg.model.n_layer, rows)
