"""Two runs, one folder: the second is refused while the first lives, and a lock left by a dead process blocks nobody."""

# 每个测试都是真的两个或更多进程；先开始的那一个不能被打扰，它的结果与独自训练的逐位相同

import contextlib
import io
import os

import pytest
import torch
from attack import LONG, ONLY_LONG, POSIX, RUN, TINY, Running, cases, empty, finished, litter, new_place, outcome, train
from hypothesis import given
from hypothesis import strategies as st

from nanogpt.weights import checkpoint
from nanogpt.write import loading

pytestmark = [pytest.mark.torture, POSIX]
AT_ONCE = 4 if LONG else 3
# 第二个进程要在它活着时启动完：比平常长一些
COMMAND = [*TINY, f"max_iters={60 if LONG else 24}"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(folder, what a run alone comes to)."""
    folder = new_place(tmp_path_factory.mktemp("folders"))
    ended = train([*COMMAND, f"out_dir={RUN}"], folder)
    assert ended.code == 0, ended.output
    return folder, outcome(folder / RUN)


SECOND = {
    "out_dir": [*COMMAND, "out_dir={named}"], "overwrite": [*COMMAND, "out_dir={named}", "overwrite=true"],
    "resume": ["resume={named}", "lang=en"], "latest": ["resume=latest", "lang=en"],
}
SPELLED = ["{run}", "./{run}", "{folder}/{run}", "outputs/../{run}"]
IN_A_LOCK = [b"\xff" * 100_000, b"", b"1\n", str(os.getpid()).encode("ascii"), b"x" * 9]


@cases(1, 40)
@given(how=st.sampled_from(list(SECOND)), spelled=st.sampled_from(SPELLED), content=st.sampled_from(IN_A_LOCK), killed=st.sampled_from([True, False]))
def test_a_living_run_keeps_others_out_and_a_dead_one_blocks_nobody(alone, how, spelled, content, killed):
    folder, whole = alone
    empty(folder)
    first = Running([*COMMAND, f"out_dir={RUN}"], folder)
    first.until(lambda: any((folder / RUN / "ckpt").glob("iter_*")))
    named = spelled.format(run=RUN, folder=folder)
    second, late = train([part.format(named=named) for part in SECOND[how]], folder), first.over
    # 第一个已经结束，第二个接着干是对的
    assert late or second.refused, second.output
    if killed:
        first.process.kill()
    done = first.wait()
    if late:
        return
    assert done.killed or done.code == 0, done.output
    # 杀掉的在锁文件里留下什么都不碍事
    (folder / RUN / "lock").write_bytes(content)
    ended = train([f"resume={RUN}", "lang=en"], folder)
    assert finished(ended) and outcome(folder / RUN) == whole, ended.output


def test_of_several_that_start_at_once_in_one_folder_one_trains(alone):
    folder, whole = alone
    empty(folder)
    ended = [run.wait() for run in [Running([*COMMAND, f"out_dir={RUN}"], folder) for _ in range(AT_ONCE)]]
    assert sorted((one.code, one.refused) for one in ended) == [(0, False)] + [(2, True)] * (AT_ONCE - 1), [one.output for one in ended]
    # 数据集也是几个进程同时准备的
    assert outcome(folder / RUN) == whole and not litter(folder)


@ONLY_LONG
def test_several_that_name_no_folder_get_one_each(alone):
    folder, _ = alone
    empty(folder)
    ended = [run.wait() for run in [Running([*COMMAND, "max_iters=6"], folder) for _ in range(AT_ONCE)]]
    folders = [path for path in (folder / "outputs").iterdir() if path.is_dir()]
    assert [one.code for one in ended] == [0] * AT_ONCE and len(folders) == AT_ONCE and not litter(folder)


@ONLY_LONG
def test_a_run_that_saves_and_deletes_all_the_time_can_be_read_meanwhile(alone):
    folder, _ = alone
    empty(folder)
    running, reads = Running([*COMMAND, f"out_dir={RUN}", "save_interval=1", "keep=1"], folder), 0
    running.until(lambda: any((folder / RUN / "ckpt").glob("iter_*")))
    while not running.over:
        with contextlib.redirect_stdout(io.StringIO()):
            which = ("best", "last")[reads % 2]
            checkpoint.use(folder / RUN, which, lambda source: loading.load(source, torch.device("cpu")), key="out_dir")
        reads += 1
    assert running.wait().code == 0 and reads
