"""Style and emotion: the sentence before the prompt, the bias towards words, and the forms in a prompt."""

import contextlib
import dataclasses
import json
from functools import lru_cache

import pytest
import torch
from conftest import make_sample_config, wild_model

from nanogpt.base.config import ROOT
from nanogpt.base.language import ConfigError
from nanogpt.core.sampling import sampler
from nanogpt.data import tokenizer
from nanogpt.data.tokenizer import ByteTokenizer, CharTokenizer
from nanogpt.write.control import build_control, language_of, prefix, read_form, words
from nanogpt.write.control.words import word_bias
from nanogpt.write.engine import Writer
from nanogpt.write.loading import Model, Settings
from nanogpt.write.request import Request
from nanogpt.write.samples import write_samples

LETTERS = "\n !',.:|ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-"
CHINESE = LETTERS + "快乐开心下面这段文字的情绪风格：。春天诗意充满悲伤"
PLAIN = sampler(temperature=0.9)
DRAWN = 300


@lru_cache
def composed_once(*overrides):
    return make_sample_config(*overrides).control


def node(*overrides):
    return dict(composed_once(*overrides))


def applied(tokens, prompt="It was ", **changes):
    return build_control({**node(), **changes}).apply(Request(prompt, PLAIN, 10, 0), tokens)


def raised(bias, tokens, text, vocab_size):
    """What the bias adds to the logits behind a text."""
    ids = torch.as_tensor(tokens.encode(text))[None]
    logits = torch.linspace(-3, 3, vocab_size)[None]
    return (bias(logits, ids) - logits)[0]


# ---- 那句话 ----


def test_without_a_wish_the_request_stays_the_same_object():
    request = Request("a", PLAIN, 5, 0)
    for group in ("control=prefix", "control=codes", "control=none", "control.strength=3"):
        assert build_control(node(group)).apply(request, ByteTokenizer()) is request


def test_the_sentence_is_in_the_prompts_language_and_uses_its_name_for_the_emotion():
    tokens = ByteTokenizer()
    assert applied(tokens, "It was", emotion="happy").prefix == "The mood of the following text: happy.\n"
    assert applied(tokens, "It was", emotion="高兴").prefix == "The mood of the following text: happy.\n"
    assert applied(tokens, "今天", emotion="happy").prefix == "下面这段文字的情绪：开心。\n"
    assert applied(tokens, "今天", emotion="高兴").prefix == "下面这段文字的情绪：高兴。\n"
    # 开头没有文字时，看风格是用什么写的
    assert applied(tokens, "\n", style="诗意").prefix == "下面这段文字的风格：诗意。\n"
    assert applied(tokens, "\n", style="poetic").prefix == "The following text is written in this style: poetic.\n"


def test_style_and_emotion_together_are_two_sentences_and_free_words_stand_as_typed(capsys):
    got = applied(ByteTokenizer(), "春", style="像{style}鲁迅", emotion="sad").prefix
    assert got == "下面这段文字的风格：像{style}鲁迅。\n下面这段文字的情绪：悲伤。\n"
    assert capsys.readouterr().err.count("\n") == 1


def test_free_words_are_said_to_have_no_words_once(capsys):
    for _ in range(3):
        applied(ByteTokenizer(), emotion="wistful")
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "control.emotion=wistful" in err and "happy" in err


def test_a_vocabulary_without_chinese_takes_the_other_language_or_leaves_the_sentence_out(capsys):
    tokens = CharTokenizer(LETTERS)
    got = applied(tokens, "\n", emotion="开心")
    assert got.prefix == "The mood of the following text: happy.\n" and capsys.readouterr().err == ""
    got = applied(tokens, "\n", style="像鲁迅", bias=False)
    err = capsys.readouterr().err
    assert got.prefix == "" and err.count("\n") == 1 and "'像'" in err and "left out" in err
    got = applied(CharTokenizer("下面这段文字的情绪：难过。"), "难过", emotion="难过", bias=False)
    assert got.prefix == "" and "lacks '\\n' of its sentence" in capsys.readouterr().err
    got = applied(CharTokenizer("春天 "), "春", emotion="happy")
    assert got.prefix == "" and got.sampler is PLAIN and "no bias" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["春", "a 春", "\n春"])
def test_one_chinese_character_makes_a_prompt_chinese(text):
    assert language_of(text, "happy") == "zh" and language_of("a", "开心") == "en"


# ---- 开头里的写法 ----


@pytest.mark.parametrize(("typed", "asked", "prompt"), [
    ("style:充满诗意的语言，| 春天的花朵", {"style": "充满诗意的语言"}, "春天的花朵"),
    ("emotion:happy| 今天天气很好", {"emotion": "happy"}, "今天天气很好"),
    ("style：诗意｜emotion：开心｜\u3000春天", {"style": "诗意", "emotion": "开心"}, "春天"),
    ("Emotion: sad | Style: formal |A day", {"emotion": "sad", "style": "formal"}, "A day"),
    ("情绪:开心|风格:古风| 春", {"emotion": "开心", "style": "古风"}, "春"),
    ("style:| a", {"style": ""}, "a"),
    ("emotion:sad|\nROMEO:", {"emotion": "sad"}, "\nROMEO:"),
    ("mood:happy| a", {}, "mood:happy| a"),
    ("my style: a | b", {}, "my style: a | b"),
    (" plain | text", {}, " plain | text"),
    ("style: a\n| b", {}, "style: a\n| b"),
])
def test_a_prompt_may_begin_with_its_own_style_and_emotion(typed, asked, prompt):
    wish = read_form(typed)
    assert wish.asked == asked and wish.prompt == prompt


def test_the_forms_count_for_one_prompt_and_are_plain_text_without_control():
    settings = Settings.of(make_sample_config("control.style=formal"))
    own, other = settings.request("emotion:sad| a"), settings.request("b")
    assert (own.prompt, own.control.style, own.control.emotion) == ("a", "formal", "sad") and other.control.emotion is None
    assert Settings.of(make_sample_config("control=none")).request("emotion:sad| a").prompt == "emotion:sad| a"


# ---- 给词加分 ----


def test_exactly_the_next_tokens_of_a_word_are_raised_by_exactly_the_strength():
    tokens = CharTokenizer(LETTERS)
    bias = word_bias(tokens, ("happy", "hate"), 2.0)
    for text, expected in {"so h": "a", "so ha": "pt", "so hap": "p", "so happ": "y", "H": "a", "so happy": "", "unh": "", "so x": "", "so ": "", "it's\nh": "a"}.items():
        change = raised(bias, tokens, text, tokens.vocab_size)
        assert {tokens.characters[i] for i in change.nonzero().flatten().tolist()} == set(expected), text
        # 加法在 float32 里：与 logits + 2 逐位相同
        logits = torch.linspace(-3, 3, tokens.vocab_size)[None]
        got = bias(logits, torch.as_tensor(tokens.encode(text))[None])
        assert torch.equal(got, torch.where(change != 0, logits + 2.0, logits))


def test_chinese_words_begin_anywhere_and_go_on():
    tokens = CharTokenizer(CHINESE)
    bias = word_bias(tokens, ("快乐", "开心"), 1.5)
    for text, expected in {"春": "快开", "春快": "快开乐", "开": "快开心", "a": "快开"}.items():
        assert {tokens.characters[i] for i in raised(bias, tokens, text, tokens.vocab_size).nonzero().flatten().tolist()} == set(expected)


def test_byte_vocabularies_are_led_along_the_bytes_once_the_first_is_written():
    tokens = ByteTokenizer()
    bias = word_bias(tokens, ("快乐",), 2.0)
    word = list("快乐".encode())
    assert not raised(bias, tokens, "春", 256).any()
    for at in range(1, len(word)):
        ids = torch.tensor([[*"春".encode(), *word[:at]]])
        assert (bias(torch.zeros(1, 256), ids)[0].nonzero().flatten().tolist()) == [word[at]]


def test_bpe_words_are_raised_with_and_without_their_space():
    tokens = tokenizer.gpt2_tokenizer()
    bias = word_bias(tokens, ("joy", "sorrowful"), 3.0)

    def names(text):
        return {tokens.decode([i]) for i in raised(bias, tokens, text, tokens.vocab_size).nonzero().flatten().tolist()}

    assert {" joy", " Joy"} <= names("full of") and "joy" not in names("full of") and "joy" in names("full of\n")
    first, rest = tokens.decode(tokens.encode(" sorrowful")[:1]), tokens.decode(tokens.encode(" sorrowful")[1:2])
    assert rest in names(f"a{first}")


def test_rows_are_raised_each_by_its_own_text():
    tokens = CharTokenizer(LETTERS)
    bias = word_bias(tokens, ("joy",), 1.0)
    texts = ["a jo", "  j", "   "]
    ids = torch.full((3, 6), -1)
    for row, text in enumerate(texts):
        ids[row, 6 - len(text) :] = torch.as_tensor(tokens.encode(text))
    together = bias(torch.zeros(3, tokens.vocab_size), ids)
    for row, text in enumerate(texts):
        assert torch.equal(together[row], raised(bias, tokens, text, tokens.vocab_size))


def test_the_bias_stands_before_the_samplers_stages_and_only_once():
    request = applied(ByteTokenizer(), emotion="happy", strength=2.0)
    bias, *rest = request.sampler.stages
    assert isinstance(bias, words.WordBias) and tuple(rest) == PLAIN.stages and request.sampler.reads_tokens
    assert bias.before(request.sampler) is request.sampler
    # 同样设置的每一行用同一个对象：Decoder 把它们并在一起
    assert applied(ByteTokenizer(), emotion="happy").sampler is not None
    tokens = ByteTokenizer()
    assert applied(tokens, "It", emotion="happy").sampler is applied(tokens, "So", emotion="glad").sampler


# ---- 整条路 ----


@pytest.fixture
def model():
    tokens = CharTokenizer(LETTERS)
    return Model("tiny", wild_model(std=0.15, vocab_size=tokens.vocab_size, block_size=64), tokens, contextlib.nullcontext)


def texts_of(model, settings, prompts, capacity=4):
    writer = model.writer(capacity=capacity)
    return [p.result.text for p in sorted((p for p in writer.write([settings.request(t, n) for n, t in enumerate(prompts)]) if p.result), key=lambda p: p.key)]


def test_strength_zero_bias_off_and_no_control_write_the_same_text(model):
    base = Settings.of(make_sample_config("max_new_tokens=60"))
    none = dataclasses.replace(base, control=node("control=none"))
    silent = {**node("control.emotion=sad"), "templates": None}
    expected = texts_of(model, none, ["It was", "So"])
    assert texts_of(model, base, ["It was", "So"]) == expected
    assert texts_of(model, dataclasses.replace(base, control={}), ["It was", "So"]) == expected
    for off in ({"strength": 0.0}, {"bias": False}):
        assert texts_of(model, dataclasses.replace(base, control={**silent, **off}), ["It was", "So"]) == expected
    assert texts_of(model, dataclasses.replace(base, control=silent), ["It was", "So"]) != expected


def test_a_biased_model_writes_the_words_more_often(model):
    """Every word of the bag is counted in 8 texts of a model that knows nothing: letters by chance."""
    base = Settings.of(make_sample_config(f"max_new_tokens={DRAWN}"))

    def hits(strength):
        settings = dataclasses.replace(base, control={**node("control.emotion=loving"), "strength": strength, "templates": None})
        text = " ".join(texts_of(model, settings, ["So "] * 8, capacity=8)).lower()
        return sum(text.count(word) for word in settings.control["emotions"]["loving"]["words"]["en"])

    none, some, many = hits(0.0), hits(3.0), hits(6.0)
    assert none < some < many and many > 5 * (none + 1)


def test_batch_and_one_shot_write_the_same_and_record_each_texts_own_wish(model, tmp_path, capsys):
    prompts = ["emotion:sad| It was", "So it", "style:poetic|emotion:happy| O"]
    (tmp_path / "p.txt").write_text("\n".join(prompts), encoding="utf-8")
    cfg = make_sample_config("max_new_tokens=30")
    write_samples(dataclasses.replace(cfg, prompts=str(tmp_path / "p.txt"), output=str(tmp_path / "o.jsonl")), model)
    together = capsys.readouterr().out
    for prompt in prompts:
        write_samples(dataclasses.replace(cfg, start=prompt), model)
        alone = capsys.readouterr().out
        assert alone in together and not alone.startswith(("emotion", "style"))
    records = sorted(map(json.loads, (tmp_path / "o.jsonl").read_text(encoding="utf-8").splitlines()), key=lambda r: r["prompt"])
    assert [(r["prompt"], r["settings"]["control"]["style"], r["settings"]["control"]["emotion"]) for r in records] == [
        ("It was", None, "sad"), ("O", "poetic", "happy"), ("So it", None, None),
    ]
    assert "templates" not in records[0]["settings"]["control"] and records[0]["settings"]["control"]["strength"] == 2.0


def test_a_prompt_of_nothing_but_a_form_is_written_behind_its_sentence(model):
    settings = Settings.of(make_sample_config("max_new_tokens=5"))
    assert len(texts_of(model, settings, ["emotion:happy|"])[0]) == 5


@pytest.mark.parametrize(("changes", "message"), [
    ({"strength": "much"}, "control.strength=much has the wrong type"), ({"strength": 1e9}, "control.strength"), ({"strength": float("nan")}, "control.strength"),
    ({"bias": 3}, "control.bias=3"), ({"emotion": {"a": 1}}, "control.emotion="), ({"stile": "x"}, "control: .*stile"),
    ({"emotions": {"odd": {"zh": ["奇"]}}}, "control.emotions.odd needs zh"), ({"styles": {"odd": None}}, "control.styles.odd"),
    ({"emotions": {"odd": {"zh": [], "en": []}}}, "control.emotions.odd"), ({"emotions": "auto"}, "control.emotions=auto has the wrong type"),
    ({"styles": "none"}, "control.styles=none has the wrong type"), ({"styles": [1]}, "control.styles="), ({"templates": "none"}, "control.templates=none"),
    ({"templates": {"zh": "x"}}, "control.templates.zh=x"), ({"templates": {"zh": {"style": 5}}}, "control.templates.zh.style=5"),
])
def test_bad_settings_are_one_line_that_names_the_key(changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        build_control({**node(), **changes})
    assert "\n" not in str(error.value)


def test_every_label_of_the_yaml_is_found_by_each_of_its_names():
    shipped = build_control(node("control=prefix"))
    for kind, labels in shipped.labels.items():
        names = [n.lower() for label in labels for n in {label.name, *label.names["zh"], *label.names["en"]}]
        assert len(names) == len(set(names)), f"{kind}: a name stands in two labels"
        assert all(label.words["zh"] and label.words["en"] for label in labels)
    assert {"happy", "sad", "angry", "calm", "fearful", "surprised", "loving", "开心"} <= set(shipped.known(ByteTokenizer())["emotion"])
    assert "poetic" in shipped.known(ByteTokenizer())["style"]


def test_a_label_of_ones_own_needs_one_entry(model):
    mine = prefix(emotion="sleepy", emotions={"sleepy": {"zh": ["困"], "en": ["sleepy"], "words": {"en": ["yawn"]}}}, strength=1.0)
    request = mine.apply(Request("a ", PLAIN, 5, 0), model.tokenizer)
    assert raised(request.sampler.stages[0], model.tokenizer, "a y", model.tokenizer.vocab_size).nonzero().numel() == 1


def test_the_writer_applies_the_control_and_shows_only_the_text(model):
    settings = dataclasses.replace(Settings.of(make_sample_config("max_new_tokens=8")), control=node("control.emotion=happy"))
    writer = Writer(model.network, model.tokenizer)
    results = [p.result for p in writer.write([settings.request("So")]) if p.result]
    assert results[0].prompt_tokens == len("The mood of the following text: happy.\nSo") and len(results[0].text) == 8


def test_the_documented_shares_are_those_that_were_measured():
    text = (ROOT / "docs/interactive.md").read_text(encoding="utf-8")
    results = json.loads((ROOT / "benchmarks/results/control.json").read_text(encoding="utf-8"))["results"]
    for sad, loving in zip(results["sad"], results["loving"], strict=True):
        assert f"| {sad['share']:.2%} | {loving['share']:.2%} |" in text
