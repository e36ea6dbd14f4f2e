# 注意力：q、k、v 一次矩阵乘得出，可选 QK-norm 与 RoPE，再按上下文长短选一种算法
# 短上下文在 CPU 上用自己的两次批量乘法，其余交给 PyTorch 的 SDPA（都在 kernels）；写作时 key、value 从 KVCache 里取
# key、value 的 head 可以比 query 少（GQA）：几个 query 共用一份，写作时缓存也小这么多倍
"""Causal self-attention."""

import torch
import torch.nn as nn

from nanogpt.core.kernels import Arrangement, Dropout, attention, is_short, rms_norm, rotate, short_attention
from nanogpt.core.kv_cache import KVCache

# 归一化后 q·k 不超过 hs；除以 hs 再乘它，注意力足够尖锐，与 head 大小无关；有增益的自己学会多尖锐
QK_NORM_MAX_LOGIT = 12.0


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention over x (B, T, C); parameter names follow GPT-2."""

    arrangement, attention = Arrangement, staticmethod(attention)

    def __init__(self, config, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head, kv, hs = config.n_head, config.kv_heads, config.head_size
        self.dropout, self.qk_norm, self.eps = config.dropout, config.qk_norm, config.norm_eps
        gains = config.qk_norm and config.norm_gain
        self.scale = QK_NORM_MAX_LOGIT / hs if config.qk_norm and not gains else hs**-0.5
        self.joint = kv == config.n_head and not gains
        # c_attn 的输出怎样分开：q 与 k 的归一化、旋转完全相同时一起算，调用次数减半
        self.layout = (3, kv, hs) if self.joint else (1, config.n_head + 2 * kv, hs)
        self.sizes, self.dim = ((2, 1), 2) if self.joint else ((config.n_head, kv, kv), 3)
        # q、k、v 合成一次矩阵乘，小模型上省两次 kernel 启动；Muon 更新时再分开
        self.c_attn = nn.Linear(config.n_embd, (config.n_head + 2 * kv) * hs, bias=config.bias or config.qkv_bias)
        self.c_proj = nn.Linear(config.n_head * hs, config.n_embd, bias=config.bias)
        self.q_gain, self.k_gain = (nn.Parameter(torch.ones(hs)) if gains else None for _ in range(2))
        self.resid_dropout = Dropout(config.dropout)

    def forward(self, x: torch.Tensor, rope=None, cache: KVCache | None = None, visible=None) -> torch.Tensor:
        B, T, _ = x.shape
        qkv = self.c_attn(x).view(B, T, *self.layout)
        dropout = self.dropout if self.training else 0.0
        short = cache is None and is_short(qkv, dropout)
        if short and self.joint:
            # 不必先拆开：归一化与旋转也在那里面做，反向少一次拼接
            arrangement = self.arrangement(self.eps if self.qk_norm else None, rope)
            y = short_attention(self.scale, visible, qkv, dropout=dropout, arrangement=arrangement)
        else:
            y = self._attend(self.parts(qkv, rope), cache, dropout, visible, short)
        # (B, nh, T, hs) -> (B, T, nh * hs)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, -1)))

    def parts(self, qkv: torch.Tensor, rope=None) -> list[torch.Tensor]:
        """Normalised and rotated q, k and v (B, T, ., ., hs) of c_attn's output in `layout`; q and k may be one."""
        *qk, v = qkv.split(self.sizes, dim=self.dim)
        if self.qk_norm:
            # 限住 q·k 的幅度，学习率可以更大而注意力不发散
            qk = [rms_norm(part, gain, self.eps) for part, gain in zip(qk, (self.q_gain, self.k_gain))]
        return [*(qk if rope is None else [rotate(part, *rope) for part in qk]), v]

    def _attend(self, parts: list[torch.Tensor], cache: KVCache | None, dropout: float, visible, short: bool):
        """Attention (B, nh, T, hs) of parts (B, T, ., ., hs) that are q, k and v, the heads in the last but one."""
        if short:
            return short_attention(self.scale, visible, *parts, dropout=dropout)
        q, k, v = (t.transpose(1, 2) for part in parts for t in part.unbind(2))
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        mask = visible if cache is None else cache.mask
        return self.attention(q, k, v, mask, dropout, self.scale)
