"""Weights laid out for writing on a CPU: each thread streams a contiguous part of its own.

x W^T with one row of x is bound by reading W. PyTorch's kernel for nn.Linear reads it at about half
of the memory's speed; a batched product over column blocks stored one after the other, one block per
thread, reads it at nearly all of it.
"""

import torch
import torch.nn as nn


class PackedLinear(nn.Module):
    """nn.Linear for inference, its weight (N, K) stored as (parts, K, N / parts)."""

    def __init__(self, linear: nn.Linear, parts: int):
        super().__init__()
        self.n_out = linear.out_features
        # 词表之类除不尽的行数，末尾补 0，算完再切掉
        padding = -self.n_out % parts
        weight = nn.functional.pad(linear.weight.detach(), (0, 0, 0, padding))
        self.register_buffer("packed", weight.view(parts, -1, linear.in_features).mT.contiguous(), persistent=False)
        bias = None
        if linear.bias is not None:
            bias = nn.functional.pad(linear.bias.detach(), (0, padding)).view(parts, 1, -1)
        self.register_buffer("packed_bias", bias, persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        """The weight as nn.Linear has it, (N, K); a copy."""
        return self.packed.mT.reshape(-1, self.packed.size(1))[: self.n_out]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts, k, width = self.packed.shape
        rows = x.reshape(1, -1, k).expand(parts, -1, -1)
        if self.packed_bias is None:
            y = torch.bmm(rows, self.packed)
        else:
            y = torch.baddbmm(self.packed_bias, rows, self.packed)
        # (parts, rows, width) -> (rows, N)；只有一行时不必搬动
        y = y.transpose(0, 1).reshape(-1, parts * width)[:, : self.n_out]
        return y.view(*x.shape[:-1], self.n_out)


@torch.no_grad()
def pack(model: nn.Module) -> None:
    """Replace every float32 nn.Linear of a CPU model by its packed form, in place; the old weights are freed unless tied."""
    parts = torch.get_num_threads()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.weight.dtype == torch.float32 and child.weight.device.type == "cpu":
                setattr(parent, name, PackedLinear(child, parts))
