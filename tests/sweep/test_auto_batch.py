"""batch_size=auto: which micro-batches are tried, which one wins, what is remembered."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import make_config, resume, train

from nanogpt.base.console import Console
from nanogpt.base.language import ConfigError
from nanogpt.sweep import auto_batch
from nanogpt.sweep.trial import TrialResult

GIB = 2**30


def result(size: int, speed: float, *, peak: float = 1.0, status: str = "ok") -> TrialResult:
    return TrialResult(overrides=(), status=status, tokens_per_s=speed, peak_gib=peak, budget_gib=10.0, micro_batch=size)


def test_candidates_split_any_number_of_rows_evenly_and_end_at_one():
    for rows in (1, 2, 7, 64, 100, 480):
        sizes = auto_batch.candidates(rows, whole=False)
        assert sizes == sorted(set(sizes), reverse=True) and sizes[0] == rows and sizes[-1] == 1
        for size in sizes:
            pieces = -(-rows // size)
            # 再小一条就要多累积一次
            assert size == 1 or -(-rows // (size - 1)) > pieces
    assert auto_batch.candidates(64, whole=True) == [64]


def test_the_search_starts_at_the_largest_promising_size_and_asks_few():
    asked = []

    def promising(size):
        asked.append(size)
        return size <= 13

    sizes = auto_batch.candidates(480, whole=False)
    assert auto_batch.worth_trying(sizes, promising) == [s for s in sizes if s <= 13]
    assert len(asked) <= 5
    assert auto_batch.worth_trying(sizes, lambda size: False) == []
    assert auto_batch.worth_trying(sizes, lambda size: True) == sizes


def test_the_fastest_wins_and_not_the_largest():
    speeds = {32: 90.0, 16: 100.0, 8: 80.0, 4: 70.0, 2: 10_000.0}
    tried = []

    def measure(size):
        tried.append(size)
        return result(size, speeds[size])

    assert auto_batch.fastest(list(speeds), measure, 0.05).micro_batch == 16
    # 连续两档更慢就停，不再往小试
    assert tried == [32, 16, 8, 4]


def test_failures_and_sizes_without_margin_never_win():
    outcomes = {32: result(32, 0.0, status="oom"), 16: result(16, 500.0, peak=9.9), 8: result(8, 50.0)}
    best = auto_batch.fastest(list(outcomes), outcomes.get, 0.05)
    assert best.micro_batch == 8
    assert auto_batch.fastest([32], outcomes.get, 0.05) is None


@pytest.fixture
def machine(in_tmp, monkeypatch):
    """A machine on which 20 rows fit by prediction and 16 in truth; returns the sizes that were tried."""
    tried = []

    def predict(cfg, overrides):
        return SimpleNamespace(total=cfg.batch_size * GIB // 2, step_s=0.5, budget=SimpleNamespace(total=10 * GIB))

    def run_trial(cfg, overrides, folder):
        tried.append(cfg)
        if cfg.batch_size > 16:
            return result(cfg.batch_size, 0.0, status="oom")
        return result(cfg.batch_size, 100.0 + cfg.batch_size)

    monkeypatch.setattr(auto_batch, "predict", predict)
    monkeypatch.setattr(auto_batch, "run_trial", run_trial)
    return tried


def test_auto_keeps_the_effective_batch_and_remembers_the_verdict(machine):
    cfg = make_config("batch_size=auto", "global_batch_size=64")
    assert auto_batch.choose(cfg, [], processes=1, console=Console(quiet=True)) == 16
    assert [c.batch_size for c in machine] == [22, 16, 11, 8]
    assert all(c.global_batch_size == 64 and c.trial.enabled for c in machine)
    # 第二次不再试
    assert auto_batch.choose(cfg, [], processes=1, console=Console(quiet=True)) == 16
    assert len(machine) == 4
    # 配置变了、要求重测、记录坏了，都会重来
    auto_batch.choose(replace(cfg, trial=replace(cfg.trial, again=True)), [], processes=1, console=Console(quiet=True))
    assert len(machine) == 8
    auto_batch.choose(make_config("batch_size=auto", "global_batch_size=64", "model.n_layer=2"), [], processes=1, console=Console(quiet=True))
    assert len(machine) == 12
    for file in auto_batch.FOLDER.glob("*.json"):
        assert json.loads(file.read_text(encoding="utf-8"))["batch_size"] == 16
        file.write_text("{", encoding="utf-8")
    assert auto_batch.choose(cfg, [], processes=1, console=Console(quiet=True)) == 16
    assert len(machine) == 16


def test_behind_each_trial_stands_how_many_may_come(capsys):
    measure = auto_batch.in_sight(lambda size: result(size, 1.0), 3, Console())
    assert [measure(size).micro_batch for size in (8, 4, 2)] == [8, 4, 2]
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(", ")[0].strip() for line in lines] == ["1 of at most 3 tried", "2 of at most 3 tried"]


def test_several_processes_share_the_effective_batch(machine):
    cfg = make_config("batch_size=auto", "global_batch_size=64")
    auto_batch.choose(cfg, [], processes=2, console=Console(quiet=True))
    assert all(c.global_batch_size == 32 for c in machine)


def test_auto_says_what_is_missing_when_nothing_fits(machine, monkeypatch):
    monkeypatch.setattr(auto_batch, "predict", lambda cfg, overrides: SimpleNamespace(total=20 * GIB, budget=SimpleNamespace(total=10 * GIB)))
    with pytest.raises(ConfigError, match="not even 1 rows fit .predicted 20.0 GiB, budget 10.0 GiB"):
        auto_batch.choose(make_config("batch_size=auto", "global_batch_size=64"), [], processes=1, console=Console(quiet=True))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["batch_size=auto"], "batch_size=auto needs global_batch_size"),
        (["batch_size=many"], "batch_size=many is not known"),
        (["batch_size=0"], "batch_size=0 is out of range"),
        (["batch_size=4", "gradient_accumulation_steps=3", "global_batch_size=16"], "global_batch_size=16 is not batch_size=4 x gradient_accumulation_steps=3 = 12"),
        (["memory.optimizer_in_backward=true", "gradient_accumulation_steps=2"], "cannot accumulate 32 rows in pieces of batch_size=16"),
        (["memory.optimizer_in_backward=true", "precision=fp16"], "has no loss scaling"),
        (["memory.weights=bf16", "precision=fp32"], "memory.weights=bf16 computes in bf16"),
        (["memory.activation_checkpointing=budget"], "activation_budget_mib=None"),
    ],
)
def test_contradictions_between_the_keys_are_one_line(overrides, message):
    with pytest.raises(ConfigError, match=message):
        make_config(*overrides)


def test_a_run_trains_with_what_auto_found_and_resumes_with_it(machine, tiny_overrides):
    overrides = [o for o in tiny_overrides if not o.startswith("batch_size")]
    trainer = train(overrides, "batch_size=auto", "global_batch_size=32")
    assert trainer.micro_batch == 16 and trainer.local_rows == 32 and trainer.progress.samples_seen == 6 * 32
    # 记下的是找到的数，不是 auto
    again = resume("outputs/run", "max_iters=8")
    assert again.cfg.batch_size == 16 and again.cfg.global_batch_size == 32 and len(machine) == 3
    again.lock.release()
    # 接着训时另写 auto：重新找，形状与数据都来自那次训练
    other = resume("outputs/run", "max_iters=8", "batch_size=auto", "global_batch_size=8")
    assert other.cfg.batch_size == 8
    assert machine[-1].resume is None and machine[-1].model.n_embd == 16 and machine[-1].dataset["dir"].endswith("data")


def test_a_trial_with_a_loss_takes_the_fastest_micro_batch_of_each_batch_and_finds_it_once(in_tmp):
    asked = []

    def run(cfg, overrides, folder, **where):
        asked.append(cfg)
        if cfg.objective != "tokens_per_s":
            return TrialResult(tuple(overrides), "ok", val_loss=cfg.learning_rate, objective=cfg.objective, micro_batch=cfg.batch_size)
        # 超过 16 条放不下；4 条最快
        return result(cfg.batch_size, 100.0 - abs(cfg.batch_size - 4)) if cfg.batch_size <= 16 else result(cfg.batch_size, 0.0, status="skipped")

    found = {}
    for rate in (1e-2, 2e-2):
        for rows in (8, 64):
            words = ["trial.enabled=true", "objective=val_loss", "batch_size=auto", f"global_batch_size={rows}", f"learning_rate={rate}", f"seed={rows}"]
            one = auto_batch.settled(run, make_config(*words), words, in_tmp / "job", run_dir=None)
            found[rate, rows] = (one.objective, one.val_loss, one.micro_batch, asked[-1].global_batch_size, asked[-1].seed)
    assert found == {(rate, rows): ("val_loss", rate, 4, rows, rows) for rate in (1e-2, 2e-2) for rows in (8, 64)}
    # 学习率不同的，用上次的结论；放不下的只问了对半找时的那几档
    measured = [(cfg.global_batch_size, cfg.batch_size) for cfg in asked if cfg.objective == "tokens_per_s"]
    assert len(asked) - len(measured) == 4 and len(measured) == len(set(measured)) and sum(size > 16 for _, size in measured) <= 2
    assert all(cfg.trial.skip_predicted for cfg in asked)


@pytest.mark.parametrize("status", ["skipped", "oom"])
def test_a_trial_that_fits_with_no_micro_batch_trains_nothing_and_says_why(in_tmp, status):
    asked = []

    def run(cfg, overrides, folder):
        asked.append(cfg)
        return TrialResult((), status, f"{cfg.batch_size} too many")

    words = ["trial.enabled=true", "objective=val_bpb", "batch_size=auto", "global_batch_size=64"]
    got = auto_batch.settled(run, make_config(*words), words, in_tmp / "job")
    assert (got.status, got.reason, got.objective, got.overrides) == (status, "1 too many", "val_bpb", tuple(words))
    assert all(cfg.objective == "tokens_per_s" for cfg in asked)
    # 写错的，不去量：由 run 说
    del asked[:]
    auto_batch.settled(run, make_config("batch_size=auto", "global_batch_size=64", "model.n_embd=15", checked=False), [], in_tmp / "job")
    assert [cfg.batch_size for cfg in asked] == ["auto"]
