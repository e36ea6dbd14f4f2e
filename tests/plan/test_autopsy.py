"""Out of memory where nothing can be divided further: one screen, and nothing lost."""

import re

import pytest
import torch
from conftest import make_config, new_session, new_trainer

from nanogpt.base import language as messages
from nanogpt.base.console import Console
from nanogpt.base.errors import OutOfMemory
from nanogpt.base.language import ConfigError
from nanogpt.core.model import GPT
from nanogpt.plan import autopsy
from nanogpt.weights import checkpoint

CUDA_SAYS = (
    "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 12.00 GiB of which 512.00 MiB is free. "
    "Including non-PyTorch memory, this process has 11.20 GiB memory in use."
)


@pytest.mark.parametrize(("detail", "expected"), [
    (CUDA_SAYS, (1.5, 0.5)),
    ("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 1073741824 bytes.", (1.0, None)),
    ("cuBLAS: CUBLAS_STATUS_ALLOC_FAILED", (None, None)),
])
def test_what_was_wanted_is_read_from_the_message(detail, expected):
    assert autopsy.wanted_and_free(detail) == expected


# 两层就够：每多一层，每次追踪都更久
TINY_PLAN = ("model=tiny", "model.vocab_size=2000", "model.n_layer=2", "arch=gpt2", "batch_size=4", "optimizer=adamw")


def screen(capsys, *overrides, detail=CUDA_SAYS, rows=1, language="en", resume=("resume=outputs/run",)):
    messages.set_language(language)
    cfg = make_config(*TINY_PLAN, *overrides)
    autopsy.show(OutOfMemory("forward", rows=rows, detail=detail), cfg, Console(), resume=resume)
    return capsys.readouterr().out


def test_the_screen_names_the_part_the_amount_and_one_override_that_fits(capsys):
    card = ["hardware=rtx3060_8gb", "hardware.vram_gib=0.3", "hardware.context_gib=0.1", "hardware.desktop_gib=0", "model.block_size=512", "model.n_layer=4"]
    out = screen(capsys, *card, rows=4)
    assert "asked for 1.50 GiB more while 0.50 GiB were free" in out and "largest part: activations" in out
    assert re.search(r"predicted peak 0\.\d\d GiB, budget 0\.30 GiB: 0\.\d\d GiB too much", out)
    command = re.search(r"run_train.py resume=outputs/run (\S+=.*)", out)[1]
    # 照着加上，预测就放得下
    from nanogpt.plan.plan import predict

    again = make_config(*TINY_PLAN, *card, *command.split())
    assert predict(again).verdict == "fits"
    chinese = screen(capsys, *card, rows=4, language="zh")
    assert "占得最多的部分：激活" in chinese and f"resume=outputs/run {command}" in chinese


def test_a_failure_that_the_plan_did_not_expect_points_at_other_programs(capsys):
    out = screen(capsys, "hardware=rtx3060_12gb", resume=())
    assert "it should fit; other programs seem to hold memory" in out


def test_a_model_that_cannot_be_traced_still_gets_advice(capsys, monkeypatch):
    def fail(*_):
        raise ConfigError(
            "model._target_={target} cannot be planned ({reason}); its step may not depend on values: measure it with "
            "a small batch_size instead",
            target="mine.Model", reason="RuntimeError: value needed",
        )

    monkeypatch.setattr(autopsy, "_planned", fail)
    out = screen(capsys)
    assert "no prediction for this model" in out and "memory=lean" in out


def raising(error):
    def raise_it(*_, **__):
        raise error

    return raise_it


@pytest.fixture
def quick_screen(monkeypatch):
    """The screen without its plan, which has tests of its own."""
    monkeypatch.setattr(autopsy, "_planned", raising(ConfigError(
        "model._target_={target} cannot be planned ({reason}); its step may not depend on values: measure it with a "
        "small batch_size instead",
        target="-", reason="-",
    )))


def test_a_run_that_cannot_go_on_shows_the_screen_and_keeps_its_checkpoint(in_tmp, tiny_overrides, capsys, monkeypatch, quick_screen):
    session = new_session([*tiny_overrides, "batch_size=1", "eval_interval=2", "max_iters=4"])
    real, calls = GPT.loss, []

    def loss(self, x, y):
        calls.append(self.training)
        if sum(calls) > 3 and self.training:
            raise torch.OutOfMemoryError(CUDA_SAYS)
        return real(self, x, y)

    monkeypatch.setattr(GPT, "loss", loss)
    with pytest.raises(OutOfMemory, match="forward or backward pass with 1 rows"):
        session.run()
    assert "asked for 1.50 GiB more" in capsys.readouterr().out
    assert checkpoint.find(in_tmp / "outputs/run", "last").iteration == 2


@pytest.mark.parametrize(("where", "phase"), [("prepare", "optimizer's update"), ("update", "optimizer's update")])
def test_out_of_memory_in_the_optimizer_is_said_and_not_repeated(in_tmp, tiny_overrides, where, phase):
    run = new_trainer(tiny_overrides)
    setattr(run.computation, where, raising(torch.OutOfMemoryError(CUDA_SAYS)))
    with pytest.raises(OutOfMemory, match=phase):
        run.step()
    assert run.progress.iteration == 0


def test_out_of_memory_in_the_evaluation_of_one_row_is_said(in_tmp, tiny_overrides):
    run = new_trainer([*tiny_overrides, "eval_batch_size=2"])
    run.model.loss = raising(torch.OutOfMemoryError(CUDA_SAYS))
    with pytest.raises(OutOfMemory, match="evaluation with 1 rows"):
        run.evaluate()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(CUDA_SAYS), ConfigError("sample_oom"), MemoryError()])
def test_a_sample_without_memory_is_left_out_and_training_goes_on(in_tmp, tiny_overrides, capsys, error):
    run = new_trainer(tiny_overrides)
    run.write_sample = raising(error)
    assert run.fit()["stopped_by"] == "finished" and "not enough memory to write a sample" in capsys.readouterr().out


def test_a_save_without_memory_is_survived_and_the_last_one_is_not(in_tmp, tiny_overrides, capsys, monkeypatch):
    real, calls = checkpoint.save, []

    def save(*arguments, **settings):
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError(CUDA_SAYS)
        return real(*arguments, **settings)

    monkeypatch.setattr(checkpoint, "save", save)
    new_trainer(tiny_overrides).fit()
    assert "CUDA out of memory" in capsys.readouterr().out and checkpoint.find(in_tmp / "outputs/run", "last").iteration == 6
    monkeypatch.setattr(checkpoint, "save", raising(MemoryError("no memory")))
    with pytest.raises(ConfigError, match="no memory"):
        new_trainer(tiny_overrides, out="outputs/other").fit()


def test_other_errors_are_passed_on_unchanged(in_tmp, tiny_overrides):
    run = new_trainer(tiny_overrides)
    run.computation.update = raising(RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        run.step()
