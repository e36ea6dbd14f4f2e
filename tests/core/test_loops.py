"""The compiled loops of a CPU's training step: the same numbers as PyTorch's operations, and the same every time."""

import math

import numpy as np
import pytest
import torch
from conftest import new_trainer, resumed_trainer, tiny, tiny_model_config, train
from test_memory_parts import after_steps, step_of

from nanogpt.core import compilation, kernels
from nanogpt.core.model import MLP
from nanogpt.core.optimizers import Optimizer
from nanogpt.core.tables import look_up
from nanogpt.weights.build import build_model

pytest.importorskip("numba")

from nanogpt.core.loops import team, training, updates
from nanogpt.core.loops.numbers import rounded
from nanogpt.core.loops.updates import Rows

BF16, FLOAT32 = torch.bfloat16, torch.float32


@pytest.fixture(params=["alone", "openmp", "crew"])
def ways(request, monkeypatch):
    """One thread, PyTorch's own, or those of a pool where PyTorch's cannot be had; also for a handful of numbers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if request.param == "alone" else 3)
    monkeypatch.setattr(team, "ALONE", 1)
    if request.param == "crew":
        monkeypatch.setattr(team, "_gnu_openmp", lambda: None)
        monkeypatch.setattr(team, "threads", lambda: 3)
    yield request.param
    torch.set_num_threads(before)


def close(one, other, dtype):
    torch.testing.assert_close(one, other, rtol=2**-7 if dtype == BF16 else 1e-5, atol=2**-7 if dtype == BF16 else 1e-5)


def looped(step):
    """The step with loops everywhere."""
    training.use_loops(step.model)
    assert updates.use_loops(step.optimizer)
    return step


@pytest.mark.parametrize("dtype", [BF16, FLOAT32])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 40, 96)])
def test_a_norm_is_that_of_pytorchs_operations(ways, dtype, shape):
    x, grad = torch.randn(shape), torch.randn(shape).to(dtype)
    with torch.autocast("cpu", BF16, enabled=dtype == BF16):
        ours, theirs = (x.clone().requires_grad_() for _ in range(2))
        y, wanted = training.rounded_norm(ours, None, 1e-3), kernels.rms_norm(theirs, None, 1e-3).to(dtype)
    assert y.dtype == dtype
    close(y, wanted, dtype)
    y.backward(grad)
    wanted.backward(grad)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=2e-2 if dtype == BF16 else 1e-5, atol=2e-2 if dtype == BF16 else 1e-5)


@pytest.mark.parametrize("dtype", [BF16, FLOAT32])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("rotated", [True, False])
def test_q_and_k_are_normalised_and_rotated_as_by_pytorchs_operations(ways, dtype, norm, rotated):
    B, T, heads, size = 2, 7, 3, 6
    qkv = torch.randn(B, T, 3, heads, size).to(dtype)
    rope = tuple(torch.randn(T, 1, 1, size) for _ in range(2)) if rotated else None
    plain, ours = (kind(1e-3 if norm else None, rope) for kind in (kernels.Arrangement, training.Arrangement))
    (packed, kept), (wanted, theirs) = ours.pack((qkv,)), plain.pack((qkv,))
    close(packed, wanted, dtype)
    grads = torch.randn(packed.shape).to(dtype)
    close(ours.unpack(grads.clone(), B, kept), plain.unpack(grads, B, theirs), dtype)


def test_parts_that_come_apart_and_double_precision_go_the_plain_way():
    parts = torch.randn(2, 7, 3, 2, 4, dtype=torch.float64).split((2, 1), dim=2)
    # 最后一种：head 的大小是奇数，分不成两半
    for some in (parts, (torch.cat(parts, dim=2),), (torch.randn(2, 7, 3, 2, 5),)):
        (ours, _), (plain, _) = (kind(1e-3, None).pack(some) for kind in (training.Arrangement, kernels.Arrangement))
        assert ours.dtype == some[0].dtype and torch.equal(ours, plain)
    for ours in (training.rms_norm, *training.ACTIVATIONS.values(), lambda x: training.dropout(x, 0.5)):
        assert ours(parts[0]).dtype == torch.float64


def test_a_norm_with_a_gain_is_not_rounded_before_it():
    x, gain = torch.randn(3, 4), torch.randn(4)
    with torch.autocast("cpu", BF16):
        for ours in (training.rms_norm, training.rounded_norm):
            torch.testing.assert_close(ours(x, gain), kernels.rms_norm(x, gain))
            assert ours(x).dtype == (BF16 if ours is training.rounded_norm else FLOAT32)


@pytest.mark.parametrize("dtype", [BF16, FLOAT32])
@pytest.mark.parametrize("name", training.ACTIVATIONS)
def test_an_activation_is_as_near_to_the_truth_as_pytorchs_operations(ways, dtype, name):
    plain = kernels.ACTIVATIONS[name]
    x = 5 * torch.randn(3, 2**14 + 6)
    x[0, :6] = torch.tensor([0.0, -0.0, 1e4, -1e4, 1e-30, math.nan])
    x = x.to(dtype)
    grad = torch.randn(plain(x).shape).to(dtype)

    def of(function, dtype):
        one = x.clone().to(dtype).requires_grad_()
        (y := function(one)).backward(grad.to(dtype))
        return y.detach().double(), one.grad.double()

    for ours, theirs, true in zip(of(training.ACTIVATIONS[name], dtype), of(plain, dtype), of(plain, torch.float64), strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        there = ~theirs.isnan()
        most = (theirs - true)[there].abs().max()
        assert (ours - true)[there].abs().max() <= 1.5 * most + 1e-5


@pytest.mark.parametrize("dtype", [BF16, FLOAT32])
def test_a_dropout_drops_what_pytorchs_operations_drop(ways, dtype):
    x, grad = (torch.randn(3, 2**14 + 5).to(dtype) for _ in range(2))
    x[0, 0] = math.nan
    results = []
    for function in (training.dropout, kernels.dropout):
        torch.manual_seed(0)
        one = x.clone().requires_grad_()
        y = function(one, 0.3)
        y.backward(grad)
        results.append((y.detach(), one.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@team.TeamKernel
def _copy(job):
    for _ in team.pieces(job):
        x, y = team.floats(job, 1, 0, team.number(job, 0)), team.row(job, 2, 0, team.number(job, 0))
        for i in range(team.number(job, 0)):
            y[i] = rounded(job, x[i])


def test_every_float_is_rounded_to_bf16_as_pytorch_rounds_it():
    generator = torch.Generator().manual_seed(0)
    every = torch.arange(2**16).short().int() << 16
    # 全部的 bf16、它们之后的半处与半处上下一点，再加随便的
    bits = torch.cat([every, *(every + half for half in (0x7FFF, 0x8000, 0x8001)), torch.randint(-(2**31), 2**31, (2**17,), generator=generator).int()])
    x, y = bits.view(FLOAT32), torch.empty(len(bits), dtype=BF16)
    _copy(BF16, len(x), 1, len(x), x, y)
    wanted = x.bfloat16()
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y.view(torch.int16)[~x.isnan()], wanted.view(torch.int16)[~x.isnan()])


@pytest.mark.parametrize("overrides", [
    (), ("dropout=0.2",), ("optimizer=adamw",), ("arch=gpt2",), ("model.tie_embeddings=true",), ("arch=llama",),
    ("model.activation=swiglu",), ("model.norm=layernorm",), ("model.position=learned",), ("model.ngrams=[]",),
])
def test_a_training_is_that_of_pytorchs_operations(ways, overrides):
    ours, theirs = (step_of(*overrides)[1] for _ in range(2))
    training.use_loops(ours.model)
    updates.use_loops(ours.optimizer)
    (weights, states), (wanted, others) = after_steps(ours, 4), after_steps(theirs, 4)
    torch.testing.assert_close(weights, wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(states, others, rtol=1e-3, atol=1e-5)


def test_rows_read_more_than_once_gradients_that_are_clipped_and_steps_that_are_not_finite(ways):
    def trained(loops):
        _, step = step_of("model.ngrams=[2,3]", "model.ngram_buckets=997")
        if loops:
            looped(step)
        norms, generator = [], torch.Generator().manual_seed(0)
        for number in range(6):
            x, y = torch.randint(30, (2, 4, 16), generator=generator)
            loss = sum(step.micro_batch(one, y, 0.5) for one in (x, x % 3))
            norms.append(step.finish(loss * (math.nan if number == 3 else 1), 0.05, late=number % 2 == 1)[0].read()[1])
        return norms, [p.detach() for p in step.parameters]

    (norms, weights), (wanted, others) = trained(True), trained(False)
    assert norms == pytest.approx(wanted, rel=1e-5)
    torch.testing.assert_close(weights, others, rtol=1e-3, atol=1e-4)


def test_an_update_leaves_no_gradient_behind_and_tells_pytorch_that_it_has_written():
    step = looped(step_of()[1])
    tables = [part.table.weight for part in step.model.ngrams]
    assert tables and all(isinstance(table.row_gradient, Rows) for table in tables)
    for _ in range(3):
        # PyTorch 自己融合的 AdamW（输出层）不说，不算在内
        before = {p: p._version for p in step.parameters if p is not step.model.lm_head.weight}
        idx = torch.randint(30, (4, step.model.config.block_size))
        step.micro_batch(idx, idx, 1.0)
        step.update()
        assert all(p._version > old for p, old in before.items())
        assert all(table.row_gradient.sum.count_nonzero() == 0 for table in tables)


@pytest.mark.parametrize("ids", [
    torch.tensor(5).expand(4, 4), torch.tensor([[1, 7], [1, 2]], dtype=torch.int32), torch.arange(16).view(4, 4).T,
])
def test_ids_of_any_strides_and_of_32_bits_are_looked_up(ids):
    looped, plain = (torch.nn.Embedding(40, 3) for _ in range(2))
    looped.load_state_dict(plain.state_dict())
    looped.weight.row_gradient = rows = Rows()
    look_up(looped, ids).pow(3).sum().backward()
    plain(ids).pow(3).sum().backward()
    torch.testing.assert_close(looped.weight.grad, plain.weight.grad)
    torch.testing.assert_close(rows.once()[0], plain.weight.grad.norm())


def test_a_table_that_others_write_to_as_well_is_gone_through_whole():
    table = torch.nn.Embedding(40, 3)
    table.weight.row_gradient = rows = Rows()
    ids = torch.randint(40, (2, 5))
    (look_up(table, ids).square().sum() + table(ids).pow(3).sum()).backward()
    assert not rows.few
    rows.add_rows(other := torch.zeros(40, 3), ids.flatten(), torch.ones(10, 3))
    assert other.sum() == 30


@pytest.fixture
def short(corpus_folder, monkeypatch):
    """What a short training is typed with whose loops are taken all the same."""
    monkeypatch.setattr(compilation, "LEAST_STEPS", 1)
    return [*tiny(corpus_folder), "sample_tokens=0", "lr_decay_iters=6"]


@pytest.mark.parametrize("settings", [
    (), ("precision.cpu_bf16=all", "dropout=0.1"), ("memory.activation_checkpointing=every_block",),
    ("memory.optimizer_in_backward=true", "grad_clip=1e9"), ("batch_size=3", "gradient_accumulation_steps=2"),
])
def test_the_same_seed_gives_the_same_weights_also_across_a_resume(in_tmp, short, settings):
    def of(trainer):
        assert trainer.loops
        return [p.detach() for p in trainer.model.parameters()]

    typed = [*short, *settings]
    one, two = (of(train(typed, out=name)) for name in ("one", "two"))
    train(typed, "max_iters=3", out="half")
    half = resumed_trainer("half", "max_iters=6")
    half.fit()
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(one, two, of(half), strict=True))


class OwnMLP(MLP):
    def __init__(self, config):
        super().__init__(config)
        self.activations = {"relu2": torch.sin}


class BareMLP(MLP):
    def __init__(self, config):
        torch.nn.Module.__init__(self)
        self.only = torch.nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x):
        # 加进一个与输入同类型的张量：输入变成 bf16，这里就加不上 float32 的
        return torch.zeros_like(x).index_add_(0, torch.arange(len(x)), self.only(x).float())


class OwnDropout(kernels.Dropout):
    def dropout(self, x, p):
        return x


def test_what_a_user_has_made_otherwise_stays_as_it_is():
    model = build_model(tiny_model_config(n_layer=3, dropout=0.5), 0)
    plain, own = model.h[2].mlp, OwnMLP(model.config)
    model.h[0].mlp, model.h[1].mlp = own, BareMLP(model.config)
    model.drop = OwnDropout(0.5)
    model.h[2].ln_1.register_forward_hook(lambda *_: None)
    training.use_loops(model)
    assert own.activations["relu2"] is torch.sin and plain.activations["relu2"] is training.squared_relu
    assert model.drop.dropout(1, 0.5) == 1 and plain.dropout.dropout is training.dropout
    first, second = ([norm.rms_norm is training.rounded_norm for norm in norms] for norms in zip(*((b.ln_1, b.ln_2) for b in model.h)))
    assert (first, second) == ([True, True, False], [False, False, True])
    idx = torch.randint(model.config.vocab_size, (2, 8))
    with torch.autocast("cpu", BF16):
        assert model.hidden(idx).dtype == FLOAT32
        model.loss(idx, idx).backward()

    class Other(Optimizer):
        def directions(self, group, named, ahead):
            return super().directions(group, named, ahead)

    groups = [{"params": list(model.parameters()), "rule": "muon"}]
    changed = Optimizer(groups)
    changed.directions = lambda *_: None
    assert not updates.use_loops(Other(groups)) and not updates.use_loops(changed)


def test_what_cannot_be_differentiated_twice_says_so():
    x = torch.randn(3, 4, requires_grad=True)
    for function in (training.rms_norm, *training.ACTIVATIONS.values(), lambda x: training.dropout(x, 0.5)):
        with pytest.raises(RuntimeError, match="cannot be differentiated twice: train with compile=false"):
            torch.autograd.grad(function(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_table_laid_out_otherwise_is_trained_as_well(ways, when):
    found = []
    for loops in (True, False):
        step = step_of()[1]
        table = step.model.wte.weight
        for now in ("before", "after"):
            if when == now:
                table.data = table.data.T.contiguous().T
            if loops and now == "before":
                looped(step)
        found.append(after_steps(step)[0])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_rates_of_any_type(ways):
    found = []
    for rate in (0.01, np.float32(0.01), torch.tensor(0.01)):
        step = looped(step_of()[1])
        for group in step.optimizer.param_groups:
            group["lr"] = rate
        found.append(after_steps(step)[0])
    for other in found[1:]:
        torch.testing.assert_close(found[0], other)
    plain = step_of()[1]
    for group in plain.optimizer.param_groups:
        group["lr"] = 0.01
    torch.testing.assert_close(found[0], after_steps(plain)[0], rtol=1e-3, atol=1e-4)


def test_a_numba_that_does_not_work_is_said_and_gone_on_without(in_tmp, short, monkeypatch, capsys):
    def broken(x):
        raise AttributeError("'function' object has no attribute '_cache'")

    monkeypatch.setattr(training, "squared_relu", broken)
    assert not train(short).loops
    assert "numba cannot be used ('function' object has no attribute '_cache'); training goes on without it" in capsys.readouterr().out


def test_loops_are_taken_for_long_trainings_on_a_cpu_alone(in_tmp, corpus_folder, monkeypatch):
    long = ("max_iters=300", "sample_tokens=0")

    def taken(*settings):
        return new_trainer([*tiny(corpus_folder), *settings], "overwrite=true").loops

    assert taken(*long)
    for settings in (("max_iters=299",), (*long, "compile=false"), (*long, "max_minutes=0.5"), (*long, "trial.enabled=true")):
        assert not taken(*settings), settings
    monkeypatch.setattr(compilation, "find_spec", lambda name: None)
    assert not taken(*long)
