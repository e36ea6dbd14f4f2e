# 采样：把 logits 里不许抽的设成 -inf，再用一个随机数按累积概率抽一个
# 每种办法是一个小类，sampler() 按固定的次序串起来；贪心也只是“只留最大的”，写作的循环里没有它的分支
"""Sampling strategies: logits (B, V) -> logits (B, V), what must not be drawn set to -inf.

Each strategy is a small frozen dataclass called as stage(logits, tokens); tokens (B, T) are the ids of
the text so far, the newest last, -1 where a row is shorter. `sampler` puts them together in this order:
repetition penalty, no-repeat n-gram, temperature, top-k, top-p, min-p, typical.
Ties are settled in favour of the lower id everywhere.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from nanogpt.base.config import check_range
from nanogpt.base.language import ConfigError
from nanogpt.base.sample_config import SamplerConfig
from nanogpt.core.kernels import inverse_cumulative, smallest_set

# 小到 float32 里成了 0 的温度也算 0，否则 0 / 0
LEAST_TEMPERATURE = 1e-30
Stage = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# `sampler` 的设置 -> (类型, 下限, 上限)；API 的字段也由它得出
SETTINGS = {
    one.name: (one.type, one.metadata["range"].low, one.metadata["range"].high) for one in fields(SamplerConfig)
}


@dataclass(frozen=True)
class RepetitionPenalty:
    """Divide positive and multiply negative logits of ids that occurred, prompt included (CTRL, arXiv:1909.05858)."""

    penalty: float

    def __call__(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        # 末尾多一列收下占位的 -1，写回时丢掉
        seen = torch.zeros(logits.size(0), logits.size(1) + 1, dtype=torch.bool, device=logits.device)
        seen.scatter_(1, torch.where(tokens < 0, logits.size(1), tokens), True)
        penalised = torch.where(logits > 0, logits / self.penalty, logits * self.penalty)
        return torch.where(seen[:, :-1], penalised, logits)


@dataclass(frozen=True)
class NoRepeatNgram:
    """Forbid the ids that would complete an n-gram that the text already holds; lifted where nothing would be left."""

    n: int

    def __call__(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        n = self.n
        if tokens.size(1) < n:
            return logits
        windows = tokens.unfold(1, n, 1)
        # 占位的 -1 不会与真正的后缀相等；后缀本身不足 n-1 个时也不禁
        suffix = tokens[:, tokens.size(1) - (n - 1) :]
        repeats = (windows[..., : n - 1] == suffix[:, None]).all(-1)
        repeats &= (suffix >= 0).all(-1)[:, None] & (windows[..., -1] >= 0)
        banned = torch.zeros(logits.size(0), logits.size(1) + 1, dtype=torch.bool, device=logits.device)
        banned.scatter_(1, torch.where(repeats, windows[..., -1], logits.size(1)), True)
        left = logits.masked_fill(banned[:, :-1], -torch.inf)
        # 小词表上可能全被禁掉：宁可重复，也不能没有可选的字
        return torch.where(left.isneginf().all(-1, keepdim=True), logits, left)


@dataclass(frozen=True)
class Temperature:
    """Divide by the temperature; towards 0 only the most likely id is left, the lowest of equals."""

    temperature: float

    def __call__(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        if self.temperature < LEAST_TEMPERATURE:
            best = logits.argmax(-1, keepdim=True)
            return torch.full_like(logits, -torch.inf).scatter_(1, best, 0.0)
        # 先减最大值：温度再小也不会出现 inf - inf
        return (logits - logits.amax(-1, keepdim=True)) / self.temperature


@dataclass(frozen=True)
class TopK:
    """Keep exactly the k most likely ids."""

    k: int

    def __call__(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        if self.k >= logits.size(-1):
            return logits
        # topk 遇到并列时留下谁没有保证：高于门槛的全留，等于门槛的按 id 补足
        least = logits.topk(self.k, dim=-1).values[:, -1:]
        # 多半没有多余的并列：显卡上问一次就得等一次，照下面的算
        if logits.device.type == "cpu" and (logits >= least).sum(-1).max() == self.k:
            return logits.masked_fill(logits < least, -torch.inf)
        above, equal = logits > least, logits == least
        room = self.k - above.sum(-1, keepdim=True)
        return logits.masked_fill(~(above | (equal & (equal.cumsum(-1) <= room))), -torch.inf)


@dataclass(frozen=True)
class TopP:
    """Keep the smallest set of most likely ids whose mass reaches p, at least one (arXiv:1904.09751)."""

    p: float

    # 候选的多少随分布而变：拿不准时多留，有把握时少留
    def __call__(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        if self.p >= 1:
            return logits
        probabilities = torch.softmax(logits, dim=-1)
        return logits.masked_fill(~smallest_set(probabilities, -probabilities, self.p), -torch.inf)


@dataclass(frozen=True)
class MinP:
    """Keep the ids at least min_p times as likely as the most likely one (arXiv:2407.01082)."""

    min_p: float

    def __call__(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        # 比值在 logits 上就是差：不必做 softmax
        floor = logits.amax(-1, keepdim=True) + torch.tensor(self.min_p, dtype=torch.float64).log().item()
        return logits.masked_fill(logits < floor, -torch.inf)


@dataclass(frozen=True)
class Typical:
    """Keep the smallest set of ids of typical surprise whose mass reaches `mass`, at least one (arXiv:2202.00666)."""

    mass: float

    def __call__(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        log_probabilities = torch.log_softmax(logits, dim=-1)
        probabilities = log_probabilities.exp()
        # 概率为 0 的项，0 * -inf 记作 0
        entropy = -(probabilities * log_probabilities).nan_to_num(nan=0.0).sum(-1, keepdim=True)
        kept = smallest_set(probabilities, (-log_probabilities - entropy).abs(), self.mass)
        return logits.masked_fill(~kept, -torch.inf)


@dataclass(frozen=True)
class Sampler:
    """Stages applied one after the other, in float32."""

    stages: tuple[Stage, ...]
    reads_tokens: bool = False
    """Whether a stage looks at the text so far."""
    # 多半的采样器不看：那样就不必每步把整篇文字拼出来

    def __call__(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            logits = stage(logits, tokens)
        return logits


def sampler(
    *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, typical: float = 1.0,
    repetition_penalty: float = 1.0, no_repeat_ngram: int = 0,
) -> Sampler:
    """The strategies that are switched on, in the order of the module's docstring; one object for equal settings."""
    given = locals()
    for name, (kind, low, high) in SETTINGS.items():
        got = given[name]
        # Python 里 True 也是整数，整数也可以当小数用
        if isinstance(got, bool) or not isinstance(got, (int, kind)):
            raise ConfigError("wrong_type", key=f"sampler.{name}", got=got, want=kind.__name__)
        check_range(f"sampler.{name}", got, low, high)
    return _assembled(**given)


# 一样的设置得同一个：请求各带各的，几行却可以一起算
@functools.lru_cache(maxsize=256, typed=True)
def _assembled(temperature, top_k, top_p, min_p, typical, repetition_penalty, no_repeat_ngram) -> Sampler:
    stages: list[Stage] = [RepetitionPenalty(repetition_penalty)] if repetition_penalty != 1 else []
    stages += [NoRepeatNgram(no_repeat_ngram)] if no_repeat_ngram else []
    reads_tokens = bool(stages)
    stages += [Temperature(temperature)] if temperature != 1 else []
    # 贪心只剩一个候选，后面的筛选都不再起作用
    if temperature != 0:
        stages += [TopK(top_k)] if top_k else []
        stages += [TopP(top_p)] if top_p < 1 else []
        stages += [MinP(min_p)] if min_p else []
        stages += [Typical(typical)] if typical < 1 else []
    return Sampler(tuple(stages), reads_tokens)


def draw(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """One id per row of logits (B, V) by inverting the cumulative distribution at uniforms (B,) in [0, 1).

    One uniform number per token makes a row's text independent of the rows beside it.
    """
    probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
    return inverse_cumulative(probabilities, uniforms)
