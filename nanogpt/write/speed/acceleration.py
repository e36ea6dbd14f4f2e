"""Fit a loaded model for writing: its number format, weight layout and the fastest step that the machine offers."""

# 载入之后、写作之前的一步：选数的格式（formats）、权重的排法，再选这台机器上最快的一步
# 读一遍权重的时间就是写一个 token 的时间，所以先减字节，再让每个线程读一段连续的内存
# CPU 装了 numba 且认得模型就用编译好的一步（fast_cpu），否则只换权重的排法；显卡上录成 CUDA graph
# 由 loading 调用；就地改模型，fast=false 时只换格式，是别的路径要对得上的那一条

import functools
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn as nn

from nanogpt.base.language import say
from nanogpt.core import loops
from nanogpt.core.attention import CausalSelfAttention
from nanogpt.core.kernels import attention
from nanogpt.core.kv_cache import KVCache
from nanogpt.core.model import GPT, Block
from nanogpt.core.precision import check_half, default_format
from nanogpt.core.sampling import sampler
from nanogpt.core.wrapping import mix_in
from nanogpt.run.cpu_units import LEAST_GAIN_OF_PRODUCTS, gain_of_products
from nanogpt.write.speed.cuda_graph import GraphStep
from nanogpt.write.speed.formats import Bf16Linear, convert
from nanogpt.write.speed.int4 import Int4Linear
from nanogpt.write.speed.int8 import Int8Linear, by_int_mm, fastest, plain_linear

# ---- 权重的排法 ----

class PackedLinear(nn.Module):
    """nn.Linear for inference whose weight (N, K) is stored as (parts, K, N / parts).

    Each thread streams a contiguous part of its own. x W^T with one row of x is bound by reading W. PyTorch's kernel
    for nn.Linear reads it at about half of the memory's speed; a batched product over column blocks stored one after
    the other, one per thread, reads it at nearly all of it.
    """

    # 没有 numba 时的退路：只换排法，不需要编译，结果只差求和次序

    def __init__(self, linear: nn.Linear, parts: int, *, tied: bool = False):
        super().__init__()
        self.n_out = linear.out_features
        # 词表之类除不尽的行数，末尾补 0，算完再切掉
        padding = -self.n_out % parts
        weight = nn.functional.pad(linear.weight.detach(), (0, 0, 0, padding))
        packed, bias = weight.view(parts, -1, linear.in_features).mT.contiguous(), None
        # count：代表几个数（GPT.parameter_count）；补的 0 不算，与词嵌入共用的那里已经算了
        packed.count = 0 if tied else linear.weight.numel()
        if linear.bias is not None:
            bias = nn.functional.pad(linear.bias.detach(), (0, padding)).view(parts, 1, -1)
            bias.count = linear.out_features
        self.register_buffer("packed_weight", packed, persistent=False)
        self.register_buffer("packed_bias", bias, persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        """The weight as nn.Linear has it, (N, K); a copy."""
        return self.packed_weight.mT.reshape(-1, self.packed_weight.size(1))[: self.n_out]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts, k, width = self.packed_weight.shape
        rows = x.reshape(1, -1, k).expand(parts, -1, -1)
        if self.packed_bias is None:
            y = torch.bmm(rows, self.packed_weight)
        else:
            y = torch.baddbmm(self.packed_bias, rows, self.packed_weight)
        # (parts, rows, width) -> (rows, N)；只有一行时不必搬动
        y = y.transpose(0, 1).reshape(-1, parts * width)[:, : self.n_out]
        return y.view(*x.shape[:-1], self.n_out)


@torch.no_grad()
def pack(model: nn.Module) -> None:
    """Replace every float32 nn.Linear of a CPU model by its packed form, in place.

    The old weights are freed unless they are tied.
    """
    parts, shared = torch.get_num_threads(), {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.weight.dtype == torch.float32 and child.weight.device.type == "cpu":
                setattr(parent, name, PackedLinear(child, parts, tied=id(child.weight) in shared))


# 小于它的模型，权重大半留在高速缓存里：减半省不下时间
LARGE_MIB = 128
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


def accelerate(model, precision: str, *, fast: bool = True):
    """Prepare a model in evaluation mode, in place, and return it.

    precision is auto | fp32 | fp16 | bf16 | int8 | int4. Without `fast` only the number format changes: the plain path
    that the others must equal.
    """
    name = measured_format(model, fast) if precision == "auto" else precision
    if model.device.type in ("mps", "xpu") and name in HALF:
        check_half(model.device, name)
    if model.device.type != "cpu" and name != "fp32":
        # 写作受读权重的带宽限制：半精度存放，字节减半，速度约翻倍
        # 没有张量核心的老卡训练用 fp32，量化之后的其余权重仍用 fp16 存放
        model.to(HALF[name] if name in HALF else HALF.get(default_format(model.device), torch.float16))
    if name in ("int8", "int4") or (name == "bf16" and model.device.type == "cpu"):
        convert(model, name)
    if fast:
        read_for_last(model)
    if fast and model.device.type == "cpu":
        if name == "bf16" and gain_of_products() >= LEAST_GAIN_OF_PRODUCTS:
            use_bf16_units(model)
        install_cpu_step(model)
        if name in ("int8", "int4"):
            choose_products(model)
    elif fast and model.device.type == "cuda":
        install(model, GraphStep(model))
    return model


def measured_format(model, fast: bool) -> str:
    """What precision=auto means: the device's own format, but bf16 for a large model on a CPU with units for it."""
    name = default_format(model.device)
    large = sum(p.numel() * p.element_size() for p in model.parameters()) >= LARGE_MIB * 2**20
    if fast and model.device.type == "cpu" and large and (fast_cpu := compiled_code()):
        # 量出来的值每台机器记一份：同一台机器总得同一个答案
        if fast_cpu.fits(model) and gain_of_products() >= LEAST_GAIN_OF_PRODUCTS:
            say("precision=auto: weights in bf16, half the reading of fp32; precision=fp32 keeps to fp32")
            return "bf16"
    return name


def of_last(block: Block, last: torch.Tensor, x: torch.Tensor, rope, cache: KVCache, visible=None) -> torch.Tensor:
    """block(x (B, T, C), rope, cache) at position last (B,) of each row, (B, 1, C); the cache is empty before."""
    attn, (B, T, _) = block.attn, x.shape
    parts = attn.parts(attn.c_attn(block.ln_1(x)).view(B, T, *attn.layout), rope)
    q, k, v = (t.transpose(1, 2) for part in parts for t in part.unbind(2))
    k, v = cache.update(attn.layer, k, v)
    rows = torch.arange(B, device=x.device)
    # 右边的是补上去的
    mask = torch.arange(T, device=x.device) <= last[:, None]
    y = attention(q[rows, :, last][:, :, None], k, v, mask[:, None, None], 0.0, attn.scale)
    x = x[rows, last][:, None] + attn.c_proj(y.reshape(B, 1, -1))
    return x + block.mlp(block.ln_2(x))


class FastReading:
    """Put before a model's own class: reads a text for the next id alone; the last block computes one position."""

    # 别的位置到了最后一层，有用的只是 key 与 value：十二层的模型省百分之六，六层的省百分之十二

    def last_hidden(self, idx: torch.Tensor, cache: KVCache, last: torch.Tensor) -> torch.Tensor:
        *blocks, final = self.h
        return self.hidden(idx, cache, [*blocks, partial(of_last, final, last)])[:, 0]


def read_for_last(model) -> None:
    """Let a model read prompts through FastReading, unless it has parts of the user's own there."""
    block = model.h[-1]
    if type(block) is Block and type(block.attn) is CausalSelfAttention and type(model).hidden is GPT.hidden:
        mix_in(model, FastReading)


class FastSteps:
    """Put before a model's own class: up to fast_step.max_rows rows at once go through `fast_step` if there is one."""

    # 从外面插到模型的类前面：core 里的模型不必留出位置

    fast_step = None

    def next_logits(self, idx: torch.Tensor, cache: KVCache) -> torch.Tensor:
        if self.fast_step is not None and len(idx) <= self.fast_step.max_rows:
            return self.fast_step(idx, cache)
        return super().next_logits(idx, cache)


def install(model, step) -> None:
    """Let a model decode through `step`, called as step(idx (B,), cache) -> logits (B, V)."""
    mix_in(model, FastSteps)
    model.fast_step = step


def compiled_code():
    """The module fast_cpu where numba is installed and works, else None."""
    if not find_spec("numba") or not _works():
        return None
    from nanogpt.write.speed import fast_cpu

    return fast_cpu


@functools.cache
def _works() -> bool:
    reason = loops.failure()
    if reason:
        say("numba cannot be used ({reason}); writing goes on without it", reason=reason)
    return reason is None


def install_cpu_step(model) -> None:
    """The compiled step where numba works and knows the model; packed weights otherwise."""
    fast_cpu = compiled_code()
    if fast_cpu is None or not fast_cpu.fits(model):
        pack(model)
        return
    if not fast_cpu.is_compiled():
        say("compiling the fast decoder for this processor, once …")
    install(model, fast_cpu.FastStep(model))
    read_by_loops(model)
    # 编译或载入机器码就在这里做完，第一个字不必等
    with torch.inference_mode():
        logits = model.fast_step(torch.zeros(1, dtype=torch.long), KVCache(model, 1, 1))
    model.fast_step.draw([sampler()], logits, logits, torch.zeros(1, 1, dtype=torch.long), torch.zeros(1))


def read_by_loops(model) -> None:
    """Let a model read texts with compiled loops in place of PyTorch's attention and small operations."""
    from nanogpt.core.loops import training
    from nanogpt.write.speed import causal_attention

    training.use_loops(model)
    for block in model.h:
        mix_in(block.attn, causal_attention.Reading)
    causal_attention.prepare()


def use_bf16_units(model) -> None:
    """Let a model's bf16 matrices be multiplied with activations in bf16 where the compiled step does not take them."""
    for linear in model.modules():
        if isinstance(linear, Bf16Linear):
            linear.native = True


def choose_products(model) -> None:
    """Let a model's integer matrices on the CPU be multiplied by what is fastest here; all ways give the same bits."""
    ways = {"floats": plain_linear, "torch._int_mm": partial(plain_linear, multiply=by_int_mm)}
    if compiled_code():
        from nanogpt.write.speed import int4_dot, integer_dot

        ways["numba"] = integer_dot.linear
        ways["numba + torch._int_mm"] = partial(integer_dot.linear, multiply=by_int_mm)
        for linear in model.modules():
            if isinstance(linear, Int4Linear):
                linear.multiply = int4_dot.linear
    linears = [m for m in model.modules() if isinstance(m, Int8Linear)]
    if not linears:
        return
    chosen, names = fastest(ways, linears[0].weight.shape)
    for linear in linears:
        linear.ways = chosen
    same = len(set(names.values())) == 1
    named = names[1] if same else ", ".join(f"{name} ({rows}+)" for rows, name in names.items())
    say("int8 products, measured: {named}", named=named)
