"""Optimizers and schedules against their references."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import LLAMA_RECIPE, make_config, tiny_model_config

import nanogpt
from nanogpt.base.config import ROOT, MemoryConfig
from nanogpt.base.language import ConfigError
from nanogpt.core import kernels
from nanogpt.core.kernels import orthogonalize
from nanogpt.core.memory.lean_optimizers import configure
from nanogpt.core.memory.lowbit import PIECE
from nanogpt.core.optimizers import ADAMW_STATES, adamw, muon
from nanogpt.core.precision import Precision
from nanogpt.core.schedule import learning_rate_at
from nanogpt.core.tables import RowGradient, look_up, row_gradient
from nanogpt.weights.build import build_model, build_step, check_trained


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


TABLES = {"ngrams": [2, 3], "ngram_buckets": 97}


def with_tables(**memory):
    """A model with n-gram tables, and Muon for it."""
    model = build_model(tiny_model_config(**TABLES), 0)
    optimizer = muon(model, **settings("muon"))
    configure(optimizer, MemoryConfig(**memory))
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    return model, optimizer, model.ngrams[1].table.weight


def test_a_row_of_a_table_moves_against_its_gradient_over_the_root_of_its_mean_square_and_without_one_not_at_all():
    model, optimizer, table = with_tables()
    squares, expected = torch.zeros(len(table)), table.detach().double()
    for step in range(4):
        gradients(model, step)
        table.grad[3 + step :] = 0
        grad = table.grad.double()
        used = grad.square().sum(1) > 0
        squares[used] = (0.95 * squares[used] + 0.05 * grad.square().mean(1)[used]).float()
        rate = 1e-2 / ((squares.double() / (1 - 0.95 ** (step + 1))).sqrt() + 1e-10)
        expected[used] -= (grad * rate[:, None])[used]
        optimizer.step()
    torch.testing.assert_close(table.detach().double(), expected, rtol=1e-5, atol=1e-6)
    assert [t.shape for t in optimizer.state["ngrams.1.table.weight"].values()] == [(), (97, 1)]


def test_a_step_that_is_skipped_changes_no_table_even_if_its_gradient_is_nan():
    model, optimizer, table = with_tables()
    gradients(model, 0)
    optimizer.step()
    before = [t.clone() for t in (table, *optimizer.state["ngrams.1.table.weight"].values())]
    gradients(model, 1)
    table.grad[5] = math.nan
    optimizer.step(skip=torch.ones(()))
    assert all(map(torch.equal, before, (table, *optimizer.state["ngrams.1.table.weight"].values())))


@pytest.mark.parametrize("memory", [{"optimizer_in_backward": True}, {"optimizer_state": "int8"}])
def test_tables_move_alike_however_the_optimizer_stores_what_it_keeps(monkeypatch, memory):
    # 一块只装得下几行
    monkeypatch.setitem(PIECE, "cpu", 256)
    (plain, one, a), (lean, two, b) = with_tables(), with_tables(**memory)
    for step in range(3):
        gradients(plain, step)
        gradients(lean, step)
        one.step()
        two.step(factor=torch.ones(()))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("memory", [{}, {"optimizer_state": "int8"}])
def test_a_checkpoint_whose_tables_adamw_trained_goes_on_with_their_mean_squares(memory):
    model, _, table = with_tables()
    old = muon(model, **settings("muon"))
    for group in old.param_groups:
        group["lr"] = 1e-2
        if group["rule"] == "rows":
            group |= {"rule": "adamw", "states": ADAMW_STATES}
    configure(old, MemoryConfig(**memory))
    gradients(model, 0)
    table.grad[7:] = 0
    squares = 0.05 * table.grad.square().mean(1, keepdim=True)
    old.step()
    _, optimizer, _ = with_tables(**memory)
    optimizer.load_state_dict(old.state_dict())
    state = optimizer.state["ngrams.1.table.weight"]
    assert set(state) == {"step", "row_avg_sq"} and state["step"] == 1
    torch.testing.assert_close(state["row_avg_sq"], squares, rtol=0.05 if memory else 1e-6, atol=1e-4 if memory else 1e-9)


def test_going_through_the_touched_rows_alone_gives_what_going_through_the_tables_gives():
    """With gradients that are clipped and two micro-batches in a step, of which rows are read more than once."""
    def trained(by_rows):
        # 步子都是 1e-2：30 倍的步子也把求和次序之差放大 30 倍
        cfg = make_config(
            "model.ngrams=[2,3]", "model.ngram_buckets=997", "batch_size=4", "model.block_size=16", "model.vocab_size=30",
            "optimizer.embedding_lr_scale=1",
        )
        model = build_model(cfg.model, 0).train()
        step = build_step(cfg, model, Precision(cfg.precision, torch.device("cpu")))
        tables = [part.table.weight for part in model.ngrams]
        assert all(hasattr(table, "row_gradient") for table in tables)
        for table in () if by_rows else tables:
            del table.row_gradient
        for group in step.optimizer.param_groups:
            group["lr"] = 1e-2 * group["lr_scale"]
        norms, generator = [], torch.Generator().manual_seed(0)
        for number in range(5):
            micro_batches = [torch.randint(30, (2, 4, 16), generator=generator) for _ in range(2)]
            loss = sum(step.micro_batch(x, y, 0.5) for x, y in micro_batches)
            assert not by_rows or all(row_gradient(table) for table in tables)
            norms.append(step.finish(loss, 0.05, late=number % 2 == 1)[0].read()[1])
            assert all(p.grad is None for p in model.parameters())
        return norms, [p.detach() for p in model.parameters()]

    (norms, weights), (wanted, others) = trained(True), trained(False)
    assert min(norms) > 0.1 and norms == pytest.approx(wanted, rel=1e-5)
    torch.testing.assert_close(weights, others, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("looked_up_first", [True, False])
def test_a_table_that_is_also_read_in_the_ordinary_way_keeps_nothing_of_the_step_before(looked_up_first):
    table = torch.nn.Embedding(40, 3)
    reference = torch.nn.Embedding.from_pretrained(table.weight.detach().clone(), freeze=False)
    table.weight.row_gradient = RowGradient()
    generator = torch.Generator().manual_seed(0)
    for number in range(4):
        first, second = torch.randint(40, (2, 5), generator=generator)
        for one, rows in ((table, look_up), (reference, torch.nn.Embedding.__call__)):
            one.weight.grad = None
            losses = [rows(one, first).square().sum(), *([one(second).pow(3).sum()] if number < 2 else [])]
            for loss in losses if looked_up_first else losses[::-1]:
                loss.backward()
        torch.testing.assert_close(table.weight.grad, reference.weight.grad)
        assert bool(row_gradient(table.weight)) == (number >= 2)


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


def test_an_optimizer_that_holds_none_of_the_models_parameters_is_refused_and_what_one_leaves_out_is_said(capsys):
    model = nanogpt.GPT(tiny_model_config())
    with pytest.raises(ConfigError, match="optimizer=SGD holds none of the model's parameters"):
        check_trained(torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))]), model)
    check_trained(torch.optim.SGD(model.parameters()), model)
    assert not capsys.readouterr().err
    check_trained(torch.optim.SGD(model.h.parameters()), model)
    assert "leaves out 2 of the model's 10 parameters, wte.weight among them" in " ".join(capsys.readouterr().err.split())
    # 冻住的本来就不训练
    for p in (model.wte.weight, model.lm_head.weight):
        p.requires_grad_(False)
    check_trained(torch.optim.SGD(model.h.parameters()), model)
    assert not capsys.readouterr().err
