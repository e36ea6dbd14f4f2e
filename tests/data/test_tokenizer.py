"""Tokenizers: lossless, saved as json, GPT-2's own ids."""

from random import Random

import pytest

from nanogpt.base.language import ConfigError
from nanogpt.data import tokenizer as tokenizers
from nanogpt.data.corpus import build_char_tokenizer
from nanogpt.data.labels import with_labels
from nanogpt.data.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, LibraryTokenizer, byte_letters

TEXTS = ["To be, or not to be", "春江潮水连海平 😀 ñ", "a\tb\n\n  c", ""]


def roundtrip(tokenizer, tmp_path):
    tokenizers.save(tokenizer, tmp_path / "t.json")
    return tokenizers.load(tmp_path / "t.json")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["char", "byte", "gpt2"])
def test_decode_undoes_encode_also_after_saving(tmp_path, kind, text):
    tokenizer = {"char": lambda: build_char_tokenizer(TEXTS), "byte": tokenizers.ByteTokenizer, "gpt2": tokenizers.gpt2_tokenizer}[kind]()
    loaded = roundtrip(tokenizer, tmp_path)
    ids = tokenizer.encode(text)
    assert loaded.decode(ids) == text and loaded.encode(text).tolist() == ids.tolist()
    assert loaded.vocab_size == tokenizer.vocab_size and all(0 <= i < tokenizer.vocab_size for i in ids)


def test_gpt2_ids_are_the_published_ones():
    tokenizer = tokenizers.gpt2_tokenizer()
    # OpenAI 公布的例子
    assert tokenizer.encode("Hello world").tolist() == [15496, 995]
    assert tokenizer.vocab_size == 50257 and tokenizer.end_of_text == 50256
    assert 50256 not in tokenizer.encode("<|endoftext|>")


def test_unknown_characters_are_named():
    with pytest.raises(ConfigError, match=r"lacks 'x' '中'"):
        build_char_tokenizer(["abc"]).encode("a中bx")


def test_unknown_characters_are_named_or_skipped_where_the_library_has_no_token_for_them():
    vocabulary = {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]], "unk_id": None}
    tokenizer = LibraryTokenizer(described(None, ["a", "b"]) | {"model": vocabulary})
    with pytest.raises(ConfigError, match=r"lacks 'x' '中'"):
        tokenizer.encode("a中bx")
    assert tokenizer.encode("a中bx", skip_unknown=True).tolist() == [0, 1] and tokenizer.encode("x", skip_unknown=True).size == 0


def test_a_half_character_decodes_to_a_replacement_not_an_error():
    ids = tokenizers.ByteTokenizer().encode("中")
    assert tokenizers.ByteTokenizer().decode(ids[:2]) == "�"


@pytest.mark.parametrize("text", ["春天的花朵, blossoms.\n开了", "😀 a\n", "plain"])
def test_a_stream_shows_every_character_as_soon_as_it_is_whole(text):
    for tokenizer in (ByteTokenizer(), CharTokenizer("".join(sorted(set(text)))), BPETokenizer("bytes", r".+|\n", {bytes((i,)): i for i in range(256)}, {})):
        pieces, stream = [], tokenizer.stream()
        for i in tokenizer.encode(text):
            pieces.append(stream.push(int(i)))
            whole = tokenizer.decode(tokenizer.encode("".join(pieces)))
            assert text.startswith(whole) and "\ufffd" not in pieces[-1]
        assert "".join(pieces) == text and stream.finish() == ""


# ---- 流式输出：整段的文字减去开头的文字 ----

MARKS = ["<unk>", "<s>", "</s>"]
PIECES = ["▁", "▁▁", "▁the", "the", "▁king", "春", "天", "𠮷", "▁春", "�", "\n", "a", "😀"]
WORDS = ["[UNK]", "[CLS]", "春", "天", "𠮷", "##𠮷", "hello", "world", "##s", "##", "a ", "  ", "##春", ",", "“", "😀", "##😀", "#", "�"]
REPLACE = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
WORD_PIECE = {"type": "WordPiece", "prefix": "##", "cleanup": True}


def chain(*decoders):
    return {"type": "Sequence", "decoders": list(decoders)}


LLAMA = chain(REPLACE, {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0})


def described(decoder, words, special=(), *, kind="WordLevel", **model):
    """A tokenizers json whose ids are the places in `words`."""
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None, "decoder": decoder,
        "pre_tokenizer": {"type": "BertPreTokenizer"} if kind == "WordPiece" else None, "added_tokens": [
            {"id": words.index(word), "content": word, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
            for word in special
        ],
        "model": {"type": kind, "vocab": {word: i for i, word in enumerate(words)}, "unk_token": words[0], **model},
    }


def byte_pieces():
    return [*MARKS, *(f"<0x{b:02X}>" for b in range(256)), *PIECES]


STREAMED = {
    "char": lambda: CharTokenizer("ab\n春\ud800😀", ("<|endoftext|>",)),
    "byte": lambda: with_labels(ByteTokenizer(), {"style": ["宋词"]}, grow=True),
    "bpe": lambda: BPETokenizer("x", r".+|\n", {bytes((i,)): i for i in range(256)} | {b"\xe6\x98": 256, b"\xa5\xe6": 257, b"\x80\xf0\x9f": 258}, {"<|endoftext|>": 260}),
    "vocab.txt": lambda: LibraryTokenizer(described(
        WORD_PIECE, WORDS, WORDS[:2], kind="WordPiece", continuing_subword_prefix="##", max_input_chars_per_word=100)),
    "unigram": lambda: LibraryTokenizer(described(METASPACE, [*MARKS, *PIECES], MARKS) | {
        "model": {"type": "Unigram", "unk_id": 0, "vocab": [[word, -1.0 - i] for i, word in enumerate([*MARKS, *PIECES])], "byte_fallback": False}}),
    "foreign byte-level": lambda: LibraryTokenizer(described(BYTE_LEVEL, [*MARKS, *byte_letters(), "æĺ", "¥æ", "ĠtheðŁ", "你"], MARKS)),
    "byte-level and more": lambda: LibraryTokenizer(described(chain(BYTE_LEVEL, REPLACE), [*MARKS, *byte_letters(), "æĺ", "¥æ", "▁the"], MARKS)),
    "byte fallback": lambda: LibraryTokenizer(described(LLAMA, byte_pieces(), MARKS)),
    "byte fallback and metaspace": lambda: LibraryTokenizer(described(chain({"type": "ByteFallback"}, METASPACE), byte_pieces(), MARKS)),
    "no decoder": lambda: LibraryTokenizer(described(None, [*MARKS, *PIECES], MARKS)),
    "end of word": lambda: LibraryTokenizer(described({"type": "BPEDecoder", "suffix": "</w>"}, [*MARKS, "a</w>", "b", "</w>", "春</w>"], MARKS)),
}


@pytest.mark.parametrize("kind", STREAMED)
def test_what_is_streamed_equals_prompt_and_continuation_decoded_together_less_the_prompt(kind):
    tokenizer, random = STREAMED[kind](), Random(0)
    known = [[int(i) for i in tokenizer.encode(text)] for text in ("春", "a")]
    known += [[int(i) for i in tokenizer.encode(text)] for text in ("春😀𠮷春", "hello worlds", "the king")] if kind != "char" else []
    for _ in range(250):
        # 少数几个 id 反复出现，半个字、空 token 与词尾才会碰到一起
        pool = [random.randrange(tokenizer.vocab_size + 3) for _ in range(random.choice((2, 5, 300)))] + random.choice(known)
        ids = [*random.choice((*known, [])), *(random.choice(pool) for _ in range(random.randint(0, 12)))]
        cut = random.randint(0, len(ids))
        whole, prompt, stream = tokenizer.decode(ids), tokenizer.decode(ids[:cut]), tokenizer.stream(ids[:cut])
        streamed = "".join(map(stream.push, ids[cut:])) + stream.finish()
        left = len(whole) - len(streamed)
        # 停在半个字或可能消失的空格上的开头，由续写补完；别处一个字符也不差
        assert whole.endswith(streamed) and left <= len(prompt) and set(prompt[left:]) <= {"\ufffd", " "}, (ids, cut)
        assert whole[:left] == prompt[:left] or "byte fallback" in kind, (ids, cut)
        assert cut or streamed == whole


def test_word_pieces_and_unigrams_go_on_behind_the_prompt_with_their_spaces():
    for kind, ids, wanted in (("vocab.txt", [6, 1, 7, 8, 2, 3], ["hello", "", " world", "s", "春", "天"]), ("unigram", [5, 0, 7, 8], ["the", "", " king", "春"])):
        tokenizer = STREAMED[kind]()
        for cut in range(len(ids)):
            stream = tokenizer.stream(ids[:cut])
            assert [stream.push(i) for i in ids[cut:]] == wanted[cut:] or not cut


def test_a_long_text_costs_no_more_per_token_than_a_short_one(monkeypatch):
    tokenizer, longest = STREAMED["vocab.txt"](), []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: longest.append(len(ids)) or decode(ids))
    stream, random = tokenizer.stream(), Random(1)
    for _ in range(500):
        stream.push(random.choice((0, 1, 2, 6, 8)))
    assert max(longest) <= 3
