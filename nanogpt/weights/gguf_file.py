"""GGUF files for llama.cpp, Ollama and LM Studio: gpt2, llama, qwen2 and qwen3, in f32, f16, bf16 or q8_0."""

# GGUF 是 llama.cpp 的文件格式：一个文件里有配置、词表与权重；写文件由它自己的 gguf 包来做
# 这里只管对应关系：我们的张量叫什么、配置写在哪些键、写不下的由 export.check_format 先拒绝；词表在 gguf_vocabulary
# read_back 把写出的读回成我们的张量，--check 用它比较
# 内存：一个张量一个张量地换格式、写出去，不会同时有两份权重

import importlib
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanogpt.base.config import ModelConfig
from nanogpt.base.files import write_text
from nanogpt.base.language import ConfigError
from nanogpt.core.rope import frequencies
from nanogpt.data.chat import BEGIN, TEMPLATE
from nanogpt.data.tokenizer import Tokenizer
from nanogpt.data.tokenizer_files import advised, drawing_numbers
from nanogpt.weights import families
from nanogpt.weights.gguf_vocabulary import vocabulary_fields
from nanogpt.weights.pretrained import Pretrained
from nanogpt.weights.tensors import refuse_not_finite

# 第一个是默认的
TYPES = ("f16", "f32", "bf16", "q8_0")
FILE = "model.gguf"
# gpt2：我们的名字 -> GGUF 的
GPT2 = {
    "wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "lm_head": "output", "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
# 别的几家：transformers 的名字 -> GGUF 的
FAMILY = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}
# llama 的 RoPE 在那边转的是相邻两个值，q、k 的行要重排
INTERLEAVED = ("attn_q.weight", "attn_k.weight", "attn_q.bias", "attn_k.bias")
# generation_config.json 的名字 -> Ollama 的
OLLAMA = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "repetition_penalty": "repeat_penalty"}
# ChatML：Ollama 的模板不是 Jinja，要另写
CHATML = (
    "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
)
# data/chat.py 的 TEMPLATE，同样的文字
OURS = "{{ range .Messages }}<|{{ .Role }}|>{{ .Content }}eos_token{{ end }}<|assistant|>"


def library():
    """The package gguf."""
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise ConfigError("missing_package", what="format=gguf", package="gguf") from None


def architecture(config: ModelConfig) -> str:
    """llama.cpp's name of what this config computes."""
    return families.family_of(config) or "gpt2"


def write_gguf(folder: Path, pretrained: Pretrained, kind: str) -> None:
    """Write model.gguf, with the numbers of `kind` (one of TYPES), and a Modelfile for Ollama."""
    gguf, config, arch = library(), pretrained.config, architecture(pretrained.config)
    vocabulary = vocabulary_fields(pretrained.tokenizer, config.vocab_size, config.separator is not None)
    file = gguf.GGUFWriter(folder / FILE, arch)
    file.add_name(config.name)
    file.add_file_type(gguf.LlamaFileType[{"f32": "ALL_F32"}.get(kind, f"MOSTLY_{kind.upper()}")])
    file.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in shape_fields(config, arch).items():
        put(file, f"{arch}.{key}", value)
    for key, value in vocabulary.items():
        put(file, "tokenizer.chat_template" if key == "chat_template" else f"tokenizer.ggml.{key}", value)
    tensors = named(config, arch, pretrained.tensors)
    kinds = {name: number_format(gguf, name, tensor, kind) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        shape, size = tuple(tensor.shape), kinds[name]
        packed = gguf.quant_shape_to_byte_shape(shape, size) if size.name in ("BF16", "Q8_0") else shape
        dtype = np.dtype({"F32": np.float32, "F16": np.float16}.get(size.name, np.uint8))
        file.add_tensor_info(name, packed, dtype, math.prod(packed) * dtype.itemsize, raw_dtype=size)
    try:
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_ti_data_to_file()
        for name, tensor in tensors.items():
            file.write_tensor_data(packed_numbers(gguf, name, tensor, kinds[name]).view(Whole))
    finally:
        file.close()
    write_text(folder / "Modelfile", modelfile(config, pretrained.tokenizer))


def put(file, key: str, value) -> None:
    """Add a field to a GGUF file by the type of its value: whole numbers are unsigned, types of tokens signed."""
    add = {bool: file.add_bool, int: file.add_uint32, float: file.add_float32, str: file.add_string}
    add.get(type(value), file.add_array)(key, value)


def shape_fields(config: ModelConfig, arch: str) -> dict:
    """What a GGUF file says of a model, by the names behind its architecture."""
    found = {
        "block_count": config.n_layer, "context_length": config.block_size, "embedding_length": config.n_embd,
        "feed_forward_length": config.mlp_width, "attention.head_count": config.n_head,
        "vocab_size": config.vocab_size,
    }
    if arch == "gpt2":
        return {**found, "attention.layer_norm_epsilon": 1e-5}
    size = config.head_size
    found |= {
        "attention.head_count_kv": config.kv_heads, "attention.key_length": size, "attention.value_length": size,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps), "rope.dimension_count": size,
        "rope.freq_base": float(config.rope_base),
    }
    if config.rope_scaling == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(config.rope_factor)}
    return found


def named(config: ModelConfig, arch: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names and in the order of rows that llama.cpp wants."""
    names, theirs = (GPT2, tensors) if arch == "gpt2" else (FAMILY, families.their_tensors(config, tensors))
    found = {}
    for full, tensor in theirs.items():
        layer = re.match(r"(?:h|model\.layers)\.(\d+)\.", full)
        part, _, leaf = full.removeprefix(layer[0] if layer else "").rpartition(".")
        new = f"{f'blk.{layer[1]}.' if layer else ''}{names[part]}.{leaf}"
        found[new] = reordered(config, tensor) if arch == "llama" and new.endswith(INTERLEAVED) else tensor
        if arch == "gpt2" and not config.bias and leaf == "weight" and (layer or part == "ln_f"):
            # 那边的 gpt2 总有 bias：补零，结果不变
            found[new.replace(".weight", ".bias")] = torch.zeros(tensor.size(0))
    if config.rope_scaling == "llama3":
        # 那边只要倍数：原来的频率除以缩放后的
        plain = frequencies(replace(config, rope_scaling="none"))
        found["rope_freqs.weight"] = plain / frequencies(config)
    return found


def reordered(config: ModelConfig, tensor: Tensor, back: bool = False) -> Tensor:
    """Rows of q or k with the two values that are turned together beside each other, or back."""
    pairs = (config.head_size // 2, 2) if back else (2, config.head_size // 2)
    return tensor.reshape(-1, *pairs, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def number_format(gguf, name: str, tensor: Tensor, kind: str):
    """The format in which a tensor is stored: vectors and tables of positions always in f32."""
    if tensor.dim() == 1 or name == "position_embd.weight":
        return gguf.GGMLQuantizationType.F32
    if kind == "q8_0" and tensor.size(-1) % 32:
        # 一块 32 个数，凑不齐的行存不成
        return gguf.GGMLQuantizationType.F16
    return gguf.GGMLQuantizationType[kind.upper()]


class Whole(np.ndarray):
    """Numbers of which a file takes all or raises OSError."""

    # gguf 包用 tofile 写；numpy 自己的那个，不到 4 KiB 的张量在满了的盘上丢了也不说
    def tofile(self, file) -> None:
        """Write them through Python's file."""
        file.write(np.ascontiguousarray(self).reshape(-1).view(np.uint8).data)


def packed_numbers(gguf, name: str, tensor: Tensor, kind) -> np.ndarray:
    """A tensor in a number format; ConfigError if it is or becomes NaN or Inf."""
    plain = tensor.detach().float().contiguous().numpy()
    refuse_not_finite([(name, tensor)])
    with np.errstate(over="ignore"):
        packed = gguf.quantize(plain, kind)
        fits = np.isfinite(gguf.dequantize(packed, kind)).all()
    if not fits:
        raise ConfigError(
            "type={kind}: {tensor} has numbers that are too large for it; take type=bf16 or f32",
            kind=kind.name.lower(), tensor=name,
        )
    return packed


def read_back(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """The weights in the model.gguf of a folder, in float32, by our names."""
    gguf, arch = library(), architecture(config)
    names = {theirs: ours for ours, theirs in (GPT2 if arch == "gpt2" else FAMILY).items()}
    found = {}
    for stored in gguf.GGUFReader(folder / FILE).tensors:
        layer = re.match(r"blk\.(\d+)\.", stored.name)
        part, _, leaf = stored.name.removeprefix(layer[0] if layer else "").rpartition(".")
        if part not in names or (arch == "gpt2" and leaf == "bias" and not config.bias):
            # 旋转频率与补上的零，我们没有
            continue
        tensor = torch.from_numpy(np.array(gguf.dequantize(stored.data, stored.tensor_type)))
        if arch == "llama" and stored.name.endswith(INTERLEAVED):
            tensor = reordered(config, tensor, back=True)
        prefix = f"{'h' if arch == 'gpt2' else 'model.layers'}.{layer[1]}." if layer else ""
        found[f"{prefix}{names[part]}.{leaf}"] = tensor
    return found if arch == "gpt2" else dict(families.own_tensors(folder / FILE, config, found))


def modelfile(config: ModelConfig, tokenizer: Tokenizer) -> str:
    """Ollama's description of the model beside it."""
    chat = (tokenizer.chat_template or {}).get("template")
    lines = [f"FROM ./{FILE}", f"PARAMETER num_ctx {config.block_size}"]
    drawing = advised(drawing_numbers(tokenizer))
    lines += [f"PARAMETER {theirs} {drawing[name]}" for name, theirs in OLLAMA.items() if name in drawing]
    if chat is None:
        # 没有对话模板：原样续写
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    elif "<|im_start|>" in chat:
        lines += ['PARAMETER stop "<|im_end|>"', f'TEMPLATE """{CHATML}"""']
    elif chat.removeprefix(BEGIN) == TEMPLATE:
        # 开头的 bos 由 add_bos_token 放
        end = tokenizer.chat_template["eos_token"]
        lines += [f'PARAMETER stop "{end}"', f'TEMPLATE """{OURS.replace("eos_token", end)}"""']
    return "\n".join(lines) + "\n"
