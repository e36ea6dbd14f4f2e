"""Safetensors files, written one tensor at a time and hashed on the way.

The library's own save_file wants every tensor in RAM at once: beside a card, twice what the optimizer holds. Files are
read by the library. Format: https://github.com/huggingface/safetensors#format
"""

import hashlib
import json
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}
# 读不了时会抛出的：大小说谎的文件头，到 torch 里才出错
UNREADABLE = (SafetensorError, OSError, RuntimeError, TypeError, ValueError, OverflowError)
# 分块写：大张量不必再复制一整份
PIECE = 2**24


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> str:
    """Write a safetensors file and return its hex SHA-256, of what was meant to be written."""
    # 元素大的在前：每个张量都落在自己的对齐位置上
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        size = tensors[name].numel() * tensors[name].element_size()
        header[name] = {"dtype": NAMES[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for piece in (struct.pack("<Q", len(head)), head):
            file.write(piece)
            digest.update(piece)
        for name in names:
            for piece in _pieces(tensors[name]):
                file.write(piece)
                digest.update(piece)
    return digest.hexdigest()


def _pieces(tensor: torch.Tensor) -> Iterable[memoryview]:
    # 逐个取到 CPU：显存里的优化器状态不必同时在内存里也有一份
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    for start in range(0, len(content), PIECE):
        yield memoryview(np.ascontiguousarray(content[start : start + PIECE]))


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file, from its header; UNREADABLE where it is none."""
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, in memory of their own; UNREADABLE where it is none."""
    with safe_open(path, framework="pt") as file:
        # 抄出来：映射着的文件 Windows 上改不了名，别处被改动又会变进来
        return {name: file.get_tensor(name).clone() for name in file.keys()}
