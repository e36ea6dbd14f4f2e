# 权重从哪里出发：gpt2 按原版，modern 让每个 block 从恒等映射开始
# 抽数的次序就是模块登记的次序，改了它，同一个种子就得出另一个模型
"""How the weights of a fresh GPT are drawn."""

import math

import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode


class Undrawn(TorchFunctionMode):
    """Inside it torch.nn.init leaves tensors as they are: for models whose weights are loaded or of no interest."""

    # 马上要被覆盖的数不必抽：GPT-2 124M 省一秒多；在 meta 上抽，还会带进整个 torch._dynamo

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def draw_normal(weight: torch.Tensor, std: float) -> None:
    """Fill with normal values drawn in float32: a 16-bit model starts from the rounded weights of a float32 one."""
    if weight.dtype == torch.float32:
        nn.init.normal_(weight, std=std)
    else:
        # bf16 的均匀分布只有 8 位，由它得出的正态分布又粗又缺尾巴；逐个张量转，不多占整份内存
        weight.copy_(torch.empty(weight.shape, dtype=torch.float32, device=weight.device).normal_(std=std))


@torch.no_grad()
def initialize(model: nn.Module) -> None:
    """Draw all weights of a GPT anew from torch's global generator, as its config.init says."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            # gpt2 固定 0.02；modern 按输入宽度缩放，每层输出方差约为 1
            std = 0.02 if model.config.init == "gpt2" else 1.0 / math.sqrt(module.in_features)
            draw_normal(module.weight, std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            draw_normal(module.weight, 0.02)
    for block in model.h:
        for projection in (getattr(block.attn, "c_proj", None), getattr(block.mlp, "c_proj", None)):
            if projection is None:
                continue  # 使用者自己的模块可以没有 c_proj
            if model.config.init == "gpt2":
                # 残差相加 2L 次，按 1/sqrt(2L) 缩小，方差不随深度增长
                draw_normal(projection.weight, 0.02 / math.sqrt(2 * model.config.n_layer))
            else:
                # 从恒等映射出发：开始时每个 block 都不改动残差流
                nn.init.zeros_(projection.weight)
    for ngram in model.ngrams:
        # 从零开始，没见过的 n-gram 不带噪声
        nn.init.zeros_(ngram.table.weight)
    if model.config.init == "modern" and not model.config.tie_embeddings:
        draw_normal(model.wte.weight, 1.0)
        nn.init.zeros_(model.lm_head.weight)
