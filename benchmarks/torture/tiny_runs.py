"""Trainings of a second on a tiny model, in this process, for the attacks on numbers and memory."""

import argparse
import contextlib
import copy
import functools
import io
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import yaml
from hydra import compose, initialize_config_dir
from ledger import ROOT, Ledger
from omegaconf import OmegaConf
from safetensors.torch import load_file

from nanogpt.base import language as messages
from nanogpt.base.config import TrainConfig, check
from nanogpt.base.sample_config import register_schemas
from nanogpt.data.corpus import build_char_tokenizer, write_dataset
from nanogpt.data.documents import Document, write_documents
from nanogpt.data.tokenizer import CharTokenizer
from nanogpt.run.health import Health, floating
from nanogpt.run.saving import Progress
from nanogpt.run.session import Session
from nanogpt.run.trainer import Trainer
from nanogpt.weights import checkpoint

LETTERS = "abcdefghij"
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "ngrams": [2], "ngram_buckets": 97}
QUICK = {
    "device": "cpu", "max_iters": 12, "batch_size": 4, "eval_interval": 4, "eval_tokens": None, "log_interval": 4, "sample_tokens": 0,
    "warmup_iters": 2, "learning_rate": 1e-2, "compile": "false",
}


@functools.cache
def composed(*groups: str) -> TrainConfig:
    """The config of these groups, before values are laid over it."""
    register_schemas()
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
        return OmegaConf.to_object(compose(config_name="train", overrides=["dataset=text_file", "dataset.path=unused.txt", "logger=none", *groups]))


class Lab:
    """A folder with a prepared text and prepared documents, in which every training gets a folder of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.count = 0
        # 量一次矩阵乘的峰值要三分之一秒，这里用不到
        self.peak = {"peak_tflops_fp32": 1.0, "peak_tflops_half": 1.0}
        torch.set_num_threads(1)
        with contextlib.redirect_stderr(io.StringIO()):
            self.data = {"text": text_folder(folder / "text"), "documents": document_folder(folder / "documents")}

    def config(self, *groups: str, data: str = "text", **values) -> TrainConfig:
        """A checked config; values are the keys of conf/train.yaml with __ for the dots, as are "a.b=c" among the groups."""
        dotted = dict(group.split("=") for group in groups if "." in group)
        values = {**{key.replace(".", "__"): yaml.safe_load(value) for key, value in dotted.items()}, **values}
        # 拼一次配置要半秒：只有真正的配置组交给 Hydra
        cfg = copy.deepcopy(composed(*(group for group in groups if "." not in group)))
        cfg.dataset["dir"] = str(self.data[data])
        cfg.groups = {}
        for field, value in SHAPE.items():
            setattr(cfg.model, field, value)
        for field, value in self.peak.items():
            setattr(cfg.hardware, field, value)
        for key, value in {**QUICK, **values}.items():
            *path, last = key.split("__")
            setattr(functools.reduce(getattr, path, cfg), last, value)
        check(cfg)
        return cfg

    def trainer(self, *groups: str, session: type[Session] = Session, **values) -> Trainer:
        """A trainer in a new folder; what it says goes to trainer.said."""
        cfg = self.config(*groups, **values)
        self.count += 1
        cfg.out_dir = str(self.folder / f"run_{self.count}")
        return self.built(lambda: session.new(cfg, Path(cfg.out_dir)))

    def resumed(self, run_dir: Path, **values) -> Trainer:
        """The training in run_dir from its last checkpoint, in a new Trainer."""
        return self.built(lambda: self.resuming(run_dir, **values))

    def resuming(self, run_dir: Path, **values) -> Session:
        """The session of `resume=run_dir` and these keys."""
        typed = OmegaConf.to_object(OmegaConf.structured(TrainConfig(optimizer={}, dataset={})))
        typed.resume = str(run_dir)
        overrides = []
        for key, value in values.items():
            setattr(typed, key, value)
            overrides.append(f"{key}={value}")
        return Session.resume(typed, overrides, run_dir)

    def built(self, session) -> Trainer:
        """The trainer of session(), built with the console listening to trainer.said."""
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            trainer = session()._build()
        trainer.said = said
        return trainer

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """English messages, and work in the lab's folder."""
        before, language = Path.cwd(), messages.current_language()
        messages.set_language("en")
        os.chdir(self.folder)
        try:
            yield
        finally:
            os.chdir(before)
            messages.set_language(language)


def text_folder(folder: Path) -> Path:
    """6,000 characters with a structure that a tiny model can learn."""
    words = ["the", "king", "and", "queen", "of", "love", "speaks", "no", "more", "words"]
    random = np.random.default_rng(0)
    text = "".join(words[i] + (" " if i % 3 else "\n") for i in random.integers(0, len(words), 1400))
    tokenizer = build_char_tokenizer([text])
    ids = tokenizer.encode(text)[:5600]
    # 验证部分除不尽 block_size：末尾总有一个短窗口
    return write_dataset(folder, name="text_file", source="attack", tokenizer=tokenizer, train=[ids[:5000]], val=[ids[5000:]])


def document_folder(folder: Path) -> Path:
    """200 short documents with labels, which fill their rows unevenly."""
    random = np.random.default_rng(0)
    documents = []
    for _ in range(212):
        text = "".join(random.choice(list(LETTERS), random.integers(1, 31)))
        labels = (str(random.choice(names)) if random.random() < 0.8 else None for names in (["verse", "prose"], ["glad", "sad"]))
        documents.append(Document(text, *labels))
    parts = {"train": documents[:200], "val": documents[200:]}
    return write_documents(folder, name="labelled", source="attack", tokenizer=CharTokenizer(LETTERS), parts=parts)


def start_again(trainer) -> None:
    """Bring a trainer back to iteration 0, as it was built; its checkpoints stay."""
    if not hasattr(trainer, "beginning"):
        scaler = trainer.precision.scaler
        trainer.beginning = {name: t.detach().clone() for name, t in trainer.model.state_dict().items()}, scaler.state_dict(), trainer.micro_batch
    weights, scale, trainer.micro_batch = trainer.beginning
    trainer.model.load_state_dict(weights)
    trainer.optimizer.state.clear()
    trainer.precision.scaler.load_state_dict(scale) if scale else None
    trainer.progress, trainer.health, trainer.prepared, trainer.saved = Progress(), Health(trainer), False, None


# ---- 比较 ----


def snapshot(trainer) -> dict[str, torch.Tensor]:
    """Copies of every weight and optimizer state, 8-bit codes included."""
    tensors = {name: t.detach().clone() for name, t in trainer.model.state_dict().items()}
    for name, state in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{name}.{key}": t.detach().clone() for key, t in state.items()}
    return tensors


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> str | None:
    """The first tensor that differs by a bit, or None."""
    if set(a) != set(b):
        return f"tensors {sorted(set(a) ^ set(b))[:3]} exist in one only"
    return next((name for name in a if not torch.equal(a[name], b[name])), None)


def counters(trainer) -> dict:
    """The progress without clock times."""
    return {key: value for key, value in vars(trainer.progress).items() if key != "train_s"}


def checkpoint_fault(run_dir: Path) -> str | None:
    """What is wrong with the checkpoints of a run: damage, tensors that are not finite, a best that is not the best; or None."""
    found = checkpoint.checkpoints(run_dir)
    for one in found:
        if problem := one.problem():
            return f"{one.name}: {problem}"
        if one.val_loss is not None and not math.isfinite(one.val_loss):
            return f"{one.name}: val_loss={one.val_loss}"
        tensors = load_file(one.folder / "model.safetensors")
        for name, tensor in [*floating(tensors), *floating(one.load_state())]:
            if not torch.isfinite(tensor).all():
                return f"{one.name}: {name} is not finite"
    best, evaluated = checkpoint.best_of(found), [c.val_loss for c in found if c.val_loss is not None]
    if evaluated and best.val_loss != min(evaluated):
        return f"best is {best.name} with {best.val_loss}, the lowest is {min(evaluated)}"
    return None


# ---- 主程序 ----


def main(ledger: Ledger, documentation: str, attack: Callable, commands: Callable, *, cases: int, of: str) -> int:
    """The command line of an attack: `attack` in this process, then `commands` in processes of their own."""
    parser = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=cases, help=f"{of}; the other kinds in proportion")
    parser.add_argument("--seed", type=int, default=0)
    arguments, started = parser.parse_args(), time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        attack(ledger, folder=Path(folder), cases=arguments.cases, seed=arguments.seed)
        commands(ledger, Lab(Path(folder) / "commands"))
    ledger.figures["seconds"] = round(time.monotonic() - started)
    return ledger.finish()
