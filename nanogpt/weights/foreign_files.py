"""Readers of weight files from elsewhere: json, safetensors, torch.save; none of them runs code."""

import json
import re
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from nanogpt.base.hashed_json import reason_of
from nanogpt.base.language import ConfigError
from nanogpt.weights.tensors import UNREADABLE

# 依次尝试；safetensors 在前：不含代码，读得也快
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


# 配置与分片目录不过几 MB：大得多的不读进内存
MOST_JSON = 64 * 2**20


def read_json(path: Path) -> dict:
    """A json object; ConfigError names the file if it is none."""
    try:
        assert path.stat().st_size <= MOST_JSON, f"larger than {MOST_JSON // 2**20} MiB"
        content = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(content, dict), "not an object"
        return content
    except (OSError, ValueError, AssertionError, RecursionError) as error:
        raise ConfigError("pretrained_damaged", file=path, reason=reason_of(error)) from None


def shard_names(index: Path) -> list[str]:
    """The files that an index names; plain names only, so that an index cannot point elsewhere."""
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        assert names and all(re.fullmatch(r"[\w-][\w.-]*", name) for name in names), "odd file names"
        return names
    except (KeyError, TypeError, AttributeError, AssertionError) as error:
        raise ConfigError("pretrained_damaged", file=index, reason=reason_of(error)) from None


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, from safetensors where there are any."""
    for file in WEIGHTS:
        if (folder / file).is_file():
            files = shard_names(folder / file) if file.endswith(".index.json") else [file]
            tensors: dict[str, Tensor] = {}
            for name in files:
                tensors |= read_safetensors(folder / name) if name.endswith(".safetensors") else read_torch(folder / name)
            return tensors
    raise ConfigError("pretrained_damaged", file=folder, reason="no " + " or ".join(WEIGHTS))


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file."""
    try:
        return load_file(path)
    except UNREADABLE as error:
        raise ConfigError("pretrained_damaged", file=path, reason=reason_of(error)) from None


def load_plain(path: Path) -> dict:
    """What torch.save wrote, tensors and plain values only; whatever else raises something of torch's."""
    with warnings.catch_warnings():
        # 不是 torch 写的 pickle，torch 先说上几行；使用者只该看到我们的一行
        warnings.simplefilter("ignore")
        # mmap：旁边的优化器状态不必读进内存；旧格式不支持
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def read_torch(path: Path) -> dict:
    """What torch.save wrote, if it holds nothing but tensors and plain values."""
    try:
        return load_plain(path)
    except Exception as error:
        # 损坏、截断与夹带代码的文件各抛各的错误，结论相同：不用它
        raise ConfigError("pretrained_damaged", file=path, reason=reason_of(error)) from None
