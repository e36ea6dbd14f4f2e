"""Reads checkpoints of karpathy/nanoGPT (ckpt.pt, meta.pkl) without running any code in them."""

# nanoGPT 的 ckpt.pt：形状、权重与词表换成我们的，可以接着写作、微调、导出
# 词表在它的 meta.pkl 里，是 pickle：由 PlainUnpickler 读，其中指名的类与函数一概拒绝
# 它的模型就是 GPT-2 的配方，只是线性层不转置、GELU 是精确的；由 pretrained.open_pretrained 调用

import io
import pickle
import re
from pathlib import Path

import torch

from nanogpt.base.config import ModelConfig
from nanogpt.base.hashed_json import reason_of
from nanogpt.base.language import ConfigError
from nanogpt.data.tokenizer import CharTokenizer, Tokenizer
from nanogpt.data.tokenizer_files import read_tokenizer
from nanogpt.weights.build import preset
from nanogpt.weights.foreign_files import check_finite, read_torch

# model_args 里决定形状的几项
SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")


def read_checkpoint(path: Path) -> tuple[ModelConfig, dict[str, torch.Tensor], Tokenizer]:
    """Config, weights by our names, and tokenizer of a nanoGPT ckpt.pt."""
    saved = read_torch(path)
    try:
        arguments, weights = saved["model_args"], saved["model"]
        sizes = {name: int(arguments[name]) for name in SHAPE}
        assert all(0 < size < 2**31 for size in sizes.values()), f"model_args: {sizes}"
        # 编译过的模型多一层 _orig_mod.
        names = {name: str(name).removeprefix("_orig_mod.").removeprefix("transformer.") for name in weights}
        tensors = {names[name]: tensor for name, tensor in weights.items()}
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
        reason = f"not a nanoGPT checkpoint: {reason_of(error)}"
        raise ConfigError("pretrained_damaged", file=path, reason=reason) from None
    # nanoGPT 用 nn.Linear（不转置）与精确的 GELU；dropout 由这次训练决定
    name, bias = path.resolve().parent.name or "nanogpt", bool(arguments.get("bias", True))
    config = preset("gpt2", name=name, bias=bias, activation="gelu", **sizes)
    # 旧版把因果掩码也存成了 buffer
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".attn.bias")}
    return config, check_finite(path, tensors), find_tokenizer(path, saved.get("config"), config.vocab_size)


def find_tokenizer(path: Path, settings, vocab_size: int) -> Tokenizer:
    """tokenizer.json beside the checkpoint, nanoGPT's meta.pkl beside it or in its data/<dataset>, or GPT-2's."""
    folder = path.resolve().parent
    if not (folder / "tokenizer.json").is_file():
        dataset = str(settings.get("dataset", "")) if isinstance(settings, dict) else ""
        places = [folder / "meta.pkl"]
        # 名字里不许有路径：别人的 checkpoint 不能指到别处去
        if re.fullmatch(r"[\w][\w.\- ]*", dataset):
            places.append(folder.parent / "data" / dataset / "meta.pkl")
        for place in places:
            if place.is_file():
                return CharTokenizer(read_characters(place, vocab_size))
    return read_tokenizer(folder, vocab_size)


def read_characters(path: Path, vocab_size: int) -> str:
    """The characters of a nanoGPT meta.pkl in the order of their ids."""
    try:
        table = PlainUnpickler(io.BytesIO(path.read_bytes())).load()["itos"]
        characters = [table[i] for i in range(vocab_size)]
        distinct = {character for character in characters if len(character) == 1}
        assert len(table) == len(distinct) == vocab_size, "not one character per id"
        return "".join(characters)
    except Exception as error:
        # 坏了的 pickle 各抛各的错误，结论相同：不用它
        raise ConfigError("pretrained_damaged", file=path, reason=reason_of(error)) from None


class PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, strings and numbers; UnpicklingError where a pickle names a class or function."""

    # 能执行的只有指名的类与函数：一个也找不到，也就什么都执行不了（Python 文档 “Restricting Globals”）

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"{module}.{name} is not plain data")
