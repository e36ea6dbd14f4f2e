"""Training steps recorded as CUDA graphs: do they give what steps launched one by one give, and how much faster?"""

import functools
from collections.abc import Iterator

from card_parts.kit import Case, Lab
from card_parts.smoke import bits, config, difference, shape
from card_parts.speed import TOY, timed

from nanogpt.base.errors import release

SAME = {
    "adamw fp32": ("optimizer=adamw", "precision=fp32"), "muon bf16": ("precision=bf16",),
    "muon fp16, dropout": ("precision=fp16", "dropout=0.1"),
    "documents, dropout": ("documents", "precision=bf16", "dropout=0.1"),
    "accumulated": ("precision=bf16", "gradient_accumulation_steps=2"),
    "lora": ("finetune=lora", "arch=gpt2", "precision=bf16"), "gpt2": ("arch=gpt2", "precision=bf16"),
}
# 预设照默认的批量，字符的词表：小模型的一步在显卡上全是启动
WAYS = {"one by one": "compile=false", "recorded": "compile=auto", "compiled and recorded": "compile=true"}
STEPS = 3


def cases(lab: Lab) -> Iterator[Case]:
    """What must be right first."""
    for name, overrides in SAME.items():
        if lab.bf16 or "precision=bf16" not in overrides:
            yield f"same, {name}", functools.partial(same, lab, shape(lab, *overrides))
    yield "a step that cannot be recorded", lambda: cut_off(lab)
    yield "bits muon, dropout", lambda: bits(lab, shape(lab, "optimizer=muon", "compile=auto", "dropout=0.1"))
    for preset in ("tiny", "small"):
        for way, asked in WAYS.items():
            if not (lab.pretend and asked == "compile=true"):
                yield f"{preset}, {way}", functools.partial(speed, lab, preset, asked)


def graphs_of(trainer) -> tuple[int, bool]:
    """(shapes of micro-batches that are recorded, whether the update is)."""
    graphs = getattr(trainer.computation, "graphs", None)
    return (len(graphs.recorded), graphs.has_update) if graphs else (0, False)


def same(lab: Lab, overrides: tuple[str, ...]) -> dict:
    """Six steps launched as graphs and six launched one by one, later ones in parts of five and three rows: largest
    difference of any weight.
    """
    found = []
    for asked in ("auto", "false"):
        trainer = lab.trainer(config(lab, (*overrides, f"compile={asked}", "deterministic=true", "max_iters=6")))
        losses = [float(trainer.step().loss) for _ in range(STEPS)]
        trainer.micro_batch = 5
        losses += [float(trainer.step().loss) for _ in range(STEPS)]
        found.append((losses, dict(trainer.model.named_parameters()), graphs_of(trainer)))
    (losses, mine, (shapes, update)), (wanted, plain, _) = found
    apart = difference(plain, mine)
    ok = losses == wanted and not apart and (lab.pretend or shapes > 1)
    return {"ok": ok, "difference": apart, "shapes": shapes, "update": update, "measured": losses, "expected": wanted}


def cut_off(lab: Lab) -> dict:
    """A loss that asks the host, which ends the recording: the steps, and the allocator, go on as if none was tried."""
    found = []
    for asked in ("auto", "false"):
        trainer = lab.trainer(config(lab, shape(lab, "precision=bf16", "dropout=0.1", f"compile={asked}", "deterministic=true")))
        real = trainer.model.loss
        trainer.model.loss = lambda x, y, real=real: real(x, y) * (1.0 if y.max().item() >= 0 else 0.0)
        losses = [float(trainer.step().loss) for _ in range(STEPS)]
        release(lab.device)
        found.append(([*losses, trainer.evaluate(), float(trainer.step().loss)], graphs_of(trainer)))
    (losses, recorded), (wanted, _) = found
    return {"ok": losses == wanted and recorded == (0, False), "measured": losses, "expected": wanted}


def speed(lab: Lab, preset: str, asked: str) -> dict:
    """Speed of a preset as it comes, on text of few characters."""
    trainer = lab.trainer(lab.config(f"model={preset}", asked, "precision=auto", "max_iters=1000", *(TOY if lab.pretend else ())))
    found = timed(lab, trainer.step, trainer.global_rows * trainer.block_size)
    return {**found, "recorded": graphs_of(trainer)[0] > 0, "loss": float(trainer.step().loss)}
