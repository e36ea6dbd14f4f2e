"""Tokenizers between text and token ids (characters, bytes, BPE, Hugging Face's tokenizers), saved as json.

A vocabulary may have special tokens: <|endoftext|>, and labels such as <|style:宋词|> (nanogpt.data.labels). encode
never produces them; decoded by a character or byte vocabulary they leave nothing.
"""

# 文字与 id 互换：字符、字节、BPE，或 tokenizers 库认得的任何词表；存成 json，从不用 pickle
# 四个类的接口相同（encode、decode、stream、word、to_dict），训练、写作、服务都不问是哪一种
# 逐个 id 地解码要等一个字的字节齐了才吐（stream）：直接 decode 半个汉字会打出 �；连起来与整段 decode 一字不差
# encode 从不产生特殊 token（结尾与标签）：文字里写着 <|endoftext|>，也只是普通文字
# 文件可能来自陌生人：load 先核对正则

import base64
import codecs
import copy
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from nanogpt.base.files import write_text
from nanogpt.base.hashed_json import reason_of
from nanogpt.base.language import ConfigError, text
from nanogpt.data import assets

KINDS = ("char", "byte", "gpt2", "bpe", "auto")

# GPT-2 的预切分规则：缩写、词、数字、标点、空白（Radford et al. 2019 的公开实现）
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
END_OF_TEXT = "<|endoftext|>"
# 标签：种类 -> 名字 -> 代表它的 id
Labels = dict[str, dict[str, tuple[int, ...]]]
# 对话的模板与它要用的两个词：template（Jinja 的原文）、bos_token、eos_token；怎样用见 nanogpt.data.chat
ChatTemplate = dict[str, str]
# 汉字（含扩展区）与全角标点
CJK = "[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]"
# 表示一个字节的 token，tokenizers 库的写法
BYTE_WORD = re.compile("<0x[0-9A-Fa-f]{2}>")


@cache
def byte_letters() -> tuple[str, ...]:
    """GPT-2's printable letter of every byte: itself where printable, else the next free one from U+0100."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    moved = iter(range(256, 512))
    return tuple(chr(b) if b in plain else chr(next(moved)) for b in range(256))


@cache
def bytes_of_letters() -> dict[str, int]:
    """The byte of each of these letters."""
    return {letter: byte for byte, letter in enumerate(byte_letters())}


class TextStream:
    """Turns ids into text one by one, holding back the bytes of a character that is not complete yet.

    The pieces joined are what the ids `after` and the pushed ones decode to together, without the text of `after`.
    """

    # 边写边显示用：每个 token 的字节固定，前后不相干，才能一个一个来

    def __init__(self, token_bytes: Callable[[int], bytes], after: Iterable[int] = ()):
        self._token_bytes = token_bytes
        # 增量解码器自己记住半个汉字的字节，等齐了才吐出来
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in after:
            self.push(token)

    def push(self, token: int) -> str:
        """New whole characters."""
        return self._decoder.decode(self._token_bytes(token))

    def finish(self) -> str:
        """What is left; half a character becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)


class LibraryWords:
    """Turns ids of a LibraryTokenizer into the words that its decoder joins, one by one.

    Bytes such as <0xE6> become the characters that they make up, U+FFFD where they make up none.
    """

    # 库的 ByteFallback 遇到一个坏字节，就把整串都写成 �，好的字也没了：字节由我们拼成字，齐了一个就是一个

    def __init__(self, tokenizer: "LibraryTokenizer"):
        self._tokenizer = tokenizer
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> list[str]:
        """New words, if any."""
        word = self._tokenizer.word_of(token)
        if word is None:
            return []
        if self._tokenizer.has_bytes and BYTE_WORD.fullmatch(word):
            return list(self._bytes.decode(bytes.fromhex(word[3:5])))
        return [*self.finish(), word]

    def finish(self) -> list[str]:
        """What is left: half a character."""
        return list(self._bytes.decode(b"", final=True))


class LibraryStream:
    """A TextStream for a LibraryTokenizer: joins the last few words again and returns what is new.

    The text of a word depends on its neighbours there.
    """

    # WordPiece 的空格、SentencePiece 的开头都要看前后：只能带着前文重解，吐出不会再变的部分

    def __init__(self, tokenizer: "LibraryTokenizer", after: Iterable[int] = ()):
        self._tokenizer, self._spelling = tokenizer, LibraryWords(tokenizer)
        self._words: list[str] = []
        self._given = 0
        """Number of characters of these words' text that were returned already, or belong to `after`."""
        if before := [word for token in after for word in self._spelling.push(int(token))]:
            self._begin_behind(before)

    def push(self, token: int) -> str:
        """New characters that later ids cannot change."""
        if not (words := self._spelling.push(token)):
            return ""
        self._words += words
        settled = self._settled(self._words)
        new, self._given = settled[self._given :], max(len(settled), self._given)
        if new:
            self._begin_behind(self._words)
        return new

    def finish(self) -> str:
        """What is left."""
        return self._tokenizer.joined([*self._words, *self._spelling.finish()])[self._given :]

    def _begin_behind(self, words: list[str]) -> None:
        """Keep only the last words, as many as later text depends on, so that the cost does not grow with the text."""
        # 排在最前的会被去掉空格，可能什么也不剩：那样不能当前文；长起来的只有一串什么也不写的，到写出字来为止
        end, count = self._settled(words)[-1:], 1
        while count < len(words) and not (end and self._settled(words[-count:]).endswith(end)):
            count += 1
        self._words = words[-count:]
        self._given = len(self._settled(self._words))

    def _settled(self, words: list[str]) -> str:
        return self._tokenizer.joined(words).removesuffix(self._tokenizer.unsettled)


class UnknownCharacters(ConfigError):  # noqa: N818 - 与 Diverged 一样，名字说的是情形
    """Raised when a text has characters that the vocabulary lacks."""

    # 单独一类：命令行与 API 的补救不同，各自接住再说

    def __init__(self, characters: list[str], skip: str | None = None):
        """`skip` is what to type to have them skipped, None if nothing does."""
        self.characters = characters
        listed = " ".join(map(repr, characters[:20]))
        super().__init__("unknown_characters", characters=listed, skip=text(
            ", pass over them with {typed}",
            typed=skip,
        ) if skip else "")


def as_word(spelled: bytes) -> str:
    """What a token stands for by itself: its text, or bytes:\\xe6… for a part of a character."""
    try:
        return spelled.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


class _OfBytes:
    """What the tokenizers have in common whose every token stands for the same bytes wherever it is."""

    # 字节固定，前后不相干：才能逐个解码（TextStream），也才说得出一个 token 单独是什么
    special: dict[str, int]
    chat_template: ChatTemplate | None = None
    sampling: Mapping[str, Any] = MappingProxyType({})
    """How the model's generation_config.json says to draw, as it stands there."""

    def stream(self, after: Iterable[int] = ()) -> TextStream:
        """Decodes ids one by one, behind those of `after`."""
        return TextStream(self.token_bytes, after)

    def word(self, token: int) -> str:
        """The name of a token in a list of tokens."""
        named = next((name for name, number in self.special.items() if number == token), f"<{token}>")
        return as_word(self.token_bytes(token)) or named


class CharTokenizer(_OfBytes):
    """One token per Unicode character of the training text, in code-point order."""

    # 最简单、也最适合中文小语料：词表就是用到的字；代价是没见过的字写不了

    kind = "char"

    def __init__(self, characters: str, special: tuple[str, ...] = ()):
        self.characters = characters
        # 特殊 token 排在字符之后：加了它们，字符的 id 不变
        self.special = {word: len(characters) + i for i, word in enumerate(special)}
        self.vocab_size = len(characters) + len(special)
        self.end_of_text = self.special.get(END_OF_TEXT)
        self.labels: Labels = {}
        # 陌生人的词表里可能有半个代理对：编不成字节，写成 ?
        self._texts = characters.encode("utf-8", errors="replace").decode("utf-8")
        codes = np.array([ord(c) for c in characters], dtype=np.uint32)
        # 查表向量化：码点 -> id，百万字以毫秒计
        self._table = np.full(int(codes.max(initial=0)) + 1, -1, dtype=np.int64)
        self._table[codes] = np.arange(len(characters))

    def encode(self, text: str, *, skip_unknown: bool = False) -> np.ndarray:
        """Ids of a text, shape (n,); ConfigError names characters that the vocabulary lacks, unless skip_unknown."""
        codes = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)
        inside = codes < len(self._table)
        ids = np.where(inside, self._table[np.where(inside, codes, 0)], -1)
        if skip_unknown:
            return ids[ids >= 0]
        if (ids < 0).any():
            missing = sorted({chr(c) for c in codes[ids < 0]})
            raise UnknownCharacters(missing)
        return ids

    def decode(self, ids) -> str:
        # 切片而不是下标：特殊 token 得到空串
        return "".join(self._texts[i : i + 1] for i in ids)

    def token_bytes(self, token: int) -> bytes:
        return self._texts[token : token + 1].encode("utf-8")

    def to_dict(self) -> dict:
        return {"kind": self.kind, "characters": self.characters, **_described(self)}


class ByteTokenizer(_OfBytes):
    """One token per UTF-8 byte: any text, 256 tokens."""

    # 什么字都写得了；一个汉字三个 token，同样的 block_size 看到的上下文只有三分之一

    kind = "byte"

    def __init__(self, special: tuple[str, ...] = ()):
        self.special = {word: 256 + i for i, word in enumerate(special)}
        self.vocab_size = 256 + len(special)
        self.end_of_text = self.special.get(END_OF_TEXT)
        self.labels: Labels = {}

    def encode(self, text: str, *, skip_unknown: bool = False) -> np.ndarray:
        """Ids of a text, shape (n,); there are no unknown characters."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64)

    def decode(self, ids) -> str:
        # 截断在半个汉字处时用 U+FFFD 表示，而不是报错
        return bytes(int(i) for i in ids if i < 256).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        return bytes((token,)) if token < 256 else b""

    def to_dict(self) -> dict:
        return {"kind": self.kind, **_described(self)}


class BPETokenizer(_OfBytes):
    """Byte-pair encoding through tiktoken; ranks and pattern are kept, so that it loads without a network."""

    # tiktoken 编码快，但只懂 GPT-2 这一类字节级 BPE；别的词表见 LibraryTokenizer

    kind = "bpe"

    def __init__(
        self, name: str, pattern: str, ranks: dict[bytes, int], special: dict[str, int], end_of_text: str = END_OF_TEXT
    ):
        self.name, self.pattern, self.ranks, self.special = name, pattern, ranks, special
        self._encoding = self._new_encoding()
        self.vocab_size = self._encoding.n_vocab
        self._end_word = end_of_text
        self.end_of_text = special.get(end_of_text)
        self.labels: Labels = {}

    def _new_encoding(self):
        import tiktoken

        return tiktoken.Encoding(
            self.name, pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens=self.special
        )

    def for_a_thread(self) -> "BPETokenizer":
        """The same tokenizer for one more thread that encodes much."""
        if type(self) is not BPETokenizer:
            # 子类的编码器怎么来的，这里不知道
            return self
        # 正则的缓存归第一个用它的线程：别的线程每个词都要来抢，两个线程一起用要多花一倍多的时间
        twin = copy.copy(self)
        twin._encoding = self._new_encoding()
        return twin

    def encode(self, text: str, *, skip_unknown: bool = False) -> np.ndarray:
        """Ids of a text, shape (n,); special tokens in it are ordinary text, and there are no unknown characters."""
        try:
            # 直接得到数组：不为每个 token 造一个 Python 整数
            return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int64)
        except UnicodeEncodeError:
            # 半个代理对编不成 UTF-8：encode_ordinary 另有办法
            return np.array(self._encoding.encode_ordinary(text), dtype=np.int64)

    def decode(self, ids) -> str:
        ids = [int(i) for i in ids]
        try:
            return self._encoding.decode(ids, errors="replace")
        except KeyError:
            # 词表补齐到 64 的倍数的模型可能抽到没有文字的 id：略过
            known = {*self.ranks.values(), *self.special.values()}
            return self._encoding.decode([i for i in ids if i in known], errors="replace")

    def token_bytes(self, token: int) -> bytes:
        try:
            return self._encoding.decode_single_token_bytes(token)
        except KeyError:
            return b""

    def to_dict(self) -> dict:
        # 按 rank 排成一列，序号即 rank，比键值对省一半；特殊 token 占着的号写 null
        ranked: list[str | None] = [None] * (max(self.ranks.values()) + 1)
        for token, rank in self.ranks.items():
            ranked[rank] = base64.b64encode(token).decode("ascii")
        saved = {
            "kind": self.kind, "name": self.name, "pattern": self.pattern, "special": self.special, "ranks": ranked,
            **_labels_of(self),
        }
        return saved if self._end_word == END_OF_TEXT else {**saved, "end_of_text": self._end_word}


class LibraryTokenizer:
    """Any tokenizer that the `tokenizers` library describes as json (WordPiece, Unigram …); json only, no code.

    Such a vocabulary may be lossy: WordPiece forgets line breaks and has a token for unknown words.
    """

    # 给别人的预训练模型用：它的词表是什么样就照什么样，不转换

    kind = "library"
    chat_template: ChatTemplate | None = None
    sampling: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, description: dict, end_of_text: str | None = None, other_ends: tuple[int, ...] = ()):
        try:
            import tokenizers
        except ImportError:
            raise ConfigError("missing_package", what="tokenizer.json", package="tokenizers") from None
        self.description, self._end_word, self.other_ends = description, end_of_text, other_ends
        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(description))
        # 文字里写着 <|im_end|> 也只是普通文字
        self._tokenizer.encode_special_tokens = True
        self.begin = _begin_of(description.get("post_processor"))
        """Id that this tokenizer puts before every text, and nothing behind it; None for none."""
        # 词表里的空号也占 embedding 的一行
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.end_of_text = None if end_of_text is None else self._tokenizer.token_to_id(end_of_text)
        self.labels: Labels = {}
        added = description.get("added_tokens") or []
        self.special = {token["content"]: token["id"] for token in added if token["special"]}
        self._silent = set(self.special.values())
        self._decoders = _decoders_of(description.get("decoder"))
        self.has_bytes = "ByteFallback" in self._decoders
        """Whether words such as <0xE6> stand for one byte; several of them make up a character."""
        self._is_word_piece = description["model"].get("type") == "WordPiece"
        self.unsettled = " " if self._is_word_piece else "\ufffd" if "ByteLevel" in self._decoders else ""
        """The character that later ids may still change where a text ends with it; at most one."""

    def encode(self, text: str, *, skip_unknown: bool = False) -> np.ndarray:
        """Ids of a text, shape (n,), without the marks that some tokenizers add at both ends.

        Most have a token for what they do not know; if there is none, ConfigError names the characters, unless
        skip_unknown.
        """
        ids = self._ids_of(text)
        if ids is None:
            missing = sorted({c for c in text if self._ids_of(c) is None}) or [text]
            if not skip_unknown:
                raise UnknownCharacters(missing)
            ids = self._ids_of("".join(c for c in text if c not in missing)) or []
        return np.array(ids, dtype=np.int64)

    @functools.cached_property
    def _with_special(self):
        # 另造一个而不是临时改设置：服务器的两个线程可能同时在编码
        return type(self._tokenizer).from_str(json.dumps(self.description))

    def encode_places(self, text: str, *, special: bool) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a text and the character in which each begins, both (n,); `special`: words of special tokens count."""
        found = (self._with_special if special else self._tokenizer).encode(text, add_special_tokens=False)
        return np.array(found.ids, dtype=np.int64), np.array([start for start, _ in found.offsets], dtype=np.int64)

    def _ids_of(self, text: str) -> list[int] | None:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except Exception:
            # 没有“未知” token 的词表遇到不认识的字，库只抛裸 Exception
            return None

    def decode(self, ids) -> str:
        ids = [int(i) for i in ids]
        if self.has_bytes or self._is_word_piece:
            spelling = LibraryWords(self)
            return self.joined([*itertools.chain.from_iterable(map(spelling.push, ids)), *spelling.finish()])
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def joined(self, words: list[str]) -> str:
        """The text of words of the vocabulary, one behind the other."""
        if self._is_word_piece and words:
            # 前面没有词可接的词尾，库连 ## 也写出来
            words = [words[0].removeprefix(self.description["model"]["continuing_subword_prefix"]), *words[1:]]
        decoder = self._tokenizer.decoder
        text = decoder.decode(words) if decoder else " ".join(words)
        # WordPiece 用空格连接各 token；汉字之间本来没有空格
        return re.sub(rf"(?<={CJK}) | (?={CJK})", "", text) if self._is_word_piece else text

    def stream(self, after: Iterable[int] = ()) -> "TextStream | LibraryStream":
        """Decodes ids one by one, behind those of `after`."""
        if self._decoders == {"ByteLevel"}:
            return TextStream(self._letters_to_bytes, after)
        return LibraryStream(self, after)

    def word(self, token: int) -> str:
        """The name of a token in a list of tokens, with its mark (▁the, ##s) unless the vocabulary is byte-level."""
        if self._decoders == {"ByteLevel"} and not self.is_silent(token):
            return as_word(self._letters_to_bytes(token))
        return self._tokenizer.id_to_token(token) or f"<{token}>"

    def is_silent(self, token: int) -> bool:
        """Whether an id adds nothing to a text: a special token, or an id that the vocabulary lacks."""
        return self.word_of(token) is None

    def word_of(self, token: int) -> str | None:
        """The word of an id as its decoder takes it; None if it adds nothing to a text."""
        return None if token in self._silent else self._tokenizer.id_to_token(token)

    def _letters_to_bytes(self, token: int) -> bytes:
        """The bytes that a token of a byte-level vocabulary stands for; a word in other letters stands for itself."""
        if (word := self.word_of(token)) is None:
            return b""
        byte_of = bytes_of_letters()
        return bytes(byte_of[letter] for letter in word) if byte_of.keys() >= set(word) else word.encode("utf-8")

    def byte_counts(self) -> np.ndarray | None:
        """The same as the function of this name."""
        if self._decoders != {"ByteLevel"}:
            return None
        return np.array([len(self._letters_to_bytes(id_)) for id_ in range(self.vocab_size)], dtype=np.int64)

    def to_dict(self) -> dict:
        others = {"other_ends": list(self.other_ends)} if self.other_ends else {}
        described = {"kind": self.kind, "tokenizers": self.description, "end_of_text": self._end_word}
        return {**described, **others, **_labels_of(self)}


def _begin_of(described: dict | None) -> int | None:
    """The id in front of a text alone, where that is all that a post-processor adds (Llama)."""
    if described and described["type"] == "Sequence":
        return next((found for part in described["processors"] if (found := _begin_of(part)) is not None), None)
    if not described or described["type"] != "TemplateProcessing":
        return None
    if [next(iter(part)) for part in described["single"]] != ["SpecialToken", "Sequence"]:
        return None
    (begin,) = described["special_tokens"][described["single"][0]["SpecialToken"]["id"]]["ids"]
    return int(begin)


def _decoders_of(described: dict | None) -> set[str]:
    """The kinds of decoder in a description, without those that change nothing."""
    if described is None:
        return set()
    if described["type"] == "Sequence":
        return set().union(*map(_decoders_of, described["decoders"]))
    return {described["type"]} - {"Fuse"}


Tokenizer = CharTokenizer | ByteTokenizer | BPETokenizer | LibraryTokenizer


def byte_counts(tokenizer: Tokenizer) -> np.ndarray | None:
    """UTF-8 bytes of text that each id stands for, (vocab_size,): 0 for special tokens, which are no text.

    None where that depends on the ids around it: vocabularies of the `tokenizers` library that are not byte-level.
    """
    ids = range(tokenizer.vocab_size)
    if isinstance(tokenizer, LibraryTokenizer):
        return tokenizer.byte_counts()
    special = set(tokenizer.special.values())
    return np.array([0 if id_ in special else len(tokenizer.token_bytes(id_)) for id_ in ids], dtype=np.int64)


def ends_of(tokenizer: Tokenizer) -> set[int | None]:
    """The ids that end a text: end_of_text, and those that generation_config.json names beside it."""
    return {tokenizer.end_of_text, *(tokenizer.other_ends if isinstance(tokenizer, LibraryTokenizer) else ())}


def begin_of(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What stands before every text that is no document of ours."""
    begin = tokenizer.begin if isinstance(tokenizer, LibraryTokenizer) else None
    return () if begin is None else (begin,)


def _labels_of(tokenizer: Tokenizer) -> dict:
    chat = {"chat_template": tokenizer.chat_template} if tokenizer.chat_template else {}
    sampling = {"sampling": dict(tokenizer.sampling)} if tokenizer.sampling else {}
    return ({"labels": tokenizer.labels} if tokenizer.labels else {}) | chat | sampling


def _described(tokenizer: CharTokenizer | ByteTokenizer) -> dict:
    return ({"special": list(tokenizer.special)} if tokenizer.special else {}) | _labels_of(tokenizer)


# ---- 读写 ----


def gpt2_tokenizer() -> BPETokenizer:
    """GPT-2's 50257 tokens, built from vocab.bpe and encoder.json (assets)."""
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    ranks = data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(assets.fetch(assets.GPT2_VOCAB)), encoder_json_file=str(assets.fetch(assets.GPT2_ENCODER))
    )
    return BPETokenizer("gpt2", GPT2_PATTERN, ranks, {END_OF_TEXT: 50256})


def from_dict(saved: dict) -> Tokenizer:
    """The tokenizer that to_dict described."""
    tokenizer = _from_dict(saved)
    tokenizer.labels = {
        str(kind): {str(name): tuple(int(i) for i in ids) for name, ids in listed.items()}
        for kind, listed in saved.get("labels", {}).items()
    }
    if chat := saved.get("chat_template"):
        tokenizer.chat_template = {name: str(chat[name]) for name in ("template", "bos_token", "eos_token")}
    tokenizer.sampling = dict(saved.get("sampling", {}))
    return tokenizer


def _from_dict(saved: dict) -> Tokenizer:
    if saved["kind"] == "char":
        return CharTokenizer(saved["characters"], tuple(saved.get("special", ())))
    if saved["kind"] == "byte":
        return ByteTokenizer(tuple(saved.get("special", ())))
    if saved["kind"] == "bpe":
        ranks = {base64.b64decode(token): rank for rank, token in enumerate(saved["ranks"]) if token is not None}
        end = saved.get("end_of_text", END_OF_TEXT)
        return BPETokenizer(saved["name"], saved["pattern"], ranks, saved["special"], end)
    if saved["kind"] == "library":
        return LibraryTokenizer(saved["tokenizers"], saved["end_of_text"], tuple(saved.get("other_ends", ())))
    raise ValueError(f"unknown tokenizer kind {saved['kind']!r}")


def save(tokenizer: Tokenizer, path: Path) -> None:
    """Write the tokenizer as json, atomically."""
    write_text(path, json.dumps(tokenizer.to_dict(), ensure_ascii=False))


def load(path: Path) -> Tokenizer:
    """Read what save wrote; ConfigError if the file holds anything else."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved["kind"] == "bpe" and saved["pattern"] != GPT2_PATTERN:
            # 我们只写这一种；别人写的正则可以让切分卡上几个小时
            raise ValueError("not the pattern of GPT-2")
        return from_dict(saved)
    except ConfigError:
        raise
    except Exception as error:
        # 词表可能来自陌生人，tokenizers 库又只抛裸 Exception
        raise ConfigError(
            "{file} is not a vocabulary ({reason}); get an undamaged copy or another model",
            file=path, reason=reason_of(error),
        ) from None
