# torch.compile：只在能用、也赚得回编译时间的地方用；编译器出了任何毛病，一行说明，照常训练
# 从外面包住模型的 hidden、损失的尾巴与 8 位状态的更新，核心不知道有它；CPU 上换成编译好的循环，也从这里
"""torch.compile, and on a CPU compiled loops, where they work and pay; never a reason for a run to fail."""

import functools
import logging
import math
import os
import shutil
import warnings
from importlib.util import find_spec

import torch

from nanogpt.base.errors import is_out_of_memory
from nanogpt.base.language import first_line
from nanogpt.core import loops
from nanogpt.core.memory.lean_optimizers import fusible_adamw, fusible_momentum
from nanogpt.core.wrapping import mix_in

# 编译的时间大致随层数涨：2 核 CPU 上 tiny 的训练图 14 秒，每多一层多两三秒
COMPILE_S, COMPILE_S_PER_LAYER = 10.0, 2.5
# 公开的数据里编译后快 1.2 ~ 1.5 倍：保守地算省下两成
GAIN = 0.2
# 粗估一步要多久：乘法到峰值的一半；每层百来个 kernel，Python 每个要 10 微秒
REACHED, LAUNCH_S_PER_LAYER = 0.5, 1e-3
# 矩阵乘估计不到启动的这么多倍，就值得录成图：录一次不过一秒，慢的处理器启动得也慢；估的乘法又偏快
LONGER_THAN_LAUNCHES = 4
# 循环编译一次要五秒，一步省一两成：短训练赚不回来。只看步数与时限，不看量出的快慢：接着训的一次要走同一条路
LEAST_STEPS, LEAST_S = 300, 60
# 编译器的报错可以有一屏：只说开头
LONGEST_REASON = 120


def unavailable(device: torch.device) -> str | None:
    """Why torch.compile cannot work here, or None."""
    if device.type == "cuda":
        try:
            import triton  # noqa: F401 - 只看装没装
        except ImportError:
            return "triton is not installed"
        return None
    if device.type != "cpu":
        return f"not tried on {device.type}"
    if not any(shutil.which(name) for name in ("g++", "clang++", "cl")):
        return "no C++ compiler"
    return None


def seconds_to_compile(layers: int) -> float:
    """A rough estimate for a model's training step."""
    return COMPILE_S + COMPILE_S_PER_LAYER * layers


def products_s(flops_per_token: float, tokens: int, peak_tflops: float) -> float:
    """A rough estimate of the seconds that the products of so many tokens take."""
    return flops_per_token * tokens / (REACHED * peak_tflops * 1e12)


def launch_bound(layers: int, flops_per_token: float, tokens: int, peak_tflops: float) -> bool:
    """Whether a card may wait for the launches of a micro-batch of so many tokens, by the same rough estimate."""
    return products_s(flops_per_token, tokens, peak_tflops) < LONGER_THAN_LAUNCHES * layers * LAUNCH_S_PER_LAYER


def pays(
    layers: int, flops_per_token: float, tokens_per_step: int, micro_batches: int, steps: float, peak_tflops: float,
    seconds: float = math.inf,
) -> bool:
    """Whether compiling saves more time than it takes, by a rough estimate from the whole length of the training:
    `steps`, or `seconds` where these are over earlier.

    It must not depend on how far the training is: a resumed run takes the same way as an uninterrupted one.
    """
    step_s = max(products_s(flops_per_token, tokens_per_step, peak_tflops), layers * LAUNCH_S_PER_LAYER * micro_batches)
    planned_s = min(seconds, steps * step_s)
    return planned_s * GAIN > seconds_to_compile(layers)


class Compiled:
    """A function compiled for each shape that it meets; its plain form from the first failure of the compiler on."""

    def __init__(self, plain, console, *, dynamic: bool = False):
        self.plain, self.console = plain, console
        # 形状只有几种：各编一张，不要又慢又难编的动态形状
        self.compiled = torch.compile(plain, dynamic=dynamic)

    def __call__(self, *args):
        if self.compiled is not None:
            try:
                return self.compiled(*args)
            except Exception as error:
                # 录制 CUDA graph 时的错多半是录不进去，不是编译器的
                if is_out_of_memory(error) or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
                    raise
                # 若是模型自己的错，下面普通执行时会原样再报一次
                self.compiled, reason = None, first_line(error)[:LONGEST_REASON]
            self.console.line("torch.compile failed ({reason}); going on without it", reason=reason)
        return self.plain(*args)


def fusible_tail(logits: torch.Tensor, expected: torch.Tensor, V: int, softcap: float) -> torch.Tensor:
    """The losses of kernels.cross_entropy(), written to be fused in two passes; the gradient is left in the logits."""
    wide = logits[:, :V].to(torch.promote_types(logits.dtype, torch.float32))
    squashed = torch.tanh(wide / softcap) if softcap else None
    capped = squashed * softcap if softcap else wide
    log_z = torch.logsumexp(capped, dim=-1, keepdim=True)
    losses = log_z - capped.gather(1, expected)
    # 比较代替 scatter：融进同一个 kernel，也没有不确定的写
    grad = torch.exp(capped - log_z) - (torch.arange(V, device=logits.device) == expected).to(capped.dtype)
    logits[:, :V].copy_(grad * (1 - squashed.square()) if softcap else grad)
    return losses


class CompiledTraining:
    """Put before a model's own class: training steps go through `compiled_hidden`."""

    # 只编译训练用的这一条路：评估还要再编三张图（整批、零头、短窗口），解码的形状每步都变
    def hidden(self, idx: torch.Tensor, cache=None) -> torch.Tensor:
        return self.compiled_hidden(idx) if self.training and cache is None else super().hidden(idx, cache)


def use_compiled(model, console) -> None:
    """Let a model's training steps run compiled."""
    model.compiled_hidden = Compiled(model.hidden, console)
    mix_in(model, CompiledTraining)
    model.cross_entropy = functools.partial(model.cross_entropy, tail=Compiled(fusible_tail, console))


def compile_hidden(
    model, asked: str, device: torch.device, console, *, obstacle: str | None = None, pays: bool = True,
) -> bool:
    """Compile model.hidden and the loss's tail for training steps as compile=auto|true|false asks, where that works;
    whether it does.

    obstacle: what speaks against it, or None; pays: whether auto may do it on a card.
    """
    asked = asked.lower()
    # CPU 上编译要一分钟，小模型短训练赚不回来；auto 只在 GPU 上开
    if asked == "false" or (asked == "auto" and (device.type == "cpu" or not pays)):
        return False
    _keep_quiet()
    reason = obstacle or unavailable(device) or _trial(device)
    if reason:
        if asked == "true":
            console.line(
                "compile={asked}: not available here ({reason}); going on without it",
                asked=asked, reason=reason,
            )
        return False
    console.line(
        "compiling the model: the first iteration takes longer, by roughly {seconds:.0f} s …",
        seconds=seconds_to_compile(model.config.n_layer),
    )
    use_compiled(model, console)
    return True


def compile_updates(optimizer, asked: str, device: torch.device, console) -> None:
    """Let updates of 8-bit states run as a few fused kernels, as compile= asks, where that works: it always pays."""
    asked = asked.lower()
    in_8_bits = getattr(getattr(optimizer, "storage", None), "int8", False)
    if not in_8_bits or asked == "false" or (asked == "auto" and device.type == "cpu"):
        return
    if unavailable(device) or _trial(device):
        return
    _keep_quiet()
    # 参数有大有小：一张图管所有的大小
    optimizer.storage.fused_adamw = Compiled(fusible_adamw, console, dynamic=True)
    optimizer.storage.fused_momentum = Compiled(fusible_momentum, console, dynamic=True)


def use_loops(
    step, asked: str, device: torch.device, console, *, compiled: bool, steps: float, seconds: float
) -> bool:
    """Let a training on a CPU compute with core.loops where numba is installed, unless compile=false or it is short;
    whether it does.

    compiled: whether the model runs through torch.compile; steps, seconds: of the whole training, infinite if unknown.
    """
    worth = asked.lower() == "true" or (asked.lower() == "auto" and steps >= LEAST_STEPS and seconds >= LEAST_S)
    # 分片的参数没有自己的内存；numba 只在这里才导入
    if device.type != "cpu" or not worth or step.sums or not find_spec("numba"):
        return False
    if reason := loops.failure():
        console.line("numba cannot be used ({reason}); training goes on without it", reason=reason[:LONGEST_REASON])
        return False
    from nanogpt.core.loops import training, updates

    worth = training.worth_it(step.model)
    if not compiled:
        training.use_loops(step.model)
    return updates.use_loops(step.optimizer) or (worth and not compiled)


def _keep_quiet() -> None:
    """Let the compiler say nothing: what matters to people, Compiled says in one line."""
    warnings.filterwarnings("ignore", module=r"torch\._(dynamo|inductor|functorch)")
    # 自己设了 TORCH_LOGS 的人就是要看
    if "TORCH_LOGS" not in os.environ:
        torch._logging.set_logs(all=logging.CRITICAL)


@functools.cache
def _trial(device: torch.device) -> str | None:
    """Compile one small function to find out whether the tool chain works; the reason if not."""
    try:
        torch.compile(lambda x: torch.sin(x) + 1)(torch.ones(8, device=device))
    except Exception as error:
        # 工具链的毛病五花八门，任何失败都等于不可用
        return first_line(error)[:LONGEST_REASON]
    return None
