"""What a training keeps of its speed while another one runs on the same cores, by how OpenMP's threads wait.

    python benchmarks/busy.py [--seconds 85] [--shape 4/4/128] [--others 0.1]

Two trainings for each way of waiting stand ready and stopped; alone and beside its twin each runs for a moment, in turn, until
the time is over. A moment counts in which other programs took less than --others cores (Linux only). Writes
benchmarks/results/busy.json: steps/s alone, of one beside the other, and its share of half of the best lone speed; where other
programs were let in, only the ways beside each other say something.
"""

# 同一台机器上两次训练，各还剩多少：按 OpenMP 的线程怎样等来分
# 进程先都备好再停住（SIGSTOP），轮流放开片刻，几种等法碰到的是同样的机器；别的程序插进来的片刻不算

import argparse
import json
import mmap
import os
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# 只有正好是缺省的那个数，程序才自己看机器忙不忙
WAYS = {
    "as OpenMP does": {"GOMP_SPINCOUNT": "300000"}, "spins briefly": {"GOMP_SPINCOUNT": "20001"},
    "sleeps at once": {"OMP_WAIT_POLICY": "passive"}, "looks at the machine": {},
}
# 看机器的半秒一次：先让它看过两次
SETTLE_S, COUNT_S = 1.2, 1.5
TICK = os.sysconf("SC_CLK_TCK")


def train(shape: str, counter: Path) -> None:
    """Take training steps for ever, and keep their number in the file."""
    import nanogpt  # noqa: F401, I001 先于 torch：定下空闲的线程怎么等
    import train_cpu

    from nanogpt.core import machine

    machine.set_up(train_cpu.CPU, deterministic=False, hardware=train_cpu.HardwareConfig())
    once, done = train_cpu.training(shape, "fp32"), 0
    with counter.open("r+b") as file, mmap.mmap(file.fileno(), 8) as memory:
        while True:
            once()
            done += 1
            memory[:] = struct.pack("q", done)


class Training:
    """A training in a process of its own, stopped unless it is measured."""

    # 计数放在内存映射的文件里：被停住时也读得到

    def __init__(self, shape: str, way: str, file: Path):
        self.file = file
        file.write_bytes(bytes(8))
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))} | WAYS[way]
        self.process = subprocess.Popen([sys.executable, __file__, "--train", str(file), "--shape", shape], env=environment)

    def stand_ready(self) -> None:
        """Wait for its first steps, and stop it."""
        while self.done() < 3:
            time.sleep(0.1)
        self.process.send_signal(signal.SIGSTOP)

    def done(self) -> int:
        """Steps so far."""
        return struct.unpack("q", self.file.read_bytes())[0]

    def cpu_s(self) -> float:
        """CPU seconds so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK


def moment(trainings: list[Training]) -> tuple[float, float]:
    """(steps/s of each on average, cores that other programs took) while these run."""
    for each in trainings:
        each.process.send_signal(signal.SIGCONT)
    time.sleep(SETTLE_S)
    start, steps, own, all_of_it = time.monotonic(), [t.done() for t in trainings], sum(t.cpu_s() for t in trainings), busy_s()
    time.sleep(COUNT_S)
    seconds = time.monotonic() - start
    others = (busy_s() - all_of_it - sum(t.cpu_s() for t in trainings) + own) / seconds
    speed = statistics.mean(t.done() - before for t, before in zip(trainings, steps, strict=True)) / seconds
    for each in trainings:
        each.process.send_signal(signal.SIGSTOP)
    return speed, others


def busy_s() -> float:
    """Seconds that the machine's cores have worked."""
    user, nice, system, _, _, irq, soft, *_ = map(int, Path("/proc/stat").read_text(encoding="utf-8").split()[1:9])
    return (user + nice + system + irq + soft) / TICK


def measure(shape: str, seconds: float, most_others: float, folder: Path) -> dict:
    """Speeds of every way, alone and beside a twin."""
    pairs = {way: [Training(shape, way, folder / f"{number}{twin}") for twin in "ab"] for number, way in enumerate(WAYS)}
    for each in (training for pair in pairs.values() for training in pair):
        each.stand_ready()
    seen: dict[str, dict[str, list[float]]] = {way: {"alone": [], "beside": []} for way in WAYS}
    until, left_out, beside_us = time.monotonic() + seconds, 0, []
    try:
        while time.monotonic() < until:
            for way, pair in pairs.items():
                for name, running in (("alone", pair[:1]), ("beside", pair)):
                    speed, others = moment(running)
                    if others < most_others:
                        seen[way][name].append(speed)
                        beside_us.append(others)
                    else:
                        left_out += 1
    finally:
        for pair in pairs.values():
            for each in pair:
                each.process.kill()
                each.process.wait()
    # 平均而不是中位数：机器很忙时，一个片刻只走得了几步
    means = {way: {name: statistics.mean(speeds) if speeds else None for name, speeds in cells.items()} for way, cells in seen.items()}
    best = max((cells["alone"] for cells in means.values() if cells["alone"]), default=None)
    for way, cells in means.items():
        alone, beside = cells["alone"], cells["beside"]
        cells |= {"alone, of the best": alone and alone / best, "share of half of the best": beside and best and beside / (best / 2)}
        cells |= {"moments": [len(seen[way]["alone"]), len(seen[way]["beside"])]}
    others = round(statistics.median(beside_us), 2) if beside_us else None
    return {"shape": shape, "cores": os.cpu_count(), "cores_of_others": others, "moments_left_out": left_out, "ways": means}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=85)
    parser.add_argument("--shape", default="4/4/128")
    parser.add_argument("--others", type=float, default=0.1)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "busy.json")
    arguments = parser.parse_args()
    if arguments.train:
        train(arguments.shape, arguments.train)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments.shape, arguments.seconds, arguments.others, Path(folder))
    print(json.dumps(result, indent=2))
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
