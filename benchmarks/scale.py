"""One process against two and four on this machine's cores: efficiency, bytes sent in a step, memory of each, and the
plan of all three; what a worker that is killed under torchrun costs.

    python benchmarks/scale.py [--steps 6]      about 8 minutes; writes benchmarks/results/scale.json
    python benchmarks/scale.py --paper          the table of docs/scale.md: up to 1,024 cards, by the plan alone

Every process has one thread, so that two of them have twice the cores of one; more processes than cores say only what
dividing a step costs on top. The effective batch is the same. Of each setting the median step counts, and of its ratios
to one process the median of three rounds, in which all settings take turns. Bytes are those of the loopback device, so
nothing else should talk over it meanwhile. On a busy machine times say nothing: those that were measured before stay.
"""

# 一个进程与两个、四个比：同样的等效批量，各一个线程；两个进程再各比一次“反向完了才求和”
# 两种模型：矩阵为主的，计算盖得住通信；查表为主的（默认的 tiny），梯度多而计算少
# 最后在 torchrun 下杀掉一个进程，看丢了多少步、多久之后又走到那里

import argparse
import json
import os
import random
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
PROCESSES = (1, 2, 4)
# 重启：杀这么多次；每隔这么多步存一份
KILLS, SAVE_INTERVAL = 3, 20
# 各设置轮流这么多回：机器一阵快一阵慢，比值取中位数，附最小与最大
ROUNDS = 3
# 负载高于它，别人也在算：不量时间
QUIET = 0.5
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


def measure(steps: int, before: dict, *, quiet: bool) -> dict:
    """All settings, one after the other, on this machine; times only where it is quiet, else those of `before`."""
    torch.set_num_threads(1)
    found = {"models": {}, "times": {} if quiet else before.get("times", {})}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        text = "To be, or not to be, that is the question.\n" * 3000
        (folder / "text.txt").write_text(text, encoding="utf-8")
        for name, words in MODELS.items():
            rounds = [one_round(folder, words, steps) for _ in range(ROUNDS)] if quiet else [one_round(folder, words, 1, late=False)]
            ran = rounds[0]
            links = median(each[2]["bytes_per_s"] for each in rounds)
            os.chdir(folder)
            # 先算分片的：本进程有多大，第一次问时量，规划过别的就更大了
            sharded = planned([*words, "parallel=fsdp"], 2, len(set(text)), links)
            plans = {world: planned(words, world, len(set(text)), links) for world in PROCESSES}
            os.chdir(ROOT)
            several, size = PROCESSES[1:], ran[1]["gradients"]
            found["models"][name] = {
                "gradients_mib": size / 2**20, "peak_over_plan": {n: ran[n]["peak"] / plans[n].total for n in PROCESSES},
                # 每个进程发一份，都经过回环
                "sent_over_theory": {n: ran[n]["sent"] / (n * plans[n].communication.network.sent(size)) for n in several},
                "fsdp": {
                    "sent_over_theory": ran["fsdp"]["sent"] / (2 * sharded.communication.sent), "peak_over_plan": ran["fsdp"]["peak"] / sharded.total,
                    "peak_over_ddp": ran["fsdp"]["peak"] / ran[2]["peak"], "peak_over_ddp_planned": sharded.total / plans[2].total,
                },
            }
            if quiet:
                cores = os.cpu_count()
                found["times"][name] = {
                    # 进程比核多的，每核的效率：多出来的只有分摊的代价
                    "efficiency": {n: spread(each[1]["step_s"] / (min(n, cores) * each[n]["step_s"]) for each in rounds) for n in several},
                    "efficiency_planned": {n: plans[1].step_s / (n * plans[n].step_s) for n in several if n <= cores},
                    "step_over_plan": {n: spread(each[n]["step_s"] / plans[n].step_s for each in rounds) for n in PROCESSES if n <= cores},
                    "summed_behind": spread(each["late"]["step_s"] / each[2]["step_s"] for each in rounds), "link_gb_per_s": links / 1e9,
                    "fsdp_over_ddp": spread(each["fsdp"]["step_s"] / each[2]["step_s"] for each in rounds),
                    "fsdp_over_ddp_planned": sharded.step_s / plans[2].step_s,
                }
        found["restarts"] = before.get("restarts", {}) | restarts(folder, quiet=quiet)
    return found


def one_round(folder: Path, words: list[str], steps: int, *, late: bool = True) -> dict:
    """Each setting once, in turn."""
    ran = {world: together(folder, world, words, steps) for world in PROCESSES}
    ran["fsdp"] = together(folder, 2, [*words, "parallel=fsdp"], steps)
    return ran | ({"late": together(folder, 2, words, steps, late=True)} if late else {})


def spread(ratios) -> list[float]:
    """The median, the smallest and the largest."""
    ratios = list(ratios)
    return [median(ratios), min(ratios), max(ratios)]


def restarts(folder: Path, *, quiet: bool) -> dict:
    """What killing a process of a training under torchrun costs: steps that are done again, and seconds until they are."""
    words = [*COMMON, *MODELS["matrices"], "out_dir=run", f"save_interval={SAVE_INTERVAL}", "eval_interval=1000000", "log_interval=1", "max_iters=100000"]
    torchrun = [sys.executable, "-u", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", f"--max-restarts={KILLS}", "--monitor-interval=0.2"]
    job = subprocess.Popen(
        [*torchrun, str(ROOT / "run_train.py"), *words], cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
    )

    def until(step: int) -> tuple[int, float]:
        """The first iteration from `step` on that is logged, and when."""
        for line in job.stdout:
            if line.startswith("iter ") and ": loss" in line and (at := int(line[5:].partition(":")[0])) >= step:
                return at, time.perf_counter()
        raise RuntimeError("torchrun gave up")

    chance, lost, seconds, away = random.Random(0), [], [], []
    at = 0
    for _ in range(KILLS):
        at, killed = until(at + SAVE_INTERVAL + chance.randrange(SAVE_INTERVAL))
        workers = [child for child in psutil.Process(job.pid).children() if "run_train.py" in " ".join(child.cmdline())]
        chance.choice(workers).kill()
        again, began = until(0)
        while again > at:
            # 被杀之前已写在管道里的
            again, began = until(0)
        _, caught_up = until(at)
        lost.append(at - again + 1)
        away.append(began - killed)
        seconds.append(caught_up - killed)
    job.terminate()
    job.communicate()
    times = {"seconds_until_it_trains": away, "seconds_until_it_is_where_it_was": seconds} if quiet else {}
    return {"save_interval": SAVE_INTERVAL, "steps_lost": lost, **times}


def show(found: dict) -> None:
    """Print what measure() found."""
    for name, row in found["models"].items():
        print(f"{name}: {row['gradients_mib']:.1f} MiB of gradients")
        print(f"  bytes sent over theory: {each(row['sent_over_theory'])}; peak over plan: {each(row['peak_over_plan'])}")
        shards = row["fsdp"]
        print(f"  parallel=fsdp: bytes sent {shards['sent_over_theory']:.3f} of theory, peak over plan {shards['peak_over_plan']:.3f}", end=", ")
        print(f"over that of ddp {shards['peak_over_ddp']:.3f} (plan {shards['peak_over_ddp_planned']:.3f})")
    for name, row in found["times"].items():
        print(f"{name}: efficiency {each(row['efficiency'])}, by the plan {each(row['efficiency_planned'])}; links of {row['link_gb_per_s']:.2f} GB/s")
        print(f"  sums behind the backward pass instead of beside it: {with_range(row['summed_behind'])} times as long", end="")
        print(f"; fsdp {with_range(row['fsdp_over_ddp'])} times as long as ddp (plan {row['fsdp_over_ddp_planned']:.2f})")
    for name, numbers in found["restarts"].items():
        print(f"a process killed under torchrun, {name.replace('_', ' ')}: {numbers}")


def each(numbers: dict) -> str:
    """A number for each number of processes."""
    return ", ".join(f"{processes} processes {with_range(number)}" for processes, number in numbers.items())


def with_range(number: float | list[float]) -> str:
    """One number, or a median with its range."""
    return "{:.2f} ({:.2f} to {:.2f})".format(*number) if isinstance(number, list) else f"{number:.3f}"


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
        before = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
        quiet = os.getloadavg()[0] < QUIET
        show(found := measure(given.steps, before, quiet=quiet))
        RESULTS.write_text(json.dumps({"cores": os.cpu_count(), "torch": torch.__version__, **found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
