"""Value embeddings: each block's attention reads, beside its values, a table looked up by the tokens themselves.

Not part of the package: a model of its own, as docs/extend.md says, for the studies `values_*` of benchmarks/ablate.py.

    python run_train.py model=tiny model._target_=benchmarks.value_embeddings.ValueGPT +model.extra.ngrams=[1]
"""

import torch

from nanogpt.core.attention import CausalSelfAttention
from nanogpt.core.model import GPT
from nanogpt.core.ngrams import NgramEmbedding


class QKV(torch.nn.Linear):
    """The projection to q, k and v, with `values` (B, T, C) added to v."""

    values: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = super().forward(x)
        return torch.cat((qkv[..., : -self.values.size(-1)], qkv[..., -self.values.size(-1) :] + self.values.to(qkv.dtype)), dim=-1)


class ValueAttention(CausalSelfAttention):
    """CausalSelfAttention whose values have an embedding added; as many key as query heads."""

    def __init__(self, config, layer: int):
        super().__init__(config, layer)
        self.c_attn = QKV(config.n_embd, 3 * config.n_embd, bias=config.bias)


class ValueGPT(GPT):
    """GPT with tables of the last n tokens for the values, extra.ngrams of them, in all blocks or, with extra.ends, two."""

    def __init__(self, config):
        super().__init__(config)
        blocks = [block for block, layer in enumerate(self.h) if isinstance(layer.attn, ValueAttention)]
        # 名字以 ngrams 开头：优化器就照查找表训练它们
        self.ngrams_values = torch.nn.ModuleDict({
            str(block): torch.nn.ModuleList(NgramEmbedding(n, self.config) for n in self.config.extra["ngrams"]) for block in blocks
        })
        for table in (table for tables in self.ngrams_values.values() for table in tables):
            torch.nn.init.zeros_(table.table.weight)

    def make_attention(self, layer: int) -> torch.nn.Module:
        """Attention with values, where this block has them."""
        between = self.config.extra.get("ends", False) and layer not in (0, self.config.n_layer - 1)
        return super().make_attention(layer) if between else ValueAttention(self.config, layer)

    def hidden(self, idx, cache=None):
        """As ever, the values looked up first."""
        history = cache.recent(max(self.config.extra["ngrams"])) if cache is not None else None
        for block, tables in self.ngrams_values.items():
            self.h[int(block)].attn.c_attn.values = sum(table(idx, history) for table in tables)
        return super().hidden(idx, cache)
