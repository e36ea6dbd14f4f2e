"""Reads the tokenizer files of Hugging Face folders as our tokenizers, and writes ours in that format."""

# Hugging Face 文件夹里的词表与我们的互换：tokenizer.json、vocab.json + merges.txt、BERT 的 vocab.txt
# 读：与 GPT-2 完全同类的字节级 BPE 换成 BPETokenizer（快），其余原样交给 LibraryTokenizer
# 写（导出用）：同样的 id、同样的文字；BPE 的合并规则由 ranks 反推出来（merges_of）
# 文件来自陌生人：任何异常都说成“文件坏了”

import json
import math
from pathlib import Path

from nanogpt.base.hashed_json import reason_of
from nanogpt.base.language import ConfigError
from nanogpt.data import tokenizer as tokenizers
from nanogpt.data.labels import labels_in
from nanogpt.data.tokenizer import (
    END_OF_TEXT,
    GPT2_PATTERN,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    ChatTemplate,
    LibraryTokenizer,
    Tokenizer,
    byte_letters,
    bytes_of_letters,
)

# GPT-2 的词表大小，以及 nanoGPT 补齐到 64 倍数之后的
GPT2_SIZES = (50257, 50304)
# 没有说明文件时，结束符常用的几种写法
END_WORDS = (END_OF_TEXT, "</s>", "[SEP]")
# generation_config.json 里管怎样抽字的，我们没有的也读：写作时说出没有照做
DRAWING = (
    "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size",
    "num_beams", "penalty_alpha", "epsilon_cutoff", "eta_cutoff", "encoder_repetition_penalty", "suppress_tokens",
    "bad_words_ids",
)
# 其中贪心时也起作用的
PENALTIES = ("repetition_penalty", "no_repeat_ngram_size")


def read_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer in a folder of Hugging Face's or ours; GPT-2's if there is none and the vocabulary has its size."""
    try:
        found, drawing = _read(folder), _drawing(folder)
    except ConfigError:
        raise
    except Exception as error:
        # 文件来自陌生人，tokenizers 库又只抛裸 Exception：一律说成文件坏了
        raise ConfigError("pretrained_damaged", file=folder / "tokenizer files", reason=reason_of(error)) from None
    if found is None:
        if vocab_size not in GPT2_SIZES:
            raise ConfigError(
                "{path} has no tokenizer for its vocabulary of {vocab}; put the tokenizer.json of the model (or of a "
                "run with the same characters) beside it",
                path=folder, vocab=vocab_size,
            )
        found = tokenizers.gpt2_tokenizer()
    if drawing:
        found.sampling = drawing
    if found.vocab_size > vocab_size:
        raise ConfigError(
            "{path}: the tokenizer has {tokens} tokens, the embedding only {rows} rows; put the model's own "
            "tokenizer.json beside it",
            path=folder, tokens=found.vocab_size, rows=vocab_size,
        )
    return found


def _json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _read(folder: Path) -> Tokenizer | None:
    described = _json(folder / "tokenizer.json")
    settings = _json(folder / "tokenizer_config.json")
    if "kind" in described:
        # 我们自己的格式
        return tokenizers.from_dict(described)
    if not described and (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        described = _from_merges(folder)
    if not described and (folder / "vocab.txt").is_file():
        described = _from_word_pieces(folder / "vocab.txt", lower=settings.get("do_lower_case", True))
    if not described:
        return None
    ends = _end_ids(folder)
    end = _end_word(described, settings, ends)
    found = byte_level_bpe(described, end or END_OF_TEXT) or LibraryTokenizer(described, end)
    if isinstance(found, LibraryTokenizer):
        # 对话模型有几种结尾：哪一种都到此为止
        found.other_ends = tuple(i for i in ends if i != found.end_of_text and found.is_silent(i))
    # 标签就是照这个写法起名的特殊 token：名字里已经说清了种类
    found.labels = labels_in({token["content"]: token["id"] for token in described.get("added_tokens") or []})
    found.chat_template = _chat_template(folder, settings, end)
    return found


def _chat_template(folder: Path, settings: dict, end: str | None) -> ChatTemplate | None:
    """The chat template of a folder, which newer versions of transformers put into a file of its own."""
    beside = folder / "chat_template.jinja"
    template = beside.read_text(encoding="utf-8") if beside.is_file() else settings.get("chat_template")
    if isinstance(template, list):
        # 有几个名字的，default 是平常对话的那一个
        template = {one["name"]: one["template"] for one in template}.get("default")
    if not template:
        return None
    return {"template": template, "bos_token": _word(settings.get("bos_token")) or "", "eos_token": end or ""}


def _word(named: dict | str | None) -> str | None:
    """A special token as tokenizer_config.json names it."""
    return named.get("content") if isinstance(named, dict) else named


def _end_word(described: dict, settings: dict, ends: list[int]) -> str | None:
    """The word of the end-of-text token, or None."""
    named = _word(settings.get("eos_token"))
    added = {t["id"]: t["content"] for t in described.get("added_tokens") or []}
    vocabulary = described["model"].get("vocab")
    words = {*added.values(), *(vocabulary if isinstance(vocabulary, dict) else ())}
    return next((word for word in (named, *map(added.get, ends), *END_WORDS) if word in words), None)


def _end_ids(folder: Path) -> list[int]:
    """The ids that generation_config.json, or else config.json, says end a text."""
    for file in ("generation_config.json", "config.json"):
        if (found := _json(folder / file).get("eos_token_id")) is not None:
            return [i for i in (found if isinstance(found, list) else [found]) if type(i) is int]
    return []


def _drawing(folder: Path) -> dict:
    """What generation_config.json says of how to draw."""
    given = _json(folder / "generation_config.json")
    return {name: given[name] for name in DRAWING if given.get(name) is not None}


def _from_merges(folder: Path) -> dict:
    """The json that the tokenizers library would write for GPT-2's old pair of files."""
    vocab = _json(folder / "vocab.json")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    return byte_level_json(vocab, merges, {END_OF_TEXT: vocab[END_OF_TEXT]} if END_OF_TEXT in vocab else {})


def _from_word_pieces(path: Path, lower: bool) -> dict:
    """BERT's vocab.txt, which many Chinese GPT-2 models use, as the json of the tokenizers library."""
    words = path.read_text(encoding="utf-8").split("\n")
    vocab = {word.strip("\r"): i for i, word in enumerate(words) if word.strip("\r")}
    special = [w for w in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if w in vocab]
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [_added(word, vocab[word]) for word in special],
        "normalizer": {
            "type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None,
            "lowercase": lower,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"}, "post_processor": None,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": False},
        "model": {
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": vocab,
        },
    }


def _added(word: str, token_id: int) -> dict:
    return {
        "id": token_id, "content": word, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
        "special": True,
    }


def byte_level_bpe(described: dict, end_of_text: str) -> BPETokenizer | None:
    """A BPETokenizer of the same ids when `described` is byte-level BPE exactly as in GPT-2, else None."""
    model, before = described["model"], described.get("pre_tokenizer") or {}
    added = described.get("added_tokens") or []
    others = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    gpt2_like = (
        model.get("type", "BPE") == "BPE" and before.get("type") == "ByteLevel"
        and not before.get("add_prefix_space", True) and before.get("use_regex", True)
        and not described.get("normalizer") and all(token["special"] for token in added)
        and not any(model.get(k) for k in others)
    )
    if not gpt2_like:
        return None
    special = {token["content"]: token["id"] for token in added}
    byte_of = bytes_of_letters()
    vocab = {word: i for word, i in model["vocab"].items() if word not in special}
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    merged = ["".join(pair) for pair in pairs]
    # tiktoken 只认“id 小的先合并”：合并次序必须与 id 次序一致，且没有别的 token
    if set(vocab) != set(byte_letters()) | set(merged) or len(merged) != len(vocab) - 256:
        return None
    ids = [vocab[word] for word in merged]
    if ids != sorted(ids):
        return None
    ranks = {bytes(byte_of[letter] for letter in word): i for word, i in vocab.items()}
    return BPETokenizer("gpt2" if len(ranks) == 50256 else "bpe", GPT2_PATTERN, ranks, special, end_of_text)


def byte_level_json(vocab: dict[str, int], merges: list, special: dict[str, int]) -> dict:
    """GPT-2's kind of byte-level BPE in the format of the tokenizers library."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [_added(word, i) for word, i in special.items()],
        "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": vocab, "merges": merges,
        },
    }


# ---- 写出 ----


def drawing_numbers(tokenizer: Tokenizer) -> dict[str, bool | int | float]:
    """What the model's generation_config.json said of how to draw, without what is no number."""
    return {
        name: value for name, value in tokenizer.sampling.items()
        if isinstance(value, bool | int | float) and math.isfinite(value)
    }


def advised(sampling: dict) -> dict:
    """What a generation_config.json advises of how to draw."""
    # do_sample=false 是 transformers 的默认值，底座模型大多这样写：贪心的续写原地打转，不当作建议
    # 那时抽样的数也没有人定过，只剩贪心也用得着的
    greedy = sampling.get("do_sample", True) is False
    return {n: value for n, value in sampling.items() if n != "do_sample" and (n in PENALTIES or not greedy)}


def to_library_json(tokenizer: Tokenizer) -> dict:
    """The json of the tokenizers library that gives the same ids and the same text."""
    if isinstance(tokenizer, LibraryTokenizer):
        return tokenizer.description
    if isinstance(tokenizer, CharTokenizer):
        return _character_json(tokenizer.characters, tokenizer.special)
    letters = byte_letters()
    if isinstance(tokenizer, ByteTokenizer):
        # 没有合并规则的字节级 BPE，就是逐字节
        vocab = {letter: byte for byte, letter in enumerate(letters)} | tokenizer.special
        return byte_level_json(vocab, [], tokenizer.special)
    words = {token: "".join(letters[b] for b in token) for token in tokenizer.ranks}
    merges = [[words[left], words[right]] for left, right in merges_of(tokenizer.ranks)]
    # 特殊 token 也要列进词表，库才会用我们的编号而不是另给
    vocab = {words[token]: rank for token, rank in tokenizer.ranks.items()} | tokenizer.special
    return byte_level_json(vocab, merges, tokenizer.special)


def _character_json(characters: str, special: dict[str, int]) -> dict:
    """One token per character: split everywhere, look up, join without spaces; unknown characters are errors."""
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [_added(word, i) for word, i in special.items()],
        "normalizer": None, "post_processor": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False},
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel", "vocab": {c: i for i, c in enumerate(characters)} | special, "unk_token": "<unknown>",
        },
    }


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two tokens from which each longer token was merged, in the order of the ranks."""
    merges = []
    for token in sorted((t for t in ranks if len(t) > 1), key=ranks.__getitem__):
        # 用排在它前面的规则切开自己，剩下的两段就是它的来历
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [(ranks.get(parts[i] + parts[i + 1], ranks[token]), i) for i in range(len(parts) - 1)]
            rank, at = min(pairs)
            assert rank < ranks[token], f"no rule leads to {token!r}"
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        merges.append((parts[0], parts[1]))
    return merges
