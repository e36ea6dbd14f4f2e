# 显卡上的训练步录成 CUDA graph：小模型的一步全是发射几百个 kernel 的时间，录下来回放只发射一回
# 每种形状的微批（前向与反向）录一张，累积时反复回放；裁剪与更新另录一张
# 图认死地址：输入、梯度、学习率都有固定的地方，每步先把数抄进去
# 录的与直接跑的是同一串 kernel、同样的随机数，结果一位不差：录不录、何时录都不影响训练，也不影响续训
# 混在 Step 前面（use_graphs，由 run/loop 接上）；录不了就一行说明，照常一步一步来
"""Training steps of a CUDA card as recorded graphs, for models whose steps are bound by launches."""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch

from nanogpt.base.errors import is_out_of_memory, release
from nanogpt.base.language import first_line
from nanogpt.core.distributed import world
from nanogpt.core.machine import on_device
from nanogpt.core.memory.lean_optimizers import Lean
from nanogpt.core.optimizers import Optimizer
from nanogpt.core.step import Step
from nanogpt.core.wrapping import mix_in

# 一次训练里通常一种，最后一个微批不满时两种
MOST_SHAPES = 4
# 录下的步有自己的一份激活，别处（评估、写样本）用不到：占得多的训练不缺这点发射的时间
SHARE_OF_MEMORY = 3
# 同一串 kernel，只有求和次序可能不同
TOLERANCE = 0.02


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which this device's graphs are recorded."""
    # 每条流都有自己的 cuBLAS 工作区（8 到 32 MiB），用过就不还：只用一条
    return torch.cuda.Stream(device)


@contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """Inside, work is given to the side stream: what runs there before a recording allocates the workspaces."""
    # 服务器里的工作线程有自己的“当前卡”，录在别的卡的流上会录成一张空图
    with torch.cuda.device(device):
        side = side_stream(device)
        side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(side):
                yield
        finally:
            torch.cuda.current_stream().wait_stream(side)


def record(work: Callable[[], object], device: torch.device, pool) -> tuple[Callable[[], None], object]:
    """(launches what work() did as one graph, what it returned); nothing is computed yet.

    Tensors that work() writes besides its result must be kept by the caller.
    """
    graph, side = torch.cuda.CUDAGraph(), side_stream(device)
    with torch.cuda.device(device):
        # 录制失败时 torch.cuda.graph 不还原当前的流：外面再套一层
        with torch.cuda.stream(side):
            try:
                with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                    result = work()
            except Exception:
                end_allocations(device, pool)
                raise
        # 随机数的起点在旁边那条流上写好：回放要等它
        torch.cuda.current_stream().wait_stream(side)
    return graph.replay, result


def end_allocations(device: torch.device, pool) -> None:
    """Let the allocator of a card go on as usual behind a recording that failed."""
    # 作废的录制在还给分配器之前就抛了：分配器以为还在录，从此不许退还缓存；录制若好好结束了，这里只报一声错
    # 2.8 以前是另一个名字
    end = getattr(torch._C, "_cuda_endAllocateToPool", None) or torch._C._cuda_endAllocateCurrentStreamToPool
    with suppress(RuntimeError):
        end(device.index, pool)
        # 它也就没有把这块池记成自己的：不还，里面的激活就永远占着
        torch._C._cuda_releasePool(device.index, pool)


@dataclass
class MicroBatch:
    """A recorded forward and backward pass of one shape, with the places of its inputs and of its loss."""

    x: torch.Tensor
    y: torch.Tensor
    share: torch.Tensor
    loss: torch.Tensor
    replay: Callable[[], None]

    def run(self, x: torch.Tensor, y: torch.Tensor, share: float) -> torch.Tensor:
        """The loss of these rows, shape (); their gradients are added."""
        self.x.copy_(x)
        self.y.copy_(y)
        self.share.fill_(share)
        self.replay()
        # 下一次回放会覆盖它
        return self.loss.clone()


class Graphs:
    """What is recorded of one Step, and the fixed places of its gradients and learning rates."""

    def __init__(self, step: Step, console, *, capacity: int | None):
        """capacity: bytes that the card has for this process; None: nothing is to be recorded."""
        self.console, self.parameters, self.groups = console, step.parameters, step.optimizer.param_groups
        self.device, self.capacity = self.parameters[0].device, capacity
        self.recorded: dict[tuple[int, ...], MicroBatch] = {}
        self.gradients: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Pairs of a parameter and its gradient."""
        self.rates = torch.zeros(len(self.groups), device=self.device)
        self._update: tuple | None = None
        self._pool = None

    # ---- 微批 ----

    def micro_batch(self, plain: Callable, x: torch.Tensor, y: torch.Tensor, share: float) -> torch.Tensor:
        """What plain(x, y, share) computes."""
        shape = tuple(x.shape)
        if shape not in self.recorded and not self._record_micro_batch(plain, x, y, share):
            return plain(x, y, share)
        if not self.attached:
            if any(p.grad is not None for p in self.parameters):
                # 同一步里先有过一个没录的：接着加在它的梯度上
                return plain(x, y, share)
            self._attach()
        return self.recorded[shape].run(x, y, share)

    @property
    def attached(self) -> bool:
        """Whether the parameters' gradients are at the places that the graphs know."""
        return bool(self.gradients) and all(p.grad is gradient for p, gradient in self.gradients)

    def _attach(self) -> None:
        """Begin the fixed gradients with zeros."""
        for p, gradient in self.gradients:
            p.grad = gradient
        torch._foreach_zero_([gradient for _, gradient in self.gradients])

    def _record_micro_batch(self, plain: Callable, x: torch.Tensor, y: torch.Tensor, share: float) -> bool:
        """Record one shape unless that is not wanted; whether it is there now."""
        if self.capacity is None or len(self.recorded) == MOST_SHAPES:
            return False
        # 正在累积的梯度先放到一边；随机数用掉多少，录完都还原
        held, fixed = [p.grad for p in self.parameters], self.gradients
        sums = [gradient.clone() for _, gradient in fixed]
        with self._same_numbers() as again:
            # 这里显存不足与不录时一样：由 Trainer 减半重来
            loss = self._plain_twice(plain, x, y, share, again)
            wanted = [p.grad for p in self.parameters]
            large = SHARE_OF_MEMORY * peak_bytes(self.device) > self.capacity
            if not large:
                with self._given_up_where_it_fails():
                    self._capture(plain, x, y, share, wanted)
                    again()
                    self._compare(self.recorded[tuple(x.shape)].run(x, y, share), loss, wanted)
        for (_, gradient), total in zip(fixed, sums, strict=True):
            gradient.copy_(total)
        for p, gradient in zip(self.parameters, held, strict=True):
            p.grad = gradient
        if large:
            # 不录，以后也不再试；旁边那条流缓存的显存，这边用不上，留着就要占两份
            self.capacity, loss, wanted = None, None, None
            release(self.device)
        return tuple(x.shape) in self.recorded

    def _plain_twice(self, plain: Callable, x, y, share: float, again: Callable[[], None]) -> torch.Tensor:
        """The loss of plain(), whose gradients are left; run aside and twice, so that nothing is new to a recording."""
        with aside(self.device):
            for _ in range(2):
                again()
                self._drop()
                loss = plain(x, y, share)
        return loss

    def _drop(self) -> None:
        for p in self.parameters:
            p.grad = None

    def _capture(self, plain: Callable, x, y, share: float, wanted: list[torch.Tensor | None]) -> None:
        """Record plain() adding to the fixed gradients, those that `wanted` shows."""
        if not self.gradients:
            self._pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
            found = zip(self.parameters, wanted, strict=True)
            self.gradients = [(p, torch.empty_like(gradient)) for p, gradient in found if gradient is not None]
        self._drop()
        self._attach()
        inputs = x.clone(), y.clone(), torch.full((), share, device=self.device)
        replay, loss = record(lambda: plain(*inputs), self.device, self._pool)
        self.recorded[tuple(x.shape)] = MicroBatch(*inputs, loss, replay)
        self._attach()

    def _compare(self, loss: torch.Tensor, wanted_loss: torch.Tensor, wanted: list[torch.Tensor | None]) -> None:
        """RuntimeError unless a replay gave the loss and the gradients of the plain pass."""
        places = {id(p): gradient for p, gradient in self.gradients}
        got = [places.get(id(p)) for p in self.parameters]
        if [g is None for g in got] != [g is None for g in wanted]:
            raise RuntimeError("the gradients of other parameters")
        same(loss, wanted_loss)
        for gradient, plain in zip(got, wanted, strict=True):
            if gradient is not None:
                same(gradient, plain)

    # ---- 更新 ----

    @property
    def has_update(self) -> bool:
        """Whether the update is recorded."""
        return self._update is not None

    @contextmanager
    def rates_on_device(self) -> Iterator[None]:
        """Inside, the learning rates of the optimizer's groups are tensors () at fixed places."""
        # 不录时也这样：两条路算的就是同样的数
        floats = [group["lr"] for group in self.groups]
        self.rates.copy_(on_device(torch.tensor(floats, dtype=torch.float32), self.device))
        for group, rate in zip(self.groups, self.rates.unbind(), strict=True):
            group["lr"] = rate
        try:
            yield
        finally:
            for group, rate in zip(self.groups, floats, strict=True):
                group["lr"] = rate

    def update(self, plain: Callable[..., None], loss: torch.Tensor, norm: torch.Tensor) -> None:
        """What plain(loss, norm) does to the parameters."""
        if self.attached and not self.has_update and self.capacity is not None:
            self._record_update(plain, norm)
        if not self.attached or not self.has_update:
            plain(loss, norm)
            return
        here, there, replay, _ = self._update
        here.copy_(loss)
        there.copy_(norm)
        replay()

    def _record_update(self, plain: Callable[..., None], norm: torch.Tensor) -> None:
        """Record plain() if that works."""
        # 损失是 NaN 的一步什么也不改，只弄脏梯度：录之前先跑一遍，录完也先试一遍，都不会多走一步
        inputs, ran = (torch.full_like(norm, math.nan), torch.full_like(norm, math.nan)), torch.zeros_like(norm)
        fixed, kept = [gradient for _, gradient in self.gradients], []

        def work() -> None:
            plain(*inputs)
            ran.fill_(1)

        with self._given_up_where_it_fails():
            kept = [gradient.clone() for gradient in fixed]
            with aside(self.device):
                plain(*inputs)
            replay, _ = record(work, self.device, self._pool)
            replay()
            if not ran.item():
                raise RuntimeError("the recorded update does nothing")
            # 图每次都写 ran：不留着它，写的就是别人的显存
            self._update = (*inputs, replay, ran)
            self.console.line("training steps are recorded as CUDA graphs and launched as a whole")
        for gradient, before in zip(fixed, kept, strict=False):
            gradient.copy_(before)

    # ---- 录不了 ----

    def forget(self) -> None:
        """Give all that is recorded back, and record nothing from now on."""
        if self.device.type == "cuda":
            # 回放在另一条流上：它还没做完，收回它的显存就是非法访问
            with suppress(RuntimeError):
                torch.cuda.synchronize(self.device)
        self.capacity, self._update, self._pool, self.gradients = None, None, None, []
        self.recorded.clear()

    @contextmanager
    def _given_up_where_it_fails(self) -> Iterator[None]:
        """Inside, an error ends all recording, said in one line."""
        # 断在录制中的图会让随机数发生器停在录制的状态：换回之前的那一份
        before = self._generator.clone_state() if self.device.type == "cuda" else None
        try:
            yield
        except Exception as error:
            # 直接跑刚刚成功过：录不了只是慢一些，不该让训练失败；显存不足也在其内
            reason = first_line(error)
            self.forget()
        else:
            return
        if before is not None:
            self._generator.graphsafe_set_state(before)
        with suppress(RuntimeError):
            release(self.device)
        self.console.line(
            "training steps cannot be recorded as CUDA graphs ({reason}); going on without", reason=reason,
        )

    @property
    def _generator(self) -> torch.Generator:
        """Where dropout takes its numbers."""
        on_card = self.device.type == "cuda"
        return torch.cuda.default_generators[self.device.index] if on_card else torch.default_generator

    @contextmanager
    def _same_numbers(self) -> Iterator[Callable[[], None]]:
        """Inside, the function begins the random numbers again; behind it, they go on as if none had been drawn."""
        before = self._generator.get_state()

        def again() -> None:
            self._generator.set_state(before)

        try:
            yield again
        finally:
            again()


def same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """RuntimeError unless two tensors agree up to the order of sums, or what is wanted has overflowed."""
    size = wanted.float().abs().max().item()
    # fp16 的第一步常常溢出：没有可比的
    if math.isfinite(size) and not torch.allclose(got.float(), wanted.float(), rtol=0.0, atol=TOLERANCE * size):
        raise RuntimeError("a recorded step gives other numbers")


def peak_bytes(device: torch.device) -> int:
    """The most that tensors have taken of a card so far."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


class Recorded:
    """Put before Step: what a card repeats in every step is launched as a whole."""

    graphs: Graphs

    def micro_batch(self, x: torch.Tensor, y: torch.Tensor, share: float) -> torch.Tensor:
        try:
            return self.graphs.micro_batch(super().micro_batch, x, y, share)
        except Exception as error:
            # 显存不足要减半重来：录下的占着一份激活，先让出来
            if is_out_of_memory(error):
                self.graphs.forget()
            raise

    def update_if_finite(self, loss: torch.Tensor, norm: torch.Tensor, limit: float) -> None:
        with self.graphs.rates_on_device():
            self.graphs.update(functools.partial(super().update_if_finite, limit=limit), loss, norm)


def can_record(step: Step) -> bool:
    """Whether graphs may stand for what this step does: alone, with a model and an optimizer of ours."""
    # 使用者自己的类里可能有每步不同的 Python：录下来就冻住了；省显存的更新逐块看学习率
    modules = {type(module).__module__ for module in step.model.modules()}
    modules |= {kind.__module__ for kind in type(step.optimizer).__mro__[:-1]}
    ours = all(name.startswith(("nanogpt.", "torch.")) for name in modules) and isinstance(step.optimizer, Optimizer)
    return ours and not isinstance(step.optimizer, Lean) and world() == 1 and not step.in_backward


def use_graphs(step: Step, console, *, capacity: int | None) -> None:
    """Let a step on a card that allows it record and replay; capacity: see Graphs."""
    if step.parameters[0].device.type == "cuda" and can_record(step):
        step.graphs = Graphs(step, console, capacity=capacity)
        mix_in(step, Recorded)
