# torchrun 下的几个进程：编号、求和、广播；只有一个进程时全是空操作
# 不用 DistributedDataParallel：微批都做完再一次求和，显存不足时各进程才能一起重来
"""Several processes under torchrun: rank, sums and broadcasts; without torchrun all of it is a no-op.

Gradients are summed once after all micro-batches instead of through DistributedDataParallel: every
process can then agree to repeat a step that ran out of memory, with no collective left half done.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

# 其余进程在第一个进程准备数据时等着：大语料要几个小时，NCCL 默认 10 分钟就中断全部
PATIENCE = timedelta(hours=24)


def rank() -> int:
    """Number of this process, 0 … world - 1."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def start(device: torch.device) -> None:
    """Join the process group: nccl on GPUs, gloo on CPUs and where torch comes without nccl (Windows)."""
    if world() > 1:
        backend = "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)


def stop() -> None:
    """Leave the process group."""
    if world() > 1 and dist.is_initialized():
        dist.destroy_process_group()


def broadcast(value):
    """The first process's value, on all."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def largest(values: list[float], device: torch.device) -> list[float]:
    """Element-wise maximum over all processes."""
    if world() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def total(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over all processes, in place."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_gradients(parameters: list[torch.Tensor]) -> None:
    """Add up the gradients of all processes, in place, in buckets of 25 MiB."""
    if world() == 1:
        return
    bucket: list[torch.Tensor] = []
    size = 0
    for gradient in [p.grad for p in parameters if p.grad is not None] + [None]:
        # 攒成大块再通信：逐个张量太慢，全部拼一起又多占一份显存
        if bucket and (gradient is None or size > 25 * 2**20):
            flat = torch.cat([g.flatten() for g in bucket])
            dist.all_reduce(flat)
            for g, piece in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                g.copy_(piece.view_as(g))
            bucket, size = [], 0
        if gradient is not None:
            bucket.append(gradient)
            size += gradient.numel() * gradient.element_size()
