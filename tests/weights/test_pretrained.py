"""Weights from elsewhere: logits equal to transformers', vocabularies the same, damaged and hostile files refused in one line."""

import hashlib
import http.server
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import urllib.parse
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    GPT2_RECIPE,
    make_config,
    make_sample_config,
    no_grad_eval,
    resumed_trainer,
    tiny_model_config,
    train,
)
from safetensors.torch import load_file, save_file

import nanogpt
from nanogpt.base.config import ROOT
from nanogpt.base.language import ConfigError
from nanogpt.core.sampling import Sampler
from nanogpt.data import assets
from nanogpt.data import tokenizer as tokenizers
from nanogpt.data.labels import with_labels
from nanogpt.data.tokenizer import begin_of, ends_of
from nanogpt.data.tokenizer_files import byte_level_bpe, read_tokenizer
from nanogpt.plan.filled_config import filled
from nanogpt.weights import foreign_files, nanogpt_checkpoint
from nanogpt.weights.build import build_model, parameters_at_least
from nanogpt.weights.export import export
from nanogpt.weights.peft import base_named
from nanogpt.weights.pretrained import build_pretrained, check_vocabulary, open_pretrained, read_config
from nanogpt.write.engine import Writer
from nanogpt.write.loading import open_model
from nanogpt.write.request import Request
from nanogpt.write.samples import write_samples

transformers = pytest.importorskip("transformers")
library = pytest.importorskip("tokenizers")
LINES = ["To be, or not to be: that is the question.", "  Whether 'tis nobler\n\nin the mind", "春江潮水连海平 😀", "don't I'll 12345", ""]


@pytest.fixture(scope="session")
def bpe_json(tmp_path_factory):
    """A byte-level BPE of 300 tokens, trained by the tokenizers library, as its json file."""
    trained = library.ByteLevelBPETokenizer()
    trained.train_from_iterator(LINES * 5, vocab_size=300, special_tokens=[], min_frequency=1, show_progress=False)
    trained.add_special_tokens(["<|endoftext|>"])
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    trained.save(str(path))
    return path


def hf_folder(folder, bpe_json, *, vocab_size=301, **settings):
    """A random tiny GPT2LMHeadModel saved by save_pretrained; (folder, the model)."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=vocab_size, n_positions=32, n_embd=48, n_layer=3, n_head=4, bos_token_id=None, eos_token_id=None, **settings
    )
    reference = transformers.GPT2LMHeadModel(config).eval()
    for p in reference.parameters():
        torch.nn.init.normal_(p, std=0.2)
    reference.save_pretrained(folder)
    shutil.copyfile(bpe_json, folder / "tokenizer.json")
    return folder, reference


@pytest.fixture
def folder(tmp_path, bpe_json):
    return hf_folder(tmp_path / "tiny-gpt2", bpe_json)[0]


def ids(vocab_size, length=32):
    return torch.randint(0, vocab_size, (2, length), generator=torch.Generator().manual_seed(1))


def same_logits(reference, pretrained):
    idx = ids(pretrained.config.vocab_size)
    with no_grad_eval(build_pretrained(pretrained)) as model:
        torch.testing.assert_close(model(idx), reference(idx).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings", [
    {}, {"tie_word_embeddings": False}, {"vocab_size": 320}, {"n_inner": 96, "activation_function": "gelu"}, {"activation_function": "relu2"},
], ids=str)
def test_logits_equal_those_of_transformers(tmp_path, bpe_json, settings):
    folder, reference = hf_folder(tmp_path / "m", bpe_json, **settings)
    same_logits(reference, open_pretrained(str(folder)))


# ---- Llama、Qwen：各家真的 config.json，层数、宽度与词表缩小，比例与开关照旧 ----

SHARED = {"hidden_act": "silu", "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True, "torch_dtype": "bfloat16"}
QWEN = {**SHARED, "sliding_window": None, "use_sliding_window": False, "max_window_layers": 28, "rms_norm_eps": 1e-6, "rope_theta": 1000000}
LLAMA3 = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}
FAMILIES = {
    "SmolLM2-135M": {
        **SHARED, "model_type": "llama", "hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 192, "rms_norm_eps": 1e-5,
        "rope_theta": 100000, "rope_scaling": None, "rope_interleaved": False, "tie_word_embeddings": True, "max_position_embeddings": 8192,
        "attention_bias": False, "mlp_bias": False, "is_llama_config": True, "pretraining_tp": 1,
    },
    "TinyLlama-1.1B": {
        **SHARED, "model_type": "llama", "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 1, "intermediate_size": 176, "rms_norm_eps": 1e-5,
        "rope_scaling": None, "tie_word_embeddings": False, "max_position_embeddings": 2048, "pretraining_tp": 1,
    },
    "Llama-3.2-1B": {
        **SHARED, "model_type": "llama", "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 256, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "rope_scaling": LLAMA3, "head_dim": 8, "tie_word_embeddings": True, "max_position_embeddings": 131072, "attention_bias": False,
    },
    "stretched linearly, with biases": {
        **SHARED, "model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 96, "rms_norm_eps": 1e-6,
        "rope_scaling": {"type": "linear", "factor": 2.0}, "tie_word_embeddings": False, "max_position_embeddings": 64, "attention_bias": True, "mlp_bias": True,
    },
    "Qwen2.5-0.5B": {
        **QWEN, "model_type": "qwen2", "hidden_size": 56, "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 304,
        "tie_word_embeddings": True, "max_position_embeddings": 32768,
    },
    "Qwen3-0.6B": {
        **QWEN, "model_type": "qwen3", "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "head_dim": 16,
        "tie_word_embeddings": True, "max_position_embeddings": 40960, "attention_bias": False, "rope_scaling": None,
    },
    "Qwen3 stretched by YaRN": {
        **QWEN, "model_type": "qwen3", "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "head_dim": 16,
        "tie_word_embeddings": True, "max_position_embeddings": 96, "rope_theta": 100, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24},
    },
    "MiniMind": {
        **QWEN, "model_type": "qwen3", "hidden_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 320, "head_dim": 12,
        "tie_word_embeddings": True, "max_position_embeddings": 32768,
    },
}


def family_folder(folder, bpe_json, name="Qwen3-0.6B", **changes):
    """A random tiny model of a family in two bf16 shards, its config.json as it is published; (folder, the model in float32)."""
    folder.mkdir(parents=True)
    described = {"vocab_size": 301, "num_hidden_layers": 2, "bos_token_id": 300, "eos_token_id": 300, **FAMILIES[name], **changes}
    (folder / "config.json").write_text(json.dumps(described), encoding="utf-8")
    torch.manual_seed(0)
    random = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder)).bfloat16()
    for p in random.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.2)
    random.save_pretrained(folder, max_shard_size="60KB")
    newer = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (folder / "model.safetensors.index.json").is_file() and "rope_parameters" in newer
    (folder / "newer.json").write_text(json.dumps(newer), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(described), encoding="utf-8")
    shutil.copyfile(bpe_json, folder / "tokenizer.json")
    # 载入时再转：.float() 转不回旋转频率丢掉的位
    return folder, transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_and_qwen_give_the_logits_of_transformers_and_go_back_as_they_came(tmp_path, bpe_json, name):
    folder, reference = family_folder(tmp_path / "model", bpe_json, name)
    opened = open_pretrained(str(folder))
    assert all(tensor.dtype == torch.bfloat16 for tensor in opened.tensors.values())
    assert read_config(folder / "newer.json", "model") == opened.config
    same_logits(reference, opened)
    export(str(folder), tmp_path / "again")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", attn_implementation="eager")
    assert type(back) is type(reference)
    torch.testing.assert_close(back(ids(301)).logits, reference(ids(301)).logits, atol=1e-5, rtol=1e-5)
    again = open_pretrained(str(tmp_path / "again"))
    assert again.config == replace(opened.config, name="again") and all(torch.equal(again.tensors[k], v.float()) for k, v in opened.tensors.items())


@pytest.mark.parametrize(("name", "changes", "expected"), [
    ("Llama-3.2-1B", {"rope_scaling": {**LLAMA3, "rope_type": "longrope"}}, "rope_scaling.rope_type=longrope is not supported"),
    ("Llama-3.2-1B", {"rope_scaling": {**LLAMA3, "rope_type": "yarn", "mscale": 0.7}}, "rope_scaling.mscale=0.7"),
    ("Llama-3.2-1B", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope_parameters.rope_type=dynamic"),
    ("Llama-3.2-1B", {"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor=None"),
    ("SmolLM2-135M", {"attention_bias": True}, "attention_bias=True"), ("SmolLM2-135M", {"hidden_act": "gelu"}, "hidden_act=gelu"),
    ("SmolLM2-135M", {"num_key_value_heads": 2}, "model.n_head=9 is not divisible by model.n_kv_head=2"),
    ("SmolLM2-135M", {"hidden_size": None}, "hidden_size=None"), ("SmolLM2-135M", {"num_hidden_layers": 3}, "2 blocks, config says 3"),
    ("SmolLM2-135M", {"intermediate_size": 191}, r"model.layers.0.mlp.gate_proj.weight: \(192, 72\), wanted: \(191, …\)"),
    ("Qwen3-0.6B", {"use_sliding_window": True}, "use_sliding_window=True"), ("Qwen3-0.6B", {"quantization_config": {"bits": 4}}, "quantization_config="),
    ("Qwen3-0.6B", {"layer_types": ["sliding_attention"] * 2}, "layer_types="), ("Qwen3-0.6B", {"layer_types": 5}, "layer_types=5"),
    ("Qwen3-0.6B", {"layer_types": [["full_attention"]]}, "layer_types="),
    ("Qwen3-0.6B", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0.5}}, "original_max_position_embeddings=0.5"),
], ids=lambda value: value if isinstance(value, str) and "=" in value else "")
def test_what_llama_and_qwen_have_and_we_lack_is_one_line_with_file_and_field(tmp_path, bpe_json, name, changes, expected):
    folder, _ = family_folder(tmp_path / "model", bpe_json, name)
    damage_config(**changes)(folder)
    with pytest.raises(ConfigError, match=expected) as error:
        open_pretrained(str(folder))
    assert "\n" not in str(error.value)


def special(word, number):
    return {"id": number, "content": word, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def qwen_tokenizer(bpe_json):
    """Byte-level BPE with Qwen's own way of cutting words, and the ends of a chat beside that of a text; 303 tokens."""
    described = json.loads(bpe_json.read_text(encoding="utf-8"))
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return described | {
        "normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, byte_level]}, "post_processor": byte_level,
        "decoder": byte_level, "added_tokens": [special(word, 300 + i) for i, word in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))],
    }


def llama_tokenizer():
    """Llama 2's: ▁ for spaces, bytes for what is unknown, <s> before every text; 290 tokens."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz", "▁t", "▁th", "▁the", "be"]
    merges = [["▁", "t"], ["▁t", "h"], ["▁th", "e"], ["b", "e"]]
    steps = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [special(word, i) for i, word in enumerate(words[:3])],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": None, "decoder": {"type": "Sequence", "decoders": steps},
        "post_processor": {
            "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
            "byte_fallback": True, "vocab": {word: i for i, word in enumerate(words)}, "merges": merges,
        },
    }


def with_tokenizer(folder, described, ends):
    """The folder with this tokenizer.json and generation_config.json."""
    (folder / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}), encoding="utf-8")
    return folder


@pytest.mark.parametrize("family", ["Qwen3", "Llama 2"])
def test_special_tokens_are_read_and_never_written_by_a_text_that_names_them(tmp_path, bpe_json, family):
    described, ends = (qwen_tokenizer(bpe_json), [302, 300]) if family == "Qwen3" else (llama_tokenizer(), 2)
    folder = tmp_path / "model"
    folder.mkdir()
    tokenizer = read_tokenizer(with_tokenizer(folder, described, ends), 400)
    assert (tokenizer.end_of_text, ends_of(tokenizer), begin_of(tokenizer)) == ((302, {300, 302}, ()) if family == "Qwen3" else (2, {2}, (1,)))
    again = tokenizers.from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    reference = library.Tokenizer.from_str(json.dumps(described))
    for text in ["the bee <|im_end|></s><s>", "春江 to be"]:
        got = tokenizer.encode(text).tolist()
        assert not set(got) & {token["id"] for token in described["added_tokens"]} and tokenizer.decode(got) == text == again.decode(got)
    assert tokenizer.encode("the bee").tolist() == reference.encode("the bee", add_special_tokens=False).ids
    assert ends_of(again) == ends_of(tokenizer) and begin_of(again) == begin_of(tokenizer)


def test_a_model_of_qwen_is_planned_tuned_resumed_and_written_with(tmp_path, bpe_json, in_tmp, capsys):
    folder, _ = family_folder(tmp_path / "qwen", bpe_json, vocab_size=320)
    with_tokenizer(folder, qwen_tokenizer(bpe_json), [302, 300])
    (folder / "generation_config.json").write_text('{"eos_token_id": [302, 300], "top_p": 0.8}', encoding="utf-8")
    Path("my.txt").write_text("\n".join(LINES) * 60, encoding="utf-8")
    typed = [f"init_from={folder}", "finetune=lora", "memory.weights=bf16", "dataset=text_file", "dataset.path=my.txt", "dataset.dir=prepared", "logger=none",
             "device=cpu", "max_iters=2", "eval_interval=1", "batch_size=2", "sample_tokens=3", "model.block_size=16", "eval_tokens=64"]
    planned, _ = filled(make_config(*typed), typed)
    trainer = train(typed, out="outputs/a")
    c = trainer.model.config
    assert c == planned.model and (c.arch, c.n_kv_head, c.head_size, c.block_size, trainer.model.dtype) == ("qwen3", 2, 16, 16, torch.bfloat16)
    shutil.rmtree(folder)
    resumed_trainer("outputs/a", "max_iters=3").fit()
    capsys.readouterr()
    cfg = make_sample_config("out_dir=outputs/a", "max_new_tokens=5", "device=cpu", "start=To be")
    model = open_model(cfg, Path(cfg.out_dir))
    write_samples(cfg, model)
    assert capsys.readouterr().out.startswith("To be")
    assert ends_of(model.tokenizer) == {300, 302} and model.tokenizer.sampling == {"top_p": 0.8}


@pytest.mark.parametrize("name", ["Qwen3-0.6B", "Qwen3-0.6B-Base", "Qwen3-8B"])
def test_qwen3_is_planned_before_it_is_fetched(name, in_tmp, monkeypatch):
    monkeypatch.setenv("NANOGPT_CACHE", "nothing")
    typed = ["experiment=finetune_qwen", f"init_from=modelscope:Qwen/{name}"]
    model = filled(make_config(*typed), typed)[0].model
    assert (model.arch, model.n_kv_head, model.head_size, model.vocab_size, model.block_size) == ("qwen3", 8, 128, 151936, 1024)
    assert model.tie_embeddings == (name != "Qwen3-8B") and model.name == name
    # 发布时说的是 0.6B 与 8.2B
    assert parameters_at_least(model) == pytest.approx(8.19e9 if name == "Qwen3-8B" else 0.596e9, rel=0.001)


def test_a_model_of_llama_reads_its_beginning_first_and_stops_at_any_of_its_ends(tmp_path, bpe_json):
    folder, _ = family_folder(tmp_path / "llama", bpe_json, "TinyLlama-1.1B")
    export(str(with_tokenizer(folder, llama_tokenizer(), [2, 0])), tmp_path / "exported")
    theirs, library_too = (kind.from_pretrained(tmp_path / "exported") for kind in (transformers.AutoConfig, transformers.AutoTokenizer))
    assert (theirs.bos_token_id, theirs.eos_token_id, library_too.bos_token, library_too.eos_token) == (1, [2, 0], "<s>", "</s>")
    pretrained = open_pretrained(str(tmp_path / "exported"))
    model = build_pretrained(pretrained).eval()
    writer = Writer(model, pretrained.tokenizer)
    writer.submit(Request("the be", Sampler((lambda logits: logits,)), 4, seed=0))
    assert writer.texts[0].prompt_ids.tolist() == [1, *pretrained.tokenizer.encode("the be")]

    def always(token):
        return Sampler((lambda logits, *_: torch.full_like(logits, -torch.inf).index_fill_(1, torch.tensor(token), 0.0),))

    for end in (0, 2):
        (piece,) = [p for p in Writer(model, pretrained.tokenizer).write([Request("the be", always(end), 4, seed=0)]) if p.result]
        assert (piece.result.finish, piece.result.text) == ("end_of_text", "")


def test_half_precision_shards_and_torch_files_load_alike(folder):
    whole = open_pretrained(str(folder))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    # 早期 hub 文件的写法：没有前缀，带因果掩码，半精度
    old = {k.removeprefix("transformer."): v.half() for k, v in tensors.items()} | {"h.0.attn.bias": torch.ones(1, 1, 32, 32)}
    torch.save(old, folder / "pytorch_model.bin")
    torch.testing.assert_close(open_pretrained(str(folder)).tensors["h.1.mlp.c_fc.weight"].float(), whole.tensors["h.1.mlp.c_fc.weight"], atol=1e-3, rtol=1e-3)
    names = sorted(tensors)
    for file, part in (("a.safetensors", names[:10]), ("b.safetensors", names[10:])):
        save_file({k: tensors[k] for k in part}, folder / file)
    index = {"weight_map": {k: "a.safetensors" if i < 10 else "b.safetensors" for i, k in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    again = open_pretrained(str(folder))
    assert all(torch.equal(again.tensors[k], v) for k, v in whole.tensors.items())


# ---- 分词器 ----


@pytest.mark.parametrize("form", ["tokenizer.json", "vocab.json"])
def test_byte_level_bpe_becomes_ours_with_the_same_ids(folder, bpe_json, form):
    reference = library.Tokenizer.from_file(str(bpe_json))
    if form == "vocab.json":
        (folder / "tokenizer.json").unlink()
        described = json.loads(bpe_json.read_text(encoding="utf-8"))
        (folder / "vocab.json").write_text(json.dumps({**described["model"]["vocab"], "<|endoftext|>": 300}), encoding="utf-8")
        merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in described["model"]["merges"])])
        (folder / "merges.txt").write_text(merges + "\n", encoding="utf-8")
    ours = open_pretrained(str(folder)).tokenizer
    assert ours.kind == "bpe" and ours.end_of_text == 300
    saved = tokenizers.from_dict(json.loads(json.dumps(ours.to_dict())))
    for line in LINES:
        assert ours.encode(line).tolist() == saved.encode(line).tolist() == reference.encode(line, add_special_tokens=False).ids
        assert saved.decode(ours.encode(line)) == line


def test_special_tokens_in_front_keep_their_numbers():
    trained = library.ByteLevelBPETokenizer()
    trained.train_from_iterator(LINES * 5, vocab_size=290, special_tokens=["<s>", "</s>"], min_frequency=1, show_progress=False)
    ours = byte_level_bpe(json.loads(trained.to_str()), "</s>")
    again = tokenizers.from_dict(json.loads(json.dumps(ours.to_dict())))
    assert again.end_of_text == 1 and again.vocab_size == trained.get_vocab_size()
    assert all(again.encode(line).tolist() == trained.encode(line).ids for line in LINES)


def test_ids_without_a_text_decode_to_nothing(folder):
    tokenizer = open_pretrained(str(folder)).tokenizer
    assert tokenizer.decode([*tokenizer.encode("to be"), 999]) == "to be"


def test_a_chinese_bert_vocabulary_is_wrapped_and_saved_as_json(folder, tmp_path):
    (folder / "tokenizer.json").unlink()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "春", "江", "潮", "水", "，", "gp", "##t", "!"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    ours = open_pretrained(str(folder)).tokenizer
    tokenizers.save(ours, tmp_path / "t.json")
    ours = tokenizers.load(tmp_path / "t.json")
    assert ours.encode("春江潮水，GPT!").tolist() == [5, 6, 7, 8, 9, 10, 11, 12]
    assert ours.decode([5, 6, 9, 10, 11, 12]) == "春江，gpt !" and ours.vocab_size == len(words) and ours.end_of_text == 3


def test_such_a_model_is_fine_tuned_on_chinese_text_and_written_with(folder, in_tmp, capsys):
    (folder / "tokenizer.json").unlink()
    characters = "春江潮水连海平月共生"
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *characters]), encoding="utf-8")
    Path("poem.txt").write_text(f"{characters[:5]}\n海上明{characters[5:]}\n" * 60, encoding="utf-8")
    typed = [f"init_from={folder}", "dataset=text_file", "dataset.path=poem.txt", "dataset.dir=prepared", "logger=none", "device=cpu", "max_iters=1",
             "batch_size=2", "sample_tokens=3", "model.block_size=8"]
    trainer = train(typed, out="outputs/a")
    # 没有换行的词表，样本与写作都从第一个有文字的 token 写起
    assert trainer.sample_prompt() is None and trainer.last_sample.startswith(characters[0])
    capsys.readouterr()
    cfg = make_sample_config("out_dir=outputs/a", "max_new_tokens=3", "device=cpu")
    write_samples(cfg, open_model(cfg, Path(cfg.out_dir)))
    assert capsys.readouterr().out.startswith(characters[0])
    assert tokenizers.load(Path("outputs/a/ckpt/iter_00000001/tokenizer.json")).kind == "library"
    assert trainer.model.wpe.weight.shape == (8, 48)


def test_gpt2_vocabulary_is_supplied_where_a_folder_lacks_it(tmp_path):
    config = tiny_model_config(vocab_size=50304, n_embd=4, n_head=1, **GPT2_RECIPE)
    save_checkpoint(tmp_path / "ckpt.pt", config, build_model(config, 0))
    pretrained = open_pretrained(str(tmp_path / "ckpt.pt"))
    assert pretrained.tokenizer.encode("Hello world").tolist() == [15496, 995] and pretrained.config.vocab_size == 50304


# ---- nanoGPT 的 ckpt.pt ----


def save_checkpoint(path, config, model, prefix="_orig_mod.", **settings):
    """What nanoGPT's train.py saves."""
    weights = {f"{prefix}{'' if k.startswith('lm_head') else 'transformer.'}{k}": v for k, v in model.state_dict().items()}
    arguments = {k: getattr(config, k) for k in ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")}
    state = {"model": weights, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}, "model_args": arguments, "iter_num": 5,
             "best_val_loss": torch.tensor(1.5), "config": {"dataset": "shakespeare_char", "device": "cpu", **settings}}
    torch.save(state, path)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_nanogpt_checkpoint_loads_with_its_characters(tmp_path, bias, protocol):
    characters = "\n !abcdé春"
    config = tiny_model_config(**{**GPT2_RECIPE, "activation": "gelu", "bias": bias, "vocab_size": len(characters)})
    model = build_model(config, 3)
    out, data = tmp_path / "out-shakespeare-char", tmp_path / "data" / "shakespeare_char"
    out.mkdir()
    data.mkdir(parents=True)
    save_checkpoint(out / "ckpt.pt", config, model, prefix="_orig_mod." if bias else "")
    meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters)), "stoi": {c: i for i, c in enumerate(characters)}}
    (data / "meta.pkl").write_bytes(pickle.dumps(meta, protocol=protocol))
    pretrained = open_pretrained(str(out / "ckpt.pt"))
    assert pretrained.tokenizer.characters == characters
    idx = ids(len(characters), 16)
    with no_grad_eval(build_pretrained(pretrained)) as loaded, no_grad_eval(model):
        assert torch.equal(loaded(idx), model(idx))
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(ConfigError, match="has no tokenizer for its vocabulary of 9; put the tokenizer.json"):
        open_pretrained(str(out / "ckpt.pt"))


def test_a_nanogpt_checkpoint_with_nan_is_refused_by_the_name_of_its_tensor(tmp_path):
    model = build_model(tiny_model_config(**{**GPT2_RECIPE, "activation": "gelu", "vocab_size": 3}), 3)
    model.h[1].attn.c_attn.weight.data[5, 2] = -torch.inf
    save_checkpoint(tmp_path / "ckpt.pt", model.config, model)
    with pytest.raises(ConfigError, match=r"ckpt.pt cannot be used \(h.1.attn.c_attn.weight holds NaN or Inf\)"):
        open_pretrained(str(tmp_path / "ckpt.pt"))


@pytest.mark.parametrize("name", ["my-text", "v1.0", "诗 2"])
def test_the_characters_of_a_nanogpt_data_set_are_found_whatever_its_name(tmp_path, name):
    (tmp_path / "data" / name).mkdir(parents=True)
    (tmp_path / "data" / name / "meta.pkl").write_bytes(pickle.dumps({"itos": dict(enumerate("abc"))}))
    assert nanogpt_checkpoint.find_tokenizer(tmp_path / "out" / "ckpt.pt", {"dataset": name}, 3).characters == "abc"
    # 别人的 checkpoint 指不到别的文件夹去
    with pytest.raises(ConfigError, match="has no tokenizer"):
        nanogpt_checkpoint.find_tokenizer(tmp_path / "out" / "ckpt.pt", {"dataset": f"../data/{name}"}, 3)


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def test_files_that_carry_code_are_refused_and_run_nothing(folder, in_tmp):
    Path("meta.pkl").write_bytes(pickle.dumps({"itos": Bomb()}))
    with pytest.raises(ConfigError, match="not plain data"):
        nanogpt_checkpoint.read_characters(Path("meta.pkl"), 1)
    torch.save({"model": {}, "model_args": Bomb()}, "ckpt.pt")
    (folder / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Bomb()}, folder / "pytorch_model.bin")
    for named in ("ckpt.pt", str(folder)):
        with pytest.raises(ConfigError, match="cannot be used"):
            open_pretrained(named)
    assert not Path("exploded").exists()


# ---- 坏文件、缺文件 ----


def damage_config(**changes):
    def apply(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")

    return apply


def damage_tensor(name, change):
    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = change(tensors[name])
        save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")

    return apply


DAMAGE = {
    "activation_function=tanh is not supported": damage_config(activation_function="tanh"),
    "scale_attn_by_inverse_layer_idx=True": damage_config(scale_attn_by_inverse_layer_idx=True),
    "model_type=mamba is not supported": damage_config(model_type="mamba"),
    r"model_type=\['gpt2'\] is not supported": damage_config(model_type=["gpt2"]),
    r"activation_function=\['gelu'\] is not supported": damage_config(activation_function=["gelu"]),
    r"pytorch_model.bin cannot be used \(.*list": lambda f: (torch.save([*load_file(f / "model.safetensors").values()], f / "pytorch_model.bin"), (f / "model.safetensors").unlink()),
    "n_layer=-3": damage_config(n_layer=-3),
    "n_embd=wide": damage_config(n_embd="wide"),
    "n_inner=100": damage_config(n_inner=100),
    "3 blocks, config says 1000000000": damage_config(n_layer=10**9),
    "not divisible": damage_config(n_head=7),
    "wpe.weight: torch.float32 \\(32, 48\\), wanted: \\(2000000000, 48\\)": damage_config(n_positions=2 * 10**9),
    "the tokenizer has 301 tokens": damage_config(vocab_size=300),
    "h.1.ln_1.bias: torch.int64": damage_tensor("transformer.h.1.ln_1.bias", lambda t: t.long()),
    "h.2.mlp.c_fc.weight: missing": damage_tensor("transformer.h.2.mlp.c_fc.weight", lambda t: None),
    "h.0.attn.c_attn.weight: torch.float32": damage_tensor("transformer.h.0.attn.c_attn.weight", lambda t: t.t().contiguous()),
    r"model.safetensors cannot be used \(transformer.h.1.mlp.c_fc.bias holds NaN or Inf\)": damage_tensor("transformer.h.1.mlp.c_fc.bias", lambda t: t * torch.nan),
    "transformer.wte.weight holds NaN or Inf": damage_tensor("transformer.wte.weight", lambda t: (t + torch.inf).half()),
    "transformer.wpe.weight holds NaN or Inf": damage_tensor("transformer.wpe.weight", lambda t: t.double() + 1e300),
    "config.json cannot be used": lambda f: (f / "config.json").write_text("{", encoding="utf-8"),
    "model.safetensors cannot be used": lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]),
    "no model.safetensors or": lambda f: (f / "model.safetensors").unlink(),
    "tokenizer files cannot be used": lambda f: (f / "tokenizer.json").write_text('{"model": {"type": "Odd"}}', encoding="utf-8"),
    "has no tokenizer": lambda f: (f / "tokenizer.json").unlink(),
}


@pytest.mark.parametrize("expected", DAMAGE)
def test_a_file_that_cannot_be_right_is_one_line(folder, expected):
    DAMAGE[expected](folder)
    with pytest.raises(ConfigError, match=expected) as error:
        open_pretrained(str(folder))
    assert "\n" not in str(error.value)


def test_of_several_weight_files_the_one_that_holds_nan_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    broken = "transformer.h.2.ln_2.weight"
    save_file({broken: tensors.pop(broken) * torch.nan}, folder / "model-00002.safetensors")
    torch.save(tensors, folder / "model-00001.bin")
    (folder / "model.safetensors").unlink()
    names = {name: "model-00001.bin" for name in tensors} | {broken: "model-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}), encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"model-00002.safetensors cannot be used \({broken} holds NaN or Inf\)"):
        open_pretrained(str(folder))


def test_an_index_cannot_point_outside_its_folder(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret"}}', encoding="utf-8")
    with pytest.raises(ConfigError, match="odd file names"):
        open_pretrained(str(folder))


@pytest.mark.parametrize("part", ["v_proj", "k_proj"])
def test_parts_that_only_together_have_the_rows_of_a_matrix_are_refused(tmp_path, bpe_json, part):
    folder, _ = family_folder(tmp_path / "model", bpe_json, "Qwen3-0.6B")
    at = "model.layers.1.self_attn."
    tensors = {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}
    names = [f"{at}q_proj.weight", f"{at}{part}.weight"]
    swapped = dict(zip(names, (tensors[names[1]], tensors[names[0]])))
    save_file({**tensors, **swapped}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=f"{names[0]}: .*wanted: "):
        open_pretrained(str(folder))


def test_a_tensor_is_taken_from_the_file_that_the_index_names(folder):
    tensors = load_file(folder / "model.safetensors")
    name = next(iter(tensors))
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    save_file({name: tensors[name] * 2}, folder / "model-2.safetensors")
    files = dict.fromkeys(tensors, "model-1.safetensors") | {"other": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}), encoding="utf-8")
    read = foreign_files.read_weights(folder)
    assert torch.equal(read[name], tensors[name]) and set(read) == set(tensors)
    # 目录写错了，别处又没有：还是那一个
    last = list(tensors)[-1]
    files = {**files, last: "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}), encoding="utf-8")
    assert torch.equal(foreign_files.read_weights(folder)[last], tensors[last])


DRAWING = {"do_sample": True, "temperature": 0.6, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.3, "num_beams": 4, "min_p": "much", "eos_token_id": 0}


def drawn(folder, capsys, *typed):
    """(the text, what was said of generation_config.json) of run_sample.py."""
    words = [f"init_from={folder}", "max_new_tokens=12", "device=cpu", "start=To be", "fast=false", *typed]
    cfg = make_sample_config(*words)
    model = open_model(cfg, None, words)
    said = capsys.readouterr().err
    write_samples(cfg, model)
    return capsys.readouterr().out, said


def test_a_model_draws_as_its_generation_config_says_unless_a_key_is_typed(folder, capsys):
    plain, said = drawn(folder, capsys)
    assert not said
    (folder / "generation_config.json").write_text(json.dumps(DRAWING), encoding="utf-8")
    keys = ["temperature=0.6", "sampler.top_k=5", "sampler.top_p=0.9", "sampler.repetition_penalty=1.3"]
    got, said = drawn(folder, capsys)
    assert " ".join(keys) in said and "passed over in the model's generation_config.json: min_p=much num_beams=4" in " ".join(said.split())
    assert got == drawn(folder, capsys, "sampler=temperature", *keys)[0] != plain == drawn(folder, capsys, "sampler=temperature")[0]
    hot, said = drawn(folder, capsys, "temperature=1.5", "sampler.top_k=0")
    assert "temperature=" not in said.partition(";")[0] and "top_k" not in said
    assert hot == drawn(folder, capsys, "sampler=temperature", "temperature=1.5", *keys[2:])[0]
    (folder / "generation_config.json").write_text(json.dumps({**DRAWING, "do_sample": False}), encoding="utf-8")
    assert drawn(folder, capsys)[0] == drawn(folder, capsys, "sampler=temperature", keys[3])[0]
    assert nanogpt.load(str(folder), "device=cpu", "fast=false").write("To be", "max_new_tokens=12") + "\n" == drawn(folder, capsys)[0].removeprefix("To be")


def test_how_to_draw_travels_with_the_vocabulary_of_a_run_and_with_its_export(folder, tmp_path):
    (folder / "generation_config.json").write_text(json.dumps(DRAWING), encoding="utf-8")
    opened = open_pretrained(str(folder))
    assert opened.tokenizer.sampling == {name: value for name, value in DRAWING.items() if name != "eos_token_id"}
    tokenizers.save(with_labels(opened.tokenizer, {"style": ["宋词"]}, grow=False), tmp_path / "tokenizer.json")
    tuned = tokenizers.load(tmp_path / "tokenizer.json")
    assert tuned.sampling == opened.tokenizer.sampling
    check_vocabulary(replace(opened, tokenizer=tuned), read_tokenizer(tmp_path, 301), "a run")
    export(str(folder), tmp_path / "out")
    assert open_pretrained(str(tmp_path / "out")).tokenizer.sampling == {name: value for name, value in opened.tokenizer.sampling.items() if name != "min_p"}
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (theirs.temperature, theirs.top_k, theirs.eos_token_id) == (0.6, 5, opened.tokenizer.end_of_text)


# ---- hub ----


class Hub(http.server.BaseHTTPRequestHandler):
    """Plays huggingface.co and modelscope.cn for a few models, from folders."""

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        asked = urllib.parse.urlsplit(self.path)
        models = {self.server.model: self.server.folder, **self.server.others}
        model = next((name for name in models if f"/{name}" in asked.path), self.server.model)
        folder = models[model]
        content = None
        if asked.path == f"/api/models/{model}":
            files = [{"rfilename": path.name, "size": path.stat().st_size} for path in folder.iterdir()]
            content = json.dumps({"id": model, "sha": "c" * 40, "siblings": files}).encode()
        elif asked.path == f"/api/v1/models/{model}/repo/files":
            files = [{"Path": p.name, "Type": "blob", "Size": p.stat().st_size, "Sha256": self.server.digest(p)} for p in folder.iterdir()]
            content = json.dumps({"Code": 200, "Data": {"Files": [*files, {"Path": "../../evil", "Type": "blob", "Size": 1}]}}).encode()
        else:
            # 两家的文件地址：/me/tiny/resolve/main/x 与 /api/v1/models/me/tiny/repo?FilePath=x
            file = urllib.parse.parse_qs(asked.query).get("FilePath", [asked.path.rpartition("/")[2]])[0]
            self.server.asked.append(file)
            if f"/{model}/" in asked.path and (folder / file).is_file():
                content = (folder / file).read_bytes()
        self.send_response(404 if content is None else 200)
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("ETag", f'"{asked.path}"')
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound" if f"/{model}/" in asked.path else "RepoNotFound")
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if body:
            self.wfile.write(content or b"")

    def log_message(self, *arguments):
        pass


def adapter_folder(folder):
    """An adapter beside the base me/tiny as PEFT would write it."""
    folder.mkdir()
    described = {"peft_type": "LORA", "base_model_name_or_path": "me/tiny", "r": 2, "lora_alpha": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    (folder / "adapter_config.json").write_text(json.dumps(described), encoding="utf-8")
    (folder / "handler.py").write_text("raise SystemExit", encoding="utf-8")
    name = "base_model.model.transformer.h.0.attn.c_attn"
    save_file({f"{name}.lora_A.weight": torch.randn(2, 48), f"{name}.lora_B.weight": torch.randn(144, 2)}, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def local_hub(folder):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.model, server.others, server.asked = folder, "me/tiny", {"me/adapter": adapter_folder(folder.parent / "adapter")}, []
    server.digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()


# 新进程：huggingface_hub 在导入时读环境变量
OPEN = """
import sys
from huggingface_hub import constants
from nanogpt.base.language import ConfigError
from nanogpt.weights.pretrained import open_pretrained
for named in sys.argv[1:]:
    constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE or named == "offline"
    try:
        print(named == "offline" or open_pretrained(named).config.n_embd)
    except ConfigError as error:
        print(error)
"""


def test_a_mirror_of_the_hub_serves_models_and_the_cache_remembers_them(tmp_path, local_hub):
    endpoint = f"http://127.0.0.1:{local_hub.server_address[1]}"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", OPEN, "me/tiny", "me/other", "me/adapter", "offline", "me/tiny", "me/adapter", "gpt2"], cwd=ROOT, env=environment,
        capture_output=True, text=True, encoding="utf-8", timeout=100,
    )
    assert done.returncode == 0, done.stderr
    online, unknown, adapted, _, offline, adapted_offline, unreachable = done.stdout.splitlines()
    assert online == adapted == offline == adapted_offline == "48"
    assert f"init_from=me/other: there is no such folder here, and {endpoint} did not give it" in unknown and "Repository Not Found" in unknown
    assert "init_from=gpt2: there is no such folder here" in unreachable and "HF_ENDPOINT" in unreachable and "model.safetensors" in unreachable
    assert "model.safetensors" in local_hub.asked and not [file for file in local_hub.asked if file.endswith(".py")]
    said = done.stderr.splitlines()
    assert re.fullmatch(rf"fetching me/tiny \(0\.\d MB\) from {endpoint} …", said[0]) and re.fullmatch(r"me/tiny: 0\.\d MB in \d+ s", said[1])
    assert "me/adapter" in said[2] and all("using the copy in" in line for line in said[4:]) and len(said) == 7


@pytest.fixture
def modelscope(local_hub, tmp_path, monkeypatch):
    """The local hub as modelscope.cn, with an empty cache."""
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", f"http://127.0.0.1:{local_hub.server_address[1]}/")
    monkeypatch.setenv("NANOGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "pip_settings", dict)
    monkeypatch.setattr(assets, "PAUSE_S", 0.0)
    return local_hub


def test_modelscope_gives_a_model_without_its_code_and_the_cache_serves_when_it_is_gone(modelscope, folder, tmp_path, capsys):
    (folder / "modeling.py").write_text("raise SystemExit", encoding="utf-8")
    got, here = open_pretrained("modelscope:me/tiny"), open_pretrained(str(folder))
    assert got.config.n_embd == 48 and all(torch.equal(t, here.tensors[name]) for name, t in got.tensors.items())
    said = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"fetching me/tiny \(0\.\d MB\) from http://127.*", said[0]) and re.fullmatch(r"me/tiny: 0\.\d MB in \d+ s", said[1])
    kept = sorted(path.name for path in (tmp_path / "cache" / "modelscope" / "me" / "tiny").iterdir())
    assert sorted(modelscope.asked) == kept == ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    open_pretrained("modelscope:me/tiny")
    assert len(modelscope.asked) == 4 and not capsys.readouterr().err
    # 预测只看缓存，什么也不问
    planned, _ = filled(make_config("init_from=modelscope:me/tiny"))
    assert planned.model.n_embd == 48 and len(modelscope.asked) == 4
    # 上面的文件换了：只取换了的
    config = (folder / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(config + "\n", encoding="utf-8")
    open_pretrained("modelscope:me/tiny")
    assert modelscope.asked[4:] == ["config.json"]
    modelscope.model = "me/gone"
    capsys.readouterr()
    assert open_pretrained("modelscope:me/tiny").config.n_embd == 48
    assert "did not answer (HTTP Error 404: Not Found); using the copy in" in capsys.readouterr().err


def test_an_adapter_on_a_hub_is_merged_into_its_base_from_the_same_hub(modelscope, folder, tmp_path):
    got, base = open_pretrained("modelscope:me/adapter"), open_pretrained(str(folder)).tensors
    assert [name for name, t in got.tensors.items() if not torch.equal(t, base[name])] == ["h.0.attn.c_attn.weight"]
    kept = sorted(path.name for path in (tmp_path / "cache" / "modelscope" / "me" / "adapter").iterdir())
    assert kept == ["adapter_config.json", "adapter_model.safetensors"] and not [f for f in modelscope.asked if f.endswith(".py")]
    assert filled(make_config("init_from=modelscope:me/adapter"))[0].model.n_embd == 48
    # 名字指的是底座加 adapter：不能当作另一个 adapter 的底座
    with pytest.raises(ConfigError, match="its base is init_from=modelscope:me/adapter, and PEFT needs a model"):
        base_named(SimpleNamespace(folder=folder), "modelscope:me/adapter", got.config)
    (modelscope.others["me/adapter"] / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no adapter_model.safetensors or adapter_model.bin"):
        open_pretrained("modelscope:me/adapter")


def test_what_modelscope_does_not_give_or_gives_changed_is_one_line(modelscope, folder, tmp_path, monkeypatch):
    for named in ("modelscope:me/other", "modelscope:../tiny", "modelscope:tiny"):
        with pytest.raises(ConfigError, match="MODELSCOPE_ENDPOINT to a mirror" if "other" in named else "no name on the hub") as error:
            open_pretrained(named)
        assert "\n" not in str(error.value)
    modelscope.digest = lambda path: "0" * 64
    with pytest.raises(ConfigError, match="tokenizer.json: SHA-256 differs"):
        open_pretrained("modelscope:me/tiny")
    assert not list((tmp_path / "cache" / "modelscope" / "me" / "tiny").iterdir())
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no model.safetensors or .*config.json and model.safetensors"):
        open_pretrained("modelscope:me/tiny")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://mirror.example")
    with pytest.raises(ConfigError, match="MODELSCOPE_ENDPOINT=http://mirror.example is not https"):
        open_pretrained("modelscope:me/tiny")


def test_a_mirror_of_the_hub_that_is_not_https_is_not_asked(monkeypatch, in_tmp):
    library = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(library, "HfApi", None)
    monkeypatch.setattr(library.constants, "ENDPOINT", "http://me:secret@mirror.example")
    with pytest.raises(ConfigError, match="HF_ENDPOINT=http://mirror.example is not https"):
        open_pretrained("gpt2")


def test_without_the_package_the_line_names_it_and_the_other_ways(monkeypatch, in_tmp):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match="pip install huggingface_hub; HF_ENDPOINT .* local folder"):
        open_pretrained("gpt2")
    for named in ("no/such/folder/here", "C:\\models\\x", "x.pt.gz/a/b"):
        with pytest.raises(ConfigError, match="there is no such folder or file here"):
            open_pretrained(named)


def test_a_pickle_that_torch_did_not_write_is_one_line_without_a_warning(tmp_path):
    (tmp_path / "w.pt").write_bytes(pickle.dumps({"model": list}, protocol=4))
    with warnings.catch_warnings(record=True) as said, pytest.raises(ConfigError, match=r"w\.pt"):
        warnings.simplefilter("always")
        open_pretrained(str(tmp_path / "w.pt"))
    assert not said
