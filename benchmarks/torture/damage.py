"""Random faults in run folders, data sets and weights from elsewhere: each is named before anything is made of it.

    python benchmarks/torture/damage.py            # 1,500 faults; writes benchmarks/results/torture_damage.json
    python benchmarks/torture/damage.py --cases 60 --seed 7

Accidents (flipped bits, truncation, lost, swapped and foreign files, other format versions) must be refused in one line, or the file
must not matter: then what is loaded equals the undamaged to the bit. Where an older checkpoint is good it must be offered, and work.
Malice (files that agree with their own hashes: planted pickles, bombs, sizes and offsets that lie) must be refused, or load without
running code, without hanging and without more memory than the model needs. POSIX only: the runs are forks of this process.
"""

import argparse
import contextlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from faults import ACCIDENTS, malicious, malicious_data, malicious_weights, swapped
from forked import train
from kill import TINY, write_text_file
from ledger import Ledger

# isort: split
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from nanogpt.base import language
from nanogpt.base.config import ROOT, HardwareConfig
from nanogpt.base.language import ConfigError
from nanogpt.base.sample_config import register_schemas
from nanogpt.core import machine
from nanogpt.data.documents import open_data
from nanogpt.run.session import Session
from nanogpt.weights import checkpoint
from nanogpt.weights.pretrained import build_pretrained, open_pretrained
from nanogpt.write import loading

ITERATIONS = (10, 20, 30)
HANG_S = 30
# 这些模型只有几千个参数：正常装入，内存几乎不涨
MOST_GROWTH_MIB = 300
SENTINEL = "code-from-a-file-has-run"


class HungError(BaseException):
    """A load took longer than HANG_S."""


# ---- 材料 ----


def build(place: Path, names: tuple[str, ...]) -> None:
    """Two runs of equal shape (a, b), one run of documents, and one of gpt2 with a folder in Hugging Face's format."""
    write_text_file(place)
    words = (place / "my.txt").read_text(encoding="utf-8").splitlines()
    lines = [json.dumps({"text": line[:30], "style": ("plain", "grand")[i % 2]}) for i, line in enumerate(words)]
    (place / "my.jsonl").write_text("\n".join(lines), encoding="utf-8")
    often = [f"save_interval={ITERATIONS[0]}", "keep=3", f"eval_interval={ITERATIONS[0]}"]
    commands = {
        "a": [*TINY, *often], "b": [*TINY, *often, "seed=9"],
        "documents": [*TINY, *often, "dataset=labelled", "dataset.path=my.jsonl", "dataset.dir=documents", "model.block_size=48"],
        "gpt2": [*TINY, *often, "arch=gpt2", "model.ngrams=[]", "dataset.tokenizer=byte", "dataset.dir=bytes"],
    }
    for name in names:
        ended = train([*commands[name], f"out_dir=runs/{name}"], place)
        assert ended.code == 0, ended.output
    if "gpt2" not in names:
        return
    from nanogpt.weights.huggingface import export

    with contextlib.redirect_stdout(io.StringIO()):
        export(place / "runs/gpt2", place / "folder", which="last")


# ---- 使用 ----


def settings(*overrides: str):
    """The TrainConfig of a command line that resumes."""
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
        return OmegaConf.to_object(compose(config_name="train", overrides=["logger=none", "device=cpu", *overrides]))


def contents(trainer) -> tuple:
    """What a resumed trainer holds, bit for bit."""
    tensors = [*trainer.model.state_dict().values(), *(t for s in trainer.optimizer.state_dict()["state"].values() for t in s.values())]
    progress = {key: value for key, value in vars(trainer.progress).items() if key != "train_s"}
    return tuple(t.cpu().numpy().tobytes() for t in tensors), json.dumps(progress), trainer.data.fingerprint


def resume(run: Path, which: str = "last") -> tuple:
    """Continue a run as far as the first step; what it would go on from."""
    typed = [f"checkpoint={which}", "max_iters=99"]
    session = Session.resume(settings(f"resume={run}", *typed), typed, run)
    try:
        trainer = session._build()
        trainer.loggers.close()
        return contents(trainer)
    finally:
        session.lock.release()


def write_with(run: Path) -> tuple:
    """Load the best checkpoint to write with; its weights and vocabulary."""
    model, tokenizer = loading.load(checkpoint.find_trained(run, "best", key="out_dir"), torch.device("cpu"))
    return tuple(t.numpy().tobytes() for t in model.state_dict().values()), json.dumps(tokenizer.to_dict())


def read_data(folder: Path) -> tuple:
    """Open a data set and take a batch."""
    data = open_data(folder, 0.1)
    data.check_block_size(16)
    starts = data.starts(1, 0, 4, 16)
    return tuple(t.numpy().tobytes() for t in data.rows("train", starts, 16)), data.fingerprint


def start_from(named: Path) -> tuple:
    """Take weights from elsewhere."""
    found = open_pretrained(str(named))
    model = build_pretrained(found)
    return tuple(t.numpy().tobytes() for t in model.state_dict().values()), json.dumps(found.tokenizer.to_dict())


# ---- 审判 ----


class Judge:
    """Loads what has been damaged and decides whether the promise held."""

    def __init__(self, ledger: Ledger, whole: dict[str, tuple], sentinel: Path):
        self.ledger, self.whole, self.sentinel = ledger, whole, sentinel
        self.most_growth = 0.0

    def use(self, kind: str, function: Callable[[Path], tuple], path: Path, wanted: str, *, malice: bool) -> ConfigError | None:
        """Run function(path); counts what came of it, and returns the refusal if it was one."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        signal.setitimer(signal.ITIMER_REAL, HANG_S)
        refusal, got, bad = None, None, ""
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                got = function(path)
        except ConfigError as error:
            refusal = error
        except HungError:
            bad = f"hangs for {HANG_S} s"
        except BaseException as error:
            bad = f"{type(error).__name__}: {error} {traceback.format_exc().splitlines()[-3:-1]}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        self.most_growth = max(self.most_growth, growth)
        if self.sentinel.exists():
            self.sentinel.unlink()
            bad = "CODE HAS RUN"
        elif growth > MOST_GROWTH_MIB:
            bad = f"took {growth:.0f} MiB"
        elif refusal and len(str(refusal).splitlines()) != 1:
            bad = f"not one line: {refusal}"
        elif got is not None and not malice and got != self.whole[wanted]:
            bad = "used although damaged"
        if bad:
            self.ledger.breach(kind, bad)
        else:
            self.ledger.count(kind, "refused and named" if refusal else "loaded, no code run" if malice else "does not matter: equal to the bit")
        return refusal

    def offered(self, kind: str, refusal: ConfigError, run: Path) -> None:
        """Where an older checkpoint is offered, it must be whole."""
        found = re.search(r"checkpoint=(iter_(\d+))", str(refusal))
        if not found:
            return
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                got = resume(run, found[1])
        except Exception as error:
            self.ledger.breach(kind, f"the offered {found[1]} does not resume: {error}")
            return
        if got != self.whole[f"resume {int(found[2])}"]:
            self.ledger.breach(kind, f"the offered {found[1]} differs")
        self.ledger.count("an older checkpoint offered", "resumes, equal to the bit")


def files_of(folder: Path) -> list[Path]:
    """All files of a folder that hold something."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)


def attack(ledger: Ledger, *, cases: int, seed: int, whole: bool = True) -> None:
    """Damage and load until so many cases have been counted; not `whole`: only runs, not data sets and weights from elsewhere."""
    register_schemas()
    language.set_language("en")
    machine.set_up(torch.device("cpu"), deterministic=True, hardware=HardwareConfig())
    torch.set_num_threads(1)

    def hung(*_):
        raise HungError

    signal.signal(signal.SIGALRM, hung)
    start = Path.cwd()
    with tempfile.TemporaryDirectory() as named:
        place, chance = Path(named), random.Random(seed)
        (place / "good").mkdir()
        build(place / "good", ("a", "b", "documents", "gpt2") if whole else ("a", "b"))
        os.chdir(place)
        try:
            _judge_all(ledger, chance, place, cases, whole)
        finally:
            os.chdir(start)


def _judge_all(ledger: Ledger, chance: random.Random, place: Path, cases: int, all_kinds: bool) -> None:
    good, here = place / "good", place / "here"

    def fresh() -> None:
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(good, here)

    fresh()
    run = here / "runs/a"
    with contextlib.redirect_stdout(io.StringIO()):
        whole = {f"resume {n}": resume(run, f"iter_{n:08d}") for n in reversed(ITERATIONS)}
        fresh()
        whole |= {"resume": whole[f"resume {ITERATIONS[-1]}"], "write": write_with(run)}
        if all_kinds:
            # 没受伤的材料都用得上，攻击才说明问题
            whole |= {"data": read_data(here / "prepared"), "documents": read_data(here / "documents")}
            whole |= {"documents run": resume(here / "runs/documents"), "weights": start_from(here / "folder")}
    judge = Judge(ledger, whole, place / SENTINEL)
    attacks = [_accident_in_run] * 6 + [_swap] * 3 + [_malice_in_run] * 6
    if all_kinds:
        attacks += [_accident_in_data] * 2 + [_malice_in_data] * 2 + [_malice_in_weights] * 2
    while ledger.cases < cases:
        fresh()
        chance.choice(attacks)(judge, chance, here)
    ledger.figures |= {"seconds that nothing may hang": HANG_S, "largest growth of resident memory in one case, MiB": round(judge.most_growth, 1)}


def _accident_in_run(judge: Judge, chance: random.Random, here: Path) -> None:
    run, name = here / "runs/a", chance.choice(list(ACCIDENTS))
    # 一半的伤落在最新的 checkpoint 上：那里最要紧
    part = run / f"ckpt/iter_{ITERATIONS[-1]:08d}" if chance.random() < 0.5 else run
    file = chance.choice(files_of(part))
    ACCIDENTS[name](chance, file)
    kind = f"accident in a run: {name}"
    if chance.random() < 0.7:
        refusal = judge.use(kind, resume, run, "resume", malice=False)
        if refusal:
            judge.offered(kind, refusal, run)
            # 更早的完好 checkpoint 还在时，一定要提到它
            if part != run and "checkpoint=iter_" not in str(refusal):
                judge.ledger.breach(kind, f"no older one offered: {refusal}")
    else:
        judge.use(kind, write_with, run, "write", malice=False)


def _swap(judge: Judge, chance: random.Random, here: Path) -> None:
    run = here / "runs/a"
    kind = f"mixed up: {swapped(chance, run, here / 'runs/b', ITERATIONS)}"
    refusal = judge.use(kind, resume, run, "resume", malice=False)
    if refusal:
        judge.offered(kind, refusal, run)


def _accident_in_data(judge: Judge, chance: random.Random, here: Path) -> None:
    which, wanted = chance.choice([("prepared", "data"), ("documents", "documents")])
    name = chance.choice(list(ACCIDENTS))
    ACCIDENTS[name](chance, chance.choice(files_of(here / which)))
    judge.use(f"accident in a data set: {name}", read_data, here / which, wanted, malice=False)


def _malice_in_run(judge: Judge, chance: random.Random, here: Path) -> None:
    run = here / "runs/a"
    kind = f"malice in a checkpoint: {malicious(chance, run / f'ckpt/iter_{ITERATIONS[-1]:08d}', judge.sentinel)}"
    judge.use(kind, *chance.choice([(resume, run, "resume"), (write_with, run, "write")]), malice=True)


def _malice_in_data(judge: Judge, chance: random.Random, here: Path) -> None:
    which = chance.choice(["prepared", "documents"])
    judge.use(f"malice in a data set: {malicious_data(chance, here / which, judge.sentinel)}", read_data, here / which, "", malice=True)


def _malice_in_weights(judge: Judge, chance: random.Random, here: Path) -> None:
    way, named = malicious_weights(chance, here, judge.sentinel)
    judge.use(f"malice in weights from elsewhere: {way}", start_from, named, "", malice=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    ledger = Ledger("damage", "Damage is named before anything is made of a file, an older good checkpoint is offered, and no code from a file runs.")
    attack(ledger, cases=arguments.cases, seed=arguments.seed)
    return ledger.finish()


if __name__ == "__main__":
    sys.exit(main())
