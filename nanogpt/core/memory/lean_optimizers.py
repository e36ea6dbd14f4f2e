"""Optimizer updates with states in 8 bits or in RAM and weights in bf16, one piece of a parameter at a time.

The arithmetic is that of nanogpt.core.optimizers, in float32; only what is stored between steps is different.
"""

# 省显存的优化器：状态压成 8 位或放进 RAM，权重存成 bf16；公式与 core/optimizers 相同，都在 fp32 里算
# Storage 管两步之间怎么存、怎么读写一小块；adamw_update、muon_* 一块一块地更新，临时张量就小
# Lean 混入优化器，换掉它的更新；configure 按 memory= 决定要不要，由 weights.build.build_step 调用
# 更新从不看张量的值：要跳过的一步由 skip () 在设备上挡住，预测的追踪也能跑同一段代码
# 有编译器的显卡上，8 位状态的更新换成融合的 kernel（fusible_*）：同样的公式，少几十次启动

import contextlib
import math
from collections.abc import Callable, Iterator

import torch

from nanogpt.base.config import MemoryConfig
from nanogpt.base.language import ConfigError
from nanogpt.core import kernels
from nanogpt.core.kernels import orthogonalized, update_scale
from nanogpt.core.memory import lowbit
from nanogpt.core.memory.lowbit import BLOCK, PIECE, SMALL, Codec, round_stochastically, scale_of, zero_code
from nanogpt.core.optimizers import SCALE, Optimizer
from nanogpt.core.tables import ROW_AVG_SQ
from nanogpt.core.wrapping import mix_in

# 二阶矩非负，整个码表都给正数
UNSIGNED = ("exp_avg_sq",)
COMPENSATION = "compensation"
# 保留全部激活的显卡上，更新时激活都已释放：堆得多，启动得少，也不抬高峰值
STACK_BYTES_SPARE = 512 * 2**20
# 融合的更新没有临时张量，一次可以处理多得多，启动就少；状态在 RAM 时要先搬上卡，仍用小块
FUSED_PIECE, FUSED_PIECE_MOVED = 2**24, 2**22


class Storage:
    """Where and in which format a parameter's states and weights lie between two steps."""

    # 格式与公式分开：四种省法可以任意组合，AdamW 与 Muon 都只写一遍

    def __init__(self, memory: MemoryConfig, device_type: str = "cpu"):
        self.piece = PIECE["cpu" if device_type == "cpu" else "card"]
        self.int8 = memory.optimizer_state == "int8"
        self.kahan = memory.bf16_rounding == "kahan"
        self.offload = memory.offload_optimizer
        self.codec = Codec()
        # 8 位状态的更新逐个运算要六十多个 kernel；有编译器时由 compilation 换成融合的
        self.fused_adamw: Callable[..., None] | None = None
        self.fused_momentum: Callable[..., None] | None = None
        self._numbers: dict[tuple[float, torch.device], torch.Tensor] = {}

    def number(self, value: float, device: torch.device) -> torch.Tensor:
        """The value as a float32 tensor () on a device, so that compiled code is not recompiled when it changes."""
        if len(self._numbers) > 64:
            # 学习率每步一个
            self._numbers.clear()
        if (value, device) not in self._numbers:
            self._numbers[value, device] = torch.full((), value, dtype=torch.float32, device=device)
        return self._numbers[value, device]

    # ---- 状态 ----

    def place(self, tensor: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        """The tensor moved to where the states of p belong."""
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
            zero = zero_code(key not in UNSIGNED)
            state[key] = self.place(torch.full(p.shape, zero, dtype=torch.uint8, device=device), p)
            state[key + SCALE] = self.place(torch.zeros(math.ceil(p.numel() / BLOCK), device=device), p)
        else:
            dtype = torch.bfloat16 if key == COMPENSATION else torch.float32
            state[key] = self.place(torch.zeros(p.shape, dtype=dtype, device=device), p)

    def read(self, state: dict, key: str, span: slice, device: torch.device) -> torch.Tensor:
        """Float32 values (n,) of a piece on `device`; a view of the state itself where that is possible."""
        values = state[key].view(-1)[span].to(device, non_blocking=True)
        if key + SCALE not in state:
            return values.float()
        scale = state[key + SCALE][_blocks(span)].to(device, non_blocking=True)
        return self.codec.decode(values, scale, key not in UNSIGNED)

    def write(self, state: dict, key: str, span: slice, values: torch.Tensor) -> None:
        """Store values that read() gave and the update has changed."""
        piece = state[key].view(-1)[span]
        if key + SCALE in state:
            codes, scale = self.codec.encode(values, key not in UNSIGNED)
            piece.copy_(codes, non_blocking=True)
            state[key + SCALE][_blocks(span)].copy_(scale, non_blocking=True)
        elif piece.dtype != values.dtype or piece.device != values.device:
            # 同格式同设备时 read 给的就是它自己，已经就地改好
            piece.copy_(values, non_blocking=True)

    def converted(self, saved: dict, p: torch.Tensor) -> dict:
        """A checkpoint's states of p in this format; those already in it are kept bit-exact."""
        state = {}
        for key, tensor in saved.items():
            if key.endswith(SCALE) or (key == COMPENSATION and not self.compensates(p)):
                continue
            # 步数是标量，融合 kernel 要求它与参数在同一设备；一行一个的数也小
            if tensor.dim() == 0 or key == ROW_AVG_SQ:
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
        """Whether the states of p include a compensation (Kahan summation)."""
        return self.kahan and p.dtype == torch.bfloat16

    def read_weights(self, state: dict, p: torch.Tensor, span: slice) -> torch.Tensor:
        """Float32 weights (n,) of a piece; p's own memory where p is float32."""
        weights = p.detach().view(-1)[span]
        if self.compensates(p):
            return weights.float() + self.read(state, COMPENSATION, span, p.device)
        return weights.float()

    def write_weights(
        self, state: dict, p: torch.Tensor, span: slice, values: torch.Tensor, skip: torch.Tensor | None = None
    ) -> None:
        """Store updated weights; bf16 ones in a way that does not lose updates below half their last digit.

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
    """The tensor in pinned RAM, which a card copies from and to without the host's help."""
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
    step = state["step"]
    # 有融合的更新时，只剩最后不满一块的几个值
    for span in lowbit.spans(p.numel(), storage.piece, whole):
        weights = storage.read_weights(state, p, span)
        first, second = (storage.read(state, key, span, p.device) for key in ("exp_avg", "exp_avg_sq"))
        # kernel 自己把步数加一：每块都从同一个数起
        moments = ([first], [second], [step.clone()])
        kernels.adamw([weights], [_gradient(grad, span, factor)], moments, group, skip)
        storage.write(state, "exp_avg", span, first)
        storage.write(state, "exp_avg_sq", span, second)
        storage.write_weights(state, p, span, weights, skip)
    step.add_(1 if skip is None else 1 - skip)


def rows_update(
    storage: Storage, state: dict, group: dict, p: torch.Tensor, grad: torch.Tensor, *,
    skip: torch.Tensor | None = None, factor: torch.Tensor | None = None,
) -> None:
    """kernels.update_rows() on one look-up table (rows, cols)."""
    cols, step = p.size(1), state["step"]
    # 一块总是整行
    for rows in lowbit.spans(len(p), max(1, storage.piece // cols)):
        span = slice(rows.start * cols, rows.stop * cols)
        weights = storage.read_weights(state, p, span)
        gradient = _gradient(grad, span, factor).view(-1, cols)
        kernels.update_rows(weights.view(-1, cols), gradient, state[ROW_AVG_SQ][rows], step, group, skip)
        storage.write_weights(state, p, span, weights, skip)
    step.add_(1 if skip is None else 1 - skip)


def muon_direction(
    storage: Storage, state: dict, group: dict, p: torch.Tensor, grad: torch.Tensor, *,
    skip: torch.Tensor | None = None, factor: torch.Tensor | None = None,
) -> torch.Tensor:
    """Nesterov momentum (rows, cols) to be orthogonalised; bf16 on a GPU, as the products there are in bf16 anyway."""
    dtype = torch.bfloat16 if kernels.device_type(p) == "cuda" else torch.float32
    direction = torch.empty(p.shape, dtype=dtype, device=p.device)
    if storage.fused_momentum and p.numel() % BLOCK == 0 and _in_blocks(storage, state, "momentum", p):
        rest, guard = storage.number(1 - group["momentum"], p.device), _guard(storage, p.device, skip, factor)
        tables = storage.codec.tables(True, p.device)
        for span in lowbit.spans(p.numel(), _fused_piece(state["momentum"], p)):
            with _blocks_here(state, ("momentum",), span, p.device) as states:
                rows = _in_rows(direction, span), _in_rows(grad, span)
                storage.fused_momentum(*rows, *states, tables, rest, *guard)
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
    storage: Storage, state: dict, group: dict, p: torch.Tensor, update: torch.Tensor, *,
    scale: float, skip: torch.Tensor | None = None,
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


def _guard(storage: Storage, device: torch.device, skip, factor) -> tuple[torch.Tensor, torch.Tensor]:
    """skip () and factor (), each as given or as it changes nothing."""
    skip = storage.number(0.0, device) if skip is None else skip
    return skip, storage.number(1.0, device) if factor is None else factor


def _in_blocks(storage: Storage, state: dict, key: str, p: torch.Tensor) -> bool:
    """Whether a fused update knows these states: in 8 bits, no compensation beside them."""
    return key + SCALE in state and not storage.compensates(p)


def _fused_piece(state: torch.Tensor, p: torch.Tensor) -> int:
    return FUSED_PIECE if state.device == p.device else FUSED_PIECE_MOVED


def _in_rows(x: torch.Tensor, span: slice) -> torch.Tensor:
    return x.detach().reshape(-1)[span].view(-1, BLOCK)


@contextlib.contextmanager
def _blocks_here(state: dict, keys: tuple[str, ...], span: slice, device: torch.device) -> Iterator[list[torch.Tensor]]:
    """Yield codes (rows, BLOCK) and scales (rows,) of each key on `device` to be changed in place; store them after."""
    there = [part for key in keys for part in (_in_rows(state[key], span), state[key + SCALE][_blocks(span)])]
    here = [part.to(device, non_blocking=True) for part in there]
    yield here
    for a, b in zip(there, here, strict=True):
        if a.device != b.device:
            a.copy_(b, non_blocking=True)


def _fused_adamw_update(
    storage: Storage, state: dict, group: dict, p: torch.Tensor, grad: torch.Tensor, numel: int, *, skip, factor
) -> None:
    b1, b2 = group["betas"]
    values = (group["lr"], group["weight_decay"], b1, 1 - b1, b2, 1 - b2, group["eps"])
    numbers, guard = [storage.number(value, p.device) for value in values], _guard(storage, p.device, skip, factor)
    tables = (storage.codec.tables(True, p.device), storage.codec.tables(False, p.device))
    for span in lowbit.spans(numel, _fused_piece(state["exp_avg"], p)):
        with _blocks_here(state, ("exp_avg", "exp_avg_sq"), span, p.device) as states:
            rows = _in_rows(p, span), _in_rows(grad, span)
            storage.fused_adamw(*rows, *states, tables, state["step"], numbers, *guard)


def fusible_adamw(p, grad, first, first_scale, second, second_scale, tables, step, numbers, skip, factor) -> None:
    """adamw_update() on blocks, for a compiler: changes weights, codes and scales in place, unless `skip` () is 1.0.

    p, grad, first, second (n, BLOCK), scales (n,); tables: Codec.tables() signed and unsigned; step (): number of
    updates before this one; numbers: lr, weight decay, beta1, 1 - beta1, beta2, 1 - beta2, eps, each ().
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
    """muon_direction() on blocks, for a compiler; rest () is 1 - momentum."""
    g, old = grad.float() * factor, _decoded(codes, scale, tables[0])
    momentum = old + rest * (g - old)
    direction.copy_(momentum - (momentum - g) * rest)
    _encode_into(codes, scale, momentum, tables, skip > 0, signed=True)


def _decoded(codes: torch.Tensor, scale: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return values[codes.int()] * scale[:, None]


def _encode_into(
    codes: torch.Tensor, scale: torch.Tensor, x: torch.Tensor, tables: tuple, kept: torch.Tensor, *, signed: bool
) -> None:
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


class Stored:
    """Mixed in before an optimizer's class: takes over a checkpoint's states in whatever format they were saved."""

    # 什么也不省时也要它：上次用 8 位训的，这次改回 fp32，状态要能接上

    storage: Storage

    def converted(self, saved: dict[str, torch.Tensor], p: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.storage.converted(saved, p)


class Lean(Stored):
    """Mixed in before an optimizer's class: states and weights in the storage's formats, updated one by one."""

    # 逐块更新本来就要读一遍梯度：裁剪的系数顺手乘上
    takes_factor = True

    def state_dict(self) -> dict:
        if self.storage.offload and torch.cuda.is_available():
            # 拷回内存是异步的：读之前要等它到
            torch.cuda.synchronize()
        return super().state_dict()

    def start(self, state: dict[str, torch.Tensor], key: str, p: torch.Tensor) -> None:
        self.storage.start(state, key, p)

    def started(self, name: str, p: torch.Tensor, group: dict) -> dict[str, torch.Tensor]:
        state = super().started(name, p, group)
        if self.storage.compensates(p) and COMPENSATION not in state:
            self.storage.start(state, COMPENSATION, p)
        return state

    @torch.no_grad()
    def prepare(self) -> None:
        super().prepare()
        # 表的更新没有融合的写法
        for group in self.param_groups if self.storage.fused_adamw else ():
            if group["rule"] != "rows":
                self._compile_update(group)

    def _compile_update(self, group: dict) -> None:
        """Run an update that changes nothing, so that it is compiled here and not in a thread of the backward pass."""
        named = zip(group["names"], group["params"], strict=True)
        pairs = [(name, p) for name, p in named if self.storage.keeps_codes("", p)]
        if not pairs:
            return
        name, p = min(pairs, key=lambda pair: pair[1].numel())
        one = torch.ones((), device=p.device)
        before, p.grad = p.grad, torch.zeros_like(p)
        self.update_one(name, p, group, skip=one, factor=one)
        p.grad = before

    @torch.no_grad()
    def update_one(
        self, name: str, p: torch.Tensor, group: dict, *, skip: torch.Tensor, factor: torch.Tensor | None
    ) -> None:
        """Update one parameter from its gradient times `factor` (), unless `skip` () is 1.0."""
        self.update(group, [(name, p)], skip=skip, factor=factor)

    def adamw(self, group: dict, named: list[tuple[str, torch.Tensor]], *, skip=None, factor=None) -> None:
        for name, p in named:
            adamw_update(self.storage, self.started(name, p, group), group, p, p.grad, skip=skip, factor=factor)

    def rows(self, group: dict, named: list[tuple[str, torch.Tensor]], *, skip=None, factor=None) -> None:
        for name, p in named:
            rows_update(self.storage, self.started(name, p, group), group, p, p.grad, skip=skip, factor=factor)

    def muon(self, group: dict, named: list[tuple[str, torch.Tensor]], *, skip=None, factor=None) -> None:
        states = [self.started(name, p, group) for name, p in named]
        directions = [
            muon_direction(self.storage, state, group, p, p.grad, skip=skip, factor=factor)
            for (_, p), state in zip(named, states, strict=True)
        ]
        rows = [group["splits"].get(name) or [len(p)] for name, p in named]
        splits = [direction.split(sizes) for direction, sizes in zip(directions, rows, strict=True)]
        parts = [part for chunks in splits for part in chunks]
        for part, update in zip(parts, orthogonalized(parts, group), strict=True):
            # 写回原处：一份方向、一份结果之外不再有第三份
            part.copy_(update)
        for (_, p), state, update, chunks in zip(named, states, directions, splits, strict=True):
            scale = update_scale(chunks[0].shape)
            for chunk in chunks[1:]:
                if (own := update_scale(chunk.shape)) != scale:
                    chunk.mul_(own / scale)
            muon_apply(self.storage, state, group, p, update, scale=group["lr"] * scale, skip=skip)


def configure(optimizer, memory: MemoryConfig, device_type: str = "cpu") -> None:
    """Make an optimizer store its states and update as memory= asks; ConfigError if that needs one of ours."""
    wishes = {
        "memory.weights": memory.weights == "bf16", "memory.optimizer_state": memory.optimizer_state == "int8",
        "memory.offload_optimizer": memory.offload_optimizer,
        "memory.optimizer_in_backward": memory.optimizer_in_backward,
    }
    wanted = [key for key, wish in wishes.items() if wish]
    if wanted and not isinstance(optimizer, Optimizer):
        key = wanted[0]
        raise ConfigError(
            "{key}={got} works with optimizer=adamw and optimizer=muon, not with {kind}; choose one of them or leave "
            "{key} at its default",
            key=key, got=str(getattr(memory, key.split(".")[1])).lower(), kind=type(optimizer).__name__,
        )
    if not isinstance(optimizer, Optimizer):
        return
    mix_in(optimizer, Lean if wanted else Stored)
    optimizer.storage = Storage(memory, device_type)
    if not wanted and device_type == "cuda" and memory.activation_checkpointing == "none":
        optimizer.stack_bytes = STACK_BYTES_SPARE
