"""Vocabularies as llama.cpp knows them: the tokenizer.ggml.* fields of a GGUF file."""

# llama.cpp 自己认几种词表，没有通用的：这里把我们的换成其中一种，编码与解码都一样才写，别的拒绝并说怎样办
# 字节级 BPE -> gpt2（切词的正则按名字选，只认 PRE 里的）；Llama 2 那种 -> llama；逐字、逐字节的也写成 gpt2：
#   一个字的几个字节由合并规则拼起来，UTF-8 的首字节与后续字节不同，所以不会跨字合并
# 没有结尾的逐字词表写成 rwkv：gpt2 在文件没说时把 11 号当结尾，写着写着就停了；rwkv 没有这个默认
# WordPiece、Unigram 在那边的空格规则与这里不同，写出来的文字会不一样

from nanogpt.base.language import ConfigError
from nanogpt.data.tokenizer import (
    BYTE_WORD,
    BPETokenizer,
    CharTokenizer,
    LibraryTokenizer,
    Tokenizer,
    begin_of,
    byte_letters,
    ends_of,
)
from nanogpt.data.tokenizer_files import to_library_json

# llama.cpp 的 token 种类
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# 切词的正则 -> llama.cpp 给它的名字
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
PRE = {QWEN2: "qwen2", LLAMA3: "llama-bpe"}
# 我们的字节词表与 BPE 里，gpt2 默认的结尾是谁也不写的垂直制表符：没有结尾时就用它
NEVER = 11, b"\x0b"
# 一条用不上的规则：llama.cpp 不收没有合并规则的 gpt2
NO_MERGE = f"{byte_letters()[0]} {byte_letters()[0]}"


def vocabulary_fields(tokenizer: Tokenizer, size: int, documents: bool) -> dict:
    """What a GGUF file says of a vocabulary, by the names behind tokenizer.ggml, with `size` rows of the embedding.

    `documents`: every text begins with the end of the one before. ConfigError for a vocabulary that llama.cpp lacks.
    """
    found = _library(tokenizer, size) if isinstance(tokenizer, LibraryTokenizer) else _of_bytes(tokenizer)
    words, kinds = found.pop("words"), dict.fromkeys(tokenizer.special.values(), CONTROL) | found.pop("kinds", {})
    words |= {number: word for word, number in tokenizer.special.items()}
    tokens = [words.get(number, f"[PAD{number}]") for number in range(size)]
    end, begin = tokenizer.end_of_text, next(iter(begin_of(tokenizer)), None)
    ends = sorted(ends_of(tokenizer) - {end, None})
    if end is None and found["model"] != "rwkv":
        if isinstance(tokenizer, LibraryTokenizer) or tokenizer.token_bytes(NEVER[0]) != NEVER[1]:
            raise _foreign(tokenizer, "no end of text")
        end = NEVER[0]
    chat = tokenizer.chat_template or {}
    return {
        **found, "tokens": tokens,
        "token_type": [kinds.get(n, NORMAL if n in words else UNUSED) for n in range(size)],
        **({} if end is None else {"eos_token_id": end, "bos_token_id": end if documents or begin is None else begin}),
        # 对话的结尾与文字的结尾不是同一个时，两个都到此为止
        **({"eot_token_id": ends[0]} if ends else {}),
        "add_bos_token": documents or begin is not None, "add_eos_token": False,
    } | ({"chat_template": chat["template"]} if chat else {})


def _of_bytes(tokenizer: Tokenizer) -> dict:
    """The fields of a vocabulary of ours whose every token is a string of bytes."""
    ids = [number for number in range(tokenizer.vocab_size) if number not in set(tokenizer.special.values())]
    # 陌生人的字符表里可能有编不成 UTF-8 的，都成了 ?：各只留一个
    spelled = {number: piece for piece, number in {tokenizer.token_bytes(number): number for number in ids}.items()}
    if tokenizer.end_of_text is None and isinstance(tokenizer, CharTokenizer):
        return {"model": "rwkv", "words": {number: _escaped(piece) for number, piece in spelled.items()}}
    letters = byte_letters()
    words = {number: "".join(letters[byte] for byte in piece) for number, piece in spelled.items()}
    if isinstance(tokenizer, BPETokenizer):
        merges = [" ".join(pair) for pair in to_library_json(tokenizer)["model"]["merges"]]
    else:
        merges = sorted({f"{word[:i]} {word[i]}" for word in words.values() for i in range(1, len(word))}, key=len)
    return {"model": "gpt2", "pre": "gpt-2", "words": words, "merges": merges or [NO_MERGE]}


def _escaped(piece: bytes) -> str:
    """Bytes as a vocabulary of RWKV writes them."""
    try:
        text = piece.decode("utf-8")
    except UnicodeDecodeError:
        text = ""
    return text if text.isprintable() and text not in ("", "\\") else "".join(f"\\x{byte:02x}" for byte in piece)


def _library(tokenizer: LibraryTokenizer, size: int) -> dict:
    """The fields of a vocabulary that the `tokenizers` library describes."""
    described = tokenizer.description
    model, added = described["model"], described.get("added_tokens") or []
    if model.get("type", "BPE") != "BPE":
        raise _foreign(tokenizer, str(model.get("type")))
    words = {number: word for word, number in model["vocab"].items()} | {t["id"]: t["content"] for t in added}
    kinds = {token["id"]: CONTROL if token["special"] else USER_DEFINED for token in added}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if model.get("byte_fallback"):
        return _sentence_piece(tokenizer, words, kinds) | {"scores": scores_of(words, merges, size)}
    pre = _cut(described.get("pre_tokenizer") or {})
    if pre is None or (pre == "llama-bpe") != bool(model.get("ignore_merges")):
        raise _foreign(tokenizer, "pre_tokenizer")
    return {"model": "gpt2", "pre": pre, "words": words, "kinds": kinds, "merges": merges or [NO_MERGE]}


def _cut(before: dict) -> str | None:
    """llama.cpp's name of how a byte-level BPE cuts a text into words; None: it has none."""
    parts = before["pretokenizers"] if before.get("type") == "Sequence" else [before]
    last = parts[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        return None
    if last.get("use_regex", True):
        digits = parts[0] == {"type": "Digits", "individual_digits": True}
        return "gpt-2" if len(parts) == 1 else "smollm" if len(parts) == 2 and digits else None
    cut = parts[0]
    same = len(parts) == 2 and cut.get("type") == "Split" and cut.get("behavior") == "Isolated" and not cut["invert"]
    return PRE.get(cut["pattern"].get("Regex")) if same else None


def _sentence_piece(tokenizer: LibraryTokenizer, words: dict, kinds: dict) -> dict:
    """The fields of Llama 2's kind of vocabulary: ▁ for spaces, <0xE6> for bytes, the earliest merge first."""
    described = tokenizer.description
    steps = described.get("normalizer") or {}
    steps = steps.get("normalizers", [steps]) if steps else []
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prefixed = {"type": "Prepend", "prepend": "▁"} in steps
    if described.get("pre_tokenizer") or [step for step in steps if step.get("type") != "Prepend"] != [spaces]:
        raise _foreign(tokenizer, "normalizer")
    kinds = {number: BYTE for number, word in words.items() if BYTE_WORD.fullmatch(word)} | kinds
    unknown = described["model"]["vocab"].get(described["model"].get("unk_token"))
    return {
        "model": "llama", "pre": "default", "words": words, "kinds": kinds | {unknown: UNKNOWN},
        "add_space_prefix": prefixed, **({} if unknown is None else {"unknown_token_id": unknown}),
    }


def scores_of(words: dict[int, str], merges: list[str], size: int) -> list[float]:
    """A score for each of `size` tokens: there the pair of tokens that make up the highest one is merged first."""
    rank: dict[str, int] = {}
    for number, pair in enumerate(merges):
        rank.setdefault(pair.replace(" ", ""), number)
    return [float(-rank.get(words.get(number, ""), 0)) for number in range(size)]


def _foreign(tokenizer: Tokenizer, what: str) -> ConfigError:
    """The error that llama.cpp would read or write other text with this vocabulary."""
    return ConfigError(
        "format=gguf: llama.cpp has no vocabulary that gives the same ids as this one ({kind}: {what}); take "
        "format=hf, or train with dataset.tokenizer=bpe, gpt2, char or byte",
        kind=tokenizer.kind, what=what,
    )
