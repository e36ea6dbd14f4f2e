"""Turn the work that a trace counted into seconds: each operation is bound by products or by memory."""

# 把追踪数出的运算量换成时间：每个运算要么受乘法的峰值限制，要么受显存带宽限制，取慢的那个
# 峰值依次取自 hardware= 写明的、认得的卡的数据、实测；卡不在这台机器上就按参考卡算
# plan 用它算每步的秒数；达成率是假设的常数，所以速度只是“大约”，显存那边才是算出来的

import functools
from collections import Counter
from dataclasses import dataclass

from nanogpt.base.config import HardwareConfig
from nanogpt.base.hardware import device_name, peak_tflops_of, present_card, reference
from nanogpt.plan.budget import Budget
from nanogpt.run.metrics import measured_peak

PCIE_GB_PER_S = 12.0
"""Pinned copies over PCIe 4.0 x16 of a desktop, each way."""
# 假设的达成率：大矩阵乘与逐元素 kernel 在消费级卡上的常见水平
PRODUCT_EFFICIENCY = {"cuda": 0.80, "xpu": 0.80, "mps": 0.80, "cpu": 0.85}
BANDWIDTH_EFFICIENCY = dict.fromkeys(PRODUCT_EFFICIENCY, 0.85)
LAUNCH_S = dict.fromkeys(PRODUCT_EFFICIENCY, 6e-6)
"""One eager operation with nothing to do."""
COPY_BYTES = 2**26


@dataclass(frozen=True)
class Rates:
    """Peaks of a device, per second."""

    # 带着出处：打印时要说清楚这些数是写明的、查到的还是量到的

    device_type: str
    fp32_flops: float
    half_flops: float
    bandwidth: float
    pcie: float
    source: str
    """Where the peaks come from."""

    def seconds(self, ops: Counter) -> float:
        """Time of operations counted by (flops, bytes, 16-bit?, bytes over PCIe)."""
        products, passes = PRODUCT_EFFICIENCY[self.device_type], BANDWIDTH_EFFICIENCY[self.device_type]
        total = 0.0
        for (flops, traffic, half, over_pcie), count in ops.items():
            peak = self.half_flops if half else self.fp32_flops
            busy = max(flops / (peak * products), traffic / (self.bandwidth * passes), over_pcie / self.pcie)
            # 发射与执行重叠：小运算受发射限制，大运算看不见它
            launch = LAUNCH_S[self.device_type]
            total += count * (max(busy, launch) if self.device_type != "cpu" else busy + launch)
        return total


def rates_of(hardware: HardwareConfig, budget: Budget, *, tf32: bool = True) -> Rates:
    """The rates of a device: stated figures first, then a known card's, then measured ones.

    A card that is not in this machine counts as the reference card.
    """
    fp32, half, bandwidth = _peaks(hardware, tf32 and budget.device_type == "cuda")
    source = f"hardware={hardware.name}"
    if None in (fp32, half, bandwidth):
        measured = _measure(budget, tf32)
        source = measured[3] if (fp32, half, bandwidth) == (None, None, None) else f"{source}, {measured[3]}"
        stated = (fp32, half, bandwidth)
        fp32, half, bandwidth = (own or found for own, found in zip(stated, measured, strict=False))
    pcie = hardware.pcie_gb_per_s or PCIE_GB_PER_S
    return Rates(budget.device_type, fp32 * 1e12, half * 1e12, bandwidth * 1e9, pcie * 1e9, source)


def _peaks(card: HardwareConfig, tf32: bool) -> tuple[float | None, float | None, float | None]:
    """(fp32 TFLOP/s, 16-bit TFLOP/s, GB/s) that a card states."""
    fp32, half = (peak_tflops_of(card, half=half, tf32=tf32) for half in (False, True))
    return fp32, half, card.bandwidth_gb_per_s


def _measure(budget: Budget, tf32: bool) -> tuple[float, float, float, str]:
    """(fp32 TFLOP/s, 16-bit TFLOP/s, GB/s, source) of the device planned for."""
    import torch

    if budget.device_type == "cuda" and not budget.present:
        return *_peaks(reference(), tf32), reference().name
    device = torch.device(budget.device_type)
    if device.type == "cuda" and (card := present_card(device)):
        return *_peaks(card, tf32), card.name
    if device.type != "cpu":
        name = device_name(device)
        fp32, half = measured_peak(device, torch.float32), measured_peak(device, torch.float16)
        return fp32, half, copy_bandwidth(device), f"{name}, measured"
    peak = measured_peak(device, torch.float32)
    # CPU 的 16 位只是取整，乘法仍用 fp32
    return peak, peak, copy_bandwidth(device), "CPU, measured"


@functools.cache
def copy_bandwidth(device) -> float:
    """GB/s of a large copy, reads and writes counted, the best of a few; measured once in a process."""
    import time

    import torch

    from nanogpt.core.machine import synchronize

    source, copies = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device), 8
    sink = torch.empty_like(source)
    best = float("inf")
    for _ in range(copies):
        start = time.perf_counter()
        sink.copy_(source)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    if device.type == "cpu":
        # 别的程序占着核时，一起抄的线程互相等，量到的近乎零；一个线程自己的 CPU 时间里没有等待，至少有它那么快
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        start = time.thread_time()
        for _ in range(copies):
            sink.copy_(source)
        # Windows 的这个钟 15 毫秒一跳，几次一起算
        best = min(best, (time.thread_time() - start) / copies or best)
        torch.set_num_threads(threads)
    return 2 * COPY_BYTES / best / 1e9
