"""The plan held against figures that others published for nanoGPT-like training of GPT-2 on known cards.

    python benchmarks/published.py     # writes benchmarks/results/published.json and prints the table; needs no card

The programs behind the figures are not ours, so this is a check of the roofline's order and not of its last percent:
eager programs from before flash attention are slower than the plan, compiled ones are faster, because the plan is
for eager kernels. No published peak states program, batch and allocator figure together; memory is shown, not judged.
"""

import json
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# ruff: noqa: E402 - 先把仓库根目录放进路径
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from nanogpt import __version__
from nanogpt.base.hardware import GIB
from nanogpt.base.sample_config import register_schemas
from nanogpt.plan.plan import predict

RESULT = ROOT / "benchmarks" / "results" / "published.json"
# nanoGPT 的 GPT-2：没有偏置，词表补到 64 的倍数
NANOGPT = ("model=gpt2", "arch=gpt2", "model.bias=false", "optimizer=adamw", "precision=bf16", "model.vocab_size=50304", "model.dropout=0.0")


@dataclass(frozen=True)
class Figure:
    """A published speed of one card."""

    source: str
    setting: str
    """Of the program behind the figure."""
    compiled: bool
    hardware: str
    batch_size: int
    tokens_per_s: float
    """Per card, as published or computed from the published time."""


NANOGPT_README = "nanoGPT README (mintlify.com/karpathy/nanoGPT/advanced/performance)"
KARPATHY = "A. Karpathy, Let's reproduce GPT-2 (chizkidd.github.io)"
THOMAS = "gilesthomas.com, LLM from scratch part 28"
FIGURES = (
    Figure(NANOGPT_README, "B=12, torch 2.0, no flash attention", False, "a100_40gb", 12, 12 * 1024 / 0.250),
    Figure(NANOGPT_README, "B=12, torch.compile", True, "a100_40gb", 12, 12 * 1024 / 0.135),
    Figure(KARPATHY, "B=16, torch.compile, flash attention, fused AdamW", True, "a100_80gb", 16, 176_500),
    Figure("github.com/karpathy/nanoGPT/issues/182", "B=12 x 5, torch.compile, 29% of 312 TFLOP/s", True, "rtx4090_24gb", 12, 105_000),
    Figure("tylerromero.com, NanoGPT speedrun worklog", "two cards, torch.compile, per card", True, "rtx4090_24gb", 32, 110_500),
    Figure("lzwjava.github.io/gpu-training-optimization-en", "B=8 x 64, torch.compile", True, "rtx4070_12gb", 8, 8 * 64 * 1024 / 9.34),
    Figure(THOMAS, "163M untied, B=6, TF32 and AMP, no flash attention, dropout", False, "rtx3090_24gb", 6, 20_000),
)


def planned(figure: Figure) -> dict[str, object]:
    """The figure beside the plan for the same shape, batch and card."""
    untied = ("model.tie_embeddings=false",) if "untied" in figure.setting else ()
    composed = compose("train", [*NANOGPT, *untied, f"hardware={figure.hardware}", f"batch_size={figure.batch_size}"])
    plan = predict(OmegaConf.to_object(composed))
    return {
        "source": figure.source, "setting": figure.setting, "compiled": figure.compiled, "hardware": figure.hardware,
        "batch_size": figure.batch_size, "published_tokens_per_s": round(figure.tokens_per_s),
        "planned_tokens_per_s": round(plan.tokens_per_s), "published_over_planned": round(figure.tokens_per_s / plan.tokens_per_s, 2),
        "planned_peak_gib": round(plan.allocated / GIB, 2), "verdict": plan.verdict,
    }


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    lines = ["| source | setting | card | published tokens/s | planned (eager) | published / planned |", "|---|---|---|--:|--:|--:|"]
    for row in rows:
        cells = (row["source"], row["setting"], row["hardware"], f"{row['published_tokens_per_s']:,}", f"{row['planned_tokens_per_s']:,}")
        lines.append(f"| {' | '.join(cells)} | {row['published_over_planned']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    register_schemas()
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
        rows = [planned(figure) for figure in FIGURES]
    result = {"date": date.today().isoformat(), "version": __version__, "model": "GPT-2 124M, T = 1024, bf16, AdamW, arch=gpt2", "rows": rows}
    RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
