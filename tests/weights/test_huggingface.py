"""Export: transformers loads the folder with equal logits and ids, without this package; nothing is overwritten."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import (
    GPT2_RECIPE,
    LLAMA_RECIPE,
    QWEN3_RECIPE,
    make_config,
    no_grad_eval,
    resumed_trainer,
    tiny_model_config,
    wild_model,
)
from test_pretrained import LINES, bpe_json, hf_folder, ids, save_checkpoint  # noqa: F401 - bpe_json is a fixture

from nanogpt.base.config import FinetuneConfig
from nanogpt.base.language import ConfigError
from nanogpt.core.memory.lora import add_adapters, merge
from nanogpt.data import tokenizer as tokenizers
from nanogpt.data.corpus import build_char_tokenizer
from nanogpt.data.tokenizer_files import byte_level_bpe, to_library_json
from nanogpt.weights import checkpoint, huggingface
from nanogpt.weights import export as exporting
from nanogpt.weights.build import build_model
from nanogpt.weights.export import export
from nanogpt.weights.pretrained import open_pretrained
from nanogpt.write import loading

transformers = pytest.importorskip("transformers")
library = pytest.importorskip("tokenizers")
CHARACTERS = build_char_tokenizer(LINES)
MODELS = {
    "modern": {"ngrams": [2, 3], "ngram_buckets": 101}, "modern tied": {"tie_embeddings": True, "norm": "layernorm", "bias": True},
    "learned positions": {**GPT2_RECIPE, "qk_norm": True},
    "gpt2": GPT2_RECIPE, "gpt2 untied, no bias": {**GPT2_RECIPE, "tie_embeddings": False, "bias": False, "activation": "gelu"},
}


def saved_run(out, model, tokenizer, *, lora=None, init_from=None):
    """A run folder with one checkpoint of the model."""
    from omegaconf import OmegaConf

    out.mkdir(parents=True)
    tokenizers.save(tokenizer, out / "tokenizer.json")
    cfg = replace(make_config(), model=model.config, finetune=lora or FinetuneConfig(), init_from=init_from)
    checkpoint.save(
        out, model=model, state={}, iteration=7, val_loss=1.0, config_text=OmegaConf.to_yaml(OmegaConf.structured(cfg)),
        tokenizer_text=json.dumps(tokenizer.to_dict()), keep=1, run=None,
    )
    return out


def random_model(tokenizer, **changes):
    return wild_model(std=0.2, **{"vocab_size": tokenizer.vocab_size, **changes})


@pytest.mark.parametrize("kind", MODELS)
def test_transformers_loads_the_export_with_equal_logits(tmp_path, kind):
    model = random_model(CHARACTERS, **MODELS[kind])
    run = saved_run(tmp_path / "run", model, CHARACTERS)
    export(str(run), tmp_path / "hf")
    plain = kind.startswith("gpt2")
    assert {p.name for p in (tmp_path / "hf").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", *([] if plain else ["modeling_nanogpt.py"]),
    }
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=not plain).eval()
    assert isinstance(loaded, transformers.GPT2LMHeadModel) == plain
    idx = ids(CHARACTERS.vocab_size, 16)
    with no_grad_eval(model):
        torch.testing.assert_close(loaded(idx).logits, model(idx), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(loaded(idx, labels=idx).loss, model.loss(idx[:, :-1], idx[:, 1:]), atol=1e-4, rtol=1e-4)
        written = loaded.generate(idx[:1, :5], max_new_tokens=6, do_sample=False, pad_token_id=0)
        greedy = idx[:1, :5]
        for _ in range(6):
            greedy = torch.cat((greedy, model(greedy)[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(written, greedy)
    if plain:
        # 往返：导出的再读回来，权重不变
        again = open_pretrained(str(tmp_path / "hf"))
        assert all(torch.equal(again.tensors[k], v) for k, v in model.state_dict().items() if k in again.tensors)


def test_nan_is_neither_read_from_a_run_nor_exported(tmp_path, monkeypatch):
    model = random_model(CHARACTERS, **GPT2_RECIPE)
    whole = open_pretrained(str(saved_run(tmp_path / "whole", model, CHARACTERS)))
    model.wpe.weight.data[3, 3] = torch.nan
    with pytest.raises(ConfigError, match=r"iter_00000007 .*wpe.weight holds NaN or Inf"):
        export(str(saved_run(tmp_path / "run", model, CHARACTERS)), tmp_path / "hf")
    # 读进来之后才坏的，例如自己的类添上的权重
    whole.tensors["ln_f.weight"][0] = torch.inf
    monkeypatch.setattr(exporting, "open_pretrained", lambda *args, **options: whole)
    with pytest.raises(ConfigError, match=r"transformer.ln_f.weight holds NaN or Inf: such a model is not exported"):
        export("run", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(("changes", "field"), [
    ({"n_head": 4, "n_kv_head": 2}, "n_kv_head=2"), ({**QWEN3_RECIPE, "bias": True}, "bias=True"), ({**LLAMA_RECIPE, "logit_softcap": 15.0}, "logit_softcap=15"),
])
def test_a_recipe_that_transformers_cannot_read_is_refused_by_the_field_that_keeps_it_at_home(tmp_path, changes, field):
    run = saved_run(tmp_path / "run", random_model(CHARACTERS, **changes), CHARACTERS)
    with pytest.raises(ConfigError, match=rf"model\.{field}.* has no form that transformers reads"):
        export(str(run), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("kind", ["modern", "learned positions"])
def test_left_padding_changes_nothing(tmp_path, kind):
    export(str(saved_run(tmp_path / "run", random_model(CHARACTERS, **MODELS[kind]), CHARACTERS)), tmp_path / "hf")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True).eval()
    idx = ids(9, 12)
    padded, mask = torch.nn.functional.pad(idx, (3, 0), value=1), torch.nn.functional.pad(torch.ones_like(idx), (3, 0))
    with torch.no_grad():
        torch.testing.assert_close(loaded(padded, attention_mask=mask).logits[:, 3:], loaded(idx).logits, atol=1e-5, rtol=1e-4)


def test_a_model_class_of_ones_own_is_exported_with_its_module_where_it_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "own_gpt.py").write_text(
        "from nanogpt.core.model import GPT\n\nclass Doubled(GPT):\n    def logits(self, hidden):\n        return 2 * super().logits(hidden)\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module("own_gpt").Doubled
    plain = random_model(CHARACTERS, **MODELS["modern"])
    model = own(replace(plain.config, _target_="own_gpt.Doubled"))
    model.load_state_dict(plain.state_dict())
    command = [str(saved_run(tmp_path / "run", model, CHARACTERS)), str(tmp_path / "hf"), "--lang", "en"]
    with pytest.raises(SystemExit):
        exporting.main(command)
    assert "names code of its own (own_gpt.Doubled)" in capsys.readouterr().err and not (tmp_path / "hf").exists()
    typed = [*command, "model._target_=own_gpt.Doubled"]
    with monkeypatch.context() as without:
        # 没有 transformers，写出的权重也真的读回来比
        without.setitem(sys.modules, "transformers", None)
        exporting.main([*typed, "--check"])
        said = capsys.readouterr().err
        assert "check: read back, a logit differs by at most 0 " in said and "only the files were read back" in said
        write = huggingface.write_tensors
        without.setattr(huggingface, "write_tensors", lambda folder, tensors: write(folder, {**tensors, "model.wte.weight": tensors["model.wte.weight"] + 1}))
        with pytest.raises(SystemExit) as ended:
            exporting.main([command[0], str(tmp_path / "damaged"), *typed[2:], "--check"])
        assert ended.value.code == 1 and "wte.weight is not what the model has" in capsys.readouterr().err
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True).eval()
    idx = ids(CHARACTERS.vocab_size, 12)
    padded, mask = torch.nn.functional.pad(idx, (3, 0), value=1), torch.nn.functional.pad(torch.ones_like(idx), (3, 0))
    with no_grad_eval(model.eval()):
        torch.testing.assert_close(loaded(idx).logits, model(idx))
        torch.testing.assert_close(loaded(padded, attention_mask=mask).logits[:, 3:], model(idx), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model(idx), 2 * plain.eval()(idx))
        assert loaded.generate(idx[:1], max_new_tokens=8, do_sample=False, pad_token_id=0).shape == (1, idx.size(1) + 8)


def test_the_command_exports_what_needs_no_nanogpt(tmp_path, capsys, monkeypatch):
    run = saved_run(tmp_path / "run", random_model(CHARACTERS, **MODELS["modern"]), CHARACTERS)
    exporting.main([str(run), str(tmp_path / "hf"), "--lang", "en"])
    assert "load it with transformers.AutoModelForCausalLM.from_pretrained(" in capsys.readouterr().err
    # 从这里起 import nanogpt 会失败
    monkeypatch.setitem(sys.modules, "nanogpt", None)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    prompt = tokenizer("To be", return_tensors="pt")
    assert tokenizer.decode(loaded.generate(**prompt, max_new_tokens=4, pad_token_id=0)[0]).startswith("To be")


def bpe_with_specials():
    trained = library.ByteLevelBPETokenizer()
    trained.train_from_iterator(LINES * 5, vocab_size=300, special_tokens=["<s>", "</s>"], min_frequency=1, show_progress=False)
    return byte_level_bpe(json.loads(trained.to_str()), "</s>")


@pytest.mark.parametrize("make", [lambda: CHARACTERS, tokenizers.ByteTokenizer, bpe_with_specials, tokenizers.gpt2_tokenizer], ids=["char", "byte", "bpe", "gpt2"])
def test_autotokenizer_gives_the_same_ids_and_text(tmp_path, make):
    ours = make()
    if ours.vocab_size == 50257:
        theirs = library.Tokenizer.from_str(json.dumps(to_library_json(ours)))
        pairs = [(theirs.encode(line).ids, theirs.decode) for line in LINES]
    else:
        export(str(saved_run(tmp_path / "run", random_model(ours, **GPT2_RECIPE), ours)), tmp_path / "hf")
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
        pairs = [(theirs(line)["input_ids"], theirs.decode) for line in LINES]
        assert theirs.eos_token_id == ours.end_of_text
    for line, (got, decode) in zip(LINES, pairs, strict=True):
        assert got == ours.encode(line).tolist() and decode(got) == line
    if ours.kind == "bpe":
        again = byte_level_bpe(to_library_json(ours), "<|endoftext|>")
        assert again.ranks == ours.ranks and again.special == ours.special and again.name == ours.name


def test_a_lora_run_is_exported_merged(tmp_path):
    model = random_model(CHARACTERS, **GPT2_RECIPE)
    lora = FinetuneConfig(method="lora", rank=2)
    add_adapters(model, lora)
    for name, p in model.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(p, std=0.3)
    export(str(saved_run(tmp_path / "run", model, CHARACTERS, lora=lora)), tmp_path / "hf", which="last")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    idx = ids(CHARACTERS.vocab_size, 16)
    with no_grad_eval(merge(model)):
        torch.testing.assert_close(loaded(idx).logits, model(idx), atol=1e-4, rtol=1e-4)


def test_a_nanogpt_checkpoint_is_converted_too(tmp_path):
    config = tiny_model_config(**{**GPT2_RECIPE, "activation": "gelu", "vocab_size": CHARACTERS.vocab_size, "bias": False})
    model = build_model(config, 0)
    save_checkpoint(tmp_path / "ckpt.pt", config, model)
    tokenizers.save(CHARACTERS, tmp_path / "tokenizer.json")
    export(str(tmp_path / "ckpt.pt"), tmp_path / "hf")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with no_grad_eval(model):
        torch.testing.assert_close(loaded(ids(9, 16)).logits, model(ids(9, 16)), atol=1e-4, rtol=1e-4)


def test_nothing_is_overwritten_and_mistakes_are_one_line(tmp_path, capsys):
    run = saved_run(tmp_path / "run", random_model(CHARACTERS, **GPT2_RECIPE), CHARACTERS)
    (tmp_path / ".notes.tmp").write_text("mine", encoding="utf-8")
    (tmp_path / "hf").mkdir()
    export(str(run), tmp_path / "hf")
    # 早先的版本会存下坏掉的权重
    broken = random_model(CHARACTERS)
    broken.h[1].mlp.c_fc.weight.data[3, 5] = torch.nan
    saved_run(tmp_path / "broken", broken, CHARACTERS)
    before = sorted(tmp_path.rglob("*"))
    for arguments, line in {
        (str(run), str(tmp_path / "hf")): "already holds something; choose an empty or new folder",
        (str(run), str(run / "tokenizer.json")): "already holds something",
        (str(run), str(run / "tokenizer.json" / "x")): "cannot be written",
        (str(tmp_path / "a" / "b" / "nothing"), str(tmp_path / "new")): "there is no such folder or file here",
        (str(run), str(tmp_path / "new"), "--checkpoint", "iter_1"): "has no such checkpoint",
        (str(tmp_path / "broken"), str(tmp_path / "new")): "is damaged (h.1.mlp.c_fc.weight holds NaN or Inf)",
    }.items():
        with pytest.raises(SystemExit) as stopped:
            exporting.main([*arguments, "--lang", "en"])
        shown = capsys.readouterr().err
        assert stopped.value.code == 2 and shown.startswith("error: ") and line in shown and shown.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / ".notes.tmp").read_text(encoding="utf-8") == "mine"


# ---- 从头到尾 ----


def test_fine_tune_a_hugging_face_folder_then_resume_write_and_export(tmp_path, monkeypatch, bpe_json):  # noqa: F811
    from test_end_to_end import run

    hf_folder(tmp_path / "tiny-gpt2", bpe_json)
    (tmp_path / "my.txt").write_text("\n".join(LINES) * 60, encoding="utf-8")
    data = ["dataset=text_file", "dataset.path=my.txt", "dataset.dir=prepared"]
    quick = ["max_iters=4", "eval_interval=2", "batch_size=2", "gradient_accumulation_steps=1", "sample_tokens=5", "logger=none", "device=cpu"]
    done = run(tmp_path, "experiment=finetune_gpt2", "init_from=tiny-gpt2", "finetune=lora", *data, *quick, "out_dir=outputs/a")
    assert "starting from the weights of tiny-gpt2" in done.stdout and "LoRA: " in done.stdout and "iter 4: loss" in done.stdout
    monkeypatch.chdir(tmp_path)
    Path("tiny-gpt2").rename("gone")
    trainer = resumed_trainer("outputs/a", "max_iters=5")
    trainer.fit()
    assert trainer.progress.iteration == 5
    model, tokenizer = loading.load(checkpoint.find(Path("outputs/a"), "last"), torch.device("cpu"))
    assert tokenizer.decode(tokenizer.encode(LINES[0])) == LINES[0]
    export("outputs/a", Path("hf"), which="last")
    loaded = transformers.AutoModelForCausalLM.from_pretrained("hf")
    with no_grad_eval(model), no_grad_eval(trainer.model):
        torch.testing.assert_close(loaded(ids(300)).logits, model(ids(300)), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(trainer.model(ids(300)), model(ids(300)), atol=1e-4, rtol=1e-4)
