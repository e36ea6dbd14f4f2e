# 数字格式：显卡与有 bf16 单元的 CPU 上是 autocast（与 loss scale）；别的 CPU 上把乘积按 16 位如实舍入，结果与显卡一致
# CPU 的单元值不值得用，由 run/cpu_units 量过写在 precision.cpu_bf16 里，这里只照办
# Precision 由 session 造好，Step 在前向外面套上它的 context()
"""Number formats: autocast and loss scaling on a GPU, autocast or faithful rounding on a CPU."""

import contextlib
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from nanogpt.base.hardware import device_name
from nanogpt.base.language import ConfigError, first_line

# 在 GPU 上由张量核心以 16 位输入、fp32 累加完成的运算
PRODUCTS = (F.linear, torch.mm, torch.matmul, torch.bmm, torch.baddbmm, F.scaled_dot_product_attention)
# loss scale 的下限：1 就是不缩放；再小只会让梯度下溢，减到 0 则永远好不了
SMALLEST_SCALE = 1.0
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class _RoundedLinear(torch.autograd.Function):
    """x W^T + b of 16-bit tensors, computed in float32; keeps what came in, not its float32 copies."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        product = x.float() @ weight.float().mT
        return (product if bias is None else product.add_(bias)).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        wide = grad.float().reshape(-1, grad.size(-1))
        # 运算符 @ 不经过下面的模式，不会再舍入一遍
        grad_x = (wide @ weight.float()).to(x.dtype).view_as(x) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (wide.mT @ x.float().reshape(-1, x.size(-1))).to(weight.dtype)
        return grad_x, grad_weight, wide.sum(0).to(x.dtype) if ctx.needs_input_grad[2] else None


class RoundedProducts(TorchFunctionMode):
    """Round the inputs and outputs of matrix products to a 16-bit format and compute them in float32.

    That is what tensor cores do. CPUs without 16-bit units need 15 times as long for a native half
    product as for a float32 one; gradients pass the same rounding, so overflow happens as on a GPU.
    With `narrow` the results stay in the 16-bit format, as those of 16-bit weights do on a GPU.
    """

    def __init__(self, dtype: torch.dtype, narrow: bool = False):
        super().__init__()
        self.dtype = dtype
        self.narrow = narrow

    def _round(self, x):
        # to() 的反向同样经过 16 位，梯度的上溢下溢与 GPU 一致
        return x.to(self.dtype).float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in PRODUCTS:
            return func(*args, **kwargs)
        if self.narrow and func is F.linear and args[0].dtype == args[1].dtype == self.dtype:
            return _RoundedLinear.apply(args[0], args[1], args[2] if len(args) > 2 else kwargs.get("bias"))
        result = func(*map(self._round, args), **kwargs).to(self.dtype)
        return result if self.narrow else result.float()


class Precision:
    """What a training step needs to run in one number format on one device."""

    def __init__(self, config, device: torch.device, weights: str = "fp32", automatic: str | None = None):
        # bf16 的权重只能配 bf16 的运算，config.check 已拦下其余
        stated = config.dtype if config.dtype != "auto" else None
        units = cpu_units(config, device.type)
        automatic = "bf16" if units == "all" else default_format(device, automatic)
        name = "bf16" if weights == "bf16" else stated or automatic
        if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ConfigError(
                "precision.dtype=bf16: {device} has no bf16; use precision=fp16", device=device_name(device),
            )
        if name != "fp32" and device.type in ("mps", "xpu"):
            check_half(device, name)
        self.name = name
        self.dtype = DTYPES[name]
        self.weights = DTYPES[weights]
        self.device_type = device.type
        self.native = units == "all" and name == "bf16"
        self.rounded = device.type == "cpu" and name != "fp32" and not self.native
        self.bf16_updates = units != "none"
        # 反向里外层的函数模式不起作用，重算时要自己再舍入；autocast 则由 checkpoint 恢复
        self.again = self.context if self.rounded else None
        self.tf32 = device.type == "cuda" and config.tf32
        # fp16 的最小正规数约 6e-5，梯度先放大再反传；bf16 指数够宽，不需要
        self.scaler = torch.amp.GradScaler(
            device.type, enabled=name == "fp16", init_scale=config.initial_loss_scale,
            growth_interval=config.loss_scale_growth_interval,
        )
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = config.tf32
            torch.backends.cudnn.allow_tf32 = config.tf32

    @property
    def half(self) -> bool:
        """Whether products run on 16-bit units, so that the 16-bit peak applies."""
        return self.name != "fp32" and not self.rounded

    @property
    def label(self) -> str:
        """Name for the console; says when a CPU only rounds."""
        name = f"{self.name} weights" if self.name == "bf16" and self.weights == self.dtype else self.name
        return f"{name} (rounded, computed in fp32)" if self.rounded else name

    def context(self):
        """Wrap the forward pass."""
        if self.rounded:
            return RoundedProducts(self.dtype, narrow=self.weights == self.dtype)
        # 权重本身是 bf16 时，一切自然都用 bf16 算；CPU 上仍要 autocast：短上下文的注意力由它知道有 bf16 单元
        if self.weights == self.dtype and not self.native:
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype)


def cpu_units(config, device_type: str) -> str:
    """What runs on a CPU's bf16 units: none | optimizer | all; "none" for other formats and until it is measured."""
    wanted = device_type == "cpu" and config.dtype in ("auto", "bf16") and config.cpu_bf16 != "auto"
    return config.cpu_bf16 if wanted else "none"


def check_half(device: torch.device, name: str) -> None:
    """Refuse a 16-bit format that this device, with this system and this torch, does not train in: by a tiny step."""
    # 支不支持随 macOS、芯片与 torch 的版本而变：问一次比列一张表可靠
    try:
        linear = torch.nn.Linear(8, 8, device=device)
        scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")
        with torch.autocast(device.type, dtype=DTYPES[name]):
            loss = linear(torch.ones(2, 8, device=device)).float().mean()
        scaler.scale(loss).backward()
        if scaler.is_enabled():
            # 与 Step 走同样的路；只要参数在哪里，不必是真的优化器
            scaler.unscale_(SimpleNamespace(param_groups=[{"params": list(linear.parameters())}]))
            scaler.update()
        reason = None if math.isfinite(loss.item()) else "NaN"
    except (RuntimeError, TypeError, NotImplementedError, AssertionError) as error:
        reason = first_line(error)
    if reason:
        raise ConfigError(
            "precision.dtype={name} does not work on {device} ({reason}); use precision=fp32",
            name=name, device=device_name(device), reason=reason,
        )


def default_format(device: torch.device, stated: str | None = None) -> str:
    """fp32 on a CPU and a Mac; on a card what hardware.dtype states, else the first of bf16, fp16, fp32 with tensor
    cores.
    """
    if device.type in ("cpu", "mps"):
        # Mac 的 16 位还没有人跑过：要的人自己写 precision=fp16
        return "fp32"
    if device.type == "xpu":
        return stated or ("bf16" if torch.xpu.is_bf16_supported() else "fp32")
    name = torch.cuda.get_device_name(device)
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return stated or "bf16"
    # 7.0 起才有张量核心，GTX 16 系列是例外；没有它，16 位只会更慢
    own = "fp16" if torch.cuda.get_device_capability(device) >= (7, 0) and "GTX" not in name else "fp32"
    return own if stated in (None, "bf16") else stated


def adjust_scale(scaler, *, skipped: bool, overflow: bool) -> bool:
    """Let a GradScaler learn from the step that it has just unscaled; True where it lowered its scale, down to
    SMALLEST_SCALE.

    skipped: the step was not finite; overflow: because its gradients were not.
    """
    if not skipped:
        scaler.update()
        return False
    # 只在坏的一步才读 scale：读一次，GPU 就停一次
    before = scaler.get_scale()
    if overflow:
        scaler.update()
    # 坏的只是 loss 的值：scale 照旧，这一步也不算“又好了一步”
    scaler.update(max(SMALLEST_SCALE, scaler.get_scale()))
    return scaler.get_scale() < before
