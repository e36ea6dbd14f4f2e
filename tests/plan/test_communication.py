"""The sums of gradients on paper: what each process sends, what the backward pass hides, where the network binds."""

import functools
from dataclasses import replace

import pytest
from conftest import make_config
from hypothesis import given
from hypothesis import strategies as st
from test_plan import SMALL

from nanogpt.base.config import ParallelConfig
from nanogpt.base.console import Console
from nanogpt.base.language import ConfigError
from nanogpt.plan import substitutes
from nanogpt.plan.advice import sharded
from nanogpt.plan.communication import EFFICIENT, Communication, Gradient, Network, exposed_s, waits
from nanogpt.plan.plan import Planner, plan_for
from nanogpt.plan.show import chosen_parallel, show

PARTS = st.lists(st.builds(Gradient, st.integers(1, 10**9), st.integers(0, 10**8)), min_size=1, max_size=8)
# 训练把非规格化数冲成零，这个进程也许训练过
FLOATS = functools.partial(st.floats, allow_subnormal=False)
NETWORKS = st.builds(Network, st.integers(2, 1024), FLOATS(1e6, 1e12), FLOATS(0, 1e-4))


@given(parts=PARTS, network=NETWORKS, backward_s=FLOATS(0, 10))
def test_the_backward_pass_hides_at_most_its_own_length_and_never_the_last_sum(parts, network, backward_s):
    total, exposed = sum(network.seconds(part.size) for part in parts), exposed_s(parts, backward_s, network)
    assert max(total - backward_s, network.seconds(parts[-1].size)) <= exposed * (1 + 1e-9) + 1e-9 and exposed <= total * (1 + 1e-9) + 1e-9
    assert exposed_s(parts, 0.0, network) == pytest.approx(total, abs=1e-9)


@given(network=NETWORKS, size=st.integers(1, 10**10))
def test_a_ring_sends_twice_all_but_one_share_and_a_tree_wins_only_where_latency_decides(network, size):
    assert network.sent(size) == pytest.approx(2 * size - 2 * size / network.world)
    no_latency = replace(network, latency_s=0.0)
    assert no_latency.seconds(size) == pytest.approx(network.sent(size) / network.bytes_per_s) and network.seconds(size) >= no_latency.seconds(size)


@given(parts=PARTS, network=NETWORKS, compute_s=FLOATS(1e-3, 10))
def test_where_the_network_binds_the_named_bandwidth_and_the_named_work_would_do(parts, network, compute_s):
    sums = Communication(network, tuple(parts), compute_s, compute_s / 2)
    longer = replace(sums, compute_s=compute_s * sums.times_the_work_needed())
    assert not sums.exposed_s or longer.efficiency == pytest.approx(EFFICIENT)
    if (rate := sums.bytes_per_s_needed()) is not None and 2e3 < rate < 5e14:
        needed, less = (replace(sums, network=replace(network, bytes_per_s=one)).efficiency for one in (rate, rate / 1.02))
        assert less < EFFICIENT <= needed


def test_the_slowest_link_decides_and_the_network_only_between_machines():
    parallel = ParallelConfig(nodes=2, link_gb_per_s=12, network_gbit=25)
    assert Network.of(parallel, 8).bytes_per_s == 25e9 / 8
    assert Network.of(replace(parallel, nodes=1), 8).bytes_per_s == 12e9 == Network.of(replace(parallel, network_gbit=400), 8).bytes_per_s
    with pytest.raises(ConfigError, match=r"parallel.world=8 is not divisible by parallel.nodes=3; choose a multiple of 3"):
        make_config("parallel.world=8", "parallel.nodes=3")


def test_each_of_many_processes_takes_the_memory_of_one_with_its_share_and_the_time_of_its_sums(capsys):
    cfg = make_config(*SMALL, "batch_size=8", "gradient_accumulation_steps=2", "parallel.world=8", "parallel.nodes=2")
    planner = Planner(cfg)
    many, alone = planner.predict(cfg), planner.predict(make_config(*SMALL, "batch_size=2"))
    assert (many.batch_size, many.accumulation, many.parts) == (2, 1, alone.parts) and alone.communication is None
    sums = many.communication
    # 每个参数一份 fp32 的梯度，各发一次
    assert sums.size == 4 * many.parameters and sums.compute_s == alone.step_s
    assert many.step_s == alone.step_s + sums.exposed_s and many.tokens_per_s == pytest.approx(16 * 64 / many.step_s)
    show(many, Console())
    said = capsys.readouterr().out
    assert "processes: 8, machines: 2, rows of a step in each process: 2, slowest link: 1.25 GB/s" in said
    assert "the network binds: 90% would compute with global_batch_size=" in said


# ---- 分片 ----

SHARES = st.lists(st.tuples(FLOATS(0, 1), FLOATS(0, 1), FLOATS(0, 1)), min_size=1, max_size=8)


@given(parts=SHARES)
def test_a_pass_waits_for_its_first_message_and_at_most_for_all(parts):
    before, compute, behind = zip(*parts, strict=True)
    wait, messages = waits(before, compute, behind), sum(before) + sum(behind)
    assert max(before[0], behind[-1], messages - sum(compute)) - 1e-9 <= wait <= messages + 1e-9


def test_each_of_many_sharded_processes_holds_its_rows_and_what_is_gathered(capsys):
    shape = ("model.n_layer=4", "model.vocab_size=320", "model.position=learned", "batch_size=1", "global_batch_size=16", "parallel.world=8")
    planner = Planner(make_config(*SMALL))
    last, every, ddp = (planner.predict(make_config(*SMALL, *shape, "optimizer=adamw", *more)) for more in (
        ["parallel=fsdp"], ["parallel=fsdp", "parallel.sum_gradients=every"], [],
    ))
    # 步数处处都有
    assert last.parts.weights == ddp.parts.weights / 8 and last.parts.optimizer == pytest.approx(ddp.parts.optimizer / 8, rel=0.01)
    assert every.parts.gradients < 0.4 * ddp.parts.gradients < last.parts.gradients and every.allocated < last.allocated < ddp.allocated
    sums, weights, share = last.communication, 4 * last.parameters, 7 / 8
    root = sums.parts[-1].weights
    assert sums.size == weights == sum(part.weights for part in sums.parts) and len(sums.parts) == 5
    # 两个微批：前向各凑齐全部，反向各凑齐 blocks；梯度求和一次
    assert sums.sent == pytest.approx(share * (2 * (2 * weights - root) + weights)) and every.communication.sent == pytest.approx(sums.sent + share * weights)
    assert 0 < sums.exposed_s <= sums.total_s and every.communication.total_s > sums.total_s > 0
    show(last, Console())
    assert "parallel=fsdp: each process sends" in capsys.readouterr().out


def test_auto_takes_the_whole_model_where_it_fits_else_rows_of_it(capsys):
    shape = ("model.n_layer=4", "model.n_head=2", "model.n_embd=256", "batch_size=1", "global_batch_size=16", "optimizer=adamw")

    def on_card(gib, *more):
        cfg = make_config(*SMALL, *shape, *more)
        return replace(cfg, hardware=replace(cfg.hardware, vram_gib=gib + 1, context_gib=0.5, desktop_gib=0.5))

    def chosen(gib, *more):
        return chosen_parallel(on_card(gib, "parallel=auto", *more), console=Console())

    assert chosen(1, "parallel.world=1").mode == "ddp" == chosen(1, "parallel.world=8").mode
    assert (chosen(0.118, "parallel.world=8").mode, chosen(0.118, "parallel.world=8", "memory.weights=bf16").mode) == ("fsdp", "ddp")
    said = capsys.readouterr().out
    assert "parallel=auto takes parallel=ddp: " in said and "parallel=auto takes parallel=fsdp: " in said
    planner = Planner(cfg := on_card(0.118, "parallel.world=8"))
    (way,) = sharded(planner.predict(cfg), planner)
    assert way.typed.startswith("parallel=fsdp") and way.plan.verdict == "fits"


def test_a_torch_that_cannot_be_asked_what_is_exchanged_is_named(monkeypatch):
    monkeypatch.setattr(substitutes, "_collectives_have_shapes", lambda: False)
    with pytest.raises(ConfigError, match="parallel=fsdp: torch .* cannot be planned; pip install -U torch, or plan parallel=ddp"):
        plan_for("model=tiny", "hardware=rtx3060_12gb", "parallel=fsdp", "parallel.world=8", "model.vocab_size=65")
    assert plan_for("model=tiny", "hardware=rtx3060_12gb", "parallel=ddp", "parallel.world=8", "model.vocab_size=65").verdict == "fits"
