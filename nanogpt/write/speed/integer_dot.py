"""Dot products of 8-bit integers in numba, with the CPU's own instruction for them (VNNI) where it has one.

`vpdpbusd` multiplies 64 pairs of bytes and adds them up in one instruction; numba reaches it through LLVM, without a
C++ compiler. Other CPUs get the same integers from ordinary instructions.
"""

# 8 位整数的点积：一条 VNNI 指令乘 64 对字节并加好，通过 LLVM 直接生成，不需要 C++ 编译器
# 没有 VNNI 的 CPU 用普通指令算出同样的整数：整数没有舍入，哪条路写出的字都一样
# int8_linear 是一整层：逐行量化激活、整数相乘、乘回 scale；fast_cpu 的一步与 int8.py 的 Int8Linear 都用它

import llvmlite.binding
import numpy as np
import torch
from llvmlite import ir
from numba import carray, config, njit, prange

from nanogpt.write.speed.tiles import INT8, INT32, INT64, at, declared, tile_of

# 一块权重同时配几行激活：寄存器够放 2 x 8 个累加器
COLUMNS = 8
# 权重这么多行的结果先攒成整数，再一次换成 float32：逐个换算比乘法还慢
CHUNK = 16
# 一块激活有这么多字节时还留在 L1、L2 里
BLOCK = 48 * 1024
# 这么多个数才值得让各核分着量化
LARGE = 2**16


def vnni_bytes() -> int:
    """How many bytes this CPU multiplies and adds at once: 64 | 32 with VNNI, 0 without."""
    # 替别的 CPU 编译时，不问这台机器
    if config.CPU_NAME or config.CPU_FEATURES:
        return 0
    features = llvmlite.binding.get_host_cpu_features()
    if features.get("avx512vnni") and features.get("avx512bw"):
        return 64
    return 32 if (features.get("avx512vnni") and features.get("avx512vl")) or features.get("avxvnni") else 0


def dot_of(rows: int, columns: int, vnni: int):
    """dot(w, x, k, out): out[c * CHUNK + r] = sum of w[r, i] x[c, i] over i < k, for contiguous int8 rows of length k,
    but with VNNI 128 sum(x[c]) more.

    Only the first k // 64 * 64 elements count; k >= 64.
    """
    lanes = (vnni or 64) // 4
    sums = ir.VectorType(INT32, lanes)
    flip = ir.Constant(sums, [ir.Constant(INT32, -0x7F7F7F80)] * lanes)

    def multiply(builder, total, weight, act):
        if vnni:
            # 指令要一边无符号：权重翻转最高位就是加 128
            name = f"llvm.x86.avx512.vpdpbusd.{8 * vnni}"
            return builder.call(declared(builder, name, sums, [sums] * 3), [total, weight, act])
        return builder.add(total, builder.mul(builder.sext(weight, sums), builder.sext(act, sums)))

    def store(builder, totals, out):
        whole = declared(builder, f"llvm.vector.reduce.add.v{lanes}i32", INT32, [sums])
        for j, total in enumerate(totals):
            place = j % columns * CHUNK + j // columns
            builder.store(builder.call(whole, [total]), builder.gep(out, [ir.Constant(INT64, place)]))

    return tile_of(
        rows, columns, vector=sums if vnni else ir.VectorType(INT8, lanes), sums=sums, step=vnni or lanes, multiple=64,
        prepare=lambda builder, weight: builder.xor(weight, flip) if vnni else weight, multiply=multiply, store=store,
        prefetch=rows > 1,
    )


VNNI = vnni_bytes()
# 无符号的一边多加的
OFFSET = 128 if VNNI else 0
_dot_1x1, _dot_2x2, _dot_2x4, _dot_2x8 = (
    dot_of(rows, columns, VNNI) for rows, columns in ((1, 1), (2, 2), (2, 4), (2, COLUMNS))
)


@njit(fastmath=False, cache=True)
def quantize_rows(x, q, scale, sums):
    """Each row of x (B, K) as int8 with one scale: x ~ q * scale[:, None]; sums (B,) are those of the 64-blocks of q.

    The same numbers as int8.quantize_rows gives.
    """
    rows, size = x.shape
    for b in range(rows):
        most, check = np.float32(0.0), np.float32(0.0)
        for k in range(size):
            most = max(most, abs(x[b, k]))
            check += x[b, k] * np.float32(0.0)
        # max 会略过 NaN：由 check 带进 scale，坏数不会被整数盖住
        most = max(most, np.float32(1e-12)) + check
        scale[b] = most / np.float32(127.0)
        factor = np.float32(127.0) / most
        total = np.int32(0)
        for k in range(size):
            q[b, k] = np.int8(np.int32(np.rint(x[b, k] * factor)))
        for k in range(size // 64 * 64):
            total += np.int32(q[b, k])
        sums[b] = total


@njit(fastmath=False, cache=True)
def _integers(weight, n, width, q, b, columns, out):
    """out (COLUMNS, CHUNK) = rows n … n + width of weight times rows b … b + columns of q."""
    size = q.shape[1]
    whole, even = size // 64 * 64, width // 2 * 2 if columns > 1 else 0
    # 只传指针：切片要记引用，比这里的乘法还贵
    if whole == 0:
        out[:] = 0
    else:
        for r in range(0, even, 2):
            w, x, into = at(weight, (n + r) * size), at(q, b * size), at(out, r)
            if columns == 8:
                _dot_2x8(w, x, size, into)
            elif columns == 4:
                _dot_2x4(w, x, size, into)
            else:
                _dot_2x2(w, x, size, into)
        for c in range(columns):
            # 只有一行激活：一次一行权重，读内存最快
            for r in range(even, width):
                _dot_1x1(at(weight, (n + r) * size), at(q, (b + c) * size), size, at(out, c * CHUNK + r))
    if whole < size:
        for c in range(columns):
            for r in range(width):
                for k in range(whole, size):
                    out[c, r] += np.int32(weight[n + r, k]) * np.int32(q[b + c, k])


@njit(fastmath=False, cache=True)
def _products(weight, scale, bias, q, row_scale, sums, y, start, stop, add):
    """Columns start … stop of y (B, N) = (q weight^T) * scale * row_scale[:, None] + bias, or added to y."""
    rows, size = q.shape
    out = np.empty((COLUMNS, CHUNK), np.int32)
    # 激活分块留在高速缓存里，权重一块读一遍
    block = max(2 * COLUMNS, BLOCK // size // COLUMNS * COLUMNS)
    for first in range(0, rows, block):
        last = min(first + block, rows)
        for n in range(start, stop, CHUNK):
            width, b = min(CHUNK, stop - n), first
            while b < last:
                columns = COLUMNS
                while columns > last - b:
                    columns //= 2
                _integers(weight, n, width, q, b, columns, out)
                for c in range(columns):
                    offset, factor = OFFSET * sums[b + c], row_scale[b + c]
                    into = carray(at(y, (b + c) * y.shape[1] + n), (width,))
                    # 不许合并乘加：与 PyTorch 逐个运算的结果逐位相同
                    for i in range(width):
                        value = np.float32(out[c, i] - offset) * scale[n + i] * factor + bias[n + i]
                        into[i] = into[i] + value if add else value
                b += columns


@njit(parallel=True, fastmath=False, cache=True)
def _quantize(x, pieces):
    """quantize_rows on all cores."""
    rows, size = x.shape
    q, row_scale, sums = np.empty((rows, size), np.int8), np.empty(rows, np.float32), np.empty(rows, np.int32)
    for piece in prange(pieces):
        first, last = rows * piece // pieces, rows * (piece + 1) // pieces
        quantize_rows(x[first:last], q[first:last], row_scale[first:last], sums[first:last])
    return q, row_scale, sums


@njit(parallel=True, fastmath=False, cache=True)
def int8_linear(weight, scale, bias, x, y, add, pieces):
    """y (B, N) = x (B, K) rounded to int8 by rows, times weight^T (N, K) int8 and scale (N,), plus bias; or added to y.

    The integers are exact, so that the order of the sums does not matter.
    """
    # 只有几行：分给各核还不如自己算完
    q, row_scale, sums = _quantize(x, pieces if x.size >= LARGE else 1)
    n_out = weight.shape[0]
    for piece in prange(pieces):
        start, stop = n_out * piece // pieces, n_out * (piece + 1) // pieces
        _products(weight, scale, bias, q, row_scale, sums, y, start, stop, add)


@njit(parallel=True, fastmath=False, cache=True)
def _rescaled(exact, scale, row_scale, bias, pieces):
    """exact (B, N) * scale * row_scale[:, None] + bias as float32."""
    rows, n_out = exact.shape
    y = np.empty((rows, n_out), np.float32)
    for piece in prange(pieces):
        for b in range(rows * piece // pieces, rows * (piece + 1) // pieces):
            for n in range(n_out):
                y[b, n] = np.float32(exact[b, n]) * scale[n] * row_scale[b] + bias[n]
    return y


def linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias, multiply=None) -> torch.Tensor:
    """int8.plain_linear, with all products here or by `multiply`."""
    x, weight, scale = x.numpy(), weight.numpy(), scale.numpy()
    bias = np.zeros(len(scale), np.float32) if bias is None else bias.numpy()
    pieces = min(torch.get_num_threads(), config.NUMBA_NUM_THREADS)
    if multiply is None:
        y = np.empty((len(x), len(weight)), np.float32)
        int8_linear(weight, scale, bias, x, y, False, pieces)
    else:
        q, row_scale, _ = _quantize(x, pieces)
        exact = multiply(torch.from_numpy(q), torch.from_numpy(weight)).numpy()
        y = _rescaled(exact, scale, row_scale, bias, pieces)
    return torch.from_numpy(y)
