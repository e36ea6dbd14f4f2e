"""The commands as a person types them, a trial that CUDA aborts, and how well a model learns in minutes."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from card_parts.kit import ROOT, Case, Lab
from torch._subclasses.fake_tensor import FakeTensor

from nanogpt.core.model import GPT

SHAKESPEARE = (
    "dataset=shakespeare_char", "model.n_layer=6", "model.n_head=6", "model.n_embd=384", "model.block_size=256",
    "dropout=0.2",
    "batch_size=64", "learning_rate=1e-2", "max_iters=2000", "eval_interval=250", "eval_tokens=null",
    "eval_batch_size=128",
    "target_val_loss=1.42", "sample_tokens=0", "logger=none", "lang=en",
)
TOY = (
    "model.n_layer=1", "model.n_embd=16", "model.n_head=2", "model.block_size=16", "max_iters=2", "eval_tokens=64",
    "sample_tokens=4",
)


class Aborting(GPT):
    """A model whose training step ends in what CUDA does not survive."""

    def loss(self, x, *arguments, **options):
        if isinstance(x, FakeTensor):
            # 试跑先算计划：那里没有卡可坏
            return super().loss(x, *arguments, **options)
        if x.is_cuda:
            # 下标越界是设备上的断言：此后这个进程里什么都不能做
            self.wte.weight[torch.full((4,), 2**30, device=x.device)].sum().item()
        os.abort()


def cases(lab: Lab) -> Iterator[Case]:
    """Each command in a process of its own, so that its seconds are those of a person."""
    out = lab.folder / "command"
    yield "default run, compile=auto", lambda: train(lab, out, "compile=auto")
    yield "resume", lambda: train(lab, out, f"resume={out}", f"max_iters={4 if lab.pretend else 300}")
    sampling = (f"out_dir={out}", f"device={lab.device}", "max_new_tokens=40", "num_samples=2")
    yield "run_sample", lambda: command(lab, "run_sample.py", *sampling)
    yield "plan", lambda: command(lab, "run_train.py", "plan=true", *base(lab))
    yield "a trial that is aborted", lambda: trial(lab)
    yield "default run, compile=false", lambda: train(lab, lab.run_folder(), "compile=false")
    if not lab.pretend:
        auto = ("batch_size=auto", "global_batch_size=32", "max_iters=50")
        yield auto[0], lambda: train(lab, lab.run_folder(), *auto)
        yield "quality", lambda: quality(lab)


def base(lab: Lab) -> tuple[str, ...]:
    """The synthetic text in the place of plays."""
    return (
        "dataset=text_file", "dataset.path=unused.txt", f"dataset.dir={lab.data('letters')}", "logger=none", "lang=en",
        f"device={lab.device}", *(TOY if lab.pretend else ()),
    )


def command(lab: Lab, script: str, *overrides: str) -> dict:
    """Run a command to its end: its seconds, its last lines where it failed, and what it warned of."""
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *overrides], cwd=lab.folder, capture_output=True, text=True, stdin=subprocess.DEVNULL,
            encoding="utf-8", errors="replace", timeout=max(1.0, min(lab.left(), 600.0)),
            env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        )
    except subprocess.TimeoutExpired:
        return {"skipped": "no time left to end", "command_s": time.perf_counter() - started}
    said = [line for line in done.stderr.splitlines() if "arning" in line]
    found = {"ok": done.returncode == 0, "command_s": time.perf_counter() - started, "said": said[:5]}
    last = " | ".join((done.stdout + done.stderr).splitlines()[-6:])[-600:]
    return found if found["ok"] else {**found, "error": last}


def train(lab: Lab, out: Path, *overrides: str) -> dict:
    """A training, and what its summary says."""
    resumed = any(override.startswith("resume=") for override in overrides)
    found = command(lab, "run_train.py", *(() if resumed else (*base(lab), f"out_dir={out}")), *overrides)
    return {**found, **summary_of(out)}


def summary_of(out: Path) -> dict:
    """What is compared of a run's summary, where there is one."""
    file = out / "summary.json"
    wanted = ("tokens_per_s", "val_loss", "best_val_loss", "wall_s", "train_s", "stopped_by")
    summary = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {key: summary[key] for key in wanted if key in summary}


def trial(lab: Lab) -> dict:
    """A trial whose process dies is a result, and this process goes on."""
    from nanogpt.sweep.trial import run_trial

    cfg = lab.config(*base(lab), "trial.enabled=true", "trial.again=true", "trial.timeout_s=60", "batch_size=2")
    cfg.model._target_ = "card_parts.commands.Aborting"
    result = run_trial(cfg, [], lab.run_folder())
    alive = torch.ones(2, device=lab.device).sum().item() == 2
    return {"ok": result.status == "crashed" and alive, "status": result.status, "reason": result.reason}


def quality(lab: Lab) -> dict:
    """tiny-shakespeare at 6 layers, 384 wide, to a validation loss of 1.42, where the text is at hand."""
    prepared = ROOT / "data" / "shakespeare_char" / "prepared" / "meta.json"
    mirror = os.environ.get("NANOGPT_ASSETS")
    if not prepared.is_file() and not (mirror and (Path(mirror) / "tinyshakespeare.txt").is_file()):
        return {"skipped": "the text of tiny-shakespeare is not here"}
    if lab.left() < 60:
        return {"skipped": "no time left"}
    out = lab.run_folder()
    found = {**command(lab, "run_train.py", *SHAKESPEARE, f"out_dir={out}", f"device={lab.device}"), **summary_of(out)}
    if "skipped" in found:
        return found
    return {**found, "ok": found["ok"] and found.get("best_val_loss", math.inf) <= 1.42}
