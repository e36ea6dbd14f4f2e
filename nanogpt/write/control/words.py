"""Lead a text towards words by raising the logits of the tokens with which a word begins or continues.

One mechanism for characters, bytes and BPE: every word is a path of token ids. Where the text so far ends
with the beginning of a path, the path's next token is raised by `strength`, once, however many words agree.
- Words in letters count only behind the end of another word ("happy", not "unhappy"); Chinese words anywhere.
- An empty beginning raises a word's first token only if that token alone says something: a Chinese character
  or at least two letters. So " happy" of a BPE is raised everywhere; in a character vocabulary "h" is not, and
  "a" is once " h" was written.
- BPE words are tried as "happy" and, with its space, as " happy".
"""

# 词的偏向：文字写到某个词的开头时，给这个词的下一个 token 加分；字符、字节、BPE 三种词表同一个办法
# 每个词是一串 token；所有词的所有开头做成一张右对齐的后缀表，一步里整批比较，不从主机上看任何值
# 它是 sampler 的一个前置阶段：prefixes 造出它并套在 sampler 前面，解码循环不知道有它

import re
from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F

from nanogpt.base.language import ConfigError
from nanogpt.core.sampling import Sampler
from nanogpt.data.tokenizer import Tokenizer

CJK = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
# 后缀表里的“任意 token”；-1 已经表示“这里没有 token”
ANY = -2


def ids_of(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids of a text, none when the vocabulary cannot give it back."""
    try:
        ids = tuple(tokenizer.encode(text).tolist())
    except ConfigError:
        return ()
    # 有的词表把不认识的字写成同一个“未知” token：给它加分就坏了
    return ids if tokenizer.decode(ids).strip() == text.strip() else ()


def paths(word: str, tokenizer: Tokenizer) -> Iterator[tuple[bool, tuple[int, ...]]]:
    """(must stand behind the end of a word, ids) of each way to write a word."""
    if CJK.search(word):
        yield False, ids_of(word, tokenizer)
        return
    # 句首大写也算；去重后次序固定
    for spelling in dict.fromkeys((word, word[:1].upper() + word[1:])):
        yield True, ids_of(spelling, tokenizer)
        spaced = ids_of(" " + spelling, tokenizer)
        # 空格自成一个 token 的词表里，带空格的写法只会到处鼓励空格
        if spaced and len(tokenizer.decode(spaced[:1])) > 1:
            yield False, spaced


def speaks(token: str) -> bool:
    """Whether a token alone points to a word: a whole Chinese character, or two letters."""
    return bool(CJK.search(token)) or ("\ufffd" not in token and sum(c.isalpha() for c in token) >= 2)


@lru_cache(maxsize=2)
def word_ends(tokenizer: Tokenizer) -> torch.Tensor:
    """Bool (V + 1,): whether a word may begin behind the id; the last entry stands for the beginning of the text."""
    def ends(token: str) -> bool:
        return not token[-1:].isalnum() or bool(CJK.match(token[-1:]))

    return torch.tensor([ends(tokenizer.decode([i])) for i in range(tokenizer.vocab_size)] + [True])


class WordBias:
    """A stage before a sampler's own: logits (B, V), tokens (B, T) -> logits, without a sync to the host."""

    # 表在造的时候算好，之后每步只有几个小张量的比较；第一次用时搬到 logits 所在的设备

    def __init__(self, tokenizer: Tokenizer, words: tuple[str, ...], strength: float):
        self.strength = strength
        nodes: dict[tuple[bool, tuple[int, ...]], set[int]] = {}
        for word in words:
            for behind_a_word, ids in paths(word, tokenizer):
                for at, token in enumerate(ids):
                    if at or speaks(tokenizer.decode([token])):
                        nodes.setdefault((behind_a_word, ids[:at]), set()).add(token)
        longest = max((len(beginning) for _, beginning in nodes), default=0)
        # 右对齐的后缀表，多留一列看词的前面是什么
        self.width = longest + 1
        suffixes = torch.full((len(nodes), self.width), ANY)
        for row, (_, beginning) in enumerate(nodes):
            suffixes[row, self.width - len(beginning) :] = torch.tensor(beginning, dtype=torch.long)
        following = sorted(set().union(*nodes.values()))
        # 哪个开头提出哪个 token；同一个 token 由几个词提出也只加一次
        rows = [[float(token in after) for token in following] for after in nodes.values()]
        # 一个词也写不出时表是空的：view 仍给出两维
        follows = torch.tensor(rows).view(len(nodes), len(following))
        self._tensors = {
            "suffixes": suffixes,
            "before": torch.tensor([longest - len(beginning) for _, beginning in nodes], dtype=torch.long),
            "anywhere": torch.tensor([not behind_a_word for behind_a_word, _ in nodes], dtype=torch.bool),
            "follows": follows,
            "following": torch.tensor(following, dtype=torch.long),
            "word_ends": word_ends(tokenizer),
        }
        self._last: tuple[Sampler | None, Sampler | None] = (None, None)

    def __call__(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        if self._tensors["suffixes"].device != logits.device:
            self._tensors = {name: tensor.to(logits.device) for name, tensor in self._tensors.items()}
        t = self._tensors
        window = F.pad(tokens[:, -self.width :], (max(0, self.width - tokens.size(1)), 0), value=-1)
        found = ((window[:, None] == t["suffixes"]) | (t["suffixes"] == ANY)).all(-1)
        # -1 取到最后一项：文首也算词的前面
        found &= t["anywhere"] | t["word_ends"][window[:, t["before"]]]
        raised = (found.float() @ t["follows"] > 0) * self.strength
        # 只动几十列：整个词表上的比较比模型的一步还贵
        return logits.index_add(1, t["following"], raised.to(logits.dtype))

    def before(self, sampler: Sampler) -> Sampler:
        """The sampler with this stage first.

        The same object for the same sampler, so that rows can be processed together.
        """
        if sampler.stages[:1] == (self,):
            return sampler
        if self._last[0] is not sampler:
            self._last = (sampler, Sampler((self, *sampler.stages), True))
        return self._last[1]


@lru_cache(maxsize=16)
def word_bias(tokenizer: Tokenizer, words: tuple[str, ...], strength: float) -> WordBias:
    """The bias towards these words; built once for all texts of the same settings."""
    return WordBias(tokenizer, words, strength)
