"""nanoGPT and this project side by side on one machine: speed, time to a loss, loss after equal tokens.

    python benchmarks/vs_nanogpt.py --nanogpt PATH [--part speed|wide|target] [--rounds 5] [--seeds 1337 1338 1339]

PATH is a checkout of karpathy/nanoGPT. Both programs run as a person would start them, one at a
time, on tiny-shakespeare with nanoGPT's published CPU recipe, which does not compile; `wide` compares the speed at the shape
of its GPU example, both with and without compiling. Writes benchmarks/results/vs_nanogpt.json; --part measures one part anew
and keeps the others.
"""

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nanogpt.base.language import ConfigError  # noqa: E402
from nanogpt.core.compilation import LEAST_STEPS  # noqa: E402
from nanogpt.data import assets, corpus  # noqa: E402 - 先把仓库根目录放进路径

TARGET = 1.8857
# nanoGPT README 的 CPU 配方，逐项照抄
RECIPE = {
    "device": "cpu", "compile": "False", "eval_iters": 20, "log_interval": 1, "block_size": 64, "batch_size": 12, "n_layer": 4,
    "n_head": 4, "n_embd": 128, "max_iters": 2000, "lr_decay_iters": 2000, "dropout": 0.0,
}
# 它的 GPU 例子的形状，批量按 CPU 取小
WIDE = {"block_size": 256, "batch_size": 16, "n_layer": 6, "n_head": 6, "n_embd": 384}
# 与它同一结构、同一批量，用本项目来训
SAME_ARCHITECTURE = [
    "dataset=shakespeare_char", "arch=gpt2", "model.activation=gelu", "optimizer=adamw", "learning_rate=1e-3", "logger=none",
    "sample_tokens=0", "device=cpu", "log_interval=1", "eval_interval=1000000", "eval_tokens=64",
]


def processor() -> str:
    """The processor's name."""
    if Path("/proc/cpuinfo").is_file():
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))[1]
    return platform.processor() or platform.machine()


def run_nanogpt(path: Path, out: Path, **changes) -> dict:
    """Run nanoGPT's train.py; seconds of the process, and the ms of every iteration that evaluated nothing."""
    settings = {**RECIPE, "out_dir": str(out), **changes}
    command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *(f"--{k}={v}" for k, v in settings.items())]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=path, capture_output=True, text=True, encoding="utf-8", check=True)
    wall_s = time.perf_counter() - start
    steps = [float(ms) for number, ms in re.findall(r"iter (\d+): loss \S+, time (\S+)ms", done.stdout) if int(number) % 250 and int(number) > 10]
    estimate = re.findall(r"step \d+: train loss \S+, val loss (\S+)", done.stdout)
    return {"wall_s": wall_s, "step_ms": statistics.median(steps), "own_val_estimate": float(estimate[-1])}


def nanogpt_validation_loss(path: Path, out: Path, data: np.ndarray) -> float:
    """Loss of its checkpoint over the whole validation split, in windows of its block size."""
    import torch

    sys.path.insert(0, str(path))
    from model import GPT, GPTConfig

    saved = torch.load(out / "ckpt.pt", weights_only=True)
    model = GPT(GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(data) - 1, 64):
            piece = torch.from_numpy(data[start : start + 65].astype(np.int64))
            total += model(piece[None, :-1], piece[None, 1:])[1].item() * (len(piece) - 1)
            count += len(piece) - 1
    return total / count


def run_ours(folder: Path, name: str, *overrides: str) -> dict:
    """Run run_train.py; seconds of the process, its summary and the ms of every iteration."""
    out = folder / name
    command = [sys.executable, str(ROOT / "run_train.py"), *overrides, f"out_dir={out}", "lang=en"]
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8", check=True)
    wall_s = time.perf_counter() - start
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    speeds = [line["tokens_per_s"] for line in lines if "tokens_per_s" in line and line["iteration"] > 10]
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return {"wall_s": wall_s, "tokens_per_s": statistics.median(speeds), "summary": summary}


def prepare(path: Path) -> np.ndarray:
    """Put the text where nanoGPT expects it, prepare both forms, check that they are equal; the validation ids."""
    folder = path / "data" / "shakespeare_char"
    shutil.copyfile(assets.fetch(assets.TINY_SHAKESPEARE), folder / "input.txt")
    subprocess.run([sys.executable, "prepare.py"], cwd=folder, check=True, capture_output=True)
    subprocess.run([sys.executable, str(ROOT / "data" / "shakespeare_char" / "prepare.py")], check=True, capture_output=True)
    theirs = np.fromfile(folder / "val.bin", dtype=np.uint16)
    ours = np.fromfile(corpus.folder_of("shakespeare_char", None, {}) / "val.bin", dtype=np.uint8)
    assert np.array_equal(theirs, ours), "the two validation splits differ"
    return theirs


def same_architecture(path: Path, folder: Path, rounds: int, shape: dict, iters: int, *, both_compiled: bool = False) -> dict:
    """Tokens/s at the same architecture and batch, the programs in turn, ours (and where said nanoGPT) also compiled."""
    rows, tokens = [], shape["block_size"] * shape["batch_size"]
    batch = ("batch_size", "block_size")
    mine = [f"{key if key == 'batch_size' else 'model.' + key}={shape[key]}" for key in ("n_layer", "n_head", "n_embd", *batch)]
    for number in range(rounds):
        found = {}
        for compiled in ("False", "True") if both_compiled else ("False",):
            out = folder / f"nano{shape['n_embd']}-{number}{compiled}"
            theirs = run_nanogpt(path, out, **shape, max_iters=iters, eval_iters=1, eval_interval=100000, compile=compiled)
            found["nanogpt" + "_compiled" * (compiled == "True")] = tokens / theirs["step_ms"] * 1e3
        # auto: with numba the small operations of a training of so many steps are compiled loops
        for compiled, name in (("false", "ours"), ("true", "ours_compiled"), *([("auto", "ours_loops")] if iters >= LEAST_STEPS else [])):
            out = f"same{shape['n_embd']}-{number}{compiled}"
            ours = run_ours(folder, out, *SAME_ARCHITECTURE, *mine, f"max_iters={iters}", f"compile={compiled}")
            found[name] = ours["tokens_per_s"]
        rows.append(found)
        print(f"same architecture, round {number + 1}, tokens/s:", {name: round(speed) for name, speed in found.items()}, flush=True)

    def ratio(ours: str, theirs: str = "nanogpt") -> float:
        return statistics.median(row[ours] / row[theirs] for row in rows)

    of_both = {"ratio_both_compiled": ratio("ours_compiled", "nanogpt_compiled")} if both_compiled else {}
    return {
        **{f"{name}_tokens_per_s": [row[name] for row in rows] for name in rows[0]},
        "ratio": ratio("ours"), "ratio_compiled": ratio("ours_compiled"), **of_both,
        **({"ratio_loops": ratio("ours_loops")} if iters >= LEAST_STEPS else {}),
    }


def time_to_target(path: Path, folder: Path, seeds: list[int], val: np.ndarray) -> dict:
    """Process wall time of nanoGPT's recipe and of experiment=cpu_speedrun, and the losses they end at."""
    theirs = run_nanogpt(path, folder / "nano_full", log_interval=10)
    theirs["full_val_loss"] = nanogpt_validation_loss(path, folder / "nano_full", val)
    print(f"nanoGPT: {theirs['wall_s']:.1f} s, val {theirs['full_val_loss']:.4f} (own estimate {theirs['own_val_estimate']})", flush=True)
    runs = []
    for seed in seeds:
        ours = run_ours(folder, f"speedrun{seed}", "experiment=cpu_speedrun", f"seed={seed}")
        runs.append({"seed": seed, "wall_s": ours["wall_s"], "full_val_loss": ours["summary"]["val_loss"], "tokens": ours["summary"]["tokens"]})
        print(f"ours, seed {seed}: {ours['wall_s']:.1f} s, val {ours['summary']['val_loss']:.4f}", flush=True)
    slowest = max(run["wall_s"] for run in runs)
    return {
        "target": TARGET, "nanogpt": theirs, "ours": runs, "all_reach_target": all(run["full_val_loss"] <= TARGET for run in runs),
        "ratio_median": theirs["wall_s"] / statistics.median(run["wall_s"] for run in runs), "ratio_slowest": theirs["wall_s"] / slowest,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True)
    parser.add_argument("--part", choices=("all", "speed", "wide", "target"), default="all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1338, 1339])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "vs_nanogpt.json")
    arguments = parser.parse_args()
    path = arguments.nanogpt.resolve()
    val = prepare(path)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        result = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.is_file() else {}
        if arguments.part in ("all", "speed"):
            result["same_architecture"] = same_architecture(path, folder, arguments.rounds, {key: RECIPE[key] for key in WIDE}, LEAST_STEPS)
        if arguments.part in ("all", "wide"):
            result["same_architecture_6_6_384"] = same_architecture(path, folder, arguments.rounds, WIDE, 24, both_compiled=True)
        if arguments.part in ("all", "target"):
            target = result["time_to_target"] = time_to_target(path, folder, arguments.seeds, val)
            equal = run_ours(folder, "equal", "experiment=shakespeare_char")["summary"]
            result["equal_tokens"] = {
                "tokens": equal["tokens"], "nanogpt_val_loss": target["nanogpt"]["full_val_loss"], "ours_val_loss": equal["val_loss"],
            }
    import torch

    result["device"] = f"{processor()}, {os.cpu_count()} cores, no GPU"
    result["torch"] = torch.__version__
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
