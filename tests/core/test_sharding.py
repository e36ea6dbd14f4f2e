"""parallel=fsdp: shards train, evaluate, save and resume like one process that holds everything."""

# 几个进程由 fork 而来，一次起一组，许多断言共用；都与一个进程的训练比

import shutil

import numpy as np
import pytest
import torch
import torch._dynamo
from attack import POSIX
from conftest import make_config, new_trainer, resumed_trainer, tiny
from members import together

from nanogpt.base.errors import OutOfMemory
from nanogpt.base.language import ConfigError
from nanogpt.core import distributed, sharding
from nanogpt.weights import build, checkpoint
from nanogpt.weights.tensors import read_tensors

pytestmark = POSIX
# 5 条分给 2 个进程：2、3 条，各切成 1、2 个微批；10 个评估的窗口分给 3 个进程：2、1、1 批
ROWS = (
    "batch_size=2", "global_batch_size=5", "eval_batch_size=3", "eval_tokens=160", "overwrite=true", "max_iters=50", "model.dropout=0",
)


# 16 位的舍入会放大末位的差别
OTHERS = (
    ("optimizer=adamw", "precision=fp16", "memory=lean", "model.tie_embeddings=true"),
    ("finetune=lora", "precision=bf16", "parallel.sum_gradients=every"),
)


def steps(trainer, count):
    """Losses and gradient norms of so many steps, and the validation loss behind them."""
    results = [trainer.step() for _ in range(count)]
    return [*(r.loss for r in results), *(r.gradient_norm for r in results), trainer.evaluate()]


def trained(overrides, out, count, *more):
    """steps() of a new run, which saves at its middle and at its end."""
    trainer = new_trainer(overrides, *ROWS, *more, out=out)
    first = steps(trainer, count // 2)
    trainer._save(final=False)
    second = steps(trainer, count - count // 2)
    trainer._save(final=True)
    return first, second


def resumed(out, count, *more):
    """steps() of the run in `out` from its older checkpoint on."""
    older = checkpoint.checkpoints(out)[0].name
    return steps(resumed_trainer(out, f"checkpoint={older}", *more), count)


def several(*tasks):
    """What each (function, arguments) gives, one after the other in the same processes."""
    results = []
    for task, *arguments in tasks:
        results.append(task(*arguments))
        # 进程组已经在了
        distributed.start = lambda *_: None
    return results


def same(one, other):
    # 各进程的梯度加起来的次序不同：只差舍入
    np.testing.assert_allclose(one, other, atol=2e-5, rtol=1e-5)


def copied(in_tmp, name):
    """A copy of a run, to be resumed from."""
    shutil.copytree(in_tmp / name, in_tmp / f"{name}_copy")
    return in_tmp / f"{name}_copy"


def test_fifty_losses_equal_those_of_one_process_and_a_run_goes_on_under_any_number_of_processes(in_tmp, corpus_folder):
    overrides = tiny(corpus_folder)
    alone = trained(overrides, in_tmp / "one", 50)
    others = [trained(overrides, in_tmp / "other", 2, *more) for more in OTHERS]
    results = together(
        2, several, (trained, overrides, in_tmp / "two", 50, "parallel=fsdp"), (resumed, copied(in_tmp, "one"), 3, "parallel=fsdp"),
        *((trained, overrides, in_tmp / f"other{n}", 2, "parallel=fsdp", *more) for n, more in enumerate(OTHERS)),
    )
    for sharded, went_on, *others_sharded in results:
        for one, other in zip(others_sharded, others, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-3)
        same(sharded[0], alone[0])
        same(sharded[1], alone[1])
        # 1 -> fsdp(2)
        same(went_on[:3], alone[1][:3])
    copy = copied(in_tmp, "two")
    # fsdp(2) -> 1，fsdp(2) -> fsdp(3)：三个进程有的一行也分不到
    same(resumed(in_tmp / "two", 3)[:3], alone[1][:3])
    for went_on in together(3, resumed, copy, 3):
        same(went_on[:3], alone[1][:3])
    # 文件与一个进程写的同样
    for file in ("model.safetensors", "state.safetensors"):
        ours, theirs = (read_tensors(checkpoint.find(in_tmp / name, "last").folder / file) for name in ("two_copy", "one"))
        assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}


def out_of_memory(overrides):
    """What a step says of which process 1 has not memory enough."""
    trainer = new_trainer(overrides, *ROWS, "parallel=fsdp", out="outputs/run")
    distributed._watch.every_s = 0.3
    real = trainer.model.gathered_loss

    def loss(x, y):
        if distributed.rank():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(x, y)

    trainer.model.gathered_loss = loss
    with pytest.raises(ConfigError) as said:
        trainer.step()
    return said.type, str(said.value)


def test_a_process_without_memory_ends_a_sharded_training_in_one_line_each(in_tmp, corpus_folder):
    (kind, said), (oom, why) = together(2, out_of_memory, tiny(corpus_folder))
    assert oom is OutOfMemory and "with 2 rows at a time, and parallel=fsdp can repeat no step" in why
    assert kind is ConfigError and said.startswith("process 1 is gone; what is saved is kept: ")


@pytest.mark.parametrize("typed", [
    "memory.weights=bf16", "memory.optimizer_state=int8", "memory.optimizer_in_backward=true", "memory.offload_optimizer=true",
    "finetune=lora finetune.frozen_weights=nf4", "batch_size=auto global_batch_size=8",
])
def test_what_does_not_go_with_shards_is_refused_by_its_key(typed):
    key = typed.split()[-1] if "nf4" in typed else typed.split()[0]
    with pytest.raises(ConfigError, match=f"^{key} does not go with parallel=fsdp"):
        make_config("parallel=fsdp", *typed.split())


def test_a_foreign_optimizer_or_model_is_refused(in_tmp, tiny_overrides, monkeypatch):
    with pytest.raises(ConfigError, match=r"^model._target_=torch.*Linear does not go with parallel=fsdp"):
        sharding.shard(torch.nn.Linear(1, 1), "cpu")
    monkeypatch.setattr(sharding, "applies", lambda parallel: True)
    monkeypatch.setattr(sharding, "shard", lambda *_: None)
    monkeypatch.setattr(build, "build_part", lambda node, key, model: torch.optim.SGD(model.parameters()))
    with pytest.raises(ConfigError, match="optimizer=SGD does not go with parallel=fsdp"):
        new_trainer(tiny_overrides)
