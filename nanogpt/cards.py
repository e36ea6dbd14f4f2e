"""Peaks of graphics cards as their makers state them, for MFU and for the forecast of speed. Needs no torch."""

from typing import NamedTuple


class Card(NamedTuple):
    """One model of card."""

    name: str
    fp32: float
    """Dense peak, TFLOP/s."""
    half: float
    """Dense peak of fp16 and bf16 that add in fp32, TFLOP/s, no sparsity."""
    bandwidth: float
    """Of its memory, GB/s (10^9 bytes)."""


CARDS = (
    Card("RTX 3060 Laptop", 10.9, 21.9, 336),
    Card("RTX 3060", 12.7, 25.5, 360),
    Card("RTX 3070", 20.3, 40.6, 448),
    Card("RTX 3080", 29.8, 59.5, 760),
    Card("RTX 3090", 35.6, 71.2, 936),
    Card("RTX 4060", 15.1, 60.4, 272),
    Card("RTX 4070", 29.1, 116.6, 504),
    Card("RTX 4080", 48.7, 194.9, 717),
    Card("RTX 4090", 82.6, 165.2, 1008),
    Card("A100", 19.5, 312.0, 1555),
    Card("H100", 66.9, 989.4, 3350),
    Card("H200", 66.9, 989.4, 4800),
)
# 参考卡：任何机器上都可与它比较
REFERENCE = next(card for card in CARDS if card.name == "RTX 3060")


def known_card(device_name: str) -> Card | None:
    """The card with the longest name inside a device's name."""
    # 最长匹配：“3060 Laptop” 先于 “3060”；带 Ti、SUPER 的型号不同，不能套用
    for card in sorted(CARDS, key=lambda card: len(card.name), reverse=True):
        if card.name in device_name and not any(word in device_name.replace(card.name, "") for word in ("Ti", "SUPER", "Super")):
            return card
    return None
