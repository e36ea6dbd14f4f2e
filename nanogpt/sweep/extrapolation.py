"""An estimate of the loss after more training, by a power law through the evaluations of trials."""

# 由短训练的曲线估计训得更久会到多少：loss = floor + scale × tokens^-power（Kaplan et al., arXiv:2001.08361）
# 只用平台上的评估：衰减那一段另有一次性的好处，把它当作同样大的一截加回去
# 指数逐个试，每个指数下另两个数是线性最小二乘；区间是所有拟合得差不多好的指数给出的范围，再加上种子之间的差
# 曲线若先降后升（背下了这点文字），幂律就不成立：那时只会估得太好，报告里说明

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

POWERS = np.linspace(0.05, 1.5, 59)
# 曲线至少有这么多点才拟合三个数
LEAST_POINTS = 5
# 平方误差在最小值的这么多倍之内都算拟合得差不多：点少，放宽一些
ALIKE = 2.0


@dataclass(frozen=True)
class Estimate:
    """The loss that is expected after `tokens`, and the range in which it should lie."""

    # 与后来真的训出来的相比时，只看落没落在区间里

    tokens: float
    value: float
    low: float
    high: float

    def moved(self, by: float) -> "Estimate":
        """The same for a text on which every loss is larger by so much."""
        return Estimate(self.tokens, self.value + by, self.low + by, self.high + by)


def power_laws(points: Sequence[tuple[float, float]]) -> list[tuple[float, float, float, float]]:
    """(squared error, floor, scale, power) for every power, with floor and scale at least 0."""
    tokens, losses = np.array(points, dtype=float).T
    found = []
    for power in POWERS:
        shape = (tokens / tokens[0]) ** -power
        columns = np.stack((np.ones_like(shape), shape), axis=1)
        floor, scale = np.linalg.lstsq(columns, losses, rcond=None)[0]
        if floor < 0:
            # 损失没有负的下限
            floor, scale = 0.0, float(shape @ losses / (shape @ shape))
        if scale < 0:
            floor, scale = float(losses.mean()), 0.0
        error = float(((floor + scale * shape - losses) ** 2).sum())
        found.append((error, float(floor), float(scale), float(power)))
    return found


def estimate(curves: Sequence[Sequence[tuple[float, float]]], tokens: float, *, plateau: float) -> Estimate | None:
    """What `curves` of one setting, lists of (tokens, loss) of different seeds, come to after `tokens`.

    Up to `plateau` of its end each curve has a constant learning rate; what the decay gains is the difference of the
    end to the law. None where there are too few points.
    """
    ends = [curve[-1] for curve in curves if curve]
    flat = sorted(point for curve in curves if curve for point in curve if point[0] <= plateau * curve[-1][0])
    if len(flat) < LEAST_POINTS or len({point[0] for point in flat}) < 3:
        return None
    laws, start = power_laws(flat), flat[0][0]
    least = min(law[0] for law in laws)
    ranked = sorted(laws)
    close = [law for law in ranked if law[0] <= ALIKE * least + 1e-12]

    def at(law: tuple[float, float, float, float], place: float) -> float:
        return law[1] + law[2] * (place / start) ** -law[3]

    def predicted(law: tuple[float, float, float, float]) -> float:
        gain = fmean(at(law, place) - loss for place, loss in ends)
        return at(law, tokens) - gain

    values = [predicted(law) for law in close]
    spread = max(loss for _, loss in ends) - min(loss for _, loss in ends)
    noise = spread + (least / len(flat)) ** 0.5
    return Estimate(tokens, predicted(ranked[0]), min(values) - noise, max(values) + noise)
