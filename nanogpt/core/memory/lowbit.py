"""8-bit optimizer states and the rounding of 16-bit weights, in plain PyTorch.

It is not bitsandbytes or torchao because it has to combine with bf16 weights and stochastic rounding, updates inside
the backward pass, states streamed from RAM, tracing without allocating, and resuming under other settings.

Blockwise 8-bit states: Dettmers et al., arXiv:2110.02861. Updates work on flat pieces of PIECE values, so that
temporaries stay small, and never branch on a tensor's value, so that the planner can trace them.
"""

# 低精度的零件：8 位的优化器状态（Codec）、bf16 权重的随机舍入、分块求范数
# lean_optimizers 用它们更新，in_backward 用它的 norm；自己写而不用 bitsandbytes、torchao，见上面的英文
# 每 256 个值共用一个 scale，码表是 dynamic tree：小的值也有七个数量级可用
# 每次更新只展开一小块（PIECE），展开的 fp32 临时张量因此不随模型变大

import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

# 一块共用一个 scale：异常值只连累自己这一块
BLOCK = 256
# bias 与归一化的增益省不了多少字节，却最怕误差
SMALL = 4096
# 更新时一次处理这么多个值，是 BLOCK 的整数倍：CPU 上留在缓存里，快三倍
# 显卡上太小就只剩 kernel 启动，太大则临时张量占显存
PIECE = {"cpu": 2**18, "card": 2**20}


def dynamic_map(signed: bool) -> list[float]:
    """The 256 values of the dynamic (tree) data type, ascending: seven decades, the larger ones in finer steps."""
    values = [0.0, 1.0]
    for decade in range(7):
        # 指数越大，留给尾数的位越多：接近 1 的值最密
        steps = 2 ** (decade + (0 if signed else 1))
        middles = [0.1 + 0.9 * (i + 0.5) / steps for i in range(steps)]
        values += [sign * m * 10.0 ** (decade - 6) for m in middles for sign in ((1, -1) if signed else (1,))]
    return sorted(values)


class Codec:
    """Float32 values to 8-bit codes with one float32 scale per BLOCK, and back.

    The scale is the block's value of largest magnitude with its sign, so that this value is kept exactly and
    encoding what was decoded changes nothing.
    """

    # 再编码不变这一点要紧：跳过的一步读出来又写回去，状态必须逐位相同

    def __init__(self):
        # 表随设备各存一份；由优化器持有，追踪时就是假张量
        self._tables: dict[tuple, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def tables(self, signed: bool, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(values (256,), midpoints and infinity (256,), shortcut() (65536,)) on a device."""
        key = (signed, str(device))
        if key not in self._tables:
            values = dynamic_map(signed)
            middles = [*((a + b) / 2 for a, b in itertools.pairwise(values)), math.inf]
            table, edges = (torch.tensor(n, dtype=torch.float32, device=device) for n in (values, middles))
            self._tables[key] = table, edges, shortcut(edges[:-1])
        return self._tables[key]

    def encode(self, x: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (n,) uint8 and scales (ceil(n / BLOCK),) of x (n,) float32; unsigned values must not be negative."""
        blocks = F.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)
        scale = scale_of(blocks)
        ratio = blocks / torch.where(scale == 0, 1.0, scale)[:, None]
        codes = self.nearest(ratio, signed)
        if not signed:
            # 二阶矩变成零，分母就只剩 eps，一步会迈出几百倍；非零的至少留最小的码
            codes = torch.maximum(codes, (blocks > 0).int())
        return codes.to(torch.uint8).view(-1)[: x.numel()], scale

    def nearest(self, x: torch.Tensor, signed: bool) -> torch.Tensor:
        """Codes of the nearest values, int32; x float32 within -1 … 1."""
        _, middles, first = self.tables(signed, x.device)
        if x.device.type != "cpu":
            return torch.bucketize(x, middles[:-1], out_int32=True)
        # 二分查找每步都猜错分支；用高 16 位查表，至多再比一次，结果相同而快三倍
        codes = first.index_select(0, (x.view(torch.int32) >> 16).bitwise_and_(0xFFFF).view(-1))
        return codes.add_(x.view(-1) > middles.index_select(0, codes)).view_as(x)

    def decode(self, codes: torch.Tensor, scale: torch.Tensor, signed: bool) -> torch.Tensor:
        """Float32 values (n,) of codes (n,) and their scales."""
        values = self.tables(signed, codes.device)[0].index_select(0, codes.int())
        if codes.numel() % BLOCK == 0:
            return values.view(-1, BLOCK).mul_(scale[:, None]).view(-1)
        return values.mul_(scale.repeat_interleave(BLOCK)[: codes.numel()])


def scale_of(blocks: torch.Tensor) -> torch.Tensor:
    """The value of largest magnitude, with its sign, in each row of (n, BLOCK); shape (n,)."""
    low, high = blocks.aminmax(dim=1)
    return torch.where(high >= -low, high, low)


def shortcut(middles: torch.Tensor) -> torch.Tensor:
    """For each upper half of a float32's bits, how many of the midpoints lie below all such numbers, (65536,) int32."""
    first = torch.arange(1 << 16, dtype=torch.int32, device=middles.device) << 16
    # 负数的低位越大，值越小
    lowest = torch.minimum(first.view(torch.float32), (first | 0xFFFF).view(torch.float32))
    return torch.bucketize(lowest, middles, out_int32=True)


def zero_code(signed: bool) -> int:
    """The code that stands for 0."""
    return dynamic_map(signed).index(0.0)


def round_stochastically(x: torch.Tensor) -> torch.Tensor:
    """x float32 as bfloat16, rounded up or down at random so that the mean is exact; uses the global generator."""
    # bf16 就是 fp32 的高 16 位：加上 0 … 65535 的随机数再截断，进位的概率恰为余下的部分
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device)
    return ((x.view(torch.int32) + noise) & -65536).view(torch.float32).to(torch.bfloat16)


def spans(numel: int, piece: int, first: int = 0) -> Iterator[slice]:
    """Slices that cover first … numel in pieces of at most `piece`."""
    return (slice(start, min(start + piece, numel)) for start in range(first, numel, piece))


def norm(x: torch.Tensor, piece: int) -> torch.Tensor:
    """L2 norm in float32, shape (), without a float32 copy of the whole tensor."""
    flat = x.detach().reshape(-1)
    if flat.is_cuda:
        # 归约的 kernel 边读边转成 fp32：一次启动就够，不必分块
        return torch.linalg.vector_norm(flat, dtype=torch.float32)
    pieces = [torch.linalg.vector_norm(flat[span], dtype=torch.float32) for span in spans(flat.numel(), piece)]
    return torch.linalg.vector_norm(torch.stack(pieces))
