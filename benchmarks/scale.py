"""One process against two on this machine's cores: efficiency, bytes sent in a step, memory of each, and the plan of all three.

    python benchmarks/scale.py [--steps 6]      about 2 minutes; writes benchmarks/results/scale.json
    python benchmarks/scale.py --paper          the table of docs/scale.md: up to 1,024 cards, by the plan alone

Every process has one thread, so that two of them have twice the cores of one. The effective batch is the same. Of each
setting the median step counts. Bytes are those of the loopback device, so nothing else should talk over it meanwhile.
"""

# 一个进程与两个进程比：同样的等效批量，各一个线程；两个进程再各比一次“反向完了才求和”
# 两种模型：矩阵为主的，计算盖得住通信；查表为主的（默认的 tiny），梯度多而计算少

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import psutil
import torch
import torch.distributed as dist

from nanogpt.base.config import check
from nanogpt.base.groups import train_config
from nanogpt.core import distributed
from nanogpt.plan.plan import Planner

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "scale.json"
MODELS = {
    "matrices": ["model.n_layer=4", "model.n_head=4", "model.n_embd=256", "model.ngrams=[]"],
    "look-up tables": ["model=tiny", "model.ngrams=[2,3,4,5]"],
}
# ram_gib：放掉的内存马上还给系统，峰值才比得了计划
COMMON = [
    "dataset=text_file", "dataset.path=text.txt", "dataset.dir=prepared", "logger=none", "device=cpu", "precision=fp32", "batch_size=16",
    "model.block_size=128", "eval_tokens=2048", "sample_tokens=0", "hardware.ram_gib=6", "optimizer=adamw", "compile=false",
]
WARM_UP = 2
ECHO = 64 * 2**20
# 纸上的：卡、卡间 GB/s、网速 Gbit/s、微批
BOXES = (("a100_40gb", 230, 200, 16), ("rtx3060_12gb", 12, 25, 4))
WORLDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
PAPER_ROWS = 2048


def echo_bytes_per_s() -> float:
    """How fast the processes add up 64 MiB, as bytes that each sends over a ring."""
    tensor, best = torch.ones(ECHO // 4), float("inf")
    for _ in range(4):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(tensor)
        best = min(best, time.perf_counter() - began)
    return 2 * (distributed.world() - 1) / distributed.world() * ECHO / best


def member(words: list[str], steps: int, late: bool) -> dict:
    """What one process measures; with `late` all gradients are summed behind the backward pass."""
    from nanogpt.run.session import Session

    torch.set_num_threads(1)
    cfg = train_config([*COMMON, *words])
    check(cfg)
    trainer = Session(cfg, Path("outputs/never"), None).build_trial()
    if late:
        trainer.gradients.begin = lambda: None
    for _ in range(WARM_UP):
        trainer.step()
    taken, before = [], psutil.net_io_counters(pernic=True)["lo"].bytes_sent
    for _ in range(steps):
        began = time.perf_counter()
        trainer.step()
        taken.append(time.perf_counter() - began)
    sent = psutil.net_io_counters(pernic=True)["lo"].bytes_sent - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {"step_s": median(taken), "sent": sent / steps, "peak": peak, "tokens": trainer.global_rows * trainer.block_size}
    found["gradients"] = sum(p.nbytes for p in trainer.parameters)
    if distributed.world() > 1:
        found["bytes_per_s"] = echo_bytes_per_s()
        distributed.stop()
    return found


def together(folder: Path, world: int, words: list[str], steps: int, *, late: bool = False) -> dict:
    """What process 0 of `world` measured, and the largest peak of all."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, __file__, "--member", json.dumps([words, steps, late])]
    running = [
        subprocess.Popen(command, cwd=folder, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True, encoding="utf-8")
        for rank in range(world)
    ]
    found = [json.loads(one.communicate()[0].splitlines()[-1]) for one in running]
    return {**found[0], "peak": max(each["peak"] for each in found)}


def planned(words: list[str], world: int, vocabulary: int, bytes_per_s: float):
    """The plan of the same setting, with the links as they were measured."""
    cfg = train_config([*COMMON, *words, f"model.vocab_size={vocabulary}", f"parallel.world={world}", f"parallel.link_gb_per_s={bytes_per_s / 1e9}"])
    check(cfg)
    return Planner(cfg).predict(cfg)


def measure(steps: int) -> dict:
    """All settings, one after the other, on this machine."""
    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        text = "To be, or not to be, that is the question.\n" * 3000
        (folder / "text.txt").write_text(text, encoding="utf-8")
        for name, words in MODELS.items():
            one, two = together(folder, 1, words, steps), together(folder, 2, words, steps)
            late = together(folder, 2, words, steps, late=True)
            shared = together(folder, 2, [*words, "parallel=fsdp"], steps)
            os.chdir(folder)
            plans = [planned(words, world, len(set(text)), two["bytes_per_s"]) for world in (1, 2)]
            sharded = planned([*words, "parallel=fsdp"], 2, len(set(text)), two["bytes_per_s"])
            os.chdir(ROOT)
            found[name] = {
                "efficiency": one["step_s"] / (2 * two["step_s"]), "efficiency_planned": plans[0].step_s / (2 * plans[1].step_s),
                "summed_behind": late["step_s"] / two["step_s"],
                # 每个进程发一份，两份都经过回环
                "sent_over_theory": two["sent"] / (2 * plans[1].communication.network.sent(two["gradients"])),
                "peak_over_plan": [each["peak"] / plan.total for each, plan in zip((one, two), plans)],
                "gradients_mib": two["gradients"] / 2**20, "link_gb_per_s": two["bytes_per_s"] / 1e9,
                "fsdp": {
                    "step_over_ddp": shared["step_s"] / two["step_s"], "step_over_ddp_planned": sharded.step_s / plans[1].step_s,
                    "sent_over_theory": shared["sent"] / (2 * sharded.communication.sent),
                    "peak_over_plan": shared["peak"] / sharded.total, "peak_over_ddp": shared["peak"] / two["peak"],
                    "peak_over_ddp_planned": sharded.total / plans[1].total,
                },
                "step_over_plan": [each["step_s"] / plan.step_s for each, plan in zip((one, two), plans)],
            }
    return found


def show(found: dict) -> None:
    """Print what measure() found."""
    for name, row in found.items():
        print(f"{name}: {row['gradients_mib']:.1f} MiB of gradients, links of {row['link_gb_per_s']:.2f} GB/s")
        print(f"  efficiency of two processes {row['efficiency']:.0%}, by the plan {row['efficiency_planned']:.0%}")
        print(f"  sums behind the backward pass instead of beside it: {row['summed_behind']:.2f} times as long")
        print(f"  bytes sent {row['sent_over_theory']:.3f} of theory; peak over plan {row['peak_over_plan'][0]:.3f}, {row['peak_over_plan'][1]:.3f}")
        shards = row["fsdp"]
        print(f"  parallel=fsdp: {shards['step_over_ddp']:.2f} times as long as ddp (plan {shards['step_over_ddp_planned']:.2f}), bytes sent {shards['sent_over_theory']:.3f} of theory")
        print(f"  peak over plan {shards['peak_over_plan']:.3f}, over that of ddp {shards['peak_over_ddp']:.3f} (plan {shards['peak_over_ddp_planned']:.3f})")


def paper() -> None:
    """Print the table of docs/scale.md."""
    columns = []
    for card, link, network, rows in BOXES:
        fixed = [f"hardware={card}", "model=gpt2", "model.vocab_size=50304", "optimizer=adamw", f"batch_size={rows}", f"global_batch_size={PAPER_ROWS}"]
        planner, cells = None, []
        for world in WORLDS:
            nodes = max(1, world // 8)
            cfg = train_config([*fixed, f"parallel.world={world}", f"parallel.nodes={nodes}", f"parallel.link_gb_per_s={link}", f"parallel.network_gbit={network}"])
            check(cfg)
            planner = planner or Planner(cfg)
            cells.append(planner.predict(cfg).communication)
        columns.append(cells)
    print("| cards | machines | rows each | sent, MiB | A100 computes | RTX 3060 computes |\n|--:|--:|--:|--:|--:|--:|")
    for number, world in enumerate(WORLDS):
        sums = columns[0][number]
        sent = f"{sums.network.sent(sums.size) / 2**20:.0f}" if sums else "-"
        computes = " | ".join(f"{cells[number].efficiency:.0%}" if cells[number] else "100%" for cells in columns)
        print(f"| {world:,} | {max(1, world // 8)} | {PAPER_ROWS // world:,} | {sent} | {computes} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--paper", action="store_true")
    parser.add_argument("--member", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.member:
        print(json.dumps(member(*json.loads(given.member))))
    elif given.paper:
        paper()
    else:
        found = measure(given.steps)
        show(found)
        RESULTS.write_text(json.dumps({"cores": os.cpu_count(), "torch": torch.__version__, "models": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
