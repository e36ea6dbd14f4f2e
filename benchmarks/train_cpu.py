"""What a CPU's own bf16 units, Newton-Schulz's forms, look-up tables and compiled loops do to a training step, and bf16 to the loss.

    python benchmarks/train_cpu.py [--part speed|loss] [--rounds 7] [--seeds 1337 1338 1339] [--iters 400]

speed, 4 minutes on 2 cores: training steps of three shapes, the ways in turn, ratios of medians; "loops" are those of
core/loops, for which numba must be installed. loss: the same trainings of the default recipe in fp32, in bf16 and in bf16
with loops (300 steps or more) for each seed, at 4/4/128. Writes benchmarks/results/train_cpu.json; --part measures
one half anew and keeps the other.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402 - 先把仓库根目录放进路径
import torch.nn.functional as F  # noqa: E402

from nanogpt.base.config import HardwareConfig  # noqa: E402
from nanogpt.base.groups import train_config  # noqa: E402
from nanogpt.core import attention, kernels, machine  # noqa: E402
from nanogpt.core.compilation import use_loops  # noqa: E402
from nanogpt.core.precision import Precision  # noqa: E402
from nanogpt.run import cpu_units  # noqa: E402
from nanogpt.run.metrics import processor_name  # noqa: E402
from nanogpt.weights.build import build_model, build_step  # noqa: E402

CPU = torch.device("cpu")
SHAPES = {
    "4/4/128": ("model.n_layer=4", "model.n_head=4", "model.n_embd=128", "model.block_size=64", "batch_size=12"),
    "tiny": ("model=tiny", "batch_size=16"),
    "6/6/384": ("model.n_layer=6", "model.n_head=6", "model.n_embd=384", "model.block_size=256", "batch_size=12"),
}
DEFAULT, GPT2 = ("arch=modern", "optimizer=muon"), ("arch=gpt2", "optimizer=adamw")
# 名字 -> 设置；before 是 Gram 矩阵与 bf16 单元之前的样子
WAYS = {
    "before": (*DEFAULT, "precision.cpu_bf16=none"), "fp32": (*DEFAULT, "precision.cpu_bf16=none"),
    "fp32, bf16 iteration": (*DEFAULT, "precision.cpu_bf16=optimizer"), "bf16": (*DEFAULT, "precision.cpu_bf16=all"),
    "bf16, dropout": (*DEFAULT, "precision.cpu_bf16=all", "dropout=0.1"),
    "bf16, PyTorch's dropout": (*DEFAULT, "precision.cpu_bf16=all", "dropout=0.1"),
    "bf16, no tables": (*DEFAULT, "precision.cpu_bf16=all", "model.ngrams=[]"),
    "fp32, loops": (*DEFAULT, "precision.cpu_bf16=none"), "bf16, loops": (*DEFAULT, "precision.cpu_bf16=all"),
    "bf16, dropout, loops": (*DEFAULT, "precision.cpu_bf16=all", "dropout=0.1"),
    "gpt2 adamw fp32": (*GPT2, "precision.cpu_bf16=none"), "gpt2 adamw bf16": (*GPT2, "precision.cpu_bf16=all"),
    "gpt2 adamw bf16, loops": (*GPT2, "precision.cpu_bf16=all"),
}
RATIOS = {
    "bf16 over fp32, gpt2 adamw": ("gpt2 adamw fp32", "gpt2 adamw bf16"), "bf16 over fp32, default": ("fp32", "bf16"),
    "bf16 over before, default": ("before", "bf16"), "Gram matrix over before, default": ("before", "fp32"),
    "bf16 iteration over fp32, default": ("fp32", "fp32, bf16 iteration"),
    "default takes, of gpt2 adamw, before": ("before", "gpt2 adamw fp32"),
    "default takes, of gpt2 adamw, fp32 with bf16 iteration": ("fp32, bf16 iteration", "gpt2 adamw fp32"),
    "default takes, of gpt2 adamw, both bf16": ("bf16", "gpt2 adamw bf16"),
    "default with loops takes, of gpt2 adamw, both bf16": ("bf16, loops", "gpt2 adamw bf16"),
    "default takes, of gpt2 adamw, both bf16 with loops": ("bf16, loops", "gpt2 adamw bf16, loops"),
    "loops over operations, fp32": ("fp32", "fp32, loops"), "loops over operations, bf16": ("bf16", "bf16, loops"),
    "loops over operations, bf16 with dropout": ("bf16, dropout", "bf16, dropout, loops"), "with tables over without, bf16": ("bf16", "bf16, no tables"),
    "with dropout over without, bf16": ("bf16, dropout", "bf16"), "with PyTorch's dropout over without, bf16": ("bf16, PyTorch's dropout", "bf16"),
}
OWN_DROPOUT = kernels.dropout
FORMS = {"plain": (False, math.inf), "Gram matrix": (False, kernels.GRAM_RATIO), "bf16": (True, kernels.GRAM_RATIO)}


def on_gram_from(ratio: float) -> None:
    """Iterate on the Gram matrix where a matrix is `ratio` times as long as wide."""
    kernels.GRAM_RATIO = ratio


def drop_with_pytorch(yes: bool) -> None:
    """Dropout of activations by F.dropout, and of attention's weights by SDPA."""
    kernels.dropout = F.dropout if yes else OWN_DROPOUT
    attention.is_short = (lambda qkv, p: kernels.is_short(qkv, p) and not p) if yes else kernels.is_short


def training(shape: str, way: str) -> Callable[[], None]:
    """A function that takes one training step of a model of its own."""
    cfg = train_config([*SHAPES[shape], *WAYS[way], "model.vocab_size=65", "device=cpu"])
    model = build_model(cfg.model, 0).train()
    step = build_step(cfg, model, Precision(cfg.precision, CPU))
    if way.endswith("loops"):
        use_loops(step, "true", CPU, None, compiled=False, steps=math.inf, seconds=math.inf)
    for group in step.optimizer.param_groups:
        group["lr"] = 1e-3
    x, y = torch.randint(65, (2, cfg.batch_size, cfg.model.block_size), generator=torch.Generator().manual_seed(0))

    def once() -> None:
        on_gram_from(math.inf if way == "before" else FORMS["Gram matrix"][1])
        drop_with_pytorch(way.endswith("PyTorch's dropout"))
        step.finish(step.micro_batch(x, y, 1.0), 1.0, late=False)

    return once


def in_turn(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, every one behind one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, once in ways.items():
            # 前一步是别的模型的：缓存里没有自己的权重与状态，训练时却总有
            once()
            start = time.perf_counter()
            once()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: round(statistics.median(each), 3) for name, each in times.items()}


def speed(rounds: int) -> dict:
    """Steps of every shape, and Newton-Schulz alone at its matrices."""
    found: dict = {"step_ms": {}, "ratios": {}, "gain_that_auto_measures": {}, "newton_schulz_ms": {}}
    for shape in SHAPES:
        found["step_ms"][shape] = took = in_turn({way: training(shape, way) for way in WAYS}, rounds)
        found["ratios"][shape] = {name: round(took[a] / took[b], 3) for name, (a, b) in RATIOS.items()}
        cfg = train_config([*SHAPES[shape], *DEFAULT])
        found["gain_that_auto_measures"][shape] = cpu_units.time_layer(cpu_units.one_layer(cfg.model))
        print(shape, json.dumps(found["ratios"][shape], indent=1), flush=True)
    for width, layers in ((128, 4), (256, 4), (384, 6)):
        for matrices in (torch.randn(4 * layers, width, width), torch.randn(layers, width, 4 * width)):
            ways = {name: iteration(matrices, *form) for name, form in FORMS.items()}
            took = found["newton_schulz_ms"][" x ".join(map(str, matrices.shape))] = in_turn(ways, rounds)
            print(list(matrices.shape), took, flush=True)
    on_gram_from(FORMS["Gram matrix"][1])
    return found


def iteration(matrices: torch.Tensor, bf16: bool, ratio: float) -> Callable[[], None]:
    """A function that orthogonalises them once."""
    def once() -> None:
        on_gram_from(ratio)
        kernels.orthogonalize(matrices, 5, bf16)

    return once


def loss(seeds: list[int], iters: int) -> dict:
    """Validation losses of the default recipe at 4/4/128, in fp32 and in bf16, both with PyTorch's operations, and in bf16
    with compiled loops; and how far apart they are."""
    ways = {"fp32": ("none", "false"), "bf16": ("all", "false"), "bf16, loops": ("all", "auto")}
    found: dict = {"iters": iters, **{name: [] for name in ways}}
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            for name, (units, compiled) in ways.items():
                out = Path(folder) / f"{name}{seed}"
                typed = [
                    *SHAPES["4/4/128"], f"precision.cpu_bf16={units}", f"compile={compiled}", f"seed={seed}", f"max_iters={iters}", f"eval_interval={iters}",
                    "dataset=shakespeare_char", "logger=none", "sample_tokens=0", "device=cpu", f"out_dir={out.as_posix()}",
                ]
                subprocess.run([sys.executable, str(ROOT / "run_train.py"), *typed], check=True, capture_output=True)
                found[name].append(json.loads((out / "summary.json").read_text(encoding="utf-8"))["val_loss"])
            print(f"seed {seed}:", {name: round(found[name][-1], 4) for name in ways}, flush=True)
    for one, other, name in (("fp32", "bf16", "mean_difference"), ("bf16", "bf16, loops", "mean_difference_of_loops")):
        found[name] = statistics.mean(b - a for a, b in zip(found[one], found[other], strict=True))
    found["deviation_of_seeds"] = statistics.stdev(found["fp32"]) if len(seeds) > 1 else None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("all", "speed", "loss"), default="all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1338, 1339])
    parser.add_argument("--iters", type=int, default=400)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "train_cpu.json")
    arguments = parser.parse_args()
    machine.set_up(CPU, deterministic=False, hardware=HardwareConfig())
    result = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.is_file() else {}
    if arguments.part in ("all", "speed"):
        result["speed"] = speed(arguments.rounds)
    if arguments.part in ("all", "loss"):
        result["loss"] = loss(arguments.seeds, arguments.iters)
    result |= {"device": processor_name(CPU), "threads": torch.get_num_threads(), "torch": torch.__version__}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
