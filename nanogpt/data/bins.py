"""Packing pieces of known length into rows of a fixed one, best fit, longest first."""

import numpy as np


def pack(lengths: np.ndarray, opens: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(row of each slot, place of each slot, number of rows) for pieces of `lengths` <= capacity.

    Slots are in the order of descending length, those that `opens` marks first: they begin a row each. The result depends
    on the multiset of (opens, length) alone, so that pieces of equal length can trade slots without packing anew.
    """
    order = np.lexsort((-lengths, ~opens))
    ordered, opening = lengths[order].tolist(), opens[order].tolist()
    row, place = np.empty(len(ordered), dtype=np.int64), np.empty(len(ordered), dtype=np.int64)
    # 剩余空间 -> 还剩这么多的行；位图的第 n 位说明剩 n 的行有没有
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    bitmap, rows = 0, 0
    for slot, length in enumerate(ordered):
        # 位图右移之后的最低位，就是放得下的行里剩得最少的
        candidates = 0 if opening[slot] else bitmap >> length
        if candidates:
            room = length + (candidates & -candidates).bit_length() - 1
            into = with_room[room].pop()
            if not with_room[room]:
                bitmap &= ~(1 << room)
        else:
            into, room, rows = rows, capacity, rows + 1
        row[slot], place[slot] = into, capacity - room
        with_room[room - length].append(into)
        bitmap |= 1 << (room - length)
    return row, place, rows
