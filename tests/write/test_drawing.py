"""What is drawn by the compiled sampling is what core/sampling.py draws."""

import pytest
import torch
from conftest import tiny_model_config

from nanogpt.core.generate import Decoder
from nanogpt.core.sampling import Sampler, Temperature, TopK, TopP, draw, sampler
from nanogpt.weights.build import build_model
from nanogpt.write.speed.acceleration import accelerate

drawing = pytest.importorskip("nanogpt.write.speed.drawing")

NONE = torch.tensor([[-1]])
SETTINGS = (
    {}, {"temperature": 0.0}, {"temperature": 0.7}, {"temperature": 1e-38}, {"top_k": 1}, {"top_k": 5}, {"top_k": 1000},
    {"top_p": 0.9}, {"top_p": 1e-6}, {"top_p": 0.999999, "temperature": 1.3}, {"min_p": 0.1}, {"min_p": 1.0},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.01}, {"top_k": 3, "top_p": 0.5, "temperature": 2.0},
    {"repetition_penalty": 1.3}, {"repetition_penalty": 0.5, "temperature": 0.0},
    {"repetition_penalty": 1.1, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
)


def plain(logits, settings, tokens, uniforms):
    return draw(sampler(**settings)(logits, tokens), uniforms)


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
        got = drawing.draw(drawing.Crew(2), logits, None, [sampler(**settings)] * 16, tokens, uniforms)
        assert torch.equal(got, plain(logits, settings, tokens, uniforms)), settings


@pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 0.7}])
def test_what_is_kept_at_a_border_of_equals_are_the_lower_ids(settings):
    # 四个并列的大数：3 个与七成都只到 id 2 为止
    logits = torch.tensor([[1.0, 1.0, 1.0, -9.0, 1.0, -9.0, -9.0, -9.0]]).repeat(400, 1)
    uniforms = torch.arange(400) / 400
    drawn = drawing.draw(drawing.Crew(1), logits, None, [sampler(**settings)] * 400, NONE.expand(400, 1), uniforms)
    assert set(drawn.tolist()) == {0, 1, 2} and drawn.bincount().tolist()[:2] == [134, 133]


def test_rows_have_samplers_of_their_own_and_some_ids_are_never_drawn():
    torch.manual_seed(0)
    # 词表补齐过的：行与行之间隔着别的数
    logits, uniforms, never = torch.randn(len(SETTINGS), 40)[:, :30], torch.rand(len(SETTINGS)), torch.tensor([3, 17])
    logits[:, 3], tokens = 50, torch.randint(30, (len(SETTINGS), 9))
    got = drawing.draw(drawing.Crew(2), logits, never, [sampler(**one) for one in SETTINGS], tokens, uniforms)
    allowed = logits.index_fill(1, never, -torch.inf)
    rows = zip(allowed[:, None], SETTINGS, tokens[:, None], uniforms[:, None])
    assert got.tolist() == [int(plain(*row)) for row in rows]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_k": 2}])
def test_logits_that_are_not_finite_are_told_not_drawn(bad, settings):
    logits = torch.randn(3, 20)
    logits[1, 7] = bad
    got = drawing.draw(drawing.Crew(1), logits, None, [sampler(**settings)] * 3, NONE.expand(3, 1), torch.rand(3))
    assert got[1] == -1 and (got[[0, 2]] >= 0).all()


class Never7:
    def __call__(self, logits, tokens):
        return logits.index_fill(1, torch.tensor([7]), -torch.inf)


@pytest.mark.parametrize(
    "one",
    [sampler(typical=0.5), sampler(no_repeat_ngram=2), Sampler((Never7(),)),
     Sampler((TopP(0.5), TopK(3))), Sampler((Temperature(0.5), Temperature(2.0)))],
)
def test_what_it_does_not_know_is_left_to_the_plain_way(one):
    assert drawing.draw(drawing.Crew(1), torch.randn(2, 20), None, [sampler(), one], NONE.expand(2, 1), torch.rand(2)) is None
    model = accelerate(build_model(tiny_model_config(n_embd=16), 0).eval(), "fp32")
    texts = []
    for fast in (True, False):
        decoder = Decoder(model, capacity=2)
        if not fast:
            decoder._fast_draw = None
        for key, own in enumerate((sampler(top_k=5), one)):
            decoder.add(key, [1, 2, 3], own, seed=key)
        texts.append([decoder.step().tolist() for _ in range(20)])
    assert texts[0] == texts[1]

