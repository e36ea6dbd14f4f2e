"""Runs the optimizer's step inside the backward pass: each gradient is used and freed as soon as it is complete.

LOMO (Lv et al., arXiv:2306.09782) showed how much memory this saves. All gradients are never there at once, so each
parameter is clipped by its own norm, which is weaker than clipping by the global one: a gradient that is small beside
the others stays as it is.
"""

# 反向传播里就更新（memory.optimizer_in_backward）：一个参数的梯度一到就用掉、释放，全部梯度从不同时存在
# 给每个参数挂一个 hook，公式与状态仍是 lean_optimizers 的（update_one）；由 weights.build.build_step 接上
# 因为梯度不留，就不能累积、不能用 loss scale，裁剪也只能按各参数自己的范数
# 一步里损失或某个梯度不是有限数，全在设备上用 skip 挡住，不问 CPU

import weakref

import torch

from nanogpt.core.memory.lowbit import norm


class InBackward:
    """Hooks on every trained parameter of an optimizer of ours, which update it when its gradient arrives."""

    # 学习率到那时才从优化器的组里读：每步都在变

    def __init__(self, optimizer, grad_clip: float):
        self.optimizer = optimizer
        self.grad_clip = grad_clip
        self.squares: torch.Tensor | None = None
        self.bad_loss: torch.Tensor | None = None
        for number, group in enumerate(optimizer.param_groups):
            for name, p in zip(group["names"], group["params"], strict=True):
                p.register_post_accumulate_grad_hook(_hook(weakref.ref(self), name, number))

    def begin(self, loss: torch.Tensor) -> None:
        """Forget the gradients of the step before; a loss () that is not finite will update nothing."""
        self.squares, self.bad_loss = None, ~torch.isfinite(loss)

    def gradient_norm(self) -> torch.Tensor:
        """Global L2 norm of this step's gradients before clipping, shape (); not finite if any of them was not."""
        return torch.zeros(()) if self.squares is None else self.squares.sqrt()

    def arrived(self, name: str, p: torch.Tensor, group: dict) -> None:
        """Update p, whose gradient is complete, and free the gradient."""
        length = norm(p.grad, self.optimizer.storage.piece)
        # 全在设备上算：每个参数问一次 GPU，反向就成了走走停停
        skip = (~torch.isfinite(length) | self.bad_loss).float()
        factor = (self.grad_clip / (length + 1e-6)).clamp(max=1.0) if self.grad_clip else None
        self.squares = length.square() if self.squares is None else self.squares + length.square()
        self.optimizer.update_one(name, p, group, skip=skip, factor=factor)
        p.grad = None


def _hook(owner: weakref.ref, name: str, group: int):
    """The hook of one parameter in the owner's group with this number."""
    # 弱引用：hook 由参数的 C++ 一侧拿着，垃圾回收看不见这个环，权重与状态会一直占着显存
    def arrived(p: torch.Tensor) -> None:
        if (it := owner()) is not None:
            it.arrived(name, p, it.optimizer.param_groups[group])

    return arrived
