"""LoRA: step 0 is the base, only adapters are trained, merging changes nothing, resume is exact."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import (
    GPT2_RECIPE,
    QWEN3_RECIPE,
    new_session,
    no_grad_eval,
    reseal,
    resume,
    resumed_trainer,
    train,
    wild_model,
)
from test_trainer import weights

from nanogpt.base.config import FinetuneConfig
from nanogpt.base.language import ConfigError
from nanogpt.core.memory.lora import LoRALinear, add_adapters, merge
from nanogpt.run.metrics import flops_per_token
from nanogpt.weights import checkpoint
from nanogpt.weights.build import build_model, model_of
from nanogpt.weights.pretrained import build_pretrained, open_pretrained

LORA = ["finetune=lora", "finetune.rank=4", "finetune.dropout=0.1", "model.dropout=0.1"]
RECIPES = {"modern": {}, "gpt2": GPT2_RECIPE, "qwen3": QWEN3_RECIPE}


def idx():
    return torch.randint(0, 11, (2, 16), generator=torch.Generator().manual_seed(3))


def adapted(recipe, **settings):
    """(model with adapters, logits of its base); every base weight random."""
    model = wild_model(std=0.2, **RECIPES[recipe])
    with no_grad_eval(model):
        before = model(idx())
    add_adapters(model, FinetuneConfig(method="lora", **settings))
    return model, before


@pytest.mark.parametrize("recipe", RECIPES)
def test_step_zero_equals_the_base_and_merging_equals_the_adapters(recipe):
    model, before = adapted(recipe)
    with no_grad_eval(model):
        assert torch.equal(model(idx()), before)
        for name, p in model.named_parameters():
            if "lora" in name:
                torch.nn.init.normal_(p, std=0.2)
        with_adapters = model(idx())
    names = set(build_model(model.config, 0).state_dict())
    merge(model)
    assert set(model.state_dict()) == names and not any(isinstance(m, LoRALinear) for m in model.modules())
    with no_grad_eval(model):
        torch.testing.assert_close(model(idx()), with_adapters, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(with_adapters, before, atol=1e-2)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_base_gets_no_gradient_and_the_adapters_those_of_the_formula(recipe):
    model, _ = adapted(recipe, rank=2, alpha=6.0)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, LoRALinear):
                m.lora_b.normal_(std=0.2)
    model.loss(idx(), idx().roll(-1, 1)).backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == {n for n, _ in model.named_parameters() if "lora" in n} and len(trained) == 2 * 4 * 2
    linear = model.h[1].mlp.c_fc
    # 链式法则：dA = scale · Bᵀ dW，dB = scale · dW Aᵀ，dW 是合并后权重的梯度
    plain = build_model(model.config, 0)
    plain.load_state_dict(merge(copy.deepcopy(model)).state_dict())
    plain.loss(idx(), idx().roll(-1, 1)).backward()
    full = plain.h[1].mlp.c_fc.weight.grad
    torch.testing.assert_close(linear.lora_a.grad, 3.0 * linear.lora_b.T @ full, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(linear.lora_b.grad, 3.0 * full @ linear.lora_a.T, atol=1e-5, rtol=1e-4)


def test_a_frozen_head_costs_no_gradient_memory():
    model, _ = adapted("gpt2", rank=1)
    loss = model.loss(idx(), idx())
    saved = loss.grad_fn.saved_tensors
    assert model.lm_head.weight.shape not in [t.shape for t in saved if t is not None]
    frozen = build_model(model.config, 0)
    assert flops_per_token(model) < flops_per_token(frozen)


def test_linears_that_the_model_lacks_are_named():
    with pytest.raises(ConfigError, match=r"finetune.linears=\['q_proj'\] does not fit the model; choose from: c_attn, c_fc, c_proj"):
        adapted("gpt2", linears=["q_proj"])
    model, _ = adapted("gpt2", linears=["c_attn"])
    assert sum(isinstance(m, LoRALinear) for m in model.modules()) == 2


# ---- 训练 ----


@pytest.fixture
def base_run(in_tmp, tiny_overrides):
    """A run of our own with a few steps, for init_from."""
    train(tiny_overrides, "max_iters=3", out="outputs/base")
    return "outputs/base"


@pytest.mark.parametrize(("optimizer", "memory"), [("adamw", "default"), ("muon", "lean")])
def test_lora_trains_only_adapters_resumes_to_the_bit_and_needs_the_base_no_more(tiny_overrides, base_run, optimizer, memory):
    base = open_pretrained(base_run)
    overrides = [o for o in tiny_overrides if not o.startswith("model.")]
    more = [f"optimizer={optimizer}", f"memory={memory}", f"init_from={base_run}", *LORA, "eval_interval=4", "lr_decay_iters=8"]
    whole = train(overrides, *more, "max_iters=8", out="outputs/whole")
    for name, tensor in base.tensors.items():
        assert torch.equal(whole.model.state_dict()[name], tensor)
    assert {name for name in whole.optimizer.state} == {n for n, _ in whole.model.named_parameters() if "lora" in n}
    train(overrides, *more, "max_iters=4", out="outputs/half")
    Path(base_run).rename("outputs/gone")
    second = resumed_trainer("outputs/half", "max_iters=8")
    second.fit()
    assert torch.equal(weights(second.model), weights(whole.model))
    # 装入取样用的模型时已合并，词表也在
    merged = model_of(checkpoint.find(Path("outputs/whole"), "last"))
    assert not any("lora" in n for n, _ in merged.named_parameters())
    with no_grad_eval(whole.model), no_grad_eval(merged):
        torch.testing.assert_close(merged(idx()), whole.model(idx()), atol=1e-5, rtol=1e-4)
    assert (Path("outputs/whole/ckpt/iter_00000008/tokenizer.json")).is_file()
    with pytest.raises(ConfigError, match="finetune.rank cannot change on resume"):
        resume("outputs/whole", "max_iters=9", "finetune.rank=2")


def test_a_run_from_before_these_keys_still_resumes(tiny_overrides, base_run):
    import yaml

    folder = Path(base_run) / "ckpt" / "iter_00000003"
    saved = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    del saved["init_from"], saved["finetune"]
    (folder / "config.yaml").write_text(yaml.safe_dump(saved), encoding="utf-8")
    reseal(folder)
    assert resume(base_run, "max_iters=5").cfg.finetune.method == "full"
    assert model_of(checkpoint.find(Path(base_run), "last")) is not None


def test_lora_on_random_weights_says_so(in_tmp, tiny_overrides, capsys):
    session = new_session(tiny_overrides, *LORA, out="outputs/a")
    trainer = session._build()
    session._announce(trainer)
    shown = capsys.readouterr().out
    assert "finetune=lora without init_from: the frozen weights are random" in shown
    assert f"{sum(p.numel() for p in trainer.parameters):,} parameters are trained" in shown


def test_init_from_one_of_our_runs_starts_where_it_stood_and_keeps_its_vocabulary(tiny_overrides, base_run):
    overrides = [o for o in tiny_overrides if not o.startswith(("model.", "dataset"))]
    Path("other.txt").write_text("of love and no more words\nthe king speaks " * 40, encoding="utf-8")
    text = ["dataset=text_file", "dataset.path=other.txt", "dataset.dir=prepared"]
    session = new_session(overrides, *text, f"init_from={base_run}", "model.block_size=8", out="outputs/tuned")
    base = open_pretrained(base_run)
    assert session.data.tokenizer.characters == base.tokenizer.characters and session.cfg.model.block_size == 8
    trainer = session._build()
    assert all(torch.equal(trainer.model.state_dict()[k], v) for k, v in base.tensors.items()) and trainer.progress.iteration == 0
    again = open_pretrained("outputs/base/ckpt/iter_00000003")
    assert torch.equal(weights(build_pretrained(again)), weights(build_pretrained(base)))
    Path("strange.txt").write_text("QUARTZ " * 40, encoding="utf-8")
    with pytest.raises(ConfigError, match="^init_from=outputs/base: the vocabulary of that model lacks"):
        new_session(overrides, "dataset=text_file", "dataset.path=strange.txt", "dataset.dir=strange", f"init_from={base_run}", out="outputs/b")


def test_what_contradicts_the_weights_is_one_line(tiny_overrides, base_run):
    overrides = [o for o in tiny_overrides if not o.startswith("model.")]
    for typed, line in {
        "model.n_embd=32": "model.n_embd=32 contradicts init_from=outputs/base, whose weights have 16; leave model.n_embd out",
        "model=small": "contradicts init_from=outputs/base",
        "arch=gpt2": "model.arch=gpt2 contradicts",
        "init_from=outputs/nothing/here": "there is no such folder or file here",
    }.items():
        with pytest.raises(ConfigError, match=line.replace("(", r"\(")):
            new_session([*overrides, f"init_from={base_run}", typed], out="outputs/b")
    Path("other.txt").write_text("other characters 123\n" * 40, encoding="utf-8")
    text = ["dataset=text_file", "dataset.path=other.txt", "dataset.dir=prepared", "dataset.tokenizer=byte", f"init_from={base_run}"]
    with pytest.raises(ConfigError, match=r"is not that of the data \(256 tokens, byte\); use dataset=text_file"):
        new_session([o for o in overrides if not o.startswith("dataset")], *text, out="outputs/b")
