"""Whether a training is faster on the bf16 units of this machine's CPU: measured once, then remembered."""

# precision.cpu_bf16=auto 在这里变成 none、optimizer 或 all：没有 bf16 单元的 CPU 慢 15 倍，所以只信量出来的
# 先量单纯的乘积，再把这个形状的一层前向加反向按两种格式轮流走几遍；小模型上类型转换会吃掉乘积省下的
# 比值按处理器、torch 版本、线程数与形状记在缓存文件夹里，同一台机器总得同一个答案
# session 定下之后写进运行目录的 config.yaml：接着训的一次不再问，plan 与试跑用同样的答案

import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from nanogpt.base.config import ModelConfig, PrecisionConfig
from nanogpt.base.language import text
from nanogpt.core.model import GPT
from nanogpt.run.metrics import measured_peak, processor_name, remember, remembered

FILE = "bf16.json"
CPU = torch.device("cpu")
# 快这么多才换：换了格式，舍入的误差也换了
LEAST_GAIN = 1.1
LEAST_GAIN_OF_PRODUCTS = 1.5
# 再窄的模型乘积太小，不值得量
LEAST_WIDTH = 128
# 与词表无关的一层：这么多 token 就看得出快慢
TOKENS, VOCABULARY = 1024, 256
ROUNDS, LONGEST_S = 6, 3.0
FIELDS = (
    "n_embd", "n_head", "kv_heads", "head_size", "mlp_width", "block_size", "norm", "activation", "qk_norm", "dropout"
)
_known: dict[str, float] = {}


def settled(precision: PrecisionConfig, model: ModelConfig, device_type: str) -> PrecisionConfig:
    """The same with cpu_bf16=auto decided for a training of `model`, where that changes anything."""
    if device_type != "cpu" or precision.cpu_bf16 != "auto" or precision.dtype not in ("auto", "bf16"):
        return precision
    units = "none"
    if model.n_embd >= LEAST_WIDTH and gain_of_products() >= LEAST_GAIN_OF_PRODUCTS:
        # 写明了 bf16 的，有单元就用：总比舍入快
        asked = precision.dtype == "bf16"
        units = "all" if asked or gain_of_training(model) >= LEAST_GAIN else "optimizer"
    return replace(precision, cpu_bf16=units)


def reason(precision: PrecisionConfig, model: ModelConfig) -> str | None:
    """What settled() made of dtype=auto and why, for people; None where nothing was measured."""
    if precision.dtype != "auto" or precision.cpu_bf16 == "auto" or model.n_embd < LEAST_WIDTH:
        return None
    if precision.cpu_bf16 == "none":
        return text(
            "precision=auto: fp32; bf16 products run at {gain:.2f} of its speed on this CPU", gain=gain_of_products()
        )
    gain = gain_of_training(model)
    if precision.cpu_bf16 == "all":
        return text(
            "precision=auto: bf16, {gain:.2f}x as fast as fp32 here; precision=fp32 keeps to fp32", gain=gain
        )
    return text("precision=auto: fp32; bf16, {gain:.2f}x as fast here, is for Muon's iteration alone", gain=gain)


def gain_of_products() -> float:
    """How many times as fast as in float32 one thread's matrix products are in bf16."""
    def measure() -> float:
        return measured_peak(CPU, torch.bfloat16) / measured_peak(CPU, torch.float32)

    return _once("products", measure)


def gain_of_training(model: ModelConfig) -> float:
    """How many times as fast as in float32 one layer of this shape is trained under bf16 autocast."""
    layer = one_layer(model)
    shape = " ".join(f"{name}={getattr(layer, name)}" for name in FIELDS)
    return _once(shape, lambda: time_layer(layer))


def one_layer(model: ModelConfig) -> ModelConfig:
    """A model of one layer of this shape, without what does not depend on the format."""
    return replace(model, n_layer=1, vocab_size=VOCABULARY, ngrams=[], separator=None, tie_embeddings=False)


def _once(what: str, measure: Callable[[], float]) -> float:
    key = f"{processor_name(CPU)}, torch {torch.__version__}, {torch.get_num_threads()} threads, {what}"
    if key not in _known:
        found = remembered(FILE).get(key)
        _known[key] = found or round(measure(), 6)
        if not found:
            remember(FILE, key, _known[key])
    return _known[key]


def time_layer(config: ModelConfig) -> float:
    """The seconds of a step in float32 over those under bf16 autocast, forward and backward."""
    best, until = {False: math.inf, True: math.inf}, time.perf_counter() + LONGEST_S
    # 训练的随机数一个也不能少
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT(config)
        idx = torch.randint(VOCABULARY, (max(1, TOKENS // config.block_size), config.block_size))
        for number in range(ROUNDS):
            # 轮流走：别的程序来抢时，两种一起慢；各取最快的一遍
            for bf16 in best:
                start = time.perf_counter()
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    loss = model.loss(idx, idx)
                loss.backward()
                best[bf16] = min(best[bf16], time.perf_counter() - start)
            if number and time.perf_counter() > until:
                break
    return best[False] / best[True]
