"""CPU seconds from the command line to its answer, beside what importing torch alone takes.

    python benchmarks/start.py [--rounds 3]

Every command is a process of its own with one thread, as a person would type it; the smallest of the rounds counts, and
the rounds take turns, so that a busy machine slows all of them alike. Writes benchmarks/results/start.json.
"""

# 从敲下命令到有回答要多少 CPU 秒；import torch 是下限，绕不过去
# 看比值而不看秒：同一台机器忙起来，两边一起变慢

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from vs_nanogpt import processor

ROOT = Path(__file__).resolve().parent.parent
TEXT = "To be, or not to be, that is the question.\n" * 200
TINY = ["model=tiny", "dataset=text_file", "dataset.path=text.txt", "logger=none", "sample_tokens=0", "device=cpu", "max_iters=1",
        "eval_tokens=64", "batch_size=1", "model.block_size=64"]
PLAN = ["plan=true", "hardware=rtx3060_12gb"]
COMMANDS = {
    "import torch": ["-c", "import torch"],
    "typo": ["run_train.py", "model.n_lyer=3"],
    "help": ["run_train.py", "--help"],
    "plan tiny": ["run_train.py", *PLAN, "model=tiny"],
    "plan medium": ["run_train.py", *PLAN, "model=medium"],
    "plan and advice, GPT-2 medium in 8 GB": [
        "run_train.py", "plan=true", "hardware=rtx3060_8gb", "model=gpt2_medium", "model.vocab_size=50257", "batch_size=16",
    ],
    "first text": ["run_sample.py", "out_dir=run", "max_new_tokens=1", "device=cpu"],
    "first text, plain step": ["run_sample.py", "out_dir=run", "max_new_tokens=1", "device=cpu", "fast=false"],
    "first training step": ["run_train.py", *TINY, "out_dir=again", "overwrite=true"],
}


def cpu_seconds(arguments: list[str], folder: Path) -> float:
    """User and system time of one process and its children; it may refuse, as a typo is, but not crash."""
    script = [str(ROOT / arguments[0]), *arguments[1:]] if arguments[0].endswith(".py") else arguments
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    before = os.times()
    done = subprocess.run([sys.executable, *script], cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8")
    after = os.times()
    if "Traceback" in done.stderr:
        sys.exit(done.stderr)
    return after.children_user - before.children_user + after.children_system - before.children_system


def measure(folder: Path, rounds: int, commands: dict[str, list[str]]) -> dict[str, dict[str, float]]:
    """CPU seconds of each command, and their ratio to importing torch."""
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    cpu_seconds(["run_train.py", *TINY, "out_dir=run"], folder)
    # numba 的机器码要编译一次：不算在内
    cpu_seconds(COMMANDS["first text"], folder)
    best = dict.fromkeys(commands, float("inf"))
    for _ in range(rounds):
        for name, arguments in commands.items():
            best[name] = min(best[name], cpu_seconds(arguments, folder))
    torch_s = best["import torch"]
    return {name: {"cpu_s": round(s, 2), "of_import_torch": round(s / torch_s, 2)} for name, s in best.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        commands = measure(Path(folder), rounds, COMMANDS)
    result = {"processor": processor(), "torch": torch.__version__, "rounds": rounds, "commands": commands}
    (ROOT / "benchmarks" / "results" / "start.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8", newline="\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
