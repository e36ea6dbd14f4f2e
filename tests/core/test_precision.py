"""Number formats on a CPU: rounding where a GPU rounds."""

import pytest
import torch
import torch.nn.functional as F
from conftest import make_config, tiny_model_config

from nanogpt.core.kernels import is_short, short_attention
from nanogpt.core.precision import Precision, RoundedProducts
from nanogpt.weights.build import build_model, build_step

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_products_equal_native_half_products(dtype):
    torch.manual_seed(0)
    x, w = torch.randn(5, 64), torch.randn(7, 64)
    native = F.linear(x.to(dtype), w.to(dtype)).float()
    with RoundedProducts(dtype):
        rounded = F.linear(x, w)
    # 同一格式里最多差最后一位
    torch.testing.assert_close(rounded, native, atol=0.02 if dtype is torch.float16 else 0.15, rtol=0.01)
    assert torch.equal(rounded, rounded.to(dtype).float()) and not torch.equal(rounded, F.linear(x, w))


def test_gradients_overflow_as_on_a_gpu():
    x, w = torch.ones(2, 4, requires_grad=True), torch.ones(3, 4, requires_grad=True)
    with RoundedProducts(torch.float16):
        (F.linear(x, w).sum() * 1e6).backward()
    assert torch.isinf(x.grad).any()


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_a_16_bit_loss_stays_close_to_float32(name):
    model = build_model(tiny_model_config(n_embd=32), 0)
    idx = torch.randint(0, 11, (2, 16))
    precision = Precision(make_config(f"precision={name}").precision, CPU)
    with precision.context():
        loss = model.loss(idx, idx)
    assert loss.item() == pytest.approx(model.loss(idx, idx).item(), rel=0.02)
    assert precision.scaler.is_enabled() == (name == "fp16") and "rounded" in precision.label


def test_recomputed_blocks_round_as_in_the_first_pass():
    cfg, found = make_config("precision=bf16", "model.ngrams=[]", "model.n_layer=1", "model.n_embd=32", "model.vocab_size=11"), []
    idx = torch.randint(0, 11, (2, 16))
    for mode in ("none", "every_block"):
        cfg.memory.activation_checkpointing = mode
        torch.manual_seed(0)
        model = build_model(cfg.model, 0).train()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.1)
        build_step(cfg, model, Precision(cfg.precision, CPU)).micro_batch(idx, idx, 1.0)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*found)


@pytest.mark.parametrize(("dtype", "units", "name", "label", "updates"), [
    ("auto", "auto", "fp32", "fp32", False), ("auto", "none", "fp32", "fp32", False), ("auto", "optimizer", "fp32", "fp32", True),
    ("auto", "all", "bf16", "bf16", True), ("bf16", "all", "bf16", "bf16", True), ("bf16", "none", "bf16", "bf16 (rounded, computed in fp32)", False),
    ("fp32", "all", "fp32", "fp32", False), ("fp16", "all", "fp16", "fp16 (rounded, computed in fp32)", False),
])
def test_a_cpu_takes_its_bf16_units_where_they_are_found_to_pay(dtype, units, name, label, updates):
    config = make_config(f"precision={dtype}", f"precision.cpu_bf16={units}")
    precision = Precision(config.precision, CPU)
    assert (precision.name, precision.label, precision.bf16_updates) == (name, label, updates)
    optimizer = build_step(config, build_model(tiny_model_config(), 0), precision).optimizer
    assert [group["ns_bf16"] for group in optimizer.param_groups if group["rule"] == "muon"] == [updates]


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
@pytest.mark.parametrize("recipe", ["modern", "gpt2"])
def test_a_step_on_bf16_units_has_the_gradients_of_a_rounded_one(weights, recipe):
    found = {}
    for units in ("none", "all"):
        cfg = make_config("precision=bf16", f"precision.cpu_bf16={units}", f"memory.weights={weights}", f"arch={recipe}",
                          "model.ngrams=[]", "model.n_layer=2", "model.n_embd=32", "model.n_head=2", "model.vocab_size=11")
        model = build_model(cfg.model, 0, weights).train()
        torch.manual_seed(1)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.1)
        idx = torch.randint(0, 11, (4, 16))
        loss = build_step(cfg, model, Precision(cfg.precision, CPU, weights)).micro_batch(idx, idx.roll(1), 1.0)
        found[units] = loss.item(), torch.cat([p.grad.float().flatten() for p in model.parameters()])
    assert found["all"][0] == pytest.approx(found["none"][0], rel=0.02)
    assert F.cosine_similarity(found["all"][1], found["none"][1], dim=0) > 0.99


def test_short_attention_in_bf16_is_that_of_float32():
    """Only under autocast, which says that the CPU has the units."""
    torch.manual_seed(0)
    qkv = torch.randn(2, 160, 3, 2, 16)
    assert not is_short(qkv.bfloat16(), 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        longer, longest = torch.zeros(1, 600, 3, 1, 1), torch.zeros(1, 1100, 3, 1, 1).bfloat16()
        assert is_short(longer.bfloat16(), 0.0) and is_short(qkv, 0.0) and not is_short(longer, 0.0) and not is_short(longest, 0.0)
        # 要丢弃时 SDPA 没有 flash：多长都在这里算
        assert is_short(longest, 0.1) and is_short(longer, 0.1)
        own = short_attention(0.25, None, qkv.bfloat16())
    torch.testing.assert_close(own.float(), short_attention(0.25, None, qkv), atol=0.03, rtol=0.03)
