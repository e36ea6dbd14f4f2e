"""The trace says what the real step does: same bytes, same lifetimes, nothing allocated."""

import functools
import subprocess
import sys

import psutil
import pytest
import torch
from conftest import TINY, make_config

from nanogpt.base.config import ROOT
from nanogpt.base.language import ConfigError
from nanogpt.core import kernels
from nanogpt.core.memory import lean_optimizers, lowbit
from nanogpt.core.model import GPT
from nanogpt.core.precision import Precision
from nanogpt.plan import trace as tracing
from nanogpt.plan import tracker
from nanogpt.plan.plan import Estimate, bilinear
from nanogpt.plan.substitutes import LikeCuda
from nanogpt.plan.trace import Shape, trace
from nanogpt.plan.tracker import Tracker
from nanogpt.run.metrics import flops_per_token
from nanogpt.weights.build import build_model, build_step

SMALL = ("model.n_layer=2", "model.n_head=2", "model.n_embd=32", "model.block_size=32", "model.vocab_size=211", "model.ngram_buckets=97")


def small(*overrides):
    return make_config(*SMALL, *overrides)


@functools.cache
def traced_once(shape, *overrides):
    """The trace of a small config, shared by the tests that only read it."""
    return trace(small(*overrides), shape)


CARD = Shape(2, 2, 2, "cuda")


def real_step(cfg, rows):
    """A model, its step and the bytes that one micro-batch of `rows` keeps for the backward pass."""
    model = build_model(cfg.model, cfg.seed)
    step = build_step(cfg, model, Precision(cfg.precision, torch.device("cpu")))
    x = torch.randint(0, cfg.model.vocab_size, (rows, cfg.model.block_size))
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step.micro_batch(x, x, 1.0)
    return step, sum(s.nbytes() for pointer, s in kept.items() if pointer not in own)


def state_bytes(step):
    return sum(t.untyped_storage().nbytes() for state in step.optimizer.state.values() for t in state.values())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_traced_weights_gradients_and_state_are_those_of_the_real_model(optimizer):
    cfg = small(f"optimizer={optimizer}")
    traced = traced_once(Shape(2, 2, 2), f"optimizer={optimizer}")
    step, _ = real_step(cfg, 2)
    weights = sum(t.untyped_storage().nbytes() for t in (*step.model.parameters(), *step.model.buffers()))
    rows = [p.row_gradient.tensors() for p in step.model.parameters() if hasattr(p, "row_gradient")]
    # 表的梯度还记着碰过哪些行：追踪的一步有两个微批
    touched = 2 * sum(t.nbytes for _, *ids in rows for t in ids)
    gradients = sum(p.grad.untyped_storage().nbytes() for p in step.model.parameters()) + touched
    step.update()
    assert (traced.weight_bytes, traced.optimizer_bytes) == (weights, state_bytes(step))
    assert traced.parameters == step.model.parameter_count()
    _, at_peak = traced.peak()
    assert at_peak["gradients"] == gradients


def test_an_optimizer_of_torchs_is_planned_like_any_other(monkeypatch):
    monkeypatch.setattr("nanogpt.weights.build.build_part", lambda node, key, model: torch.optim.SGD(model.parameters(), momentum=0.9))
    own = traced_once(Shape(2, 2, 2), "model.ngrams=[]")
    traced = trace(small("model.ngrams=[]"), Shape(2, 2, 2))
    # 一份动量，每个参数一个数
    assert traced.weight_bytes == own.weight_bytes and traced.optimizer_bytes == 4 * traced.parameters
    with torch.no_grad():
        assert trace(small("model.ngrams=[]"), Shape(2, 2, 2)).parameters == traced.parameters


QWEN3 = ("arch=qwen3", "model.n_head=4", "model.n_kv_head=2", "model.head_dim=16", "model.block_size=160")


@pytest.mark.parametrize("overrides", [(), ("arch=gpt2",), ("precision=bf16",), ("precision.cpu_bf16=all",), ("memory=lean",), ("dropout=0.1",), ("model.block_size=160",), QWEN3])
def test_traced_activations_are_what_the_real_forward_pass_saves(overrides):
    traced = traced_once(Shape(2), *overrides)
    _, kept = real_step(small(*overrides), 2)
    # 追踪还看见几个标量（loss），hook 看不见
    assert kept <= traced.activations <= kept + 64 + 0.002 * kept


def test_what_is_recomputed_on_a_card_takes_the_cards_path_with_dropout_too():
    """CUDA's attention drops by itself; the CPU's keeps all probabilities for it."""
    without, dropped = (traced_once(CARD, "precision=bf16", "memory=lean", *more) for more in ((), ("dropout=0.1",)))
    assert without.activations <= dropped.activations <= 1.5 * without.activations


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dropout_keeps_a_byte_per_element_on_a_card(precision):
    without, dropped = (traced_once(CARD, f"precision={precision}", *more) for more in ((), ("dropout=0.1",)))
    model = small().model
    # embedding 之后一处，每个 block 两处
    masks = (1 + 2 * model.n_layer) * CARD.rows * model.block_size * model.n_embd
    assert dropped.activations - without.activations == masks


def test_gpt2_124m_needs_what_was_found_for_it_before():
    cfg = make_config("model=gpt2", "model.vocab_size=50257", "precision=bf16", "optimizer=adamw")
    traced = trace(cfg, Shape(8, 1, 8, "cuda"))
    assert traced.weight_bytes == pytest.approx(0.498e9, rel=0.01) and traced.optimizer_bytes == pytest.approx(0.995e9, rel=0.01)
    # 5.5 GB 是整块 logits（bf16 加 fp32）也留着的时候；这里分块算，一块也不留
    logits = 8 * 1024 * 50257 * 6
    assert traced.activations + logits == pytest.approx(5.5e9, rel=0.03)


def test_shallow_traces_extend_to_the_full_one():
    cfg = small("model.n_layer=6", "model.n_embd=64", "precision=bf16", "memory=lean")
    guess = Estimate(cfg, "cuda")
    assert guess.shallow
    live, _ = trace(cfg, Shape(5, 2, 5, "cuda")).peak()
    # 峰值可能换到另一处，外推会差一点：答案由完整的追踪给
    assert 0.93 * live <= guess.live(5) <= 1.07 * live


def test_an_estimate_asks_for_no_trace_that_says_nothing():
    asked = []

    def at(i, j):
        asked.append((i, j))
        return 10.0 * i + j

    assert bilinear(at, 12, 8, (8, 16)) == 110 and asked == [(0, 0), (1, 0)]
    assert bilinear(at, 1, 32, (8, 16)) == 3 and asked[2:] == [(0, 0), (0, 1)]


def test_fp16_and_bf16_take_the_same_memory():
    peaks = [traced_once(CARD, f"precision={p}").peak()[0] for p in ("fp16", "bf16")]
    assert peaks[0] == pytest.approx(peaks[1], abs=4096)


def test_peaks_grow_with_rows_and_accumulation_and_shrink_with_checkpointing():
    def peak(rows, accumulation, *overrides):
        return traced_once(Shape(rows, accumulation, rows, "cuda"), "precision=bf16", *overrides).peak()[0]

    accumulated = peak(2, 2)
    assert peak(1, 1) < peak(2, 1) < accumulated and peak(2, 2, "memory=lean") < accumulated


def test_two_traces_are_equal_and_every_freed_storage_was_allocated():
    one, two = traced_once(CARD, "precision=bf16"), trace(small("precision=bf16"), CARD)
    # autocast 的缓存按地址散列，清空时的次序不定，别的都相同
    assert {p: sorted(e) for p, e in one.events.items()} == {p: sorted(e) for p, e in two.events.items()}
    assert one.events["steady_micro_1"] == two.events["steady_micro_1"] and one.ops == two.ops and one.peak() == two.peak()
    live = {}
    for storage, size in one.timeline():
        if size > 0:
            assert storage not in live
            live[storage] = size
        else:
            assert live.pop(storage) == -size
    assert sum(live.values()) == one.weight_bytes + one.optimizer_bytes


def test_products_are_counted_in_full():
    cfg = small("arch=gpt2", "precision=fp32")
    traced = trace(cfg, Shape(2, 1, 2, "cuda"))
    model = build_model(cfg.model, 0)
    tokens = 2 * cfg.model.block_size
    counted = sum(flops * n for (flops, *_), n in traced.ops["steady_micro_0"].items()) / tokens
    # flops_per_token 把因果注意力算作整块，这里只算一半，反向多算一次重算
    assert counted == pytest.approx(flops_per_token(model), rel=0.15)


def test_a_card_is_planned_without_one_and_the_plan_leaves_no_trace():
    cfg = small("precision=bf16")
    before, real = torch.random.get_rng_state(), (kernels.device_type, lowbit.spans, lean_optimizers.Storage.start)
    on_card, on_cpu = trace(cfg, Shape(2, device_type="cuda")), traced_once(Shape(2), "precision=bf16")
    # CPU 上短的注意力存概率矩阵，取整的乘积用 fp32：两条路不同
    assert on_card.activations != on_cpu.activations
    assert real == (kernels.device_type, lowbit.spans, lean_optimizers.Storage.start) and torch.equal(before, torch.random.get_rng_state())
    assert kernels.device_type(torch.zeros(1)) == "cpu"


def test_nothing_is_allocated():
    cfg = make_config("model=gpt2_xl", "model.n_layer=2", "model.vocab_size=50257", "precision=bf16")
    # 头一次追踪要载入模块
    traced_once(Shape(2))
    before = psutil.Process().memory_info().rss
    traced = trace(cfg, Shape(16, 1, 16, "cuda"))
    assert traced.peak()[0] > 4 * 2**30
    assert psutil.Process().memory_info().rss - before < 100 * 2**20


class Wide(GPT):
    """A model of a user's own: one more layer in front."""

    def __init__(self, config):
        super().__init__(config)
        self.front = torch.nn.Linear(config.n_embd, config.n_embd, bias=False)

    def embed(self, idx, cache=None):
        return self.front(super().embed(idx, cache))


class Peeking(GPT):
    """A model whose computation depends on values."""

    def hidden(self, idx, cache=None):
        return super().hidden(idx, cache) * (2.0 if idx.sum().item() else 1.0)


def test_a_users_own_model_is_traced_and_one_that_reads_values_is_refused_in_one_line():
    plain, wide = traced_once(Shape(2)), traced_once(Shape(2), "model._target_=test_trace.Wide")
    assert wide.weight_bytes - plain.weight_bytes == 32 * 32 * 4 and wide.optimizer_bytes > plain.optimizer_bytes
    with pytest.raises(ConfigError, match="test_trace.Peeking") as error:
        trace(small("model._target_=test_trace.Peeking"), Shape(2, device_type="cuda"))
    assert "\n" not in str(error.value) and kernels.device_type(torch.zeros(1)) == "cpu"


def test_adapters_are_traced_with_their_own_gradients_only():
    full, lora = (traced_once(Shape(2, 2, 2), "optimizer=adamw", *more) for more in ((), ("finetune=lora",)))
    assert lora.optimizer_bytes < full.optimizer_bytes / 3 and lora.weight_bytes > full.weight_bytes
    assert lora.peak()[1]["gradients"] < full.peak()[1]["gradients"] / 3


def test_storages_in_host_memory_are_counted_apart():
    near, apart = (traced_once(Shape(2, 1, 2, "cuda"), "optimizer=adamw", *more) for more in ((), ("memory.offload_optimizer=true",)))
    # 步数是标量，留在卡上
    assert apart.ram == 8 * apart.parameters and apart.optimizer_bytes < near.optimizer_bytes - 8 * apart.parameters + 1000
    assert sum(over for (*_, over), n in apart.ops["steady_update"].items()) > 0 == sum(over for (*_, over) in near.ops["steady_update"])


def test_tiny_models_and_single_tokens_are_traced():
    assert trace(make_config(*TINY, "model.vocab_size=3", "model.block_size=1"), Shape(1)).peak()[0] > 0


def test_a_trace_does_not_depend_on_the_traces_before_it():
    # 同一进程里先追踪过 fp32 的权重，bf16 的不能照着它的结果算
    lean = small("memory=minimal", "batch_size=1")
    alone = trace(lean, Shape(1, 1, 1, "cuda"))
    trace(small("precision=fp32"), Shape(1, 1, 1, "cuda"))
    again = trace(lean, Shape(1, 1, 1, "cuda"))
    assert alone.peaks() == again.peaks()
    assert again.weight_bytes < 0.6 * trace(small("precision=bf16"), Shape(1, 1, 1, "cuda")).weight_bytes


@pytest.mark.parametrize("memory", ["lean8", "minimal"])
def test_a_trace_that_takes_no_shortcut_is_the_same(memory, monkeypatch):
    # 32 个 token 分三块求损失，最后一块短些
    cfg = small(f"memory={memory}", "precision=bf16", "batch_size=1", "model.vocab_size=20000", "memory.loss_chunk_mib=1")
    quick = trace(cfg, Shape(1, 1, 1, "cuda"))
    monkeypatch.setattr(Tracker, "_on_meta", lambda self, func, args, kwargs: func(*args, **kwargs))
    monkeypatch.setattr(Tracker, "repeated", lambda self, key, compute: compute())
    monkeypatch.setattr(Tracker, "_are_fresh", lambda self, made: False)
    monkeypatch.setattr(tracker, "_REMEMBERED", {})
    slow = trace(cfg, Shape(1, 1, 1, "cuda"))
    assert {p: sorted(e) for p, e in quick.events.items()} == {p: sorted(e) for p, e in slow.events.items()}
    assert quick.ops == slow.ops and quick.kinds == slow.kinds


def test_a_plan_imports_neither_the_compiler_nor_distributed_tensors():
    # 一个新的进程：这里的别的测试早已导入了它
    code = (
        "import sys; from run_train import main; from nanogpt.base.cli import run_script; sys.argv = ['run_train.py', 'plan=true', 'model=tiny', "
        "'model.n_layer=1', 'hardware=rtx3060_12gb', 'memory=lean']; run_script('train', main)\nassert 'torch' in sys.modules and 'torch._dynamo' not in sys.modules"
    )
    code += "\nassert 'torch.distributed.tensor' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


def test_a_trace_that_needs_the_compiler_begins_again_with_it(monkeypatch):
    tried = []

    def needs_it(cfg, shape):
        tried.append(type(sys.modules.get("torch._dynamo")))
        if len(tried) == 1:
            raise ImportError("cannot import name 'AttrSource' from 'torch._dynamo.source'")
        return "traced"

    for name in [name for name in sys.modules if name in ("torch._dynamo", "torch._dynamo.config")]:
        monkeypatch.delitem(sys.modules, name)
    # getattr(torch, "_dynamo") 会导入它
    monkeypatch.setitem(vars(torch), "_dynamo", None)
    monkeypatch.setattr(tracing, "_stands", [])
    monkeypatch.setattr(tracing, "_traced", needs_it)
    assert trace(small(), Shape(1)) == "traced"
    assert tried == [tracing._Stand, type(None)] and tracing._stands == [None]


def test_the_guess_is_close_on_both_sides_of_a_full_chunk_of_logits():
    cfg = small("model.vocab_size=9000", "memory.loss_chunk_mib=2", "precision=bf16")
    guess = Estimate(cfg, "cuda")
    for rows in (1, 4, 24):
        assert guess.live(rows) == pytest.approx(trace(cfg, Shape(rows, 2, rows, "cuda")).peak()[0], rel=0.07)


def test_a_tensor_that_is_planned_for_a_card_says_that_it_lies_on_one():
    with LikeCuda():
        assert torch.ones(1).is_cuda
    assert not torch.ones(1).is_cuda
