"""The optimizers' updates with states in 8 bits or in RAM and weights in bf16, one piece of a parameter at a time.

The arithmetic is that of nanogpt.optimizers, in float32; only what is stored between steps differs.
"""

import contextlib
import math

import torch
from torch.optim.adamw import adamw as adamw_kernel

from nanogpt import target
from nanogpt.config import MemoryConfig
from nanogpt.lowbit import BLOCK, PIECE, SMALL, Codec, round_stochastically, spans, zero_code

# 二阶矩非负，整个码表都给正数
UNSIGNED = ("exp_avg_sq",)
SCALE = "_scale"
COMPENSATION = "compensation"


class Storage:
    """Where and in which format a parameter's states and weights lie between two steps."""

    def __init__(self, memory: MemoryConfig, device_type: str = "cpu"):
        self.piece = PIECE[device_type]
        self.int8 = memory.optimizer_state == "int8"
        self.kahan = memory.bf16_rounding == "kahan"
        self.offload = memory.offload_optimizer
        self.codec = Codec()

    # ---- 状态 ----

    def place(self, tensor: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        """The tensor where states of p belong."""
        if not self._in_ram(p) or target.planned():
            return tensor.to(p.device)
        # 锁页内存：拷贝不经中转，且能与计算重叠
        return tensor.cpu().pin_memory()

    def _in_ram(self, p: torch.Tensor) -> bool:
        """Whether states of p stay in RAM while p is on a card."""
        return self.offload and target.device_type(p) == "cuda"

    def keeps_codes(self, key: str, p: torch.Tensor) -> bool:
        """Whether this state of p is stored in 8 bits."""
        return self.int8 and key != COMPENSATION and p.numel() >= SMALL

    def start(self, state: dict, key: str, p: torch.Tensor) -> None:
        """Add a state of zeros under `key`."""
        device = "cpu" if self._in_ram(p) else p.device
        with target.host_memory() if self._in_ram(p) else contextlib.nullcontext():
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
                for span in spans(p.numel(), self.piece):
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


def _blocks(span: slice) -> slice:
    return slice(span.start // BLOCK, math.ceil(span.stop / BLOCK))


def adamw_update(
    storage: Storage, state: dict, group: dict, p: torch.Tensor, grad: torch.Tensor, *,
    skip: torch.Tensor | None = None, factor: torch.Tensor | None = None,
) -> None:
    """AdamW on one parameter; `skip` () is 1.0 where nothing may change, `factor` () multiplies the gradient."""
    step = count = state["step"]
    for span in spans(p.numel(), storage.piece):
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
    step.copy_(count)


def muon_direction(
    storage: Storage, state: dict, group: dict, p: torch.Tensor, grad: torch.Tensor, *,
    skip: torch.Tensor | None = None, factor: torch.Tensor | None = None,
) -> torch.Tensor:
    """Nesterov momentum (rows, cols) to be orthogonalised, bf16 on a GPU, where the products take no more."""
    direction = torch.empty(p.shape, dtype=torch.bfloat16 if target.device_type(p) == "cuda" else torch.float32, device=p.device)
    for span in spans(p.numel(), storage.piece):
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
    for span in spans(p.numel(), storage.piece):
        old = storage.read_weights(state, p, span)
        new = old.mul(1 - group["lr"] * group["weight_decay"]).add_(update.view(-1)[span].float(), alpha=-scale)
        old.copy_(new if skip is None else torch.where(skip > 0, old, new))
        storage.write_weights(state, p, span, old, skip)


def _gradient(grad: torch.Tensor, span: slice, factor: torch.Tensor | None) -> torch.Tensor:
    piece = grad.reshape(-1)[span].float()
    return piece if factor is None else piece * factor
