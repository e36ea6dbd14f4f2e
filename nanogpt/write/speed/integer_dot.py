"""Dot products of 8-bit integers in numba, with the CPU's own instruction for them (VNNI) where it has one.

`vpdpbusd` multiplies 64 pairs of bytes and adds them up in one instruction; numba reaches it through LLVM, without a
C++ compiler. Other CPUs get the same integers from ordinary instructions.
"""

# 8 位整数的点积：一条 VNNI 指令乘 64 对字节并加好，通过 LLVM 直接生成，不需要 C++ 编译器
# 没有 VNNI 的 CPU 用普通指令算出同样的整数：整数没有舍入，哪条路写出的字都一样
# 一整层是 quantize_rows 与 products：逐行量化激活，整数相乘，乘回 scale；fast_cpu 与 int8.py 的 Int8Linear 都用它们

import llvmlite.binding
import numpy as np
import torch
from llvmlite import ir
from numba import carray, config

from nanogpt.core.loops.compiled import INT32, crew_of, kernel, meet, part_of_kernel, share, threads
from nanogpt.write.speed.tiles import INT8, at, declared, row_length, tile_of

# 一块权重同时配几行激活：寄存器够放 2 x 8 个累加器
COLUMNS = 8
# 权重这么多行的结果先攒成整数，再一次换成 float32：逐个换算比乘法还慢
CHUNK = 16
# 一块激活有这么多字节时还留在 L1、L2 里
BLOCK = 48 * 1024
# 每隔这么多列记一个和：int4 的一组也这么长
GROUP = 32


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
    """dot(w, w_stride, x, x_stride, k, out): out[c * CHUNK + r] = sum of w[r, i] x[c, i] over i < k, of int8; with VNNI
    128 sum(x[c]) more.

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

    return tile_of(
        rows, columns, vector=lambda of: sums if vnni else ir.VectorType(INT8, lanes), sums=sums, step=vnni or lanes,
        multiple=64, prepare=lambda builder, weight: builder.xor(weight, flip) if vnni else weight, multiply=multiply,
        add="add", chunk=CHUNK,
    )


VNNI = vnni_bytes()
# 无符号的一边多加的
OFFSET = 128 if VNNI else 0
_dot_1x1, _dot_2x2, _dot_2x4, _dot_2x8 = (
    dot_of(rows, columns, VNNI) for rows, columns in ((1, 1), (2, 2), (2, 4), (2, COLUMNS))
)


@kernel
def quantize_rows(x, start, stop, acts):
    """Rows start … stop of x (B, K) into acts = (q (B, >= K) int8, scale (B,), sums (B, K // GROUP)).

    x ~ q * scale[:, None], the same numbers as int8.quantize_rows gives; sums are those of q over GROUP columns each.
    """
    q, scale, sums = acts
    size, bits = x.shape[1], x.view(np.int32)
    for b in range(start, stop):
        # 浮点的大小次序就是位的次序，整数的最大值好向量化；NaN、Inf 的位最大，留在 scale 里，坏数不会被整数盖住
        most = np.float32(1e-12).view(np.int32)
        for k in range(size):
            most = max(most, np.int32(bits[b, k] & 0x7FFFFFFF))
        highest = np.int32(most).view(np.float32)
        scale[b] = highest / np.float32(127.0)
        factor = np.float32(127.0) / highest
        for k in range(size):
            q[b, k] = np.int8(np.int32(np.rint(x[b, k] * factor)))
        for g in range(size // GROUP):
            total = np.int32(0)
            for k in range(g * GROUP, (g + 1) * GROUP):
                total += np.int32(q[b, k])
            sums[b, g] = total


@part_of_kernel
def _integers(weight, n, width, q, b, columns, out):
    """out (COLUMNS, CHUNK) = rows n … n + width of weight times rows b … b + columns of q."""
    size, stride = weight.shape[1], q.shape[1]
    whole, even = size // 64 * 64, width // 2 * 2 if columns > 1 else 0
    # 只传指针：切片要记引用，比这里的乘法还贵
    if whole == 0:
        out[:] = 0
    else:
        for r in range(0, even, 2):
            w, x, into = at(weight, (n + r) * size), at(q, b * stride), at(out, r)
            if columns == 8:
                _dot_2x8(w, size, x, stride, size, into)
            elif columns == 4:
                _dot_2x4(w, size, x, stride, size, into)
            else:
                _dot_2x2(w, size, x, stride, size, into)
        for c in range(columns):
            # 只有一行激活：一次一行权重，读内存最快
            for r in range(even, width):
                w, x = at(weight, (n + r) * size), at(q, (b + c) * stride)
                _dot_1x1(w, size, x, stride, size, at(out, c * CHUNK + r))
    if whole < size:
        for c in range(columns):
            for r in range(width):
                for k in range(whole, size):
                    out[c, r] += np.int32(weight[n + r, k]) * np.int32(q[b + c, k])


@kernel
def products(weight, scale, bias, acts, y, start, stop, add):
    """Columns start … stop of y (B, N) = (q weight^T) * scale * row_scale[:, None] + bias, or added to y.

    The integers are exact, so that the order of the sums does not matter.
    """
    q, row_scale, sums = acts
    rows, size = y.shape[0], weight.shape[1]
    out = np.empty((COLUMNS, CHUNK), np.int32)
    offsets = np.zeros(rows, np.int32)
    for b in range(rows):
        for g in range(size // 64 * 64 // GROUP):
            offsets[b] += OFFSET * sums[b, g]
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
                    offset, factor = offsets[b + c], row_scale[b + c]
                    into = carray(at(y, (b + c) * y.shape[1] + n), (width,))
                    # 不许合并乘加：与 PyTorch 逐个运算的结果逐位相同
                    for i in range(width):
                        value = np.float32(out[c, i] - offset) * scale[n + i] * factor + bias[n + i]
                        into[i] = into[i] + value if add else value
                b += columns


def activations(rows: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Room for `rows` of activations (rows, size) as quantize_rows() writes them."""
    q = np.empty((rows, row_length(size, 1)), np.int8)
    return q, np.empty(rows, np.float32), np.empty((rows, size // GROUP), np.int32)


@kernel
def _quantize(part, crew, size, x, acts):
    start, stop = share(len(x), part, size)
    quantize_rows(x, start, stop, acts)


@kernel
def _linear(part, crew, size, weight, scale, bias, x, acts, y):
    _quantize(part, crew, size, x, acts)
    meet(crew, size)
    start, stop = share(len(bias), part, size)
    products(weight, scale, bias, acts, y, start, stop, False)


@kernel
def _rescale(part, crew, size, exact, scale, row_scale, bias, y):
    """y (B, N) = exact (B, N) * scale * row_scale[:, None] + bias as float32."""
    start, stop = share(len(y), part, size)
    for b in range(start, stop):
        for n in range(y.shape[1]):
            y[b, n] = np.float32(exact[b, n]) * scale[n] * row_scale[b] + bias[n]


def linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias, multiply=None) -> torch.Tensor:
    """int8.plain_linear, with all products here or by `multiply`."""
    bias = torch.zeros(len(scale)) if bias is None else bias
    x, weight, scale, bias = x.numpy(), weight.numpy(), scale.numpy(), bias.numpy()
    y, acts, crew = np.empty((len(x), len(scale)), np.float32), activations(*x.shape), crew_of(threads())
    if multiply is None:
        crew.run(_linear, weight, scale, bias, x, acts, y)
    else:
        crew.run(_quantize, x, acts)
        q = np.ascontiguousarray(acts[0][:, : x.shape[1]])
        exact = multiply(torch.from_numpy(q), torch.from_numpy(weight)).numpy()
        crew.run(_rescale, exact, scale, acts[1], bias, y)
    return torch.from_numpy(y)
