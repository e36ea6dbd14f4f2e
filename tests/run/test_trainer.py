"""The loop: accumulation equals the large batch, resume equals the uninterrupted run, faults are survived."""

import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import hooks, make_config, new_session, new_trainer, no_grad_eval, reseal, resume, resumed_trainer, train
from test_shards import sharded_dataset

from nanogpt.base.cli import remembered_groups
from nanogpt.base.config import auto_tokens, block_parameters, span_of
from nanogpt.base.language import ConfigError
from nanogpt.base.lock import Lock
from nanogpt.core import distributed
from nanogpt.core.progress import Progress
from nanogpt.run import loggers, loop
from nanogpt.run.loop import share_batch
from nanogpt.run.metrics import Forecast
from nanogpt.run.session import Session
from nanogpt.weights import checkpoint


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def records(out="outputs/run"):
    from pathlib import Path

    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_training_lowers_the_loss(in_tmp, tiny_overrides):
    trainer = train(tiny_overrides, "max_iters=40", "eval_interval=40")
    losses = [r["train/loss"] for r in records() if "train/loss" in r]
    assert losses[-1] < losses[0] - 0.5 and trainer.progress.val_loss < losses[0] - 0.5
    # ASCII 的字符各一个字节
    bits = [r["val/bpb"] for r in records() if "val/bpb" in r]
    assert bits == pytest.approx([trainer.progress.val_loss / math.log(2)])
    assert json.loads((in_tmp / "outputs/run/summary.json").read_text(encoding="utf-8"))["best_val_bpb"] == bits[0]
    kept = checkpoint.find(in_tmp / "outputs/run", "last")
    kept.drop_state()
    assert checkpoint.read_manifest(kept.folder).val_bpb == kept.val_bpb == bits[0]


def test_a_stride_of_one_is_every_token_with_its_whole_context(in_tmp, tiny_overrides):
    trainer = new_trainer(tiny_overrides, "eval_stride=1", "eval_tokens=40")
    torch.manual_seed(0)
    for p in trainer.parameters:
        torch.nn.init.normal_(p, std=0.3)
    block = trainer.block_size
    x, y = (torch.from_numpy(trainer.data.tokens["val"].astype("int64"))[i:] for i in (0, 1))
    places = [*range(block), *(start + block - 1 for start, _ in trainer.windows[1:])]
    with no_grad_eval(trainer.model) as model:
        logits = torch.stack([model(x[None, max(0, at + 1 - block) : at + 1])[0, -1] for at in places])
    assert len(places) == 40 and len(trainer.windows) > 1
    assert trainer.evaluate() == pytest.approx(float(torch.nn.functional.cross_entropy(logits, y[places])), rel=1e-5)
    with pytest.raises(ConfigError, match="eval_stride=1000 is above model.block_size"):
        make_config("eval_stride=1000")


def test_a_budget_of_tokens_is_a_training_of_as_many_iterations_and_can_be_raised(in_tmp, tiny_overrides):
    whole = train(tiny_overrides, out="outputs/a")
    step = whole.global_rows * whole.block_size
    same = train(tiny_overrides, "max_iters=null", f"max_tokens={6 * step - 1}", out="outputs/b")
    assert torch.equal(weights(same.model), weights(whole.model)) and same.progress.tokens_trained == 6 * step
    with pytest.raises(ConfigError, match=f"max_tokens={6 * step - 1} is used up; add max_tokens={12 * step - 2} to train on"):
        resumed_trainer("outputs/b")
    # 一步就用完了几倍：印出的命令也要够长
    short = new_session(tiny_overrides, "max_iters=null", "max_tokens=9", "warmup_iters=0", out="outputs/d")
    assert f"max_tokens={2 * step}" in short._next(short.run(), curves=False)["next_longer"]
    with pytest.raises(ConfigError, match=f"max_tokens={3 * step} is used up; add max_tokens={12 * step} to train on"):
        resumed_trainer("outputs/b", f"max_tokens={3 * step}")
    assert resumed_trainer("outputs/b", f"max_tokens={8 * step}").fit()["iters"] == 8
    # 先到的那一项结束训练
    assert train(tiny_overrides, f"max_tokens={9 * step}", out="outputs/c").progress.iteration == 6


def test_a_typed_budget_takes_the_place_of_one_that_is_used_up(in_tmp, tiny_overrides, monkeypatch, capsys):
    train(tiny_overrides, "eval_interval=100", "eval_tokens=64", "sample_tokens=0")
    with pytest.raises(ConfigError, match="already stands at iteration 6 of max_iters=6; add max_iters=12 to train on"):
        resumed_trainer("outputs/run", "max_iters=6", "max_minutes=60")
    with pytest.raises(ConfigError, match="already stands"):
        resumed_trainer("outputs/run", "max_minutes=null")
    timed = resumed_trainer("outputs/run", "max_minutes=1")
    assert "max_iters=6 was the end of this run; it goes on to max_minutes=1.0" in capsys.readouterr().out
    Clock(timed, monkeypatch)
    assert (timed.fit()["stopped_by"], timed.span.iters, timed.progress.wall_s) == ("max_minutes", None, pytest.approx(60, abs=10))
    counted = resumed_trainer("outputs/run", f"max_iters={timed.progress.iteration + 2}")
    assert (counted.cfg.max_minutes, counted.span.spent(timed.progress.iteration, 60) < 1) == (None, True)


def test_how_long_it_takes_is_said_once_where_no_bar_says_it(in_tmp, tiny_overrides, capsys):
    trainer = new_trainer(tiny_overrides, "max_iters=12", "eval_interval=5", "log_interval=100", "eval_tokens=64", "sample_tokens=0")
    trainer.forecast = Forecast(12, 5, None, 0.5)
    trainer.stopwatch = SimpleNamespace(start=lambda: None, stop=lambda: 10.0, take=lambda: 10.0)
    trainer.fit()
    trainer.progress.iteration = 5
    trainer.forecast.pause("evaluation", 5.0)
    for seconds in (50, 100):
        trainer.span = dataclasses.replace(trainer.span, seconds=trainer.progress.wall_s + seconds)
        trainer._say_left()
    trainer.forecast = Forecast(10, 5, None, 0.5)
    trainer._say_left()
    # 7 步、3 次评估，每次算半步
    said = [line for line in capsys.readouterr().out.splitlines() if "to go" in line]
    assert said == ["about 85.0 s to go (iterations: 7, evaluations: 3)"] * 2


def test_an_automatic_budget_fits_model_and_text_and_is_written_down_as_a_number(in_tmp, tiny_overrides):
    session = new_session(tiny_overrides, "max_iters=null", "max_tokens=auto")
    text_tokens = len(session.data.tokens["train"])
    blocks = sum(p.numel() for p in session._build().model.h.parameters() if p.dim() > 1)
    assert blocks == block_parameters(session.cfg.model)
    assert session.cfg.max_tokens == min(20 * blocks, 4 * text_tokens) == auto_tokens(session.cfg.model, text_tokens)
    cfg = make_config()
    assert (cfg.max_iters, span_of(cfg).iters, span_of(make_config("max_minutes=3")).iters) == (None, 250, None)


def test_a_validation_loss_that_has_turned_is_said_once_with_what_to_type(in_tmp, tiny_overrides, capsys):
    for typed in ("0", "null"):
        trainer = new_trainer(tiny_overrides, "max_iters=10", "eval_interval=1", "dropout=0.1", f"early_stop_evals={typed}", "overwrite=true")
        losses = iter([3.0, 2.0, 2.1, 2.2, 2.3, 2.4, 1.9, 2.0, 2.0, 2.0])
        trainer.evaluate = lambda *told, losses=losses: next(losses)
        trainer.fit()
        said = [line for line in capsys.readouterr().out.splitlines() if "has not improved" in line or "early_stop" in line]
        assert "since iteration 2:" in said[0] and "dropout=0.2" in said[0] and len(said) == 2 - (typed == "null")
        assert said[-1].endswith("run_train.py resume=outputs/run early_stop_evals=3" if typed == "0" else "it stops by itself if that goes on (early_stop_evals)")


def test_since_when_it_has_turned_is_right_whatever_the_interval_was_before(in_tmp, tiny_overrides, capsys):
    losses = iter([2.0, 2.1, 2.1, 2.1, 2.1])
    more = ["early_stop_evals=0", "lr_schedule=constant"]
    for trainer in (lambda: new_trainer(tiny_overrides, *more, "max_iters=7", "eval_interval=3"), lambda: resumed_trainer("outputs/run", "max_iters=40", "eval_interval=20")):
        trainer = trainer()
        trainer.evaluate = lambda *told: next(losses)
        trainer.fit()
    said = [line for line in capsys.readouterr().out.splitlines() if "has not improved" in line]
    # 第三次没有更好的，恰好在前一次训练的末尾：那时不说，接着训再说
    assert len(said) == 1 and "since iteration 3:" in said[0]
    older = Progress(iteration=40, evals_without_gain=2)
    assert older.since_best(10) == 20 and trainer.progress.since_best(10) == trainer.progress.iteration - 3


class Clock:
    """A clock on which each step of a trainer takes ten seconds and all else nothing."""

    def __init__(self, trainer, monkeypatch):
        self.now, self.rates, real = 0.0, [], trainer.step

        def step():
            result = real()
            self.now += 10
            self.rates.append(result.learning_rate)
            return result

        trainer.step = step
        monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: self.now))


def test_a_budget_of_minutes_ends_the_run_with_its_decay_done_and_a_resume_has_what_is_left(in_tmp, tiny_overrides, monkeypatch):
    timed = [*tiny_overrides, "max_iters=null", "max_minutes=1", "warmup_iters=0", "eval_interval=3"]
    whole = new_trainer(timed, out="outputs/whole")
    clock = Clock(whole, monkeypatch)
    summary = whole.fit()
    assert (summary["stopped_by"], summary["iters"], whole.progress.wall_s) == ("max_minutes", 6, 60)
    assert clock.rates == pytest.approx([1e-2 * (6 - i) / 6 for i in range(6)])
    half = new_trainer(timed, out="outputs/half")
    Clock(half, monkeypatch)
    half.span = dataclasses.replace(half.span, iters=3)
    half.fit()
    rest = resumed_trainer("outputs/half")
    again = Clock(rest, monkeypatch)
    assert rest.fit()["iters"] == 6 and again.rates == pytest.approx(clock.rates[3:])
    with pytest.raises(ConfigError, match="max_minutes=1.0 is used up; add max_minutes=2.0 to train on"):
        resumed_trainer("outputs/half")
    longer = resumed_trainer("outputs/half", "max_minutes=2")
    Clock(longer, monkeypatch)
    assert longer.fit()["iters"] == 12


def test_an_evaluation_that_would_use_up_the_time_is_left_to_the_end(in_tmp, tiny_overrides, monkeypatch):
    trainer = new_trainer(tiny_overrides, "max_iters=null", "max_minutes=1", "eval_interval=1")
    clock, real, at = Clock(trainer, monkeypatch), trainer.evaluate, []

    def evaluate(*told):
        at.append(trainer.progress.iteration)
        clock.now += 15
        return real(*told)

    trainer.evaluate = evaluate
    trainer.fit()
    # 10 + 15、35 + 15；60 秒时结束，再评估
    assert at == [1, 2, 3] and trainer.progress.iteration == 3


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_accumulation_equals_the_large_batch(in_tmp, tiny_overrides, optimizer):
    whole = train(tiny_overrides, f"optimizer={optimizer}", "batch_size=8", out="outputs/a")
    parts = train(tiny_overrides, f"optimizer={optimizer}", "batch_size=2", "gradient_accumulation_steps=4", out="outputs/b")
    torch.testing.assert_close(weights(parts.model), weights(whole.model), atol=2e-4, rtol=1e-3)
    assert parts.progress.val_loss == pytest.approx(whole.progress.val_loss, abs=1e-3)


def test_any_micro_batch_gives_the_global_batch_exactly(in_tmp, tiny_overrides):
    # 5 + 5 + 2：最后一个微批不满，梯度仍等于整批的平均
    whole = train(tiny_overrides, "batch_size=12", out="outputs/a")
    parts = train(tiny_overrides, "batch_size=5", "global_batch_size=12", out="outputs/b")
    assert parts.progress.samples_seen == whole.progress.samples_seen == 72
    torch.testing.assert_close(weights(parts.model), weights(whole.model), atol=2e-4, rtol=1e-3)
    assert share_batch(make_config("batch_size=16", "global_batch_size=6"), 2) == (3, 3)


@pytest.mark.parametrize("more", [
    ["optimizer=muon", "model.dropout=0.1"],
    ["optimizer=adamw", "precision=fp16", "precision.loss_scale_growth_interval=4", "model.dropout=0.1"],
    ["optimizer=adamw", "model=gpt2", "model.n_layer=2", "model.n_head=2", "model.n_embd=16", "model.block_size=16", "precision=bf16"],
    ["memory=lean", "gradient_accumulation_steps=2", "lr_schedule=wsd", "model.ngrams=[2]", "model.ngram_buckets=50"],
])
def test_resume_equals_the_uninterrupted_run_to_the_bit(in_tmp, tiny_overrides, more):
    base = [*tiny_overrides, *more, "eval_interval=5", "lr_decay_iters=20"]
    whole = train(base, "max_iters=20", out="outputs/whole")
    train(base, "max_iters=10", out="outputs/half")
    second = resumed_trainer("outputs/half", "max_iters=20")
    assert second.progress.iteration == 10
    second.fit()
    assert torch.equal(weights(second.model), weights(whole.model))
    a, b = (checkpoint.find(in_tmp / "outputs" / n, "last").load_state() for n in ("whole", "half"))
    assert a["scaler"] == b["scaler"] and a["fingerprint"] == b["fingerprint"]
    for name, tensors in a["optimizer"]["state"].items():
        assert all(torch.equal(t, b["optimizer"]["state"][name][k]) for k, t in tensors.items())
    times = {"train_s", "wall_s"}
    assert {k: v for k, v in a["progress"].items() if k not in times} == {k: v for k, v in b["progress"].items() if k not in times}
    stable = ("iteration", "train/loss", "val/loss", "learning_rate", "tokens")
    rows = [[{k: r[k] for k in stable if k in r} for r in records(f"outputs/{n}") if "learning_rate" in r] for n in ("whole", "half")]
    # 第 10 步在前半程是最后一步，多评估了一次；其余逐行相同
    assert [{k: v for k, v in r.items() if k != "val/loss"} for r in rows[0]] == [{k: v for k, v in r.items() if k != "val/loss"} for r in rows[1]]
    samples = [[r["sample"] for r in records(f"outputs/{n}") if "sample" in r][-1] for n in ("whole", "half")]
    assert samples[0] == samples[1]


def test_a_run_on_many_files_behind_an_address_resumes_to_the_bit(in_tmp, tiny_overrides, monkeypatch):
    monkeypatch.setenv("NANOGPT_CACHE", str(in_tmp / "cache"))
    address = sharded_dataset(in_tmp / "corpus").as_uri()
    base = [o for o in tiny_overrides if not o.startswith("dataset")] + ["dataset=hf", f"dataset.dir={address}", "lr_decay_iters=6", "sample_tokens=0"]
    whole = train(base, out="outputs/whole")
    train(base, "max_iters=2", out="outputs/half")
    again = resumed_trainer("outputs/half", "max_iters=6")
    again.fit()
    assert torch.equal(weights(again.model), weights(whole.model)) and not (in_tmp / "outputs/half/data").exists()


def test_a_run_of_an_earlier_version_goes_on_in_its_own_order(in_tmp, tiny_overrides):
    def old(out, **more):
        trainer = new_trainer(tiny_overrides, *more.get("overrides", ()), "lr_decay_iters=6", out=out)
        trainer.order = 1
        trainer.fit()
        return trainer

    whole = old("outputs/whole")
    half = old("outputs/half", overrides=["max_iters=3"]).saver.saved.folder
    # 那时的 manifest 是格式 2，状态里没有次序
    state = json.loads((half / "state.json").read_text(encoding="utf-8"))
    (half / "state.json").write_text(json.dumps({"dict": [pair for pair in state["dict"] if pair[0] != "order"]}), encoding="utf-8")
    manifest = json.loads((half / "manifest.json").read_text(encoding="utf-8"))
    (half / "manifest.json").write_text(json.dumps({**manifest, "format": 2}), encoding="utf-8")
    reseal(half)
    resumed = resumed_trainer("outputs/half", "max_iters=6")
    resumed.fit()
    assert torch.equal(weights(resumed.model), weights(whole.model)) and resumed.saver.saved.load_state()["order"] == 1
    new = train(tiny_overrides, "lr_decay_iters=6", out="outputs/new")
    assert not torch.equal(weights(new.model), weights(whole.model)) and new.saver.saved.load_state()["order"] == 2


def test_the_same_seed_gives_the_same_run_and_another_does_not(in_tmp, tiny_overrides):
    one, two, three = (train(tiny_overrides, f"seed={s}", out=f"outputs/{n}") for n, s in enumerate((5, 5, 6)))
    assert torch.equal(weights(one.model), weights(two.model)) and not torch.equal(weights(one.model), weights(three.model))


def test_sampling_and_evaluating_do_not_change_the_training(in_tmp, tiny_overrides):
    plain = train(tiny_overrides, "model.dropout=0.2", "eval_interval=6", "sample_tokens=0", out="outputs/a")
    busy = train(tiny_overrides, "model.dropout=0.2", "eval_interval=1", "sample_tokens=20", out="outputs/b")
    assert torch.equal(weights(plain.model), weights(busy.model))


def fail_above(trainer, rows, error):
    """Make the model's loss run out of memory when training on more than `rows` sequences."""
    real, calls = trainer.model.loss, []

    def loss(x, y):
        calls.append(len(x))
        if len(x) > rows and trainer.model.training:
            raise error
        return real(x, y)

    trainer.model.loss = loss
    return calls


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
])
def test_out_of_memory_halves_the_micro_batch_and_repeats_the_same_step(in_tmp, tiny_overrides, error, capsys):
    calm = new_trainer(tiny_overrides, "batch_size=8", out="outputs/a")
    hit = new_trainer(tiny_overrides, "batch_size=8", out="outputs/b")
    fail_above(hit, 3, error)
    for _ in range(4):
        calm.step()
        hit.step()
    assert hit.micro_batch == 2 and hit.progress.samples_seen == calm.progress.samples_seen == 32
    torch.testing.assert_close(weights(hit.model), weights(calm.model), atol=2e-4, rtol=1e-3)
    assert "micro-batch 8 -> 4, accumulation 2" in capsys.readouterr().out


def test_a_fault_late_in_the_step_leaves_no_half_accumulated_gradient(in_tmp, tiny_overrides):
    calm = new_trainer(tiny_overrides, "gradient_accumulation_steps=3", out="outputs/a")
    hit = new_trainer(tiny_overrides, "gradient_accumulation_steps=3", out="outputs/b")
    real, count = hit.model.loss, [0]

    def loss(x, y):
        count[0] += 1
        if count[0] == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(x, y)

    hit.model.loss = loss
    results = [calm.step(), hit.step()]
    assert results[0].loss == pytest.approx(results[1].loss, abs=1e-5)
    assert results[0].gradient_norm == pytest.approx(results[1].gradient_norm, rel=1e-4)


def test_out_of_memory_at_one_sequence_ends_with_advice(in_tmp, tiny_overrides):
    trainer = new_trainer(tiny_overrides)
    fail_above(trainer, 0, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(ConfigError, match="memory=lean"):
        trainer.fit()


def test_other_errors_are_not_mistaken_for_memory(in_tmp, tiny_overrides):
    trainer = new_trainer(tiny_overrides)
    fail_above(trainer, 0, RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        trainer.step()


def test_evaluation_survives_out_of_memory(in_tmp, tiny_overrides):
    trainer = new_trainer(tiny_overrides, "eval_batch_size=16")
    expected, real = trainer.evaluate(), trainer.model.loss

    def loss(x, y):
        if len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(x, y)

    trainer.model.loss = loss
    assert trainer.evaluate() == pytest.approx(expected, abs=1e-6) and trainer.eval_batch == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_loss_is_skipped_and_counted(in_tmp, tiny_overrides, bad):
    trainer = new_trainer(tiny_overrides)
    real = trainer.model.loss
    trainer.step()
    before = weights(trainer.model).clone()
    trainer.model.loss = lambda x, y: real(x, y) * bad
    trainer.step()
    assert torch.equal(weights(trainer.model), before)
    trainer.model.loss = real
    trainer.step()
    assert trainer.progress.nonfinite_steps == 1 and trainer.progress.nonfinite_in_a_row == 0
    assert not torch.equal(weights(trainer.model), before) and torch.isfinite(weights(trainer.model)).all()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_non_finite_gradient_is_skipped(in_tmp, tiny_overrides, precision):
    trainer = new_trainer(tiny_overrides, f"precision={precision}")
    before = weights(trainer.model).clone()
    handle = trainer.model.wte.weight.register_hook(lambda g: g * math.inf)
    trainer.step()
    handle.remove()
    assert torch.equal(weights(trainer.model), before)
    trainer.step()
    assert torch.isfinite(weights(trainer.model)).all() and not torch.equal(weights(trainer.model), before)


def test_divergence_stops_with_the_last_good_checkpoint_and_advice(in_tmp, tiny_overrides):
    trainer = new_trainer(tiny_overrides, "max_iters=30", "max_nonfinite_steps=4")
    real = trainer.model.loss
    trainer.model.loss = lambda x, y: real(x, y) * (math.nan if trainer.progress.iteration >= 3 and trainer.model.training else 1)
    with pytest.raises(ConfigError, match=r"4 steps in a row.*iter_00000006.*resume=outputs/run learning_rate="):
        trainer.fit()
    assert torch.isfinite(torch.cat([t.flatten() for t in trainer.optimizer.state_dict()["state"]["wte.weight"].values()])).all()


def test_fp16_overflow_halves_the_scale_and_training_goes_on(in_tmp, tiny_overrides):
    trainer = new_trainer(tiny_overrides, "precision=fp16", "precision.initial_loss_scale=1e18", "max_iters=70", "eval_interval=70")
    trainer.fit()
    assert trainer.precision.scaler.get_scale() < 1e9 and trainer.progress.nonfinite_steps == 0
    assert trainer.progress.val_loss < 2.9


def test_early_stopping_and_target_stop_the_run(in_tmp, tiny_overrides):
    stopped = train(tiny_overrides, "max_iters=50", "eval_interval=1", "learning_rate=1e-12", "early_stop_evals=3", out="outputs/a")
    assert stopped.progress.iteration < 50
    reached = train(tiny_overrides, "max_iters=50", "eval_interval=1", "target_val_loss=100", out="outputs/b")
    assert reached.progress.iteration == 1 and checkpoint.find(in_tmp / "outputs" / "b", "last").iteration == 1


def test_the_best_weights_are_kept_also_with_an_interval_for_saves_of_its_own(in_tmp, tiny_overrides):
    trainer = train(tiny_overrides, "max_iters=12", "eval_interval=2", "save_interval=5", "keep=1", "learning_rate=0.3", "lr_schedule=constant", "warmup_iters=0")
    found = checkpoint.checkpoints(in_tmp / "outputs/run")
    assert trainer.progress.best_iteration < 12 and [one.iteration for one in found] == [trainer.progress.best_iteration, 12]
    assert checkpoint.best_of(found).val_loss == trainer.progress.best_val_loss


# 学得太快，第 8 步最好：漏了它，留下的就是别的
BEST_AT_8 = ("max_iters=9", "eval_interval=2", "learning_rate=0.3", "lr_schedule=constant", "warmup_iters=0")


@pytest.mark.parametrize("halfway", [False, True])
def test_an_interrupt_where_an_evaluation_was_due_notes_no_loss_that_was_not_measured_and_it_is_made_up_for(in_tmp, tiny_overrides, halfway):
    overrides = [*tiny_overrides, *BEST_AT_8, "log_interval=1", "eval_batch_size=1"]
    whole = train(overrides, out="outputs/whole")
    trainer = new_trainer(overrides)
    step, evaluate = trainer.step, trainer.evaluate

    def stopped():
        trainer.stop_requested = trainer.progress.iteration == 7 and not halfway
        return step()

    def stopped_halfway(told):
        trainer.stop_requested = trainer.progress.iteration == 8
        return evaluate(told)

    trainer.step, trainer.evaluate = stopped, stopped_halfway if halfway else evaluate
    assert trainer.fit()["stopped_by"] == "interrupted"
    assert [record["iteration"] for record in records() if "val/loss" in record] == [2, 4, 6]
    weights = Path("outputs/run/ckpt/iter_00000008/model.safetensors")
    written = weights.stat().st_mtime_ns
    again = resumed_trainer("outputs/run")
    again.fit()
    times = {"train_s", "wall_s"}
    assert {k: v for k, v in vars(again.progress).items() if k not in times} == {k: v for k, v in vars(whole.progress).items() if k not in times}
    measured = [{one["iteration"]: one["val/loss"] for one in loggers.history(Path("outputs") / name)[0] if "val/loss" in one} for name in ("run", "whole")]
    assert measured[0] == measured[1] and list(measured[0]) == [2, 4, 6, 8, 9]
    best = checkpoint.best_of(checkpoint.checkpoints(Path("outputs/run")))
    assert best.iteration == 8 and best.val_loss == measured[0][8] < measured[0][9]
    # 只换了清单：整份重写，换上去的一瞬间断了电，就没有 checkpoint
    assert weights.stat().st_mtime_ns == written and best.problem() is None


def interrupted_at(iteration, overrides, *more):
    """A run in outputs/run that was told to end at that iteration, where an evaluation was due."""
    trainer = new_trainer(overrides, *more)
    step = trainer.step

    def stopped():
        trainer.stop_requested = trainer.progress.iteration == iteration - 1
        return step()

    trainer.step = stopped
    assert trainer.fit()["stopped_by"] == "interrupted"


def test_a_disk_that_is_full_while_an_evaluation_is_made_up_for_costs_neither_the_training_nor_the_best(in_tmp, tiny_overrides, monkeypatch, capsys):
    # 只留一份
    interrupted_at(8, tiny_overrides, *BEST_AT_8, "keep=1")
    again = resumed_trainer("outputs/run")
    evaluated, full = checkpoint.Checkpoint.evaluated, [OSError(28, "No space left on device")]

    def once(saved, *losses):
        if full:
            raise full.pop()
        return evaluated(saved, *losses)

    monkeypatch.setattr(checkpoint.Checkpoint, "evaluated", once)
    assert again.fit()["stopped_by"] == "finished"
    assert "could not save a checkpoint (No space left on device)" in capsys.readouterr().out
    found = checkpoint.checkpoints(Path("outputs/run"))
    assert [one.iteration for one in found] == [8, 9] and checkpoint.best_of(found).iteration == 8


@pytest.mark.parametrize("gone", [True, False])
def test_a_loss_that_can_never_be_noted_costs_no_weights(in_tmp, tiny_overrides, monkeypatch, gone):
    interrupted_at(8, tiny_overrides, *BEST_AT_8, "keep=1")
    again = resumed_trainer("outputs/run")

    def never(saved, *losses):
        if gone and saved.folder.is_dir():
            # 有人为了腾地方删了它
            shutil.rmtree(saved.folder)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.Checkpoint, "evaluated", never)
    assert again.fit()["stopped_by"] == "finished"
    found = [one.iteration for one in checkpoint.checkpoints(Path("outputs/run"))]
    # 记不上的那一份可能是最好的：还在，就留着
    assert found[-1] == 9 and (8 in found) != gone


@pytest.mark.parametrize("ends", ["target_val_loss=100", "early_stop_evals=1"])
def test_a_training_that_ends_with_an_evaluation_that_was_made_up_for_goes_on_like_any_other(in_tmp, tiny_overrides, ends):
    # 学得太慢：第 4 步不会比第 2 步好
    interrupted_at(4, tiny_overrides, "max_iters=9", "eval_interval=2", *(["learning_rate=1e-12", "optimizer.weight_decay=0"] if "early" in ends else []))
    ended = resumed_trainer("outputs/run", ends)
    assert ended.fit()["stopped_by"] == ends.partition("=")[0].replace("_val_loss", "_reached").replace("_evals", "")
    assert ended.progress.iteration == 4 and checkpoint.find(Path("outputs/run"), "last").val_loss == ended.progress.val_loss
    assert resumed_trainer("outputs/run").fit()["iters"] > 4


def same_again(*overrides):
    """The session of the first command typed again, with resume=auto."""
    typed = ["resume=outputs/run", *overrides]
    cfg = make_config(*typed, "out_dir=outputs/run", *remembered_groups(typed), checked=False)
    return Session.resume(cfg, list(overrides), Path("outputs/run"), hooks())


def test_the_same_command_after_an_early_end_has_nothing_to_do_and_keeps_the_times(in_tmp, tiny_overrides):
    def again(*more):
        return same_again("max_iters=50", "target_val_loss=100", *more).run()

    first = new_session([*tiny_overrides, "max_iters=50", "eval_interval=1", "target_val_loss=100"]).run()
    second = again()
    assert (first["iters"], second["iters"], second["stopped_by"]) == (1, 1, "target_reached")
    assert second["wall_s"] >= first["wall_s"] > 0 and second["train_s"] == first["train_s"]
    assert again("learning_rate=1e-3")["iters"] == 2
    # 换了目标，就还有事做
    assert again("target_val_loss=null", "max_iters=3")["iters"] == 3


def test_time_and_tokens_of_a_checkpoint_belong_to_the_same_steps(in_tmp, tiny_overrides):
    train(tiny_overrides, "max_iters=4", "eval_interval=100", "log_interval=100", "save_interval=2", "keep=3")
    times = [one.load_state()["progress"]["train_s"] for one in checkpoint.checkpoints(in_tmp / "outputs/run")]
    assert 0 < times[0] < times[1]
    record, = (one for one in records() if "tokens_per_s" in one)
    assert record["tokens_per_s"] == pytest.approx(record["tokens"] / times[1])


def test_a_validation_that_is_measured_otherwise_counts_its_best_anew(in_tmp, tiny_overrides, capsys):
    train(tiny_overrides, "eval_tokens=128")
    # 验证部分没有那么长的，量的还是那些；没有事做的，也什么都不忘
    for session, anew in (
        (lambda: resume("outputs/run", "max_iters=9", "eval_tokens=64"), True), (lambda: resume("outputs/run", "max_iters=9"), False),
        (lambda: resume("outputs/run", "max_iters=9", "eval_tokens=100000"), True), (lambda: same_again("eval_tokens=64"), False),
    ):
        session = session()
        trainer = session._build()
        session._measure_anew(trainer)
        assert (trainer.progress.best_val_loss == math.inf) == anew == ("measured otherwise than before" in capsys.readouterr().out)
        trainer.loggers.close()
        session.lock.release()


def test_another_number_format_goes_on_with_a_loss_scale_of_its_own(in_tmp, tiny_overrides):
    train(tiny_overrides, "precision=fp32")
    trainer = resumed_trainer("outputs/run", "max_iters=8", "precision=fp16")
    trainer.fit()
    assert trainer.progress.iteration == 8 and trainer.precision.scaler.is_enabled()


def test_evaluation_covers_the_whole_split_exactly(in_tmp, tiny_overrides):
    trainer = new_trainer(tiny_overrides)
    losses = []
    with torch.no_grad():
        trainer.model.eval()
        tokens = torch.from_numpy(trainer.data.tokens["val"].astype("int64"))
        for start in range(0, len(tokens) - 1, 16):
            piece = tokens[start : start + 17]
            logits = trainer.model(piece[None, :-1])[0]
            losses.append(torch.nn.functional.cross_entropy(logits, piece[1:], reduction="none"))
    assert trainer.evaluate() == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5)
    assert trainer.evaluate() == trainer.evaluate()


def test_a_full_disk_is_reported_and_training_goes_on(in_tmp, tiny_overrides, monkeypatch, capsys):
    trainer = new_trainer(tiny_overrides, "max_iters=6", "eval_interval=2")
    real, calls = checkpoint.save, []

    def save(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", save)
    trainer.fit()
    assert "No space left on device" in capsys.readouterr().out and trainer.saver.saved.iteration == 6


def test_a_run_that_cannot_save_at_the_end_fails_loudly(in_tmp, tiny_overrides, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    trainer = new_trainer(tiny_overrides)
    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(ConfigError, match="could not be saved"):
        trainer.fit()


@pytest.mark.parametrize(("batch", "accumulation", "world", "expected"), [
    (8, 4, 1, (32, 8)), (8, 4, 2, (16, 8)), (8, 1, 2, (4, 4)), (6, 3, 2, (9, 6)), (8, 4, 4, (8, 8)), (5, 1, 3, (2, 2)),
])
def test_any_number_of_processes_shares_the_same_effective_batch(batch, accumulation, world, expected, monkeypatch):
    cfg = make_config(f"batch_size={batch}", f"gradient_accumulation_steps={accumulation}")
    assert share_batch(cfg, world) == expected
    rows = list(range(batch * accumulation))
    monkeypatch.setenv("WORLD_SIZE", str(world))
    shares = []
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(rows[distributed.share(len(rows))])
    assert [row for share in shares for row in share] == rows and max(map(len, shares)) == expected[0] and min(map(len, shares)) >= expected[0] - 1


def test_a_batch_with_fewer_rows_than_processes_is_refused():
    with pytest.raises(ConfigError, match="2 rows of a step cannot be shared by 3 processes; start at most 2"):
        share_batch(make_config("batch_size=2"), 3)


# ---- 继续训练时的配置 ----


@pytest.mark.parametrize(("override", "key"), [
    ("seed=5", "seed"), ("model.n_layer=3", "model.n_layer"), ("dataset.val_fraction=0.3", "dataset.val_fraction"),
    ("arch=gpt2", "model"), ("experiment=cpu_speedrun", "experiment"),
])
def test_what_may_not_change_on_resume_is_refused_by_name(in_tmp, tiny_overrides, override, key):
    train(tiny_overrides)
    with pytest.raises(ConfigError, match=f"{key}.* cannot change on resume"):
        resume("outputs/run", "max_iters=9", override)


def test_what_may_change_on_resume_takes_effect(in_tmp, tiny_overrides):
    train(tiny_overrides)
    cfg = resume("outputs/run", "max_iters=9", "learning_rate=5e-3", "model.dropout=0.3", "memory=lean", "precision=fp16").cfg
    assert (cfg.learning_rate, cfg.model.dropout, cfg.memory.activation_checkpointing, cfg.precision.dtype) == (5e-3, 0.3, "every_block", "fp16")
    assert cfg.batch_size == 4 and cfg.logger == {}


@pytest.mark.parametrize("override", ["dropout=0.3", "model.dropout=0.3"])
def test_dropout_goes_by_both_names_also_on_resume(in_tmp, tiny_overrides, override):
    assert make_config(override).model.dropout == 0.3
    train(tiny_overrides, "dropout=0.1")
    assert resume("outputs/run", "max_iters=9", override).cfg.model.dropout == 0.3
    assert resume("outputs/run", "max_iters=9").cfg.model.dropout == 0.1


def test_resuming_a_finished_run_says_how_to_go_on(in_tmp, tiny_overrides):
    train(tiny_overrides)
    with pytest.raises(ConfigError, match=r"iteration 6 of max_iters=6; add max_iters=12"):
        resume("outputs/run")


def test_resume_from_an_older_checkpoint_makes_it_the_last(in_tmp, tiny_overrides):
    train(tiny_overrides, "keep=5")
    resumed_trainer("outputs/run", "checkpoint=iter_00000003", "max_iters=5").fit()
    assert [c.iteration for c in checkpoint.checkpoints(in_tmp / "outputs/run")] == [3, 5]


def test_code_named_by_a_stranger_is_not_run_on_resume(in_tmp, tiny_overrides):
    train(tiny_overrides)
    for config in (in_tmp / "outputs/run").rglob("config.yaml"):
        config.write_text(config.read_text(encoding="utf-8").replace("nanogpt.core.model.GPT", "os.abort"), encoding="utf-8")
        if config.parent.name.startswith("iter_"):
            reseal(config.parent)
    with pytest.raises(ConfigError, match=r"names code of its own \(os.abort\)"):
        resume("outputs/run", "max_iters=9")


def test_a_model_class_of_the_users_own_trains_and_resumes(in_tmp, tiny_overrides, monkeypatch):
    (in_tmp / "my_model.py").write_text(
        "import torch\nfrom nanogpt.core.model import GPT\n"
        "class Mine(GPT):\n"
        "    def make_mlp(self, layer):\n"
        "        return torch.nn.Linear(self.config.n_embd, self.config.n_embd, bias=self.config.extra['bias'])\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(in_tmp))
    own = ["model._target_=my_model.Mine", "+model.extra.bias=true"]
    train(tiny_overrides, *own)
    with pytest.raises(ConfigError, match="names code of its own"):
        resume("outputs/run", "max_iters=9")
    assert type(resumed_trainer("outputs/run", "max_iters=9", *own).model).__name__ == "Mine"


def test_a_run_without_data_of_its_own_goes_on_with_what_it_was_trained_on(in_tmp, tiny_overrides, corpus_folder, monkeypatch):
    import shutil

    from nanogpt.data import corpus

    script = in_tmp / "data/text_file/prepare.py"
    script.parent.mkdir(parents=True)
    shutil.copy(corpus.home_of("text_file") / "prepare.py", script)
    monkeypatch.setattr("nanogpt.base.config.ROOT", in_tmp)
    (in_tmp / "songs.txt").write_text("to be or not to be\n" * 50, encoding="utf-8")
    own = [o for o in tiny_overrides if not o.startswith(("dataset.dir=", "dataset.path="))]
    trained = train(own, "dataset.path=songs.txt", "bundle_data_mib=0", "max_iters=3").data
    # 早先的版本给文件夹起别的名字；文字后来也改了
    trained.folder.rename(script.parent / "prepared")
    (in_tmp / "songs.txt").write_text("that is the question\n" * 50, encoding="utf-8")
    again = resumed_trainer("outputs/run", "max_iters=6")
    assert again.data.folder == script.parent / "prepared" and again.data.fingerprint == trained.fingerprint


def test_data_other_than_the_checkpoints_is_refused(in_tmp, tiny_overrides, tmp_path):
    import numpy as np

    from nanogpt.data.corpus import write_dataset
    from nanogpt.data.tokens import TokenData

    trainer = train(tiny_overrides)
    other = write_dataset(tmp_path / "other", name="t", source="t", tokenizer=trainer.data.tokenizer, train=[np.zeros(900, int)], val=[np.zeros(90, int)])
    assert TokenData(other).fingerprint != trainer.data.fingerprint
    with pytest.raises(ConfigError, match="differs from what the checkpoint was trained on"):
        resumed_trainer("outputs/run", "max_iters=9", f"dataset.dir={other}")


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
@pytest.mark.parametrize("name", ["lock", "metrics.jsonl", "logs", "ckpt"])
def test_a_strangers_run_with_a_link_in_it_writes_nowhere_else(own_run, name):
    mine = own_run / "mine"
    if (own_run / "outputs/run" / name).is_dir():
        (own_run / "outputs/run" / name).rename(mine)
    else:
        mine.write_text("years of work", encoding="utf-8")
        (own_run / "outputs/run" / name).unlink(missing_ok=True)
    (own_run / "outputs/run" / name).symlink_to(mine)
    before = {path: path.read_bytes() for path in [mine, *mine.rglob("*")] if path.is_file()}
    with pytest.raises(ConfigError, match=f"outputs/run: {name} in it is a link") as error:
        resumed_trainer("outputs/run", "max_iters=9")
    assert "\n" not in str(error.value) and before == {path: path.read_bytes() for path in [mine, *mine.rglob("*")] if path.is_file()}
    if name == "lock":
        # 公用的 /tmp 里的锁也是
        with pytest.raises(OSError):
            Lock(own_run / "outputs/run/lock").take()
        assert mine.read_text(encoding="utf-8") == "years of work"


@pytest.mark.parametrize("seed", [20261126013000, 2**63 - 1])
def test_any_legal_seed_trains_writes_samples_and_goes_on(in_tmp, tiny_overrides, seed, capsys):
    quick = ("max_iters=3", "eval_interval=1", "sample_tokens=3", f"seed={seed}")
    assert train(tiny_overrides, *quick).last_sample
    assert resumed_trainer("outputs/run", "max_iters=4").fit()["iters"] == 4
    assert "sample could not be written" not in capsys.readouterr().out


def test_a_sample_that_cannot_be_written_never_ends_a_training(in_tmp, tiny_overrides, monkeypatch, capsys):
    def broken(*_, **__):
        raise KeyError("a bug")

    monkeypatch.setattr("nanogpt.write.engine.write_sample", broken)
    trainer = train(tiny_overrides, "max_iters=3", "eval_interval=1", "sample_tokens=3")
    assert trainer.progress.iteration == 3 and "iter 1: the sample could not be written (KeyError: 'a bug')" in capsys.readouterr().out
