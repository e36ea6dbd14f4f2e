"""Causal attention of float32 rows on a CPU in numba: some queries at a time, with keys that stay in the caches."""

# 读一段开头时的注意力：PyTorch 在 CPU 上的 SDPA 只到矩阵乘的三分之一，又把因果的那一半多算出几成
# 一条向量的每格是一个 query：key、value 逐个广播来乘，都照它们在内存里的样子读；softmax 竖着走，不必横着加
# 一段 key 的分数算完就乘上 value（Flash Attention 的在线 softmax，arXiv:2205.14135），多长都留在 L2 里
# 每个 query 的求和次序与旁边有几行、几个线程无关

from functools import partial

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from nanogpt.core import kernels
from nanogpt.core.loops.compiled import INT32, INT64, part_of_kernel
from nanogpt.core.loops.team import TeamKernel, floats, integers, pieces, real
from nanogpt.write.speed.float_dot import FLOAT, LANES
from nanogpt.write.speed.tiles import at, fused, load, loop, shifted, splat, store, turn_of

# 一块的累加器：几行 key（或 value 的几列）x 几条 query 的向量，AVX-512 有 32 个寄存器，别的 16 个
ROWS, VECTORS = 8 if LANES == 16 else 4, 3
# 一次几个 query；一段几个 key：分数不到 100 KB
QUERIES, SPAN = VECTORS * LANES, 512
# head 的长短是它的倍数
UNIT = 8
# key 比这少时，PyTorch 的更快
LEAST_KEYS = 96
COLUMNS = ir.VectorType(FLOAT, LANES)
LOG2_E, LN_2 = 1.4426950408889634, (0.693359375, -2.12194440e-4)
TAYLOR = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0)


def outer_of(vectors: int, of_keys: bool):
    """tile(a, stride, b, k, out): `vectors` of LANES columns of ROWS rows of out, QUERIES apart, are a times b.

    b has k rows, QUERIES apart. Of keys: a has ROWS rows, a stride apart, and out is written. Else a has k rows, a
    stride apart, of which ROWS elements are read, so that it is turned round, and the products are added to out.
    """

    def generate(context, builder, signature, args):
        a, stride, b, k, out = args
        builder.function.attributes.add("noinline")

        def times(value, number):
            return builder.mul(value, ir.Constant(INT64, number))

        def added(i, totals):
            columns = [
                load(builder, b, builder.add(times(i, QUERIES), ir.Constant(INT64, v * LANES)), COLUMNS, 4)
                for v in range(vectors)
            ]
            after = []
            for r in range(ROWS):
                if of_keys:
                    place = builder.add(times(stride, r), i)
                else:
                    place = builder.add(builder.mul(stride, i), ir.Constant(INT64, r))
                one = splat(builder, load(builder, a, place, FLOAT, 4), LANES)
                for v, column in enumerate(columns):
                    after.append(fused(builder, one, column, totals[r * vectors + v]))
            return after

        for n, total in enumerate(loop(builder, k, 1, COLUMNS, ROWS * vectors, added)):
            place = ir.Constant(INT64, n // vectors * QUERIES + n % vectors * LANES)
            if not of_keys:
                total = builder.fadd(total, load(builder, out, place, COLUMNS, 4))
            store(builder, total, out, place)
        return context.get_dummy_value()

    @intrinsic
    def tile(typing, a, stride, b, k, out):
        return types.void(a, types.intp, b, types.intp, out), generate

    return tile


_scores_1, _scores_2, _scores_3 = (outer_of(vectors, True) for vectors in (1, 2, 3))
_turn = turn_of(LANES)
_values_1, _values_2, _values_3 = (outer_of(vectors, False) for vectors in (1, 2, 3))


@part_of_kernel
def _score(k, apart, q, size, count, seen, vectors, scores):
    """scores (count, QUERIES) of keys with queries; those from `seen` on are not seen by the first queries.

    ROWS rows before the first may be overwritten.
    """
    for j in range(0, count, ROWS):
        # 末了不满一块的，连着前几个再算一遍；这一段比一块还短时，连着上一段的
        first = min(j, count - ROWS)
        skip = max(0, (first - seen) // LANES)
        key, column = shifted(k, first * apart), shifted(q, skip * LANES)
        into = shifted(scores, first * QUERIES + skip * LANES)
        if vectors - skip == 3:
            _scores_3(key, apart, column, size, into)
        elif vectors - skip == 2:
            _scores_2(key, apart, column, size, into)
        else:
            _scores_1(key, apart, column, size, into)


@part_of_kernel
def _add_values(v, apart, scores, size, count, seen, vectors, out):
    """out (size, QUERIES) += values times scores; those from `seen` on are not seen by the first queries."""
    for skip in range(vectors):
        start = 0 if skip == 0 else seen + skip * LANES
        stop = count if skip == vectors - 1 else min(count, seen + (skip + 1) * LANES)
        start = max(0, start)
        if start >= stop:
            continue
        for c in range(0, size, ROWS):
            value, weight = shifted(v, start * apart + c), shifted(scores, start * QUERIES + skip * LANES)
            into = shifted(out, c * QUERIES + skip * LANES)
            if vectors - skip == 3:
                _values_3(value, apart, weight, stop - start, into)
            elif vectors - skip == 2:
                _values_2(value, apart, weight, stop - start, into)
            else:
                _values_1(value, apart, weight, stop - start, into)


@intrinsic
def _softened(typing, scores, count, peaks, totals, factors):
    """Make `count` rows of scores e^(scores - peaks) with the highest peaks so far; factors are e^(old - new peaks).

    Peaks, totals and factors are QUERIES long; totals become totals * factors + the sums of the rows.
    """

    def generate(context, builder, signature, args):
        scores, count, peaks, totals, factors = args
        builder.function.attributes.add("noinline")
        places = [ir.Constant(INT64, v * LANES) for v in range(VECTORS)]

        def all_of(start):
            return [load(builder, start, place, COLUMNS, 4) for place in places]

        def each_of(i):
            row = builder.gep(scores, [builder.mul(i, ir.Constant(INT64, QUERIES))])
            return row, all_of(row)

        def higher(i, before):
            # 坏数留着：比不出大小的算更高
            _, row = each_of(i)
            return [builder.select(builder.fcmp_unordered(">", r, b), r, b) for r, b in zip(row, before)]

        def summed(i, sums):
            row, values = each_of(i)
            values = [_power(builder, builder.fsub(r, h)) for r, h in zip(values, highest)]
            for place, value in zip(places, values):
                store(builder, value, row, place)
            return [builder.fadd(total, value) for total, value in zip(sums, values)]

        before = all_of(peaks)
        highest = loop(builder, count, 1, COLUMNS, VECTORS, higher, before)
        sums = loop(builder, count, 1, COLUMNS, VECTORS, summed)
        for place, b, h, old, new in zip(places, before, highest, all_of(totals), sums):
            factor = _power(builder, builder.fsub(b, h))
            store(builder, h, peaks, place)
            store(builder, factor, factors, place)
            store(builder, builder.fadd(builder.fmul(old, factor), new), totals, place)
        return context.get_dummy_value()

    return types.void(scores, types.intp, peaks, totals, factors), generate


def _power(builder, x):
    """e^x of a vector, x <= 0, to about 2 ulp; 0 below -87."""

    def all_lanes(number, kind=COLUMNS):
        return ir.Constant(kind, [number] * LANES)

    # 加上 1.5 x 2^23，小数部分就舍去了，整数 n 留在最低的几位：左移到指数那里就是乘 2^n
    # 许可重排加法的话，编译器会把加上又减去的消掉：_attend 因此不许
    shift = all_lanes(1.5 * 2**23)
    shifted = fused(builder, x, all_lanes(LOG2_E), shift)
    n = builder.fsub(shifted, shift)
    r = fused(builder, n, all_lanes(-LN_2[0]), x)
    r = fused(builder, n, all_lanes(-LN_2[1]), r)
    p = all_lanes(TAYLOR[0])
    for c in TAYLOR[1:]:
        p = fused(builder, p, r, all_lanes(c))
    bits = ir.VectorType(INT32, LANES)
    exponent = builder.shl(builder.bitcast(shifted, bits), all_lanes(23, bits))
    value = builder.bitcast(builder.add(builder.bitcast(p, bits), exponent), COLUMNS)
    return builder.select(builder.fcmp_ordered("<", x, all_lanes(-87.0)), all_lanes(0.0), value)


@part_of_kernel
def _soften(scores, count, seen, peaks, totals, factors):
    """_softened(), where keys from `seen` on are not seen by the first queries."""
    for j in range(max(0, seen + 1), count):
        hidden = carray(shifted(scores, j * QUERIES), (min(j - seen, QUERIES),))
        for i in range(len(hidden)):
            hidden[i] = np.float32(-np.inf)
    _softened(scores, count, peaks, totals, factors)


@part_of_kernel
def _turn_all(rows, apart, count, turned):
    """turned (apart, count) of rows (count, apart)."""
    for i in range(0, count, LANES):
        for c in range(0, apart, LANES):
            _turn(shifted(rows, i * apart + c), apart, shifted(turned, c * count + i), count)


@part_of_kernel
def _scale(out, factors, size):
    """out (size, QUERIES) times a factor for each query."""
    factor = carray(factors, (QUERIES,))
    for c in range(size):
        row = carray(shifted(out, c * QUERIES), (QUERIES,))
        for i in range(QUERIES):
            row[i] *= factor[i]


@part_of_kernel
def _copy(start, apart, count, size, scale, into, apart_there):
    """`count` rows of `size` numbers, times a scale, to where they lie apart_there from each other."""
    for i in range(count):
        row = carray(shifted(start, i * apart), (size,))
        there = carray(shifted(into, i * apart_there), (size,))
        for c in range(size):
            there[c] = row[c] * scale


@partial(TeamKernel, reorder=False)
def _attend(job):
    # 一段整数，一次取出：逐个去拿的，每处都要展开、编译
    about, scale = integers(job, 0, 0, 14), real(job, 1)
    T, longest, heads, groups, size = about[0], about[1], about[2], about[3], about[4]
    queries, keys, values, y = floats(job, 2, 0, 1), floats(job, 3, 0, 1), floats(job, 4, 0, 1), floats(job, 5, 0, 1)
    blocks = -(-T // QUERIES)
    # 行要补齐成整条的向量，才好转置
    wide = -(-size // LANES) * LANES
    whole = QUERIES * wide
    # 一整块，从一条缓存线开始
    room = np.zeros(3 * whole + (SPAN + ROWS + 3) * QUERIES + 16, np.float32)
    line = (-room.ctypes.data % 64) // 4
    for piece in pieces(job):
        # 地址在循环里取：numba 在数组最后一次出现之后就把它放掉，地址留不住它
        rows = at(room, line)
        q, out, scores = shifted(rows, whole), shifted(rows, 2 * whole), shifted(rows, 3 * whole + ROWS * QUERIES)
        factors = shifted(scores, SPAN * QUERIES)
        peaks, totals = shifted(factors, QUERIES), shifted(factors, 2 * QUERIES)
        # 越靠后的 query 要看的 key 越多：一前一后交错着分，线程才分得匀
        text, block = piece // blocks, piece % blocks
        block = blocks - 1 - block // 2 if block % 2 else block // 2
        b, h, first = text // heads, text % heads, block * QUERIES
        count = min(QUERIES, T - first)
        vectors = -(-count // LANES)
        start = b * about[5] + h * about[6] + first * about[7]
        _copy(at(queries, start), about[7], count, size, scale, rows, wide)
        _turn_all(rows, wide, QUERIES, q)
        highest, sums = carray(peaks, (QUERIES,)), carray(totals, (QUERIES,))
        for i in range(QUERIES):
            highest[i], sums[i] = np.float32(-np.inf), np.float32(0.0)
        total = carray(out, (whole,))
        for i in range(whole):
            total[i] = np.float32(0.0)
        # 第一个 query 看得到的最后一个 key
        seen = longest - T + first
        stop, begin = seen + count, 0
        while begin < stop:
            # 一段一段总在同样的地方分：右边补了几个，不改变前面的每一位
            end = min(begin + SPAN, stop)
            k = at(keys, b * about[8] + h // groups * about[9] + begin * about[10])
            v = at(values, b * about[11] + h // groups * about[12] + begin * about[13])
            _score(k, about[10], q, size, end - begin, seen - begin, vectors, scores)
            _soften(scores, end - begin, seen - begin, peaks, totals, factors)
            if begin > 0:
                _scale(out, factors, size)
            _add_values(v, about[13], scores, size, end - begin, seen - begin, vectors, out)
            begin = end
        inverse = carray(factors, (QUERIES,))
        for i in range(QUERIES):
            inverse[i] = np.float32(1.0) / sums[i]
        _scale(out, factors, size)
        _turn_all(out, QUERIES, wide, rows)
        start = ((b * T + first) * heads + h) * size
        _copy(rows, wide, count, size, np.float32(1.0), at(y, start), heads * size)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask, dropout: float, scale: float) -> torch.Tensor:
    """kernels.attention() of a text that is read, (B, nh, T, hs); everything else is left to that."""
    B, heads, T, size = q.shape
    L, parts = k.size(2), (q, k, v)
    known = mask is None and not dropout and T > 1 and L >= LEAST_KEYS and size % UNIT == 0
    known = known and all(part.dtype == torch.float32 and part.stride(3) == 1 for part in parts)
    if not known or torch.is_grad_enabled():
        return kernels.attention(q, k, v, mask, dropout, scale)
    y = torch.empty(B, T, heads, size)
    strides = [stride for part in parts for stride in part.stride()[:3]]
    about = torch.tensor([T, L, heads, heads // k.size(1), size, *strides])
    _attend(torch.float32, q.numel() * L, B * heads * -(-T // QUERIES), about, float(scale), *parts, y)
    return y.transpose(1, 2)


class Reading:
    """Put before CausalSelfAttention: a text is read through compiled loops."""

    attention = staticmethod(attention)

    def parts(self, qkv: torch.Tensor, rope=None) -> list[torch.Tensor]:
        """CausalSelfAttention.parts()."""
        batch, T = qkv.shape[:2]
        alone = not self.joint or (rope is None and not self.qk_norm)
        if alone or T == 1 or torch.is_grad_enabled():
            return super().parts(qkv, rope)
        packed, _ = self.arrangement(self.eps if self.qk_norm else None, rope).pack((qkv,))
        return [packed.unflatten(1, (batch, -1)).permute(1, 3, 0, 2, 4)]


def prepare() -> None:
    """Compile it, or load what was compiled, so that no text has to wait."""
    one = torch.zeros(1, 1, LEAST_KEYS, UNIT)
    with torch.inference_mode():
        attention(one, one, one, None, 0.0, 1.0)
