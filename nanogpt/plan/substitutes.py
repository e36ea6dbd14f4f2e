"""Stand-ins for the few parts of a training step that ask for a device or a value, used while it is traced."""

# 追踪时的替身：训练步里凡是问设备、问数值、搬内存的几个小函数，在这里换掉
# 追踪用的是没有存储的张量，它们自称在 CPU 上，也没有值，而规划的往往是一张卡
# 训练那边不知道有规划这回事：substituted() 里的一张表就是全部的替换，出来时原样放回

import contextlib
import importlib
from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import is_fake
from torch.overrides import TorchFunctionMode

from nanogpt.base.language import ConfigError
from nanogpt.core import distributed, kernels, sharding
from nanogpt.core.machine import TORCH
from nanogpt.core.memory import lean_optimizers, lowbit
from nanogpt.core.precision import DTYPES, RoundedProducts, cpu_units
from nanogpt.plan.tracker import Tracker
from nanogpt.weights import build

# CUDA 的 autocast 提到 fp32 算、CPU 的不提的运算（torch 文档 “Autocast Op Reference”）
FLOAT32_ON_CUDA = (
    F.layer_norm, F.softmax, F.log_softmax, torch.softmax, torch.log_softmax, torch.Tensor.softmax, F.cross_entropy,
    F.nll_loss,
)
# 假张量从这一版起才认得带 out_dtype 的 addmm
ADDMM_IS_TRACED = TORCH >= (2, 13)
# 对称的 scale：只有形状和类型要紧
SCALE = 1.0


def dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """CUDA's dropout: one byte per element is kept for the backward pass."""
    # CPU 的那个留一份与输入同样大的：量过，124M、fp32、12 行时规划因此多算 7%
    return torch.native_dropout(x, p, True)[0] if training and p else x


class LikeCuda(TorchFunctionMode):
    """Makes CPU autocast allocate as CUDA's does, and lets tensors say that they are on a card."""

    # 假张量在 CPU 上：不换的话，autocast 走 CPU 的规则，算出的临时张量大小就不是显卡上的

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func == torch.Tensor.is_cuda.__get__:
            return True
        if func is F.scaled_dot_product_attention and kwargs.get("dropout_p"):
            # CUDA 的 flash 自己做 dropout，不存概率矩阵；CPU 的会退回到存
            kwargs = {**kwargs, "dropout_p": 0.0}
        if func is F.dropout:
            return dropout(*args, **kwargs)
        if func in FLOAT32_ON_CUDA and torch.is_autocast_enabled("cpu"):
            args = tuple(a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)
        return func(*args, **kwargs)


class TracedScaler:
    """The allocations of torch.amp.GradScaler, without looking at any value."""

    # 真的 GradScaler 要读 Inf 的计数：假张量没有值，读就出错

    def __init__(self, enabled: bool):
        self.enabled = enabled

    def is_enabled(self) -> bool:
        """Whether the loss is scaled."""
        return self.enabled

    def _found_inf_per_device(self, optimizer) -> dict:
        return {}

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss times a scalar of the device."""
        return loss * torch.ones((), dtype=loss.dtype) if self.enabled else loss

    def unscale_(self, optimizer) -> None:
        """Every gradient times a scalar, in place."""
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(SCALE)


class PlannedPrecision:
    """nanogpt.core.precision.Precision of a device that need not be there.

    dtype=auto is what cpu_bf16 says on a CPU, else what `automatic` says.
    """

    # 真的 Precision 要问那张卡支持什么；这里只按写明的来，卡可以不在

    def __init__(self, config, device_type: str, weights: str = "fp32", automatic: str = "bf16"):
        units = cpu_units(config, device_type)
        automatic = "bf16" if units == "all" else "fp32" if device_type == "cpu" else automatic
        name = "bf16" if weights == "bf16" else config.dtype if config.dtype != "auto" else automatic
        self.name = name
        self.dtype = DTYPES[name]
        self.weights = DTYPES[weights]
        self.device_type = device_type
        self.native = units == "all" and name == "bf16"
        self.rounded = device_type == "cpu" and name != "fp32" and not self.native
        self.bf16_updates = units != "none"
        self.half = name != "fp32" and not self.rounded
        # 与舍入一样是函数模式：反向里重算时要自己再进一次
        self.again = self.context if self.rounded or device_type == "cuda" else None
        self.scaler = TracedScaler(name == "fp16")

    @contextlib.contextmanager
    def context(self):
        """Wrap the forward pass."""
        with contextlib.ExitStack() as stack:
            if self.rounded:
                stack.enter_context(RoundedProducts(self.dtype, narrow=self.weights == self.dtype))
            if self.device_type == "cuda":
                stack.enter_context(LikeCuda())
            if self.native or (self.device_type == "cuda" and self.weights != self.dtype):
                stack.enter_context(torch.autocast("cpu", dtype=self.dtype))
            yield

    def backward_context(self):
        """Wrap the backward pass, so that what is computed again takes the card's path."""
        return LikeCuda() if self.device_type == "cuda" else contextlib.nullcontext()


class FusedRMSNorm(torch.autograd.Function):
    """Allocates and saves what the CUDA kernel behind F.rms_norm does (torch >= 2.9).

    That is its input and one float32 per row, and a gain's sums.
    """

    # CPU 上 F.rms_norm 是一串小运算，存下的多得多：照它追踪，显存就估大了

    @staticmethod
    def forward(ctx, x, gain, eps):
        # kernel 只认连续的输入；q、k 是切片，会临时抄一份
        r = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        y = torch.mul(x.contiguous(), 1.0)
        ctx.save_for_backward(x, r, gain)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, _, gain = ctx.saved_tensors
        of_gain = None if gain is None else torch.empty_like(gain)
        return torch.mul(grad.contiguous(), x.contiguous()), of_gain, None


@contextlib.contextmanager
def substituted(device_type: str, tracker: Tracker | None = None) -> Iterator[None]:
    """Let the training step compute as on a device of this type.

    What lies in RAM and what counts several times is told to `tracker`.
    """

    def counted_spans(numel: int, piece: int, first: int = 0) -> Iterator[slice]:
        # 大小相同的几块只追踪第一块
        pieces = list(spans(numel, piece, first))
        if len(pieces) > 2:
            tracker.times *= len(pieces) - 1
            yield pieces[0]
            tracker.times //= len(pieces) - 1
            del pieces[:-1]
        yield from pieces

    def start_apart(storage, state: dict, key: str, p: torch.Tensor) -> None:
        before, tracker.in_ram = tracker.in_ram, storage.in_ram(p)
        try:
            start(storage, state, key, p)
        finally:
            tracker.in_ram = before

    def once(update, where: dict, tensors: tuple[torch.Tensor, ...], state: dict, *about) -> None:
        # 形状相同的参数，更新时做的事一模一样：只追踪第一个
        kinds = tuple((x.shape, x.stride(), x.dtype) for x in (*tensors, *state.values()))
        tracker.repeated((update.func, id(where), kinds, tuple(state), *about), update)

    def adamw(storage, state: dict, group: dict, p: torch.Tensor, grad: torch.Tensor, **how) -> None:
        once(partial(adamw_update, storage, state, group, p, grad, **how), group, (p, grad), state)

    def muon(storage, state: dict, group: dict, p: torch.Tensor, update: torch.Tensor, **how) -> None:
        once(partial(muon_apply, storage, state, group, p, update, **how), group, (p, update), state)

    def one(optimizer, name: str, p: torch.Tensor, group: dict, **how) -> None:
        update, state = partial(update_one, optimizer, name, p, group, **how), optimizer.state.get(p, {})
        once(update, group, (p, p.grad), state, tuple(group.get("splits", {}).get(name, ())))

    def chunks(work, total: int, rows: int) -> None:
        # 一样大的块，做的事一模一样，做完什么也不留：16 MiB 一块时，这里占过追踪的大半
        call = object()
        for start in range(0, total, rows):
            tracker.repeated((call, min(rows, total - start)), partial(work, start))

    adamw_update, muon_apply = lean_optimizers.adamw_update, lean_optimizers.muon_apply
    update_one = lean_optimizers.Lean.update_one
    spans, start, sums = lowbit.spans, lean_optimizers.Storage.start, kernels.sums_in_product
    table = [
        (kernels, "device_type", lambda x: device_type),
        (kernels, "fused_rms_norm", FusedRMSNorm.apply),
        # 测试也拿真的张量来算：那时照实
        (kernels, "sums_in_product", lambda total: ADDMM_IS_TRACED if is_fake(total) else sums(total)),
        # 没有跟踪器的是测试，算的是真的张量：每一块都要
        (kernels, "chunk_by_chunk", chunks if tracker else kernels.chunk_by_chunk),
        (lowbit, "spans", counted_spans),
        (lean_optimizers, "pinned", lambda tensor: tensor),
        (lean_optimizers.Storage, "start", start_apart),
        (lean_optimizers, "adamw_update", adamw),
        (lean_optimizers, "muon_apply", muon),
        (lean_optimizers.Lean, "update_one", one),
        # 没有存储的模型再大也放得下
        (build, "check_memory_for", lambda *_: None),
    ]
    with replaced(table):
        yield


@contextlib.contextmanager
def replaced(table: list[tuple]) -> Iterator[None]:
    """Put each (owner, name, substitute) in its place, and the originals back behind it."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in table]
    for owner, name, substitute in table:
        setattr(owner, name, substitute)
    try:
        yield
    finally:
        for owner, name, original in before:
            setattr(owner, name, original)


def _collectives_have_shapes() -> bool:
    with contextlib.suppress(ImportError):
        # 早些的版本，导入了它才登记；更早的没有它
        importlib.import_module("torch.distributed._tools.fake_collectives")
    return torch._C._dispatch_has_kernel_for_dispatch_key("c10d::_allgather_base_", "Meta")


@contextlib.contextmanager
def one_of(world: int) -> Iterator[None]:
    """Be the first of `world` processes that are not there: what is sent goes nowhere, what comes has no values."""
    if world == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if not _collectives_have_shapes():
        raise ConfigError(
            "parallel=fsdp: torch {got} does not say what sharded processes exchange, so that it cannot be planned; "
            "pip install -U torch, or plan parallel=ddp",
            got=torch.__version__,
        )
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        mesh = dist.init_device_mesh("cpu", (world,))
        here = [(distributed, "world", lambda: world), (distributed, "rank", lambda: 0)]
        with replaced([*here, (sharding, "mesh_on", lambda _: mesh)]):
            yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def resizing(tracker: Tracker) -> Iterator[None]:
    """Tell `tracker` of the storages that fully_shard empties and fills again without a tensor coming or going."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param as module

    def told(change):
        def resize(tensor: torch.Tensor) -> None:
            change(tensor)
            tracker.resized(tensor)

        return resize

    names = ("alloc_storage", "free_storage")
    with replaced([(module, name, told(getattr(module, name))) for name in names]):
        yield
