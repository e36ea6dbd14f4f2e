"""Whether a model learns as well when memory is saved: one small recipe, plain and with each part and preset of memory=.

    python benchmarks/fit_more_learns.py [--iters 200] [--seeds 1337 1338] [--optimizers muon adamw] [--threads 2] [--quick]

The recipe is experiment=cpu_speedrun (tiny-shakespeare) for --iters iterations; the figure is the loss over the whole validation
split, and its ratio to the plain run with the same seed. Writes benchmarks/results/fit_more_learns.json; --quick trains four
iterations of a smaller model and writes nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# 每一部分单独开，再是整套预设
VARIANTS = {
    "plain": [],
    "precision=bf16": ["precision=bf16"],
    "checkpointing=selective": ["memory.activation_checkpointing=selective"],
    "checkpointing=budget": ["memory.activation_checkpointing=budget", "memory.activation_budget_mib=8"],
    "optimizer_state=int8": ["memory.optimizer_state=int8"],
    "weights=bf16 stochastic": ["memory.weights=bf16"],
    "weights=bf16 kahan": ["memory.weights=bf16", "memory.bf16_rounding=kahan"],
    "optimizer_in_backward": ["memory.optimizer_in_backward=true"],
    "offload_optimizer": ["memory.offload_optimizer=true"],
    "memory=lean": ["memory=lean"],
    "memory=lean8": ["memory=lean8"],
    "memory=offload": ["memory=offload"],
    "memory=minimal": ["memory=minimal"],
}
# AdamW 在这个小配方上的合适学习率
RATES = {"muon": "2e-2", "adamw": "5e-3"}


def validation_loss(overrides: list[str], threads: int) -> tuple[float, float]:
    """(loss over the whole validation split, seconds) of one training in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, str(ROOT / "run_train.py"), "experiment=cpu_speedrun", "sample_tokens=0", f"out_dir={out}", *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        started = time.perf_counter()
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8", check=False)
        if done.returncode:
            sys.exit(f"{' '.join(overrides)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        return summary["val_loss"], round(time.perf_counter() - started, 1)


def measure(arguments: argparse.Namespace, optimizer: str) -> dict:
    """Each variant's losses over the seeds and the mean of their ratios to the plain run's."""
    quick = ["model.n_embd=32", "model.ngrams=[2]", "eval_tokens=1024"] if arguments.quick else []
    results: dict[str, dict] = {}
    for name, parts in VARIANTS.items():
        losses, seconds = [], []
        for seed in arguments.seeds:
            loss, wall = validation_loss(
                [f"optimizer={optimizer}", f"learning_rate={RATES[optimizer]}", f"seed={seed}", f"max_iters={arguments.iters}",
                 f"eval_interval={arguments.iters}", "warmup_iters=3", *quick, *parts], arguments.threads,
            )
            losses.append(round(loss, 4))
            seconds.append(wall)
        plain = results["plain"]["val_loss"] if results else losses
        ratio = statistics.mean(a / b for a, b in zip(losses, plain, strict=True))
        results[name] = {"val_loss": losses, "ratio": round(ratio, 4), "wall_s": seconds, "overrides": parts}
        print(f"{optimizer:6} {name:26} {losses} x {ratio:.4f}  {seconds} s", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1338])
    parser.add_argument("--optimizers", nargs="+", default=["muon", "adamw"], choices=sorted(RATES))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.iters, arguments.seeds = 4, [1337]
    results = {optimizer: measure(arguments, optimizer) for optimizer in arguments.optimizers}
    if arguments.quick:
        return
    import torch
    from vs_nanogpt import processor

    record = {
        "recipe": "experiment=cpu_speedrun", "iters": arguments.iters, "seeds": arguments.seeds, "threads": arguments.threads, "device": processor(),
        "torch": torch.__version__, "ratio": "mean over the seeds of val_loss / val_loss of the plain run", "results": results,
    }
    path = ROOT / "benchmarks" / "results" / "fit_more_learns.json"
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
