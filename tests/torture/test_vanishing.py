"""Processes of one training that vanish: the others say so in one line, and the same command goes on, with fewer or more of them."""

# 每个案例是一次训练的一生：几个进程，在随机的时刻杀掉其中一个，再用另一个数目敲同一条命令，最后走完
# 等效批量不变，数据次序不变：结果与一个进程从头到尾的只差舍入
# 短的形式 fork 出各个进程；长的还用真的 torchrun --max-restarts

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import numpy as np
import psutil
import pytest
from attack import GIVEN_UP_S, LONG, ONLY_LONG, POSIX, RUN, TINY, cases, new_place, train
from hypothesis import given
from hypothesis import strategies as st
from members import commands
from typed import ENVIRONMENT

from nanogpt.base.config import ROOT
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
    folder = new_place(tmp_path_factory.mktemp("vanishing"))
    ended = train(WORDS, folder)
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


@ONLY_LONG
@pytest.mark.parametrize("kills", [1, 3, 8])
def test_torchrun_starts_a_training_again_whose_workers_are_killed_at_any_moment(undisturbed, kills):
    folder, weights, loss = undisturbed
    shutil.rmtree(folder / "outputs")
    words = [word for word in WORDS if word != "resume=auto"]
    job = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", f"--max-restarts={kills}", str(ROOT / "run_train.py"), *words],
        cwd=folder, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, encoding="utf-8",
    )
    left, began = kills, time.monotonic()
    while left and job.poll() is None:
        time.sleep(random.uniform(0.5, 12))
        workers = [child for child in psutil.Process(job.pid).children() if "run_train.py" in " ".join(child.cmdline())]
        if workers:
            random.choice(workers).kill()
            left -= 1
        assert time.monotonic() - began < 10 * GIVEN_UP_S
    _, said = job.communicate(timeout=3 * GIVEN_UP_S)
    assert job.returncode == 0, said
    ends_like(folder, weights, loss)


@ONLY_LONG
def test_a_job_that_is_told_to_end_saves_and_the_same_command_goes_on(undisturbed):
    folder, weights, loss = undisturbed
    shutil.rmtree(folder / "outputs")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "run_train.py"), *WORDS]
    job = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8")
    while "iter 4:" not in job.stdout.readline():
        assert job.poll() is None
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=GIVEN_UP_S)
    stopped = summary(folder)
    assert stopped["stopped_by"] == "interrupted" and checkpoint.find(folder / RUN, "last").iteration == stopped["iters"]
    (folder / RUN / "summary.json").unlink()
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, encoding="utf-8", timeout=GIVEN_UP_S, check=False)
    assert done.returncode == 0, done.stderr
    ends_like(folder, weights, loss)


@ONLY_LONG
@pytest.mark.skipif(not find_spec("ray"), reason="extra ray is not installed")
@pytest.mark.parametrize("victim", ["process", "node"])
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
        job = subprocess.Popen(
            [sys.executable, str(ROOT / "run_train.py"), *WORDS, "launch=ray", "launch.nodes=2", "launch.gpus=0"],
            cwd=folder, env={**ENVIRONMENT, "RAY_ADDRESS": cluster.address}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
        )
        said = []
        while not said or "iter 6:" not in said[-1]:
            said.append(job.stdout.readline())
            assert job.poll() is None, said
        if victim == "node":
            cluster.remove_node(nodes[1], allow_graceful=False)
            cluster.add_node(num_cpus=1, **small)
        else:
            os.kill(int(re.search(r"pid (\d+)", (folder / RUN / "job" / "ray-1.log").read_text(encoding="utf-8"))[1]), signal.SIGKILL)
        rest, _ = job.communicate(timeout=2 * GIVEN_UP_S)
    finally:
        cluster.shutdown()
    assert job.returncode == 0 and "all begin again from what is saved (1 of 3)" in rest and "continuing outputs/run at iteration" in rest, rest
    ends_like(folder, weights, loss)
