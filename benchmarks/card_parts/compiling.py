"""torch.compile of the step: seconds, graphs, and new compilations where a training meets another shape."""

import contextlib
import functools
import time
from collections.abc import Iterator
from unittest import mock

import torch
from card_parts.kit import Case, Lab
from card_parts.smoke import compared, failing

MEMORY = {
    "default": (), "lean": ("memory=lean",), "selective": ("memory.activation_checkpointing=selective",),
    "budget": ("memory.activation_checkpointing=budget", "memory.activation_budget_mib=64"),
}
# 宽度与 GPT-2 124M 相同；图的数目与层数无关
WIDE = (
    "model.n_layer=2", "model.n_head=12", "model.n_embd=768", "model.block_size=512", "model.vocab_size=8192",
    "batch_size=8",
)
TOY = ("model.n_layer=2", "model.n_head=2", "model.n_embd=32", "model.block_size=32", "batch_size=4")


def cases(lab: Lab) -> Iterator[Case]:
    """arch x memory."""
    for memory, overrides in MEMORY.items():
        for arch in ("gpt2", "modern"):
            if not lab.pretend or (arch, memory) == ("modern", "lean"):
                yield f"{arch} {memory}", functools.partial(compiled, lab, f"arch={arch}", *overrides)


def compiled(lab: Lab, *overrides: str) -> dict:
    """Losses beside the eager step's; graphs after steps, after partial batches of evaluation, after a halved batch."""
    fixed = ("optimizer=adamw", "precision=fp32", "precision.tf32=false", "learning_rate=1e-3", "eval_tokens=null")
    overrides = (*(TOY if lab.pretend else WIDE), *fixed, *overrides)
    eager = lab.trainer(lab.config(*overrides), drawn_on="cpu")
    want = [float(eager.step().loss) for _ in range(3)] + [eager.evaluate()]
    del eager
    lab.clean()
    with rehearsed(lab):
        trainer = lab.trainer(lab.config(*overrides, "compile=true"), drawn_on="cpu")
        found, got = {}, []
        started = time.perf_counter()
        got.append(float(trainer.step().loss))
        lab.wait()
        found["first_step_s"] = time.perf_counter() - started
        got += [float(trainer.step().loss) for _ in range(2)]
        found["graphs"] = counted()
        got.append(trainer.evaluate())
        found["graphs_after_evaluation"] = counted()
        with failing(trainer.model, 2 if lab.pretend else 4):
            trainer.step()
        found["graphs_after_halving"], found["micro_batch"] = counted(), trainer.micro_batch
    breaks, result = dict(torch._dynamo.utils.counters["graph_break"]), compared(got, want, 1e-3)
    return {**result, **found, "ok": result["ok"] and not breaks and found["graphs"] > 0, "breaks": breaks}


def counted() -> int:
    """Graphs that dynamo has made since the case began."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@contextlib.contextmanager
def rehearsed(lab: Lab) -> Iterator[None]:
    """Count from zero; in a rehearsal trace as torch.compile does, without the minute that the CPU's compiler takes."""
    import torch._dynamo

    torch._dynamo.utils.counters.clear()
    eager = functools.partial(torch.compile, backend="eager")
    with mock.patch.object(torch, "compile", eager) if lab.pretend else contextlib.nullcontext():
        yield
