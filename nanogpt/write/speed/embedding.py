"""What the first block reads, compiled: a token's row, its position's, and those of the n-grams that end with it."""

# GPT.embed 的另一份：四张 n-gram 表在 PyTorch 里是五六十个小运算，小模型上与其余各层加起来一样久
# 表存成什么格式，由权重的类型定；每一行的算法与旁边有几行无关

import numpy as np
import torch
from numba import types
from numba.extending import overload

from nanogpt.core.kernels import RMS_EPS
from nanogpt.core.kv_cache import KVCache
from nanogpt.core.loops.compiled import kernel
from nanogpt.core.loops.numbers import as_array, as_float, cache_aligned
from nanogpt.core.model import Dropout
from nanogpt.write.speed.formats import Bf16Embedding
from nanogpt.write.speed.int4 import GROUP, ROWS, Int4Embedding
from nanogpt.write.speed.int8 import Int8Embedding

TABLES = (torch.nn.Embedding, Bf16Embedding, Int8Embedding, Int4Embedding)
DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.uint8)
# 表的张数是类型的一部分：补到这么多，不为每种张数各编译一遍
AT_LEAST = 4


def _add_row(table, i, out):
    """Add row i of a table (weight, scale) to out (C,)."""


@overload(_add_row, inline="always")
def _add_row_of(table, i, out):
    dtype = table[0].dtype
    if dtype in (types.float32, types.int16):

        def add(table, i, out):
            for c in range(len(out)):
                out[c] += as_float(table[0][i, c])

    elif dtype == types.int8:

        def add(table, i, out):
            scale = table[1][i]
            for c in range(len(out)):
                out[c] += np.float32(table[0][i, c]) * scale

    else:

        def add(table, i, out):
            block, row = i // ROWS, i % ROWS
            for c in range(len(out)):
                # int4.quantize() 的次序：一组里每 8 列两个字节段，低半与高半隔四列
                group, place = c // GROUP, c % GROUP
                byte = table[0][block, group, (place // 8 * ROWS + row) * 4 + place % 4]
                code = byte >> 4 if place % 8 >= 4 else byte & 15
                out[c] += np.float32(np.int32(code) - 8) * as_float(table[1][block, group, row])

    return add


@kernel(reorder=True)
def _square(row):
    total = np.float32(0.0)
    for c in range(len(row)):
        total += row[c] * row[c]
    return total


@kernel
def _embed(idx, V, tokens, lengths, wte, wpe, tables, orders, hashes, eps, x):
    """Rows (B * T, C) of x for idx (B, T), which are written into tokens (B, L) from lengths[b] on; False if one of
    them is no id of the model (V of them).

    orders (n,) are the n of the n-grams, hashes (n, 2) multiplier and rows of their tables; eps < 0: no norm.
    """
    T, C = idx.shape[1], x.shape[1]
    for b in range(idx.shape[0]):
        for t in range(T):
            last, token, row = lengths[b] + t, idx[b, t], x[b * T + t]
            if token < 0 or token >= V:
                # 编译好的代码不查下标；用负的 id 标出文章开头（marked）只在训练时有
                return False
            tokens[b, last] = token
            for c in range(C):
                row[c] = np.float32(0.0)
            _add_row(wte, token, row)
            if wpe.shape[0] > 0:
                for c in range(C):
                    row[c] += wpe[last, c]
            for n in range(len(orders)):
                key = token + 1
                for back in range(1, orders[n]):
                    # 开头之前没有字，记作 0；溢出时回绕，与训练时一样
                    key = key * hashes[n, 0] + (tokens[b, last - back] + 1 if back <= last else 0)
                _add_row(tables[n], key % hashes[n, 1], row)
            if eps >= 0:
                r = np.float32(1.0) / np.sqrt(_square(row) / np.float32(C) + eps)
                for c in range(C):
                    row[c] *= r
    return True


def _arrays(table: torch.nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """Weight and scale of a table, an empty scale where it has none."""
    return as_array(table.weight.detach()), as_array(getattr(table, "scale", torch.zeros(0)))


class Embedding:
    """Called as embedding(idx (B, T), cache) -> x (B * T, C) float32; notes the ids in the cache, not its lengths."""

    def __init__(self, model):
        c, ngrams = model.config, list(model.ngrams)
        self.wte = _arrays(model.wte)
        self.wpe = np.zeros((0, c.n_embd), np.float32) if model.wpe is None else model.wpe.weight.detach().numpy()
        tables = [_arrays(ngram.table) for ngram in ngrams] or [_nothing_like(self.wte, c.n_embd)]
        self.tables = (*tables, *[tables[0]] * (AT_LEAST - len(tables)))
        self.orders = np.array([ngram.n for ngram in ngrams], np.int64)
        self.hashes = np.array([[ngram.multiplier, len(table[0])] for ngram, table in zip(ngrams, tables)], np.int64)
        self.hashes = self.hashes.reshape(-1, 2)
        self.eps = np.float32(RMS_EPS if c.embed_norm else -1)
        self.size, self.vocab_size = c.n_embd, c.vocab_size

    @staticmethod
    def fits(model) -> bool:
        """Whether the model looks up its rows as is done here."""
        tables = [ngram.table for ngram in model.ngrams]
        known = all(type(one) in TABLES and not getattr(one, "max_norm", None) for one in (model.wte, *tables))
        if not known or type(model.drop) is not Dropout:
            return False
        weights = [table.weight for table in tables]
        # 几张表要是同一种，才编译得成一段代码
        alike = len({weight.dtype for weight in weights}) <= 1 and all(weight.is_contiguous() for weight in weights)
        return alike and all(weight.dtype in DTYPES for weight in (model.wte.weight, *weights)) and (
            model.wpe is None or model.wpe.weight.dtype == torch.float32
        )

    def __call__(self, idx: torch.Tensor, cache: KVCache) -> np.ndarray:
        B, T = idx.shape
        assert max(cache.lengths) + T <= cache.max_length, f"{T} more positions do not fit into {cache.max_length}"
        x = cache_aligned((B * T, self.size))
        at = cache.tokens.numpy(), np.array(cache.lengths)
        known = _embed(
            idx.contiguous().numpy(), self.vocab_size, *at, self.wte, self.wpe, self.tables, self.orders, self.hashes,
            self.eps, x,
        )
        if not known:
            raise IndexError(f"ids {idx.min()} … {idx.max()}: the model has 0 … {self.vocab_size - 1}")
        return x


def _nothing_like(table: tuple[np.ndarray, np.ndarray], size: int) -> tuple[np.ndarray, np.ndarray]:
    """A table of no rows for a model without n-grams, of a kind that its tables could have."""
    # 查的表从不存成 4 位：那样的模型，表是 int8 的
    dtype = np.int8 if table[0].dtype == np.uint8 else table[0].dtype
    return np.zeros((0, size), dtype), np.zeros(0, np.float32)
