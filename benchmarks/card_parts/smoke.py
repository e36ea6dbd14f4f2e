"""Does training do on the card what it does on a CPU, to the bit where that is promised, and out of memory?"""

import contextlib
import copy
import functools
import re
from collections.abc import Iterator
from dataclasses import replace

import torch
from card_parts.kit import GIB, Case, Lab, profile

from nanogpt.base.config import TrainConfig
from nanogpt.base.errors import OutOfMemory
from nanogpt.run.session import Session
from nanogpt.weights import checkpoint
from nanogpt.weights.tensors import read_tensors

SMALL = (
    "model.n_layer=2", "model.n_head=2", "model.n_embd=128", "model.block_size=64", "batch_size=8",
    "learning_rate=2e-3",
    "warmup_iters=1", "precision.initial_loss_scale=256", "precision.tf32=false", "eval_tokens=1024",
)
TOY = ("model.n_embd=16", "model.block_size=16", "batch_size=4", "eval_tokens=128")
MEMORY = {
    "default": (), "lean": ("memory=lean",), "selective": ("memory.activation_checkpointing=selective",),
    "budget": ("memory.activation_checkpointing=budget", "memory.activation_budget_mib=1"),
    "lean8": ("memory=lean8",), "offload": ("memory=offload",), "minimal": ("memory=minimal",),
}
# 权重本身是 bf16
BF16_WEIGHTS = ("offload", "minimal")
PRETENDED = (
    ("modern", "muon", "default", "fp32"), ("gpt2", "adamw", "minimal", "bf16"), ("gpt2", "adamw", "lean8", "fp16"),
    ("modern", "adamw", "selective", "bf16"),
)
STEPS = 4
MORE = {
    "documents": ("documents",), "chunks": ("model.vocab_size=8192", "memory.loss_chunk_mib=1"),
    "lora": ("finetune=lora", "arch=gpt2"), "accumulated": ("gradient_accumulation_steps=3",),
    "kahan": ("precision=bf16", "memory.weights=bf16", "memory.bf16_rounding=kahan"),
    "llama": ("arch=llama",), "qwen3": ("arch=qwen3",),
    "lora4": ("memory=lora4", "arch=llama", "precision=bf16"),
}
BITS = {
    "fp32": ("precision=fp32",), "bf16": ("precision=bf16",), "fp16": ("precision=fp16",),
    "documents": ("documents", "precision=bf16"), "dropout": ("dropout=0.1", "precision=fp32"),
    "compiled": ("compile=true", "precision=bf16"),
    "lean8": ("memory=lean8", "precision=bf16"), "minimal": ("memory=minimal", "precision=bf16"),
}


def cases(lab: Lab) -> Iterator[Case]:
    """All of them, what matters most first."""
    yield "rates", lambda: rates(lab)
    for arch in ("gpt2", "modern"):
        for optimizer in ("adamw", "muon"):
            for memory in MEMORY:
                for precision in ("bf16",) if memory in BF16_WEIGHTS else ("fp32", "bf16", "fp16"):
                    cell = (arch, optimizer, memory, precision)
                    wanted = not lab.pretend or cell in PRETENDED
                    if wanted and (lab.bf16 or precision != "bf16"):
                        yield " ".join(cell), functools.partial(same_losses, lab, *cell)
    for name, overrides in MORE.items():
        if "precision=bf16" in overrides and not lab.bf16:
            continue
        yield name, functools.partial(same_as_cpu, lab, shape(lab, *overrides), 2e-2 if "precision=bf16" in overrides else 1e-3)
    for name, overrides in BITS.items():
        if name == "dropout" or not (lab.pretend or ("precision=bf16" in overrides and not lab.bf16)):
            yield f"bits {name}", functools.partial(bits, lab, shape(lab, "optimizer=adamw", *overrides))
    yield "attention kernels", lambda: attention_kernels(lab)
    yield "out of memory, injected", lambda: injected(lab)
    yield "out of memory in the update", lambda: in_update(lab)
    yield "out of memory, real", lambda: real(lab)


def shape(lab: Lab, *overrides: str) -> tuple[str, ...]:
    """Overrides of a small training; the word "documents" among them stands for that data."""
    # 合成的文字读很多遍，默认会去掉几张表；这里要它们都在
    tables = () if any(o.startswith("arch=") and o != "arch=modern" for o in overrides) else ("model.ngrams=[2,3,4,5]",)
    return (*SMALL, *tables, *(TOY if lab.pretend else ()), *overrides)


def config(lab: Lab, overrides: tuple[str, ...]) -> TrainConfig:
    """A config of one's own, composed once: Hydra needs a quarter of a second each time."""
    return copy.deepcopy(_config(lab, overrides))


@functools.cache
def _config(lab: Lab, overrides: tuple[str, ...]) -> TrainConfig:
    data = "documents" if "documents" in overrides else "letters"
    return lab.config(*(override for override in overrides if override != "documents"), data=data)


# ---- 损失与 CPU 上的相同 ----


def same_losses(lab: Lab, arch: str, optimizer: str, memory: str, precision: str) -> dict:
    """One cell of the grid."""
    overrides = shape(lab, f"arch={arch}", f"optimizer={optimizer}", *MEMORY[memory])
    cfg = config(lab, (*overrides, "precision=bf16") if memory in BF16_WEIGHTS else overrides)
    exact = cfg if memory in BF16_WEIGHTS else replace(cfg, precision=replace(cfg.precision, dtype="fp32"))
    cfg.precision = replace(cfg.precision, dtype=precision)
    # fp32 的差别只来自求和次序；Newton-Schulz 与 8 位状态会把它放大
    tolerance = 2e-2 if precision != "fp32" else 5e-3 if optimizer == "muon" or memory == "lean8" else 1e-4
    return compared(lab.losses(cfg, STEPS), reference(lab, overrides, exact), tolerance)


def same_as_cpu(lab: Lab, overrides: tuple[str, ...], tolerance: float) -> dict:
    """Losses of one setting here and on the CPU."""
    cfg = config(lab, overrides)
    return compared(lab.losses(cfg, STEPS), reference(lab, overrides, cfg), tolerance)


_references: dict[tuple, list[float]] = {}


def reference(lab: Lab, key: tuple[str, ...], cfg: TrainConfig) -> list[float]:
    """The losses on the CPU, computed once."""
    key = (lab, *key)
    if key not in _references:
        _references[key] = lab.losses(copy.deepcopy(replace(cfg, device="cpu")), STEPS)
    return _references[key]


def compared(got: list[float], want: list[float], tolerance: float) -> dict:
    """Largest relative difference of two lists of losses, and whether it is tolerable."""
    error = max(abs(a - b) / abs(b) for a, b in zip(got, want, strict=True))
    return {"ok": error <= tolerance, "measured": got, "expected": want, "difference": error, "tolerance": tolerance}


# ---- 逐位相同 ----


def bits(lab: Lab, overrides: tuple[str, ...]) -> dict:
    """Six steps, six again, and three with three more behind a resume: largest difference of any weight."""
    overrides = (*overrides, "max_iters=6", "lr_decay_iters=6", "eval_interval=3", "deterministic=true")
    first, again, resumed = weights(lab, overrides), weights(lab, overrides), weights(lab, overrides, interrupted=True)
    found = {"again": difference(first, again), "resumed": difference(first, resumed)}
    return {"ok": not any(found.values()), **found}


def difference(first: dict, other: dict) -> float:
    """Largest difference of any of the tensors that both have by name."""
    return max((first[name].double() - other[name].double()).abs().max().item() for name in first)


def weights(lab: Lab, overrides: tuple[str, ...], *, interrupted: bool = False) -> dict:
    """The weights that a run ends with."""
    folder = lab.run_folder()
    cfg = config(lab, (*overrides, f"out_dir={folder}", *(["max_iters=3"] if interrupted else [])))
    Session.new(cfg, folder, []).run()
    if interrupted:
        typed = config(lab, (*overrides, f"resume={folder}"))
        Session.resume(typed, ["max_iters=6"], folder).run()
    return read_tensors(checkpoint.find(folder, "last").folder / "model.safetensors")


def attention_kernels(lab: Lab) -> dict:
    """Which kernels attention takes in a deterministic step in 16 bits."""
    trainer = lab.trainer(config(lab, shape(lab, "precision=bf16", "deterministic=true")))
    found = profile(lab, trainer.step, 3, top=200)
    names = [row["name"] for row in found["kernels"]]
    names = [name for name in names if re.search("flash|fmha|efficient|cudnn|attention", name.lower())]
    return {"attention": names, "launches": found["launches"], "idle": found["idle"]}


# ---- 显存不足 ----


@contextlib.contextmanager
def failing(model, most_rows: int) -> Iterator[None]:
    """Let model.loss run out of memory above so many rows."""
    real = model.loss

    def loss(x, *arguments, **options):
        if len(x) > most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(x, *arguments, **options)

    model.loss = loss
    try:
        yield
    finally:
        del model.loss


def injected(lab: Lab) -> dict:
    """A step and an evaluation that fail above two rows go on with two and come to the same."""
    cfg = config(lab, shape(lab, "optimizer=adamw"))
    whole, halved = lab.trainer(cfg), lab.trainer(cfg)
    halved.model.load_state_dict(whole.model.state_dict())
    want = [float(whole.step().loss) for _ in range(2)] + [whole.evaluate()]
    with failing(halved.model, 2):
        got = [float(halved.step().loss) for _ in range(2)] + [halved.evaluate()]
    found = compared(got, want, 1e-4)
    return {**found, "ok": found["ok"] and halved.micro_batch == 2, "micro_batch": halved.micro_batch}


def in_update(lab: Lab) -> dict:
    """Where nothing can be halved the run ends with the error that says so."""
    trainer = lab.trainer(config(lab, shape(lab)))
    trainer.step()

    def step(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    trainer.optimizer.step = step
    try:
        trainer.step()
    except OutOfMemory as error:
        return {"ok": error.phase == "update", "phase": error.phase}
    return {"ok": False, "error": "no error"}


def real(lab: Lab) -> dict:
    """Under a cap that holds half of the batch: a step is halved, comes to the same, and gives its memory back."""
    if lab.device.type != "cuda":
        return {"skipped": "a CPU has no allocator with a cap"}
    sizes = ("model.block_size=256", "model.vocab_size=8192", "model.ngrams=[]", "optimizer=adamw")
    exact = ("precision=fp32", "precision.tf32=false")
    half, full = (config(lab, (*sizes, *exact, f"batch_size={rows}")) for rows in (32, 64))
    want = lab.losses(full, 2)
    lab.clean()
    lab.losses(half, 2)
    cap = 1.2 * torch.cuda.max_memory_reserved()
    lab.clean()
    trainer = lab.trainer(full, drawn_on="cpu")
    torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.get_device_properties(0).total_memory, 0)
    got = [float(trainer.step().loss) for _ in range(2)]
    lab.wait()
    settled = torch.cuda.memory_allocated()
    then, val = float(trainer.step().loss), trainer.evaluate()
    lab.wait()
    kept = torch.cuda.memory_allocated() - settled
    found = compared(got, want, 1e-3)
    ok = found["ok"] and trainer.micro_batch < 64 and kept < 2**20
    more = {"micro_batch": trainer.micro_batch, "cap_gib": cap / GIB, "kept_bytes": kept, "then": then, "val_loss": val}
    return {**found, **more, "ok": ok}


# ---- 这张卡有多快 ----


def rates(lab: Lab) -> dict:
    """Copies in GB/s, products in TFLOP/s, and the GiB of the card that are not the allocator's."""
    device, cuda = lab.device, lab.device.type == "cuda"
    source = torch.ones(2**28 if cuda else 2**20, device=device)
    sink = torch.empty_like(source)
    found = {"copy_gb_per_s": 2 * source.nbytes / lab.seconds(lambda: sink.copy_(source)) / 1e9}
    found["read_gb_per_s"] = source.nbytes / lab.seconds(source.sum) / 1e9
    sink = None
    size = 8192 if cuda else 128

    def tflops(dtype, tf32: bool) -> float:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a = torch.randn(size, size, device=device, dtype=dtype)
        return 2 * size**3 / lab.seconds(lambda: a @ a) / 1e12

    formats = {"fp16": (torch.float16, False), "tf32": (torch.float32, True), "fp32": (torch.float32, False)}
    formats |= {"bf16": (torch.bfloat16, False)} if lab.bf16 else {}
    found |= {f"{name}_tflops": tflops(*how) for name, how in formats.items()}
    if cuda:
        lab.forget_peak()
        free, total = torch.cuda.mem_get_info()
        found |= {"total_gib": total / GIB, "beside_allocator_gib": (total - free - torch.cuda.memory_reserved()) / GIB}
    return found
