# 训练之前把机器摆好：选设备、确定性、CPU 与 CUDA 的分配器；以及主机与显卡之间怎样搬数而不互相等
# 设备先问 torch.accelerator：一个 torch 只带一种加速器，cuda（含 ROCm）、xpu（Intel）或 mps（Mac）
"""The machine under a run: device, threads, allocator, reproducibility."""

import contextlib
import ctypes
import functools
import os
import platform
import sys
from collections.abc import Iterator

import torch

from nanogpt.base.config import HardwareConfig
from nanogpt.base.hardware import GIB, allocator_cap, device_memory
from nanogpt.base.language import ConfigError, say
from nanogpt.core import distributed
from nanogpt.core.waiting import watch_the_machine

WINDOWS_MARGIN = 2**28
"""VRAM that stays free on Windows, where memory beyond the card is paged instead of refused."""
# glibc mallopt 的参数号（malloc.h）
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
# Linux 的 madvise：往后用大页；把已有的小页并成大页（6.1 起，更早的不认，无妨）。大页多大
MADV_HUGEPAGE, MADV_COLLAPSE, LARGE_PAGE = 14, 25, 2**21
# cuBLAS 只有用这两种固定工作区时才逐位重现
REPEATABLE_WORKSPACES = (":4096:8", ":16:8")
# 给 CUDA 分配器的设置：新旧两个名字
ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
# 更早的把 int64 的余数当 float32 算：n-gram 的表会查到别的行，存下的模型在 CPU 上就是错的
SAFE_ON_MPS = (2, 8)


def choose_device(named: str, hardware: HardwareConfig) -> torch.device:
    """auto takes this process's GPU if there is one (and hardware is not cpu), else the CPU."""
    have = accelerators()
    if named == "auto":
        named = have[0].partition(":")[0] if have and hardware.name != "cpu" else "cpu"
    if named == "cpu":
        return torch.device("cpu")
    kind, _, number = named.partition(":")
    if distributed.world() > 1 and kind != "cuda":
        raise ConfigError("device={got}: several processes need CUDA cards or device=cpu; choose device=cpu", got=named)
    # torchrun 下每个进程用自己的那张卡
    index = int(number or (os.environ.get("LOCAL_RANK", 0) if distributed.world() > 1 else 0))
    if named == "mps" and named in have:
        if TORCH < SAFE_ON_MPS:
            raise ConfigError(
                "device=mps: torch {got} computes remainders of large integers wrongly there; install torch 2.8 or "
                "later (pip install -U torch), or choose device=cpu",
                got=torch.__version__,
            )
        return torch.device("mps")
    if f"{kind}:{index}" not in have:
        raise _not_here(named, " | ".join(have) or "cpu")
    device = torch.device(kind, index)
    getattr(torch, kind).set_device(device)
    return device


def _not_here(named: str, have: str) -> ConfigError:
    if named == "mps":
        return ConfigError(
            "device=mps is the GPU of a Mac with Apple silicon; this machine offers {have}: choose device={have}",
            have=have,
        )
    if named.startswith("xpu"):
        return ConfigError(
            "device={got}: this machine offers {have}; choose device={have} or install the XPU build of torch "
            "(pytorch.org)",
            got=named, have=have,
        )
    return ConfigError(
        "device={got}: this machine offers {have}; choose device={have} or install the CUDA build of torch (README)",
        got=named, have=have,
    )


def accelerators() -> list[str]:
    """The devices besides the CPU that this machine and this build of torch offer: cuda:0 …, xpu:0 … or mps."""
    kind = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else None
    if kind == "mps":
        return ["mps"]
    # 别的加速器（NPU、HPU）没有写过，不当作有
    return [f"{kind}:{i}" for i in range(torch.accelerator.device_count())] if kind in ("cuda", "xpu") else []


def set_up(
    device: torch.device, *, deterministic: bool, hardware: HardwareConfig, threads: int | None = None
) -> None:
    """Make results repeatable, CPU allocations cheap, its threads good neighbours, and the VRAM budget real."""
    if threads:
        torch.set_num_threads(threads)
    # 非正规数在 CPU 上慢几十倍，训练后期的微小梯度会碰到
    torch.set_flush_denormal(True)
    if device.type == "cpu" and hardware.ram_gib is not None:
        return_freed_memory()
    else:
        keep_freed_memory()
    if device.type == "cpu":
        watch_the_machine()
    if device.type == "mps":
        cap_allocator(device, hardware)
    if device.type != "cuda":
        return
    if deterministic:
        # cuBLAS 要固定工作区，矩阵乘才能逐位重现；必须在第一次调用之前设
        if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in REPEATABLE_WORKSPACES:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = REPEATABLE_WORKSPACES[0]
        # 不能 warn_only：那样 flash 与 memory-efficient attention 的反向仍用不确定的算法，只警告一句
        torch.use_deterministic_algorithms(True)
        # 默认还会把每块新内存填满，只为查错，白费带宽
        torch.utils.deterministic.fill_uninitialized_memory = False
    grow_segments(device)
    cap_allocator(device, hardware)


def segments_grow() -> bool:
    """Whether a training on a CUDA card here lets the allocator's segments grow page by page; a plan asks it too."""
    # WSL 的驱动做不到，第一次分配就出错；使用者自己写了设置的，由他做主
    native = sys.platform == "linux" and "microsoft" not in platform.release().lower()
    return native and not any(os.environ.get(name) for name in ALLOCATOR_SETTINGS)


def grow_segments(device: torch.device) -> None:
    """Let the allocator's segments grow page by page where the driver can: fewer fragments."""
    if not segments_grow():
        return
    # 旧版本只有后一个名字，新版本说它过时了
    change = getattr(torch._C, "_accelerator_setAllocatorSettings", None) or torch.cuda.memory._set_allocator_settings
    try:
        change("expandable_segments:True")
        torch.empty(1, device=device)
    except RuntimeError:
        # 虚拟化的显卡也可能做不到：照旧
        change("expandable_segments:False")


def cap_allocator(device: torch.device, hardware: HardwareConfig) -> None:
    """Cap the allocator at the stated VRAM budget; on Windows, where the driver pages into RAM, and at what is free."""
    free, total = device_memory(device)
    # 与预测用同一个数：计划说放得下的，这里就真的给这么多
    if (cap := allocator_cap(hardware)) is not None:
        if total < (hardware.vram_gib - 0.05) * GIB:
            say(
                "hardware.vram_gib={vram}: this card has {total:.2f} GiB; the budget is that much less",
                vram=hardware.vram_gib, total=total / GIB,
            )
            cap -= int(hardware.vram_gib * GIB) - total
    elif sys.platform == "win32":
        cap = free - WINDOWS_MARGIN
    else:
        return
    part = min(1.0, max(0.0, cap / total))
    # MPS 的份额是对建议上限说的，也没有编号
    where = () if device.type == "mps" else (device,)
    getattr(torch, device.type).set_per_process_memory_fraction(part, *where)


@contextlib.contextmanager
def any_kernels() -> Iterator[None]:
    """Inside, deterministic=true asks for nothing: for samples, and where an operation is deterministic by the
    values it gets.

    Holds for the whole process, so no other thread may compute meanwhile.
    """
    wanted = torch.are_deterministic_algorithms_enabled()
    lenient = torch.is_deterministic_algorithms_warn_only_enabled()
    if not wanted:
        yield
        return
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(wanted, warn_only=lenient)


def keep_freed_memory() -> None:
    """Tell glibc not to return large blocks to the system: saves some 700 page faults a step (Linux only)."""
    _mallopt(mmap_threshold=2**30, trim_threshold=2**31 - 1)


def return_freed_memory() -> None:
    """Tell glibc to return every large block at once, so that this process holds what lives and no fragments (Linux
    only).

    Without it the heap of a training step was seen to hold 1.7 times what lives: too much under a budget.
    """
    _mallopt(mmap_threshold=2**20, trim_threshold=2**21)


def use_large_pages(tensor: torch.Tensor) -> None:
    """Ask the system to keep a tensor of the CPU in pages of 2 MiB, for what is read from end to end again and again.

    Linux only; the tensor itself stays where and what it is.
    """
    # 4 KiB 一页时，顺着读几百 MB 也总在等页表：一行的一步慢一成半到两成
    start = -(-tensor.data_ptr() // LARGE_PAGE) * LARGE_PAGE
    size = (tensor.data_ptr() + tensor.nbytes) // LARGE_PAGE * LARGE_PAGE - start
    if sys.platform == "linux" and tensor.device.type == "cpu" and size > 0:
        advise = ctypes.CDLL(None).madvise
        for advice in (MADV_HUGEPAGE, MADV_COLLAPSE):
            # 只是请求：系统不答应，照旧也对
            advise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice)


def _mallopt(*, mmap_threshold: int, trim_threshold: int) -> None:
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, mmap_threshold)
        mallopt(M_TRIM_THRESHOLD, trim_threshold)


def on_device(values, device: torch.device) -> torch.Tensor:
    """Numbers or a tensor of the host on a device, without making the host wait for what a card has queued."""
    host = torch.as_tensor(values)
    # 只有锁页内存的拷贝是异步的；普通内存的要等卡上排着的一切做完，提前排下一步就白排了
    if device.type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    # MPS 的异步拷贝会去读已经放掉的内存（pytorch#139550、#189690），数就错了
    return host.to(device)


def synchronize(device: torch.device) -> None:
    """Wait until a card has done what it was asked for; nothing on a CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@functools.cache
def has_float64(device: torch.device) -> bool:
    """Whether the device computes in float64: not a Mac's GPU, and not every one of Intel's."""
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type != "mps"


def in_float64(x: torch.Tensor) -> torch.Tensor:
    """x in float64: where it lies, or in RAM where its device has none."""
    return x.double() if has_float64(x.device) else x.cpu().double()


class Reading:
    """Numbers that the device may still be computing; read() waits for these only, not for later work."""

    def __init__(self, *scalars: torch.Tensor):
        self._tensor = torch.stack([scalar.detach().float() for scalar in scalars])
        self._arrived: torch.cuda.Event | None = None
        self._numbers: list[float] | None = None
        if self._tensor.is_cuda:
            # 锁页内存加事件：读上一步的数，不等后面排着的下一步
            pinned = torch.empty(self._tensor.shape, dtype=torch.float32, pin_memory=True)
            self._tensor = pinned.copy_(self._tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[float]:
        """The numbers."""
        if self._numbers is None:
            if self._arrived is not None:
                self._arrived.synchronize()
            self._numbers, self._tensor = self._tensor.tolist(), None
        return self._numbers
