"""Optimizers: AdamW and Muon over named parameters, and the learning-rate schedules.

An optimizer is anything with `param_groups`, `step`, `zero_grad`, `state_dict` and
`load_state_dict`; torch.optim's own fit as well. A group's `lr_scale` multiplies the run's rate.
"""

import math

import torch
from torch.optim.adamw import adamw as adamw_kernel

from nanogpt.base.config import MemoryConfig
from nanogpt.base.language import ConfigError
from nanogpt.core.kernels import orthogonalize
from nanogpt.core.memory.lean_optimizers import COMPENSATION, SCALE, Storage, adamw_update, muon_apply, muon_direction

# 同形状的矩阵一起正交化：小模型快数倍，大模型不为此多占显存
STACK_BYTES = 64 * 2**20
# 保留全部激活的显卡上，更新时激活都已释放：堆得多，启动得少，也不抬高峰值
STACK_BYTES_SPARE = 512 * 2**20
# AdamW 与 Muon 各自的状态
ADAMW_STATES = ("step", "exp_avg", "exp_avg_sq")


class Optimizer:
    """Base of ours: groups of named parameters, state kept by name, so that a checkpoint is readable.

    Not a torch.optim.Optimizer: its first use imports torch._dynamo, 3 s of start-up on a slow CPU.
    """

    def __init__(self, groups: list[dict]):
        # 每组：params、names、states、lr、lr_scale、weight_decay，余下由子类定义
        self.param_groups = [group for group in groups if group["params"]]
        self.state: dict[str, dict[str, torch.Tensor]] = {}
        self.storage = Storage(MemoryConfig())
        # 默认格式走融合 kernel 的整批更新，最快；其余逐块更新
        self.frugal = False
        self.stack_bytes = STACK_BYTES

    def zero_grad(self) -> None:
        """Drop all gradients."""
        # 置 None 而不是清零：省一次写，峰值显存也低
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def state_dict(self) -> dict:
        """State tensors by parameter name (not copies)."""
        if self.storage.offload and torch.cuda.is_available():
            # 拷回内存是异步的：读之前要等它到
            torch.cuda.synchronize()
        return {"state": self.state}

    def load_state_dict(self, state: dict) -> None:
        """Restore what state_dict returned, under any memory= settings, converting each tensor to the present ones."""
        by_name = {name: p for g in self.param_groups for name, p in zip(g["names"], g["params"], strict=True)}
        if set(state["state"]) - set(by_name):
            raise ValueError("optimizer: the checkpoint's state belongs to other parameters; resume with the same model and optimizer")
        for name, tensors in state["state"].items():
            for key, tensor in tensors.items():
                # 形状不对的状态要到更新时才出事，那时参数已改了一半
                if not key.endswith(SCALE) and tensor.numel() != (1 if key == "step" else by_name[name].numel()):
                    raise ValueError(f"optimizer: {key} of {name} has {tensor.numel()} values")
        self.state = {name: self.storage.converted(tensors, by_name[name]) for name, tensors in state["state"].items()}

    def started(self, name: str, p: torch.Tensor, group: dict) -> dict[str, torch.Tensor]:
        """The states of a parameter, zeros at first."""
        state = self.state.setdefault(name, {})
        for key in group["states"]:
            if key in state:
                continue
            if key == "step":
                state[key] = torch.zeros((), dtype=torch.float32, device=p.device)
            elif self.frugal:
                self.storage.start(state, key, p)
            else:
                state[key] = torch.zeros_like(p)
        if self.storage.compensates(p) and COMPENSATION not in state:
            self.storage.start(state, COMPENSATION, p)
        return state

    @torch.no_grad()
    def prepare(self) -> None:
        """Allocate every state that is not there yet, before the first step.

        Allocated one by one between the temporaries of the first update they would tear the card's memory to pieces for good.
        """
        for group in self.param_groups:
            for name, p in zip(group["names"], group["params"], strict=True):
                self.started(name, p, group)
            if self.storage.fused_adamw:
                self._compile_update(group)

    def _compile_update(self, group: dict) -> None:
        """Run an update that changes nothing: it is compiled here, and not by a thread of the first backward pass."""
        pairs = [(name, p) for name, p in zip(group["names"], group["params"], strict=True) if self.storage.keeps_codes("", p)]
        if not pairs:
            return
        name, p = min(pairs, key=lambda pair: pair[1].numel())
        one = torch.ones((), device=p.device)
        before, p.grad = p.grad, torch.zeros_like(p)
        self.update_one(name, p, group, skip=one, factor=one)
        p.grad = before

    def _present(self, group: dict) -> list[tuple[str, torch.Tensor]]:
        """(name, parameter) pairs that have a gradient."""
        return [(n, p) for n, p in zip(group["names"], group["params"], strict=True) if p.grad is not None]

    def _adamw_step(self, group: dict, present: list[tuple[str, torch.Tensor]], *, skip=None, factor=None) -> None:
        """One AdamW update (Loshchilov & Hutter, arXiv:1711.05101) of (name, parameter) pairs through torch's fused kernel."""
        if self.frugal:
            for name, p in present:
                adamw_update(self.storage, self.started(name, p, group), group, p, p.grad, skip=skip, factor=factor)
            return
        states = [self.started(name, p, group) for name, p in present]
        if states:
            # fused：一个 kernel 更新全部张量，CPU 与 CUDA 都有
            adamw_kernel(
                [p for _, p in present], [p.grad for _, p in present],
                [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], [],
                [s["step"] for s in states],
                fused=True, amsgrad=False, found_inf=skip, beta1=group["betas"][0], beta2=group["betas"][1],
                lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
            )

    @torch.no_grad()
    def update_one(self, name: str, p: torch.Tensor, group: dict, *, skip: torch.Tensor, factor: torch.Tensor | None) -> None:
        """Update one parameter from its gradient times `factor` (), unless `skip` () is 1.0."""
        group["update"](group, [(name, p)], skip=skip, factor=factor)

    @torch.no_grad()
    def step(self, *, skip: torch.Tensor | None = None, factor: torch.Tensor | None = None) -> None:
        """Update every parameter that has a gradient.

        skip () is 1.0 where nothing may change, in weights or states; only where `frugal`, factor () multiplies the gradients.
        """
        for group in self.param_groups:
            group["update"](group, self._present(group), skip=skip, factor=factor)


class Muon(Optimizer):
    """Muon for matrices (Jordan 2024; scaled as in Moonlight, arXiv:2502.16982), AdamW for the rest.

    The update is orthogonalised Nesterov momentum times 0.2 * sqrt(max(rows, cols)), whose RMS is
    that of an AdamW update, so one learning rate serves both.
    """

    def _muon_step(self, group: dict, present: list[tuple[str, torch.Tensor]], *, skip=None, factor=None) -> None:
        for portion in portions(present, self.stack_bytes):
            if self.frugal:
                self._frugal_muon(group, portion, skip=skip, factor=factor)
            else:
                self._plain_muon(group, portion, skip=skip)

    def _plain_muon(self, group: dict, named: list[tuple[str, torch.Tensor]], *, skip=None) -> None:
        momenta = [self.started(name, p, group)["momentum"] for name, p in named]
        gradients = [p.grad for _, p in named]
        if skip is not None:
            # 坏的一步：拿动量当梯度，动量就一位不动，方向也仍是有限数；梯度用完就丢，写在原处
            for momentum, gradient in zip(momenta, gradients, strict=True):
                torch.where(skip > 0, momentum, gradient, out=gradient)
        # foreach：显卡上几十个矩阵一次启动；CPU 上就是逐个做
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        # Nesterov：向前多看一步
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])
        splits = [group["splits"].get(name, 1) for name, _ in named]
        directions = [part for direction, n in zip(ahead, splits, strict=True) for part in direction.chunk(n)]
        weights = [part for (_, p), n in zip(named, splits, strict=True) for part in p.detach().chunk(n)]
        del ahead, gradients
        updates = orthogonalized(directions, group["ns_steps"])
        del directions
        kept = 1 - group["lr"] * group["weight_decay"]
        if skip is not None:
            for update in updates:
                update.masked_fill_(skip > 0, 0.0)
            kept = torch.where(skip > 0, 1.0, kept)
        torch._foreach_mul_(weights, kept)
        by_scale: dict[float, list[int]] = {}
        for i, part in enumerate(weights):
            by_scale.setdefault(group["lr"] * update_scale(part.shape), []).append(i)
        for scale, indices in by_scale.items():
            torch._foreach_add_([weights[i] for i in indices], [updates[i] for i in indices], alpha=-scale)

    def _frugal_muon(self, group: dict, named: list[tuple[str, torch.Tensor]], skip=None, factor=None) -> None:
        states = [self.started(name, p, group) for name, p in named]
        directions = [
            muon_direction(self.storage, state, group, p, p.grad, skip=skip, factor=factor) for (_, p), state in zip(named, states, strict=True)
        ]
        splits = [d.chunk(group["splits"].get(name, 1)) for (name, _), d in zip(named, directions, strict=True)]
        parts = [part for chunks in splits for part in chunks]
        for part, update in zip(parts, orthogonalized(parts, group["ns_steps"]), strict=True):
            # 写回原处：一份方向、一份结果之外不再有第三份
            part.copy_(update)
        for (_, p), state, update, chunks in zip(named, states, directions, splits, strict=True):
            muon_apply(self.storage, state, group, p, update, scale=group["lr"] * update_scale(chunks[0].shape), skip=skip)


def portions(named: list[tuple[str, torch.Tensor]], most_bytes: int) -> list[list[tuple[str, torch.Tensor]]]:
    """The pairs in order, in lists of at most most_bytes of float32 matrices, but at least one."""
    lists, size = [], most_bytes
    for name, p in named:
        if size + 4 * p.numel() > most_bytes:
            lists.append([])
            size = 0
        lists[-1].append((name, p))
        size += 4 * p.numel()
    return lists


def orthogonalized(matrices: list[torch.Tensor], steps: int) -> list[torch.Tensor]:
    """Each matrix (rows, cols) with its singular values pushed towards 1; those of one shape are batched."""
    by_shape: dict[tuple, list[int]] = {}
    for i, matrix in enumerate(matrices):
        # qkv 三块各自正交化，合在一起会互相牵制
        by_shape.setdefault(tuple(matrix.shape), []).append(i)
    results: list[torch.Tensor] = list(matrices)
    for indices in by_shape.values():
        # 同形状的矩阵堆在一起做批量乘法，小模型上快数倍
        batch = torch.stack([matrices[i] for i in indices]) if len(indices) > 1 else matrices[indices[0]][None]
        for i, update in zip(indices, orthogonalize(batch, steps), strict=True):
            results[i] = update
    return results


def update_scale(shape: torch.Size) -> float:
    """What an orthogonal matrix is multiplied with to have the RMS of an AdamW update."""
    return 0.2 * math.sqrt(max(shape))


def split_parameters(model: torch.nn.Module) -> tuple[list, list, list]:
    """Return (matrices inside blocks, embeddings and head, vectors), each a list of (name, parameter)."""
    matrices, tables, vectors = [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.dim() < 2:
            vectors.append((name, p))
        elif p.dim() == 2 and name.startswith("h."):
            matrices.append((name, p))
        else:
            tables.append((name, p))
    return matrices, tables, vectors


def _group(named: list, **settings) -> dict:
    return {"names": [n for n, _ in named], "params": [p for _, p in named], "lr": 0.0, **settings}


def _check(key: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"optimizer.{key}={value} is out of range; choose a value from {low:g} to {high:g}")


def adamw(model: torch.nn.Module, *, weight_decay: float, beta1: float, beta2: float, eps: float) -> Optimizer:
    """AdamW on everything; only matrices and embeddings are decayed."""
    for key, value in {"beta1": beta1, "beta2": beta2}.items():
        _check(key, value, 0, 0.99999)
    _check("weight_decay", weight_decay, 0, 10)
    _check("eps", eps, 0, 1)
    matrices, tables, vectors = split_parameters(model)
    optimizer = Optimizer([])
    shared = {"betas": (beta1, beta2), "eps": eps, "lr_scale": 1.0, "states": ADAMW_STATES, "update": optimizer._adamw_step}
    # bias 与归一化的增益不衰减：它们不参与矩阵乘，缩小没有正则意义
    groups = [_group(matrices + tables, weight_decay=weight_decay, **shared), _group(vectors, weight_decay=0.0, **shared)]
    optimizer.param_groups = [g for g in groups if g["params"]]
    return optimizer


def muon(
    model: torch.nn.Module, *, weight_decay: float, momentum: float, ns_steps: int,
    embedding_lr_scale: float, head_lr_scale: float, ngram_lr_scale: float, beta1: float, beta2: float, eps: float,
) -> Optimizer:
    """Muon on the blocks' matrices, AdamW without decay on embeddings, head and vectors."""
    for key, value in {"beta1": beta1, "beta2": beta2, "momentum": momentum}.items():
        _check(key, value, 0, 0.99999)
    _check("weight_decay", weight_decay, 0, 10)
    _check("ns_steps", ns_steps, 1, 20)
    _check("eps", eps, 0, 1)
    for key, value in {"embedding_lr_scale": embedding_lr_scale, "head_lr_scale": head_lr_scale, "ngram_lr_scale": ngram_lr_scale}.items():
        _check(key, value, 0, 1e6)
    matrices, tables, vectors = split_parameters(model)
    optimizer = Muon([])
    shared = {"betas": (beta1, beta2), "eps": eps, "weight_decay": 0.0, "states": ADAMW_STATES, "update": optimizer._adamw_step}
    head = [(n, p) for n, p in tables if n.startswith("lm_head")]
    ngrams = [(n, p) for n, p in tables if n.startswith("ngrams")]
    embeddings = [(n, p) for n, p in tables if not n.startswith(("lm_head", "ngrams"))]
    groups = [
        _group(
            matrices, states=("momentum",), lr_scale=1.0, weight_decay=weight_decay, momentum=momentum, ns_steps=ns_steps,
            splits={n: 3 for n, _ in matrices if n.endswith("attn.c_attn.weight")}, update=optimizer._muon_step,
        ),
        # 每步只有少数行有梯度，查表参数要更大的步长
        _group(embeddings, lr_scale=embedding_lr_scale, **shared),
        _group(ngrams, lr_scale=ngram_lr_scale, **shared),
        _group(head, lr_scale=head_lr_scale, **shared),
        _group(vectors, lr_scale=1.0, **shared),
    ]
    optimizer.param_groups = [g for g in groups if g["params"]]
    return optimizer


def configure(optimizer, memory: MemoryConfig, device_type: str = "cpu") -> None:
    """Make an optimizer store its states and update as memory= says; ConfigError where it is not one of ours."""
    wishes = {
        "memory.weights": memory.weights == "bf16", "memory.optimizer_state": memory.optimizer_state == "int8",
        "memory.offload_optimizer": memory.offload_optimizer, "memory.optimizer_in_backward": memory.optimizer_in_backward,
    }
    wanted = [key for key, wish in wishes.items() if wish]
    if wanted and not isinstance(optimizer, Optimizer):
        key = wanted[0]
        raise ConfigError(
            "{key}={got} works with optimizer=adamw and optimizer=muon, not with {kind}; choose one of them or leave "
            "{key} at its default",
            key=key, got=str(getattr(memory, key.split(".")[1])).lower(), kind=type(optimizer).__name__,
        )
    if wanted:
        optimizer.storage = Storage(memory, device_type)
        optimizer.frugal = True
    elif device_type == "cuda" and memory.activation_checkpointing == "none":
        optimizer.stack_bytes = STACK_BYTES_SPARE


def learning_rate_at(iteration: int, schedule) -> float:
    """Learning rate of a 0-based iteration under a ScheduleConfig-like object."""
    s = schedule
    if iteration < s.warmup_iters:
        # 从 1 而不是 0 起步，第一步不白跑；nanoGPT 除以 warmup_iters + 1，改成那样，旧的训练接着跑就不再逐位一致
        return s.learning_rate * (iteration + 1) / s.warmup_iters
    if s.lr_schedule == "constant":
        return s.learning_rate
    end = s.lr_decay_iters
    # wsd：平台期之后只在最后一段下降，中途的 checkpoint 可以接着训
    start = s.warmup_iters if s.lr_schedule in ("cosine", "linear") else max(s.warmup_iters, round(end * (1 - s.decay_fraction)))
    if iteration >= end:
        return s.min_lr
    if iteration < start:
        return s.learning_rate
    progress = (iteration - start) / max(1, end - start)
    weight = 0.5 * (1 + math.cos(math.pi * progress)) if s.lr_schedule == "cosine" else 1 - progress
    return s.min_lr + weight * (s.learning_rate - s.min_lr)
