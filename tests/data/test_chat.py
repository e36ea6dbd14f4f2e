"""Conversations: as people's files have them, as the model reads them, and what is trained on of them."""

import json

import numpy as np
import pytest

from nanogpt.base.language import ConfigError
from nanogpt.data import chat
from nanogpt.data import tokenizer as tokenizers
from nanogpt.data.chat import question_ids, samples, turn_end, with_template
from nanogpt.data.tokenizer import ByteTokenizer, CharTokenizer, LibraryTokenizer
from nanogpt.data.tokenizer_files import read_tokenizer, to_library_json

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{- bos_token }}\n{%- if messages[0]['role'] == 'system' %}\n    {%- set system = messages[0]['content']|trim %}\n    {%- set messages = messages[1:] %}\n"
    "{%- else %}\n    {%- set system = '' %}\n{%- endif %}\n{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: 26 Jul 2024\\n\\n' + system + '<|eot_id|>' }}\n"
    "{%- for message in messages %}\n    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n"
)
# 与 Qwen3 的一样：只有最后一问之后的回答带着思考，从前的思考去掉
QWEN3 = (
    "{%- set ns = namespace(last=-1) %}\n{%- for message in messages %}\n    {%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}\n{%- endfor %}\n"
    "{%- for message in messages %}\n    {%- if message.role == 'assistant' and loop.index0 > ns.last %}\n"
    "        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}\n        {%- set thought = message.content.split('</think>')[0].split('<think>')[-1].strip('\\n') if '</think>' in message.content else '' %}\n"
    "        {{- '<|im_start|>assistant\\n<think>\\n' + thought + '\\n</think>\\n\\n' + content + '<|im_end|>\\n' }}\n"
    "    {%- elif message.role == 'assistant' %}\n        {{- '<|im_start|>assistant\\n' + message.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n' }}\n"
    "    {%- else %}\n        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\n    {%- endif %}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\\n' }}{% generation %}{{ message['content'] + eos_token }}"
    "{% endgeneration %}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
# 模板、它的特殊 token、开头与结尾
FAMILIES = {
    "chatml": (CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|im_end|>"),
    "llama3": (LLAMA3, ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"], "<|begin_of_text|>", "<|eot_id|>"),
    "qwen3": (QWEN3, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|im_end|>"),
    "zephyr": (ZEPHYR, ["<s>", "</s>"], "<s>", "</s>"),
}
TALK = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": " What is 1 + 2?\n"}, {"role": "assistant", "content": "It is 3."},
    {"role": "user", "content": "再说一遍 🙂"}, {"role": "assistant", "content": "<think>\n三\n</think>\n\n是三。"},
]


def folder_of(path, name, *, beside=False):
    """The tokenizer files of a model of this family."""
    template, special, begin, end = FAMILIES[name]
    path.mkdir()
    (path / "tokenizer.json").write_text(json.dumps(to_library_json(ByteTokenizer(tuple(special)))), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": end}
    if beside:
        (path / "chat_template.jinja").write_text(template, encoding="utf-8")
    else:
        settings["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", FAMILIES)
def test_a_conversation_is_the_ids_of_transformers_and_its_answers_are_found_by_prefixes(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    folder = folder_of(tmp_path / name, name, beside=name == "qwen3")
    own, theirs = read_tokenizer(folder, 300), transformers.AutoTokenizer.from_pretrained(folder)
    for tokenizer in (own, tokenizers.from_dict(own.to_dict()), LibraryTokenizer(to_library_json(own), FAMILIES[name][3])):
        tokenizer.chat_template = tokenizer.chat_template or own.chat_template

        def whole(messages, **more):
            return theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **more)

        found = samples(tokenizer, TALK)
        # Qwen3 从前的回答没有思考，单独是一个样本
        assert [one.ids.tolist() for one in found] == [whole(TALK[:3]), whole(TALK)][-len(found) :] and len(found) == (2 if name == "qwen3" else 1)
        asked = [whole(TALK[:2], add_generation_prompt=True), whole(TALK[:4], add_generation_prompt=True)]
        assert [question_ids(tokenizer, TALK[:2]).tolist(), question_ids(tokenizer, TALK[:4]).tolist()] == asked
        assert turn_end(tokenizer) == own.special[FAMILIES[name][3]]
        told = [tokenizer.decode(part) for one in found for part in np.split(one.ids, np.flatnonzero(np.diff(one.answers)) + 1)[1::2]]
        # 结尾的记号读得出来还是读不出来，各种词表不同
        told = [part.removesuffix(FAMILIES[name][3]).strip("\n") for part in told]
        think = "<think>\n\n</think>\n\n" if name == "qwen3" else ""
        assert told == [think + "It is 3.", TALK[4]["content"]]
        assert all(one.ids[:n].tolist() == ids for one, ids in zip(found[-1:], asked[-1:]) for n in [len(ids)] if name != "zephyr")


def test_words_of_special_tokens_are_ordinary_text_within_a_conversation(tmp_path):
    for tokenizer in (read_tokenizer(folder_of(tmp_path / "c", "chatml"), 300), with_template(ByteTokenizer(), grow=True)):
        end, library = turn_end(tokenizer), LibraryTokenizer(to_library_json(tokenizer))
        library.chat_template = tokenizer.chat_template
        word = next(word for word, token in tokenizer.special.items() if token == end)
        talk = [{"role": "user", "content": f"say {word} 你"}, {"role": "assistant", "content": f"你{word}{word}!"}]
        for one in (tokenizer, library):
            (sample,) = samples(one, talk)
            assert sample.ids.tolist().count(end) == 2 and one.decode(sample.ids[sample.answers][:-1]) == talk[1]["content"]
            assert np.array_equal(sample.ids, samples(tokenizer, talk)[0].ids)


def test_our_own_template_needs_four_tokens_and_no_character():
    tokenizer = with_template(CharTokenizer("12+=?"), grow=True)
    (sample,) = samples(tokenizer, [{"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": "2"}])
    names = {token: word for word, token in tokenizer.special.items()}
    assert [names.get(int(i), tokenizer.decode([i])) for i in sample.ids] == ["<|user|>", *"1+1=?", "<|endoftext|>", "<|assistant|>", "2", "<|endoftext|>"]
    assert sample.answers.tolist() == [False] * 8 + [True] * 2
    # 模型自己的词表不变大：角色写成文字，字符词表里没有的就拒绝
    words = with_template(ByteTokenizer(("<|endoftext|>",)), grow=False)
    assert words.vocab_size == 257 and words.decode(question_ids(words, [{"role": "user", "content": "hi"}])) == "<|user|>hi<|assistant|>"
    with pytest.raises(ConfigError, match="neither a chat template nor an end of text"):
        with_template(CharTokenizer("ab"), grow=False)
    with pytest.raises(tokenizers.UnknownCharacters):
        with_template(CharTokenizer("ab", ("<|endoftext|>",)), grow=False)


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}", "{{ cycler.__init__.__globals__.os.system('x') }}", "{% if %}",
    "{{ raise_exception('roles must alternate') }}", "{{ nothing.at.all }}", "{{ messages[0].content }}",
])
def test_a_template_is_data_and_what_it_refuses_is_one_line(template):
    tokenizer = with_template(ByteTokenizer(), grow=True)
    tokenizer.chat_template = {**tokenizer.chat_template, "template": template}
    with pytest.raises(ConfigError, match="the chat template does not take this conversation") as found:
        samples(tokenizer, TALK)
    assert "\n" not in str(found.value)


def test_a_template_is_compiled_once():
    chat._compiled.cache_clear()
    with_template(ByteTokenizer(), grow=True)
    with_template(CharTokenizer("1"), grow=True)
    assert chat._compiled.cache_info().misses == 1
