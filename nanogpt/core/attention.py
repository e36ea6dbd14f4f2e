"""Causal self-attention, rotary position embedding and the key/value cache.

Small element-wise chains are autograd functions of their own: eager PyTorch would make three to
seven passes over memory for each, which on a CPU costs as much as the matrix products.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanogpt.core import planned_device

# 两种写法都给同样的 rms_norm，显式写出才不随 dtype 变
RMS_EPS = 1e-6
# 归一化后 q·k 不超过 hs；除以 hs 再乘它，注意力足够尖锐，与 head 大小无关
QK_NORM_MAX_LOGIT = 12.0
# CPU 上 T 不超过它时，存下整个 T x T 概率矩阵比 flash 重算更快
SHORT_CONTEXT = 128


class _RMSNorm(torch.autograd.Function):
    """y = x * r with r = (mean(x^2) + eps)^-1/2; dx = r * (g - y * mean(g * y))."""

    @staticmethod
    def forward(ctx, x):
        # 半精度的平方和会丢位，在 fp32 里求
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)).square_()
        r = square.div_(x.size(-1)).add_(RMS_EPS).rsqrt_()
        y = (x * r).to(x.dtype)
        # y 本来就要留给后面的线性层，存它不多占内存
        ctx.save_for_backward(y, r)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, r = ctx.saved_tensors
        mean = (grad * y).sum(-1, keepdim=True, dtype=r.dtype).div_(y.size(-1))
        return torch.addcmul(grad, y, mean.to(y.dtype), value=-1).mul_(r.to(y.dtype))


def rms_norm(x: torch.Tensor) -> torch.Tensor:
    """RMSNorm without a gain over the last dimension (arXiv:1910.07467)."""
    # GPU 与 torch.compile 自带融合的实现
    if planned_device.device_type(x) == "cpu" and not torch.compiler.is_compiling():
        return _RMSNorm.apply(x)
    if planned_device.planned():
        return planned_device.FusedRMSNorm.apply(x)
    # 有的版本的 autocast 会把它提到 fp32：q、k 跟着变宽，就用不上 flash 了
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x, (x.size(-1),), eps=RMS_EPS)


def rope_table(head_size: int, length: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and signed sin, (length, 1, 1, head_size) in float32 (RoFormer, arXiv:2104.09864)."""
    # 频率按几何级数递减：低维看近处，高维看远处
    frequency = base ** -(torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)
    cos, sin = angle.cos(), angle.sin()
    # 符号写进表里，旋转只需一次交换加一次乘加；中间的 1 与 (B, T, 2, nh, hs) 广播
    return torch.cat((cos, cos), dim=-1)[:, None, None], torch.cat((-sin, sin), dim=-1)[:, None, None]


def _swap_halves(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((second, first), dim=-1)


class _Rotate(torch.autograd.Function):
    """A rotation is orthogonal: its backward is the rotation by the negative angle."""

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


class _ShortAttention(torch.autograd.Function):
    """softmax(scale * q k^T) v for a short causal context, in two batched products and four backward."""

    @staticmethod
    def forward(ctx, scale, visible, *parts):
        # parts 沿第 2 维拼起来是 q、k、v，(B, T, 3, nh, hs)；拼接与换轴一次做完
        packed = torch.cat([part.permute(2, 0, 3, 1, 4) for part in parts])
        _, B, nh, T, hs = packed.shape
        q, k, v = packed.view(3, B * nh, T, hs)
        mask = torch.full((T, T), float("-inf"), dtype=q.dtype).triu_(1)
        # 缩放与掩码都并进矩阵乘，不再各走一遍内存
        p = torch.baddbmm(mask, q, k.mT, alpha=scale)
        if visible is not None:
            # 每行的文章边界不同，只好再走一遍；因果部分已经遮好
            p.view(B, nh, T, T).masked_fill_(~visible, float("-inf"))
        p = p.softmax(dim=-1)
        ctx.save_for_backward(q, k, v, p)
        ctx.scale = scale
        ctx.sizes = [part.size(2) for part in parts]
        return torch.bmm(p, v).view(B, nh, T, hs)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, p = ctx.saved_tensors
        B, nh, T, hs = grad.shape
        grad = grad.reshape(B * nh, T, hs)
        grad_s = torch._softmax_backward_data(torch.bmm(grad, v.mT), p, -1, p.dtype)
        # 直接写进同一块内存，缩放也并进乘法
        packed = torch.empty((3, B * nh, T, hs), dtype=q.dtype)
        packed[0].baddbmm_(grad_s, k, beta=0, alpha=ctx.scale)
        packed[1].baddbmm_(grad_s.mT, q, beta=0, alpha=ctx.scale)
        torch.bmm(p.mT, grad, out=packed[2])
        grads = packed.view(3, B, nh, T, hs).permute(1, 3, 0, 2, 4).split(ctx.sizes, dim=2)
        return None, None, *grads


def on_device(values, device: torch.device) -> torch.Tensor:
    """Numbers or a tensor of the host on a device, without making the host wait for what a card has queued."""
    host = torch.as_tensor(values)
    # 只有锁页内存的拷贝是异步的；普通内存的要等卡上排着的一切做完，提前排下一步就白排了
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


class KVCache:
    """Preallocated keys and values of every layer, each (n_layer, B, nh, L, hs), and the ids read so far, (B, L).

    `lengths` says how many positions of each row are filled; rows may differ. The active rows are the
    first len(lengths), so that a finished row costs nothing. L is block_size unless a shorter `length` is given.
    """

    def __init__(self, model, batch_size: int, length: int | None = None):
        config = model.config
        self.max_length = min(length or config.block_size, config.block_size)
        shape = (config.n_layer, batch_size, config.n_head, self.max_length, config.n_embd // config.n_head)
        # 一次分配好，逐 token 生成时不再申请显存
        self.k = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.v = torch.zeros_like(self.k)
        self.tokens = torch.zeros(batch_size, self.max_length, dtype=torch.long, device=model.device)
        # 长度记在主机上：每一步都能算出，不必向 GPU 查询
        self.lengths = [0] * batch_size
        self.position: slice | torch.Tensor = slice(0, 0)
        self.mask: torch.Tensor | None = None
        self.end = 0
        # 录制 CUDA graph 时由外面定好的 (位置, 可见长度)，形状每步相同
        self.fixed: tuple[torch.Tensor, int] | None = None

    def part(self, start: int, stop: int) -> "KVCache":
        """Rows start … stop as an empty cache that shares this one's memory: reading a prompt writes straight into place."""
        part = object.__new__(KVCache)
        part.max_length = self.max_length
        part.k, part.v, part.tokens = self.k[:, start:stop], self.v[:, start:stop], self.tokens[start:stop]
        part.lengths, part.fixed = [0] * (stop - start), None
        return part

    def widened(self, rows: int) -> "KVCache":
        """A cache of so many rows that holds what this one held; this one is of no use any more."""
        # 新对象：录好的 CUDA graph 由此知道地址变了
        wide = object.__new__(KVCache)
        wide.max_length, wide.lengths, wide.fixed = self.max_length, self.lengths, self.fixed
        filled = max(self.lengths, default=0)
        for name in ("k", "v"):
            # 一个一个来，抄完就放：不同时占着两份
            old = self.__dict__.pop(name)
            new = old.new_zeros(old.size(0), rows, *old.shape[2:])
            new[:, : old.size(1), :, :filled] = old[..., :filled, :]
            setattr(wide, name, new)
        wide.tokens = torch.cat((self.tokens, self.tokens.new_zeros(rows - self.tokens.size(0), self.max_length)))
        return wide

    def begin(self, T: int) -> slice | torch.Tensor:
        """Positions of the next T ids: a slice when all rows are equally long, else (B, 1) for T = 1."""
        lengths = self.lengths
        if self.fixed is not None:
            self.position, self.end = self.fixed
            self.mask = (torch.arange(self.end, device=self.tokens.device) <= self.position)[:, None, None]
            return self.position
        self.end = max(lengths) + T
        assert self.end <= self.max_length, f"{self.end} positions do not fit into {self.max_length}"
        if min(lengths) + T == self.end:
            self.position, self.mask = slice(self.end - T, self.end), None
        else:
            assert T == 1, "rows of different lengths go on one id at a time"
            self.position = on_device(lengths, self.tokens.device)[:, None]
            # 每行只看自己写过的位置，后面是别的行才有的
            self.mask = (torch.arange(self.end, device=self.tokens.device) <= self.position)[:, None, None]
        return self.position

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write k, v (B, nh, T, hs) at the positions of begin(); return keys and values (B, nh, end, hs), `mask` hides the unfilled."""
        rows = len(self.lengths)
        if self.mask is None:
            self.k[layer, :rows, :, self.position] = k
            self.v[layer, :rows, :, self.position] = v
        else:
            at = self.position[:, :, None, None].expand(-1, k.size(1), -1, k.size(3))
            self.k[layer, :rows].scatter_(2, at, k.to(self.k.dtype))
            self.v[layer, :rows].scatter_(2, at, v.to(self.v.dtype))
        return self.k[layer, :rows, :, : self.end].to(k.dtype), self.v[layer, :rows, :, : self.end].to(v.dtype)

    def recent(self, n: int) -> torch.Tensor:
        """The n ids before the positions of begin(), (B, n); -1 before the start."""
        rows = len(self.lengths)
        if self.mask is None:
            start = self.position.start
            known = self.tokens[:rows, max(start - n, 0) : start]
            return F.pad(known, (n - known.size(1), 0), value=-1)
        at = self.position + torch.arange(-n, 0, device=self.tokens.device)
        return self.tokens[:rows].gather(1, at.clamp(min=0)).masked_fill(at < 0, -1)

    def advance(self, idx: torch.Tensor) -> None:
        """Note that idx (B, T) has been read at the positions of begin()."""
        rows, T = idx.shape
        if self.mask is None:
            self.tokens[:rows, self.position] = idx
        else:
            self.tokens[:rows].scatter_(1, self.position, idx)
        self.lengths = [length + T for length in self.lengths]

    def drop(self, row: int) -> None:
        """Remove a row; the last one takes its place."""
        last = len(self.lengths) - 1
        if row < last:
            filled = self.lengths[last]
            self.k[:, row, :, :filled] = self.k[:, last, :, :filled]
            self.v[:, row, :, :filled] = self.v[:, last, :, :filled]
            self.tokens[row, :filled] = self.tokens[last, :filled]
            self.lengths[row] = filled
        self.lengths.pop()


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention over x (B, T, C); parameter names follow GPT-2."""

    def __init__(self, config, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.qk_norm = config.qk_norm
        head_size = config.n_embd // config.n_head
        self.scale = QK_NORM_MAX_LOGIT / head_size if config.qk_norm else head_size**-0.5
        # q、k、v 合成一次矩阵乘，小模型上省两次 kernel 启动
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, rope=None, cache: KVCache | None = None, visible: torch.Tensor | None = None) -> torch.Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        dropout = self.dropout if self.training else 0.0
        short = cache is None and self._is_short(qkv, dropout)
        if short and not self.qk_norm and rope is None:
            # q、k 原样使用时不必先拆开：反向少一次拼接
            y = _ShortAttention.apply(self.scale, visible, qkv)
        else:
            # q 与 k 的归一化、旋转完全相同，一起算，调用次数减半
            qk, v = qkv.split((2, 1), dim=2)
            if self.qk_norm:
                # 限住 q·k 的幅度，学习率可以更大而注意力不发散
                qk = rms_norm(qk)
            if rope is not None:
                qk = rotate(qk, *rope)
            y = _ShortAttention.apply(self.scale, visible, qk, v) if short else self._attend(qk, v, cache, dropout, visible)
        # (B, nh, T, hs) -> (B, T, C)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))

    @staticmethod
    def _is_short(qkv: torch.Tensor, dropout: float) -> bool:
        """Whether the explicit products beat SDPA: on a CPU, in float32, with a short context."""
        # CPU 的 bf16、fp16 小矩阵乘很慢，半精度仍交给 SDPA
        on_cpu = planned_device.device_type(qkv) == "cpu" and qkv.dtype in (torch.float32, torch.float64)
        return on_cpu and not dropout and qkv.size(1) <= SHORT_CONTEXT and not torch.compiler.is_compiling()

    def _attend(self, qk: torch.Tensor, v: torch.Tensor, cache: KVCache | None, dropout: float, visible: torch.Tensor | None) -> torch.Tensor:
        """Scaled dot-product attention through PyTorch's kernel, (B, nh, T, hs)."""
        T = qk.size(1)
        q, k, v = (t.transpose(1, 2) for t in (*qk.unbind(2), v.squeeze(2)))
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        # 单 token 续写时自己的每个 key 都可见；整段预填充才是因果的
        mask = cache.mask if cache is not None else visible
        if cache is not None and 1 < T < k.size(2):
            mask = torch.ones(T, k.size(2), dtype=torch.bool, device=qk.device).tril(k.size(2) - T)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=T > 1 and mask is None, dropout_p=dropout, scale=self.scale
        )
