"""The decode loop: equal to the full forward, row by row, alone or beside others, within the context and beyond it."""

import pytest
import torch
from conftest import GPT2_RECIPE, wild_model

from nanogpt.generate import UNIFORMS, Decoder
from nanogpt.sampling import sampler

GREEDY = sampler(temperature=0.0)
RECIPES = {"rope": {}, "learned": {"position": "learned"}, "gpt2": GPT2_RECIPE, "ngrams": {"ngrams": [2, 3], "ngram_buckets": 99}}


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
    together = decode(model, rows, 40)
    for prompt, got in zip(rows, together):
        assert torch.equal(got, decode(model, [prompt], 40)[0])
        assert torch.equal(got, by_full_forward(model, prompt, 40))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_prompt_longer_than_the_context_starts_with_its_end(recipe):
    model = wild_model(**RECIPES[recipe])
    (prompt,) = prompts(45)
    assert torch.equal(decode(model, [prompt], 30)[0], by_full_forward(model, prompt, 30))


@pytest.mark.parametrize("recipe", RECIPES)
def test_cached_logits_equal_the_full_forward_at_every_position(recipe):
    model = wild_model(**RECIPES[recipe])
    rows = prompts(3, 7)
    decoder = Decoder(model, capacity=2)
    for key, row in enumerate(rows):
        decoder.add(key, row, GREEDY, seed=0)
    for _ in range(8):
        with torch.inference_mode():
            logits = decoder._next_logits()
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
