"""What training does on a card, without one: decisions on the device, deterministic kernels, compiled graphs."""

import contextlib
import copy
import functools
import math
import os

import pytest
import torch
import torch.distributed as dist
from conftest import GPT2_RECIPE, new_trainer, tiny_model_config
from test_memory_parts import preset_parts, step_of, weights
from torch.utils._python_dispatch import TorchDispatchMode

from nanogpt.base.config import HardwareConfig, MemoryConfig
from nanogpt.base.console import Console
from nanogpt.base.errors import explained
from nanogpt.base.language import ConfigError
from nanogpt.core import compilation, distributed, kernels, machine
from nanogpt.core.compilation import compile_hidden, compile_updates, fusible_tail, pays
from nanogpt.core.loss import chunked_cross_entropy, even
from nanogpt.core.memory.lean_optimizers import Storage, adamw_update, fusible_adamw
from nanogpt.core.memory.lowbit import SMALL
from nanogpt.core.memory.recompute import keep_last, recompute_blocks
from nanogpt.plan.substitutes import substituted
from nanogpt.run.metrics import flops_per_token
from nanogpt.weights.build import build_model


@pytest.fixture(autouse=True)
def determinism_as_before():
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


# ---- 坏的一步：在设备上决定 ----

PARTS = {
    "adamw": (["optimizer=adamw"], {}), "muon": ([], {}), "adamw 8 bit": (["optimizer=adamw"], preset_parts("lean8")),
    "muon 8 bit bf16": ([], preset_parts("offload")), "adamw in backward": (["optimizer=adamw"], preset_parts("minimal")),
    "adamw kahan": (["optimizer=adamw"], {**preset_parts("offload"), "bf16_rounding": "kahan"}),
    "muon kahan in backward": ([], {**preset_parts("minimal"), "bf16_rounding": "kahan"}),
}


def everything(step):
    return [t.clone() for t in (*step.model.parameters(), *(t for state in step.optimizer.state.values() for t in state.values()))]


def device_step(step, seed, *, poison=None):
    """One step decided on the device; `poison` is what the loss is multiplied with."""
    torch.manual_seed(seed)
    idx = torch.randint(0, 30, (4, step.model.config.block_size))
    loss = step.micro_batch(idx, idx, 1.0 if poison is None else poison)
    norm = step.gradient_norm()
    step.update_if_finite(loss, norm, 1.0)
    step.drop_gradients()
    return loss, norm


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_bad_step_decided_on_the_device_changes_no_bit(parts, poison):
    overrides, memory = PARTS[parts]
    _, step = step_of(*overrides, **memory)
    step.prepare()
    for seed in range(3):
        device_step(step, seed)
    before = everything(step)
    loss, _ = device_step(step, 3, poison=poison)
    assert not math.isfinite(loss) and all(torch.equal(a, b) for a, b in zip(before, everything(step), strict=True))
    # 只有一个参数的梯度坏了，范数也就坏了：别的参数也不动
    handle = step.model.lm_head.weight.register_hook(lambda g: g * math.inf)
    loss, norm = device_step(step, 3)
    handle.remove()
    assert math.isfinite(loss) and not math.isfinite(norm)
    if step.in_backward is None:
        assert all(torch.equal(a, b) for a, b in zip(before, everything(step), strict=True))
    device_step(step, 3)
    assert not torch.equal(weights(step.model), torch.cat([t.flatten() for t in before[: len(list(step.model.parameters()))]]))


@pytest.mark.parametrize("parts", ["adamw", "muon", "adamw 8 bit"])
def test_deciding_on_the_device_gives_the_steps_that_the_host_gives(parts):
    overrides, memory = PARTS[parts]
    _, here = step_of(*overrides, **memory)
    _, there = step_of(*overrides, **memory)
    for seed in range(3):
        device_step(here, seed)
        torch.manual_seed(seed)
        idx = torch.randint(0, 30, (4, there.model.config.block_size))
        there.micro_batch(idx, idx, 1.0)
        norm = there.gradient_norm()
        if norm > 1.0:
            there.clip(norm, 1.0)
        there.update()
    torch.testing.assert_close(weights(here.model), weights(there.model), rtol=0, atol=0 if not memory else 1e-6)


def poisoned(trainer, *iterations):
    """Make the loss of these iterations NaN."""
    real = trainer.model.loss
    trainer.model.loss = lambda x, y: real(x, y) * (math.nan if trainer.progress.iteration in iterations and trainer.model.training else 1)
    return trainer


def late(trainer):
    """A trainer that works as on a card."""
    trainer.reads_late = True
    return trainer


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_whose_numbers_are_read_late_equals_one_that_waits_for_each(in_tmp, tiny_overrides, optimizer, capsys):
    runs = []
    for out, way in (("outputs/a", late), ("outputs/b", lambda trainer: trainer)):
        trainer = poisoned(way(new_trainer(tiny_overrides, f"optimizer={optimizer}", "max_iters=9", "log_interval=2", out=out)), 1, 4, 5)
        trainer.fit()
        said = [line.partition(", 0")[0] for line in capsys.readouterr().out.splitlines() if "not finite" in line]
        progress = {key: value for key, value in vars(trainer.progress).items() if key not in ("train_s", "wall_s")}
        runs.append((weights(trainer.model), progress, said))
    assert torch.equal(runs[0][0], runs[1][0]) and runs[0][1:] == runs[1][1:]
    assert runs[0][1]["nonfinite_steps"] == 3 and len(runs[0][2]) == 3


def test_a_run_that_is_read_late_still_stops_at_too_many_bad_steps(in_tmp, tiny_overrides):
    trainer = poisoned(late(new_trainer(tiny_overrides, "max_iters=30", "eval_interval=30", "log_interval=30", "max_nonfinite_steps=4")), *range(3, 30))
    with pytest.raises(ConfigError, match="4 steps in a row"):
        trainer.fit()
    # 第 4 个坏步是第 7 步：晚一步才看见
    assert trainer.progress.nonfinite_in_a_row == 4 and trainer.progress.iteration <= 8


class Readings(TorchDispatchMode):
    """Counts how often a value is asked for by the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("parts", PARTS)
def test_no_step_on_a_card_asks_the_device_for_a_value(in_tmp, tiny_overrides, parts):
    overrides, memory = PARTS[parts]
    _, step = step_of(*overrides, **memory)
    step.prepare()
    idx = torch.zeros(4, step.model.config.block_size, dtype=torch.long)
    with Readings() as seen:
        loss = step.micro_batch(idx, idx, 1.0)
        step.update_if_finite(loss, step.gradient_norm(), 1.0)
    assert seen.count == 0


def test_a_trainer_on_a_card_reads_each_step_while_the_next_one_runs(in_tmp, tiny_overrides):
    trainer = late(new_trainer(tiny_overrides, "gradient_accumulation_steps=2"))
    results = [trainer.step() for _ in range(3)]
    read = [result.reading._numbers is not None for result in results]
    assert read == [True, True, False] and math.isfinite(results[2].loss) and trainer.unjudged is results[2]
    with Readings() as seen:
        trainer.step()
    # 唯一的一次：上一步的两个数，从锁页内存里读
    assert seen.count == 0


# ---- deterministic=true ----


@pytest.fixture
def as_on_a_card(monkeypatch):
    """set_up() for a card that is not there."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    for later in ("cap_allocator", "grow_segments"):
        monkeypatch.setattr(machine, later, lambda *_: None)
    machine.set_up(torch.device("cuda", 0), deterministic=True, hardware=HardwareConfig())


def test_deterministic_kernels_are_demanded_and_not_only_wished_for(as_on_a_card):
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    with machine.any_kernels():
        assert not torch.are_deterministic_algorithms_enabled()
    assert torch.are_deterministic_algorithms_enabled()


def test_samples_are_written_by_any_kernel_and_training_goes_on_by_deterministic_ones(in_tmp, tiny_overrides, as_on_a_card):
    trainer = new_trainer(tiny_overrides, "max_iters=3", "eval_interval=2")
    wanted = {"sample": [], "step": []}
    trainer.write_sample = lambda *_, **__: wanted["sample"].append(torch.are_deterministic_algorithms_enabled()) or "x"
    real = trainer.computation.micro_batch
    trainer.computation.micro_batch = lambda *a: wanted["step"].append(torch.are_deterministic_algorithms_enabled()) or real(*a)
    trainer.fit()
    assert wanted == {"sample": [False, False], "step": [True] * 3}


def test_an_operation_without_a_deterministic_form_is_one_line_with_the_key(as_on_a_card):
    with pytest.raises(RuntimeError) as error:
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    assert "deterministic=false" in str(explained(error.value)) and "put_" in str(explained(error.value))


@pytest.mark.parametrize(("release", "variable", "broken", "asked"), [
    ("6.8.0-generic", None, False, ["True"]), ("6.8.0-generic", None, True, ["True", "False"]),
    ("5.15.90.1-microsoft-standard-WSL2", None, False, []), ("6.8.0-generic", "PYTORCH_CUDA_ALLOC_CONF", False, []),
])
def test_segments_grow_where_the_driver_can_and_nobody_said_otherwise(monkeypatch, release, variable, broken, asked):
    settings = []

    def empty(*_, **__):
        if broken:
            raise RuntimeError("CUDA driver error: operation not supported")

    for name in machine.ALLOCATOR_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "max_split_size_mb:128")
    monkeypatch.setattr(machine.sys, "platform", "linux")
    monkeypatch.setattr(machine.platform, "release", lambda: release)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", lambda text: settings.append(text.partition(":")[2]), raising=False)
    monkeypatch.setattr(torch, "empty", empty)
    machine.grow_segments(torch.device("cuda", 0))
    assert settings == asked and machine.segments_grow() == bool(asked)


# ---- 几个进程 ----


@pytest.mark.parametrize(("nccl", "backend"), [(True, "nccl"), (False, "gloo")])
def test_cards_talk_through_nccl_where_torch_has_it_after_hours_of_preparation_if_need_be(monkeypatch, nccl, backend):
    store, asked = dist.HashStore(), {}
    # 另一个进程不在：碰头由 test_distributed 来试
    monkeypatch.setattr(distributed, "_met", lambda store: store)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "_watch", None)
    monkeypatch.setattr(distributed, "Watch", lambda *of: None)
    monkeypatch.setattr(distributed, "rendezvous", lambda url, timeout: asked.update(hours=timeout.total_seconds() / 3600) or iter([(store, 0, 2)]))
    monkeypatch.setattr(distributed.dist, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda name, timeout, **how: asked.update(name=name, seconds=timeout.total_seconds()))
    distributed.start(torch.device("cuda", 0), 600)
    assert asked["name"] == backend and asked["hours"] >= 12 and asked["seconds"] > 600


# ---- torch.compile ----


@pytest.fixture
def eager_backend(monkeypatch):
    """torch.compile traces as always and hands the graphs back uncompiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(compilation, "unavailable", lambda device: None)
    monkeypatch.setattr(compilation, "_trial", lambda device: None)
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


MODERN = {"ngrams": [2], "ngram_buckets": 97}


# budget 里既有保留的 block，也有重算的；其余组合逐一跑过，图数相同
@pytest.mark.parametrize(("recipe", "mode"), [(MODERN, "budget"), (GPT2_RECIPE, "selective"), ({"separator": 0}, "every_block")], ids=["modern", "gpt2", "documents"])
def test_a_training_step_is_one_graph_a_shape_and_an_evaluation_none(eager_backend, recipe, mode):
    model = build_model(tiny_model_config(n_layer=2 if mode == "budget" else 1, **recipe), 0)
    recompute_blocks(model, mode)
    if mode == "budget":
        keep_last(model, 1)
    compile_hidden(model, "true", torch.device("cpu"), Console(quiet=True))
    for rows in (4, 3, 4, 3):
        idx = torch.randint(0, 11, (rows, 16))
        model.train().loss(idx, idx).backward()
        with torch.no_grad():
            model.eval().loss(idx[:2, :9], idx[:2, :9])
    # 每种行数：block 一张，损失的尾巴一张
    assert eager_backend["stats"]["unique_graphs"] == 4 and not eager_backend["graph_break"] and not eager_backend["recompiles"]


def test_a_compiler_that_fails_is_one_line_and_the_run_goes_on(monkeypatch, capsys):
    def failing(function, **_):
        def compiled(*args):
            raise RuntimeError("backend='inductor' raised:\nCppCompileError: no space")

        return compiled

    monkeypatch.setattr(torch, "compile", failing)
    model = build_model(tiny_model_config(), 0)
    plain = copy.deepcopy(model)
    compilation.use_compiled(model, Console())
    del model.cross_entropy
    idx = torch.randint(0, 11, (2, 16))
    assert [model.loss(idx, idx), model.loss(idx, idx)] == [plain.loss(idx, idx)] * 2
    assert capsys.readouterr().out == "torch.compile failed (backend='inductor' raised:); going on without it\n"
    # 显存不足不是编译器的错：照常减半
    model.compiled_hidden.compiled = lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        model.loss(idx, idx)


def test_auto_compiles_where_the_whole_training_is_long_enough():
    model = build_model(tiny_model_config(n_layer=4, n_head=4, n_embd=256, block_size=128, vocab_size=65), 0)
    flops = flops_per_token(model)
    assert not pays(4, flops, 2048, 1, 250, 25.5) and pays(4, flops, 2048, 1, 250_000, 25.5)


def test_rounded_products_with_recomputation_are_not_compiled(in_tmp, tiny_overrides, capsys):
    trainer = new_trainer(tiny_overrides, "precision=bf16", "memory=lean", "compile=true")
    assert not trainer.compiles and "activation_checkpointing=every_block" in capsys.readouterr().out


# ---- 损失 ----


def loss_and_gradients(V, dtype, *, softcap, tail=None, card=False, chunk_mib=1, ignoring=False, rows=600):
    """Loss and gradients of 16-bit (or float32) products over several chunks; `card`: as a card would compute it."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, rows, 24, requires_grad=True), (0.3 * torch.randn(V, 24)).requires_grad_()
    targets = torch.randint(0, V, (2, rows))
    if ignoring:
        targets[:, ::3] = -1
    with substituted("cuda") if card else contextlib.nullcontext(), torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        loss = chunked_cross_entropy(hidden, weight, targets, softcap=softcap, chunk_mib=chunk_mib, ignoring=ignoring, tail=tail)
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("softcap", [0.0, 15.0])
@pytest.mark.parametrize("tail", [None, fusible_tail], ids=["plain", "fusible"])
def test_the_loss_as_a_card_computes_it_equals_the_plain_one(dtype, tolerance, softcap, tail):
    # 501 行要补到 512；600 行分块后每块一样大
    for ignoring in (False, True):
        expected = loss_and_gradients(501, dtype, softcap=softcap, ignoring=ignoring)
        got = loss_and_gradients(501, dtype, softcap=softcap, tail=tail, card=True, ignoring=ignoring)
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance * a.abs().max().item())


def test_chunks_on_a_card_are_of_one_size_where_the_tokens_allow_it():
    assert [even(8192, most) for most in (333, 1335, 8192, 10_000)] == [256, 1024, 8192, 8192] and even(7919, 333) == 333


def test_the_head_is_padded_only_where_it_is_copied_anyway():
    weight = torch.ones(501, 4)
    with substituted("cuda"):
        assert kernels.aligned(weight, torch.bfloat16).shape == (512, 4) and kernels.aligned(weight, torch.bfloat16)[501:].eq(0).all()
        assert kernels.aligned(weight, torch.float32) is weight and kernels.aligned(weight.bfloat16(), torch.bfloat16).shape == (501, 4)
        assert kernels.aligned(torch.ones(504, 4), torch.bfloat16).shape == (504, 4)
    assert kernels.aligned(weight, torch.bfloat16).shape == (501, 4)


# ---- 时间 ----


def test_the_first_step_of_each_shape_is_not_timed_where_it_compiles(in_tmp, tiny_overrides, capsys, monkeypatch):
    trainer = new_trainer(tiny_overrides, "max_iters=6", "log_interval=1", "eval_interval=6", "sample_tokens=0")
    trainer.compiles = True
    summary = trainer.fit()
    timed = trainer.progress.tokens_trained - trainer.progress.untimed_tokens
    assert trainer.progress.untimed_tokens == 64 and timed == 5 * 64 and summary["tokens_per_s"] == pytest.approx(timed / trainer.progress.train_s)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("iter")]
    assert ["tok/s" in line for line in lines if "val loss" not in line] == [False] + [True] * 5


# ---- 8 位状态的融合更新 ----


def fused(step, monkeypatch):
    """The step with fused updates, traced by the compiler and run by torch."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    compile_updates(step.optimizer, "true", torch.device("cpu"), Console(quiet=True))
    assert step.optimizer.storage.fused_adamw
    return step


@pytest.mark.parametrize("parts", ["adamw 8 bit", "muon 8 bit bf16", "adamw in backward"])
def test_the_fused_update_stores_the_codes_of_the_plain_one(parts, monkeypatch):
    overrides, memory = PARTS[parts]
    memory = {**memory, "weights": "fp32"}
    _, plain = step_of(*overrides, **memory)
    _, quick = step_of(*overrides, **memory)
    monkeypatch.setattr(compilation, "unavailable", lambda device: None)
    fused(quick, monkeypatch).prepare()
    plain.prepare()
    for seed in range(4):
        device_step(plain, seed)
        device_step(quick, seed)
        torch.testing.assert_close(weights(quick.model), weights(plain.model), rtol=0, atol=2e-6)
        for name, state in plain.optimizer.state.items():
            for key, tensor in state.items():
                other = quick.optimizer.state[name][key]
                # 乘加的次序差一个末位，至多挪到相邻的码，而且很少
                assert (tensor.float() - other.float()).abs().max() <= (1 if tensor.dtype == torch.uint8 else 1e-6), (name, key)
                assert (tensor != other).float().mean() <= 0.01 or tensor.dtype != torch.uint8, (name, key)
                # 每步从同样的权重与状态出发：比的是一步，不是几步之后放大的末位
                other.copy_(tensor)
        quick.model.load_state_dict(plain.model.state_dict())


@pytest.mark.parametrize("parts", ["adamw 8 bit", "muon 8 bit bf16", "adamw in backward"])
def test_a_bad_step_of_a_fused_update_changes_no_bit(parts, monkeypatch):
    overrides, memory = PARTS[parts]
    _, step = step_of(*overrides, **memory)
    monkeypatch.setattr(compilation, "unavailable", lambda device: None)
    before = everything(step)
    fused(step, monkeypatch).prepare()
    assert all(torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=False))
    for seed in range(2):
        device_step(step, seed)
    before = everything(step)
    device_step(step, 3, poison=math.nan)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(step), strict=True))


def test_the_values_behind_the_last_whole_block_are_updated_with_the_others():
    # 50257 行、1600 列的词表就不是 256 的整数倍
    n, group = SMALL + 1000, {"betas": (0.9, 0.95), "lr": 1e-2, "weight_decay": 0.1, "eps": 1e-8}
    results = []
    for function in (None, fusible_adamw):
        storage = Storage(MemoryConfig(optimizer_state="int8"))
        storage.fused_adamw = function
        p, state = torch.linspace(-1, 1, n), {"step": torch.zeros(())}
        for key in ("exp_avg", "exp_avg_sq"):
            storage.start(state, key, p)
        for seed, skip in ((1, 0.0), (2, 1.0), (3, 0.0)):
            grad = torch.randn(n, generator=torch.Generator().manual_seed(seed))
            adamw_update(storage, state, group, p, grad, skip=torch.tensor(skip))
        results.append((p, state))
    (plain, states), (quick, others) = results
    torch.testing.assert_close(quick, plain, rtol=0, atol=2e-6)
    assert states["step"] == others["step"] == 2
    assert all((states[key] != others[key]).float().mean() <= 0.01 for key in ("exp_avg", "exp_avg_sq"))
