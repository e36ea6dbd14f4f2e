"""Up to how many rows the compiled decoding step (nanogpt/write/speed/fast_cpu.py) is worth it: CPU time beside the plain and the packed step.

    python benchmarks/fast_rows.py [--rounds 3]

One thread, so that no thread waits for another one and a busy machine disturbs little; the steps take turns, and a ratio is
the median over the rounds of two neighbours. Writes benchmarks/results/fast_rows.json.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["NUMBA_NUM_THREADS"] = "1"

import torch  # noqa: E402 - 线程数要在载入之前定下

from nanogpt.core.kv_cache import KVCache  # noqa: E402
from nanogpt.run.metrics import processor_name  # noqa: E402
from nanogpt.weights.build import build_model, preset  # noqa: E402
from nanogpt.write.speed import fast_cpu  # noqa: E402
from nanogpt.write.speed.acceleration import choose_products, install, pack, use_bf16_units  # noqa: E402
from nanogpt.write.speed.formats import convert  # noqa: E402

SHAPES = {
    "gpt2_124m": {"vocab_size": 50257},
    "char_6_layers": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 65},
}
ROWS = (8, 24, 32, 48, 96)
PROMPT, STEPS = 16, 2


def models(shape: str, precision: str) -> dict:
    """The same random weights behind each kind of step; only float32 weights have a packed form."""
    kinds = {}
    for kind in ("compiled", "plain", "packed") if precision == "fp32" else ("compiled", "plain"):
        torch.manual_seed(0)
        model = kinds[kind] = build_model(preset("gpt2", **SHAPES[shape]), 0).eval()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.05)
        if precision != "fp32":
            convert(model, precision)
            choose_products(model)
            use_bf16_units(model)
        if kind == "compiled":
            install(model, fast_cpu.FastStep(model))
            model.fast_step.max_rows = max(ROWS)
        elif kind == "packed":
            pack(model)
    return kinds


def measure(kinds: dict, rows: int, rounds: int) -> dict:
    """CPU milliseconds of one step of `rows` rows, and the compiled step's time as a multiple of the others'."""
    idx, caches = torch.zeros(rows, dtype=torch.long), {}
    for kind, model in kinds.items():
        caches[kind] = KVCache(model, rows, PROMPT + STEPS * rounds + 1)
        model(idx[:, None].expand(-1, PROMPT).contiguous(), caches[kind])
        model.next_logits(idx, caches[kind])
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, model in kinds.items():
            start = time.process_time()
            for _ in range(STEPS):
                model.next_logits(idx, caches[kind])
            times[kind].append((time.process_time() - start) / STEPS)
    ratios = {
        kind: round(statistics.median(a / b for a, b in zip(times["compiled"], times[kind], strict=True)), 2) for kind in kinds if kind != "compiled"
    }
    return {"ms": {kind: round(1e3 * statistics.median(t), 2) for kind, t in times.items()}, "compiled_as_multiple_of": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    cases = {}
    with torch.inference_mode():
        for shape in SHAPES:
            for precision in ("fp32", "bf16", "int8", "int4"):
                kinds = models(shape, precision)
                for rows in ROWS:
                    found = cases[f"{shape}, {precision}, {rows} rows"] = measure(kinds, rows, rounds)
                    print(f"{shape}, {precision}, {rows} rows", found["compiled_as_multiple_of"], flush=True)
    record = {
        "command": "python benchmarks/fast_rows.py", "device": processor_name(torch.device("cpu")), "torch": torch.__version__, "threads": 1,
        "rounds": rounds, "cases": cases,
    }
    path = ROOT / "benchmarks" / "results" / "fast_rows.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
