"""A full disk, a read-only folder, a quota: said in one line, the last good checkpoint kept, training goes on, the save is tried again."""

# 有权挂载时，训练目录放在一小块 tmpfs 上，填满、腾空、改成只读都是真的；没有这个权限只攻文件大小的上限与没人读的输出
# 重试的间隔在子进程里缩短，一次攻击才只要几秒

import contextlib
import functools
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from attack import LONG, ONLY_LONG, POSIX, TINY, Running, cases, finished, litter, new_place, outcome, train
from hypothesis import given
from hypothesis import strategies as st

from nanogpt.run import saving
from nanogpt.weights import checkpoint

pytestmark = [pytest.mark.torture, POSIX]
ITERATIONS = 120 if LONG else 40
OFTEN = (f"max_iters={ITERATIONS}", "log_interval=5", "save_interval=5")


class Place:
    """A folder, a run below it that may lie on a small disk, and what that run comes to when nothing is in its way."""

    # 同一条命令用遍所有的磁盘
    def __init__(self, folder: Path):
        self.folder, self.disk = new_place(folder), folder / "disk"
        self.run = self.disk / "run"
        self.command = [*TINY, *OFTEN, f"out_dir={self.run}"]
        ended = train(self.command, folder)
        assert ended.code == 0, ended.output
        self.whole = outcome(self.run)
        self.clear()

    def clear(self) -> None:
        """Forget the run."""
        shutil.rmtree(self.disk, ignore_errors=True)

    def begun(self, *more: str) -> Running:
        """A run that has saved at least once."""
        running = Running([*self.command, *more], self.folder, before=hurry)
        running.until(lambda: any((self.run / "ckpt").glob("iter_*")))
        return running

    def last_good(self) -> bool:
        """Whether the last checkpoint is whole, and no half of another lies beside it."""
        checkpoint.find(self.run, "last").load_state()
        return not litter(self.run)

    @contextlib.contextmanager
    def small(self, options: str = "size=8m") -> Iterator[Path]:
        """A small tmpfs in the place of the disk; skips where mounting is not allowed."""
        self.clear()
        self.disk.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.disk)], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("mounting needs root")
        try:
            yield self.disk
        finally:
            subprocess.run(["umount", "-l", str(self.disk)], check=True)
            self.clear()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    """One for all attacks of this file."""
    return Place(tmp_path_factory.mktemp("disk"))


def hurry() -> None:
    """In the child: try again soon."""
    saving.RETRY_S = 0.2


def fill(folder: Path, leave: int = 0) -> Path:
    """Write a file that leaves `leave` bytes; its path."""
    ballast, space = folder / "ballast", os.statvfs(folder)
    with contextlib.suppress(OSError), ballast.open("wb") as file:
        for _ in range(max(0, space.f_bavail * space.f_frsize - leave) // 4096):
            file.write(bytes(4096))
    return ballast


@cases(1, 15)
@given(logger=st.sampled_from(["none", "tensorboard"]), leave=st.sampled_from([0, 1000, 20_000]), ms=st.integers(0, 1000))
def test_a_disk_that_fills_and_is_freed_again_costs_nothing_but_time(place, logger, leave, ms):
    with place.small() as disk:
        running = place.begun(f"logger={logger}", f"max_iters={2 * ITERATIONS}", f"lr_decay_iters={ITERATIONS}")
        ballast = fill(disk, leave)
        running.until(lambda: "could not save a checkpoint" in running.output())
        time.sleep(ms / 1000)
        ballast.unlink(missing_ok=True)
        ended = running.wait()
        assert ended.code == 0 and place.last_good() and checkpoint.find(place.run, "last").iteration == 2 * ITERATIONS, ended.output


@ONLY_LONG
@cases(1, 8)
@given(leave=st.integers(0, 9000))
def test_a_disk_that_stays_full_is_said_in_one_line_and_the_run_goes_on_where_there_is_room(place, leave):
    with place.small() as disk:
        running = place.begun()
        ballast = fill(disk, leave)
        ended = running.wait()
        ballast.unlink(missing_ok=True)
        if ended.code:
            assert ended.refused and "could not be saved" in ended.output and place.last_good(), ended.output
            assert finished(train([f"resume={place.run}", "lang=en"], place.folder))
        assert outcome(place.run) == place.whole


@ONLY_LONG
@cases(1, 8)
@given(leave=st.integers(0, 9000))
def test_without_room_from_the_start_nothing_is_left_behind(place, leave):
    with place.small() as disk:
        fill(disk, leave)
        assert train(place.command, place.folder, before=hurry).refused
    with place.small() as disk:
        fill(disk, leave)
        ended = train([*TINY, f"dataset.dir={disk / 'data'}", "out_dir=outputs/elsewhere"], place.folder, before=hurry)
        assert ended.refused and [p.name for p in disk.iterdir()] == ["ballast"], ended.output
        assert not (place.folder / "outputs/elsewhere").exists()


@ONLY_LONG
@cases(1, 8)
@given(inodes=st.integers(12, 40))
def test_without_more_files_the_run_goes_on_or_ends_with_one_line(place, inodes):
    with place.small(f"size=8m,nr_inodes={inodes}"):
        ended = train(place.command, place.folder, before=hurry)
        assert ended.refused or (ended.code == 0 and outcome(place.run) == place.whole), ended.output


@ONLY_LONG
@pytest.mark.parametrize("resumes", [True, False])
def test_a_read_only_folder_is_said_in_one_line(place, resumes):
    with place.small() as disk:
        assert train([*place.command, "max_iters=10"], place.folder).code == 0
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        ended = train([f"resume={place.run}", "max_iters=20", "lang=en"] if resumes else [*TINY, f"out_dir={disk / 'new'}"], place.folder)
        assert ended.refused and place.last_good(), ended.output


@ONLY_LONG
def test_a_folder_of_checkpoints_that_is_frozen_in_the_middle_keeps_the_last_good_one(place):
    running, kept = place.begun(), place.run / "ckpt"
    if subprocess.run(["chattr", "+i", str(kept)], capture_output=True, check=False).returncode:
        running.process.kill()
        running.wait()
        pytest.skip("chattr needs root and a file system that knows it")
    ended = running.wait()
    subprocess.run(["chattr", "-i", str(kept)], check=True)
    assert (ended.refused and place.last_good()) or (ended.code == 0 and outcome(place.run) == place.whole), ended.output
    place.clear()


def limited(size: int) -> None:
    """In the child: no file may grow beyond a size."""
    import resource

    hurry()
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@cases(1, 10)
@given(size=st.sampled_from([8000, 1000, 4000, 20_000, 40_000]))
def test_a_limit_on_the_size_of_files_is_exit_code_2_or_does_not_matter(place, size):
    place.clear()
    ended = train(place.command, place.folder, before=functools.partial(limited, size))
    # 输出也是文件：会被截断，错误那一行可能不见
    assert not ended.traced and (ended.code == 2 or (ended.code == 0 and outcome(place.run) == place.whole)), ended.output
    place.clear()


def output_is_full() -> None:
    """In the child: stdout takes nothing."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def output_is_closed() -> None:
    """In the child: whoever read stdout has gone."""
    reading, writing = os.pipe()
    os.dup2(writing, 1)
    os.close(reading)
    os.close(writing)


@ONLY_LONG
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
def test_a_full_output_does_not_stop_the_run(place):
    place.clear()
    ended = train(place.command, place.folder, before=output_is_full)
    assert not ended.traced and outcome(place.run) == place.whole, ended.output


def test_when_nobody_reads_the_output_the_run_saves_ends_and_can_be_resumed(place):
    place.clear()
    ended = train(place.command, place.folder, before=output_is_closed)
    assert ended.code == 141 and not ended.traced, ended.output
    # 头一行就没人读：还没开始训
    again = train([f"resume={place.run}", "lang=en"] if (place.run / "run.json").is_file() else place.command, place.folder)
    assert finished(again) and outcome(place.run) == place.whole, again.output
