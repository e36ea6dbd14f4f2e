"""run_sample.py: from a run folder to text."""

import io
import subprocess
import sys

import pytest
import torch
from conftest import make_config, tiny_model_config
from test_end_to_end import ENVIRONMENT
from test_trainer import train

from nanogpt import generate as generation
from nanogpt import writing
from nanogpt.build import build_model
from nanogpt.config import ROOT, SampleConfig, check_sample
from nanogpt.messages import ConfigError
from nanogpt.tokenizer import ByteTokenizer


def sample(folder, *overrides, expect=0):
    done = subprocess.run([sys.executable, str(ROOT / "run_sample.py"), *overrides], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, encoding="utf-8", timeout=90)
    assert done.returncode == expect, done.stderr
    return done


def test_the_command_writes_text_and_only_text(in_tmp, tiny_overrides):
    train(tiny_overrides)
    done = sample(in_tmp, "start=the king and", "num_samples=2", "max_new_tokens=40")
    one, two = done.stdout.split("-" * 40 + "\n")
    assert done.stderr == "" and one.startswith("the king and") and two.startswith("the king and")
    assert len(one) == len("the king and") + 41 and one != two
    assert sample(in_tmp, "start=the king and", "num_samples=2", "max_new_tokens=40").stdout == done.stdout


def test_characters_that_the_vocabulary_lacks_are_one_line(in_tmp, tiny_overrides):
    train(tiny_overrides)
    done = sample(in_tmp, "start=春, x", expect=2)
    assert "the vocabulary lacks ',' 'x' '春'" in done.stderr and done.stderr.count("\n") == 1


def test_generation_equals_choosing_from_the_full_forward():
    model = build_model(tiny_model_config(ngrams=[2, 3], ngram_buckets=99), 0).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    idx = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(1))
    got = torch.stack(list(generation.generate(model, idx, 11, lambda logits: logits.argmax(-1))), dim=1)
    history = idx
    with torch.no_grad():
        for _ in range(11):
            history = torch.cat((history, model(history)[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(got, history[:, 5:])


@pytest.mark.parametrize("recipe", ["rope", "learned"])
def test_beyond_the_context_the_newer_half_is_read_again(recipe):
    model = build_model(tiny_model_config(position=recipe), 0).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    idx = torch.randint(0, 11, (1, 3), generator=torch.Generator().manual_seed(1))
    got = torch.stack(list(generation.generate(model, idx, 60, lambda logits: logits.argmax(-1))), dim=1)
    history, window = idx, idx
    with torch.no_grad():
        for _ in range(60):
            if window.size(1) > 16:
                window = history[:, -8:]
            chosen = model(window)[:, -1].argmax(-1, keepdim=True)
            history, window = torch.cat((history, chosen), dim=1), torch.cat((window, chosen), dim=1)
    assert torch.equal(got, history[:, 3:])


@pytest.mark.parametrize("text", ["春天的花朵 blossoms\n开了", "a\nb\n\n", "😀\n"])
def test_streaming_never_shows_half_a_character(monkeypatch, text):
    pieces = []

    class Screen(io.StringIO):
        def write(self, piece):
            pieces.append(piece)

    monkeypatch.setattr(sys, "stdout", Screen())
    writing.stream((torch.tensor([i]) for i in ByteTokenizer().encode(text)), ByteTokenizer())
    monkeypatch.undo()
    assert "".join(pieces) == text and not any("�" in piece for piece in pieces)


@pytest.mark.parametrize(("change", "message"), [
    ({"num_samples": 0}, "num_samples=0"), ({"temperature": -1.0}, "temperature=-1.0"), ({"device": "tpu"}, "device=tpu"), ({"lang": "xx"}, "lang=xx"),
])
def test_bad_settings_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        check_sample(SampleConfig(**change))


def test_prompts_come_from_files_too(tmp_path):
    (tmp_path / "p.txt").write_text("春天\n", encoding="gb18030")
    assert writing.prompt_text(f"FILE:{tmp_path / 'p.txt'}") == "春天\n"
    with pytest.raises(ConfigError, match="start=FILE:nothing.txt"):
        writing.prompt_text("FILE:nothing.txt")


def test_mistakes_are_one_line(in_tmp):
    done = sample(in_tmp, expect=2)
    assert done.stderr.startswith("error: out_dir=") and done.stderr.count("\n") == 1
    done = sample(in_tmp, "max_new_token=3", expect=2)
    assert "did you mean max_new_tokens?" in done.stderr and "conf/sample.yaml" in done.stderr


def test_temperature_zero_is_greedy():
    logits = torch.randn(5, 11)
    assert torch.equal(generation.sample_tempered(logits, 0, torch.Generator()), logits.argmax(-1))
    assert make_config().sample_temperature > 0
