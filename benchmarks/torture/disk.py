"""A full disk, a read-only folder, a quota: said in one line, the last good checkpoint kept, training goes on, the save is tried again.

    python benchmarks/torture/disk.py              # writes benchmarks/results/torture_disk.json
    python benchmarks/torture/disk.py --cases 8 --seed 7

With the right to mount (root), the run folder lies on a small tmpfs that is filled, emptied and made read-only; without, only the cases
of a file-size limit and of a full output are run. Linux only: the runs are forks of this process.
"""

import argparse
import contextlib
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from forked import Ended, Running, train
from kill import TINY, litter, outcome, write_text_file
from ledger import Ledger

# isort: split
import torch

from nanogpt.base import language
from nanogpt.run import saving
from nanogpt.weights import checkpoint

ENOUGH_MIB, RETRY_S = 8, 0.2
LONG = ("max_iters=120", "log_interval=5", "save_interval=5")


def mounted(folder: Path, options: str) -> bool:
    """Whether a small tmpfs with these options could be mounted at `folder`."""
    folder.mkdir(exist_ok=True)
    return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False).returncode == 0


@contextlib.contextmanager
def small_disk(folder: Path, options: str = f"size={ENOUGH_MIB}m") -> Iterator[bool]:
    """A tmpfs at `folder`; False where mounting is not allowed."""
    there = mounted(folder, options)
    try:
        yield there
    finally:
        if there:
            subprocess.run(["umount", "-l", str(folder)], check=True)
        shutil.rmtree(folder, ignore_errors=True)


def fill(folder: Path, leave: int = 0) -> Path:
    """Write a file that leaves `leave` bytes; its path."""
    ballast = folder / "ballast"
    space = os.statvfs(folder)
    with contextlib.suppress(OSError), ballast.open("wb") as file:
        for _ in range(max(0, space.f_bavail * space.f_frsize - leave) // 4096):
            file.write(bytes(4096))
    return ballast


def hurry() -> None:
    """In the child: try again soon, so that an attack takes seconds."""
    saving.RETRY_S = RETRY_S


def lines_of(ended: Ended) -> list[str]:
    """The error lines that a person sees."""
    return [line for line in ended.output.splitlines() if line.startswith("error:")]


class Attack:
    """All cases in one working folder."""

    def __init__(self, ledger: Ledger, place: Path, chance: random.Random):
        self.ledger, self.place, self.chance = ledger, place, chance
        self.disk = place / "disk"
        self.run = self.disk / "run"
        self.command = [*TINY, *LONG, f"out_dir={self.run}"]
        ended = train(self.command, place)
        assert ended.code == 0, ended.output
        self.whole = outcome(self.run)
        shutil.rmtree(self.disk)

    def judge(self, kind: str, good: bool, what: str, ended: Ended) -> None:
        """Count a case as kept or broken; a traceback breaks every promise."""
        if good and not ended.traced:
            self.ledger.count(kind, what)
        else:
            self.ledger.breach(kind, f"code {ended.code}: {ended.output[-600:]}")

    def last_good(self) -> bool:
        """Whether the last checkpoint is whole, and no half of another lies beside it."""
        checkpoint.find(self.run, "last").load_state()
        return not litter(self.run)

    def wait_for(self, running: Running, said: Callable[[], bool]) -> None:
        while not running.over and not said():
            time.sleep(0.002)

    def begun(self, *more: str) -> Running:
        """A run on the small disk that has saved at least once."""
        running = Running([*self.command, *more], self.place, before=hurry)
        self.wait_for(running, lambda: len(list((self.run / "ckpt").glob("iter_*"))) >= 1)
        return running

    def full_then_free(self) -> None:
        """The disk fills in the middle and is freed again: nothing is lost but time."""
        with small_disk(self.disk) as there:
            if not there:
                return
            logger = self.chance.choice(["none", "tensorboard"])
            running = self.begun(f"logger={logger}", "max_iters=400", "lr_decay_iters=120")
            ballast = fill(self.disk, self.chance.choice([0, 0, 1000, 20_000]))
            self.wait_for(running, lambda: "could not save" in running.output())
            said = "could not save a checkpoint" in running.output()
            time.sleep(self.chance.random())
            ballast.unlink(missing_ok=True)
            ended = running.wait()
            good = ended.code == 0 and self.last_good() and checkpoint.find(self.run, "last").iteration == 400
            self.judge(f"full, then free, logger={logger}", good, "said, trained on, saved" if said else "had room enough", ended)

    def full_to_the_end(self) -> None:
        """The disk stays full: the exit code says so, and the last good checkpoint is there."""
        with small_disk(self.disk) as there:
            if not there:
                return
            running = self.begun("logger=none")
            ballast = fill(self.disk)
            ended = running.wait()
            ballast.unlink(missing_ok=True)
            if ended.code == 0:
                # 填满之前最后一次已存下
                self.judge("full to the end", outcome(self.run) == self.whole, "was done before", ended)
                return
            good = ended.code == 2 and len(lines_of(ended)) == 1 and "could not be saved" in lines_of(ended)[0] and self.last_good()
            self.judge("full to the end", good, "said in one line, exit code 2, last good one kept", ended)
            again = train([f"resume={self.run}", "lang=en"], self.place)
            self.judge("then space again", again.code == 0 and outcome(self.run) == self.whole, "resumes, equal to the bit", again)

    def full_from_the_start(self) -> None:
        """No room for anything: one line, and no half run."""
        with small_disk(self.disk) as there:
            if not there:
                return
            fill(self.disk, self.chance.choice([0, 3000, 9000]))
            ended = train(self.command, self.place, before=hurry)
            self.judge("full from the start", ended.code == 2 and len(lines_of(ended)) == 1, "said in one line, exit code 2", ended)

    def no_room_to_prepare(self) -> None:
        """The data set does not fit."""
        with small_disk(self.disk) as there:
            if not there:
                return
            fill(self.disk, self.chance.choice([0, 2000, 8000]))
            command = [*TINY, *LONG, f"dataset.dir={self.disk / 'data'}", "out_dir=outputs/elsewhere"]
            ended = train(command, self.place, before=hurry)
            left = [p.name for p in self.disk.iterdir() if p.name != "ballast"]
            good = ended.code == 2 and len(lines_of(ended)) == 1 and not left and not (self.place / "outputs/elsewhere").exists()
            self.judge("no room for the data set", good, "said in one line, nothing left behind", ended)

    def no_inodes(self) -> None:
        """Space enough, but no more files."""
        with small_disk(self.disk, f"size={ENOUGH_MIB}m,nr_inodes={self.chance.randrange(12, 40)}") as there:
            if not there:
                return
            ended = train([*self.command, "logger=none"], self.place, before=hurry)
            good = (ended.code == 0 and outcome(self.run) == self.whole) or (ended.code == 2 and len(lines_of(ended)) == 1)
            self.judge("no more files", good, "went on" if ended.code == 0 else "said in one line, exit code 2", ended)

    def read_only(self) -> None:
        """The run folder may not be written."""
        with small_disk(self.disk) as there:
            if not there:
                return
            first = train([*self.command, "max_iters=10"], self.place)
            assert first.code == 0, first.output
            subprocess.run(["mount", "-o", "remount,ro", str(self.disk)], check=True)
            arguments = self.chance.choice([[f"resume={self.run}", "max_iters=20", "lang=en"], [*TINY, f"out_dir={self.disk / 'new'}"]])
            ended = train(arguments, self.place)
            self.judge("read-only", ended.code == 2 and len(lines_of(ended)) == 1 and self.last_good(), "said in one line, exit code 2", ended)

    def frozen(self) -> None:
        """In the middle of a run the folder of its checkpoints can no longer be changed."""
        running = self.begun("logger=none")
        if subprocess.run(["chattr", "+i", str(self.run / "ckpt")], capture_output=True, check=False).returncode:
            running.kill()
            running.wait()
            return
        ended = running.wait()
        subprocess.run(["chattr", "-i", str(self.run / "ckpt")], check=True)
        done = ended.code == 0 and outcome(self.run) == self.whole
        good = done or (ended.code == 2 and len(lines_of(ended)) == 1 and self.last_good())
        self.judge("ckpt/ frozen in the middle", good, "was done before" if done else "said in one line, exit code 2, last good one kept", ended)
        shutil.rmtree(self.disk)

    def quota(self) -> None:
        """No file may grow beyond a size."""
        limit = self.chance.choice([1000, 4000, 8000, 20_000, 40_000])

        def limited() -> None:
            hurry()
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        ended = train([*self.command, "logger=none"], self.place, before=limited)
        # 输出也是文件：会被截断，错误那一行可能不见
        good = ended.code == 2 or (ended.code == 0 and outcome(self.run) == self.whole)
        self.judge("no file beyond a size", good, "exit code 2" if ended.code else "equal to the bit", ended)
        shutil.rmtree(self.disk, ignore_errors=True)

    def nobody_reads(self) -> None:
        """stdout is full, or closed by its reader: the run goes on, or saves and ends."""
        full = self.chance.random() < 0.5

        def replaced() -> None:
            hurry()
            if full:
                os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
            else:
                reading, writing = os.pipe()
                os.dup2(writing, 1)
                os.close(reading)
                os.close(writing)

        ended = train([*self.command, "logger=none"], self.place, before=replaced)
        if full:
            self.judge("stdout is full", outcome(self.run) == self.whole, f"trained on, exit code {ended.code}", ended)
        else:
            # 头一行就没人读：还没开始训
            begun = (self.run / "run.json").is_file()
            again = train([f"resume={self.run}", "lang=en"] if begun else self.command, self.place)
            # 也可能到最后一行才发觉没人读：那时已训完
            good = ended.code == 141 and (again.code == 0 or "already stands" in again.output) and outcome(self.run) == self.whole
            self.judge("nobody reads stdout", good, "exit code 141; then resumes, equal to the bit", again if ended.code == 141 else ended)
        shutil.rmtree(self.disk, ignore_errors=True)


def attack(ledger: Ledger, *, cases: int, seed: int) -> None:
    """Every case in turn until so many have been counted."""
    language.set_language("en")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as named:
        place = Path(named)
        write_text_file(place)
        attacker = Attack(ledger, place, random.Random(seed))
        ways = [
            attacker.full_then_free, attacker.full_to_the_end, attacker.full_from_the_start, attacker.no_room_to_prepare, attacker.no_inodes,
            attacker.read_only, attacker.frozen, attacker.quota, attacker.nobody_reads,
        ]
        with small_disk(place / "probe") as allowed:
            ledger.figures["tmpfs"] = allowed
        while ledger.cases < cases:
            for way in ways:
                way()
                shutil.rmtree(place / "outputs", ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=120)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    ledger = Ledger("disk", "A full or read-only disk is said in one line; the last good checkpoint is kept, the save is tried again.")
    attack(ledger, cases=arguments.cases, seed=arguments.seed)
    return ledger.finish()


if __name__ == "__main__":
    sys.exit(main())
