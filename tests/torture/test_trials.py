"""Attack a sweep: trials that crash, hang and are killed, and the sweep itself killed again and again."""

# 试跑怎样结局都是一行结果，别的试跑不受影响；扫描随时被杀，重新输入：一次不丢，一次不重，不留进程
# 每种结局的判定在 test_trial.py；这里攻击的是整个扫描，用真的命令

import contextlib
import html
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from attack import LONG, ONLY_LONG, POSIX, cases
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from nanogpt.sweep import earlier_results, process
from nanogpt.sweep.result import TrialResult

pytestmark = [pytest.mark.torture, POSIX]
SWEEP = (
    "-m", "experiment=fit", "hardware=cpu", "hardware.ram_gib=1.5", "dataset=text_file", "dataset.path=my.txt", "dataset.dir=prepared", "device=cpu",
    "model.n_layer=2", "model.n_head=2", "model.n_embd=16", "model.block_size=16", "model.ngrams=[2]", "model.ngram_buckets=97", "logger=none",
    "eval_tokens=200", "sample_tokens=5", "hardware.peak_tflops_fp32=0.1", "trial.warmup_steps=1", "trial.steps=2", "lang=en",
)
# 微批 -> (模型在那时做什么, 结果的状态, 原因里的话)；hang_in_c 用 PyDLL：不放 GIL，这个进程里再没有 Python 代码能跑
FAULTS = {
    3: ("ctypes.string_at(0)", "crashed", "SIGSEGV"), 8: ("os.abort()", "crashed", "SIGABRT"), 13: ("os._exit(3)", "crashed", "exit code 3"),
    18: ("os._exit(0)", "crashed", "exit code 0"), 23: ("raise RuntimeError('a bug of my own')", "crashed", "RuntimeError: a bug of my own"),
    28: ("raise SystemExit('enough')", "crashed", "SystemExit: enough"), 33: ("time.sleep(3600)", "timeout", "not done after"),
    38: ("ctypes.PyDLL(None).sleep(3600)", "timeout", "not done after"),
    43: ("os.kill(os.getpid(), signal.SIGKILL)", *(("oom", "killed by") if process.oom_kills() is None else ("crashed", "SIGKILL"))),
    48: (
        "subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(3600)']); os.kill(os.getpid(), signal.SIGTERM)", "crashed", "SIGTERM",
    ),
}
FAULTY_MODEL = f"""
import ctypes, os, signal, subprocess, sys, time
from nanogpt.core.model import GPT

FAULTS = {({rows: code for rows, (code, *_) in FAULTS.items()})!r}

class Faulty(GPT):
    def loss(self, x, *arguments, **options):
        if self.training and x.size(0) in FAULTS:
            exec(FAULTS[x.size(0)])
        return super().loss(x, *arguments, **options)
"""
# 快的假子进程：记下开始与完成，父进程一断就走
CHILD = """
import json, os, select, sys
job = json.loads(sys.stdin.readline())
rows = job["config"]["batch_size"]
def note(what):
    descriptor = os.open("measured", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{what} {rows}\\n".encode())
    os.close(descriptor)
note("begun")
if select.select([sys.stdin], [], [], SECONDS)[0]:
    os._exit(1)
values = {"status": "ok", "tokens_per_s": 1000.0 + rows, "micro_batch": rows, "peak_gib": 0.1, "budget_gib": 1.5, "device_type": "cpu"}
with open(job["report"], "a", encoding="utf-8") as file:
    file.write(json.dumps(values) + "\\n")
note("done")
"""
# 换上假子进程的 run_train.py：产品里没有为测试留的口子
FAKE = f"""
import runpy, sys
from nanogpt.sweep import trial
trial.run_trial.__kwdefaults__["command"] = (sys.executable, "-S", "-c", {CHILD.replace("SECONDS", "0.5" if LONG else "0.05")!r})
sys.argv = [{str(ROOT / "run_train.py")!r}, *sys.argv[1:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Sweep:
    """A command that is typed again and again in one folder; its processes carry a mark by which they are found."""

    # 标记在环境变量里：孙进程也带着它
    def __init__(self, folder: Path, command: tuple[str, ...], sizes, *overrides: str):
        typed = [*SWEEP, f"batch_size={','.join(map(str, sizes))}", *overrides]
        self.folder, self.command, self.mark = folder, [sys.executable, *command, *typed], uuid.uuid4().hex
        folder.mkdir(exist_ok=True)
        (folder / "my.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 60, encoding="utf-8")

    def start(self) -> subprocess.Popen:
        """Type it."""
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "TORTURE_SWEEP": self.mark, "TMPDIR": str(self.folder), "PYTHONUNBUFFERED": "1",
            # 它的 socket 的路径放不下测试的长文件夹
            "RAY_TMPDIR": tempfile.gettempdir(),
            "PYTHONPATH": os.pathsep.join([str(self.folder), str(ROOT)]),
        }
        with (self.folder / "console").open("ab") as output:
            return subprocess.Popen(self.command, cwd=self.folder, env=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL)

    def alive(self) -> list[psutil.Process]:
        """Its processes that still run."""
        found = []
        for one in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                # 没人收的僵尸已经结束了
                if one.status() != psutil.STATUS_ZOMBIE and one.environ().get("TORTURE_SWEEP") == self.mark:
                    found.append(one)
        return found

    def assert_clean(self) -> None:
        """No process is left, and every result file is whole JSON."""
        end = time.monotonic() + 5
        while (left := self.alive()) and time.monotonic() < end:
            time.sleep(0.05)
        for one in left:
            one.kill()
        assert not left
        for pattern in ("outputs/fit/trials/*.json", "outputs/fit/*/*/trial.json", "outputs/fit/*/trials.jsonl"):
            for path in self.folder.glob(pattern):
                [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def newest(self, name: str) -> str:
        """A file of the newest report."""
        return max(self.folder.glob(f"outputs/fit/*/{name}"), key=lambda path: path.stat().st_mtime).read_text(encoding="utf-8")

    def measured(self) -> Counter:
        """What the fake children have noted: {"begun 1": times, ...}."""
        path = self.folder / "measured"
        return Counter(path.read_text(encoding="utf-8").splitlines() if path.exists() else [])


# 长的形式：真的试跑，每第五个出毛病
@ONLY_LONG
def test_of_a_sweep_with_faulty_trials_each_gives_its_figures_or_its_reason(tmp_path):
    (tmp_path / "faulty.py").write_text(FAULTY_MODEL, encoding="utf-8")
    sizes = range(1, 51)
    sweep = Sweep(tmp_path, (str(ROOT / "run_train.py"),), sizes, "model._target_=faulty.Faulty", "trial.timeout_s=40")
    for again in (False, True):
        # 有试跑失败的扫描：退出码 1
        assert sweep.start().wait(3600) == 1
        sweep.assert_clean()
        rows, page = [json.loads(line) for line in sweep.newest("trials.jsonl").splitlines()], sweep.newest("report.html")
        by_size = {int(one.split("=")[1]): row for row in rows for one in row["overrides"] if one.startswith("batch_size=")}
        assert len(rows) == len(sizes) and sorted(by_size) == list(sizes)
        for size, row in by_size.items():
            _, status, words = FAULTS.get(size, ("", "ok", ""))
            assert row["status"] == status and words in row["reason"] and html.escape(row["reason"]) in page, row
            # 再输入一遍：崩溃可能是一时的，只有它们重测
            assert bool(row["tokens_per_s"]) == (status == "ok") and row["known"] == (again and status != "crashed")


MOMENTS = st.lists(st.tuples(st.sampled_from(["measured", "any"]), st.integers(0, 60 if LONG else 0)), min_size=1, max_size=10 if LONG else 1)


@cases(1, 3)
@given(moments=MOMENTS)
def test_a_sweep_that_is_killed_and_typed_again_loses_no_trial_and_counts_none_twice(tmp_path_factory, moments):
    folder, sizes = tmp_path_factory.mktemp("sweep"), range(1, 31 if LONG else 5)
    sweep = Sweep(folder, ("-c", FAKE), sizes)
    for aim, ms in moments:
        running, before = sweep.start(), sum(n for what, n in sweep.measured().items() if what.startswith("done"))
        if aim == "measured":
            # 又量完一个：父进程正在记下结果
            while running.poll() is None and sum(n for what, n in sweep.measured().items() if what.startswith("done")) == before:
                time.sleep(0.001)
            time.sleep(ms / 1000)
        else:
            time.sleep(ms / 5)
        running.kill()
        running.wait()
        sweep.assert_clean()
    assert sweep.start().wait(600) == 0, (folder / "console").read_text(encoding="utf-8")[-600:]
    rows = [json.loads(line) for line in sweep.newest("trials.jsonl").splitlines()]
    assert sorted(row["micro_batch"] for row in rows) == list(sizes) and {row["status"] for row in rows} == {"ok"}
    done = sum(n for what, n in sweep.measured().items() if what.startswith("done"))
    # 量完而还没记下的那一刻被杀，只好再量：一次被杀至多一个
    assert len(sizes) <= done <= len(sizes) + len(moments) and not list((folder / "outputs/fit/trials").glob(".*"))


# 每个 Python 进程一开始就换上假子进程：launcher 在别的进程里跑任务
EVERYWHERE = f"""
import sys
from nanogpt.sweep import trial
trial.run_trial.__kwdefaults__["command"] = (sys.executable, "-S", "-c", {CHILD.replace("SECONDS", "0.5")!r})
"""
LAUNCHERS = {
    "submitit_local": ["hydra/launcher=submitit_local"],
    "ray": ["hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=2", "+hydra.launcher.ray.init.object_store_memory=80000000"],
}


@ONLY_LONG
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_sweep_on_workers_whose_driver_or_workers_are_killed_loses_no_trial_and_counts_none_twice(tmp_path, launcher):
    plugin = "hydra_plugins.hydra_" + ("ray_launcher" if launcher == "ray" else "submitit_launcher")
    if not find_spec(plugin):
        pytest.skip(plugin)
    sizes, kills = range(1, 7), 4
    sweep = Sweep(tmp_path, (str(ROOT / "run_train.py"),), sizes, *LAUNCHERS[launcher])
    (tmp_path / "sitecustomize.py").write_text(EVERYWHERE, encoding="utf-8")
    for kill in range(kills):
        running = sweep.start()
        while running.poll() is None and sum(sweep.measured().values()) <= 3 * kill:
            time.sleep(0.01)
        # 轮流杀驱动的一方与任意一个正在量的
        others = [one for one in sweep.alive() if "nanogpt.sweep" not in " ".join(one.cmdline())] if kill % 2 else []
        (random.choice(others) if others else running).kill()
        time.sleep(random.random())
        running.kill()
        running.wait()
    assert sweep.start().wait(600) == 0, (tmp_path / "console").read_text(encoding="utf-8")[-600:]
    sweep.assert_clean()
    rows = [json.loads(line) for line in sweep.newest("trials.jsonl").splitlines()]
    assert sorted(row["micro_batch"] for row in rows) == list(sizes) and {row["status"] for row in rows} == {"ok"}
    done = Counter(what for what in sweep.measured().elements() if what.startswith("done"))
    # 量完、还没记下时被杀的才再量；每次至多两个在量
    assert set(done) == {f"done {size}" for size in sizes} and sum(done.values()) <= len(sizes) + 2 * kills
    assert not list((tmp_path / "outputs/fit/trials").glob("*.claim.*"))


@ONLY_LONG
@pytest.mark.skipif(not find_spec("ray"), reason="extra ray is not installed")
def test_trials_of_a_sweep_run_on_the_nodes_of_a_ray_cluster_that_they_fit(tmp_path):
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **small})
    try:
        for name, mib in (("NVIDIA GeForce RTX 3060", 12288), ("NVIDIA A100-SXM4-80GB", 81920)):
            # 同一台机器上的两个节点，各有各的“显卡”
            folder = tmp_path / str(mib)
            folder.mkdir()
            (folder / "nvidia-smi").write_text(f"#!/bin/sh\necho '{name}, {mib}'\n", encoding="utf-8")
            (folder / "nvidia-smi").chmod(0o755)
            cluster.add_node(num_cpus=1, num_gpus=1, env_vars={"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "WHICH": str(mib)}, **small)
        cluster.wait_for_nodes()
        code = f"""
import os, sys
os.environ["RAY_ADDRESS"] = {cluster.address!r}
sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]!r}
from conftest import make_config
from nanogpt.sweep.ray_trials import RayTrials
trials = RayTrials(one_kind=False)
where = {{node: card.name for node, card in trials._cards().items()}}
for words in (["model=tiny"], ["model=gpt2_xl", "batch_size=4"]):
    print(sorted(where[node] for node in trials.nodes(make_config(*words, "model.vocab_size=50257"))))
"""
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", check=False)
        assert done.stdout.splitlines() == ["['a100_80gb', 'rtx3060_12gb']", "['a100_80gb']"], done.stdout + done.stderr
        os.environ["RAY_ADDRESS"] = cluster.address
        sweep = Sweep(tmp_path / "sweep", (str(ROOT / "run_train.py"),), [2, 4], "launch=ray", "launch.gpus=1")
        assert sweep.start().wait(600) == 0, (sweep.folder / "console").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in sweep.newest("trials.jsonl").splitlines()]
        assert sorted(row["micro_batch"] for row in rows) == [2, 4] and {row["status"] for row in rows} == {"ok"}
        recipe = (sweep.folder / "outputs/fit/fit/best.yaml").read_text(encoding="utf-8")
        assert "launch" not in recipe and "batch_size: " in recipe
    finally:
        os.environ.pop("RAY_ADDRESS", None)
        cluster.shutdown()


@pytest.mark.skipif(sys.platform != "linux", reason="SIGIO on a closed pipe")
def test_a_trial_that_is_stuck_in_c_ends_with_its_sweep(tmp_path):
    stuck = (
        "import ctypes, subprocess, sys; sys.path.insert(0, sys.argv[1]); from nanogpt.sweep import child; child._leave_with_parent()\n"
        "other = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'], stdin=subprocess.DEVNULL); print(other.pid, flush=True)\n"
        "ctypes.PyDLL(None).sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", stuck, str(ROOT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, cwd=tmp_path,
    )
    other = psutil.Process(int(parent.stdout.readline()))
    time.sleep(0.2)
    parent.stdin.close()
    # SIGIO 由内核送到：占着 GIL 也一样
    assert parent.wait(10) == -signal.SIGIO
    end = time.monotonic() + 5
    while other.is_running() and other.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, "the grandchild lives on"
        time.sleep(0.02)
    parent.stdout.close()


def test_what_a_kill_left_half_written_is_cleared_away(tmp_path, monkeypatch):
    monkeypatch.setattr(earlier_results, "FOLDER", tmp_path)
    for name in (".abc.json.12345678.tmp", ".other.json.12345678.tmp"):
        (tmp_path / name).write_text("{", encoding="utf-8")
    earlier_results.keep(TrialResult((), "ok", key="abc"))
    # 别的键可能正有人在写
    assert sorted(os.listdir(tmp_path)) == [".other.json.12345678.tmp", "abc.json"]
