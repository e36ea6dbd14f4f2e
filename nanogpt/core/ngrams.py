# modern 配方里的 n-gram 嵌入：除了当前的字，再按“最近 n 个字”查一张表，加到嵌入上
# 查表不做乘法，几乎不花时间；表放不下全部组合时用哈希，冲突由训练自己消化
"""Embeddings of the last n tokens, hashed into a table."""

import torch
import torch.nn as nn

from nanogpt.base.config import ModelConfig
from nanogpt.base.language import text
from nanogpt.core.tables import look_up


class NgramEmbedding(nn.Module):
    """Hashed embedding of the last n tokens at each position, (B, T) -> (B, T, C).

    A table look-up that costs no matrix product (Over-Tokenized Transformer, arXiv:2501.16975).
    """

    def __init__(self, n: int, config: ModelConfig):
        super().__init__()
        self.n = n
        # 全部 n-gram 都放得下时逐一编号，没有冲突，表也更小；否则用大奇数做滚动哈希
        distinct = (config.vocab_size + 1) ** n
        self.multiplier = config.vocab_size + 1 if distinct <= config.ngram_buckets else 1000003
        self.table = nn.Embedding(min(distinct, config.ngram_buckets), config.n_embd)

    def forward(
        self, idx: torch.Tensor, history: torch.Tensor | None = None, inside: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """history (B, >= n - 1) holds the ids before idx, -1 where there are none.

        inside (B, T) says how many ids before each one belong to the same document; None: all of them.
        """
        T = idx.size(1)
        if history is None:
            history = idx.new_full((), -1).expand(idx.size(0), self.n - 1)
        # 逐 token 解码时，n-gram 的前几个字在缓存里；开头没有前文，记作 -1
        # id 整体加 1，空位成为 0，与任何真 token 区分
        padded = torch.cat((history[:, history.size(1) - (self.n - 1) :], idx), dim=1) + 1
        key = padded[:, padded.size(1) - T :]
        for back in range(1, self.n):
            start = padded.size(1) - T - back
            before = padded[:, start : start + T]
            if inside is not None:
                # 别的文章的字与没有前文一样，都是 0
                before = before * (inside >= back)
            # int64 溢出时自然回绕，不影响哈希
            key = key * self.multiplier + before
        return look_up(self.table, key % self.table.num_embeddings)


def table_count(model: nn.Module) -> int:
    """How many of a model's parameters lie in n-gram tables."""
    return sum(part.table.weight.numel() for part in model.modules() if isinstance(part, NgramEmbedding))


def size_text(model: nn.Module) -> str:
    """How many parameters a model has, for people; look-up tables stand apart."""
    # 表占了小模型的大半，却几乎不参与计算：合成一个数，会被当成一个大得多的模型
    tables = table_count(model)
    rest = f"{(model.parameter_count() - tables) / 1e6:.2f}M"
    return text("{rest} + {tables} in look-up tables", rest=rest, tables=f"{tables / 1e6:.2f}M") if tables else rest
