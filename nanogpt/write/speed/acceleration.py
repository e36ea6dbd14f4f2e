"""Fit a loaded model for writing: number format, weight layout and the fastest step that the machine offers."""

from importlib.util import find_spec

import torch

from nanogpt.base.language import say
from nanogpt.core.kv_cache import KVCache
from nanogpt.core.precision import default_format
from nanogpt.core.wrapping import mix_in
from nanogpt.write.speed.cuda_graph import GraphStep
from nanogpt.write.speed.int8 import quantize_model
from nanogpt.write.speed.weight_layout import pack

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


def accelerate(model, precision: str, *, fast: bool = True):
    """Prepare a model in evaluation mode, in place, and return it; precision is auto | fp32 | fp16 | bf16 | int8.

    Without `fast` only the number format changes: the plain path that the others must equal.
    """
    name = default_format(model.device) if precision == "auto" else precision
    if model.device.type == "cuda" and name != "fp32":
        # 写作受读权重的带宽限制：半精度存放，字节减半，速度约翻倍
        # 没有张量核心的老卡训练用 fp32，量化之后的其余权重仍用 fp16 存放
        model.to(HALF.get(default_format(model.device), torch.float16) if name == "int8" else HALF[name])
    if name == "int8":
        quantize_model(model)
    if fast and model.device.type == "cpu":
        install_cpu_step(model)
    elif fast:
        install(model, GraphStep(model))
    return model


class FastSteps:
    """Put before a model's own class: up to fast_step.max_rows rows at once go through `fast_step`, unless it is None."""

    fast_step = None

    def next_logits(self, idx: torch.Tensor, cache: KVCache) -> torch.Tensor:
        if self.fast_step is not None and len(idx) <= self.fast_step.max_rows:
            return self.fast_step(idx, cache)
        return super().next_logits(idx, cache)


def install(model, step) -> None:
    """Let a model decode through `step`, called as step(idx (B,), cache) -> logits (B, V)."""
    mix_in(model, FastSteps)
    model.fast_step = step


def install_cpu_step(model) -> None:
    """The compiled step where numba is installed and knows the model; packed weights otherwise."""
    if find_spec("numba"):
        from nanogpt.write.speed import fast_cpu

        if fast_cpu.fits(model):
            if not fast_cpu.is_compiled():
                say("compiling the fast decoder for this processor, once …")
            install(model, fast_cpu.FastStep(model))
            # 编译或载入机器码就在这里做完，第一个字不必等
            with torch.inference_mode():
                model.fast_step(torch.zeros(1, dtype=torch.long), KVCache(model, 1, 1))
            return
    pack(model)
