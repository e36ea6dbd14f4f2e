"""A model of PyTorch's CUDA caching allocator that replays allocations and says how much they reserve.

After c10/cuda/CUDACachingAllocator.cpp of torch 2.6 to 2.11 with one stream, without and with expandable segments.
"""

# 照着 PyTorch 的显存分配器，重放一串分配与释放，得出 reserved 的峰值，或在哪一次申请时不够
# 规划不能只看活着的字节：取整、切块、碎片与整段申请会多占，显存够不够由 reserved 说了算
# replay 是入口，plan 用它；一个小池一个大池，空闲块取最佳适配，释放时与空闲的邻居合并，不够时先退回空闲的
# 新地方从哪里来有两种：Allocator 一段一段地要，段与段不相连，只退整段；
# GrowingAllocator 每池一条长长的地址，只在需要处铺上显存页，页随时可撤：大张量能跨过从前的段界，碎片少得多
# 训练用哪一种由 core/machine.py 的 segments_grow 决定，规划问的也是它

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
PAGE = {True: SMALL_SEGMENT, False: LARGE_SEGMENT}
"""What an expandable segment grows by, in the small pool and in the large one."""
ENDLESS = 2**60
"""Addresses of an expandable segment."""


def _up(size: int, unit: int) -> int:
    """The multiple of `unit` that is not below `size`."""
    return -(-size // unit) * unit


@dataclass(frozen=True)
class Replay:
    """What a stream of allocations led to; bytes. After a failure the peaks are those up to it."""

    # 两个峰值都留着：一个对照实测，一个决定放不放得下

    fits: bool
    allocated: int
    """Peak of the blocks in use, as torch.cuda.max_memory_allocated reports."""
    reserved: int
    """Peak of the segments, free blocks included, as torch.cuda.max_memory_reserved reports."""
    failed_request: int = 0
    """The request that found no room."""


class _Block:
    """A piece of a segment."""

    # 同一段里的块连成双向链表，释放时才找得到邻居；一次追踪有几万块，用 __slots__ 省内存
    # mapped=False 是没铺显存页的一截地址：不占显存，也还不能用

    __slots__ = ("address", "after", "before", "free", "mapped", "size", "small")

    def __init__(self, address: int, size: int, small: bool, mapped: bool = True):
        self.address, self.size, self.small, self.mapped = address, size, small, mapped
        self.before = self.after = None
        self.free = False

    def cut(self, size: int) -> "_Block":
        """Shorten this one to `size`; the rest, behind it."""
        rest = _Block(self.address + size, self.size - size, self.small, self.mapped)
        rest.before, rest.after = self, self.after
        if self.after:
            self.after.before = rest
        self.after, self.size = rest, size
        return rest

    def join_next(self) -> None:
        """Take in the block behind this one."""
        self.size, self.after = self.size + self.after.size, self.after.after
        if self.after:
            self.after.before = self


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
        # 大块池里剩下不足 1 MiB 的不切开，整块交出去
        self._smallest_rest = {True: ROUND, False: SMALL_LIMIT + ROUND}

    def allocate(self, key: int, size: int) -> None:
        """Reserve `size` > 0 bytes under the name `key`; OutOfCapacityError where they do not fit."""
        size = _up(size, ROUND)
        small = size <= SMALL_LIMIT
        block = self._best_fit(size, small) or self._new_room(size, small)
        if block.size - size >= self._smallest_rest[small]:
            self._put_back(block.cut(size))
        self._used[key] = block
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)

    def free(self, key: int) -> None:
        """Give the block of `key` back to its pool, merged with free neighbours."""
        block = self._used.pop(key)
        self.allocated -= block.size
        self._put_back(block)

    def _best_fit(self, size: int, small: bool) -> _Block | None:
        pool = self._free[small]
        at = self._fitting(pool, size)
        if at == len(pool):
            return None
        block = self._by_address[pool[at][1]]
        self._take_out(block)
        return block

    def _fitting(self, pool: list[tuple[int, int]], size: int) -> int:
        return bisect_left(pool, (size, 0))

    def _new_room(self, size: int, small: bool) -> _Block:
        # 小申请合用 2 MiB 的段，中等的合用 20 MiB 的段，再大的各自成段
        length = SMALL_SEGMENT if small else LARGE_SEGMENT if size < MIDDLE_LIMIT else _up(size, LARGE_ROUND)
        self._make_sure_of(length, size)
        self._reserve(length)
        block = _Block(self._next_address, length, small)
        # 相邻的两段也不会合并：之间留一个空地址
        self._next_address += length + ROUND
        return block

    def _make_sure_of(self, length: int, size: int) -> None:
        """`length` more bytes may be reserved for a request of `size`, or OutOfCapacityError."""
        if self.capacity is not None and self.reserved + length > self.capacity:
            # 真的分配器在报错之前也先退一次缓存
            self._give_back_unused()
            if self.reserved + length > self.capacity:
                raise OutOfCapacityError(size)

    def _reserve(self, length: int) -> None:
        self.reserved += length
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def _give_back_unused(self) -> None:
        """Return every segment that is free as a whole."""
        for block in self._free_blocks():
            if block.before is None and block.after is None:
                self._take_out(block)
                self.reserved -= block.size

    def _free_blocks(self) -> list[_Block]:
        return [self._by_address[address] for pool in self._free.values() for _, address in pool]

    def _put_back(self, block: _Block) -> _Block:
        """Make a block free, merged with free neighbours; the block that they are now."""
        if block.before and block.before.free:
            block = block.before
            self._take_out(block)
            block.join_next()
        if block.after and block.after.free:
            self._take_out(block.after)
            block.join_next()
        block.free = True
        insort(self._free[block.small], (block.size, block.address))
        self._by_address[block.address] = block
        return block

    def _take_out(self, block: _Block) -> None:
        pool = self._free[block.small]
        del pool[bisect_left(pool, (block.size, block.address))]
        del self._by_address[block.address]
        block.free = False


class GrowingAllocator(Allocator):
    """The same with expandable segments: the pages of a pool lie in one range of addresses."""

    # 每池一条链，从头到尾是整条地址：用着的、空闲的、没铺页的；最后一块没铺页，没有尽头
    # 链上第一块永远是同一个：切开留左，合并也留左

    def __init__(self, capacity: int | None = None):
        super().__init__(capacity)
        self._smallest_rest[False] = ROUND
        self._first = {small: _Block(ENDLESS * small, ENDLESS, small, mapped=False) for small in PAGE}

    def _fitting(self, pool: list[tuple[int, int]], size: int) -> int:
        at = super()._fitting(pool, size)
        # 后面还能接着铺页的，按它能长到的大小算：留给别处放不下的
        while at + 1 < len(pool) and self._potential(pool[at + 1]) < self._potential(pool[at]):
            at += 1
        return at

    def _potential(self, entry: tuple[int, int]) -> int:
        size, address = entry
        after = self._by_address[address].after
        return size if after is None or after.mapped else size + after.size

    def _new_room(self, size: int, small: bool) -> _Block:
        # PyTorch 只按 2 MiB 取整去比上限，铺的却是整页，会越过它一点；驱动不让越过，这里按整页比
        self._make_sure_of(_up(size, PAGE[small]), size)
        block = self._first_gap(size, small)
        while not block.free or block.size < size:
            gap = block.after if block.free else block
            block = self._map(gap, size - block.size if block.free else size)
        self._take_out(block)
        return block

    def _first_gap(self, size: int, small: bool) -> _Block:
        """The first of the lowest neighbours, free or not mapped, that have `size` bytes together."""
        start, room, block = None, 0, self._first[small]
        while room < size:
            if block.mapped and not block.free:
                start, room = None, 0
            else:
                start, room = start or block, room + block.size
            block = block.after
        return start

    def _map(self, gap: _Block, size: int) -> _Block:
        """Lay pages under the first `size` bytes of a gap, or under all of it; the free block that it becomes."""
        length = min(gap.size, _up(size, PAGE[gap.small]))
        if length < gap.size:
            gap.cut(length)
        gap.mapped = True
        self._reserve(length)
        return self._put_back(gap)

    def _give_back_unused(self) -> None:
        """Unmap every page that is free as a whole."""
        for block in self._free_blocks():
            page, end = PAGE[block.small], block.address + block.size
            start, end = _up(block.address, page), end // page * page
            if start >= end:
                continue
            self._take_out(block)
            if start > block.address:
                block, part = block.cut(start - block.address), block
                self._put_back(part)
            if block.size > end - start:
                self._put_back(block.cut(end - start))
            self.reserved -= block.size
            block.mapped = False
            if block.after and not block.after.mapped:
                block.join_next()
            if block.before and not block.before.mapped:
                block.before.join_next()


def replay(events: Iterable[tuple[int, int]], capacity: int | None = None, *, growing: bool = False) -> Replay:
    """Feed events (id, +bytes to allocate or -bytes to free) to an allocator, with expandable segments if `growing`."""
    allocator = (GrowingAllocator if growing else Allocator)(capacity)
    try:
        for key, size in events:
            if size > 0:
                allocator.allocate(key, size)
            else:
                allocator.free(key)
    except OutOfCapacityError as error:
        return Replay(False, allocator.peak_allocated, allocator.peak_reserved, error.args[0])
    return Replay(True, allocator.peak_allocated, allocator.peak_reserved)
