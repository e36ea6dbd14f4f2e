"""A model of PyTorch's CUDA caching allocator that replays allocations and says how much they reserve.

After c10/cuda/CUDACachingAllocator.cpp with default settings (no expandable segments, one stream).
"""

# 照着 PyTorch 的显存分配器，重放一串分配与释放，得出 reserved 的峰值，或在哪一次申请时不够
# 规划不能只看活着的字节：取整、切块、碎片与整段申请会多占，显存够不够由 reserved 说了算
# replay 是入口，plan 用它；一个小池一个大池，空闲块取最佳适配，释放时与空闲的邻居合并，不够时先退回整段空闲的

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

MIB = 2**20
ROUND = 512
"""Every block is a multiple of it."""
SMALL_LIMIT = MIB
"""Largest request of the small pool."""
SMALL_SEGMENT = 2 * MIB
MIDDLE_LIMIT = 10 * MIB
"""Requests below it come out of segments of LARGE_SEGMENT."""
LARGE_SEGMENT = 20 * MIB
LARGE_ROUND = 2 * MIB


@dataclass(frozen=True)
class Replay:
    """What a stream of allocations led to; bytes. After a failure the peaks are those up to it."""

    # 两个峰值都留着：一个对照实测，一个决定放不放得下

    fits: bool
    allocated: int
    """Peak of the blocks in use, as torch.cuda.max_memory_allocated reports."""
    reserved: int
    """Peak of the segments, as torch.cuda.max_memory_reserved reports."""
    failed_request: int = 0
    """The request that found no room."""


class _Block:
    """A piece of a segment."""

    # 同一段里的块连成双向链表，释放时才找得到邻居；一次追踪有几万块，用 __slots__ 省内存

    __slots__ = ("address", "after", "before", "free", "size", "small")

    def __init__(
        self, address: int, size: int, small: bool, before: "_Block | None" = None, after: "_Block | None" = None
    ):
        self.address, self.size, self.small = address, size, small
        self.before, self.after = before, after
        self.free = False


class OutOfCapacityError(Exception):
    """The modelled allocator found no room, not even after giving its unused segments back."""

    # 只在本模块里用：replay 接住它，把不够的那次申请写进 Replay


class Allocator:
    """allocate() and free() by storage id under a capacity in bytes, None for no limit."""

    # 只记数，不占内存：地址是编出来的，用来在大小相同的空闲块里定次序

    def __init__(self, capacity: int | None = None):
        self.capacity = capacity
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self._used: dict[int, _Block] = {}
        # 空闲块按 (大小, 地址) 排序：第一个够大的就是最佳
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        self._by_address: dict[int, _Block] = {}
        self._next_address = 0

    def allocate(self, key: int, size: int) -> None:
        """Reserve `size` > 0 bytes under the name `key`; OutOfCapacityError where they do not fit."""
        size = -(-size // ROUND) * ROUND
        small = size <= SMALL_LIMIT
        block = self._best_fit(size, small) or self._new_segment(size, small)
        rest = block.size - size
        # 大块池里剩下不足 1 MiB 的不切开，整块交出去
        if rest >= ROUND if small else rest > SMALL_LIMIT:
            tail = _Block(block.address + size, rest, small, block, block.after)
            if block.after:
                block.after.before = tail
            block.after, block.size = tail, size
            self._put_back(tail)
        self._used[key] = block
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)

    def free(self, key: int) -> None:
        """Give the block of `key` back to its pool, merged with free neighbours."""
        block = self._used.pop(key)
        self.allocated -= block.size
        before, after = block.before, block.after
        if before and before.free:
            self._take_out(before)
            before.size += block.size
            before.after = after
            if after:
                after.before = before
            block = before
        if after and after.free:
            self._take_out(after)
            block.size += after.size
            block.after = after.after
            if after.after:
                after.after.before = block
        self._put_back(block)

    def _best_fit(self, size: int, small: bool) -> _Block | None:
        pool = self._free[small]
        at = bisect_left(pool, (size, 0))
        if at == len(pool):
            return None
        block = self._by_address.pop(pool.pop(at)[1])
        block.free = False
        return block

    def _new_segment(self, size: int, small: bool) -> _Block:
        # 小申请合用 2 MiB 的段，中等的合用 20 MiB 的段，再大的各自成段
        rounded = -(-size // LARGE_ROUND) * LARGE_ROUND
        length = SMALL_SEGMENT if small else LARGE_SEGMENT if size < MIDDLE_LIMIT else rounded
        if self.capacity is not None and self.reserved + length > self.capacity:
            # 真的分配器在报错之前也先退一次缓存
            self._give_back_unused()
            if self.reserved + length > self.capacity:
                raise OutOfCapacityError(size)
        self.reserved += length
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        block = _Block(self._next_address, length, small)
        # 相邻的两段也不会合并：之间留一个空地址
        self._next_address += length + ROUND
        return block

    def _give_back_unused(self) -> None:
        """Return every segment that is free as a whole."""
        for pool in self._free.values():
            for size, address in list(pool):
                block = self._by_address[address]
                if block.before is None and block.after is None:
                    self._take_out(block)
                    self.reserved -= size

    def _put_back(self, block: _Block) -> None:
        block.free = True
        insort(self._free[block.small], (block.size, block.address))
        self._by_address[block.address] = block

    def _take_out(self, block: _Block) -> None:
        pool = self._free[block.small]
        del pool[bisect_left(pool, (block.size, block.address))]
        del self._by_address[block.address]
        block.free = False


def replay(events: Iterable[tuple[int, int]], capacity: int | None = None) -> Replay:
    """Feed events (id, +bytes to allocate or -bytes to free) to an allocator."""
    allocator = Allocator(capacity)
    try:
        for key, size in events:
            if size > 0:
                allocator.allocate(key, size)
            else:
                allocator.free(key)
    except OutOfCapacityError as error:
        return Replay(False, allocator.peak_allocated, allocator.peak_reserved, error.args[0])
    return Replay(True, allocator.peak_allocated, allocator.peak_reserved)
