"""Data of conversations: every way in which people write them, and rows of which answers alone are targets."""

import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import reseal, wild_model
from test_labelled_data import script

from nanogpt.base.language import ConfigError
from nanogpt.data import corpus
from nanogpt.data.chat import question_ids, samples, with_template
from nanogpt.data.conversations import ConversationData, conversations, split_conversations, write_conversations
from nanogpt.data.opening import open_data
from nanogpt.data.tokenizer import ByteTokenizer, CharTokenizer
from nanogpt.data.tokens import copy_dataset

OPTIONS = {"tokenizer": "auto", "vocab_size": 300, "encoding": "auto", "val_fraction": 0.2}
TALK = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?\nquick"}, {"role": "assistant", "content": "2"},
    {"role": "user", "content": "是吗"}, {"role": "assistant", "content": "是 🙂"},
]
OPENAI = {"messages": TALK}
SHAREGPT = {"system": "Be brief.", "conversations": [
    {"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"].replace("\n", "\r\n")} for m in TALK[1:]
]}


def read(path, content, encoding="utf-8"):
    path.write_bytes(content.encode(encoding))
    return [one.messages for one in conversations([path])]


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """prepare(file, **options) -> the data set; its folder lies below tmp_path."""
    monkeypatch.setattr("nanogpt.base.config.ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(corpus, "_script", script)
    return lambda path, **options: open_data(corpus.prepare("chat", None, {**OPTIONS, "path": path and str(path), **options}))


# ---- 文件 ----


def test_every_form_of_a_conversation_is_the_same_messages(tmp_path):
    parts = {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in TALK], "id": 7}
    records = [OPENAI, SHAREGPT, parts, {"conversation": [{**m, "role": m["role"].replace("system", "developer")} for m in TALK]}]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    for content in ("\r\n".join(lines), "[\n" + ",\n".join(lines) + "\n]", "\n\n".join(lines) + "\n"):
        for encoding in ("utf-8", "utf-8-sig", "gb18030", "utf-16"):
            assert read(tmp_path / "a.json", content, encoding) == [TALK] * 4
    alpaca = [{"instruction": "Add.", "input": "1+1", "output": "2"}, {"instruction": "Add.", "input": "", "output": "2"}, {"question": "Add.", "answer": "2"}]
    asked = [[{"role": "user", "content": text}, {"role": "assistant", "content": "2"}] for text in ("Add.\n1+1", "Add.", "Add.")]
    assert read(tmp_path / "a.jsonl", json.dumps(alpaca)) == asked


def test_an_empty_answer_ends_its_conversation_and_questions_without_an_answer_are_left_out(tmp_path, capsys):
    def talk(*said):
        return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]}

    told = read(tmp_path / "a.json", json.dumps([talk("a", "b", "c", " ", "d", "e"), talk("a", ""), talk("a"), talk("a", "b", "c")]))
    assert [[m["content"] for m in one] for one in told] == [["a", "b"]] * 2
    assert "2 conversations without an answer are left out, 2 end before an empty one" in capsys.readouterr().err


WRONG = {
    "tool": ({"messages": [*TALK, {"role": "tool", "content": "7"}]}, "message 6 has the role 'tool'; known are system, user, assistant"),
    "call": ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]}, "message 1 has the role tool_calls"),
    "observation": ({"conversations": [{"from": "observation", "value": "x"}]}, "message 1 has the role 'observation'"),
    "no role": ({"messages": ["hi"]}, "message 1 has the role None"),
    "no text": ({"messages": [{"role": "user", "content": None}]}, "message 1 holds None, which is not a text"),
    "picture": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, r"message 1 holds \[\{'type': 'image_url'"),
    "half a character": ({"messages": [{"role": "user", "content": "\ud83d"}]}, r"message 1 holds '\\ud83d'"),
    "text": ({"text": "x"}, r"no conversation in it \(its fields: text\); write for example"),
    "empty": ({"messages": []}, "no conversation in it"),
    "list": ([1], r"this is not a JSON object \(a list\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_record_is_named_with_file_and_line(tmp_path, case):
    record, message = WRONG[case]
    with pytest.raises(ConfigError, match=rf"a.jsonl, line 2: .*{message}"):
        read(tmp_path / "a.jsonl", json.dumps(OPENAI) + "\n" + json.dumps(record) + "\n")


def sums(count, *, system=None):
    """Conversations of one or two questions."""
    for i in range(count):
        turns = [("user", f"{i}+1?"), ("assistant", str(i + 1)), *([("user", "again"), ("assistant", str(i + 1) * 3)] if i % 2 else [])]
        yield {"messages": [{"role": role, "content": text} for role, text in ([("system", system)] if system else []) + turns]}


def test_parts_hold_no_repetition_and_no_question_of_each_other(tmp_path, capsys):
    records = [*sums(40), *sums(40), *({"question": f"{i}+1?", "answer": "?"} for i in range(40))]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    parts = split_conversations(conversations([tmp_path / "a.jsonl"]), 0.1)
    assert "40 of 120 conversations repeat another and are left out" in capsys.readouterr().err
    asked = {split: {one.messages[0]["content"] for one in listed} for split, listed in parts.items()}
    assert len(parts["val"]) == 8 and len(parts["train"]) == 72 and not asked["train"] & asked["val"]
    random.Random(1).shuffle(records)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    again = split_conversations(conversations([tmp_path / "a.jsonl"]), 0.1)
    assert {one.messages[0]["content"] for one in again["val"]} == asked["val"]


@pytest.mark.parametrize("tokenizer", ["auto", "byte", "bpe"])
def test_a_file_becomes_a_data_set_with_each_of_our_vocabularies(tmp_path, prepared, tokenizer):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, sums(30, system="Add 😀"))), encoding="utf-8")
    data = prepared(tmp_path / "a.jsonl", tokenizer=tokenizer)
    own = data.tokenizer
    assert isinstance(data, ConversationData) and data.meta["conversations"] == {"train": 24, "val": 6} and own.chat_template
    assert [own.special[f"<|{role}|>"] for role in ("system", "user", "assistant")] == [data.vocab_size - 3 + i for i in range(3)]
    for split in ("train", "val"):
        for start, end in zip([0, *data._index[split][:-1, 0]], data._index[split][:, 0]):
            ids, answers = data.tokens[split][start:end], data.answers[split][start:end]
            assert ids[0] == own.special["<|system|>"] and ids[-1] == own.end_of_text and answers[-1] and not answers[0]
    # 复制到训练目录里的是同一份
    copy_dataset(data.folder, tmp_path / "copy")
    assert np.array_equal(open_data(tmp_path / "copy").answers["train"], data.answers["train"])


def test_a_template_that_refuses_is_named_with_file_and_line(tmp_path, prepared):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*sums(9), {"messages": [{"role": "assistant", "content": "x"}]}])), encoding="utf-8")
    coder = with_template(ByteTokenizer(), grow=True)
    strict = "{% if messages and messages[0].role != 'user' %}{{ raise_exception('ask first') }}{% endif %}"
    coder.chat_template = {**coder.chat_template, "template": strict + coder.chat_template["template"]}
    with pytest.raises(ConfigError, match=r"a.jsonl, line 10: the chat template does not take this conversation \(ask first\)"):
        prepared(tmp_path / "a.jsonl", tokenizer=coder)


@pytest.mark.parametrize(("options", "message"), [
    ({"path": None}, "dataset.path is not set; type dataset=chat"), ({"val_fraction": 1}, "dataset.val_fraction=1"), ({"tokenizer": "?"}, "dataset.tokenizer="),
])
def test_wrong_options_are_named_before_anything_is_read(tmp_path, prepared, options, message):
    (tmp_path / "a.jsonl").write_text(json.dumps(OPENAI), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        prepared(**{"path": tmp_path / "a.jsonl", **options})


# ---- 训练的行 ----


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    """The data set of 60 conversations and the samples that it holds."""
    folder = tmp_path_factory.mktemp("talks")
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, sums(60))), encoding="utf-8")
    listed = list(conversations([folder / "a.jsonl"]))
    tokenizer = with_template(CharTokenizer("".join(sorted({c for one in listed for m in one.messages for c in m["content"]}))), grow=True)
    write_conversations(folder / "d", name="chat", source="a", tokenizer=tokenizer, parts={"train": listed[:50], "val": listed[50:]})
    return open_data(folder / "d"), [samples(tokenizer, one.messages)[0] for one in listed[:50]]


def test_every_epoch_shows_every_conversation_once_and_its_answers_are_the_targets(talks):
    data, wanted = talks
    rows = len(data.pieces("train", 48).rows)
    orders = []
    for epoch in range(2):
        starts = data.starts(3, epoch * rows, rows, 48)
        x, y = (t.numpy() for t in data.rows("train", starts, 48))
        assert np.array_equal((y >= 0).sum(1), data.targets(starts, 48)) and (y >= 0).sum() == sum(one.answers.sum() for one in wanted)
        found = []
        for ids, targets in zip(x, y):
            begins = np.flatnonzero(ids < 0)
            # 行尾没有填满的是 0，不是任何一段的目标
            for a, b in zip(begins, [*begins[1:], len(ids)]):
                last = a + np.flatnonzero(targets[a:b] >= 0)[-1] + 1
                found.append(((~ids[a], *ids[a + 1 : last].tolist(), targets[last - 1]), tuple(targets[a:last])))
        assert sorted(found) == sorted((tuple(one.ids.tolist()), tuple(np.where(one.answers, one.ids, -1)[1:].tolist())) for one in wanted)
        orders.append(x.tolist())
    assert orders[0] != orders[1] and rows < 50 / 2


ARCHS = {
    "modern": {"ngrams": [2, 3], "logit_softcap": 0.0}, "gpt2": {"position": "learned", "norm": "layernorm", "qk_norm": False, "logit_softcap": 0.0},
    "llama": {"activation": "swiglu", "norm_gain": True, "n_kv_head": 1, "qk_norm": False, "embed_norm": False, "logit_softcap": 0.0},
}


# 长的一行走 SDPA，短的走自己的两次乘法
@pytest.mark.parametrize(("arch", "block_size"), [("modern", 48), ("modern", 160), ("gpt2", 48), ("llama", 160)])
def test_the_loss_of_packed_rows_is_that_of_the_answers_each_alone(talks, arch, block_size):
    data, wanted = talks
    model = wild_model(vocab_size=data.vocab_size, block_size=block_size, marked=True, **ARCHS[arch]).train()
    rows = len(data.pieces("train", block_size).rows)
    x, y = data.rows("train", data.starts(0, 0, rows, block_size), block_size)
    packed = model.loss(x, y)
    packed.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    # 一段一段、没有记号地读，手算交叉熵
    total, count = 0, sum(int(one.answers.sum()) for one in wanted)
    for one in wanted:
        ids = torch.from_numpy(one.ids)[None]
        losses = F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:], reduction="none")
        total = total + losses[torch.from_numpy(one.answers[1:])].sum() / count
    total.backward()
    torch.testing.assert_close(packed, total)
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in model.parameters()]), gradient, atol=1e-5, rtol=1e-3)
    # 看得见别段的模型得出的是另一个数
    model.config.marked = False
    assert abs(model.eval().loss(torch.where(x < 0, ~x, x), y) - packed) > 1e-4


def test_a_conversation_longer_than_a_row_loses_its_end_and_one_without_an_answer_is_left_out(talks, tmp_path):
    data, wanted = talks
    lengths = np.array([len(one.ids) for one in wanted])
    block_size = 8
    x, y = data.rows("train", data.starts(0, 0, len(data.pieces("train", block_size).rows), block_size), block_size)
    seen = sum(int(one.answers[1 : block_size + 1].sum()) for one in wanted)
    whole = [one for one in wanted if one.answers[1 : block_size + 1].any()]
    assert int((y >= 0).sum()) == seen and int((x < 0).sum()) == len(whole)
    assert data.left_out(block_size) == (50, int((lengths > 9).sum()), 50 - len(whole))
    assert data.left_out(200) == (50, 0, 0)
    with pytest.raises(ConfigError, match="model.block_size=4: no conversation of the train part reaches its first answer"):
        data.check_block_size(4)


def test_a_held_out_part_takes_its_answers_along(talks, tmp_path):
    copy_dataset(talks[0].folder, tmp_path / "d")
    data, whole = open_data(tmp_path / "d"), talks[0]
    data.hold_out(0.2)
    assert len(data._index["val"]) == 10 and len(data._index["train"]) == 40
    assert sum(int(part.sum()) for part in data.answers.values()) == int(whole.answers["train"].sum())
    assert data.val_targets(data.val_windows(64, None)) == int(data.answers["val"].sum())


def test_answers_that_do_not_fit_the_tokens_are_damage(talks, tmp_path):
    copy_dataset(talks[0].folder, tmp_path / "d")
    path = tmp_path / "d" / "train.answers.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"train.answers.bin.*SHA-256"):
        open_data(tmp_path / "d")
    reseal(tmp_path / "d", "meta.json")
    with pytest.raises(ConfigError, match="train: answers"):
        open_data(tmp_path / "d")


def test_a_question_is_read_as_it_was_in_training(talks):
    data, wanted = talks
    ids = question_ids(data.tokenizer, [{"role": "user", "content": "1+1?"}])
    assert wanted[1].ids[: len(ids)].tolist() == ids.tolist() and wanted[1].answers[len(ids)] and not wanted[1].answers[: len(ids)].any()
