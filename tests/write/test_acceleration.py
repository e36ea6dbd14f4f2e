"""The fast paths for writing equal the plain one: compiled step, packed weights, int8."""

import contextlib
import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GPT2_RECIPE, QWEN3_RECIPE, kernels, tiny_model_config, wild_model
from test_generate import decode, prompts

from nanogpt.core.attention import CausalSelfAttention
from nanogpt.core.generate import Decoder
from nanogpt.core.kv_cache import KVCache
from nanogpt.core.model import GPT, MLP
from nanogpt.core.sampling import sampler
from nanogpt.write.speed import acceleration, int4
from nanogpt.write.speed.acceleration import PackedLinear, accelerate, install, pack
from nanogpt.write.speed.cuda_graph import GraphStep
from nanogpt.write.speed.formats import Bf16Linear
from nanogpt.write.speed.int4 import Int4Linear
from nanogpt.write.speed.int8 import (
    Int8Embedding,
    Int8Linear,
    by_int_mm,
    fastest,
    plain_linear,
    quantize,
    quantize_rows,
)

RECIPES = {
    "modern": {"ngrams": [2, 3], "ngram_buckets": 99}, "gpt2": GPT2_RECIPE, "gelu": {**GPT2_RECIPE, "activation": "gelu", "bias": False},
    "relu2 learned": {"position": "learned", "qk_norm": False}, "qwen3": QWEN3_RECIPE,
}


def logits_of(model, idx):
    with torch.inference_mode():
        return model(idx)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_the_compiled_step_equals_the_plain_path(recipe, precision):
    fast_cpu = kernels("nanogpt.write.speed.fast_cpu")
    # 宽度够一组才有 int4；qwen3 的有几个矩阵不够，两种混着
    model = accelerate(wild_model(**RECIPES[recipe], n_embd=32 if precision == "int4" else 16), precision, fast=False)
    assert fast_cpu.fits(model) and (precision != "int4" or isinstance(model.h[0].mlp.c_fc, Int4Linear))
    rows = prompts(5, 1, 9)
    plain = decode(model, rows, 40)
    install(model, fast_cpu.FastStep(model))
    assert torch.equal(decode(model, rows, 40), plain)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_compiled_step_gives_the_same_logits(recipe):
    fast_cpu = kernels("nanogpt.write.speed.fast_cpu")
    model = wild_model(**RECIPES[recipe])
    idx = torch.tensor(prompts(12))
    expected = logits_of(model, idx)[0]
    install(model, fast_cpu.FastStep(model))
    cache = fast_cpu.KVCache(model, 1)
    with torch.inference_mode():
        for position in range(12):
            got = model.next_logits(idx[:, position], cache)[0]
            torch.testing.assert_close(got, expected[position], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(logits_of(model, idx)[0], expected)


@pytest.mark.parametrize("recipe", [*RECIPES, "five tables"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_the_compiled_look_up_gives_what_the_first_block_reads(recipe, precision):
    embedding = kernels("nanogpt.write.speed.embedding")
    settings = RECIPES.get(recipe, {"ngrams": [2, 3, 4, 5, 8], "ngram_buckets": 1013})
    model = accelerate(wild_model(**settings, n_embd=32), precision, fast=False)
    assert embedding.Embedding.fits(model)
    size = model.config.vocab_size
    idx = torch.randint(size, (2, 6), generator=torch.Generator().manual_seed(0))
    caches = [KVCache(model, 2) for _ in range(2)]
    for cache in caches:
        # 一行已经读过三个字，另一行从头开始
        cache.tokens[0, :3], cache.lengths = torch.tensor([size - 1, 0, 5]), [3, 0]
    wanted = []
    for t in range(6):
        wanted.append(model.embed(idx[:, t : t + 1], caches[0]))
        caches[0].advance(idx[:, t : t + 1])
    look_up = embedding.Embedding(model)
    got = look_up(idx, caches[1])
    torch.testing.assert_close(torch.from_numpy(got).view(2, 6, -1), torch.cat(wanted, dim=1), atol=1e-6, rtol=1e-6)
    assert torch.equal(caches[0].tokens, caches[1].tokens)
    # 猜着读的几个与一个一个读的，每一位都一样
    assert (look_up(idx[:, :1], caches[1]) == got.reshape(2, 6, -1)[:, 0]).all()
    for wrong in (-1, size):
        with pytest.raises(IndexError, match=str(wrong)):
            look_up(torch.tensor([[1], [wrong]]), caches[1])


def forbidden(*_):
    raise AssertionError


@pytest.mark.parametrize(
    "own",
    [
        lambda model: model.wte.register_forward_hook(forbidden), lambda model: model.ngrams[0].register_forward_pre_hook(forbidden),
        lambda model: model.ngrams[1].table.register_forward_hook(forbidden), lambda model: setattr(model.ngrams[0], "forward", forbidden),
        lambda model: model.h[1].mlp.register_forward_hook(forbidden), lambda model: setattr(model.h[0].attn.c_attn, "forward", forbidden),
        lambda model: setattr(model, "drop", torch.nn.Identity()), lambda model: setattr(model.wte, "max_norm", 0.5),
        lambda model: model.ngrams[0].table.to(torch.bfloat16), lambda model: model.wpe.to(torch.bfloat16),
        lambda model: setattr(model.ngrams[0].table, "weight", torch.nn.Parameter(torch.zeros(16, 99).t())),
    ],
)
def test_what_somebody_changed_is_not_compiled(own):
    fast_cpu = kernels("nanogpt.write.speed.fast_cpu")
    model = wild_model(position="learned", ngrams=[2, 3], ngram_buckets=99)
    assert fast_cpu.fits(model)
    own(model)
    assert not fast_cpu.fits(model)


def test_more_rows_than_the_compiled_step_takes_go_the_plain_way():
    fast_cpu = kernels("nanogpt.write.speed.fast_cpu")
    model, rows = wild_model(), prompts(*range(1, 8))
    plain = decode(model, rows, 20)
    install(model, fast_cpu.FastStep(model))
    for most in (32, 4):
        # 写着写着行数减少，也可能从普通路换到快路
        model.fast_step.max_rows = most
        assert torch.equal(decode(model, rows, 20), plain)


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_several_threads_write_with_one_model_at_once(precision):
    model = accelerate(wild_model(n_embd=32), precision)
    rows = [prompts(9, 4), prompts(2, 7, 5)]
    alone = [decode(model, row, 30) for row in rows]
    with ThreadPoolExecutor(2) as pool:
        together = [list(pool.map(lambda row: decode(model, row, 30), rows)) for _ in range(5)]
    assert all(torch.equal(a, b) for texts in together for a, b in zip(texts, alone, strict=True))


def test_a_model_of_ones_own_is_not_compiled():
    fast_cpu = kernels("nanogpt.write.speed.fast_cpu")

    class Mine(MLP):
        pass

    class Other(GPT):
        def make_mlp(self, layer):
            return Mine(self.config)

    model = Other(tiny_model_config()).eval()
    assert not fast_cpu.fits(model) and not hasattr(accelerate(model, "fp32"), "fast_step")
    assert isinstance(model.h[0].mlp.c_fc, PackedLinear)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_prompt_goes_through_the_last_block_with_one_position(recipe):
    model, rows, seen = wild_model(**RECIPES[recipe]), prompts(7, 1, 9), []
    idx = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    last = torch.tensor([len(row) - 1 for row in rows])
    caches = [KVCache(model, 3) for _ in range(2)]
    with torch.inference_mode():
        plain = model.last_hidden(idx, caches[0], last)
    model.h[-1].mlp.register_forward_hook(lambda mlp, x, y: seen.append(y.size(1)))
    accelerate(model, "fp32")
    with torch.inference_mode():
        got = model.last_hidden(idx, caches[1], last)
        assert seen == [1]
        # 别处照旧算每个位置
        torch.testing.assert_close(model.hidden(idx)[torch.arange(3), last], got, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got, plain, atol=1e-5, rtol=1e-5)
    assert torch.equal(caches[0].k, caches[1].k) and torch.equal(caches[0].v, caches[1].v) and caches[1].lengths == [9, 9, 9]


def test_a_prompt_goes_whole_through_a_block_of_the_users_own():
    class Attention(CausalSelfAttention):
        def forward(self, x, rope=None, cache=None):
            return super().forward(x, rope, cache) * 0.5

    class Own(GPT):
        def make_attention(self, layer):
            return Attention(self.config, layer)

    model, rows = Own(tiny_model_config()).eval(), prompts(5, 1, 9)
    plain = decode(model, rows, 20)
    assert torch.equal(decode(accelerate(model, "fp32"), rows, 20), plain) and not isinstance(model, acceleration.FastReading)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("recipe", RECIPES)
def test_packed_weights_give_the_same_logits(recipe, threads, monkeypatch):
    model = wild_model(**RECIPES[recipe])
    idx = torch.tensor(prompts(7, 7))
    expected = logits_of(model, idx)
    weight, size = model.h[0].mlp.c_fc.weight.detach().clone(), model.parameter_count()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    pack(model)
    # 补齐的行、与词嵌入共用的，都不多算
    assert model.parameter_count() == size
    torch.testing.assert_close(logits_of(model, idx), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.h[0].mlp.c_fc.weight, weight)


def test_writing_is_packed_where_numba_is_missing(monkeypatch):
    monkeypatch.setattr(acceleration, "find_spec", lambda name: None)
    model, rows = wild_model(), prompts(5, 1, 9)
    plain = decode(model, rows, 20)
    accelerate(model, "fp32")
    assert isinstance(model.lm_head, PackedLinear) and not hasattr(model, "fast_step") and torch.equal(decode(model, rows, 20), plain)


def test_a_numba_that_does_not_work_is_said_once_and_gone_on_without(monkeypatch, capsys):
    pytest.importorskip("numba")

    def broken(x):
        raise AttributeError("'function' object has no attribute '_cache'")

    monkeypatch.setattr("nanogpt.core.loops.training.squared_relu", broken)
    acceleration._works.cache_clear()
    try:
        for precision in ("fp32", "int8", "auto"):
            model, rows = wild_model(), prompts(5, 1, 9)
            plain = decode(accelerate(model, precision, fast=False), rows, 20)
            assert torch.equal(decode(accelerate(wild_model(), precision), rows, 20), plain) and not hasattr(model, "fast_step")
    finally:
        acceleration._works.cache_clear()
    said = "numba cannot be used ('function' object has no attribute '_cache'); writing goes on without it"
    assert capsys.readouterr().err.count(said) == 1


def test_int8_rounds_each_row_to_half_a_step():
    weight = torch.randn(7, 30) * torch.logspace(-3, 3, 7)[:, None]
    weight[3] = 0
    rounded, scale = quantize(weight)
    assert rounded.dtype == torch.int8 and rounded.abs().max() == 127
    assert ((rounded * scale[:, None] - weight).abs() <= scale[:, None] / 2 * 1.001).all()


@pytest.mark.parametrize("rows, n_out, n_in", [(1, 7, 32), (3, 5, 100), (8, 33, 64), (13, 18, 200), (40, 50, 768), (25, 67, 68), (70, 100, 3072), (130, 110, 72), (30, 9, 70), (2, 9, 3100)])
def test_every_way_to_multiply_int8_gives_the_same_bits_as_exact_integers(rows, n_out, n_in):
    integer_dot = kernels("nanogpt.write.speed.integer_dot")
    weight, scale = quantize(torch.randn(n_out, n_in))
    # 最大的数连成一片：会溢出的算法在这里露馅
    weight[0], x, bias = 127, torch.randn(rows, n_in), torch.randn(n_out)
    x[0] = 3
    q, row_scale = quantize_rows(x)
    exact = (q.double() @ weight.double().T).float()
    expected = exact * scale * row_scale[:, None] + bias
    for way in (plain_linear, partial(plain_linear, multiply=by_int_mm), integer_dot.linear, partial(integer_dot.linear, multiply=by_int_mm)):
        assert torch.equal(way(x, weight, scale, bias), expected), way
    assert torch.equal(Int8Linear(weight, scale, bias)(x[None])[0], expected)
    assert (q * row_scale[:, None] - x).abs().max() <= row_scale.max() * 0.501


def test_activations_are_rounded_to_the_same_integers_everywhere():
    integer_dot = kernels("nanogpt.write.speed.integer_dot")
    # 半数恰在两个整数正中：除法多舍入一次就偏到另一边
    x = torch.randint(-254, 255, (64, 512), generator=torch.Generator().manual_seed(0)) * torch.rand(64, 1) / 2
    q, scale = quantize_rows(x)
    for lanes, sums in ((False, True), (True, True), (False, False)):
        acts = integer_dot.activations(*x.shape, lanes=lanes, sums=sums)
        integer_dot.quantize_rows(x.numpy(), 0, 64, acts)
        assert (acts[0] == q.numpy()).all() and (acts[1] == scale.numpy()).all()
        # 行在各自的格子里的、别处去乘的，用不上每组的和
        none = len(acts[3]) or not sums
        wanted = np.empty((64, 0)) if none else -8 * q.view(64, -1, 32).sum(2).numpy()
        assert acts[2].shape == wanted.shape and (acts[2] == wanted).all()


@pytest.mark.parametrize("size", [128, 100])
def test_activations_lie_side_by_side_the_same_whoever_laid_them(size):
    integer_dot = with_instruction("integer_dot", 64)
    x = torch.randn(70, size).numpy()
    acts = integer_dot.activations(*x.shape)
    # 几个线程各一份，边界不在一组的开头
    for start, stop in ((40, 70), (0, 7), (7, 40)):
        integer_dot.quantize_rows(x, start, stop, acts)
    q, lanes = acts[0][:, :size], acts[3]
    beside = lanes.view(np.uint8).reshape(len(lanes), size // 4, 16, 4).transpose(0, 2, 1, 3).reshape(-1, size)
    assert (beside[:70].astype(int) == q.astype(int) + 128).all()


def test_int4_rounds_each_weight_to_half_a_step_and_a_byte_holds_two():
    weight = torch.randn(37, 96) * torch.logspace(-3, 3, 37)[:, None]
    weight[3] = 0
    packed, scale = int4.quantize(weight)
    error = (int4.dense(packed, scale)[:37] - weight).view(37, 3, 32).abs()
    # 与最大的反号、几乎一样大的，要 8 而只有 7：差整整一步；scale 舍入到 bf16，步子至多小 2^-8，七步就差七个
    most = weight.view(37, 3, 32).abs().amax(2, keepdim=True) / 8 * (1 + 7 * 2**-8)
    assert packed.numel() == 48 * 96 // 2 and (error <= most * (1 + 1e-5)).all()
    assert error.mean() < weight.abs().mean() / 8 and not int4.dense(packed, scale)[3].any()


@pytest.mark.parametrize("rows, n_out, n_in", [(1, 16, 32), (3, 50, 96), (15, 33, 768), (40, 7, 3072)])
def test_every_way_to_multiply_int4_gives_the_same_bits(rows, n_out, n_in):
    int4_dot = kernels("nanogpt.write.speed.int4_dot")
    weight, x, bias = torch.randn(n_out, n_in), torch.randn(rows, n_in), torch.randn(n_out)
    weight[0], x[0] = -3, 2
    packed, scale = int4.quantize(weight)
    plain = int4.plain_linear(x, packed, scale, bias)
    assert torch.equal(int4_dot.linear(x, packed, scale, bias), plain)
    q, row_scale = quantize_rows(x)
    dense = int4.dense(packed, scale)[:n_out].double()
    torch.testing.assert_close(plain.double(), q.double() @ dense.T * row_scale[:, None] + bias, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("precision, form", [("int8", Int8Linear), ("int4", Int4Linear), ("bf16", Bf16Linear)])
def test_products_of_stored_weights_are_those_of_the_matrix_they_stand_for(precision, form):
    model = wild_model(**GPT2_RECIPE, n_embd=64, vocab_size=97)
    tied = accelerate(model, precision, fast=False)
    idx = torch.arange(97)
    assert isinstance(tied.lm_head, form) and tied.wte.weight.data_ptr() == tied.lm_head.weight.data_ptr()
    # 一行单位向量乘出来的，就是词嵌入那一列
    unit = torch.eye(64)
    torch.testing.assert_close(tied.lm_head(unit).T, tied.wte(idx), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4", "bf16"])
def test_the_compiled_step_shares_the_models_weights(precision):
    fast_cpu = kernels("nanogpt.write.speed.fast_cpu")
    model = accelerate(wild_model(n_embd=32), precision, fast=False)
    linears, before = [block.mlp.c_fc for block in model.h], model.h[0].mlp.c_fc.weight.data_ptr()
    whole = fast_cpu._shared(linears, "weight")
    assert [view.data_ptr() for view in whole] == [linear.weight.data_ptr() for linear in linears]
    # 换算过的本来就挨着，不必搬；没有换算的搬一次
    assert (whole.data_ptr() == before) == (precision != "fp32")


def with_instruction(name: str, vnni: int):
    """A module of kernels, where this CPU multiplies so many bytes at once."""
    module = kernels(f"nanogpt.write.speed.{name}")
    if vnni > module.VNNI:
        pytest.skip("this CPU lacks the instruction")
    return module


@pytest.mark.parametrize("vnni", [0, 64])
def test_a_cpu_without_vnni_multiplies_int4_to_the_same_numbers(vnni):
    int4_dot = with_instruction("int4_dot", vnni)
    dot, at = int4_dot.dot_of(2, vnni), int4_dot.at
    x, weight = torch.randn(2, 96), torch.randn(16, 96)
    packed, scale = int4.quantize(weight)
    q, row_scale = quantize_rows(x)
    less, out = -8 * q.view(2, 3, 32).sum(2, dtype=torch.int32).numpy(), np.zeros((2, 16), np.float32)
    njit = pytest.importorskip("numba").njit
    run = njit(lambda w, s, q, less, out: dot(at(w, 0), at(s, 0), at(q, 0), 96, at(less, 0), 3, at(out, 0)))
    run(packed.numpy(), scale.view(torch.int16).numpy(), q.numpy(), less, out)
    assert torch.equal(torch.from_numpy(out) * row_scale[:, None], int4.plain_linear(x, packed, scale, torch.zeros(16)))


def test_a_large_model_is_written_in_bf16_where_it_was_measured_to_pay(monkeypatch, capsys):
    pytest.importorskip("numba")
    monkeypatch.setattr(acceleration, "gain_of_products", lambda: 2.0)
    assert acceleration.measured_format(wild_model(), True) == "fp32"
    monkeypatch.setattr(acceleration, "LARGE_MIB", 0)
    assert acceleration.measured_format(wild_model(), False) == "fp32"
    model = accelerate(wild_model(), "auto")
    assert model.lm_head.native and "precision=fp32 keeps to fp32" in capsys.readouterr().err
    idx = torch.tensor(prompts(9))
    torch.testing.assert_close(logits_of(model, idx), logits_of(wild_model(), idx), atol=0.2, rtol=0.1)
    monkeypatch.setattr(acceleration, "gain_of_products", lambda: 0.1)
    assert acceleration.measured_format(wild_model(), True) == "fp32"
    # 没有 bf16 单元：多少行都不值得先补成 float32 再乘
    without = accelerate(wild_model(), "bf16")
    assert not without.lm_head.native and without.fast_step.max_rows == accelerate(wild_model(), "fp32").fast_step.max_rows


@pytest.mark.parametrize(("size", "failing"), [(1, 0), (2, 0), (2, 1), (5, 0), (5, 3)])
def test_a_crew_waits_for_everyone_and_is_let_go_when_one_cannot_come(size, failing):
    compiled = kernels("nanogpt.core.loops.compiled")
    before, seen = set(threading.enumerate()), np.zeros((size, 50), int)
    crew = compiled.Crew(size)
    threads = set(threading.enumerate()) - before

    def work(part, crew, size, fails):
        if fails and part == failing:
            raise KeyboardInterrupt
        for step in range(50):
            seen[part, step] = 1
            compiled.meet(crew, size)
            assert fails or seen[:, step].all()

    given = np.zeros(1)
    held = weakref.ref(given)
    with pytest.raises(KeyboardInterrupt):
        crew.run(lambda part, crew, size, fails, given: work(part, crew, size, fails), True, given)
    # 出了错的也不占着它的张量
    del given
    gc.collect()
    assert held() is None
    seen[:] = 0
    crew.run(work, False)
    assert seen.all()
    # 没有人再用它：它的线程就结束
    assert len(threads) == size - 1
    del crew
    for thread in threads:
        thread.join(timeout=20)
        assert not thread.is_alive()


def test_compiled_code_is_thrown_away_when_any_file_of_kernels_changes(tmp_path, monkeypatch):
    compiled = kernels("nanogpt.core.loops.compiled")
    from nanogpt.write.speed import fast_cpu, tiles

    kept = [part._cache for part in vars(fast_cpu).values() if hasattr(part, "targetoptions")]
    stamps = {compiled._stamp(Path(module.__file__).parent) for module in (fast_cpu, compiled)}
    assert {cache._cache_file._source_stamp for cache in kept if hasattr(cache, "_cache_file")} == stamps
    for name, source in (("beside/tiles.py", tiles.__file__), ("here/compiled.py", compiled.__file__)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(Path(source).read_bytes())
    monkeypatch.setattr(compiled, "__file__", str(tmp_path / "here/compiled.py"))
    stamps = [compiled._stamp.__wrapped__(tmp_path / "beside")]
    for name in ("beside/tiles.py", "here/compiled.py"):
        (tmp_path / name).write_text("# other", encoding="utf-8")
        stamps.append(compiled._stamp.__wrapped__(tmp_path / "beside"))
    assert len(set(stamps)) == 3


def test_a_damaged_full_or_forbidden_cache_of_compiled_code_only_costs_compiling_again(tmp_path, monkeypatch):
    compiled = kernels("nanogpt.core.loops.compiled")
    from numba.core import caching

    monkeypatch.setattr(compiled.config, "CACHE_DIR", str(tmp_path))

    def again():
        # 只在这里编译，不碰真的那些
        plus = compiled.kernel(lambda x: x + 1)
        kept = compiled.is_kept(plus)
        assert plus(2) == 3
        return kept, plus

    assert [again()[0] for _ in range(2)] == [False, True]
    for suffix, known in ((".nbi", False), (".nbc", True)):
        for damage in (b"", b"\x80", b"no pickle"):
            for file in tmp_path.rglob(f"*{suffix}"):
                file.write_bytes(damage)
            assert again()[0] == known and again()[1].stats.cache_hits
    with monkeypatch.context() as full:
        full.setattr(caching.IndexDataCacheFile, "_dump", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        next(tmp_path.rglob("*.nbi")).unlink()
        assert not again()[0]
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    assert not again()[0]


@pytest.mark.parametrize("vnni", [0, 32, 64])
def test_a_cpu_without_vnni_gets_the_same_integers(vnni):
    integer_dot = with_instruction("integer_dot", vnni)
    dot, at = integer_dot.dot_of(2, 4, vnni), integer_dot.at
    weight, q = np.random.default_rng(0).integers(-127, 128, (2, 6, 130), dtype=np.int8)
    weight, q, out = weight[:2, :128].copy(), q[:4, :128].copy(), np.zeros((8, integer_dot.CHUNK), np.int32)
    njit = pytest.importorskip("numba").njit
    njit(lambda w, x, out: dot(at(w, 0), 128, at(x, 0), 128, 128, at(w, 0), at(out, 0)))(weight, q, out)
    more = 128 * q.astype(int).sum(1, keepdims=True) if vnni else 0
    assert (out[:4, :2] - more == q.astype(int) @ weight.astype(int).T).all()


@pytest.mark.parametrize("vnni", [0, 64])
@pytest.mark.parametrize("vectors", [2, 4])
def test_rows_that_lie_side_by_side_are_multiplied_to_the_same_integers(vectors, vnni):
    integer_dot = with_instruction("integer_dot", vnni)
    dot, at, rows = integer_dot.lanes_of(4, vectors, vnni), integer_dot.at, 16 * vectors
    draw = np.random.default_rng(0)
    weight, x = draw.integers(-127, 128, (4, 68), dtype=np.int8), draw.integers(1, 256, (rows, 68), dtype=np.uint8)
    beside = np.stack([x[first : first + 16].view(np.int32).T for first in range(0, rows, 16)]).copy()
    out = np.zeros((4, rows), np.int32)
    njit = pytest.importorskip("numba").njit
    njit(lambda w, x, out: dot(at(w, 0), 68, at(x, 0), 17, at(out, 0)))(weight, beside, out)
    assert (out == weight.astype(int) @ x.astype(int).T).all()


@pytest.mark.parametrize("form", ["fp32", "bf16"])
@pytest.mark.parametrize("n_out, n_in", [(50, 7), (29, 64), (75, 100), (48, 768), (29, 2500)])
def test_products_of_floats_are_exact_within_rounding_and_the_same_bits_whatever_lies_beside_a_row(n_out, n_in, form):
    products = kernels("nanogpt.write.speed.float_dot").products
    draw = np.random.default_rng(0)
    weight, bias, x = (draw.standard_normal(shape, dtype=np.float32) for shape in ((n_out, n_in), n_out, (29, n_in)))
    if form == "bf16":
        rounded = torch.from_numpy(weight).bfloat16()
        weight, exactly = rounded.view(torch.int16).numpy(), rounded.float().numpy()
    exact = x.astype(float) @ (weight if form == "fp32" else exactly).astype(float).T + bias

    def multiplied(x, pieces, add):
        y = np.full((len(x), n_out), 1.0, np.float32)
        for start, stop in pairwise(pieces):
            products(weight, bias, x, y, start, stop, add)
        return y

    y = multiplied(x, [0, n_out], False)
    assert np.abs(y - exact).max() < 1e-6 * n_in**0.5 * 4
    assert np.abs(multiplied(x, [0, n_out], True) - exact - 1).max() < 1e-6 * n_in**0.5 * 4
    for rows in (1, 2, 3, 7, 8, 14, 16, 21, 28):
        # 行数与各核的分界都会换掉块的形状；行与行之间也可以隔着别的
        assert (multiplied(x[-rows:].copy(), [0, 5, n_out - 1, n_out], False) == y[-rows:]).all()
    assert (multiplied(np.pad(x, ((0, 0), (0, 16)), constant_values=np.nan), [0, n_out], False) == y).all()


def test_rows_of_integers_that_would_push_each_other_out_of_the_cache_lie_further_apart():
    """4096 columns: the same bits as the plain paths'."""
    integer_dot, int4_dot = (kernels(f"nanogpt.write.speed.{name}_dot") for name in ("integer", "int4"))
    assert [integer_dot.activations(3, size)[0].shape for size in (4096, 4032)] == [(3, 4160), (3, 4032)]
    torch.manual_seed(0)
    weight, bias, x = torch.randn(40, 4096), torch.randn(40), torch.randn(9, 4096)
    eight, four = (*quantize(weight), bias), (*int4.quantize(weight), bias)
    for way in (integer_dot.linear, partial(integer_dot.linear, multiply=by_int_mm)):
        assert torch.equal(way(x, *eight), plain_linear(x, *eight))
    assert torch.equal(int4_dot.linear(x, *four), int4.plain_linear(x, *four))


def test_no_product_may_be_reordered_because_of_who_calls_it_first():
    # numba 里没有写明 fastmath 的，随调用者
    for name in ("float_dot", "integer_dot", "int4_dot"):
        module = kernels(f"nanogpt.write.speed.{name}")
        compiled = [part for part in vars(module).values() if hasattr(part, "targetoptions") and part.__module__ == module.__name__]
        assert compiled and all(part.targetoptions.get("fastmath") is False for part in compiled)


@pytest.mark.parametrize("lanes, asks", [(4, 3), (8, 1)])
def test_a_cpu_with_narrower_vectors_multiplies_floats_too(lanes, asks):
    float_dot = kernels("nanogpt.write.speed.float_dot")
    dot, at, njit = float_dot.dot_of(3, 4, lanes, asks), float_dot.at, pytest.importorskip("numba").njit
    weight, x = np.random.default_rng(0).standard_normal((2, 4, 32), dtype=np.float32)
    out = np.zeros((4, float_dot.CHUNK), np.float32)
    # 只要前 16 个；行与行之间隔着 32 个
    njit(lambda w, x, out: dot(at(w, 0), 32, at(x, 0), 32, 16, at(w, 0), at(out, 0)))(weight, x, out)
    np.testing.assert_allclose(out[:, :3], x[:, :16] @ weight[:3, :16].T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [2, 26])
def test_sums_of_integers_may_pass_two_to_the_31st_on_their_way(rows):
    integer_dot = kernels("nanogpt.write.speed.integer_dot")
    weight, x = torch.full((3, 70_016), 127, dtype=torch.int8), torch.full((rows, 70_016), 3.0)
    assert torch.equal(integer_dot.linear(x, weight, torch.ones(3), None), plain_linear(x, weight, torch.ones(3), None))


def test_a_step_keeps_its_room_although_another_thread_replaces_it():
    fast_cpu = kernels("nanogpt.write.speed.fast_cpu")

    class Step(fast_cpu.FastStep):
        last_room = property(lambda self: (1, "another thread's"), lambda self, value: None)

    assert len(Step(wild_model())._room(40)[0]) == 40


def test_a_row_of_activations_that_is_not_finite_is_not_hidden_by_integers():
    integer_dot = kernels("nanogpt.write.speed.integer_dot")
    weight, scale = quantize(torch.randn(8, 70))
    for bad in (torch.nan, torch.inf):
        x = torch.randn(2, 70)
        x[1, 66] = bad
        for way in (plain_linear, integer_dot.linear):
            y = way(x, weight, scale, None)
            assert y[0].isfinite().all() and not y[1].isfinite().any(), way


def test_a_way_that_gives_other_bits_or_fails_is_never_chosen():
    ways = {"plain": lambda *a: (time.sleep(1e-3), plain_linear(*a))[1], "wrong": lambda *a: plain_linear(*a) + 1}
    ways["missing"] = lambda x, weight, *_: torch.mm(x, weight)
    chosen, names = fastest(ways, (8, 64))
    assert set(names.values()) == {"plain"} and set(chosen) == set(names)


def test_int8_keeps_tied_weights_tied_and_changes_the_loss_little():
    model = wild_model(std=0.1, **{**GPT2_RECIPE, "n_embd": 64, "vocab_size": 97})
    idx = torch.randint(0, 97, (4, 16), generator=torch.Generator().manual_seed(0))
    before = logits_of(model, idx)
    floats = sum(p.numel() * 4 for p in model.parameters())
    accelerate(model, "int8", fast=False)
    assert isinstance(model.wte, Int8Embedding) and model.wte.weight.data_ptr() == model.lm_head.weight.data_ptr()
    after = logits_of(model, idx)
    assert 0 < (after - before).abs().mean() < 0.02 * before.abs().mean()
    assert sum(b.numel() * b.element_size() for b in {b.data_ptr(): b for b in [*model.buffers(), *model.parameters()]}.values()) < 0.35 * floats
    assert model.dtype == torch.float32 and decode(model, [[1, 2]], 5, sampler(temperature=0.0)).shape == (1, 5)


class Replayed(GraphStep):
    """GraphStep whose graphs are the step itself, run again at every replay and written to the same place."""

    def __init__(self, model, replays=True):
        super().__init__(model)
        self.replays, self.keys, self.pools = replays, [], []

    def _captured(self, inputs, idx, cache):
        plain = [self._plain(inputs, trial, cache) for trial in self._trials(idx)]
        logits, held, pool = plain[-1].clone(), weakref.ref(cache), torch.zeros(1)
        self.keys.append((inputs.rows, inputs.end))
        self.pools.append(weakref.ref(pool))

        def replay(pool=pool):
            if self.replays:
                logits.copy_(inputs.run(held()))

        return replay, logits, plain


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recorded_step_equals_the_plain_one_for_rows_of_any_number_and_length(recipe):
    model, rows = wild_model(**RECIPES[recipe]), prompts(5, 1, 9)
    plain = decode(model, rows, 40)
    install(model, Replayed(model))
    assert torch.equal(decode(model, rows, 40), plain)


def test_rows_that_end_one_by_one_take_the_graphs_of_powers_of_two_and_free_them_with_their_cache():
    model = wild_model()

    def drawn():
        decoder = Decoder(model, capacity=8)
        for key in range(7):
            decoder.add(key, [1, 2, key], sampler(temperature=0.0), 0)
        for key in range(7):
            yield [row.key for row in decoder.rows], torch.stack((decoder.step(), decoder.step())).tolist()
            decoder.remove(key)
        # 缓存还活着的时候，图也还在
        yield decoder

    *plain, _ = drawn()
    step = Replayed(model)
    install(model, step)
    # 七行用八行的图算，多出来的空行不影响结果
    *fast, decoder = drawn()
    assert fast == plain
    assert [rows for rows, _ in step.keys] == [8, 4, 2, 1] and all(pool() is not None for pool in step.pools)
    # 显存不足时减半重来：旧缓存一放，图与显存池跟着放，不与新的并存
    del decoder
    assert all(pool() is None for pool in step.pools) and not step.recorded


def test_a_card_that_records_nothing_or_nothing_useful_goes_on_without(capsys, monkeypatch):
    rows = prompts(5, 1)
    for broken in (lambda model: Replayed(model, replays=False), GraphStep):
        model = wild_model()
        plain = decode(model, rows, 20)
        install(model, broken(model))
        if broken is GraphStep:
            # 没有 CUDA 的 torch 在录制时报错，与不支持的显卡一样
            monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        assert torch.equal(decode(model, rows, 20), plain) and model.fast_step is None
        assert capsys.readouterr().err.count("CUDA graph") == 1


def test_a_decoding_step_copies_nothing_that_the_host_must_wait_for(monkeypatch):
    model = wild_model()
    decoder = Decoder(model, capacity=4)
    for key, (prompt, own) in enumerate(zip(prompts(5, 1, 9), (sampler(top_k=3), sampler(temperature=0.5), sampler(repetition_penalty=1.1)))):
        decoder.add(key, prompt, own, 0)
    made = torch.tensor

    def tensor(*args, **kwargs):
        # 普通内存直接建到卡上的拷贝会让主机等卡：只许经过 on_device
        assert "device" not in kwargs
        return made(*args, **kwargs)

    monkeypatch.setattr(torch, "tensor", tensor)
    for _ in range(70):
        decoder.step()
    decoder.remove(0)
    decoder.step()
