"""A sweep of trials as a person types it: every job is a result, the exit code tells the truth, an interrupted sweep goes on."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import psutil
import pytest
from conftest import make_config
from test_end_to_end import ENVIRONMENT, QUICK, RUN, TEXT, run

from nanogpt.base.config import ROOT
from nanogpt.sweep import earlier_results, result
from nanogpt.sweep.jobs import exit_code
from nanogpt.sweep.result import TrialResult

SWEEP = ["-m", "experiment=fit", "hardware=cpu", "hardware.ram_gib=1.0"]


@pytest.fixture
def own_text(tmp_path, monkeypatch):
    """A folder with a text, and the overrides of a sweep over it."""
    (tmp_path / "my.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", ENVIRONMENT["OMP_NUM_THREADS"])
    # 锁放在自己的目录：不等同一台机器上别的试跑
    monkeypatch.setitem(ENVIRONMENT, "TMPDIR", str(tmp_path))
    return tmp_path, [*SWEEP, "dataset=text_file", "dataset.path=my.txt", "dataset.dir=prepared", *QUICK]


def remember(overrides, batch_size, **values):
    """Leave a result as an earlier sweep would have: the test needs no child for it."""
    typed = [*(o for o in overrides if o != "-m"), f"batch_size={batch_size}"]
    key = earlier_results.key_of(make_config(*typed))
    earlier_results.keep(TrialResult(tuple(typed), **{"status": "ok", "key": key, "tokens_per_s": 1000.0 * batch_size, "peak_gib": 0.5, "budget_gib": 1.0,
                                           "micro_batch": batch_size, **values}))


def running_trials(pid):
    """The children of a sweep that are trials, and not some passing helper (uname, nvidia-smi)."""
    found = []
    for one in psutil.Process(pid).children():
        with contextlib.suppress(psutil.Error):
            found += [one] if any("nanogpt.sweep.child" in word for word in one.cmdline()) else []
    return found


def trials(folder):
    """trials.jsonl of the newest sweep."""
    newest = sorted(folder.glob("outputs/fit/*/trials.jsonl"))[-1]
    return [json.loads(line) for line in newest.read_text(encoding="utf-8").splitlines()]


def test_what_is_known_is_not_measured_again_and_counts_once_and_joblib_works(own_text):
    folder, overrides = own_text
    # 结果都已知：顺便试另一个 launcher，不另起一次扫描
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"] if find_spec("hydra_plugins.hydra_joblib_launcher") else []
    for batch_size in (2, 4):
        remember(overrides, batch_size)
    remember(overrides, 8, status="oom", reason="too much", tokens_per_s=None)
    # 同一目录里上一次扫描留下的不算
    result.write(TrialResult(("batch_size=64",), "crashed", key="stale"), folder / "outputs" / "fit" / "mine" / "7" / "trial.json")
    done = run(folder, *overrides, *launcher, "batch_size=2,4,8,4", "lang=zh", "hydra.sweep.dir=outputs/fit/mine")
    assert [(r["micro_batch"], r["status"], r["known"]) for r in trials(folder)] == [(4, "ok", True), (2, "ok", True), (8, "oom", True)]
    assert "3 次试跑中 3 次以前测过" in done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="signals, RLIMIT_DATA")
def test_an_interrupted_sweep_goes_on_survives_an_out_of_memory_error_and_a_mistake(own_text):
    folder, overrides = own_text
    overrides += ["model.n_embd=256", "model.block_size=128", "eval_batch_size=1", "hardware.ram_gib=0.6", "trial.skip_predicted=false"]
    # 真的子进程只有两个（内存不足的与成功的）；已知的一个慢，最快的是实测的
    remember(overrides, 2, tokens_per_s=0.1)
    command = [*overrides, "batch_size=2,0,8192,1"]
    process = subprocess.Popen(
        [*RUN, *command], cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
        # 测试自己可能在后台运行，那里的 SIGINT 是被忽略的，而且会遗传
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while "batch_size=2" not in (line := process.stdout.readline()) or "trial" not in line:
        assert process.poll() is None
    while not (children := running_trials(process.pid)):
        time.sleep(0.05)
    # 等父进程进到守候的循环里
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on from there" in err and "Traceback" not in err
    assert not any(child.is_running() for child in children) and len(list(earlier_results.FOLDER.glob("*.json"))) == 1
    done = run(folder, *command)
    rows = trials(folder)
    assert "1 of 4 trials known from before" in done.stdout
    assert [(r["status"], r["micro_batch"]) for r in rows] == [("ok", 1), ("ok", 2), ("oom", 8192), ("invalid", None)] and rows[0]["tokens_per_s"] > 0
    # 没有被减半微批“救”回来：问的就是这个设置
    assert "can't allocate memory" in rows[2]["reason"] and "batch_size=0 is out of range" in rows[3]["reason"]
    assert all(name in done.stdout for name in ("report.html", "--config-dir outputs/fit +fit=best", "out of memory", "invalid"))
    # 配方能训练由 test_report.py 证明；这里只看报告里的命令拼出什么
    config = run(folder, "--config-dir", "outputs/fit", "+fit=best", "--cfg", "job").stdout
    assert "\nbatch_size: 1\n" in config and "\n  enabled: false\n" in config and "\n  n_embd: 256\n" in config


def test_the_exit_code_tells_the_truth(own_text):
    folder, overrides = own_text
    ok, oom, crash = (TrialResult((), status) for status in ("ok", "oom", "crashed"))
    assert exit_code([ok, oom]) == 0 and exit_code([oom]) == exit_code([ok, crash]) == exit_code([]) == 1
    assert exit_code([ok, TrialResult((), "timeout")]) == 1
    run(folder, *overrides, "batch_size=0,-1", expect=1)
    single = [o for o in overrides if o != "-m"]
    run(folder, *single, "batch_size=0", expect=1)


def test_a_plain_sweep_and_a_plain_run_have_no_trials():
    cfg = make_config()
    assert not cfg.trial.enabled and make_config("experiment=fit").trial.enabled


def test_the_parent_of_trials_never_imports_torch():
    code = "import sys, nanogpt.sweep.jobs, nanogpt.sweep.trial, nanogpt.sweep.report, nanogpt.sweep.search, nanogpt.sweep.learning_report, nanogpt.sweep.child; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_results_of_jobs_are_read_in_order_and_damaged_ones_left_out(tmp_path):
    for number in (10, 2, 1):
        result.write(TrialResult((f"batch_size={number}",), "ok", key=str(number)), tmp_path / str(number) / "trial.json")
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "trial.json").write_text("{", encoding="utf-8")
    result.write(TrialResult(("batch_size=2", "lang=zh"), "ok", key="2"), tmp_path / "11" / "trial.json")
    assert [r.key for r in result.collect(tmp_path)] == ["1", "2", "10"]
