# 逐 token 写作时，已经读过的 key、value 与 id 都存在这里，读过的不再算第二遍
# 一批里各行长短可以不同；写完的行由最后一行补上，所以活着的行总排在最前面
# 只有 attention 与 generate 用它；训练时没有 cache
"""What a model has read so far: keys and values of every layer, and the ids."""

import torch
import torch.nn.functional as F

from nanogpt.core.machine import on_device


class KVCache:
    """Preallocated keys and values of every layer, each (n_layer, B, nkv, L, hs), and the ids read so far, (B, L).

    `lengths` says how many positions of each row are filled; rows may differ. The active rows are the
    first len(lengths), so that a finished row costs nothing. L is block_size unless a shorter `length` is given.
    """

    def __init__(self, model, batch_size: int, length: int | None = None):
        config = model.config
        self.max_length = min(length or config.block_size, config.block_size)
        shape = (config.n_layer, batch_size, config.kv_heads, self.max_length, config.head_size)
        # 一次分配好，逐 token 生成时不再申请显存
        self.k = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.v = torch.zeros_like(self.k)
        self.tokens = torch.zeros(batch_size, self.max_length, dtype=torch.long, device=model.device)
        # 长度记在主机上：每一步都能算出，不必向 GPU 查询
        self.lengths = [0] * batch_size
        self.position: slice | torch.Tensor = slice(0, 0)
        self.mask: torch.Tensor | None = None
        self.end = 0
        # 录制 CUDA graph 时由外面定好的 (位置, 可见长度)，形状每步相同
        self.fixed: tuple[torch.Tensor, int] | None = None

    def part(self, start: int, stop: int) -> "KVCache":
        """Rows start … stop as an empty cache in this one's memory: a prompt that is read lands in its place."""
        part = object.__new__(KVCache)
        part.max_length = self.max_length
        part.k, part.v, part.tokens = self.k[:, start:stop], self.v[:, start:stop], self.tokens[start:stop]
        part.lengths, part.fixed = [0] * (stop - start), None
        return part

    def widened(self, rows: int) -> "KVCache":
        """A cache of so many rows that holds what this one held; this one is of no use any more."""
        # 新对象：录好的 CUDA graph 由此知道地址变了
        wide = object.__new__(KVCache)
        wide.max_length, wide.lengths, wide.fixed = self.max_length, self.lengths, self.fixed
        filled = max(self.lengths, default=0)
        for name in ("k", "v"):
            # 一个一个来，抄完就放：不同时占着两份
            old = self.__dict__.pop(name)
            new = old.new_zeros(old.size(0), rows, *old.shape[2:])
            new[:, : old.size(1), :, :filled] = old[..., :filled, :]
            setattr(wide, name, new)
        wide.tokens = torch.cat((self.tokens, self.tokens.new_zeros(rows - self.tokens.size(0), self.max_length)))
        return wide

    def begin(self, T: int) -> slice | torch.Tensor:
        """Positions of the next T ids: a slice when all rows are equally long, else (B, 1) for T = 1."""
        lengths = self.lengths
        if self.fixed is not None:
            self.position, self.end = self.fixed
            self.mask = (torch.arange(self.end, device=self.tokens.device) <= self.position)[:, None, None]
            return self.position
        self.end = max(lengths) + T
        assert self.end <= self.max_length, f"{self.end} positions do not fit into {self.max_length}"
        if min(lengths) + T == self.end:
            self.position, self.mask = slice(self.end - T, self.end), None
        else:
            assert T == 1, "rows of different lengths go on one id at a time"
            self.position = on_device(lengths, self.tokens.device)[:, None]
            # 每行只看自己写过的位置，后面是别的行才有的
            self.mask = (torch.arange(self.end, device=self.tokens.device) <= self.position)[:, None, None]
        return self.position

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write k, v (B, nkv, T, hs) where begin() said; return all (B, nkv, end, hs), the unfilled behind `mask`."""
        rows = len(self.lengths)
        if self.mask is None:
            self.k[layer, :rows, :, self.position] = k
            self.v[layer, :rows, :, self.position] = v
        else:
            at = self.position[:, :, None, None].expand(-1, k.size(1), -1, k.size(3))
            self.k[layer, :rows].scatter_(2, at, k.to(self.k.dtype))
            self.v[layer, :rows].scatter_(2, at, v.to(self.v.dtype))
        return self.k[layer, :rows, :, : self.end].to(k.dtype), self.v[layer, :rows, :, : self.end].to(v.dtype)

    def recent(self, n: int) -> torch.Tensor:
        """The n ids before the positions of begin(), (B, n); -1 before the start."""
        rows = len(self.lengths)
        if self.mask is None:
            start = self.position.start
            known = self.tokens[:rows, max(start - n, 0) : start]
            return F.pad(known, (n - known.size(1), 0), value=-1)
        at = self.position + torch.arange(-n, 0, device=self.tokens.device)
        return self.tokens[:rows].gather(1, at.clamp(min=0)).masked_fill(at < 0, -1)

    def advance(self, idx: torch.Tensor) -> None:
        """Note that idx (B, T) has been read at the positions of begin()."""
        rows, T = idx.shape
        if self.mask is None:
            self.tokens[:rows, self.position] = idx
        else:
            self.tokens[:rows].scatter_(1, self.position, idx)
        self.lengths = [length + T for length in self.lengths]

    def drop(self, row: int) -> None:
        """Remove a row; the last one takes its place."""
        last = len(self.lengths) - 1
        if row < last:
            filled = self.lengths[last]
            self.k[:, row, :, :filled] = self.k[:, last, :, :filled]
            self.v[:, row, :, :filled] = self.v[:, last, :, :filled]
            self.tokens[row, :filled] = self.tokens[last, :filled]
            self.lengths[row] = filled
        self.lengths.pop()
