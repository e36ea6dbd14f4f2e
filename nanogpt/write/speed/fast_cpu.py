"""One decoding step of a GPT on the CPU as a single compiled function (numba, extra `fast`).

For some rows a token is bound by reading the weights once. Eager PyTorch reads them at half of the
memory's speed and spends as long again between its many small operations; here all cores read
disjoint parts of each matrix, in whatever number format, and nothing lies in between. Needs no C++ compiler;
the compiled code is kept on disk.
"""

# CPU 上的一步编译成一个函数：PyTorch 逐个小运算时，内存带宽只用到一半，运算之间又空等
# 这里各核各读一段权重，中间只在 meet 等齐；几个核跑的是同一个 _step，各算自己的一份（compiled.Crew）
# _step 是整个模型的一步，由上面几个小函数拼成，都直接写 float32 的数组
# 各种格式的乘法在 float_dot、integer_dot、int4_dot
# fits 说认不认得这个模型，FastStep 由 acceleration 装到模型上
# 与 core/model 是两份实现：模型的式子改了，这里要跟着改，否则 fits 要说不认得
# 编译结果缓存在磁盘上，第一次要几秒；行数超过 MAX_ROWS 时普通的路更快

from itertools import pairwise

import numpy as np
import torch
from numba import types
from numba.extending import overload

from nanogpt.core.attention import CausalSelfAttention
from nanogpt.core.kv_cache import KVCache
from nanogpt.core.loops import compiled
from nanogpt.core.loops.compiled import Crew, kernel, meet, part_of_kernel, share
from nanogpt.core.loops.numbers import as_array, cache_aligned, exp
from nanogpt.core.machine import use_large_pages
from nanogpt.core.model import GPT, MLP, Block, Norm
from nanogpt.core.ngrams import NgramEmbedding
from nanogpt.write.speed import float_dot, int4_dot, integer_dot
from nanogpt.write.speed.drawing import draw
from nanogpt.write.speed.embedding import Embedding
from nanogpt.write.speed.float_dot import LANES
from nanogpt.write.speed.formats import Bf16Linear
from nanogpt.write.speed.int4 import Int4Linear
from nanogpt.write.speed.int8 import Int8Linear
from nanogpt.write.speed.integer_dot import VNNI, activations
from nanogpt.write.speed.tiles import row_length

# 模型里的矩阵可以是哪几种，各叫什么
FORMATS = {torch.nn.Linear: "fp32", Bf16Linear: "bf16", Int8Linear: "int8", Int4Linear: "int4"}
# 至多几行走编译好的一步：96 行时 fp32 仍是普通的路的 0.7，int8、int4 0.6 ~ 0.8；bf16 到 24 行，再多用 bf16 单元更快
# 没有这样的单元，同 fp32（benchmarks/fast_rows.py，有 AVX-512）；更窄的向量没有量过，不放宽
# 定死而不在启动时量：量出的选择随机器忙闲而变，同一个种子就写不出同样的字
MAX_ROWS = {"fp32": 96, "bf16": 24, "int8": 96, "int4": 96} if LANES == 16 else {
    "fp32": 16, "bf16": 16, "int8": 48, "int4": 48,
}
# 一步里多一行要多花的时间，占第一行的几分之几（benchmarks/speculation.py）：fp32 0.06 ~ 0.12，bf16 0.12 ~ 0.14
# int8 0.08 ~ 0.11，int4 0.09 ~ 0.24；留余量，猜不中时不白读；没有 VNNI 的整数没有量过
ROW_COST = {"fp32": 0.2, "bf16": 0.2} | ({"int8": 0.15, "int4": 0.25} if VNNI else {"int8": 0.4, "int4": 0.4})
ACTIVATIONS = {"none": 0, "relu2": 1, "gelu": 2, "gelu_tanh": 3, "swiglu": 4}


@part_of_kernel
def _erf(x):
    """erf in float32, absolute error below 5e-7 (Abramowitz & Stegun 7.1.26)."""
    t = np.float32(1.0) / (np.float32(1.0) + np.float32(0.3275911) * abs(x))
    p = np.float32(0.0)
    for c in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        p = (p + np.float32(c)) * t
    y = np.float32(1.0) - p * exp(-x * x)
    return y if x >= 0 else -y


@kernel(reorder=True)
def _activate(y, start, stop, kind):
    """Apply the activation to columns start … stop of y (B, N) in place."""
    for b in range(y.shape[0]):
        # 切出一段、从 0 数起：numba 就知道下标不是负的，循环才成了 SIMD
        row = y[b, start:stop]
        if kind == 1:
            for n in range(len(row)):
                row[n] = max(row[n], np.float32(0.0)) ** 2
        elif kind == 2:
            for n in range(len(row)):
                row[n] = np.float32(0.5) * row[n] * (np.float32(1.0) + _erf(row[n] * np.float32(0.7071067811865476)))
        elif kind == 3:
            for n in range(len(row)):
                # (1 + tanh u) / 2 = 1 / (1 + e^-2u)
                u = np.float32(0.7978845608028654) * (row[n] + np.float32(0.044715) * row[n] * row[n] * row[n])
                row[n] = row[n] / (np.float32(1.0) + exp(min(np.float32(-2.0) * u, np.float32(87.0))))


def _products(matrix, x, acts, y, start, stop, add):
    """Columns start … stop of y (B, N) = x (B, K) matrix^T + bias, or added to y; matrix is (weight, scale, bias)."""


@overload(_products, inline="always")
def _products_of(matrix, x, acts, y, start, stop, add):
    # 编译时按权重的类型选一种乘法，_step 只写一遍
    dtype = matrix[0].dtype
    if dtype in (types.float32, types.int16):
        return lambda matrix, x, acts, y, start, stop, add: float_dot.products(
            matrix[0], matrix[2], x, y, start, stop, add
        )
    dot = {types.int8: integer_dot, types.uint8: int4_dot}[dtype].products
    return lambda matrix, x, acts, y, start, stop, add: dot(*matrix, acts, y, start, stop, add)


def _quantize(matrix, x, start, stop, acts):
    """Round rows start … stop of x into acts if such a matrix multiplies integers; whether it does."""


@overload(_quantize, inline="always")
def _quantize_of(matrix, x, start, stop, acts):
    if matrix[0].dtype in (types.float32, types.int16):
        return lambda matrix, x, start, stop, acts: False

    def quantize(matrix, x, start, stop, acts):
        integer_dot.quantize_rows(x, start, stop, acts)
        return True

    return quantize


@part_of_kernel
def _linear(matrix, x, acts, y, activation, add, part, size):
    """This part of y (B, N) = activation(x (B, K) matrix^T + bias), or added to y."""
    start, stop = share(len(matrix[2]), part, size, 16)
    _products(matrix, x, acts, y, start, stop, add)
    if 0 < activation < 4:
        _activate(y, start, stop, activation)


@part_of_kernel
def _layer(stacked, i):
    """Layer i of a matrix or norm whose parts are stacked over the layers."""
    return stacked[0][i], stacked[1][i], stacked[2][i]


@kernel(reorder=True)
def _gate(fused, y, start, stop):
    """silu(gate) * up of rows start … stop of fused (B, 2 I) = (gate, up) into y (B, >= I)."""
    size = fused.shape[1] // 2
    for b in range(start, stop):
        gates, ups, row = fused[b, :size], fused[b, size:], y[b]
        for i in range(size):
            row[i] = ups[i] * gates[i] / (np.float32(1.0) + exp(min(-gates[i], np.float32(87.0))))


@kernel(reorder=True)
def _normalise(x, gain, bias, layernorm, eps, y, start, stop):
    """LayerNorm or RMSNorm of rows start … stop of x (B, C) into y."""
    size = x.shape[1]
    for b in range(start, stop):
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


@kernel(reorder=True)
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


@kernel(reorder=True)
def _attend(qkv, keys, values, lengths, gains, cos, sin, settings, y, part, size):
    """Write the new keys and values from lengths[b] of keys, values (B, nkv, L, hs) on; attend into y (B * T, nh * hs).

    qkv (B * T, .) are T ids of each of B texts, one text after the other.
    """
    n_head, _, qk_norm, _, scale, eps = settings
    q_gain, k_gain = gains
    _, heads, longest, head_size = keys.shape
    # 一份 key 由几个 query 共用：同一个 job 先写它，再替它们读
    groups, steps = n_head // heads, qkv.shape[0] // lengths.shape[0]
    first, last_job = share(lengths.shape[0] * heads, part, size)
    q, out = np.empty(head_size, np.float32), np.empty(head_size, np.float32)
    weights = np.empty(longest, np.float32)
    for job in range(first, last_job):
        b, h = job // heads, job % heads
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
                    key, score = keys[b, h, t], np.float32(0.0)
                    for i in range(head_size):
                        score += q[i] * key[i]
                    weights[t] = score * scale
                    highest = max(highest, weights[t])
                total = np.float32(0.0)
                for t in range(last + 1):
                    weights[t] = exp(weights[t] - highest)
                    total += weights[t]
                out[:] = np.float32(0.0)
                for t in range(last + 1):
                    value = values[b, h, t]
                    for i in range(head_size):
                        out[i] += weights[t] * value[i]
                for i in range(head_size):
                    y[row, at + i] = out[i] / total


@kernel
def _step(part, crew, size, x, layers, norm_f, head, settings, keys, values, lengths, cos, sin, room, logits):
    """One part of all blocks, the last norm and the head; x (B * T, C) is overwritten, logits (B * T, V) filled.

    Each matrix is (weight, scale, bias), each norm (gain, bias), and gains are those of q and k, stacked over the
    layers; `room` is what FastStep._room() makes.
    """
    # 每一行的算法与旁边有几行、有几个线程都无关，逐位如此：speculation.py 靠它
    norm_1, attn, gains, proj, norm_2, fc, out = layers
    _, layernorm, _, activation, _, eps = settings
    normed, qkv, attended, fused, inner, acts, acts_attended, acts_inner = room
    start, stop = share(len(x), part, size)
    for i in range(len(gains[0])):
        _normalise(x, norm_1[0][i], norm_1[1][i], layernorm, eps, normed, start, stop)
        _quantize(attn, normed, start, stop, acts)
        meet(crew, size)
        _linear(_layer(attn, i), normed, acts, qkv, 0, False, part, size)
        meet(crew, size)
        _attend(
            qkv, keys[i], values[i], lengths, (gains[0][i], gains[1][i]), cos, sin, settings, attended, part, size
        )
        meet(crew, size)
        if _quantize(proj, attended, start, stop, acts_attended):
            meet(crew, size)
        _linear(_layer(proj, i), attended, acts_attended, x, 0, True, part, size)
        meet(crew, size)
        _normalise(x, norm_2[0][i], norm_2[1][i], layernorm, eps, normed, start, stop)
        _quantize(fc, normed, start, stop, acts)
        meet(crew, size)
        _linear(_layer(fc, i), normed, acts, fused, activation, False, part, size)
        meet(crew, size)
        if activation == 4:
            _gate(fused, inner, start, stop)
        if _quantize(out, inner, start, stop, acts_inner) or activation == 4:
            meet(crew, size)
        _linear(_layer(out, i), inner, acts_inner, x, 0, True, part, size)
        meet(crew, size)
    _normalise(x, norm_f[0], norm_f[1], layernorm, eps, normed, start, stop)
    _quantize(head, normed, start, stop, acts)
    meet(crew, size)
    _linear(head, normed, acts, logits, 0, False, part, size)


def fits(model) -> bool:
    """Whether the model is made of the parts that are compiled here, in one of FORMATS, on the CPU."""
    if model.device.type != "cpu" or model.dtype != torch.float32:
        return False
    if any(getattr(type(model), name) is not getattr(GPT, name) for name in ("embed", "hidden", "logits")):
        return False
    # 挂在哪一层上的 hook、换掉的 forward，这里都不会调用
    if any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules()):
        return False
    blocks = all(type(b) is Block and type(b.attn) is CausalSelfAttention and type(b.mlp) is MLP for b in model.h)
    if not blocks or any(type(n) is not NgramEmbedding for n in model.ngrams) or not Embedding.fits(model):
        return False
    return all(type(m) in FORMATS for m in (model.lm_head, *(m for b in model.h for m in _linears_of(b))))


def _linears_of(block: Block) -> tuple[torch.nn.Module, ...]:
    return block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj


def is_compiled() -> bool:
    """Whether an earlier run left the compiled code on disk; else the first step takes some seconds."""
    return compiled.is_kept(_step)


class FastStep:
    """Called as step(idx (B,), cache) -> logits (B, V); shares memory with the model's weights."""

    # 造一次：各层同名的矩阵叠成一个数组，模型自己的权重变成它的视图，不多占内存

    def __init__(self, model):
        c, blocks = model.config, list(model.h)
        widest = blocks[0].mlp.c_fc
        self.kind = FORMATS[type(widest)]
        self.max_rows = MAX_ROWS["fp32" if self.kind == "bf16" and not widest.native else self.kind]
        self.row_cost = ROW_COST[self.kind]
        self.model, self.crew, self.embedding = model, Crew(compiled.threads()), Embedding(model)
        attn, proj, fc, out = (_matrices(linears) for linears in zip(*map(_linears_of, blocks), strict=True))
        gains = tuple(_stacked([getattr(b.attn, g) for b in blocks], c.head_size, 1.0) for g in ("q_gain", "k_gain"))
        norm_1, norm_2 = (_norms([getattr(b, name) for b in blocks], c.n_embd) for name in ("ln_1", "ln_2"))
        self.layers = norm_1, attn, gains, proj, norm_2, fc, out
        self.norm_f = tuple(part[0] for part in _norms([model.ln_f], c.n_embd))
        self.head = tuple(part[0] for part in _matrices([model.lm_head]))
        scale = np.float32(blocks[0].attn.scale)
        eps = np.float32(c.norm_eps)
        self.settings = (c.n_head, c.norm == "layernorm", c.qk_norm, ACTIVATIONS[c.activation], scale, eps)
        nothing = np.zeros((1, 0), np.float32)
        # 上一步用的地方，行数没变就接着用：只在 crew 里碰它，那里一次只有一步
        self.last_room = 0, ()
        rope = c.position == "rope"
        self.cos = model.rope_cos.view(c.block_size, -1).numpy() if rope else nothing
        self.sin = model.rope_sin.view(c.block_size, -1).numpy() if rope else nothing

    def __call__(self, idx: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Logits behind idx; writes the cache as the model itself would."""
        return self.read(idx[:, None], cache)

    def read(self, idx: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Logits (B * T, V) behind every one of idx (B, T), bit-exactly those of T calls; writes the cache."""
        x = self.embedding(idx, cache)
        logits = cache_aligned((idx.numel(), self.model.config.vocab_size))
        self.crew.run(
            _step, x, self.layers, self.norm_f, self.head, self.settings, cache.k.numpy(), cache.v.numpy(),
            np.array(cache.lengths), self.cos, self.sin, self._room(len(x)), logits,
        )
        cache.lengths = [length + idx.size(1) for length in cache.lengths]
        return self.model.softcapped(torch.from_numpy(logits))

    def draw(self, *what) -> torch.Tensor:
        """drawing.draw() with this step's threads."""
        return draw(self.crew, *what)

    def _room(self, rows: int) -> tuple:
        """Room for what lies between the matrices: normed, qkv, attended, fused, inner, and each as int8."""
        before, room = self.last_room
        if before == rows:
            return room
        c, (_, attn, _, _, _, fc, _) = self.model.config, self.layers
        sizes = (c.n_embd, c.n_head * c.head_size, c.mlp_width)
        acts = [activations(rows, size, lanes=self.kind == "int8") for size in sizes]
        # 量化的由 acts 去乘：这里的一行就是一行
        length = row_length if self.kind in ("fp32", "bf16") else lambda size, _: size
        normed, attended, inner = (cache_aligned((rows, length(size, 4))) for size in sizes)
        qkv = cache_aligned((rows, attn[2].shape[1]))
        fused = cache_aligned((rows, fc[2].shape[1])) if c.activation == "swiglu" else inner
        room = normed, qkv, attended, fused, inner, *acts
        # 交出去的是这一份：别的线程随时会换掉留着的
        self.last_room = rows, room
        return room


def _norms(norms: list[Norm], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Gains and biases (layers, size)."""
    return _stacked([n.weight for n in norms], size, 1.0), _stacked([n.bias for n in norms], size, 0.0)


def _stacked(vectors: list[torch.Tensor | None], size: int, missing: float) -> np.ndarray:
    """Vectors (layers, size); those that are not there are filled with `missing`."""
    return torch.stack([torch.full((size,), missing) if v is None else v.detach() for v in vectors]).numpy()


def _matrices(linears: list) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights (layers, …), scales (layers, …) and biases (layers, N); the linears' own become views of them."""
    whole = tuple(_shared(linears, name) for name in ("weight", "scale"))
    use_large_pages(whole[0])
    biases = _stacked([m.bias for m in linears], linears[0].out_features, 0.0)
    return *map(as_array, whole), biases


def _shared(linears: list, name: str) -> torch.Tensor:
    """Tensors of that name (layers, …), of which the linears' own become views."""
    parts = [getattr(m, name, None) for m in linears]
    if parts[0] is None:
        return torch.zeros(len(linears), 0)
    if len(parts) == 1:
        return parts[0].detach()[None]
    apart = {b.data_ptr() - a.data_ptr() for a, b in pairwise(parts)}
    if apart == {parts[0].nbytes} and parts[0].untyped_storage().nbytes() == len(parts) * parts[0].nbytes:
        # 换算时就挨着放好了（formats.rooms）
        return parts[0].as_strided((len(parts), *parts[0].shape), (parts[0].numel(), *parts[0].stride()), 0)
    whole = torch.empty(len(parts), *parts[0].shape, dtype=parts[0].dtype)
    for view, part in zip(whole, parts, strict=True):
        # 一层一层地搬：不留第二份，prefill 用的就是这块内存
        part.data = view.copy_(part.detach())
    return whole
