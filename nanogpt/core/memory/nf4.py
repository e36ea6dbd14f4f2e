"""Frozen linears whose weights take 4.5 bits each: NF4 of QLoRA (Dettmers et al., arXiv:2305.14314)."""

# 冻住的权重存成 4 位（finetune.frozen_weights=nf4，memory=lora4）：每 64 个一组
# 每组记下最大的绝对值，各数取 16 个标准值中最近的
# 16 个值是正态分布的分位数：训练过的权重差不多就是这样分布的
# 用的时候临时还原成平常的矩阵再相乘，反向再还原一次：不留在激活里；省的是显存，不是时间
# 只有乘法与查表，CPU 与各种卡都一样；数值与 bitsandbytes 的 NF4（组 64，不再压缩组的最大值）相同

from itertools import pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F

# 论文附录 E：N(0, 1) 的分位数缩放到 [-1, 1]，0 在其中
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
GROUP = 64


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes, two to a byte, (groups, GROUP / 2) uint8, and the scale of each group, (groups,) float32."""
    flat = weight.detach().reshape(-1).float()
    groups = F.pad(flat, (0, -flat.numel() % GROUP)).view(-1, GROUP)
    scales = groups.abs().amax(dim=1)
    # 全是零的组：除以 1，取中间的 0
    normal = groups / torch.where(scales == 0, 1.0, scales)[:, None]
    codes = torch.zeros_like(normal, dtype=torch.uint8)
    for low, high in pairwise(LEVELS):
        # 逐个比较，CPU 上比 torch.bucketize 快一倍多
        codes += normal > (low + high) / 2
    return codes[:, ::2] * 16 + codes[:, 1::2], scales


def pairs(device: torch.device) -> torch.Tensor:
    """The two values that each byte stands for, (256, 2) float32."""
    levels = torch.tensor(LEVELS, device=device)
    return torch.stack((levels.repeat_interleave(16), levels.repeat(16)), dim=1)


def dequantize(packed: torch.Tensor, scales: torch.Tensor, table: torch.Tensor, shape, dtype) -> torch.Tensor:
    """The matrix that quantize() was given, as the codes have it; `table` is pairs()."""
    # 一个字节查一次，得两个数：索引只占每个权重两个字节
    values = F.embedding(packed.int(), table).view(-1, GROUP).mul_(scales[:, None])
    return values.view(-1)[: shape[0] * shape[1]].view(shape).to(dtype)


class _Product(torch.autograd.Function):
    """x W^T + b of a frozen W in 4 bits, of which only the codes are kept for the backward pass."""

    @staticmethod
    def forward(ctx, x, packed, scales, table, bias, shape):
        ctx.save_for_backward(packed, scales, table)
        ctx.shape, ctx.dtype = shape, x.dtype
        return F.linear(x, dequantize(packed, scales, table, shape, x.dtype), bias)

    @staticmethod
    def backward(ctx, grad):
        # CPU 上没有 16 位单元的很慢：照 precision 那样用 fp32 算
        dtype = torch.float32 if grad.device.type == "cpu" else grad.dtype
        weight = dequantize(*ctx.saved_tensors, ctx.shape, dtype)
        return (grad.to(dtype) @ weight).to(ctx.dtype), None, None, None, None, None


class NF4Linear(nn.Linear):
    """A frozen linear whose weight is stored as NF4; products are computed in the type of what comes in."""

    # weight 是打包的 uint8，不是参数：优化器、梯度都不知道它；查表不存进 checkpoint

    def __init__(self, base: nn.Linear, *, empty: bool = False):
        """`empty`: the weights will be loaded, and those of `base` do not matter."""
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        del self.weight
        self.dtype, self.bias = base.weight.dtype, base.bias
        groups = -(-base.weight.numel() // GROUP)
        packed = torch.empty(groups, GROUP // 2, dtype=torch.uint8, device=base.weight.device)
        scales = torch.empty(groups, device=base.weight.device)
        if not empty:
            packed, scales = quantize(base.weight)
        self.register_buffer("weight", packed)
        self.register_buffer("scales", scales)
        self.register_buffer("table", pairs(base.weight.device), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (self.out_features, self.in_features)
        return _Product.apply(x, self.weight, self.scales, self.table, self.bias, shape)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight as a plain matrix."""
        return dequantize(self.weight, self.scales, self.table, (self.out_features, self.in_features), dtype)
