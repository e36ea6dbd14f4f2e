"""The model: equal to GPT-2, cached equal to full, chunked equal to plain, open to subclasses."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import GPT2_RECIPE, LLAMA_RECIPE, QWEN3_RECIPE, no_grad_eval, tiny_model_config

import nanogpt
from nanogpt.base.language import ConfigError
from nanogpt.core import kernels
from nanogpt.core.attention import CausalSelfAttention
from nanogpt.core.kernels import attention, squared_relu, swiglu
from nanogpt.core.kv_cache import KVCache
from nanogpt.core.loss import chunked_cross_entropy
from nanogpt.core.memory.recompute import recompute_blocks
from nanogpt.core.model import GPT
from nanogpt.core.ngrams import size_text, table_count
from nanogpt.core.rope import rope_table
from nanogpt.weights.build import build_model, preset, preset_names
from nanogpt.write.speed.formats import convert

RECIPES = {
    "modern": {}, "gpt2": GPT2_RECIPE, "ngrams": {"ngrams": [2, 3], "ngram_buckets": 101}, "llama": LLAMA_RECIPE, "qwen3": QWEN3_RECIPE,
}


def random_ids(rows=2, length=16, vocab=11):
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(3))


def awake(config, seed=0):
    """A model whose zero-initialised parts are random too, so that every path matters."""
    model = build_model(config, seed)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    return model


def test_gpt2_recipe_equals_transformers_gpt2():
    transformers = pytest.importorskip("transformers")
    hf_config = transformers.GPT2Config(
        vocab_size=61, n_positions=32, n_embd=48, n_layer=3, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    torch.manual_seed(0)
    reference = transformers.GPT2LMHeadModel(hf_config).eval()
    for p in reference.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model = GPT(tiny_model_config(n_layer=3, n_head=4, n_embd=48, block_size=32, vocab_size=61, **GPT2_RECIPE)).eval()
    own = model.state_dict()
    for name, tensor in reference.state_dict().items():
        name = name.removeprefix("transformer.")
        # Hugging Face 的 Conv1D 存的是转置
        conv = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        own[name].copy_(tensor.t() if conv else tensor)
    idx = random_ids(3, 32, 61)
    with torch.no_grad():
        torch.testing.assert_close(model(idx), reference(idx).logits, atol=1e-5, rtol=1e-5)
    assert model.parameter_count() == reference.num_parameters()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("pieces", [[1] * 16, [5, 1, 1, 9], [16], [3, 13]])
def test_cached_decoding_equals_full_forward(recipe, pieces):
    model = awake(tiny_model_config(**RECIPES[recipe]))
    idx = random_ids()
    with no_grad_eval(model):
        full = model(idx)
        cache = KVCache(model, 2)
        parts = [model(piece, cache) for piece in idx.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), full, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_token_never_sees_the_future(recipe):
    model = awake(tiny_model_config(**RECIPES[recipe]))
    idx = random_ids()
    changed = idx.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 11
    with no_grad_eval(model):
        torch.testing.assert_close(model(idx)[:, :9], model(changed)[:, :9])


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("rows_per_chunk", [1, 7, 26])
def test_chunked_loss_and_gradients_equal_the_plain_ones(softcap, rows_per_chunk, monkeypatch):
    torch.manual_seed(0)
    hidden = torch.randn(2, 13, 8, dtype=torch.double, requires_grad=True)
    # 一行 logits 恰好 1 MiB（fp32），chunk_mib 就是每块的行数
    weight = torch.randn(2**18, 8, dtype=torch.double, requires_grad=True)
    targets = torch.randint(0, 2**18, (2, 13))
    logits = hidden @ weight.t()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    plain = F.cross_entropy(logits.view(-1, 2**18), targets.view(-1))
    wanted = torch.autograd.grad(plain * 3, (hidden, weight))
    chunked = chunked_cross_entropy(hidden, weight, targets, softcap=softcap, chunk_mib=rows_per_chunk)
    got = torch.autograd.grad(chunked * 3, (hidden, weight))
    torch.testing.assert_close(chunked.double(), plain, atol=1e-5, rtol=1e-5)
    for g, w in zip(got, wanted):
        torch.testing.assert_close(g, w, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("recipe", RECIPES)
def test_loss_is_the_cross_entropy_of_the_logits(recipe):
    model = awake(tiny_model_config(**RECIPES[recipe]))
    idx, targets = random_ids(), random_ids(vocab=10) + 1
    expected = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model.loss(idx, targets), expected, atol=1e-5, rtol=1e-5)


def test_the_loss_never_holds_all_logits():
    hidden, weight = torch.randn(1, 4096, 4, requires_grad=True), torch.randn(512, 4, requires_grad=True)
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        chunked_cross_entropy(hidden, weight, torch.zeros(1, 4096, dtype=torch.long), softcap=0.0, chunk_mib=1).backward()
    # 1 MiB 的 fp32 是 262144 个数；完整 logits 有 2097152 个
    assert largest <= 262144


@pytest.mark.parametrize("recipe", RECIPES)
def test_activation_checkpointing_changes_no_gradient(recipe):
    model = awake(tiny_model_config(dropout=0.2, **RECIPES[recipe]))
    idx, targets = random_ids(), random_ids()
    gradients = []
    for kind in ("none", "every_block"):
        if kind != "none":
            recompute_blocks(model, kind)
        torch.manual_seed(5)
        gradients.append(torch.autograd.grad(model.loss(idx, targets), list(model.parameters())))
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


@pytest.mark.parametrize(("T", "L", "masked", "dtype"), [
    (1, 9, False, torch.float32), (1, 9, True, torch.float32), (9, 9, False, torch.bfloat16), (9, 9, True, torch.float32),
])
def test_fewer_key_heads_equal_as_many_that_are_copies(T, L, masked, dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, length, 8, dtype=dtype) for heads, length in ((6, T), (2, L), (2, L)))
    mask = torch.ones(2, 1, T, L, dtype=torch.bool).tril(L - T) if masked else None
    copied = attention(q, *(t.repeat_interleave(3, dim=1) for t in (k, v)), mask, 0.0, 0.3)
    torch.testing.assert_close(attention(q, k, v, mask, 0.0, 0.3), copied)


@pytest.mark.parametrize("queries", [5, 128])
@pytest.mark.parametrize("changes", [{}, {"position": "none"}, {"qk_norm": False}, {"rope_scaling": "yarn", "rope_attention_factor": 1.3}])
def test_attention_over_a_short_context_equals_its_parts_one_after_another(monkeypatch, changes, queries):
    """Value and gradients; tables of YaRN also lengthen what they rotate; also a few queries at a time."""
    torch.manual_seed(0)
    monkeypatch.setattr(kernels, "QUERIES", queries)
    config = tiny_model_config(**changes).completed()
    attend, x = CausalSelfAttention(config, 0).double(), torch.randn(2, 16, 16, dtype=torch.double, requires_grad=True)
    rope = None if config.position == "none" else tuple(table.double() for table in rope_table(config))
    outcomes = []
    for short in (True, False):
        monkeypatch.setattr("nanogpt.core.attention.is_short", lambda qkv, dropout, short=short: short)
        y = attend(x, rope)
        outcomes.append((y, *torch.autograd.grad(y.square().sum(), (x, attend.c_attn.weight))))
    for a, b in zip(*outcomes):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("queries", [5, 12])
@pytest.mark.parametrize("documents", [False, True])
def test_attention_over_a_short_context_drops_as_its_formula_says(monkeypatch, queries, documents):
    """Value and gradients of softmax(...) * kept * factor; also a few queries at a time, and with ends of documents."""
    torch.manual_seed(0)
    kept, taken = torch.rand(4, 12, 12) < 0.75, []

    def kept_here(like, p):
        taken.append(like.size(1))
        return kept[:, sum(taken) - like.size(1) : sum(taken), : like.size(2)].to(torch.uint8), 1 / (1 - p)

    monkeypatch.setattr(kernels, "_kept", kept_here)
    monkeypatch.setattr(kernels, "QUERIES", queries)
    q, k, v = (torch.randn(2, 12, 1, 2, 8, dtype=torch.double, requires_grad=True) for _ in range(3))
    unseen = torch.ones(2, 1, 12, 12).triu(1).bool()
    if documents:
        # 第二篇从第 7 个起：后面的看不到前面的
        unseen[1, 0, 7:, :7] = True
    ours = kernels.short_attention(0.3, ~unseen if documents else None, q, k, v, dropout=0.25)
    heads = [part.squeeze(2).transpose(1, 2) for part in (q, k, v)]
    scores = (0.3 * heads[0] @ heads[1].mT).masked_fill(unseen, float("-inf"))
    plain = (scores.softmax(-1) * kept.view(2, 2, 12, 12) / 0.75) @ heads[2]
    torch.testing.assert_close(ours, plain)
    for own, other in zip(*(torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (ours, plain))):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.999])
def test_dropout_drops_its_share_and_keeps_the_mean(p):
    torch.manual_seed(0)
    x = torch.ones(1001, 1003, requires_grad=True)
    y = kernels.dropout(x, p)
    dropped, share = (y == 0).double().mean().item(), min(255, max(1, round(256 * p))) / 256
    assert dropped == pytest.approx(share, abs=4 * (share * (1 - share) / x.numel()) ** 0.5) and share == pytest.approx(p, abs=1 / 256)
    torch.testing.assert_close(y[y > 0], torch.full_like(y[y > 0], 1 / (1 - share)))
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y)
    torch.manual_seed(0)
    assert torch.equal(kernels.dropout(x, p), y) and not torch.equal(kernels.dropout(x, p), y)
    # 相邻的、隔一个随机数的，互不相干
    for apart in (1, 8):
        assert ((y == 0).flatten()[:-apart] & (y == 0).flatten()[apart:]).double().mean().item() == pytest.approx(share**2, abs=3e-3)


def test_dropout_is_for_training_only():
    x = torch.ones(8, 64)
    layer = kernels.Dropout(0.5)
    assert (layer(x) == 0).any() and torch.equal(layer.eval()(x), x) and torch.equal(kernels.Dropout(0.0)(x), x)


def test_the_squared_relu_kernel_has_the_gradient_of_its_formula():
    x = torch.randn(3, 8, dtype=torch.double, requires_grad=True)
    torch.testing.assert_close(squared_relu(x), x.relu().square())
    assert torch.autograd.gradcheck(squared_relu, x)


def test_the_swiglu_kernel_has_the_gradient_of_its_formula():
    x = torch.randn(3, 8, dtype=torch.double, requires_grad=True)
    torch.testing.assert_close(swiglu(x), F.silu(x[:, :4]) * x[:, 4:])
    assert torch.autograd.gradcheck(swiglu, x)


def test_modern_starts_as_a_uniform_guess():
    model = build_model(tiny_model_config(), 0)
    loss = model.loss(random_ids(), random_ids())
    assert loss.item() == pytest.approx(torch.log(torch.tensor(11.0)).item(), abs=1e-4)


def test_a_subclass_can_replace_attention_and_mlp():
    class Windowed(CausalSelfAttention):
        pass

    class Mine(GPT):
        def make_attention(self, layer):
            return Windowed(self.config, layer) if layer == 0 else super().make_attention(layer)

        def make_mlp(self, layer):
            return torch.nn.Linear(self.config.n_embd, self.config.n_embd)

    model = Mine(tiny_model_config())
    assert isinstance(model.h[0].attn, Windowed) and not isinstance(model.h[1].attn, Windowed)
    model.loss(random_ids(), random_ids()).backward()
    assert model.h[0].mlp.weight.grad is not None


@pytest.mark.parametrize("name", preset_names())
def test_one_line_constructors_build_every_preset(name):
    with torch.device("meta"):
        model = getattr(nanogpt, name)(vocab_size=50257)
    assert (model.config.n_layer, model.config.n_embd) == (preset(name).n_layer, preset(name).n_embd)


def test_gpt2_sizes_are_the_published_ones():
    with torch.device("meta"):
        counts = [nanogpt.create_model(name, vocab_size=50257).parameter_count() for name in ("gpt2", "gpt2_medium", "gpt2_large", "gpt2_xl")]
    assert counts == [124_439_808, 354_823_168, 774_030_080, 1_557_611_200]


def test_parameter_names_are_those_of_gpt2():
    names = dict(GPT(tiny_model_config(**GPT2_RECIPE)).named_parameters())
    assert {"wte.weight", "wpe.weight", "h.0.ln_1.weight", "h.0.attn.c_attn.bias", "h.1.mlp.c_proj.weight", "ln_f.bias"} <= set(names)
    assert "lm_head.weight" not in names


def test_half_precision_autocast_keeps_the_loss_close():
    model = awake(tiny_model_config(n_embd=32))
    idx = random_ids()
    plain = model.loss(idx, idx)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model.loss(idx, idx)
        half.backward()
    assert half.dtype == torch.float32 and abs(half.item() - plain.item()) < 0.05 * plain.item()


def test_a_models_size_names_its_look_up_tables_apart_also_with_int8_weights():
    model = nanogpt.create_model("tiny", vocab_size=76)
    total = sum(p.numel() for p in model.parameters())
    assert model.parameter_count() == total and table_count(model) == (77**2 + 3 * 16384) * 256
    said = size_text(model)
    assert said == f"{(total - table_count(model)) / 1e6:.2f}M + {table_count(model) / 1e6:.2f}M in look-up tables"
    for precision in ("int8", "int4"):
        smaller = copy.deepcopy(model)
        convert(smaller, precision)
        # 词表 76 行，4 位的补到 80 行：多出的不算
        assert smaller.parameter_count() == total and size_text(smaller) == said
    assert size_text(nanogpt.create_model("tiny", vocab_size=76, arch="gpt2")).endswith("M")


@pytest.mark.parametrize("arch", ["modern", "gpt2", "llama", "qwen3"])
def test_a_preset_of_every_recipe_computes(arch):
    # yaml 把 1e-5 读成字：Hydra 认得，这里的读法不认得
    model = nanogpt.create_model("tiny", vocab_size=7, arch=arch, n_layer=1, n_embd=8, n_head=2, block_size=4)
    assert model(torch.zeros(1, 4, dtype=torch.long)).shape == (1, 4, 7)


@pytest.mark.parametrize(("changes", "said"), [
    ({"position": "rop"}, r"model.position=rop is not known; choose one of: rope \| learned"), ({"activation": "relu"}, "model.activation=relu is not known"),
    ({"norm": "rmsnom"}, "model.norm=rmsnom"), ({"rope_scaling": "foo"}, "model.rope_scaling=foo"), ({"init": "gpt"}, "model.init=gpt"),
    ({"n_layer": -1}, "model.n_layer=-1 is out of range"), ({"block_size": 0}, "model.block_size=0 is out of range"), ({"n_head": 0}, "model.n_head=0 is out of range"),
    ({"n_embd": 65}, "model.n_embd=65 is not divisible by"),
])
def test_a_model_made_from_python_has_only_what_the_command_line_takes(changes, said):
    with pytest.raises(ConfigError, match=said):
        nanogpt.create_model("tiny", vocab_size=7, **{"n_head": 2, **changes})
    with pytest.raises(ConfigError, match="lr_schedule=cosin is not known"):
        nanogpt.Schedule(1e-3, 0.0, 5, 20, "cosin", 0.2)
