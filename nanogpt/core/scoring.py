# 模型觉得一段文字有多可能：整段一次前向（read），或写作时每步顺手记下（Likely）
"""How likely a model finds the tokens of a text: of a prompt in one pass, of drawn tokens at every step of decoding."""

from dataclasses import dataclass

import torch

# 一次算这么多个位置的 logits：GPT-2 的词表下约 50 MB
POSITIONS = 256


@dataclass(frozen=True)
class Score:
    """One token with its log-probability (natural), and the most likely tokens at its place, itself among them."""

    # API 的 logprobs 要的就是这些

    token: str
    logprob: float | None
    """None where nothing stands before it."""
    top: dict[str, float]
    offset: int
    """Characters of the text before it, counted from the prompt where that is scored too."""


@dataclass(frozen=True)
class Likely:
    """Log-probabilities at n positions, before any sampler: of the id that stands there (n,), and of the k most
    likely ids (n, k).
    """

    # 留在设备上，要看时才取回
    own: torch.Tensor
    top: torch.Tensor
    top_ids: torch.Tensor

    @classmethod
    def of(cls, logprobs: torch.Tensor, ids: torch.Tensor, count: int) -> "Likely":
        """From log-probabilities (n, V) and ids (n,)."""
        top, top_ids = logprobs.topk(min(count, logprobs.size(-1)))
        return cls(logprobs.gather(-1, ids[:, None])[:, 0], top, top_ids)

    def rows(self) -> list[tuple[float, dict[int, float]]]:
        """(log-probability, {id: log-probability}, the most likely first) of every position."""
        listed = zip(self.own.tolist(), self.top_ids.tolist(), self.top.tolist())
        return [(own, dict(zip(ids, values))) for own, ids, values in listed]


@torch.inference_mode()
def read(model, ids: torch.Tensor, *, vocab_size: int, count: int) -> list[tuple[float, dict[int, float]]]:
    """The rows of Likely for ids[1:], each behind all that stand before it; ids (T,) with T <= block_size."""
    hidden, rows = model.hidden(ids[None])[0, :-1], []
    for part, wanted in zip(hidden.split(POSITIONS), ids[1:].split(POSITIONS)):
        # 与抽样时一样，词表补齐的那几行不算
        logprobs = model.logits(part).float()[:, :vocab_size].log_softmax(-1)
        rows += Likely.of(logprobs, wanted, count).rows()
    return rows
