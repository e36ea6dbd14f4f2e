"""Writes and reads tensors: safetensors files, nested training states as json, and the check for NaN and Inf.

The library's save_file wants every tensor in RAM at once, also those that lie on a card. So files are written one
tensor at a time and hashed on the way. Format: https://github.com/huggingface/safetensors#format

Of a large matrix whose rows are mostly zero, as a look-up table and its optimizer states are at first, only the other
rows are stored, under its name, and their numbers as `<name>.filled`; the metadata has {"rows": {name: all its rows}}.

In the json of a state every object has one key that says what it stands for: {"dict": [[key, value], …]},
{"tuple": […]}, {"tensor": name} or {"float": "nan" | "inf" | "-inf"}; lists, strings, numbers, true, false and null
stand for themselves.
"""

# 我们自己的张量文件：权重与优化器状态逐个张量写，边写边算摘要；读由 safetensors 库来
# 优化器状态是嵌套的字典与列表：拆成 json 与一张张量表，不用 pickle，文件里就没有代码
# checkpoint 写它、读它；first_not_finite 也给训练的 health、读别人的文件与导出用
# 格式很简单，所以自己写：库的 save_file 要全部张量同时在内存里
# n-gram 的表从零开始，没遇到过的行，连同它的两份动量，一直是零：不写它们，短训练的 checkpoint 小到几分之一

import errno
import hashlib
import json
import math
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nanogpt.base.language import ConfigError, text
from nanogpt.core.sharding import Sharded

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}
# 读不了时会抛出的：大小说谎的文件头，到 torch 里才出错
UNREADABLE = (SafetensorError, OSError, RuntimeError, TypeError, ValueError, OverflowError)
# 分块写：大张量不必再复制一整份
PIECE = 2**24
# 存着哪些行的那个张量，名字是原来的加上它
FILLED = ".filled"
# 小于它的张量不值得挑行
LARGE = 2**20


def write_tensors(path: Path, tensors: dict[str, torch.Tensor | Sharded]) -> str:
    """Write a safetensors file and return the hex SHA-256 of what was to be written, not of what the disk holds."""
    filled = {name: rows for name, tensor in tensors.items() if (rows := _filled_rows(tensor)) is not None}
    stored = tensors | {name + FILLED: rows for name, rows in filled.items()}
    # 元素大的在前：每个张量都落在自己的对齐位置上
    names = sorted(stored, key=lambda name: (-stored[name].element_size(), name))
    metadata = {"format": "pt"}
    if filled:
        metadata["rows"] = json.dumps({name: len(tensors[name]) for name in filled}, ensure_ascii=False)
    header, at = {"__metadata__": metadata}, 0
    for name in names:
        tensor = stored[name]
        shape = [len(filled[name]), tensor.shape[1]] if name in filled else list(tensor.shape)
        size = math.prod(shape) * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": shape, "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    # 文件头补空格到 8 的倍数，后面的张量才对齐
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for piece in (struct.pack("<Q", len(head)), head):
            file.write(piece)
            digest.update(piece)
        for name in names:
            for piece in _pieces(stored[name], filled.get(name)):
                file.write(piece)
                digest.update(piece)
    return digest.hexdigest()


def write_plain(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file for others, every row of it; OSError where the disk does not take it."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        # 磁盘满了，库也抛自己的错误，系统的话在里面
        raise OSError(errno.EIO, str(error).rpartition("error: ")[2].partition(" (os error")[0]) from None


def _filled_rows(tensor: torch.Tensor | Sharded) -> torch.Tensor | None:
    """Numbers of the rows of a matrix that are not zero, where leaving out the others saves a tenth or more."""
    if tensor.dim() != 2 or tensor.numel() * tensor.element_size() < LARGE:
        return None
    if isinstance(tensor, Sharded):
        filled = tensor.fetch(filled=True)
    elif tensor.is_contiguous():
        # 看字节而不看值：-0.0 也要原样回来
        filled = tensor.detach().view(torch.uint8).any(dim=1)
    else:
        return None
    rows = filled.nonzero().reshape(-1).to(torch.int32).cpu()
    return rows if 10 * len(rows) <= 9 * len(tensor) else None


def _pieces(tensor: torch.Tensor | Sharded, rows: torch.Tensor | None = None) -> Iterable[memoryview]:
    """The bytes of a tensor, or of these rows of it."""
    if isinstance(tensor, Sharded):
        # 一次只凑齐一个张量
        tensor = tensor.fetch()
    if rows is not None:
        # 一次挑出几行：不为它们另占一整份内存
        for some in rows.split(max(1, PIECE // (tensor.shape[1] * tensor.element_size()))):
            yield from _pieces(tensor.detach()[some.to(tensor.device)])
        return
    # 逐个取到 CPU：显存里的优化器状态不必同时在内存里也有一份
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    for start in range(0, len(content), PIECE):
        yield memoryview(np.ascontiguousarray(content[start : start + PIECE]))


def _whole_rows(file: safe_open) -> dict[str, int]:
    """How many rows the tensors have of which only some are stored; ValueError if that is not said properly."""
    found = json.loads((file.metadata() or {}).get("rows", "{}"))
    names = set(file.keys())
    if not isinstance(found, dict) or not {*found, *(name + FILLED for name in found)} <= names:
        raise ValueError("rows of tensors that are not there")
    if not all(type(count) is int and 0 < count < 2**31 for count in found.values()):
        raise ValueError("rows without a number")
    return found


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file, from its header; raises one of UNREADABLE if it cannot be read."""
    with safe_open(path, framework="pt") as file:
        rows = _whole_rows(file)
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    for name, count in rows.items():
        del shapes[name + FILLED]
        shapes[name] = (count, *shapes[name][1:])
    return shapes


def read_tensors(path: Path, *, mapped: bool = False) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, in memory of their own; raises one of UNREADABLE if it cannot be read.

    With `mapped` they lie in the file and may only be read, for those who want a part of each.
    """
    with safe_open(path, framework="pt") as file:
        rows = _whole_rows(file)
        # 抄出来：映射着的文件 Windows 上改不了名，别处被改动又会变进来
        read = {name: file.get_tensor(name) if mapped else file.get_tensor(name).clone() for name in file.keys()}
    for name, count in rows.items():
        read[name] = _with_zeros(read[name], read.pop(name + FILLED), count)
    return read


class Readers(Mapping[str, torch.Tensor]):
    """Tensors that are read anew whenever they are asked for, so that only those in use lie in memory."""

    # 看起来是名字 -> 张量的字典；合并、拼接、转置也只在取的时候做

    def __init__(self, readers: dict[str, Callable[[], torch.Tensor]]):
        self.readers = readers

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.readers)

    def __len__(self) -> int:
        return len(self.readers)

    def pieces(self) -> Iterator[tuple[str, int, torch.Tensor]]:
        """(name, first row, rows) of all tensors, a MiB or so at a time where they lie in a file as they are."""
        for name, reader in self.readers.items():
            if isinstance(reader, Stored):
                yield from ((name, start, rows) for start, rows in reader.pieces())
            else:
                yield name, 0, reader()


@dataclass(frozen=True)
class Stored:
    """A tensor of a safetensors file."""

    # 每次重新打开：映射着的文件，读过的页都算在这个进程的内存里

    path: Path
    name: str

    def __call__(self) -> torch.Tensor:
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(self.name)

    def pieces(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows), a multiple of 64 rows at a time."""
        with safe_open(self.path, framework="pt") as file:
            shape = file.get_slice(self.name).get_shape()
        if not shape:
            yield 0, self()
            return
        step = max(1, PIECE // 1024 // max(1, math.prod(shape[1:]))) * 64
        for start in range(0, shape[0], step):
            with safe_open(self.path, framework="pt") as file:
                rows = file.get_slice(self.name)[start : start + step].clone()
            yield start, rows


def reader_of(tensors: Mapping[str, torch.Tensor], name: str) -> Callable[[], torch.Tensor]:
    """What reads one of these tensors."""
    return tensors.readers[name] if isinstance(tensors, Readers) else partial(tensors.__getitem__, name)


def readers_of(path: Path) -> Readers:
    """All tensors of a safetensors file of ours; raises one of UNREADABLE, now or when read."""
    with safe_open(path, framework="pt") as file:
        rows, names = _whole_rows(file), set(file.keys())
    readers = {name: Stored(path, name) for name in sorted(names) if name.removesuffix(FILLED) not in rows}
    for name, count in rows.items():
        readers[name] = partial(_read_with_zeros, Stored(path, name), Stored(path, name + FILLED), count)
    return Readers(readers)


def _read_with_zeros(stored: Stored, rows: Stored, count: int) -> torch.Tensor:
    return _with_zeros(stored(), rows(), count)


def _with_zeros(stored: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """The matrix of `count` rows of which only `rows` were stored."""
    numbers = rows.long()
    if numbers.shape != stored.shape[:1] or (len(numbers) and not 0 <= numbers.min() <= numbers.max() < count):
        raise ValueError("rows that there cannot be")
    whole = stored.new_zeros((count, *stored.shape[1:]))
    whole[numbers] = stored
    return whole


# ---- 嵌套的状态 ----


def flatten(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """What json can hold of `value`; its tensors are added to `tensors`. TypeError at anything else."""
    if isinstance(value, torch.Tensor | Sharded):
        name = f"{len(tensors):06d}"
        tensors[name] = value.detach()
        return {"tensor": name}
    if isinstance(value, dict):
        # 键可以是整数：torch.optim 按编号存
        return {"dict": [[flatten(k, tensors), flatten(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [flatten(v, tensors) for v in value]}
    if isinstance(value, list):
        return [flatten(v, tensors) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be saved")


def restore(node: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """What flatten() was given; ValueError, KeyError or TypeError if `node` is not something that it writes."""
    if isinstance(node, list):
        return [restore(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind == "dict":
        return {restore(key, tensors): restore(value, tensors) for key, value in content}
    if kind == "tuple":
        return tuple(restore(item, tensors) for item in content)
    if kind == "tensor":
        return tensors[content]
    if kind == "float" and content in ("nan", "inf", "-inf"):
        return float(content)
    raise ValueError(f"unknown kind {kind!r}")


# ---- 是不是有限数 ----


def floating(state, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """(dotted name, tensor) of every floating tensor with elements in nested dicts and lists."""
    items = state.items() if isinstance(state, Mapping) else enumerate(state) if isinstance(state, list | tuple) else ()
    for key, value in items:
        value = value.local if isinstance(value, Sharded) else value
        if isinstance(value, torch.Tensor):
            if value.is_floating_point() and value.numel():
                yield f"{prefix}{key}", value.detach()
        else:
            yield from floating(value, f"{prefix}{key}.")


def first_not_finite(named: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """Name of the first tensor that holds NaN, Inf or more than float32 can hold, or None if all are finite.

    Takes hardly any memory and waits for each device once.
    """
    by_device = defaultdict(list)
    for name, tensor in named:
        # 八位浮点没有 aminmax；这样的权重只从别人的文件来
        low, high = torch.aminmax(tensor.float() if tensor.element_size() == 1 else tensor)
        # float64 里太大的数，换成我们的 float32 就是 Inf
        low, high = low.float(), high.float()
        # NaN 会传过 aminmax；Inf 减自己得 NaN，有限数得 0
        by_device[tensor.device].append((name, (low - low) + (high - high)))
    for pairs in by_device.values():
        names, values = zip(*pairs, strict=True)
        # 一次取回：逐个张量去问，GPU 要停几百次
        for name, finite in zip(names, torch.stack(values).isfinite().tolist(), strict=True):
            if not finite:
                return name
    return None


def refuse_not_finite(named: Iterable[tuple[str, torch.Tensor]]) -> None:
    """ConfigError, naming the tensor, if one that is about to be exported is not finite."""
    if name := first_not_finite(named):
        raise ConfigError(
            "{reason}: such a model is not exported; choose another checkpoint with --checkpoint",
            reason=text("nan_weights", tensor=name),
        )
