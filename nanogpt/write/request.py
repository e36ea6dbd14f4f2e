"""What is to be written and what comes back, and how a prompt becomes ids."""

# 写作的一头一尾：要写什么（Request），写出了什么（Piece、Result），开头怎样变成 token
# 循环在 engine.py，控制在 control/；两边都只认这里的形状，互不相识
# Control 是控制的约定：apply 改写 Request，别处不问它是哪一种

import itertools
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from nanogpt.base.language import ConfigError
from nanogpt.core.sampling import Sampler
from nanogpt.core.scoring import Score
from nanogpt.data.tokenizer import END_OF_TEXT, Tokenizer


@dataclass(frozen=True)
class Request:
    """One text to write behind a prompt."""

    # 不可变：同一个 Request 可以重写、记录、比较，控制改写时另造一个

    prompt: str
    sampler: Sampler
    max_new_tokens: int
    seed: int
    prefix: str = ""
    """Read before the prompt and never shown: where style and emotion go in words."""
    prefix_ids: tuple[int, ...] = ()
    """Read before the prefix: the labels of a model of documents (the Writer itself puts its separator in front)."""
    labels: dict[str, str] = field(default_factory=dict)
    """What these ids mean: kind -> name of the label."""
    guidance: float = 1.0
    """How far prefix_ids push the text: 0 not at all, 1 as the model learned it, more of it above (Decoder)."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these."""
    stop_at_end_of_text: bool = True
    ends: tuple[int, ...] = ()
    """Ids that end the text beside those that end every text: the end of an answer."""
    skip_unknown: bool = False
    """Whether characters that the vocabulary lacks are passed over."""
    control: "Control | None" = None
    """Style and emotion: fills in the prefixes and wraps the sampler when the request is submitted."""
    ids: tuple[int, ...] | None = None
    """The prompt as ids, where it was given so; `prompt` is their text."""
    logprobs: int | None = None
    """How many of the most likely tokens are told at every place, beside the drawn one; None: no scores."""
    score_prompt: bool = False
    """Whether the tokens of the prompt are scored too, behind the labels; guidance does not count there."""


class Control(Protocol):
    """What conf/control yamls build."""

    # 约定而不是基类：自己写的控制只要有这几样，不必继承

    style: str | None
    emotion: str | None

    def apply(self, request: Request, tokenizer: Tokenizer) -> Request:
        """The request that writes in this style and emotion; the prompt stays as it is."""

    def known(self, tokenizer: Tokenizer) -> dict[str, list[str]]:
        """Names that can be typed for "style" and "emotion", the model's labels first; others may be allowed too."""


@dataclass(frozen=True)
class Result:
    """A finished text; seconds count from submit()."""

    # 带着原来的 Request：记录里要写出是怎么要的

    request: Request
    text: str
    finish: str
    """length | stop | end_of_text | interrupted"""
    tokens: int
    prompt_tokens: int
    seconds_to_first_token: float
    seconds: float


@dataclass(frozen=True)
class Piece:
    """The next part of one text: whole characters, and at its end the result, or the error that ended it."""

    # 只有完整的字符、不会再收回的字：显示它的人不必懂停止词与半个字符

    key: int
    prompt: str
    text: str
    result: Result | None = None
    error: ConfigError | None = None
    scores: tuple[Score, ...] = ()
    """Of the tokens since the last piece, if the request asks for them."""


def encode_prompt(tokenizer: Tokenizer, prompt: str, *, skip_unknown: bool = False) -> np.ndarray:
    """Ids of a prompt, in which <|endoftext|> means the token of that name if the vocabulary has one."""
    if tokenizer.end_of_text is None:
        return tokenizer.encode(prompt, skip_unknown=skip_unknown)
    parts = [tokenizer.encode(part, skip_unknown=skip_unknown) for part in prompt.split(END_OF_TEXT)]
    marks = [np.array([tokenizer.end_of_text], dtype=np.int64)] * len(parts)
    return np.concatenate([piece for pair in zip(marks, parts) for piece in pair][1:])


# 一段话最可能在它们后面开始；词表里有哪个就用哪个
BEGINNINGS = ("\n", " ", "。", ".")


def default_prompt(tokenizer: Tokenizer, separator: int | None) -> str:
    """The prompt where none is given: nothing for a model of documents, else a line break.

    A vocabulary without a line break takes the first other text that it can spell.
    """
    if separator is not None:
        return ""
    alone = (tokenizer.decode([i]) for i in range(tokenizer.vocab_size))
    return next((text for text in itertools.chain(BEGINNINGS, alone) if _spells(tokenizer, text)), "\n")


def _spells(tokenizer: Tokenizer, text: str) -> bool:
    # BERT 式词表没有换行与空格，不认识的字又都写成同一个 token：读得回来的才算
    return bool(text) and "\ufffd" not in text and text in tokenizer.decode(tokenizer.encode(text, skip_unknown=True))


def labels_of(request: Request) -> tuple[int, ...]:
    """The label ids that are read: none with guidance 0, which is the model without them."""
    return request.prefix_ids if request.guidance else ()
