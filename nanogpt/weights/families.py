"""Llama, Qwen2 and Qwen3 in transformers' files: their config.json and names of tensors, as ours and back."""

# Llama、Qwen2、Qwen3 三家：transformers 的 config.json 与张量名，和我们的互换
# 读由 pretrained 调用，写由 huggingface 调用
# 三家是同一个结构的不同开关：Qwen2 是 q、k、v 带 bias，Qwen3 是 QK-norm 带增益
# 他们的 q、k、v 与 gate、up 各存各的，我们合成一个矩阵：按行拼起来就是
# 会改变结果、而我们没有实现的设置一律拒绝，说出文件与字段；config.json 有新旧两种写法（rope_parameters）

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nanogpt.base.config import ModelConfig
from nanogpt.base.hashed_json import reason_of
from nanogpt.base.language import ConfigError
from nanogpt.weights.build import preset
from nanogpt.weights.tensors import Readers, reader_of

# 会改变结果的设置：没写，或是其中之一
FAMILIES = {
    "llama": {"rope_interleaved": (False,)},
    "qwen2": {"use_sliding_window": (False,), "use_mrope": (False,)},
    "qwen3": {"attention_bias": (False,), "use_sliding_window": (False,)},
}
EVERY = {"hidden_act": ("silu",), "partial_rotary_factor": (1.0,), "quantization_config": ()}
# 上下文动辄几万：照着开，缓存与一行训练数据就先把内存占满；要更长的写 model.block_size
LONGEST = 2048
# 三家都一样的：我们的字段与值
RECIPE = {
    "position": "rope", "norm": "rmsnorm", "norm_gain": True, "activation": "swiglu", "embed_norm": False,
    "logit_softcap": 0.0, "ngrams": [],
}
# 我们的名字 -> 他们的，按行拼接
BLOCK = {
    "ln_1.weight": ("input_layernorm.weight",), "ln_2.weight": ("post_attention_layernorm.weight",),
    "attn.c_attn.weight": tuple(f"self_attn.{part}_proj.weight" for part in "qkv"),
    "attn.c_attn.bias": tuple(f"self_attn.{part}_proj.bias" for part in "qkv"),
    "attn.q_gain": ("self_attn.q_norm.weight",), "attn.k_gain": ("self_attn.k_norm.weight",),
    "attn.c_proj.weight": ("self_attn.o_proj.weight",), "attn.c_proj.bias": ("self_attn.o_proj.bias",),
    "mlp.c_fc.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"), "mlp.c_proj.weight": ("mlp.down_proj.weight",),
    "mlp.c_fc.bias": ("mlp.gate_proj.bias", "mlp.up_proj.bias"), "mlp.c_proj.bias": ("mlp.down_proj.bias",),
}
OWNERS = {theirs: ours for ours, parts in BLOCK.items() for theirs in parts}
OUTSIDE = {
    "model.embed_tokens.weight": "wte.weight", "model.norm.weight": "ln_f.weight", "lm_head.weight": "lm_head.weight",
}
# Qwen3 发布的几种大小：层数、宽度、query 的 head 数、中间层宽度；还没下载，也能先规划
QWEN3 = {
    "0.6B": (28, 1024, 16, 3072), "1.7B": (28, 2048, 16, 6144), "4B": (36, 2560, 32, 9728), "8B": (36, 4096, 32, 12288),
}


def published(name: str) -> dict | None:
    """What config.json of Qwen/Qwen3-0.6B-Base and its like says of the shape; None for any other name."""
    found = re.fullmatch(r"Qwen/Qwen3-([\d.]+B)(-Base)?", name)
    if not found or found[1] not in QWEN3:
        return None
    layers, width, heads, inner = QWEN3[found[1]]
    return {
        "model_type": "qwen3", "vocab_size": 151936, "num_hidden_layers": layers, "hidden_size": width,
        "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": inner,
        "max_position_embeddings": 32768 if found[2] else 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
        "tie_word_embeddings": found[1] != "8B", "attention_bias": False, "hidden_act": "silu",
    }


# ---- 读 ----


def read_family(path: Path, given: dict, name: str) -> ModelConfig:
    """The ModelConfig of a config.json whose model_type is one of FAMILIES; ConfigError names a field we lack."""
    family = given["model_type"]
    for field, allowed in (EVERY | FAMILIES[family]).items():
        if given.get(field) is not None and given[field] not in allowed:
            raise unsupported(path, field, given[field], " | ".join(map(str, (*allowed, "null"))))
    layers = given.get("layer_types") or []
    if not isinstance(layers, list) or any(kind != "full_attention" for kind in layers):
        raise unsupported(path, "layer_types", layers, "full_attention")

    bias = family == "llama" and given.get("attention_bias") is True
    if family == "llama" and bias != (given.get("mlp_bias") is True):
        raise unsupported(path, "attention_bias", given.get("attention_bias"), f"mlp_bias={given.get('mlp_bias')}")

    def size(field: str, default: int | None = None) -> int:
        got = default if given.get(field) is None else given[field]
        if type(got) is not int or not 0 < got < 2**31:
            raise unsupported(path, field, got, "> 0")
        return got

    width, heads = size("hidden_size"), size("num_attention_heads")
    head_dim = size("head_dim", 128 if family == "qwen3" else max(1, width // heads))
    return preset(
        "tiny", "qwen3" if family == "qwen3" else "llama", name=name, n_layer=size("num_hidden_layers"), n_head=heads,
        n_kv_head=size("num_key_value_heads", heads), head_dim=None if head_dim * heads == width else head_dim,
        n_embd=width, intermediate_size=size("intermediate_size"), vocab_size=size("vocab_size"),
        block_size=min(size("max_position_embeddings"), LONGEST),
        norm_eps=number(path, given, "rms_norm_eps", 1e-6),
        bias=bias, qkv_bias=family == "qwen2",
        tie_embeddings=given.get("tie_word_embeddings") is True, **rope(path, given),
    )


def rope(path: Path, given: dict) -> dict:
    """The fields of a ModelConfig about rotary positions, from either way of writing them."""
    new = given.get("rope_parameters") is not None
    field = "rope_parameters" if new else "rope_scaling"
    said = given.get(field) or {}
    if not isinstance(said, dict):
        raise unsupported(path, field, said, "{rope_type: …}")
    base = number(path, said if new else given, "rope_theta", 10000.0)
    kind = said.get("rope_type", said.get("type", "default"))
    if kind == "default":
        return {"rope_base": base}
    if kind not in ("linear", "llama3", "yarn"):
        raise unsupported(path, f"{field}.rope_type", kind, "default | linear | llama3 | yarn")
    found = {"rope_base": base, "rope_scaling": kind, "rope_factor": number(path, said, "factor")}
    if kind == "linear":
        return found
    if kind == "yarn":
        for name, plain in (("mscale", None), ("mscale_all_dim", None), ("truncate", True)):
            if said.get(name, plain) not in (plain, None):
                raise unsupported(path, f"{field}.{name}", said[name], plain)
        usual = 0.1 * math.log(max(found["rope_factor"], 1.0)) + 1
        found |= {
            "rope_low_freq_factor": number(path, said, "beta_slow", 1.0),
            "rope_high_freq_factor": number(path, said, "beta_fast", 32.0),
            "rope_attention_factor": number(path, said, "attention_factor", usual),
        }
    else:
        found |= {
            "rope_low_freq_factor": number(path, said, "low_freq_factor"),
            "rope_high_freq_factor": number(path, said, "high_freq_factor"),
        }
    length = number(path, said, "original_max_position_embeddings")
    if length < 1:
        raise unsupported(path, "original_max_position_embeddings", length, ">= 1")
    return {**found, "rope_original_length": int(length)}


def number(path: Path, given: dict, field: str, default: float | None = None) -> float:
    """A positive number of a config.json."""
    got = default if given.get(field) is None else given[field]
    if type(got) not in (int, float) or not 0 < got < 1e38:
        raise unsupported(path, field, got, "> 0")
    return float(got)


def unsupported(path: Path, field: str, got, want: str) -> ConfigError:
    """The error that a field of a config.json asks for what we do not compute."""
    return ConfigError("pretrained_unsupported", file=path, field=field, got=got, want=want)


def own_tensors(path: Path, config: ModelConfig, theirs: Mapping[str, Tensor]) -> Readers:
    """Tensors by our names; those that are no part of such a model keep their name."""
    found, rows = {}, rows_of(config)
    for name in theirs:
        block = re.fullmatch(r"model\.layers\.(\d{1,6})\.(.+)", str(name))
        if name in OUTSIDE:
            found[OUTSIDE[name]] = reader_of(theirs, name)
        elif block and block[2] in OWNERS:
            ours = OWNERS[block[2]]
            parts = [f"model.layers.{block[1]}.{part}" for part in BLOCK[ours]]
            if missing := [part for part in parts if part not in theirs]:
                raise ConfigError("pretrained_damaged", file=path, reason=f"{missing[0]}: missing")
            if name == parts[0]:
                readers = [reader_of(theirs, part) for part in parts]
                found[f"h.{block[1]}.{ours}"] = partial(joined, path, parts, readers, rows.get(len(parts)))
        elif not str(name).endswith("rotary_emb.inv_freq"):
            # 旧文件里的旋转频率可由配置重算
            found[name] = reader_of(theirs, name)
    return Readers(found)


def joined(path: Path, names: list[str], readers: list[Callable[[], Tensor]], rows: list[int] | None) -> Tensor:
    """The parts, one below the other, each with so many rows; None: there is only one."""
    parts = [reader() for reader in readers]
    # 合起来够数，各自不够的：q 的行就成了 k 的
    for name, part, want in zip(names, parts, rows or []):
        if part.shape[:1] != (want,):
            reason = f"{name}: {tuple(part.shape)}, wanted: ({want}, …)"
            raise ConfigError("pretrained_damaged", file=path, reason=reason)
    try:
        return torch.cat(parts) if rows else parts[0]
    except (RuntimeError, TypeError) as error:
        raise ConfigError("pretrained_damaged", file=path, reason=f"{names[0]}: {reason_of(error)}") from None


def rows_of(config: ModelConfig) -> dict[int, list[int]]:
    """Rows of each part of a matrix of ours that is three of theirs, or two."""
    heads = [count * config.head_size for count in (config.n_head, config.kv_heads, config.kv_heads)]
    return {3: heads, 2: [config.mlp_width] * 2}


# ---- 写 ----


def family_of(config: ModelConfig) -> str | None:
    """The model_type of transformers that computes what a GPT of this config does; None: none of these."""
    return None if stranger(config) else "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"


def stranger(config: ModelConfig) -> str | None:
    """The first field of a config that none of these families has; None: one of them computes the same."""
    others = [field for field, value in RECIPE.items() if getattr(config, field) != value]
    biased = [field for field in ("bias", "qkv_bias") if getattr(config, field)]
    # llama 的 bias 是处处都有，qwen2 的只在 q、k、v，qwen3 一个也没有
    return next(iter(others + (biased if config.qk_norm else biased[1:])), None)


def family_json(config: ModelConfig) -> dict:
    """What config.json says of such a model."""
    family = family_of(config)
    scaling = {} if config.rope_scaling == "none" else {"factor": config.rope_factor}
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    if config.rope_scaling == "llama3":
        scaling |= {"low_freq_factor": low, "high_freq_factor": high}
    if config.rope_scaling == "yarn":
        scaling |= {"beta_slow": low, "beta_fast": high, "attention_factor": config.rope_attention_factor}
    if config.rope_scaling in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = config.rope_original_length
    kind = "default" if config.rope_scaling == "none" else config.rope_scaling
    return {
        "architectures": [f"{family.capitalize()}ForCausalLM"], "model_type": family, "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd, "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads, "head_dim": config.head_size, "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.block_size, "hidden_act": "silu", "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings, "attention_dropout": 0.0,
        # 新旧两种写法都写：transformers 4 与别的引擎只认旧的
        "rope_theta": config.rope_base, "rope_scaling": {"rope_type": kind, **scaling} if scaling else None,
        "rope_parameters": {"rope_type": kind, "rope_theta": config.rope_base, **scaling},
        **({"attention_bias": False} if family == "qwen3" else {}),
        **({"attention_bias": config.bias, "mlp_bias": config.bias} if family == "llama" else {}),
    }


def their_tensors(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names of transformers."""
    rows = rows_of(config)
    found = {theirs: tensors[ours] for theirs, ours in OUTSIDE.items() if ours in tensors}
    for name, tensor in tensors.items():
        if name in OUTSIDE.values():
            continue
        _, layer, ours = name.split(".", 2)
        parts = BLOCK[ours]
        pieces = tensor.split(rows[len(parts)]) if len(parts) > 1 else [tensor]
        found |= {f"model.layers.{layer}.{part}": piece for part, piece in zip(parts, pieces, strict=True)}
    return found
