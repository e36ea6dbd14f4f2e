# 一步训练的计算：前向、反向、裁剪、更新；不管数据、时间与文件
# 何时看数值由 Trainer 决定；规划显存时追踪的也是这里的同一段代码，所以除 Reading 之外不看任何数值
"""The computation of one training step: forward, backward, clip, update."""

import math
from collections.abc import Callable

import torch

from nanogpt.core.machine import Reading
from nanogpt.core.optimizers import Optimizer
from nanogpt.core.precision import adjust_scale
from nanogpt.core.tables import row_gradient


class Step:
    """One model, its optimizer and its number format."""

    # 谁把几个进程的梯度加起来；None：distributed.GradientSum
    sums = None

    def __init__(self, model, optimizer, precision, *, in_backward=None, expect: Callable[[int], None] | None = None):
        """in_backward updates parameters during the backward pass; expect() is told the rows of micro-batches."""
        self.model = model
        self.optimizer = optimizer
        self.precision = precision
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.in_backward = in_backward
        self.expect = expect or (lambda rows: None)

    def prepare(self) -> None:
        """Allocate what the optimizer keeps, before the first step."""
        # torch.optim 的没有这一步：它们在第一次更新时才分配
        if isinstance(self.optimizer, Optimizer):
            self.optimizer.prepare()

    def micro_batch(self, x: torch.Tensor, y: torch.Tensor, share: float) -> torch.Tensor:
        """Forward and backward of rows x, y (B, T) that are `share` of the step; returns share * mean loss, shape ().

        With in_backward the parameters have been updated when this returns.
        """
        loss = self.forward(x, y, share)
        self.backward(loss)
        return loss.detach()

    def forward(self, x: torch.Tensor, y: torch.Tensor, share: float) -> torch.Tensor:
        """share * mean loss of rows x, y (B, T), shape (), to be given to backward()."""
        with self.precision.context():
            # 按行数加权：最后一个微批可以不满，梯度仍等于整批的平均
            return self.model.loss(x, y) * share

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a forward() loss; in_backward applies those that are finite, none if the loss is not."""
        if self.in_backward:
            self.in_backward.begin(loss.detach())
        self.precision.scaler.scale(loss).backward()

    def gradient_norm(self) -> torch.Tensor:
        """Global L2 norm of all gradients, shape ()."""
        if self.in_backward:
            return self.in_backward.gradient_norm()
        grads = [rows.once() if (rows := row_gradient(p)) else p.grad for p in self.parameters if p.grad is not None]
        # bf16 的梯度得出 bf16 的范数：裁剪的系数不该再跟着粗一遍
        return torch.nn.utils.get_total_norm(grads).float()

    def clip(self, norm: torch.Tensor, limit: float) -> None:
        """Scale all gradients so that their norm `norm` becomes `limit`."""
        torch.nn.utils.clip_grads_with_norm_([p for p in self.parameters if not row_gradient(p)], limit, norm)
        for rows in filter(None, map(row_gradient, self.parameters)):
            rows.scale((limit / (norm + 1e-6)).clamp(max=1.0))

    def update(self) -> None:
        """Apply the gradients and drop them; nothing is left to do after a backward that did."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def drop_gradients(self) -> None:
        """Forget all gradients, also of parameters that the optimizer does not know."""
        # 不靠优化器：它可能只管一部分参数，剩下的半份梯度会混进下一步
        for p in self.parameters:
            p.grad = None

    def finish(self, loss: torch.Tensor, limit: float, *, late: bool) -> tuple[Reading, bool]:
        """Clip the gradients to norm `limit` and apply them unless one is not finite; `late`: decided on the device.

        Returns (loss, norm before clipping) and whether an fp16 overflow has lowered the loss scale.
        """
        # 先还原再裁剪，否则阈值会被 loss scale 放大
        if self.precision.scaler.is_enabled():
            self.precision.scaler.unscale_(self.optimizer)
        norm, healing = self.gradient_norm(), False
        reading = Reading(loss, norm)
        if late:
            self.update_if_finite(loss, norm, limit)
        else:
            healing = self._update_if_read_finite(reading, norm, limit)
        self.drop_gradients()
        return reading, healing

    def _update_if_read_finite(self, reading: Reading, norm: torch.Tensor, limit: float) -> bool:
        """update_if_finite() decided by the host; returns whether an fp16 overflow has lowered the loss scale."""
        loss_is_finite, norm_is_finite = map(math.isfinite, reading.read())
        finite = loss_is_finite and norm_is_finite
        if finite and reading.read()[1] > limit:
            # 没超过阈值就不必把全部梯度再读写一遍
            self.clip(norm, limit)
        if finite:
            # 范数有限，梯度就没有溢出：不必让 scaler.step 再问一次设备
            self.update()
        if not self.precision.scaler.is_enabled():
            return False
        # 梯度溢出是 fp16 的日常：跳过这一步并减半 scale，下一步就好了
        return adjust_scale(self.precision.scaler, skipped=not finite, overflow=not norm_is_finite) and loss_is_finite

    @property
    def decides_on_device(self) -> bool:
        """Whether update_if_finite() may be called: fp16's loss scale and other optimizers ask the host."""
        return isinstance(self.optimizer, Optimizer) and not self.precision.scaler.is_enabled()

    def update_if_finite(self, loss: torch.Tensor, norm: torch.Tensor, limit: float) -> None:
        """Clip to norm `limit` and update unless loss () or norm () is not finite, without waiting; gradients stay."""
        if not self.in_backward:
            skip = (~(torch.isfinite(loss) & torch.isfinite(norm))).float()
            if self.optimizer.takes_factor:
                # 逐块更新本来就要读一遍梯度：顺手乘上，不必先写回去
                self.optimizer.step(skip=skip, factor=(limit / (norm + 1e-6)).clamp(max=1.0))
            else:
                if limit < math.inf:
                    self.clip(norm, limit)
                self.optimizer.step(skip=skip)
