"""Both ends of a compiled step on a CPU beside PyTorch's operations: looking up what the first block reads
(nanogpt/write/speed/embedding.py), and choosing the next id (drawing.py there).

    python benchmarks/drawing.py [--rounds 5]

Random logits of two vocabularies, 1, 8 and 32 rows, the shipped samplers and one that does everything. Both take turns in
every round; a ratio is that of the medians. Also a whole step of GPT-2 124M's shape (random weights) with either, and one
of the default models of 65 characters, whose n-gram tables are looked up either way. Writes benchmarks/results/drawing.json.
"""

import argparse
import json
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import nanogpt  # noqa: E402, F401, I001 先于 torch：定下空闲的线程怎么等
import torch  # noqa: E402

from nanogpt.base.files import write_text  # noqa: E402
from nanogpt.core.generate import Decoder  # noqa: E402
from nanogpt.core.lanes import draw_each  # noqa: E402
from nanogpt.core.loops import compiled  # noqa: E402
from nanogpt.core.machine import keep_freed_memory  # noqa: E402
from nanogpt.core.sampling import sampler  # noqa: E402
from nanogpt.run.metrics import processor_name  # noqa: E402
from nanogpt.weights.build import build_model, preset  # noqa: E402
from nanogpt.write.speed import drawing  # noqa: E402
from nanogpt.write.speed.acceleration import accelerate  # noqa: E402

SAMPLERS = {
    "greedy": {"temperature": 0.0}, "temperature": {"temperature": 0.8}, "top_k": {"temperature": 0.8, "top_k": 200},
    "top_p": {"temperature": 0.8, "top_p": 0.95}, "min_p": {"temperature": 0.8, "min_p": 0.05},
    "all": {"repetition_penalty": 1.1, "temperature": 0.8, "top_k": 200, "top_p": 0.95, "min_p": 0.05},
}
VOCABULARIES, ROWS, STEPS = (65, 50257), (1, 8, 32), 20


def seconds(work, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - start) / times


def measured(ways: dict, rounds: int, times: int) -> dict:
    """Median milliseconds of each way, and how many times as fast the compiled one is."""
    seen = {name: [] for name in ways}
    for work in ways.values():
        work()
    for _ in range(rounds):
        for name, work in ways.items():
            seen[name].append(1e3 * seconds(work, times))
    found = {f"{name}_ms": round(statistics.median(each), 4) for name, each in seen.items()}
    return found | {"times_as_fast": round(found["plain_ms"] / found["compiled_ms"], 2)}


def decoding(model, rows: int, one, draw=None):
    """A step of a Decoder whose texts have begun, drawn as the model does or by `draw`."""
    decoder = Decoder(model, capacity=rows)
    decoder.draw = draw or decoder.draw
    for row in range(rows):
        decoder.add(row, [row], one, seed=row)
    decoder.step()
    return decoder.step


def steps_of(model, rows: int, one) -> dict:
    """A whole step of the model, drawn either way."""
    return {"compiled": decoding(model, rows, one), "plain": decoding(model, rows, one, draw_each)}


def looked_up_plainly(model, idx: torch.Tensor, cache):
    """What FastStep.embedding gives, by the model itself."""
    x, lengths = model.embed(idx, cache), cache.lengths
    cache.advance(idx)
    cache.lengths = lengths
    return x.flatten(0, 1).contiguous().numpy()


def look_ups_of(preset_name: str, precision: str, rows: int) -> dict:
    """A whole step of a default model, its tables looked up either way."""
    ways = {}
    for name in ("compiled", "plain"):
        model = accelerate(build_model(preset(preset_name, vocab_size=VOCABULARIES[0]), 0).eval(), precision)
        if name == "plain":
            model.fast_step.embedding = partial(looked_up_plainly, model)
        ways[name] = decoding(model, rows, sampler(**SAMPLERS["temperature"]))
    return ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "drawing.json")
    args = parser.parse_args()
    keep_freed_memory()
    crew, alone, equal, whole, looked_up = compiled.crew_of(compiled.threads()), {}, True, {}, {}
    for size in VOCABULARIES:
        for rows in ROWS:
            torch.manual_seed(0)
            logits, tokens, uniforms = torch.randn(rows, size) * 3, torch.randint(size, (rows, 256)), torch.rand(rows)
            for name, settings in SAMPLERS.items():
                one = sampler(**settings)
                ways = {
                    "compiled": partial(drawing.draw, crew, [one] * rows, logits, logits, tokens, uniforms),
                    "plain": partial(draw_each, [one] * rows, logits, logits, tokens, uniforms),
                }
                equal &= torch.equal(ways["compiled"](), ways["plain"]())
                alone[f"{size} ids, {rows} rows, {name}"] = measured(ways, args.rounds, STEPS)
    for precision in ("fp32", "int8", "int4"):
        model = accelerate(build_model(preset("gpt2", vocab_size=VOCABULARIES[-1]), 0).eval(), precision)
        for rows in ROWS:
            for name in ("temperature", "top_p"):
                ways = steps_of(model, rows, sampler(**SAMPLERS[name]))
                whole[f"{precision}, {rows} rows, {name}"] = measured(ways, args.rounds, STEPS // 2)
                print(precision, rows, name, whole[f"{precision}, {rows} rows, {name}"], flush=True)
    for name in ("tiny", "small"):
        for precision in ("fp32", "int8"):
            for rows in ROWS:
                looked_up[f"{name}, {precision}, {rows} rows"] = measured(look_ups_of(name, precision, rows), args.rounds, STEPS // 2)
    record = {
        "command": "python benchmarks/drawing.py", "device": processor_name(torch.device("cpu")), "cores": os.cpu_count(), "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(), "rounds": args.rounds, "equal_ids": equal, "drawing": alone, "step_of_gpt2_124m": whole,
        "step_with_tables": looked_up,
    }
    write_text(args.out, json.dumps(record, indent=1) + "\n")
    for name, found in (alone | looked_up).items():
        print(f"{name:32s}", found)


if __name__ == "__main__":
    main()
