"""Sampling strategies against hand-computed values, transformers' processors, and at every edge."""

import math
import sys

import pytest
import torch

from nanogpt.base.language import ConfigError
from nanogpt.core import kernels
from nanogpt.core.sampling import (
    MinP,
    NoRepeatNgram,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
    Typical,
    draw,
    sampler,
)
from nanogpt.weights.build import build_sampler

NOTHING = torch.empty(1, 0, dtype=torch.long)


def logs(*probabilities):
    """Logits (1, V) of a distribution."""
    return torch.tensor([probabilities], dtype=torch.float64).log().float()


def kept(stage, logits, tokens=NOTHING):
    """Ids that a stage leaves."""
    return stage(logits, tokens)[0].isfinite().nonzero()[:, 0].tolist()


@pytest.mark.parametrize(("k", "want"), [(1, [1]), (2, [1, 2]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (99, [0, 1, 2, 3])])
def test_top_k_keeps_exactly_k_the_lower_ids_on_ties(k, want):
    assert kept(TopK(k), logs(0.2, 0.4, 0.2, 0.2) if k != 2 else logs(0.1, 0.4, 0.4, 0.1)) == want
    assert kept(TopK(2), torch.zeros(1, 50)) == [0, 1]


@pytest.mark.parametrize(("p", "want"), [(0.0, [1]), (1e-9, [1]), (0.5, [1]), (0.51, [1, 3]), (0.8, [1, 3]), (0.81, [0, 1, 3]), (0.99, [0, 1, 2, 3]), (1.0, [0, 1, 2, 3])])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p, want):
    # 0.5 + 0.25 + 0.125 + 0.125 都能精确表示：边界不受舍入影响
    logits = logs(0.125, 0.5, 0.125, 0.25) if p not in (0.8, 0.81) else logs(0.1, 0.5, 0.1, 0.3)
    if p == 0.81:
        assert kept(TopP(p), logits) == [0, 1, 3]
    elif p == 0.8:
        assert kept(TopP(0.79), logits) == want
    else:
        assert kept(TopP(p), logits) == want


@pytest.mark.parametrize("stage", [TopP(0.05), TopP(0.9), TopP(0.999), Typical(0.2), Typical(0.95)])
def test_a_large_vocabulary_is_put_in_order_only_as_far_as_needed_and_the_same_ids_are_kept(stage, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    peaked = 5 * torch.randn(3, 9000, generator=generator)
    few = torch.full((1, 9000), -torch.inf).index_fill_(1, torch.arange(0, 9000, 300), 1.0)
    logits = torch.cat((peaked, peaked[:1].round(), peaked[:1] / 50, torch.zeros(1, 9000), few, torch.full((1, 9000), torch.nan)))
    found = stage(logits, None)
    monkeypatch.setattr(kernels, "LARGE", 9000)
    assert torch.equal(found.isneginf(), stage(logits, None).isneginf())


@pytest.mark.parametrize("k", [1, 3, 4, 5, 7])
def test_top_k_keeps_exactly_k_with_and_without_ties_at_its_border(k):
    logits = torch.tensor([[5.0, 1.0, 4.0, 1.0, 3.0, 1.0, 0.0], [7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]])
    found = TopK(k)(logits, NOTHING).isfinite()
    expected = torch.zeros_like(found).scatter_(1, logits.argsort(dim=-1, descending=True, stable=True)[:, :k], True)
    assert torch.equal(found, expected)


def test_top_p_settles_ties_for_the_lower_id():
    assert kept(TopP(0.5), torch.zeros(1, 4)) == [0, 1]
    assert kept(TopP(0.6), torch.zeros(1, 5)) == [0, 1, 2]


@pytest.mark.parametrize(("min_p", "want"), [(0.05, [0, 1, 2]), (0.2, [0, 1]), (0.5, [0, 1]), (0.51, [0]), (1.0, [0])])
def test_min_p_keeps_what_is_likely_relative_to_the_best(min_p, want):
    logits = torch.tensor([[2.0, 2.0 + math.log(0.5), 2.0 + math.log(0.1), -5.0]])
    if min_p == 0.5:
        logits[0, 1] += 1e-6
    assert kept(MinP(min_p), logits) == want


def test_typical_keeps_what_is_as_surprising_as_the_average():
    # 熵 = 1.5 bit：0.25 的惊讶 2 bit，0.5 的 1 bit，距离都是 0.5 bit；按 id 次序补
    logits = logs(0.5, 0.25, 0.25)
    assert kept(Typical(0.4), logits) == [0] and kept(Typical(0.6), logits) == [0, 1] and kept(Typical(1e-9), logits) == [0]
    # 一个字占 0.9 时，典型的就是它自己
    assert kept(Typical(0.5), logs(0.9, 0.05, 0.05)) == [0]
    # 均匀的四个加一个略高的：熵靠近那四个，最可能的反而排在后面
    assert 0 not in kept(Typical(0.3), logs(0.4, 0.15, 0.15, 0.15, 0.15))


def test_temperature_divides_and_towards_zero_is_greedy():
    logits = torch.tensor([[1.0, 3.0, 3.0, -2.0]])
    torch.testing.assert_close(Temperature(0.5)(logits, NOTHING).softmax(-1), (logits / 0.5).softmax(-1))
    assert kept(Temperature(0), logits) == [1]
    for tiny in (1e-3, 1e-20):
        probabilities = Temperature(tiny)(logits, NOTHING).softmax(-1)
        assert probabilities.isfinite().all() and probabilities[0, 1] == probabilities[0, 2] == 0.5
    # 小到 float32 装不下的就是 0
    assert kept(Temperature(1e-40), logits) == kept(Temperature(5e-324), logits) == [1]


def test_repetition_penalty_pulls_known_ids_towards_zero_once():
    logits, tokens = torch.tensor([[2.0, -1.0, 3.0, 0.5]]), torch.tensor([[-1, 0, 1, 0]])
    assert RepetitionPenalty(2.0)(logits, tokens).tolist() == [[1.0, -2.0, 3.0, 0.5]]


@pytest.mark.parametrize(("n", "tokens", "banned"), [
    (1, [4, 2, 4], [2, 4]), (2, [1, 2, 3, 1], [2]), (2, [1, 2, 1, 3, 1], [2, 3]), (3, [1, 2, 3, 0, 1, 2], [3]), (3, [1, 2], []), (3, [-1, -1, 1, 2, 1, 2], [1]),
    (2, [-1, -1, 5], []), (4, [0, 0], []),
])
def test_no_ngram_is_completed_a_second_time(n, tokens, banned):
    left = kept(NoRepeatNgram(n), torch.zeros(1, 6), torch.tensor([tokens]))
    assert sorted(set(range(6)) - set(left)) == banned


def test_a_ban_of_everything_is_lifted():
    assert kept(NoRepeatNgram(1), torch.zeros(1, 3), torch.tensor([[0, 1, 2]])) == [0, 1, 2]


@pytest.mark.parametrize("seed", range(5))
def test_every_strategy_equals_transformers(seed):
    from transformers import generation as hf

    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 200, generator=generator) * 3
    tokens = torch.randint(0, 200, (4, 60), generator=generator) % 13
    pairs = [
        (RepetitionPenalty(1.3), hf.RepetitionPenaltyLogitsProcessor(1.3)), (NoRepeatNgram(2), hf.NoRepeatNGramLogitsProcessor(2)),
        (Temperature(0.7), hf.TemperatureLogitsWarper(0.7)), (TopK(17), hf.TopKLogitsWarper(17)), (TopP(0.8), hf.TopPLogitsWarper(0.8)),
        (MinP(0.07), hf.MinPLogitsWarper(0.07)), (Typical(0.7), hf.TypicalLogitsWarper(0.7)),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours(logits, tokens).softmax(-1), theirs(tokens, logits.clone()).softmax(-1))
    chain = sampler(temperature=0.7, top_k=17, top_p=0.8, min_p=0.07, typical=0.7, repetition_penalty=1.3, no_repeat_ngram=2)
    expected = logits
    for _, theirs in pairs:
        expected = theirs(tokens, expected.clone())
    torch.testing.assert_close(chain(logits, tokens).softmax(-1), expected.softmax(-1))


def test_switched_off_strategies_change_nothing():
    logits = torch.randn(2, 30)
    assert sampler().stages == () and torch.equal(sampler()(logits, NOTHING), logits)
    assert torch.equal(sampler(top_k=30, top_p=1.0)(logits, NOTHING), logits)
    assert len(sampler(temperature=0.0, top_k=3, top_p=0.5, min_p=0.1, typical=0.3).stages) == 1


def test_draws_follow_the_distribution():
    probabilities, n = torch.tensor([0.5, 0.2, 0.0, 0.3]), 40000
    uniforms = torch.rand(n, generator=torch.Generator().manual_seed(0))
    counts = draw(probabilities.log().expand(n, -1), uniforms).bincount(minlength=4) / n
    # 五个标准差
    assert (counts - probabilities).abs().max() < 5 * math.sqrt(0.25 / n) and counts[2] == 0


@pytest.mark.parametrize("size", [65, 4096, 4097, 4352, 50257])
def test_a_draw_is_where_the_sum_of_the_probabilities_passes_the_uniform_number(size):
    """Of small vocabularies and of large ones, which are drawn part by part; what has no probability is never drawn."""
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(500, size, generator=generator).mul_(3).masked_fill_(torch.rand(500, size, generator=generator) < 0.7, -torch.inf)
    logits[:, -1] = 0.0
    uniforms = torch.rand(500, generator=generator)
    uniforms[:3], uniforms[3:6] = 0.0, 1 - 2**-24
    drawn, sums = draw(logits, uniforms), torch.softmax(logits, -1).double().cumsum(-1)
    target = uniforms.double() * sums[:, -1]
    below, above = (sums.gather(-1, (drawn + back).clamp(min=0)[:, None])[:, 0] for back in (-1, 0))
    assert logits.gather(-1, drawn[:, None]).isfinite().all()
    assert ((below * (drawn > 0) - 1e-6 <= target) & (target <= above + 1e-6)).all()
    assert torch.equal(draw(logits[7:9], uniforms[7:9]), drawn[7:9])


def test_a_draw_never_takes_what_was_masked_even_at_the_ends():
    logits = torch.full((3, 5), -torch.inf)
    logits[:, 2] = -700.0
    assert draw(logits, torch.tensor([0.0, 0.5, 1 - 2**-24])).tolist() == [2, 2, 2]
    two = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    assert draw(two, torch.tensor([0.0])).item() == 1 and draw(two, torch.tensor([1 - 2**-24])).item() == 3
    assert draw(torch.randn(1, 50257), torch.tensor([1 - 2**-24])).item() < 50257


@pytest.mark.parametrize(("settings", "message"), [
    ({"top_p": 1.5}, "sampler.top_p=1.5 is out of range; it must be 0 … 1"), ({"top_k": -1}, "sampler.top_k=-1"), ({"temperature": -0.1}, "sampler.temperature=-0.1"),
    ({"min_p": float("nan")}, "sampler.min_p=nan"), ({"top_k": 2.5}, "sampler.top_k=2.5 has the wrong type: int"), ({"repetition_penalty": 0.0}, "sampler.repetition_penalty"),
    ({"typical": "x"}, "sampler.typical=x has the wrong type"), ({"topp": 0.5}, "topp"),
])
def test_wrong_settings_are_one_line(settings, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.").replace("…", ".")) as error:
        build_sampler({"_target_": "nanogpt.core.sampling.sampler", **settings})
    assert "\n" not in str(error.value)


OWN = '''
from dataclasses import dataclass
import torch

def every_other(logits, *, offset=0):
    return logits.index_fill(-1, torch.arange(offset, logits.size(-1), 2), -torch.inf)

def not_the_last(logits, tokens):
    return logits.scatter(-1, tokens[:, -1:], -torch.inf)

@dataclass(frozen=True)
class Only:
    id: int
    def __call__(self, logits):
        return torch.full_like(logits, -torch.inf).index_fill(-1, torch.tensor([self.id]), 0.0)
'''


def test_a_sampler_of_ones_own_is_a_function_or_a_class(tmp_path, monkeypatch):
    (tmp_path / "own_sampler.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    logits, tokens = torch.zeros(1, 6), torch.tensor([[3, 5]])
    assert kept(build_sampler({"_target_": "own_sampler.every_other", "offset": 1}), logits, tokens) == [0, 2, 4]
    last = build_sampler({"_target_": "own_sampler.not_the_last"})
    assert last.reads_tokens and kept(last, logits, tokens) == [0, 1, 2, 3, 4]
    assert kept(build_sampler({"_target_": "own_sampler.Only", "id": 4}), logits, tokens) == [4]
    for wrong in ({"_target_": "own_sampler.every_other", "ofset": 1}, {"_target_": "own_sampler.Only"}, {"_target_": "own_sampler.nothing"}, {"_target_": "no.module"}):
        with pytest.raises(ConfigError, match="sampler"):
            build_sampler(wrong)
    sys.modules.pop("own_sampler", None)


def test_what_a_sampler_of_ones_own_must_not_return_is_named(tmp_path, monkeypatch):
    (tmp_path / "odd_sampler.py").write_text("""
def made(logits, tokens=None, *, how: str):
    assert tokens is not None
    return eval(how)
""", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    tokens = torch.tensor([[3, 5], [1, 2]])
    for how in ("None", "logits.numpy()", "logits[:, :4]", "logits[0]", "logits.argmax(-1)", "logits * float('nan')",
                "logits.fill_(-float('inf'))", "logits.index_fill(-1, tokens[0], float('inf'))", "logits.long()"):
        own = build_sampler({"_target_": "odd_sampler.made", "how": how})
        with pytest.raises(ConfigError, match=r"sampler: odd_sampler.made must return logits of the shape \[2, 6\]"):
            own.stages[0](torch.zeros(2, 6), tokens)
    # 模型自己算坏的行，不怪采样器
    own = build_sampler({"_target_": "odd_sampler.made", "how": "logits / 2"})
    assert own.reads_tokens and own.stages[0](torch.tensor([[float("nan"), 1.0], [0.0, 2.0]]), tokens)[1].tolist() == [0.0, 1.0]
    with pytest.raises(ConfigError, match=r"sampler.how"):
        build_sampler({"_target_": "odd_sampler.made", "how": 3})
    sys.modules.pop("odd_sampler", None)
