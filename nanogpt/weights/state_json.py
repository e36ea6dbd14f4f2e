"""Nested dicts, lists and tuples of tensors and plain values <-> json and a table of tensors: what a pickle would do, without one.

In the json every object has one key that says what it stands for: {"dict": [[key, value], …]}, {"tuple": […]},
{"tensor": name} or {"float": "nan" | "inf" | "-inf"}; lists, strings, numbers, true, false and null stand for themselves.
"""

import math
from typing import Any

import torch


def flatten(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """What json can hold of `value`; its tensors are added to `tensors`. TypeError at anything else."""
    if isinstance(value, torch.Tensor):
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
    """What flatten() was given; ValueError, KeyError or TypeError where `node` is nothing that it writes."""
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
