"""Products of float32 rows with float32 or bf16 weights in numba: a tile of them at once, in the widest vectors."""

# float32 的矩阵乘，给编译好的一步用：权重读一遍，配上几行激活，乘加都在寄存器里
# bf16 的权重在寄存器里补成 float32，激活与求和仍是 float32：只读一半的字节，不需要 bf16 的指令
# numpy 没有 bf16，用 int16 装
# 每个积一个累加器，最后按固定的次序相加：一行的结果与旁边有几行、归哪一块都无关，逐位如此

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import carray, config, types

from nanogpt.core.loops.compiled import INT32, kernel, part_of_kernel
from nanogpt.core.loops.numbers import as_float
from nanogpt.write.speed.tiles import AHEAD, at, fused, tile_of

FLOAT = ir.FloatType()
# 一次几行权重
ROWS = 3
# 权重最多这么多行的结果先攒着，再加 bias 写出
CHUNK = 16 * ROWS
# 权重一段这么多字节：几组激活轮着用，下一段同时从内存来，两段一起留在最小的 L2（256 KB）里
BLOCK = 72 * 1024


def float_lanes() -> int:
    """How many float32 a vector of this CPU holds."""
    # 替别的 CPU 编译时，不问这台机器
    features = {} if config.CPU_NAME or config.CPU_FEATURES else llvmlite.binding.get_host_cpu_features()
    return 16 if features.get("avx512f") else 8 if features.get("avx") else 4


def dot_of(rows: int, columns: int, lanes: int, asks: int):
    """dot(w, w_stride, x, x_stride, k, ahead, out): out[c * CHUNK + r] = sum of w[r, i] x[c, i] over i < k.

    x are float32, w float32 or the bits of bf16 as int16. `asks` rows of weights from `ahead` on are asked for.
    Only the first k // lanes * lanes elements count; k >= lanes.
    """
    vector = ir.VectorType(FLOAT, lanes)

    def multiply(builder, total, weight, act):
        return fused(builder, weight, act, total)

    def prepare(builder, weight):
        if weight.type == vector:
            return weight
        wide = ir.VectorType(INT32, lanes)
        bits = builder.shl(builder.zext(weight, wide), ir.Constant(wide, [16] * lanes))
        return builder.bitcast(bits, vector)

    return tile_of(
        rows, columns, vector=lambda of: ir.VectorType(FLOAT if of is types.float32 else ir.IntType(16), lanes),
        sums=vector, step=lanes, multiple=lanes, prepare=prepare, multiply=multiply, add="fadd", chunk=CHUNK,
        asks=asks,
    )


LANES = float_lanes()
# 一次几行激活：3 x 8 个累加器要 32 个寄存器，AVX-512 才有
COLUMNS = 8 if LANES == 16 else 4
_dot_1x1, _dot_3x1, _dot_3x2, _dot_3x4, _dot_3x8 = (
    dot_of(rows, columns, LANES, rows) for rows, columns in ((1, 1), (3, 1), (3, 2), (3, 4), (3, 8))
)
# 激活有几组时，一块只要下一段的一行
_dot_in_turn = dot_of(ROWS, COLUMNS, LANES, 1)


@part_of_kernel
def _sums(weight, n, width, x, b, columns, chunk, sums):
    """sums[c * CHUNK + r] = row n + r of weight times row b + c of x, r < width, c < columns.

    Weights are asked for before they are needed: further on in this chunk, or some of the next one by every group of
    rows of x, if there are several.
    """
    size, stride, rows = weight.shape[1], x.shape[1], len(x)
    whole, even = size // LANES * LANES, width // ROWS * ROWS if rows > 1 else 0
    further, last = AHEAD // weight.itemsize, n + 2 * chunk - 1
    # 第一组就读完这一段的话，后几组算的时候内存闲着：32 行慢两成；末了不满的一组把剩下的要齐
    several = rows >= 2 * COLUMNS
    in_turn = several and columns == COLUMNS
    if whole == 0:
        sums[:] = 0
    else:
        for r in range(0, even, ROWS):
            # 只传指针：切片要记引用，比这里的乘法还贵
            w, acts, into = at(weight, (n + r) * size), at(x, b * stride), at(sums, r)
            ahead = (n + r) * size + further
            if several:
                asked = b // COLUMNS * (chunk // ROWS) + (r // ROWS if in_turn else r)
                ahead = min(n + chunk + asked, last) * size
            if in_turn:
                _dot_in_turn(w, size, acts, stride, size, at(weight, ahead), into)
            elif COLUMNS == 8 and columns == 8:
                _dot_3x8(w, size, acts, stride, size, at(weight, ahead), into)
            elif columns == 4:
                _dot_3x4(w, size, acts, stride, size, at(weight, ahead), into)
            elif columns == 2:
                _dot_3x2(w, size, acts, stride, size, at(weight, ahead), into)
            else:
                _dot_3x1(w, size, acts, stride, size, at(weight, ahead), into)
        # 只有一行激活：一次一行权重，读内存最快
        for r in range(even, width):
            for c in range(columns):
                row, acts, into = (n + r) * size, at(x, (b + c) * stride), at(sums, c * CHUNK + r)
                _dot_1x1(at(weight, row), size, acts, stride, size, at(weight, row + further), into)
    for r in range(width):
        for c in range(columns):
            for k in range(whole, size):
                sums[c * CHUNK + r] += as_float(weight[n + r, k]) * x[b + c, k]


@kernel
def products(weight, bias, x, y, start, stop, add):
    """Columns start … stop of y (B, >= N) = x (B, >= K) weight^T (N, K) + bias, or added to y."""
    rows = x.shape[0]
    sums = np.zeros(CHUNK * COLUMNS, np.float32)
    chunk = max(2, min(CHUNK // ROWS, BLOCK // (ROWS * weight.shape[1] * weight.itemsize))) * ROWS
    for n in range(start, stop, chunk):
        width, b = min(chunk, stop - n), 0
        while b < rows:
            columns = COLUMNS
            while columns > rows - b:
                columns //= 2
            _sums(weight, n, width, x, b, columns, chunk, sums)
            for c in range(columns):
                # 从 0 数起的一段：循环才成 SIMD，有 bias 要加的有几百万个
                into, added = carray(at(y, (b + c) * y.shape[1] + n), (width,)), carray(at(bias, n), (width,))
                found = carray(at(sums, c * CHUNK), (width,))
                for i in range(width):
                    value = found[i] + added[i]
                    into[i] = into[i] + value if add else value
            b += columns
