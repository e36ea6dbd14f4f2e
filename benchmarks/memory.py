"""Predicted against measured peak memory over presets x precision x memory presets x batch sizes.

    python benchmarks/memory.py [--minutes 10]     # writes benchmarks/results/memory.json

The file is written after every setting; a command that was cut off, or whose minutes were spent, goes on where it
stopped when it is typed again, on the same device with the same PyTorch. The settings come in an order in which
any part of them is a fair one of all.

With a CUDA card: torch.cuda.max_memory_allocated and max_memory_reserved of real steps, an evaluation and a
sample, each setting in a process of its own, under the cap of hardware=rtx3060_12gb; also whether a setting
that the plan calls "fits" ran. Without one: the traced activations against the bytes that saved-tensor
hooks count, and the traced live peak against the growth of resident memory.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# ruff: noqa: E402 - 先把仓库根目录放进路径
import psutil
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from nanogpt.base.config import TrainConfig, check
from nanogpt.base.errors import is_out_of_memory
from nanogpt.base.files import write_text
from nanogpt.base.sample_config import register_schemas
from nanogpt.core import machine
from nanogpt.core.precision import Precision
from nanogpt.plan.plan import Planner
from nanogpt.plan.trace import Shape, trace
from nanogpt.run.metrics import peak_resident
from nanogpt.weights.build import build_model, build_step

VOCAB = 50257
# CPU 上要跑得动，又要大到常驻内存的增长盖过零碎开销
CPU_GRID = [
    *(("tiny", precision, memory, rows) for precision in ("fp32", "bf16") for memory in ("default", "lean") for rows in (8, 16)),
    *(("small", "fp32", memory, 4) for memory in ("default", "lean", "lean8")),
    ("small", "bf16", "minimal", 4),
]
GPU_GRID = [
    (model, precision, memory, rows)
    for model in ("small", "medium", "large", "gpt2", "gpt2_medium") for precision in ("fp32", "fp16", "bf16")
    for memory in ("default", "lean", "lean8") for rows in (1, 4, 16)
] + [
    (model, "bf16", "minimal", rows) for model in ("medium", "large", "gpt2_large", "gpt2_xl") for rows in (1, 4)
]
CPU_VOCAB = 4096
STRIDE = 7
# 大块内存用完立刻还给系统，常驻内存才跟着活着的张量走
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}


def config(model: str, precision: str, memory: str, rows: int, *, cuda: bool) -> TrainConfig:
    """The config of one setting; two micro-batches per step where gradients can be accumulated."""
    register_schemas()
    accumulation = 1 if memory == "minimal" else 2
    overrides = [
        f"model={model}", f"precision={precision}", f"memory={memory}", f"batch_size={rows}", "optimizer=adamw",
        f"gradient_accumulation_steps={accumulation}",
        f"model.vocab_size={VOCAB if cuda else CPU_VOCAB}", f"hardware={'rtx3060_12gb' if cuda else 'cpu'}",
    ]
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
        cfg = OmegaConf.to_object(compose(config_name="train", overrides=overrides))
    check(cfg)
    return cfg


def run_steps(cfg: TrainConfig, device: torch.device) -> None:
    """Two optimizer steps of two micro-batches, an evaluation and the reading of one long prompt."""
    from nanogpt.core.kv_cache import KVCache

    model = build_model(cfg.model, cfg.seed, cfg.memory.weights).to(device)
    step = build_step(cfg, model, Precision(cfg.precision, device, cfg.memory.weights))
    step.prepare()
    scaler = step.precision.scaler
    x = torch.randint(0, cfg.model.vocab_size, (cfg.batch_size, cfg.model.block_size), device=device)
    for _ in range(3 if device.type == "cuda" else 2):
        model.train()
        for _ in range(cfg.gradient_accumulation_steps):
            step.micro_batch(x, x, 0.5)
        if scaler.is_enabled():
            scaler.unscale_(step.optimizer)
        step.clip(step.gradient_norm(), 1.0)
        if scaler.is_enabled():
            scaler.step(step.optimizer)
            scaler.update()
            step.optimizer.zero_grad()
        else:
            step.update()
    model.eval()
    with torch.no_grad():
        with step.precision.context():
            model.loss(x, x)
        model.logits(model.hidden(x[:1], KVCache(model, 1))[:, -1])


def saved_bytes(cfg: TrainConfig) -> int:
    """Bytes that the first micro-batch keeps for the backward pass, weights and tokens aside."""
    device = torch.device("cpu")
    model = build_model(cfg.model, cfg.seed, cfg.memory.weights)
    step = build_step(cfg, model, Precision(cfg.precision, device, cfg.memory.weights))
    x = torch.randint(0, cfg.model.vocab_size, (cfg.batch_size, cfg.model.block_size))
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step.micro_batch(x, x, 0.5)
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in own)


def child(setting: list, cuda: bool) -> dict:
    """Measure one setting in this process."""
    cfg = config(*setting, cuda=cuda)
    if cuda:
        device = torch.device("cuda", 0)
        machine.set_up(device, deterministic=cfg.deterministic, hardware=cfg.hardware)
        try:
            run_steps(cfg, device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return {"ran": False}
        return {"ran": True, "allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    torch.set_num_threads(1)
    # 先走一遍极小的：库的代码页、线程栈不算在张量头上
    small = config("tiny", setting[1], setting[2], 1, cuda=False)
    small.model.vocab_size, small.model.n_embd, small.model.ngram_buckets = 64, 64, 64
    run_steps(small, torch.device("cpu"))
    before = psutil.Process().memory_info().rss
    run_steps(cfg, torch.device("cpu"))
    return {"ran": True, "resident": peak_resident() - before}


def measure(setting: tuple, cuda: bool) -> dict:
    """Prediction and measurement of one setting."""
    cfg = config(*setting, cuda=cuda)
    command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(setting), *(["--cuda"] if cuda else [])]
    done = subprocess.run(command, env={**os.environ, **({} if cuda else MALLOC)}, capture_output=True, text=True, encoding="utf-8", check=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    row = dict(zip(("model", "precision", "memory", "batch_size"), setting, strict=True))
    if cuda:
        plan = Planner(cfg).predict(cfg)
        row |= {"verdict": plan.verdict, "predicted_allocated": plan.allocated, "predicted_reserved": plan.reserved, **measured}
        if measured["ran"]:
            row["error_allocated"] = plan.allocated / measured["allocated"] - 1
            row["error_reserved"] = plan.reserved / measured["reserved"] - 1
        return row
    traced = trace(cfg, Shape(cfg.batch_size, cfg.gradient_accumulation_steps, cfg.batch_size))
    live, hooks = traced.peak()[0], saved_bytes(cfg)
    row |= {
        "predicted_live": live, "resident_growth": measured["resident"], "error_resident": live / measured["resident"] - 1,
        "predicted_activations": traced.activations, "saved_by_hooks": hooks, "error_activations": traced.activations / hooks - 1,
    }
    return row


def summary(rows: list[dict]) -> dict:
    """Median and worst error of every figure."""
    names = sorted({name for row in rows for name in row if name.startswith("error_")})
    result = {}
    for name in names:
        errors = [abs(row[name]) for row in rows if name in row]
        result[name] = {"median": statistics.median(errors), "worst": max(errors), "settings": len(errors)}
    if any("verdict" in row for row in rows):
        result["called_fits_but_failed"] = sum(row["verdict"] == "fits" and not row["ran"] for row in rows)
        result["called_does_not_fit_but_ran"] = sum(row["verdict"] == "does_not_fit" and row["ran"] for row in rows)
    return result


def spread(grid: list[tuple]) -> list[tuple]:
    """The settings in an order in which neighbours of the grid lie apart."""
    return [setting for start in range(STRIDE) for setting in grid[start::STRIDE]]


def measure_all(grid: list[tuple], cuda: bool, environment: dict, out: Path, minutes: float) -> dict:
    """Measure the settings that the file lacks, while there is time, and write it after each; what it holds then."""
    until = time.monotonic() + 60 * minutes
    before = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    # 量完的文件从头再量；没量完的接着量，但不与别的机器、别的版本混在一起
    goes_on = before.get("missing") and all(before.get(key) == value for key, value in environment.items())
    rows = {setting_of(row): row for row in before["rows"]} if goes_on else {}
    result = before
    for setting in spread([setting for setting in grid if setting not in rows]):
        if time.monotonic() > until:
            break
        rows[setting] = measure(setting, cuda)
        print(" ".join(f"{k}={v:.3f}" if isinstance(v, float) else f"{k}={v}" for k, v in rows[setting].items()), flush=True)
        done = [rows[setting] for setting in grid if setting in rows]
        result = {**environment, "missing": len(grid) - len(done), "summary": summary(done), "rows": done}
        write_text(out, json.dumps(result, indent=2) + "\n")
    return result


def setting_of(row: dict) -> tuple:
    """The setting that a row of the file is of."""
    return tuple(row[key] for key in ("model", "precision", "memory", "batch_size"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--cuda", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no setting after so long")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "memory.json")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(json.loads(arguments.child), arguments.cuda)))
        return
    cuda = torch.cuda.is_available()
    if not cuda:
        torch.set_num_threads(1)
    device = torch.cuda.get_device_name(0) if cuda else f"CPU, {os.cpu_count()} cores, no GPU"
    result = measure_all(GPU_GRID if cuda else CPU_GRID, cuda, {"device": device, "torch": torch.__version__}, arguments.out, arguments.minutes)
    print(json.dumps(result.get("summary"), indent=2))


if __name__ == "__main__":
    main()
