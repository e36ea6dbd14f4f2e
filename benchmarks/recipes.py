"""What some minutes of training give: each recipe trained with several seeds, judged on all of the validation split.

    python benchmarks/recipes.py [NAME …] [--seeds 1337 1 2] [--jobs 1] [--runs FOLDER] [--out FILE]

Recipes: see RECIPES below; without names all of them, three to four hours on 2 cores, most of it for `shakespeare_small`.
With --jobs 2 two seeds are trained beside each other and share the cores: together sooner done, but each takes longer.
Every training keeps its run folder under --runs: the same command goes on where it was stopped. Beside the losses and minutes
(of the steps, at the median of their speeds, without evaluations) stand the minutes that the plan gives for an RTX 3060, and a text
that the first seed wrote.

Writes benchmarks/results/recipes.json after every training. `--quick` trains a few iterations of small models, in a folder
of its own, and writes nothing else.
"""

import argparse
import concurrent.futures
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# 名字 -> (训练的设置, 写作的设置)
SHAKESPEARE = ["sampler.temperature=0.8", "max_new_tokens=300"]
RECIPES: dict[str, tuple[list[str], list[str]]] = {
    "default": ([], SHAKESPEARE),
    "cpu_speedrun": (["experiment=cpu_speedrun"], SHAKESPEARE),
    "shakespeare_char": (["experiment=shakespeare_char"], SHAKESPEARE),
    "shakespeare_tiny": (["experiment=shakespeare_tiny"], SHAKESPEARE),
    "shakespeare_small": (["experiment=shakespeare_small"], SHAKESPEARE),
    "poetry": (["experiment=poetry"], ["control.style=七言绝句", "start=春", "max_new_tokens=60"]),
}
QUICK = ["model.n_layer=1", "model.n_head=2", "model.n_embd=16", "model.block_size=16", "batch_size=4", "max_iters=8", "warmup_iters=2", "eval_batch_size=64"]
CARD = "rtx3060_12gb"


def program(name: str, *overrides: str, threads: int = 0) -> str:
    """Output of one of the two programs, with so many threads; 0: as many as it takes by itself."""
    command = [sys.executable, str(ROOT / f"run_{name}.py"), *overrides, "lang=en"]
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-1000:]}{done.stderr[-1000:]}")
    return done.stdout


def train(settings: list[str], seed: int, run: Path, threads: int) -> dict:
    """Train, or go on with what is there; what the run says at its end."""
    summary = run / "summary.json"
    if not summary.is_file() or json.loads(summary.read_text(encoding="utf-8"))["stopped_by"] == "interrupted":
        # 读完整的验证集；中途不停：比的是预算走完的模型
        begin = [*settings, f"seed={seed}", f"out_dir={run}", "eval_tokens=null", "early_stop_evals=0", "logger=none", "sample_tokens=0"]
        program("train", *([f"resume={run}"] if run.exists() else begin), threads=threads)
    found = json.loads(summary.read_text(encoding="utf-8"))
    kept = ("val_loss", "best_val_loss", "val_bpb", "iters", "tokens", "parameters", "table_parameters", "precision", "device", "versions")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    curve = [[line["tokens"], round(line["val/loss"], 4)] for line in lines if "val/loss" in line]
    # 按途中速度的中位数算：中途停过、挤过也不算进去；评估不算
    speed = statistics.median(line["tokens_per_s"] for line in lines if "tokens_per_s" in line)
    return {"seed": seed, "minutes": round(found["tokens"] / speed / 60, 2), **{key: found[key] for key in kept}, "curve": curve}


def planned(settings: list[str]) -> float:
    """Minutes on a card, by the plan."""
    from nanogpt.base.groups import train_config
    from nanogpt.plan.plan import Planner

    cfg = train_config([*settings, "device=auto", f"hardware={CARD}"])
    return round(Planner(cfg).predict(cfg).train_s / 60, 2)


def report(name: str, runs: list[dict], minutes_on_card: float) -> dict:
    """The figures of a recipe over its seeds."""
    losses = [run["val_loss"] for run in runs]
    spread = {"deviation": round(statistics.stdev(losses), 4)} if len(losses) > 1 else {}
    return {
        "settings": RECIPES[name][0], "val_loss": round(statistics.mean(losses), 4), **spread, "val_bpb": round(statistics.mean(r["val_bpb"] for r in runs), 4),
        "minutes": round(statistics.mean(r["minutes"] for r in runs), 2), "planned_minutes": {CARD: minutes_on_card}, "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="trainings beside each other")
    parser.add_argument("--runs", type=Path, default=ROOT / "outputs" / "recipes", help="folder of the run folders")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "recipes.json")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(RECIPES):
        parser.error(f"no recipe is called {', '.join(sorted(unknown))}; there are: {', '.join(RECIPES)}")
    result = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.is_file() and not arguments.quick else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder, more = (Path(temporary), QUICK) if arguments.quick else (arguments.runs, [])
        for name in arguments.names or RECIPES:
            settings, writing = RECIPES[name]
            minutes_on_card, threads = planned(settings), 0 if arguments.jobs == 1 else max(1, os.cpu_count() // arguments.jobs)
            folders = {seed: folder / f"{name.replace(', ', '_').replace(' ', '_')}-{seed}" for seed in arguments.seeds}
            runs: dict[int, dict] = {}
            with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
                under_way = [pool.submit(train, [*settings, *more], seed, run, threads) for seed, run in folders.items()]
                for done in concurrent.futures.as_completed(under_way):
                    found = done.result()
                    runs[found["seed"]] = found
                    print(name, {key: found[key] for key in ("seed", "minutes", "val_loss", "val_bpb")}, flush=True)
                    if found["seed"] == arguments.seeds[0]:
                        found["wrote"] = program("sample", f"out_dir={folders[found['seed']]}", "seed=1", *writing).strip()
                    result[name] = report(name, [runs[seed] for seed in arguments.seeds if seed in runs], minutes_on_card)
                    if not arguments.quick:
                        arguments.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, found in result.items():
        print(f"{name}: {found['val_loss']} (deviation {found.get('deviation')}), {found['minutes']} minutes; {found['runs'][0].get('wrote', '')[:300]}")


if __name__ == "__main__":
    main()
