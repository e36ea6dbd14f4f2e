"""How much memory a run may take and on which device, for the plan, the allocator's cap and the trials."""

# 一次运行可以用多少内存、在哪个设备上：规划、分配器的上限、试跑都问这里，口径才一致
# 显卡：写明了 hardware= 就按写明的算，卡不在这台机器上也行；否则问此刻空闲多少
# CPU：预算是空闲的内存加上本进程已占的，所以要先量本进程在有任何张量之前有多大

import functools
from dataclasses import dataclass

from nanogpt.base.config import TrainConfig
from nanogpt.base.hardware import GIB, allocator_cap, device_memory, device_name, free_ram

# 走第一步才读进来的 torch 代码页（21 MiB）与 oneDNN、Python 留着的（4 MiB），几个进程也是各这么多
STEP_BYTES = 24 * 2**20


@dataclass(frozen=True)
class Budget:
    """Memory of the device that is planned for, bytes."""

    # 总量减去 context 与 desktop 才是张量能用的：三者分开，表里才说得清少了的去哪了

    device_type: str
    """cpu | cuda | xpu | mps"""
    name: str
    """For the console."""
    total: int
    """The card's memory; on a CPU what this process may take."""
    capacity: int
    """What tensors may take: all that PyTorch's allocator may reserve."""
    context: int
    """The card's own part; on a CPU this process without its tensors."""
    desktop: int
    present: bool
    """Whether the device is in this machine, so that it can be measured."""

    growing: bool = False
    """Whether the allocator's segments will grow, which leaves fewer fragments."""

    @property
    def traced_as(self) -> str:
        """cpu | cuda: whose way of computing is traced."""
        # Intel 与 Mac 的 GPU 与显卡走同样的路；分配器的取整只有 CUDA 的是知道的
        return "cpu" if self.device_type == "cpu" else "cuda"


def budget_for(cfg: TrainConfig) -> Budget:
    """The device and the memory that cfg is for; a card that is stated by hardware= need not be here."""
    import torch

    from nanogpt.core.machine import choose_device, segments_grow

    hardware = cfg.hardware
    cap = allocator_cap(hardware)
    if cfg.device == "cpu" or hardware.name == "cpu":
        return on_cpu(cfg)
    if cap is not None:
        context, desktop = int(hardware.context_gib * GIB), int(hardware.desktop_gib * GIB)
        total = int(hardware.vram_gib * GIB)
        here = torch.cuda.is_available()
        return Budget("cuda", hardware.name, total, cap, context, desktop, here, segments_grow())
    device = choose_device(cfg.device, hardware)
    if device.type == "cpu":
        return on_cpu(cfg)
    free, total = device_memory(device)
    if device.type == "mps":
        return Budget("mps", device_name(device), total, free, 0, total - free, True)
    # 本进程已占的还能再用；free 里已经扣掉了自己的上下文
    free += getattr(torch, device.type).memory_reserved(device)
    context = min(int(hardware.context_gib * GIB), total - free)
    desktop, growing = total - free - context, device.type == "cuda" and segments_grow()
    return Budget(device.type, device_name(device), total, free, context, desktop, True, growing)


def process_bytes(cfg: TrainConfig) -> int:
    """Resident size of this process when it was first asked for: the program before any tensor.

    A forked copy keeps the figure.
    """
    return _resident(cfg.memory.activation_checkpointing != "none", cfg.parallel.mode != "ddp")


@functools.cache
def _resident(checkpointing: bool, sharded: bool) -> int:
    import psutil

    # 重算、分片第一次用到时会导入它们，占几十 MB：训练时反正要有。导入前先把少的那份量下来，
    # 不然同一进程里随后的规划（sweep 里很常见）会把这些也算进去。追踪过再量的偏多几十 MB：宁可多算
    if sharded:
        _resident(True, False)
        import torch.distributed.fsdp
    elif checkpointing:
        _resident(False, False)
        import torch._dynamo  # noqa: F401

    return psutil.Process().memory_info().rss


def on_cpu(cfg: TrainConfig, total: int | None = None) -> Budget:
    """What tensors of cfg may take of `total` bytes; None: of what hardware= states, or of what is free."""
    process = process_bytes(cfg)
    if total is None:
        total = int(cfg.hardware.ram_gib * GIB) if cfg.hardware.ram_gib is not None else free_ram() + process
    return Budget("cpu", "CPU", total, total - process - STEP_BYTES, process + STEP_BYTES, 0, True)
