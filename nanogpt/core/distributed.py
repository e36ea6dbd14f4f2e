# torchrun 下的几个进程：编号、求和、广播；只有一个进程时全是空操作
# 梯度边反向边求和（GradientSum）：通信藏在计算后面；累积时只有最后一个微批通信
# 不用 DistributedDataParallel：一个进程反向到一半显存不足，它那一半的通信没有人补，别的进程就永远等着
"""Several processes under torchrun: rank, sums and broadcasts; without torchrun all of it is a no-op.

Gradients are summed while the backward pass goes on, without DistributedDataParallel: a process that runs out of
memory takes part in the sums that are left, so that all can agree to repeat the step.
"""

import atexit
import contextlib
import os
import sys
import time
import uuid
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from nanogpt.base.errors import EXIT_USER_ERROR
from nanogpt.base.language import ConfigError
from nanogpt.core.watch import Watch

# 其余进程在第一个进程准备数据时等着：大语料要几个小时，NCCL 默认 10 分钟就中断全部
PATIENCE = timedelta(hours=24)
CONNECT = timedelta(minutes=1)
# 等别的进程来时，隔这么久看一次
MEET_S = 0.02
# 这么大（字节）的梯度原地求和，不抄；更小的攒成一捆，免得每次通信都在等延迟
LARGE, BUNDLE = 2**20, 25 * 2**20
# gloo 的线程拿到 GIL、松开张量的时间：平时不到 1 ms，机器忙时也够
PAUSE_GLOO_S = 0.2
# 别的进程把话说完的时间
PAUSE_S = 3

_watch: Watch | None = None


def rank() -> int:
    """Number of this process, 0 … world - 1."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def share(rows: int) -> slice:
    """Which of `rows` are this process's: shares differ by one row at most, so that any number of processes will do."""
    return slice(rank() * rows // world(), (rank() + 1) * rows // world())


def start(device: torch.device, timeout_s: float) -> None:
    """Join the process group: nccl on GPUs, gloo on CPUs and where torch comes without nccl (Windows).

    From then on a process that does not answer for timeout_s ends the training; see watch.
    """
    global _watch
    if world() == 1:
        return
    # torchrun 自己的 store 早就在了，连不上就是它已经不在；没有 torchrun，要等 0 号进程来开
    there = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    backend = "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
    # 时限由 watch 管，它说得出是哪一个；通信库自己的只是后备
    limit = timedelta(seconds=2 * timeout_s + 60)
    try:
        store, _, _ = next(rendezvous("env://", timeout=CONNECT if there else PATIENCE))
        store = _met(store)
        dist.init_process_group(
            backend, store=dist.PrefixStore("group", store), rank=rank(), world_size=world(), timeout=limit,
        )
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            "the processes of this training could not meet ({reason}); type the command again", reason=reason,
        ) from None
    if backend == "gloo":
        # gloo 的线程松开最后一个张量要拿 GIL；解释器已在收尾，就以 abort（134）结束整个进程：先等它松手
        atexit.register(time.sleep, PAUSE_GLOO_S)
    _watch = Watch(dist.PrefixStore("watch", store), rank(), world(), timeout_s)


def _met(store: dist.Store) -> dist.Store:
    """The part of the store that belongs to this start alone, when all processes are there."""
    # torchrun 的 store 活过每一次重启，里面还有上一次的地址与警报：由 0 号起一个新名字，逐个告诉此刻活着的
    # batch_size=auto 由 0 号先量，别的等着：先在这里等齐，通信的时限才能短
    mine = uuid.uuid4().hex
    if rank():
        store.set(f"hello/{rank()}", mine)
        store.wait([f"name/{mine}"], PATIENCE)
        name = store.get(f"name/{mine}").decode()
        store.set(f"{name}/{rank()}", "here")
        store.wait([f"{name}/0"], PATIENCE)
        return dist.PrefixStore(name, store)
    for number in range(1, world()):
        while not store.check([f"{mine}/{number}"]):
            # 读到的也许还是上一次的：多告诉一个早已不在的，无妨
            if store.check([f"hello/{number}"]):
                store.set(f"name/{store.get(f'hello/{number}').decode()}", mine)
            time.sleep(MEET_S)
    store.set(f"{mine}/0", "here")
    return dist.PrefixStore(mine, store)


def waiting() -> contextlib.AbstractContextManager[None]:
    """Around everything that waits for the other processes; nothing with one process."""
    return _watch.waiting() if _watch else contextlib.nullcontext()


def lost() -> bool:
    """Whether another process hangs or is gone, so that this one is about to end."""
    return _watch is not None and _watch.ending


def to_go_on(remedy: str) -> None:
    """Say this where another process hangs or is gone."""
    if _watch:
        _watch.remedy = remedy


def when_left_alone(task: Callable[[], None]) -> None:
    """Call task() from another thread if what started the processes is gone."""
    if _watch:
        _watch.left_alone = task


def stop() -> None:
    """Leave the process group."""
    # 有人不在了的，解散也要等它
    if world() > 1 and dist.is_initialized() and not lost():
        dist.destroy_process_group()


def broadcast(value):
    """The first process's value, on all."""
    if world() == 1:
        return value
    box = [value]
    with waiting():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def from_first(task: Callable[[], Any]) -> Any:
    """What task() gives in the first process, on all, which wait for as long as it takes."""
    if world() == 1:
        return task()
    value = None
    if rank() == 0:
        value = task()
        _watch.store.set("done", "1")
    else:
        # 大语料要准备几个小时：不算停住
        _watch.store.wait(["done"], PATIENCE)
    return broadcast(value)


def check_alike(facts: dict[str, str]) -> None:
    """Refuse to train where processes differ in one of `facts`: ConfigError in the first, SystemExit in the others."""
    if world() == 1:
        return
    everyone: list[dict[str, str]] = [{}] * world()
    with waiting():
        dist.all_gather_object(everyone, facts)
    for number, theirs in enumerate(everyone):
        for key in sorted(everyone[0].keys() | theirs.keys()):
            first, got = everyone[0].get(key, "-"), theirs.get(key, "-")
            if first == got:
                continue
            if rank():
                # 一个人说就够；先走的话，torchrun 会把还没说完的也结束掉
                time.sleep(PAUSE_S)
                sys.exit(EXIT_USER_ERROR)
            raise ConfigError(
                "{key}={got} in process {rank}, {first} in process 0: start all of them with the same command, files "
                "and versions",
                key=key, got=got, rank=number, first=first,
            )


def first_found(value: str | None) -> str | None:
    """The value of the first process that has one."""
    if world() == 1:
        return value
    everyone: list[str | None] = [None] * world()
    with waiting():
        dist.all_gather_object(everyone, value)
    return next((one for one in everyone if one is not None), None)


def largest(values: list[float], device: torch.device) -> list[float]:
    """Element-wise maximum over all processes."""
    if world() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    with waiting():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def agree(loss: torch.Tensor, flags: list[bool]) -> tuple[torch.Tensor, list[bool]]:
    """(sum of the losses () of all processes, which flags are set on any of them), in one message."""
    if world() == 1:
        return loss, flags
    both = torch.cat([loss.float().reshape(1), torch.tensor(flags, dtype=torch.float32, device=loss.device)])
    with waiting():
        dist.all_reduce(both)
    return both[0], [count > 0 for count in both[1:].tolist()]


def total(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over all processes, in place."""
    if world() > 1:
        with waiting():
            dist.all_reduce(tensor)
    return tensor


class GradientSum:
    """Adds up the gradients of all processes in place, each part as soon as the backward pass has it."""

    # 各进程的通信必须同样多、同样次序：按参数登记的倒序一份一份地发，先到的也要等前面的
    # 反向差不多就是这个次序；查表与嵌入层最后才到，它们那一份藏不住

    def __init__(self, parameters: list[torch.Tensor]):
        """All begin with the weights of the first process."""
        self._parts = parts_of(parameters) if world() > 1 else []
        self._left: list[int] | None = None
        self._sent: list[tuple[dist.Work, torch.Tensor]] = []
        for number, part in enumerate(self._parts):
            for p in part:
                p.register_post_accumulate_grad_hook(_hook(weakref.ref(self), number))
                with waiting():
                    # 另一种 CPU 上抽出的初值会差末位：此后只求和梯度，差的就一直差着
                    dist.broadcast(p.detach(), src=0)

    def begin(self) -> None:
        """The next backward pass is the last one of this step: from now on gradients are complete as they arrive."""
        self._left = [len(part) for part in self._parts]

    def arrived(self, number: int) -> None:
        """A gradient of part `number` is complete, unless there are more micro-batches to come."""
        if self._left is None:
            return
        # 可重入的重算会让一个梯度分几次到，那时发出去的就不全
        assert self._left[number], "a gradient arrived twice in one backward pass"
        self._left[number] -= 1
        while len(self._sent) < len(self._parts) and not self._left[len(self._sent)]:
            self._send()

    def _send(self, *, nothing: bool = False) -> None:
        """Begin to add up the next part; with `nothing` this process adds zeros."""
        part = self._parts[len(self._sent)]
        grads = [torch.zeros_like(p) if nothing or p.grad is None else p.grad for p in part]
        whole = len(part) == 1 and grads[0].is_contiguous()
        tensor = grads[0] if whole else torch.cat([grad.flatten() for grad in grads])
        with waiting():
            self._sent.append((dist.all_reduce(tensor, async_op=True), tensor))

    def finish(self, *, failed: bool) -> None:
        """Wait for all sums; where this process `failed`, only complete those that the others wait for."""
        for number, part in enumerate(self._parts):
            if number == len(self._sent):
                # 显存不足的进程补上零，别人才等得到；没用到的参数也按零算
                self._send(nothing=failed)
            work, tensor = self._sent[number]
            with waiting():
                work.wait()
            if failed:
                # 一次只占一份的内存
                self._sent[number] = (work, tensor.new_empty(0))
                continue
            for p, piece in zip(part, tensor.flatten().split([p.numel() for p in part]), strict=True):
                if p.grad is None:
                    # 这里没用到，别的进程用到了：更新才处处相同；谁也没用到的，仍没有梯度
                    p.grad = piece.view_as(p).clone() if piece.any() else None
                elif p.grad.data_ptr() != piece.data_ptr():
                    p.grad.copy_(piece.view_as(p))
        self._left, self._sent = None, []

    def evaluated(self, sums: torch.Tensor, windows: list[tuple[int, int]], batch: int) -> torch.Tensor:
        """Sum over all processes, in place, of what each added up over its share of the windows, `batch` at a time."""
        return total(sums)


def parts_of(parameters: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Parameters whose gradients travel together, in the order in which the backward pass is likely to have them."""
    parts: list[list[torch.Tensor]] = []
    bundle: list[torch.Tensor] = []
    for p in reversed(parameters):
        if p.nbytes >= LARGE:
            parts.append([p])
            continue
        if bundle and (bundle[0].dtype != p.dtype or sum(one.nbytes for one in bundle) + p.nbytes > BUNDLE):
            bundle = []
        if not bundle:
            parts.append(bundle)
        bundle.append(p)
    return parts


def _hook(owner: weakref.ref, number: int):
    """The hook of a parameter in the owner's part with this number."""
    # 弱引用：hook 由参数的 C++ 一侧拿着，垃圾回收看不见这个环
    def arrived(p: torch.Tensor) -> None:
        if (it := owner()) is not None:
            it.arrived(number)

    return arrived
