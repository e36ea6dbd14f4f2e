"""Speed, model FLOPs utilisation and memory, measured on the machine that is there."""

import functools
import sys
import time
from pathlib import Path

import psutil
import torch

from nanogpt.cards import peak_tflops_of, present_card
from nanogpt.ram import GIB


@functools.cache
def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large matrix product, the best within a third of a second; measured once in a process."""
    size = 4096 if device.type == "cuda" else 768
    a = torch.randn(size, size, device=device, dtype=dtype)
    best, until = float("inf"), time.perf_counter() + 0.3
    # 取最好的一次：机器忙的时候，少数几次不能代表峰值
    while time.perf_counter() < until:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12


def peak_tflops(hardware, device: torch.device, precision) -> tuple[str, float]:
    """(where the figure comes from, TFLOP/s) for this device and number format."""
    half, tf32 = precision.half, precision.tf32
    if stated := peak_tflops_of(hardware, half=half, tf32=tf32):
        return f"hardware={hardware.name}", stated
    if device.type == "cuda" and (card := present_card(device)):
        return card.name, peak_tflops_of(card, half=half, tf32=tf32)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    dtype = precision.dtype if precision.half else torch.float32
    return f"{name}, matmul", measured_peak(device, dtype)


def memory_gib(device: torch.device) -> dict[str, float]:
    """allocated, reserved and peak in GiB: of the CUDA allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return {
            "allocated": torch.cuda.memory_allocated(device) / GIB,
            "reserved": torch.cuda.memory_reserved(device) / GIB,
            "peak": torch.cuda.max_memory_allocated(device) / GIB,
        }
    info = psutil.Process().memory_info()
    return {"allocated": info.rss / GIB, "reserved": info.vms / GIB, "peak": peak_resident(info) / GIB}


def peak_resident(info=None) -> int:
    """Largest resident size of this process so far, bytes; `info` is psutil's memory_info() where it is at hand."""
    if sys.platform == "linux":
        # ru_maxrss 会带上父进程 fork 时的大小，VmHWM 不会
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    if sys.platform == "win32":
        return (info or psutil.Process().memory_info()).peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS 以字节计，别的以 KiB 计
    return peak if sys.platform == "darwin" else peak * 1024


class Stopwatch:
    """Adds up the seconds between start and stop; used to time steps without evaluation and saving."""

    def __init__(self):
        self.total_s = 0.0
        self._since: float | None = None

    def start(self) -> None:
        self._since = time.perf_counter()

    def stop(self) -> None:
        self.total_s += time.perf_counter() - self._since
        self._since = None

    def cancel(self) -> None:
        """Forget the time since start()."""
        self._since = None

    def take(self) -> float:
        """Seconds so far; starts again from zero."""
        total, self.total_s = self.total_s, 0.0
        return total
