"""One-shot and batch writing: order, files of prompts, jsonl records, every precision, pretrained weights."""

import ast
import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_sample_config
from test_loading import sample
from test_pretrained import bpe_json, hf_folder  # noqa: F401 - bpe_json is a fixture
from typed import ENVIRONMENT

from nanogpt.base import language
from nanogpt.base.config import ROOT
from nanogpt.base.console import Console
from nanogpt.base.language import ConfigError
from nanogpt.weights import pretrained
from nanogpt.write import loading, samples
from nanogpt.write.request import Piece, Request, Result


def finished(key, text):
    return Piece(key, "p", text, Result(None, text, "length", 1, 1, 0.1, 0.2))


@pytest.fixture
def run(own_run):
    """A short run of ours, out_dir=latest."""
    return own_run


def written(capsys, *overrides):
    """stdout of run_sample.py for these overrides, in this process; what is not about speed goes the plain way."""
    overrides = overrides if any(o.startswith("fast=") for o in overrides) else (*overrides, "fast=false")
    cfg = make_sample_config("device=cpu", *overrides)
    samples.write_samples(cfg, loading.open_model(cfg, None if cfg.init_from else loading.Path("outputs/run")))
    return capsys.readouterr().out


def test_pieces_are_shown_text_after_text_and_as_early_as_possible():
    pieces = [Piece(1, "p", "b1"), Piece(0, "p", "a1"), Piece(1, "p", "b2"), finished(0, "a2"), finished(2, "c"), finished(1, "b3")]
    consumed = []

    def watched():
        for piece in pieces:
            consumed.append(piece.text)
            yield piece

    shown = [(piece.text, len(consumed)) for piece in samples.in_order(watched(), 3)]
    assert [text for text, _ in shown] == ["a1", "a2", "b1", "b2", "b3", "c"]
    assert shown[0] == ("a1", 2) and shown[3] == ("b2", 4)


def test_a_file_of_prompts_equals_one_by_one_under_greedy_decoding(run, capsys):
    prompts = ["the king", "t", "queen of love and words", "no more"]
    (run / "p.txt").write_text("\n\n".join(prompts) + "\n", encoding="utf-8")
    together = written(capsys, "prompts=p.txt", "sampler=greedy", "max_new_tokens=30", "batch_size=3")
    alone = [written(capsys, f"start='{prompt}'", "sampler=greedy", "max_new_tokens=30") for prompt in prompts]
    assert together == (samples.SEPARATOR + "\n").join(alone)
    (run / "p.jsonl").write_text("".join(json.dumps(p if i % 2 else {"prompt": p, "id": i}) + "\n" for i, p in enumerate(prompts)), encoding="utf-8")
    assert written(capsys, "prompts=p.jsonl", "sampler=greedy", "max_new_tokens=30") == together
    listed = "starts=[" + ",".join(f"'{p}'" for p in prompts) + "]"
    assert written(capsys, listed, "sampler=greedy", "max_new_tokens=30", "batch_size=1") == together


@pytest.mark.parametrize(("name", "content", "message"), [
    ("p.txt", "\n \n", "holds no prompt"), ("p.jsonl", '"a"\n{"text": 1}\n', "line 2"), ("p.jsonl", "{\n", "line 1"), ("q.txt", None, "prompts=q.txt"),
])
def test_bad_files_of_prompts_are_one_line(in_tmp, name, content, message):
    if content is not None:
        (in_tmp / name).write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        loading.prompts_of_file(loading.Path(name))


def test_texts_are_recorded_and_earlier_records_stay(run, capsys):
    for seed in (5, 9):
        shown = written(capsys, "start=the", "num_samples=2", "max_new_tokens=12", f"seed={seed}", "output=out/s.jsonl", "sampler=top_p", "sampler.top_p=0.7")
    records = [json.loads(line) for line in (run / "out/s.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sorted(r["seed"] for r in records) == [5, 6, 9, 10] and all(r["prompt"] == "the" and len(r["text"]) == 12 for r in records)
    assert shown == (samples.SEPARATOR + "\n").join("the" + r["text"] + "\n" for r in sorted(records, key=lambda r: r["seed"]) if r["seed"] > 6)
    assert records[0]["settings"]["sampler"]["top_p"] == 0.7 and records[0]["tokens"] == 12 and records[0]["seconds"] > 0
    assert "ckpt" in records[0]["model"] or "iter_" in records[0]["model"]


def test_an_output_that_cannot_be_written_is_told_before_the_writing(in_tmp):
    (in_tmp / "folder").mkdir()
    with pytest.raises(ConfigError, match="output=folder cannot be written"):
        samples.Records("folder", "model")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_text_whose_record_finds_no_room_is_shown_before_the_mistake(run, capsys):
    with pytest.raises(ConfigError, match="output=/dev/full cannot be written .No space left on device"):
        written(capsys, "start=the", "max_new_tokens=12", "output=/dev/full")
    shown = capsys.readouterr().out
    assert shown.startswith("the") and len(shown) == 16 and shown.endswith("\n")


def test_a_wrong_prompt_among_many_is_told_before_the_first_is_written(run, capsys):
    with pytest.raises(ConfigError, match="lacks 'Z'"):
        written(capsys, "starts=[the,kZng]")
    assert capsys.readouterr().out == ""
    assert written(capsys, "start=kZng", "unknown=skip", "sampler=greedy").replace("kZng", "kng") == written(capsys, "start=kng", "sampler=greedy")


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4", "bf16", "fp16"])
def test_every_precision_writes(run, capsys, precision):
    text = written(capsys, f"precision={precision}", "start=the", "max_new_tokens=20", "sampler=top_k")
    assert text.startswith("the") and len(text) == 24


def test_fast_and_plain_write_the_same(run, capsys):
    options = ("start=the", "max_new_tokens=60", "sampler=min_p", "num_samples=2")
    assert written(capsys, *options, "fast=true") == written(capsys, *options, "fast=false")


def test_a_sampler_of_ones_own_is_chosen_on_the_command_line(run):
    (run / "vowels.py").write_text(
        "def only(logits, *, ids):\n    keep = logits.new_full(logits.shape, -float('inf'))\n    keep[:, ids] = logits[:, ids]\n    return keep\n", encoding="utf-8"
    )
    (run / "conf/sampler").mkdir(parents=True)
    (run / "conf/sampler/vowels.yaml").write_text("_target_: vowels.only\nids: [0, 2]\n", encoding="utf-8")
    done = sample(run, f"--config-dir={run / 'conf'}", "sampler=vowels", "start=the", "max_new_tokens=30", "fast=false", python_path=str(run))
    assert len(set(done.stdout[3:-1])) == 2
    assert "sampler" in sample(run, f"--config-dir={run / 'conf'}", "sampler=vowels", "+sampler.idd=3", expect=2, python_path=str(run)).stderr


def test_pretrained_weights_write_too(tmp_path, bpe_json, capsys, monkeypatch):  # noqa: F811
    hf_folder(tmp_path / "hf", bpe_json)
    monkeypatch.chdir(tmp_path)
    text = written(capsys, "init_from=hf", "start=ab", "max_new_tokens=10", "sampler=greedy")
    opened = pretrained.open_pretrained("hf")
    ids = opened.tokenizer.encode("ab").tolist()
    model = pretrained.build_pretrained(opened).eval()
    with torch.no_grad():
        for _ in range(10):
            ids.append(int(model(torch.tensor([ids]))[0, -1, : opened.tokenizer.vocab_size].argmax()))
    expected = opened.tokenizer.decode(ids)
    assert text in (expected + "\n", expected.split("<|endoftext|>")[0] + "\n")


@pytest.mark.skipif(sys.platform == "win32", reason="pipes end otherwise there")
def test_a_reader_that_leaves_early_is_no_error(run):
    command = [sys.executable, str(ROOT / "run_sample.py"), "start=the", "max_new_tokens=5000", "fast=false"]
    writing = subprocess.Popen(command, cwd=run, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert writing.stdout.read(3) == b"the"
    writing.stdout.close()
    assert writing.stderr.read().startswith(b"writing with ") and writing.wait(timeout=60) == 141


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


STRANGE = "春\x1b]0;owned\x07\x9b31m\u202e\r👨\u200d👩\n\tend"
VISIBLE = "春\\x1b]0;owned\\x07\\x9b31m\\u202e\\r👨\u200d👩\n\tend"


@pytest.mark.parametrize(("stream", "wanted"), [(Terminal, VISIBLE), (io.StringIO, STRANGE)])
def test_what_would_command_a_terminal_is_shown_visibly_there_and_goes_into_a_pipe_as_it_is(monkeypatch, stream, wanted):
    def printed(name, say):
        monkeypatch.setattr(sys, name, stream())
        say()
        return getattr(sys, name).getvalue()

    piece = dataclasses.replace(finished(0, STRANGE), prompt=STRANGE)
    assert printed("stdout", lambda: samples._print(iter([piece]), 1)) == wanted * 2 + "\n"
    assert printed("stderr", lambda: language.say(
        "starting from the weights of {named}",
        named=STRANGE,
    )) == language.text(
        "starting from the weights of {named}",
        named=wanted,
    ) + "\n"
    line = printed("stdout", lambda: Console().line("starting from the weights of {named}", named=STRANGE))
    # rich 把制表符展开成空格
    assert line == (language.text(
        "starting from the weights of {named}",
        named=wanted,
    ).expandtabs(8) if stream is Terminal else language.text(
        "starting from the weights of {named}",
        named=wanted,
    )) + "\n"


def test_nothing_is_printed_past_the_one_function_that_watches_for_escape_sequences():
    for path in (ROOT / "nanogpt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write"):
                assert path.name == "language.py" and "shown(written, file)" in ast.unparse(node), f"{path}:{node.lineno}"


def test_settings_become_requests():
    settings = loading.Settings.of(make_sample_config("stop=['x','\\n\\n']", "seed=3", "max_new_tokens=7"))
    request = settings.request("p", 2)
    assert isinstance(request, Request) and (request.seed, request.stop, request.max_new_tokens) == (5, ("x", "\n\n"), 7)
    assert json.dumps(dataclasses.asdict(settings)) and (ROOT / "conf" / "sampler" / "temperature.yaml").is_file()


def test_texts_that_are_printed_on_a_terminal_are_not_cut_by_a_bar(run, monkeypatch, capsys):
    plain = written(capsys, "starts=[the,king]", "max_new_tokens=12")
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Terminal())
    cfg = make_sample_config("starts=[the,king]", "max_new_tokens=12")
    samples.write_samples(cfg, loading.open_model(cfg, loading.Path("outputs/run")))
    # 进度条接管 stdout 时，每印一段就换一行
    assert sys.stdout.getvalue() == plain and "0/2" not in sys.stderr.getvalue()


def test_a_temperature_that_the_sampler_does_not_read_is_refused(run):
    for typed in (["sampler=greedy", "temperature=0.7"], ["temperature=0.3", "sampler=greedy"]):
        with pytest.raises(ConfigError, match=r"temperature=0\.[37] has no effect with sampler=greedy"):
            loading.open_model(make_sample_config(*typed), loading.Path("outputs/run"), typed)
    typed = ["sampler=top_p", "temperature=0.3"]
    assert loading.open_model(make_sample_config(*typed), loading.Path("outputs/run"), typed)


def test_a_folder_is_no_file_of_prompts(run):
    for typed in ("prompts=outputs", "start=FILE:outputs"):
        with pytest.raises(ConfigError, match="outputs is no file to read a text from"):
            make_sample_config(typed)
