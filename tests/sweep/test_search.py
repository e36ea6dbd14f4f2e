"""A search: what it proposes, who goes on, how the time is divided, and that an interrupted one comes to the same end."""

import dataclasses
import json
import math
import random
import threading
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import yaml
from conftest import composed, make_config
from test_end_to_end import QUICK, TEXT
from typed import typed

from nanogpt.base.language import ConfigError
from nanogpt.data import corpus
from nanogpt.data.opening import open_data
from nanogpt.sweep import beside, child, earlier_results, jobs, learning_report, process, result, search, trial_trainer
from nanogpt.sweep.beside import Beside, places
from nanogpt.sweep.extrapolation import estimate
from nanogpt.sweep.halving import LEAST_MINUTES, Candidate, Schedule, Search, divide, importance
from nanogpt.sweep.learning import finished
from nanogpt.sweep.learning_report import full_budget, trained
from nanogpt.sweep.result import TrialResult
from nanogpt.sweep.search import Steps, Trials
from nanogpt.sweep.space import default_of, overrides_of, shaped, space_of, with_own
from nanogpt.sweep.trial import lock_path

OPTUNA = pytest.mark.skipif(not find_spec("optuna"), reason="extra search is not installed")
SPACE = ["learning_rate=tag(log,interval(1e-3,1e-1))", "global_batch_size=8,16,32", "dropout=0.0,0.1"]


# ---- 循环，用假的试跑 ----


class Fake:
    """Trials whose loss is known: the best learning rate is 1e-2, dropout helps, high rates diverge."""

    # 时间按结果里写的算，不真的过去

    def __init__(self, schedule, stop=10**9):
        self.schedule, self.calls, self.stop, self.known = schedule, [], stop, {}

    def __call__(self, setting, rung, seed):
        asked = (tuple(setting.items()), rung, seed)
        if asked not in self.known:
            if len(self.calls) == self.stop:
                raise KeyboardInterrupt
            self.calls.append(asked)
            self.known[asked] = self.trained(setting, rung, seed)
        return self.known[asked]

    def trained(self, setting, rung, seed):
        rate, rungs = float(setting["learning_rate"]), self.schedule.rungs
        if rate > 0.05:
            return TrialResult((), "crashed", "diverged", objective="val_loss", wall_s=5.0)
        loss = 2 + (math.log10(rate) + 2) ** 2 - 0.1 * float(setting["dropout"]) + 1 / rungs[rung] + 0.01 * seed
        minutes = rungs[rung] - (rungs[rung - 1] if rung and not seed else 0.0)
        return TrialResult((), "ok", val_loss=loss, objective="val_loss", wall_s=60 * minutes + 6)


def searched(fake, minutes=60.0, seed=1):
    found = Search(space_of(SPACE, [], []), fake.schedule, fake, minutes=minutes, seed=seed, say=lambda *said: None, first={"learning_rate": 0.02})
    found.run()
    return found


def told(found):
    return [(one.setting, one.status, one.reason, one.values) for one in found.candidates], [one.number for one in found.best]


@OPTUNA
def test_survivors_go_on_the_others_are_pruned_with_a_reason_and_the_best_is_found():
    schedule = divide(60.0, 0.1, trials=27, eta=3, rungs=3, top=2, seeds=3)
    fake = Fake(schedule)
    found = searched(fake)
    assert found.candidates[0].setting["learning_rate"] == "0.02" and found.spent <= 60.0
    for generation in range(schedule.generations):
        mine = [one for one in found.candidates if one.status != "crashed"][9 * generation : 9 * generation + 9]
        assert sorted(one.rung for one in mine) == [0] * 6 + [1] * 2 + [2]
        for rung in (0, 1):
            gone = [one.results[rung].value for one in mine if one.rung == rung]
            assert min(gone) >= max(one.results[rung].value for one in mine if one.rung > rung)
    pruned = next(one for one in found.candidates if one.status == "pruned" and one.rung == 0)
    assert "of 9, the best 3 went on" in pruned.reason and pruned.reason.startswith("val_loss")
    best = found.best[0]
    assert [len(one.values) for one in found.best] == [3, 3] and best.mean <= found.best[1].mean and best.spread == pytest.approx(0.01)
    assert abs(math.log10(float(best.setting["learning_rate"])) + 2) < 0.2
    # 每一段只训一次：晋级的从自己停下的地方接着
    assert len(set(fake.calls)) == len(fake.calls)
    shares = importance(found.candidates, space_of(SPACE, [], []))
    assert max(shares, key=shares.get) == "learning_rate" and sum(shares.values()) == pytest.approx(1)


@OPTUNA
def test_an_interrupted_search_typed_again_comes_to_the_same_end():
    schedule = divide(30.0, 0.1, trials=9, eta=3, rungs=3, top=1, seeds=2)
    whole = Fake(schedule)
    expected = told(searched(whole, 30.0))
    for stop in (1, 8, 13):
        fake = Fake(schedule, stop)
        with pytest.raises(KeyboardInterrupt):
            searched(fake, 30.0)
        fake.stop = 10**9
        assert told(searched(fake, 30.0)) == expected and fake.calls == whole.calls


@OPTUNA
def test_beside_each_other_the_search_is_the_same_whoever_is_done_first_and_an_interrupted_one_too(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    one, schedule = (divide(60.0, 0.1, trials=27, eta=3, rungs=3, top=2, seeds=3, jobs=jobs) for jobs in (1, 3))
    assert schedule.rungs[-1] > 1.5 * one.rungs[-1] and schedule.minutes == pytest.approx(60)
    busy = set()

    class Slow(Fake):
        def trained(self, setting, rung, seed):
            where = process.place.get()
            assert where.startswith("cpu-") and where not in busy
            busy.add(where)
            time.sleep(random.random() / 200)
            busy.remove(where)
            return super().trained(setting, rung, seed)

    def searched(fake):
        beside = Beside(["cpu-0", "cpu-1", "cpu-2"])
        found = Search(space_of(SPACE, [], []), schedule, fake, minutes=60.0, seed=1, say=lambda *said: None, beside=beside)
        found.run()
        return found

    found = searched(Slow(schedule))
    assert found.spent <= 60.0 and abs(math.log10(float(found.best[0].setting["learning_rate"])) + 2) < 0.2 and len(found.best[0].values) == 3
    settings = [tuple(one.setting.items()) for one in found.candidates]
    assert len(settings) == len(set(settings)) and told(searched(Slow(schedule))) == told(found)
    fake = Slow(schedule, stop=11)
    with pytest.raises(KeyboardInterrupt):
        searched(fake)
    fake.stop = 10**9
    assert told(searched(fake)) == told(found) and len(set(fake.calls)) == len(fake.calls)


def test_ctrl_c_ends_the_trials_beside_each_other(tmp_path):
    def work(piece):
        if piece:
            raise KeyboardInterrupt
        process.run_child({}, tmp_path, timeout_s=60, command=[process.sys.executable, "-S", "-c", "import time; time.sleep(60)"])

    before = set(psutil.Process().children())
    with pytest.raises(KeyboardInterrupt):
        Beside(["0", "1"]).all(work, [0, 1])
    assert set(psutil.Process().children()) == before and not process.ending.is_set()


@pytest.mark.parametrize(("cards", "words", "found"), [
    ("", ["search.jobs=2", "objective=val_loss"], ["cpu-0", "cpu-1"]),
    ("", ["search.jobs=2", "objective=tokens_per_s"], "on a CPU, trials beside each other would disturb each other's timing"),
    ("A100, 580\nA100, 580", ["search.jobs=2", "objective=tokens_per_s"], ["4", "7"]),
    ("A100, 580\nA100, 580", ["search.jobs=3"], "search.jobs=3, but 2 cards can be seen here"),
    ("A100, 580\nA100, 580", ["search.jobs=2", "device=cuda:1"], "takes a CUDA card for each trial; leave device=cuda:1 out"),
    ("A100, 580\nA100, 580", ["search.jobs=2", "device=cpu"], ["cpu-0", "cpu-1"]),
    ("A100, 580\nL4, 580", ["search.jobs=2"], "the cards here differ"),
    ("", ["search.jobs=2", "objective=val_loss", "device=xpu"], "would share one GPU here"),
])
def test_trials_beside_each_other_have_a_card_each_or_share_the_cores_of_a_cpu(monkeypatch, cards, words, found):
    monkeypatch.setattr(earlier_results, "_cards", lambda: cards)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    cfg = make_config("experiment=search", *words, checked=False)
    if isinstance(found, str):
        with pytest.raises(ConfigError, match=found):
            places(cfg)
        return
    assert places(cfg) == found
    seen, locks = Beside(found).all(lambda piece: (process.environment()["CUDA_VISIBLE_DEVICES"], lock_path("auto")), range(2)), []
    for card, lock in seen:
        assert card == ("4,7" if found[0].startswith("cpu") else card) and lock not in locks
        locks.append(lock)


def test_a_macs_one_gpu_is_not_shared(monkeypatch):
    monkeypatch.setattr(beside.sys, "platform", "darwin")
    monkeypatch.setattr(beside.platform, "machine", lambda: "arm64")
    for words in ([], ["device=mps"]):
        with pytest.raises(ConfigError, match="would share one GPU here"):
            places(make_config("experiment=search", "search.jobs=2", "objective=val_loss", *words, checked=False))
    assert places(make_config("experiment=search", "search.jobs=2", "objective=val_loss", "device=cpu", checked=False)) == ["cpu-0", "cpu-1"]


@OPTUNA
def test_no_setting_is_tried_twice_however_small_the_space():
    schedule = divide(60.0, 0.1, trials=27, eta=3, rungs=2, top=1, seeds=1)
    fake = Fake(schedule)
    found = Search(space_of(["learning_rate=1e-3,1e-2", "dropout=0.0,0.1"], [], []), schedule, fake, minutes=60.0, seed=0, say=lambda *said: None)
    found.run()
    settings = [tuple(one.setting.items()) for one in found.candidates]
    assert len(settings) == len(set(settings)) <= 4 and found.best[0].setting == {"learning_rate": "0.01", "dropout": "0.1"}


@OPTUNA
def test_a_setting_that_crashes_with_another_seed_is_ranked_behind_those_that_do_not():
    schedule = divide(60.0, 0.1, trials=27, eta=3, rungs=3, top=2, seeds=3)
    best = searched(Fake(schedule)).best[0]
    fake = Fake(schedule)
    trained = fake.trained
    fake.trained = lambda setting, rung, seed: TrialResult((), "crashed", "diverged", objective="val_loss", wall_s=5.0) if seed == 2 and setting == best.setting else trained(setting, rung, seed)
    found = searched(fake)
    assert [one.status for one in found.best] == ["ok", "crashed"] and found.best[1].setting == best.setting and found.best[1].mean < found.best[0].mean
    assert found.best[1].reason == "with another of its seeds: diverged"


@OPTUNA
@pytest.mark.parametrize(("failing", "left"), [(1, [1]), (2, [2]), (9, [])])
def test_where_the_best_one_fails_the_next_best_goes_on_in_its_place(failing, left):
    schedule, failed = Schedule((1.0, 2.0), 1, 3, 1, 1, 0.1), []
    fake = Fake(schedule)
    trained = fake.trained

    def fails(setting, rung, seed):
        if rung and len(failed) < failing:
            failed.append(setting)
            return TrialResult((), "crashed", "killed", objective="val_loss", wall_s=5.0)
        return trained(setting, rung, seed)

    fake.trained = fails
    found = searched(fake)
    ranked = sorted((one for one in found.candidates if one.results), key=lambda one: one.results[0].value)
    assert len(ranked) == 3 and [one.setting for one in ranked[: len(failed)]] == failed
    assert [ranked.index(one) for one in found.best] == left
    assert [one.status for one in ranked] == (["crashed"] * failing + ["ok"] + ["pruned"] * 2)[:3] if left else ["crashed"] * 3


@OPTUNA
def test_where_every_seed_but_the_first_crashes_the_next_best_is_taken():
    schedule = Schedule((1.0, 2.0), 2, 3, 1, 3, 0.1)
    best = searched(Fake(schedule)).best
    fake = Fake(schedule)
    trained = fake.trained
    fake.trained = lambda setting, rung, seed: TrialResult((), "diverged", "NaN", objective="val_loss", wall_s=5.0) if seed and setting == best[0].setting else trained(setting, rung, seed)
    found = searched(fake)
    assert [one.status for one in found.best] == ["ok", "diverged"] and len(found.best[0].values) == 3 and found.best[1].setting == best[0].setting


@OPTUNA
def test_settings_that_are_compared_in_one_step_are_tried_beside_each_other_too(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    schedule, together = Schedule((0.5,), 7, 3, 1, 1, 0.0, 3), threading.Barrier(3)

    class Waiting(Fake):
        def trained(self, setting, rung, seed):
            # 七个：三个、三个、一个
            if len(self.calls) <= 6:
                together.wait(30)
            return super().trained(setting, rung, seed)

    found = Search(space_of(SPACE, ["learning_rate=1e-3,5e-2"], []), schedule, Waiting(schedule), minutes=60.0, seed=1, say=lambda *said: None, beside=Beside(["cpu-0", "cpu-1", "cpu-2"]))
    found.run()
    assert len(found.candidates) == 7 and schedule.minutes == pytest.approx(3 * 0.5 * 1.25) and not together.broken


@OPTUNA
def test_trials_that_take_longer_than_planned_end_the_search_with_what_there_is():
    schedule = divide(30.0, 0.1, trials=27, eta=3, rungs=3, top=2, seeds=3)
    slow = Fake(schedule)
    trained = slow.trained
    slow.trained = lambda *asked: dataclasses.replace(trained(*asked), wall_s=10 * trained(*asked).wall_s)
    found = searched(slow, 30.0)
    longest = max(one.wall_s for one in slow.known.values()) / 60
    assert 30.0 <= found.spent <= 30.0 + longest and found.best and found.best[0].values


@pytest.mark.parametrize("minutes", [2, 5, 20, 60, 120, 1000])
def test_the_time_is_divided_whole_and_no_rung_is_too_short_to_say_anything(minutes):
    one = divide(minutes, 0.15, trials=27, eta=3, rungs=3, top=2, seeds=3)
    assert one.minutes == pytest.approx(minutes) and one.rungs[0] >= LEAST_MINUTES and one.generations * one.size <= 27
    assert all(b == pytest.approx(3 * a) for a, b in zip(one.rungs, one.rungs[1:]))
    # 只有一个设置，就没有比较：时间少时，先少几个种子
    assert one.generations * one.size >= 2
    with pytest.raises(ConfigError, match=r"search.minutes=1 is too short to compare settings.*give at least \d"):
        divide(1, 0.15, trials=27, eta=3, rungs=3, top=2, seeds=3)
    assert divide(1, 0.15, trials=1, eta=3, rungs=3, top=2, seeds=3).size == 1


# ---- 空间 ----


def test_typed_keys_replace_those_of_the_space_and_single_values_end_the_search_over_a_key():
    lines = [*SPACE, "shape=as_is,deeper", "model.ngrams=[2,3],[]"]
    space = {one.key: str(one) for one in space_of(lines, ["dropout=0.0,0.3", "optimizer=muon,adamw"], ["learning_rate=1e-2", "model.n_layer=3"])}
    assert space == {
        "global_batch_size": "global_batch_size=8,16,32", "model.ngrams": "model.ngrams=[2,3],[]", "dropout": "dropout=0.0,0.3", "optimizer": "optimizer=muon,adamw",
    }
    cfg = make_config("batch_size=8", "gradient_accumulation_steps=2")
    assert default_of(space_of(lines, [], []), cfg) == {"learning_rate": 0.01, "global_batch_size": "16", "dropout": "0.0", "shape": "as_is"}


@pytest.mark.parametrize("typed_words", [["model=tiny,small"], ["model=tiny,small", "shape=as_is"]])
def test_several_models_can_be_searched_in_place_of_shapes(typed_words):
    space = {one.key: one.choices for one in space_of([*SPACE, "shape=as_is,deeper"], typed_words, [])}
    assert space["model"] == ("tiny", "small") and space.get("shape", ("as_is",)) == ("as_is",)


def test_the_setting_without_a_search_is_in_the_space_unless_it_was_left_out():
    cfg = make_config("batch_size=12", "learning_rate=0.2")
    space = with_own(space_of(SPACE, ["dropout=0.1,0.2"], []), ["dropout=0.1,0.2"], cfg)
    assert {one.key: str(one) for one in space} == {
        "learning_rate": "learning_rate=0.001 … 0.2 (log)", "global_batch_size": "global_batch_size=8,12,16,32", "dropout": "dropout=0.1,0.2",
    }
    first = default_of(space, cfg)
    assert first == {"learning_rate": 0.2, "global_batch_size": "12"}
    lines = ["min_lr=tag(log,interval(1e-5,1e-3))", "optimizer=adamw,muon"]
    other = dataclasses.replace(cfg, min_lr=0.0, groups={"optimizer": "muon"})
    assert [str(one) for one in with_own(space_of(lines, [], []), [], other)] == ["min_lr=1e-05 … 0.001 (log)", "optimizer=adamw,muon"]
    assert default_of(space_of(lines, [], []), other) == {"optimizer": "muon"}
    # 由文字定的，默认的空间里有这个词
    assert default_of(space_of(["dropout=null,0.1"], [], []), cfg) == {"dropout": "null"}


def test_words_are_read_as_the_command_line_reads_them():
    # Hydra 写作 1e-05，纯 YAML 会当成文字
    cfg = dataclasses.replace(make_config("learning_rate=1e-5", "optimizer=adamw", "optimizer.eps=1e-10"))
    typed_words = ["learning_rate=1e-5,0.00001,3e-4", "dropout=0,0.0,0.1", "optimizer.eps=1e-8,1e-10", "global_batch_size=interval(4,64)", "grad_clip=interval(1,4)"]
    space = space_of([], typed_words, [])
    assert [one.choices for one in space[:3]] == [("1e-05", "0.0003"), ("0", "0.1"), ("1e-08", "1e-10")]
    assert space_of([], ["global_batch_size=0x10,1e1,16"], [])[0].choices == ("16", "10")
    assert [one.whole for one in space[3:]] == [True, False] and space[3].word(space[3].drawn(random.Random(0))).isdigit()
    assert default_of(space, cfg) == {"learning_rate": "1e-05", "dropout": "0", "optimizer.eps": "1e-10", "global_batch_size": 16, "grad_clip": 1.0}


def test_what_weights_decide_that_a_training_starts_from_is_not_searched():
    cfg = make_config("init_from=gpt2", "objective=val_loss", checked=False)
    space = search.searched(dataclasses.replace(cfg, search=dataclasses.replace(cfg.search, space=[*SPACE, "shape=as_is,deeper", "model.ngrams=null,[]", "model.dropout=0,0.1"])))
    assert {one.key for one in space} == {"learning_rate", "global_batch_size", "dropout", "model.dropout"}


def test_shapes_that_change_nothing_are_one():
    cfg = make_config("model.n_layer=1", "model.n_embd=32", "model.n_head=2")
    space = with_own(space_of([*SPACE, "shape=as_is,deeper,wider"], [], []), [], cfg)
    assert next(one for one in space if one.key == "shape").choices == ("as_is", "deeper")


@pytest.mark.parametrize(("typed_words", "said"), [
    (["learning_rate=interval(1e-2,1e-3)"], "contradicts itself: 0.01 is not below 0.001"),
    (["learning_rate=tag(log,interval(0,1e-3))"], "a logarithmic interval begins above 0"),
    (["shape=as_is,wider", "model.n_embd=64,128"], "shape and model.n_embd both decide"),
    (["shape=as_is,wider", "model=tiny,small"], "shape and model both decide"),
    (["dropout=0.1,0.2", "dropout=0.3,0.4"], "dropout is given twice"),
    (["max_iters=10,20"], "the search decides max_iters by itself"),
    (["optimiser=muon,adamw"], "there is no key optimiser"),
    (["dropout=choice(0.1,"], "this cannot be read"),
    (["dropout=0.1,1.5"], "dropout=1.5 is out of range"),
    (["learning_rate=interval(-1,1e-3)"], "learning_rate=-1.0 is out of range"),
    (["global_batch_size=8,x"], "global_batch_size=x has the wrong type"),
    (["global_batch_size=interval(1,inf)"], "global_batch_size=inf has the wrong type"),
    (["global_batch_size=null,8"], "global_batch_size=null has the wrong type: int is wanted"),
    (["eval_batch_size=4.5,8"], "eval_batch_size=4.5 has the wrong type: int"),
    (["model.n_layer=interval(1.2,1.8)"], "no value is left to search"),
    (["lr_schedule_=wsd,cosine"], "there is no key lr_schedule_"),
    (["shape=as_is,higher"], "shape=higher is not known; choose one of: as_is | deeper | wider"),
    (["optimizer=muon,sgd"], "optimizer=sgd is not known; choose one of: adamw | muon"),
    (["model.activation=relu2,selu"], "model.activation=selu is not known"),
])
def test_a_space_that_contradicts_itself_is_refused_in_one_line(typed_words, said):
    with pytest.raises(ConfigError) as refused:
        space_of(SPACE, typed_words, [])
    assert said in str(refused.value) and "\n" not in str(refused.value)
    for typed_alone in ([], ["shape=as_is"]):
        with pytest.raises(ConfigError, match="the search space is empty"):
            space_of([], typed_alone, [])


@pytest.mark.parametrize("preset", ["tiny", "gpt2_xl"])
def test_other_shapes_have_about_the_same_work_and_whole_heads(preset):
    model = make_config(f"model={preset}").model
    for word in ("deeper", "wider"):
        other = make_config(f"model={preset}", *overrides_of({"shape": word}, model)).model
        work = other.n_layer * other.n_embd**2 / (model.n_layer * model.n_embd**2)
        assert 0.8 < work < 1.25 and other.n_embd % other.n_head == 0 and other.n_layer != model.n_layer
    assert shaped(model, "as_is") == []


# ---- 估计 ----


def test_a_power_law_is_found_again_and_the_estimate_says_how_sure_it_is():
    def curve(gain, noise=0.0):
        plateau = [(t, 1.2 + 3 * t**-0.4 + noise * (-1) ** i) for i, t in enumerate(np.linspace(1e3, 8e3, 8))]
        return [*plateau, (1e4, 1.2 + 3 * 1e4**-0.4 - gain)]

    exact = estimate([curve(0.05)], 1e5, plateau=0.8)
    wanted = 1.2 + 3 * 1e5**-0.4 - 0.05
    assert exact.value == pytest.approx(wanted, abs=5e-3) and exact.low <= wanted <= exact.high
    rough = estimate([curve(0.05, 0.01), curve(0.07, -0.01)], 1e5, plateau=0.8)
    assert rough.high - rough.low > exact.high - exact.low and rough.low < wanted < rough.high
    assert estimate([[(1e3, 2.0), (2e3, 1.9)]], 1e5, plateau=0.8) is None


def test_the_expectation_is_for_the_budget_that_was_typed():
    best = TrialResult((), "ok", effective_batch=8, tokens_per_s=100.0)
    block = make_config().model.block_size
    budgets = {"max_iters=3000": 3000 * 8 * block, "max_tokens=5000000": 5e6, "max_minutes=60": 360_000, "max_minutes=60 max_tokens=1000": 1000, "seed=1": 250 * 8 * block}
    for words, tokens in budgets.items():
        assert full_budget(make_config(*words.split()), best) == tokens


# ---- 真的短训练，在这个进程里 ----


def learned(tiny_overrides, folder, *more):
    lines = []
    overrides = [*tiny_overrides, "trial.enabled=true", "objective=val_loss", "dropout=0.1", "hardware.peak_tflops_fp32=0.1", "lr_schedule=wsd", "lr_decay_iters=8", *more]
    child.measure(make_config(*overrides), overrides, folder, lambda **said: lines.append(said), predict=lambda cfg, device: None, limit=lambda gib: None)
    return {key: value for line in lines for key, value in line.items()}


def test_a_survivor_goes_on_exactly_as_if_it_had_not_stopped(tiny_overrides, in_tmp):
    first = learned(tiny_overrides, Path("outputs/fit/runs/a"), "max_iters=4", "eval_interval=2")
    went_on = learned(tiny_overrides, Path("outputs/fit/runs/a"), "max_iters=8", "eval_interval=2")
    whole = learned(tiny_overrides, Path("outputs/fit/runs/b"), "max_iters=8", "eval_interval=2")
    assert (first["status"], first["iters"], went_on["iters"]) == ("ok", 4, 8) and first["val_loss"] > went_on["val_loss"]
    assert [(t, loss) for t, _, loss in went_on["curve"]] == [(t, loss) for t, _, loss in whole["curve"]] and went_on["val_loss"] == whole["val_loss"]
    # 已走完、还没记下的，不再训练；latest 仍是人自己训的那一次
    again = learned(tiny_overrides, Path("outputs/fit/runs/a"), "max_iters=8", "eval_interval=2")
    assert again["val_loss"] == whole["val_loss"] and "micro_batch" in again and not Path("outputs/.latest").exists()
    # 被人叫停的不算走完，接着训
    summary = Path("outputs/fit/runs/a/summary.json")
    summary.write_text(json.dumps({**json.loads(summary.read_text(encoding="utf-8")), "stopped_by": "interrupted"}), encoding="utf-8")
    assert finished(make_config(*tiny_overrides, "lr_schedule=wsd", "lr_decay_iters=8", "max_iters=8", "eval_interval=2"), summary.parent) is None
    # 死在最后一个 checkpoint 与总结之间的，补上总结
    summary.unlink()
    ended = learned(tiny_overrides, Path("outputs/fit/runs/a"), "max_iters=8", "eval_interval=2")
    assert (ended["status"], ended["val_loss"], ended["curve"]) == ("ok", whole["val_loss"], went_on["curve"])
    # 坏了的权重接不下去：从头训，到的是同一处
    for file in summary.parent.glob("ckpt/*/model.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    summary.unlink()
    anew = learned(tiny_overrides, Path("outputs/fit/runs/a"), "max_iters=8", "eval_interval=2")
    assert [(t, loss) for t, _, loss in anew["curve"]] == [(t, loss) for t, _, loss in whole["curve"]]


def test_measured_anew_is_trained_anew_but_a_longer_budget_goes_on(tiny_overrides, in_tmp):
    run_dir = Path("outputs/fit/runs/a")
    learned(tiny_overrides, run_dir, "max_iters=4", "eval_interval=2")
    marked = run_dir / "metrics.jsonl"
    for more, begun in ((["max_iters=4"], True), (["max_iters=8"], False), (["max_iters=4"], True)):
        marked.write_text(marked.read_text(encoding="utf-8") + '{"event": "mine"}\n', encoding="utf-8")
        got = learned(tiny_overrides, run_dir, *more, "eval_interval=2", "trial.again=true")
        assert got["status"] == "ok" and ("mine" not in marked.read_text(encoding="utf-8")) == begun
    # 在更远的一级里被打断的：那里的权重不是这一级的
    learned(tiny_overrides, run_dir, "max_iters=8", "eval_interval=2")
    (run_dir / "summary.json").unlink()
    with pytest.raises(ConfigError, match="the run already stands at iteration 8"):
        learned(tiny_overrides, run_dir, "max_iters=4", "eval_interval=2")
    assert learned(tiny_overrides, run_dir, "max_iters=4", "eval_interval=2", "trial.again=true")["iters"] == 4


def test_a_text_or_start_that_was_changed_is_another_trial_of_learning_and_the_same_of_speed(in_tmp):
    text, start = in_tmp / "my.txt", in_tmp / "start"
    start.mkdir()

    def keys():
        cfg = make_config("dataset=text_file", f"dataset.path={text}", f"init_from={start}", checked=False)
        return [earlier_results.key_of(dataclasses.replace(cfg, objective=objective)) for objective in ("val_loss", "tokens_per_s")]

    text.write_text(TEXT, encoding="utf-8")
    (start / "model.safetensors").write_bytes(b"1")
    first = keys()
    text.write_text(TEXT[::-1], encoding="utf-8")
    second = keys()
    (start / "model.safetensors").write_bytes(b"12")
    third = keys()
    # 准备在指名的文件夹里，之前与之后是同一次试跑
    cfg = make_config("dataset=text_file", f"dataset.path={text}", f"dataset.dir={in_tmp / 'there'}", "objective=val_loss", checked=False)
    before = earlier_results.key_of(cfg)
    corpus.prepare("text_file", str(in_tmp / "there"), {key: value for key, value in cfg.dataset.items() if key not in ("name", "dir")})
    assert earlier_results.key_of(cfg) == before
    assert len({first[0], second[0], third[0]}) == 3 and first[1] == second[1] == third[1] and keys() == third


def test_only_trainings_with_the_settings_of_best_yaml_are_compared_with_what_was_expected(in_tmp):
    best = TrialResult(("dataset.path=my.txt", "model.n_layer=2", "learning_rate=1e-2", "sample_prompt='it\\'s'", "dropout=null", "objective=val_loss", "max_iters=9"), "ok")
    cfg = make_config("dataset=text_file", "dataset.path=my.txt", "objective=val_loss", checked=False)
    same = {"groups": {"fit": "best"}, "dataset": {"name": "text_file", "path": "my.txt"}, "model": {"n_layer": 2}, "learning_rate": 0.01, "sample_prompt": "it's", "dropout": 0.05, "objective": "tokens_per_s"}
    changes = {"same": {}, "text": {"dataset": {"name": "text_file", "path": "other.txt"}}, "depth": {"model": {"n_layer": 1}}, "rate": {"learning_rate": 0.02}, "own": {"groups": {}}}
    for name, change in changes.items():
        (in_tmp / "outputs" / name).mkdir(parents=True)
        (in_tmp / "outputs" / name / "config.yaml").write_text(yaml.safe_dump({**same, **change}), encoding="utf-8")
        (in_tmp / "outputs" / name / "summary.json").write_text('{"tokens": 5, "best_val_loss": 1.5}', encoding="utf-8")
    assert trained(best, cfg) == [("outputs/same", 5, 1.5)]
    # 配方里没写的键，照试训的那一次；在留出的那份上评估的，比不得
    trial = {**same, "optimizer": {"name": "muon", "head_weight_decay": 0.5}, "dropout": 0.1}
    best = replace(best, run_dir=(in_tmp / "outputs/fit/runs/a").as_posix())
    for name, change in {"fit/runs/a": {}, "same": {"optimizer": {"name": "muon", "head_weight_decay": 2.0}}, "adamw": {"optimizer": {"name": "adamw"}}, "held": {"holdout": 0.1}}.items():
        (in_tmp / "outputs" / name).mkdir(parents=True, exist_ok=True)
        (in_tmp / "outputs" / name / "config.yaml").write_text(yaml.safe_dump({**trial, **change}), encoding="utf-8")
        (in_tmp / "outputs" / name / "summary.json").write_text('{"tokens": 5, "best_val_loss": 1.5}', encoding="utf-8")
    assert trained(best, cfg) == [("outputs/same", 5, 1.5)]


def test_a_report_that_finds_no_room_is_one_line_behind_what_was_found(in_tmp, capsys, monkeypatch):
    full = OSError(28, "No space left on device", "outputs/fit/report.html")
    written = learning_report.write_text
    monkeypatch.setattr(learning_report, "write_text", lambda path, content: raise_(full) if path.name == "report.html" else written(path, content))
    found = [result.made({"overrides": ["learning_rate=0.01"], "status": "ok", "objective": "val_loss", "val_loss": 1.5, "micro_batch": 8})]
    monkeypatch.setattr(search, "_folder", lambda: in_tmp)
    monkeypatch.setattr(search, "_search", lambda *asked: learning_report.write_trials(found, in_tmp, margin=0.1))
    with pytest.raises(SystemExit) as ended:
        search.search_job(make_config(), [])
    said = capsys.readouterr()
    assert ended.value.code == 2 and "+fit=best" in said.out and said.err.count("\n") == 1 and "report.html: the system refuses (No space left" in said.err


def raise_(error):
    raise error


def test_a_first_setting_that_came_further_than_the_best_is_compared_where_both_were():
    def candidate(number, *losses, status="ok"):
        results = [TrialResult((), "ok", val_loss=loss, objective="val_loss", tokens=10**9, effective_batch=1) for loss in losses]
        return Candidate(number, {}, results, tried=results, status=status)

    first, best = candidate(0, 3.0, 2.5, status="timeout"), candidate(4, 2.75)
    found = SimpleNamespace(candidates=[first, best], best=[best], starts_as_typed=True, schedule=Schedule((1.0, 2.0, 4.0), 2, 2, 1, 1, 0.0))
    line = next(line for line in learning_report.notes_of(make_config("objective=val_loss"), found) if "without a search" in line)
    assert "3.0000 after 1.0 min; the best one then: 2.7500" in line


def test_the_validation_split_is_looked_at_once_when_the_training_has_ended(tiny_overrides, in_tmp, monkeypatch):
    opened = []
    monkeypatch.setattr(trial_trainer, "open_data", lambda *asked, **how: opened.append(open_data(*asked, **how)) or opened[-1])
    stopped = learned(tiny_overrides, Path("outputs/fit/runs/a"), "max_iters=4", "eval_interval=4", "holdout=0.2")
    ended = learned(tiny_overrides, Path("outputs/fit/runs/a"), "max_iters=8", "eval_interval=4", "holdout=0.2")
    assert stopped["validation"] is None and ended["validation"] != ended["val_loss"] and abs(ended["validation"] - ended["val_loss"]) < 1
    # 看到一半停下的，一步也不再训，只补上这一眼
    summary = Path("outputs/fit/runs/a/summary.json")
    # 总结写不下，那一眼也不白看
    with monkeypatch.context() as full:
        full.setattr(trial_trainer, "keep_summary", lambda *told: None)
        assert learned(tiny_overrides, Path("outputs/fit/runs/d"), "max_iters=8", "eval_interval=4", "holdout=0.2")["validation"] == ended["validation"]
    seen = json.loads(summary.read_text(encoding="utf-8"))
    assert seen.pop("validation")["val_loss"] == ended["validation"]
    summary.write_text(json.dumps(seen), encoding="utf-8")
    again = learned(tiny_overrides, Path("outputs/fit/runs/a"), "max_iters=8", "eval_interval=4", "holdout=0.2")
    assert again["validation"] == ended["validation"] and again["curve"] == ended["curve"]
    assert ended["validation"] == learned(tiny_overrides, Path("outputs/fit/runs/b"), "max_iters=8", "eval_interval=8", "holdout=0.2", "eval_tokens=128")["validation"]
    # 与挑选时的评估一样滑动；评估短的，这一眼也短
    slid = learned(tiny_overrides, Path("outputs/fit/runs/c"), "max_iters=8", "eval_interval=8", "holdout=0.2", "eval_tokens=16", "eval_stride=8")
    assert [data.overlap for data in opened] == [0, 0, 0, 0, 8] and abs(slid["validation"] - ended["validation"]) > 1e-4


def test_an_objective_that_never_appears_is_a_line(tiny_overrides, in_tmp, monkeypatch):
    monkeypatch.setattr("nanogpt.sweep.trial_trainer.TrialTrainer.evaluate", lambda trainer, *told: math.nan)
    with pytest.raises(ConfigError, match=r"objective=val_loss never appeared: no evaluation within the budget"):
        learned(tiny_overrides, Path("outputs/fit/runs/a"), "max_iters=2", "eval_interval=2")


@pytest.mark.parametrize("writes", [True, False])
def test_a_training_that_still_writes_is_not_taken_for_one_that_hangs(tmp_path, writes):
    sign = tmp_path / "metrics.jsonl"
    code = f"import sys, time; sys.stdin.readline(); [({writes} and open({str(sign)!r}, 'w').close(), time.sleep(0.2)) for _ in range(7)]"
    ended = process.run_child({}, tmp_path, timeout_s=1, signs=[sign], command=[process.sys.executable, "-S", "-c", code])
    assert ended.killed == (None if writes else "timeout")


@pytest.mark.parametrize(("typed_words", "tried"), [([], [64, 32, 16, 8]), (["batch_size=64"], [64]), (["memory.optimizer_in_backward=true"], [64])])
def test_a_setting_that_does_not_fit_is_tried_in_smaller_micro_batches_of_the_same_batch(typed_words, tried):
    trials, asked = Trials.__new__(Trials), []
    trials.cfg, trials.base, trials.micro_batch = make_config(*typed_words), typed_words, 64

    def speed(words):
        asked.append(dict(word.split("=") for word in words))
        return TrialResult((), "ok" if int(asked[-1]["batch_size"]) <= 8 else "skipped", wall_s=2.0)

    trials.speed = speed
    got = trials.fitting({"global_batch_size": "64", "dropout": "0.1"})
    assert [int(words["batch_size"]) for words in asked] == tried and {(words["global_batch_size"], words["dropout"]) for words in asked} == {("64", "0.1")}
    assert (got.status, got.wall_s) == ("ok" if len(tried) > 1 else "skipped", 2.0 * len(tried))
    # 默认的微批比一批小：反向里更新的照样一次算完
    trials.micro_batch = 16
    pieces = 64 if "memory.optimizer_in_backward=true" in typed_words else 16
    assert f"batch_size={pieces}" in trials.words({"global_batch_size": "64", "dropout": "0.1"}, 16)


@pytest.mark.parametrize("rungs", [(5,), (2, 5), (1, 2, 5)])
def test_a_setting_trains_in_one_folder_at_every_rung_however_many_there_are(rungs, tmp_path):
    trials, asked, steps = Trials.__new__(Trials), [], Steps(rungs)
    trials.base, trials.number, trials.folder, trials.composing, trials.composed = [], 0, tmp_path, threading.Lock(), lambda more: make_config()
    trials.run_trial = lambda cfg, shown, folder, run_dir: asked.append((run_dir, cfg.max_iters, f"max_iters={cfg.max_iters}" in shown))
    for rung in range(len(rungs)):
        trials.trial(["seed=0"], steps, rung)
    assert len({run_dir for run_dir, *_ in asked}) == 1 and [(iters, said) for _, iters, said in asked] == [(n, True) for n in rungs]


# ---- 敲下的命令 ----


@OPTUNA
def test_a_search_as_it_is_typed_ends_with_a_report_and_a_recipe(in_tmp, monkeypatch):
    (in_tmp / "my.txt").write_text(TEXT, encoding="utf-8")
    asked = []

    def faked(cfg, overrides, folder, *, run_dir=None):
        asked.append((cfg, run_dir))
        common = {"overrides": overrides, "status": "ok", "objective": cfg.objective, "wall_s": 6.0, "step_ms": 10.0, "tokens_per_s": 5000.0, "micro_batch": cfg.batch_size,
                  "effective_batch": cfg.global_batch_size, "device": "cpu"}
        if cfg.objective == "tokens_per_s":
            return result.made(common)
        loss = 2 + (math.log10(cfg.learning_rate) + 2) ** 2 + 1 / cfg.max_iters
        curve = [(n * 100.0, n / 10, loss + 1 / n) for n in range(1, 8)]
        return result.made({**common, "val_loss": loss, "curve": curve, "tokens": 700, "minutes": 0.7, "run_dir": str(run_dir)})

    monkeypatch.setattr(jobs, "run_trial", faked)
    words = ["-m", "experiment=search", "objective=val_loss", "search.minutes=15", "search.trials=9", "learning_rate=3e-3,1e-2,3e-2", "dropout=0", "dataset.path=my.txt",
             "dataset.dir=prepared", *(word for word in QUICK if not word.startswith(("logger", "sample", "eval")))]
    done = typed("run_train.py", in_tmp, *words, "max_iters=5000")
    assert "chosen on 10% of the training split" in done.stdout and "--config-dir outputs/fit +fit=best max_iters=5000" in done.stdout
    assert "planned is one training" in typed("run_train.py", in_tmp, *words, "plan=true").stdout.replace("\n", " ")
    trainings = [(cfg, run_dir) for cfg, run_dir in asked if cfg.objective == "val_loss"]
    assert all(cfg.holdout == 0.1 and cfg.lr_schedule == "wsd" and cfg.dropout == 0 and cfg.trial.enabled for cfg, _ in trainings)
    assert {cfg.learning_rate for cfg, _ in trainings} <= {3e-3, 1e-2, 3e-2}
    # 晋级的在同一个目录里，终点不变，停得更晚
    again = [pair for pair in trainings if pair[1] == trainings[0][1]]
    assert len({cfg.lr_decay_iters for cfg, _ in again}) == 1 and again[0][0].max_iters < again[0][0].lr_decay_iters
    best = yaml.safe_load((in_tmp / "outputs/fit/fit/best.yaml").read_text(encoding="utf-8"))
    assert best["learning_rate"] == 0.01 and best["lr_schedule"] == "wsd" and not {"holdout", "max_iters"} & {*best}
    cfg = composed("train", [f"hydra.searchpath=[file://{(in_tmp / 'outputs/fit').as_posix()}]", "+fit=best"])
    assert not cfg.search.enabled and not cfg.trial.enabled and cfg.holdout == 0 and cfg.dataset["path"] == "my.txt"
    report = next(in_tmp.glob("outputs/fit/*/report.html")).read_text(encoding="utf-8")
    assert report.count("<svg") == 3 and "pruned" in report and "<script" not in report and "is expected" in report
    rows = [json.loads(line) for line in next(in_tmp.glob("outputs/fit/*/trials.jsonl")).read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len(trainings)
    # 一半是从断处接着训的：记下的时间里也要有前一半
    assert all(row["wall_s"] >= 6.0 for row in rows) and any(row["wall_s"] > 6.0 for row in rows)
    refused = typed("run_train.py", in_tmp, *words, "model.n_embd=32", "model.n_head=3,5", expect=2)
    assert "of 64 settings drawn from it none is possible; the last: model.n_embd=32 is not divisible by model.n_head=" in refused.stderr
    refused = typed("run_train.py", in_tmp, *words, "search.minutes=0", expect=2)
    assert "search.minutes=0" in refused.stderr and "Traceback" not in refused.stderr
    refused = typed("run_train.py", in_tmp, *words, "search.minutes=0.001", expect=2)
    assert "search.minutes=0.001 is too short" in refused.stderr and refused.stderr.count("error") == 1
    # 起点的设置有误，原因里已有补救；换小模型帮不上忙
    monkeypatch.setattr(jobs, "run_trial", lambda cfg, overrides, folder, *, run_dir=None: result.made({"overrides": overrides, "status": "invalid", "reason": "give more text"}))
    refused = typed("run_train.py", in_tmp, *words, expect=2)
    assert refused.stderr.strip().endswith("cannot be trained: give more text")


@OPTUNA
def test_speed_can_be_searched_too(in_tmp, monkeypatch):
    (in_tmp / "my.txt").write_text(TEXT, encoding="utf-8")

    def faked(cfg, overrides, folder, *, run_dir=None):
        if cfg.model.n_embd % cfg.model.n_head:
            return result.made({"overrides": overrides, "status": "invalid", "reason": f"{cfg.model.n_head} heads"})
        fits = cfg.batch_size < 32
        return result.made({"overrides": overrides, "key": f"{cfg.batch_size}", "status": "ok" if fits else "oom", "tokens_per_s": 100.0 * cfg.batch_size if fits else None,
                            "micro_batch": cfg.batch_size, "wall_s": 1.0})

    monkeypatch.setattr(jobs, "run_trial", faked)
    # 画图要一秒多，test_report.py 已看过
    monkeypatch.setattr("nanogpt.sweep.report.write_pictures", lambda *asked: [])
    done = typed("run_train.py", in_tmp, "-m", "experiment=search", "objective=tokens_per_s", "search.trials=8", "batch_size=4,8,16,32", "dataset.path=my.txt")
    best = yaml.safe_load((in_tmp / "outputs/fit/fit/best.yaml").read_text(encoding="utf-8"))
    assert best["batch_size"] == 16 and "train with the fastest setting" in done.stdout
    # 一个也不成立：每个都列出，退出码说没有结果
    refused = typed("run_train.py", in_tmp, "-m", "experiment=search", "objective=tokens_per_s", "search.trials=6", "model.n_head=3,5,7", "model.n_embd=32", "dataset.path=my.txt", expect=1)
    assert len(next(path for path in in_tmp.glob("outputs/fit/*/trials.jsonl") if "heads" in path.read_text(encoding="utf-8")).read_text(encoding="utf-8").splitlines()) == 3
    assert "no setting could be trained; the reasons" in refused.stdout
    swept = typed("run_train.py", in_tmp, "-m", "experiment=fit", "objective=val_loss,val_bpb", "dataset.path=my.txt", expect=2)
    assert "objective=val_loss,val_bpb: a sweep is ranked by one objective" in swept.stderr
