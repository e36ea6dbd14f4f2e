"""What the text decides: which n-gram tables and how much dropout, where the person leaves it open."""

import itertools
import json
import math

import numpy as np
import pytest
from attack import outcome
from conftest import ROOT, make_config, new_session, resume, train

from nanogpt.base.config import tokens_per_step
from nanogpt.core.progress import Progress
from nanogpt.plan.plan import Planner
from nanogpt.run.regularize import (
    RISEN_EVALS,
    dropout_of,
    has_risen,
    head_decay_of,
    held_back,
    passes_of,
    past_turn,
    tables_for,
)
from nanogpt.weights.build import preset


@pytest.mark.parametrize("model", ["tiny", "small", "medium"])
def test_more_passes_or_larger_blocks_never_take_more_tables_or_less_dropout(model):
    budgets = (1, 1.4, 2, 4, 8, 1000)
    filled = [held_back(make_config(f"model={model}", f"max_tokens={int(passes * 10**6)}"), 10**6) for passes in budgets]
    found = [cfg.model for cfg in filled]
    assert [cfg.optimizer["ngram_lr_scale"] for cfg in filled] == [3, 3, 1, 1, 1, 1]
    assert found[0].ngrams == found[1].ngrams == [2, 3, 4, 5] and found[0].dropout == found[2].dropout == 0
    for less, more in itertools.pairwise(found):
        assert set(more.ngrams) <= set(less.ngrams) and less.dropout <= more.dropout < 0.5
    assert found[-1].ngrams == [] and found[4].dropout > 0
    for passes in budgets:
        assert set(tables_for(passes, 10**8)) <= set(tables_for(passes, 10**6)) <= set(tables_for(passes, 10**5))


def test_what_was_measured_is_what_is_chosen():
    """The best settings of results/ablate_held_back.json and ablate_held_back_small.json."""
    assert [tables_for(passes, 786_432) for passes in (2, 4, 8)] == [[2, 3, 4, 5], [2, 3, 4], [2, 3]]
    assert [tables_for(passes, 10_616_832) for passes in (4, 8)] == [[], []]
    # BPE，4096 个：4 遍时 2 最好，2 遍时 2 好于没有；读一遍时 2 与 3 最好，block 多大都一样
    assert [tables_for(passes, 786_432, 4096) for passes in (1, 2, 4, 8)] == [[2, 3], [2], [2], []]
    assert tables_for(1, 10**8, 4096) == [2, 3] and tables_for(1, 10**8) == [2, 3, 4, 5]
    assert tables_for(4, 786_432, 30) == tables_for(4, 786_432, 65) == tables_for(4, 786_432)


def test_large_blocks_drop_more_of_a_text_whose_tokens_say_more():
    """The best of results/ablate_dropout.json, ablate_dropout_bpe.json, …_bpe_tiny.json and …_poems.json."""
    small = {"n_layer": 4, "n_head": 4, "n_embd": 128}
    assert [dropout_of(preset("tiny", vocab_size=65), passes) for passes in (2, 4, 8)] == [0, 0.05, 0.1]
    assert [dropout_of(preset("tiny", vocab_size=4096, **small), passes) for passes in (4, 8)] == [0.05, 0.1]
    assert all(0.15 <= dropout_of(preset("tiny", vocab_size=vocabulary), 8) <= 0.2 for vocabulary in (4096, 6400, 12_919))
    every = [dropout_of(preset("tiny", vocab_size=vocabulary), 8) for vocabulary in (2, 65, 300, 4096, 50_257, 10**6)]
    assert every == sorted(every) and dropout_of(preset("tiny", vocab_size=10**6), 10**6) == 0.3


def test_blocks_larger_than_small_drop_more():
    """The better ones of results/h200/ablate_dropout_medium.json and ablate_large_texts.json."""
    assert [dropout_of(preset(name, vocab_size=65), 8) for name in ("small", "medium", "large")] == [0.1, 0.2, 0.26]
    assert 0.15 <= dropout_of(preset("medium", vocab_size=6400), 4) <= 0.2


def test_an_output_layer_is_decayed_where_a_short_text_of_many_tokens_is_read_often():
    """What results/ablate_head_decay.json and the trainings beside it say, and nothing where nothing was to be gained."""
    tiny, small = preset("tiny", vocab_size=5000), preset("tiny", vocab_size=4096, n_layer=4, n_head=4, n_embd=128)
    assert [head_decay_of(tiny, passes, 108_000) for passes in (1, 2, 4, 8, 10**6)] == pytest.approx([0, 0, 1.5, 3, 6], rel=0.02)
    assert [head_decay_of(tiny, 8, tokens) for tokens in (300_000, 600_000, 3_000_000)] == pytest.approx([3, 1.5, 0.3], rel=0.02)
    assert head_decay_of(small, 8, 243_000) == 0 and head_decay_of(preset("tiny", vocab_size=65), 8, 250_000) < 0.1
    assert head_decay_of(preset("tiny", vocab_size=5000, tie_embeddings=True), 8, 108_000) == 0
    filled = [held_back(make_config("model=tiny", "max_tokens=900000", "model.vocab_size=5000", *typed), 108_000) for typed in ((), ("optimizer.head_weight_decay=1",), ("init_from=there",))]
    assert filled[0].optimizer["head_weight_decay"] > 2.9 and [cfg.optimizer["head_weight_decay"] for cfg in filled[1:]] == [1, 0]
    assert "head_weight_decay" not in held_back(make_config("optimizer=adamw", "max_tokens=900000"), 108_000).optimizer


def test_what_is_typed_is_taken_and_weights_trained_before_are_not_dropped():
    typed = held_back(make_config("max_tokens=100000", "dropout=0.07", "model.ngrams=[2,7]", "optimizer.ngram_lr_scale=2"), 1000)
    assert (typed.dropout, typed.model.ngrams, typed.optimizer["ngram_lr_scale"]) == (0.07, [2, 7], 2)
    cfg = make_config("max_tokens=100000", "arch=gpt2", "init_from=gpt2")
    assert held_back(cfg, 1000).dropout == 0 and held_back(cfg, 0).model.ngrams == []
    assert passes_of(make_config("max_minutes=1"), 10) == 4
    a_step = tokens_per_step(make_config())
    assert passes_of(make_config("max_minutes=1"), a_step, 30) == passes_of(make_config("max_minutes=1", "max_iters=30"), a_step, 99) == 30
    # 搜索的每一级：停得早晚不同，学习率的终点相同，配方也就相同
    rungs = [held_back(make_config(f"max_iters={end}", "lr_decay_iters=90"), 10 * a_step) for end in (10, 30, 90)]
    assert rungs[0].model == rungs[1].model == rungs[2].model and rungs[0].optimizer == rungs[2].optimizer


@pytest.mark.parametrize(("typed", "scale"), [
    ((), 30), (("arch=llama",), 30), (("arch=gpt2",), 1), (("model.tie_embeddings=true",), 1), (("model.init=gpt2",), 1), (("init_from=there",), 1),
    (("optimizer.embedding_lr_scale=2",), 2),
])
def test_an_embedding_that_starts_from_values_around_one_takes_larger_steps(typed, scale):
    assert held_back(make_config("max_iters=10", *typed), 1000).optimizer["embedding_lr_scale"] == scale


def test_a_run_writes_down_what_was_chosen_and_keeps_it(in_tmp, tiny_overrides, capsys):
    more = ["model.ngrams=null", "model.ngram_buckets=97", "dropout=null", "max_iters=400", "batch_size=8"]
    session = new_session(tiny_overrides, *more)
    text_tokens = len(session.data.tokens["train"])
    chosen = session.cfg.model
    assert passes_of(session.cfg, text_tokens) > 4 and chosen.dropout == session.cfg.dropout > 0 and chosen.ngrams != [2, 3, 4, 5]
    trainer = train(tiny_overrides, *more, "max_iters=3", out="outputs/short")
    assert (trainer.model.config.ngrams, trainer.model.config.dropout) == ([2, 3, 4, 5], 0.0)
    capsys.readouterr()
    # 预算变长了：说一声，不自己改
    for typed, said in ((["max_iters=400"], True), (["max_iters=400", "dropout=0.3"], False), (["max_iters=4"], False)):
        session = resume("outputs/short", *typed)
        session._announce_budget(session._build())
        session.lock.release()
        kept = session.cfg
        dropout = 0.3 if "dropout=0.3" in typed else 0.0
        assert (kept.model.ngrams, kept.dropout, kept.model.dropout) == ([2, 3, 4, 5], dropout, dropout)
        asked = f"a new training would take dropout={chosen.dropout:g}; this one goes on with dropout=0: add dropout={chosen.dropout:g}"
        assert (asked in capsys.readouterr().out) == said


def test_minutes_are_worth_as_many_passes_as_the_plan_says(in_tmp, tiny_overrides, monkeypatch, capsys):
    more = ["model.ngrams=null", "model.ngram_buckets=97", "dropout=null", "max_iters=null", "max_minutes=1"]
    chosen, text_tokens = [], len(new_session(tiny_overrides).data.tokens["train"])
    for passes in (0.5, 8, None):
        def steps(self, cfg, overrides=None, passes=passes):
            return int(passes * text_tokens / tokens_per_step(cfg)) if passes else 1 // 0

        monkeypatch.setattr(Planner, "steps", steps)
        session = new_session(tiny_overrides, *more, out=f"outputs/{passes}")
        chosen.append((session.cfg.dropout, session.cfg.model.ngrams))
        session._announce_budget(session._build())
        if passes:
            cfg = make_config(*tiny_overrides, *more)
            planned = Planner(cfg).predict(cfg).cfg.model
            assert (planned.dropout, planned.ngrams) == chosen[-1]
    # 规划不了的：当作 4 遍
    assert chosen == [(0.0, [2, 3, 4, 5]), (0.1, [2, 3]), (0.05, [2, 3, 4])]
    assert "for about 8 passes over the text it takes dropout=0.1" in capsys.readouterr().out


def test_a_plan_knows_the_text_where_it_is_prepared(in_tmp, tiny_overrides):
    more = ["model.ngrams=null", "model.ngram_buckets=97", "dropout=null", "max_iters=400"]
    session = new_session(tiny_overrides, *more)
    cfg = make_config(*tiny_overrides, *more, "plan=true")
    planned = Planner(cfg).predict(cfg).cfg.model
    assert (planned.ngrams, planned.dropout) == (session.cfg.model.ngrams, session.cfg.model.dropout) != ([2, 3, 4, 5], 0.0)


def stopped_at(curve, train_losses, targets=10**9):
    """Number of evaluations behind which a training with these losses stops by itself, of evaluations evenly over its budget."""
    progress, best = Progress(), math.inf
    for number, (loss, train_loss) in enumerate(zip(curve, train_losses), 1):
        progress.iteration = number
        if loss < best:
            best, progress.best_iteration, progress.evals_risen = loss, number, 0
        else:
            progress.evals_risen = progress.evals_risen + 1 if has_risen(loss, best, train_loss, targets) else 0
        if number < len(curve) and past_turn(progress, 1, number / len(curve)):
            return number
    return None


def test_no_measured_training_that_stops_by_itself_would_have_become_better():
    studies = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((ROOT / "benchmarks/results").glob("ablate_*.json"))]
    stopped = []
    for run in (run for study in studies for run in study["runs"]):
        curve = [loss for _, loss in run["curve"]]
        # 训练损失没有都记下：当作总在降，停得只会更早
        if at := stopped_at(curve, [0.0] * len(curve)):
            stopped.append(at / len(curve))
            assert min(curve[:at]) == min(curve), run["variant"]
    assert len(stopped) > 10 and min(stopped) < 0.5


def test_only_a_loss_that_stays_clearly_above_the_best_while_the_training_loss_falls_stops_a_training():
    rising = [2.0, *[2.2] * 19]
    assert stopped_at(rising, [1.0] * 20) == 1 + RISEN_EVALS
    # 一次回到附近、只高一点、训练损失也高、最好的就在不久前、评估太粗，都不停
    dips = [2.0, *[2.2, 2.2, 2.2, 2.05] * 4]
    near = [2.0, *[2.09] * 19]
    late = [*np.linspace(3, 2, 18), *[2.2] * 12]
    for curve, train_loss, targets in ((dips, 1.0, 10**9), (near, 1.0, 10**9), (rising, 2.1, 10**9), (rising, math.nan, 10**9), (rising, 1.0, 1000)):
        assert stopped_at(curve, [train_loss] * len(curve), targets) is None
    assert stopped_at(late, [1.0] * 30) == 18 + 6


LOSSES = [math.nan, 6.0, 5.0, *[9.0] * 10]


def by_heart(trainer):
    """The same trainer, whose validation loss rises behind its second step whatever it learns."""
    trainer.evaluate = lambda *told: LOSSES[trainer.progress.iteration]
    return trainer


def test_a_training_that_stopped_by_itself_goes_on_by_the_printed_command_as_if_it_had_not_stopped(in_tmp, tiny_overrides, capsys):
    more = ["max_iters=12", "eval_interval=1", "keep=99"]
    by_heart(new_session(tiny_overrides, *more, "early_stop_evals=0", out="outputs/never")._build()).fit()
    session = new_session(tiny_overrides, *more)
    stopped = by_heart(session._build())
    summary = stopped.fit()
    assert (summary["stopped_by"], summary["iters"], summary["best_val_loss"]) == ("early_stop", 6, 5.0)
    at_once = outcome(in_tmp / "outputs/run")
    capsys.readouterr()
    session._finish(stopped, summary)
    session.lock.release()
    typed = next(line for line in capsys.readouterr().out.splitlines() if "early_stop_evals" in line).split("run_train.py ")[1].split()
    # 中途断开、再接着训，停在同一处
    again = by_heart(resume("outputs/run", "checkpoint=iter_00000004")._build())
    assert again.progress.evals_risen == 2 and again.fit()["iters"] == 6 and outcome(in_tmp / "outputs/run") == at_once
    assert typed == ["resume=outputs/run", "early_stop_evals=0"]
    onward = by_heart(resume("outputs/run", *typed[1:])._build())
    assert onward.fit()["stopped_by"] == "finished" and outcome(in_tmp / "outputs/run") == outcome(in_tmp / "outputs/never")
