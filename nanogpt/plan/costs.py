"""What one operation costs: products, passes over memory, scratch space of its kernel."""

import math

import torch

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)
# 建张量而不写它，或只改形状：不花时间
UNTOUCHED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted", "_local_scalar_dense"}
# RTX 3060 的 SM 数：确定性的 flash 反向按它决定要几份 dq
SM_COUNT = 28
FLASH_TILE = 128


def is_free(func, made_storage: bool) -> bool:
    """Whether an operation only makes a view or reserves memory."""
    name = func._schema.name
    if name.rpartition("::")[2] in UNTOUCHED:
        return True
    return not made_storage and not func._schema.is_mutable and bool(func.is_view or name.endswith(("::_to_copy", "::detach", "::lift_fresh")))


def product(*sizes: int) -> int:
    """FLOPs of a matrix product: two per multiply-add."""
    return 2 * math.prod(sizes)


def flops_of(func, args, out) -> tuple[int, bool]:
    """(floating-point operations in products, whether on 16-bit units); element-wise work counts as traffic only."""
    packet = func._overloadpacket
    if packet in (aten.mm, aten.bmm):
        a, b = args[0], args[1]
        return product(*a.shape, b.shape[-1]), a.dtype in HALF
    if packet in (aten.addmm, aten.baddbmm, aten.addmm_, aten.baddbmm_):
        a, b = args[1], args[2]
        return product(*a.shape, b.shape[-1]), a.dtype in HALF
    name = packet.__name__
    if "scaled_dot_product" in name:
        q, k = (args[1], args[2]) if name.endswith("backward") else (args[0], args[1])
        causal = any(a is True for a in args) or q.size(-2) == k.size(-2)
        # 前向两次乘积，反向重算一次再加四次；因果的一半被跳过
        flops = (5 if name.endswith("backward") else 2) * product(*q.shape, k.size(-2))
        return flops // 2 if causal else flops, q.dtype in HALF
    return 0, False


def nbytes(t: torch.Tensor) -> int:
    """Bytes that reading a tensor touches; a broadcast one touches its storage only."""
    return min(t.numel() * t.element_size(), t.untyped_storage().nbytes())


def traffic_of(func, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> int:
    """Bytes read and written by one operation."""
    name = func._schema.name.rpartition("::")[2]
    written = sum(map(nbytes, outputs))
    if name in ("embedding", "gather", "index", "index_select"):
        # 只读用到的行，不读整张表
        return 2 * written
    if name in ("zeros", "zeros_like", "ones", "full", "fill_", "zero_", "normal_", "scatter_add_"):
        return written
    read = sum(map(nbytes, inputs))
    if func._schema.is_mutable and not outputs:
        # 融合的优化器：四份张量读，三份写回
        return 2 * read - sum(nbytes(t) for t in inputs[: len(inputs) // 4])
    return read + written


def workspace_of(func, args) -> int:
    """Scratch bytes of the CUDA kernel that an attention backward stands for, 0 for others; assumes deterministic=true."""
    name = func._overloadpacket.__name__
    if not ("scaled_dot_product" in name and name.endswith("backward")):
        return 0
    q = args[1]
    B, nh, T, hs = q.shape
    if q.dtype not in HALF:
        return B * nh * T * 4
    rows = math.ceil(T / FLASH_TILE) * FLASH_TILE
    width = math.ceil(hs / 32) * 32
    # dq 用 fp32 累加；要求确定性时，SM 多于 (行 × head) 就分成几份再相加
    parts = math.ceil(SM_COUNT / (B * nh))
    return parts * B * nh * rows * width * 4 + B * nh * rows * 4
