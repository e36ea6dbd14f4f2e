# 几个进程一起训练时，梯度求和要多久、有多少藏在反向后面：纸上算出，与 core/distributed 发送的次序相同
# 线路只有两种：一台机器里两张卡之间的，机器之间的；环与树取快的那种，都是 NCCL 的做法
# plan 给出追踪到的梯度与反向的时间，这里把一份份梯度排到线路上；show 把结果变成两行
"""What summing the gradients of several processes costs, and how much of it the backward pass hides.

A ring sends 2 (W - 1) / W of the gradients from each of W processes over every link, in 2 (W - 1) messages; a tree all
of them twice, in 2 log2 W messages. The slowest link decides: with several machines that is mostly their network, over
which a ring that visits machine after machine passes once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nanogpt.base.config import ParallelConfig

# 一条消息走一段路的延迟：机器之内，机器之间
LINK_LATENCY_S, NETWORK_LATENCY_S = 10e-6, 30e-6
# 一个微批的时间里，反向约占这么多
BACKWARD = 2 / 3
EFFICIENT = 0.9
"""Efficiency below which the network is said to bind."""


@dataclass(frozen=True)
class Network:
    """The links between the processes of one training."""

    # 只管一份梯度要走多久，不管何时开始
    world: int
    bytes_per_s: float
    """Of the slowest link that each message passes."""
    latency_s: float

    @classmethod
    def of(cls, parallel: ParallelConfig, world: int) -> "Network":
        """The links that parallel= states."""
        link, between = parallel.link_gb_per_s * 1e9, parallel.network_gbit * 1e9 / 8
        if parallel.nodes == 1:
            return cls(world, link, LINK_LATENCY_S)
        return cls(world, min(link, between), NETWORK_LATENCY_S)

    def sent(self, size: int) -> float:
        """Bytes that each process sends over a ring to add up `size` bytes."""
        return 2 * (self.world - 1) / self.world * size

    def seconds(self, size: int) -> float:
        """Time to add up `size` bytes: of a ring or a tree, whichever is faster."""
        ring = self.sent(size) / self.bytes_per_s + 2 * (self.world - 1) * self.latency_s
        tree = 2 * size / self.bytes_per_s + 2 * math.ceil(math.log2(self.world)) * self.latency_s
        return min(ring, tree)

    def half_seconds(self, size: int) -> float:
        """Time to gather, or to add up and scatter, `size` bytes over a ring: half of what adding them up takes."""
        return self.sent(size) / 2 / self.bytes_per_s + (self.world - 1) * self.latency_s


@dataclass(frozen=True)
class Gradient:
    """A sum of gradients that are sent together."""

    # 查表与嵌入层的梯度不费乘法，反向走到最后才有
    size: int
    work: int
    """Weights in it that the backward pass multiplies with."""
    weights: int = 0
    """Bytes of the parameters that are gathered with it where they are sharded."""


def exposed_s(parts: Sequence[Gradient], backward_s: float, network: Network) -> float:
    """How long the sums go on behind a backward pass of `backward_s`, in which the parts become ready in this order."""
    work = sum(part.work for part in parts) or 1
    ready = free = 0.0
    last = max((n for n, part in enumerate(parts) if part.work), default=-1)
    for number, part in enumerate(parts):
        # 排在所有矩阵之后的（嵌入层、查表）要等反向走完
        ready = backward_s if number > last else ready + backward_s * part.work / work
        free = max(ready, free) + network.seconds(part.size)
    return max(0.0, free - backward_s)


@dataclass(frozen=True)
class Communication:
    """What a plan says of the sums in each step."""

    # 都是数：与 Plan 一样可以留着比较
    network: Network
    parts: tuple[Gradient, ...]
    compute_s: float
    """A step of each process without the sums."""
    backward_s: float
    """Of its last micro-batch, beside which the gradients are sent."""

    @property
    def size(self) -> int:
        """Bytes of all gradients."""
        return sum(part.size for part in self.parts)

    @property
    def sent(self) -> float:
        """Bytes that each process sends in a step."""
        return self.network.sent(self.size)

    @property
    def total_s(self) -> float:
        """All sums, one behind the other."""
        return sum(map(self.network.seconds, (part.size for part in self.parts)))

    @property
    def exposed_s(self) -> float:
        """The part of them that comes on top of the computation."""
        return exposed_s(self.parts, self.backward_s, self.network)

    @property
    def efficiency(self) -> float:
        """Share of each step in which the processes compute."""
        return self.compute_s / (self.compute_s + self.exposed_s)

    def bytes_per_s_needed(self) -> float | None:
        """Bandwidth from which the efficiency is EFFICIENT; None where latency alone costs more."""
        def efficient(rate: float) -> bool:
            return replace(self, network=replace(self.network, bytes_per_s=rate)).efficiency >= EFFICIENT

        low, high = 1e3, 1e15
        if not efficient(high):
            return None
        while high / low > 1.01:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if efficient(middle) else (middle, high)
        return high

    def times_the_work_needed(self) -> float:
        """How many times as long a step must compute, by accumulating more, for its efficiency to be EFFICIENT."""
        return self.exposed_s * EFFICIENT / (1 - EFFICIENT) / self.compute_s


@dataclass(frozen=True)
class ShardedCommunication(Communication):
    """The same for parallel=fsdp: parameters are gathered in every forward and backward pass, gradients scattered."""

    # parts 是各 block（反向的次序），最后一份是根与各张表：它在反向里不必再凑一次，求和却排在最后
    micro_batches: int
    sums: int
    """Micro-batches whose gradients are summed: one, or all."""

    @property
    def sent(self) -> float:
        """Bytes that each process sends in a step, without Muon's matrices."""
        gathered = sum(2 * part.weights for part in self.parts) - self.parts[-1].weights
        return self.network.sent(self.micro_batches * gathered + self.sums * self.size) / 2

    @property
    def total_s(self) -> float:
        """All messages, one behind the other."""
        gather = [self.network.half_seconds(part.weights) for part in self.parts]
        scatter = sum(self.network.half_seconds(part.size) for part in self.parts)
        return self.micro_batches * (2 * sum(gather) - gather[-1]) + self.sums * scatter

    @property
    def exposed_s(self) -> float:
        """The part of them that comes on top of the computation."""
        gather = [self.network.half_seconds(part.weights) for part in self.parts]
        scatter = [self.network.half_seconds(part.size) for part in self.parts]
        work = sum(part.work for part in self.parts) or 1
        backward = [self.backward_s * part.work / work for part in self.parts]
        # 前向：根先凑齐，再一个 block 一个 block 地走，下一个 block 趁这一个在算时凑
        forward = [0.0, *(s * (1 - BACKWARD) / BACKWARD for s in reversed(backward[:-1]))]
        each = waits([gather[-1], *reversed(gather[:-1])], forward, [0.0] * len(gather))
        silent, summed = (waits([*gather[:-1], 0.0], backward, some) for some in ([0.0] * len(gather), scatter))
        return self.micro_batches * each + (self.micro_batches - self.sums) * silent + self.sums * summed


def waits(before: Sequence[float], compute: Sequence[float], behind: Sequence[float]) -> float:
    """How much longer a pass takes than its parts compute.

    Of each part one message must have arrived `before` it computes, and one is sent `behind` it; the messages follow
    each other, those of the next part begin while a part computes.
    """
    link, done = before[0], 0.0
    for number, seconds in enumerate(compute):
        arrived = link
        if number + 1 < len(before):
            link += before[number + 1]
        done = max(done, arrived) + seconds
        if behind[number]:
            link = max(link, done) + behind[number]
    return max(link, done) - sum(compute)
