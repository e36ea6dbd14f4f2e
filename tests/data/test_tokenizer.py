"""Tokenizers: lossless, saved as json, GPT-2's own ids."""

from functools import cache
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.base.language import ConfigError
from nanogpt.data import tokenizer as tokenizers
from nanogpt.data.corpus import build_char_tokenizer
from nanogpt.data.labels import with_labels
from nanogpt.data.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, LibraryTokenizer, byte_letters

gpt2 = cache(tokenizers.gpt2_tokenizer)
TEXTS = ["To be, or not to be", "春江潮水连海平 😀 ñ", "a\tb\n\n  c", ""]


def roundtrip(tokenizer, tmp_path):
    tokenizers.save(tokenizer, tmp_path / "t.json")
    return tokenizers.load(tmp_path / "t.json")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["char", "byte", "gpt2"])
def test_decode_undoes_encode_also_after_saving(tmp_path, kind, text):
    tokenizer = {"char": lambda: build_char_tokenizer(TEXTS), "byte": tokenizers.ByteTokenizer, "gpt2": gpt2}[kind]()
    loaded = roundtrip(tokenizer, tmp_path)
    ids = tokenizer.encode(text)
    assert loaded.decode(ids) == text and loaded.encode(text).tolist() == ids.tolist()
    assert loaded.vocab_size == tokenizer.vocab_size and all(0 <= i < tokenizer.vocab_size for i in ids)


def test_gpt2_ids_are_the_published_ones():
    tokenizer = gpt2()
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
    "gpt2": gpt2,
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


def some_ids(tokenizer):
    """Ids in which half characters, rare Han, emoji, empty and special tokens and ends of words meet: few, repeated."""
    known = [list(map(int, tokenizer.encode(text, skip_unknown=True))) for text in ("春", "a", "春😀𠮷春", "hello worlds", "the king")]
    anything = st.integers(0, tokenizer.vocab_size + 2)
    runs = st.sampled_from([ids for ids in known if ids]) | st.lists(anything, max_size=6)
    return st.lists(runs | st.lists(anything, min_size=1, max_size=3).map(lambda few: few * 3), max_size=4).map(lambda parts: [i for part in parts for i in part])


@pytest.mark.parametrize("kind", STREAMED)
def test_what_is_streamed_equals_prompt_and_continuation_decoded_together_less_the_prompt(kind):
    tokenizer = STREAMED[kind]()

    @settings(max_examples=50)
    @given(some_ids(tokenizer), st.integers(0, 30))
    def check(ids, cut):
        whole, prompt, stream = tokenizer.decode(ids), tokenizer.decode(ids[:cut]), tokenizer.stream(ids[:cut])
        # 开头停在半个字或可能消失的空格上：由续写补完
        open_end = tokenizer.stream(ids[:cut]).finish()
        assert prompt.endswith(open_end) and set(open_end) <= {"\ufffd", " "}
        shown = prompt.removesuffix(open_end)
        assert shown + "".join(map(stream.push, ids[cut:])) + stream.finish() == whole

    check()


def test_the_end_of_a_word_behind_nothing_is_written_without_its_mark():
    tokenizer = STREAMED["vocab.txt"]()
    unknown, end = WORDS.index("[UNK]"), WORDS.index("##s")
    assert tokenizer.decode([unknown, end, WORDS.index("hello")]) == "s hello" and tokenizer.stream([unknown]).push(end) == "s"


def test_word_pieces_and_unigrams_go_on_behind_the_prompt_with_their_spaces():
    for kind, ids, wanted in (("vocab.txt", [6, 1, 7, 8, 2, 3], ["hello", "", " world", "s", "春", "天"]), ("unigram", [5, 0, 7, 8], ["the", "", " king", "春"])):
        tokenizer = STREAMED[kind]()
        for cut in range(len(ids)):
            stream = tokenizer.stream(ids[:cut])
            assert [stream.push(i) for i in ids[cut:]] == wanted[cut:] or not cut


def test_words_that_stand_for_bytes_are_characters_as_soon_as_they_are_whole_and_a_wrong_one_spoils_no_other():
    tokenizer = STREAMED["byte fallback"]()
    ids = [3 + byte for byte in (*"\n😀".encode(), 0xFF, *"𠮷".encode(), *"春".encode()[:2])]
    stream = tokenizer.stream()
    assert list(map(stream.push, ids)) == ["\n", "", "", "", "😀", "�", "", "", "", "𠮷", "", ""] and stream.finish() == "�"
    assert tokenizer.decode(ids) == "\n😀�𠮷�"
    # 没有坏字节时，与库一样
    whole = [259 + 2, *ids[:5], 259 + 3, *ids[6:10], 259 + 4]
    assert tokenizer.decode(whole) == tokenizer._tokenizer.decode(whole) == "the\n😀the𠮷 king"


@pytest.mark.parametrize("kind", [kind for kind in STREAMED if kind not in ("gpt2", "char", "byte", "bpe")])
def test_a_long_text_costs_no_more_per_token_than_a_short_one(kind, monkeypatch):
    tokenizer, decoded = STREAMED[kind](), []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: decoded.append(len(ids)) or decode(ids))
    stream, random = tokenizer.stream(), Random(1)
    # 什么也不写的 ## 除外；最后是同一个 token，在字节级词表里是一长串坏字节
    written = [i for i in range(tokenizer.vocab_size) if tokenizer.word(i) != "##"]
    for token in [*random.choices(written, k=300), *[written[len(written) // 2]] * 300]:
        stream.push(token)
    assert sum(decoded) < 10 * 600
