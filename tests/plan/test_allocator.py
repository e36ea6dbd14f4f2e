"""The model of the caching allocator, on sequences worked by hand."""

import random

import pytest

from nanogpt.plan.allocator import MIB, Allocator, OutOfCapacityError, replay


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


@pytest.mark.parametrize("seed", range(5))
def test_peaks_are_ordered_and_any_capacity_above_the_reserved_peak_fits(seed):
    events = random_events(seed)
    live = peak = 0
    for _, size in events:
        live += size
        peak = max(peak, live)
    free = replay(events)
    assert free.fits and peak <= free.allocated <= free.reserved
    assert replay(events, capacity=free.reserved) == free
    fits = [replay(events, capacity=free.reserved * part // 20).fits for part in range(8, 24)]
    # 容量越大越放得下；放得下的最小容量不低于真正占用的
    assert fits == sorted(fits) and not replay(events, capacity=peak - 1).fits


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
