# 注意力：q、k、v 一次矩阵乘得出，可选 QK-norm 与 RoPE，再按上下文长短选一种算法
# 短上下文在 CPU 上用自己的两次批量乘法（kernels），其余交给 PyTorch 的 SDPA；写作时 key、value 从 KVCache 里取
"""Causal self-attention and rotary position embedding."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanogpt.core.kernels import device_type, is_short, rms_norm, rotate, short_attention
from nanogpt.core.kv_cache import KVCache

# 归一化后 q·k 不超过 hs；除以 hs 再乘它，注意力足够尖锐，与 head 大小无关
QK_NORM_MAX_LOGIT = 12.0


def rope_table(head_size: int, length: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and signed sin, (length, 1, 1, head_size) in float32 (RoFormer, arXiv:2104.09864)."""
    # 频率按几何级数递减：低维看近处，高维看远处
    frequency = base ** -(torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)
    cos, sin = angle.cos(), angle.sin()
    # 符号写进表里，旋转只需一次交换加一次乘加；中间的 1 与 (B, T, 2, nh, hs) 广播
    return torch.cat((cos, cos), dim=-1)[:, None, None], torch.cat((-sin, sin), dim=-1)[:, None, None]


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention over x (B, T, C); parameter names follow GPT-2."""

    def __init__(self, config, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.qk_norm = config.qk_norm
        head_size = config.n_embd // config.n_head
        self.scale = QK_NORM_MAX_LOGIT / head_size if config.qk_norm else head_size**-0.5
        # q、k、v 合成一次矩阵乘，小模型上省两次 kernel 启动
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: torch.Tensor, rope=None, cache: KVCache | None = None, visible: torch.Tensor | None = None,
    ) -> torch.Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        dropout = self.dropout if self.training else 0.0
        short = cache is None and is_short(qkv, dropout)
        if short and not self.qk_norm and rope is None:
            # q、k 原样使用时不必先拆开：反向少一次拼接
            y = short_attention(self.scale, visible, qkv)
        else:
            # q 与 k 的归一化、旋转完全相同，一起算，调用次数减半
            qk, v = qkv.split((2, 1), dim=2)
            if self.qk_norm:
                # 限住 q·k 的幅度，学习率可以更大而注意力不发散
                qk = rms_norm(qk)
            if rope is not None:
                qk = rotate(qk, *rope)
            y = short_attention(self.scale, visible, qk, v) if short else self._attend(qk, v, cache, dropout, visible)
        # (B, nh, T, hs) -> (B, T, C)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))

    def _attend(self, qk, v, cache: KVCache | None, dropout: float, visible: torch.Tensor | None) -> torch.Tensor:
        """Scaled dot-product attention through PyTorch's kernel, of qk (B, T, 2, nh, hs) and v (B, T, 1, nh, hs)."""
        T = qk.size(1)
        q, k, v = (t.transpose(1, 2) for t in (*qk.unbind(2), v.squeeze(2)))
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        if device_type(q) == "mps":
            # 那里的 SDPA 读换过轴的张量会读错（pytorch#181133、#163597）
            q, k, v = (t.contiguous() for t in (q, k, v))
        # 单 token 续写时自己的每个 key 都可见；整段预填充才是因果的
        mask = cache.mask if cache is not None else visible
        if cache is not None and 1 < T < k.size(2):
            mask = torch.ones(T, k.size(2), dtype=torch.bool, device=qk.device).tril(k.size(2) - T)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=T > 1 and mask is None, dropout_p=dropout, scale=self.scale
        )
