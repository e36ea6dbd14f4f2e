"""Tokenizers: lossless, saved as json, GPT-2's own ids."""

import pytest

from nanogpt import tokenizer as tokenizers
from nanogpt.corpus import build_char_tokenizer
from nanogpt.messages import ConfigError

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
