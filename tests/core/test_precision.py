"""Number formats on a CPU: rounding where a GPU rounds."""

import pytest
import torch
import torch.nn.functional as F
from conftest import make_config, tiny_model_config

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


def test_auto_is_float32_on_a_cpu():
    assert Precision(make_config().precision, CPU).name == "fp32"
