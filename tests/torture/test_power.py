"""Loss of power at any operation on a file: the run goes on from the last checkpoint that was synced, or begins again."""

# 把真的训练对文件做的事一步步记下来，连同 fsync；再在任一步之后断电，造出文件系统可能留下的样子，从那里接着训
# 判定按记录里的标记：宣布存好的，断电之后必须在

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from unittest import mock

import pytest
from attack import LONG, POSIX, cases, quick
from conftest import make_config, resume
from filelog import KINDS, FileLog, Mark, write_tree
from hypothesis import given
from hypothesis import strategies as st

from nanogpt.base import files, run_names
from nanogpt.base.language import ConfigError
from nanogpt.run import rundir
from nanogpt.run.session import Session
from nanogpt.weights import checkpoint

pytestmark = [pytest.mark.torture, POSIX]
RUN = Path("outputs/deep/run")
SAVES = ("save_interval=3", "eval_interval=3", "log_interval=6", "max_iters=9", "keep=1", "bundle_data_mib=0")


@dataclass(frozen=True)
class Scenario:
    """What is recorded, and what was there before."""

    # before：先在同一目录里训完的那一次；None 是没有。resumes：从它的哪一个 checkpoint 接着训
    name: str
    typed: tuple[str, ...] = ()
    before: tuple[str, ...] | None = None
    resumes: str | None = None
    other: bool = False
    prepares: bool = False


SCENARIOS = [
    Scenario("a new run"), Scenario("a run that goes on from an older checkpoint", ("max_iters=12",), ("keep=9",), "iter_00000003"),
    Scenario("a new run with its data", ("bundle_data_mib=32",)), Scenario("a run beside an earlier one", other=True),
    Scenario("a run that goes on", ("max_iters=15",), (), "last"), Scenario("a run over another", ("overwrite=true", "seed=5"), ("keep=9",)),
    Scenario("a new run that prepares its data", prepares=True),
]


@dataclass
class Reached:
    """What the recorded run had made durable before the power went."""

    # attempts：可以从哪些迭代接着训，那里可以是什么内容
    begun: bool = False
    saved: int | None = None
    best: float | None = None
    attempts: dict[int, list[tuple]] = field(default_factory=dict)


@dataclass
class Recorded:
    """A scenario that was recorded in a folder."""

    # before、hold：之前与这一次的每个 checkpoint 里有什么
    scenario: Scenario
    base: list[str]
    root: Path
    log: FileLog
    before: dict[int, tuple]
    hold: dict[int, tuple]

    def reached(self, at: int) -> Reached:
        """What has to be there after so many operations."""
        found = Reached()
        if resumes := self.scenario.resumes:
            first = max(self.before) if resumes == "last" else int(checkpoint.NAME.fullmatch(resumes)[1])
            found = Reached(True, first, self.before[first][0], {first: [self.before[first]]})
        marks = [operation.reached for operation in self.log.operations[:at] if isinstance(operation, Mark)]
        for what, *values in marks:
            if what == "saving":
                found.attempts.setdefault(values[0], []).append(self.hold[values[0]])
            elif what == "saved":
                found.saved, found.best = values[0], min(values[1], found.best or values[1])
        if ("begun",) not in marks:
            # 还没真正开始：原来的那一份也算
            for iteration, content in self.before.items():
                found.attempts.setdefault(iteration, []).append(content)
        found.begun |= ("begun",) in marks
        return found

    def check(self, reached: Reached) -> None:
        """What resume= finds is no less than was reached."""
        check_latest(reached, other=self.scenario.other)
        if reached.saved is not None:
            assert checkpoint.find(RUN, "best").val_loss <= reached.best
        try:
            session = resume(RUN, "max_iters=99")
        except ConfigError:
            assert not reached.begun
            # 还没有真正开始：把命令再敲一遍
            with built(started(self.base, *self.scenario.typed)):
                return
        with built(session) as trainer:
            iteration = trainer.progress.iteration
            assert iteration >= (reached.saved or 0), f"goes on from {iteration}, {reached.saved} was saved"
            if iteration:
                assert held(session.source) in reached.attempts[iteration], "another content"


def check_latest(reached: Reached, *, other: bool) -> None:
    """outputs/latest names this run or the one before, and this one once it has begun."""
    if not run_names.LATEST.is_file():
        assert not reached.begun and not other, "latest is lost"
        return
    # 正要被盖掉的那一份还没重新开始：名字是对的，里面可以是空的
    path = run_names.locate("latest") if reached.begun else Path(run_names.LATEST.read_text(encoding="utf-8").strip())
    assert path.resolve() in {RUN.resolve(), *([] if reached.begun else [Path("outputs/other").resolve()])}


def held(one: checkpoint.Checkpoint) -> tuple:
    """What a checkpoint holds, without clock times; its validation loss first."""
    progress = json.dumps({key: value for key, value in one.load_state()["progress"].items() if key not in ("train_s", "wall_s")})
    return one.val_loss, one.sha256["model.safetensors"], one.sha256["state.safetensors"], progress


def started(base: list[str], *typed: str) -> Session:
    """The session of a new run in RUN."""
    cfg = make_config(*base, *SAVES, *typed)
    cfg.out_dir = str(RUN)
    return Session.new(cfg, rundir.choose(cfg))


@contextlib.contextmanager
def built(session: Session) -> Iterator:
    """Its trainer, whose lock is released at the end."""
    try:
        yield session._build()
    finally:
        if session.lock:
            session.lock.release()


def fit(session: Session) -> None:
    with built(session) as trainer:
        trainer.fit()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        yield


def recorded(scenario: Scenario, base: list[str], root: Path) -> Recorded:
    """Let a scenario happen in the current folder, and note what it does."""
    if scenario.before is not None:
        fit(started(base, *scenario.before))
    if scenario.other:
        Path("outputs/other").mkdir(parents=True)
        run_names.remember(Path("outputs/other"))
    before = {one.iteration: held(one) for one in checkpoint.checkpoints(RUN)} if RUN.is_dir() else {}
    log, hold, real_save, real_remember = FileLog(root), dict(before), checkpoint.save, run_names.remember

    def save(*arguments, iteration: int, **options) -> checkpoint.Checkpoint:
        log.operations.append(Mark(("saving", iteration)))
        one = real_save(*arguments, iteration=iteration, **options)
        hold[iteration] = held(one)
        log.operations.append(Mark(("saved", iteration, one.val_loss)))
        return one

    def remember(path: Path) -> None:
        real_remember(path)
        log.operations.append(Mark(("begun",)))

    with log.recording(), mock.patch.object(checkpoint, "save", save), mock.patch.object(run_names, "remember", remember):
        if scenario.other:
            # 扫描的目录由 Hydra 建好，没有同步
            RUN.parent.mkdir(parents=True)
        fit(resume(RUN, f"checkpoint={scenario.resumes}", *scenario.typed) if scenario.resumes else started(base, *scenario.typed))
    return Recorded(scenario, base, root, log, before, hold)


@pytest.fixture(scope="module")
def run_of(corpus_folder, tmp_path_factory):
    """run_of(scenario) -> what was recorded of it."""
    found = {}

    def of(scenario: Scenario) -> Recorded:
        if scenario.name not in found:
            # macOS 的临时文件夹是链接；记录按真正的路径
            root, text = tmp_path_factory.mktemp("root").resolve(), tmp_path_factory.mktemp("text") / "my.txt"
            text.write_text("the quick brown fox jumps over a lazy dog\n" * 150, encoding="utf-8")
            base = quick(corpus_folder, *([f"dataset.path={text}", "dataset.dir=prepared/deep/text"] if scenario.prepares else []))
            with contextlib.chdir(root), quiet():
                found[scenario.name] = recorded(scenario, base, root)
        return found[scenario.name]

    return of


@pytest.mark.parametrize("scenario", SCENARIOS if LONG else SCENARIOS[:2], ids=lambda scenario: scenario.name)
@cases(3, 350)
@given(at=st.integers(0, 10**6), kind=st.sampled_from(KINDS), chance=st.randoms(use_true_random=False))
def test_after_a_loss_of_power_a_run_goes_on_from_what_was_saved(run_of, scenario, at, kind, chance):
    run = run_of(scenario)
    at %= len(run.log.operations) + 1
    with contextlib.chdir(run.root), quiet():
        write_tree(run.root, run.log.state(at, kind, chance))
        run.check(run.reached(at))


def test_the_judge_of_lost_power_sees_what_was_not_synced(corpus_folder, in_tmp, monkeypatch):
    root = in_tmp.resolve()
    monkeypatch.setattr(FileLog, "_synced", lambda *_: None)
    with quiet():
        run = recorded(SCENARIOS[1], quick(corpus_folder), root)
        write_tree(root, run.log.state(len(run.log.operations), "nothing unsynced", Random(0)))
        with pytest.raises((AssertionError, ConfigError)):
            run.check(run.reached(len(run.log.operations)))


def test_a_file_is_the_old_or_the_new_one_whenever_the_power_goes(tmp_path):
    path = tmp_path / "a"

    def left(write) -> set:
        path.write_bytes(b"old")
        log = FileLog(tmp_path)
        with log.recording():
            write()
        moments = range(len(log.operations) + 1)
        return {log.state(at, kind, Random(n)).get("a") for at in moments for kind in KINDS for n in range(3)}

    assert left(lambda: files.write_text(path, "new")) == {b"old", b"new"}
    assert left(lambda: path.write_text("newer", encoding="utf-8")) >= {b"", b"\0" * 5, b"old"}
