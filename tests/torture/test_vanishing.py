"""Processes of one training that vanish: the others say so in one line, and the same command goes on, with fewer or more of them."""

# 每个案例是一次训练的一生：几个进程，在随机的时刻杀掉其中一个，再用另一个数目敲同一条命令，最后走完
# 等效批量不变，数据次序不变：结果与一个进程从头到尾的只差舍入
# 短的形式 fork 出各个进程；长的还用真的 torchrun --max-restarts

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil
import pytest
from attack import FORKS, GIVEN_UP_S, LONG, ONLY_LONG, POSIX, RUN, TINY, TRAIN, Running, _child, cases, new_place, train
from hypothesis import given
from hypothesis import strategies as st
from members import commands
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
from typed import ENVIRONMENT

from nanogpt.base.config import ROOT
from nanogpt.base.errors import EXIT_TERMINATED
from nanogpt.core import distributed
from nanogpt.run.loop import Training
from nanogpt.weights import checkpoint
from nanogpt.weights.tensors import read_tensors

pytestmark = [pytest.mark.torture, POSIX]
# 6 条：几个进程都分得出，有的多一条；没有 dropout，各进程的随机数才无所谓
WORDS = [*TINY, "dropout=0", "batch_size=6", "optimizer=adamw", f"out_dir={RUN}", "resume=auto"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(folder, weights, validation loss) of a training by one process from start to end."""
    return trained_alone(WORDS, tmp_path_factory.mktemp("vanishing"))


def trained_alone(words, place):
    folder = new_place(place)
    ended = train(words, folder)
    assert ended.code == 0, ended.output
    return folder, *outcome(folder)


def outcome(folder):
    last = checkpoint.find(folder / RUN, "last")
    tensors = read_tensors(last.folder / "model.safetensors")
    return np.concatenate([tensors[name].numpy().ravel() for name in sorted(tensors)]), summary(folder)["val_loss"]


def summary(folder):
    return json.loads((folder / RUN / "summary.json").read_text(encoding="utf-8"))


def ends_like(folder, weights, loss):
    found, val_loss = outcome(folder)
    np.testing.assert_allclose(found, weights, atol=2e-3, rtol=1e-2)
    assert val_loss == pytest.approx(loss, abs=2e-3)


def vanishing(victim: int, share: float):
    """before(rank): `victim` is killed that share of the way through its steps, in the middle of a backward pass."""
    def before(rank: int) -> None:
        distributed.PAUSE_S = 0.5
        step = Training.step

        def cut_short(trainer):
            distributed._watch.every_s = 0.4
            if rank == victim and trainer.progress.iteration >= share * trainer.span.iters:
                trainer.parameters[0].register_hook(lambda _: os.kill(os.getpid(), signal.SIGKILL))
            return step(trainer)

        Training.step = cut_short

    return before


LIFE = st.tuples(st.integers(2, 4), st.integers(0, 3), st.integers(0, 99).map(lambda n: n / 100))
# 短的只有一种：0 号活着，才问得出是谁
LIVES = st.lists(LIFE, min_size=1, max_size=3) if LONG else st.just([(2, 1, 0.6)])


@cases(1, 25)
@given(lives=LIVES, last=st.integers(1, 3) if LONG else st.just(1))
def test_whoever_vanishes_the_same_command_goes_on_with_any_number_of_processes_and_ends_alike(undisturbed, lives, last):
    folder, weights, loss = undisturbed
    shutil.rmtree(folder / "outputs")
    for world, victim, share in lives:
        victim %= world
        every = [one.wait() for one in commands(folder, lambda rank: WORDS, world, before=vanishing(victim, share))]
        if every[0].code == 0:
            break
        assert [one.code for one in every] == [-signal.SIGKILL if rank == victim else 2 for rank in range(world)], [one.output for one in every]
        said = [line for one in every for line in one.output.splitlines() if line.startswith("error:")]
        # store 在 0 号进程里：它不在了，就问不出是谁
        assert said and all("is gone; what is saved is kept: " in line for line in said) and not any(one.traced for one in every)
        assert not victim or said == [f"error: process {victim} is gone; what is saved is kept: {said[0].partition('kept: ')[2]}"]
    if not (folder / RUN / "summary.json").is_file():
        every = [one.wait() for one in commands(folder, lambda rank: WORDS, last)] if last > 1 else [train(WORDS, folder)]
        assert [one.code for one in every] == [0] * last, [one.output for one in every]
    ends_like(folder, weights, loss)


def told_twice(rank: int) -> None:
    """In process 1 SIGTERM comes twice: from what manages the job, and passed on by torchrun."""
    os.environ["TORCHELASTIC_RUN_ID"] = "none"
    step = Training.step

    def interrupted(trainer):
        if rank == 1 and trainer.progress.iteration == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer)

    Training.step = interrupted


def test_a_job_that_is_told_to_end_saves_at_once_and_its_exit_code_lets_a_launcher_start_it_again(undisturbed):
    folder, weights, loss = undisturbed
    shutil.rmtree(folder / "outputs")
    every = [one.wait() for one in commands(folder, lambda rank: WORDS, before=told_twice)]
    assert [one.code for one in every] == [EXIT_TERMINATED] * 2, [one.output for one in every]
    stopped = summary(folder)
    assert stopped["stopped_by"] == "interrupted" and stopped["iters"] == checkpoint.find(folder / RUN, "last").iteration == 5
    # 训完之后再敲，也不是错误：总结没写完就被杀掉的，补上
    for last in (False, True):
        ended = train(WORDS, folder)
        assert ended.code == 0 and not ended.traced, ended.output
        assert "continuing" in ended.output
        ends_like(folder, weights, loss)
        if not last:
            (folder / RUN / "summary.json").unlink()


@ONLY_LONG
@pytest.mark.skipif(not find_spec("ray"), reason="extra ray is not installed")
@pytest.mark.parametrize("victim", ["process", "node", "command"])
def test_a_training_on_a_ray_cluster_outlives_its_processes_and_its_nodes(undisturbed, victim):
    from ray.cluster_utils import Cluster

    folder, weights, loss = undisturbed
    shutil.rmtree(folder / "outputs")
    small = {"object_store_memory": 80 * 2**20}
    # 头节点只有驱动的一方：被杀的总是别的节点
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **small})
    try:
        nodes = [cluster.add_node(num_cpus=1, **small) for _ in range(2)]
        cluster.wait_for_nodes()
        def typed():
            words = [*WORDS, "launch=ray", "launch.nodes=2", "launch.gpus=0"]
            return subprocess.Popen(
                [sys.executable, str(ROOT / "run_train.py"), *words], cwd=folder, env={**ENVIRONMENT, "RAY_ADDRESS": cluster.address},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
            )

        job = typed()
        said = []
        while not said or "iter 6:" not in said[-1]:
            said.append(job.stdout.readline())
            assert job.poll() is None, said
        if victim == "node":
            cluster.remove_node(nodes[1], allow_graceful=False)
            cluster.add_node(num_cpus=1, **small)
        elif victim == "command":
            job.send_signal(signal.SIGINT)
            said, _ = job.communicate(timeout=2 * GIVEN_UP_S)
            assert job.returncode == 130 and "saved; continue with:" in said and summary(folder)["stopped_by"] == "interrupted", said
            job = typed()
        else:
            os.kill(int(re.search(r"pid (\d+)", (folder / RUN / "job" / "ray-1.log").read_text(encoding="utf-8"))[1]), signal.SIGKILL)
        rest, _ = job.communicate(timeout=2 * GIVEN_UP_S)
    finally:
        cluster.shutdown()
    again = victim == "command" or "all begin again from what is saved (1 of 3)" in rest
    assert job.returncode == 0 and again and "continuing outputs/run at iteration" in rest, rest
    ends_like(folder, weights, loss)


# ---- torchrun ----


# 长得够在半路上杀：每隔 10 步存一份
LONGER = [*WORDS, "max_iters=300", "save_interval=10", "eval_interval=50", "log_interval=50", "learning_rate=3e-3"]
KILLS, RESTARTS = 5, 20


@pytest.fixture(scope="module")
def longer_undisturbed(tmp_path_factory):
    """The same of the training that torchrun starts."""
    return trained_alone(LONGER, tmp_path_factory.mktemp("killed"))


class Forked:
    """What torchrun takes for the Popen of a worker: run_train.py in a fork."""

    # torchrun 的一切照旧（聚齐、重启、转发信号），只是工作进程不必再花几秒导入 torch
    def __init__(self, words: list[str], environment: dict[str, str]):
        def begin() -> None:
            # torchrun 的 socket 不能留在这里：它被杀了，别人还以为它在
            os.closerange(3, 256)
            os.setsid()
            os.environ.update(environment)

        handle, log = tempfile.mkstemp(suffix=".log", dir=".")
        os.close(handle)
        self.process = FORKS.Process(target=_child, args=(TRAIN, words, Path.cwd(), Path(log).resolve(), begin, None))
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        """Its exit code, or None."""
        return self.process.exitcode

    def wait(self, seconds: float) -> None:
        """Until it ends, so many seconds at most."""
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("run_train.py", seconds)
            time.sleep(0.05)

    def kill(self) -> None:
        """At once."""
        self.process.kill()


def fork_workers() -> None:
    """torchrun, in this process, forks its workers."""
    SubprocessHandler._popen = lambda _, arguments, environment: Forked([*arguments[3:]], environment)


class Job:
    """A training under torchrun with so many processes, which starts them again when one dies."""

    # 与 Slurm 的作业一样：启动器与它启动的一切可以一起消失
    def __init__(self, folder: Path, world: int):
        launched = ["--standalone", f"--nproc_per_node={world}", f"--max-restarts={RESTARTS}", "--monitor-interval=0.2", str(ROOT / "run_train.py")]
        self.launcher = Running([*launched, *LONGER], folder, program=("-m", "torch.distributed.run"), before=fork_workers)
        self.saves = folder / RUN / "ckpt"

    @property
    def over(self) -> bool:
        """Whether the launcher has ended."""
        return self.launcher.over

    def workers(self) -> list[psutil.Process]:
        """The processes that train now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.launcher.process.pid).children()
        return []

    def saved(self) -> float:
        """When it saved last."""
        with contextlib.suppress(OSError):
            return self.saves.stat().st_mtime
        return 0.0

    def until_over(self) -> None:
        """Wait for its end."""
        self.until_other(lambda: False, False)

    def until_other(self, what: Callable, than) -> None:
        """Wait until what() is another than it was, or for the end of the job."""
        began = time.monotonic()
        while not self.over and what() == than:
            assert time.monotonic() - began < GIVEN_UP_S
            time.sleep(0.05)


def kill(job: Job, how: str, chance: random.Random) -> None:
    """Let something vanish, one of KINDS; what is left of the job ends by itself or goes on."""
    workers, launcher = job.workers(), job.launcher.process
    if how == "launcher":
        launcher.kill()
        # 没有人管了的，存好就走，不会占着训练目录
        assert not psutil.wait_procs(workers, timeout=GIVEN_UP_S)[1]
    elif how == "node":
        for process in (launcher, *workers):
            process.kill()
        psutil.wait_procs(workers)
    elif how == "preempted":
        launcher.terminate()
    elif workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            chance.choice(workers).send_signal(signal.SIGTERM if how == "told" else signal.SIGKILL)


KINDS = ("worker", "worker", "worker", "told", "launcher", "node", "preempted")


@ONLY_LONG
@pytest.mark.parametrize("piece", range(10))
def test_what_vanishes_under_torchrun_at_any_moment_does_not_change_where_the_training_ends(longer_undisturbed, piece):
    folder, weights, loss = longer_undisturbed
    shutil.rmtree(folder / "outputs", ignore_errors=True)
    chance, done, ended = random.Random(os.urandom(8)), [], None
    while ended is None or ended.code:
        # 换一个数目再敲同一条命令
        job, before = Job(folder, chance.randint(1, 3)), len(done)
        while not job.over and len(done) < KILLS:
            job.until_other(job.workers, [])
            if chance.random() < 0.7:
                job.until_other(job.saved, job.saved())
                time.sleep(chance.uniform(0, 1))
            else:
                time.sleep(chance.uniform(0, 2))
            if not job.over:
                done.append(chance.choice(KINDS))
                print(time.strftime("%X"), done[-1], flush=True)
                kill(job, done[-1], chance)
        job.until_over()
        ended = job.launcher.wait()
        # 只杀了工作进程的，torchrun 自己就训到了头
        assert not ended.code or {"launcher", "node", "preempted"} & {*done[before:]}, ended.output
    print(f"survived {len(done)}", flush=True)
    found, val_loss = outcome(folder)
    np.testing.assert_allclose(found, weights, atol=1e-3, rtol=1e-2)
    assert val_loss == pytest.approx(loss, abs=1e-4)
