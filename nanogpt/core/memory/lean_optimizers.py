"""The optimizers' updates with states in 8 bits or in RAM and weights in bf16, one piece of a parameter at a time.

The arithmetic is that of nanogpt.core.optimizers, in float32; only what is stored between steps differs.
"""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch.optim.adamw import adamw as adamw_kernel

from nanogpt.base.config import MemoryConfig
from nanogpt.core import kernels
from nanogpt.core.memory import lowbit
from nanogpt.core.memory.lowbit import BLOCK, PIECE, SMALL, Codec, round_stochastically, scale_of, zero_code

# 二阶矩非负，整个码表都给正数
UNSIGNED = ("exp_avg_sq",)
SCALE = "_scale"
COMPENSATION = "compensation"
# 融合的更新没有临时张量，一次可以处理多得多，启动就少；状态在 RAM 时要先搬上卡，仍用小块
FUSED_PIECE, FUSED_PIECE_MOVED = 2**24, 2**22


class Storage:
    """Where and in which format a parameter's states and weights lie between two steps."""

    def __init__(self, memory: MemoryConfig, device_type: str = "cpu"):
        self.piece = PIECE[device_type]
        self.int8 = memory.optimizer_state == "int8"
        self.kahan = memory.bf16_rounding == "kahan"
        self.offload = memory.offload_optimizer
        self.codec = Codec()
        # 8 位状态的更新逐个运算要六十多个 kernel；有编译器时由 compilation 换成融合的
        self.fused_adamw: Callable[..., None] | None = None
        self.fused_momentum: Callable[..., None] | None = None
        self._numbers: dict[tuple[float, torch.device], torch.Tensor] = {}

    def number(self, value: float, device: torch.device) -> torch.Tensor:
        """The value as a float32 tensor () on a device: compiled code is not made anew when it changes."""
        if len(self._numbers) > 64:
            # 学习率每步一个
            self._numbers.clear()
        if (value, device) not in self._numbers:
            self._numbers[value, device] = torch.full((), value, dtype=torch.float32, device=device)
        return self._numbers[value, device]

    # ---- 状态 ----

    def place(self, tensor: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        """The tensor where states of p belong."""
        return pinned(tensor) if self.in_ram(p) else tensor.to(p.device)

    def in_ram(self, p: torch.Tensor) -> bool:
        """Whether states of p stay in RAM while p is on a card."""
        return self.offload and kernels.device_type(p) == "cuda"

    def keeps_codes(self, key: str, p: torch.Tensor) -> bool:
        """Whether this state of p is stored in 8 bits."""
        return self.int8 and key != COMPENSATION and p.numel() >= SMALL

    def start(self, state: dict, key: str, p: torch.Tensor) -> None:
        """Add a state of zeros under `key`."""
        device = "cpu" if self.in_ram(p) else p.device
        if self.keeps_codes(key, p):
            state[key] = self.place(torch.full(p.shape, zero_code(key not in UNSIGNED), dtype=torch.uint8, device=device), p)
            state[key + SCALE] = self.place(torch.zeros(math.ceil(p.numel() / BLOCK), device=device), p)
        else:
            dtype = torch.bfloat16 if key == COMPENSATION else torch.float32
            state[key] = self.place(torch.zeros(p.shape, dtype=dtype, device=device), p)

    def read(self, state: dict, key: str, span: slice, device: torch.device) -> torch.Tensor:
        """Float32 values (n,) of a piece on `device`; a view of the state itself where that is possible."""
        values = state[key].view(-1)[span].to(device, non_blocking=True)
        if key + SCALE not in state:
            return values.float()
        return self.codec.decode(values, state[key + SCALE][_blocks(span)].to(device, non_blocking=True), key not in UNSIGNED)

    def write(self, state: dict, key: str, span: slice, values: torch.Tensor) -> None:
        """Store what read() gave and the update has changed."""
        piece = state[key].view(-1)[span]
        if key + SCALE in state:
            codes, scale = self.codec.encode(values, key not in UNSIGNED)
            piece.copy_(codes, non_blocking=True)
            state[key + SCALE][_blocks(span)].copy_(scale, non_blocking=True)
        elif piece.dtype != values.dtype or piece.device != values.device:
            # 同格式同设备时 read 给的就是它自己，已经就地改好
            piece.copy_(values, non_blocking=True)

    def converted(self, saved: dict, p: torch.Tensor) -> dict:
        """A checkpoint's states of p in this format; those already in it are taken bit for bit."""
        state = {}
        for key, tensor in saved.items():
            if key.endswith(SCALE) or (key == COMPENSATION and not self.compensates(p)):
                continue
            # 步数是标量，融合 kernel 要求它与参数在同一设备
            if tensor.dim() == 0:
                state[key] = tensor.to(p.device)
            elif (key + SCALE in saved) == self.keeps_codes(key, p):
                state |= {k: self.place(saved[k], p) for k in (key, key + SCALE) if k in saved}
            else:
                self.start(state, key, p)
                for span in lowbit.spans(p.numel(), self.piece):
                    self._store(state, key, span, self.read(saved, key, span, tensor.device))
        return state

    def _store(self, state: dict, key: str, span: slice, values: torch.Tensor) -> None:
        if key + SCALE in state:
            self.write(state, key, span, values)
        else:
            state[key].view(-1)[span].copy_(values)

    # ---- 权重 ----

    def compensates(self, p: torch.Tensor) -> bool:
        """Whether p has a compensation among its states."""
        return self.kahan and p.dtype == torch.bfloat16

    def read_weights(self, state: dict, p: torch.Tensor, span: slice) -> torch.Tensor:
        """Float32 weights (n,) of a piece; p's own memory where p is float32."""
        weights = p.detach().view(-1)[span]
        if self.compensates(p):
            return weights.float() + self.read(state, COMPENSATION, span, p.device)
        return weights.float()

    def write_weights(self, state: dict, p: torch.Tensor, span: slice, values: torch.Tensor, skip: torch.Tensor | None = None) -> None:
        """Store updated weights; bf16 ones so that updates below half their last digit are not lost.

        Where `skip` () is 1.0 the values are those of read_weights(), and nothing changes.
        """
        if p.dtype != torch.bfloat16:
            return
        piece = p.detach().view(-1)[span]
        if self.kahan:
            new = values.to(torch.bfloat16)
            rest = values - new.float()
            if skip is not None:
                # 权重加补偿恰在两数正中时会舍到另一边：和不变，下一步前向用的权重却变了
                new = torch.where(skip > 0, piece, new)
                rest = torch.where(skip > 0, self.read(state, COMPENSATION, span, p.device), rest)
            piece.copy_(new)
            # 舍去的部分记下来，下一步先加回去
            self.write(state, COMPENSATION, span, rest)
        else:
            piece.copy_(round_stochastically(values))


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in RAM that a card copies from and to without the host's help."""
    # 锁页内存：拷贝不经中转，主机也不必等它；与计算同在一条流上，并不重叠
    return tensor.cpu().pin_memory()


def _blocks(span: slice) -> slice:
    return slice(span.start // BLOCK, math.ceil(span.stop / BLOCK))


def adamw_update(
    storage: Storage, state: dict, group: dict, p: torch.Tensor, grad: torch.Tensor, *,
    skip: torch.Tensor | None = None, factor: torch.Tensor | None = None,
) -> None:
    """AdamW on one parameter; `skip` () is 1.0 where nothing may change, `factor` () multiplies the gradient."""
    whole = p.numel() // BLOCK * BLOCK if storage.fused_adamw and _in_blocks(storage, state, "exp_avg", p) else 0
    if whole:
        _fused_adamw_update(storage, state, group, p, grad, whole, skip=skip, factor=factor)
    step, count = state["step"], None
    # 有融合的更新时，只剩最后不满一块的几个值
    for span in [slice(whole, p.numel())] * (whole < p.numel()) if whole else lowbit.spans(p.numel(), storage.piece):
        weights = storage.read_weights(state, p, span)
        first, second = (storage.read(state, key, span, p.device) for key in ("exp_avg", "exp_avg_sq"))
        # kernel 自己把步数加一：每块都从同一个数起
        count = step.clone()
        adamw_kernel(
            [weights], [_gradient(grad, span, factor)], [first], [second], [], [count], fused=True, amsgrad=False, found_inf=skip,
            beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )
        storage.write(state, "exp_avg", span, first)
        storage.write(state, "exp_avg_sq", span, second)
        storage.write_weights(state, p, span, weights, skip)
    if count is None:
        step.add_(1 if skip is None else 1 - skip)
    else:
        step.copy_(count)


def muon_direction(
    storage: Storage, state: dict, group: dict, p: torch.Tensor, grad: torch.Tensor, *,
    skip: torch.Tensor | None = None, factor: torch.Tensor | None = None,
) -> torch.Tensor:
    """Nesterov momentum (rows, cols) to be orthogonalised, bf16 on a GPU, where the products take no more."""
    direction = torch.empty(p.shape, dtype=torch.bfloat16 if kernels.device_type(p) == "cuda" else torch.float32, device=p.device)
    if storage.fused_momentum and p.numel() % BLOCK == 0 and _in_blocks(storage, state, "momentum", p):
        numbers = [storage.number(value, p.device) for value in (1 - group["momentum"], *_GUARD)]
        guard = [given if given is not None else number for given, number in zip((skip, factor), numbers[1:], strict=True)]
        tables = storage.codec.tables(True, p.device)
        for span in lowbit.spans(p.numel(), _fused_piece(state["momentum"], p)):
            with _blocks_here(state, ("momentum",), span, p.device) as states:
                storage.fused_momentum(_in_rows(direction, span), _in_rows(grad, span), *states, tables, numbers[0], *guard)
        return direction
    for span in lowbit.spans(p.numel(), storage.piece):
        g, old = _gradient(grad, span, factor), storage.read(state, "momentum", span, p.device)
        momentum = old.lerp(g, 1 - group["momentum"])
        direction.view(-1)[span].copy_(g.lerp(momentum, group["momentum"]))
        # 坏梯度不进动量
        old.copy_(momentum if skip is None else torch.where(skip > 0, old, momentum))
        storage.write(state, "momentum", span, old)
    return direction


def muon_apply(
    storage: Storage, state: dict, group: dict, p: torch.Tensor, update: torch.Tensor, *, scale: float, skip: torch.Tensor | None = None
) -> None:
    """p <- p * (1 - lr * decay) - scale * update, update (rows, cols)."""
    for span in lowbit.spans(p.numel(), storage.piece):
        old = storage.read_weights(state, p, span)
        new = old.mul(1 - group["lr"] * group["weight_decay"]).add_(update.view(-1)[span].float(), alpha=-scale)
        old.copy_(new if skip is None else torch.where(skip > 0, old, new))
        storage.write_weights(state, p, span, old, skip)


def _gradient(grad: torch.Tensor, span: slice, factor: torch.Tensor | None) -> torch.Tensor:
    piece = grad.reshape(-1)[span].float()
    return piece if factor is None else piece * factor


# ---- 融合的更新：张量都按 (块数, BLOCK) 排 ----

# skip、factor 没有给时的值：照常更新，梯度不缩放
_GUARD = (0.0, 1.0)


def _in_blocks(storage: Storage, state: dict, key: str, p: torch.Tensor) -> bool:
    """Whether a fused update knows these states: in 8 bits, no compensation beside them."""
    return key + SCALE in state and not storage.compensates(p)


def _fused_piece(state: torch.Tensor, p: torch.Tensor) -> int:
    return FUSED_PIECE if state.device == p.device else FUSED_PIECE_MOVED


def _in_rows(x: torch.Tensor, span: slice) -> torch.Tensor:
    return x.detach().reshape(-1)[span].view(-1, BLOCK)


@contextlib.contextmanager
def _blocks_here(state: dict, keys: tuple[str, ...], span: slice, device: torch.device) -> Iterator[list[torch.Tensor]]:
    """Codes (rows, BLOCK) and scales (rows,) of each key on `device`, to be changed in place; brought back to where they lie."""
    there = [part for key in keys for part in (_in_rows(state[key], span), state[key + SCALE][_blocks(span)])]
    here = [part.to(device, non_blocking=True) for part in there]
    yield here
    for a, b in zip(there, here, strict=True):
        if a.device != b.device:
            a.copy_(b, non_blocking=True)


def _fused_adamw_update(storage: Storage, state: dict, group: dict, p: torch.Tensor, grad: torch.Tensor, numel: int, *, skip, factor) -> None:
    b1, b2 = group["betas"]
    numbers = [storage.number(value, p.device) for value in (group["lr"], group["weight_decay"], b1, 1 - b1, b2, 1 - b2, group["eps"], *_GUARD)]
    skip = numbers[-2] if skip is None else skip
    factor = numbers[-1] if factor is None else factor
    tables = (storage.codec.tables(True, p.device), storage.codec.tables(False, p.device))
    for span in lowbit.spans(numel, _fused_piece(state["exp_avg"], p)):
        with _blocks_here(state, ("exp_avg", "exp_avg_sq"), span, p.device) as states:
            storage.fused_adamw(_in_rows(p, span), _in_rows(grad, span), *states, tables, state["step"], numbers[:-2], skip, factor)


def fusible_adamw(p, grad, first, first_scale, second, second_scale, tables, step, numbers, skip, factor) -> None:
    """adamw_update() of blocks for a compiler: weights, codes and scales are changed in place, not where `skip` () is 1.0.

    p, grad, first, second (n, BLOCK), scales (n,); tables: Codec.tables() signed and unsigned; step (): of the update before;
    numbers: lr, weight decay, beta1, 1 - beta1, beta2, 1 - beta2, eps, each ().
    """
    lr, decay, beta1, rest1, beta2, rest2, eps = numbers
    signed, unsigned = tables
    kept = skip > 0
    g = grad.float() * factor
    m = _decoded(first, first_scale, signed[0])
    m = m + rest1 * (g - m)
    v = beta2 * _decoded(second, second_scale, unsigned[0]) + rest2 * g * g
    steps = step + 1
    denominator = (v / (1 - beta2**steps)).sqrt() + eps
    new = p.float() * (1 - lr * decay) - lr / (1 - beta1**steps) * m / denominator
    if p.dtype == torch.bfloat16:
        new = round_stochastically(new)
    p.copy_(torch.where(kept, p, new))
    _encode_into(first, first_scale, m, signed, kept, signed=True)
    _encode_into(second, second_scale, v, unsigned, kept, signed=False)


def fusible_momentum(direction, grad, codes, scale, tables, rest, skip, factor) -> None:
    """What muon_direction() does, of blocks for a compiler; rest () is 1 - momentum."""
    g, old = grad.float() * factor, _decoded(codes, scale, tables[0])
    momentum = old + rest * (g - old)
    direction.copy_(momentum - (momentum - g) * rest)
    _encode_into(codes, scale, momentum, tables, skip > 0, signed=True)


def _decoded(codes: torch.Tensor, scale: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return values[codes.int()] * scale[:, None]


def _encode_into(codes: torch.Tensor, scale: torch.Tensor, x: torch.Tensor, tables: tuple, kept: torch.Tensor, *, signed: bool) -> None:
    """Codec.encode() of x (n, BLOCK), stored unless `kept` ()."""
    new_scale = scale_of(x)
    ratio = x / torch.where(new_scale == 0, 1.0, new_scale)[:, None]
    # 与 Codec.nearest 一样查表：两次读，而二分查找要八次
    _, middles, first = tables
    new = first[(ratio.view(torch.int32) >> 16) & 0xFFFF]
    new = new + (ratio > middles[new]).int()
    if not signed:
        new = torch.maximum(new, (x > 0).int())
    codes.copy_(torch.where(kept, codes, new.to(torch.uint8)))
    scale.copy_(torch.where(kept, scale, new_scale))
