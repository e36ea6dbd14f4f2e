"""Attack the numbers of a training: NaN and Inf in losses, gradients, weights and optimizer states, fp16 overflows, absurd learning rates.

python benchmarks/torture/numerics.py --cases 60 --seed 0

Each case is drawn from the seed and compared to the bit with a training that never saw the bad step.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from ledger import ROOT, Ledger
from tiny_runs import SHAPE, Lab, checkpoint_fault, counters, difference, main, snapshot, start_again

from nanogpt.base.language import ConfigError
from nanogpt.run import saving
from nanogpt.run import trainer as trainers
from nanogpt.run.health import Diverged
from nanogpt.weights import checkpoint

PROMISE = (
    "NaN and Inf, wherever they appear, are recovered (the step is skipped, and everything afterwards equals to the bit a run that skipped it) or "
    "stop the run with one line that names the last good checkpoint; no checkpoint ever holds a weight or optimizer state that is not finite."
)
VARIANTS = [
    ("optimizer=adamw", "precision=fp32"), ("optimizer=muon", "precision=fp32"), ("optimizer=adamw", "precision=fp16"),
    ("optimizer=muon", "precision=fp16"), ("optimizer=adamw", "precision=bf16"), ("optimizer=muon", "precision=bf16"),
    ("optimizer=adamw", "memory=lean8"), ("optimizer=muon", "memory=lean8"), ("optimizer=adamw", "precision=bf16", "memory=offload"),
    ("optimizer=adamw", "precision=bf16", "memory=minimal"), ("optimizer=muon", "precision=bf16", "memory=minimal"),
]
VALUES = (math.nan, math.inf, -math.inf)
STEPS = 10
OUTCOMES = {None: "went through", "runaway": "stopped: worse than guessing", "diverged": "stopped: steps not finite", "broken": "stopped: weights"}
# fp16 的初值 65536 减半这么多次到 1
HALVINGS = 16


@dataclass
class Fault:
    """What goes wrong, at which iterations (0-based)."""

    kind: str
    """loss: value and gradients are bad | value: only the value is | gradient: one element of one parameter's gradient is."""
    value: float
    steps: frozenset[int]
    name: str = ""
    """The parameter, for kind=gradient."""
    micro: int = 0
    """Number of the micro-batch that is hit."""

    def __str__(self) -> str:
        return f"{self.kind}={self.value} at {sorted(self.steps)} {self.name} micro-batch {self.micro}"


@contextlib.contextmanager
def injected(trainer, fault: Fault) -> Iterator[None]:
    """Let `fault` happen while the block runs."""
    real, seen = trainer.model.loss, [(-1, 0)]

    def now() -> bool:
        return trainer.progress.iteration in fault.steps

    def loss(x, y):
        # 数这一步里的第几个微批
        step, number = seen[0]
        seen[0] = (trainer.progress.iteration, number + 1 if step == trainer.progress.iteration else 0)
        result = real(x, y)
        if not (trainer.model.training and now() and seen[0][1] == fault.micro):
            return result
        return result * fault.value if fault.kind == "loss" else result + fault.value if fault.kind == "value" else result

    def spoilt(gradient):
        if not (now() and seen[0][1] == fault.micro):
            return gradient
        gradient = gradient.clone()
        gradient.view(-1)[gradient.numel() // 2] = fault.value
        return gradient

    trainer.model.loss = loss
    hook = dict(trainer.model.named_parameters())[fault.name].register_hook(spoilt) if fault.kind == "gradient" else None
    try:
        yield
    finally:
        del trainer.model.loss
        if hook:
            hook.remove()


def skip(trainer, fault: Fault) -> None:
    """What a skipped step must amount to, written down without the trainer's own skipping."""
    progress, scaler = trainer.progress, trainer.precision.scaler
    if fault.kind == "gradient" and trainer.computation.in_backward:
        # 反向里更新：只有坏梯度的那个参数不动，其余照常；随机舍入的随机数也照抽
        parameter, states = dict(trainer.model.named_parameters())[fault.name], trainer.optimizer.state[fault.name]
        before = [t.detach().clone() for t in (parameter, *states.values())]
        trainer.step()
        with torch.no_grad():
            for tensor, old in zip((parameter, *states.values()), before, strict=True):
                tensor.copy_(old)
        counted = True
    else:
        overflow = scaler.is_enabled() and fault.kind != "value"
        if overflow:
            scaler.scale(torch.zeros(()))
            # 与 GradScaler 的说明一致：溢出时减半，计数从头来；scale 只能由状态写入
            scaler.load_state_dict({**scaler.state_dict(), "scale": max(1.0, scaler.get_scale() / 2), "_growth_tracker": 0})
        progress.iteration += 1
        progress.samples_seen += trainer.global_rows
        progress.tokens_trained += trainer.global_rows * trainer.block_size
        counted = not (overflow and fault.kind == "gradient")
    progress.nonfinite_steps += counted
    progress.nonfinite_in_a_row = progress.nonfinite_in_a_row + 1 if counted else progress.nonfinite_in_a_row


class Bench:
    """Trainers that are used again and again: building one takes longer than ten of its steps."""

    def __init__(self, lab: Lab, halvings: int):
        self.lab, self.halvings = lab, halvings
        self._built: dict[tuple, list] = {}

    def pair(self, variant: tuple[str, ...]) -> list:
        """Two trainers of a variant at iteration 0, equal to the bit."""
        if variant not in self._built:
            values = {"precision__initial_loss_scale": 2.0**self.halvings}
            if not self.lab.config(*variant).memory.optimizer_in_backward:
                # 第二个微批坏了，第一个的梯度也不能用
                values |= {"batch_size": 2, "gradient_accumulation_steps": 2}
            self._built[variant] = [self.lab.trainer(*variant, save_interval=10**6, keep=10**6, **values) for _ in range(2)]
        for trainer in self._built[variant]:
            start_again(trainer)
        return self._built[variant]


def transient(ledger: Ledger, bench: Bench, random: Random, variant: tuple[str, ...]) -> None:
    """A fault that passes, at random steps, single or several in a row; half of the runs are resumed from a checkpoint on the way."""
    real, reference = bench.pair(variant)
    first = random.randrange(STEPS - 1)
    steps = frozenset(range(first, min(STEPS, first + random.choice((1, 1, 2, 4)))) if random.random() < 0.7 else random.sample(range(STEPS), 3))
    kind = random.choice(("loss", "value", "gradient"))
    name = random.choice([n for n, _ in real.model.named_parameters()])
    fault = Fault(kind, random.choice(VALUES), steps, name, random.randrange(math.ceil(real.local_rows / real.micro_batch)))
    said = f"{' '.join(variant)}: {fault}"
    stop = random.randrange(1, STEPS) if random.random() < 0.5 else STEPS
    with injected(real, fault):
        for _ in range(stop):
            real.step()
        if stop < STEPS:
            real = _resumed(real)
            said += f", resumed at {stop}"
    if stop < STEPS:
        with injected(real, fault):
            for _ in range(STEPS - stop):
                real.step()
    for iteration in range(STEPS):
        skip(reference, fault) if iteration in steps else _good_step(reference)
    ledger.figures["steps skipped"] = ledger.figures.get("steps skipped", 0) + len(steps)
    if wrong := _unequal(real, reference):
        ledger.breach(f"{kind} of a step", f"{said}: {wrong}")
    else:
        ledger.count(f"{kind} of a step", "skipped, then equal to the bit" + (", also across a resume" if stop < STEPS else ""))


def _good_step(trainer) -> None:
    trainer.step()
    trainer.progress.nonfinite_in_a_row = 0


def _resumed(trainer):
    """The same trainer as a new process would have it: everything from a checkpoint."""
    trainer._save(final=False)
    source = checkpoint.find(trainer.run_dir, trainer.saved.name)
    start_again(trainer)
    saving.restore(trainer, source)
    return trainer


def _unequal(real, reference) -> str | None:
    if tensor := difference(snapshot(real), snapshot(reference)):
        return f"{tensor} differs"
    if counters(real) != counters(reference):
        return f"counters {counters(real)} instead of {counters(reference)}"
    if real.precision.scaler.state_dict() != reference.precision.scaler.state_dict():
        return f"scaler {real.precision.scaler.state_dict()} instead of {reference.precision.scaler.state_dict()}"
    return None


def storm(ledger: Ledger, bench: Bench, random: Random, variant: tuple[str, ...], length: int) -> None:
    """fp16 gradients overflow `length` times in a row."""
    real, reference = bench.pair(variant)
    allowed = bench.halvings + real.cfg.max_nonfinite_steps
    name = random.choice([n for n, _ in real.model.named_parameters()])
    fault = Fault("gradient", random.choice((math.inf, -math.inf)), frozenset(range(2, 2 + length)), name)
    said, ended = f"{' '.join(variant)}: {fault}", None
    with injected(real, fault):
        try:
            for _ in range(2 + length + 3):
                real.step()
        except Diverged as error:
            ended = str(error)
    scale = real.precision.scaler.get_scale()
    if length >= allowed:
        if ended and "not finite" in ended and real.progress.iteration == 2 + allowed - 1 and scale == 1.0:
            ledger.count("overflow storm", "stopped at scale 1")
        else:
            ledger.breach("overflow storm", f"{said}: {ended}, scale {scale}, {counters(real)}")
        return
    for iteration in range(2 + length + 3):
        if iteration in fault.steps:
            before = reference.precision.scaler.get_scale()
            skip(reference, fault)
            # scale 已到 1 的溢出不会自愈，要计数
            reference.progress.nonfinite_steps += before <= 1
            reference.progress.nonfinite_in_a_row += before <= 1
        else:
            _good_step(reference)
    wrong = ended or _unequal(real, reference) or (None if scale == max(1.0, 2.0 ** (bench.halvings - length)) else f"scale {scale}")
    ledger.breach("overflow storm", f"{said}: {wrong}") if wrong else ledger.count("overflow storm", "recovered to the bit")


def persistent(ledger: Ledger, bench: Bench, random: Random, variant: tuple[str, ...]) -> None:
    """Bad losses or gradients without end: the run stops after max_nonfinite_steps, with its weights as they were."""
    real, reference = bench.pair(variant)
    limit, kind = real.cfg.max_nonfinite_steps, random.choice(("loss", "value"))
    fault = Fault(kind, random.choice(VALUES), frozenset(range(2, 99)))
    said, ended = f"{' '.join(variant)}: {fault}", None
    with injected(real, fault):
        try:
            for _ in range(limit + 9):
                real.step()
        except Diverged as error:
            ended = error
    for _ in range(2):
        reference.step()
    wrong = difference(snapshot(real), snapshot(reference)) if ended and real.progress.iteration == 1 + limit else f"ended with {ended}"
    if not wrong and ("\n" in str(ended) or "learning_rate=" not in str(ended)):
        wrong = f"the line is {ended}"
    ledger.breach("no end of bad steps", f"{said}: {wrong}") if wrong else ledger.count("no end of bad steps", "stopped, weights untouched")


# ---- 整个训练 ----


class Trained:
    """Whole trainings, and the clean ones that they are compared with."""

    def __init__(self, lab: Lab):
        self.lab = lab
        self._clean: dict[tuple, dict] = {}

    def clean(self, variant: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """The tensors at the end of a training in which nothing goes wrong."""
        if variant not in self._clean:
            trainer = self.lab.trainer(*variant)
            trainer.fit()
            self._clean[variant] = snapshot(trainer)
        return self._clean[variant]


def permanent(ledger: Ledger, trained: Trained, random: Random, variant: tuple[str, ...]) -> None:
    """One element of a weight or of an optimizer state becomes NaN or Inf: it is never saved, the last checkpoint goes on as if nothing had been."""
    trainer = trained.lab.trainer(*variant)
    at, value, target = random.randrange(1, 12), random.choice(VALUES), random.choice(("weight", "optimizer state"))
    real, hit = trainer.step, []

    def step():
        if trainer.progress.iteration == at and not hit:
            hit.append(_spoil(trainer, target, value, random))
        return real()

    trainer.step = step
    said = f"{' '.join(variant)}: {target} {value} before iteration {at}"
    ended, trainer_dir = _fit(trainer), trainer.run_dir
    if not isinstance(ended, Diverged) or ended.message != "broken" or "\n" in str(ended):
        ledger.breach(target, f"{said} ({hit}): ended with {ended!r}")
        return
    found = checkpoint.checkpoints(trainer_dir)
    wrong = checkpoint_fault(trainer_dir) or ("a checkpoint from after the fault" if any(c.iteration > at for c in found) else None)
    outcome = "stopped before anything was saved"
    if found and not wrong:
        outcome = "stopped, the last checkpoint went on to the same end"
        again = trained.lab.resumed(trainer_dir)
        again.fit()
        wrong = f"{found[-1].name} not named" if found[-1].name not in str(ended) else difference(snapshot(again), trained.clean(variant))
    ledger.breach(target, f"{said} ({hit}): {wrong}; {ended}") if wrong else ledger.count(target, outcome)


def _fit(trainer) -> Exception | None:
    try:
        trainer.fit()
    except ConfigError as error:
        return error
    return None


def _spoil(trainer, target: str, value: float, random: Random) -> str:
    """Set one element to `value`; returns which."""
    tensors = dict(trainer.model.named_parameters())
    if target != "weight":
        # 8 位的码装不下 NaN：坏的只能是它们的 scale
        tensors = {f"{n}.{k}": t for n, s in trainer.optimizer.state.items() for k, t in s.items() if t.is_floating_point() and t.dim()}
    name = random.choice(sorted(tensors))
    with torch.no_grad():
        flat = tensors[name].view(-1)
        flat[random.randrange(flat.numel())] = value
    return name


def evaluation(ledger: Ledger, trained: Trained, random: Random, variant: tuple[str, ...]) -> None:
    """Validation losses that are not finite, with weights that are: best, counters and files never hear of them."""
    trainer = trained.lab.trainer(*variant, early_stop_evals=3, sample_tokens=4)
    bad = {n for n in (4, 8, 12) if random.random() < 0.6} or {4}
    real, value = trainer.model.loss, random.choice(VALUES)
    trainer.model.loss = lambda x, y: real(x, y) * (value if trainer.progress.iteration in bad and not trainer.model.training else 1)
    said = f"{' '.join(variant)}: validation loss {value} at {sorted(bad)}"
    ended = _fit(trainer)
    losses = {c.iteration: c.val_loss for c in checkpoint.checkpoints(trainer.run_dir)}
    wrong = repr(ended) if ended else checkpoint_fault(trainer.run_dir) or strictly_read(trainer.run_dir)
    if not wrong and any((losses[i] is None) != (i in bad) for i in losses):
        wrong = f"val_loss of the checkpoints: {losses}"
    wrong = wrong or difference(snapshot(trainer), trained.clean(variant))
    ledger.breach("validation loss", f"{said}: {wrong}") if wrong else ledger.count("validation loss", "said and passed over")


def sample(ledger: Ledger, trained: Trained, variant: tuple[str, ...]) -> None:
    """Logits that are not finite while a sample is written: the sample is left out."""
    trainer = trained.lab.trainer(*variant, sample_tokens=4)
    real = trainers.write_sample
    trainers.write_sample = _raising(ConfigError("nonfinite_logits"))
    try:
        ended = _fit(trainer)
    finally:
        trainers.write_sample = real
    ok = ended is None and "no sample is written" in trainer.said.getvalue() and not difference(snapshot(trainer), trained.clean(variant))
    ledger.count("sample", "left out") if ok else ledger.breach("sample", f"{' '.join(variant)}: {ended!r}")


def _raising(error: Exception) -> Callable:
    def raise_it(*_, **__):
        raise error

    return raise_it


def strictly_read(run_dir: Path) -> str | None:
    """What in the json files of a run is no JSON, or None."""
    files = [run_dir / "summary.json", run_dir / "metrics.jsonl", *(run_dir / "ckpt").glob("iter_*/manifest.json")]
    for file in files:
        text = file.read_text(encoding="utf-8")
        for part in text.splitlines() if file.suffix == ".jsonl" else [text]:
            try:
                # NaN 与 Infinity 不是 JSON，Python 默认却收下
                json.loads(part, parse_constant=_raising(ValueError("NaN or Infinity")))
            except ValueError as error:
                return f"{file.name}: {error}"
    return None


def diverging(ledger: Ledger, trained: Trained, random: Random, *, iters: int) -> None:
    """A learning rate 10 to 100,000 times too high."""
    arch, optimizer, precision = random.choice(("modern", "gpt2")), random.choice(("adamw", "muon")), random.choice(("fp32", "fp16", "bf16"))
    groups = (f"arch={arch}", f"optimizer={optimizer}", f"precision={precision}")
    rate = 10 ** random.uniform(-1, 3)
    values = {"lr_schedule": random.choice(("linear", "constant")), "grad_clip": random.choice((0.0, 1.0))}
    values["model__ngrams"] = [] if arch == "gpt2" else [2]
    trainer = trained.lab.trainer(*groups, learning_rate=rate, max_iters=iters, eval_interval=iters // 4, log_interval=50, **values)
    ended, said = _fit(trainer), f"{' '.join(groups)} learning_rate={rate:.3g} {values}"
    wrong, kind = checkpoint_fault(trainer.run_dir), f"learning_rate from {10 ** math.floor(math.log10(rate)):g}"
    if ended and not wrong:
        line = str(ended)
        found = checkpoint.checkpoints(trainer.run_dir)
        if not isinstance(ended, Diverged) or "\n" in line or "learning_rate=" not in line:
            wrong = repr(ended)
        elif found:
            named = checkpoint.best_of(found) if ended.message == "runaway" else found[-1]
            wrong = None if (named or found[-1]).name in line else f"{line} does not name {named}"
    elif not wrong:
        wrong = strictly_read(trainer.run_dir)
    outcome = OUTCOMES.get(ended and ended.message, "stopped")
    ledger.breach(kind, f"{said}: {wrong}") if wrong else ledger.count(kind, outcome)


# ---- 命令行 ----

FAULTY_MODEL = '''
import torch
from nanogpt.core.model import GPT

class Faulty(GPT):
    calls = 0

    def loss(self, idx, targets):
        Faulty.calls += self.training
        fault = self.config.extra["fault"] if Faulty.calls > 5 else None
        if fault == "weight":
            with torch.no_grad():
                self.h[0].mlp.c_fc.weight[0, 0] = float("inf")
        loss = super().loss(idx, targets)
        bad = fault == "loss" if self.training else fault == "evaluation"
        return loss * float("nan") if bad else loss
'''


def commands(ledger: Ledger, lab: Lab) -> None:
    """The same from outside: one line, exit code 2, no traceback, a checkpoint that `resume` takes."""
    (lab.folder / "faulty.py").write_text(FAULTY_MODEL, encoding="utf-8")
    for fault, code in (("weight", 2), ("loss", 2), ("evaluation", 0)):
        shape = [f"model.{key}={str(value).replace(' ', '')}" for key, value in SHAPE.items()]
        run_dir = lab.folder / f"command_{fault}"
        command = [
            sys.executable, str(ROOT / "run_train.py"), "model._target_=faulty.Faulty", f"+model.extra.fault={fault}", *shape, "lang=en",
            "dataset=text_file", f"dataset.dir={lab.data['text']}", "dataset.path=unused.txt", "logger=none", "device=cpu", "max_iters=30",
            "batch_size=4", "eval_interval=4", "sample_tokens=4", f"out_dir={run_dir}", "hardware.peak_tflops_fp32=1",
        ]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(lab.folder), str(ROOT)])}
        done = subprocess.run(command, cwd=lab.folder, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=300)
        lines, found = [line for line in done.stderr.splitlines() if line.strip()], checkpoint.checkpoints(run_dir)
        wrong = checkpoint_fault(run_dir) or (None if found else "no checkpoint")
        if done.returncode != code or "Traceback" in done.stderr or (code and (len(lines) != 1 or found[-1].name not in lines[0])):
            wrong = f"exit code {done.returncode}: {done.stderr[-300:]}"
        ledger.breach("command", f"{fault}: {wrong}") if wrong else ledger.count("command", f"{fault}: exit code {code}")


def attack(ledger: Ledger, *, folder: Path, cases: int, seed: int, variants=VARIANTS, halvings: int = HALVINGS, whole: bool = True) -> None:
    """`cases` transient faults per variant and a share of every other kind, in trainings under `folder`.

    whole=False leaves out the whole trainings; fp16 begins with a loss scale that `halvings` bring to 1.
    """
    random, lab = Random(seed), Lab(folder)
    with lab.quiet():
        bench = Bench(lab, halvings)
        for variant in variants:
            for _ in range(cases):
                transient(ledger, bench, random, variant)
            for _ in range(max(1, cases // 10)):
                persistent(ledger, bench, random, variant)
        for variant in (v for v in variants if lab.config(*v).precision.dtype == "fp16"):
            for length in [3, halvings + 4, halvings + 10, *(random.randrange(1, 40) for _ in range(cases // 6))]:
                storm(ledger, bench, random, variant, length)
        if whole:
            whole_runs(ledger, lab, random, cases, variants)


def whole_runs(ledger: Ledger, lab: Lab, random: Random, cases: int, variants: list, *, iters: int = 160) -> None:
    """Trainings from their first to their last step."""
    trained = Trained(lab)
    for variant in variants:
        for _ in range(max(1, cases // 6)):
            permanent(ledger, trained, random, variant)
        for _ in range(max(1, cases // 20)):
            evaluation(ledger, trained, random, variant)
        sample(ledger, trained, variant)
    for _ in range(cases):
        diverging(ledger, trained, random, iters=iters)


if __name__ == "__main__":
    sys.exit(main(Ledger("numerics", PROMISE), __doc__, attack, commands, cases=60, of="transient faults per variant"))
