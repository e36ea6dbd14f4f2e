"""Loss of power at any operation on a file: the run goes on from the last checkpoint that was synced, or begins again.

    python benchmarks/torture/power.py             # writes benchmarks/results/torture_power.json
    python benchmarks/torture/power.py --cases 300 --seed 7

The operations of real runs are recorded, fsync included. Then the power goes after each of them: states are built as a file system may
leave them, with names and contents that were not synced lost, zeroed, torn or out of order, and each is resumed from.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from filelog import KINDS, FileLog, Mark, Tree, write_tree
from kill import write_text_file
from ledger import Ledger
from tiny_runs import Lab

# isort: split
from nanogpt.base.language import ConfigError
from nanogpt.run import rundir
from nanogpt.run.session import Session
from nanogpt.weights import checkpoint

RUN = Path("outputs/deep/run")
SAVES = {"save_interval": 3, "eval_interval": 3, "log_interval": 6, "max_iters": 9, "keep": 1, "bundle_data_mib": 0}


@dataclass(frozen=True)
class Scenario:
    """What is recorded, and what was there before."""

    name: str
    typed: dict = field(default_factory=dict)
    """Values of the run that is recorded."""
    before: dict | None = None
    """Values of a run that ended before in the same folder, None without."""
    resumes: str | None = None
    """The checkpoint of that run from which the recorded one goes on; None: it is a new one."""
    other: bool = False
    """Whether another run had been the latest."""
    prepares: bool = False
    """Whether it prepares its data set, too."""


SCENARIOS = (
    Scenario("a new run"), Scenario("a new run with its data", {"bundle_data_mib": 32}), Scenario("a run beside an earlier one", other=True),
    Scenario("a run that goes on", {"max_iters": 15}, before={}, resumes="last"),
    Scenario("a run that goes on from an older checkpoint", {"max_iters": 12}, before={"keep": 9}, resumes="iter_00000003"),
    Scenario("a run over another", {"overwrite": True, "seed": 5}, before={"keep": 9}),
    Scenario("a new run that prepares its data", prepares=True),
)


@dataclass(frozen=True)
class Recorded:
    """A run that was recorded."""

    log: FileLog
    before: dict[int, tuple]
    """What each checkpoint held that was there before, by iteration."""
    hold: dict[int, tuple]
    """The same of the run's own checkpoints, those included from which it went on."""


@dataclass
class Reached:
    """What the recorded run had made durable before the power went."""

    begun: bool = False
    """Whether its folder was there, so that resume= has to work."""
    saved: int | None = None
    """Iteration of the newest checkpoint."""
    best: float | None = None
    """Lowest validation loss among the checkpoints."""
    attempts: dict[int, list[tuple]] = field(default_factory=dict)
    """Iterations from which the run may go on, with what it may find there."""


class Attack:
    """Records the scenarios in a folder and judges what can be left of them."""

    def __init__(self, ledger: Ledger, place: Path, chance: random.Random):
        self.ledger, self.chance = ledger, chance
        self.lab = Lab(place / "lab")
        self.text = place / "my.txt"
        write_text_file(place)
        # macOS 的临时文件夹是链接；记录按真正的路径
        self.root = (place / "root").resolve()
        self.root.mkdir()

    def begin(self, scenario: Scenario) -> Session:
        """The session of its command."""
        return self.start(prepares=scenario.prepares, **SAVES | scenario.typed)

    def start(self, *, prepares: bool = False, **values) -> Session:
        """The session of a new run in RUN."""
        cfg = self.lab.config(**values)
        cfg.out_dir = str(RUN)
        if prepares:
            cfg.dataset |= {"path": str(self.text), "dir": "prepared/deep/text"}
        return Session.new(cfg, rundir.choose(cfg))

    @contextlib.contextmanager
    def built(self, session: Session) -> Iterator:
        """Its trainer, whose lock is released at the end."""
        try:
            yield session._build()
        finally:
            if session.lock:
                session.lock.release()

    def train(self, session: Session) -> None:
        with self.built(session) as trainer:
            trainer.fit()

    # ---- 记录 ----

    def recorded(self, scenario: Scenario) -> "Recorded":
        """The scenario, carried out."""
        write_tree(self.root, {})
        if scenario.other:
            cfg = self.lab.config(**SAVES)
            self.train(Session.new(cfg, Path("outputs/other")))
        if scenario.before is not None:
            self.train(self.start(**{**SAVES, **scenario.before}))
        before = {c.iteration: held(c) for c in checkpoint.checkpoints(RUN)} if RUN.is_dir() else {}
        log, hold = FileLog(self.root), dict(before if scenario.resumes else {})
        real_save, real_remember = checkpoint.save, rundir.remember

        def save(*arguments, iteration: int, **options):
            log.mark(("saving", iteration))
            made = real_save(*arguments, iteration=iteration, **options)
            hold[iteration] = held(made)
            log.mark(("saved", iteration, made.val_loss))
            return made

        def remember(path: Path) -> None:
            real_remember(path)
            log.mark(("begun",))

        with log.recording(), mock.patch.object(checkpoint, "save", save), mock.patch.object(rundir, "remember", remember):
            if scenario.other:
                # 扫描的目录由 Hydra 建好，没有同步
                RUN.parent.mkdir(parents=True)
            if scenario.resumes:
                self.train(self.lab.resuming(RUN, checkpoint=scenario.resumes, **scenario.typed))
            else:
                self.train(self.begin(scenario))
        return Recorded(log, before, hold)

    def reached(self, scenario: Scenario, run: Recorded, at: int) -> Reached:
        """What has to be there after so many operations."""
        found = Reached()
        if scenario.resumes:
            first = max(run.before) if scenario.resumes == "last" else checkpoint_number(scenario.resumes)
            found = Reached(True, first, run.before[first][0], {first: [run.before[first]]})
        marks = [operation.reached for operation in run.log.operations[:at] if isinstance(operation, Mark)]
        for what, *values in marks:
            if what == "saving":
                found.attempts.setdefault(values[0], []).append(run.hold[values[0]])
            elif what == "saved":
                found.saved, found.best = values[0], min(values[1], found.best or values[1])
        if ("begun",) not in marks:
            # 还没真正开始：原来的那一份也算
            for iteration, content in run.before.items():
                found.attempts.setdefault(iteration, []).append(content)
        found.begun |= ("begun",) in marks
        return found

    # ---- 断电之后 ----

    def states(self, run: Recorded) -> Iterator[tuple[int, str, Tree]]:
        """(number of operations, kind, state): every moment in random order with a kind for each, then again with the next kind."""
        seen, found, moments = set(), 1, list(range(len(run.log.operations) + 1))
        self.chance.shuffle(moments)
        for round_ in itertools.count():
            if round_ % len(KINDS) == 0:
                if not found:
                    return
                found = 0
            for number, at in enumerate(moments):
                kind = KINDS[(number + round_) % len(KINDS)]
                state = run.log.state(at, kind, self.chance)
                # 同样的文件，更晚的时刻要求更高
                key = hash((tuple(state.items()), sum(isinstance(o, Mark) for o in run.log.operations[:at])))
                if key not in seen:
                    seen.add(key)
                    found += 1
                    yield at, kind, state

    def judge(self, scenario: Scenario, run: Recorded, at: int, kind: str, state: Tree) -> None:
        """Resume from a state; counts what came of it."""
        reached = self.reached(scenario, run, at)
        write_tree(self.root, state)
        try:
            with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
                outcome = self.outcome(scenario, reached)
        except Exception as error:
            # 什么都可能坏：每一种都是一条记录
            self.ledger.breach(f"{scenario.name}: {kind}", f"after operation {at}: {type(error).__name__}: {error}")
            return
        self.ledger.count(f"{scenario.name}: {kind}", outcome)

    def outcome(self, scenario: Scenario, reached: Reached) -> str:
        """What resume= finds, which has to be no less than was reached."""
        self.check_latest(reached, other=scenario.other)
        if reached.saved is not None:
            best = checkpoint.find(RUN, "best")
            assert best.val_loss <= reached.best, f"the best has {best.val_loss}, {reached.best} was reached"
        try:
            session = self.lab.resuming(RUN, max_iters=99)
        except ConfigError:
            if reached.begun:
                raise
            # 还没有真正开始：把命令再敲一遍
            with self.built(self.begin(scenario)):
                return "counts as empty: the command is typed again"
        with self.built(session) as trainer:
            iteration = trainer.progress.iteration
            if not iteration:
                assert reached.saved is None, f"begins again, {reached.saved} was saved"
                return "begins again"
            assert iteration >= (reached.saved or 0), f"goes on from {iteration}, {reached.saved} was saved"
            assert iteration in reached.attempts, f"goes on from {iteration}, which was set aside"
            assert held(session.source) in reached.attempts[iteration], "another content"
        return "goes on from the last checkpoint, equal to the bit"

    def check_latest(self, reached: Reached, *, other: bool) -> None:
        """outputs/latest names this run or the one before, and this one once it has begun."""
        if not rundir.LATEST.is_file():
            assert not reached.begun and not other, "latest is lost"
            return
        # 正要被盖掉的那一份还没重新开始：名字是对的，里面可以是空的
        path = rundir.locate("latest") if reached.begun else Path(rundir.LATEST.read_text(encoding="utf-8").strip())
        allowed = {RUN.resolve()} if reached.begun else {RUN.resolve(), Path("outputs/other").resolve()}
        assert path.resolve() in allowed, f"latest names {path}"


def checkpoint_number(name: str) -> int:
    """The iteration in a checkpoint's name."""
    return int(checkpoint.NAME.fullmatch(name)[1])


def held(one: checkpoint.Checkpoint) -> tuple:
    """What a checkpoint holds, without clock times; its validation loss first."""
    progress = json.dumps({key: value for key, value in one.load_state()["progress"].items() if key != "train_s"})
    return one.val_loss, one.sha256["model.safetensors"], one.sha256["state.safetensors"], progress


def attack(ledger: Ledger, *, cases: int, seed: int, scenarios: tuple[Scenario, ...] = SCENARIOS) -> None:
    """So many states of the scenarios, in equal parts."""
    with tempfile.TemporaryDirectory() as named:
        attacker = Attack(ledger, Path(named), random.Random(seed))
        with attacker.lab.quiet(), contextlib.chdir(attacker.root):
            for number, scenario in enumerate(scenarios, 1):
                with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                    run = attacker.recorded(scenario)
                ledger.figures[f"operations recorded, {scenario.name}"] = len(run.log.operations)
                for at, kind, state in attacker.states(run):
                    if ledger.cases >= cases * number // len(scenarios):
                        break
                    attacker.judge(scenario, run, at, kind, state)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    ledger = Ledger("power", "After a loss of power the run goes on from the last checkpoint that was saved, or begins again; latest names a run.")
    attack(ledger, cases=arguments.cases, seed=arguments.seed)
    return ledger.finish()


if __name__ == "__main__":
    sys.exit(main())
