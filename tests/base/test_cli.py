"""The command line of the run scripts: how often Hydra composes, and what comes out of it."""

import contextlib
import os
import sys

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from nanogpt.base import cli
from nanogpt.base.language import ConfigError


@pytest.fixture
def composed_how_often(monkeypatch):
    done, compose = [], ConfigLoaderImpl._load_configuration_impl
    monkeypatch.setattr(ConfigLoaderImpl, "_load_configuration_impl", lambda *a, **k: done.append(1) or compose(*a, **k))
    return done


def what_the_task_sees(monkeypatch, *typed):
    seen = []
    monkeypatch.setattr(sys, "argv", ["run_train.py", *typed])
    cli.run_script("train", lambda cfg, words: seen.append(
        (cfg, words, OmegaConf.to_container(HydraConfig.get(), resolve=False)),
    ))
    return seen


@pytest.mark.parametrize("typed", [("max_iters=3", "model=small"), ("hydra.mode=RUN",)])
def test_a_job_is_composed_once_and_as_hydra_itself_does(in_tmp, monkeypatch, composed_how_often, typed):
    once = what_the_task_sees(monkeypatch, *typed)
    assert len(composed_how_often) == 1
    monkeypatch.setattr(cli, "composed_once", contextlib.nullcontext)
    assert what_the_task_sees(monkeypatch, *typed) == once and len(composed_how_often) == 3


@pytest.mark.parametrize(("typed", "often"), [("model.n_lyer=3", 1), ("model=tinny", 1), ("batch_size=4,8", 2)])
def test_a_mistake_is_composed_no_oftener_than_it_must(in_tmp, monkeypatch, capsys, composed_how_often, typed, often):
    with pytest.raises(SystemExit):
        what_the_task_sees(monkeypatch, typed)
    assert len(composed_how_often) == often and capsys.readouterr().err.startswith("error: ")


def test_all_weights_and_frozen_weights_of_4_bits_contradict_each_other(in_tmp, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        what_the_task_sees(monkeypatch, "experiment=finetune_qwen", "memory=lora4", "finetune=full")
    assert capsys.readouterr().err.startswith("error: finetune=full contradicts memory=lora4, ")


def test_the_name_of_the_recipe_is_not_taken_for_the_recipe(in_tmp, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        what_the_task_sees(monkeypatch, "model.arch=gpt2")
    assert capsys.readouterr().err.strip().endswith("choose an architecture with arch=gpt2")


@pytest.mark.parametrize(("typed", "said"), [
    ("dataset=../txt/my.txt", "dataset=../txt/my.txt: there is no such option; for a text of your own type dataset.path=../txt/my.txt"),
    ("dataset=my.txt", "for a text of your own type dataset.path=my.txt"),
    ("dataset=my text.txt", "for a text of your own type 'dataset.path=my text.txt'\n" if os.name != "nt" else "my text.txt"),
    ("dataset=", "dataset=: there is no such option; choose one of: chat, "),
    # 没有引号的空格：shell 拆成了两个
    ("text.txt", "text.txt: this is no key=value; a value with a blank in it is put in quotes as a whole: "),
    ("learning_rate=1e-3，2e-3", "values are parted by an ASCII comma: learning_rate=1e-3,2e-3\n"),
    ("max_iters=many", "max_iters=many has the wrong type: int is wanted\n"),
    ("dataset=shakespere", "dataset=shakespere: there is no such option; choose one of: chat, "),
    ("model=a/b", "model=a/b: there is no such option; choose one of: gpt2, "),
    # 训练不会的格式，也不劝人用
    ("precision=fp8", "precision=fp8: there is no such option; choose one of: auto, bf16, fp16, fp32\n"),
    ("dataset.paht=x", "dataset.paht: there is no such key (did you mean dataset.path?)"),
    ("memory.foo=1", "memory.foo: there is no such key; see conf/train.yaml"),
    ("memory.wieghts=bf16", "(did you mean memory.weights?)"),
])
def test_a_mistake_names_what_was_typed_and_what_can_be_typed_instead(in_tmp, monkeypatch, capsys, typed, said):
    with pytest.raises(SystemExit):
        what_the_task_sees(monkeypatch, typed)
    assert said in (line := capsys.readouterr().err) and line.startswith("error: ") and line.count("\n") == 1


def test_writing_does_not_take_the_groups_of_a_run_that_was_to_be_resumed(in_tmp, monkeypatch, capsys):
    run = in_tmp / "outputs" / "run"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("groups: {optimizer: muon, dataset: text_file, logger: none}\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["run_sample.py", "resume=outputs/run"])
    with pytest.raises(SystemExit):
        cli.run_script("sample", lambda cfg, words: None)
    assert capsys.readouterr().err.startswith("error: resume: there is no such key (did you mean out_dir?)")


RESTARTS = {"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_RESTART_COUNT": "0"}


@pytest.mark.parametrize(("typed", "environment"), [(["resume=auto"], {}), ([], RESTARTS)])
def test_the_same_command_begins_a_training_and_goes_on_with_it(in_tmp, monkeypatch, typed, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    words = ["model=small", "experiment=reviews", "overwrite=true", "out_dir=outputs/a b", "max_iters=9"]
    assert cli.gone_on([*words, *typed]) == words
    (in_tmp / "outputs/a b").mkdir(parents=True)
    assert cli.gone_on([*words, *typed]) == words
    (in_tmp / "outputs/a b/run.json").touch()
    assert cli.gone_on([*words, *typed]) == ["model=small", "out_dir=outputs/a b", "max_iters=9", "resume=outputs/a b"]
    # 写明了接着哪一个的，就是那一个
    assert cli.gone_on([*words, "resume=outputs/c"]) == [*words, "resume=outputs/c"]
    with pytest.raises(ConfigError, match="add out_dir=outputs/my-run"):
        cli.gone_on(["max_iters=9", *typed])


def test_without_the_word_and_without_torchrun_nothing_is_gone_on_with(in_tmp):
    (in_tmp / "run.json").touch()
    assert cli.gone_on(["out_dir=."]) == ["out_dir=."]
