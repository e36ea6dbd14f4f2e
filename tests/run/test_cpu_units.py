"""What precision=auto makes of a CPU's bf16 units; nothing here depends on the machine."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_config, resume, train

from nanogpt.plan.plan import predict
from nanogpt.run import cpu_units
from nanogpt.run.rundir import resumed_config

SHAPE = ("model.n_layer=2", "model.n_head=2", "model.n_embd=16", "model.block_size=512", "model.ngrams=[]")


@pytest.fixture
def gains(monkeypatch):
    """Set what is measured."""
    def set_gains(products, training):
        monkeypatch.setattr(cpu_units, "LEAST_WIDTH", 1)
        monkeypatch.setattr(cpu_units, "gain_of_products", lambda: products)
        monkeypatch.setattr(cpu_units, "gain_of_training", lambda model: training)

    return set_gains


@pytest.mark.parametrize(("dtype", "products", "training", "units", "said"), [
    ("auto", 0.07, 9.0, "none", "fp32; bf16 products run at 0.07 of its speed"), ("auto", 2.3, 1.6, "all", "bf16, 1.60x as fast"),
    ("auto", 2.3, 1.05, "optimizer", "fp32; bf16, 1.05x as fast here, is for Muon"), ("bf16", 2.3, 1.05, "all", None), ("bf16", 0.07, 1.0, "none", None),
    ("fp32", 2.3, 1.6, "auto", None), ("fp16", 2.3, 1.6, "auto", None),
])
def test_bf16_is_taken_where_it_clearly_pays(gains, dtype, products, training, units, said):
    gains(products, training)
    cfg = make_config(f"precision={dtype}")
    found = cpu_units.settled(cfg.precision, cfg.model, "cpu")
    assert found.cpu_bf16 == units and cfg.precision.cpu_bf16 == "auto"
    assert cpu_units.settled(found, cfg.model, "cpu") is found and cpu_units.settled(cfg.precision, cfg.model, "cuda") is cfg.precision
    why = cpu_units.reason(found, cfg.model)
    assert why is None if said is None else said in why


def test_a_model_too_narrow_for_its_products_is_not_measured(gains, monkeypatch):
    gains(2.3, 1.6)
    monkeypatch.setattr(cpu_units, "LEAST_WIDTH", 128)
    cfg = make_config("model.n_embd=64", "model.n_head=4")
    assert cpu_units.settled(cfg.precision, cfg.model, "cpu").cpu_bf16 == "none"


def test_a_gain_is_measured_once_on_a_machine_and_for_each_shape(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOGPT_CACHE", str(tmp_path))
    measured = []
    monkeypatch.setattr(cpu_units, "time_layer", lambda layer: measured.append(layer.n_embd) or 1.25)
    for width in (128, 256, 128, 256):
        # 像是另一个进程
        monkeypatch.setattr(cpu_units, "_known", {})
        assert cpu_units.gain_of_training(make_config(f"model.n_embd={width}").model) == 1.25
    assert measured == [128, 256]
    kept = json.loads((tmp_path / cpu_units.FILE).read_text(encoding="utf-8"))
    assert all(torch.__version__ in key and f"{torch.get_num_threads()} threads" in key for key in kept) and len(kept) == 2


def test_one_layer_is_timed_without_touching_the_random_numbers(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOGPT_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu_units, "ROUNDS", 1)
    before = torch.get_rng_state()
    assert cpu_units.gain_of_training(make_config(*SHAPE, "dropout=0.1").model) > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_keeps_the_format_it_began_with(in_tmp, tiny_overrides, gains):
    """Whatever a later measurement says, and bit for bit."""
    gains(2.3, 1.6)
    whole = train(tiny_overrides, out="whole")
    train(tiny_overrides, "max_iters=3", "lr_decay_iters=6", out="part")
    gains(0.07, 1.0)
    resumed = resume("part", "max_iters=6")._build()
    resumed.fit()
    assert whole.precision.label == resumed.precision.label == "bf16"
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_of_before_bf16_units_were_used_goes_on_as_it_was(own_run, gains):
    gains(2.3, 1.6)
    saved = (own_run / "outputs/run/config.yaml").read_text(encoding="utf-8")
    older = yaml.safe_load(saved)
    del older["precision"]["cpu_bf16"]
    typed = make_config("resume=outputs/run")
    assert resumed_config(yaml.safe_dump(older), typed, [], Path("config.yaml")).precision.cpu_bf16 == "none"
    # 这次写明的，照这次的来
    assert resumed_config(saved, typed, ["precision=auto"], Path("config.yaml")).precision.cpu_bf16 == "auto"


def test_a_plan_takes_the_format_that_the_training_will_take(gains):
    gains(2.3, 1.6)
    cfg = make_config(*SHAPE, "model.vocab_size=11", "device=cpu", "batch_size=2")
    plan = predict(cfg)
    assert plan.precision == "bfloat16" and plan.rates.half_flops == pytest.approx(2.3 * plan.rates.fp32_flops)
    assert cfg.precision.cpu_bf16 == "auto"
