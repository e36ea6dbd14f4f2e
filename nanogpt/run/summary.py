"""Write summary.json: what a finished run reached, for people and for sweeps."""

# summary.json：一次训练走到了哪里，给人看，也给脚本与比较用
# loop 把走到哪里、多快交进来，结束时写一次；versions 与 device_name 也给评估与试跑的记录用
# 写不下只报一行：权重都已存好，少一份总结不算失败

import json
import math
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from nanogpt.base import hardware
from nanogpt.base.console import Console
from nanogpt.base.files import write_text
from nanogpt.base.hashed_json import reason_of
from nanogpt.core import distributed
from nanogpt.core.precision import Precision
from nanogpt.core.progress import Progress


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("nanogpt", "numpy", "hydra-core"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            # 没有安装、直接从源码目录运行
            found[package] = "source"
    return found


def device_name(device: torch.device) -> str:
    """The card's name, or the processor with its thread count."""
    if device.type != "cpu":
        return hardware.device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def write_summary(
    run_dir: Path, progress: Progress, measured: dict[str, float], *, stopped_by: str, wall_s: float, micro_batch: int,
    parameters: int, table_parameters: int, precision: Precision, device: torch.device, console: Console,
    bits: float | None,
) -> dict:
    """Write <run>/summary.json (first process only) and return its content.

    measured: metrics of the whole training; bits: bits per byte for each nat of validation loss, where that is known.
    """
    best = progress.best_val_loss if math.isfinite(progress.best_val_loss) else None

    def per_byte(loss: float | None) -> float | None:
        return loss * bits if bits and loss is not None else None

    summary = {
        "stopped_by": stopped_by,
        "val_loss": progress.val_loss,
        "best_val_loss": best,
        "val_bpb": per_byte(progress.val_loss),
        "best_val_bpb": per_byte(best),
        "iters": progress.iteration,
        "tokens": progress.tokens_trained,
        "tokens_per_s": measured["tokens_per_s"],
        "mfu": measured["mfu"],
        "mfu_rtx3060": measured["mfu_rtx3060"],
        "peak_vram_gib": measured["memory/peak_gib"] if device.type != "cpu" else None,
        "peak_ram_gib": measured["memory/peak_gib"] if device.type == "cpu" else None,
        "wall_s": wall_s,
        "train_s": progress.train_s,
        "nonfinite_steps": progress.nonfinite_steps,
        "micro_batch": micro_batch,
        "parameters": parameters,
        "table_parameters": table_parameters,
        "precision": precision.label,
        "device": device_name(device),
        "processes": distributed.world(),
        "versions": versions(),
    }
    keep_summary(run_dir, summary, console)
    return summary


def keep_summary(run_dir: Path, summary: dict, console: Console) -> None:
    """Write it as <run>/summary.json, in the first process only."""
    if distributed.rank():
        return
    try:
        write_text(run_dir / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        # 权重都已存好：少一份总结不算失败
        console.line("logger_failed", name="summary.json", reason=reason_of(error))
