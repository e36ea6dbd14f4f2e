"""Documents with labels: every one whole and once an epoch, and a packed row is worth what its documents are worth alone."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import resumed_trainer, train
from test_trainer import weights

from nanogpt.base.config import ModelConfig
from nanogpt.base.language import ConfigError
from nanogpt.core.loss import chunked_cross_entropy
from nanogpt.data import tokenizer as tokenizers
from nanogpt.data.corpus import build_char_tokenizer
from nanogpt.data.documents import Document, pack, read_judge_part, write_documents
from nanogpt.data.labels import with_labels
from nanogpt.data.opening import open_data
from nanogpt.data.tokenizer import GPT2_PATTERN, BPETokenizer, ByteTokenizer, CharTokenizer
from nanogpt.data.tokens import TokenData, copy_dataset
from nanogpt.weights.build import build_model

LETTERS = "abcdefghij"


def random_documents(count, longest, seed=0):
    random = np.random.default_rng(seed)
    texts = ["".join(random.choice(list(LETTERS), random.integers(1, longest + 1))) for _ in range(count)]
    return [Document(text, *(str(random.choice(names)) if random.random() < 0.8 else None for names in (["verse", "prose"], ["glad", "sad"]))) for text in texts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """200 documents of up to 30 letters with two kinds of labels, some missing."""
    documents = random_documents(220, 30)
    parts = {"train": documents[:200], "val": documents[200:212], "judge": documents[212:]}
    return write_documents(tmp_path_factory.mktemp("documents") / "d", name="d", source="test", tokenizer=CharTokenizer(LETTERS), parts=parts)


def texts_of(x, y, data):
    """(label ids, text ids, ended) of the documents in a row, in order; pieces that go on begin without a separator."""
    found, labels = [], {i for kind in data.tokenizer.labels.values() for ids in kind.values() for i in ids}
    for token, target in zip(x.tolist(), y.tolist()):
        if token == data.separator or not found:
            found.append(([], [], []))
        if token in labels:
            found[-1][0].append(token)
        elif token != data.separator:
            found[-1][1].append(token)
        if target == data.separator:
            found[-1][2].append(True)
    return [(tuple(labels), tuple(text), bool(ended)) for labels, text, ended in found if text or ended]


def test_documents_come_back_with_their_labels(folder):
    data = open_data(folder)
    assert list(data.documents("train")) == random_documents(220, 30)[:200]
    judge = [json.loads(line) for line in (folder / "judge.jsonl").read_text(encoding="utf-8").splitlines()]
    assert judge[0]["text"] == random_documents(220, 30)[212].text and len(judge) == 8


def test_texts_for_the_judge_come_back_with_line_separators_in_them(tmp_path):
    texts = [Document("a\u2028b\x85c", style="verse"), Document("d\ne", emotion="glad")]
    write_documents(tmp_path / "d", name="d", source="t", tokenizer=CharTokenizer("ab"), parts={"train": [Document("ab")], "val": [], "judge": texts})
    assert read_judge_part(tmp_path / "d") == texts


@pytest.mark.parametrize("block_size", [40, 64, 200])
def test_every_epoch_shows_every_document_once_and_whole(folder, block_size):
    data = open_data(folder)
    rows, index = len(data.pieces("train", block_size).rows), data._index["train"]
    wanted = sorted(
        (tuple(i for kind, label in enumerate(labels) for i in data._ids[kind][label]), tuple(data.tokens["train"][start:end].tolist()), True)
        for start, (end, *labels) in zip([0, *index[:-1, 0]], index.tolist())
    )
    orders = []
    for epoch in range(2):
        starts = data.starts(3, epoch * rows, rows, block_size)
        x, y = data.rows("train", starts, block_size)
        assert sorted(text for i in range(rows) for text in texts_of(x[i], y[i], data)) == wanted
        assert np.array_equal((y >= 0).sum(1).numpy(), data.targets(starts, block_size))
        orders.append(x.tolist())
    assert orders[0] != orders[1]


def test_a_long_document_goes_on_behind_its_labels(folder):
    data = open_data(folder)
    block_size = 12
    cut = data.pieces("train", block_size)
    starts = data.starts(0, 0, len(cut.rows), block_size)
    x, y = data.rows("train", starts, block_size)
    pieces = [text for i in range(len(cut.rows)) for text in texts_of(x[i], y[i], data)]
    # 每个字恰好读一次，每篇恰好结束一次；接着写的块也带着标签
    assert sum(len(text) for _, text, _ in pieces) == len(data.tokens["train"]) and sum(ended for *_, ended in pieces) == 200
    assert cut.goes_on.any() and int((y >= 0).sum()) == len(data.tokens["train"]) + 200
    goes_on = [text for text in pieces if not text[2] and len(text[1]) + len(text[0]) == block_size]
    assert any(labels for labels, _, _ in goes_on)


def test_labels_are_dropped_together_and_alone(folder):
    data = open_data(folder, label_dropout=0.3)
    starts = data.starts(0, 0, 40 * len(data.pieces("train", 64).rows), 64)
    x, y = data.rows("train", starts, 64)
    kept = [labels for i in range(len(starts)) for labels, *_ in texts_of(x[i], y[i], data)]
    both = sum(len(labels) == 2 for labels in kept) / len(kept)
    assert both == pytest.approx(0.64 * 0.7**3, abs=0.03)
    always = open_data(folder, label_dropout=1.0)
    x, _ = always.rows("train", starts[:10], 64)
    assert not set(x.flatten().tolist()) & {i for kind in data.tokenizer.labels.values() for (i,) in kind.values()}
    # 去掉标签不改变目标数：梯度的权重不随之跳动
    assert np.array_equal(always.targets(starts, 64), data.targets(starts, 64))


def test_a_row_depends_only_on_seed_and_position(folder):
    data = open_data(folder, label_dropout=0.2)
    whole = data.rows("train", data.starts(5, 0, 60, 64), 64)[0]
    again = open_data(folder, label_dropout=0.2)
    pieces = [again.rows("train", again.starts(5, first, 6, 64), 64)[0] for first in reversed(range(0, 60, 6))]
    assert torch.equal(torch.cat(pieces[::-1]), whole)


def test_packing_fits_fills_and_depends_only_on_the_lengths():
    random = np.random.default_rng(0)
    lengths, opens = random.integers(1, 33, 500), random.random(500) < 0.1
    row, place, rows = pack(lengths, opens, 64)
    order = np.lexsort((-lengths, ~opens))
    taken = np.zeros((rows, 64), dtype=int)
    for slot, piece in enumerate(order):
        taken[row[slot], place[slot] : place[slot] + lengths[piece]] += 1
        assert not opens[piece] or place[slot] == 0
    assert taken.max() == 1 and taken.sum() == lengths.sum() and rows <= 1.02 * lengths.sum() / 64 + 1
    mixed = random.permutation(500)
    assert all(np.array_equal(a, b) for a, b in zip(pack(lengths[mixed], opens[mixed], 64), (row, place, rows)))


ARCHS = {
    "modern": {"ngrams": [2, 3, 4]},
    "gpt2": {"arch": "gpt2", "position": "learned", "norm": "layernorm", "activation": "gelu_tanh", "bias": True, "qk_norm": False,
             "embed_norm": False, "tie_embeddings": True, "init": "gpt2", "logit_softcap": 0.0, "ngrams": []},
}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("block_size", [64, 160], ids=["short", "sdpa"])
def test_a_packed_row_is_worth_what_its_documents_are_alone(folder, arch, block_size):
    data = open_data(folder)
    model = build_model(ModelConfig(
        n_layer=2, n_head=2, n_embd=16, block_size=block_size, vocab_size=data.vocab_size, ngram_buckets=97, separator=data.separator, **ARCHS[arch],
    ), 1)
    with torch.no_grad():
        for p in model.parameters():
            # modern 的输出投影从 0 开始：那样谁也看不出差别
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1)
    x, y = data.rows("train", data.starts(0, 0, 2, block_size), block_size)
    row_loss = model.loss(x, y)
    row_loss.backward()
    packed = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    alone = []
    for i in range(2):
        begins = [*torch.nonzero(x[i] == data.separator).flatten().tolist(), block_size]
        alone += [(x[i : i + 1, a:b], y[i : i + 1, a:b]) for a, b in pairwise(begins)]
    total = sum(int((part >= 0).sum()) for _, part in alone)
    losses = [model.loss(a, b) * int((b >= 0).sum()) / total for a, b in alone]
    sum(losses).backward()
    torch.testing.assert_close(sum(losses), row_loss)
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in model.parameters()]), packed, atol=1e-5, rtol=1e-4)
    # 看得见别篇的模型得出的是另一个数：这个比较不是空的
    model.config.separator = None
    assert abs(chunked_cross_entropy(model.hidden(x), model.lm_head.weight, y, softcap=0, chunk_mib=1, ignoring=True) - row_loss) > 1e-4


def test_ignored_targets_leave_the_mean_and_the_gradients():
    random = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(40, 8, generator=random, requires_grad=True), torch.randn(11, 8, generator=random, requires_grad=True)
    targets = torch.randint(0, 11, (40,), generator=random)
    targets[::3] = -1
    kept = targets >= 0
    found = []
    for ignoring, h, t in ((True, hidden, targets), (False, hidden[kept], targets[kept])):
        loss = chunked_cross_entropy(h[None], weight, t[None], softcap=5.0, chunk_mib=1, ignoring=ignoring)
        found.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    torch.testing.assert_close(*found)


def tiny_run(folder, *more):
    return ("model.n_layer=2", "model.n_head=2", "model.n_embd=16", "model.block_size=40", "model.ngrams=[2]", "model.ngram_buckets=97", "max_iters=6",
            "eval_interval=3", "sample_tokens=8", "logger=none", "device=cpu", "dataset=text_file", f"dataset.dir={folder}", *more)


def test_training_on_documents_accumulates_exactly_and_resumes_to_the_bit(in_tmp, folder):
    whole = train(tiny_run(folder, "batch_size=12"), out="outputs/a")
    parts = train(tiny_run(folder, "batch_size=5", "global_batch_size=12"), out="outputs/b")
    torch.testing.assert_close(weights(parts.model), weights(whole.model), atol=2e-4, rtol=1e-3)
    train(tiny_run(folder, "batch_size=12", "max_iters=3", "lr_decay_iters=6", "warmup_iters=1"), out="outputs/c")
    straight = train(tiny_run(folder, "batch_size=12", "lr_decay_iters=6", "warmup_iters=1"), out="outputs/d")
    resumed = resumed_trainer("outputs/c", "max_iters=6")
    resumed.fit()
    assert torch.equal(weights(resumed.model), weights(straight.model)) and resumed.model.config.separator == resumed.data.separator
    assert (in_tmp / "outputs/c/data/train.docs.bin").is_file() and (in_tmp / "outputs/c/data/judge.jsonl").is_file()


def test_validation_counts_every_target_of_the_documents_once(folder, in_tmp):
    trainer = train(tiny_run(folder, "batch_size=12", "eval_tokens=null"), out="outputs/a")
    data, model = trainer.data, trainer.model
    total, count = 0.0, 0
    for row, _ in data.val_windows(40, None):
        x, y = data.rows("val", np.array([row]), 40)
        total, count = total + model.loss(x, y).item() * int((y >= 0).sum()), count + int((y >= 0).sum())
    # 行尾的空位不是目标，说出来的数里也没有
    assert count == len(data.tokens["val"]) + 12 == data.val_targets(trainer.windows) and trainer.evaluate() == pytest.approx(total / count, abs=1e-5)


def test_a_copied_folder_is_whole_and_a_damaged_one_refused(folder, tmp_path):
    copy_dataset(folder, tmp_path / "copy")
    assert list(open_data(tmp_path / "copy").documents("val")) == list(open_data(folder).documents("val"))
    file = tmp_path / "copy" / "train.docs.bin"
    file.write_bytes(file.read_bytes()[:-8] + bytes(8))
    with pytest.raises(ConfigError, match="train.docs.bin"):
        open_data(tmp_path / "copy")


@pytest.mark.parametrize("block_size, want", [(5, "model.block_size=5.*>=6"), (6, None)])
def test_a_context_without_room_behind_the_labels_is_refused(folder, block_size, want):
    data = open_data(folder)
    if want is None:
        data.check_block_size(block_size)
        return
    with pytest.raises(ConfigError, match=want):
        data.check_block_size(block_size)


def test_a_split_without_documents_is_refused(tmp_path):
    parts = {"train": [Document("ab")], "val": []}
    data = open_data(write_documents(tmp_path / "d", name="d", source="t", tokenizer=CharTokenizer("ab"), parts=parts))
    with pytest.raises(ConfigError, match="no documents for val"):
        data.check_block_size(16)


# ---- 带标签的词表 ----

BYTES = {bytes((i,)): i for i in range(256)}


@pytest.mark.parametrize("make", [lambda: build_char_tokenizer(["春天|ab<>"]), ByteTokenizer, lambda: BPETokenizer("b", GPT2_PATTERN, BYTES, {})], ids=["char", "byte", "bpe"])
def test_labels_take_new_ids_and_survive_saving(make, tmp_path):
    plain = make()
    grown = with_labels(plain, {"style": ["宋词", "a b"], "emotion": ["positive"]}, grow=True)
    ids = [i for kind in grown.labels.values() for (i,) in kind.values()]
    assert sorted([grown.end_of_text, *ids]) == list(range(plain.vocab_size, grown.vocab_size)) and len(ids) == 3
    assert np.array_equal(grown.encode("春天ab"), plain.encode("春天ab")) and not plain.labels
    tokenizers.save(grown, tmp_path / "t.json")
    again = tokenizers.load(tmp_path / "t.json")
    assert again.labels == grown.labels and again.to_dict() == grown.to_dict() and again.end_of_text == grown.end_of_text
    if grown.kind != "bpe":
        assert grown.decode([*grown.encode("春"), grown.end_of_text, ids[0], *grown.encode("天")]) == "春天"
        stream = grown.stream()
        assert "".join(stream.push(i) for i in [*grown.encode("春"), ids[0], *grown.encode("天")]) + stream.finish() == "春天"


def test_a_vocabulary_that_must_keep_its_size_writes_labels_as_text():
    own = BPETokenizer("b", GPT2_PATTERN, BYTES, {"<|endoftext|>": 256})
    labelled = with_labels(own, {"style": ["verse"]}, grow=False)
    assert labelled.vocab_size == own.vocab_size and labelled.labels["style"]["verse"] == tuple(b"<|style:verse|>") and not own.labels
    with pytest.raises(ConfigError, match="end of text"):
        with_labels(ByteTokenizer(), {"style": ["verse"]}, grow=False)


def test_running_text_is_opened_as_before(corpus_folder):
    data = open_data(corpus_folder)
    assert type(data) is TokenData and data.separator is None


def test_documents_are_not_slid_over(folder):
    with pytest.raises(ConfigError, match=r"eval_stride=4 slides over running text.*leave it out, or eval_stride=null"):
        open_data(folder).slide(4, 16)


def test_held_out_documents_are_spread_over_the_training_split_and_keep_their_labels(folder):
    every = list(open_data(folder).documents("train"))
    data = open_data(folder)
    data.hold_out(0.1)
    train, held = list(data.documents("train")), list(data.documents("val"))
    assert held == every[9::10] and train == [document for i, document in enumerate(every) if i % 10 != 9]
    assert data.val_targets(data.val_windows(16, None)) == sum(len(document.text) + 1 for document in held)
