"""What this machine and the known cards offer: free memory, peak speeds, the memory budget of hardware=."""

# 机器上有什么：进程还能用多少内存，显卡叫什么、有多快、许给训练多少显存
# 卡的数据只写在 conf/hardware/*.yaml；自动识别、plan 的预测、MFU 与显存上限都从这里取
# 除了问设备的几个（present_card、device_name、device_memory）都不需要 torch：查配置、做预测的命令不必等它
# 容器与 ulimit 给的内存可能比整台机器的少，free_ram 取最小的一个

import contextlib
import functools
import platform
from pathlib import Path

import yaml

from nanogpt.base.config import ROOT, HardwareConfig
from nanogpt.base.language import ConfigError

GIB = 2**30
CGROUP = Path("/sys/fs/cgroup")


def free_ram() -> int:
    """Bytes of RAM that this process can still take: what is free, or less where a container or ulimit says so."""
    import psutil

    used = psutil.Process().memory_info()
    limits = [psutil.virtual_memory().available]
    with contextlib.suppress(OSError, ValueError):
        # 容器（cgroup v2）里看到的空闲是整台机器的；没有上限时写着 max
        most, taken = (int((CGROUP / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in (CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
        # 缓存着的文件也算它占的，要用时就让出来
        limits.append(most - taken + int(counts.get("inactive_file", 0)))
    with contextlib.suppress(ImportError):
        # Windows 没有 ulimit
        import resource

        # Mac 上没有 data 这一项，那里也不限它
        for name, taken in (("RLIMIT_AS", used.vms), ("RLIMIT_DATA", getattr(used, "data", 0))):
            most = resource.getrlimit(getattr(resource, name))[0]
            limits += [] if most == resource.RLIM_INFINITY else [most - taken]
    return max(0, min(limits))


# ---- 显卡 ----

REFERENCE = "rtx3060_12gb"
"""The card that other machines are compared with."""


@functools.cache
def cards() -> dict[str, HardwareConfig]:
    """The options of hardware= that are cards, the one with most memory first."""
    # 一张卡只在 conf/hardware 里写一次：加一个 yaml，自动识别、计划与 MFU 就都认识它
    files = sorted((ROOT / "conf" / "hardware").glob("*.yaml"))
    nodes = [HardwareConfig(**(yaml.safe_load(path.read_text(encoding="utf-8")) or {})) for path in files]
    found = sorted((node for node in nodes if node.device_names), key=lambda node: -node.vram_gib)
    return {node.name: node for node in found}


def reference() -> HardwareConfig:
    """The reference card."""
    return cards()[REFERENCE]


def known_card(device_name: str, memory_gib: float) -> HardwareConfig | None:
    """The card that a driver calls `device_name`; of several with this name, the one nearest in memory.

    Laptop, Ti and SUPER variants have other names and are other cards: unless listed they are unknown and are measured.
    """
    named = [card for card in cards().values() if device_name.casefold() in map(str.casefold, card.device_names)]
    return min(named, key=lambda card: abs(card.vram_gib - memory_gib), default=None)


def present_card(device) -> HardwareConfig | None:
    """The known card behind a CUDA device, if it is one."""
    import torch

    properties = torch.cuda.get_device_properties(device)
    return known_card(properties.name, properties.total_memory / GIB)


def device_name(device) -> str:
    """What the driver calls a card, or Apple's chip."""
    import torch

    if device.type == "mps":
        # 2.8 起才说得出芯片的名字
        return getattr(torch.backends.mps, "get_name", platform.machine)()
    return getattr(torch, device.type).get_device_name(device)


def device_memory(device) -> tuple[int, int]:
    """(free, all) bytes of a card's memory; of the RAM that a Mac shares with its GPU, what Metal recommends to use."""
    import torch

    if device.type != "mps":
        return getattr(torch, device.type).mem_get_info(device)
    total = torch.mps.recommended_max_memory()
    # 内存是共用的：别的程序占了的，GPU 也用不上
    return max(0, min(total - torch.mps.driver_allocated_memory(), free_ram())), total


def peak_tflops_of(card: HardwareConfig, *, half: bool, tf32: bool) -> float | None:
    """Dense peak of a card in the number format that products run in."""
    if half:
        return card.peak_tflops_half
    # Ampere 以后的 TF32 恰是 16 位峰值的一半；消费级卡上与 fp32 几乎相同，A100 上是它的八倍
    if tf32 and card.dtype == "bf16" and card.peak_tflops_half:
        return max(card.peak_tflops_half / 2, card.peak_tflops_fp32 or 0.0)
    return card.peak_tflops_fp32


def allocator_cap(hardware: HardwareConfig) -> int | None:
    """Bytes that the CUDA allocator may reserve under hardware.vram_gib; None sets no limit."""
    if hardware.vram_gib is None:
        return None
    cap = hardware.vram_gib - hardware.context_gib - hardware.desktop_gib
    if cap <= 0:
        raise ConfigError(
            "hardware.vram_gib={vram} leaves nothing after context_gib={context} and desktop_gib={desktop}; raise it "
            "or lower those",
            vram=hardware.vram_gib, context=hardware.context_gib, desktop=hardware.desktop_gib,
        )
    return int(cap * GIB)
