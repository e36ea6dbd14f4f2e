"""A tiny model, a tiny corpus, and configs composed from the real conf/ tree."""

import contextlib
import copy
import functools
import gc
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

# 两个测试进程与它们启动的命令分两个核：等待的线程不能空转，要在 OpenMP 载入之前说
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pytest
import torch
from hydra import initialize_config_dir
from hypothesis import HealthCheck, Phase, settings
from omegaconf import OmegaConf

from nanogpt.base import groups, language
from nanogpt.base.cli import remembered_groups
from nanogpt.base.config import ROOT, ModelConfig, TrainConfig, check
from nanogpt.base.files import sha256
from nanogpt.base.hashed_json import write_sealed
from nanogpt.base.sample_config import SampleConfig, check_sample, register_schemas
from nanogpt.data.corpus import build_char_tokenizer, write_dataset
from nanogpt.run import cpu_units
from nanogpt.weights.build import build_model
from nanogpt.write.control import prefixes

sys.path.append(str(ROOT))
from run_train import hooks

register_schemas()

# 张量极小：多线程只有等待；机器忙时 OpenMP 的自旋会慢上百倍
torch.set_num_threads(1)
os.environ.setdefault("WANDB_MODE", "offline")

TINY = ("model.n_layer=2", "model.n_head=2", "model.n_embd=16", "model.block_size=16", "model.ngrams=[2]", "model.ngram_buckets=97")


def pytest_configure(config):
    """Attacks are short and the same every time; `pytest -m torture` makes many more, other ones every time."""
    every = {
        "deadline": None, "database": None, "print_blob": True, "suppress_health_check": list(HealthCheck),
        # 攻击要起进程、写文件：缩小案例比重来一次贵得多
        "phases": (Phase.explicit, Phase.generate),
    }
    settings.register_profile("short", derandomize=True, **every)
    settings.register_profile("long", **every)
    settings.load_profile("long" if config.getoption("markexpr") == "torture" else "short")


def pytest_runtest_logreport(report):
    """Print the name of a failure at once, not only after minutes."""
    # xdist 的子进程没有终端：由收集结果的那个进程来印
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\nFAILED {report.nodeid} ({report.when})", file=sys.__stderr__, flush=True)


def pytest_collection_finish():
    """Take what is loaded by now out of every garbage collection: torch alone is a million objects."""
    gc.collect()
    gc.freeze()
    # 张量靠引用计数释放；成环的垃圾攒多一些再收
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(autouse=True)
def english():
    """Tests read English messages, whatever the machine speaks."""
    language.set_language("en")
    yield
    language.set_language("en")


@pytest.fixture(autouse=True)
def the_same_random_numbers():
    """What a test draws does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_said_before():
    """What is said once in a process is said once in a test."""
    prefixes._said.clear()


@pytest.fixture(autouse=True)
def no_bf16_units(monkeypatch):
    """Tests see a CPU without bf16 units, whatever the machine has; a test that wants some sets another gain."""
    monkeypatch.setattr(cpu_units, "_known", {})
    monkeypatch.setattr(cpu_units, "gain_of_products", lambda: 0.07)


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """Run in an empty folder: outputs/ lands there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory, corpus_folder) -> Path:
    """A folder with outputs/run, a short run of the tiny model, which is `latest`; read it, or copy it with `own_run`."""
    folder = tmp_path_factory.mktemp("trained")
    with contextlib.chdir(folder):
        train(tiny(corpus_folder))
    return folder


@pytest.fixture
def own_run(in_tmp, trained_once):
    """Run in a folder that holds a copy of that run."""
    shutil.copytree(trained_once, in_tmp, dirs_exist_ok=True)
    return in_tmp


def corpus_text(words: int = 1400) -> str:
    """A text with structure that a tiny model can learn."""
    chosen = ["the", "king", "and", "queen", "of", "love", "speaks", "no", "more", "words"]
    return "".join(chosen[i] + (" " if i % 3 else "\n") for i in np.random.default_rng(0).integers(0, len(chosen), words))


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory) -> Path:
    """A prepared character data set of 6,000 tokens."""
    text = corpus_text()
    tokenizer = build_char_tokenizer([text])
    ids = tokenizer.encode(text)[:6000]
    folder = tmp_path_factory.mktemp("corpus") / "prepared"
    return write_dataset(folder, name="text_file", source="test", tokenizer=tokenizer, train=[ids[:5000]], val=[ids[5000:]])


def composed(config_name: str, overrides: list[str]):
    """The typed config that a run script would see for these overrides."""
    return copy.deepcopy(_composed(config_name, tuple(overrides)))


@functools.cache
def _composed(config_name: str, overrides: tuple[str, ...]):
    if any(one.startswith("hydra.searchpath") for one in overrides):
        # 那里的文件随测试而变，不能记住
        with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
            node, choices = groups.Composer(config_name).composed(list(overrides))
    else:
        node, choices = _composer(config_name).composed(list(overrides))
    cfg = OmegaConf.to_object(node)
    cfg.groups = choices
    return cfg


# 许多测试用的是同样的组
_composer = functools.cache(groups.Composer)


@functools.cache
def shipped_yaml() -> list[Path]:
    """The files of conf/ that belong to the project, by what git tracks; without git all of them. Others are the user's own."""
    done = subprocess.run(["git", "ls-files", "-z", "conf/*.yaml"], cwd=ROOT, capture_output=True, check=False)
    tracked = [ROOT / os.fsdecode(name) for name in done.stdout.split(b"\0") if name]
    return sorted(path for path in tracked if path.is_file()) or sorted((ROOT / "conf").rglob("*.yaml"))


def shipped_options() -> dict[str, list[str]]:
    """The options of each configuration group that belong to the project."""
    groups = sorted({path.parent for path in shipped_yaml()} - {ROOT / "conf"})
    return {group.name: [path.stem for path in shipped_yaml() if path.parent == group] for group in groups}


def reseal(folder: Path, name: str = "manifest.json") -> None:
    """Make a changed checkpoint (or with meta.json a data set) agree with itself again, as someone would who means harm."""
    values = json.loads((folder / name).read_text(encoding="utf-8"))
    hashes = {file: sha256(folder / file) for file in values["sha256"] if (folder / file).is_file()}
    write_sealed(folder / name, {**values, "sha256": hashes})


def make_config(*overrides: str, checked: bool = True) -> TrainConfig:
    """The TrainConfig that run_train.py would see for these overrides."""
    cfg = composed("train", list(overrides))
    if checked:
        check(cfg)
    return cfg


def make_sample_config(*overrides: str) -> SampleConfig:
    """The checked SampleConfig that run_sample.py would see for these overrides."""
    cfg = composed("sample", list(overrides))
    check_sample(cfg)
    return cfg


def tiny(corpus_folder) -> list[str]:
    """Overrides of a run that takes a second on a CPU."""
    return [
        *TINY, "dataset=text_file", f"dataset.dir={corpus_folder}", "dataset.path=unused.txt", "logger=none", "device=cpu", "max_iters=6",
        "batch_size=4", "eval_batch_size=32", "eval_interval=3", "eval_tokens=null", "log_interval=1", "sample_tokens=8", "warmup_iters=2", "learning_rate=1e-2",
    ]


@pytest.fixture
def tiny_overrides(corpus_folder):
    """The same, as a list of one's own."""
    return tiny(corpus_folder)


# ---- 训练：测试里只用这几个函数，不碰 Session 怎样拼起来 ----


def new_session(overrides, *more, out="outputs/run"):
    """The session of a new run in `out`."""
    from nanogpt.run.session import Session

    cfg = make_config(*overrides, *more)
    # 目录名不经 Hydra：同一组 overrides 只拼一次
    cfg.out_dir = str(out)
    return Session.new(cfg, Path(out), [*overrides, *more], hooks())


def new_trainer(overrides, *more, out="outputs/run"):
    """The trainer of a new run, before its first step."""
    return new_session(overrides, *more, out=out)._build()


def train(overrides, *more, out="outputs/run"):
    """The trainer of a new run, at its end."""
    trainer = new_trainer(overrides, *more, out=out)
    trainer.fit()
    return trainer


def resume(out, *overrides):
    """The session of `resume=out` and what else was typed."""
    from nanogpt.run.session import Session

    typed = [f"resume={out}", *overrides]
    return Session.resume(make_config(*typed, *remembered_groups(typed), checked=False), list(overrides), Path(out), hooks())


def resumed_trainer(out, *overrides):
    """The trainer of a run that goes on, before its next step."""
    return resume(out, *overrides)._build()


def kernels(name: str):
    """A module of compiled code; what needs it is skipped where numba is missing, and only there."""
    pytest.importorskip("numba")
    return importlib.import_module(name)


def tiny_model_config(**changes) -> ModelConfig:
    """A ModelConfig that builds in milliseconds."""
    return ModelConfig(**{"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 11, "ngrams": [], **changes})


def wild_model(*, std: float = 0.3, **changes):
    """A tiny model in evaluation mode, every weight random, so that logits differ and greedy choices are stable."""
    model = build_model(tiny_model_config(**changes), 0).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


GPT2_RECIPE = {
    "arch": "gpt2", "position": "learned", "norm": "layernorm", "activation": "gelu_tanh", "bias": True, "qk_norm": False,
    "embed_norm": False, "tie_embeddings": True, "init": "gpt2", "logit_softcap": 0.0,
}
LLAMA_RECIPE = {
    "arch": "llama", "norm_gain": True, "norm_eps": 1e-5, "activation": "swiglu", "intermediate_size": 24, "qk_norm": False, "embed_norm": False,
    "logit_softcap": 0.0, "n_head": 4, "n_kv_head": 2, "rope_scaling": "llama3", "rope_factor": 4.0, "rope_original_length": 16,
}
QWEN3_RECIPE = {
    **LLAMA_RECIPE, "arch": "qwen3", "qk_norm": True, "n_kv_head": 1, "head_dim": 6, "tie_embeddings": True, "rope_scaling": "linear", "qkv_bias": True,
}


@contextlib.contextmanager
def no_grad_eval(model):
    """Evaluate without dropout or gradients."""
    model.eval()
    with torch.no_grad():
        yield model
    model.train()
