"""Two runs, one folder: the second is refused while the first lives, and a lock left by a dead process never blocks anyone.

    python benchmarks/torture/folders.py           # writes benchmarks/results/torture_folders.json
    python benchmarks/torture/folders.py --rounds 2 --seed 7

POSIX only: the runs are forks of this process.
"""

import argparse
import contextlib
import io
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from forked import Ended, Running, train
from kill import RUN, TINY, empty, litter, outcome, write_text_file
from ledger import Ledger

# isort: split
import torch

from nanogpt.base import language
from nanogpt.weights import checkpoint
from nanogpt.write import loading

AT_ONCE = 4
# 第二个进程要在它活着时启动完：比平常长一些
LONG = "max_iters=60"


class Attack:
    """All cases in one working folder."""

    def __init__(self, ledger: Ledger, folder: Path, chance: random.Random):
        self.ledger, self.folder, self.chance = ledger, folder, chance
        self.command = [*TINY, LONG]
        ended = train([*self.command, f"out_dir={RUN}"], folder)
        assert ended.code == 0, ended.output
        self.whole = outcome(folder / RUN)
        empty(folder)

    def judge(self, kind: str, good: bool, what: str, why: str) -> None:
        """Count a case as kept or broken."""
        if good:
            self.ledger.count(kind, what)
        else:
            self.ledger.breach(kind, why)

    def refused(self, ended: Ended) -> bool:
        """Whether a run was turned away in one line."""
        lines = [line for line in ended.output.splitlines() if line.startswith("error:")]
        return ended.code == 2 and len(lines) == 1 and not ended.traced

    def first(self) -> Running:
        """A run that is in the middle of its work."""
        running = Running([*self.command, f"out_dir={RUN}"], self.folder)
        while not any((self.folder / RUN / "ckpt").glob("iter_*")) and not running.over:
            time.sleep(0.005)
        return running

    def second_is_refused(self) -> None:
        """New, overwriting or resuming, however the folder is spelled: refused, and the first is not disturbed."""
        first = self.first()
        spelled = self.chance.choice([str(RUN), f"./{RUN}", str(self.folder / RUN), "outputs/../outputs/run"])
        how = self.chance.choice([[f"out_dir={spelled}"], [f"out_dir={spelled}", "overwrite=true"], ["resume=latest"], [f"resume={spelled}"]])
        arguments = ["lang=en", *how] if how[0].startswith("resume") else [*self.command, *how]
        second = train(arguments, self.folder)
        late = first.over
        done = first.wait()
        kind = "a second run: " + " ".join(part.partition("=")[0] for part in how)
        if late:
            self.ledger.count(kind, "the first was done before")
        else:
            self.judge(kind, self.refused(second), "refused in one line", f"{second.code}: {second.output[-300:]}")
        if late and how != [f"out_dir={spelled}"]:
            # 第一个已经结束，第二个接着干是对的
            empty(self.folder)
            return
        self.judge("the first run", done.code == 0 and outcome(self.folder / RUN) == self.whole, "equal to the bit", done.output[-300:])
        empty(self.folder)

    def at_the_same_moment(self) -> None:
        """Of several that start at once in one folder, exactly one trains."""
        runs = [Running([*self.command, f"out_dir={RUN}"], self.folder) for _ in range(AT_ONCE)]
        ended = [run.wait() for run in runs]
        won = [e for e in ended if e.code == 0]
        good = len(won) == 1 and all(self.refused(e) for e in ended if e.code) and outcome(self.folder / RUN) == self.whole
        said = " | ".join(f"{e.code} {e.output[-120:]}" for e in ended)
        self.judge("at the same moment, one folder", good, "one trains, the others are refused", said)
        self.judge("one data set, prepared at the same moment", not litter(self.folder), "whole, nothing left behind", str(litter(self.folder)))
        empty(self.folder)

    def each_its_own(self) -> None:
        """Several at once that name no folder: each gets one."""
        runs = [Running([*self.command, "max_iters=6"], self.folder) for _ in range(AT_ONCE)]
        ended = [run.wait() for run in runs]
        folders = [p for p in (self.folder / "outputs").iterdir() if p.is_dir()]
        good = all(e.code == 0 for e in ended) and len(folders) == AT_ONCE and not litter(self.folder)
        self.judge("at the same moment, no folder named", good, "each in its own", " | ".join(f"{e.code} {e.output[-120:]}" for e in ended))
        empty(self.folder)

    def dead_lock(self) -> None:
        """A killed process, or whatever lies in the lock file, blocks nobody."""
        first = self.first()
        first.kill()
        first.wait()
        lock = self.folder / RUN / "lock"
        lock.write_bytes(self.chance.choice([b"", b"1\n", b"\xff" * 100_000, str(os.getpid()).encode("ascii"), b"x" * 9]))
        ended = train([f"resume={RUN}", "lang=en"], self.folder)
        good = ended.code == 0 and outcome(self.folder / RUN) == self.whole
        # 被杀之前就跑完了的，会说已经到头
        good = good or ("already stands at" in ended.output and outcome(self.folder / RUN) == self.whole)
        self.judge("a lock left by a dead process", good, "blocks nobody", f"{ended.code}: {ended.output[-300:]}")
        empty(self.folder)

    def written_while_read(self) -> None:
        """Someone writes with a run that is saving and deleting all the time."""
        run = Running([*self.command, f"out_dir={RUN}", "save_interval=1", "keep=1"], self.folder)
        reads = 0
        while not run.over:
            if not any((self.folder / RUN / "ckpt").glob("iter_*")):
                continue
            which = self.chance.choice(["best", "last"])
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    checkpoint.use(self.folder / RUN, which, lambda source: loading.load(source, torch.device("cpu")), key="out_dir")
            except Exception as error:
                self.ledger.breach("read while it is written", f"{which}: {type(error).__name__}: {error}")
            reads += 1
        run.wait()
        self.ledger.counts["read while it is written"]["whole"] += reads
        empty(self.folder)


def attack(ledger: Ledger, *, rounds: int, seed: int) -> None:
    """Every case `rounds` times."""
    language.set_language("en")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as named:
        folder = Path(named)
        write_text_file(folder)
        attacker = Attack(ledger, folder, random.Random(seed))
        cases: list[Callable[[], None]] = [
            attacker.second_is_refused, attacker.at_the_same_moment, attacker.each_its_own, attacker.dead_lock, attacker.written_while_read,
        ]
        for _ in range(rounds):
            for case in cases:
                case()
                shutil.rmtree(folder / "outputs", ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    ledger = Ledger("folders", "Two runs never share a folder, and a lock left by a dead process never blocks anyone.")
    attack(ledger, rounds=arguments.rounds, seed=arguments.seed)
    return ledger.finish()


if __name__ == "__main__":
    sys.exit(main())
