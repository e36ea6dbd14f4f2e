"""Causal self-attention, rotary position embedding and the key/value cache."""

import torch
import torch.nn as nn
import torch.nn.functional as F


def rope_table(head_size: int, length: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin of shape (length, 1, head_size / 2) in float32 (RoFormer, arXiv:2104.09864)."""
    # 频率按几何级数递减：低维看近处，高维看远处
    frequency = base ** -(torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)
    # 中间的 1 留给 head 维，可直接与 (B, T, nh, hs/2) 广播
    return angle.cos()[:, None, :], angle.sin()[:, None, :]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x (B, T, nh, hs) by position; the pairs are (i, i + hs/2)."""
    # 前后两半配对，内存连续，比奇偶交错配对快
    first, second = x.chunk(2, dim=-1)
    # 表是 fp32，先转成 x 的类型，免得半精度激活被悄悄提升
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class KVCache:
    """Preallocated keys and values of every layer, each (n_layer, B, nh, block_size, hs).

    `length` positions are filled. `tokens` (B, length) keeps the ids, which n-gram embeddings read.
    """

    def __init__(self, model, batch_size: int):
        config, weight = model.config, model.wte.weight
        shape = (config.n_layer, batch_size, config.n_head, config.block_size, config.n_embd // config.n_head)
        # 一次分配到 block_size，逐 token 生成时不再申请显存
        self.k = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.v = torch.zeros_like(self.k)
        self.tokens = torch.zeros(batch_size, config.block_size, dtype=torch.long, device=weight.device)
        self.length = 0

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write k, v (B, nh, T, hs) behind what is there; return all filled keys and values."""
        end = self.length + k.size(2)
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end].to(k.dtype), self.v[layer, :, :, :end].to(v.dtype)


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention over x (B, T, C); parameter names follow GPT-2."""

    def __init__(self, config, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.qk_norm = config.qk_norm
        # q、k、v 合成一次矩阵乘，小模型上省两次 kernel 启动
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, rope=None, cache: KVCache | None = None) -> torch.Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3 * self.n_head, C // self.n_head)
        # q 与 k 的归一化、旋转完全相同，一起算，调用次数减半
        qk, v = qkv.split((2 * self.n_head, self.n_head), dim=2)
        if self.qk_norm:
            # 限住 q·k 的幅度，学习率可以更大而注意力不发散
            qk = F.rms_norm(qk, (qk.size(-1),))
        if rope is not None:
            qk = rotate(qk, *rope)
        q, k = qk.transpose(1, 2).chunk(2, dim=1)  # (B, nh, T, hs)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        # 单 token 续写时每个 key 都可见，不需要掩码；整段预填充才是因果的
        mask = None
        if cache is not None and 1 < T < k.size(2):
            mask = torch.ones(T, k.size(2), dtype=torch.bool, device=x.device).tril(k.size(2) - T)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=T > 1 and mask is None,
            dropout_p=self.dropout if self.training else 0.0,
        )
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))
