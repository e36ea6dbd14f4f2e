"""Products of 8-bit activations with 4-bit weights in numba, as int4.py stores them."""

# int4 的点积：权重交错着存，一条 VNNI 指令给 16 行各加 4 对，低半、高半各一条
# 没有 VNNI 的 CPU 用普通指令算出同样的整数
# 半个字节无符号，正是指令要的：不必翻转；多加的 8 由每组激活的和补回来，当作累加器的初值
# 每组乘一次 scale，按次序加进 float32：乘与加分开舍入，与 int4.plain_linear 逐位相同

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from nanogpt.core.loops.compiled import INT32, INT64, crew_of, kernel, meet, share, threads
from nanogpt.core.loops.numbers import cache_aligned
from nanogpt.write.speed.int4 import GROUP, ROWS
from nanogpt.write.speed.integer_dot import VNNI, WIDE, activations, dot4, quantize_rows
from nanogpt.write.speed.tiles import ask_ahead, at, load, loop, splat, store

FLOAT, BYTES = ir.FloatType(), GROUP * ROWS // 2
WIDE_FLOAT = ir.VectorType(FLOAT, ROWS)
# 一块权重同时配几行激活：每行要两个累加器，AVX-512 才放得下这么多
COLUMNS = 8 if VNNI == 64 else 2


def dot_of(columns: int, vnni: int):
    """dot(w, scale, q, stride, less, groups, out): out[c * ROWS + r] = products of row r of a block with row c of q.

    w and scale are those of one block, rows of q int8, `stride` apart, and less (columns, groups) int32 contiguous.
    """

    def generate(context, builder, signature, args):
        w, scale, q, stride, less, groups, out = args
        builder.function.attributes.add("noinline")

        def constant(number):
            return ir.Constant(INT64, number)

        def added(g, totals):
            # 多加的 8：累加器从 -8 乘激活的和开始
            exact = [
                splat(builder, load(builder, less, place, INT32, 4), ROWS)
                for place in (builder.add(g, builder.mul(groups, constant(c))) for c in range(columns))
            ]
            # 一行激活时只是读：先要后面的，读得快一半；一条 64 字节，scale 一组才半条
            for line in range(0, BYTES, 64):
                ask_ahead(builder, w, builder.add(builder.mul(g, constant(BYTES)), constant(line)))
            ask_ahead(builder, scale, builder.mul(g, constant(ROWS)))
            nibble, four = (ir.Constant(WIDE, [number] * ROWS) for number in (0x0F0F0F0F, 4))
            for j in range(4):
                packed = load(builder, w, builder.add(builder.mul(g, constant(BYTES)), constant(4 * ROWS * j)), WIDE, 1)
                for half, shifted in enumerate((packed, builder.lshr(packed, four))):
                    codes = builder.and_(shifted, nibble)
                    for c in range(columns):
                        column = builder.add(builder.mul(stride, constant(c)), builder.mul(g, constant(GROUP)))
                        act = load(builder, q, builder.add(column, constant(8 * j + 4 * half)), INT32, 1)
                        exact[c] = dot4(builder, exact[c], codes, act, vnni)
            bits = load(builder, scale, builder.mul(g, constant(ROWS)), ir.VectorType(ir.IntType(16), ROWS), 2)
            factor = builder.bitcast(builder.shl(builder.zext(bits, WIDE), ir.Constant(WIDE, [16] * ROWS)), WIDE_FLOAT)
            return [
                builder.fadd(total, builder.fmul(builder.sitofp(whole, WIDE_FLOAT), factor))
                for total, whole in zip(totals, exact, strict=True)
            ]

        for c, value in enumerate(loop(builder, groups, 1, WIDE_FLOAT, columns, added)):
            store(builder, value, out, constant(c * ROWS))
        return context.get_dummy_value()

    @intrinsic
    def dot(typing, w, scale, q, stride, less, groups, out):
        return types.void(w, scale, q, types.intp, less, types.intp, out), generate

    return dot


_dot_1, _dot_2, _dot_4, _dot_8 = (dot_of(columns, VNNI) for columns in (1, 2, 4, 8))


@kernel
def products(weight, scale, bias, acts, y, start, stop, add):
    """Columns start … stop of y (B, N) = x (B, K) times the transposed matrix of codes, plus bias; or added to y.

    acts are x as integer_dot.quantize_rows() writes it; start is a multiple of ROWS.
    """
    q, row_scale, less, _ = acts
    (rows, groups), stride = less.shape, q.shape[1]
    out = np.empty(COLUMNS * ROWS, np.float32)
    for n in range(start, stop, ROWS):
        width, block, b = min(ROWS, stop - n), n // ROWS, 0
        w, factors = at(weight, block * groups * BYTES), at(scale, block * groups * ROWS)
        while b < rows:
            columns = COLUMNS
            while columns > rows - b:
                columns //= 2
            x, start_of, into = at(q, b * stride), at(less, b * groups), at(out, 0)
            if columns == 8:
                _dot_8(w, factors, x, stride, start_of, groups, into)
            elif columns == 4:
                _dot_4(w, factors, x, stride, start_of, groups, into)
            elif columns == 2:
                _dot_2(w, factors, x, stride, start_of, groups, into)
            else:
                _dot_1(w, factors, x, stride, start_of, groups, into)
            for c in range(columns):
                # 从 0 数起的一段：循环才成 SIMD
                row, added = carray(at(y, (b + c) * y.shape[1] + n), (width,)), carray(at(bias, n), (width,))
                found, factor = carray(at(out, c * ROWS), (width,)), row_scale[b + c]
                for i in range(width):
                    value = found[i] * factor + added[i]
                    row[i] = row[i] + value if add else value
            b += columns


@kernel
def _linear(part, crew, size, weight, scale, bias, x, acts, y):
    start, stop = share(len(x), part, size)
    quantize_rows(x, start, stop, acts)
    meet(crew, size)
    start, stop = share(len(bias), part, size, ROWS)
    products(weight, scale, bias, acts, y, start, stop, False)


def linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """int4.plain_linear on all cores."""
    y, scale = cache_aligned((len(x), len(bias))), scale.view(torch.int16)
    arrays = (tensor.numpy() for tensor in (weight, scale, bias, x))
    crew_of(threads()).run(_linear, *arrays, activations(*x.shape, lanes=False), y)
    return torch.from_numpy(y)
