# 词表大时 logits 比整个模型还占地方：一次只算一块 token，当场求出损失与梯度，用完就丢
# GPT.loss 是唯一的入口；块的大小与编译好的尾巴由 weights.build 与 compilation 从外面给定
"""Cross-entropy of a linear head without ever holding all (N, V) logits."""

from collections.abc import Callable

import torch

from nanogpt.core import kernels


def even(total: int, most: int) -> int:
    """The largest size, at most `most` but at least half of it, of which `total` is a multiple; else `most`."""
    # 各块一样大：编译的尾巴只编一次，行数也对得齐张量核心
    pieces = range(-(-total // most), 2 * -(-total // most) + 1)
    return next((total // k for k in pieces if total % k == 0), most)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Gradients are formed in the forward pass, chunk by chunk, so that no logits are kept or recomputed.

    torch 2.13 has F.linear_cross_entropy, but no soft-cap, and 2.6 must work too.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, softcap, rows, dtype, need_grad, need_weight, ignoring, tail):
        # 只数要算的目标；全都不算的一批，损失为 0
        N = (targets >= 0).sum().clamp(min=1) if ignoring else hidden.size(0)
        w, V = kernels.aligned(weight, dtype), weight.size(0)
        wide = torch.promote_types(dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_grad else None
        # 冻结的输出层（LoRA）不需要这块与词表同大的梯度
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if need_weight else None

        def add(start: int) -> None:
            """Add one chunk's part to total, grad_hidden and grad_weight."""
            h = hidden[start : start + rows].to(dtype)
            expected = targets[start : start + rows, None]
            if ignoring:
                counts = (expected >= 0).to(dtype)
                expected = expected.clamp(min=0)
            if need_grad and tail is not None:
                grad = torch.nn.functional.linear(h, w)
                losses = tail(grad, expected, V, softcap)
            else:
                losses, grad = kernels.cross_entropy(torch.nn.functional.linear(h, w), expected, V, softcap, need_grad)
            total.add_((losses * counts.to(wide) if ignoring else losses).sum())
            if not need_grad:
                return
            grad_hidden[start : start + rows] = torch.mm(grad, w)
            if ignoring:
                # 乘在窄的一边：词表那么宽的 grad 不必再走一遍
                grad_hidden[start : start + rows] *= counts
                h = h * counts
            if need_weight:
                kernels.add_product(grad_weight, grad.t()[:V], h)

        # 写成函数：上一块的 logits 随返回释放，不与下一块同时占着
        kernels.chunk_by_chunk(add, hidden.size(0), rows)
        if need_grad:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype) if need_weight else None)
            ctx.N = N
        return total / N

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_loss / ctx.N
        # 就地缩放：与词表同大的梯度不再抄一份
        return grad_hidden * scale, None if grad_weight is None else grad_weight.mul_(scale), *[None] * 8


def chunked_cross_entropy(
    hidden, weight, targets, *, softcap: float, chunk_mib: int = 256, ignoring: bool = False,
    tail: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """Mean cross-entropy of `softcap(hidden @ weight.T)` against targets, shape ().

    hidden (B, T, C), weight (V, C), targets (B, T); with `ignoring`, targets of -1 are left out of the mean.
    At most chunk_mib MiB of float32 logits exist at a time. Under autocast the products run in its dtype.
    tail: compilation.fusible_tail(), compiled; used where gradients are wanted.
    """
    device_type = hidden.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype
    rows = max(1, chunk_mib * 2**20 // (4 * weight.size(0)))
    if tail is not None:
        rows = even(hidden.numel() // hidden.size(-1), rows)
    need_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    # 函数内部自己决定精度，外层的 autocast 不得再插手
    with torch.autocast(device_type, enabled=False):
        return _ChunkedCrossEntropy.apply(
            hidden.reshape(-1, hidden.size(-1)), weight, targets.reshape(-1), softcap, rows, dtype, need_grad,
            need_grad and weight.requires_grad, ignoring, tail,
        )
