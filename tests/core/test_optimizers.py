"""Optimizers and schedules against their references."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import LLAMA_RECIPE, tiny_model_config

from nanogpt.base.config import ROOT, MemoryConfig
from nanogpt.core import kernels
from nanogpt.core.kernels import orthogonalize
from nanogpt.core.memory.lean_optimizers import configure
from nanogpt.core.optimizers import adamw, muon
from nanogpt.core.schedule import learning_rate_at
from nanogpt.weights.build import build_model


def settings(name):
    import yaml

    node = yaml.safe_load((ROOT / "conf" / "optimizer" / f"{name}.yaml").read_text(encoding="utf-8"))
    return {k: float(v) if isinstance(v, str) else v for k, v in node.items() if k != "_target_"}


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def test_adamw_equals_torch_optim():
    ours, reference = build_model(tiny_model_config(norm="layernorm", bias=True), 0), build_model(tiny_model_config(norm="layernorm", bias=True), 0)
    optimizer = adamw(ours, **settings("adamw"))
    named = [p for p in reference.parameters()]
    decay = [{"params": [p for p in named if p.dim() > 1], "weight_decay": 0.1}, {"params": [p for p in named if p.dim() < 2], "weight_decay": 0.0}]
    torch_optimizer = torch.optim.AdamW(decay, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    for step in range(5):
        gradients(ours, step)
        gradients(reference, step)
        optimizer.step()
        torch_optimizer.step()
    for a, b in zip(ours.parameters(), reference.parameters()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 32), (2, 32, 8)])
def test_orthogonalize_keeps_the_singular_vectors_and_flattens_the_values(shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    result = orthogonalize(x, 5)
    inner = u.mT @ result @ v.mT
    values = inner.diagonal(dim1=1, dim2=2)
    assert (inner - torch.diag_embed(values)).abs().max() < 0.05
    # 五步的系数只求快，不求准：奇异值落在 0.6 ~ 1.3 之间，极小的除外
    assert values.max() < 1.35 and values.median() > 0.6


@pytest.mark.parametrize("shape", [(3, 8, 16), (2, 40, 8), (1, 12, 48)])
@pytest.mark.parametrize("steps", [1, 5, 12])
def test_iterating_on_the_gram_matrix_gives_what_iterating_on_the_matrix_gives(monkeypatch, shape, steps):
    """Also where singular values are tiny, and where there are more steps than rounding stands at a stretch."""
    torch.manual_seed(0)
    u, s, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    x = u * torch.logspace(0, -4, s.size(-1)) @ v
    on_x = orthogonalize(x, steps)
    monkeypatch.setattr(kernels, "GRAM_ROWS", 1)
    on_gram = orthogonalize(x, steps)
    # 迭代本身把极小的奇异值放大数百倍，舍入也跟着放大
    torch.testing.assert_close(on_gram, on_x, atol=2e-3, rtol=0)
    assert not torch.equal(on_gram, on_x) or steps == 1


def test_orthogonalize_in_bf16_points_where_float32_does():
    torch.manual_seed(0)
    x = torch.randn(2, 16, 64)
    exact, rough = orthogonalize(x, 5), orthogonalize(x, 5, bf16=True)
    assert rough.dtype == torch.float32 and torch.nn.functional.cosine_similarity(exact.flatten(), rough.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("decades", [1, 4])
def test_the_gram_matrix_in_bf16_is_as_close_to_the_exact_iteration_as_the_plain_one_in_bf16(monkeypatch, decades):
    torch.manual_seed(0)
    u, s, v = torch.linalg.svd(torch.randn(2, 64, 256), full_matrices=False)
    x = u * torch.logspace(0, -decades, s.size(-1)) @ v
    on_gram = orthogonalize(x, 5, bf16=True)
    monkeypatch.setattr(kernels, "GRAM_RATIO", math.inf)
    exact, plain = orthogonalize(x, 5), orthogonalize(x, 5, bf16=True)
    assert not torch.equal(on_gram, plain)
    assert (on_gram - exact).norm() < 1.5 * (plain - exact).norm() + 0.02 * exact.norm()


def test_muon_moves_matrices_by_the_update_of_an_adamw_step():
    model = build_model(tiny_model_config(n_embd=64, n_head=4), 0)
    optimizer = muon(model, **{**settings("muon"), "weight_decay": 0.0})
    before = {n: p.clone() for n, p in model.named_parameters()}
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * group["lr_scale"]
    gradients(model, 0)
    optimizer.step()
    change = model.h[0].mlp.c_fc.weight - before["h.0.mlp.c_fc.weight"]
    assert change.square().mean().sqrt().item() == pytest.approx(0.01 * 0.2, rel=0.35)


@pytest.mark.parametrize("lean", [False, True])
def test_muon_moves_each_of_the_matrices_that_share_a_weight_as_if_it_stood_alone(lean):
    """The rows of q, k and v differ in number with fewer key heads; gate and up share the weight of SwiGLU."""
    model = build_model(tiny_model_config(**LLAMA_RECIPE), 0)
    optimizer = muon(model, **{**settings("muon"), "weight_decay": 0.0, "momentum": 0.0})
    configure(optimizer, MemoryConfig(optimizer_in_backward=lean))
    gradients(model, 0)
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    for weight, sizes in ((model.h[0].attn.c_attn.weight, (16, 8, 8)), (model.h[1].mlp.c_fc.weight, (24, 24))):
        before, parts = weight.detach().clone(), weight.grad.clone().split(sizes)
        alone = [orthogonalize(part[None], 5)[0] * 0.2 * max(part.shape) ** 0.5 for part in parts]
        optimizer.step()
        torch.testing.assert_close(before - weight, torch.cat(alone), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("factory", "name"), [(adamw, "adamw"), (muon, "muon")])
def test_state_round_trips_and_goes_on_equally(tmp_path, factory, name):
    models = [build_model(tiny_model_config(), 0) for _ in range(2)]
    one, two = (factory(model, **settings(name)) for model in models)
    for optimizer in (one, two):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
    for step in range(3):
        gradients(models[0], step)
        one.step()
    torch.save(one.state_dict(), tmp_path / "o.pt")
    models[1].load_state_dict(models[0].state_dict())
    two.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True))
    for step in range(3, 5):
        for model, optimizer in zip(models, (one, two)):
            gradients(model, step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters()))


def test_state_of_another_model_is_refused():
    optimizer = adamw(build_model(tiny_model_config(), 0), **settings("adamw"))
    with pytest.raises(ValueError, match="other parameters"):
        optimizer.load_state_dict({"state": {"h.9.attn.c_attn.weight": {}}})


@pytest.mark.parametrize("bad", [{"beta1": 1.0}, {"momentum": -0.1}, {"ns_steps": 0}, {"weight_decay": -1}])
def test_bad_settings_name_their_key(bad):
    key = next(iter(bad))
    with pytest.raises(ValueError, match=f"optimizer.{key}="):
        muon(build_model(tiny_model_config(), 0), **{**settings("muon"), **bad})


def schedule(kind, **changes):
    return SimpleNamespace(**{"learning_rate": 1.0, "min_lr": 0.1, "warmup_iters": 10, "lr_decay_iters": 110, "lr_schedule": kind, "decay_fraction": 0.2, **changes})


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_warm_up_rises_linearly_to_the_peak_and_nothing_exceeds_it(kind):
    rates = [learning_rate_at(i, schedule(kind)) for i in range(150)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)]) and max(rates) == 1.0 and min(rates) >= 0.1
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == (1.0 if kind == "constant" else 0.1)


def test_each_schedule_has_its_shape():
    assert learning_rate_at(60, schedule("cosine")) == pytest.approx(0.1 + 0.9 * 0.5)
    assert learning_rate_at(35, schedule("cosine")) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert learning_rate_at(85, schedule("linear")) == pytest.approx(0.1 + 0.9 * 0.25)
    assert learning_rate_at(87, schedule("wsd")) == 1.0 and learning_rate_at(99, schedule("wsd")) == pytest.approx(0.55)


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_a_schedule_over_a_share_of_the_budget_has_the_shape_of_one_over_iterations(kind):
    by_share, by_step = (schedule(kind, warmup_iters=0, lr_decay_iters=end) for end in (None, 100))
    for i in range(101):
        assert learning_rate_at(i, by_share, i / 100) == pytest.approx(learning_rate_at(i, by_step))
    # 预热数步数，却至多占预算的 2%：步子慢的机器也走得完
    warming = schedule(kind, warmup_iters=10, lr_decay_iters=None)
    assert learning_rate_at(0, warming, 0.0) == pytest.approx(0.1) and learning_rate_at(4, warming, 0.01) == pytest.approx(
        0.5 * learning_rate_at(4, by_share, 0.01))
    assert learning_rate_at(1, warming, 0.02) == learning_rate_at(1, by_share, 0.02)


def test_no_warm_up_starts_at_the_peak():
    assert learning_rate_at(0, schedule("cosine", warmup_iters=0)) == 1.0
