"""Guesses from the text so far: the same ids as without them, in fewer passes of the model."""

import pytest
import torch
from conftest import kernels, make_sample_config, wild_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_acceleration import RECIPES
from test_generate import prompts

from nanogpt.base.language import ConfigError
from nanogpt.core.generate import Decoder
from nanogpt.core.kv_cache import KVCache
from nanogpt.core.sampling import sampler
from nanogpt.write.engine import Writer
from nanogpt.write.request import Request
from nanogpt.write.speed.acceleration import accelerate, install
from nanogpt.write.speed.speculation import LONGEST, Guesses, SpeculativeDecoder, decoder_of

SAMPLERS = {
    "greedy": {"temperature": 0.0}, "hot": {}, "cold": {"temperature": 0.3}, "top_k": {"top_k": 3}, "top_p": {"top_p": 0.7}, "min_p": {"min_p": 0.2},
    "typical": {"typical": 0.6}, "penalised": {"temperature": 0.2, "repetition_penalty": 1.3}, "no repeats": {"temperature": 0.0, "no_repeat_ngram": 4},
}
MODELS = {}


def fast_model(recipe: str, precision: str):
    """A tiny model that decodes through the compiled step; made once."""
    fast_cpu = kernels("nanogpt.write.speed.fast_cpu")
    if (recipe, precision) not in MODELS:
        model = MODELS[recipe, precision] = accelerate(wild_model(**RECIPES[recipe]), precision, fast=False)
        install(model, fast_cpu.FastStep(model))
    return MODELS[recipe, precision]


def written(decoder, prompt, chosen, seed, steps):
    decoder.add(0, prompt, chosen, seed)
    return [int(decoder.step()) for _ in range(steps)]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_several_ids_in_one_pass_give_bit_exactly_the_logits_of_one_by_one(recipe, precision):
    model = fast_model(recipe, precision)
    idx, one, several, at, got = torch.tensor(prompts(16)), KVCache(model, 1), KVCache(model, 1), 0, []
    with torch.inference_mode():
        wanted = torch.cat([model.next_logits(idx[:, i], one) for i in range(16)])
        for count in (1, 3, 5, 2, 5):
            got.append(model.fast_step.read(idx[:, at : at + count], several))
            at += count
    assert torch.equal(torch.cat(got), wanted)
    assert torch.equal(one.k, several.k) and torch.equal(one.v, several.v) and torch.equal(one.tokens, several.tokens)


@settings(max_examples=20)
@given(
    recipe=st.sampled_from(sorted(RECIPES)), precision=st.sampled_from(["fp32", "int8"]), chosen=st.sampled_from(sorted(SAMPLERS)),
    seed=st.integers(0, 99), count=st.sampled_from(["auto", 1, 4, 16]), once=st.lists(st.integers(0, 10), min_size=1, max_size=6), times=st.integers(1, 5),
)
def test_a_seed_writes_the_same_with_guesses_and_without(recipe, precision, chosen, seed, count, once, times):
    model, with_chosen = fast_model(recipe, precision), sampler(**SAMPLERS[chosen])
    # 上下文 16：越过几次窗口，也有比它长的开头
    plain = written(Decoder(model, capacity=1), once * times, with_chosen, seed, 40)
    assert written(decoder_of(model, count, capacity=1), once * times, with_chosen, seed, 40) == plain


@pytest.mark.parametrize("count", ["auto", 4])
def test_a_text_that_repeats_itself_takes_fewer_passes_than_ids(count):
    decoder = decoder_of(fast_model("gpt2", "fp32"), count, capacity=1)
    written(decoder, [1, 2, 3], sampler(temperature=0.0), 0, 150)
    # 随机的小模型贪心地写，不久就转圈；窗口只有 16，每 8 个 id 重读一次
    assert decoder.passes < 0.5 * decoder.written


def test_guesses_that_never_come_true_are_not_read_along():
    model, every = fast_model("modern", "fp32"), []
    decoder = decoder_of(model, "auto", capacity=1)
    decoder.read = lambda idx, cache: every.append(idx.numel()) or model.fast_step.read(idx, cache)
    written(decoder, [1, 2, 3], sampler(temperature=50.0), 0, 150)
    # 11 个字里乱抽：偶尔也猜中
    assert sum(every) - len(every) < 30


def test_rows_that_come_and_go_change_nothing():
    model, chosen = fast_model("modern", "fp32"), sampler(temperature=0.3)
    rows = [row * 2 for row in prompts(4, 6, 2)]
    alone = {key: written(Decoder(model, capacity=1), row, chosen, 0, 40) for key, row in enumerate(rows)}
    decoder, got = decoder_of(model, 4, capacity=3), {key: [] for key in alone}
    comes, goes = {0: 0, 9: 1, 10: 2, 25: 1}, {9: 0, 20: 2, 25: 1}
    for step in range(40):
        if step in goes:
            decoder.remove(goes[step])
        if step in comes:
            got[comes[step]] = []
            decoder.add(comes[step], rows[comes[step]], chosen, seed=0)
        for row, token in zip(decoder.rows, decoder.step().tolist(), strict=True):
            got[row.key].append(token)
    assert all(got[key] == alone[key][: len(got[key])] for key in got) and decoder.passes


def test_texts_scores_and_stops_of_a_writer_are_those_without_guesses():
    from test_engine import DOCUMENTS, TOKENIZER

    documents = wild_model(separator=8, ngrams=[2], ngram_buckets=99)
    for model, tokenizer, labels in ((wild_model(), TOKENIZER, ()), (documents, DOCUMENTS, (9,))):
        accelerate(model, "fp32")
        asked = Request("abab", sampler(temperature=0.5), 60, seed=3, logprobs=2, stop=("hhh",), prefix_ids=labels, stop_at_end_of_text=False)
        texts = []
        for speculate in (0, "auto", 5):
            pieces = list(Writer(model, tokenizer, speculate=speculate).write([asked, Request("b", sampler(), 20, seed=0)]))
            texts.append([(piece.key, piece.text, piece.scores) for piece in pieces])
        assert texts[0] == texts[1] == texts[2]


def test_where_the_step_is_not_compiled_only_a_number_guesses():
    model, chosen, (row,) = wild_model(), sampler(temperature=0.0), prompts(6)
    assert type(decoder_of(model, "auto", capacity=1)) is type(decoder_of(model, 0, capacity=1)) is Decoder
    guessing = decoder_of(model, 3, capacity=1)
    assert isinstance(guessing, SpeculativeDecoder)
    assert written(guessing, row, chosen, 0, 60) == written(Decoder(model, capacity=1), row, chosen, 0, 60) and guessing.passes < guessing.written


def test_a_guess_with_broken_values_leaves_nothing_behind():
    model = fast_model("modern", "fp32")
    decoder = decoder_of(model, 3, capacity=2)

    def read(idx, cache):
        logits = model.fast_step.read(idx, cache)
        cache.v[:, 0, :, cache.lengths[0] - 1] = torch.nan
        return logits.index_fill(0, torch.tensor([idx.numel() - 1]), torch.nan)

    decoder.read = read
    assert written(decoder, [1, 2] * 3, sampler(temperature=0.0), 0, 6) == written(Decoder(model, capacity=1), [1, 2] * 3, sampler(temperature=0.0), 0, 6)
    assert decoder.cache.v.isfinite().all()


def test_guesses_follow_the_latest_of_the_longest_recurrences():
    guesses = Guesses([1, 2, 3, 9, 2, 3, 8, 1, 2])
    assert guesses.next(3) == [3, 9, 2]
    guesses.add(3)
    # 最长的重现是 1 2 3，不是更近的 2 3
    assert (guesses.length, guesses.next(2)) == (3, [9, 2])
    guesses.add(70000)
    assert guesses.next(5) == [] and guesses.worth(0.1) == 0
    assert Guesses([5, 6] * 40).next(5) == [5, 6, 5, 6, 5] and Guesses([5, 6] * 40).length == LONGEST
    assert Guesses([0xD800, 7, 0xD800]).next(1) == [7] and Guesses([4]).next(1) == []


@pytest.mark.parametrize("given_value", ["17", "-1", "often"])
def test_speculate_is_auto_or_a_small_number(given_value):
    with pytest.raises(ConfigError, match="speculate"):
        make_sample_config(f"speculate={given_value}")
