"""The decode loop: equal to the full forward, row by row, alone or beside others, within the context and beyond it."""

import pytest
import torch
from conftest import GPT2_RECIPE, wild_model

from nanogpt.core import lanes
from nanogpt.core.generate import UNIFORMS, Decoder
from nanogpt.core.sampling import Sampler, sampler
from nanogpt.write.speed.acceleration import accelerate

GREEDY = sampler(temperature=0.0)
# gpt2 的位置是学来的，rope 的是算出来的
RECIPES = {"rope": {}, "gpt2": GPT2_RECIPE, "ngrams": {"ngrams": [2, 3], "ngram_buckets": 99}}


def prompts(*lengths, vocab=11):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lengths]


def decode(model, rows, steps, chosen=GREEDY, **options):
    decoder = Decoder(model, capacity=len(rows), **options)
    for key, row in enumerate(rows):
        decoder.add(key, row, chosen, seed=key)
    return torch.stack([decoder.step() for _ in range(steps)], dim=1)


def by_full_forward(model, prompt, steps):
    """Greedy ids where every step reads the whole window again; a full window goes on from its newer half."""
    block = model.config.block_size
    history, window = list(prompt), list(prompt)[-block:]
    with torch.no_grad():
        for _ in range(steps):
            if len(window) > block:
                window = history[-(block // 2) :]
            history.append(int(model(torch.tensor([window]))[0, -1].argmax()))
            window.append(history[-1])
    return torch.tensor(history[len(prompt) :])


@pytest.mark.parametrize("recipe", RECIPES)
def test_rows_of_different_lengths_equal_one_by_one_and_the_full_forward(recipe):
    model = wild_model(**RECIPES[recipe])
    rows = prompts(5, 1, 9, 5)
    # 上下文 16：够越过两次
    together = decode(model, rows, 26)
    for prompt, got in zip(rows, together):
        assert torch.equal(got, decode(model, [prompt], 26)[0])
        assert torch.equal(got, by_full_forward(model, prompt, 26))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_prompt_longer_than_the_context_starts_with_its_end(recipe):
    model = wild_model(**RECIPES[recipe])
    (prompt,) = prompts(45)
    assert torch.equal(decode(model, [prompt], 20)[0], by_full_forward(model, prompt, 20))


@pytest.mark.parametrize("recipe", RECIPES)
def test_cached_logits_equal_the_full_forward_at_every_position(recipe):
    model = wild_model(**RECIPES[recipe])
    rows = prompts(3, 7)
    decoder = Decoder(model, capacity=2)
    for key, row in enumerate(rows):
        decoder.add(key, row, GREEDY, seed=0)
    for _ in range(8):
        with torch.inference_mode():
            logits = decoder.next_logits()
            for slot, row in enumerate(rows):
                torch.testing.assert_close(logits[slot], model(torch.tensor([row]))[0, -1], atol=2e-5, rtol=1e-5)
            drawn = logits.argmax(-1)
            decoder.newest[:2] = drawn
        rows = [[*row, int(token)] for row, token in zip(rows, drawn)]


def test_rows_that_come_and_go_do_not_disturb_the_others():
    model = wild_model(ngrams=[2, 3], ngram_buckets=99)
    alone = {key: decode(model, [row], 30)[0].tolist() for key, row in enumerate(prompts(4, 6, 2, 8))}
    decoder, got = Decoder(model, capacity=3), {key: [] for key in alone}
    rows = prompts(4, 6, 2, 8)
    arrivals, departures = {0: [0], 3: [1, 2], 12: [3]}, {10: 1, 20: 0}
    for step in range(34):
        if step in departures:
            decoder.remove(departures[step])
        for key in arrivals.get(step, []):
            decoder.add(key, rows[key], GREEDY, seed=0)
        drawn = decoder.step().tolist()
        for row, token in zip(decoder.rows, drawn):
            got[row.key].append(token)
    assert all(got[key][:30] == alone[key][: len(got[key])] for key in got) and len(got[1]) == 7


def test_texts_that_join_together_are_read_in_one_pass_up_to_a_bound(monkeypatch):
    model, read = wild_model(), []
    hidden = type(model).hidden
    monkeypatch.setattr(
        model, "hidden", lambda idx, cache: read.append(tuple(idx.shape)) or hidden(model, idx, cache), raising=False
    )
    rows = prompts(4, 6, 1, 1, 8)
    alone = [decode(model, [row], 4)[0].tolist() for row in rows]

    def joined(bound):
        monkeypatch.setattr(lanes, "READ_PER_STEP", bound)
        decoder = Decoder(model, capacity=5)
        decoder.add(0, rows[0], GREEDY, seed=0)
        first = decoder.step().tolist()
        for key in range(1, 5):
            decoder.add(key, rows[key], GREEDY, seed=key)
        read.clear()
        others = torch.stack([decoder.step() for _ in range(4)], dim=1).tolist()
        assert [first + others[0][:3], *others[1:]] == alone
        return [shape for shape in read if shape != (5, 1)]

    # 每行最后一个 id 与正在写的一起走
    assert joined(512) == [(4, 7)]
    assert joined(12) == [(2, 5), (1, 7)]


def test_a_seed_gives_the_same_text_beside_any_other_rows_and_after_a_restart():
    model, chosen = wild_model(), sampler(temperature=1.0)
    rows = prompts(5, 3)
    together = decode(model, rows, 150, chosen)
    assert torch.equal(together[0], decode(model, rows[:1], 150, chosen)[0])
    half = UNIFORMS + 9
    for cut in (half, UNIFORMS):
        decoder = Decoder(model, capacity=1)
        decoder.add(0, rows[0] + together[0, :cut].tolist(), chosen, seed=0, count=cut)
        state = decoder.rows[0].randoms, [float(decoder._next_uniforms()) for _ in range(1)]
        fresh = torch.rand(200, generator=torch.Generator().manual_seed(0))
        assert state[1] == [float(fresh[cut])]


def test_samplers_of_their_own_apply_to_their_own_rows():
    model = wild_model()
    decoder = Decoder(model, capacity=3)
    once = sampler(temperature=0.0, no_repeat_ngram=1)
    for key, chosen in enumerate((GREEDY, once, GREEDY)):
        decoder.add(key, [1, 2, 3], chosen, seed=0)
    drawn = torch.stack([decoder.step() for _ in range(8)], dim=1)
    assert torch.equal(drawn[0], drawn[2]) and torch.equal(drawn[0], decode(model, [[1, 2, 3]], 8)[0])
    assert sorted(drawn[1].tolist()) == sorted(set(range(11)) - {1, 2, 3})


def test_equal_samplers_are_applied_to_all_their_rows_at_once(monkeypatch):
    model, applied = wild_model(), []
    decoder, call = Decoder(model, capacity=4), Sampler.__call__
    monkeypatch.setattr(Sampler, "__call__", lambda self, logits, tokens: applied.append(len(logits)) or call(self, logits, tokens))
    for key, top_k in enumerate((3, 4, 3, 3)):
        decoder.add(key, [1, 2], sampler(top_k=top_k), seed=key)
    decoder.step()
    assert sorted(applied) == [1, 3]


def test_texts_of_one_id_are_read_by_the_fast_step_alone(monkeypatch):
    model = wild_model(**GPT2_RECIPE)
    rows, plain = prompts(1, 1, 1), []
    expected = decode(model, rows, 6)
    accelerate(model, "fp32")
    assert model.fast_step is not None
    hidden = type(model).hidden
    monkeypatch.setattr(model, "hidden", lambda idx, *how: plain.append(tuple(idx.shape)) or hidden(model, idx, *how), raising=False)
    assert torch.equal(decode(model, rows, 6), expected) and not plain
    assert torch.equal(decode(model, prompts(1, 3), 6)[0], expected[0]) and plain


def test_the_penalties_see_the_whole_text_even_beyond_the_context():
    model = wild_model(vocab_size=97)
    drawn = decode(model, prompts(2, 30, vocab=97), 60, sampler(temperature=0.0, no_repeat_ngram=1))
    for prompt, row in zip(prompts(2, 30, vocab=97), drawn.tolist()):
        assert len(set(row)) == 60 and not set(row) & set(prompt)


def test_ids_that_the_tokenizer_lacks_are_never_drawn():
    model = wild_model()
    drawn = decode(model, prompts(4, vocab=3), 80, sampler(temperature=1.0), vocab_size=3)
    assert drawn.max() < 3


def test_logits_that_are_not_finite_are_told_not_drawn():
    model = wild_model()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    assert decode(model, prompts(4), 2).tolist() == [[-1, -1]]


# ---- 成篇的模型：分隔符、标签、引导 ----

SEPARATOR, LABELS = 10, (8, 9)


def document_model(**changes):
    """Ids 0 … 7 are text, 8 and 9 labels, 10 the separator."""
    return wild_model(**{"separator": SEPARATOR, "std": 0.5, **changes})


def guided_by_full_forward(model, prompt, steps, labels, guidance):
    """Greedy ids from u + g (c - u), never a label or the end, where every step reads both windows again."""
    block = model.config.block_size
    text, opening = list(prompt), [SEPARATOR]
    if len(labels) + 1 + len(text) > block:
        opening, start = [], len(text) - (block - len(labels))
    else:
        start = 0
    with torch.no_grad():
        for _ in range(steps):
            if len(opening) + len(labels) + len(text) - start > block:
                opening, start = [], len(text) - block // 2
            c = u = model(torch.tensor([[*opening, *text[start:]]]))[0, -1]
            if labels:
                c = model(torch.tensor([[*opening, *labels, *text[start:]]]))[0, -1]
            logits = u + guidance * (c - u)
            text.append(int(logits[:8].argmax()))
    return text[len(prompt) :]


def decode_documents(model, rows, steps, chosen=GREEDY, never=LABELS):
    """Ids of rows (prompt, labels, guidance), each up to its end."""
    decoder, got = Decoder(model, capacity=len(rows), never=never), {key: [] for key in range(len(rows))}
    for key, (prompt, labels, guidance) in enumerate(rows):
        decoder.add(key, prompt, chosen, seed=key, labels=labels, guidance=guidance)
    for _ in range(steps):
        keys = [row.key for row in decoder.rows]
        for key, token in zip(keys, decoder.step().tolist() if keys else []):
            got[key].append(token)
            if token == SEPARATOR:
                decoder.remove(key)
    return list(got.values())


@pytest.mark.parametrize(("recipe", "guidance"), [*((recipe, 2.5) for recipe in RECIPES), ("ngrams", 1.0), ("ngrams", 0.5)])
def test_documents_equal_the_full_forward_with_and_without_labels_within_the_context_and_beyond(recipe, guidance):
    model = document_model(**RECIPES[recipe])
    model.config.separator = None
    short, long = prompts(5, 30, vocab=8)
    rows = [([], LABELS), ([], ()), (short, LABELS[:1]), (short, LABELS), (long, LABELS), (long, ())]
    expected = [guided_by_full_forward(model, prompt, 20, labels, guidance) for prompt, labels in rows]
    model.config.separator = SEPARATOR
    got = decode_documents(model, [(prompt, labels, guidance) for prompt, labels in rows], 20, never=(*LABELS, SEPARATOR))
    assert got == expected


def test_a_guided_text_is_the_same_alone_and_beside_rows_that_come_and_go():
    model = document_model(ngrams=[2], ngram_buckets=99)
    chosen = sampler(temperature=0.9, repetition_penalty=1.3)
    rows = [(prompt, labels, guidance) for (prompt, labels), guidance in zip([([1, 2], LABELS), ([3], ()), ([], LABELS[:1]), ([5, 4, 3], LABELS)], (3.0, 2.0, 1.0, 0.7))]
    alone = []
    for key, (prompt, labels, guidance) in enumerate(rows):
        decoder = Decoder(model, capacity=1, never=LABELS)
        decoder.add(key, prompt, chosen, seed=key, labels=labels, guidance=guidance)
        alone.append([int(decoder.step()) for _ in range(30)])
    decoder, got = Decoder(model, capacity=4, never=LABELS), {key: [] for key in range(4)}
    arrivals, departures = {0: [1], 2: [0], 5: [2, 3]}, {9: 1, 14: 0}
    for step in range(35):
        if step in departures:
            decoder.remove(departures[step])
        for key in arrivals.get(step, []):
            prompt, labels, guidance = rows[key]
            decoder.add(key, prompt, chosen, seed=key, labels=labels, guidance=guidance)
        for row, token in zip([*decoder.rows], decoder.step().tolist()):
            got[row.key].append(token)
    assert [got[key][:30] for key in got] == [ids[: len(got[key])] for key, ids in enumerate(alone)] and len(got[0]) == 12


def test_guidance_one_takes_no_second_lane_and_changes_no_bit():
    model = document_model()
    plain, one = (Decoder(model, capacity=2) for _ in range(2))
    for key in range(2):
        plain.add(key, [1, 2], GREEDY, seed=0, labels=LABELS)
        one.add(key, [1, 2], GREEDY, seed=0, labels=LABELS, guidance=1.0)
    assert len(one.lanes) == 2 and one.cache.k.size(1) == 2
    for _ in range(20):
        assert torch.equal(plain.step(), one.step())
    assert torch.equal(plain.cache.k, one.cache.k)


def test_labels_are_never_drawn_and_count_as_no_repetition():
    model = document_model()
    torch.nn.init.constant_(model.lm_head.weight, 0.0)
    drawn = decode_documents(model, [([], LABELS, 1.0)], 200, sampler(temperature=1.0))[0]
    assert not set(drawn) & set(LABELS) and drawn[-1] == SEPARATOR
    once = Decoder(model, capacity=1, never=LABELS)
    once.add(0, [], sampler(temperature=0.0, no_repeat_ngram=1), seed=0, labels=LABELS, guidance=2.0)
    assert sorted(int(once.step()) for _ in range(9)) == [*range(8), SEPARATOR]


@pytest.mark.parametrize("shadow", [False, True])
def test_one_lane_that_is_not_finite_spoils_its_own_row_only(shadow):
    model = document_model()
    decoder = Decoder(model, capacity=2, never=LABELS)
    decoder.add(0, [1], GREEDY, seed=0, labels=LABELS, guidance=2.0)
    decoder.add(1, [1, 2, 3], GREEDY, seed=0)
    decoder.step()
    slot = next(slot for slot in decoder._slots(0) if decoder.lanes[slot].shadow == shadow)
    with torch.inference_mode():
        decoder.cache.k[:, slot, :, 0] = float("nan")
    ids = decoder.step().tolist()
    assert ids[0] == -1 and ids[1] >= 0
    decoder.wipe(0)
    decoder.remove(0)
    assert not decoder.cache.k.isnan().any() and len(decoder.lanes) == len(decoder.rows) == 1
    alone = Decoder(model, capacity=1, never=LABELS)
    alone.add(1, [1, 2, 3], GREEDY, seed=0)
    assert [int(decoder.step()) for _ in range(6)] == [int(alone.step()) for _ in range(8)][2:]


def test_what_stands_before_the_last_separator_of_a_prompt_is_not_read():
    model = document_model()
    assert decode_documents(model, [([1, 2, SEPARATOR, 3], LABELS, 2.0)], 9) == decode_documents(model, [([3], LABELS, 2.0)], 9)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_compiled_step_writes_the_same_guided_texts(precision):
    pytest.importorskip("numba")
    rows = [([1, 2], LABELS, 2.0), ([3], (), 1.0), ([], LABELS[:1], 0.5)]
    plain, fast = (accelerate(document_model(ngrams=[2], ngram_buckets=99), precision, fast=fast) for fast in (False, True))
    assert fast.fast_step and decode_documents(plain, rows, 40, never=(*LABELS, SEPARATOR)) == decode_documents(fast, rows, 40, never=(*LABELS, SEPARATOR))
