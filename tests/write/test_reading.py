"""A prompt that is read on a CPU through compiled loops gives what PyTorch's operations give."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import GPT2_RECIPE, QWEN3_RECIPE, kernels, wild_model

from nanogpt.base.config import ROOT
from nanogpt.core import kernels as plain
from nanogpt.core.kv_cache import KVCache
from nanogpt.write.speed.acceleration import accelerate

pytestmark = pytest.mark.filterwarnings("error")


def parts_of(batch: int, heads: int, shared: int, queries: int, length: int, size: int, *, std: float = 1.0):
    """q as the products of a model lie in memory, k and v as in a cache that has room for more."""
    draw = torch.Generator().manual_seed(queries)
    q = torch.randn(batch, queries, heads + 2, size, generator=draw)[:, :, :heads].transpose(1, 2) * std
    k, v = (torch.randn(batch, heads // shared, length + 5, size, generator=draw)[:, :, :length] for _ in range(2))
    return q, k, v


def ours(*parts):
    with torch.inference_mode():
        return kernels("nanogpt.write.speed.causal_attention").attention(*parts, None, 0.0, parts[0].size(3) ** -0.5)


def theirs(*parts):
    return plain.attention(*parts, None, 0.0, parts[0].size(3) ** -0.5)


# 头的长短不满一条向量的，几个 query 共用 key 的，前面已有的，几段 key 的，一段末了不满一块的，只有几个 query 的
SHAPES = [(2, 3, 1, 100, 100, 8), (1, 4, 2, 97, 150, 24), (2, 2, 1, 130, 130, 64), (1, 2, 1, 700, 700, 16), (1, 3, 3, 60, 1100, 40), (2, 2, 1, 2, 96, 136)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("std", [0.1, 1.0, 30.0])
def test_attention_of_a_text_is_exact_within_rounding(shape, std):
    parts = parts_of(*shape, std=std)
    exact = theirs(*(part.double() for part in parts))
    q, k, _ = parts
    # 分数在 float32 里舍入：多大的分数，就差多少
    largest = (q.abs().amax(dim=(2, 3)) * k.abs().sum(3).amax(2).repeat_interleave(shape[2], dim=1)).max() * shape[5] ** -0.5
    assert (ours(*parts) - exact).abs().max() <= 2e-6 + 1e-7 * largest


def test_the_bits_of_attention_do_not_depend_on_what_lies_beside_a_text_or_on_the_threads():
    parts = parts_of(3, 4, 2, 150, 200, 32)
    whole, before = ours(*parts), torch.get_num_threads()
    assert torch.equal(ours(*(part[1:2] for part in parts)), whole[1:2])
    try:
        torch.set_num_threads(3)
        assert torch.equal(ours(*parts), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("length", [100, 513, 515, 540])
def test_what_is_padded_on_the_right_of_a_text_changes_none_of_its_bits(length):
    q, k, v = parts_of(1, 2, 1, 545, 545, 16, std=3.0)
    # 分数往后越来越高：最高的在后一段里，前面的都要重新缩小
    k *= torch.linspace(0.1, 3.0, 545)[:, None]
    assert torch.equal(ours(q[:, :, :length], k[:, :, :length], v[:, :, :length]), ours(q, k, v)[:, :, :length])


def test_a_number_that_is_not_finite_stays_and_spoils_only_who_sees_it():
    q, k, v = parts_of(1, 2, 1, 120, 120, 16)
    k[0, 0, 70, 3] = torch.nan
    found = ours(q, k, v)
    assert found[0, 0, 70:].isnan().all() and found[0, 0, :70].isfinite().all() and found[0, 1].isfinite().all()


def test_scores_that_are_far_apart_neither_overflow_nor_vanish():
    q, k, v = parts_of(1, 1, 1, 600, 600, 8)
    q[:], k[:] = 1.0, torch.linspace(0.0, -4000.0, 600)[:, None]
    # 每个 query 都只看得清第一个 key，它在头一段里
    torch.testing.assert_close(ours(q, k, v), v[:, :, :1].expand_as(v), atol=1e-6, rtol=1e-6)
    k[:] = torch.linspace(-4000.0, 0.0, 600)[:, None]
    torch.testing.assert_close(ours(q, k, v), v, atol=3e-2, rtol=0)


@pytest.mark.parametrize("case", ["masked", "dropped", "short", "odd", "double", "trained"])
def test_other_attention_is_left_to_pytorch(case, monkeypatch):
    causal = kernels("nanogpt.write.speed.causal_attention")
    monkeypatch.setattr(plain, "attention", lambda *given: given)
    q, k, v = parts_of(1, 1, 1, 2 if case == "short" else 100, 90 if case == "short" else 100, 12 if case == "odd" else 16)
    if case == "double":
        q, k, v = q.double(), k.double(), v.double()
    given = (q, k, v, torch.ones(100, 100, dtype=torch.bool) if case == "masked" else None, 0.1 if case == "dropped" else 0.0, 0.5)
    with torch.set_grad_enabled(case == "trained"):
        assert causal.attention(*given) == given


@pytest.mark.parametrize("recipe", [{}, GPT2_RECIPE, {**GPT2_RECIPE, "activation": "gelu"}, {**QWEN3_RECIPE, "n_head": 4, "n_embd": 32}])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_text_read_in_one_go_or_in_two_gives_what_the_plain_path_gives(recipe, precision):
    reading = kernels("nanogpt.write.speed.causal_attention").Reading
    make = {**{"n_embd": 32}, **recipe, "block_size": 160}
    usual = accelerate(wild_model(**make), precision, fast=False)
    fast = accelerate(wild_model(**make), precision)
    assert all(isinstance(block.attn, reading) for block in fast.h)
    idx, last = torch.randint(11, (2, 150), generator=torch.Generator().manual_seed(1)), torch.tensor([149, 149])
    with torch.inference_mode():
        wanted, caches = usual.logits(usual.last_hidden(idx, KVCache(usual, 2), last)), [KVCache(fast, 2) for _ in range(2)]
        found = fast.logits(fast.last_hidden(idx, caches[0], last))
        fast.hidden(idx[:, :40], caches[1])
        later = fast.logits(fast.hidden(idx[:, 40:], caches[1])[:, -1])
    # 量化的一格舍到另一边，差的就是一格
    close = {"atol": 2e-4, "rtol": 1e-4} if precision == "fp32" else {"atol": float(wanted.std()) / 20, "rtol": 0.0}
    torch.testing.assert_close(found, wanted, **close)
    torch.testing.assert_close(later, wanted, **close)


def test_no_sum_of_attention_may_be_reordered():
    # 许了的话，求 e^x 时加上又减去的会被消掉：没有融合乘加的 CPU 上只剩 2 的整数次方
    assert kernels("nanogpt.write.speed.causal_attention")._attend.reorder is False


def test_vectors_of_powers_are_exact_to_the_last_bits():
    causal, njit = kernels("nanogpt.write.speed.causal_attention"), pytest.importorskip("numba").njit
    at, rows = causal.at, 40
    x = -np.abs(np.random.default_rng(0).standard_normal((rows, causal.QUERIES), dtype=np.float32)) * np.float32(20)
    x[0], x[1, :3] = 0.0, (-86.9, -90.0, -np.inf)
    found, peaks, totals, factors = x.copy(), np.full(causal.QUERIES, -np.inf, np.float32), *np.zeros((2, causal.QUERIES), np.float32)
    njit(lambda *given: causal._softened(at(given[0], 0), rows, at(given[1], 0), at(given[2], 0), at(given[3], 0)))(found, peaks, totals, factors)
    exact = np.exp(x.astype(float))
    exact[exact < np.exp(-87)] = 0
    np.testing.assert_allclose(found, exact, rtol=3e-7)
    np.testing.assert_allclose(totals, exact.sum(0), rtol=1e-6)
    assert (peaks == 0).all()


# 放掉的大块内存当场还给系统：还在用它的，不是算错，是当场死掉
STRICT = """
import torch
from conftest import GPT2_RECIPE, wild_model
from nanogpt.core.generate import Decoder
from nanogpt.core.sampling import sampler
from nanogpt.write.speed.acceleration import accelerate

torch.set_num_threads(2)
for precision in ("fp32", "int8", "int4"):
    model = accelerate(wild_model(n_embd=128, n_head=2, n_layer=1, block_size=256, vocab_size=600, **GPT2_RECIPE), precision)
    for rows, chosen in ((1, sampler(temperature=0.0)), (9, sampler(top_k=40)), (30, sampler(top_p=0.9))):
        decoder = Decoder(model, capacity=rows)
        for key in range(rows):
            decoder.add(key, [(7 * i + key) % 600 for i in range(130)], chosen, seed=key)
        for _ in range(4):
            assert decoder.step().min() >= 0
print("done")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="只有 glibc 听这些环境变量")
def test_no_kernel_goes_on_with_memory_that_it_has_freed():
    kernels("nanogpt.write.speed.causal_attention")
    strict = {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_MMAP_MAX_": "1000000", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_PERTURB_": "165"}
    places = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", STRICT], env={**os.environ, **strict, "PYTHONPATH": places}, capture_output=True, text=True, encoding="utf-8",
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-2000:]
