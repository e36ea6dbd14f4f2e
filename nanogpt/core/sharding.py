# parallel=fsdp：参数、梯度与优化器状态按行分给各个进程，用到一个 block 时才把它的参数凑齐，用完就放
# 凑齐与求和是 torch 的 fully_shard；这里把它接到训练步、优化器与 checkpoint 上，核心与它们各自的公式都不知道
# 优化器拿到的是自己那几行的普通张量（DTensor 的 local）：AdamW 逐元素，照旧；Muon 要整个矩阵，由 exchanged 凑齐
# checkpoint 仍是一个进程的格式：存时第一个进程一个张量一个张量地要（fetching、serve），读时各取自己的行
# 每次前向、反向都在通信，各进程必须同步：一个显存不足，谁也不能单独重做，训练就此结束，从 checkpoint 接着
"""Parameters, gradients and optimizer states in shards: of each tensor every process holds some rows.

Gathering and summing is torch's fully_shard (FSDP2; Zhao et al., arXiv:2304.11277). Optimizers see their own rows as
plain tensors; Muon's matrices come together for the iteration, each in one process, and go back. Checkpoints are those
of one process: the first process fetches whole tensors, one at a time.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from nanogpt.base.config import ParallelConfig
from nanogpt.base.errors import not_divisible
from nanogpt.base.language import ConfigError
from nanogpt.core import distributed
from nanogpt.core.kernels import orthogonalized, portions, update_scale
from nanogpt.core.wrapping import mix_in


def applies(parallel: ParallelConfig) -> bool:
    """Whether this training is sharded: with one process there is nothing to share."""
    return parallel.mode == "fsdp" and distributed.world() > 1


def rows_of(length: int, rank: int) -> slice:
    """Which of `length` rows process `rank` holds: equal shares, the last ones may be smaller or empty."""
    # 与 torch.chunk 同样的分法
    each = -(-length // distributed.world())
    return slice(min(length, rank * each), min(length, (rank + 1) * each))


# ---- 整个张量 ----


@dataclass(frozen=True, eq=False)
class Sharded:
    """What stands for a tensor of which this process holds some rows; the first one can fetch() the others."""

    # 有张量的几样外表，写 checkpoint 的一方不必分辨；通信只在 fetch 里
    name: str
    local: torch.Tensor
    rows: int
    """Of the whole tensor."""

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.rows, *self.local.shape[1:]))

    @property
    def dtype(self) -> torch.dtype:
        return self.local.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.local.element_size()

    def __len__(self) -> int:
        return self.rows

    def numel(self) -> int:
        return math.prod(self.shape)

    def dim(self) -> int:
        return self.local.dim()

    def element_size(self) -> int:
        return self.local.element_size()

    def data_ptr(self) -> int:
        return self.local.data_ptr()

    def detach(self) -> "Sharded":
        return self

    def fetch(self, *, filled: bool = False) -> torch.Tensor:
        """The whole tensor; with `filled` which of its rows have a bit set, (rows,) bool.

        Only in the first process inside fetching(), while the others serve().
        """
        distributed.broadcast((self.name, filled))
        return self.gathered(filled=filled)

    def gathered(self, *, filled: bool) -> torch.Tensor:
        """What fetch() asked for, in the first process; all must call this."""
        local = self.local.view(torch.uint8).any(dim=1).to(torch.uint8) if filled else self.local
        each = -(-self.rows // distributed.world())
        mine = local.new_zeros((each, *local.shape[1:]))
        mine[: len(local)] = local
        first = distributed.rank() == 0
        whole = local.new_empty((each * distributed.world(), *local.shape[1:])) if first else mine
        with distributed.waiting():
            dist.gather(mine, list(whole.split(each)) if first else None, dst=0)
        return whole[: self.rows].bool() if filled else whole[: self.rows]


@contextlib.contextmanager
def fetching(*states: dict) -> Iterator[bool]:
    """Let the first process fetch() what is Sharded in nested `states`; the others wait here until it is done.

    Yields whether this is the first one.
    """
    known = {tensor.name: tensor for state in states for tensor in _sharded_in(state)}
    if distributed.rank():
        # 第一个进程写盘写到一半出错也会来说一声：谁也不会永远等着
        while known and (asked := distributed.broadcast(None)) is not None:
            known[asked[0]].gathered(filled=asked[1])
        yield False
        return
    try:
        yield True
    finally:
        if known and not distributed.lost():
            distributed.broadcast(None)


def _sharded_in(value) -> Iterator[Sharded]:
    if isinstance(value, Sharded):
        yield value
    for inside in value.values() if isinstance(value, dict) else ():
        yield from _sharded_in(inside)


def whole_shape(optimizer, name: str, p: torch.Tensor) -> torch.Size:
    """The shape of a parameter of which p is what this process has."""
    return optimizer.shapes[name] if isinstance(optimizer, ShardedOptimizer) else p.shape


# ---- 模型 ----


class ShardedModel:
    """Mixed in before a model's class: loss() in step with the other processes, weights in and out as whole tensors."""

    # 评估时各进程的批数可以差一个：数着，少的一方补上（ShardedGradients.evaluated）
    evaluations = 0

    def loss(self, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.evaluations += not torch.is_grad_enabled()
        with _in_step("forward" if torch.is_grad_enabled() else "evaluation", len(idx)):
            return self.gathered_loss(idx, targets)

    def gathered_loss(self, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """loss() with the parameters that it takes gathered."""
        return super().loss(idx, targets)

    def state_dict(self, *given, **named) -> dict:
        state = super().state_dict(*given, **named)
        return {name: Sharded(name, t.to_local(), len(t)) if hasattr(t, "to_local") else t for name, t in state.items()}

    def load_state_dict(self, state_dict: dict, *given, **named):
        own = super().state_dict()
        return super().load_state_dict({n: _cut(t, own.get(n)) for n, t in state_dict.items()}, *given, **named)


def _cut(whole: torch.Tensor, own: torch.Tensor | None) -> torch.Tensor:
    """The rows of a whole tensor that belong here, in the form of the model's `own` one."""
    if not hasattr(own, "to_local"):
        return whole
    if whole.shape != own.shape:
        raise ValueError(f"{list(whole.shape)} instead of {list(own.shape)}")
    from torch.distributed.tensor import DTensor

    rows = whole[rows_of(len(whole), distributed.rank())].to(own.device)
    return DTensor.from_local(
        rows, own.device_mesh, own.placements, run_check=False, shape=own.shape, stride=own.stride()
    )


@contextlib.contextmanager
def _in_step(phase: str, rows: int) -> Iterator[None]:
    """Around what every process has to do alike: one that runs out of memory cannot repeat it by itself."""
    with distributed.waiting(), not_divisible(phase, rows=rows, line="oom_sharded"):
        yield


def mesh_on(device_type: str):
    """All processes in a row."""
    # 载入要近一秒：不分片的训练不必等
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device_type, (distributed.world(),))


def shard(model: torch.nn.Module, device_type: str) -> None:
    """Leave every process its rows of the model's parameters, on its device."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    from nanogpt.core.model import GPT

    if not isinstance(model, GPT):
        raise ConfigError("not_sharded", key=f"model._target_={type(model).__module__}.{type(model).__qualname__}")
    mesh = mesh_on(device_type)
    # 输出层与共享它权重的 embedding 留在根上：损失直接读它的权重；使用者自己的 embed 也可能直接读
    tables = [*model.ngrams, *([] if model.lm_head.weight is model.wte.weight else [model.wte])]
    tables = tables if type(model).embed is GPT.embed else []
    for part in (*tables, *model.h):
        fully_shard(part, mesh=mesh)
    for table in tables:
        # 查表的反向用不到表
        table.set_unshard_in_backward(False)
    mix_in(model, ShardedModel)
    # 反向从输出层开始：前向之后不必放掉又凑齐
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(model, "gathered_loss")


# ---- 训练步 ----


class ShardedStep:
    """Mixed in before Step: its parameters are this process's rows, as plain tensors."""

    # 梯度到齐之后由 ShardedGradients.finish 放到这些张量上，裁剪与更新照旧
    passes = 0

    def micro_batch(self, x: torch.Tensor, y: torch.Tensor, share: float) -> torch.Tensor:
        self.passes += 1
        with _in_step("forward", len(x)):
            return super().micro_batch(x, y, share)

    def backward(self, loss: torch.Tensor) -> None:
        # fully_shard 取各进程的平均，这里要的是和
        super().backward(loss * distributed.world())

    def gradient_norm(self) -> torch.Tensor:
        scaler = self.precision.scaler
        if scaler.is_enabled():
            # 溢出只有一个进程看得见：大家的 loss scale 要一起降
            for found in scaler._found_inf_per_device(self.optimizer).values():
                distributed.total(found)
        # 平方和在 float64 里不会溢出
        return distributed.total(super().gradient_norm().double().square()).sqrt().float()

    def drop_gradients(self) -> None:
        super().drop_gradients()
        for p in self.model.parameters():
            p.grad = None


class ShardedGradients:
    """Stands for distributed.GradientSum: gradients arrive summed, each process has those of its rows."""

    # fully_shard 在反向里一个 block 一个 block 地求和（reduce-scatter）；这里只说何时求，与求完放到哪里

    def __init__(self, step, *, passes: int, every: bool):
        """passes: micro-batches of a step in the process with the most.

        every: sum in each of them, so that no whole gradients are kept between them.
        """
        self.step, self.model, self.passes, self.every = step, step.model, passes, every
        self.token = torch.zeros((1, 1), dtype=torch.long, device=step.parameters[0].device)
        self.model.set_requires_gradient_sync(every)

    def begin(self) -> None:
        """The next backward pass is the last one of this step."""
        while self.step.passes < self.passes - 1:
            # 行数少一条的进程可能少一个微批：补一个不算数的，大家才凑得齐参数
            self.step.micro_batch(self.token, self.token, 0.0)
        self.model.set_requires_gradient_sync(True)

    def finish(self, *, failed: bool) -> None:
        """Hand the gradients to the step's parameters."""
        assert not failed, "running out of memory ends a sharded training"
        rows = local_rows(self.model)
        for name, p in self.model.named_parameters():
            rows[name].grad, p.grad = None if p.grad is None else p.grad.to_local(), None
        hand_over(self.step, rows)
        self.step.passes = 0
        self.model.set_requires_gradient_sync(self.every)

    def evaluated(self, sums: torch.Tensor, windows: list[tuple[int, int]], batch: int) -> torch.Tensor:
        """Sum over all processes, behind as many forward passes as the process with the most batches has."""
        world = distributed.world()
        shares = [Counter(length for _, length in windows[rank::world]) for rank in range(world)]
        most = max(sum(-(-count // batch) for count in share.values()) for share in shares)
        while self.model.evaluations < most:
            self.model.loss(self.token, self.token)
        self.model.evaluations = 0
        return distributed.total(sums)


def weights_of(model: torch.nn.Module) -> list[torch.Tensor]:
    """The model's parameters; of one that is sharded what lies in this process."""
    return list(local_rows(model).values()) if isinstance(model, ShardedModel) else list(model.parameters())


def units_of(model: torch.nn.Module) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """(all, trained) parameters of each part that is gathered as a whole, as the backward pass has their gradients."""
    inside = [list(block.parameters()) for block in reversed(model.h)]
    known = {id(p) for part in inside for p in part}
    # 根与各张表到最后才求和
    parts = [*inside, [p for p in model.parameters() if id(p) not in known]]
    return [(part, [p for p in part if p.requires_grad]) for part in parts]


def local_rows(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """This process's rows of every parameter, as plain tensors in the same memory."""
    return {name: p.detach().to_local() for name, p in model.named_parameters()}


def hand_over(step, rows: dict[str, torch.Tensor]) -> None:
    """Make these the parameters of a step and its optimizer."""
    # 每步都换：有的版本在第一次前向、装入权重之后，会把分片挪到别处
    step.parameters[:] = [rows[name] for name, p in step.model.named_parameters() if p.requires_grad]
    for group in step.optimizer.param_groups:
        group["params"] = [rows[name] for name in group["names"]]


def shard_step(step, *, passes: int, every: bool) -> None:
    """Make a step of a model that shard() has cut train its rows alone; the rest: see ShardedGradients."""
    mix_in(step, ShardedStep)
    mix_in(step.optimizer, ShardedOptimizer)
    step.optimizer.shapes = {name: p.shape for name, p in step.model.named_parameters()}
    hand_over(step, local_rows(step.model))
    step.sums = ShardedGradients(step, passes=passes, every=every)


# ---- 优化器 ----


class ShardedOptimizer:
    """Mixed in before an optimizer's class: its parameters are rows, its checkpoints whole tensors."""

    # 状态与参数同形：各取自己的行；步数是标量，处处相同

    shapes: dict[str, torch.Size]
    """Of the whole parameters."""

    def state_dict(self) -> dict:
        def whole(name: str, key: str, tensor: torch.Tensor):
            return tensor if tensor.dim() == 0 else Sharded(f"{name}/{key}", tensor, self.shapes[name][0])

        state = super().state_dict()["state"]
        return {"state": {n: {key: whole(n, key, t) for key, t in tensors.items()} for n, tensors in state.items()}}

    def load_state_dict(self, state: dict) -> None:
        cut = {}
        for name, tensors in state["state"].items():
            # 换一种格式（8 位）存下的，先整个换回来
            whole = self.converted(tensors, torch.empty(self.shapes[name])) if name in self.shapes else tensors
            if any(t.dim() and t.shape not in (self.shapes.get(name), (len(t), 1)) for t in whole.values()):
                raise ValueError(f"optimizer: the states of {name} have other shapes")
            cut[name] = {
                key: t[rows_of(len(t), distributed.rank())].clone() if t.dim() else t for key, t in whole.items()
            }
        super().load_state_dict({"state": cut})

    def update(self, group: dict, named: list[tuple[str, torch.Tensor]], *, skip=None, factor=None) -> None:
        if group["rule"] != "muon":
            super().update(group, named, skip=skip, factor=factor)
            return
        rows, shapes = dict(named), [(name, self.shapes[name]) for name, _ in named]
        # 按整个矩阵分批，各进程才分得一样；每批够大家各做一份
        for portion in portions(shapes, distributed.world() * self.stack_bytes):
            self.muon(group, [(name, rows[name]) for name, _ in portion], skip=skip, factor=factor)

    def directions(self, group: dict, named: list, ahead: list[torch.Tensor]) -> tuple[list, list, list]:
        shapes = [self.shapes[name] for name, _ in named]
        splits = [group["splits"].get(name) or [shape[0]] for (name, _), shape in zip(named, shapes, strict=True)]
        return [p.detach() for _, p in named], exchanged(ahead, shapes, splits, group), [1.0] * len(named)


def exchanged(
    ahead: list[torch.Tensor], shapes: list[torch.Size], splits: list[list[int]], group: dict,
) -> list[torch.Tensor]:
    """This process's rows of the scaled updates of matrices of which `ahead` are its rows of the directions.

    Each matrix comes together in one process; splits: the rows of the matrices joined in it.
    """
    world, rank = distributed.world(), distributed.rank()
    owners = owners_of(shapes, world)
    # 按主人排好：发给同一个进程的挨在一起
    order = sorted(range(len(shapes)), key=lambda i: owners[i])
    mine = [i for i in order if owners[i] == rank]

    def count(i: int, holder: int) -> int:
        rows = rows_of(shapes[i][0], holder)
        return (rows.stop - rows.start) * shapes[i][1]

    sent = [sum(count(i, rank) for i in order if owners[i] == owner) for owner in range(world)]
    received = [sum(count(i, holder) for i in mine) for holder in range(world)]
    arrived = _all_to_all(torch.cat([ahead[i].flatten() for i in order]), sent, received)
    pieces = arrived.split([count(i, holder) for holder in range(world) for i in mine])
    whole = [torch.cat(pieces[n :: len(mine)]).view(shapes[i]) for n, i in enumerate(mine)]
    del arrived, pieces
    parts = [part for i, matrix in zip(mine, whole, strict=True) for part in matrix.split(splits[i])]
    for part, update in zip(parts, orthogonalized(parts, group), strict=True):
        part.copy_(update).mul_(update_scale(part.shape))
    back = [m[rows_of(len(m), holder)].flatten() for holder in range(world) for m in whole]
    returned = _all_to_all(torch.cat(back) if back else ahead[0].new_empty(0), received, sent)
    rows = dict(zip(order, returned.split([count(i, rank) for i in order]), strict=True))
    return [rows[i].view_as(ahead[i]) for i in range(len(ahead))]


def owners_of(shapes: list[torch.Size], world: int) -> list[int]:
    """Which process iterates each matrix, so that all have about the same work."""
    # 最重的先分，每次给活最少的：一次迭代的 FLOPs 与 元素数 × 短边 成正比
    work, owners = [0] * world, [0] * len(shapes)
    for i in sorted(range(len(shapes)), key=lambda i: -shapes[i].numel() * min(shapes[i])):
        owners[i] = work.index(min(work))
        work[owners[i]] += shapes[i].numel() * min(shapes[i])
    return owners


def _all_to_all(flat: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
    """What the other processes have sent here while `sent` values of flat went to each of them."""
    into = flat.new_empty(sum(received))
    with distributed.waiting():
        dist.all_to_all_single(into, flat, received, sent)
    return into
