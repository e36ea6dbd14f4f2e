"""nanogpt export: what other programs compute with a file of ours is what we compute; what they cannot hold is one line."""

import json
import re
import sys
from dataclasses import replace

import pytest
import torch
from conftest import GPT2_RECIPE, LLAMA_RECIPE, QWEN3_RECIPE, no_grad_eval, wild_model
from test_huggingface import CHARACTERS, random_model, saved_run
from test_pretrained import LINES, bpe_json, ids, llama_tokenizer, qwen_tokenizer, with_tokenizer  # noqa: F401 - bpe_json is a fixture

from nanogpt.base.config import FinetuneConfig
from nanogpt.base.language import ConfigError
from nanogpt.core.memory.lora import add_adapters
from nanogpt.data import tokenizer as tokenizers
from nanogpt.data.bpe import train_bpe
from nanogpt.data.chat import rendered, with_template
from nanogpt.data.corpus import build_char_tokenizer
from nanogpt.data.labels import with_labels
from nanogpt.data.tokenizer_files import read_tokenizer
from nanogpt.weights import export as exporting
from nanogpt.weights import export_check, gguf_file
from nanogpt.weights.export import check_format, export, writer
from nanogpt.weights.export_check import compared, llama_cpp_steps
from nanogpt.weights.gguf_vocabulary import vocabulary_fields
from nanogpt.weights.pretrained import Pretrained, open_pretrained

gguf = pytest.importorskip("gguf")
SWIGLU = {**LLAMA_RECIPE, "intermediate_size": 64}
ARCHS = {
    "gpt2": GPT2_RECIPE, "gpt2 of nanoGPT": {**GPT2_RECIPE, "bias": False, "activation": "gelu", "tie_embeddings": False},
    "llama": SWIGLU, "llama linear": {**SWIGLU, "rope_scaling": "linear", "bias": True, "tie_embeddings": True},
    "qwen2": {**SWIGLU, "rope_scaling": "none", "qkv_bias": True},
    "qwen3": {**SWIGLU, **QWEN3_RECIPE, "qkv_bias": False, "head_dim": 16, "intermediate_size": 64},
}


def random_pretrained(tokenizer=CHARACTERS, **changes):
    model = wild_model(std=0.3, **{"vocab_size": tokenizer.vocab_size, "n_embd": 32, "block_size": 40, **changes})
    tensors = dict(model.state_dict())
    if model.config.tie_embeddings:
        tensors.pop("lm_head.weight")
    return Pretrained(model.config, tensors, tokenizer)


def written(folder, pretrained, form, kind=None):
    folder.mkdir()
    check_format(pretrained.config, form)
    writer(form, kind)(folder, pretrained)
    return folder


# ---- llama.cpp ----


@pytest.mark.parametrize("arch", ARCHS)
def test_llama_cpp_writes_the_ids_that_we_write(tmp_path, arch):
    pytest.importorskip("xllamacpp")
    pretrained = random_pretrained(**ARCHS[arch])
    for kind in gguf_file.TYPES if arch in ("gpt2", "qwen3") else ["f32"]:
        found = compared(written(tmp_path / kind, pretrained, "gguf", kind), pretrained, "gguf", kind)
        # 8 位的激活也舍入：随机的模型里并列的两个会换次序
        assert found.good and (found.equal == found.count > 0 or kind in ("bf16", "q8_0")), (kind, found)
        assert (found.rounding == 0) == (kind == "f32")


def vocabularies(bpe_json, tmp_path):  # noqa: F811
    def foreign(name, described, ends):
        (tmp_path / name).mkdir()
        return read_tokenizer(with_tokenizer(tmp_path / name, described, ends), 400)

    characters = build_char_tokenizer([*LINES, "\\ \t"])
    return {
        "char": characters, "char, labels": with_labels(characters, {"style": ["宋词"]}, grow=True), "byte": tokenizers.ByteTokenizer(),
        "byte, labels": with_labels(tokenizers.ByteTokenizer(), {"style": ["宋词"]}, grow=True), "bpe": train_bpe(LINES * 5, 300),
        "gpt2-like": foreign("gpt2", json.loads(bpe_json.read_text(encoding="utf-8")), [300]),
        "qwen": foreign("qwen", qwen_tokenizer(bpe_json), [302, 300]), "llama 2": foreign("llama", llama_tokenizer(), 2),
    }


def test_llama_cpp_reads_and_writes_text_by_our_vocabularies(tmp_path, bpe_json, monkeypatch):  # noqa: F811
    pytest.importorskip("xllamacpp")
    spoken = []
    ask = export_check.ask

    def all_lines(address, path, body):
        if path != "/tokenize":
            return ask(address, path, body)
        for line in ["the bee to be", "\\ \t", *unknown, *LINES]:
            got = ask(address, path, {**body, "content": line})["tokens"]
            spoken.append((line, got, ask(address, "/detokenize", {"tokens": got})["content"], ask(address, path, {"content": "be"})["tokens"]))
        return ask(address, path, body)

    monkeypatch.setattr(export_check, "ask", all_lines)
    for name, tokenizer in vocabularies(bpe_json, tmp_path).items():
        # 没有结尾的逐字词表遇到没见过的字，那边报错
        unknown = [] if name in ("char", "llama 2") else ["to é 鼎 be"]
        pretrained = random_pretrained(tokenizer, vocab_size=tokenizer.vocab_size + 3, separator=tokenizer.end_of_text if "labels" in name else None, **SWIGLU)
        llama_cpp_steps(written(tmp_path / f"{name} out", pretrained, "gguf"), pretrained, [3, 4], 2)
        for line, got, back, _ in spoken:
            ours = tokenizer.encode(line, skip_unknown=True).tolist()
            # 那边的 llama 开头多一个空格，由提示的结尾接上
            assert got == ours and back.removeprefix(" " if name == "llama 2" else "") == tokenizer.decode(ours), (name, line)
        spoken.clear()


def test_a_gguf_file_says_context_rope_ends_and_template_and_ollama_finds_it(tmp_path, bpe_json):  # noqa: F811
    tokenizer = vocabularies(bpe_json, tmp_path)["qwen"]
    tokenizer.chat_template = {"template": "<|im_start|>{{ messages }}", "bos_token": "", "eos_token": "<|im_end|>"}
    folder = written(tmp_path / "out", random_pretrained(tokenizer, **ARCHS["llama linear"]), "gguf")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(folder / "model.gguf").fields.items()}
    expected = {
        "general.architecture": "llama", "llama.context_length": 40, "llama.rope.scaling.factor": 4.0, "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.eos_token_id": 302, "tokenizer.ggml.eot_token_id": 300, "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "<|im_start|>{{ messages }}",
    }
    assert {name: fields[name] for name in expected} == expected and fields["tokenizer.ggml.token_type"][-3:] == [3, 3, 3]
    modelfile = (folder / "Modelfile").read_text(encoding="utf-8")
    assert modelfile.startswith("FROM ./model.gguf\nPARAMETER num_ctx 40\n") and 'stop "<|im_end|>"' in modelfile and ".Messages" in modelfile
    assert '"""{{ .Prompt }}"""' in gguf_file.modelfile(random_pretrained().config, CHARACTERS)
    labelled = vocabulary_fields(with_labels(CHARACTERS, {"style": ["宋词"]}, grow=True), 50, documents=True)
    assert labelled["add_bos_token"] and labelled["tokens"][labelled["bos_token_id"]] == "<|endoftext|>" and labelled["tokens"][-1] == "[PAD49]"


def test_ollama_renders_a_conversation_in_our_template_as_we_do_and_draws_as_the_model_says():
    tokenizer = with_template(CHARACTERS, grow=True)
    tokenizer.sampling = {"do_sample": False, "top_p": 0.9, "repetition_penalty": 1.1, "min_p": "much"}
    messages = [{"role": role, "content": role[:2]} for role in ("system", "user", "assistant", "user")]
    written = gguf_file.modelfile(random_pretrained().config, tokenizer)
    assert re.findall("PARAMETER (.*)", written)[1:] == ["repeat_penalty 1.1", 'stop "<|endoftext|>"']
    template = re.search('TEMPLATE """(.*)"""', written, flags=re.DOTALL)[1]
    repeated, last = re.fullmatch(r"{{ range .Messages }}(.*){{ end }}(.*)", template).groups()
    shown = [repeated.replace("{{ .Role }}", m["role"]).replace("{{ .Content }}", m["content"]) for m in messages]
    assert "".join(shown) + last == rendered(tokenizer, messages, asking=True)


# ---- CTranslate2、transformers ----


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_ctranslate2_writes_the_ids_that_we_write(tmp_path, arch):
    pytest.importorskip("ctranslate2")
    pretrained = random_pretrained(**ARCHS[arch])
    for kind in ("f32", "int8"):
        found = compared(written(tmp_path / kind, pretrained, "ct2", kind), pretrained, "ct2", kind)
        assert found.good and (found.equal == found.count > 0 or kind == "int8"), (kind, found)


@pytest.mark.parametrize("changes", [{"ngrams": [2, 3], "ngram_buckets": 101}, {**GPT2_RECIPE, "qk_norm": True, "bias": False}], ids=["modern", "learned positions"])
def test_a_folder_with_its_own_code_has_a_cache_that_changes_nothing_and_is_read_back(tmp_path, changes):
    transformers = pytest.importorskip("transformers")
    pretrained = random_pretrained(**changes)
    folder = written(tmp_path / "hf", pretrained, "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    idx = ids(CHARACTERS.vocab_size, 6)
    padded, mask = torch.nn.functional.pad(idx, (3, 0), value=1), torch.nn.functional.pad(torch.ones_like(idx), (3, 0))
    for beams in (1, 3) if "ngrams" in changes else (1,):
        # 越过上下文（40）；有填充的行与没有的一起
        options = {"attention_mask": mask, "max_new_tokens": 33, "do_sample": False, "pad_token_id": 0, "num_beams": beams}
        assert torch.equal(model.generate(padded, use_cache=True, **options), model.generate(padded, use_cache=False, **options))
    with torch.no_grad():
        first = model(idx[:, :4], use_cache=True)
        rest = [model(idx[:, at : at + 1], past_key_values=first.past_key_values, use_cache=True).logits for at in (4, 5)]
        torch.testing.assert_close(torch.cat(rest, 1), model(idx).logits[:, 4:], atol=1e-5, rtol=1e-4)
    again = open_pretrained(str(folder))
    same = replace(again.config, name=pretrained.config.name, arch=pretrained.config.arch, init=pretrained.config.init)
    assert same == pretrained.config and all(torch.equal(again.tensors[name], tensor) for name, tensor in pretrained.tensors.items())
    assert compared(folder, pretrained, "hf", "f32").equal == 24
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for field, value in {"n_layer": 0, "norm": "other", "ngrams": "x", "n_head": 3}.items():
        (folder / "config.json").write_text(json.dumps({**described, field: value}), encoding="utf-8")
        with pytest.raises(ConfigError) as error:
            open_pretrained(str(folder))
        assert "\n" not in str(error.value)


# ---- 命令 ----


def typed(capsys, *words):
    """(exit code, what was shown on stderr) of nanogpt export."""
    try:
        exporting.main([*map(str, words), "lang=en"])
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    return code, capsys.readouterr().err


def test_a_lora_run_goes_merged_into_a_gguf_file_and_is_checked(tmp_path, capsys):
    model, lora = random_model(CHARACTERS, **GPT2_RECIPE), FinetuneConfig(method="lora", rank=2)
    add_adapters(model, lora)
    torch.nn.init.normal_(model.h[0].attn.c_attn.lora_b, std=0.3)
    run = saved_run(tmp_path / "run", model, CHARACTERS, lora=lora)
    code, shown = typed(capsys, run, tmp_path / "out", "format=gguf", "type=f32", "--check", "--checkpoint=last")
    assert code == 0 and "load it with ollama create my-model -f" in shown and "check: read back, a logit differs by at most 0 " in shown
    back = gguf_file.read_back(tmp_path / "out", model.config)
    with no_grad_eval(model):
        merged = model.h[0].attn.c_attn.merged().weight
    assert torch.equal(back["h.0.attn.c_attn.weight"], merged)


def test_a_file_that_is_not_the_model_fails_the_check(tmp_path, capsys, monkeypatch):
    run = saved_run(tmp_path / "run", random_model(CHARACTERS, **SWIGLU), CHARACTERS)
    reordered = gguf_file.reordered
    monkeypatch.setattr(gguf_file, "reordered", lambda config, tensor, back=False: tensor if not back else reordered(config, tensor, back=True))
    code, shown = typed(capsys, run, tmp_path / "out", "format=gguf", "--check")
    assert code == 1 and "h.0.attn.c_attn.weight is not what the model has" in shown and "do not use it" in shown


def test_what_a_format_cannot_hold_is_one_line_and_nothing_is_written(tmp_path, capsys, monkeypatch):
    runs = {
        "modern": random_model(CHARACTERS), "llama": random_model(CHARACTERS, **SWIGLU), "relu2": random_model(CHARACTERS, **{**GPT2_RECIPE, "activation": "relu2"}),
        "qwen3": random_model(CHARACTERS, **{**ARCHS["qwen3"], "rope_scaling": "llama3"}), "yarn": random_model(CHARACTERS, **{**ARCHS["qwen3"], "rope_scaling": "yarn"}), "large": random_model(CHARACTERS, **SWIGLU),
    }
    runs["large"].wte.weight.data[0, 0] = 1e6
    paths = {name: saved_run(tmp_path / name, model, CHARACTERS) for name, model in runs.items()}
    monkeypatch.setitem(sys.modules, "ctranslate2.converters", None)
    before = sorted(tmp_path.rglob("*"))
    for (name, *words), expected in {
        ("modern", "format=gguf"): "this is arch=modern; take format=hf, or train with arch=llama", ("llama", "format=onnx"): "choose from hf, gguf, ct2",
        ("llama", "format=gguf", "type=int8"): "choose from f16, f32, bf16, q8_0",
        ("relu2", "format=gguf"): "no model with model.activation=relu2", ("qwen3", "format=gguf"): "no model with model.rope_scaling=llama3", ("yarn", "format=gguf"): "no model with model.rope_scaling=yarn",
        ("llama", "format=ct2"): "pip install ctranslate2 transformers",
        ("large", "format=gguf", "type=f16"): "token_embd.weight has numbers that are too large", ("llama", "fromat=gguf"): "fromat=gguf: nanogpt export knows format= type= model= model._target_= alone",
        ("llama", "--adapter", "format=gguf"): "leave out format=",
    }.items():
        code, shown = typed(capsys, paths[name], tmp_path / "out", *words)
        assert code == 2 and expected in shown and shown.count("\n") == 1, (words, shown)
    # 忘了文件夹的：不建一个叫这个名字的
    monkeypatch.chdir(tmp_path)
    code, shown = typed(capsys, paths["llama"], "to=out")
    assert code == 2 and "FOLDER" in shown and shown.count("\n") == 1
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install gguf" in typed(capsys, paths["llama"], tmp_path / "out", "format=gguf")[1]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("form", ["gguf", "hf", "ct2"])
def test_a_full_disk_leaves_nothing(tmp_path, capsys, form):
    run = saved_run(tmp_path / "run", random_model(CHARACTERS, **{**SWIGLU, "rope_scaling": "none"}), CHARACTERS)
    before = sorted(tmp_path.rglob("*"))
    resource = pytest.importorskip("resource")
    before_all = resource.getrlimit(resource.RLIMIT_FSIZE)
    # 真的写不下：各个库抛的错误各不相同
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, before_all[1]))
    try:
        code, shown = typed(capsys, run, tmp_path / "out", f"format={form}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before_all)
    assert code == 2 and re.search(r"cannot be written \((No space left on device|File too large)\)", shown) and sorted(tmp_path.rglob("*")) == before


def test_a_vocabulary_that_llama_cpp_would_read_otherwise_is_refused(tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[SEP]", "to", "be", "春"]), encoding="utf-8")
    tokenizer = read_tokenizer(tmp_path / "bert", 10)
    with pytest.raises(ConfigError, match="format=ct2 has no model with model.rope_scaling=llama3"):
        check_format(random_pretrained(**SWIGLU).config, "ct2")
    with pytest.raises(ConfigError, match="format=gguf has no model with model.rope_scaling=yarn"):
        check_format(replace(random_pretrained(**SWIGLU).config, rope_scaling="yarn"), "gguf")
    with pytest.raises(ConfigError, match=r"\(library: WordPiece\); take format=hf"):
        written(tmp_path / "out", random_pretrained(tokenizer, **SWIGLU), "gguf")


def test_nan_is_never_written_into_a_gguf_file(tmp_path):
    pretrained = random_pretrained(**SWIGLU)
    pretrained.tensors["ln_f.weight"][0] = torch.nan
    with pytest.raises(ConfigError, match="output_norm.weight holds NaN or Inf: such a model is not exported"):
        written(tmp_path / "out", pretrained, "gguf")


def test_the_former_command_still_exports(tmp_path, monkeypatch):
    run = saved_run(tmp_path / "run", random_model(CHARACTERS, **GPT2_RECIPE), CHARACTERS)
    from nanogpt import huggingface as former

    former.main([str(run), str(tmp_path / "out"), "--checkpoint", "last", "--lang", "en"])
    assert (tmp_path / "out/config.json").is_file() and former.export is export
