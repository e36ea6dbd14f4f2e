"""Write summary.json: what a finished run reached, for people and for sweeps."""

# summary.json：一次训练走到了哪里，给人看，也给脚本与比较用
# loop 结束时写一次；versions 与 device_name 也给评估与试跑的记录用
# 写不下只报一行：权重都已存好，少一份总结不算失败

import json
import math
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from nanogpt.base.files import write_text
from nanogpt.base.hashed_json import reason_of
from nanogpt.core import distributed


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
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def write_summary(trainer, reason: str, wall_s: float) -> dict:
    """Write <run>/summary.json (first process only) and return its content."""
    progress = trainer.progress
    timed = progress.tokens_trained - progress.untimed_tokens
    # 只走了编译的那一步：速度只能连编译一起算
    trained = trainer.metrics(timed, progress.train_s) if timed else trainer.metrics(progress.tokens_trained, wall_s)
    summary = {
        "stopped_by": reason,
        "val_loss": progress.val_loss,
        "best_val_loss": progress.best_val_loss if math.isfinite(progress.best_val_loss) else None,
        "iters": progress.iteration,
        "tokens": progress.tokens_trained,
        "tokens_per_s": trained["tokens_per_s"],
        "mfu": trained["mfu"],
        "mfu_rtx3060": trained["mfu_rtx3060"],
        "peak_vram_gib": trained["memory/peak_gib"] if trainer.device.type == "cuda" else None,
        "peak_ram_gib": trained["memory/peak_gib"] if trainer.device.type == "cpu" else None,
        "wall_s": wall_s,
        "train_s": progress.train_s,
        "nonfinite_steps": progress.nonfinite_steps,
        "micro_batch": trainer.micro_batch,
        "parameters": trainer.model.parameter_count(),
        "precision": trainer.precision.label,
        "device": device_name(trainer.device),
        "processes": distributed.world(),
        "versions": versions(),
    }
    if not distributed.rank():
        try:
            write_text(trainer.run_dir / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            # 权重都已存好：少一份总结不算失败
            trainer.console.line("logger_failed", name="summary.json", reason=reason_of(error))
    return summary
