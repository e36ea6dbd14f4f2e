"""Cross-entropy of a linear head without ever holding all (N, V) logits."""

import torch

from nanogpt.machine import any_kernels


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Gradients are formed in the forward pass, chunk by chunk, so that no logits are kept or recomputed.

    torch 2.13 has F.linear_cross_entropy, but no soft-cap, and 2.6 must work too.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, softcap, rows, dtype, need_grad, need_weight, ignoring):
        # 只数要算的目标；全都不算的一批，损失为 0
        N = (targets >= 0).sum().clamp(min=1) if ignoring else hidden.size(0)
        w = weight.to(dtype)
        # 半精度的指数和会丢小概率：softmax 与求和至少用 fp32
        wide = torch.promote_types(dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_grad else None
        # 冻结的输出层（LoRA）不需要这块与词表同大的梯度
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if need_weight else None

        def add(start: int) -> None:
            """Add one chunk's part to total, grad_hidden and grad_weight."""
            h = hidden[start : start + rows].to(dtype)
            target = targets[start : start + rows, None]
            if ignoring:
                counts = (target >= 0).to(dtype)
                target = target.clamp(min=0)
            logits = torch.nn.functional.linear(h, w).to(wide)
            if softcap:
                squashed = torch.tanh(logits / softcap)
                logits = squashed * softcap
            log_z = torch.logsumexp(logits, dim=-1, keepdim=True)
            losses = log_z - logits.gather(1, target)
            total.add_((losses * counts.to(wide) if ignoring else losses).sum())
            if not need_grad:
                return
            # d(sum of losses)/d(logits) = softmax - onehot，量级为 1：半精度里也不下溢，1/N 留到反向再乘
            grad = logits.sub_(log_z).exp_()
            with any_kernels():
                # 每行只有一个下标，怎么加都一样；deterministic=true 却会为它排序，每块多十几个 kernel
                grad.scatter_add_(1, target, torch.full_like(target, -1, dtype=grad.dtype))
            if softcap:
                grad *= 1 - squashed.square()
            grad = grad.to(dtype)
            grad_hidden[start : start + rows] = torch.mm(grad, w)
            if ignoring:
                # 乘在窄的一边：词表那么宽的 grad 不必再走一遍
                grad_hidden[start : start + rows] *= counts
                h = h * counts
            if need_weight:
                grad_weight.add_(torch.mm(grad.t(), h))

        for start in range(0, hidden.size(0), rows):
            # 写成函数：上一块的 logits 随返回释放，不与下一块同时占着
            add(start)
        if need_grad:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype) if need_weight else None)
            ctx.N = N
        return total / N

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_loss / ctx.N
        # 就地缩放：与词表同大的梯度不再抄一份
        return grad_hidden * scale, None if grad_weight is None else grad_weight.mul_(scale), *[None] * 7


def chunked_cross_entropy(hidden, weight, targets, *, softcap: float, chunk_mib: int, ignoring: bool = False) -> torch.Tensor:
    """Mean cross-entropy of `softcap(hidden @ weight.T)` against targets, shape ().

    hidden (B, T, C), weight (V, C), targets (B, T); with `ignoring`, targets of -1 are left out of the mean.
    At most chunk_mib MiB of float32 logits exist at a time. Under autocast the products run in its dtype.
    """
    device_type = hidden.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype
    rows = max(1, chunk_mib * 2**20 // (4 * weight.size(0)))
    need_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    # 函数内部自己决定精度，外层的 autocast 不得再插手
    with torch.autocast(device_type, enabled=False):
        return _ChunkedCrossEntropy.apply(
            hidden.reshape(-1, hidden.size(-1)), weight, targets.reshape(-1), softcap, rows, dtype, need_grad,
            need_grad and weight.requires_grad, ignoring,
        )
