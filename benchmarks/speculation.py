"""What guessing ahead from the text itself saves when one text is written: speculate=auto beside speculate=0.

    python benchmarks/speculation.py [--rounds 3] [--run FOLDER]

A run trained here for a minute (or FOLDER) and random weights of GPT-2's shape write ordinary text, at temperature 0.8,
and text that repeats itself: small models do so when they write greedily, and so do random weights. Both ways write the
same ids, which is checked, take turns, and are timed in CPU seconds with one thread. Also what one more row of a step
costs, as part of the first (ROW_COST). Writes benchmarks/results/speculation.json.
"""

# 同样的字，两种写法轮流写，看 CPU 秒之比；文字不同就是错，直接停
# 猜得中多少由模型与文字定：平常的文字在小模型上几乎不猜，比值该在 1 附近

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from nanogpt.core.kv_cache import KVCache
from nanogpt.core.sampling import sampler
from nanogpt.run.metrics import processor_name
from nanogpt.weights import checkpoint
from nanogpt.weights.build import build_model, preset
from nanogpt.write.loading import load
from nanogpt.write.speed import fast_cpu
from nanogpt.write.speed.acceleration import accelerate
from nanogpt.write.speed.speculation import decoder_of

ROOT = Path(__file__).resolve().parent.parent
GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50257}
TRAINING = ["experiment=cpu_speedrun", "model.n_layer=4", "model.n_head=4", "model.n_embd=128", "model.block_size=128", "max_iters=60", "sample_tokens=0"]
KINDS = {"ordinary, temperature 0.8": {"temperature": 0.8}, "repetitive, greedy": {"temperature": 0.0}}


def written(model, speculate: int | str, kind: str, tokens: int):
    """CPU seconds for ids behind id 0, the ids, and the decoder."""
    decoder = decoder_of(model, speculate, capacity=1)
    decoder.add(0, [0], sampler(**KINDS[kind]), seed=1)
    decoder.step()
    start = time.process_time()
    ids = [int(decoder.step()) for _ in range(tokens)]
    return time.process_time() - start, ids, decoder


def compared(model, kind: str, tokens: int, rounds: int) -> dict:
    """How many times as many ids per CPU second with guesses as without, and ids per pass of the model."""
    ratios = []
    for _ in range(rounds):
        plain_s, plain, _ = written(model, 0, kind, tokens)
        guessed_s, guessed, decoder = written(model, "auto", kind, tokens)
        assert guessed == plain, "the ids differ"
        ratios.append(plain_s / guessed_s)
    return {"speed_as_multiple_of_plain": round(statistics.median(ratios), 2), "ids_per_pass": round(decoder.written / decoder.passes, 2)}


@torch.inference_mode()
def row_cost(model, rounds: int) -> float:
    """CPU time of each further row of a step as part of the first row's, from 1 and 5 rows."""
    times = {1: [], 5: []}
    for _ in range(5 * rounds):
        for rows, found in times.items():
            cache = KVCache(model, 1, 64)
            start = time.process_time()
            model.fast_step.read(torch.zeros(1, rows, dtype=torch.long), cache)
            found.append(time.process_time() - start)
    return round((min(times[5]) / min(times[1]) - 1) / 4, 2)


def trained(folder: Path) -> Path:
    """A run trained in `folder`."""
    run = folder / "run"
    subprocess.run([sys.executable, str(ROOT / "run_train.py"), *TRAINING, f"out_dir={run}"], check=True, cwd=folder, capture_output=True)
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    cases = {}
    with tempfile.TemporaryDirectory() as folder:
        source = checkpoint.find(arguments.run or trained(Path(folder)), "last")
        for name, tokens in (("trained, 4 layers, 128 wide, characters", 500), ("GPT-2 124M's shape, random weights", 100)):
            for precision in ("fp32", "bf16", "int8", "int4"):
                random = name.startswith("GPT")
                model = build_model(preset("gpt2", **GPT2), 0).eval() if random else load(source, torch.device("cpu"))[0]
                accelerate(model, precision)
                assert isinstance(model.fast_step, fast_cpu.FastStep)
                found = {kind: compared(model, kind, tokens, arguments.rounds) for kind in KINDS}
                cases[f"{name}, {precision}"] = {"row_cost": row_cost(model, arguments.rounds), **found}
                print(f"{name}, {precision}", cases[f"{name}, {precision}"], flush=True)
    record = {
        "command": "python benchmarks/speculation.py", "device": processor_name(torch.device("cpu")), "torch": torch.__version__, "threads": 1,
        "rounds": arguments.rounds, "cases": cases,
    }
    (ROOT / "benchmarks" / "results" / "speculation.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
