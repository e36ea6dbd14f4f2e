"""The models of the caching allocator, without and with growing segments, on sequences worked by hand."""

import random

import pytest

from nanogpt.plan.allocator import ENDLESS, MIB, PAGE, Allocator, GrowingAllocator, OutOfCapacityError, Replay, replay

# 一串申请与释放（MiB），两种分配器各占多少都是手算的
BY_HAND = [(1, 30), (2, 14), (1, -30), (2, -14), (3, 44), (4, 3), (3, -44), (5, 13), (6, 31)]


def test_small_requests_share_two_mebibyte_segments():
    allocator = Allocator()
    allocator.allocate(1, 1)
    assert (allocator.allocated, allocator.reserved) == (512, 2 * MIB)
    allocator.allocate(2, MIB)
    assert (allocator.allocated, allocator.reserved) == (512 + MIB, 2 * MIB)
    # 剩下 1 MiB - 512，再要 1 MiB 就得新开一段
    allocator.allocate(3, MIB)
    assert allocator.reserved == 4 * MIB


def test_middle_requests_share_twenty_mebibytes_and_large_ones_round_to_two():
    allocator = Allocator()
    allocator.allocate(1, 9 * MIB)
    allocator.allocate(2, 9 * MIB)
    assert allocator.reserved == 20 * MIB
    allocator.allocate(3, 10 * MIB + 1)
    assert allocator.reserved == 32 * MIB


def test_a_remainder_of_up_to_one_mebibyte_is_not_split_off_in_the_large_pool():
    allocator = Allocator()
    allocator.allocate(1, 12 * MIB)
    allocator.free(1)
    allocator.allocate(2, 11 * MIB)
    # 余下正好 1 MiB：整块给出去，计入 allocated
    assert allocator.allocated == 12 * MIB
    allocator.free(2)
    allocator.allocate(3, 11 * MIB - 512)
    assert allocator.allocated == 11 * MIB - 512


def test_the_smallest_sufficient_block_is_taken():
    allocator = Allocator()
    for key, size in ((1, 30), (2, 14), (3, 20)):
        allocator.allocate(key, size * MIB)
    for key in (1, 2, 3):
        allocator.free(key)
    allocator.allocate(4, 13 * MIB)
    allocator.allocate(5, 20 * MIB)
    allocator.allocate(6, 30 * MIB)
    assert allocator.reserved == 64 * MIB


def test_free_neighbours_merge():
    allocator = Allocator()
    allocator.allocate(0, 30 * MIB)
    allocator.free(0)
    for key in (1, 2, 3):
        allocator.allocate(key, 10 * MIB)
    for key in (1, 3, 2):
        allocator.free(key)
    allocator.allocate(4, 30 * MIB)
    assert allocator.reserved == 30 * MIB


def test_unused_segments_are_given_back_before_failing():
    allocator = Allocator(capacity=40 * MIB)
    allocator.allocate(1, 20 * MIB)
    allocator.allocate(2, 10 * MIB)
    allocator.free(1)
    # 30 + 24 > 40：交还空着的 20，就放得下
    allocator.allocate(3, 24 * MIB)
    assert (allocator.reserved, allocator.peak_reserved) == (34 * MIB, 34 * MIB)
    with pytest.raises(OutOfCapacityError):
        allocator.allocate(4, 7 * MIB)


def test_a_half_used_segment_is_not_given_back():
    events = [(1, 10 * MIB), (2, 4 * MIB), (1, -10 * MIB), (3, 18 * MIB)]
    assert not replay([(0, 30 * MIB), (0, -30 * MIB), *events], capacity=40 * MIB).fits
    assert replay([(0, 30 * MIB), (0, -30 * MIB), *events], capacity=48 * MIB).fits


# ---- 会增长的段 ----


def test_a_stream_worked_by_hand_reserves_what_each_model_says():
    events = [(key, size * MIB) for key, size in BY_HAND]
    # 段：30、14、44 各一段；3 取最小够大的 14，13 取 30，31 取 44
    assert replay(events) == Replay(True, 47 * MIB, 88 * MIB)
    # 页：30 与 14 铺三页，还回去连成一块 60；44 之后放 3，44 还回去切出 13，剩下的 31 正好
    assert replay(events, growing=True) == Replay(True, 47 * MIB, 60 * MIB)


def test_a_growing_pool_goes_on_where_it_ended_and_by_whole_pages():
    allocator = GrowingAllocator()
    # 小池的第三块跨在两页上，八块正好三页；大池 11 + 12 + 37 也是
    for key, (size, reserved) in enumerate([*zip([0.75] * 8, (2, 2, 4, 4, 4, 6, 6, 6)), (11, 26), (12, 46), (37, 66)]):
        allocator.allocate(key, int(size * MIB))
        assert allocator.reserved == reserved * MIB
    assert allocator.allocated == allocator.reserved


def test_a_growing_pool_splits_off_any_remainder():
    allocator = GrowingAllocator()
    allocator.allocate(1, 12 * MIB)
    allocator.free(1)
    allocator.allocate(2, 12 * MIB - 512)
    assert allocator.allocated == 12 * MIB - 512


def test_the_end_of_a_growing_pool_is_kept_for_what_fits_nowhere_else():
    allocator = GrowingAllocator()
    for key, size in ((1, 20), (2, 30)):
        allocator.allocate(key, size * MIB)
    allocator.free(1)
    # 末尾的 10 更贴合，却还能长：取 20 的那块
    allocator.allocate(3, 10 * MIB)
    allocator.allocate(4, 30 * MIB)
    assert allocator.reserved == 80 * MIB


def test_free_pages_are_unmapped_before_failing_and_gaps_are_filled_before_the_end_grows():
    def filled(capacity):
        allocator = GrowingAllocator(capacity * MIB)
        for key, size in ((1, 30), (2, 10), (3, 30)):
            allocator.allocate(key, size * MIB)
        allocator.free(1)
        assert allocator.reserved == 80 * MIB
        # 空闲的 30 里有一整页可撤；新的两页铺在末尾
        allocator.allocate(4, 35 * MIB)
        return allocator

    with pytest.raises(OutOfCapacityError):
        filled(99)
    allocator = filled(100)
    assert allocator.reserved == allocator.peak_reserved == 100 * MIB
    allocator.capacity = None
    # 撤掉的那一页，与它后面空闲的 10 连成一块
    allocator.allocate(5, 25 * MIB)
    assert allocator.reserved == 120 * MIB and allocator._used[5].address == 0


def check_chains(allocator):
    """Every address belongs to one block; neighbours of a kind are merged; the counts are those of the blocks."""
    used = mapped = 0
    for small, block in allocator._first.items():
        address = block.address
        while block:
            assert block.address == address and block.size > 0 and not (block.free and not block.mapped)
            after = block.after
            if after:
                assert after.before is block and not (block.free and after.free) and (block.mapped or after.mapped)
            mapped += block.size * block.mapped
            used += block.size * (block.mapped and not block.free)
            address += block.size
            block = after
        assert address == ENDLESS * (1 + small)
    assert (used, mapped) == (allocator.allocated, allocator.reserved)


@pytest.mark.parametrize("seed", range(3))
def test_a_growing_pool_stays_whole_whatever_comes_and_gives_all_back(seed):
    allocator = GrowingAllocator()
    for number, (key, size) in enumerate(random_events(seed)):
        if size > 0:
            allocator.allocate(key, size)
        else:
            allocator.free(key)
        if number % 20 == 0:
            check_chains(allocator)
        if number % 60 == 0:
            allocator._give_back_unused()
            check_chains(allocator)
    for key in list(allocator._used):
        allocator.free(key)
    allocator._give_back_unused()
    check_chains(allocator)
    assert allocator.reserved == 0 and all(block.size == ENDLESS for block in allocator._first.values())


# ---- 两种都成立的 ----


def random_events(seed: int) -> list[tuple[int, int]]:
    numbers = random.Random(seed)
    events, live = [], []
    for key in range(600):
        size = int(2 ** numbers.uniform(6, 25))
        events.append((key, size))
        live.append((key, size))
        while len(live) > 12:
            old, size = live.pop(numbers.randrange(len(live)))
            events.append((old, -size))
    return events


@pytest.mark.parametrize("growing", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_peaks_are_ordered_and_any_capacity_above_the_reserved_peak_fits(seed, growing):
    events = random_events(seed)
    live = peak = 0
    for _, size in events:
        live += size
        peak = max(peak, live)
    free = replay(events, growing=growing)
    assert free.fits and peak <= free.allocated <= free.reserved
    # 会增长的按整个申请去比上限，末尾空着的不抵：所以要多留一点
    assert replay(events, capacity=free.reserved + growing * 2 * PAGE[False], growing=growing) == free
    fits = [replay(events, capacity=free.reserved * part // 20, growing=growing).fits for part in range(8, 24)]
    # 容量越大越放得下；放得下的最小容量不低于真正占用的
    assert fits == sorted(fits) and not replay(events, capacity=peak - 1, growing=growing).fits


@pytest.mark.parametrize("seed", range(3))
def test_everything_freed_leaves_whole_segments(seed):
    allocator = Allocator()
    events = random_events(seed)
    live = {}
    for key, size in events:
        (allocator.allocate if size > 0 else lambda k, _: allocator.free(k))(key, size)
        live[key] = size > 0
    for key in [key for key, alive in live.items() if alive]:
        allocator.free(key)
    assert allocator.allocated == 0
    allocator._give_back_unused()
    assert allocator.reserved == 0
