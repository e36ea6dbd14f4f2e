"""Labels of the model for the words people use, in every way of writing; samples in training; exports that keep the labels."""

import contextlib
import dataclasses
import json
from functools import lru_cache

import pytest
import torch
from conftest import GPT2_RECIPE, TINY, make_sample_config, train, wild_model
from test_huggingface import saved_run
from test_trainer import records

from nanogpt.base.cli import quoted
from nanogpt.base.language import ConfigError
from nanogpt.core.sampling import sampler
from nanogpt.data.documents import Document, write_documents
from nanogpt.data.labels import label_tokens, with_labels
from nanogpt.data.opening import open_data
from nanogpt.data.tokenizer import ByteTokenizer, CharTokenizer
from nanogpt.serve.completions import Reader, error_body
from nanogpt.serve.server import announcement
from nanogpt.weights.export import export
from nanogpt.weights.pretrained import open_pretrained
from nanogpt.write import engine
from nanogpt.write.commands import InteractiveSession
from nanogpt.write.control import build_control, prefixes
from nanogpt.write.engine import Writer, write_sample
from nanogpt.write.loading import Model, Settings
from nanogpt.write.request import Request
from nanogpt.write.samples import write_samples
from nanogpt.write.terminal import from_a_pipe, toolbar

LABELS = {"style": ["五言绝句", "宋词"], "emotion": ["negative", "positive"]}
LETTERS = "\n ,.:|abcdefghijklmnopqrstuvwxyzIT春天花朵的"
GREEDY = sampler(temperature=0.0)


@lru_cache
def composed_once(*overrides):
    return make_sample_config(*overrides).control


def node(*overrides, **changes):
    return {**composed_once(*overrides), **changes}


@pytest.fixture(scope="module")
def tokens():
    return with_labels(CharTokenizer("".join(sorted(LETTERS))), LABELS, grow=True)


@pytest.fixture(scope="module")
def model(tokens):
    network = wild_model(std=0.3, vocab_size=tokens.vocab_size, block_size=64, separator=tokens.end_of_text)
    return Model("tiny", network, tokens, contextlib.nullcontext)


@pytest.fixture(scope="module")
def plain():
    tokens = CharTokenizer("".join(sorted(LETTERS)))
    return Model("plain", wild_model(std=0.2, vocab_size=tokens.vocab_size, block_size=64), tokens, contextlib.nullcontext)


def applied(tokens, prompt="I", **wishes):
    return build_control(node(**wishes)).apply(Request(prompt, GREEDY, 10, 0), tokens)


def results(model, control, prompts, **changes):
    settings = dataclasses.replace(Settings.of(make_sample_config("max_new_tokens=20")), control=control, **changes)
    written = model.writer(capacity=4).write([settings.request(prompt, number) for number, prompt in enumerate(prompts)])
    return [p.result for p in sorted((p for p in written if p.result), key=lambda p: p.key)]


# ---- 说法与标签 ----


@pytest.mark.parametrize(("kind", "typed", "label"), [
    ("style", "宋词", "宋词"), ("style", "词", "宋词"), ("style", "Song Ci", "宋词"), ("style", "五绝", "五言绝句"), ("style", "七律", None), ("style", "诗意", None),
    ("emotion", "positive", "positive"), ("emotion", "NEGATIVE", "negative"), ("emotion", "happy", "positive"), ("emotion", "开心", "positive"),
    ("emotion", "积极", "positive"), ("emotion", "好评", "positive"), ("emotion", "温柔", "positive"), ("emotion", "平静", "positive"), ("emotion", "愤怒", "negative"),
    ("emotion", "scared", "negative"), ("emotion", "难过", "negative"), ("emotion", "惊讶", None), ("emotion", "像鲁迅", None),
])
def test_the_words_people_use_mean_the_labels_of_the_model(tokens, kind, typed, label):
    assert build_control(node()).label(kind, typed, tokens) == label
    got = applied(tokens, **{kind: typed})
    assert got.labels == ({kind: label} if label else {}) and got.prefix_ids == (tokens.labels[kind][label] if label else ())


def test_labels_of_ones_own_are_found_by_the_synonyms_that_everybody_uses():
    own = with_labels(ByteTokenizer(), {"emotion": ["开心", "消极"], "style": ["鲁迅"]}, grow=True)
    assert [applied(own, emotion=typed).labels.get("emotion") for typed in ("happy", "喜悦", "sad", "差评", "惊讶")] == ["开心", "开心", "消极", "消极", None]
    mine = node(aliases={"style": {"鲁迅": ["周树人", "Lu Xun"]}}, style="lu xun")
    assert build_control(mine).apply(Request("a", GREEDY, 5, 0), own).labels == {"style": "鲁迅"}


def test_style_and_emotion_stand_in_the_order_of_training_however_they_are_typed(tokens):
    request = Settings.of(make_sample_config()).request("emotion:happy| style:词| 春")
    got = request.control.apply(request, tokens)
    assert got.prefix_ids == tokens.labels["style"]["宋词"] + tokens.labels["emotion"]["positive"] and (got.prompt, got.prefix) == ("春", "")


def test_a_word_without_a_label_is_asked_for_as_with_prefix_and_said_once(capsys):
    tokens = with_labels(ByteTokenizer(), LABELS, grow=True)
    for _ in range(2):
        got = applied(tokens, "It", style="词", emotion="惊讶")
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "control.emotion=惊讶 is not a label" in err and "style: 五言绝句, 宋词 | emotion: negative, positive" in err
    assert got.labels == {"style": "宋词"} and got.prefix == "The mood of the following text: surprised.\n" and len(got.sampler.stages) == len(GREEDY.stages) + 1
    # 自由的词也只有这一行
    assert applied(tokens, "It", style="像鲁迅").prefix.startswith("The following text") and capsys.readouterr().err.count("\n") == 1
    poor = with_labels(CharTokenizer("春天"), LABELS, grow=True)
    got = applied(poor, "春", style="像鲁迅", emotion="happy")
    err = capsys.readouterr().err
    assert (got.prefix, got.sampler, got.labels) == ("", GREEDY, {"emotion": "positive"}) and err.count("\n") == 1 and "cannot write it either; left out" in err


def test_a_model_without_labels_writes_as_with_prefix_and_says_the_same(plain, capsys):
    prompts = ["It is", "emotion:sad| a", "style:poetic| b", "style:odd| c"]
    said = []
    texts = []
    for group in ("control=prefix", "control=codes"):
        prefixes._said.clear()
        texts.append([r.text for r in results(plain, node(group), prompts)])
        said.append(capsys.readouterr().err)
    assert texts[0] == texts[1] and said[0] == said[1] and said[0].count("\n") == 1


def test_without_a_wish_no_label_is_read_and_nothing_said(model, capsys):
    coded, none = (results(model, node(group), ["", "春"]) for group in ("control=codes", "control=none"))
    assert [r.text for r in coded] == [r.text for r in none] and [r.prompt_tokens for r in none] == [1, 2] and capsys.readouterr().err == ""


def test_guidance_without_a_label_to_strengthen_is_said_once(model, plain, capsys):
    for _ in range(2):
        results(model, node(guidance=2.0), ["", "style:词| 春"])
        assert results(plain, node(guidance=2.0), ["a"])[0].text == results(plain, node(), ["a"])[0].text
    err = capsys.readouterr().err
    assert err.count("\n") == 2 and "on a text without a label" in err and "trained without labels" in err


# ---- 写作 ----


def test_codes_write_what_the_labels_and_the_guidance_write(model, tokens):
    control = node(guidance=3.0, style="宋词")
    for (result, want) in zip(results(model, control, ["春", "emotion:happy| "]), (("宋词", None), ("宋词", "positive"))):
        ids = sum((tokens.labels[kind][label] for kind, label in zip(("style", "emotion"), want) if label), ())
        request = dataclasses.replace(result.request, control=None, prefix_ids=ids, guidance=3.0)
        assert [p.result.text for p in Writer(model.network, tokens).write([request]) if p.result] == [result.text]


def test_guidance_one_equals_no_guidance_and_zero_equals_no_label(model):
    def texts(control, prompts=("", "春", "花朵")):
        return [r.text for r in results(model, control, prompts)]

    assert texts(node(style="词", guidance=1.0)) == texts(node(style="词")) != texts(node(style="词", guidance=4.0))
    assert texts(node(style="词", guidance=0.0)) == texts(node())


def test_nothing_is_the_default_prompt_of_documents_and_a_line_break_that_of_running_text(model, plain, capsys):
    for one, default in ((model, ""), (plain, "\n")):
        cfg = dataclasses.replace(make_sample_config("max_new_tokens=15"), control=node())
        write_samples(cfg, one)
        unnamed = capsys.readouterr().out
        write_samples(dataclasses.replace(cfg, start=default), one)
        assert unnamed == capsys.readouterr().out and unnamed.startswith(default)
    assert quoted("start=null") == "start=null" and quoted("control.style=null") == "control.style=null" and quoted("start=春") == "start='春'"


def test_records_tell_the_guidance_and_what_the_words_became(model, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("emotion:开心| 春\nstyle:词| \n花\n", encoding="utf-8")
    cfg = dataclasses.replace(make_sample_config("max_new_tokens=9"), control=node(guidance=2.0))
    write_samples(dataclasses.replace(cfg, prompts=str(tmp_path / "p.txt"), output=str(tmp_path / "o.jsonl")), model)
    kept = [json.loads(line)["settings"]["control"] for line in (tmp_path / "o.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(control["guidance"] == 2.0 and "aliases" not in control for control in kept)
    assert sorted((c["emotion"] or "", str(c["labels"])) for c in kept) == [("", "{'style': '宋词'}"), ("", "{}"), ("开心", "{'emotion': 'positive'}")]


def test_interactive_commands_change_style_emotion_and_guidance(model, capsys):
    session = InteractiveSession(dataclasses.replace(make_sample_config("max_new_tokens=9"), control=node()), model, piped=False)
    assert session.values("style")[:2] == LABELS["style"] and session.values("emotion")[:3] == ["negative", "positive", "happy"] and "guidance" in session.values("control")
    lines = ["/style 词", "/control guidance 2", "春", "style:五绝| emotion:happy|", "/control guidance 21", "/control guidance x", "/style"]
    assert from_a_pipe(session, [f"{line}\n".encode() for line in lines]) == 2
    assert [written.result.request.labels for written in session.written] == [{"style": "宋词"}, {"style": "五言绝句", "emotion": "positive"}]
    assert all(written.result.request.guidance == 2 for written in session.written)
    err = capsys.readouterr().err
    assert "control.guidance=21 is out of range" in err and "control.guidance=x" in err and "guidance=2" in toolbar(session)
    session.handle("/control guidance 1")
    assert "guidance" not in toolbar(session)
    session.handle("/control")
    assert "style: 五言绝句 宋词 poetic" in capsys.readouterr().err


@pytest.mark.parametrize(("changes", "message"), [
    ({"aliases": "none"}, "control.aliases=none has the wrong type"), ({"guidance": -1}, "control.guidance=-1 is out of range"), ({"guidance": "2"}, "control.guidance=2 has the wrong type"), ({"guidance": True}, "control.guidance"),
    ({"guidance": float("nan")}, "control.guidance"), ({"aliases": {"emotion": ["happy"]}}, "control.aliases.emotion"),
    ({"aliases": {"style": {"词": "ci"}}}, "control.aliases.style"), ({"guidanse": 1}, "control: .*guidanse"),
])
def test_bad_settings_are_one_line_that_names_the_key(changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        build_control(node(**changes))
    assert "\n" not in str(error.value)


def test_the_api_takes_guidance_and_for_documents_an_empty_prompt(model, plain):
    cfg = make_sample_config()

    def reader(one, control):
        settings = dataclasses.replace(Settings.of(cfg), control=control)
        return Reader("m", settings, cfg.server, one.tokenizer, empty_prompts=one.writes_documents)

    asked = reader(model, node()).read(b'{"prompt": "", "style": "\\u8bcd", "guidance": 2}')
    request = asked.requests[0].control.apply(asked.requests[0], model.tokenizer)
    assert request.labels == {"style": "宋词"} and request.guidance == 2
    for one, control, fields, code in (
        (model, node(), {"prompt": "a", "guidance": 21}, "out_of_range"), (model, node(), {"prompt": "a", "guidance": -0.1}, "out_of_range"),
        (model, node(), {"prompt": "a", "guidance": "2"}, "wrong_type"), (model, node("control=prefix"), {"prompt": "a", "guidance": 2}, "unknown_field"),
        (plain, node(), {"prompt": ""}, "no_prompt"),
    ):
        with pytest.raises(ConfigError) as error:
            reader(one, control).read(json.dumps(fields).encode())
        told = error_body(error.value, "en")["error"]
        assert told["code"] == code and told["param"] == ("prompt" if code == "no_prompt" else "guidance")
    schema = reader(model, node()).form.model_json_schema()["properties"]
    guidance = schema["guidance"]["anyOf"][0]
    assert (guidance["minimum"], guidance["maximum"]) == (0, 20) and schema["prompt"]["anyOf"][0]["minLength"] == 0


def test_the_page_is_told_the_labels_and_what_an_empty_text_means(model, plain):
    cfg = make_sample_config()
    told = announcement(cfg, model)
    assert told["controls"]["styles"][:2] == LABELS["style"] and told["controls"]["labels"] == LABELS
    assert (told["defaults"]["guidance"], told["defaults"]["prompt"]) == (1.0, "")
    told = announcement(cfg, plain)
    assert "guidance" not in told["defaults"] and told["defaults"]["prompt"] == "\n" and told["controls"]["labels"] == {"style": [], "emotion": []}


# ---- 训练中的样本 ----


@pytest.fixture(scope="module")
def poems(tmp_path_factory):
    """A folder of documents of eight styles, which a tiny model can train on."""
    def listed(count):
        return [Document("春天的花朵"[n % 3 :] * (1 + n % 2), style=f"style {n % 8}") for n in range(count)]

    folder = tmp_path_factory.mktemp("poems") / "prepared"
    tokenizer = CharTokenizer("".join(sorted("春天的花朵")))
    return write_documents(folder, name="text_file", source="test", tokenizer=tokenizer, parts={"train": listed(80), "val": listed(16)})


def test_training_on_documents_shows_a_text_for_each_label(in_tmp, poems):
    overrides = [
        *TINY, "dataset=text_file", f"dataset.dir={poems}", "dataset.path=unused.txt", "logger=none", "device=cpu", "max_iters=4", "batch_size=2",
        "eval_interval=2", "eval_tokens=null", "sample_tokens=12", "warmup_iters=1",
    ]
    train(overrides)
    train(overrides, quoted("sample_prompt=春"), out="outputs/begun")
    train(overrides, out="outputs/again")
    samples = [r["sample"] for r in records() if "sample" in r]
    lines = samples[-1].split("\n")
    assert [line.split("] ")[0] for line in lines] == [f"[style {n}" for n in range(6)] and all(len(line.split("] ")[1]) <= 12 for line in lines)
    assert samples == [r["sample"] for r in records("outputs/again") if "sample" in r]
    assert all("] 春" in line for line in [r["sample"] for r in records("outputs/begun") if "sample" in r][-1].split("\n"))


def test_a_sample_of_documents_without_labels_is_one_text_that_ends(poems):
    tokenizer = with_labels(CharTokenizer("".join(sorted("春天的花朵"))), {}, grow=True)
    network = wild_model(vocab_size=tokenizer.vocab_size, separator=tokenizer.end_of_text)
    torch.nn.init.zeros_(network.lm_head.weight)
    assert open_data(poems).separator == tokenizer.end_of_text
    text = write_sample(network, tokenizer, "", 500, sampler=sampler(), seed=1)
    assert len(text) < 500 and "\n" not in text and "[" not in text
    assert engine.SAMPLED_LABELS == 6


# ---- 导出 ----


@pytest.mark.parametrize("make", [lambda: CharTokenizer("".join(sorted(LETTERS))), ByteTokenizer], ids=["char", "byte"])
@pytest.mark.parametrize("recipe", [GPT2_RECIPE, {"ngrams": [2], "ngram_buckets": 101}], ids=["gpt2", "modern"])
def test_transformers_reads_labels_as_the_same_ids_and_writes_the_same_behind_them(tmp_path, make, recipe):
    transformers = pytest.importorskip("transformers")
    ours = with_labels(make(), LABELS, grow=True)
    network = wild_model(std=0.2, **{"vocab_size": ours.vocab_size, "separator": ours.end_of_text, "block_size": 32, **recipe})
    export(str(saved_run(tmp_path / "run", network, ours)), tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    label = ours.labels["style"]["宋词"]
    ids = theirs("<|endoftext|><|style:宋词|>春天")["input_ids"]
    assert ids == [ours.end_of_text, *label, *ours.encode("春天").tolist()] and theirs.eos_token_id == ours.end_of_text
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True).eval()
    # 随机的权重会抽到标签，训练过的不会：我们遮住了它们
    options = {"suppress_tokens": label_tokens(ours), "do_sample": False, "pad_token_id": 0}
    written = loaded.generate(torch.tensor([ids]), max_new_tokens=9, **options)[0, len(ids) :].tolist()
    texts = [p.result.text for p in Writer(network, ours).write([Request("春天", GREEDY, 9, 0, prefix_ids=label)]) if p.result]
    assert texts == [ours.decode(written)]
    if recipe is GPT2_RECIPE:
        again = open_pretrained(str(tmp_path / "hf"))
        assert again.tokenizer.labels == ours.labels and again.config.separator == ours.end_of_text == again.tokenizer.end_of_text
        # 别人照同样写法起名的特殊 token 也认得
        config = json.loads((tmp_path / "hf" / "config.json").read_text(encoding="utf-8"))
        (tmp_path / "hf" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if not k.startswith("document_")}), encoding="utf-8")
        again = open_pretrained(str(tmp_path / "hf"))
        assert again.tokenizer.labels == ours.labels and again.config.separator == ours.end_of_text


def test_labels_written_as_ordinary_text_come_back_by_their_names(tmp_path):
    pytest.importorskip("transformers")
    base = with_labels(ByteTokenizer(), {}, grow=True)
    ours = with_labels(base, LABELS, grow=False)
    assert len(ours.labels["style"]["宋词"]) > 1
    network = wild_model(**{"vocab_size": ours.vocab_size, "separator": ours.end_of_text, "block_size": 64, **GPT2_RECIPE})
    export(str(saved_run(tmp_path / "run", network, ours)), tmp_path / "hf")
    again = open_pretrained(str(tmp_path / "hf"))
    assert again.tokenizer.labels == ours.labels and again.config.separator == ours.end_of_text
    config = tmp_path / "hf" / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"document_separator": 256', '"document_separator": 999'), encoding="utf-8")
    with pytest.raises(ConfigError, match="document_separator"):
        open_pretrained(str(tmp_path / "hf"))
