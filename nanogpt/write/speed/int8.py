"""8-bit products for writing: each row of a matrix as int8 with one scale, and on a CPU each row of activations too.

Symmetric round-to-nearest per output row and per token (LLM.int8 without outlier columns, arXiv:2208.07339). A quarter
of float32's bytes, and integers that a CPU multiplies several times as fast. The integers are exact, so that every way
to multiply them gives the same bits.
"""

# 写作时的 8 位：权重每行一个 scale；CPU 上激活也逐行量化，整数乘整数比浮点快几倍，读的字节少到四分之一
# 整数没有舍入：plain_linear 用浮点算出的、torch._int_mm 的、numba 的逐位相同，所以可以在启动时量一量再挑快的（fastest）
# 由 formats 换上；显卡上激活照旧，权重还原成浮点再乘；只用于写作：没有梯度，也不存盘

import math
import time
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

# 127 * 127 * 1024 < 2^24：float32 里这么长的整数点积没有舍入
EXACT = 1024
# 量哪几种行数：一个 token、一批、一段开头；其余的归到不超过它的最大一档
MEASURED_ROWS, TURNS = (1, 8, 128), 6


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight (N, K) as int8 (N, K) and scale (N,) with weight ~ int8 * scale[:, None]."""
    scale = weight.float().abs().amax(dim=1).clamp(min=1e-12) / 127
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (B, K) float32 as int8 (B, K) and scale (B,); a row that is not finite has a scale that is not."""
    most = x.abs().amax(dim=1).clamp(min=1e-12)
    # 127 / most 在 torch 里是先取倒数再乘，舍入两次，与别处的一次偶尔差一位
    factor = torch.full_like(most, 127) / most
    return (x * factor[:, None]).round_().to(torch.int8), most / 127


def by_floats(q: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """q (B, K) weight^T (N, K) of int8 as int32, by float32 products short enough to be exact."""
    parts = zip(q.split(EXACT, dim=1), weight.split(EXACT, dim=1), strict=True)
    return sum(F.linear(a.float(), b.float()).to(torch.int32) for a, b in parts)


def by_int_mm(q: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The same by PyTorch's own product of integers."""
    return torch._int_mm(q, weight.t())


def plain_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias, multiply=by_floats) -> torch.Tensor:
    """x (B, K) float32, rounded to int8 by rows, times weight^T (N, K) int8, times scale (N,), plus bias (N,)."""
    q, row_scale = quantize_rows(x)
    y = multiply(q, weight).float().mul_(scale).mul_(row_scale[:, None])
    return y if bias is None else y.add_(bias)


def fastest(ways: dict[str, Callable], shape: tuple[int, int]) -> tuple[dict[int, Callable], dict[int, str]]:
    """For each of MEASURED_ROWS the fastest of `ways` to compute plain_linear with such a weight, and its name.

    A way that does not work here or does not give plain_linear's bits, as an int8 kernel that saturates, is out.
    """
    generator = torch.Generator().manual_seed(0)
    # 一半是最大的数：有的 CPU 的内核两两相加时会溢出
    weight = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    weight[::2] = 127
    scale, chosen, names = torch.rand(shape[0], generator=generator), {}, {}
    for rows in MEASURED_ROWS:
        x = torch.randn(rows, shape[1], generator=generator).sign()
        # 第一次不算：编译、线程池
        seconds = {name: math.inf for name, way in ways.items() if _agrees(way, x, weight, scale)}
        for _ in range(TURNS):
            # 轮流量：别的程序占着核的那一阵，轮到谁都一样；慢一倍的不必再量
            for name in [name for name, least in seconds.items() if least <= 2 * min(seconds.values())]:
                seconds[name] = min(seconds[name], _seconds(ways[name], x, weight, scale))
        names[rows] = min(seconds, key=seconds.get)
        chosen[rows] = ways[names[rows]]
    return chosen, names


def _agrees(way: Callable, *inputs: torch.Tensor) -> bool:
    try:
        return torch.equal(way(*inputs, None), plain_linear(*inputs, None))
    except RuntimeError:
        # 有的平台、有的 torch 没有 _int_mm，或者限定形状
        return False


def _seconds(way: Callable, *inputs: torch.Tensor) -> float:
    start = time.perf_counter()
    way(*inputs, None)
    return time.perf_counter() - start


class Int8Linear(nn.Module):
    """nn.Linear with an int8 weight; x (..., K) -> (..., N) in x's dtype."""

    # 形状与属性名同 nn.Linear：换上之后模型的代码不必改，fast_cpu 也认得
    # ways 由 acceleration 换成这台机器上最快的：行数 -> 算法，结果逐位相同

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        self.ways: dict[int, Callable] = {1: plain_linear}
        # buffer 而不是参数：不求导，.to(device) 照样跟着走
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.out_features = len(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu":
            y = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
            return y if self.bias is None else y + self.bias.to(x.dtype)
        rows = x.detach().reshape(-1, x.size(-1)).float().contiguous()
        way = self.ways[max(count for count in self.ways if count <= max(1, len(rows)))]
        return way(rows, self.weight, self.scale, self.bias).to(x.dtype).view(*x.shape[:-1], -1)


class Int8Embedding(nn.Module):
    """nn.Embedding with int8 rows; idx (...) -> (..., C) in `dtype`."""

    # 与输出层绑在一起的词嵌入：不一起量化，内存里就要留两份

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.dtype = dtype
        self.num_embeddings = weight.size(0)

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        return F.embedding(idx, self.weight).to(self.dtype) * F.embedding(idx, self.scale[:, None]).to(self.dtype)
