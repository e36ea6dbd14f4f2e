"""The optimizer's small operations of a training step on a CPU, each in one pass: Muon's moments, tables by rows."""

# kernels.update_rows、RowGradient 与 Optimizer.muon 里同样的公式；正交化的矩阵乘仍是 kernels.orthogonalize 的
# 一组矩阵一次做完：各自的地址排成一列，一块活是其中一个矩阵的一段
# 要跳过坏的一步（skip）、别的数字格式时，仍走普通的路

import numpy as np
import torch

from nanogpt.core import kernels
from nanogpt.core.loops.team import BLOCK, TeamKernel, floats, floats_at, integers, number, pieces, real, span
from nanogpt.core.optimizers import Optimizer
from nanogpt.core.tables import ROW_AVG_SQ, RowGradient, row_gradient
from nanogpt.core.wrapping import mix_in

# 一张表的行分几份：同一行总归同一份，重复的下标就不会两个线程一起写
SHARES = 8
# 优化器里这几个方法都还是自己的，才换
OVERRIDDEN = ("update", "rows", "muon", "directions")


@TeamKernel
def _look_ahead(job):
    size, blocks, momentum, rest = number(job, 0), number(job, 1), real(job, 2), real(job, 3)
    for piece in pieces(job):
        i, (start, length) = piece // blocks, span(piece % blocks, size)
        grad, kept = floats_at(job, 4, i, start, length), floats_at(job, 5, i, start, length)
        ahead = floats(job, 6, i * size + start, length)
        for k in range(length):
            moved = kept[k] + rest * (grad[k] - kept[k])
            kept[k] = moved
            ahead[k] = grad[k] + momentum * (moved - grad[k])


@TeamKernel
def _subtract(job):
    size, blocks, left, rate = number(job, 0), number(job, 1), real(job, 2), real(job, 3)
    for piece in pieces(job):
        i, (start, length) = piece // blocks, span(piece % blocks, size)
        weight, update = floats_at(job, 4, i, start, length), floats(job, 5, i * size + start, length)
        for k in range(length):
            weight[k] = weight[k] * left - update[k] * rate


@TeamKernel
def _add_rows(job):
    count, size, ids = number(job, 0), number(job, 1), integers(job, 2, 0, number(job, 0))
    for share in pieces(job):
        for n in range(count):
            if ids[n] % SHARES == share:
                grad, total = floats(job, 3, n * size, size), floats(job, 4, ids[n] * size, size)
                for c in range(size):
                    total[c] += grad[c]


@TeamKernel
def _add_squares(job):
    count, size = number(job, 0), number(job, 1)
    ids = integers(job, 2, 0, count)
    for share in pieces(job):
        total = 0.0
        for n in range(count):
            seen = integers(job, 4, ids[n], 1)
            if ids[n] % SHARES == share and seen[0] == 0:
                seen[0] = 1
                row, square = floats(job, 3, ids[n] * size, size), np.float32(0)
                for c in range(size):
                    square += row[c] * row[c]
                total += square
        for n in range(count):
            if ids[n] % SHARES == share:
                integers(job, 4, ids[n], 1)[0] = 0
        floats(job, 5, share, 1)[0] = total


@TeamKernel
def _update_rows(job):
    count, size, ids = number(job, 0), number(job, 1), integers(job, 6, 0, number(job, 0))
    lr, rest, correction, eps = real(job, 2), real(job, 3), real(job, 4), real(job, 5)
    for share in pieces(job):
        for n in range(count):
            if ids[n] % SHARES != share:
                continue
            grad, square = floats(job, 8, ids[n] * size, size), np.float32(0)
            for c in range(size):
                square += grad[c] * grad[c]
            if square > 0:
                weight, kept = floats(job, 7, ids[n] * size, size), floats(job, 9, ids[n], 1)
                kept[0] += rest * (square / np.float32(size) - kept[0])
                rate = lr / (np.sqrt(kept[0] / correction) + eps)
                for c in range(size):
                    weight[c] -= grad[c] * rate
            # 用过的梯度清成 0：同一行再来时就没有事做，下一步也不必再清
            for c in range(size):
                grad[c] = np.float32(0)


class Rows(RowGradient):
    """A RowGradient whose touched rows are gone through one by one."""

    # 只走一遍：查的次数是行数的四倍，也比整张表走几遍快
    most = 4

    def __init__(self):
        super().__init__()
        self._seen: torch.Tensor | None = None

    @property
    def few(self) -> bool:
        return super().few and self.sum.is_contiguous()

    def ids(self) -> torch.Tensor:
        # 下标也可以是 int32 的
        return super().ids().long()

    def add_rows(self, total: torch.Tensor, ids: torch.Tensor, grad: torch.Tensor) -> None:
        if total is not self.sum or not total.is_contiguous():
            super().add_rows(total, ids, grad)
            return
        # expand 出来的下标压平了也不连续
        ids, grad = ids.long().contiguous(), grad.contiguous()
        _add_rows(torch.float32, grad.numel(), SHARES, len(ids), grad.size(1), ids, grad, total)

    def once(self) -> torch.Tensor:
        """The norm of the touched rows, (1,)."""
        if self._seen is None:
            self._seen = torch.zeros(len(self.sum), dtype=torch.int64)
        ids, size, squares = self.ids(), self.sum.size(1), torch.empty(SHARES)
        _add_squares(torch.float32, len(ids) * size, SHARES, len(ids), size, ids, self.sum, self._seen, squares)
        return squares.sum().sqrt_()[None]

    def update(self, p: torch.Tensor, state: dict[str, torch.Tensor], group: dict) -> None:
        """tables.update_table(); leaves a gradient of zeros."""
        ids, size, beta = self.ids(), self.sum.size(1), float(group["betas"][1])
        state["step"] += 1
        _update_rows(
            torch.float32, len(ids) * size, SHARES, len(ids), size, float(group["lr"]), 1 - beta,
            1 - beta ** int(state["step"]), float(group["eps"]), ids, p, self.sum, state[ROW_AVG_SQ],
        )
        # 绕过了 PyTorch：要它知道权重变了
        torch.autograd.graph.increment_version(p)
        self._ids = [ids[:0]]


class LoopedUpdates:
    """Put before an Optimizer: its updates of tables and by Muon go through these loops."""

    def rows(self, group, named, *, skip=None, factor=None):
        for name, p in named:
            rows = row_gradient(p)
            if isinstance(rows, Rows) and skip is None and p.is_contiguous():
                rows.update(p.detach(), self.started(name, p, group), group)
            else:
                super().rows(group, [(name, p)], skip=skip, factor=factor)

    def muon(self, group, named, *, skip=None, factor=None):
        momenta = [self.started(name, p, group)["momentum"] for name, p in named]
        tensors = [*momenta, *(p for _, p in named), *(p.grad for _, p in named)]
        if skip is not None or not all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors):
            super().muon(group, named, skip=skip, factor=factor)
            return
        # 同一形状的堆在一起：_look_ahead 直接写进去
        parts: dict[torch.Size, list[tuple]] = {}
        for (name, p), momentum in zip(named, momenta, strict=True):
            rows = group["splits"].get(name) or [len(p)]
            for part in zip(*(t.split(rows) for t in (p.grad, momentum, p.detach())), strict=True):
                parts.setdefault(part[0].shape, []).append(part)
        lr, momentum = float(group["lr"]), float(group["momentum"])
        left = 1 - lr * float(group["weight_decay"])
        for shape, these in parts.items():
            grads, kept, weights = (_addresses(each) for each in zip(*these, strict=True))
            ahead, blocks = torch.empty(len(these), *shape), -(-shape.numel() // BLOCK)
            about = torch.float32, ahead.numel(), len(these) * blocks, shape.numel(), blocks
            _look_ahead(*about, momentum, 1 - momentum, grads, kept, ahead)
            update = kernels.orthogonalize(ahead, group["ns_steps"], group["ns_bf16"]).contiguous()
            _subtract(*about, left, lr * kernels.update_scale(shape), weights, update)
        torch.autograd.graph.increment_version([p for _, p in named])


def _addresses(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors])


def use_loops(optimizer) -> bool:
    """Let an optimizer of parameters on a CPU update with these loops, before its first step; whether it does."""
    kind = type(optimizer)
    # 省显存的、使用者自己的，各有自己的更新
    ours = all(getattr(kind, name, None) is getattr(Optimizer, name) for name in OVERRIDDEN)
    if not ours or not vars(optimizer).keys().isdisjoint(OVERRIDDEN):
        return False
    mix_in(optimizer, LoopedUpdates)
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        if type(getattr(p, "row_gradient", None)) is RowGradient and p.dtype == torch.float32 and p.is_contiguous():
            p.row_gradient = Rows()
    return any(group["rule"] != "adamw" for group in optimizer.param_groups)
