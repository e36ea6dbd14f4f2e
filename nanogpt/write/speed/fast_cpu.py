"""One decoding step of a GPT on the CPU as a single compiled function (numba, extra `fast`).

For some rows a token is bound by reading the weights once. Eager PyTorch reads them at half of the
memory's speed and spends as long again between its many small operations; here all cores read
disjoint parts of each matrix, float32 or int8, and nothing lies in between. Needs no C++ compiler;
the compiled code is kept on disk.
"""

# CPU 上的一步编译成一个函数：PyTorch 逐个小运算时，内存带宽只用到一半，运算之间又空等
# 这里各核各读一段权重，中间没有空当
# _step 是整个模型的一步，由上面几个小函数拼成，都直接写 float32 的数组
# fits 说认不认得这个模型，FastStep 由 acceleration 装到模型上
# 与 core/model 是两份实现：模型的式子改了，这里要跟着改，否则 fits 要说不认得
# 编译结果缓存在磁盘上，第一次要几秒；行数超过 MAX_ROWS 时普通的路更快

import math
from pathlib import Path

import numpy as np
import torch
from numba import config, njit, prange, set_num_threads, types
from numba.extending import overload

from nanogpt.core.attention import CausalSelfAttention
from nanogpt.core.kv_cache import KVCache
from nanogpt.core.model import GPT, MLP, Block, Norm
from nanogpt.core.ngrams import NgramEmbedding
from nanogpt.write.speed.float_dot import LANES, products
from nanogpt.write.speed.int8 import Int8Linear
from nanogpt.write.speed.integer_dot import VNNI, int8_linear

# 只许重排加法（SIMD 需要）、合并乘加；不假设没有 NaN 与无穷
REORDER = {"reassoc", "contract", "nsz"}
# 有 AVX-512 时 8 行起乘加就接近机器的极限，int8 也到 48 行都快（benchmarks/fast_rows.py）；更窄的向量没有量过，不放宽
# 定死而不在启动时量：量出的选择随机器忙闲而变，同一个种子就写不出同样的字
MAX_ROWS = {torch.float32: 48 if LANES == 16 else 16, torch.int8: 48}
# 一步里多一行要多花的时间，占第一行的几分之几（benchmarks/results/speculation.json），留余量：
# int8 有 VNNI 时约 0.09；float32 是逐行相乘时量的，现在有 AVX-512 的一核上 2 ~ 8 行几乎不多花，待重测
ROW_COST = {torch.float32: 0.2, torch.int8: 0.15 if VNNI else 0.4}
ACTIVATIONS = {"none": 0, "relu2": 1, "gelu": 2, "gelu_tanh": 3, "swiglu": 4}


@njit(inline="always")
def _exp(x):
    """e^x in float32 to about 2 ulp for x <= 88; arithmetic only, so that LLVM turns loops over it into SIMD."""
    x = max(x, np.float32(-87.0))
    n = np.float32(math.floor(x * np.float32(1.4426950408889634) + np.float32(0.5)))
    # 分两段减去 n·ln2，余数才不丢位；多项式是 e^r 的泰勒展开，|r| <= ln2 / 2
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1 / 5040)
    for c in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
        p = p * r + np.float32(c)
    # 直接写指数位：乘以 2^n
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(inline="always")
def _erf(x):
    """erf in float32, absolute error below 5e-7 (Abramowitz & Stegun 7.1.26)."""
    t = np.float32(1.0) / (np.float32(1.0) + np.float32(0.3275911) * abs(x))
    p = np.float32(0.0)
    for c in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        p = (p + np.float32(c)) * t
    y = np.float32(1.0) - p * _exp(-x * x)
    return y if x >= 0 else -y


@njit(inline="always")
def _activate(y, start, stop, kind):
    """Apply the activation to y[start:stop] in place."""
    if kind == 1:
        for n in range(start, stop):
            y[n] = max(y[n], np.float32(0.0)) ** 2
    elif kind == 2:
        for n in range(start, stop):
            y[n] = np.float32(0.5) * y[n] * (np.float32(1.0) + _erf(y[n] * np.float32(0.7071067811865476)))
    elif kind == 3:
        for n in range(start, stop):
            # (1 + tanh u) / 2 = 1 / (1 + e^-2u)
            u = np.float32(0.7978845608028654) * (y[n] + np.float32(0.044715) * y[n] * y[n] * y[n])
            y[n] = y[n] / (np.float32(1.0) + _exp(min(np.float32(-2.0) * u, np.float32(87.0))))


@njit(parallel=True, fastmath=REORDER, cache=True)
def _float_linear(weight, bias, x, y, activation, add, pieces):
    """y (B, N) = activation(x (B, K) weight^T (N, K) + bias), or added to y."""
    n_out = weight.shape[0]
    for piece in prange(pieces):
        start, stop = n_out * piece // pieces, n_out * (piece + 1) // pieces
        products(weight, bias, x, y, start, stop, add)
        for b in range(x.shape[0]):
            _activate(y[b], start, stop, activation)


@njit(parallel=True, fastmath=REORDER, cache=True)
def _activate_all(y, activation, pieces):
    """Apply the activation to y (B, N) in place."""
    size = y.shape[1]
    for piece in prange(pieces):
        for b in range(y.shape[0]):
            _activate(y[b], size * piece // pieces, size * (piece + 1) // pieces, activation)


def _linear(weight, scale, bias, x, y, activation, add, pieces):
    """_float_linear or int8_linear, by the type of the weight; the activation, if any, is applied to y."""


@overload(_linear)
def _linear_of(weight, scale, bias, x, y, activation, add, pieces):
    # 编译时按权重的类型二选一：两条路各用各的乘法，_step 只写一遍
    if weight.dtype is not types.int8:
        return lambda weight, scale, bias, x, y, activation, add, pieces: _float_linear(
            weight, bias, x, y, activation, add, pieces
        )

    def multiply(weight, scale, bias, x, y, activation, add, pieces):
        int8_linear(weight, scale, bias, x, y, add, pieces)
        if 0 < activation < 4:
            _activate_all(y, activation, pieces)

    return multiply


@njit(fastmath=REORDER, cache=True)
def _gate(fused, y):
    """silu(gate) * up of fused (B, 2 I) = (gate, up) into y (B, I)."""
    # 一行只有几千个数：不值得为它再开一次并行
    size = y.shape[1]
    for b in range(y.shape[0]):
        for i in range(size):
            gate = fused[b, i]
            y[b, i] = fused[b, size + i] * gate / (np.float32(1.0) + _exp(min(-gate, np.float32(87.0))))


@njit(fastmath=REORDER, cache=True)
def _normalise(x, gain, bias, layernorm, eps, y):
    """LayerNorm or RMSNorm of every row of x (B, C) into y."""
    size = x.shape[1]
    for b in range(x.shape[0]):
        mean = np.float32(0.0)
        if layernorm:
            for c in range(size):
                mean += x[b, c]
            mean /= np.float32(size)
        square = np.float32(0.0)
        for c in range(size):
            square += (x[b, c] - mean) ** 2
        if layernorm:
            r = np.float32(1.0) / np.sqrt(square / np.float32(size) + np.float32(1e-5))
            for c in range(size):
                y[b, c] = (x[b, c] - mean) * r * gain[c] + bias[c]
        else:
            r = np.float32(1.0) / np.sqrt(square / np.float32(size) + eps)
            for c in range(size):
                y[b, c] = x[b, c] * r * gain[c]


@njit(fastmath=REORDER, cache=True)
def _turn(x, gain, cos, sin, qk_norm, eps, out):
    """QK-norm and rotary embedding of one head's vector x (hs,)."""
    size = x.shape[0]
    r = np.float32(1.0)
    if qk_norm:
        square = np.float32(0.0)
        for i in range(size):
            square += x[i] * x[i]
        r = np.float32(1.0) / np.sqrt(square / np.float32(size) + eps)
    half = size // 2
    for i in range(size):
        if cos.shape[0] > 0:
            j = i + half if i < half else i - half
            out[i] = r * (x[i] * gain[i] * cos[i] + x[j] * gain[j] * sin[i])
        else:
            out[i] = r * x[i] * gain[i]


@njit(parallel=True, fastmath=REORDER, cache=True)
def _attend(qkv, keys, values, lengths, q_gain, k_gain, cos, sin, n_head, scale, qk_norm, eps, y):
    """Write the new keys and values from lengths[b] of keys, values (B, nkv, L, hs) on; attend into y (B * T, nh * hs).

    qkv (B * T, .) are T ids of each of B texts, one text after the other.
    """
    heads, head_size = keys.shape[1], keys.shape[3]
    # 一份 key 由几个 query 共用：同一个 job 先写它，再替它们读
    groups, steps = n_head // heads, qkv.shape[0] // lengths.shape[0]
    for job in prange(lengths.shape[0] * heads):
        b, h = job // heads, job % heads
        q, out = np.empty(head_size, np.float32), np.empty(head_size, np.float32)
        weights = np.empty(lengths[b] + steps, np.float32)
        # 同一段文字的几个位置依次走：后一个要看前一个刚写下的 key
        for step in range(steps):
            row, last = b * steps + step, lengths[b] + step
            turn = last if cos.shape[0] > 1 else 0
            at = (n_head + h) * head_size
            _turn(qkv[row, at : at + head_size], k_gain, cos[turn], sin[turn], qk_norm, eps, keys[b, h, last])
            for i in range(head_size):
                values[b, h, last, i] = qkv[row, at + heads * head_size + i]
            for member in range(groups):
                at = (h * groups + member) * head_size
                _turn(qkv[row, at : at + head_size], q_gain, cos[turn], sin[turn], qk_norm, eps, q)
                highest = np.float32(-np.inf)
                for t in range(last + 1):
                    score = np.float32(0.0)
                    for i in range(head_size):
                        score += q[i] * keys[b, h, t, i]
                    weights[t] = score * scale
                    highest = max(highest, weights[t])
                total = np.float32(0.0)
                out[:] = np.float32(0.0)
                for t in range(last + 1):
                    weight = _exp(weights[t] - highest)
                    total += weight
                    for i in range(head_size):
                        out[i] += weight * values[b, h, t, i]
                for i in range(head_size):
                    y[row, at + i] = out[i] / total


@njit(cache=True)
def _step(
    x, norm_1, attn, gains, proj, norm_2, fc, out, norm_f, head, settings, keys, values, lengths, cos, sin, pieces,
    logits,
):
    """All blocks, the last norm and the head; x (B * T, C) is overwritten, logits (B * T, V) filled.

    Each matrix is (weight, scale, bias), each norm (gain, bias), and gains are those of q and k, stacked over the
    layers.
    """
    # 每一行的算法与旁边有几行无关，逐位如此：speculation.py 靠它
    n_head, layernorm, qk_norm, activation, scale, eps = settings
    rows = x.shape[0]
    normed, qkv = np.empty(x.shape, np.float32), np.empty((rows, attn[0].shape[1]), np.float32)
    attended, fused = np.empty((rows, proj[0].shape[2]), np.float32), np.empty((rows, fc[0].shape[1]), np.float32)
    inner = np.empty((rows, out[0].shape[2]), np.float32) if activation == 4 else fused
    for i in range(attn[0].shape[0]):
        _normalise(x, norm_1[0][i], norm_1[1][i], layernorm, eps, normed)
        _linear(attn[0][i], attn[1][i], attn[2][i], normed, qkv, 0, False, pieces)
        _attend(
            qkv, keys[i], values[i], lengths, gains[0][i], gains[1][i], cos, sin, n_head, scale, qk_norm, eps, attended
        )
        _linear(proj[0][i], proj[1][i], proj[2][i], attended, x, 0, True, pieces)
        _normalise(x, norm_2[0][i], norm_2[1][i], layernorm, eps, normed)
        _linear(fc[0][i], fc[1][i], fc[2][i], normed, fused, activation, False, pieces)
        if activation == 4:
            _gate(fused, inner)
        _linear(out[0][i], out[1][i], out[2][i], inner, x, 0, True, pieces)
    _normalise(x, norm_f[0], norm_f[1], layernorm, eps, normed)
    _linear(head[0], head[1], head[2], normed, logits, 0, False, pieces)


def fits(model) -> bool:
    """Whether the model is made of the parts that are compiled here, in float32 or int8, on the CPU."""
    if model.device.type != "cpu" or model.dtype != torch.float32:
        return False
    if any(getattr(type(model), name) is not getattr(GPT, name) for name in ("embed", "hidden", "logits")):
        return False
    blocks = all(type(b) is Block and type(b.attn) is CausalSelfAttention and type(b.mlp) is MLP for b in model.h)
    known = (torch.nn.Linear, Int8Linear)
    linears = all(type(m) in known for b in model.h for m in (b.attn.c_attn, b.attn.c_proj, b.mlp.c_fc, b.mlp.c_proj))
    return blocks and linears and type(model.lm_head) in known and all(type(n) is NgramEmbedding for n in model.ngrams)


def is_compiled() -> bool:
    """Whether an earlier run left the compiled code on disk; else the first step takes some seconds."""
    return any(Path(_step.stats.cache_path).glob("fast_cpu._step-*.nbc"))


class FastStep:
    """Called as step(idx (B,), cache) -> logits (B, V); shares memory with the model's weights."""

    # 造一次：各层同名的矩阵叠成一个数组，模型自己的权重变成它的视图，不多占内存

    def __init__(self, model):
        c = model.config
        dtype = model.lm_head.weight.dtype
        self.max_rows, self.row_cost = MAX_ROWS[dtype], ROW_COST[dtype]
        # 与 torch 用同样多的线程：它只数物理核，超线程抢的是同一条内存通道
        self.model, self.pieces = model, min(torch.get_num_threads(), config.NUMBA_NUM_THREADS)
        set_num_threads(self.pieces)
        blocks = list(model.h)
        self.parts = (
            _norms([b.ln_1 for b in blocks], c.n_embd), _matrices([b.attn.c_attn for b in blocks]),
            tuple(_stacked([getattr(b.attn, name) for b in blocks], c.head_size, 1.0) for name in ("q_gain", "k_gain")),
            _matrices([b.attn.c_proj for b in blocks]), _norms([b.ln_2 for b in blocks], c.n_embd),
            _matrices([b.mlp.c_fc for b in blocks]), _matrices([b.mlp.c_proj for b in blocks]),
            tuple(part[0] for part in _norms([model.ln_f], c.n_embd)),
            tuple(part[0] for part in _matrices([model.lm_head])),
        )
        scale = np.float32(blocks[0].attn.scale)
        eps = np.float32(c.norm_eps)
        self.settings = (c.n_head, c.norm == "layernorm", c.qk_norm, ACTIVATIONS[c.activation], scale, eps)
        nothing = np.zeros((1, 0), np.float32)
        rope = c.position == "rope"
        self.cos = model.rope_cos.view(c.block_size, -1).numpy() if rope else nothing
        self.sin = model.rope_sin.view(c.block_size, -1).numpy() if rope else nothing

    def __call__(self, idx: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Logits behind idx; writes the cache as the model itself would."""
        return self.read(idx[:, None], cache)

    def read(self, idx: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Logits (B * T, V) behind every one of idx (B, T), bit-exactly those of T calls; writes the cache."""
        x = self.model.embed(idx, cache).flatten(0, 1).contiguous().numpy()
        logits = np.empty((idx.numel(), self.model.config.vocab_size), np.float32)
        lengths = np.array(cache.lengths)
        _step(
            x, *self.parts, self.settings, cache.k.numpy(), cache.v.numpy(), lengths, self.cos, self.sin, self.pieces,
            logits,
        )
        cache.advance(idx)
        return self.model.softcapped(torch.from_numpy(logits))


def _norms(norms: list[Norm], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Gains and biases (layers, size)."""
    return _stacked([n.weight for n in norms], size, 1.0), _stacked([n.bias for n in norms], size, 0.0)


def _stacked(vectors: list[torch.Tensor | None], size: int, missing: float) -> np.ndarray:
    """Vectors (layers, size); those that are not there are filled with `missing`."""
    return torch.stack([torch.full((size,), missing) if v is None else v.detach() for v in vectors]).numpy()


def _matrices(linears: list) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights (layers, N, K), scales and biases (layers, N); the linears' own weights become views of them."""
    if len(linears) == 1:
        weights = linears[0].weight.detach()[None]
    else:
        weights = torch.stack([m.weight.detach() for m in linears])
        for linear, view in zip(linears, weights):
            # 不留第二份：prefill 用的就是这块内存
            linear.weight.data = view
    ones, zeros = torch.ones(weights.shape[:2]), torch.zeros(weights.shape[:2])
    scales = torch.stack([m.scale for m in linears]) if isinstance(linears[0], Int8Linear) else ones
    biases = torch.stack([m.bias.detach() for m in linears]) if linears[0].bias is not None else zeros
    return weights.numpy(), scales.numpy(), biases.numpy()
