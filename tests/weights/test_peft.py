"""Adapters in PEFT's format: PEFT computes with ours what we do, we compute with its what it does; the rest is one line."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import make_config, make_sample_config, no_grad_eval
from safetensors.torch import load_file, save_file
from test_huggingface import saved_run
from test_pretrained import bpe_json, family_folder, hf_folder, ids, same_logits  # noqa: F401 - bpe_json is a fixture

from nanogpt.base.config import FinetuneConfig
from nanogpt.base.language import ConfigError
from nanogpt.core.memory.lora import add_adapters
from nanogpt.data.labels import with_labels
from nanogpt.plan.filled_config import filled
from nanogpt.weights import export as exporting
from nanogpt.weights.export import export, export_adapter
from nanogpt.weights.pretrained import build_pretrained, open_pretrained
from nanogpt.write.loading import open_model
from nanogpt.write.samples import write_samples

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
LLAMA = "Llama-3.2-1B"
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def base_of(tmp_path, bpe_json):  # noqa: F811
    """kind -> (folder, the model in float32) of a random base of transformers."""
    return lambda kind: hf_folder(tmp_path / "base", bpe_json) if kind == "gpt2" else family_folder(tmp_path / "base", bpe_json, kind)


def lora_run(folder, out, *, init_from=None, **settings):
    """(run folder, model) of a run that tuned the model of a folder with LoRA; every B is random."""
    pretrained = open_pretrained(str(folder))
    model, lora = build_pretrained(pretrained), FinetuneConfig(method="lora", **{"rank": 3, "alpha": 5.0, **settings})
    add_adapters(model, lora)
    torch.manual_seed(2)
    for name, p in model.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(p, std=0.2)
    return saved_run(out, model, pretrained.tokenizer, lora=lora, init_from=init_from or str(folder)), model


@pytest.mark.parametrize(("kind", "settings"), [
    ("gpt2", {}), (LLAMA, {}), ("Qwen3-0.6B", {}), ("Qwen2.5-0.5B", {"linears": ["c_attn"]}), ("gpt2", {"linears": ["c_proj"]}),
], ids=str)
def test_peft_computes_with_our_adapter_what_we_do_and_we_read_it_back(tmp_path, base_of, kind, settings):
    folder, reference = base_of(kind)
    run, model = lora_run(folder, tmp_path / "run", **settings)
    assert export_adapter(str(run), tmp_path / "adapter", "last") == str(folder)
    theirs = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()
    idx = ids(301)
    with no_grad_eval(model):
        torch.testing.assert_close(theirs(idx).logits, model(idx), atol=1e-4, rtol=1e-4)
        with theirs.disable_adapter():
            assert (theirs(idx).logits - model(idx)).abs().max() > 0.01
    same_logits(theirs, open_pretrained(str(tmp_path / "adapter")))
    # 没有 rank_pattern 之类也装得进：模块名都在 target_modules 里
    assert set(json.loads((tmp_path / "adapter/adapter_config.json").read_text())["target_modules"]) <= {*EVERY, "c_attn", "c_proj", "c_fc"}


@pytest.mark.parametrize(("kind", "settings"), [
    ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}), (LLAMA, {"target_modules": EVERY, "use_rslora": True}),
    ("Qwen3-0.6B", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}}), ("Qwen3-0.6B", {"target_modules": "all-linear"}),
], ids=str)
def test_an_adapter_of_peft_gives_its_logits_in_writing_tuning_and_export(tmp_path, base_of, kind, settings, capsys):
    folder, reference = base_of(kind)
    theirs = peft.get_peft_model(reference, peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, task_type="CAUSAL_LM", **settings)).eval()
    theirs.peft_config["default"].base_model_name_or_path = str(folder)
    theirs.save_pretrained(tmp_path / "adapter")
    typed = [f"init_from={tmp_path / 'adapter'}"]
    assert filled(make_config(*typed), typed)[0].model == open_pretrained(*typed[0].split("=")[1:]).config
    same_logits(theirs, open_pretrained(str(tmp_path / "adapter")))
    export(str(tmp_path / "adapter"), tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    torch.testing.assert_close(merged(ids(301)).logits, theirs(ids(301)).logits, atol=1e-4, rtol=1e-4)
    cfg = make_sample_config(f"init_from={tmp_path / 'adapter'}", "max_new_tokens=3", "device=cpu", "start=To be", "fast=false")
    write_samples(cfg, open_model(cfg, None))
    assert capsys.readouterr().out.startswith("To be")


def test_labels_of_documents_travel_with_an_adapter(tmp_path, base_of):
    folder, _ = base_of("Qwen3-0.6B")
    opened = open_pretrained(str(folder))
    labelled = replace(opened, config=replace(opened.config, separator=300), tokenizer=with_labels(opened.tokenizer, {"style": ["宋词"]}, grow=False))
    model, lora = build_pretrained(labelled), FinetuneConfig(method="lora", rank=2)
    add_adapters(model, lora)
    run = saved_run(tmp_path / "labelled", model, labelled.tokenizer, lora=lora, init_from=str(folder))
    export_adapter(str(run), tmp_path / "adapter", "last")
    again = open_pretrained(str(tmp_path / "adapter"))
    assert again.config.separator == 300 and again.tokenizer.labels == labelled.tokenizer.labels


def damaged(folder, change):
    config = folder / "adapter_config.json"
    described, tensors = json.loads(config.read_text()), load_file(folder / "adapter_model.safetensors")
    change(described, tensors)
    config.write_text(json.dumps(described))
    save_file(tensors, folder / "adapter_model.safetensors")


Q = "base_model.model.model.layers.0.self_attn.q_proj"
DAMAGE = {
    "use_dora=True is not supported": lambda d, t: d.update(use_dora=True), "peft_type=IA3": lambda d, t: d.update(peft_type="IA3"),
    r"alpha_pattern=\{'q_proj': 3\}": lambda d, t: d.update(alpha_pattern={"q_proj": 3}), "a_field_of_tomorrow=1": lambda d, t: d.update(a_field_of_tomorrow=1),
    "lora_alpha=x": lambda d, t: d.update(lora_alpha="x"), "init_lora_weights=pissa": lambda d, t: d.update(init_lora_weights="pissa"),
    r"base_model_name_or_path=/nowhere/a/b: there is no such folder": lambda d, t: d.update(base_model_name_or_path="/nowhere/a/b"),
    "q_proj: A and B do not fit": lambda d, t: t.pop(f"{Q}.lora_A.weight"), "lm_head.weight: not a matrix of a LoRA": lambda d, t: t.update({"base_model.model.lm_head.weight": torch.ones(2, 2)}),
    r"q_proj: \(64, 32\), in the base: missing": lambda d, t: [t.update({k.replace("layers.0", "layers.7"): t.pop(k)}) for k in list(t) if k.startswith(Q)],
    r"q_proj: \(64, 3\), in the base: \(64, 32\)": lambda d, t: t.update({f"{Q}.lora_A.weight": torch.ones(3, 3)}),
    "q_proj.lora_A.weight holds NaN": lambda d, t: t[f"{Q}.lora_A.weight"].fill_(torch.nan), "no adapter in it": lambda d, t: t.clear(),
}


def test_an_adapter_that_cannot_be_right_is_one_line(tmp_path, base_of):
    folder, _ = base_of("Qwen3-0.6B")
    run, _ = lora_run(folder, tmp_path / "run")
    export_adapter(str(run), tmp_path / "adapter", "last")
    for number, (expected, change) in enumerate(DAMAGE.items()):
        shutil.copytree(tmp_path / "adapter", tmp_path / str(number))
        damaged(tmp_path / str(number), change)
        with pytest.raises(ConfigError, match=expected) as error:
            open_pretrained(str(tmp_path / str(number)))
        assert "\n" not in str(error.value)


def test_a_run_without_an_adapter_or_without_a_base_for_peft_is_refused_and_nothing_is_written(tmp_path, base_of, capsys):
    folder, _ = base_of("Qwen3-0.6B")
    pretrained = open_pretrained(str(folder))
    plain = saved_run(tmp_path / "plain", build_pretrained(pretrained), pretrained.tokenizer)
    of_a_run, _ = lora_run(folder, tmp_path / "run", init_from=str(plain))
    on_a_hub, _ = lora_run(folder, tmp_path / "hub", init_from="modelscope:Qwen/Qwen3-0.6B")
    for run, expected in {plain: "without finetune=lora: it has no adapter", of_a_run: f"its base is init_from={plain}"}.items():
        with pytest.raises(SystemExit) as stopped:
            exporting.main([str(run), str(tmp_path / "adapter"), "--adapter", "--checkpoint=last", "--lang=en"])
        assert stopped.value.code == 2 and expected in capsys.readouterr().err and not (tmp_path / "adapter").exists()
    exporting.main([str(on_a_hub), str(tmp_path / "adapter"), "--adapter", "--checkpoint=last", "--lang=en"])
    assert "an adapter in PEFT's format beside Qwen/Qwen3-0.6B" in "".join(capsys.readouterr())
