"""A short form of benchmarks/torture/sweeps.py: the same judge over fake trials, and one real sweep that is killed."""

import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT, torture
from test_trial import POSIX, fake, quick, trial  # noqa: F401 - quick 是 fixture

from nanogpt.sweep import earlier_results, report, result
from nanogpt.sweep.report import write_report
from nanogpt.sweep.result import TrialResult

# 假的子进程里同样的毛病：torture/faulty.py 在真的模型里有
CODE = {
    "crash_in_c": "os.kill(os.getpid(), signal.SIGSEGV)", "abort": "os.abort()", "leave_with_3": "os._exit(3)", "leave_as_if_all_were_well": "os._exit(0)",
    "raise_an_exception": "report(status='crashed', reason='RuntimeError: a bug in a model of my own')",
    "raise_system_exit": "report(status='crashed', reason='SystemExit: enough')", "hang": "time.sleep(60)", "hang_in_c": "time.sleep(60)",
    "be_killed": "os.kill(os.getpid(), signal.SIGKILL)", "leave_a_grandchild": "subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)']); os.kill(os.getpid(), signal.SIGTERM)",
}
WELL = "report(status='ok', tokens_per_s=1000.0, micro_batch=1)"


@pytest.fixture
def ledger():
    """A ledger that must have nothing broken at the end."""
    made = torture("ledger").Ledger("sweeps", "short")
    yield made
    assert made.cases and not made.broken


@POSIX
def test_faulty_trials_are_reasons_and_the_others_results(quick, ledger, capsys, monkeypatch):  # noqa: F811
    # 画图要载入 matplotlib，这里不看图
    monkeypatch.setattr(report, "write_pictures", lambda *_: [])
    monkeypatch.setattr(report.chart, "svg", lambda *_: "<svg></svg>")
    sweeps, before = torture("sweeps"), set(psutil.Process().children(recursive=True))
    _, folder = quick
    faults, sizes = torture("faulty").FAULTS, [3, 8, 13, 33, 43, 48, 5, 9]
    for number, rows in enumerate(sizes):
        code = CODE[faults[rows][0].__name__] if rows in faults else WELL
        got = trial(quick, f"batch_size={rows}", "trial.timeout_s=1" if rows == 33 else "trial.timeout_s=30", code=code)
        result.write(got, folder / "sweep" / str(number) / "trial.json")
    found = result.collect(folder / "sweep")
    write_report(found, folder / "sweep", margin=0.05)
    rows = [vars(one) for one in found]
    assert {row["status"] for row in rows} == {"ok", "crashed", "timeout"} and not set(psutil.Process().children(recursive=True)) - before
    capsys.readouterr()
    page = (folder / "sweep" / "report.html").read_text(encoding="utf-8")
    sweeps.check_faults(ledger, rows, page, sizes, known=False)


@POSIX
def test_a_killed_sweep_keeps_what_it_measured_and_leaves_no_process(tmp_path, ledger):
    sweeps = torture("sweeps")
    sweep = sweeps.Sweep(tmp_path, sweeps.fake(0.05), "batch_size=1,2,3,4")
    process = sweep.start()
    sweeps.after_a_measurement(tmp_path / "measured", process, random.Random(0), 20)
    # 第一个量完、第二个开始之后：第一个必已记下
    while process.poll() is None and "begun 2" not in (tmp_path / "measured").read_text(encoding="utf-8"):
        time.sleep(0.01)
    process.kill()
    process.wait()
    sweep.none_left(ledger, "killed")
    sweep.whole_files(ledger, "killed")
    kept = [result.read(path) for path in (tmp_path / "outputs" / "fit" / "trials").glob("*.json")]
    assert kept and all(one.status == "ok" for one in kept) and 1 in [one.micro_batch for one in kept]


@pytest.mark.skipif(sys.platform != "linux", reason="SIGIO on a closed pipe")
def test_a_trial_that_is_stuck_in_c_ends_with_its_sweep(tmp_path):
    stuck = (
        "import ctypes, subprocess, sys; sys.path.insert(0, sys.argv[1]); from nanogpt.sweep import child; child._leave_with_parent()\n"
        "other = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'], stdin=subprocess.DEVNULL); print(other.pid, flush=True)\n"
        "ctypes.PyDLL(None).sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", stuck, str(ROOT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, cwd=tmp_path,
    )
    other = psutil.Process(int(process.stdout.readline()))
    time.sleep(0.2)
    process.stdin.close()
    # SIGIO 由内核送到：占着 GIL 也一样
    assert process.wait(10) == -signal.SIGIO
    end = time.monotonic() + 5
    while other.is_running() and other.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, "the grandchild lives on"
        time.sleep(0.02)
    process.stdout.close()


def test_what_a_kill_left_half_written_is_cleared_away(tmp_path, monkeypatch):
    monkeypatch.setattr(earlier_results, "FOLDER", tmp_path)
    for name in (".abc.json.12345678.tmp", ".other.json.12345678.tmp"):
        (tmp_path / name).write_text("{", encoding="utf-8")
    earlier_results.keep(TrialResult((), "ok", key="abc"))
    # 别的键可能正有人在写
    assert sorted(os.listdir(tmp_path)) == [".other.json.12345678.tmp", "abc.json"]
