"""Activation checkpointing: which activations of the blocks are kept for the backward pass, and which recomputed.

`every_block` keeps only each block's input; `selective` also keeps the results of matrix products and attention, so
that only cheap operations run twice; `budget` keeps everything of as many blocks as fit, and the inputs of the others.
"""

# 用时间换显存：block 的激活不留到反向，反向时再算一遍
# 从外面给每个 block 混入 Recomputed（mix_in），core 里的 Block 不知道；由 weights.build.build_step 接上
# selective 留下矩阵乘法与注意力的结果，只重算便宜的；budget 先量一个 block 留下多少字节，再决定最后几个不必重算
# 重算必须与第一次逐位相同：dropout 的随机数与 autocast 由 torch 的 checkpoint 恢复，自己的舍入由 second_in 恢复

import contextlib
import functools

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from nanogpt.core.wrapping import mix_in

aten = torch.ops.aten
PRODUCTS = [aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default]
ATTENTION = [
    aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default, aten._scaled_dot_product_cudnn_attention.default,
]


class Recomputed:
    """Mixed in before a block's own class: unless `kept`, its activations are recomputed in the backward pass."""

    # 混入而不是包一层 Module：参数名不变，checkpoint 与导出照旧；训练之外（写作、评估）走原来的 forward
    kept = False
    # 给 checkpoint 的 context_fn：留下哪些结果，重算时包上什么；None 是什么也不留
    contexts = None

    def forward(self, x: torch.Tensor, rope=None, cache=None, visible=None) -> torch.Tensor:
        if self.kept or not (self.training and torch.is_grad_enabled()):
            return super().forward(x, rope, cache, visible)
        # 只留每个 block 的输入，反向时重算一遍：以约三成时间换激活显存
        options = {} if self.contexts is None else {"context_fn": self.contexts}
        return checkpoint(super().forward, x, rope, None, visible, use_reentrant=False, **options)


def recompute_blocks(model, mode: str, *, second_in=None) -> None:
    """Wrap the blocks of a model for activation_checkpointing=mode; second_in() is a context for the recomputation."""
    contexts = _selective(model.config.dropout) if mode == "selective" else None
    if second_in is not None:
        contexts = functools.partial(_second_in, second_in, contexts or _nothing)
    for block in model.h:
        mix_in(block, Recomputed)
        block.contexts = contexts


def keep_last(model, count: int) -> None:
    """Let the last `count` blocks keep their activations."""
    # 靠后的 block 反向最先用到，用完就释放，不与前面的重算同时占内存
    for layer, block in enumerate(model.h):
        block.kept = layer >= len(model.h) - count


def _nothing() -> tuple:
    return contextlib.nullcontext(), contextlib.nullcontext()


def _selective(dropout: float):
    # 带 dropout 的注意力若直接取回结果，就少抽一次随机数，后面的 dropout 会全部错位
    return functools.partial(create_selective_checkpoint_contexts, PRODUCTS if dropout else PRODUCTS + ATTENTION)


def _second_in(context, contexts) -> tuple:
    """The pair of contexts(), with context() entered as well in the second one."""
    first, second = contexts()

    @contextlib.contextmanager
    def both():
        with second, context():
            yield

    return first, both()


def saved_bytes(function, parameters: list[torch.Tensor]) -> int:
    """Bytes that function() keeps for its backward pass: distinct storages, without those of `parameters`."""
    # 用存储的句柄而不是地址：假张量没有地址
    known = {p.untyped_storage()._cdata for p in parameters}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    total = sum(storage.nbytes() for storage in kept.values())
    del result
    return total


def fit_budget(model, rows: int, budget_mib: int, context) -> None:
    """Keep the activations of as many blocks as budget_mib allows with micro-batches of `rows` rows.

    A row has block_size tokens. The inputs of the recomputed blocks count as well. context() wraps the forward pass, as
    in training.
    """
    c = model.config
    T = c.block_size
    x = torch.zeros(rows, T, c.n_embd, dtype=model.dtype, device=model.device, requires_grad=True)
    rope = (model.rope_cos[:T], model.rope_sin[:T]) if c.position == "rope" else None
    # 哪些位置互相看得见由各 block 共用，不算在哪一个头上
    visible = model.visible(torch.zeros(rows, T, dtype=torch.long, device=model.device))
    fixed = [*model.parameters(), *model.buffers(), *([] if visible is None else [visible])]
    was_training = model.training
    model.train()
    keep_last(model, len(model.h))
    with context(), torch.enable_grad():
        whole = saved_bytes(lambda: model.h[0](x, rope, None, visible), fixed)
    model.train(was_training)
    inputs = x.nbytes
    spare = budget_mib * 2**20 - len(model.h) * inputs
    keep_last(model, max(0, min(len(model.h), spare // max(1, whole - inputs))))
