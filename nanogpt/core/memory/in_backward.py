# 反向里边走边更新：一个参数的梯度一到就用掉、放掉，显存里不再同时有全部梯度
# 由 weights.build 接到 Step 上；hook 只拿弱引用，训练器一放，权重与状态就跟着放
"""The optimizer's step inside the backward pass: each gradient is used and freed as soon as it is complete.

Lomo (Lv et al., arXiv:2306.09782) showed the memory this saves. Nobody sees all gradients at once, so each parameter is clipped by
its own norm, which is weaker than clipping by the global one: a gradient that is small beside the others stays as it is.
"""

import weakref

import torch

from nanogpt.core.memory.lowbit import norm


class InBackward:
    """Hooks on every trained parameter of an optimizer of ours; learning rates are read from its groups when a gradient arrives."""

    def __init__(self, optimizer, grad_clip: float):
        self.optimizer = optimizer
        self.grad_clip = grad_clip
        self.squares: torch.Tensor | None = None
        self.bad_loss: torch.Tensor | None = None
        for number, group in enumerate(optimizer.param_groups):
            for name, p in zip(group["names"], group["params"], strict=True):
                p.register_post_accumulate_grad_hook(_hook(weakref.ref(self), name, number))

    def begin(self, loss: torch.Tensor) -> None:
        """Forget the gradients of the step before; nothing is updated by the backward pass of a loss () that is not finite."""
        self.squares, self.bad_loss = None, ~torch.isfinite(loss)

    def gradient_norm(self) -> torch.Tensor:
        """Global L2 norm of the gradients of this step before clipping, shape (); not finite if any of them was not."""
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
    """The hook of one parameter of the owner's group with this number."""
    # 弱引用：hook 由参数的 C++ 一侧拿着，垃圾回收看不见这个环，权重与状态会一直占着显存
    def arrived(p: torch.Tensor) -> None:
        if (it := owner()) is not None:
            it.arrived(name, p, it.optimizer.param_groups[group])

    return arrived
