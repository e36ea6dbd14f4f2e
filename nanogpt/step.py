"""The computation of one training step: forward, backward, clip, update; no data, no time, no files.

The trainer decides on values (is it finite?), the planner traces the same functions without any.
"""

import torch

from nanogpt.build import build_part
from nanogpt.config import TrainConfig
from nanogpt.precision import Precision


def build_step(cfg: TrainConfig, model, precision: Precision) -> "Step":
    """The step of a model as cfg.memory and cfg.optimizer want it; the trainer and the planner take the same one."""
    model.activation_checkpointing = cfg.memory.activation_checkpointing
    model.loss_chunk_mib = cfg.memory.loss_chunk_mib
    return Step(model, build_part(cfg.optimizer, "optimizer", model), precision)


class Step:
    """One model, its optimizer and its number format."""

    def __init__(self, model, optimizer, precision):
        self.model = model
        self.optimizer = optimizer
        self.precision = precision
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def micro_batch(self, x: torch.Tensor, y: torch.Tensor, share: float) -> torch.Tensor:
        """Forward and backward of rows x, y (B, T) that are `share` of the step; returns share * mean loss, shape ()."""
        with self.precision.context():
            # 按行数加权：最后一个微批可以不满，梯度仍等于整批的平均
            loss = self.model.loss(x, y) * share
        with self.precision.backward_context():
            self.precision.scaler.scale(loss).backward()
        return loss.detach()

    def gradient_norm(self) -> torch.Tensor:
        """Global L2 norm of all gradients, shape ()."""
        return torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    def clip(self, norm: torch.Tensor, limit: float) -> None:
        """Scale all gradients so that their norm `norm` becomes `limit`."""
        torch.nn.utils.clip_grads_with_norm_(self.parameters, limit, norm)

    def update(self) -> None:
        """Apply the gradients and drop them."""
        self.optimizer.step()
        self.optimizer.zero_grad()
