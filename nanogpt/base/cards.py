"""Graphics cards known by name: the options of conf/hardware that name a device. Needs no torch."""

import functools

import yaml

from nanogpt.base.config import ROOT, HardwareConfig
from nanogpt.base.ram import GIB

REFERENCE = "rtx3060_12gb"
"""The card that any machine is compared with."""


@functools.cache
def cards() -> dict[str, HardwareConfig]:
    """The options of hardware= that are a card, the largest memory first."""
    # 一张卡只在 conf/hardware 里写一次：加一个 yaml，自动识别、计划与 MFU 就都认识它
    files = sorted((ROOT / "conf" / "hardware").glob("*.yaml"))
    nodes = [HardwareConfig(**(yaml.safe_load(path.read_text(encoding="utf-8")) or {})) for path in files]
    found = sorted((node for node in nodes if node.device_names), key=lambda node: -node.vram_gib)
    return {node.name: node for node in found}


def reference() -> HardwareConfig:
    """The reference card."""
    return cards()[REFERENCE]


def known_card(device_name: str, memory_gib: float) -> HardwareConfig | None:
    """The card that a driver calls `device_name`; of several with this name the one nearest in memory.

    Laptop, Ti and SUPER variants are other cards with other names: unless listed they are unknown, and measured.
    """
    named = [card for card in cards().values() if device_name.casefold() in map(str.casefold, card.device_names)]
    return min(named, key=lambda card: abs(card.vram_gib - memory_gib), default=None)


def present_card(device) -> HardwareConfig | None:
    """The known card that a CUDA device is."""
    import torch

    properties = torch.cuda.get_device_properties(device)
    return known_card(properties.name, properties.total_memory / GIB)


def peak_tflops_of(card: HardwareConfig, *, half: bool, tf32: bool) -> float | None:
    """Dense peak of a card in the number format that products run in."""
    if half:
        return card.peak_tflops_half
    # Ampere 以后的 TF32 恰是 16 位峰值的一半；消费级卡上与 fp32 几乎相同，A100 上是它的八倍
    if tf32 and card.dtype == "bf16" and card.peak_tflops_half:
        return max(card.peak_tflops_half / 2, card.peak_tflops_fp32 or 0.0)
    return card.peak_tflops_fp32
