"""A training that has come to nothing stops with one line, and what merely looks odd does not stop it."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import new_trainer, resumed_trainer, tiny_model_config

from nanogpt.base import language as messages
from nanogpt.base.errors import OutOfMemory, explained
from nanogpt.base.language import ConfigError
from nanogpt.core.loss import chunked_cross_entropy
from nanogpt.core.precision import adjust_scale
from nanogpt.run import health
from nanogpt.run.health import Diverged, Health, broken_tensor
from nanogpt.sweep.child import verdict_of
from nanogpt.weights import checkpoint
from nanogpt.weights.build import build_model
from nanogpt.weights.tensors import first_not_finite


def optimizer_with(**state):
    return SimpleNamespace(state_dict=lambda: {"state": {"wte.weight": state}})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_tensor_that_is_not_finite_is_named(value, dtype):
    model = build_model(tiny_model_config(), 0).to(dtype)
    huge = optimizer_with(exp_avg=torch.tensor([3e38, -3e38]), codes=torch.ones(3, dtype=torch.uint8), empty=torch.zeros(0))
    assert broken_tensor(model, huge) is None
    assert broken_tensor(model, optimizer_with(exp_avg=torch.tensor([0.0, value], dtype=dtype))) == "optimizer.wte.weight.exp_avg"
    model.h[1].mlp.c_fc.weight.data[3, 5] = value
    assert broken_tensor(model, huge) == "h.1.mlp.c_fc.weight"
    assert first_not_finite([("a", torch.ones(2).to(torch.float8_e4m3fn)), ("b", torch.tensor([value]))]) == "b"


def test_optimizers_of_other_makes_are_looked_through_as_well():
    model = build_model(tiny_model_config(), 0)
    adam = torch.optim.AdamW(model.parameters())
    model.loss(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)).backward()
    adam.step()
    assert broken_tensor(model, adam) is None
    adam.state[model.wte.weight]["exp_avg_sq"][0, 0] = math.inf
    assert broken_tensor(model, adam) == "optimizer.0.exp_avg_sq"


def watched(vocab_size=65, best=math.inf):
    """A Health of a run with nothing but a loss."""
    progress = SimpleNamespace(best_val_loss=best, nonfinite_in_a_row=0)
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=vocab_size))
    return Health(model, None, progress, max_nonfinite_steps=10, say=print, remedy=lambda best: "")


def feed(watch, losses):
    """How many of these losses pass before the run is stopped."""
    for count, loss in enumerate(losses):
        try:
            watch.after_update(loss, 1.0, iteration=count + 1, healing=False)
        except Diverged as error:
            assert "above that of guessing" in str(error) and "4.17" in str(error)
            return count
    return len(losses)


def test_a_loss_that_stays_above_guessing_stops_the_run():
    learnt = [4.17, 3.5, 2.5, 2.0]
    assert feed(watched(), learnt + [9.0] * 200) == len(learnt) + health.RUNAWAY_STEPS // 2
    # 时高时低，多半在上面，也是发散
    assert feed(watched(), learnt + [9.0, 9.0, 4.0] * 200) < 100
    # 一步也没学会，从开头就上去
    assert feed(watched(), [4.17] + [9.0] * 200) == 1 + health.RUNAWAY_STEPS // 2
    # 续训：这一程开头就已经很高，但存下的最好值不高
    assert feed(watched(best=2.0), [9.0] * 200) == health.RUNAWAY_STEPS // 2


@pytest.mark.parametrize("losses", [
    [4.17] + [9.0] * 40 + [3.0] * 200,
    [4.17, 4.4, 4.0, 4.5, 4.2] * 100,
    [4.17 + 0.1 * (step % 5) for step in range(300)],
    [8.0 - 0.001 * step for step in range(300)],
    [2.0] * 50 + [4.5] * 300,
], ids=["a spike that comes down", "random data", "a model that learns nothing", "pretrained on another language", "not better than guessing"])
def test_odd_beginnings_and_hard_data_do_not_stop_the_run(losses):
    assert feed(watched(), losses) == len(losses)


def spoil(trainer, at, change):
    """Call change() before iteration `at`."""
    real, done = trainer.step, []

    def step():
        if trainer.progress.iteration == at and not done:
            done.append(change())
        return real()

    trainer.step = step


def test_nothing_broken_is_saved_and_the_line_says_what_and_how_to_go_on(in_tmp, tiny_overrides):
    trainer = new_trainer(tiny_overrides, "max_iters=12")
    spoil(trainer, 4, lambda: trainer.model.lm_head.weight.data[0, 0].fill_(math.nan))
    with pytest.raises(Diverged, match=r"lm_head.weight is not finite.*not saved.*iter_00000003.*resume=outputs/run learning_rate=3.3e-03$"):
        trainer.fit()
    assert [c.iteration for c in checkpoint.checkpoints(in_tmp / "outputs/run")] == [3] and trainer.progress.iteration == 4
    resumed_trainer("outputs/run").fit()


def test_before_anything_was_saved_the_advice_is_to_begin_again(in_tmp, tiny_overrides):
    trainer = new_trainer(tiny_overrides)
    spoil(trainer, 1, lambda: trainer.model.wte.weight.data.fill_(math.inf))
    with pytest.raises(Diverged, match="start again with a lower rate: learning_rate=3.3e-03"):
        trainer.fit()


def test_a_run_that_stops_closes_its_loggers_and_a_logger_cannot_hide_why(in_tmp, tiny_overrides):
    trainer, closed = new_trainer(tiny_overrides), []
    trainer.loggers.close = lambda: closed.append(1) or fail_with(OSError("disk full"))
    spoil(trainer, 1, lambda: trainer.model.wte.weight.data.fill_(math.inf))
    with pytest.raises(Diverged):
        trainer.fit()
    assert closed == [1]


def test_a_run_does_not_start_from_weights_that_are_not_finite(in_tmp, tiny_overrides):
    trainer = new_trainer(tiny_overrides)
    trainer.model.wte.weight.data[2, 3] = math.nan
    with pytest.raises(Diverged, match="wte.weight is not finite.*choose another checkpoint"):
        trainer.step()


def test_a_validation_loss_that_is_not_finite_counts_as_no_evaluation(in_tmp, tiny_overrides, capsys):
    trainer = new_trainer(tiny_overrides, "max_iters=9", "early_stop_evals=1", "keep=9")
    real = trainer.model.loss
    trainer.model.loss = lambda x, y: real(x, y) * (math.nan if trainer.progress.iteration in (6, 9) and not trainer.model.training else 1)
    summary = trainer.fit()
    found = checkpoint.checkpoints(in_tmp / "outputs/run")
    assert [c.val_loss is None for c in found] == [False, True, True] and checkpoint.best_of(found).iteration == 3
    assert summary["best_val_loss"] == found[0].val_loss and summary["val_loss"] is None and summary["iters"] == 9
    assert "NaN" not in (in_tmp / "outputs/run/summary.json").read_text(encoding="utf-8") and "does not count" in capsys.readouterr().out
    line = messages.text(
        "done: val loss {val_loss:.4f} (best {best:.4f}){bits} after {iteration} iterations in {wall}, {speed:.0f} tokens/s",
        val_loss=None, best=None, bits="", iteration=9, wall="0:01", speed=1.0,
    )
    assert line.startswith("done: val loss - (best -) after 9")


def test_a_checkpoint_between_two_evaluations_is_never_the_best(in_tmp, tiny_overrides):
    new_trainer(tiny_overrides, "max_iters=8", "eval_interval=4", "save_interval=2", "keep=9").fit()
    found = checkpoint.checkpoints(in_tmp / "outputs/run")
    # 从前 6 会带着 4 的验证损失，好像评估过似的
    assert [(c.iteration, c.val_loss is not None) for c in found] == [(2, False), (4, True), (6, False), (8, True)]


def test_a_sample_of_logits_that_are_not_finite_is_left_out(in_tmp, tiny_overrides, capsys):
    def fail(*_, **__):
        raise ConfigError("nonfinite_logits")

    trainer = new_trainer(tiny_overrides)
    trainer.write_sample = fail
    assert trainer.fit()["stopped_by"] == "finished" and "no sample is written" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_gradient_whose_norm_overflows_is_skipped_although_its_elements_are_finite(in_tmp, tiny_overrides, precision):
    trainer = new_trainer(tiny_overrides, f"precision.dtype={precision}")
    before = trainer.model.wte.weight.detach().clone()
    # 1e30 的平方放不进 fp32：照用的话，exp_avg_sq 就成了 Inf
    handle = trainer.model.wte.weight.register_hook(lambda g: torch.full_like(g, 1e35 if precision == "fp16" else 1e30))
    trainer.step()
    handle.remove()
    assert torch.equal(trainer.model.wte.weight, before) and trainer.progress.nonfinite_steps == 1
    trainer.step()
    assert broken_tensor(trainer.model, trainer.optimizer) is None


def test_the_loss_scale_never_falls_below_one():
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    lowered = []
    for gradient in (math.inf,) * 5:
        scaler.scale(torch.zeros(()))
        parameter.grad = torch.tensor([gradient])
        scaler.unscale_(optimizer)
        lowered.append(adjust_scale(scaler, skipped=True, overflow=True))
    assert lowered == [True, True, False, False, False] and scaler.get_scale() == 1.0


def test_steps_inside_the_backward_pass_say_that_only_some_parameters_were_left(in_tmp, tiny_overrides, capsys):
    trainer = new_trainer(tiny_overrides, "memory.optimizer_in_backward=true")
    trainer.model.wte.weight.register_hook(lambda g: g * math.nan)
    trainer.step()
    assert "the parameters that it belongs to were left as they are (1 in a row)" in capsys.readouterr().out


# ---- 内存 ----


def test_the_last_short_window_of_an_evaluation_is_tried_again(in_tmp, tiny_overrides):
    trainer = new_trainer(tiny_overrides, "eval_batch_size=4")
    expected, real, failed = trainer.evaluate(), trainer.model.loss, []

    def loss(x, y):
        if x.size(1) < trainer.block_size and not failed:
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(x, y)

    trainer.model.loss = loss
    assert trainer.evaluate() == expected and failed and trainer.eval_batch == 4
    trainer.model.loss = lambda x, y: real(x, y) if x.size(1) == trainer.block_size else fail_with(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(OutOfMemory, match="evaluation with 1 rows"):
        trainer.evaluate()


def fail_with(error):
    raise error


def test_finding_out_which_blocks_fit_may_run_out_of_memory_too(in_tmp, tiny_overrides):
    trainer = new_trainer(tiny_overrides)
    real, asked = trainer.computation.expect, []

    def expect(rows):
        asked.append(rows)
        return real(rows) if rows < 3 else fail_with(torch.OutOfMemoryError("CUDA out of memory"))

    trainer.computation.expect = expect
    trainer.step()
    trainer.step()
    assert asked == [4, 2] and trainer.micro_batch == 2


def test_nothing_is_kept_alive_by_the_error_when_a_step_is_tried_again(in_tmp, tiny_overrides, monkeypatch):
    trainer = new_trainer(tiny_overrides)
    real, held = trainer.model.loss, []

    class Big:
        alive = 0

        def __init__(self):
            Big.alive += 1

        def __del__(self):
            Big.alive -= 1

    def loss(x, y):
        held.append(Big.alive)
        piece = Big()
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        del piece
        return real(x, y)

    trainer.model.loss = loss
    trainer.step()
    assert held == [0, 0, 0]


def test_any_other_place_without_memory_is_one_line(in_tmp, tiny_overrides):
    trainer = new_trainer(tiny_overrides)
    trainer.data.starts = lambda *_, **__: fail_with(MemoryError("Unable to allocate 8.00 GiB for an array"))
    with pytest.raises(OutOfMemory, match="training loop"):
        trainer.fit()
    assert "std::bad_alloc" in str(explained(RuntimeError("std::bad_alloc\nmore"))) and explained(RuntimeError("shape mismatch")) is None


def test_a_trial_that_ran_out_of_memory_anywhere_is_called_so_in_either_language():
    for language in ("en", "zh"):
        messages.set_language(language)
        assert verdict_of(OutOfMemory("update", rows=1, detail="")) == verdict_of(ConfigError("sample_oom")) == "oom"
        assert verdict_of(Diverged(
            "{tensor} is not finite in what this run starts from; choose another checkpoint=… (best, or an older "
            "iter_…) or another init_from",
            tensor="x",
        )) == "diverged" and verdict_of(ConfigError(
            "stop holds an empty string; give at least one character or leave it out",
        )) == "invalid"


def test_double_precision_stays_double_through_the_loss():
    hidden, weight = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True), torch.randn(7, 5, dtype=torch.float64)
    targets = torch.randint(7, (2, 3))
    ours = chunked_cross_entropy(hidden, weight, targets, softcap=0.0, chunk_mib=1)
    plain = torch.nn.functional.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten())
    assert ours.dtype == torch.float64 and abs(ours.item() - plain.item()) < 1e-14


def test_the_progress_of_a_skipped_step_survives_a_resume(in_tmp, tiny_overrides):
    trainer = new_trainer(tiny_overrides)
    real = trainer.model.loss
    trainer.model.loss = lambda x, y: real(x, y) * (math.nan if trainer.progress.iteration == 1 and trainer.model.training else 1)
    trainer.fit()
    again = resumed_trainer("outputs/run", "max_iters=7")
    assert (again.progress.nonfinite_steps, again.progress.iteration, again.progress.samples_seen) == (1, 6, 24)
    rates = [json.loads(line).get("learning_rate") for line in (in_tmp / "outputs/run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    # 跳过的一步也算一次迭代：学习率照日程走
    assert len([rate for rate in rates if rate is not None]) == 6
