# 写作的循环：每步给每行抽一个 id；行随时来去，各有各的上下文、采样器与种子
# 一步的路：next_logits（读还没读的，或所有行一起走一格）-> 引导 -> 采样器 -> 抽
# 一行文字占模型的一条 lane；有引导的再占一条“影子”，只差没有标签
"""The decode loop: rows of ids in, one more id per row and step out."""

from collections.abc import Sequence

import torch

from nanogpt.core.kv_cache import KVCache
from nanogpt.core.lanes import Lane, Order, Row, draw_each, guided, order_of, passes
from nanogpt.core.machine import on_device
from nanogpt.core.sampling import Sampler
from nanogpt.core.scoring import Likely

# 每行一次取这么多个随机数，免得每个 token 都往 GPU 送一次
UNIFORMS = 64


class Decoder:
    """Decodes up to `capacity` rows together; rows come and go at any step, each with a context of its own.

    A row whose context is full goes on from the newer half of it: these block_size // 2 ids are read
    again from position 0, the older half is forgotten. That holds for RoPE and learned positions alike,
    and costs one reading per block_size // 2 ids. A prompt longer than block_size starts with its end.

    A model of documents reads [separator, labels …, prompt …]; a part that is read again, and the end of a long prompt,
    stand behind the labels alone, as in training. Guidance g draws from u + g (c - u), where c are the logits behind
    the labels and u those without them (Sanchez et al. 2023, arXiv:2306.17806); both are lanes of one batch. Taken of
    logits instead of log-probabilities this differs by a constant per row, which the softmax does not see.
    """

    def __init__(
        self, model, *, capacity: int, max_length: int | None = None, vocab_size: int | None = None,
        never: Sequence[int] = (),
    ):
        self.model = model
        # 模型的词表可能补齐到整数：tokenizer 没有的 id 一律不抽
        self.vocab_size = vocab_size
        self.device = model.device
        self.capacity = capacity
        # 标签只读不写：训练时它们从来不是目标，logits 没有意义
        self.never = torch.tensor(list(never), dtype=torch.long, device=self.device) if never else None
        # 编译好的一步带着它自己的采样（write/speed/drawing）
        self.draw = getattr(getattr(model, "fast_step", None), "draw", draw_each)
        separator = model.config.separator
        self.separator = torch.tensor([] if separator is None else [separator], dtype=torch.long)
        self.cache = KVCache(model, capacity, max_length)
        self.cache.lengths = []
        self.rows: list[Row] = []
        self.lanes: list[Lane] = []
        self._order: Order | None = None
        self.top: int | None = None
        """How many of the most likely ids step() notes in `likely`, beside the drawn ones; None: it notes nothing."""
        self.likely: Likely | None = None
        # 每条 lane 下一个要读的 id
        self.newest = torch.zeros(capacity, dtype=torch.long, device=self.device)
        self.uniforms = torch.zeros(capacity, UNIFORMS, device=self.device)

    @torch.inference_mode()
    def add(
        self, key: int, prompt: Sequence[int], sampler: Sampler, seed: int, *,
        count: int = 0, labels: Sequence[int] = (), guidance: float = 1.0,
    ) -> None:
        """Add a row, read at the next step(); `count` ids of its prompt were drawn before.

        Only a model of documents takes an empty prompt. With labels and guidance != 1 the row takes a second lane.
        Labels count neither as text nor as repetitions.
        """
        assert len(self.rows) < self.capacity and (len(prompt) or len(self.separator))
        slot = len(self.rows)
        ids = torch.as_tensor(prompt, dtype=torch.long)
        # 随机数总在 CPU 上生成：同一种子在 CPU 与 GPU 上抽到同样的数
        randoms = torch.Generator().manual_seed(seed)
        if count % UNIFORMS:
            # 从半路接着写：随机数也接到同一处
            torch.rand(count // UNIFORMS * UNIFORMS, generator=randoms)
            self.uniforms[slot] = on_device(torch.rand(UNIFORMS, generator=randoms), self.device)
        else:
            torch.rand(count, generator=randoms)
        labels = torch.tensor(list(labels), dtype=torch.long, device=self.device)
        row = Row(key, sampler, randoms, count, labels, float(guidance), ids[:0].to(self.device))
        self.rows.append(row)
        self._open_lanes(row, ids)

    def _open_lanes(self, row: Row, ids: torch.Tensor) -> None:
        """Where the model begins to read a text."""
        start = 0
        if len(self.separator):
            # 一次只读一篇：与训练时一样，看不到分隔符之前的
            ends = (ids == self.separator).nonzero()
            start = int(ends[-1, 0]) + 1 if len(ends) else 0
        room = max(1, self.cache.max_length - len(row.labels))
        # 放不下的长文从中间读起，前面没有分隔符
        fits = len(self.separator) + len(ids) - start <= room
        opening = (self.separator if fits else self.separator[:0]).to(self.device)
        start = max(start, len(ids) - room)
        row.earlier, text = ids[:start].to(self.device), ids[start:].to(self.device)
        lanes = [Lane(row, torch.cat((opening, row.labels, text)), len(opening) + len(row.labels))]
        if row.guidance != 1 and len(row.labels):
            lanes.append(Lane(row, torch.cat((opening, text)), len(opening), shadow=True))
        if len(self.lanes) + len(lanes) > len(self.newest):
            # 有人要引导才多占一倍：不用它的人不付显存
            self.cache = self.cache.widened(2 * self.capacity)
            self.newest = torch.cat((self.newest, torch.zeros_like(self.newest)))
        self.lanes += lanes
        self.cache.lengths += [0] * len(lanes)
        self._note_order()

    @torch.inference_mode()
    def step(self) -> torch.Tensor:
        """Draw the next id of every row, (rows,) in the order of `rows`; -1 where the logits were not finite."""
        self._reread_full_rows()
        logits = guided(self.next_logits().float()[:, : self.vocab_size], self._order)
        allowed = logits if self.never is None else logits.index_fill(1, self.never, -torch.inf)
        # 采样器可能就地改写 logits：要记就先算好
        logprobs = None if self.top is None else allowed.log_softmax(-1)
        samplers = [row.sampler for row in self.rows]
        reads = any(sampler.reads_tokens for sampler in samplers)
        tokens = self._tokens() if reads else self.newest[: len(self.rows), None]
        drawn = self.draw(samplers, logits, allowed, tokens, self._next_uniforms())
        ids = drawn.clamp(min=0)
        self.likely = None if logprobs is None else Likely.of(logprobs, ids, self.top)
        self.newest[: len(self.lanes)] = ids if self._order is None else ids[self._order.owner]
        for row in self.rows:
            row.count += 1
        return drawn

    @torch.inference_mode()
    def wipe(self, key: int) -> None:
        """Zero what a row with non-finite values left in the cache, before it is removed."""
        # 遮住的位置也会 0 × NaN：下一个用到这一行的文字会跟着坏
        for slot in self._slots(key):
            self.cache.k[:, slot].zero_()
            self.cache.v[:, slot].zero_()

    @torch.inference_mode()
    def remove(self, key: int) -> None:
        """Take a row out; the last row moves into its place."""
        for slot in reversed(self._slots(key)):
            self.cache.drop(slot)
            self.newest[slot] = self.newest[len(self.lanes) - 1]
            self.lanes[slot] = self.lanes[-1]
            self.lanes.pop()
        slot, last = next(slot for slot, row in enumerate(self.rows) if row.key == key), len(self.rows) - 1
        self.uniforms[slot] = self.uniforms[last]
        self.rows[slot] = self.rows[last]
        self.rows.pop()
        self._note_order()

    # ---- 哪条 lane 是谁的 ----

    def _slots(self, key: int) -> list[int]:
        """The lanes of a row."""
        return [slot for slot, lane in enumerate(self.lanes) if lane.row.key == key]

    def _note_order(self) -> None:
        """Note which lane is whose; None where lanes are rows, so that a step without guidance pays nothing for it."""
        same = [lane.row for lane in self.lanes] == self.rows
        self._order = None if same else order_of(self.rows, self.lanes, self.device)

    # ---- 读 ----

    def _reread_full_rows(self) -> None:
        for slot, lane in enumerate(self.lanes):
            # 影子少了标签，总是短一些：它跟着带标签的一起重读，看到的是同一段
            if lane.unread is not None or lane.shadow or self.cache.lengths[slot] < self.cache.max_length:
                continue
            labels = lane.row.labels
            keep = max(1, min(self.cache.max_length // 2, self.cache.max_length - len(labels)))
            # 较新的一半，加上刚写出、还没读的那个
            text = self.cache.tokens[slot, lane.front :]
            forgotten = len(text) - (keep - 1)
            lane.row.earlier = torch.cat((lane.row.earlier, text[:forgotten]))
            kept = torch.cat((text[forgotten:], self.newest[slot : slot + 1]))
            for own in self.lanes:
                if own.row is lane.row:
                    own.unread, own.front = (kept, 0) if own.shadow else (torch.cat((labels, kept)), len(labels))

    def next_logits(self) -> torch.Tensor:
        """Logits (lanes, V) behind the newest id of every lane."""
        unread = [lane.unread for lane in self.lanes if lane.unread is not None]
        # 都只有一个 id 的，下面逐 token 的那一步就读了
        if unread and len(unread) == len(self.lanes) and max(map(len, unread)) > 1:
            return self._read(0, unread)
        for start, texts in passes(self.lanes):
            # 别的行正在逐 token 前进：这几行先读到只剩最后一个，再一起走
            self._read(start, [ids[:-1] for ids in texts], only_hidden=True)
            self.newest[start : start + len(texts)] = torch.stack([ids[-1] for ids in texts])
        return self.model.next_logits(self.newest[: len(self.lanes)], self.cache)

    def _read(self, start: int, texts: list[torch.Tensor], *, only_hidden: bool = False) -> torch.Tensor | None:
        """Read texts into empty lanes from `start` on, in one pass, shorter ones padded on the right."""
        # 因果注意力看不到右边：补的 0 不影响前面，之后会被真正的 token 覆盖
        lengths = [len(t) for t in texts]
        idx = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        part, last = self.cache.part(start, start + len(texts)), on_device(lengths, self.device) - 1
        # 只有一个 id 的文字，前面没有要读的
        hidden = self.model.last_hidden(idx, part, last.clamp(min=0)) if idx.size(1) else None
        self.cache.lengths[start : start + len(texts)] = lengths
        for lane in self.lanes[start : start + len(texts)]:
            lane.unread = None
        return None if only_hidden else self.model.logits(hidden)

    # ---- 抽 ----

    def _next_uniforms(self) -> torch.Tensor:
        n = len(self.rows)
        for slot, row in enumerate(self.rows):
            if row.count % UNIFORMS == 0:
                self.uniforms[slot] = on_device(torch.rand(UNIFORMS, generator=row.randoms), self.device)
        columns = [row.count % UNIFORMS for row in self.rows]
        if len(set(columns)) == 1:
            return self.uniforms[:n, columns[0]]
        return self.uniforms[torch.arange(n, device=self.device), on_device(columns, self.device)]

    def _tokens(self) -> torch.Tensor:
        """Texts so far, (rows, T), the newest last, -1 before the start; T >= 1."""
        # 整篇文字，不只是上下文里的；只有惩罚重复的采样器才读它，平时不必另存一份
        slots = {id(lane.row): slot for slot, lane in enumerate(self.lanes) if not lane.shadow}
        texts = []
        for row in self.rows:
            slot = slots[id(row)]
            read = self.cache.tokens[slot, self.lanes[slot].front : self.cache.lengths[slot]]
            texts.append(torch.cat((row.earlier, read)) if len(row.earlier) else read)
        # 每行的最后一个 token 都在最后一列
        tokens = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=-1, padding_side="left")
        return tokens if tokens.size(1) else tokens.new_full((len(texts), 1), -1)
