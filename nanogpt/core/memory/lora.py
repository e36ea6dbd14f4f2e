"""LoRA: frozen linears with trained low-rank updates beside them (Hu et al., arXiv:2106.09685)."""

# LoRA（finetune.method=lora）：原来的权重冻住，旁边训练一对小矩阵，梯度与优化器状态只有它们的那一点
# add_adapters 在训练开始时换下 blocks 里指名的 linear；checkpoint 存的是冻住的权重加两个小矩阵
# frozen_weights=nf4 时冻住的权重再压成 4 位（nf4）：它就成了 adapter 里面的一个模块
# 写作、导出之前由 merge 加回权重，之后就是普通的模型：别处不必认得 LoRA

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanogpt.base.config import FinetuneConfig
from nanogpt.base.language import ConfigError
from nanogpt.core.kernels import Dropout
from nanogpt.core.memory.nf4 import NF4Linear


class LoRALinear(nn.Linear):
    """y = W x + b + (alpha / rank) * B A x; W and b keep their names and are frozen, A and B are trained."""

    # 是 nn.Linear 的子类、weight 与 bias 的名字不变：预训练的权重照样装得进

    def __init__(self, base: nn.Linear, config: FinetuneConfig):
        # 先造在 meta 上：马上换成原来的权重，不必白占一份内存
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.base = base if isinstance(base, NF4Linear) else None
        place = {"device": base.weight.device, "dtype": base.dtype if self.base else base.weight.dtype}
        self.weight, self.bias = (None, None) if self.base else (base.weight, base.bias)
        self.lora_a = nn.Parameter(torch.empty(config.rank, base.in_features, **place))
        # B 从零开始：第 0 步与原模型完全相同
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, config.rank, **place))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.scale = config.alpha / config.rank
        self.dropout = Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plain = self.base(x) if self.base else super().forward(x)
        # 先降到 rank 维再升回来，不必造出 B A 这个大矩阵
        return plain + self.scale * F.linear(F.linear(self.dropout(x), self.lora_a), self.lora_b)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain linear with the update added to its weight."""
        # 合并在 fp32 里算：半精度的权重加小增量会丢位
        update = self.scale * (self.lora_b.float() @ self.lora_a.float())
        frozen = self.base.dense(torch.float32) if self.base else self.weight.float()
        return plain_linear((frozen + update).to(self.lora_a.dtype), self.base.bias if self.base else self.bias)


def plain_linear(weight: torch.Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """A linear of this weight and bias."""
    plain = nn.Linear(weight.size(1), weight.size(0), bias=bias is not None, device="meta")
    plain.weight, plain.bias = nn.Parameter(weight), bias
    return plain


def add_adapters(model: nn.Module, config: FinetuneConfig, *, empty: bool = False) -> None:
    """Freeze the model and put adapters beside those linears of its blocks that config.linears names.

    `empty`: the weights of all will be loaded, those that the model holds do not matter.
    """
    inside = {name: m for name, m in model.h.named_modules() if isinstance(m, nn.Linear)}
    have = sorted({name.rpartition(".")[2] for name in inside})
    if not config.linears or set(config.linears) - set(have):
        raise ConfigError(
            "finetune.linears={got} does not fit the model; choose from: {have}",
            got=list(config.linears), have=", ".join(have),
        )
    model.requires_grad_(False)
    for name, linear in inside.items():
        if config.frozen_weights == "nf4":
            linear = NF4Linear(linear, empty=empty)
            # 一个接一个：原来的马上放掉，内存不必同时有两份
            replace_module(model.h, name, linear)
            inside[name] = None
        if name.rpartition(".")[2] in config.linears:
            replace_module(model.h, name, LoRALinear(linear, config))


def merge(model: nn.Module) -> nn.Module:
    """Fold all adapters into plain weights, in place, and make every parameter trainable again; return the model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            replace_module(model, name, module.merged())
        elif isinstance(module, NF4Linear) and not name.endswith(".base"):
            replace_module(model, name, plain_linear(module.dense(module.dtype), module.bias))
    return model.requires_grad_(True)


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where the dotted name points."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)
