"""Run the real training step on tensors without storage and write down its allocations and its work.

FakeTensorMode gives shapes, types and lifetimes as the real run has them; the Tracker below it follows each
storage from its first sight to its finalisation. No values exist, so nothing may depend on one.
"""

# 在没有存储的张量上走一遍真的训练步，记下每次分配、每次乘积、每次读写
# 走的是训练用的同一份代码：先造模型，走两步（第一步造出优化器状态，第二步是稳定的样子），再评估一次、采样一次
# trace 是入口，plan 用它；Trace 只是记录，显存的峰值与时间由别的模块从中算出
# 没有值可读：模型的步若依赖数值就追踪不了，这时给一句话，而不是崩溃

import contextlib
import functools
import gc
import importlib.util
import sys
import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nanogpt.base.config import TrainConfig
from nanogpt.base.language import ConfigError
from nanogpt.core.distributed import parts_of
from nanogpt.core.kv_cache import KVCache
from nanogpt.core.machine import accelerators
from nanogpt.core.memory.lora import add_adapters
from nanogpt.core.ngrams import size_text
from nanogpt.core.precision import default_format
from nanogpt.core.sharding import units_of, weights_of
from nanogpt.core.step import Step
from nanogpt.plan.substitutes import PlannedPrecision, one_of, resizing, substituted
from nanogpt.plan.tracker import Tracker
from nanogpt.weights.build import build_model, build_step

KINDS = ("weights", "gradients", "optimizer", "activations", "temporaries")


@dataclass(frozen=True)
class Shape:
    """What decides a trace besides the config.

    Rows per micro-batch, micro-batches per step, rows per evaluation batch, the type of device, and over how many
    processes parameters, gradients and states are sharded.
    """

    # 可哈希、可 repr：同样的形状不追踪第二遍

    rows: int
    accumulation: int = 1
    eval_rows: int = 1
    device_type: str = "cpu"
    shards: int = 1


@dataclass
class Trace:
    """Events (storage id, +bytes or -bytes) and work, phase by phase.

    Phases: set_up; first_micro_0 and first_update (the optimizer's state appears); steady_micro_0,
    steady_micro_1 when accumulating (gradients are there already) and steady_update; evaluate; sample.
    """

    # 按阶段分开：每阶段的峰值与层数、行数成线性，粗估靠的就是这一点

    shape: Shape
    block_size: int
    dtype: torch.dtype
    events: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    kinds: dict[int, str] = field(default_factory=dict)
    """Kind of each storage that is not a temporary."""
    ops: dict[str, Counter] = field(default_factory=dict)
    """Phase -> how often each (flops, bytes, 16-bit product?, bytes over PCIe) occurs."""
    activations: int = 0
    """Bytes kept for the backward pass at the end of a forward pass."""
    ram: int = 0
    """Bytes of state that lie in RAM beside a card."""
    weight_bytes: int = 0
    optimizer_bytes: int = 0
    gradients: list[tuple[int, int, int]] = field(default_factory=list)
    """(bytes, weights in matrices, bytes of weights) of each sum of gradients that several processes would send."""
    parameters: int = 0
    size: str = ""
    """The parameters, for people."""

    def timeline(self) -> Iterator[tuple[int, int]]:
        """All events of set-up, two steps, an evaluation, a sample and one more step."""
        live: dict[int, int] = {}
        # 稳定后再走一步：评估留下的碎片可能让它多要一段
        for phase in (*self.events, *(phase for phase in self.events if phase.startswith("steady"))):
            for number, size in self.events[phase]:
                # 重放的一步里，上一步留到现在的小张量（如梯度范数）先释放再分配
                if size > 0 and number in live:
                    yield number, -live.pop(number)
                if size > 0:
                    live[number] = size
                elif live.pop(number, None) is None:
                    continue
                yield number, size

    def peaks(self) -> dict[str, int]:
        """Largest number of live bytes in each phase."""
        live, peaks = 0, {}
        for phase, events in self.events.items():
            best = live
            for _, size in events:
                live += size
                best = max(best, live)
            peaks[phase] = best
        return peaks

    def peak(self) -> tuple[int, dict[str, int]]:
        """Largest number of live bytes, and what they are at that moment."""
        live = best = 0
        by_kind: Counter = Counter()
        at_best: dict[str, int] = {}
        for storage, size in self.timeline():
            live += size
            by_kind[self.kinds.get(storage, "temporaries")] += size
            if live > best:
                best, at_best = live, dict(by_kind)
        return best, {kind: at_best.get(kind, 0) for kind in KINDS}


def trace(cfg: TrainConfig, shape: Shape) -> Trace:
    """Trace set-up, two steps, an evaluation and a sample of cfg, whose batch_size and vocabulary are known."""
    try:
        with contextlib.suppress(_CompilerNeededError), without_compiler(sharded=shape.shards > 1):
            return _traced(cfg, shape)
        return _traced(cfg, shape)
    except ConfigError:
        raise
    except Exception as error:
        # 使用者自己的模型可能读取数值、调用不认识的 kernel：一行说明，不是崩溃
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        raise ConfigError(
            "model._target_={target} cannot be planned ({reason}); its step may not depend on values: measure it with "
            "a small batch_size instead",
            target=cfg.model._target_, reason=reason[:200],
        ) from error


def _traced(cfg: TrainConfig, shape: Shape) -> Trace:
    # 追踪中收走循环引用会改变释放的时刻：结果要每次相同
    # 上一遍可能停在 torch.optim 的 step 里：那里关掉的求导，没来得及打开
    with (
        torch.enable_grad(), _no_collector(), torch.random.fork_rng(devices=[]), one_of(shape.shards),
        fake_tensors() as mode,
    ):
        return _Run(cfg, shape, mode).all()


class _CompilerNeededError(Exception):
    """A trace that needs more of torch._dynamo than its switches."""

    # 少见；那就真的导入它，从头追踪一遍


class _Source:
    """What stands for torch._dynamo's classes of where a tensor comes from, which nobody reads here."""

    # torch.tensor(…) 造出真的张量（激活重算要存随机数的状态）：FakeTensorMode 给它起个名字，为此也会导入整个编译器

    def __init__(self, source_name: str):
        pass

    def __getattr__(self, name: str):
        raise AttributeError(f"torch._dynamo.source: {name}")


class _Stand(types.ModuleType):
    """What stands for torch._dynamo while nothing is compiled: its switches, disable() and the names of tensors."""

    # FakeTensorMode 只读 torch._dynamo.config 里的几个开关，却因此导入整个编译器：一次规划的五分之一

    def __init__(self, package: str):
        super().__init__(package)
        spec = importlib.util.find_spec(package)
        file = Path(spec.submodule_search_locations[0]) / "config.py"
        own = importlib.util.spec_from_file_location(f"{package}.config", file)
        # 它在 sys.modules 里找自己
        self.config = sys.modules[own.name] = importlib.util.module_from_spec(own)
        own.loader.exec_module(self.config)
        self.source = types.ModuleType(f"{package}.source")
        self.source.ConstantSource = self.source.RandomValueSource = _Source

    def graph_break(self, *args, **options) -> None:
        """Called by torch.optim in every step; nothing is compiled."""

    def disable(self, fn, *args, **options):
        """torch._dynamo.disable of a compiler that is not there."""
        # torch 记住了 call：编译器来了之后，照它自己的意思
        real = functools.cache(lambda: torch._dynamo.disable(fn, *args, **options))

        def call(*given, **named):
            return (fn if sys.modules.get(self.__name__) is self else real())(*given, **named)

        return call


_stands: list[_Stand | None] = []


@contextlib.contextmanager
def without_compiler(*, sharded: bool = False) -> Iterator[None]:
    """Trace without importing torch._dynamo, unless it is imported already; _CompilerNeededError where that fails.

    What is `sharded` needs it in any case.
    """
    name = "torch._dynamo"
    if name in sys.modules or None in _stands or sharded:
        yield
        return
    stand = _stands[0] if _stands else _Stand(name)
    _stands[:] = [stand]
    standing = {name: stand, f"{name}.config": stand.config, f"{name}.source": stand.source}
    sys.modules |= standing
    torch._dynamo = stand
    try:
        yield
    except (ImportError, AttributeError) as error:
        if name not in f"{error}":
            raise
        _stands[:] = [None]
        raise _CompilerNeededError from error
    finally:
        for one in standing:
            del sys.modules[one]
        del torch._dynamo


def fake_tensors() -> FakeTensorMode:
    """A mode in which tensors have shapes and types but no storage."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def automatic_format(cfg: TrainConfig) -> str:
    """What precision=auto takes on the card that cfg is planned for."""
    here = accelerators()
    if cfg.hardware.dtype or not here:
        return cfg.hardware.dtype or "bf16"
    return default_format(torch.device(here[0].partition(":")[0]))


class _Run:
    """One trace in the making."""

    # 各步之间要记的东西不少（跟踪器、前向之前活着的、正在填的记录），所以是一个对象

    def __init__(self, cfg: TrainConfig, shape: Shape, mode: FakeTensorMode):
        self.cfg, self.shape = cfg, shape
        self.tracker = Tracker(mode)
        self.precision = PlannedPrecision(cfg.precision, shape.device_type, cfg.memory.weights, automatic_format(cfg))
        self.result = Trace(shape, cfg.model.block_size, self.precision.dtype)
        self.before_forward: set[int] = set()

    def all(self) -> Trace:
        sharded = self.shape.shards > 1
        resized = resizing(self.tracker) if sharded else contextlib.nullcontext()
        with substituted(self.shape.device_type, self.tracker), resized, self.tracker:
            step = self._set_up()
            step.prepare()
            self._optimizer_step(step, "first", micro_batches=1)
            self._name_survivors(step)
            self._optimizer_step(step, "steady", micro_batches=min(2, self.shape.accumulation))
            self._evaluate(step.model)
            if not sharded:
                # 分片的训练不写样本
                self._sample(step.model)
        result = self.result
        result.ram = sum(size for number, size in self.tracker.live().items() if number in self.tracker.host)
        return result

    def _set_up(self) -> Step:
        cfg = self.cfg
        model = build_model(cfg.model, cfg.seed, cfg.memory.weights)
        if cfg.finetune.method == "lora":
            add_adapters(model, cfg.finetune)
        for p in model.parameters():
            # 比任何释放梯度的 hook 都先登记，才看得见梯度
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(self._gradient_arrived)
        step = build_step(cfg, model, self.precision)
        # 造模型时的临时张量在 CPU 上，不占显存：只留下权重本身
        self.tracker.take()
        self.tracker.take_ops()
        events, seen = [], set()
        if self.shape.shards > 1:
            # 微批各走一遍：不必补
            step.sums.passes = 1
        if self.shape.shards > 1 and self.shape.device_type == "cpu":
            # 分片之前，内存里有过整个模型
            whole = sum(p.nbytes for p in step.model.parameters())
            events += [(0, whole), (0, -whole)]
        for t in (*weights_of(step.model), *step.model.buffers()):
            number = self.tracker.follow(t)
            if number not in seen:
                seen.add(number)
                events.append((number, t.untyped_storage().nbytes()))
                self.result.kinds[number] = "weights"
        self.tracker.take()
        self.result.events["set_up"] = events
        self.result.weight_bytes = sum(size for _, size in events)
        tables = {id(part.weight) for part in step.model.modules() if isinstance(part, torch.nn.Embedding)}
        parts = units_of(step.model) if self.shape.shards > 1 else [(part, part) for part in parts_of(step.parameters)]
        for part, trained in parts:
            work = sum(p.numel() for p in part if p.ndim > 1 and id(p) not in tables)
            self.result.gradients.append((sum(p.nbytes for p in trained), work, sum(p.nbytes for p in part)))
        self.result.parameters = sum(p.numel() for p in step.model.parameters())
        self.result.size = size_text(step.model)
        return step

    def _gradient_arrived(self, p: torch.Tensor) -> None:
        if p.grad is not None:
            self.result.kinds[self.tracker.follow(p.grad)] = "gradients"

    def _forward_ended(self) -> None:
        """What this forward pass made and still holds is kept for the backward pass."""
        known = self.before_forward | self.tracker.host
        kept = {n: size for n, size in self.tracker.live().items() if n not in known}
        for number in kept:
            self.result.kinds.setdefault(number, "activations")
        self.result.activations = sum(kept.values())

    def _tokens(self, rows: int) -> torch.Tensor:
        return torch.empty(rows, self.cfg.model.block_size, dtype=torch.long)

    def _optimizer_step(self, step: Step, section: str, micro_batches: int) -> None:
        """One step as Trainer.step takes it, gradients always clipped."""
        step.model.train()
        total = torch.zeros(())
        for number in range(micro_batches):
            x, y = self._tokens(self.shape.rows), self._tokens(self.shape.rows)
            self.before_forward = set(self.tracker.live())
            if step.sums and number == micro_batches - 1:
                step.sums.begin()
            loss = step.forward(x, y, 1.0 / self.shape.accumulation)
            self._forward_ended()
            with self.precision.backward_context():
                step.backward(loss)
            for tensor in _rows_kept(step):
                self.result.kinds[self.tracker.follow(tensor)] = "gradients"
            total += loss.detach()
            del loss
            if step.sums:
                self._name_gradients(total, x, y)
                if number == micro_batches - 1:
                    step.sums.finish(failed=False)
            self._end_phase(f"{section}_micro_{number}")
        if self.precision.scaler.is_enabled():
            self.precision.scaler.unscale_(step.optimizer)
        norm = step.gradient_norm()
        if step.decides_on_device and self.shape.device_type == "cuda":
            step.update_if_finite(total, norm, 1.0)
        else:
            step.clip(norm, 1.0)
            step.update()
        step.optimizer.zero_grad()
        del x, y, total, norm
        self._end_phase(f"{section}_update")

    def _end_phase(self, phase: str) -> None:
        self.result.events[phase], self.result.ops[phase] = self.tracker.take(), self.tracker.take_ops()

    def _name_gradients(self, *others: torch.Tensor) -> None:
        """Whatever outlives a backward pass of a sharded model, besides `others`, are gradients: whole ones or rows."""
        for number in set(self.tracker.live()) - {self.tracker.follow(t) for t in others}:
            self.result.kinds.setdefault(number, "gradients")

    def _name_survivors(self, step: Step) -> None:
        """Whatever outlives the first step and is no weight belongs to the optimizer."""
        states = None
        if self.shape.shards > 1:
            # 最后凑齐的那个 block 要到下一次前向才放掉：它不是状态
            states = {self.tracker.follow(t) for each in step.optimizer.state.values() for t in each.values()}
        apart = self.tracker.host | {self.tracker.follow(tensor) for tensor in _rows_kept(step)}
        for number, size in self.tracker.live().items():
            if states is not None and number not in states:
                continue
            if self.result.kinds.get(number) != "weights" and number not in apart:
                self.result.kinds[number] = "optimizer"
                self.result.optimizer_bytes += size

    @torch.no_grad()
    def _evaluate(self, model) -> None:
        model.eval()
        x, y = self._tokens(self.shape.eval_rows), self._tokens(self.shape.eval_rows)
        with self.precision.context():
            loss = model.loss(x, y)
        del x, y, loss
        self._end_phase("evaluate")

    @torch.no_grad()
    def _sample(self, model) -> None:
        """One row of the longest prompt, as the decode loop reads it."""
        cache = KVCache(model, 1)
        idx = self._tokens(1)
        logits = model.logits(model.hidden(idx, cache)[:, -1])
        del cache, idx, logits
        self._end_phase("sample")


def _rows_kept(step: Step) -> list[torch.Tensor]:
    """What the gradients of look-up tables keep from one step to the next."""
    # 它们自己写进 p.grad，autograd 的 hook 看不见
    return [t for p in step.parameters if hasattr(p, "row_gradient") for t in p.row_gradient.tensors()]
