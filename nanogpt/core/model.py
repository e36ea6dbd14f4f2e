# 模型本身，从 token 到 logits 与损失，一页读完；小算子在 kernels，注意力在 attention，损失的分块在 loss
# 省显存的重算、torch.compile、写作的快路都从外面包上来（wrapping），这里没有为它们留的分支
"""The GPT model: embeddings, blocks, head; forward gives logits, loss never holds all of them.

`arch=gpt2` is GPT-2 (Radford et al. 2019), parameter names included. `arch=modern` swaps in RoPE,
RMSNorm, QK-norm, squared ReLU and zero-initialised output projections. `arch=llama` and `arch=qwen3` compute what
transformers' LlamaForCausalLM and Qwen3ForCausalLM compute.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanogpt.base.config import ModelConfig
from nanogpt.core.attention import CausalSelfAttention
from nanogpt.core.initialize import initialize
from nanogpt.core.kernels import ACTIVATIONS, Dropout, beginnings, rms_norm
from nanogpt.core.kv_cache import KVCache
from nanogpt.core.loss import chunked_cross_entropy
from nanogpt.core.ngrams import NgramEmbedding
from nanogpt.core.rope import rope_table
from nanogpt.core.tables import look_up


class Norm(nn.Module):
    """RMSNorm with or without a gain, or LayerNorm with weight and optional bias, over the last dimension."""

    rms_norm = staticmethod(rms_norm)

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.kind, self.eps = config.norm, config.norm_eps
        layernorm = config.norm == "layernorm"
        self.weight = nn.Parameter(torch.ones(config.n_embd)) if layernorm or config.norm_gain else None
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if layernorm and config.bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # RMSNorm 可以不带增益：紧跟其后的线性层能吸收它，少一次乘法
        if self.kind == "rmsnorm":
            return self.rms_norm(x, self.weight, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class MLP(nn.Module):
    """Position-wise feed-forward layer C -> mlp_width -> C."""

    activations = ACTIVATIONS

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, self.activation = config.mlp_width, config.activation
        # SwiGLU 的两个矩阵合成一次乘法：前一半过 SiLU，再乘后一半
        self.c_fc = nn.Linear(config.n_embd, width * (2 if self.activation == "swiglu" else 1), bias=config.bias)
        self.c_proj = nn.Linear(width, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.c_proj(self.activations[self.activation](self.c_fc(x))))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, attention: nn.Module, mlp: nn.Module):
        super().__init__()
        self.ln_1 = Norm(config)
        self.attn = attention
        self.ln_2 = Norm(config)
        self.mlp = mlp

    def forward(self, x: torch.Tensor, rope=None, cache: KVCache | None = None, visible=None) -> torch.Tensor:
        # 只有成篇的数据才有 visible：使用者自己的注意力不必认识它
        seen = {} if visible is None else {"visible": visible}
        x = x + self.attn(self.ln_1(x), rope, cache, **seen)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Decoder-only transformer. idx and targets are (B, T) int64 with T <= block_size.

    To change a part, subclass and override `make_attention` or `make_mlp`, and name the class in
    the model yaml's `_target_`.
    """

    cross_entropy = staticmethod(chunked_cross_entropy)

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.vocab_size, "vocab_size comes from the data set"
        self.config = config = config.completed()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.position == "learned" else None
        self.ngrams = nn.ModuleList(NgramEmbedding(n, config) for n in config.ngrams)
        self.drop = Dropout(config.dropout)
        self.h = nn.ModuleList(
            Block(config, self.make_attention(layer), self.make_mlp(layer)) for layer in range(config.n_layer)
        )
        self.ln_f = Norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.wte.weight
        if config.position == "rope":
            # 可由配置重算，不必存进 checkpoint
            for name, table in zip(("rope_cos", "rope_sin"), rope_table(config), strict=True):
                self.register_buffer(name, table, persistent=False)
        self.reset_parameters()

    def make_attention(self, layer: int) -> nn.Module:
        """Build the attention of block `layer`; called as attn(x, rope, cache), for documents with visible=."""
        return CausalSelfAttention(self.config, layer)

    def make_mlp(self, layer: int) -> nn.Module:
        """Build the feed-forward part of block `layer`; called as mlp(x)."""
        return MLP(self.config)

    def reset_parameters(self) -> None:
        """Draw all weights anew from torch's global generator."""
        initialize(self)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.wte.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the activations outside autocast; with int8 weights the embedding says it."""
        return getattr(self.wte, "dtype", self.wte.weight.dtype)

    def embed(self, idx: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """Return what the first block reads, (B, T, C); with a cache this begins its next step."""
        T = idx.size(1)
        assert T <= self.config.block_size, f"{T} positions do not fit block_size={self.config.block_size}"
        at = cache.begin(T) if cache is not None else slice(0, T)
        inside = self.inside(idx) if cache is None else None
        if self.config.marked:
            idx = torch.where(idx < 0, ~idx, idx)
        x = look_up(self.wte, idx)
        if self.wpe is not None:
            # 每篇文章的位置从 0 数起，与单独写它时一样
            x = x + self.wpe.weight[at if inside is None else inside]
        if self.ngrams:
            history = cache.recent(max(self.config.ngrams) - 1) if cache is not None else None
            for ngram in self.ngrams:
                x = x + ngram(idx, history, inside)
        if self.config.embed_norm:
            x = rms_norm(x)
        return self.drop(x)

    def inside(self, idx: torch.Tensor) -> torch.Tensor | None:
        """How many ids of the same document stand before each id of idx, (B, T); None where text runs on."""
        if (begins := beginnings(idx, self.config)) is None:
            return None
        at = torch.arange(idx.size(1), device=idx.device).expand_as(idx)
        # 最近一篇的开头；行首之前视为 0，接着上一行写的文章从 0 数起
        return at - torch.where(begins, at, 0).cummax(dim=1).values

    def visible(self, idx: torch.Tensor) -> torch.Tensor | None:
        """What each position attends to, (B, 1, T, T) bool: earlier ones of its document; None: all earlier ones."""
        if (begins := beginnings(idx, self.config)) is None:
            return None
        document = begins.cumsum(dim=1)
        return (document[:, :, None] == document[:, None, :]).tril_()[:, None]

    def hidden(self, idx: torch.Tensor, cache: KVCache | None = None, blocks=None) -> torch.Tensor:
        """Return the normalised last hidden state (B, T, C); documents packed into one row do not see each other.

        `blocks` are called in place of the model's own.
        """
        x = self.embed(idx, cache)
        # 写作时一行只有一篇
        visible = self.visible(idx) if cache is None else None
        at = cache.position if cache is not None else slice(0, idx.size(1))
        rope = (self.rope_cos[at], self.rope_sin[at]) if self.config.position == "rope" else None
        for block in self.h if blocks is None else blocks:
            x = block(x, rope, cache, visible)
        if cache is not None:
            cache.advance(idx)
        return self.ln_f(x)

    def last_hidden(self, idx: torch.Tensor, cache: KVCache, last: torch.Tensor) -> torch.Tensor:
        """Read idx (B, T) into a cache; return the hidden states (B, C) at position last (B,) of each row."""
        return self.hidden(idx, cache)[torch.arange(len(idx), device=idx.device), last]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Project hidden states (..., C) to logits (..., V), soft-capped if the config says so."""
        return self.softcapped(self.lm_head(hidden))

    def softcapped(self, logits: torch.Tensor) -> torch.Tensor:
        """Bound logits smoothly to +-logit_softcap, if the config says so."""
        cap = self.config.logit_softcap
        # 平滑地限制在 ±cap 之内，训练后期 logits 不会越长越大
        return cap * torch.tanh(logits / cap) if cap else logits

    def next_logits(self, idx: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Logits (B, V) behind one more id per row, idx (B,)."""
        return self.logits(self.hidden(idx[:, None], cache)[:, -1])

    def forward(self, idx: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """Return logits (B, T, V)."""
        return self.logits(self.hidden(idx, cache))

    def loss(self, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy in nats, shape (), computed in chunks of tokens.

        In evaluation mode and with data of documents, targets of -1 (context, labels, unfilled ends) do not count.
        """
        c, hidden = self.config, self.hidden(idx)
        ignoring = c.separator is not None or c.marked or not self.training
        return self.cross_entropy(hidden, self.lm_head.weight, targets, softcap=c.logit_softcap, ignoring=ignoring)

    def parameter_count(self) -> int:
        """Number of distinct parameters (tied weights count once), frozen ones, int8 and 4-bit weights included."""
        small = (b for name, b in self.named_buffers() if name.endswith(("weight", "bias")))
        # 4 位的一个字节两个；写作时补齐了行的，自己说有几个
        return sum(getattr(t, "count", t.numel() << (t.dtype == torch.uint8)) for t in {*self.parameters(), *small})
