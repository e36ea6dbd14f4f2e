"""The GPT of this package for transformers, in one file that needs nothing else of nanogpt.

`nanogpt export` copies this file beside the weights; AutoModelForCausalLM loads it with trust_remote_code=True.
"""

# 随导出的权重一起走的模型文件：transformers 以 trust_remote_code 载入它，对方机器上不必装 nanogpt
# 所以这里把 core/model 与 core/attention 的公式再写一遍，只写前向；改了那边要改这边（测试比 logits）
# KV 缓存用 transformers 的 DynamicCache；上下文满了之后照旧每个 token 重读最近的 block_size 个
# n-gram 要看前几个 id，缓存里没有：generate 每一步把它们另外送来，自己写循环时由上一次 forward 记在缓存上
# 左侧可以有填充：位置从第一个真的 token 数起，n-gram 与注意力都看不见填充

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# 与 nanogpt.core.attention 中的同名常数一致
RMS_EPS = 1e-6
QK_NORM_MAX_LOGIT = 12.0


class NanoGPTConfig(PretrainedConfig):
    """The fields of nanogpt.base.config.ModelConfig that change the result."""

    # transformers 要一个 PretrainedConfig 才存得进、读得出 config.json

    model_type = "nanogpt"
    keys_to_ignore_at_inference = ()

    def __init__(
        self, vocab_size=256, block_size=128, n_layer=4, n_head=4, n_embd=256, mlp_ratio=4, bias=False, position="rope",
        norm="rmsnorm", activation="relu2", qk_norm=True, embed_norm=True, tie_embeddings=False, logit_softcap=15.0,
        rope_base=10000.0, ngrams=(), ngram_buckets=16384, use_cache=True, **others,
    ):
        self.vocab_size, self.block_size, self.n_layer, self.n_head = vocab_size, block_size, n_layer, n_head
        self.n_embd, self.mlp_ratio, self.bias, self.position, self.norm = n_embd, mlp_ratio, bias, position, norm
        self.activation, self.qk_norm, self.embed_norm = activation, qk_norm, embed_norm
        self.tie_embeddings, self.logit_softcap, self.rope_base = tie_embeddings, logit_softcap, rope_base
        self.ngrams, self.ngram_buckets = list(ngrams), ngram_buckets
        # transformers 的通用代码用这几个名字
        self.max_position_embeddings, self.num_hidden_layers, self.hidden_size = block_size, n_layer, n_embd
        super().__init__(**{**others, "tie_word_embeddings": False})
        # 新旧版本的基类对它各有各的处理：自己定
        self.use_cache = use_cache


def rms_norm(x):
    """RMSNorm without a gain over the last dimension."""
    return F.rms_norm(x, (x.size(-1),), eps=RMS_EPS)


def rotate(x, base, past):
    """Rotary position embedding of x (B, T, nh, hs) behind `past` positions; the pairs are (i, i + hs/2)."""
    T, half = x.size(1), x.size(-1) // 2
    # 每次现算：放进 buffer 的话，transformers 在 meta 设备上造模型时会丢掉它
    frequency = base ** -(torch.arange(0, 2 * half, 2, dtype=torch.float32, device=x.device) / (2 * half))
    angle = torch.outer(torch.arange(past, past + T, dtype=torch.float32, device=x.device), frequency)[:, None]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Norm(nn.Module):
    """RMSNorm without parameters, or LayerNorm."""

    # 两种配方（modern、gpt2）各用一种；参数名与 core 相同，权重才装得进

    def __init__(self, config):
        super().__init__()
        if config.norm == "layernorm":
            self.weight = nn.Parameter(torch.ones(config.n_embd))
            self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None
        self.kind = config.norm

    def forward(self, x):
        if self.kind == "rmsnorm":
            return rms_norm(x)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Attention(nn.Module):
    """Causal self-attention over x (B, T, C) and what the cache holds; visible (B, 1, T, L) are the keys to read."""

    # 遮罩由外面算好：因果与填充合在一张表里，各层共用

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, visible, cache):
        B, T, C = x.shape
        head_size = C // self.config.n_head
        q, k, v = self.c_attn(x).view(B, T, 3, self.config.n_head, head_size).unbind(2)
        if self.config.qk_norm:
            q, k = rms_norm(q), rms_norm(k)
        if self.config.position == "rope":
            q, k = (rotate(part, self.config.rope_base, visible.size(-1) - T) for part in (q, k))
        scale = QK_NORM_MAX_LOGIT / head_size if self.config.qk_norm else head_size**-0.5
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Feed-forward layer C -> mlp_ratio * C -> C."""

    # 三种激活都要：relu2 是 modern，gelu 是 nanoGPT，gelu_tanh 是 OpenAI 的 GPT-2

    def __init__(self, config):
        super().__init__()
        width = config.mlp_ratio * config.n_embd
        self.activation = config.activation
        self.c_fc = nn.Linear(config.n_embd, width, bias=config.bias)
        self.c_proj = nn.Linear(width, config.n_embd, bias=config.bias)

    def forward(self, x):
        x = self.c_fc(x)
        if self.activation == "relu2":
            return self.c_proj(x.relu().square())
        return self.c_proj(F.gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none"))


class Block(nn.Module):
    """Pre-norm transformer block."""

    # 名字与 core 的 Block 相同：transformers 分卡时凭它不把一个 block 拆开

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = Norm(config), Attention(config, layer), Norm(config), MLP(config)

    def forward(self, x, visible, cache):
        x = x + self.attn(self.ln_1(x), visible, cache)
        return x + self.mlp(self.ln_2(x))


class NgramEmbedding(nn.Module):
    """Hashed embedding of the last n tokens at each position (arXiv:2501.16975)."""

    # 算 key 的整数运算必须与 core 一样：差一位就查到别的行

    def __init__(self, n, config):
        super().__init__()
        self.n = n
        distinct = (config.vocab_size + 1) ** n
        self.multiplier = config.vocab_size + 1 if distinct <= config.ngram_buckets else 1000003
        self.table = nn.Embedding(min(distinct, config.ngram_buckets), config.n_embd)

    def forward(self, numbers, T):
        """(B, T, C) for the last T of numbers (B, L): ids plus 1, and 0 for padding and before the beginning."""
        padded = F.pad(numbers, (self.n - 1, 0))
        first = padded.size(1) - T
        key = padded[:, first:]
        for back in range(1, self.n):
            key = key * self.multiplier + padded[:, first - back : first - back + T]
        return self.table(key % self.table.num_embeddings)


class NanoGPTForCausalLM(PreTrainedModel, GenerationMixin):
    """Decoder-only transformer; parameter names are those of nanogpt.core.model.GPT."""

    # GenerationMixin 给它 generate()；参数名相同，safetensors 直接装得进

    config_class = NanoGPTConfig
    _no_split_modules = ["Block"]  # noqa: RUF012
    main_input_name = "input_ids"

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.position == "learned" else None
        self.ngrams = nn.ModuleList(NgramEmbedding(n, config) for n in config.ngrams)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = Norm(config)
        self.reach = max(config.ngrams, default=1)
        # 共享时直接用 wte，不劳 transformers 的绑定机制
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def forward(
        self, input_ids=None, attention_mask=None, labels=None, past_key_values=None, use_cache=None, before=None,
        **unused,
    ):
        """Logits (B, T, V) and, with labels (B, T), the mean loss of predicting labels[:, t + 1] at t.

        attention_mask (B, T), with past_key_values (B, past + T), is 0 at padding, which belongs on the left. `before`
        (B, n) are the ids in front of input_ids that n-grams need; without it those of the last call with this cache.
        """
        (B, T), cache = input_ids.shape, past_key_values
        if cache is None and (self.config.use_cache if use_cache is None else use_cache) and labels is None:
            cache = DynamicCache()
        past = 0 if cache is None else cache.get_seq_length()
        mask = input_ids.new_ones(B, past + T) if attention_mask is None else attention_mask.long()
        # 每个位置至少看得见自己：整行被遮的填充位置会算出 NaN
        own = torch.ones(T, past + T, dtype=torch.bool, device=input_ids.device)
        visible = own.tril(past) & (mask.bool()[:, None, None] | ~own.tril(past - 1))
        x = self.wte(input_ids)
        if self.wpe is not None:
            x = x + self.wpe((mask.cumsum(1) - 1).clamp(min=0)[:, past:])
        if past and before is None:
            before = getattr(cache, "newest_ids", input_ids[:, :0])
        ids = torch.cat((before, input_ids), dim=1) if past else input_ids
        for ngram in self.ngrams:
            x = x + ngram((ids + 1) * mask[:, -ids.size(1) :], T)
        if cache is not None:
            cache.newest_ids = ids[:, -self.reach :]
        if self.config.embed_norm:
            x = rms_norm(x)
        for block in self.h:
            x = block(x, visible, cache)
        logits = F.linear(self.ln_f(x), self.wte.weight if self.lm_head is None else self.lm_head.weight)
        if self.config.logit_softcap:
            logits = self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def prepare_inputs_for_generation(
        self, input_ids, attention_mask=None, past_key_values=None, use_cache=None, **unused,
    ):
        """Pass on what the cache does not hold; beyond block_size the newest ids, older ones are forgotten."""
        newest, past = slice(-self.config.block_size, None), 0
        if input_ids.size(1) > self.config.block_size:
            # 位置都变了：缓存里的不能用
            past_key_values, use_cache = None, False
        elif past_key_values is not None:
            past = past_key_values.get_seq_length()
        mask = None if attention_mask is None else attention_mask[:, newest]
        return {
            "input_ids": input_ids[:, newest][:, past:], "attention_mask": mask, "past_key_values": past_key_values,
            "use_cache": use_cache, "before": input_ids[:, max(0, past - self.reach) : past],
        }
