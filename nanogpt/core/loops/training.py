"""The small operations of a training step on a CPU, each in one pass over memory, and what puts them in place."""

# kernels.py 里同名公式的另一份，逐项对得上，只差舍入：RMSNorm，q、k 的归一化与旋转，激活函数，dropout
# PyTorch 里它们是一串小运算，每个要走一遍内存、叫醒一次线程：小模型的一步里，与矩阵乘一样久
# use_loops 从外面换上去：Norm、MLP、Dropout、注意力各有一个留给它的属性；别的数字格式、编译器追踪时照旧

import functools

import numpy as np
import torch

from nanogpt.core import kernels
from nanogpt.core.attention import CausalSelfAttention
from nanogpt.core.loops.compiled import part_of_kernel
from nanogpt.core.loops.numbers import as_float, exp, rounded
from nanogpt.core.loops.team import BLOCK, NUMBERS, TeamKernel, floats, number, octets, pieces, real, row, span
from nanogpt.core.model import MLP, Block, Norm

# 一块几行：多了，线程分不匀
ROWS = 16
RELU2, GELU = 0, 1
# tanh 近似的 GELU：2·sqrt(2/π)，与三次项的系数
TWICE, CUBIC = np.float32(2 * 0.7978845608028654), np.float32(0.044715)


def _once(backward):
    # PyTorch 自己的 once_differentiable 只在传来的梯度要求导时才报错，别的时候悄悄少算几项
    @functools.wraps(backward)
    def checked(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError("compiled loops cannot be differentiated twice: train with compile=false")
        return backward(ctx, grad)

    return checked


@TeamKernel
def _normalize(job):
    rows, size, eps = number(job, 0), number(job, 1), real(job, 2)
    for piece in pieces(job):
        for i in range(piece * ROWS, min(rows, (piece + 1) * ROWS)):
            x, y, square = floats(job, 3, i * size, size), row(job, 4, i * size, size), np.float32(0)
            for c in range(size):
                square += x[c] * x[c]
            factor = np.float32(1) / np.sqrt(square / np.float32(size) + eps)
            floats(job, 5, i, 1)[0] = factor
            for c in range(size):
                y[c] = rounded(job, x[c] * factor)


@TeamKernel
def _normalize_back(job):
    rows, size = number(job, 0), number(job, 1)
    for piece in pieces(job):
        for i in range(piece * ROWS, min(rows, (piece + 1) * ROWS)):
            grad, y, product = row(job, 2, i * size, size), row(job, 3, i * size, size), np.float32(0)
            for c in range(size):
                product += as_float(grad[c]) * as_float(y[c])
            mean, factor, into = product / np.float32(size), floats(job, 4, i, 1)[0], floats(job, 5, i * size, size)
            for c in range(size):
                into[c] = factor * (as_float(grad[c]) - as_float(y[c]) * mean)


class _Norm(torch.autograd.Function):
    """kernels.rms_norm() of float32 rows, in `dtype`."""

    @staticmethod
    def forward(ctx, x, eps, dtype):
        x = x.contiguous()
        rows, size = x.numel() // x.size(-1), x.size(-1)
        y, r = torch.empty(x.shape, dtype=dtype), torch.empty(rows)
        _normalize(dtype, x.numel(), -(-rows // ROWS), rows, size, eps, x, y, r)
        ctx.save_for_backward(y, r)
        return y

    @staticmethod
    @_once
    def backward(ctx, grad):
        y, r = ctx.saved_tensors
        grad, into = grad.contiguous(), torch.empty(y.shape)
        rows, size = r.numel(), y.size(-1)
        _normalize_back(y.dtype, y.numel(), -(-rows // ROWS), rows, size, grad, y, r, into)
        return into, None, None


def rms_norm(x: torch.Tensor, gain: torch.Tensor | None = None, eps: float = kernels.RMS_EPS) -> torch.Tensor:
    """kernels.rms_norm()."""
    if x.dtype != torch.float32 or torch.compiler.is_compiling():
        return kernels.rms_norm(x, gain, eps)
    y = _Norm.apply(x, eps, x.dtype)
    return y if gain is None else y * gain.to(x.dtype)


def rounded_norm(x: torch.Tensor, gain: torch.Tensor | None = None, eps: float = kernels.RMS_EPS) -> torch.Tensor:
    """kernels.rms_norm() under autocast to bf16 for products that round what they read: rounded to begin with."""
    bf16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    if x.dtype != torch.float32 or gain is not None or not bf16 or torch.compiler.is_compiling():
        return rms_norm(x, gain, eps)
    return _Norm.apply(x, eps, torch.bfloat16)


@part_of_kernel
def _sigmoid(x):
    return np.float32(1) / (np.float32(1) + exp(min(-x, np.float32(87))))


@TeamKernel
def _activate(job):
    size, kind = number(job, 0), number(job, 1)
    for piece in pieces(job):
        start, length = span(piece, size)
        x, y = row(job, 2, start, length), row(job, 3, start, length)
        if kind == RELU2:
            for i in range(length):
                positive = max(as_float(x[i]), np.float32(0))
                y[i] = rounded(job, positive * positive)
        else:
            for i in range(length):
                # (1 + tanh u) / 2 = sigmoid 2u
                one = as_float(x[i])
                y[i] = rounded(job, one * _sigmoid(TWICE * one * (np.float32(1) + CUBIC * one * one)))


@TeamKernel
def _activate_back(job):
    size, kind = number(job, 0), number(job, 1)
    for piece in pieces(job):
        start, length = span(piece, size)
        x, grad, into = row(job, 2, start, length), row(job, 3, start, length), row(job, 4, start, length)
        if kind == RELU2:
            for i in range(length):
                into[i] = rounded(job, np.float32(2) * max(as_float(x[i]), np.float32(0)) * as_float(grad[i]))
        else:
            for i in range(length):
                one = as_float(x[i])
                s = _sigmoid(TWICE * one * (np.float32(1) + CUBIC * one * one))
                slope = TWICE * (np.float32(1) + np.float32(3) * CUBIC * one * one)
                into[i] = rounded(job, as_float(grad[i]) * (s + one * s * (np.float32(1) - s) * slope))


class _Activation(torch.autograd.Function):
    """RELU2 or GELU of float32 or bf16, which keeps x."""

    @staticmethod
    def forward(ctx, x, kind):
        x = x.contiguous()
        y, size, ctx.kind = torch.empty_like(x), x.numel(), kind
        _activate(x.dtype, size, -(-size // BLOCK), size, kind, x, y)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @_once
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        grad, into, size = grad.contiguous(), torch.empty_like(x), x.numel()
        _activate_back(x.dtype, size, -(-size // BLOCK), size, ctx.kind, x, grad, into)
        return into, None


@TeamKernel
def _gate(job):
    rows, size = number(job, 0), number(job, 1)
    for piece in pieces(job):
        for i in range(piece * ROWS, min(rows, (piece + 1) * ROWS)):
            gate, up = row(job, 2, 2 * i * size, size), row(job, 2, (2 * i + 1) * size, size)
            y = row(job, 3, i * size, size)
            for c in range(size):
                one = as_float(gate[c])
                y[c] = rounded(job, one * _sigmoid(one) * as_float(up[c]))


@TeamKernel
def _gate_back(job):
    rows, size = number(job, 0), number(job, 1)
    for piece in pieces(job):
        for i in range(piece * ROWS, min(rows, (piece + 1) * ROWS)):
            gate, up = row(job, 2, 2 * i * size, size), row(job, 2, (2 * i + 1) * size, size)
            of_gate, of_up = row(job, 4, 2 * i * size, size), row(job, 4, (2 * i + 1) * size, size)
            grad = row(job, 3, i * size, size)
            for c in range(size):
                one, g = as_float(gate[c]), as_float(grad[c])
                s = _sigmoid(one)
                of_up[c] = rounded(job, g * one * s)
                of_gate[c] = rounded(job, g * as_float(up[c]) * s * (np.float32(1) + one * (np.float32(1) - s)))


class _SwiGLU(torch.autograd.Function):
    """kernels.swiglu() of (..., 2 n) in float32 or bf16."""

    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        size = x.size(-1) // 2
        y, rows = x.new_empty(*x.shape[:-1], size), x.numel() // (2 * size)
        _gate(x.dtype, x.numel(), -(-rows // ROWS), rows, size, x, y)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @_once
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        grad, into, size = grad.contiguous(), torch.empty_like(x), x.size(-1) // 2
        rows = x.numel() // (2 * size)
        _gate_back(x.dtype, x.numel(), -(-rows // ROWS), rows, size, x, grad, into)
        return into


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """kernels.squared_relu(), which keeps x instead of relu(x)."""
    return _Activation.apply(x, RELU2) if _is_known(x) else kernels.squared_relu(x)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """kernels.gelu_tanh()."""
    return _Activation.apply(x, GELU) if _is_known(x) else kernels.gelu_tanh(x)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """kernels.swiglu()."""
    return _SwiGLU.apply(x) if _is_known(x) else kernels.swiglu(x)


def _is_known(x: torch.Tensor) -> bool:
    return x.dtype in NUMBERS and not torch.compiler.is_compiling()


@TeamKernel
def _drop(job):
    size, dropped, factor = number(job, 0), number(job, 1), real(job, 2)
    for piece in pieces(job):
        start, length = span(piece, size)
        x, drawn, y = row(job, 3, start, length), octets(job, 4, start, length), row(job, 5, start, length)
        for i in range(length):
            # 乘 0 而不是写 0：丢掉的 NaN 还是 NaN，与 PyTorch 的乘法一样
            y[i] = rounded(job, as_float(x[i]) * (factor if drawn[i] >= dropped else np.float32(0)))


class _Dropout(torch.autograd.Function):
    """kernels.dropout() of float32 or bf16, which keeps the random bytes."""

    @staticmethod
    def forward(ctx, x, p):
        drawn, ctx.dropped = kernels.drawn_bytes(x, p)
        ctx.save_for_backward(drawn)
        return _Dropout.dropped_of(x.contiguous(), drawn, ctx.dropped)

    @staticmethod
    @_once
    def backward(ctx, grad):
        (drawn,) = ctx.saved_tensors
        return _Dropout.dropped_of(grad.contiguous(), drawn, ctx.dropped), None

    @staticmethod
    def dropped_of(x: torch.Tensor, drawn: torch.Tensor, dropped: int) -> torch.Tensor:
        """x with zeros where drawn < dropped, and otherwise larger by as much."""
        y, size = torch.empty_like(x), x.numel()
        _drop(x.dtype, size, -(-size // BLOCK), size, dropped, 256 / (256 - dropped), x, drawn, y)
        return y


def dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """kernels.dropout(): the same elements of the same random numbers."""
    return _Dropout.apply(x, p) if _is_known(x) else kernels.dropout(x, p)


@TeamKernel
def _arrange(job):
    T, heads, size, norm, eps = number(job, 0), number(job, 1), number(job, 2), number(job, 3), real(job, 4)
    rows, half = number(job, 5), size // 2
    for piece in pieces(job):
        b, head = piece // heads, piece % heads
        for kind in range(3):
            for t in range(T):
                # 第几行：c_attn 的输出里，与换过轴的里
                place = (kind * rows + piece) * T + t
                x = row(job, 6, (((b * T + t) * 3 + kind) * heads + head) * size, size)
                y = row(job, 7, place * size, size)
                if kind == 2:
                    for i in range(size):
                        y[i] = x[i]
                    continue
                factor = np.float32(1)
                if norm:
                    square, kept = np.float32(0), row(job, 8, place * size, size)
                    for i in range(size):
                        square += as_float(x[i]) * as_float(x[i])
                    factor = np.float32(1) / np.sqrt(square / np.float32(size) + eps)
                    floats(job, 9, place, 1)[0] = factor
                    for i in range(size):
                        kept[i] = rounded(job, as_float(x[i]) * factor)
                cos, sin = floats(job, 10, t * size, size), floats(job, 11, t * size, size)
                first, second, other = y[:half], y[half:], x[half:]
                # 两半各一个循环：合在一起写，编译器就得先查会不会重叠
                for i in range(half):
                    first[i] = rounded(job, as_float(x[i]) * factor * cos[i] + as_float(other[i]) * factor * sin[i])
                cos, sin = cos[half:], sin[half:]
                for i in range(half):
                    second[i] = rounded(job, as_float(other[i]) * factor * cos[i] + as_float(x[i]) * factor * sin[i])


@TeamKernel
def _arrange_back(job):
    T, heads, size, norm = number(job, 0), number(job, 1), number(job, 2), number(job, 3)
    rows, half = number(job, 4), size // 2
    for piece in pieces(job):
        b, head = piece // heads, piece % heads
        for kind in range(3):
            for t in range(T):
                place = (kind * rows + piece) * T + t
                g = row(job, 5, place * size, size)
                into = row(job, 6, (((b * T + t) * 3 + kind) * heads + head) * size, size)
                if kind == 2:
                    for i in range(size):
                        into[i] = g[i]
                    continue
                cos, sin = floats(job, 9, t * size, size), floats(job, 10, t * size, size)
                other, cos2, sin2 = g[half:], cos[half:], sin[half:]
                # 没有归一化时：减去的是 0，乘的是 1
                y, factor, mean = g, np.float32(1), np.float32(0)
                if norm:
                    y, factor, product = row(job, 7, place * size, size), floats(job, 8, place, 1)[0], np.float32(0)
                    y2 = y[half:]
                    for i in range(half):
                        product += (as_float(g[i]) * cos[i] - as_float(other[i]) * sin[i]) * as_float(y[i])
                        product += (as_float(other[i]) * cos2[i] - as_float(g[i]) * sin2[i]) * as_float(y2[i])
                    mean = product / np.float32(size)
                into2, y2 = into[half:], y[half:]
                for i in range(half):
                    turned = as_float(g[i]) * cos[i] - as_float(other[i]) * sin[i]
                    into[i] = rounded(job, factor * (turned - as_float(y[i]) * mean))
                for i in range(half):
                    turned = as_float(other[i]) * cos2[i] - as_float(g[i]) * sin2[i]
                    into2[i] = rounded(job, factor * (turned - as_float(y2[i]) * mean))


class Arrangement(kernels.Arrangement):
    """The same in one pass, for q, k and v that come as one part in float32 or bf16."""

    in_one_pass = False

    def pack(self, parts):
        qkv, rope = parts[0], self.rope
        known = rope is None or rope[0].dtype == torch.float32
        # 两半各走一遍：奇数的 head 走普通的路
        self.in_one_pass = len(parts) == 1 and known and qkv.dtype in NUMBERS and qkv.size(-1) % 2 == 0
        if not self.in_one_pass or (self.eps is None and rope is None):
            return super().pack(parts)
        B, T, _, heads, size = qkv.shape
        packed, y, r = torch.empty(3, B * heads, T, size, dtype=qkv.dtype), None, None
        if self.eps is not None:
            y, r = torch.empty_like(packed[:2]), torch.empty(2, B * heads, T, 1)
        _arrange(
            qkv.dtype, qkv.numel(), B * heads, T, heads, size, self.eps is not None, self.eps or 0.0, B * heads,
            qkv.contiguous(), packed, y, r, *self._tables(T, size),
        )
        return packed, (y, r)

    def unpack(self, grads, batch, kept):
        y, r = kept
        if not self.in_one_pass or (r is None and self.rope is None):
            return super().unpack(grads, batch, kept)
        _, rows, T, size = grads.shape
        into = torch.empty(batch, T, 3, rows // batch, size, dtype=grads.dtype)
        _arrange_back(
            grads.dtype, grads.numel(), rows, T, rows // batch, size, r is not None, rows, grads, into, y, r,
            *self._tables(T, size),
        )
        return into

    def _tables(self, T: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        # 不旋转就是转 0 度
        return tuple(t.contiguous() for t in self.rope or (torch.ones(T, size), torch.zeros(T, size)))


ACTIVATIONS = {"relu2": squared_relu, "gelu_tanh": gelu_tanh, "swiglu": swiglu}
# 哪些类的哪个属性换成什么；使用者的子类改过的不换
IN_PLACE_OF = (
    (Norm, "rms_norm", rms_norm), (MLP, "activations", {**kernels.ACTIVATIONS, **ACTIVATIONS}),
    (kernels.Dropout, "dropout", dropout), (CausalSelfAttention, "arrangement", Arrangement),
)


def use_loops(model) -> None:
    """Let a model on a CPU compute with these loops, before it is trained."""
    for part in model.modules():
        for kind, name, ours in IN_PLACE_OF:
            if isinstance(part, kind) and getattr(part, name) is getattr(kind, name):
                setattr(part, name, ours)
    for block in (block for block in model.modules() if type(block) is Block):
        # 只有自己的乘积来读时才先舍入：使用者的层照旧读到 float32
        for norm, reader, kind in ((block.ln_1, block.attn, CausalSelfAttention), (block.ln_2, block.mlp, MLP)):
            looked_at = norm._forward_hooks or reader._forward_pre_hooks or norm.rms_norm is not rms_norm
            if type(reader) is kind and type(norm) is Norm and not looked_at and _rounds(reader):
                norm.rms_norm = rounded_norm


def _rounds(reader: CausalSelfAttention | MLP) -> bool:
    """Whether a layer reads its input with a product of PyTorch's own, unseen by anybody else."""
    first = reader.c_attn if isinstance(reader, CausalSelfAttention) else reader.c_fc
    return type(first) is torch.nn.Linear and not first._forward_hooks and not first._forward_pre_hooks


def worth_it(model) -> bool:
    """Whether a model has any use for these loops."""
    c = model.config
    return c.norm == "rmsnorm" or c.activation in ACTIVATIONS or c.qk_norm or c.dropout > 0
