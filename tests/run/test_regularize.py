"""What the text decides: which n-gram tables and how much dropout, where the person leaves it open."""

import itertools

import numpy as np
import pytest
from conftest import make_config, new_session, resume, train

from nanogpt.plan.plan import Planner
from nanogpt.run.regularize import held_back, occurrences, passes_of


def test_an_ngram_occurs_as_often_as_counting_says():
    ids = np.random.default_rng(0).integers(0, 5, 3000).astype(np.uint16)
    for n in (2, 3, 4):
        grams = {tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)}
        assert occurrences(ids, n) == pytest.approx((len(ids) - n + 1) / len(grams))
    assert occurrences(ids[:1], 2) == 0


@pytest.mark.parametrize("tokens", [10_000, 100_000])
def test_more_passes_never_take_more_tables_or_less_dropout(tokens):
    text = np.random.default_rng(0).integers(0, 60, tokens).astype(np.uint8)
    found = [held_back(make_config(f"max_tokens={int(passes * tokens)}"), text) for passes in (1, 2, 8, 1000)]
    assert found[0].ngrams == [2, 3, 4, 5] and found[0].dropout == found[1].dropout == 0
    for less, more in itertools.pairwise(found):
        assert set(more.ngrams) <= set(less.ngrams) and less.dropout <= more.dropout < 0.5
    assert found[-1].ngrams == [] and found[2].dropout > 0


def test_what_is_typed_is_taken_and_weights_trained_before_are_not_dropped():
    text = np.zeros(1000, np.uint8)
    typed = held_back(make_config("max_tokens=100000", "dropout=0.07", "model.ngrams=[2,7]"), text)
    assert (typed.dropout, typed.ngrams) == (0.07, [2, 7])
    cfg = make_config("max_tokens=100000", "arch=gpt2", "init_from=gpt2")
    assert held_back(cfg, text).dropout == 0 and held_back(cfg, None).ngrams == []
    assert passes_of(make_config("max_minutes=1"), 10) == 4


def test_a_run_writes_down_what_was_chosen_and_keeps_it(in_tmp, tiny_overrides, capsys):
    more = ["model.ngrams=null", "model.ngram_buckets=97", "dropout=null", "max_iters=400", "batch_size=8"]
    session = new_session(tiny_overrides, *more)
    text_tokens = len(session.data.tokens["train"])
    chosen = session.cfg.model
    assert passes_of(session.cfg, text_tokens) > 4 and chosen.dropout == session.cfg.dropout > 0 and chosen.ngrams != [2, 3, 4, 5]
    trainer = train(tiny_overrides, *more, "max_iters=3", out="outputs/short")
    assert (trainer.model.config.ngrams, trainer.model.config.dropout) == ([2, 3, 4, 5], 0.0)
    kept = resume("outputs/short", "max_iters=400").cfg
    assert (kept.model.ngrams, kept.dropout, kept.model.dropout) == ([2, 3, 4, 5], 0.0, 0.0)


def test_a_plan_knows_the_text_where_it_is_prepared(in_tmp, tiny_overrides):
    more = ["model.ngrams=null", "model.ngram_buckets=97", "dropout=null", "max_iters=400"]
    session = new_session(tiny_overrides, *more)
    cfg = make_config(*tiny_overrides, *more, "plan=true")
    planned = Planner(cfg).predict(cfg).cfg.model
    assert (planned.ngrams, planned.dropout) == (session.cfg.model.ngrams, session.cfg.model.dropout) != ([2, 3, 4, 5], 0.0)
