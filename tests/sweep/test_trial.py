"""One trial: whatever happens in the child, a plain result comes out and nothing is left running."""

import copy
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time

import psutil
import pytest
from conftest import make_config

from nanogpt.base.config import ROOT, lookup
from nanogpt.base.language import ConfigError
from nanogpt.base.lock import only_one
from nanogpt.sweep import child, claims, earlier_results, process, ray_trials, result
from nanogpt.sweep.process import Ended
from nanogpt.sweep.ray_trials import RayTrials, described, selector
from nanogpt.sweep.result import TrialResult, made
from nanogpt.sweep.trial import classified, lock_path, run_trial

FIT = ("trial.enabled=true", "trial.warmup_steps=1", "trial.steps=2", "hardware.ram_gib=1.0")
POSIX = pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")
# 假的子进程：先照真的那样读任务，report(…) 写一行报告
PRELUDE = """
import json, os, signal, subprocess, sys, time
job = json.loads(sys.stdin.readline())
def report(**values):
    with open(job["report"], "a", encoding="utf-8") as file:
        print(json.dumps(values), file=file)
"""


def fake(code):
    return [sys.executable, "-S", "-c", PRELUDE + code]


@pytest.fixture
def quick(tiny_overrides, in_tmp, monkeypatch):
    """Overrides of a trial of a second, in an empty folder."""
    # 锁放在自己的目录：不等同一台机器上别的试跑
    monkeypatch.setattr(tempfile, "tempdir", str(in_tmp))
    return [*tiny_overrides, *FIT], in_tmp


def trial(quick, *more, code=None, **options):
    overrides, folder = quick
    cfg = make_config(*overrides, *more, checked=False)
    return run_trial(cfg, [*overrides, *more], folder / "job", **({"command": fake(code)} if code else {}), **options)


# ---- 真的子进程 ----


def test_a_trial_measures_a_model_of_the_users_own_module(quick, monkeypatch):
    _, folder = quick
    module = folder / "mine" / "my_gpt.py"
    module.parent.mkdir()
    module.write_text("from nanogpt.core.model import GPT\nclass Mine(GPT):\n    pass\nprint('mine is used')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(module.parent))
    got = trial(quick, "model._target_=my_gpt.Mine", "gradient_accumulation_steps=2")
    assert got.status == "ok", got
    assert got.tokens_per_s == pytest.approx(8 * 16 / got.step_ms * 1000)
    assert (got.micro_batch, got.effective_batch, got.precision, got.budget_gib) == (4, 8, "fp32", 1.0)
    assert 0.05 < got.peak_gib < 1.0 and got.reserved_gib is None
    # 三步的损失说明不了什么
    assert got.train_loss is None and got.val_loss is None
    assert "mine is used" in (folder / "job" / "trial.log").read_text(encoding="utf-8")
    assert earlier_results.find(got.key) == result.read(earlier_results.FOLDER / f"{got.key}.json") == got
    again = trial(quick, "model._target_=my_gpt.Mine", "gradient_accumulation_steps=2")
    assert again.known and again.tokens_per_s == got.tokens_per_s


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA")
def test_the_limit_is_real():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from nanogpt.sweep.process import limit_memory; limit_memory(0.3); bytearray(2**29)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8")
    assert "MemoryError" in done.stderr


# ---- 子进程里的步骤，不另开进程 ----


def measured(overrides, folder, plan):
    lines = []
    cfg = make_config(*overrides)
    child.measure(cfg, overrides, folder, lambda **values: lines.append(values), predict=lambda cfg, device_type: plan, limit=lambda gib: lines.append({"limit": gib}))
    return {key: value for line in lines for key, value in line.items()}


def test_what_is_predicted_not_to_fit_is_skipped_unless_told_otherwise(quick):
    overrides, folder = quick
    plan = child.Prediction(predicted_gib=14.2, budget_gib=12.0, tokens_per_s=1000.0, fits=False)
    got = measured(overrides, folder, plan)
    assert got["status"] == "skipped" and got["reason"] == "predicted 14.2 GiB > 12.0" and "limit" not in got
    assert got["predicted_gib"] == 14.2 and got["predicted_tokens_per_s"] == 1000.0
    tried = measured([*overrides, "trial.skip_predicted=false"], folder, plan)
    assert tried["status"] == "ok" and tried["limit"] == 1.0


def test_a_prediction_speaks_of_this_device_and_a_failing_planner_stops_nothing(monkeypatch):
    from types import ModuleType, SimpleNamespace

    planner = ModuleType("nanogpt.plan.plan")
    monkeypatch.setitem(sys.modules, "nanogpt.plan.plan", planner)
    budget = SimpleNamespace(device_type="cuda", total=12 * 2**30, capacity=11 * 2**30)
    plan = SimpleNamespace(budget=budget, total=11 * 2**30, reserved=10 * 2**30, tokens_per_s=5.0, verdict="tight")
    planner.predict = lambda cfg: plan
    cfg = make_config()
    assert child.prediction(cfg, "cuda") == child.Prediction(10.0, 11.0, 5.0, True)
    assert child.prediction(cfg, "cpu") is None
    plan.verdict, budget.device_type = "does_not_fit", "cpu"
    assert child.prediction(cfg, "cpu") == child.Prediction(11.0, 12.0, 5.0, False)
    assert child.prediction_aside(cfg, "cpu") == child.prediction(cfg, "cpu")
    planner.predict = lambda cfg: 1 / 0
    assert child.prediction(cfg, "cpu") is None and child.prediction_aside(cfg, "cpu") is None


def test_losses_are_reported_after_enough_steps_and_no_run_folder_is_claimed(quick):
    overrides, folder = quick
    before = set(folder.rglob("*"))
    got = measured([*overrides, f"trial.steps={result.STEPS_FOR_LOSS}"], folder / "job", None)
    assert got["val_loss"] < math.log(30) and got["train_loss"] > 0
    assert set(folder.rglob("*")) == before


def test_errors_of_the_child_are_told_apart():
    from nanogpt.base.language import ConfigError
    from nanogpt.run.health import Diverged

    assert child.verdict_of(MemoryError()) == child.verdict_of(RuntimeError("can't start new thread")) == child.verdict_of(OSError(12, "x")) == "oom"
    assert child.verdict_of(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling")) == "oom"
    assert child.verdict_of(ConfigError(
        "{line}",
        line="x",
    )) == "invalid" and child.verdict_of(KeyError("x")) == "crashed"
    # 同样的设置再训一次也一样：记住，不再训
    assert child.verdict_of(Diverged("{line}", line="x")) == "diverged" and {"diverged"} < {*result.LASTING} & {*result.EXPECTED}


# ---- 各种结局，用假的子进程 ----

# 内核说得出有没有为内存结束过程序的地方，才分得清
ENDED = ("oom", "killed by the system") if process.oom_kills() is None else ("crashed", "SIGKILL (during: steps): ended by someone")

ENDINGS = {
    "os.abort()": ("crashed", "SIGABRT"),
    "report(phase='steps'); print('CUDA error: an illegal memory access'); os.abort()": ("crashed", "SIGABRT (during: steps): CUDA error: an illegal memory access"),
    "print('terminate called after throwing an instance of \\'std::bad_alloc\\''); sys.stdout.flush(); os.abort()": ("oom", "bad_alloc"),
    "report(phase='steps'); os.kill(os.getpid(), signal.SIGKILL)": ENDED,
    "sys.exit(3)": ("crashed", "exit code 3"),
    "sys.exit(0)": ("crashed", "exit code 0"),
    "open(job['report'], 'wb').write(b'\\x00\\xff{{{\\n[1]\\n\"ok\"\\n{\"status\": \"o'); sys.stdout.buffer.write(b'\\xff\\x00 rubbish')": ("crashed", "rubbish"),
    "report(status='splendid')": ("crashed", "splendid"),
    "time.sleep(60)": ("timeout", "not done after 1 s"),
    "subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)']).wait()": ("timeout", "not done"),
    "report(watch_gib=0.05, device_type='cpu'); x = bytearray(os.urandom(1) * 2**27); time.sleep(60)": ("oom", "above the budget"),
    "report(status='ok', tokens_per_s=5.0); os.abort()": ("ok", ""),
}


@POSIX
@pytest.mark.parametrize("code", ENDINGS)
def test_every_ending_is_a_result_in_one_line_and_leaves_no_process(quick, code):
    status, reason = ENDINGS[code]
    before = set(psutil.Process().children(recursive=True))
    got = trial(quick, "trial.timeout_s=1" if status == "timeout" else "trial.timeout_s=30", code=code.replace("sys.exit", "os._exit") + "\nsys.stdout.flush()")
    assert got.status == status and reason in got.reason and "\n" not in got.reason
    assert set(psutil.Process().children(recursive=True)) <= before
    # 崩溃可能是一时的，下次再测；其余记住
    assert bool(earlier_results.find(got.key)) == (status != "crashed")


@POSIX
def test_a_child_is_on_its_own_also_under_torchrun(tmp_path, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "x", "MY_OWN": "kept"}.items():
        monkeypatch.setenv(name, value)
    ended = process.run_child({}, tmp_path, timeout_s=30, command=fake("report(**{k: v for k, v in os.environ.items() if k.isupper()})"))
    assert ended.values["MY_OWN"] == "kept"
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & set(ended.values)


@POSIX
def test_grandchildren_go_with_the_child(quick):
    _, folder = quick
    trial(quick, code=f"p = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)']); open({str(folder / 'pid')!r}, 'w').write(str(p.pid))")
    pid = int((folder / "pid").read_text(encoding="utf-8"))
    for _ in range(50):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    raise AssertionError("the grandchild lives on")


def test_ctrl_c_ends_the_child_and_records_nothing(quick, monkeypatch):
    before = set(psutil.Process().children(recursive=True))

    def interrupt(pid):
        raise KeyboardInterrupt

    monkeypatch.setattr(process, "resident", interrupt)
    with pytest.raises(KeyboardInterrupt):
        trial(quick, code="time.sleep(60)")
    assert set(psutil.Process().children(recursive=True)) <= before and not list(earlier_results.FOLDER.glob("*"))


@POSIX
def test_the_child_leaves_when_its_parent_is_killed(quick):
    _, folder = quick
    code = f"import json, sys; sys.path.insert(0, {str(ROOT)!r}); from nanogpt.sweep import child; child._leave_with_parent(); print('up', flush=True); import time; time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=folder)
    assert process.stdout.readline() == b"up\n"
    process.stdin.close()
    assert process.wait(10) == 1
    process.stdout.close()


def test_on_windows_a_child_watches_its_parent_and_not_the_pipe(quick):
    _, folder = quick
    parent = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    code = (
        f"import json, psutil, sys; sys.path.insert(0, {str(ROOT)!r}); from nanogpt.sweep import child; sys.platform = 'win32'\n"
        f"child._leave_with_parent({parent.pid}); print('up', flush=True); print(sys.stdin.readline(), flush=True); import time; time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=folder)
    try:
        assert process.stdout.readline() == b"up\n"
        # 管道没有人读着：谁都能读
        process.stdin.write(b"mine\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"mine\n" and process.poll() is None
        parent.kill()
        parent.wait()
        assert process.wait(10) == 1
    finally:
        parent.kill()
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


# ---- 设置、已知结果、锁 ----


@pytest.mark.parametrize("bad", ["batch_size=0", "model.n_embd=15", "batch_size=auto", "resume=latest", "init_from=latest"])
def test_a_setting_that_cannot_be_is_a_result(quick, bad):
    got = trial(quick, bad, code="os.abort()")
    assert got.status == "invalid" and got.reason and "\n" not in got.reason and got.score == 0.0
    assert not (quick[1] / "job").exists()


def test_known_results_are_found_by_what_they_depend_on_and_by_nothing_else(quick, monkeypatch):
    overrides, _ = quick
    cfg = make_config(*overrides)

    def key(**changes):
        changed = copy.deepcopy(cfg)
        for name, value in changes.items():
            *path, last = name.split("__")
            setattr(lookup(changed, ".".join(path)) if path else changed, last, value)
        return earlier_results.key_of(changed)

    same = key()
    assert same == key(out_dir="x", lang="zh", logger={}, trial__again=True, trial__margin=0.2, overwrite=True, groups={"model": "tiny"})
    others = [key(batch_size=8), key(precision__dtype="bf16"), key(trial__steps=3), key(memory__loss_chunk_mib=1), key(hardware__ram_gib=2.0), key(seed=1)]
    assert len({same, *others}) == 7
    monkeypatch.setattr(earlier_results, "device", lambda cfg: "another card, driver 1.2")
    assert key() != same


def test_a_mended_module_of_ones_own_is_measured_anew(quick, monkeypatch):
    overrides, folder = quick
    monkeypatch.syspath_prepend(str(folder))
    cfg = make_config(*overrides, "model._target_=my_own_model.Mine")
    keys = []
    for code in ("import broken", "import mended", "import broken"):
        (folder / "my_own_model.py").write_text(code, encoding="utf-8")
        keys.append(earlier_results.key_of(cfg))
    # 只读，不导入：子进程里会出的错不该出在这里
    assert keys[0] == keys[2] != keys[1] and "my_own_model" not in sys.modules
    assert earlier_results.own_code({"a": [{"_target_": "omegaconf.OmegaConf"}, {"_target_": "nowhere.X"}, {"_target_": 3}]}) == {}


def test_again_measures_anew_and_a_damaged_file_counts_as_unknown(quick):
    code = "report(status='ok', tokens_per_s=time.time())"
    first = trial(quick, code=code)
    assert trial(quick, code=code).known
    anew = trial(quick, "trial.again=true", code=code)
    assert not anew.known and anew.tokens_per_s > first.tokens_per_s
    (earlier_results.FOLDER / f"{first.key}.json").write_text('{"status": "ok", "tok', encoding="utf-8")
    assert not trial(quick, code=code).known


def test_results_survive_json_and_never_hold_nan(tmp_path):
    values = {"overrides": ["a=1"], "status": "ok", "tokens_per_s": math.nan, "peak_gib": math.inf, "step_ms": "fast", "micro_batch": True, "reason": "a\nb",
              "known": 1, "strange": 3, "device": None}
    got = made(values)
    assert (got.tokens_per_s, got.peak_gib, got.step_ms, got.micro_batch, got.reason, got.known) == (None, None, None, None, "a b", True)
    assert got.score == 0.0 and made({**values, "objective": "__class__"}).value is None

    def refuse(constant):
        raise AssertionError(constant)

    json.loads(got.to_json(), parse_constant=refuse)
    result.write(got, tmp_path / "x" / "trial.json")
    assert result.read(tmp_path / "x" / "trial.json") == got
    assert TrialResult((), "ok", tokens_per_s=3.0).score == 3.0 and TrialResult((), "spilled", tokens_per_s=3.0).score == 0.0
    assert TrialResult((), "ok", val_loss=3.0, objective="val_loss").score == 3.0 < TrialResult((), "oom", objective="val_loss").score < math.inf


def test_a_kernel_kill_is_out_of_memory_and_an_unnamed_signal_a_crash():
    assert classified(Ended(-9), 10)[0] == classified(Ended(-9, oom_kills=1), 10)[0] == "oom" and classified(Ended(-9, oom_kills=0), 10)[0] == "crashed"
    assert classified(Ended(-11, last_line="x"), 10) == ("crashed", "SIGSEGV (during: start): x")
    assert classified(Ended(-41), 10)[1].startswith("signal 41" if os.name != "nt" else "")


@POSIX
def test_trials_wait_for_each_other_and_a_dead_process_blocks_nobody(tmp_path):
    path, order = tmp_path / "lock", []

    def second():
        with only_one(path):
            order.append("second")

    with only_one(path):
        waiting = threading.Thread(target=second)
        waiting.start()
        time.sleep(0.3)
        order.append("first")
    waiting.join(5)
    assert order == ["first", "second"]
    code = f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path; from nanogpt.base.lock import only_one\nwith only_one(Path({str(path)!r})): os._exit(1)"
    subprocess.run([sys.executable, "-c", code], check=False)
    with only_one(path):
        pass


@POSIX
def test_a_trial_that_is_wanted_twice_at_once_is_measured_once(quick, monkeypatch):
    _, folder = quick
    monkeypatch.setattr(claims, "POLL_S", 0.02)
    code = f"open({str(folder / 'begun')!r}, 'a').write('x'); time.sleep(0.3); report(status='ok', tokens_per_s=5.0)"
    # Hydra 拼配置不能几个线程一起
    overrides, cfg, found = quick[0], make_config(*quick[0]), []
    both = [threading.Thread(target=lambda: found.append(run_trial(cfg, overrides, folder / "job", command=fake(code)))) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert sorted(one.known for one in found) == [False, True] and (folder / "begun").read_text(encoding="utf-8") == "x"
    assert not list(earlier_results.FOLDER.glob("*.claim.*"))


@POSIX
def test_the_claim_of_a_process_that_is_gone_is_taken_over_and_that_of_one_that_lives_is_not(tmp_path, monkeypatch):
    for name, value in {"POLL_S": 0.01, "BEAT_S": 0.02, "STALE_S": 0.4}.items():
        monkeypatch.setattr(claims, name, value)
    path = tmp_path / "trial.claim"
    gone = subprocess.Popen([sys.executable, "-S", "-c", ""])
    gone.wait()
    (tmp_path / "trial.claim.3").write_text(f"{claims.machine()} {gone.pid}", encoding="utf-8")
    monkeypatch.setattr(claims, "STALE_S", 1e9)
    with claims.claimed(path):
        # 同一台机器上死了的，不必等
        assert {file.name for file in tmp_path.iterdir()} == {"trial.claim.3", "trial.claim.4"}
    monkeypatch.setattr(claims, "STALE_S", 0.4)
    # 另一台机器上的，只看它还动不动
    (tmp_path / "trial.claim.1").write_text("elsewhere 1", encoding="utf-8")
    waiting = []
    with claims.claimed(path):
        assert (tmp_path / "trial.claim.2").exists()

        def second():
            with claims.claimed(path):
                waiting.append(sorted(file.name for file in tmp_path.iterdir()))

        (tmp_path / "trial.claim.2").write_text("elsewhere 2", encoding="utf-8")
        other = threading.Thread(target=second)
        other.start()
        other.join(2 * claims.STALE_S)
        assert other.is_alive() and not waiting
    other.join()
    assert waiting == [["trial.claim.1"]] and not list(tmp_path.iterdir())


def test_the_same_kind_of_card_or_processor_is_the_same_device_on_every_machine(monkeypatch):
    cfg = make_config("device=cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(earlier_results, "_cards", lambda: "NVIDIA A100, 580\nNVIDIA A100, 580")
    one = earlier_results.device(cfg)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(earlier_results, "_cards", lambda: "NVIDIA A100, 580")
    assert earlier_results.device(cfg) == one == "NVIDIA A100, 580"
    monkeypatch.setattr(earlier_results, "_cards", lambda: "NVIDIA A100, 580\nNVIDIA L4, 580")
    assert earlier_results.device(cfg).endswith(" 0")
    cpu = earlier_results.device(make_config("device=cpu"))
    earlier_results._processor.cache_clear()
    monkeypatch.setattr(earlier_results.platform, "node", lambda: "another")
    assert earlier_results.device(make_config("device=cpu")) == cpu


def test_a_trial_on_a_cluster_goes_to_the_nodes_whose_cards_it_fits(monkeypatch):
    monkeypatch.setattr(ray_trials, "connected", lambda: None)
    monkeypatch.setattr(RayTrials, "_fits", lambda trials, cfg, card: cfg.batch_size <= card.vram_gib)
    cards = {"a": ("NVIDIA GeForce RTX 3060", 12.0), "b": ("NVIDIA A100-SXM4-80GB", 80.0), "c": ("An unknown card", 30.0), "d": ("NVIDIA GeForce RTX 3060", 11.9)}
    every, one = RayTrials(one_kind=False), RayTrials(one_kind=True)
    every.cards = one.cards = {node: described(*card) for node, card in cards.items()}
    assert [card.name for card in every.cards.values()] == ["rtx3060_12gb", "a100_80gb", "An unknown card", "rtx3060_12gb"]
    placed = {rows: every.nodes(make_config(f"batch_size={rows}")) for rows in (8, 16, 64, 100)}
    assert placed == {8: ["a", "b", "c", "d"], 16: ["b", "c"], 64: ["b"], 100: []}
    # 比时间的搜索：第一个放得下的、最多的那种卡，以后都是它
    assert one.nodes(make_config("batch_size=8")) == one.nodes(make_config("batch_size=64")) == ["a", "d"]
    assert selector(["a", "d"]) == {"ray.io/node-id": "in(a,d)"} and selector([]) == {}
    every.cards = {node: card for node, card in every.cards.items() if node in "ad"}
    assert every.nodes(make_config("batch_size=64")) == []


def test_the_lock_of_trials_lies_where_only_its_owner_writes(in_tmp, monkeypatch, tiny_overrides):
    monkeypatch.setenv("NANOGPT_CACHE", str(in_tmp / "cache"))
    assert lock_path("cuda").parent == in_tmp / "cache"
    (in_tmp / "cache").write_text("a file", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"lock of trials .*cache.*trial-.*\.lock cannot be taken .*NANOGPT_CACHE"):
        run_trial(make_config(*tiny_overrides, "trial.enabled=true"), [], in_tmp / "job")


def test_devices_have_locks_of_their_own(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert lock_path("auto") == lock_path("cuda") == lock_path("cuda:0") != lock_path("cuda:1")
    first = lock_path("cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert lock_path("cuda") != first
    # Slurm 隔开了各任务的卡
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    locks = set()
    for card in "12":
        monkeypatch.setenv("SLURM_JOB_GPUS", card)
        locks.add(lock_path("cuda"))
    assert len(locks) == 2
