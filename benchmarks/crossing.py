"""What it costs when documents packed into one row see each other, and what keeping them apart costs.

    python benchmarks/crossing.py [--iters 300] [--seeds 1337 1] [--threads 2] [overrides of experiment=poetry …]

Trains the same recipe with both attentions and evaluates both on documents that stand alone, which is how a text is
written. Writes benchmarks/results/crossing.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "crossing.json"
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from nanogpt.core.model import GPT  # noqa: E402 - 先把仓库根目录放进路径


class Crossing(GPT):
    """A GPT that in training attends to, and counts n-grams over, whatever stands before in the row."""

    def visible(self, idx):
        # 评估仍各看各的：写作时前面没有别的文章
        return None if self.training else super().visible(idx)

    def inside(self, idx):
        return None if self.training else super().inside(idx)


def train(target: str, seed: int, arguments: argparse.Namespace, rest: list[str]) -> dict:
    """Final validation loss and training seconds of one run."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [
            sys.executable, "run_train.py", "experiment=poetry", f"model._target_={target}", f"seed={seed}", f"max_iters={arguments.iters}",
            f"eval_interval={arguments.iters}", "eval_tokens=null", "sample_tokens=0", "logger=none", f"out_dir={out.as_posix()}", *rest,
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        return {"seed": seed, "val_loss": round(summary["val_loss"], 4), "train_s": summary["train_s"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iters", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1])
    parser.add_argument("--threads", type=int, default=2)
    arguments, rest = parser.parse_known_args()
    import torch
    from vs_nanogpt import processor

    runs = {"apart": [], "crossing": []}
    for seed in arguments.seeds:
        # 交替着跑：机器忙闲对两边一样
        for name, target in (("apart", "nanogpt.core.model.GPT"), ("crossing", "crossing.Crossing")):
            runs[name].append(train(target, seed, arguments, rest))
            print(name, runs[name][-1], flush=True)
    loss = {name: sum(run["val_loss"] for run in found) / len(found) for name, found in runs.items()}
    # 别的程序只会让它变慢：各取最快的一次
    seconds = {name: min(run["train_s"] for run in found) for name, found in runs.items()}
    record = {
        "recipe": "experiment=poetry", **vars(arguments), "overrides": rest, "torch": torch.__version__, "device": processor(), "runs": runs,
        "val_loss_of_crossing_minus_apart": round(loss["crossing"] - loss["apart"], 4),
        "time_of_apart_over_crossing": round(seconds["apart"] / seconds["crossing"], 3),
    }
    RESULTS.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in record.items() if key != "runs"}, indent=1))


if __name__ == "__main__":
    main()
