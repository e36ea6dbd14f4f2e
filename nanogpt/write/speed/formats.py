"""The forms of a model's matrices for writing: int8, int4, bf16 on a CPU; converted whole or piece by piece."""

# 写作时矩阵存成什么：convert 就地换掉一个模型的 Linear 与词嵌入，fill 边读边换，float32 的整个模型从不同时在内存里
# 每种形式的类与 nn.Linear 同名同形（weight、bias、out_features）：core 的模型不必改，fast_cpu 也认得
# 绑在一起的权重仍是同一份；只用于写作：没有梯度，也不存盘

import re
from collections.abc import Iterable, Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanogpt.write.speed import int4, int8
from nanogpt.write.speed.int4 import Int4Embedding, Int4Linear
from nanogpt.write.speed.int8 import Int8Embedding, Int8Linear

# 换算成别的形式的
CONVERTED = ("int8", "int4", "bf16")
# 一次换算这么多个数：float32 的中间结果只有几 MiB
PIECE = 2**20


class Bf16Linear(nn.Module):
    """nn.Linear with a bf16 weight on a CPU; x (..., K) -> (..., N) float32, as if the weight were float32."""

    # 舍入的只有权重：编译好的一步在寄存器里把它补成 float32，这里是别的路要对得上的那一条
    # native：很多行时激活也舍入到 bf16，用 CPU 自己的乘法；由 acceleration 在量过的机器上打开

    native = False

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.out_features = len(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.native:
            return F.linear(x, self.weight.float(), self.bias)
        y = F.linear(x.bfloat16(), self.weight).float()
        return y if self.bias is None else y + self.bias


class Bf16Embedding(nn.Module):
    """nn.Embedding with bf16 rows; idx (...) -> (..., C) float32."""

    # 模型的激活是 float32：dtype 说的是它，不是权重

    dtype = torch.float32

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.register_buffer("weight", weight)
        self.num_embeddings = len(weight)

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        return F.embedding(idx, self.weight).float()


def wanted(precision: str, width: int, *, multiplied: bool) -> str:
    """The form of a matrix (N, width) of a model in this precision; a table whose rows are looked up is never int4."""
    # 查表不读整个矩阵：4 位省不下时间，只丢精度
    return "int8" if precision == "int4" and (width % int4.GROUP or not multiplied) else precision


def rooms(form: str, weight: torch.Tensor, count: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Room for `count` matrices of such a weight's shape in a form, one behind the other: (weight, scale) or (weight,).
    """
    # 各层同名的矩阵挨着放：编译好的一步要的正是这样，不必再搬一遍
    rows, width = weight.shape
    blocks, groups = -(-rows // int4.ROWS), width // int4.GROUP
    wanted = {
        "bf16": [((rows, width), torch.bfloat16)],
        "int8": [((rows, width), torch.int8), ((rows,), torch.float32)],
        "int4": [((blocks, groups, int4.GROUP * int4.ROWS // 2), torch.uint8),
                 ((blocks, groups, int4.ROWS), torch.bfloat16)],
    }[form]
    return zip(*(torch.empty(count, *shape, dtype=dtype, device=weight.device) for shape, dtype in wanted), strict=True)


def write(stored: tuple[torch.Tensor, ...], start: int, rows: torch.Tensor) -> None:
    """Write rows of a float matrix, from row `start` on, into its room; start is a multiple of int4.ROWS."""
    if stored[0].dtype == torch.bfloat16:
        stored[0][start : start + len(rows)] = rows
        return
    unit, quantize = (int4.ROWS, int4.quantize) if stored[0].dtype == torch.uint8 else (1, int8.quantize)
    at = slice(start // unit, -(-(start + len(rows)) // unit))
    stored[0][at], stored[1][at] = quantize(rows)


def in_pieces(tensor: torch.Tensor) -> Iterable[tuple[int, torch.Tensor]]:
    """(first row, rows) of a tensor, some MiB at a time."""
    step = max(1, PIECE // max(1, tensor[0].numel()) // int4.ROWS) * int4.ROWS if tensor.dim() else 1
    return ((start, tensor[start : start + step]) for start in range(0, len(tensor), step))


@torch.no_grad()
def convert(model: nn.Module, precision: str, *, empty: bool = False) -> None:
    """Replace every nn.Linear and token embedding by its int8, int4 or bf16 form, in place; tied weights stay tied.

    With `empty` the weights will be filled in.
    """
    # count：这个张量代表几个数；补齐的行、没有的 bias 不算（GPT.parameter_count）
    done: dict[int, tuple[torch.Tensor, ...]] = {}
    layers: dict[tuple, Iterator[tuple[torch.Tensor, ...]]] = {}
    multiplied = {id(m.weight) for m in model.modules() if type(m) is nn.Linear}
    for place, parent in list(model.named_modules()):
        in_block = re.fullmatch(r"h\.\d+\.(.+)", place)
        for name, child in list(parent.named_children()):
            # 位置表直接按行切片，又很小，留着不动
            if type(child) not in (nn.Linear, nn.Embedding) or name == "wpe":
                continue
            weight = child.weight
            if id(weight) not in done:
                form = wanted(precision, weight.size(1), multiplied=id(weight) in multiplied)
                key = (in_block[1] if in_block else place, name, form, weight.shape)
                if key not in layers:
                    layers[key] = rooms(form, weight, len(model.h) if in_block else 1)
                done[id(weight)] = next(layers[key])
                done[id(weight)][0].count = weight.numel()
                for start, rows in () if empty else in_pieces(weight.detach()):
                    write(done[id(weight)], start, rows)
            setattr(parent, name, _converted(child, done[id(weight)]))


def _converted(child: nn.Linear | nn.Embedding, stored: tuple[torch.Tensor, ...]) -> nn.Module:
    """The module that takes the place of a linear or an embedding."""
    dtype, linear = stored[0].dtype, type(child) is nn.Linear
    if dtype == torch.uint8:
        if not linear:
            return Int4Embedding(*stored, child.weight.dtype, child.num_embeddings)
        bias = child.weight.new_zeros(len(child.weight)) if child.bias is None else child.bias.detach()
        bias.count = 0 if child.bias is None else len(bias)
        return Int4Linear(*stored, bias)
    kinds = (Bf16Linear, Bf16Embedding) if dtype == torch.bfloat16 else (Int8Linear, Int8Embedding)
    if linear:
        return kinds[0](*stored, None if child.bias is None else child.bias.detach())
    return Bf16Embedding(*stored) if dtype == torch.bfloat16 else Int8Embedding(*stored, child.weight.dtype)


@torch.no_grad()
def fill(model: nn.Module, pieces: Iterable[tuple[str, int, torch.Tensor]], precision: str) -> None:
    """Fill a model whose weights hold nothing yet with (name, first row, rows), its matrices converted at once."""
    # 整个 float32 的模型从不同时在内存里：GPT-2 的峰值从几份全量降到一份小的
    convert(model, precision, empty=True)
    own = model.state_dict()
    for name, start, rows in pieces:
        stored = (own[name], own.get(name.removesuffix("weight") + "scale"))
        if stored[0].dtype in (torch.int8, torch.uint8, torch.bfloat16):
            for offset, some in in_pieces(rows):
                write(stored, start + offset, some)
        else:
            stored[0][start : start + len(rows)] = rows
