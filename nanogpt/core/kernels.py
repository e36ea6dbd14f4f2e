# 核心里所有“怎么算才快”的小算子：每个都有一句话的数学定义，读模型时可以跳过这里
# PyTorch 逐个运算地做，一串逐元素的小运算要读写内存三到七遍，CPU 上与矩阵乘一样贵，所以自己写前向与反向
# 要按设备选算法的，只问张量自己（device_type）；规划显存时由 plan/substitutes 从外面换掉其中几个函数
"""Small operations that the model, the loss and the optimizers are made of, each written for speed."""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.optim.adamw import adamw as adamw_kernel

from nanogpt.core.machine import any_kernels, in_float64

# 两种写法都给同样的 rms_norm，显式写出才不随 dtype 变
RMS_EPS = 1e-6
# CPU 上 T 不超过它时，存下概率矩阵比 flash 重算更快；bf16 的矩阵小一半，flash 却更慢（1024 时两倍）
SHORT_CONTEXT, SHORT_CONTEXT_BF16 = 512, 1024
# 一次这么多个 query，只配它们看得到的 key：因果的那一半不算，512 时快一倍多
QUERIES = 128
# 长边是短边的这么多倍时，在 Gram 矩阵上迭代的运算才少；比这还小的矩阵，多出的调用次数更贵
GRAM_RATIO, GRAM_ROWS = 2, 64
# Gram 矩阵里舍入的负特征值每步放大 12 倍：这么多步之后就重新算一次；bf16 粗 16 位，3 步时误差与直接迭代一样，5 步就发散
GRAM_STEPS = {torch.float32: 5, torch.bfloat16: 3}
# 词表大过它：CPU 上筛时不全排一遍（五万个词要几毫秒，比 8 位权重的一步还久），抽时一段一段地抽，一段 PART 个
LARGE, PART = 4096, 256
# NS 五步的系数：让奇异值尽快靠近 1，不求精确收敛（Keller Jordan, 2024）
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def device_type(x: torch.Tensor) -> str:
    """cpu | cuda | xpu | mps: where x is computed with."""
    return x.device.type


def _reciprocal_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    # 半精度的平方和会丢位，在 fp32 里求
    wide = torch.promote_types(x.dtype, torch.float32)
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square_()
    return square.div_(x.size(-1)).add_(eps).rsqrt_()


class _RMSNorm(torch.autograd.Function):
    """y = x * r with r = (mean(x^2) + eps)^-1/2; dx = r * (g - y * mean(g * y))."""

    @staticmethod
    def forward(ctx, x, eps):
        r = _reciprocal_rms(x, eps)
        y = (x * r).to(x.dtype)
        # y 本来就要留给后面的线性层，存它不多占内存
        ctx.save_for_backward(y, r)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, r = ctx.saved_tensors
        mean = (grad * y).sum(-1, keepdim=True, dtype=r.dtype).div_(y.size(-1))
        return torch.addcmul(grad, y, mean.to(y.dtype), value=-1).mul_(r.to(y.dtype)), None


def rms_norm(x: torch.Tensor, gain: torch.Tensor | None = None, eps: float = RMS_EPS) -> torch.Tensor:
    """RMSNorm over the last dimension (arXiv:1910.07467), times a gain of its size if there is one."""
    # fp32 的增益会把半精度的激活悄悄提升
    gain = None if gain is None else gain.to(x.dtype)
    # GPU 与 torch.compile 自带融合的实现
    if device_type(x) == "cpu" and not torch.compiler.is_compiling():
        y = _RMSNorm.apply(x, eps)
        return y if gain is None else y * gain
    return fused_rms_norm(x, gain, eps)


def fused_rms_norm(x: torch.Tensor, gain: torch.Tensor | None, eps: float) -> torch.Tensor:
    """The same in one kernel of PyTorch's."""
    # 有的版本的 autocast 会把它提到 fp32：q、k 跟着变宽，就用不上 flash 了
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x, (x.size(-1),), gain, eps)


class _SquaredReLU(torch.autograd.Function):
    """relu(x)^2; eager autograd would keep x and relu(x) and pass over them four times more."""

    # 只留 relu(x)：反向一次乘法就得出 2·relu(x)·grad

    @staticmethod
    def forward(ctx, x):
        r = x.relu()
        ctx.save_for_backward(r)
        return r.square()

    @staticmethod
    def backward(ctx, grad):
        (r,) = ctx.saved_tensors
        # 加在 0 上：乘 2 不另走一遍
        return torch.addcmul(grad.new_zeros(()), grad, r, value=2)


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """relu(x)^2, which keeps one tensor for the backward pass."""
    return _SquaredReLU.apply(x)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up of x = (gate, up) along the last dimension; eager autograd would keep silu(gate) as well."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        grads = torch.empty_like(x)
        of_gate, of_up = grads.chunk(2, dim=-1)
        of_up.copy_(F.silu(gate)).mul_(grad)
        of_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        return grads


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (..., n) of x = (gate, up) (..., 2 n) (arXiv:2002.05202), which keeps x for the backward pass."""
    return _SwiGLU.apply(x)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU by the tanh of its approximation (arXiv:1606.08415)."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {
    # ReLU² 只有比较和乘法，CPU 上比 GELU 快几倍，loss 不差（Primer, arXiv:2109.08668）
    "relu2": squared_relu, "swiglu": swiglu,
    # GPT-2 原版用 tanh 近似的 GELU，导入权重时必须一致
    "gelu_tanh": gelu_tanh, "gelu": F.gelu,
}


def beginnings(idx: torch.Tensor, config) -> torch.Tensor | None:
    """Where packed documents begin, (B, T) bool: at separators, or at marked ids, which are negative; None: nowhere."""
    if config.marked:
        return idx < 0
    return None if config.separator is None else idx == config.separator


def _swap_halves(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((second, first), dim=-1)


class _Rotate(torch.autograd.Function):
    """A rotation is orthogonal: its backward is the rotation by the negative angle."""

    # 存下 cos、sin 就够了，不必留输入

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return torch.addcmul(x * cos, _swap_halves(x), sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return torch.addcmul(grad * cos, _swap_halves(grad), sin, value=-1), None, None


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x (B, T, ..., hs) by position; the pairs are (i, i + hs/2)."""
    # 前后两半配对，内存连续，比奇偶交错配对快；表转成 x 的类型，免得半精度激活被悄悄提升
    return _Rotate.apply(x, cos.to(x.dtype), sin.to(x.dtype))


class Arrangement:
    """q, k and v as the products of short_attention() read them, q and k normalised and rotated, and the way back."""

    def __init__(self, eps: float | None, rope: tuple[torch.Tensor, torch.Tensor] | None):
        """eps: of the RMSNorm; rope: rope_table()'s rows of the T positions; None: without."""
        self.eps = eps
        self.rope = None if rope is None else tuple(table.view(-1, table.size(-1)) for table in rope)

    def pack(self, parts: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, tuple]:
        """(3, B * nh, T, hs) of parts that make (B, T, 3, nh, hs) when joined along dimension 2; and what unpack()
        wants besides."""
        # 拼接与换轴一次做完；换过轴之后内存连续，逐元素的运算快几倍：归一化与旋转放在这里做
        packed = torch.cat([part.permute(2, 0, 3, 1, 4) for part in parts]).flatten(1, 2)
        if self.eps is None and self.rope is None:
            return packed, (None, None)
        # 全程 fp32：bf16 的每个小运算都要先转过去再转回来，反而慢
        qk, y, r = packed[:2], None, None
        x = qk.to(torch.promote_types(qk.dtype, torch.float32))
        if self.eps is not None:
            r = _reciprocal_rms(x, self.eps)
            y = x.mul_(r).to(qk.dtype, copy=True)
        if self.rope is not None:
            swapped = _swap_halves(x)
            x.mul_(self.rope[0]).addcmul_(swapped, self.rope[1])
        # fp32 时 x 就是 qk
        qk.copy_(x)
        return packed, (y, r)

    def unpack(self, grads: torch.Tensor, batch: int, kept: tuple) -> torch.Tensor:
        """(B, T, 3, nh, hs), the gradient of what pack() got, from that of what it made, which it overwrites."""
        y, r = kept
        if r is not None or self.rope is not None:
            grad = grads[:2]
            g = grad.to(torch.promote_types(grad.dtype, torch.float32))
            if self.rope is not None:
                swapped = _swap_halves(g)
                g.mul_(self.rope[0]).addcmul_(swapped, self.rope[1], value=-1)
            if r is not None:
                y = y.to(g.dtype)
                mean = (g * y).sum(-1, keepdim=True).div_(y.size(-1))
                g.addcmul_(y, mean, value=-1).mul_(r)
            grad.copy_(g)
        return grads.unflatten(1, (batch, -1)).permute(1, 3, 0, 2, 4)


def drawn_bytes(like: torch.Tensor, p: float) -> tuple[torch.Tensor, int]:
    """Random bytes in the shape of `like`, and how many of their 256 values a dropout of p drops: the lowest."""
    # CPU 上 bernoulli_ 一个元素要 6 ns，六层 384 宽的一步里占四分之一；一个 64 位随机数当八个元素用，便宜十倍
    # p 因此舍入到 1/256，倍数照真正丢掉的份额算，期望不变
    drawn = torch.empty((like.numel() + 7) // 8, dtype=torch.int64).random_(torch.iinfo(torch.int64).min, None)
    return drawn.view(torch.uint8)[: like.numel()].view(like.shape), min(255, max(1, round(p * 256)))


def _kept(like: torch.Tensor, p: float) -> tuple[torch.Tensor, float]:
    """1 for the elements that a dropout of p keeps, else 0, uint8; and the factor that makes up for the others."""
    drawn, dropped = drawn_bytes(like, p)
    # 就地比较、留作 uint8：bool 乘 bf16 要先转换，慢三倍
    return drawn.ge_(dropped), 256 / (256 - dropped)


class _Dropout(torch.autograd.Function):
    """x * kept * factor, which keeps one byte per element for the backward pass."""

    @staticmethod
    def forward(ctx, x, p):
        kept, ctx.factor = _kept(x, p)
        ctx.save_for_backward(kept)
        return (x * kept).mul_(ctx.factor)

    @staticmethod
    def backward(ctx, grad):
        (kept,) = ctx.saved_tensors
        return (grad * kept).mul_(ctx.factor), None


def dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """x with a share p of its elements zero and the others larger by as much; on a CPU p is rounded to 1/256."""
    if device_type(x) == "cpu" and not torch.compiler.is_compiling():
        return _Dropout.apply(x, p)
    return F.dropout(x, p)


class Dropout(torch.nn.Dropout):
    """dropout() while training."""

    dropout = staticmethod(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(x, self.p) if self.training and self.p else x


class _ShortAttention(torch.autograd.Function):
    """dropout(softmax(scale * q k^T)) v of some queries at a time, each with two products, and four on the way back."""

    @staticmethod
    def forward(ctx, scale, visible, dropout, arrangement, *parts):
        B, T, _, nh, hs = parts[0].shape
        packed, kept_qk = arrangement.pack(parts)
        q, k, v = packed
        mask = torch.full((min(T, QUERIES), T), float("-inf"), dtype=q.dtype)
        out, kept_of, ctx.factor = torch.empty_like(q), [], 1.0
        for start, stop in _spans(T):
            # 这几个 query 看不到 stop 之后的：不去算那一块，也不存；缩放与掩码都并进矩阵乘，不再各走一遍内存
            here = mask[: stop - start, :stop].triu(start + 1)
            p = torch.baddbmm(here, q[:, start:stop], k[:, :stop].mT, alpha=scale)
            if visible is not None:
                # 每行的文章边界不同，只好再走一遍；因果部分已经遮好
                p.view(B, nh, stop - start, stop).masked_fill_(~visible[..., start:stop, :stop], float("-inf"))
            p = p.softmax(dim=-1)
            kept, ctx.factor = _kept(p, dropout) if dropout else (None, 1.0)
            torch.bmm(p if kept is None else p * kept, v[:, :stop], out=out[:, start:stop])
            kept_of += [p, kept]
        ctx.save_for_backward(packed, *kept_qk, *kept_of)
        ctx.scale, ctx.arrangement = scale, arrangement
        ctx.sizes = [part.size(2) for part in parts]
        out = out.view(B, nh, T, hs)
        # 不就地乘：分段重算会留着乘积，不许改
        return out * ctx.factor if dropout else out

    @staticmethod
    def backward(ctx, grad):
        (q, k, v), *kept_of = ctx.saved_tensors
        kept_qk, kept_of = kept_of[:2], kept_of[2:]
        B, nh, T, hs = grad.shape
        grad = grad.reshape(B * nh, T, hs)
        if ctx.factor != 1:
            # dv 与 grad_p 都由它乘出：在最小的张量上放大一次就够了
            grad = grad * ctx.factor
        # 直接写进同一块内存，缩放也并进乘法；从最后几个 query 起：它们看得到全部 key，写满，前面的再加上去
        packed = torch.empty((3, B * nh, T, hs), dtype=q.dtype)
        of_q, of_k, of_v = packed
        for number, (start, stop) in reversed(list(enumerate(_spans(T)))):
            p, kept = kept_of[2 * number : 2 * number + 2]
            grad_p, used = torch.bmm(grad[:, start:stop], v[:, :stop].mT), p
            if kept is not None:
                grad_p.mul_(kept)
                used = p * kept
            grad_s = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
            beta = 0 if stop == T else 1
            of_q[:, start:stop].baddbmm_(grad_s, k[:, :stop], beta=0, alpha=ctx.scale)
            of_k[:, :stop].baddbmm_(grad_s.mT, q[:, start:stop], beta=beta, alpha=ctx.scale)
            of_v[:, :stop].baddbmm_(used.mT, grad[:, start:stop], beta=beta)
        grads = ctx.arrangement.unpack(packed, B, kept_qk).split(ctx.sizes, dim=2)
        return None, None, None, None, *grads


def _spans(T: int) -> list[tuple[int, int]]:
    """Which queries are taken at a time: from start to stop, QUERIES of them."""
    return [(start, min(T, start + QUERIES)) for start in range(0, T, QUERIES)]


def is_short(qkv: torch.Tensor, dropout: float) -> bool:
    """Whether short_attention() beats SDPA on qkv (B, T, 3, nh, hs): on a CPU, with a short context, not in half."""
    if device_type(qkv) != "cpu" or torch.compiler.is_compiling():
        return False
    # 要丢弃的 SDPA 在 CPU 上没有 flash：也存下整个概率矩阵，而且多存几份，多长都是这里快
    length = 0 if dropout else qkv.size(1)
    if qkv.dtype == torch.bfloat16:
        # 没有 bf16 单元的 CPU 上小矩阵乘很慢，仍交给 SDPA；用得上单元的训练才开 autocast
        return length <= SHORT_CONTEXT_BF16 and torch.is_autocast_enabled("cpu")
    return length <= SHORT_CONTEXT and qkv.dtype in (torch.float32, torch.float64)


NO_ARRANGEMENT = Arrangement(None, None)


def short_attention(
    scale: float, visible: torch.Tensor | None, *parts: torch.Tensor,
    dropout: float = 0.0, arrangement: Arrangement = NO_ARRANGEMENT,
) -> torch.Tensor:
    """Causal attention (B, nh, T, hs) of parts that make q, k, v (B, T, 3, nh, hs) when joined along dimension 2.

    Keys and values may have fewer heads, a divisor of nh. What `arrangement` does to q and k comes first.
    """
    heads = parts[0].size(3)
    # 上下文短，抄几份 key 也不多
    parts = [part if part.size(3) == heads else part.repeat_interleave(heads // part.size(3), dim=3) for part in parts]
    return _ShortAttention.apply(scale, visible, dropout, arrangement, *parts)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask, dropout: float, scale: float) -> torch.Tensor:
    """SDPA of q (B, nh, T, hs) with k, v (B, nkv, L, hs); nkv divides nh.

    If T > 1 and there is no mask, it is causal, and the queries are those of the last T positions.
    """
    T, L = q.size(2), k.size(2)
    if mask is None and 1 < T < L:
        # SDPA 自己的因果从第一个 key 对起；单 token 续写时每个 key 都看得到
        mask = torch.ones(T, L, dtype=torch.bool, device=q.device).tril(L - T)
    settings = {"is_causal": T > 1 and mask is None, "dropout_p": dropout, "scale": scale}
    shape, groups = q.shape, q.size(1) // k.size(1)
    if groups > 1 and T == 1:
        # 只有一个位置：共用一份 key 的几个 head 当作几个位置，哪种 kernel 都不必抄 key
        q = q.reshape(q.size(0), k.size(1), groups, q.size(3))
    elif groups > 1 and mask is None and _has_flash(q):
        settings["enable_gqa"] = True
    elif groups > 1:
        # 别的 kernel 不认分组，会退回到存下整个概率矩阵的那一种
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if device_type(q) == "mps":
        # 那里的 SDPA 读换过轴的张量会读错（pytorch#181133、#163597）
        q, k, v = (t.contiguous() for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **settings).reshape(shape)


def _has_flash(q: torch.Tensor) -> bool:
    """Whether SDPA takes its flash kernel where q is computed with, which shares keys among heads by itself."""
    if device_type(q) != "cuda":
        return device_type(q) == "cpu"
    half = q.dtype in (torch.float16, torch.bfloat16)
    # 规划时张量不在卡上：当作 30 系以后的卡
    return half and (q.device.type != "cuda" or torch.cuda.get_device_capability(q.device) >= (8, 0))


def cross_entropy(
    logits: torch.Tensor, expected: torch.Tensor, V: int, softcap: float, need_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(losses (rows, 1), d(sum of losses)/d(logits) in their dtype) of logits (rows, >= V), of which the first V
    columns count.

    The gradient lies where the logits lay if there are further columns, which stay as they are.
    """
    dtype, buffer, logits = logits.dtype, logits if logits.size(1) > V else None, logits[:, :V]
    # 半精度的指数和会丢小概率：softmax 与求和至少用 fp32
    wide = torch.promote_types(dtype, torch.float32)
    if softcap:
        squashed = (logits.to(wide) / softcap).tanh_()
        logits = squashed * softcap
    if device_type(logits) != "cpu":
        # 显卡上一个 kernel 就得出 log-probs；logsumexp 要把词表那么宽的内存走五遍
        log_p, logits = torch.log_softmax(logits, dim=-1, dtype=wide), None
        losses = -log_p.gather(1, expected)
    else:
        logits = logits.to(wide)
        log_z = torch.logsumexp(logits, dim=-1, keepdim=True)
        losses = log_z - logits.gather(1, expected)
        log_p = logits.sub_(log_z) if need_grad else None
    if not need_grad:
        return losses, None
    # softmax - onehot，量级为 1：半精度里也不下溢，1/N 留到反向再乘
    grad = log_p.exp_()
    with any_kernels():
        # 每行只有一个下标，怎么加都一样；deterministic=true 却会为它排序，每块多十几个 kernel
        grad.scatter_add_(1, expected, torch.full_like(expected, -1, dtype=grad.dtype))
    if softcap:
        # 就地算 1 - squashed²：词表那么宽的临时张量，每个都是一整块
        grad *= squashed.square_().neg_().add_(1)
    if buffer is None:
        return losses, grad.to(dtype)
    buffer[:, :V].copy_(grad)
    return losses, buffer


def aligned(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight in `dtype`; on a card, where that is a copy anyway, with rows of zeros up to a multiple of 64."""
    V = weight.size(0)
    if device_type(weight) != "cuda" or weight.dtype == dtype or V % 8 == 0:
        return weight.to(dtype)
    # GPT-2 的 50257 行对不齐 16 字节，张量核心的乘法要慢得多
    w = torch.empty(V + -V % 64, weight.size(1), dtype=dtype, device=weight.device)
    w[:V].copy_(weight)
    w[V:].zero_()
    return w


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add a @ b (n, m) to `total` (n, m), which may be float32 beside factors in 16 bits."""
    if total.dtype != a.dtype and sums_in_product(total):
        # 乘法自己累加进 fp32：省去与词表同大的临时张量，以及读写它的三遍
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(torch.mm(a, b))


def chunk_by_chunk(work: Callable[[int], None], total: int, rows: int) -> None:
    """work(start) for every chunk of `rows` out of `total`, one after the other."""
    # 规划只追踪各种大小的第一块，见 plan/substitutes
    for start in range(0, total, rows):
        work(start)


def sums_in_product(total: torch.Tensor) -> bool:
    """Whether products of 16-bit matrices can be added to `total` in float32 in place, where it lies (torch >= 2.8)."""
    return _sums_in_product(total.device)


@functools.cache
def _sums_in_product(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    a, total = torch.ones(16, 16, dtype=torch.float16, device=device), torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())


def adamw(parameters: list, gradients: list, states: tuple[list, list, list], group: dict, skip) -> None:
    """One AdamW update (Loshchilov & Hutter, arXiv:1711.05101) through torch's fused kernel, unless `skip` () is 1.0.

    states: first moments, second moments, numbers of updates.
    """
    if skip is not None and device_type(parameters[0]) == "mps":
        # MPS 的 kernel 收下 found_inf 却不看：只好问一次
        if skip.item():
            return
        skip = None
    # fused：一个 kernel 更新全部张量，CPU 与 CUDA、XPU、MPS 都有
    adamw_kernel(
        parameters, gradients, *states[:2], [], states[2], fused=True, amsgrad=False, found_inf=skip,
        beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"],
        eps=group["eps"], maximize=False,
    )


def subtract(weights: list[torch.Tensor], updates: list[torch.Tensor], rate: float | torch.Tensor) -> None:
    """Subtract rate times its update from each weight in place; a rate () on the device overwrites the updates."""
    if isinstance(rate, torch.Tensor):
        # alpha 只能是主机上的数
        torch._foreach_mul_(updates, rate)
        torch._foreach_sub_(weights, updates)
    else:
        torch._foreach_add_(weights, updates, alpha=-rate)


def update_rows(
    weights: torch.Tensor, gradient: torch.Tensor, squares: torch.Tensor, step: torch.Tensor, group: dict, skip,
) -> None:
    """One update of a look-up table (rows, cols) in place: rows without a gradient stay as they are, the others move
    against theirs, divided by the root of its mean square; nothing changes if `skip` () is 1.0.

    squares (rows, 1): running means of the squares, as group["betas"][1] says; step (): number of updates before.
    Row-wise adaptive rates as in FBGEMM's row-wise AdaGrad, over a running mean. Overwrites a float32 gradient.
    """
    # 一行隔很多步才查到一次：AdamW 的动量在没有梯度的步里还推着它走，读写的又都是整张表，占三份内存
    # 实测与 AdamW 一样好（差在种子之间的差以内），状态却只有一行一个数
    gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    length = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
    used, beta = length > 0, group["betas"][1]
    if skip is not None:
        used = used & (skip == 0)
    squares.copy_(torch.where(used, squares.lerp(length.square_().div_(gradient.size(1)), 1 - beta), squares))
    # 没有用过的行全是 0：加上 eps 就不会是 0/0
    rate = group["lr"] / (squares / (1 - beta ** (step + 1))).sqrt_().add_(group["eps"])
    change = gradient.mul_(rate)
    if skip is not None:
        # 坏的一步里是 NaN：乘 0 还是 NaN
        change.masked_fill_(skip > 0, 0.0)
    weights.sub_(change.to(weights.dtype))


def orthogonalize(matrices: torch.Tensor, steps: int, bf16: bool = False) -> torch.Tensor:
    """Push the singular values of each matrix in (n, rows, cols) towards 1 by Newton-Schulz iteration.

    In bf16 on CUDA, elsewhere only if asked for.
    """
    # 没有 bf16 矩阵单元的 CPU 上 fp32 反而快
    x = matrices.bfloat16() if bf16 or device_type(matrices) == "cuda" else matrices.float()
    # 始终让行数较少：Gram 矩阵取小的那一边
    wide = x.size(1) <= x.size(2)
    x = x if wide else x.mT
    # Frobenius 范数 ≥ 谱范数，除以它保证迭代收敛
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    # 显卡上小矩阵的乘积本来就快，不值得多启动几次
    on_gram = device_type(matrices) != "cuda" and x.size(1) >= GRAM_ROWS and x.size(2) >= GRAM_RATIO * x.size(1)
    x = _iterated_on_gram(x, steps) if on_gram else _iterated(x, steps)
    x = x if wide else x.mT
    # 转置过来的要排成权重的样子，foreach 才能一次启动
    return x.to(matrices.dtype, memory_format=torch.contiguous_format) if x.dtype != matrices.dtype else x


def _iterated(x: torch.Tensor, steps: int) -> torch.Tensor:
    """x <- a x + b (x x^T) x + c (x x^T)^2 x, `steps` times."""
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def _iterated_on_gram(x: torch.Tensor, steps: int) -> torch.Tensor:
    """_iterated() on g = x x^T, (n, rows, rows): the steps' factors p = a + b g + c g^2 commute with it and each other.

    With them g becomes p g p, and their product times x is the result: fewer FLOPs where x is long.
    """
    a, b, c = NEWTON_SCHULZ
    most = GRAM_STEPS[x.dtype]
    for first in range(0, steps, most):
        gram, product = torch.bmm(x, x.mT), None
        for left in range(min(most, steps - first), 0, -1):
            factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            factor.diagonal(dim1=1, dim2=2).add_(a)
            product = factor if product is None else torch.bmm(factor, product)
            if left > 1:
                gram = torch.bmm(torch.bmm(factor, gram), factor)
        x = torch.bmm(product, x)
    return x


def orthogonalized(matrices: list[torch.Tensor], group: dict) -> list[torch.Tensor]:
    """Each matrix (rows, cols) with its singular values pushed towards 1 as a Muon group's ns_steps and ns_bf16 say;
    those of one shape are batched."""
    by_shape: dict[tuple, list[int]] = {}
    for i, matrix in enumerate(matrices):
        # qkv 三块各自正交化，合在一起会互相牵制
        by_shape.setdefault(tuple(matrix.shape), []).append(i)
    results: list[torch.Tensor] = list(matrices)
    for indices in by_shape.values():
        # 同形状的矩阵堆在一起做批量乘法，小模型上快数倍
        batch = torch.stack([matrices[i] for i in indices]) if len(indices) > 1 else matrices[indices[0]][None]
        for i, update in zip(indices, orthogonalize(batch, group["ns_steps"], group["ns_bf16"]), strict=True):
            results[i] = update
    return results


def portions(named: list[tuple[str, torch.Tensor]], most_bytes: int) -> list[list[tuple[str, torch.Tensor]]]:
    """The pairs (their tensors, or shapes) in lists of at most most_bytes of float32 matrices, but at least one."""
    lists, size = [], most_bytes
    for name, p in named:
        size += 4 * p.numel()
        if size > most_bytes:
            lists.append([])
            size = 4 * p.numel()
        lists[-1].append((name, p))
    return lists


def update_scale(shape: torch.Size) -> float:
    """What an orthogonal matrix is multiplied with to have the RMS of an AdamW update."""
    return 0.2 * math.sqrt(max(shape))


def smallest_set(probabilities: torch.Tensor, rank_by: torch.Tensor, mass: float) -> torch.Tensor:
    """Which ids (B, V) come first in ascending order of rank_by until their probability reaches `mass`; at least one.

    Of equals the lower id comes first.
    """
    if device_type(probabilities) == "cpu" and probabilities.size(-1) > LARGE:
        # 一行一行：各行只排哪一小堆，由这一行的数定；显卡上问一次就得等一次，不这样做
        return torch.stack([_smallest_of_row(*row, mass) for row in zip(probabilities, rank_by, strict=True)])
    # 稳定排序：并列时 id 小的在前
    order = rank_by.argsort(dim=-1, stable=True)
    ordered = in_float64(probabilities.gather(-1, order))
    # 排在前面的合计已经达到 mass，就不再需要；float64 里求和，词表大也不丢位
    kept = ordered.cumsum(-1) - ordered < mass
    kept[:, 0] = True
    return torch.zeros_like(rank_by, dtype=torch.bool).scatter_(1, order, kept.to(rank_by.device))


def _smallest_of_row(probabilities: torch.Tensor, rank_by: torch.Tensor, mass: float) -> torch.Tensor:
    """smallest_set() of one row (V,): only those near its border are put in order."""
    # 浮点数的次序就是位的次序（负数反过来；加 0 使 -0 成 0）：按前 16 位分堆，界线落在哪一堆，只排那一堆
    bits = (rank_by + 0.0).view(torch.int32)
    heap = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> 16
    heap -= heap.min()
    within = torch.bincount(heap, weights=probabilities.double())
    total = within.cumsum(0)
    border = min(int(torch.searchsorted(total, mass)), len(total) - 1)
    ids = (heap == border).nonzero()[:, 0]
    # 稳定排序：并列时 id 小的在前
    order = ids[rank_by[ids].argsort(stable=True)]
    ordered = probabilities[order].double()
    kept = (total - within)[border] + ordered.cumsum(0) - ordered < mass
    # 至少一个：前面一堆也没有时
    kept[0] |= border == 0
    return (heap < border).index_fill_(0, order[kept], True)


def inverse_cumulative(probabilities: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """The ids (B,) at which the sums of probabilities (B, V) pass this share (B,) in [0, 1) of the whole."""
    V, share = probabilities.size(-1), in_float64(share)[:, None]
    if V <= LARGE:
        sums = _sums(probabilities)
        return _place(sums, share * sums[:, -1:]).to(probabilities.device)[:, 0]
    # 先定落在哪一段，再在段里定哪一个：五万个词不必逐个累加，32 行时 CPU 上快十倍
    whole = V // PART * PART
    parts = (probabilities[:, :whole].unflatten(-1, (-1, PART)).sum(-1), probabilities[:, whole:].sum(-1, keepdim=True))
    sums = _sums(torch.cat(parts, dim=-1))
    target = share * sums[:, -1:]
    part = _place(sums, target)
    ids = part.to(probabilities.device) * PART + torch.arange(PART, device=probabilities.device)
    inside = _sums(probabilities.gather(-1, ids.clamp(max=V - 1)).masked_fill_(ids >= V, 0.0))
    # 段的和与段里逐个的和差在舍入：落点总要在段里
    rest = torch.minimum((target - sums.gather(-1, part)).clamp_(min=0), inside[:, -1:] * (1 - 2**-52))
    return ids.gather(-1, _place(inside, rest).to(ids.device))[:, 0]


def _sums(masses: torch.Tensor) -> torch.Tensor:
    """(B, n + 1): the sums of the first 0, 1 … n of masses (B, n)."""
    # float64 的累加：尾巴也不会被舍入吞掉
    return F.pad(in_float64(masses).cumsum(-1), (1, 0))


def _place(sums: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Which of the masses behind the sums (B, n + 1) target (B, 1) falls into, (B, 1)."""
    # right=True：概率为 0 的 id 不占任何区间，永远抽不到；不是有限数的行抽到什么都不算数，但不许越界
    return (torch.searchsorted(sums, target, right=True) - 1).clamp_(0, sums.size(-1) - 2)
