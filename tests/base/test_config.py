"""The config tree composes; every wrong value is one line that names the key."""

import ast
import dataclasses
import inspect
import re
import string
import textwrap

import pytest
import yaml
from conftest import TINY, make_config, make_sample_config, shipped_options
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from nanogpt.base import groups, language, parts
from nanogpt.base.cli import with_integers
from nanogpt.base.composing import OTHER_NAMES, guess_of, known_keys
from nanogpt.base.config import (
    REQUIRED,
    ROOT,
    ModelConfig,
    TrainConfig,
    check,
    keys,
    trusted_targets,
    untrusted_targets,
)
from nanogpt.base.language import ConfigError
from nanogpt.base.sample_config import SampleConfig
from nanogpt.base.value_checks import check_value
from nanogpt.weights import build
from nanogpt.weights.build import build_sampler

GROUPS = shipped_options()
# 只属于 run_sample.py 的配置组与选项
SAMPLE_GROUPS = ("sampler", "control")
SAMPLE_OPTIONS = [(group, option) for group in SAMPLE_GROUPS for option in GROUPS.get(group, [])] + [("precision", option) for option in GROUPS["precision"]]
OPTIONS = [(group, option) for group, options in GROUPS.items() for option in options if group not in SAMPLE_GROUPS and (group, option) not in (("precision", "int8"), ("precision", "int4"))]


def test_what_differs_in_values_is_composed_to_what_hydra_itself_composes():
    composer = groups.Composer("train")
    for words in (
        ["experiment=cpu_speedrun", "learning_rate=1e-3"], ["experiment=cpu_speedrun", "learning_rate=3e-3", "model.ngrams=[2,3]", "max_minutes=null"],
        ["experiment=cpu_speedrun", "model=tiny", "dropout=${grad_clip}"], ["optimizer=adamw", "optimizer.beta1=0.8", "+logger={mine: {x: 1}}", "logger.mine.x=2"],
        ["optimizer=adamw", "optimizer.beta1=0.7", "~logger", "dataset=text_file", "dataset.path='a, b'"], ["optimizer=adamw", "optimizer.beta1=0.7"],
    ):
        composed, (node, choices) = groups._composed("train", words), composer.composed(words)
        assert OmegaConf.to_yaml(node) == OmegaConf.to_yaml(composed[0]) and choices == composed[1]
    with pytest.raises(ConfigCompositionException) as said:
        composer.composed(["optimizer=adamw", "optimizer.beta=0.7"])
    with pytest.raises(ConfigCompositionException) as wanted:
        groups._composed("train", ["optimizer=adamw", "optimizer.beta=0.7"])
    assert str(said.value) == str(wanted.value)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_yaml_composes_and_passes_the_checks(group, option):
    cfg = make_config(f"{group}={option}")
    for name, node in {"optimizer": cfg.optimizer, **{f"logger.{k}": v for k, v in cfg.logger.items()}}.items():
        assert callable(parts.locate_class(node["_target_"], name))


@pytest.mark.parametrize(("group", "option"), SAMPLE_OPTIONS)
def test_every_yaml_of_run_sample_composes_and_is_built(group, option):
    cfg = make_sample_config(f"{group}={option}")
    assert callable(build_sampler(cfg.sampler))


@pytest.mark.parametrize("optimizer", GROUPS["optimizer"])
def test_every_optimizer_yaml_is_built(optimizer):
    cfg = make_config(f"optimizer={optimizer}", *TINY)
    cfg.model.vocab_size = 11
    model = build.build_model(cfg.model, 0)
    built = parts.build_part(cfg.optimizer, "optimizer", model)
    in_groups = [p for g in built.param_groups for p in g["params"]]
    assert len(in_groups) == len({id(p) for p in in_groups}) == len(list(model.parameters()))


@pytest.mark.parametrize("logger", [name for name in GROUPS["logger"] if name not in ("none", "jsonl")])
def test_every_logger_yaml_is_built(logger):
    cfg = make_config(f"logger={logger}")
    assert [parts.build_part(node, name) for name, node in cfg.logger.items()]


def test_presets_have_the_promised_shapes():
    shapes = {n: build.preset(n) for n in GROUPS["model"]}
    got = {n: (c.n_layer, c.n_head, c.n_embd, c.block_size) for n, c in shapes.items()}
    assert got == {
        "tiny": (4, 4, 256, 128), "small": (6, 6, 384, 256), "medium": (12, 12, 768, 512), "large": (24, 16, 1024, 1024),
        "gpt2": (12, 12, 768, 1024), "gpt2_medium": (24, 16, 1024, 1024), "gpt2_large": (36, 20, 1280, 1024), "gpt2_xl": (48, 25, 1600, 1024),
        "gpt_3b": (36, 20, 2560, 1024),
    }


@pytest.mark.parametrize("name", GROUPS["model"])
def test_python_presets_equal_the_composed_config(name):
    assert build.preset(name) == make_config(f"model={name}").model.completed()


def test_gpt2_presets_bring_their_recipe_and_the_command_line_wins():
    assert make_config("model=gpt2").model.position == "learned"
    assert make_config("model=gpt2", "arch=modern").model.position == "rope"


BAD = {
    "model.n_embd=100 model.n_head=12": "model.n_embd=100 is not divisible by model.n_head=12; choose a multiple of 12",
    "model.n_embd=36 model.n_head=4": "odd", "arch=qwen3 model.head_dim=7": "model.head_dim=7 is odd",
    "arch=llama model.n_kv_head=3": "model.n_head=4 is not divisible by model.n_kv_head=3; choose a divisor of 4",
    "learning_rate=-1": "learning_rate=-1.0 is out of range",
    "learning_rate=0": "learning_rate",
    "learning_rate=nan": "learning_rate",
    "min_lr=1 learning_rate=0.1": "min_lr=1.0 is above learning_rate=0.1",
    "warmup_iters=1000 max_iters=100": "warmup_iters=1000 is not shorter than max_iters=100",
    "warmup_iters=50 lr_decay_iters=20": "lr_decay_iters",
    "batch_size=0": "batch_size=0 is out of range",
    "gradient_accumulation_steps=-2": "gradient_accumulation_steps",
    "max_iters=0": "max_iters",
    "max_tokens=0": "max_tokens=0 is out of range",
    "max_tokens=lots": "max_tokens=lots is not known; choose one of: 1 … 1e+15 | auto | null",
    "max_minutes=0": "max_minutes=0.0 is out of range",
    "warmup_iters=100 max_tokens=4096": "warmup_iters=100 is not shorter than max_iters=2",
    "model.dropout=1.0": "model.dropout",
    "model.block_size=0": "model.block_size",
    "device=tpu": "device=tpu is not known",
    "lang=fr": "lang=fr is not known; choose one of: auto | zh | en",
    "compile=maybe": "compile",
    "lr_schedule=step": "lr_schedule",
    "precision.dtype=fp8": "precision.dtype",
    "model.position=alibi": "model.position",
    "memory.activation_checkpointing=some": "memory.activation_checkpointing",
    "memory=minimal gradient_accumulation_steps=4": "cannot accumulate 64 rows in pieces of batch_size=16",
    "memory=minimal precision=fp16": "memory.weights=bf16 computes in bf16",
    "memory=lora4 finetune.method=full": "finetune.frozen_weights=nf4: finetune.method=full freezes no weights",
    "dataset.name=nothing": "data/nothing/prepare.py",
    "dataset.name=../evil": "dataset.name",
    "checkpoint=1e9 init_from=outputs/run": "is not known; choose one of: last | best | iter_00001000",
    "checkpoint=best": "there is no run to take it from; add resume=",
    "keep=0": "keep",
    "sample_temperature=-1": "sample_temperature",
    "model.ngrams=[1]": "model.ngrams",
}


@pytest.mark.parametrize("overrides", BAD)
def test_bad_values_are_one_line_naming_key_value_and_remedy(overrides):
    with pytest.raises(ConfigError) as error:
        make_config(*overrides.split())
    assert BAD[overrides] in str(error.value) and "\n" not in str(error.value)
    language.set_language("zh")
    assert "\n" not in str(error.value) and re.search("[一-鿿]", str(error.value))


def test_whole_numbers_may_be_typed_as_floats():
    def integers(typed, schema=TrainConfig):
        return with_integers(typed, schema)

    assert [integers(f"max_iters={n}") for n in ("1e3", "2000.0", "5.0E+2,1_000e1", "1e-3", "1.5e0", "range(1e1,2e1)")] == [
        f"max_iters={n}" for n in ("1000", "2000", "500,10000", "1e-3", "1.5e0", "range(10,20)")]
    assert integers("dataset.vocab_size=8e3") == "dataset.vocab_size=8000" and integers("optimizer.eps=1.0") == "optimizer.eps=1.0"
    for kept in ("learning_rate=1e0", "out_dir=1e3", "sample_prompt=1e3", "lr_schedule=1e3", "max_iters='1e3'", "max_iters=v1e3", "batch_size=auto"):
        assert integers(kept) == kept
    assert make_config(integers("batch_size=4e0"), integers("model.ngrams=[2e0,3]")).model.ngrams == [2, 3]


@pytest.mark.parametrize("script", ["train", "sample"])
def test_names_of_other_programs_lead_to_a_key_that_there_is(script):
    make = {"train": make_config, "sample": make_sample_config}[script]
    for name, meant in OTHER_NAMES[script].items():
        assert guess_of(name, script) == meant and name not in known_keys(script)
        *groups, key = meant.split() if "=" not in meant.split()[-1] else [*meant.split(), None]
        cfg = make(*groups, *(["dataset=text_file"] if (key or "").startswith("dataset") else []), *(["logger=wandb"] if (key or "").startswith("logger") else []))
        node = cfg
        for part in key.split(".") if key else ():
            node = node[part] if isinstance(node, dict) else getattr(node, part)
    assert guess_of("n_layer", "train") == "model.n_layer" and guess_of("bias", "train") == "model.bias" and guess_of("port", "sample") == "server.port"


@pytest.mark.parametrize(("word", "remedy"), [("scratch", "leave it out"), ("resume", "resume=outputs/my-run")])
def test_words_of_nanogpt_for_where_a_model_comes_from_are_explained(word, remedy):
    for make in (make_config, make_sample_config):
        with pytest.raises(ConfigError, match=f"^init_from={word}.*{remedy}"):
            make(f"init_from={word}")


@pytest.mark.parametrize(("script", "schema"), [("train", TrainConfig), ("sample", SampleConfig)])
def test_a_top_level_key_has_one_default_and_it_is_in_the_yaml(script, schema):
    node = yaml.safe_load((ROOT / "conf" / f"{script}.yaml").read_text(encoding="utf-8"))
    groups = {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()} | {"groups", "search"}
    # search 的默认值在 experiment/search.yaml：不搜索的人不必看见它
    for key, field in keys(schema):
        top, _, name = key.partition(".")
        if top not in groups:
            assert field.default is field.default_factory is REQUIRED, key
            assert name in node[top] if name else top in node, key


def test_an_option_that_shows_a_default_shows_the_one_of_the_field():
    for group, option in (("memory", "default"), ("hardware", "auto"), ("finetune", "full"), ("finetune", "lora"), ("arch", "modern")):
        node = yaml.safe_load((ROOT / "conf" / group / f"{option}.yaml").read_text(encoding="utf-8"))
        fresh = {"arch": ModelConfig}.get(group) or dict(keys(TrainConfig))[group].type
        assert {**dataclasses.asdict(fresh()), **node, "method": "full"} == {**dataclasses.asdict(fresh()), "method": "full"}


def test_every_key_is_described_in_english_beside_its_field():
    for schema in {TrainConfig, SampleConfig} | {field.type for root in (TrainConfig, SampleConfig) for _, field in keys(root) if dataclasses.is_dataclass(field.type)}:
        body = ast.parse(textwrap.dedent(inspect.getsource(schema))).body[0].body
        for field, after in zip(body, [*body[1:], None]):
            if isinstance(field, ast.AnnAssign) and not dataclasses.is_dataclass(schema.__dataclass_fields__[field.target.id].type):
                assert isinstance(after, ast.Expr) and after.value.value.endswith((".", "…")), (schema, field.target.id)


@pytest.mark.parametrize("script", ["train", "sample"])
def test_every_top_level_key_of_the_run_scripts_is_documented(script):
    lines = (ROOT / "conf" / f"{script}.yaml").read_text(encoding="utf-8").splitlines()
    keys = [line for line in lines if re.match(r"[a-z_]+:", line) and not line.startswith(("defaults", "hydra"))]
    assert keys and all("#" in line for line in keys)


SAYING = {"ConfigError": 0, "Diverged": 0, "say": 0, "say_once": 0, "text": 0, "sentence": 0, "line": 0, "text_in": 1}


def sentences_said():
    """First arguments, where they are literals, of everything that says a sentence."""
    for path in [*(ROOT / "nanogpt").rglob("*.py"), *(ROOT / "data").glob("*/prepare.py"), *ROOT.glob("run_*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(node, "func", None) and (getattr(node.func, "attr", None) or getattr(node.func, "id", None))
            if name in SAYING and len(node.args) > SAYING[name] and isinstance(said := getattr(node.args[SAYING[name]], "value", None), str):
                yield said
    for path in (ROOT / "nanogpt").rglob("*.html"):
        yield from re.findall(r'\btext\("([^"]+)"', path.read_text(encoding="utf-8"))


def test_every_sentence_has_its_chinese_with_the_same_placeholders_and_none_is_dead():
    def names(template):
        return {field for _, field, _, _ in string.Formatter().parse(template) if field}

    said = {language.NAMED.get(sentence, sentence) for sentence in sentences_said()} | set(language.NAMED.values())
    chinese = language.chinese()
    assert said - {""} == set(chinese)
    assert all(names(en) == names(zh) for en, zh in chinese.items())


def test_a_sentence_that_is_said_in_several_places_has_a_name():
    said = [sentence for sentence in sentences_said() if sentence and sentence not in language.NAMED]
    assert sorted(said) == sorted(set(said))


def test_every_named_sentence_is_said():
    files = [*(ROOT / "nanogpt").rglob("*.py"), *(ROOT / "nanogpt").rglob("*.html"), *(ROOT / "data").glob("*/prepare.py")]
    code = "".join(path.read_text(encoding="utf-8") for path in files if path.name != "language.py")
    assert not {name for name in language.NAMED if f'"{name}"' not in code}


def test_targets_of_strangers_are_found_wherever_they_hide():
    saved = {"model": {"_target_": "nanogpt.core.model.GPT"}, "logger": {"x": {"_target_": "os.system", "y": [{"_target_": "evil.run"}]}}}
    assert untrusted_targets(saved, {}) == ["evil.run", "os.system"]
    assert untrusted_targets(saved, {"a": {"_target_": "evil.run"}}) == ["os.system"]
    assert all(target.startswith("nanogpt.") for target in trusted_targets()) and len(trusted_targets()) == 6


def test_check_does_not_import_torch():
    import subprocess
    import sys

    code = "import sys, nanogpt.base.cli, nanogpt.base.config, nanogpt.base.sample_config, nanogpt.run.rundir, run_train, run_sample; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_valid_configuration_passes():
    check(make_config("model=medium", "precision=fp16", "warmup_iters=0", "lr_schedule=constant"))


@pytest.mark.parametrize("key", ["out_dir", "resume", "init_from", "dataset.path", "dataset.dir"])
def test_a_control_character_in_a_path_is_refused(key):
    with pytest.raises(ConfigError, match=rf"{key}=.*control character"):
        check_value(key, "a\x1b]0;x\x07")
