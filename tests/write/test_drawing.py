"""What is drawn by the compiled sampling is what core/lanes.draw_each() draws."""

from dataclasses import dataclass

import pytest
import torch
from conftest import kernels, tiny_model_config

from nanogpt.core.generate import Decoder
from nanogpt.core.lanes import draw_each
from nanogpt.core.sampling import Sampler, Temperature, TopK, TopP, sampler
from nanogpt.weights.build import build_model
from nanogpt.write.speed.acceleration import accelerate

compiled, drawing = kernels("nanogpt.core.loops.compiled"), kernels("nanogpt.write.speed.drawing")

SETTINGS = (
    {}, {"temperature": 0.0}, {"temperature": 0.7}, {"temperature": 1e-38}, {"top_k": 1}, {"top_k": 5}, {"top_k": 10**400},
    {"top_p": 0.9}, {"top_p": 1e-6}, {"top_p": 0.999999, "temperature": 1.3}, {"min_p": 0.1}, {"min_p": 1.0},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.01}, {"top_k": 3, "top_p": 0.5, "temperature": 2.0},
    {"repetition_penalty": 1.3}, {"repetition_penalty": 0.5, "temperature": 0.0},
    {"repetition_penalty": 1.1, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
)


def both(samplers, logits, tokens, uniforms, allowed=None):
    """What either way draws."""
    given = samplers, logits, logits if allowed is None else allowed, tokens, uniforms
    return drawing.draw(compiled.crew_of(2), *given).tolist(), draw_each(*given).tolist()


@pytest.mark.parametrize("size", [1, 7, 300, 5000])
@pytest.mark.parametrize("ties", [False, True])
def test_every_strategy_draws_what_the_plain_one_draws(size, ties):
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(16, size, generator=generator) * 4
    # 只有几种值：界线总落在并列的数上
    logits = logits.round() if ties else logits
    uniforms = torch.rand(16, generator=generator)
    uniforms[0], uniforms[1] = 0.0, 1 - 2**-24
    # 有的行短，有的 id 出现几次
    tokens = torch.randint(-1, min(size, 40), (16, 30), generator=generator)
    for settings in SETTINGS:
        got, wanted = both([sampler(**settings)] * 16, logits, tokens, uniforms)
        assert got == wanted, settings


@pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 0.7}])
def test_what_is_kept_at_a_border_of_equals_are_the_lower_ids(settings):
    # 四个并列的大数：3 个与七成都只到 id 2 为止
    logits = torch.tensor([[1.0, 1.0, 1.0, -9.0, 1.0, -9.0, -9.0, -9.0]]).repeat(400, 1)
    drawn, _ = both([sampler(**settings)] * 400, logits, torch.full((400, 1), -1), torch.arange(400) / 400)
    assert [drawn.count(i) for i in range(8)] == [134, 133, 133, 0, 0, 0, 0, 0]


def test_the_highest_uniform_number_draws_no_id_that_is_next_to_impossible():
    logits = torch.randn(200, 100, generator=torch.Generator().manual_seed(0))
    drawn, _ = both([sampler(temperature=0.2)] * 200, logits, torch.full((200, 1), -1), torch.full((200,), 1 - 2**-24))
    # 从它起的概率，合计该有 2^-24
    rest = (logits.double() / 0.2).softmax(-1).flip(-1).cumsum(-1).flip(-1)[range(200), drawn]
    assert (rest > 2**-26).all()


@dataclass
class Never7:
    """A stage of one's own, no key of a dictionary, that writes into what it is given."""

    id: int = 7

    def __call__(self, logits, tokens):
        logits[:, self.id] = -torch.inf
        return logits


UNKNOWN = (
    sampler(typical=0.5), sampler(no_repeat_ngram=2), Sampler((Never7(),)), Sampler((TopP(0.5), TopK(3))),
    Sampler((Temperature(0.5), Temperature(2.0))),
)


def test_rows_have_samplers_of_their_own_and_some_ids_are_never_drawn():
    torch.manual_seed(0)
    samplers = [*(sampler(**one) for one in SETTINGS), *UNKNOWN, sampler()]
    # 词表补齐过的：行与行之间隔着别的数
    logits, uniforms, tokens = torch.randn(len(samplers), 40)[:, :30], torch.rand(len(samplers)), torch.randint(30, (len(samplers), 9))
    logits[:, 3] = 50
    allowed = logits.index_fill(1, torch.tensor([3, 17]), -torch.inf)
    got, _ = both(samplers, logits, tokens, uniforms, allowed)
    # 一行怎么抽，与旁边是谁无关
    for row, one in enumerate(samplers):
        at = slice(row, row + 1)
        alone = both([one], logits[at], tokens[at], uniforms[at], allowed[at].clone())
        assert [got[row]] == alone[0] and got[row] not in (3, 17), one
        assert alone[0] == alone[1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_k": 2}])
def test_logits_that_are_not_finite_are_told_not_drawn(bad, settings):
    logits = torch.randn(3, 20)
    logits[1, 7] = bad
    got, wanted = both([sampler(**settings)] * 3, logits, torch.full((3, 1), -1), torch.rand(3))
    assert got[1] == -1 == wanted[1] and min(got[0], got[2]) >= 0


@pytest.mark.parametrize("one", UNKNOWN)
def test_a_sampler_of_ones_own_writes_as_it_did(one):
    model, texts = accelerate(build_model(tiny_model_config(n_embd=16), 0).eval(), "fp32"), []
    for draw in (model.fast_step.draw, draw_each):
        decoder = Decoder(model, capacity=2)
        decoder.draw = draw
        for key, own in enumerate((sampler(top_k=5), one)):
            decoder.add(key, [1, 2, 3], own, seed=key)
        texts.append([decoder.step().tolist() for _ in range(20)])
    assert texts[0] == texts[1] and min(map(min, texts[0])) >= 0
