"""kill -9 at any moment: the run goes on to the bit, repeats at most one checkpoint interval, and leaves no litter.

    python benchmarks/torture/kill.py              # 250 kills; writes benchmarks/results/torture_kill.json
    python benchmarks/torture/kill.py --kills 20 --seed 7

Each life is a small run that saves every few iterations, is killed three times and then left to finish. A kill comes after a
random time, a random moment after something began (a save, the deletion of an old checkpoint, the making of the folder), or right
before a random one of the run's own changes of files. POSIX only: the runs are forks of this process.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from forked import Ended, changes_of, train
from ledger import Ledger

from nanogpt.base.language import ConfigError
from nanogpt.weights import checkpoint

SAVE_INTERVAL = 3
TINY = (
    "dataset=text_file", "dataset.path=my.txt", "dataset.dir=prepared", "model.n_layer=1", "model.n_head=2", "model.n_embd=16", "model.block_size=16",
    "model.ngrams=[2]", "model.ngram_buckets=31", "batch_size=4", "logger=none", "sample_tokens=0", "eval_tokens=64", "eval_interval=5",
    f"save_interval={SAVE_INTERVAL}",
    "log_interval=1", "max_iters=30", "warmup_iters=2", "dropout=0.1", "lang=en", "device=cpu",
)
KINDS = {
    "fp32, muon": (), "fp16, adamw": ("precision=fp16", "optimizer=adamw"), "memory=minimal": ("memory=minimal",),
    "memory=lean8": ("memory=lean8", "gradient_accumulation_steps=2"),
}
KILLS_PER_LIFE = 3
RUN = Path("outputs/run")


def write_text_file(folder: Path) -> None:
    """The text that all runs train on."""
    words = "the quick brown fox jumps over a lazy dog and then sleeps until morning".split()
    chance = random.Random(1)
    lines = (" ".join(chance.choice(words) for _ in range(9)) for _ in range(300))
    (folder / "my.txt").write_text("\n".join(lines), encoding="utf-8")


def outcome(run: Path) -> tuple:
    """Everything that two equal runs must have in common: weights, optimizer and counters of the last checkpoint."""
    last = checkpoint.find(run, "last")
    state = last.load_state()
    # 用时不同，其余逐位相同
    progress = {key: value for key, value in state["progress"].items() if key != "train_s"}
    return last.iteration, last.val_loss, last.sha256["model.safetensors"], last.sha256["state.safetensors"], json.dumps(progress)


def empty(folder: Path) -> None:
    """Remove all but the text: the next run has to prepare its data, too."""
    shutil.rmtree(folder / "outputs", ignore_errors=True)
    shutil.rmtree(folder / "prepared", ignore_errors=True)


def litter(folder: Path) -> list[str]:
    """Temporary files and folders below a folder."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob(".*") if p.name.endswith((".tmp", ".lock")))


class Life:
    """One run from its first start to its end, with kills in between."""

    def __init__(self, ledger: Ledger, chance: random.Random, folder: Path, kind: str, seconds: float, changes: int):
        self.ledger, self.chance, self.folder, self.kind = ledger, chance, folder, kind
        self.seconds, self.changes = seconds, changes
        self.command = [*TINY, *KINDS[kind], f"out_dir={RUN}"]
        self.most_litter = 0
        self.repeated: list[int] = []

    @property
    def run(self) -> Path:
        return self.folder / RUN

    def arguments(self) -> list[str]:
        """resume= once the run is there; before that, the command again, as the message says."""
        return [f"resume={RUN}", "lang=en"] if (self.run / "run.json").is_file() else self.command

    def aimed(self) -> tuple[str, dict]:
        """A way to be killed: its name, and what train() has to do for it."""
        aims = {
            "inside a save": lambda: any((self.run / "ckpt").glob(".iter_*.tmp")),
            "while old ones are deleted": lambda: any((self.run / "ckpt").glob(".iter_*.old.tmp")),
            "at the start": lambda: (self.run / "lock").exists(),
        }
        name = self.chance.choice(["any moment", "before a change of a file", *aims])
        if name == "any moment":
            return name, {"kill_after_s": self.chance.uniform(0, self.seconds)}
        if name == "before a change of a file":
            return name, {"kill_at_change": self.chance.randrange(1, self.changes)}
        return name, {"watch": aims[name], "kill_after_s": self.chance.choice([0, 0.001, 0.003, 0.01]) * self.chance.random()}

    def logged(self) -> int:
        """The last iteration in metrics.jsonl."""
        path, last = self.run / "metrics.jsonl", 0
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            last = record["iteration"] if "event" not in record else last
        return last

    def kill_once(self) -> bool:
        """Start, kill, look at what is left; False when the run was done before."""
        name, how = self.aimed()
        ended = train(self.arguments(), self.folder, **how)
        if not ended.killed:
            self.finished(ended)
            return False
        left = litter(self.folder)
        self.most_litter = max(self.most_litter, len(left))
        self.ledger.count(f"killed: {name}", "in the middle of a write" if left else "between two writes")
        before = self.logged()
        found = checkpoint.listed(self.run).good if self.run.is_dir() else []
        self.repeated.append(before - (found[-1].iteration if found else 0))
        return True

    def finished(self, ended: Ended) -> None:
        """A run that went on to its end must have done so without an error, or say that it had been there before."""
        # 存完最后的 checkpoint、还没写总结就被杀：已经到头了
        if "already stands at iteration" in ended.output:
            self.ledger.count("killed behind its last save", "said to be done")
        elif ended.code or ended.traced:
            self.ledger.breach(self.kind, f"{' '.join(self.arguments())} ended with {ended.code}: {ended.output[-400:]}")

    def live(self, whole: tuple) -> None:
        """All kills, then the end, which must equal that of the run that was never killed."""
        for _ in range(KILLS_PER_LIFE):
            if not self.kill_once():
                break
        # 一次不被打断的启动必须能走到终点；已经走完的会说 already_done
        if not (self.run / "summary.json").is_file():
            self.finished(train(self.arguments(), self.folder))
        try:
            same = outcome(self.run) == whole
            why = "" if same else f"{outcome(self.run)} is not {whole}"
        except ConfigError as error:
            same, why = False, str(error)
        if same:
            self.ledger.count(f"finished: {self.kind}", "equal to the bit")
        else:
            self.ledger.breach(self.kind, why)
        if left := litter(self.folder):
            self.ledger.breach(self.kind, f"left behind: {left}")


def attack(ledger: Ledger, *, kills: int, seed: int, kinds: tuple[str, ...] = tuple(KINDS), changes: int | None = None) -> None:
    """Kill runs of these KINDS until so many kills have been counted; a run makes so many changes of files (None: counted first)."""
    chance = random.Random(seed)
    dead, repeated, most = 0, [], 0
    with tempfile.TemporaryDirectory() as place:
        whole, seconds, made = {}, {}, {}
        for kind in kinds:
            folder = Path(place) / kind.replace(", ", "-").replace("=", "-")
            folder.mkdir()
            write_text_file(folder)
            command = [*TINY, *KINDS[kind], f"out_dir={RUN}"]
            ended = train(command, folder)
            assert ended.code == 0, ended.output
            whole[kind], seconds[kind] = outcome(folder / RUN), ended.seconds
            empty(folder)
            made[kind] = changes or changes_of(command, folder)
            empty(folder)
        while dead < kills:
            kind = chance.choice(kinds)
            folder = Path(place) / kind.replace(", ", "-").replace("=", "-")
            life = Life(ledger, chance, folder, kind, seconds[kind], made[kind])
            life.live(whole[kind])
            dead += len(life.repeated)
            repeated += life.repeated
            most = max(most, life.most_litter)
            empty(folder)
    if max(repeated) > SAVE_INTERVAL:
        ledger.breach("work", f"{max(repeated)} iterations repeated, the interval is {SAVE_INTERVAL}")
    ledger.figures |= {
        "kills": dead, "iterations repeated at most": max(repeated), "checkpoint interval": SAVE_INTERVAL,
        "temporary files and folders after a kill, at most": most,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=250)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    ledger = Ledger("kill", "After kill -9 at any moment the run goes on to the bit and repeats at most one checkpoint interval.")
    started = time.perf_counter()
    attack(ledger, kills=arguments.kills, seed=arguments.seed)
    print(f"  {time.perf_counter() - started:.0f} s")
    return ledger.finish()


if __name__ == "__main__":
    sys.exit(main())
