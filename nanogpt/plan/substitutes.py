"""Stand-ins that a trace needs where the real part asks for a device or for a value."""

import contextlib

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from nanogpt.core.precision import DTYPES, RoundedProducts

# CUDA 的 autocast 提到 fp32 算、CPU 的不提的运算（torch 文档 “Autocast Op Reference”）
FLOAT32_ON_CUDA = (F.layer_norm, F.softmax, F.log_softmax, torch.softmax, torch.log_softmax, torch.Tensor.softmax, F.cross_entropy, F.nll_loss)
# 对称的 scale：只有形状和类型要紧
SCALE = 1.0


class LikeCuda(TorchFunctionMode):
    """Makes CPU autocast allocate as CUDA's does, and lets tensors say that they are on a card."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.is_cuda.__get__:
            return True
        if func is F.scaled_dot_product_attention and kwargs.get("dropout_p"):
            # CUDA 的 flash 自己做 dropout，不存概率矩阵；CPU 的会退回到存
            kwargs = {**kwargs, "dropout_p": 0.0}
        if func in FLOAT32_ON_CUDA and torch.is_autocast_enabled("cpu"):
            args = tuple(a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)
        return func(*args, **kwargs)


class TracedScaler:
    """The allocations of torch.amp.GradScaler, without looking at any value."""

    def __init__(self, enabled: bool):
        self.enabled = enabled

    def is_enabled(self) -> bool:
        """Whether the loss is scaled."""
        return self.enabled

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss times a scalar of the device."""
        return loss * torch.ones((), dtype=loss.dtype) if self.enabled else loss

    def unscale_(self, optimizer) -> None:
        """Every gradient times a scalar, in place."""
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(SCALE)


class PlannedPrecision:
    """nanogpt.core.precision.Precision of a device that need not be there; dtype auto is fp32 on a CPU, else what `automatic` says."""

    def __init__(self, config, device_type: str, weights: str = "fp32", automatic: str = "bf16"):
        automatic = "fp32" if device_type == "cpu" else automatic
        name = "bf16" if weights == "bf16" else config.dtype if config.dtype != "auto" else automatic
        self.name = name
        self.dtype = DTYPES[name]
        self.weights = DTYPES[weights]
        self.device_type = device_type
        self.rounded = device_type == "cpu" and name != "fp32"
        self.half = name != "fp32" and not self.rounded
        self.scaler = TracedScaler(name == "fp16")

    @contextlib.contextmanager
    def context(self):
        """Wrap the forward pass."""
        with contextlib.ExitStack() as stack:
            if self.rounded:
                stack.enter_context(RoundedProducts(self.dtype, narrow=self.weights == self.dtype))
            if self.device_type == "cuda":
                stack.enter_context(LikeCuda())
                if self.weights != self.dtype:
                    stack.enter_context(torch.autocast("cpu", dtype=self.dtype))
            yield

    def backward_context(self):
        """Wrap the backward pass, so that what is computed again takes the card's path."""
        return LikeCuda() if self.device_type == "cuda" else contextlib.nullcontext()
