"""Sampling on a CPU as one compiled function: repetition penalty, temperature, top-k, top-p, min-p and the draw.

The same ids as core/lanes.draw_each() gives, but for what rounding decides.
"""

# CPU 上的采样编译成一个函数：重复惩罚、温度、top-k、top-p、min-p 与抽取，一行一行来
# 在 PyTorch 里这是二十到五十个小运算，词表五万时每个都要走一遍：8 行的 top-p 占 4 位权重一步的三成
# 这里一行只留两样：y 是减去最大值、除以温度之后的 logits（y <= 0），w 是 exp(y)；筛掉的 w = 0
# top-k 与 top-p 是同一件事：从大到小留，直到合计够了——一个数的是个数，一个数的是 w。不必排序：
# y <= 0 时，绝对值的位从小到大就是 y 从大到小，按位一段一段地找界线，走三遍就到最后一位
# no-repeat、typical 与用户自己的仍走普通的路：settings_of 说认不认得

import functools

import numpy as np
import torch
from numba import carray

from nanogpt.core.kernels import PART
from nanogpt.core.lanes import draw_each
from nanogpt.core.loops.compiled import Crew, kernel, share
from nanogpt.core.loops.numbers import exp
from nanogpt.core.sampling import LEAST_TEMPERATURE, MinP, RepetitionPenalty, Sampler, Temperature, TopK, TopP
from nanogpt.write.speed.tiles import at

# y 的 31 位分三段看：每段右边还有几位，有几位宽；第一段最宽，同一堆接连加的就少，不必等前一次加完
HEAPS = ((20, 11), (10, 10), (0, 10))
# 符号以外的位
MAGNITUDE = 0x7FFFFFFF
# 这么多个词一块，先看每块里最大的：多半的块，里面一个也留不下
BLOCK = 64
# 数比这少时，叫醒别的核比算还久
ALONE = 2**15
# 独自算时没有谁要等
NOBODY = np.empty(0, np.int64)


@kernel(reorder=True)
def _sum(values):
    # float64：float32 的和错在第八位，最高的随机数就总落在末尾那些几乎不可能的 id 上
    total = 0.0
    for i in range(len(values)):
        total += np.float64(values[i])
    return total


@kernel
def _most(values):
    """The largest of values (V,) float32, none of them NaN."""
    # 位照符号翻过来就是整数的大小次序：整数的最大值好向量化
    bits, most = values.view(np.int32), np.int32(-(2**31))
    for i in range(len(bits)):
        most = max(most, np.int32(bits[i] ^ ((bits[i] >> 31) & 0x7FFFFFFF)))
    return np.int32(most ^ ((most >> 31) & 0x7FFFFFFF)).view(np.float32)


@kernel(reorder=True)
def _weigh(y, most, temperature, w):
    """y (V,) = (y - most) / temperature in place, and w (V,) = e^y."""
    for i in range(len(y)):
        y[i] = (y[i] - most) / temperature
        # exp 到 -87 为止：再小的都算 0，不许抽的（-inf）也在里面
        w[i] = exp(y[i]) if y[i] > np.float32(-87.0) else np.float32(0.0)


@kernel
def _penalise(y, seen, tokens, penalty):
    """Divide positive and multiply negative y (V,) of the ids in tokens (T,) by the penalty; overwrites seen (V,)."""
    seen[:] = np.float32(0.0)
    for i in tokens:
        # 出现几次都只罚一次
        if i >= 0 and seen[i] == 0:
            seen[i] = np.float32(1.0)
            y[i] = y[i] / penalty if y[i] > 0 else y[i] * penalty


@kernel
def _lows(bits, lows):
    """The least magnitude in each BLOCK of the bits of floats (V,)."""
    for block in range(len(lows)):
        # 从 0 数起的一段：循环才成 SIMD，快十倍
        first, low = block * BLOCK, np.int32(MAGNITUDE)
        part = carray(at(bits, first), (min(BLOCK, len(bits) - first),))
        for i in range(len(part)):
            low = min(low, np.int32(part[i] & MAGNITUDE))
        lows[block] = low


@kernel
def _within(bits, w, lows, bound, near):
    """Write the places of magnitudes (V,) up to a bound and with w > 0 into near, in order; how many they are."""
    bound, into, count = np.int32(bound), at(near, 0), 0
    for block in range(len(lows)):
        if lows[block] <= bound:
            first = block * BLOCK
            size = min(BLOCK, len(bits) - first)
            part, weights = carray(at(bits, first), (size,)), carray(at(w, first), (size,))
            for i in range(size):
                # 先写下再看算不算数：没有猜不中的分支
                into[count] = np.int32(first + i)
                count += np.int64((part[i] & np.int32(MAGNITUDE)) <= bound) & np.int64(weights[i] > 0)
    return count


@kernel
def _drop(y, w, border):
    """Zero w and make y -inf where the magnitude of y is beyond a border."""
    bits, border = y.view(np.int32), np.int32(border)
    for i in range(len(y)):
        far = np.int32(bits[i] & MAGNITUDE) > border
        w[i] = np.float32(0.0) if far else w[i]
        y[i] = -np.float32(np.inf) if far else y[i]


@kernel
def _keep(y, w, wanted, count):
    """Zero w (and make y -inf) where y is not among the largest whose w (with `count` their number) reach `wanted`; at
    least one stays, and of equals the lower id comes first.
    """
    bits, size, bound = y.view(np.int32), len(y), MAGNITUDE
    lows, (shift, width) = np.empty((size + BLOCK - 1) // BLOCK, np.int32), HEAPS[0]
    heaps, before, border = np.zeros(1 << width, np.float64), 0.0, np.int64(0)
    _lows(bits, lows)
    if not count:
        # 概率都不到它的那些，合起来也不到该筛掉的一份；w 是近似的 e^y，留一点余地
        bound = np.int64(np.float32(0.01 - np.log(max(_sum(w) - wanted, 0.0) / size)).view(np.int32))
    elif wanted <= len(lows):
        # 有这么多块，各有一个不比它远；只看头几位，宁可多留
        for low in lows:
            heaps[low >> shift] += 1.0
        heap, total = 0, heaps[0]
        while total < wanted:
            heap += 1
            total += heaps[heap]
        bound = ((heap + 1) << shift) - 1
    near = np.empty(size, np.int32)
    left = _within(bits, w, lows, bound, near)
    for shift, width in HEAPS:
        last = (1 << width) - 1
        heaps[: last + 1] = 0.0
        for j in range(left):
            heaps[bits[near[j]] >> shift & last] += 1.0 if count else np.float64(w[near[j]])
        total, place = before, 0
        for heap in range(last + 1):
            if heaps[heap] > 0:
                # 舍入之后合计仍不够时，界线在最后一堆
                place, before = heap, total
                total += heaps[heap]
                if total >= wanted:
                    break
        # 只有界线上的一堆，下一段还要看
        candidates, left = left, 0
        for j in range(candidates):
            i = near[j]
            near[left] = i
            left += (bits[i] >> shift & last) == place
        border = border << width | place
    _drop(y, w, border)
    for j in range(left):
        mass = 1.0 if count else np.float64(w[near[j]])
        # 至少一个
        if before >= wanted and before > 0:
            w[near[j]], y[near[j]] = np.float32(0.0), -np.float32(np.inf)
        before += mass


@kernel
def _place(w, uniform):
    """The id at which the sums of w (V,) pass this share of the whole; never one with w = 0."""
    parts = (len(w) + PART - 1) // PART
    sums = np.zeros(parts + 1, np.float64)
    for part in range(parts):
        sums[part + 1] = sums[part] + _sum(w[part * PART : min(len(w), (part + 1) * PART)])
    target, part = uniform * sums[parts], 0
    while part < parts - 1 and sums[part + 1] <= target:
        part += 1
    first, last, inside = part * PART, min(len(w), (part + 1) * PART), 0.0
    for i in range(first, last):
        inside += np.float64(w[i])
    # 段的和与段里逐个的和差在舍入：落点总要在段里，也不能因此总落在最后一个
    rest, total, place = min(target - sums[part], inside * (1 - 2.0**-52)), 0.0, -1
    for i in range(first, last):
        if w[i] > 0:
            place = i
            total += np.float64(w[i])
            if total > rest:
                break
    return place


@kernel
def _draw(part, crew, size, logits, allowed, tokens, settings, uniforms, ids):
    """lanes.draw_each(); settings (B, 5): repetition_penalty, temperature, top_k, top_p, min_p."""
    start, stop = share(len(ids), part, size)
    V = logits.shape[1]
    y, w = np.empty(V, np.float32), np.empty(V, np.float32)
    for b in range(start, stop):
        temperature, k, p, least = settings[b, 1], settings[b, 2], settings[b, 3], settings[b, 4]
        # 有一个不是有限的数，和就不是
        if not np.isfinite(_sum(logits[b])):
            ids[b] = -1
            continue
        # y[:] = allowed[b] 也行，编译却多要一秒半
        for i in range(V):
            y[i] = allowed[b, i]
        if settings[b, 0] != 1:
            _penalise(y, w, tokens[b], np.float32(settings[b, 0]))
        most = _most(y)
        if temperature < LEAST_TEMPERATURE:
            for i in range(V):
                if y[i] == most:
                    ids[b] = i
                    break
            continue
        _weigh(y, most, np.float32(temperature), w)
        # count 不写成字面的 True、False：numba 会各编译一份
        count = 0 < k < V
        if count:
            _keep(y, w, k, count)
        count = p >= 1
        if not count:
            _keep(y, w, p * _sum(w), count)
        if least > 0:
            floor = np.float32(np.log(least))
            for i in range(V):
                if y[i] < floor:
                    w[i] = np.float32(0.0)
        ids[b] = _place(w, uniforms[b])


# sampler() 排的次序，各取哪个数，不用时是几
STAGES = {
    RepetitionPenalty: ("penalty", 1.0), Temperature: ("temperature", 1.0), TopK: ("k", 0.0), TopP: ("p", 1.0),
    MinP: ("min_p", 0.0),
}


@functools.lru_cache(maxsize=256)
def _numbers(stages: tuple) -> tuple[float, ...] | None:
    kinds = [type(stage) for stage in stages]
    if [kind for kind in STAGES if kind in kinds] != kinds:
        return None
    found = dict(zip(kinds, stages, strict=True))
    # top_k 没有上限，浮点数却有
    return tuple(
        float(min(getattr(found[kind], of), 2**62)) if kind in found else off for kind, (of, off) in STAGES.items()
    )


def settings_of(sampler) -> tuple[float, ...] | None:
    """repetition_penalty, temperature, top_k, top_p and min_p of a sampler; None if it does anything else."""
    # 用户自己的一步不一定能作字典的键：先看种类
    known = type(sampler) is Sampler and all(type(stage) in STAGES for stage in sampler.stages)
    return _numbers(tuple(sampler.stages)) if known else None


def draw(
    crew: Crew, samplers: list, logits: torch.Tensor, allowed: torch.Tensor, tokens: torch.Tensor,
    uniforms: torch.Tensor,
) -> torch.Tensor:
    """What lanes.draw_each() draws, on the CPU; rows whose sampler is not known here are left to it."""
    alike = {id(sampler): sampler for sampler in samplers}
    settings = {which: settings_of(sampler) for which, sampler in alike.items()}
    left = [row for row, sampler in enumerate(samplers) if settings[id(sampler)] is None]
    if len(left) == len(samplers):
        return draw_each(samplers, logits, allowed, tokens, uniforms)
    if left:
        # 一行怎么抽，与旁边是谁无关：别的行仍在这里抽
        here = [row for row, sampler in enumerate(samplers) if settings[id(sampler)] is not None]
        ids = torch.empty(len(samplers), dtype=torch.long)
        for rows, way in ((here, functools.partial(draw, crew)), (left, draw_each)):
            given = (one[rows] for one in (logits, allowed, tokens, uniforms))
            ids[rows] = way([samplers[row] for row in rows], *given)
        return ids
    ids, numbers = np.empty(len(samplers), np.int64), np.array([settings[id(sampler)] for sampler in samplers])
    logits, allowed, tokens, uniforms = (one.contiguous().numpy() for one in (logits, allowed, tokens, uniforms))
    arguments = logits, allowed, tokens, numbers, uniforms, ids
    if len(ids) == 1 or logits.size < ALONE:
        _draw(0, NOBODY, 1, *arguments)
    else:
        crew.run(_draw, *arguments)
    return torch.from_numpy(ids)
