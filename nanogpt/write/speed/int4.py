"""4-bit weights for writing: groups of 32 along the input, one scale each; activations are rounded to int8 by rows.

Symmetric, the scale chosen so that the largest weight of a group is -8 (as llama.cpp's Q4_0 does), kept in bf16: 4.5
bits a weight. The integers of a group are exact, and groups are added up in order, so that every way to compute it
gives the same bits.
"""

# 写作时的 4 位：一个 token 只是读一遍权重，读的字节是 int8 的一半多一点
# 16 行权重交错着存：一条 64 字节的指令里每个 32 位归一行，不必横着求和（int4_dot）；一个字节的低半与高半隔四列
# plain_linear 是别的路要对得上的那一条，没有 numba 时也用它；显卡上还原成浮点再乘，只省显存

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanogpt.write.speed.int8 import quantize_rows

GROUP, ROWS = 32, 16


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight (N, K) as two codes to a byte, (blocks, K / GROUP, 16 * ROWS) uint8, and scales (blocks, K / GROUP, ROWS).

    A block is ROWS rows, the last one filled up; K is a multiple of GROUP.
    """
    groups = F.pad(weight.float(), (0, 0, 0, -len(weight) % ROWS)).view(-1, ROWS, weight.size(1) // GROUP, GROUP)
    largest = groups.gather(3, groups.abs().argmax(dim=3, keepdim=True))
    scale = (largest / -8).bfloat16()
    # 先把 scale 舍入，再照它取整：舍入的误差不另算
    exact = torch.where(scale == 0, 1.0, scale.float())
    codes = (groups / exact).round_().add_(8).clamp_(0, 15).to(torch.uint8)
    # (blocks, groups, 第几条指令, 行, 4 列)，低半与高半
    low, high = codes.view(*codes.shape[:3], 4, 2, 4).permute(4, 0, 2, 3, 1, 5)
    packed = (low | high << 4).reshape(len(groups), -1, GROUP * ROWS // 2)
    return packed, scale[..., 0].mT.contiguous()


def codes_of(packed: torch.Tensor) -> torch.Tensor:
    """The codes -8 … 7 of quantize(), (blocks * ROWS, K) int8."""
    parts = packed.view(*packed.shape[:2], 4, ROWS, 4)
    codes = torch.stack((parts & 15, parts >> 4)).permute(1, 4, 2, 3, 0, 5)
    return codes.reshape(len(packed) * ROWS, -1).to(torch.int8) - 8


def dense(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The matrix (blocks * ROWS, K) that the codes stand for, float32."""
    factors = scale.float().mT.reshape(-1, scale.size(1), 1)
    return (codes_of(packed).view(*factors.shape[:2], GROUP) * factors).flatten(1)


def plain_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """x (B, K) float32, rounded to int8 by rows, times the transposed matrix of these codes, plus bias (N,)."""
    q, row_scale = quantize_rows(x)
    codes, factors = codes_of(weight), scale.float().mT.reshape(-1, scale.size(1))
    y = torch.zeros(len(x), len(codes))
    for group, (a, b) in enumerate(zip(q.split(GROUP, dim=1), codes.split(GROUP, dim=1), strict=True)):
        # 127 * 8 * 32 < 2^24：float32 里的整数没有舍入
        y += F.linear(a.float(), b.float()) * factors[:, group]
    return y.mul_(row_scale[:, None])[:, : len(bias)] + bias


class Int4Linear(nn.Module):
    """nn.Linear with a 4-bit weight; x (..., K) -> (..., N) in x's dtype."""

    # 属性名同 nn.Linear 与 Int8Linear；multiply 由 acceleration 换成这台机器上快的，结果逐位相同

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor):
        super().__init__()
        self.multiply = plain_linear
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.out_features = len(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu":
            return F.linear(x, dense(self.weight, self.scale)[: self.out_features].to(x.dtype), self.bias.to(x.dtype))
        rows = x.detach().reshape(-1, x.size(-1)).float().contiguous()
        return self.multiply(rows, self.weight, self.scale, self.bias).to(x.dtype).view(*x.shape[:-1], -1)


class Int4Embedding(nn.Module):
    """nn.Embedding whose rows are those of an Int4Linear; idx (...) -> (..., C) in `dtype`."""

    # 与输出层绑在一起的词嵌入：不一起量化，内存里就要留两份

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, num_embeddings: int):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.dtype, self.num_embeddings = dtype, num_embeddings

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        block, row = idx.flatten() // ROWS, idx.flatten() % ROWS
        # 只取这一行的：当作只有一行的块
        parts = self.weight.view(*self.weight.shape[:2], 4, ROWS, 4)[block, :, :, row]
        codes = torch.stack((parts & 15, parts >> 4), dim=3).to(torch.int8) - 8
        rows = codes.view(len(block), -1, GROUP) * self.scale[block, :, row].float()[:, :, None]
        return rows.view(*idx.shape, -1).to(self.dtype)
