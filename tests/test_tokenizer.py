"""Tokenizers: lossless, saved as json, GPT-2's own ids."""

import pytest

from nanogpt import tokenizer as tokenizers
from nanogpt.corpus import build_char_tokenizer
from nanogpt.messages import ConfigError
from nanogpt.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, LibraryTokenizer, WindowStream

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


def test_a_half_character_decodes_to_a_replacement_not_an_error():
    ids = tokenizers.ByteTokenizer().encode("中")
    assert tokenizers.ByteTokenizer().decode(ids[:2]) == "�"


@pytest.mark.parametrize("text", ["春天的花朵, blossoms.\n开了", "😀 a\n", "plain"])
def test_ids_streamed_one_by_one_join_to_the_decoded_text(text):
    for tokenizer in (ByteTokenizer(), CharTokenizer("".join(sorted(set(text)))), BPETokenizer("bytes", r".+|\n", {bytes((i,)): i for i in range(256)}, {})):
        ids = tokenizer.encode(text)
        stream = tokenizer.stream()
        pieces = [stream.push(int(i)) for i in ids]
        assert "".join(pieces) + stream.finish() == text and not any("�" in piece for piece in pieces)
        window = WindowStream(tokenizer.decode)
        assert "".join(window.push(int(i)) for i in ids) + window.finish() == text


def test_word_pieces_are_streamed_with_their_spaces():
    words = ["[UNK]", "春", "天", "hello", "world", "##s", ","]
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100, "vocab": {w: i for i, w in enumerate(words)}}
    tokenizer = LibraryTokenizer({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "post_processor": None,
        "pre_tokenizer": {"type": "BertPreTokenizer"}, "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}, "model": model,
    })
    ids, stream = [3, 4, 5, 6, 1, 2, 3, 3], tokenizer.stream()
    assert "".join(stream.push(i) for i in ids) + stream.finish() == tokenizer.decode(ids) == "hello worlds,春天hello hello"
