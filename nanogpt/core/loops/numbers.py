"""float32 and bf16 inside kernels, and e^x: numpy has no bf16, so that its bits are handed over as int16."""

# bf16 就是 float32 的高 16 位：补 16 个 0 变宽，舍入到最近（一半时取偶）变窄，都向量化得成几条整数指令

import numpy as np
import torch
from numba import types
from numba.extending import overload

from nanogpt.core.loops.compiled import part_of_kernel

# 变窄时的 NaN：照加的话会进位成 -0，坏掉的一步就看不出来了
NAN = 0x7FC0


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's memory as an array, bf16 as int16."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def cache_aligned(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> np.ndarray:
    """Memory for numbers that begins with a line of the cache."""
    # numpy 从一条缓存线的四分之一处开始：每条 64 字节的向量都跨两条线，乘积慢三成
    return torch.empty(shape, dtype=dtype).numpy()


def as_float(weight):
    """A float32 or the bits of a bf16 as float32."""


@overload(as_float, inline="always")
def _as_float_of(weight):
    if weight is types.float32:
        return lambda weight: weight
    return lambda weight: np.int32(np.int32(weight) << 16).view(np.float32)


def rounded(like, number):
    """A float32 as what `like`, a pointer, points to: itself, or its bits once it is rounded to bf16."""


@overload(rounded, inline="always")
def _rounded_of(like, number):
    # 只给指针：传数组要记引用，循环里有了那些调用就不向量化
    if like.dtype == types.float32:
        return lambda like, number: number

    def to_bf16(like, number):
        bits = np.float32(number).view(np.int32)
        nearest = (bits + np.int32(0x7FFF) + ((bits >> 16) & np.int32(1))) >> 16
        return np.int16(nearest | np.int32(number != number) * np.int32(NAN))

    return to_bf16


@part_of_kernel
def exp(x):
    """e^x in float32 to about 2 ulp for x <= 88; arithmetic only, so that LLVM turns loops over it into SIMD."""
    x = max(x, np.float32(-87.0))
    # math.floor 是 libm 的一次调用，np.floor 是一条指令
    n = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    # 分两段减去 n·ln2，余数才不丢位；多项式是 e^r 的泰勒展开，|r| <= ln2 / 2
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1 / 5040)
    for c in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
        p = p * r + np.float32(c)
    # 直接写指数位：乘以 2^n
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
