"""run_sample.py: from a run folder to text."""

import dataclasses
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import GPT2_RECIPE, make_sample_config, tiny_model_config, wild_model
from typed import ENVIRONMENT, typed

from nanogpt import create_model
from nanogpt.base.config import ROOT, FinetuneConfig, ModelConfig
from nanogpt.base.language import ConfigError
from nanogpt.base.sample_config import check_sample
from nanogpt.core.kv_cache import KVCache
from nanogpt.core.memory.lora import add_adapters, merge
from nanogpt.data.tokenizer import ByteTokenizer
from nanogpt.weights import build, checkpoint, pretrained, tensors
from nanogpt.weights.build import build_model
from nanogpt.weights.huggingface import write_folder
from nanogpt.write import loading
from nanogpt.write.speed.acceleration import accelerate


def sample(folder, *overrides, expect=0, python_path=None):
    """python run_sample.py in this process."""
    return typed("run_sample.py", folder, *overrides, expect=expect, python_path=python_path)


def test_the_command_writes_text_and_only_text(own_run):
    # fast=false：第一次编译快速解码器时 stderr 会说一声
    arguments = ["start=the king and", "num_samples=2", "max_new_tokens=40", "fast=false"]
    # 一次在自己的进程里：stderr 上没有任何库的话
    done = subprocess.run([sys.executable, str(ROOT / "run_sample.py"), *arguments], cwd=own_run, env=ENVIRONMENT, capture_output=True, text=True, encoding="utf-8", timeout=90)
    one, two = done.stdout.split("-" * 40 + "\n")
    assert re.fullmatch(r"writing with \S+: iter \d+, val loss \d+\.\d{4} \(\d\.\d{3} bpb\), tiny \(\d\.\d\dM( \+ \d\.\d\dM in look-up tables)?\)\n", done.stderr) and one.startswith("the king and") and two.startswith("the king and")
    assert len(one) == len("the king and") + 41 and one != two
    assert done.returncode == 0 and sample(own_run, *arguments).stdout == done.stdout


@pytest.mark.parametrize("precision", ["int8", "int4", "bf16"])
@pytest.mark.parametrize("name", ["modern_muon", "gpt2_adamw_labels", "lora_minimal"])
def test_weights_are_read_and_converted_piece_by_piece_and_are_those_of_the_whole_model(name, precision, monkeypatch):
    source, cpu = checkpoint.find(ROOT / "tests" / "runs" / name, "last", key="out_dir"), torch.device("cpu")
    whole = accelerate(loading.load(source, cpu)[0], precision, fast=False).state_dict()
    monkeypatch.setattr(tensors, "PIECE", 16000)
    assert name != "modern_muon" or len(list(source.readers().pieces())) > len(source.readers())
    pieces = loading.load(source, cpu, precision=precision)[0]
    assert all(not isinstance(module, torch.nn.Linear) for module in pieces.modules())
    read = accelerate(pieces, precision, fast=False).state_dict()
    assert read.keys() == whole.keys() and all(torch.equal(read[key], whole[key]) for key in whole)


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_a_folder_of_another_library_is_read_piece_by_piece_too(arch, tmp_path, monkeypatch):
    model = create_model("tiny", vocab_size=256, arch=arch, n_layer=2, n_head=2, n_embd=32, block_size=16)
    (tmp_path / "hf").mkdir()
    write_folder(tmp_path / "hf", pretrained.Pretrained(model.config, checkpoint.model_tensors(model), ByteTokenizer()))
    monkeypatch.setattr(tensors, "PIECE", 16000)
    read = []
    for folder in (tmp_path / "hf", tmp_path / "hf"):
        cfg = make_sample_config(f"init_from={folder}", "precision=int4", "device=cpu", "fast=false")
        read.append(loading.open_model(cfg, None).network.state_dict())
        monkeypatch.setattr(loading, "_filling", lambda device, precision: None)
    assert read[0].keys() == read[1].keys() and all(torch.equal(read[0][key], read[1][key]) for key in read[0])


def test_a_lora_run_with_frozen_weights_in_4_bits_is_merged_as_it_is_read():
    config = ModelConfig(n_layer=1, n_head=2, n_embd=64, block_size=8, vocab_size=11, ngrams=[])
    finetune = FinetuneConfig(method="lora", rank=2, linears=["c_attn"], frozen_weights="nf4")
    model = build_model(config, 0)
    add_adapters(model, finetune)
    torch.nn.init.normal_(model.h[0].attn.c_attn.lora_b)
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = build.merged(tensors.Readers({name: partial(stored.__getitem__, name) for name in stored}), config, finetune)
    plain = merge(model).state_dict()
    assert set(found) == set(plain) and all(torch.equal(found[name], plain[name]) for name in plain)


def test_characters_that_the_vocabulary_lacks_are_one_line(own_run):
    done = sample(own_run, "start=春, x", "fast=false", expect=2)
    assert "the vocabulary lacks ',' 'x' '春'; leave them out, pass over them with unknown=skip, or" in done.stderr and done.stderr.count("\n") == 1
    skipped = sample(own_run, "start=春", "unknown=skip", "fast=false", expect=2).stderr
    assert "the prompt '春': the vocabulary has none of its characters" in skipped and skipped.count("\n") == 1


@pytest.mark.parametrize(("change", "message"), [
    ({"num_samples": 0}, "num_samples=0"), ({"temperature": -1.0}, "temperature=-1.0"), ({"start": "a", "starts": ["b"]}, "name prompts twice"), ({"out_dir": "outputs/a", "init_from": "gpt2"}, "out_dir=outputs/a init_from=gpt2: these are two models"), ({"stop": [""]}, "stop holds"),
    ({"serve": True, "output": "a.jsonl"}, "leave out output"), ({"serve": True, "start": "a"}, "leave out start"), ({"serve": True, "num_samples": 2}, "leave out num_samples"), ({"unknown": "maybe"}, "unknown=maybe"), ({"device": "tpu"}, "device=tpu"), ({"lang": "xx"}, "lang=xx"),
])
def test_bad_settings_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        check_sample(dataclasses.replace(make_sample_config(), **change))


@pytest.mark.parametrize("changes", [{}, {"rope_scaling": "llama3", "rope_original_length": 16}], ids=str)
def test_a_longer_context_to_write_with_is_that_of_a_model_built_for_it(changes, capsys):
    model, long = wild_model(**changes), build_model(tiny_model_config(block_size=40, **changes), 0).eval()
    long.load_state_dict(model.state_dict())
    cfg = make_sample_config("block_size=40", "fast=false")
    written = loading.ready(cfg, "x", model, ByteTokenizer()).network
    idx = torch.arange(40)[None] % 11
    assert torch.equal(written(idx), long(idx)) and KVCache(written, 1).max_length == 40
    assert "block_size=40, the model's own context is 16: texts get worse" in capsys.readouterr().err
    loading.set_context(written, 12)
    assert torch.equal(written(idx[:, :12]), long(idx[:, :12])) and KVCache(written, 1).max_length == 12


def test_learned_positions_can_only_be_cut_short(capsys):
    model = wild_model(**GPT2_RECIPE)
    before = model(torch.arange(8)[None])
    with pytest.raises(ConfigError, match="block_size=17: this model has learned positions for 16 tokens"):
        loading.set_context(model, 17)
    loading.set_context(model, 8)
    assert torch.equal(model(torch.arange(8)[None]), before) and model.config.block_size == 8 and not capsys.readouterr().err


def test_prompts_come_from_files_too(tmp_path):
    (tmp_path / "p.txt").write_text("春天\n", encoding="gb18030")
    assert loading.prompt_text(f"FILE:{tmp_path / 'p.txt'}") == "春天"
    with pytest.raises(ConfigError, match="start=FILE:nothing.txt"):
        loading.prompt_text("FILE:nothing.txt")


def test_mistakes_are_one_line(in_tmp):
    done = sample(in_tmp, expect=2)
    assert done.stderr.startswith("error: out_dir=") and done.stderr.count("\n") == 1
    done = sample(in_tmp, "max_new_token=3", expect=2)
    assert "did you mean max_new_tokens?" in done.stderr and "conf/sample.yaml" in done.stderr
