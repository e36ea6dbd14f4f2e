"""Peak memory of nanoGPT's training step and of ours: GPT-2 124M, T = 1024, B = 8, bf16, AdamW.

    python benchmarks/vs_nanogpt_memory.py --nanogpt PATH     # writes benchmarks/results/vs_nanogpt_memory.json

On a CUDA card both are measured, each in a process of its own, with tokens/s. Without one both are traced by
the same tracer (bytes live at the peak, nothing allocated), which gives a ratio of memory and no speed.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# ruff: noqa: E402 - 先把仓库根目录放进路径
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from nanogpt.base.sample_config import register_schemas
from nanogpt.core.precision import Precision
from nanogpt.plan.substitutes import LikeCuda, substituted
from nanogpt.plan.trace import Shape, fake_tensors, trace
from nanogpt.plan.tracker import Tracker
from nanogpt.weights.build import build_model, build_step

ROWS, BLOCK, VOCAB = 8, 1024, 50257
STEPS = 10
OURS = {"default": ("memory=default",), "lean": ("memory=lean",), "selective": ("memory.activation_checkpointing=selective",)}


def nanogpt_parts(path: Path, device_type: str):
    """nanoGPT's model and optimizer as its train.py makes them."""
    sys.path.insert(0, str(path))
    from model import GPT, GPTConfig

    model = GPT(GPTConfig(block_size=BLOCK, vocab_size=VOCAB, n_layer=12, n_head=12, n_embd=768, dropout=0.0, bias=False))
    # fused=True 与 train.py 在 GPU 上相同
    return model, lambda: model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device_type)


def nanogpt_step(model, optimizer, x, y, context) -> None:
    """One iteration of its train.py without accumulation; bf16 needs no scaling."""
    with context():
        _, loss = model(x, y)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def peak_of(events: list[tuple[int, int]], live: int) -> int:
    """Largest number of live bytes."""
    best = live
    for _, size in events:
        live += size
        best = max(best, live)
    return best


def traced_nanogpt(path: Path) -> int:
    """Live bytes at the peak of nanoGPT's second step, as on a card."""

    def context():
        return torch.autocast("cpu", dtype=torch.bfloat16)

    with fake_tensors() as mode, substituted("cuda"), Tracker(mode) as tracker:
        model, make_optimizer = nanogpt_parts(path, "cuda")
        optimizer = make_optimizer()
        x = torch.empty(ROWS, BLOCK, dtype=torch.long)
        for _ in range(2):
            live = sum(tracker.live().values())
            tracker.take()
            with LikeCuda():
                nanogpt_step(model, optimizer, x, x, context)
        return peak_of(tracker.take(), live)


def our_config(overrides: tuple[str, ...]):
    """The config of our side."""
    register_schemas()
    typed = ["model=gpt2", "precision=bf16", "optimizer=adamw", "model.bias=false", f"model.vocab_size={VOCAB}", f"batch_size={ROWS}", *overrides]
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
        return OmegaConf.to_object(compose(config_name="train", overrides=typed))


def traced_ours(overrides: tuple[str, ...]) -> int:
    """Live bytes at the peak of our second step."""
    peaks = trace(our_config(overrides), Shape(ROWS, 1, ROWS, "cuda")).peaks()
    return max(size for phase, size in peaks.items() if phase.startswith("steady"))


def measured(path: Path, which: str) -> dict:
    """Peak bytes and tokens/s of one side on the card, in this process."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    x = torch.randint(0, VOCAB, (ROWS, BLOCK), device=device)
    if which == "nanogpt":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        model, make_optimizer = nanogpt_parts(path, "cuda")
        model.to(device)
        optimizer = make_optimizer()

        def one_step():
            nanogpt_step(model, optimizer, x, x, lambda: torch.autocast("cuda", dtype=torch.bfloat16))
    else:
        cfg = our_config(OURS[which])
        step = build_step(cfg, build_model(cfg.model, cfg.seed).to(device), Precision(cfg.precision, device))

        def one_step():
            step.micro_batch(x, x, 1.0)
            step.clip(step.gradient_norm(), 1.0)
            step.update()

    for _ in range(3):
        one_step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        one_step()
    torch.cuda.synchronize()
    speed = STEPS * ROWS * BLOCK / (time.perf_counter() - start)
    return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved(), "tokens_per_s": speed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "vs_nanogpt_memory.json")
    arguments = parser.parse_args()
    path = arguments.nanogpt.resolve()
    if arguments.child:
        print(json.dumps(measured(path, arguments.child)))
        return
    result = {"setting": f"GPT-2 124M, T={BLOCK}, B={ROWS}, bf16, AdamW", "torch": torch.__version__}
    if torch.cuda.is_available():
        result |= {"how": "measured", "device": torch.cuda.get_device_name(0)}
        for which in ("nanogpt", *OURS):
            command = [sys.executable, str(Path(__file__).resolve()), "--nanogpt", str(path), "--child", which]
            done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True)
            result[which] = json.loads(done.stdout.splitlines()[-1])
        for which in OURS:
            result[which]["memory_ratio"] = result[which]["allocated"] / result["nanogpt"]["allocated"]
            result[which]["speed_ratio"] = result[which]["tokens_per_s"] / result["nanogpt"]["tokens_per_s"]
    else:
        result |= {"how": "traced", "device": "as on a CUDA card, none present", "nanogpt": {"live": traced_nanogpt(path)}}
        for which, overrides in OURS.items():
            live = traced_ours(overrides)
            result[which] = {"live": live, "memory_ratio": live / result["nanogpt"]["live"]}
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
