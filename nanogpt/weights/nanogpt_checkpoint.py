"""Reads checkpoints of karpathy/nanoGPT (ckpt.pt, meta.pkl) without running any code in them."""

# nanoGPT 的 ckpt.pt：形状、权重与词表换成我们的，可以接着写作、微调、导出
# 词表在它的 meta.pkl 里，是 pickle：自己解释操作码（plain_pickle），只认字典、列表、字符串与数，别的一概拒绝
# 它的模型就是 GPT-2 的配方，只是线性层不转置、GELU 是精确的；由 pretrained.open_pretrained 调用

import pickletools
import re
from pathlib import Path

import torch

from nanogpt.base.config import ModelConfig
from nanogpt.base.hashed_json import reason_of
from nanogpt.base.language import ConfigError
from nanogpt.data.tokenizer import CharTokenizer, Tokenizer
from nanogpt.data.tokenizer_files import read_tokenizer
from nanogpt.weights.build import preset
from nanogpt.weights.foreign_files import read_torch

# model_args 里决定形状的几项
SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
# 操作码自己就带着值：字符串与数
PLAIN = ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")
# 字符表再大也只有几 MB
META_BYTES = 64 * 2**20


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
    return config, tensors, find_tokenizer(path, saved.get("config"), config.vocab_size)


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
        assert path.stat().st_size <= META_BYTES, "too large"
        table = plain_pickle(path.read_bytes())["itos"]
        characters = [table[i] for i in range(vocab_size)]
        distinct = {character for character in characters if len(character) == 1}
        assert len(table) == len(distinct) == vocab_size, "not one character per id"
        return "".join(characters)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError, IndexError) as error:
        raise ConfigError("pretrained_damaged", file=path, reason=reason_of(error)) from None


def plain_pickle(content: bytes):
    """The value of a pickle made of dicts, lists, strings, numbers and None; ValueError at any other opcode.

    It interprets pickletools' opcodes itself and knows no imports and no calls, so that nothing can be run.
    """
    stack, memo, mark = [], [], object()

    # MARK 压一个记号；SETITEMS、APPENDS 取走它之后的全部
    def since_mark() -> list:
        at = len(stack) - 1 - stack[::-1].index(mark)
        items = stack[at + 1 :]
        del stack[at:]
        return items

    for opcode, argument, _ in pickletools.genops(content):
        name = opcode.name
        if name in ("PROTO", "FRAME"):
            continue
        elif name == "STOP":
            return stack.pop()
        elif name == "MARK":
            stack.append(mark)
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name in ("NONE", "NEWTRUE", "NEWFALSE"):
            stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
        elif name in PLAIN:
            stack.append(argument)
        elif name == "MEMOIZE":
            memo.append(stack[-1])
        elif name in ("BINPUT", "LONG_BINPUT"):
            # 旧协议按编号存，编号总是依次递增
            assert argument == len(memo), "memo out of order"
            memo.append(stack[-1])
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("SETITEM", "SETITEMS"):
            items = since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name in ("APPEND", "APPENDS"):
            stack[-1].extend(since_mark() if name == "APPENDS" else [stack.pop()])
        else:
            raise ValueError(f"opcode {name} is not plain data")
    raise ValueError("no end")
