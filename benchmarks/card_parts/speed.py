"""Tokens per second of training beside nanoGPT on the same card, where a step's time goes, and what updates cost."""

import functools
import sys
import time
from collections.abc import Iterator

import numpy as np
import torch
from card_parts.kit import GIB, Case, Lab, profile

from nanogpt.core.compilation import compile_updates

VOCAB = 50304
# 名字 -> (overrides, 每步行数)；nanoGPT 的名字在下面单列
GPT2 = ("model=gpt2", "optimizer=adamw", "model.bias=false")
OURS = {
    "ours gpt2 16 compiled": ((*GPT2, "compile=true"), 16),
    "ours modern muon 16 compiled": ((*GPT2, "arch=modern", "optimizer=muon", "compile=true"), 16),
    "ours gpt2 16 eager": (GPT2, 16),
    "ours gpt2 16 compiled, not deterministic": ((*GPT2, "compile=true", "deterministic=false"), 16),
    "ours gpt2 16 compiled, loss_chunk 512": ((*GPT2, "compile=true", "memory.loss_chunk_mib=512"), 16),
    "ours gpt2 16 selective compiled": ((*GPT2, "compile=true", "memory.activation_checkpointing=selective"), 16),
    "ours gpt2 8 eager": (GPT2, 8),
    "ours small 16 compiled": (("model=small", "optimizer=muon", "compile=true"), 16),
    "ours medium 16 compiled": (("model=medium", "optimizer=muon", "compile=true"), 16),
}
NANOGPT = {"nanogpt 16 compiled": (16, True), "nanogpt 16 eager": (16, False), "nanogpt 8 eager": (8, False)}
ORDER = (
    "ours gpt2 16 compiled", "nanogpt 16 compiled", "ours gpt2 16 compiled, not deterministic",
    "where a step's time goes", "ours gpt2 16 eager", "nanogpt 16 eager", "update fused", "update 8-bit",
    "update 8-bit, 1.5B", "ours modern muon 16 compiled", "update muon", "update kahan", "update offload",
    "ours gpt2 16 compiled, loss_chunk 512", "ours gpt2 16 selective compiled", "ours gpt2 8 eager",
    "nanogpt 8 eager", "ours small 16 compiled", "ours medium 16 compiled",
)
PRETENDED = ("ours gpt2 16 eager", "nanogpt 16 eager", "where a step's time goes", "update 8-bit")
UPDATES = {
    "fused": ("optimizer=adamw",), "8-bit": ("optimizer=adamw", "memory=lean8"), "muon": ("optimizer=muon",),
    "kahan": ("optimizer=adamw", "memory.weights=bf16", "memory.bf16_rounding=kahan"),
    "offload": ("optimizer=adamw", "memory=offload"),
    "8-bit, 1.5B": ("model=gpt2_xl", "optimizer=adamw", "memory=offload", "memory.offload_optimizer=false"),
}
TOY = ("model.n_layer=2", "model.n_head=2", "model.n_embd=32", "model.block_size=32")


def cases(lab: Lab) -> Iterator[Case]:
    """In the order of worth."""
    known = {name: functools.partial(ours, lab, *how) for name, how in OURS.items()}
    known |= {name: functools.partial(nanogpt, lab, *how) for name, how in NANOGPT.items()}
    known |= {f"update {name}": functools.partial(update, lab, overrides) for name, overrides in UPDATES.items()}
    known["where a step's time goes"] = lambda: step_parts(lab)
    for name in PRETENDED if lab.pretend else ORDER:
        yield name, known[name]


def trainer_of(lab: Lab, overrides: tuple[str, ...], rows: int):
    """A trainer of `rows` rows of 1024 tokens at GPT-2's vocabulary, in 16 bits."""
    if lab.pretend:
        cfg = lab.config(*overrides, *TOY, "model.vocab_size=64", "batch_size=2")
    else:
        block = () if any("gpt2" in override for override in overrides) else ("model.block_size=1024",)
        half = "bf16" if lab.bf16 else "fp16"
        sizes = (f"model.vocab_size={VOCAB}", f"batch_size={rows}", "max_iters=100000")
        cfg = lab.config(*overrides, f"precision={half}", *block, *sizes, data="gpt2")
    return lab.trainer(cfg)


def ours(lab: Lab, overrides: tuple[str, ...], rows: int) -> dict:
    """Speed, share of the card's peak and memory of our steps, data included."""
    trainer = trainer_of(lab, overrides, rows)
    tokens = trainer.global_rows * trainer.block_size
    found = timed(lab, trainer.step, tokens)
    return {**found, "mfu": trainer.metrics(tokens, found["step_ms"] / 1e3)["mfu"], "loss": float(trainer.step().loss)}


def timed(lab: Lab, step, tokens: int) -> dict:
    """Seconds of the first step, tokens/s of the later ones, peak memory, the slowest kernels."""
    started = time.perf_counter()
    step()
    lab.wait()
    first = time.perf_counter() - started
    lab.forget_peak()
    seconds = lab.seconds(step, count=5, each=1 if lab.pretend else 4)
    found = {"first_step_s": first, "step_ms": seconds * 1e3, "tokens_per_s": tokens / seconds, **lab.peaks()}
    return {**found, "kernels": profile(lab, step, 3, top=25)["kernels"]}


def nanogpt(lab: Lab, rows: int, compiled: bool) -> dict:
    """The same of its train.py's loop: autocast, fused AdamW, clipping, the next batch fetched beside the step."""
    if lab.nanogpt is None or not (lab.nanogpt / "model.py").is_file():
        return {"skipped": "no --nanogpt PATH with model.py"}
    if str(lab.nanogpt) not in sys.path:
        sys.path.insert(0, str(lab.nanogpt))
    from model import GPT, GPTConfig

    toy = {"block_size": 32, "vocab_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 32}
    full = {"block_size": 1024, "vocab_size": VOCAB, "n_layer": 12, "n_head": 12, "n_embd": 768}
    shape = toy if lab.pretend else full
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    model = GPT(GPTConfig(**shape, dropout=0.0, bias=False)).to(lab.device)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), lab.device.type)
    scaler = torch.amp.GradScaler(lab.device.type, enabled=not lab.bf16)
    run = torch.compile(model) if compiled else model
    rows, block = 2 if lab.pretend else rows, shape["block_size"]
    data, dtype = ("letters", np.uint8) if lab.pretend else ("gpt2", np.uint16)
    tokens = np.memmap(lab.data(data) / "train.bin", dtype=dtype, mode="r")

    def batch():
        starts = torch.randint(len(tokens) - block, (rows,)).tolist()
        windows = torch.stack([torch.from_numpy(tokens[i : i + block + 1].astype(np.int64)) for i in starts])
        parts = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
        return parts if lab.pretend else [part.pin_memory().to(lab.device, non_blocking=True) for part in parts]

    following = batch()

    def step():
        nonlocal following
        with torch.autocast(lab.device.type, dtype=torch.bfloat16 if lab.bf16 else torch.float16):
            _, loss = run(*following)
        following = batch()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return timed(lab, step, rows * block)


# ---- 一步的时间花在哪里 ----


def step_parts(lab: Lab) -> dict:
    """ms of blocks, loss, backward and update, eager and compiled; kernels and idle time of whole compiled steps."""
    eager = trainer_of(lab, GPT2, 16)
    found = {"parts_ms": phases(lab, eager)}
    del eager
    lab.clean()
    trainer = trainer_of(lab, GPT2 if lab.pretend else (*GPT2, "compile=true"), 16)
    return {**found, "parts_compiled_ms": phases(lab, trainer), **profile(lab, trainer.step, 1 if lab.pretend else 5)}


def phases(lab: Lab, trainer) -> dict[str, float]:
    """Each part with all before it, less what is before it."""
    trainer.step()
    model, step = trainer.model, trainer.computation
    rows, block = trainer.micro_batch, trainer.block_size
    x = torch.randint(0, 64 if lab.pretend else VOCAB, (rows, block), device=lab.device)

    def hidden():
        with step.precision.context():
            model.hidden(x)

    def whole():
        step.update()

    # 先丢掉上一次的梯度：与真的一步一样，从没有梯度开始
    upto = {
        "blocks": lab.seconds(hidden, count=5),
        "loss": lab.seconds(lambda: step.forward(x, x, 1.0), count=5),
        "backward": lab.seconds(lambda: (step.micro_batch(x, x, 1.0), step.optimizer.zero_grad()), count=5),
        "update": lab.seconds(lambda: (step.micro_batch(x, x, 1.0), whole()), count=5),
    }
    before = [0.0, *list(upto.values())[:-1]]
    return {name: (seconds - earlier) * 1e3 for (name, seconds), earlier in zip(upto.items(), before)}


def update(lab: Lab, overrides: tuple[str, ...]) -> dict:
    """One update of GPT-2 124M (or of the named model): ms, kernels, and the bytes of its states."""
    large = any("gpt2_xl" in override for override in overrides)
    if large and lab.total < 40 * GIB:
        return {"skipped": "for cards of 40 GiB and more"}
    trainer = trainer_of(lab, overrides if large else ("model=gpt2", *overrides), 1)
    # 与 compile=auto 一样；前向不编，省下时间
    compile_updates(trainer.optimizer, "auto", lab.device, trainer.console)
    step = trainer.computation
    trainer.step()
    gradients = [torch.randn_like(p) * 1e-3 for p in step.parameters]

    def once():
        for p, gradient in zip(step.parameters, gradients):
            p.grad = gradient
        step.update()

    parameters = sum(p.numel() for p in step.parameters)
    return {"parameters": parameters, **profile(lab, once, 3, top=5)}
