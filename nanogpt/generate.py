"""The decode loop: rows of ids in, one more id per row and step out."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nanogpt.attention import KVCache
from nanogpt.sampling import Sampler, draw

# 每行一次取这么多个随机数，免得每个 token 都往 GPU 送一次
UNIFORMS = 64


@dataclass
class Row:
    """One text that grows. `unread` are ids that the model has not read yet, None once only the newest is left."""

    key: int
    sampler: Sampler
    randoms: torch.Generator
    unread: torch.Tensor | None
    count: int = 0


class Decoder:
    """Decodes up to `capacity` rows together; rows come and go at any step, each with a context of its own.

    A row whose context is full goes on from the newer half of it: these block_size // 2 ids are read
    again from position 0, the older half is forgotten. That holds for RoPE and learned positions alike,
    and costs one reading per block_size // 2 ids. A prompt longer than block_size starts with its end.
    """

    def __init__(self, model, *, capacity: int, max_length: int | None = None, vocab_size: int | None = None):
        self.model = model
        # 模型的词表可能补齐到整数：tokenizer 没有的 id 一律不抽
        self.vocab_size = vocab_size
        self.device = model.device
        self.capacity = capacity
        self.cache = KVCache(model, capacity, max_length)
        self.cache.lengths = []
        self.rows: list[Row] = []
        self.newest = torch.zeros(capacity, dtype=torch.long, device=self.device)
        self.uniforms = torch.zeros(capacity, UNIFORMS, device=self.device)
        # 整篇文字（不只是上下文里的），按行靠左；只有惩罚重复的采样器才读它
        self.history = torch.full((capacity, 64), -1, dtype=torch.long, device=self.device)
        self.written = [0] * capacity

    @torch.inference_mode()
    def add(self, key: int, prompt: Sequence[int], sampler: Sampler, seed: int, *, count: int = 0) -> None:
        """Add a row with at least one id of prompt; it is read at the next step(). `count` ids of it were drawn before."""
        assert len(self.rows) < self.capacity and len(prompt)
        slot = len(self.rows)
        ids = torch.as_tensor(prompt, dtype=torch.long).to(self.device)
        # 随机数总在 CPU 上生成：同一种子在 CPU 与 GPU 上抽到同样的数
        randoms = torch.Generator().manual_seed(seed)
        if count % UNIFORMS:
            # 从半路接着写：随机数也接到同一处
            torch.rand(count // UNIFORMS * UNIFORMS, generator=randoms)
            self.uniforms[slot] = torch.rand(UNIFORMS, generator=randoms).to(self.device)
        else:
            torch.rand(count, generator=randoms)
        self.rows.append(Row(key, sampler, randoms, ids[-self.cache.max_length :], count))
        self.cache.lengths.append(0)
        self._reserve_history(len(ids))
        self.history[slot] = -1
        self.history[slot, : len(ids)] = ids
        self.written[slot] = len(ids)

    @torch.inference_mode()
    def step(self) -> torch.Tensor:
        """Draw the next id of every row, (rows,) in the order of `rows`; -1 where the logits were not finite."""
        self._reread_full_rows()
        logits = self._next_logits().float()[:, : self.vocab_size]
        n = len(self.rows)
        # 一次求和就能看出 NaN 与无穷：贪心与筛选都会把它们盖住
        drawn = torch.where(logits.sum(-1).isfinite(), draw(self._shaped(logits), self._next_uniforms()), -1)
        self.newest[:n] = drawn.clamp(min=0)
        self._note(n)
        for row in self.rows:
            row.count += 1
        return drawn

    @torch.inference_mode()
    def wipe(self, key: int) -> None:
        """Zero what a row with non-finite values left in the cache, before it is removed."""
        # 遮住的位置也会 0 × NaN：下一个用到这一行的文字会跟着坏
        slot = self._slot(key)
        self.cache.k[:, slot].zero_()
        self.cache.v[:, slot].zero_()

    @torch.inference_mode()
    def remove(self, key: int) -> None:
        """Take a row out; the last row moves into its place."""
        slot, last = self._slot(key), len(self.rows) - 1
        self.cache.drop(slot)
        for tensor in (self.newest, self.uniforms, self.history):
            tensor[slot] = tensor[last]
        self.written[slot] = self.written[last]
        self.rows[slot] = self.rows[last]
        self.rows.pop()

    def _slot(self, key: int) -> int:
        return next(slot for slot, row in enumerate(self.rows) if row.key == key)

    # ---- 读 ----

    def _reread_full_rows(self) -> None:
        keep = self.cache.max_length // 2 or 1
        for slot, row in enumerate(self.rows):
            if row.unread is None and self.cache.lengths[slot] == self.cache.max_length:
                # 较新的一半，加上刚写出、还没读的那个
                kept = self.cache.tokens[slot, self.cache.max_length - (keep - 1) :]
                row.unread = torch.cat((kept, self.newest[slot : slot + 1]))

    def _next_logits(self) -> torch.Tensor:
        """Logits (rows, V) behind the newest id of every row."""
        waiting = [slot for slot, row in enumerate(self.rows) if row.unread is not None]
        if waiting and len(waiting) == len(self.rows):
            return self._read(0, [row.unread for row in self.rows])
        for slot in waiting:
            # 别的行正在逐 token 前进：这一行先读到只剩最后一个，再一起走
            unread = self.rows[slot].unread
            self.newest[slot] = unread[-1]
            self.cache.lengths[slot] = 0
            if len(unread) > 1:
                self._read(slot, [unread[:-1]], only_hidden=True)
            self.rows[slot].unread = None
        return self.model.next_logits(self.newest[: len(self.rows)], self.cache)

    def _read(self, start: int, texts: list[torch.Tensor], *, only_hidden: bool = False) -> torch.Tensor | None:
        """Read texts into empty rows from `start` on, in one pass, shorter ones padded on the right."""
        # 因果注意力看不到右边：补的 0 不影响前面，之后会被真正的 token 覆盖
        lengths = [len(t) for t in texts]
        idx = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        hidden = self.model.hidden(idx, self.cache.part(start, start + len(texts)))
        self.cache.lengths[start : start + len(texts)] = lengths
        for row in self.rows[start : start + len(texts)]:
            row.unread = None
        if only_hidden:
            return None
        last = torch.tensor(lengths, device=self.device) - 1
        return self.model.logits(hidden[torch.arange(len(texts), device=self.device), last])

    # ---- 抽 ----

    def _shaped(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits after each row's own sampler."""
        samplers = {id(row.sampler): row.sampler for row in self.rows}
        tokens = self._tokens() if any(s.reads_tokens for s in samplers.values()) else self.newest[: len(self.rows), None]
        if len(samplers) == 1:
            return self.rows[0].sampler(logits, tokens)
        shaped = torch.empty_like(logits)
        for sampler in samplers.values():
            mine = torch.tensor([slot for slot, row in enumerate(self.rows) if row.sampler is sampler], device=self.device)
            shaped[mine] = sampler(logits[mine], tokens[mine])
        return shaped

    def _next_uniforms(self) -> torch.Tensor:
        n = len(self.rows)
        for slot, row in enumerate(self.rows):
            if row.count % UNIFORMS == 0:
                self.uniforms[slot] = torch.rand(UNIFORMS, generator=row.randoms).to(self.device)
        columns = [row.count % UNIFORMS for row in self.rows]
        if len(set(columns)) == 1:
            return self.uniforms[:n, columns[0]]
        return self.uniforms[torch.arange(n, device=self.device), torch.tensor(columns, device=self.device)]

    # ---- 全文 ----

    def _reserve_history(self, length: int) -> None:
        if length > self.history.size(1):
            # 成倍增长，搬动的总代价与长度成正比
            longer = torch.full((self.capacity, max(length, 2 * self.history.size(1))), -1, dtype=torch.long, device=self.device)
            longer[:, : self.history.size(1)] = self.history
            self.history = longer

    def _note(self, n: int) -> None:
        """Append the newest ids to the history."""
        written = self.written[:n]
        self._reserve_history(max(written) + 1)
        if len(set(written)) == 1:
            self.history[:n, written[0]] = self.newest[:n]
        else:
            self.history[:n].scatter_(1, torch.tensor(written, device=self.device)[:, None], self.newest[:n, None])
        for slot in range(n):
            self.written[slot] += 1

    def _tokens(self) -> torch.Tensor:
        """Texts so far, (rows, T), the newest last, -1 before the start."""
        n = len(self.rows)
        written = self.written[:n]
        longest = max(written)
        if min(written) == longest:
            return self.history[:n, :longest]
        # 靠左存、靠右读：每行的最后一个 token 都在最后一列
        at = torch.arange(longest, device=self.device) - longest + torch.tensor(written, device=self.device)[:, None]
        return self.history[:n].gather(1, at.clamp(min=0)).masked_fill(at < 0, -1)
