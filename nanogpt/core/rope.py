# RoPE 的角度表：频率按几何级数递减，低维看近处，高维看远处
# 上下文是后来才拉长的模型（Llama 3.1 起）另有缩放：与 transformers 同样的公式，权重才对得上
"""Tables of rotary position embedding: the angles of every position, stretched or not."""

import math

import torch

from nanogpt.base.config import ModelConfig


def rope_table(config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and signed sin, (block_size, 1, 1, head_size) in float32 (RoFormer, arXiv:2104.09864)."""
    angle = torch.outer(torch.arange(config.block_size, dtype=torch.float32), frequencies(config))
    # yarn 把注意力放尖一点：不是它时，因子是 1
    cos, sin = angle.cos() * config.rope_attention_factor, angle.sin() * config.rope_attention_factor
    # 符号写进表里，旋转只需一次交换加一次乘加；中间的 1 与 (B, T, 2, nh, hs) 广播
    return torch.cat((cos, cos), dim=-1)[:, None, None], torch.cat((-sin, sin), dim=-1)[:, None, None]


def frequencies(config: ModelConfig) -> torch.Tensor:
    """Radians per position of every pair of values, (head_size / 2,)."""
    size = config.head_size
    frequency = config.rope_base ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    if config.rope_scaling == "linear":
        return frequency / config.rope_factor
    if config.rope_scaling == "llama3":
        # 原来的上下文里转得够多圈的不动，一圈不到的按倍数放慢，中间的线性过渡
        turns = config.rope_original_length * frequency / (2 * math.pi)
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return frequency * (kept + (1 - kept) / config.rope_factor)
    if config.rope_scaling == "yarn":
        # 同样的想法，过渡按维数而不按圈数，两端取整（YaRN, arXiv:2309.00071）
        def dimension(turns: float) -> float:
            span = config.rope_original_length / (2 * math.pi * turns)
            return size * math.log(span) / (2 * math.log(config.rope_base))

        low = max(math.floor(dimension(config.rope_high_freq_factor)), 0)
        high = min(math.ceil(dimension(config.rope_low_freq_factor)), size - 1)
        slow = ((torch.arange(size // 2) - low) / max(high - low, 1e-3)).clamp(0, 1)
        return frequency * (1 - slow + slow / config.rope_factor)
    return frequency
