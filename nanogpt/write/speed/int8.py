"""8-bit weights for writing: each row of a matrix as int8 with one scale, activations as they were.

Symmetric round-to-nearest per output row (LLM.int8 without outlier columns, arXiv:2208.07339, since
activations are not quantised). A quarter of float32's bytes; a token is bound by reading them.
"""

# 写作时的 8 位权重：每行一个 scale，激活照旧；读权重的字节少到四分之一，而写一个 token 的时间就是读一遍权重的时间
# quantize_model 由 acceleration 在 precision=int8 时调用，把 Linear 与词嵌入就地换掉，绑在一起的权重仍是同一份
# 只用于写作：没有梯度，也不存盘

import torch
import torch.nn as nn
import torch.nn.functional as F

# 行数少时直接用 int8 的内核；多了先还原成浮点再做矩阵乘更快
FEW_ROWS = 4
# 它一次读 16 个数，不问够不够：宽度不是 16 的倍数就读到别人的内存里，写出乱字，甚至崩溃
KERNEL_WIDTH = 16


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight (N, K) as int8 (N, K) and scale (N,) with weight ~ int8 * scale[:, None]."""
    scale = weight.float().abs().amax(dim=1).clamp(min=1e-12) / 127
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale


class Int8Linear(nn.Module):
    """nn.Linear with an int8 weight; x (..., K) -> (..., N) in x's dtype."""

    # 形状与属性名同 nn.Linear：换上之后模型的代码不必改，fast_cpu 也认得

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        # buffer 而不是参数：不求导，.to(device) 照样跟着走
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // x.size(-1)
        if x.device.type == "cpu" and rows <= FEW_ROWS and x.size(-1) % KERNEL_WIDTH == 0:
            # 只有 bf16 激活的内核是向量化的；bf16 与 fp32 的尾数差远小于 int8 的舍入
            y = torch._weight_int8pack_mm(x.reshape(rows, -1).bfloat16(), self.weight, self.scale.bfloat16())
            y = y.to(x.dtype).view(*x.shape[:-1], -1)
        else:
            y = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)


class Int8Embedding(nn.Module):
    """nn.Embedding with int8 rows; idx (...) -> (..., C) in `dtype`."""

    # 与输出层绑在一起的词嵌入：不一起量化，内存里就要留两份

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.dtype = dtype
        self.num_embeddings = weight.size(0)

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        return F.embedding(idx, self.weight).to(self.dtype) * F.embedding(idx, self.scale[:, None]).to(self.dtype)


@torch.no_grad()
def quantize_model(model: nn.Module) -> None:
    """Replace every nn.Linear and token embedding by its int8 form, in place; tied weights stay tied."""
    done: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            # 位置表直接按行切片，又很小，留着不动
            if type(child) not in (nn.Linear, nn.Embedding) or name == "wpe":
                continue
            weight = child.weight
            if id(weight) not in done:
                done[id(weight)] = quantize(weight)
            if type(child) is nn.Linear:
                bias = None if child.bias is None else child.bias.detach()
                setattr(parent, name, Int8Linear(*done[id(weight)], bias))
            else:
                setattr(parent, name, Int8Embedding(*done[id(weight)], weight.dtype))
