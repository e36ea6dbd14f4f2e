"""Attack a sweep: trials that crash, hang and are killed, and the sweep itself killed again and again.

python benchmarks/torture/sweeps.py --trials 50 --kills 20
"""

import argparse
import html
import json
import os
import random as randomness
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import psutil
from faulty import FAULTS
from ledger import ROOT, Ledger

PROMISE = (
    "Whatever a trial does, the sweep gives its result or the reason why there is none; a sweep killed at any moment and typed again loses no trial, "
    "counts none twice, and leaves no process behind."
)
TEXT = "The quick brown fox jumps over the lazy dog.\n" * 60
SWEEP = (
    "-m", "experiment=fit", "hardware=cpu", "hardware.ram_gib=1.5", "dataset=text_file", "dataset.path=my.txt", "dataset.dir=prepared", "device=cpu",
    "model.n_layer=2", "model.n_head=2", "model.n_embd=16", "model.block_size=16", "model.ngrams=[2]", "model.ngram_buckets=97", "logger=none",
    "eval_tokens=200", "sample_tokens=5", "hardware.peak_tflops_fp32=0.1", "trial.warmup_steps=1", "trial.steps=2", "lang=en",
)
REAL = (sys.executable, str(ROOT / "run_train.py"))
# 快的假子进程：记下开始与完成，父进程一断就走
CHILD = """
import json, os, select, sys
job = json.loads(sys.stdin.readline())
rows = job["config"]["batch_size"]
def note(what):
    descriptor = os.open("measured", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{what} {rows}\\n".encode())
    os.close(descriptor)
note("begun")
if select.select([sys.stdin], [], [], SECONDS)[0]:
    os._exit(1)
values = {"status": "ok", "tokens_per_s": 1000.0 + rows, "micro_batch": rows, "peak_gib": 0.1, "budget_gib": 1.5, "device_type": "cpu"}
with open(job["report"], "a", encoding="utf-8") as file:
    file.write(json.dumps(values) + "\\n")
note("done")
"""
# 换上假子进程的 run_train.py：产品里没有为测试留的口子
FAKE = """
import runpy, sys
from nanogpt.sweep import trial
trial.run_trial.__kwdefaults__["command"] = (sys.executable, "-S", "-c", CHILD)
sys.argv = [SCRIPT, *sys.argv[1:]]
runpy.run_path(SCRIPT, run_name="__main__")
"""


def fake(seconds: float) -> tuple[str, ...]:
    """The command of a sweep whose trials take `seconds` and measure nothing."""
    child = CHILD.replace("SECONDS", repr(seconds))
    return sys.executable, "-c", FAKE.replace("CHILD", repr(child)).replace("SCRIPT", repr(str(ROOT / "run_train.py")))


class Sweep:
    """A command that is typed again and again in one folder; its processes carry a mark by which they are found."""

    def __init__(self, folder: Path, command: tuple[str, ...], *overrides: str):
        self.folder, self.command, self.mark = folder, [*command, *SWEEP, *overrides], uuid.uuid4().hex
        (folder / "my.txt").write_text(TEXT, encoding="utf-8")

    def start(self) -> subprocess.Popen:
        """Type it."""
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "TORTURE_SWEEP": self.mark, "TMPDIR": str(self.folder), "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join([str(self.folder), str(ROOT)]),
        }
        with (self.folder / "console").open("ab") as output:
            return subprocess.Popen(self.command, cwd=self.folder, env=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL)

    def finish(self, seconds: float = 1800) -> int:
        """Type it and wait; the exit code."""
        return self.start().wait(seconds)

    def alive(self) -> list[psutil.Process]:
        """Its processes that still run."""
        found = []
        for process in psutil.process_iter():
            try:
                # 没人收的僵尸已经结束了
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("TORTURE_SWEEP") == self.mark:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def none_left(self, ledger: Ledger, kind: str, seconds: float = 5) -> None:
        """Count whether all processes are gone; end those that are not."""
        end = time.monotonic() + seconds
        while (left := self.alive()) and time.monotonic() < end:
            time.sleep(0.05)
        ledger.breach(kind, f"left behind: {[one.cmdline()[-1:] for one in left]}") if left else ledger.count(kind, "no process left")
        for one in left:
            one.kill()

    def whole_files(self, ledger: Ledger, kind: str) -> None:
        """Every result file is whole JSON."""
        torn = []
        patterns = ("outputs/fit/trials/*.json", "outputs/fit/*/*/trial.json", "outputs/fit/*/trials.jsonl")
        for path in [path for pattern in patterns for path in self.folder.glob(pattern)]:
            try:
                for line in path.read_text(encoding="utf-8").splitlines():
                    json.loads(line)
            except ValueError:
                torn.append(path.name)
        ledger.breach(kind, f"torn: {torn}") if torn else ledger.count(kind, "no torn file")

    def rows(self) -> list[dict]:
        """trials.jsonl of the newest report."""
        newest = max(self.folder.glob("outputs/fit/*/trials.jsonl"), key=lambda path: path.stat().st_mtime)
        return [json.loads(line) for line in newest.read_text(encoding="utf-8").splitlines()]

    def page(self) -> str:
        """report.html of the newest report."""
        return max(self.folder.glob("outputs/fit/*/report.html"), key=lambda path: path.stat().st_mtime).read_text(encoding="utf-8")


# ---- 一：坏掉的试跑 ----


def faults(ledger: Ledger, folder: Path, *, trials: int, timeout_s: int = 40) -> None:
    """A sweep of real trials, some of which crash, hang or are killed; typed again, it measures only what crashed."""
    shutil.copy(ROOT / "benchmarks" / "torture" / "faulty.py", folder)
    sizes = ",".join(str(rows) for rows in range(1, trials + 1))
    sweep = Sweep(folder, REAL, "model._target_=faulty.Faulty", f"trial.timeout_s={timeout_s}", f"batch_size={sizes}")
    for attempt in ("first", "again"):
        begun = time.monotonic()
        process = sweep.start()
        over = threading.Event()
        killer = threading.Thread(target=_kill_victims, args=(sweep, over))
        killer.start()
        code = process.wait(3600)
        over.set()
        killer.join()
        ledger.figures[f"{trials} trials, {attempt}, s"] = round(time.monotonic() - begun, 1)
        ledger.count("exit code", "1, as documented") if code == 1 else ledger.breach("exit code", f"{code}")
        check_faults(ledger, sweep.rows(), sweep.page(), range(1, trials + 1), known=attempt == "again")
        sweep.none_left(ledger, "faults")
        sweep.whole_files(ledger, "faults")


def _kill_victims(sweep: Sweep, over: threading.Event) -> None:
    """SIGKILL from outside whoever writes its process id into the folder's `victims`."""
    path, killed = sweep.folder / "victims", 0
    while not over.wait(0.2):
        pids = [int(line) for line in path.read_text(encoding="utf-8").split()] if path.exists() else []
        for pid in pids[killed:]:
            # 进程号可能已属于别人：只杀带标记的
            if pid in {one.pid for one in sweep.alive()}:
                os.kill(pid, signal.SIGKILL)
        killed = len(pids)


def check_faults(ledger: Ledger, rows: list[dict], page: str, wanted: Sequence[int], *, known: bool) -> None:
    """Every wanted batch size once: its figures, or its reason, in the report's table too."""
    # 写了两遍的，后一个算数
    by_size = {[int(one.split("=")[1]) for one in row["overrides"] if one.startswith("batch_size=")][-1]: row for row in rows}
    if len(rows) != len(wanted) or sorted(by_size) != sorted(wanted):
        ledger.breach("rows", f"{sorted(by_size)} in {len(rows)} rows")
    for rows_at_once, row in sorted(by_size.items()):
        fault, status, words = FAULTS.get(rows_at_once, (None, "ok", ""))
        measured = bool(row["tokens_per_s"]) == (status == "ok") and row["known"] == (known and status != "crashed")
        if row["status"] != status or words not in row["reason"] or not measured or html.escape(row["reason"]) not in page:
            ledger.breach("trial", f"{rows_at_once}: {row['status']} ({row['reason']}), {row['tokens_per_s']} tokens/s, known={row['known']}")
        else:
            ledger.count("trial" + (" typed again" if known else ""), status if fault is None else f"{fault.__name__}: {status}")


# ---- 二：扫描自己被杀 ----


def kills(ledger: Ledger, sweep: Sweep, *, trials: int, count: int, random: randomness.Random, longest_s: float = 12) -> None:
    """Kill the sweep's own process `count` times, half of them right after a trial was measured; then let it finish."""
    for number in range(count):
        process = sweep.start()
        if number % 2:
            after_a_measurement(sweep.folder / "measured", process, random, longest_s)
        else:
            time.sleep(random.uniform(0.2, longest_s))
        ended = process.poll()
        process.kill()
        process.wait()
        sweep.none_left(ledger, "killed")
        sweep.whole_files(ledger, "killed")
        ledger.count("killed", "while it ran" if ended is None else "after its end")
    code = sweep.finish()
    ledger.count("finished", "exit code 0") if code == 0 else ledger.breach("finished", f"exit code {code}: {_end(sweep.folder / 'console')}")
    check_kills(ledger, sweep, trials, count)


def after_a_measurement(path: Path, process: subprocess.Popen, random: randomness.Random, longest_s: float) -> None:
    """Wait until another trial was measured, and a little longer."""
    before, end = path.stat().st_size if path.exists() else 0, time.monotonic() + 3 * longest_s
    while process.poll() is None and time.monotonic() < end:
        if path.exists() and b"done" in path.read_bytes()[before:]:
            # 父进程正在记下结果
            time.sleep(random.uniform(0, 0.06))
            return
        time.sleep(0.001)


def check_kills(ledger: Ledger, sweep: Sweep, trials: int, count: int) -> None:
    """No trial lost, none twice, nothing half-written left, and almost nothing measured twice."""
    rows = sweep.rows()
    sizes = Counter(row["micro_batch"] for row in rows)
    if sorted(sizes.elements()) != list(range(1, trials + 1)) or any(row["status"] != "ok" for row in rows):
        ledger.breach("rows", f"{len(rows)} rows of {trials}: {sizes.most_common(3)}, {Counter(row['status'] for row in rows)}")
    else:
        ledger.count("rows", "every trial once")
    measured = sweep.folder / "measured"
    if measured.exists():
        done = Counter(line.split()[1] for line in measured.read_text(encoding="utf-8").splitlines() if line.startswith("done"))
        again = done.total() - trials
        # 量完而还没记下的那一刻被杀，只好再量：一次被杀至多一个
        ledger.figures |= {"measured": done.total(), "measured again because killed before it was written down": again}
        ledger.count("measured", "at most once for every kill") if 0 <= again <= count else ledger.breach("measured", f"{again} too many")
    stray = [path.name for path in (sweep.folder / "outputs" / "fit" / "trials").glob(".*")]
    ledger.breach("stray files", str(stray)) if stray else ledger.count("stray files", "none")


def _end(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")[-600:]


def real_kills(ledger: Ledger, folder: Path, *, count: int, random: randomness.Random) -> None:
    """The same with real trials, one of which hangs without ever letting Python run: it must end with the sweep all the same."""
    shutil.copy(ROOT / "benchmarks" / "torture" / "faulty.py", folder)
    stuck = next(rows for rows, (fault, *_) in FAULTS.items() if fault.__name__ == "hang_in_c")
    hanging = Sweep(folder, REAL, "model._target_=faulty.Faulty", f"batch_size={stuck},{stuck + 1}")
    process = hanging.start()
    # 等到真的卡住：子进程已在、CPU 不再动
    while len(hanging.alive()) < 2 and process.poll() is None:
        time.sleep(0.1)
    time.sleep(12)
    process.kill()
    process.wait()
    hanging.none_left(ledger, "killed beside a trial that is stuck in C")
    kills(ledger, Sweep(folder, REAL, "batch_size=1,2,3,4"), trials=4, count=count, random=random, longest_s=9)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    ledger, random = Ledger("sweeps", PROMISE), randomness.Random(asked.seed)
    for name, attack in (
        ("faults", lambda folder: faults(ledger, folder, trials=asked.trials)),
        ("kills", lambda folder: kills(ledger, Sweep(folder, fake(0.5), f"batch_size={','.join(map(str, range(1, asked.trials + 1)))}"),
                                       trials=asked.trials, count=asked.kills, random=random)),
        ("real kills", lambda folder: real_kills(ledger, folder, count=max(1, asked.kills // 4), random=random)),
    ):
        print(name, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            attack(Path(folder))
    return ledger.finish()


if __name__ == "__main__":
    sys.exit(main())
