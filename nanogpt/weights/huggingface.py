"""Exports a run as a Hugging Face folder: `python -m nanogpt.huggingface export OUT_DIR TARGET`.

The architectures of GPT-2, Llama and Qwen become the plain models of transformers; any other brings its own modeling
file along, and a user's own model class (named with model=…) also the module that defines it.
"""

# 导出：把训练好的模型写成 transformers 载得进的文件夹（python -m nanogpt.huggingface export）
# 架构恰是 GPT-2、Llama、Qwen 的写成 transformers 自己的模型；别的带上 modeling_nanogpt.py
# 自己的类带上自己的模块与 modeling_own.py
# 词表也写成 tokenizers 库的格式，id 相同；读别人的文件夹在 pretrained.py
# 写出来的要与我们自己算的一致：改 core 里的公式时，三种写法都要跟着改

import argparse
import contextlib
import inspect
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import torch
from safetensors.torch import save_file

from nanogpt.base import run_names
from nanogpt.base.config import ModelConfig, trusted_targets
from nanogpt.base.errors import Arguments, forgive_output, one_line_each
from nanogpt.base.files import folder_aside, write_json, write_text
from nanogpt.base.groups import sample_config
from nanogpt.base.language import ConfigError, say, set_language, text
from nanogpt.base.value_checks import check_path
from nanogpt.data.tokenizer import begin_of, ends_of
from nanogpt.data.tokenizer_files import END_WORDS, to_library_json
from nanogpt.weights import checkpoint, families, peft
from nanogpt.weights.pretrained import ACTIVATIONS, TRANSPOSED, Pretrained, build_pretrained, open_pretrained
from nanogpt.weights.tensors import first_not_finite

__all__ = ["Pretrained", "build_pretrained", "export", "open_pretrained"]

# 自己的模型类要指名才执行
NAMING = ("model=", "model._target_=")
EPILOG = "A model class of your own is named behind these with model=NAME, as for training; its code is run only then."
# 自带代码的文件夹里的模块名；transformers 按它动态导入
MODULE, OWN_MODULE = "modeling_nanogpt", "modeling_own"


def export(named: str, target: Path, which: str | None = None, *, code: str | None = None) -> Pretrained:
    """Write the model that `named` means, usually a run folder, as a folder for transformers; return what was written.

    `code` is the model class that was typed; no other class that a checkpoint names is run.
    """
    refuse_used(target)
    pretrained = open_pretrained(named, key="OUT_DIR", which=which, code=code)
    write = writer_of(pretrained.config)
    with new_folder(target) as aside:
        write(aside, pretrained)
        write_tokenizer(aside, pretrained)
    return pretrained


def export_adapter(named: str, target: Path, which: str | None = None) -> str:
    """Write the adapter of a run trained with finetune=lora as a folder for PEFT; return the name of its base."""
    refuse_used(target)
    run_dir, which = run_names.locate(named, key="OUT_DIR"), run_names.checkpoint_in(named, which, "best")

    def written(source: checkpoint.Checkpoint) -> str:
        with new_folder(target) as aside:
            return peft.write_adapter(source, aside)

    return checkpoint.use(run_dir, which, written, key="OUT_DIR")


def refuse_used(target: Path) -> None:
    """Refuse a target that holds something, before anything is read."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError("TARGET={target} already holds something; choose an empty or new folder", target=target)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside the target that becomes it; ConfigError where it cannot be written."""
    try:
        if target.is_dir():
            target.rmdir()
        with folder_aside(target) as aside:
            yield aside
    except OSError as error:
        raise ConfigError(
            "TARGET={target} cannot be written ({reason}); choose another folder",
            target=target, reason=error.strerror or error,
        ) from None


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
    fields = (
        "vocab_size", "block_size", "n_layer", "n_head", "n_embd", "mlp_ratio", "bias", "position", "norm",
        "activation", "qk_norm", "embed_norm", "tie_embeddings", "logit_softcap", "rope_base", "ngrams",
        "ngram_buckets",
    )
    write_json(folder / "config.json", {
        "architectures": ["NanoGPTForCausalLM"], "model_type": "nanogpt", "dtype": "float32",
        "bos_token_id": end, "eos_token_id": end,
        "auto_map": {"AutoConfig": f"{MODULE}.NanoGPTConfig", "AutoModelForCausalLM": f"{MODULE}.NanoGPTForCausalLM"},
        **{field: getattr(config, field) for field in fields}, **about_documents(pretrained),
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


def about_documents(pretrained: Pretrained) -> dict:
    """What config.json says about a model of documents: its separator and the names of its labels."""
    names = {kind: list(listed) for kind, listed in pretrained.tokenizer.labels.items()}
    separator = pretrained.config.separator
    return {} if separator is None else {"document_separator": separator, "document_labels": names}


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write model.safetensors in float32, never NaN or Inf; transformers asks for the metadata `format`."""
    # 共享内存的张量 save_file 不收：各抄一份
    copies = {name: tensor.detach().float().contiguous().clone() for name, tensor in tensors.items()}
    if name := first_not_finite(copies.items()):
        # 读进来时查过；自己的类还会添上别的权重
        raise ConfigError(
            "{reason}: such a model is not exported; choose another checkpoint with --checkpoint",
            reason=text("nan_weights", tensor=name),
        )
    save_file(copies, folder / "model.safetensors", metadata={"format": "pt"})


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


def main(arguments: list[str] | None = None) -> None:
    """The command line: export OUT_DIR TARGET [model=…] [--checkpoint best|last|iter_…]; exit code 2 on a mistake."""
    forgive_output()
    set_language("auto")
    with one_line_each():
        arguments = sys.argv[1:] if arguments is None else arguments
        named = [word for word in arguments if word.startswith(NAMING)]
        typed = parser().parse_args([word for word in arguments if word not in named])
        set_language(typed.lang)
        paths = {"OUT_DIR": typed.out_dir, "TARGET": str(typed.target), "--checkpoint": typed.checkpoint or "best"}
        for key, value in paths.items():
            check_path(key, value)
        if typed.adapter:
            base = export_adapter(typed.out_dir, typed.target, typed.checkpoint)
            say("written: {target}, an adapter in PEFT's format beside {base}", target=typed.target, base=base)
            return
        code = sample_config(named).model["_target_"] if named else None
        pretrained = export(typed.out_dir, typed.target, typed.checkpoint, code=code)
    plain = writer_of(pretrained.config) in (write_gpt2, write_family)
    trust = "" if plain else ", trust_remote_code=True"
    say(
        "written: {target}; load it with {command}",
        target=typed.target, command=f"transformers.AutoModelForCausalLM.from_pretrained({str(typed.target)!r}{trust})",
    )


def parser() -> argparse.ArgumentParser:
    """The parser of `export` and its options."""
    top = Arguments(prog="python -m nanogpt.huggingface", description=__doc__.splitlines()[0])
    commands = top.add_subparsers(dest="command", required=True)
    command = commands.add_parser("export", help="write a run as a folder that transformers loads", epilog=EPILOG)
    command.add_argument("out_dir", metavar="OUT_DIR", help="run folder, latest, or anything that init_from takes")
    command.add_argument("target", metavar="TARGET", type=Path, help="new or empty folder")
    command.add_argument("--checkpoint", help="best (default), last or iter_…")
    command.add_argument("--adapter", action="store_true", help="of a run with finetune=lora, its adapter alone (PEFT)")
    command.add_argument("--config-dir", help="folder with yamls of your own")
    command.add_argument("--lang", default="auto", choices=("auto", "zh", "en"))
    return top


