"""Which device a computation is for: the tensor's own or, while the planner traces, the one that is planned for.

The planner runs the training step on tensors without storage that call themselves CPU tensors, whatever
card it plans for. Code that takes another path on a card asks here instead of asking the tensor.
"""

import contextlib
from collections.abc import Iterator

import torch

# 只在 planning_for 里面有意义；正常训练时都不起作用
_planned: str | None = None
_host = False
_count = 1


def device_type(x: torch.Tensor) -> str:
    """cpu | cuda: where the computation on x counts as running."""
    return _planned or x.device.type


def planned() -> str | None:
    """The device type that is planned for, None outside of a trace."""
    return _planned


@contextlib.contextmanager
def planning_for(kind: str) -> Iterator[None]:
    """Let device_type() answer `kind` inside."""
    global _planned
    before, _planned = _planned, kind
    try:
        yield
    finally:
        _planned = before


@contextlib.contextmanager
def host_memory() -> Iterator[None]:
    """Storages made inside stay in RAM beside a card: a trace counts them apart; otherwise no effect."""
    global _host
    before, _host = _host, True
    try:
        yield
    finally:
        _host = before


def in_host_memory() -> bool:
    """Whether the innermost context is host_memory()."""
    return _host


@contextlib.contextmanager
def counted(times: int) -> Iterator[None]:
    """Let the work inside count `times` times in a trace: equal pieces need to be traced once; otherwise no effect."""
    global _count
    before, _count = _count, _count * times
    try:
        yield
    finally:
        _count = before


def count() -> int:
    """How often the present work counts."""
    return _count


class FusedRMSNorm(torch.autograd.Function):
    """Allocates and saves what the CUDA kernel behind F.rms_norm does (torch >= 2.9): its input and one float32 per row."""

    @staticmethod
    def forward(ctx, x):
        # kernel 只认连续的输入；q、k 是切片，会临时抄一份
        r = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        y = torch.mul(x.contiguous(), 1.0)
        ctx.save_for_backward(x, r)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, _ = ctx.saved_tensors
        return torch.mul(grad.contiguous(), x.contiguous())
