"""Reads weight files from elsewhere (json, safetensors, torch.save) without running any code in them."""

# 读别人的权重文件：json、safetensors、torch.save 存的，三种都不执行里面的代码
# 来自网上的文件可能坏了、被截断、夹带代码：库各抛各的错，这里都变成一行，说是哪个文件
# 分片的目录（index.json）只许指同一文件夹里的文件名；torch 的文件只以 weights_only 读
# pretrained、nanogpt_checkpoint、hub 都用它；自己写的张量文件在 tensors.py

import json
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from nanogpt.base.hashed_json import reason_of
from nanogpt.base.language import ConfigError, text
from nanogpt.weights.tensors import UNREADABLE, Readers, Stored, first_not_finite, floating, reader_of

# 依次尝试；safetensors 在前：不含代码，读得也快
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# PEFT 的 adapter
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
# 成篇数据的分隔符与标签：adapter 的底座的 config.json 里没有
DOCUMENTS = "documents.json"


def read_json(path: Path) -> dict:
    """Read a json object; ConfigError names the file if it holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(content, dict), "not an object"
        return content
    except (OSError, ValueError, AssertionError, RecursionError) as error:
        raise ConfigError("pretrained_damaged", file=path, reason=reason_of(error)) from None


def weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor that an index names; only plain names, so that it cannot point to another folder."""
    try:
        files = read_json(index)["weight_map"]
        names = set(files.values())
        assert names and all(re.fullmatch(r"[\w-][\w.-]*", name) for name in names), "odd file names"
        return files
    except (KeyError, TypeError, AttributeError, AssertionError) as error:
        raise ConfigError("pretrained_damaged", file=index, reason=reason_of(error)) from None


def shard_names(index: Path) -> list[str]:
    """The files that an index names."""
    return sorted(set(weight_map(index).values()))


def read_weights(folder: Path) -> Readers:
    """All tensors of a folder, from safetensors if there are any; none with NaN or Inf."""
    for file in WEIGHTS:
        if (folder / file).is_file():
            files = weight_map(folder / file) if file.endswith(".index.json") else {}
            readers = {}
            for name in sorted(set(files.values())) or [file]:
                found = stored_in(folder / name) if name.endswith(".safetensors") else read_torch(folder / name)
                # 几个文件里都有的，照目录取；只有一个文件里有的，目录写错了也认得出
                for key in check_finite(folder / name, found):
                    if key not in readers or files.get(key) == name:
                        readers[key] = reader_of(found, key)
            return Readers(readers)
    raise ConfigError("pretrained_damaged", file=folder, reason="no " + " or ".join(WEIGHTS))


def check_finite(path: Path, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """These tensors of a file; ConfigError names the file and the first tensor that holds NaN or Inf."""
    # 趁还叫着文件里的名字：合并、改名之后，就说不出坏在哪个文件的哪里
    try:
        name = first_not_finite(floating(tensors))
    except UNREADABLE as error:
        raise ConfigError("pretrained_damaged", file=path, reason=reason_of(error)) from None
    if name:
        raise ConfigError("pretrained_damaged", file=path, reason=text("nan_weights", tensor=name))
    return tensors


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file."""
    try:
        return load_file(path)
    except UNREADABLE as error:
        raise ConfigError("pretrained_damaged", file=path, reason=reason_of(error)) from None


def stored_in(path: Path) -> Readers:
    """The same, each read when it is asked for."""
    try:
        with safe_open(path, framework="pt") as file:
            return Readers({name: Stored(path, name) for name in file.keys()})
    except UNREADABLE as error:
        raise ConfigError("pretrained_damaged", file=path, reason=reason_of(error)) from None


def load_plain(path: Path) -> dict:
    """What torch.save wrote, tensors and plain values only; torch raises an error of its own for anything else."""
    with warnings.catch_warnings():
        # 不是 torch 写的 pickle，torch 先说上几行；使用者只该看到我们的一行
        warnings.simplefilter("ignore")
        # mmap：旁边的优化器状态不必读进内存；旧格式不支持
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if not isinstance(found, dict):
        raise TypeError(f"{type(found).__name__} instead of dict")
    return found


def read_torch(path: Path) -> dict:
    """What torch.save wrote, if it holds nothing but tensors and plain values."""
    try:
        return load_plain(path)
    except Exception as error:
        # 损坏、截断与夹带代码的文件各抛各的错误，结论相同：不用它
        raise ConfigError("pretrained_damaged", file=path, reason=reason_of(error)) from None
