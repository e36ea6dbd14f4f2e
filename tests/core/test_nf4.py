"""4-bit frozen weights: the nearest of NF4's levels, products those of the plain matrix, LoRA beside them trains, resumes and merges."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import (
    GPT2_RECIPE,
    QWEN3_RECIPE,
    make_config,
    no_grad_eval,
    resume,
    resumed_trainer,
    train,
    wild_model,
)
from test_lora import base_run, idx  # noqa: F401 - base_run is a fixture
from test_trainer import weights

from nanogpt.base.config import FinetuneConfig
from nanogpt.base.language import ConfigError
from nanogpt.core.memory.lora import LoRALinear, add_adapters, merge
from nanogpt.core.memory.nf4 import LEVELS, NF4Linear, dequantize, pairs, quantize
from nanogpt.plan.trace import Shape, trace
from nanogpt.run.metrics import flops_per_token
from nanogpt.weights import checkpoint
from nanogpt.weights.build import model_of
from nanogpt.weights.export import export
from nanogpt.weights.pretrained import open_pretrained

NF4 = FinetuneConfig(method="lora", rank=3, frozen_weights="nf4")


def test_the_levels_are_quantiles_of_the_normal_distribution():
    # 两边的端点各取半格之内：论文附录 E
    offset = (1 - 1 / 32 + 1 - 1 / 30) / 2
    upper = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64))[:-1]
    lower = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64))[:-1]
    values = torch.cat((upper, torch.zeros(1), lower)).sort().values
    torch.testing.assert_close(values / values.max(), torch.tensor(LEVELS, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(8, 24), (5, 7), (1, 64), (3, 65)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_becomes_the_nearest_level_of_its_group(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight.view(-1)[:70] *= torch.arange(70)[: weight.numel()] > 63
    packed, scales = quantize(weight)
    assert packed.dtype == torch.uint8 and packed.numel() == 32 * -(-weight.numel() // 64) and len(scales) == len(packed)
    expected = torch.zeros(weight.numel())
    for start in range(0, weight.numel(), 64):
        group = weight.reshape(-1)[start : start + 64].float()
        levels = torch.tensor(LEVELS) * group.abs().max()
        expected[start : start + 64] = levels[(group[:, None] - levels).abs().argmin(dim=1)]
    got = dequantize(packed, scales, pairs(weight.device), shape, torch.float32)
    torch.testing.assert_close(got, expected.view(shape), atol=1e-6, rtol=1e-6)
    # 再压一次不再改变什么
    assert torch.equal(quantize(got)[0], packed)


def test_products_and_gradients_are_those_of_the_plain_matrix_and_only_codes_are_kept():
    base = nn.Linear(48, 20)
    four = NF4Linear(base)
    dense, x = four.dense(torch.float32), torch.randn(2, 5, 48, requires_grad=True)
    y = four(x)
    assert torch.equal(y, F.linear(x, dense, base.bias))
    kept = [t for t in y.grad_fn.saved_tensors if t.is_floating_point() and t.numel() >= dense.numel()]
    assert not kept
    y.square().sum().backward()
    plain = x.detach().clone().requires_grad_()
    F.linear(plain, dense, base.bias).square().sum().backward()
    torch.testing.assert_close(x.grad, plain.grad)
    half = NF4Linear(nn.Linear(48, 20).bfloat16())(x.detach().bfloat16().requires_grad_())
    half.sum().backward()
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("recipe", [{}, GPT2_RECIPE, QWEN3_RECIPE], ids=["modern", "gpt2", "qwen3"])
@pytest.mark.parametrize("linears", [["c_attn", "c_proj", "c_fc"], ["c_attn"]], ids=str)
def test_a_model_in_4_bits_is_its_rounded_base_and_merges_into_plain_weights(recipe, linears):
    model, plain = (wild_model(std=0.2, **recipe) for _ in range(2))
    linear_names = [name for name, m in plain.h.named_modules() if isinstance(m, nn.Linear)]
    for name in linear_names:
        module = plain.h.get_submodule(name)
        module.weight.data = NF4Linear(module).dense(torch.float32)
    count, flops = model.parameter_count(), flops_per_token(model)
    add_adapters(model, FinetuneConfig(method="lora", rank=1, frozen_weights="nf4", linears=linears))
    assert sum(isinstance(m, NF4Linear) for m in model.modules()) == len(linear_names)
    assert count < model.parameter_count() < 1.5 * count and flops_per_token(model) < flops
    with no_grad_eval(model), no_grad_eval(plain):
        torch.testing.assert_close(model(idx()), plain(idx()), atol=1e-5, rtol=1e-5)
        for name, p in model.named_parameters():
            if "lora" in name:
                nn.init.normal_(p, std=0.2)
        adapted = model(idx())
    names = set(plain.state_dict())
    merge(model)
    assert set(model.state_dict()) == names and not any(isinstance(m, LoRALinear | NF4Linear) for m in model.modules())
    with no_grad_eval(model):
        torch.testing.assert_close(model(idx()), adapted, atol=1e-4, rtol=1e-4)


def test_qlora_trains_only_adapters_resumes_to_the_bit_writes_and_is_exported(tiny_overrides, base_run, capsys):  # noqa: F811
    overrides = [o for o in tiny_overrides if not o.startswith("model.")]
    more = [f"init_from={base_run}", "memory=lora4", "finetune.rank=4", "model.dropout=0.1", "eval_interval=2", "lr_decay_iters=4"]
    whole = train(overrides, *more, "max_iters=4", out="outputs/whole")
    assert whole.cfg.finetune.method == "lora" and whole.model.h[0].mlp.c_fc.base.weight.dtype == torch.uint8
    assert {name for name in whole.optimizer.state} == {n for n, _ in whole.model.named_parameters() if "lora" in n}
    train(overrides, *more, "max_iters=2", out="outputs/half")
    shutil.rmtree(base_run)
    second = resumed_trainer("outputs/half", "max_iters=4")
    second.fit()
    assert torch.equal(weights(second.model), weights(whole.model))
    merged = model_of(checkpoint.find(Path("outputs/whole"), "last"))
    assert not any("lora" in n or "base" in n for n in merged.state_dict())
    # 合并后的权重放得进 fp32：差别只是训练时的 bf16
    with no_grad_eval(whole.model), no_grad_eval(merged):
        torch.testing.assert_close(merged(idx()), whole.model.float()(idx()), atol=1e-3, rtol=1e-2)
    export("outputs/whole", Path("exported"), "last")
    assert all(t.dtype == torch.float32 for t in open_pretrained("outputs/whole").tensors.values())
    with pytest.raises(ConfigError, match="finetune.frozen_weights cannot change on resume"):
        resume("outputs/whole", "max_iters=9", "finetune.frozen_weights=same")


def test_the_plan_knows_that_4_bits_are_a_quarter_of_16():
    def weight_bytes(*typed):
        cfg = make_config("model.n_embd=256", "model.n_layer=2", "model.n_head=4", "model.ngrams=[]", "model.vocab_size=16", "optimizer=adamw", "model.block_size=16", *typed)
        return trace(cfg, Shape(1, 1, 1)).weight_bytes

    lora, four = weight_bytes("finetune=lora", "memory.weights=bf16"), weight_bytes("memory=lora4")
    matrices = 2 * (4 + 8) * 256 * 256
    saved = matrices * (2 - 0.5625)
    assert abs(lora - four - saved) < 0.02 * saved
