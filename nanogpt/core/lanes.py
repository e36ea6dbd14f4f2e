# 一行文字在模型里占一条 lane；有引导的占两条：一条带标签，影子那条不带，两条的 logits 合成一份
# 没有引导时 lane 就是行，什么也不必算
"""Which of the model's rows belong to which text, and how the logits of a guided text come together."""

from dataclasses import dataclass

import torch

from nanogpt.core.machine import on_device
from nanogpt.core.sampling import Sampler, draw

# 别的文字正在写时，两步之间至多读这么多个 id，一遍连补齐的也不超过它：约为 32 行走十步的乘法，写着的至多停这么久
# 更长的开头一次读完：切开读要多一种注意力，省不下时间
READ_PER_STEP = 512


@dataclass(eq=False)
class Row:
    """One text that grows; `count` ids of it were drawn."""

    # 随机数归各行自己：旁边是谁、何时来，都不影响写出什么

    key: int
    sampler: Sampler
    randoms: torch.Generator
    count: int
    labels: torch.Tensor
    """Ids (n,) that stand in front of whatever part of the text is read."""
    guidance: float
    earlier: torch.Tensor
    """Ids (n,) of the text that the model reads no more; the rest of it lies in the cache."""


@dataclass(eq=False)
class Lane:
    """One row of the model's batch and of the cache: what it reads of a text. The shadow of a guided text lacks the
    labels.

    `unread` are ids that the model has not read yet, None once only the newest is left; the first `front` of them
    are no text.
    """

    # 影子总比带标签的短：重读时一起重读，看到的是同一段
    row: Row
    unread: torch.Tensor | None
    front: int
    shadow: bool = False


@dataclass
class Order:
    """Which lanes belong to which row, as indices on the device."""

    # 只在行来去时算一次，每一步直接用

    read: torch.Tensor
    """Lane of each row, (rows,)."""
    shadow: torch.Tensor
    """Lane without the labels of each row, (rows,); the same one where the row is not guided."""
    guidance: torch.Tensor
    """(rows, 1)"""
    owner: torch.Tensor
    """Row of each lane, (lanes,)."""


def order_of(rows: list[Row], lanes: list[Lane], device: torch.device) -> Order:
    """Who is whose, for lanes in any order."""
    own = [[slot for slot, lane in enumerate(lanes) if lane.row is row] for row in rows]
    read = [next(slot for slot in slots if not lanes[slot].shadow) for slots in own]
    shadow = [next((slot for slot in slots if lanes[slot].shadow), lane) for slots, lane in zip(own, read, strict=True)]
    number = {id(row): at for at, row in enumerate(rows)}
    owner, guidance = [number[id(lane.row)] for lane in lanes], [[row.guidance] for row in rows]
    return Order(*(on_device(values, device) for values in (read, shadow, guidance, owner)))


def guided(logits: torch.Tensor, order: Order | None) -> torch.Tensor:
    """Logits of the lanes (lanes, V) -> of the rows (rows, V); an order of None says that they are the same."""
    if order is None:
        return logits
    read, shadow = logits[order.read], logits[order.shadow]
    # 没有影子的行 read - shadow 恰为 0：与独自写时逐位相同
    return shadow + order.guidance * (read - shadow)


def draw_each(
    samplers: list[Sampler], logits: torch.Tensor, allowed: torch.Tensor, tokens: torch.Tensor, uniforms: torch.Tensor,
) -> torch.Tensor:
    """Ids (rows,), each drawn by its row's sampler at uniforms (rows,); -1 where the logits (rows, V) are not finite.

    allowed are the logits, -inf where an id must not be drawn; tokens (rows, T) are the texts, -1 in front of a short
    one.
    """
    # 一次求和就能看出 NaN 与无穷：贪心与筛选都会把它们盖住，就地改写的采样器又会添上 -inf，所以先看
    # 两遍之中有一遍坏了，合起来也是坏的
    finite = logits.sum(-1).isfinite()
    alike = {id(sampler): sampler for sampler in samplers}
    if len(alike) == 1:
        shaped = samplers[0](allowed, tokens)
    else:
        shaped = torch.empty_like(allowed)
        for one in alike.values():
            mine = on_device([slot for slot, sampler in enumerate(samplers) if sampler is one], logits.device)
            shaped[mine] = one(allowed[mine], tokens[mine])
    return torch.where(finite, draw(shaped, uniforms), -1)


def passes(lanes: list[Lane]) -> list[tuple[int, list[torch.Tensor]]]:
    """How lanes with unread ids are read: neighbours together, (first lane, their ids), padded to READ_PER_STEP at
    most.
    """
    found: list[tuple[int, list[torch.Tensor]]] = []
    for slot, lane in enumerate(lanes):
        if lane.unread is None:
            continue
        start, together = found[-1] if found else (0, [])
        longest = max(len(lane.unread), *map(len, together), 0)
        if together and start + len(together) == slot and (len(together) + 1) * longest <= READ_PER_STEP:
            together.append(lane.unread)
        else:
            found.append((slot, [lane.unread]))
    return found
