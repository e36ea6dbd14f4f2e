"""Real optimizer steps of a large model on a CPU, in a process that may not have more memory than a small card.

    python benchmarks/xl_step.py [--model gpt2_xl] [--limit-gib 8] [--steps 1] [--memory minimal] [--optimizer adamw] [--quick]
    python benchmarks/xl_step.py --model gpt_3b --limit-gib 12 --optimizer muon

One row of 1024 tokens, memory=minimal. The limit is RLIMIT_DATA (Linux): an allocation beyond it fails. Records the peak of
resident memory, the loss on the same row before and after, and seconds. Writes benchmarks/results/xl_step.json; --quick only
tries the program on a tiny model and writes nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

RESULTS = ROOT / "benchmarks" / "results" / "xl_step.json"
RATES = {"adamw": 5e-5, "muon": 5e-4}


def peak_gib() -> float:
    """Largest resident memory of this process so far."""
    from nanogpt.base.hardware import GIB
    from nanogpt.run.metrics import peak_resident

    return peak_resident() / GIB


def row_of_tokens(length: int, vocab_size: int):
    """x, y (1, length): this program's own text as bytes, which every vocabulary has ids for."""
    import torch

    text = (Path(__file__).read_bytes() + (ROOT / "nanogpt" / "core" / "model.py").read_bytes())[: length + 1]
    ids = torch.tensor(list(text)) % vocab_size
    return ids[None, :-1], ids[None, 1:]


def build(arguments: argparse.Namespace):
    """The config and the step, as run_train.py would build them."""
    import torch

    from nanogpt.base.config import check_memory
    from nanogpt.base.groups import train_config
    from nanogpt.core.precision import Precision
    from nanogpt.weights.build import build_model, build_step

    quick = ["model.block_size=64"] if arguments.quick else []
    cfg = train_config([
        f"model={arguments.model}", f"optimizer={arguments.optimizer}", f"memory={arguments.memory}", "batch_size=1",
        "model.vocab_size=50257", *quick,
    ])
    check_memory(cfg)
    torch.set_num_threads(arguments.threads)
    model = build_model(cfg.model, cfg.seed, cfg.memory.weights)
    return cfg, build_step(cfg, model, Precision(cfg.precision, torch.device("cpu"), cfg.memory.weights))


def child(arguments: argparse.Namespace) -> None:
    """Set the limit, build, step, print one JSON line."""
    import resource

    limit = int(arguments.limit_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    import torch

    started = time.perf_counter()
    cfg, step = build(arguments)
    step.prepare()
    x, y = row_of_tokens(cfg.model.block_size, cfg.model.vocab_size)
    record = {"parameters": step.model.parameter_count(), "build_s": round(time.perf_counter() - started, 1), "built_gib": round(peak_gib(), 3)}
    losses, seconds = [], []
    for number in range(arguments.steps + 1):
        torch.manual_seed(number)
        for group in step.optimizer.param_groups:
            group["lr"] = RATES[arguments.optimizer] * group["lr_scale"]
        step.model.train(number < arguments.steps)
        started = time.perf_counter()
        if number < arguments.steps:
            losses.append(step.micro_batch(x, y, 1.0).item())
            step.update()
            seconds.append(round(time.perf_counter() - started, 1))
            print(f"step {number + 1}: loss {losses[-1]:.4f}, {seconds[-1]} s, peak {peak_gib():.2f} GiB", file=sys.stderr, flush=True)
        else:
            with torch.no_grad():
                losses.append(step.forward(x, y, 1.0).item())
    stored = sum(t.nbytes for state in step.optimizer.state.values() for t in state.values())
    weights = sum(p.nbytes for p in step.model.parameters())
    print(json.dumps({
        **record, "losses": [round(loss, 4) for loss in losses], "step_s": seconds, "peak_rss_gib": round(peak_gib(), 3),
        "weights_gib": round(weights / 2**30, 3), "states_gib": round(stored / 2**30, 3),
        "block_size": cfg.model.block_size, "torch": torch.__version__,
    }))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gpt2_xl")
    parser.add_argument("--limit-gib", type=float, default=8.0)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--memory", default="minimal")
    parser.add_argument("--optimizer", default="adamw", choices=sorted(RATES))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick and not arguments.child:
        arguments.model, arguments.limit_gib = "tiny", 2.0
    if arguments.child:
        child(arguments)
        return
    if not sys.platform.startswith("linux"):
        sys.exit("RLIMIT_DATA is enforced on Linux only")
    options = [f"--{name.replace('_', '-')}={getattr(arguments, name)}" for name in ("model", "limit_gib", "steps", "memory", "optimizer", "threads")]
    command = [sys.executable, __file__, "--child", *options, *(["--quick"] if arguments.quick else [])]
    # 大块直接向系统要、用完就还，免得堆里的碎片也算在上限里；逐块更新的临时量留在堆里，不必反复缺页
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**22)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, encoding="utf-8", check=False)
    from vs_nanogpt import processor

    settings = {k: getattr(arguments, k) for k in ("model", "limit_gib", "memory", "optimizer", "threads")}
    if done.returncode:
        sys.exit(f"{settings}: the step failed with exit code {done.returncode}")
    result = {**settings, "device": processor(), **json.loads(done.stdout.splitlines()[-1])}
    print(json.dumps(result, indent=1))
    assert result["losses"][-1] < result["losses"][0], "the loss did not fall"
    if not arguments.quick:
        record = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
        record[f"{arguments.model} {arguments.memory} {arguments.optimizer} {arguments.limit_gib:g} GiB"] = result
        RESULTS.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
