"""Opens pretrained weights: GPT-2, Llama, Qwen2 and Qwen3 in Hugging Face's format, a nanoGPT ckpt.pt, or a run.

Files are data: shapes are compared with the config before anything is used, and no code is run.
"""

# 已有的权重从哪里来都变成同一样东西：Pretrained（配置、张量、词表），供微调、写作、导出
# open_pretrained 看名字认出是哪一种，本机的文件优先；每一种都要过 checked：名字与形状先核对再用，有限数读文件时已看过
# adapted 与 check_vocabulary 在微调开始时把它与这次的配置、数据对上，合不上的现在就说
# GPT-2 会改变结果的设置只接受我们实现了的（REQUIRED）：悄悄算错比拒绝更糟；Llama、Qwen 的在 families

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nanogpt.base import run_names
from nanogpt.base.config import FinetuneConfig, ModelConfig, check_keys, check_model
from nanogpt.base.hashed_json import reason_of
from nanogpt.base.language import ConfigError, text
from nanogpt.base.saved_config import typed_node
from nanogpt.data import tokenizer as tokenizers
from nanogpt.data.labels import LABEL_KINDS, with_labels
from nanogpt.data.tokenizer import Tokenizer
from nanogpt.data.tokenizer_files import read_tokenizer
from nanogpt.weights import checkpoint, families, hub, nanogpt_checkpoint, peft
from nanogpt.weights.build import build_model, build_undrawn, model_of, preset, weight_shapes
from nanogpt.weights.foreign_files import DOCUMENTS, read_json, read_weights
from nanogpt.weights.tensors import Readers, first_not_finite, floating

# Hugging Face 的名字 -> 我们的；gelu_new 就是 tanh 近似
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu2": "relu2"}
# 会改变结果、而我们没有实现的设置：只接受这些值
REQUIRED = {
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False, "layer_norm_epsilon": 1e-5,
}
# Hugging Face 的 Conv1D 存的是转置
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# 带着 modeling_nanogpt.py 的文件夹（export 写的）的 config.json 里，属于模型的字段
OWN_KIND = "nanogpt"
OWN_FIELDS = (
    "vocab_size", "block_size", "n_layer", "n_head", "n_embd", "mlp_ratio", "bias", "position", "norm", "activation",
    "qk_norm", "embed_norm", "tie_embeddings", "logit_softcap", "rope_base", "ngrams", "ngram_buckets",
)
# 旧文件里的因果掩码不是参数
MASKS = (".attn.bias", ".attn.masked_bias")


@dataclass(frozen=True)
class Pretrained:
    """Weights by the names of nanogpt.core.model.GPT, the config they belong to, and their tokenizer."""

    # 三样总是一起：没有词表的权重既写不出字，也接不上数据

    config: ModelConfig
    tensors: Mapping[str, Tensor]
    tokenizer: Tokenizer


def open_pretrained(
    named: str, key: str = "init_from", which: str | None = None, *, code: str | None = None, lazily: bool = False
) -> Pretrained:
    """The model that a person named: gpt2 …, owner/name on a hub, a folder, a run of ours, or nanoGPT's ckpt.pt.

    `key` is the key that the name was typed for; `which` is the checkpoint of a run (None: its best); `code` is the
    model class that was typed. With `lazily` the tensors of a folder are read whenever they are asked for.
    """
    path = Path(named)
    # 本机的文件优先：断网的人把权重放在 ./gpt2 就能用
    if path.is_file() and path.suffix == ".pt":
        return checked(path, *nanogpt_checkpoint.read_checkpoint(path))
    if peft.is_adapter(path):
        return read_folder(*peft.base_folder(path, key), adapter=path, lazily=lazily)
    if (path / "config.json").is_file():
        return read_folder(path, lazily=lazily)
    if run_names.names_run(named):
        return read_run(named, key, which, code)
    if path.exists():
        raise ConfigError(
            "{key}={got}: there is no model here that can be read: wanted is a folder with config.json and "
            "model.safetensors, a run folder, or a nanoGPT ckpt.pt",
            key=key, got=named,
        )
    if hub.repository_of(named) is None:
        raise ConfigError(
            "{key}={got}: there is no such folder or file here, and it is no name on the hub; give gpt2, gpt2-medium, "
            "gpt2-large, gpt2-xl, owner/name, modelscope:owner/name, a folder with config.json and model.safetensors, "
            "a run folder, or a nanoGPT ckpt.pt",
            key=key, got=named,
        )
    folder = hub.download(named, key)
    if peft.is_adapter(folder):
        return read_folder(*peft.base_folder(folder, key, named), adapter=folder, lazily=lazily)
    return read_folder(folder, path.name, lazily=lazily)


def build_pretrained(
    pretrained: Pretrained, seed: int | None = None, weights: str = "fp32", fill: Callable | None = None
) -> torch.nn.Module:
    """A model that holds these weights; a `seed`, given for training, draws the weights that a subclass adds.

    It also says where torch's global generator goes on. `fill` is that of build.model_of().
    """
    # LoRA 接着抽数：训练时照旧抽完，同一个种子才有同样的结果
    model = build_undrawn(pretrained.config) if seed is None else build_model(pretrained.config, seed, weights)
    if fill and pretrained.config._target_ == ModelConfig._target_ and isinstance(pretrained.tensors, Readers):
        fill(model, pretrained.tensors.pieces())
    else:
        model.load_state_dict(pretrained.tensors, strict=False)
    return model


def read_run(named: str, key: str, which: str | None, code: str | None) -> Pretrained:
    """Weights of a run of ours: its checkpoint `which`, the last if none was evaluated, or the one that was named."""
    run_dir, which = run_names.locate(named, key=key), run_names.checkpoint_in(named, which, "best")

    def taken(source: checkpoint.Checkpoint) -> Pretrained:
        model = model_of(source, code)
        tensors = checkpoint.model_tensors(model)
        if name := first_not_finite(floating(tensors)):
            # 早先的版本会存下坏掉的权重
            raise source.damaged(text("nan_weights", tensor=name))
        return Pretrained(model.config, tensors, tokenizers.load(source.folder / "tokenizer.json"))

    return checkpoint.use(run_dir, which, taken, key=key)


# ---- 微调：与这次训练的配置对上 ----


def adapted(pretrained: Pretrained, wanted: ModelConfig, typed: set[str], named: str) -> Pretrained:
    """The same weights with the dropout of `wanted` and, if typed, its context.

    ConfigError if `typed` fields contradict the weights. Learned positions can only be cut short; RoPE has none.
    """
    have = pretrained.config
    for field in sorted(typed - {"dropout", "block_size", "name"}):
        if getattr(wanted, field) != getattr(have, field):
            raise ConfigError(
                "init_from_shape", key=f"model.{field}", got=getattr(wanted, field), named=named,
                want=getattr(have, field),
            )
    block = wanted.block_size if "block_size" in typed else have.block_size
    # RoPE 没有位置参数，可以加长；学出来的位置 embedding 只能截短
    if block > have.block_size and have.position == "learned":
        raise ConfigError(
            "init_from_shape", key="model.block_size", got=block, named=named, want=f"<= {have.block_size}",
        )
    tensors = pretrained.tensors
    if "wpe.weight" in tensors:
        tensors = {**tensors, "wpe.weight": tensors["wpe.weight"][:block]}
    return replace(pretrained, config=replace(have, dropout=wanted.dropout or 0.0, block_size=block), tensors=tensors)


def check_vocabulary(pretrained: Pretrained, other: Tokenizer, named: str) -> None:
    """Refuse data whose ids have another meaning than the model's."""
    own = pretrained.tokenizer
    # 名字不影响 id；标签是别的数据的也没关系，模板只决定怎样问，抽字的设置只在写作时用
    ignored = {"name": "", "labels": {}, "other_ends": [], "chat_template": None, "sampling": {}}
    if own.to_dict() | ignored != other.to_dict() | ignored:
        raise ConfigError(
            "init_from={named}: its vocabulary ({want} tokens, {want_kind}) is not that of the data ({got} tokens, "
            "{got_kind}); use dataset=text_file, labelled, plays_char, chinese_poetry or chinese_reviews with "
            "dataset.tokenizer=auto, which takes the model's own",
            named=named, want=own.vocab_size, want_kind=own.kind, got=other.vocab_size, got_kind=other.kind,
        )


# ---- Hugging Face 格式的文件夹 ----


def read_folder(
    folder: Path, name: str | None = None, adapter: Path | None = None, *, lazily: bool = False
) -> Pretrained:
    """Config, weights and tokenizer of a folder with config.json, the `adapter` of another folder merged in."""
    config = read_config(folder / "config.json", name or folder.resolve().name)
    found, kind = read_weights(folder), read_json(folder / "config.json").get("model_type")
    turned = () if config.norm_gain or kind == OWN_KIND else TRANSPOSED
    if adapter:
        found = peft.merged_into(adapter, found, turned)
    if config.norm_gain:
        tensors = families.own_tensors(folder, config, found)
    else:
        names = {name: str(name).removeprefix("transformer.") for name in found}
        tensors = Readers({
            own: partial(_turned, found.readers[name]) if own.endswith(turned) else found.readers[name]
            for name, own in names.items() if not own.endswith(MASKS)
        })
    tensors = tensors if lazily else dict(tensors)
    about = adapter / DOCUMENTS if adapter and (adapter / DOCUMENTS).is_file() else folder / "config.json"
    config, tokenizer = with_documents(about, config, read_tokenizer(folder, config.vocab_size))
    return checked(folder, config, tensors, tokenizer)


def _turned(reader: Callable[[], Tensor]) -> Tensor:
    tensor = reader()
    return tensor.t() if tensor.dim() == 2 else tensor


def read_config(path: Path, name: str) -> ModelConfig:
    """The ModelConfig of a config.json; ConfigError names a field that our model cannot follow."""
    given = read_json(path)
    kind = given.get("model_type", "gpt2")
    # 元组：别人写的也可能是列表，字典不认
    if kind in tuple(families.FAMILIES):
        return families.read_family(path, given, name)
    if kind == OWN_KIND:
        return read_own(path, given, name)
    if kind != "gpt2":
        raise families.unsupported(path, "model_type", kind, " | ".join(("gpt2", *families.FAMILIES, OWN_KIND)))
    for field, want in REQUIRED.items():
        if field in given and given[field] != want:
            raise ConfigError("pretrained_unsupported", file=path, field=field, got=given[field], want=want)
    activation = given.get("activation_function", "gelu_new")
    if activation not in tuple(ACTIVATIONS):
        raise ConfigError(
            "pretrained_unsupported", file=path, field="activation_function", got=activation,
            want=" | ".join(ACTIVATIONS),
        )
    # 旧的配置写 n_ctx 或省略默认值；GPT2Config 的默认值就是 124M 的形状
    default = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257}
    sizes = {field: given.get(field, value) for field, value in default.items()}
    for field, got in sizes.items():
        if type(got) is not int or not 0 < got < 2**31:
            raise ConfigError("pretrained_unsupported", file=path, field=field, got=got, want="> 0")
    width, inner = sizes["n_embd"], given.get("n_inner") or 4 * sizes["n_embd"]
    if type(inner) is not int or inner % width or inner <= 0:
        raise ConfigError("pretrained_unsupported", file=path, field="n_inner", got=inner, want=f"n x {width}")
    return preset(
        "gpt2", name=name, n_layer=sizes["n_layer"], n_head=sizes["n_head"], n_embd=width,
        block_size=sizes["n_positions"], vocab_size=sizes["vocab_size"], mlp_ratio=inner // width,
        activation=ACTIVATIONS[activation],
        tie_embeddings=bool(given.get("tie_word_embeddings", True)),
    )


def read_own(path: Path, given: dict, name: str) -> ModelConfig:
    """The ModelConfig of a folder that brings modeling_nanogpt.py along, which is not run."""
    try:
        own = {field: given[field] for field in OWN_FIELDS}
        config = typed_node(ModelConfig, {"name": name, "dropout": 0.0, **own})
        check_keys(config)
        check_model(config)
    except ConfigError:
        raise
    except Exception as error:
        # 文件来自陌生人：缺字段、类型不对，OmegaConf 各有各的异常
        raise ConfigError("pretrained_damaged", file=path, reason=reason_of(error)) from None
    return config


def with_documents(path: Path, config: ModelConfig, tokenizer: Tokenizer) -> tuple[ModelConfig, Tokenizer]:
    """The config with the separator, and the tokenizer with the labels, of a model of documents; others are unchanged.

    config.json names them; else the names of the special tokens tell.
    """
    given = read_json(path)
    separator, names = given.get("document_separator"), given.get("document_labels", {})
    if separator is None:
        return (replace(config, separator=tokenizer.end_of_text) if tokenizer.labels else config), tokenizer
    try:
        assert type(separator) is int and 0 <= separator < config.vocab_size and set(names) <= set(LABEL_KINDS)
        assert all(isinstance(name, str) for listed in names.values() for name in listed)
        # 当普通文字写的标签（微调别人的词表）只有名字能带过来
        return replace(config, separator=separator), with_labels(tokenizer, names, grow=False)
    except ConfigError:
        raise
    except Exception as error:
        # 名字来自陌生人，tokenizers 库又只抛裸 Exception
        reason = f"document_separator, document_labels: {type(error).__name__}"
        raise ConfigError("pretrained_damaged", file=path, reason=reason) from None


# ---- 核对 ----


def checked(path: Path, config: ModelConfig, tensors: Mapping[str, Tensor], tokenizer: Tokenizer) -> Pretrained:
    """A Pretrained of these parts, after comparing every name and shape with the config."""
    # 先看层数，再造模型：配置里写着十亿层的文件不会把内存吃光
    layers = {int(match[1]) for name in tensors if (match := re.match(r"h\.(\d{1,6})\.", str(name)))}
    if len(layers) != config.n_layer or max(layers) != config.n_layer - 1:
        raise ConfigError("pretrained_damaged", file=path, reason=f"{len(layers)} blocks, config says {config.n_layer}")
    expected = weight_shapes(config, FinetuneConfig())
    if config.tie_embeddings:
        expected.pop("lm_head.weight")
        others = [name for name in tensors if name != "lm_head.weight"]
        lazy = isinstance(tensors, Readers)
        tensors = Readers({n: tensors.readers[n] for n in others}) if lazy else {n: tensors[n] for n in others}
    for name in sorted(set(expected) | set(map(str, tensors))):
        got, want = tensors.get(name), expected.get(name)
        if isinstance(got, Tensor):
            if tuple(got.shape) == want and got.is_floating_point():
                continue
            found = f"{got.dtype} {tuple(got.shape)}"
        else:
            found = "missing" if got is None else type(got).__name__
        reason = f"{name}: {found}, wanted: {'nothing' if want is None else want}"
        raise ConfigError("pretrained_damaged", file=path, reason=reason)
    return Pretrained(config, tensors, tokenizer)
