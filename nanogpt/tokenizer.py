"""Text <-> token ids: characters, bytes, or GPT-2's byte-pair encoding; saved as json beside a checkpoint."""

import base64
import codecs
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nanogpt import assets
from nanogpt.files import write_text
from nanogpt.messages import ConfigError

KINDS = ("char", "byte", "gpt2")

# GPT-2 的预切分规则：缩写、词、数字、标点、空白（Radford et al. 2019 的公开实现）
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
END_OF_TEXT = "<|endoftext|>"


class TextStream:
    """Turns ids into text one by one; bytes of a character that is not whole yet are held back."""

    def __init__(self, token_bytes: Callable[[int], bytes]):
        self._token_bytes = token_bytes
        # 增量解码器自己记住半个汉字的字节，等齐了才吐出来
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """New whole characters."""
        return self._decoder.decode(self._token_bytes(token))

    def finish(self) -> str:
        """What is left; half a character becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)


class CharTokenizer:
    """One token per Unicode character of the training text, in code-point order."""

    kind = "char"
    end_of_text: int | None = None

    def __init__(self, characters: str):
        self.characters = characters
        self.vocab_size = len(characters)
        codes = np.array([ord(c) for c in characters], dtype=np.uint32)
        # 查表向量化：码点 -> id，百万字以毫秒计
        self._table = np.full(int(codes.max(initial=0)) + 1, -1, dtype=np.int64)
        self._table[codes] = np.arange(len(characters))

    def encode(self, text: str, *, skip_unknown: bool = False) -> np.ndarray:
        """Ids of a text, shape (n,); ConfigError names the characters that the vocabulary lacks, unless they are to be skipped."""
        codes = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)
        inside = codes < len(self._table)
        ids = np.where(inside, self._table[np.where(inside, codes, 0)], -1)
        if skip_unknown:
            return ids[ids >= 0]
        if (ids < 0).any():
            missing = sorted({chr(c) for c in codes[ids < 0]})
            raise ConfigError("unknown_characters", characters=" ".join(map(repr, missing[:20])))
        return ids

    def decode(self, ids) -> str:
        return "".join(self.characters[i] for i in ids)

    def stream(self) -> TextStream:
        """Decodes ids one by one."""
        return TextStream(lambda token: self.characters[token].encode("utf-8", errors="replace"))

    def to_dict(self) -> dict:
        return {"kind": self.kind, "characters": self.characters}


class ByteTokenizer:
    """One token per UTF-8 byte: any text, 256 tokens."""

    kind = "byte"
    vocab_size = 256
    end_of_text: int | None = None

    def encode(self, text: str, *, skip_unknown: bool = False) -> np.ndarray:
        """Ids of a text, shape (n,); there are no unknown characters."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64)

    def decode(self, ids) -> str:
        # 截断在半个汉字处时用 U+FFFD 表示，而不是报错
        return bytes(int(i) for i in ids).decode("utf-8", errors="replace")

    def stream(self) -> TextStream:
        """Decodes ids one by one."""
        return TextStream(lambda token: bytes((token,)))

    def to_dict(self) -> dict:
        return {"kind": self.kind}


class BPETokenizer:
    """Byte-pair encoding through tiktoken; ranks and pattern are kept, so that it loads without a network."""

    kind = "bpe"

    def __init__(self, name: str, pattern: str, ranks: dict[bytes, int], special: dict[str, int]):
        import tiktoken

        self.name, self.pattern, self.ranks, self.special = name, pattern, ranks, special
        self._encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        self.vocab_size = self._encoding.n_vocab
        self.end_of_text = special.get(END_OF_TEXT)

    def encode(self, text: str, *, skip_unknown: bool = False) -> np.ndarray:
        """Ids of a text, shape (n,); the words of special tokens are ordinary text, and there are no unknown characters."""
        return np.array(self._encoding.encode_ordinary(text), dtype=np.int64)

    def decode(self, ids) -> str:
        return self._encoding.decode([int(i) for i in ids], errors="replace")

    def stream(self) -> TextStream:
        """Decodes ids one by one."""
        return TextStream(self._encoding.decode_single_token_bytes)

    def to_dict(self) -> dict:
        # 按 rank 排成一列，序号即 rank，比键值对省一半
        ordered = sorted(self.ranks, key=self.ranks.__getitem__)
        return {
            "kind": self.kind, "name": self.name, "pattern": self.pattern, "special": self.special,
            "ranks": [base64.b64encode(token).decode("ascii") for token in ordered],
        }


Tokenizer = CharTokenizer | ByteTokenizer | BPETokenizer


def gpt2_tokenizer() -> BPETokenizer:
    """GPT-2's 50257 tokens, built from vocab.bpe and encoder.json (assets)."""
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    ranks = data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(assets.fetch(assets.GPT2_VOCAB)), encoder_json_file=str(assets.fetch(assets.GPT2_ENCODER))
    )
    return BPETokenizer("gpt2", GPT2_PATTERN, ranks, {END_OF_TEXT: 50256})


def from_dict(saved: dict) -> Tokenizer:
    """The tokenizer that to_dict described."""
    if saved["kind"] == "char":
        return CharTokenizer(saved["characters"])
    if saved["kind"] == "byte":
        return ByteTokenizer()
    if saved["kind"] == "bpe":
        ranks = {base64.b64decode(token): rank for rank, token in enumerate(saved["ranks"])}
        return BPETokenizer(saved["name"], saved["pattern"], ranks, saved["special"])
    raise ValueError(f"unknown tokenizer kind {saved['kind']!r}")


def save(tokenizer: Tokenizer, path: Path) -> None:
    """Write the tokenizer as json, atomically."""
    write_text(path, json.dumps(tokenizer.to_dict(), ensure_ascii=False))


def load(path: Path) -> Tokenizer:
    """Read what save wrote."""
    return from_dict(json.loads(path.read_text(encoding="utf-8")))
