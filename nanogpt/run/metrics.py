"""Measure speed, model FLOPs utilisation and memory on this machine."""

# 在这台机器上量速度、MFU 与内存：峰值 TFLOP/s、此刻与最高的内存、只计训练步的秒表
# MFU 的分母取自 hardware= 写明的、认得的卡，否则实测；CPU 的峰值每分钟再量一次，因为别的程序会抢
# loop 用 peak_tflops、flops_per_token、memory_gib 与秒表，plan/roofline 用 measured_peak，sweep 用 peak_resident

import contextlib
import functools
import json
import math
import platform
import re
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from nanogpt.base.files import write_text
from nanogpt.base.hardware import GIB, device_name, peak_tflops_of, present_card
from nanogpt.base.language import text
from nanogpt.core.machine import synchronize
from nanogpt.core.memory.nf4 import NF4Linear
from nanogpt.data.assets import cache_folder

# 在缓存文件夹里：每种处理器、torch 版本、数字格式见过的最快一次；remember 也记别的，如 cpu_units 的比值
PEAKS = "peaks.json"
BURST_S, REFRESH_S = 0.3, 60.0
# 几种大小里总有一种最合这台机器的缓存；CPU 上一次约 1 ms，忙的机器也来不及打断每一次
SIZES = {"card": (4096,), "cpu": (256, 384, 512)}
_measured: dict[str, tuple[float, float]] = {}


def measured_peak(device: torch.device, dtype: torch.dtype, *, keep: bool = False) -> float:
    """TFLOP/s of the fastest matrix products seen on this machine: now, earlier in this process, or by an earlier one.

    Of a CPU it is the rate of one thread times the number of threads, and is measured anew after a minute. With `keep`
    a new best is written to the cache folder.
    """
    tf32 = device.type == "cuda" and dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    kind = "tf32" if tf32 else str(dtype).removeprefix("torch.")
    key = f"{processor_name(device)}, torch {torch.__version__}, {kind}"
    if key not in _measured:
        _measured[key] = remembered(PEAKS).get(key, 0.0), -math.inf
    best, at = _measured[key]
    # 显卡没有别人来抢，显存也常常正好用满：只在开始时量
    due = at == -math.inf or (device.type == "cpu" and time.monotonic() - at > REFRESH_S)
    if due and (found := _burst(device, dtype)) > best:
        best = found
        if keep:
            remember(PEAKS, key, best)
    _measured[key] = best, time.monotonic() if due else at
    return best * (torch.get_num_threads() if device.type == "cpu" else 1)


def _burst(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of the fastest of many products; of one thread on a CPU."""
    card, threads = device.type != "cpu", torch.get_num_threads()
    generator, sizes = torch.Generator(device).manual_seed(0), SIZES["card" if card else "cpu"]
    matrices = [torch.randn(size, size, device=device, dtype=dtype, generator=generator) for size in sizes]
    best, until = 0.0, time.perf_counter() + BURST_S
    # 一起算的线程互相等：别的程序占着一个核，几个线程的乘积就慢几十倍，再取最好的也量不出峰值
    torch.set_num_threads(1)
    try:
        while time.perf_counter() < until:
            for a in matrices:
                synchronize(device)
                start = time.perf_counter()
                torch.mm(a, a)
                synchronize(device)
                best = max(best, 2 * len(a) ** 3 / (time.perf_counter() - start) / 1e12)
    finally:
        torch.set_num_threads(threads)
    return best


def remembered(file: str) -> dict[str, float]:
    """What was measured on this machine before, by what it was: a file of positive numbers in the cache folder."""
    try:
        numbers = json.loads((cache_folder() / file).read_text(encoding="utf-8"))
        return {key: float(value) for key, value in numbers.items() if 0 < value < math.inf}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        # 没有、坏了、读不了：重新量就是
        return {}


def remember(file: str, key: str, number: float) -> None:
    """Keep a number for the next process."""
    # 只是缓存：存不下，下一次重新量
    with contextlib.suppress(OSError):
        cache_folder().mkdir(parents=True, exist_ok=True)
        write_text(cache_folder() / file, json.dumps({**remembered(file), key: round(number, 6)}, indent=1) + "\n")


@functools.cache
def processor_name(device: torch.device) -> str:
    """What the driver calls the card, or the system the processor, with the instructions that torch uses of it."""
    if device.type != "cpu":
        return device_name(device)
    # Linux 上 platform.processor() 只说架构
    info = Path("/proc/cpuinfo")
    told = info.read_text(encoding="utf-8", errors="replace") if info.is_file() else ""
    found = re.search(r"^model name\s*: (.+)$", told, re.MULTILINE)
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def peak_tflops(hardware, device: torch.device, precision) -> tuple[str, float]:
    """(what the figure is, TFLOP/s) for this device and number format."""
    half, tf32 = precision.half, precision.tf32
    if stated := peak_tflops_of(hardware, half=half, tf32=tf32):
        return f"hardware={hardware.name}", stated
    if device.type == "cuda" and (card := present_card(device)):
        return card.name, peak_tflops_of(card, half=half, tf32=tf32)
    name, dtype = processor_name(device), precision.dtype if half else torch.float32
    message = "peak_of_card" if device.type != "cpu" else "peak_of_threads"
    return text(message, name=name, threads=torch.get_num_threads()), measured_peak(device, dtype, keep=True)


def memory_gib(device: torch.device) -> dict[str, float]:
    """allocated, reserved and peak in GiB: of the card's allocator, or of this process on a CPU."""
    if device.type == "mps":
        # Metal 没有峰值：分配器要来的很少还回去，它就是见过的最高处
        allocated, reserved = torch.mps.current_allocated_memory() / GIB, torch.mps.driver_allocated_memory() / GIB
        return {"allocated": allocated, "reserved": reserved, "peak": reserved}
    if device.type != "cpu":
        # torch.cuda 与 torch.xpu 的名字相同
        card = getattr(torch, device.type)
        return {
            "allocated": card.memory_allocated(device) / GIB,
            "reserved": card.memory_reserved(device) / GIB,
            "peak": card.max_memory_allocated(device) / GIB,
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


def flops_per_token(model) -> int:
    """FLOPs of the matrix products that training takes per token, forward and backward.

    As in PaLM (arXiv:2204.02311, appendix B): attention counts as if it saw the whole context, look-ups are free, and
    what is computed again to save memory does not count.
    """
    c = model.config
    tables = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, torch.nn.Embedding)}
    linears = [[name for name, m in block.attn.named_modules() if isinstance(m, torch.nn.Linear)] for block in model.h]
    outputs = {f"h.{layer}.attn.{names[-1]}.weight" for layer, names in enumerate(linears) if names}
    flops, trained = 0, False
    # 参数按计算的次序登记；共享的矩阵在每个用它的地方各算一次
    for name, p, numel in matrices(model):
        if name in outputs:
            # 注意力的乘积在输出投影之前；反向恰是前向的两倍
            flops += (4 + 8 * trained) * c.n_head * c.head_size * c.block_size
        if p.dim() > 1 and name not in tables:
            # 前向、自己的梯度、往回传的梯度各两次；LoRA 冻结的矩阵没有第二项，第一个 adapter 之前没有第三项
            flops += (2 + 2 * p.requires_grad + 2 * trained) * numel
        trained = trained or p.requires_grad
    return flops


def matrices(model) -> Iterator[tuple[str, torch.Tensor, int]]:
    """(name, tensor, number of weights) of everything that multiplies or adds, in the order in which it is computed."""
    for name, module in model.named_modules(remove_duplicate=False):
        four_bit = isinstance(module, NF4Linear)
        # 4 位的权重不是参数
        for own, tensor in (("weight", module.weight),) if four_bit else module.named_parameters("", recurse=False):
            yield f"{name}.{own}", tensor, module.in_features * module.out_features if four_bit else tensor.numel()


class Forecast:
    """How long the rest of a training takes: its steps, and what it stops for, as both have lasted so far."""

    # 只看步速的 ETA 会忽快忽慢：评估、保存、写样本都要停下来，按上一次的时长算进去

    def __init__(self, max_iters: int, evaluations: int | None, saves: int | None, evaluation_in_steps: float):
        """Intervals of evaluations and of saves between them; the work of an evaluation compared to that of a step."""
        self.max_iters, self.evaluations, self.saves = max_iters, evaluations or max_iters, saves
        self._relative = evaluation_in_steps
        self._steps: deque[float] = deque(maxlen=200)
        self._pauses: dict[str, float] = {}

    def step(self, seconds: float) -> None:
        """One step took so long."""
        self._steps.append(seconds)

    def pause(self, kind: str, seconds: float) -> None:
        """An "evaluation", with the save and the sample behind it, or a "save" alone took so long."""
        self._pauses[kind] = seconds

    @property
    def timed(self) -> int:
        """How many recent steps it knows."""
        return len(self._steps)

    @property
    def step_s(self) -> float:
        """Seconds of a recent step; 0 before the first one that was timed."""
        return sum(self._steps) / len(self._steps) if self._steps else 0.0

    @property
    def evaluation_s(self) -> float:
        """Seconds of the next evaluation: those of the latest, or, before the first, what its work would take."""
        return self._pauses.get("evaluation", self._relative * self.step_s)

    def _ahead(self, interval: int, iteration: int) -> int:
        """How often something is due that comes every `interval` steps."""
        return self.max_iters // interval - (iteration - 1) // interval

    def evaluations_left(self, iteration: int) -> int:
        """How many evaluations come from the end of this step on."""
        # 最后一步总要评估
        return self._ahead(self.evaluations, iteration) + (self.max_iters % self.evaluations > 0)

    def left_s(self, iteration: int) -> float:
        """Seconds from the end of this step until max_iters are done; what is due right after it counts."""
        saves, extra = 0, self.max_iters % self.evaluations > 0
        if self.saves:
            # 与评估碰在一起的保存已算在评估里
            both = self._ahead(math.lcm(self.saves, self.evaluations), iteration)
            saves = self._ahead(self.saves, iteration) - both - (extra and self.max_iters % self.saves == 0)
        steps = (self.max_iters - iteration) * self.step_s
        pauses = self.evaluations_left(iteration) * self.evaluation_s + saves * self._pauses.get("save", 0.0)
        return steps + pauses


class Stopwatch:
    """Adds up the seconds between start and stop; used to time steps without evaluation and saving."""

    # cancel 是给编译用的：第一步里的编译时间不算进速度

    def __init__(self):
        self.total_s = 0.0
        self._since: float | None = None

    def start(self) -> None:
        self._since = time.perf_counter()

    def stop(self) -> float:
        """Seconds since start(), which are added up."""
        passed, self._since = time.perf_counter() - self._since, None
        self.total_s += passed
        return passed

    def cancel(self) -> None:
        """Forget the time since start()."""
        self._since = None

    def take(self) -> float:
        """Seconds so far; starts again from zero."""
        total, self.total_s = self.total_s, 0.0
        return total
