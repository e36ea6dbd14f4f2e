"""Writes a model as a folder for transformers.

The architectures of GPT-2, Llama and Qwen become the plain models of transformers; any other brings its own modeling
file along, and a user's own model class (named with model=…) also the module that defines it.
"""

# 写成 transformers 载得进的文件夹，是 nanogpt export 的 format=hf；命令在 export.py
# 架构恰是 GPT-2、Llama、Qwen 的写成 transformers 自己的模型；别的带上 modeling_nanogpt.py
# 自己的类带上自己的模块与 modeling_own.py
# 词表也写成 tokenizers 库的格式，id 相同；读别人的文件夹在 pretrained.py
# 写出来的要与我们自己算的一致：改 core 里的公式时，三种写法都要跟着改

import inspect
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import torch

from nanogpt.base.config import ModelConfig, trusted_targets
from nanogpt.base.files import write_json, write_text
from nanogpt.base.language import ConfigError
from nanogpt.data.tokenizer import begin_of, ends_of
from nanogpt.data.tokenizer_files import END_WORDS, drawing_numbers, to_library_json
from nanogpt.weights import families
from nanogpt.weights.foreign_files import read_json
from nanogpt.weights.pretrained import ACTIVATIONS, OWN_FIELDS, OWN_KIND, TRANSPOSED, Pretrained, build_pretrained
from nanogpt.weights.tensors import read_tensors, refuse_not_finite, write_plain

# 自带代码的文件夹里的模块名；transformers 按它动态导入
MODULE, OWN_MODULE = "modeling_nanogpt", "modeling_own"


def write_folder(folder: Path, pretrained: Pretrained) -> None:
    """Write everything that transformers reads."""
    writer_of(pretrained.config)(folder, pretrained)
    write_tokenizer(folder, pretrained)
    if drawing := drawing_numbers(pretrained.tokenizer):
        # 有了这个文件，transformers 就不再看 config.json 里的结尾
        described = read_json(folder / "config.json")
        ends = {name: described[name] for name in ("bos_token_id", "eos_token_id")}
        write_json(folder / "generation_config.json", {**ends, **drawing})


def is_plain(config: ModelConfig) -> bool:
    """Whether transformers has this model itself, so that no code goes along."""
    return writer_of(config) in (write_gpt2, write_family)


def writer_of(config: ModelConfig) -> Callable[[Path, Pretrained], None]:
    """What writes a model of this config; ConfigError if nothing can."""
    if config._target_ not in trusted_targets():
        return write_own
    if is_gpt2(config):
        return write_gpt2
    if families.family_of(config):
        return write_family
    check_custom(config)
    return write_custom


def is_gpt2(config: ModelConfig) -> bool:
    """Whether transformers' own GPT2LMHeadModel computes the same."""
    flags = (config.qk_norm, config.embed_norm, config.logit_softcap, list(config.ngrams))
    recipe = (config.position, config.norm, *flags)
    same = recipe == ("learned", "layernorm", False, False, 0.0, []) and config.activation in ACTIVATIONS.values()
    same = same and next(beyond_custom(config), "intermediate_size") == "intermediate_size"
    # 自己的类算什么，从配置看不出来
    return same and config._target_ in trusted_targets()


def beyond_custom(config: ModelConfig) -> Iterator[str]:
    """The fields in which a config differs from every recipe of before `arch=llama`."""
    usual = {
        "n_kv_head": (None, config.n_head), "head_dim": (None, config.n_embd // config.n_head), "qkv_bias": (False,),
        "norm_gain": (False,), "norm_eps": (1e-6,), "rope_scaling": ("none",),
        "intermediate_size": (None, config.mlp_ratio * config.n_embd),
    }
    if config.activation == "swiglu":
        yield "activation"
    yield from (field for field, values in usual.items() if getattr(config, field) not in values)


def check_custom(config: ModelConfig) -> None:
    """Refuse what neither a plain GPT-2 nor modeling_nanogpt.py computes."""
    if beyond := next(beyond_custom(config), None):
        # 接近 llama 的，说它与 llama 差在哪里
        field = families.stranger(config) if config.activation == "swiglu" else beyond
        raise ConfigError(
            "model.{field}={got} has no form that transformers reads; export a run with arch=modern, gpt2, llama or "
            "qwen3 as they are",
            field=field, got=getattr(config, field),
        )


def write_gpt2(folder: Path, pretrained: Pretrained) -> None:
    """config.json and model.safetensors of a GPT2LMHeadModel."""
    config, end = pretrained.config, pretrained.tokenizer.end_of_text
    activation = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation)
    write_json(folder / "config.json", {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": config.vocab_size,
        "n_positions": config.block_size, "n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd,
        "n_inner": config.mlp_width, "activation_function": activation,
        "layer_norm_epsilon": 1e-5, "tie_word_embeddings": config.tie_embeddings,
        "resid_pdrop": config.dropout, "embd_pdrop": config.dropout, "attn_pdrop": config.dropout,
        "bos_token_id": end, "eos_token_id": end, "dtype": "float32", **about_documents(pretrained),
    })
    tensors = {}
    for name, tensor in pretrained.tensors.items():
        theirs = name if name.startswith("lm_head") else f"transformer.{name}"
        tensors[theirs] = tensor.t() if name.endswith(TRANSPOSED) else tensor
        if not config.bias and name.startswith(("h.", "ln_f")):
            # GPT2LMHeadModel 总有 bias：补零，结果不变
            tensors[theirs.replace(".weight", ".bias")] = torch.zeros(tensor.size(0))
    write_tensors(folder, tensors)


def write_family(folder: Path, pretrained: Pretrained) -> None:
    """config.json and model.safetensors of a LlamaForCausalLM, Qwen2ForCausalLM or Qwen3ForCausalLM."""
    config, end = pretrained.config, pretrained.tokenizer.end_of_text
    others = sorted(ends_of(pretrained.tokenizer) - {end})
    write_json(folder / "config.json", {
        **families.family_json(config), "eos_token_id": [end, *others] if others else end,
        "bos_token_id": next(iter(begin_of(pretrained.tokenizer)), end), "dtype": "float32",
        **about_documents(pretrained),
    })
    write_tensors(folder, families.their_tensors(config, pretrained.tensors))


def write_custom(folder: Path, pretrained: Pretrained) -> None:
    """Write a folder whose modeling file holds the architecture; it does not need this package."""
    config, end = pretrained.config, pretrained.tokenizer.end_of_text
    write_json(folder / "config.json", {
        "architectures": ["NanoGPTForCausalLM"], "model_type": OWN_KIND, "dtype": "float32",
        "bos_token_id": end, "eos_token_id": end,
        "auto_map": {"AutoConfig": f"{MODULE}.NanoGPTConfig", "AutoModelForCausalLM": f"{MODULE}.NanoGPTForCausalLM"},
        **{field: getattr(config, field) for field in OWN_FIELDS}, **about_documents(pretrained),
    })
    shutil.copyfile(Path(__file__).with_name(f"{MODULE}.py"), folder / f"{MODULE}.py")
    write_tensors(folder, pretrained.tensors)


def write_own(folder: Path, pretrained: Pretrained) -> None:
    """Write a folder for a user's own model class: its module, and a modeling file that needs this package."""
    config, end = pretrained.config, pretrained.tokenizer.end_of_text
    module, _, name = config._target_.rpartition(".")
    write_json(folder / "config.json", {
        "architectures": ["OwnForCausalLM"], "model_type": "nanogpt_own", "dtype": "float32",
        "bos_token_id": end, "eos_token_id": end,
        "auto_map": {"AutoConfig": f"{OWN_MODULE}.OwnConfig", "AutoModelForCausalLM": f"{OWN_MODULE}.OwnForCausalLM"},
        "shape": asdict(config), **about_documents(pretrained),
    })
    source = Path(inspect.getsourcefile(import_module(module)))
    if single := "." not in module:
        # 单独一个文件的模块随文件夹走；包里的要另外安装
        shutil.copyfile(source, folder / source.name)
    wrapper = Path(__file__).with_name(f"{OWN_MODULE}.py").read_text(encoding="utf-8")
    usual = "from nanogpt.core.model import GPT\n"
    assert wrapper.count(usual) == 1
    own = f"from {'.' if single else ''}{module} import {name} as GPT\n"
    write_text(folder / f"{OWN_MODULE}.py", wrapper.replace(usual, own))
    tensors = build_pretrained(pretrained).state_dict()
    write_tensors(folder, {f"model.{name}": tensor for name, tensor in tensors.items()})


def own_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that write_own wrote, under the model's own names."""
    return {name.removeprefix("model."): tensor for name, tensor in read_tensors(folder / "model.safetensors").items()}


def about_documents(pretrained: Pretrained) -> dict:
    """What config.json says about a model of documents: its separator and the names of its labels."""
    names = {kind: list(listed) for kind, listed in pretrained.tokenizer.labels.items()}
    separator = pretrained.config.separator
    return {} if separator is None else {"document_separator": separator, "document_labels": names}


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write model.safetensors in float32, never NaN or Inf; transformers asks for the metadata `format`."""
    # 共享内存的张量库不收：各抄一份
    copies = {name: tensor.detach().float().contiguous().clone() for name, tensor in tensors.items()}
    # 读进来时查过；自己的类还会添上别的权重
    refuse_not_finite(copies.items())
    write_plain(folder / "model.safetensors", copies)


def write_tokenizer(folder: Path, pretrained: Pretrained) -> None:
    """Write tokenizer.json of the tokenizers library with the same ids, and what AutoTokenizer needs to know."""
    described = to_library_json(pretrained.tokenizer)
    write_json(folder / "tokenizer.json", described)
    words = {token["content"]: token["id"] for token in described["added_tokens"]}

    def word_of(token: int | None) -> str | None:
        return next((word for word in (*END_WORDS, *words) if words.get(word, -1) == token), None)

    end = word_of(pretrained.tokenizer.end_of_text)
    chat = pretrained.tokenizer.chat_template or {}
    begin = chat.get("bos_token") or word_of(next(iter(begin_of(pretrained.tokenizer)), None)) or end
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": pretrained.config.block_size,
        "clean_up_tokenization_spaces": False,
        # 旧版 transformers 默认还会给 token_type_ids，GPT 不认
        "model_input_names": ["input_ids", "attention_mask"],
        **({"bos_token": begin, "eos_token": end} if end else {}),
        **({"chat_template": chat["template"]} if chat else {}),
    })
