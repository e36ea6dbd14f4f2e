"""Attack every place where memory can run out, with every message that a library uses for it.

python benchmarks/torture/memory.py --cases 60 --seed 0

Gradients and losses of what was repeated are compared with those of what never failed, in float64 and float32.
"""

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import torch
from ledger import ROOT, Ledger
from memory_errors import memory_errors, other_errors
from tiny_runs import SHAPE, Lab, checkpoint_fault, difference, main, snapshot, start_again

from nanogpt.base.language import ConfigError
from nanogpt.base.out_of_memory import OutOfMemory, is_out_of_memory
from nanogpt.core import distributed, generate
from nanogpt.core.sampling import sampler
from nanogpt.core.step import Reading
from nanogpt.serve.worker import Worker
from nanogpt.weights import checkpoint
from nanogpt.write.engine import Request, Writer

PROMISE = (
    "Running out of memory in the forward or backward pass, an evaluation or a sample is recovered with the same effective batch and the same "
    "gradients; anywhere else the run ends with one line and an intact checkpoint; other errors are passed on unchanged."
)
PLACES = ("forward", "late in the forward", "backward", "copy to the device", "reading the rows")
# 相对误差：float64 只剩求和次序之差；float32 是它的舍入
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


class Saboteur:
    """Raises an error in a trainer's step (or evaluation) at chosen calls, counted over all attempts, or for too many rows."""

    def __init__(self, trainer, error: Exception, *, place: str, calls=frozenset(), rows: int | None = None, training: bool = True):
        self.trainer, self.error, self.place, self.calls, self.rows, self.training = trainer, error, place, calls, rows, training
        self.call, self.raised, self._armed = -1, 0, False

    def _now(self, place: str) -> None:
        if self._armed and place == self.place:
            self.raised += 1
            self._armed = False
            raise self.error

    @contextlib.contextmanager
    def at_work(self, parameter: torch.Tensor | None = None) -> Iterator["Saboteur"]:
        """Patch the trainer; the backward pass fails when the gradient of `parameter` arrives."""
        trainer, model, data = self.trainer, self.trainer.model, self.trainer.data
        real_rows, real_copy, real_loss = data.rows, trainer.to_device, model.loss

        def rows(split, starts, block_size, **more):
            self.call += 1
            mine = (split == "train") == self.training
            self._armed = mine and (self.call in self.calls or (self.rows is not None and len(starts) > self.rows))
            self._now("reading the rows")
            return real_rows(split, starts, block_size, **more)

        def copy(x, y):
            self._now("copy to the device")
            return real_copy(x, y)

        def loss(x, y):
            self._now("forward")
            result = real_loss(x, y)
            self._now("late in the forward")
            return result

        def arrived(gradient):
            self._now("backward")
            return gradient

        data.rows, trainer.to_device, model.loss = rows, copy, loss
        hook = parameter.register_hook(arrived) if parameter is not None else None
        try:
            yield self
        finally:
            del data.rows, trainer.to_device, model.loss
            if hook:
                hook.remove()


def gradients(trainer) -> dict[str, torch.Tensor]:
    """What one step would hand to the optimizer."""
    found = {}

    def keep(loss):
        found.update({name: p.grad.detach().clone() for name, p in trainer.model.named_parameters() if p.grad is not None})
        trainer._drop_gradients()
        return Reading(loss, torch.zeros(())), False

    trainer._update = keep
    try:
        trainer.step()
    finally:
        del trainer._update
    return found


def farthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest ||a - b|| / ||b|| of a tensor."""
    if set(a) != set(b):
        return float("inf")
    return max(((a[n] - b[n]).norm() / b[n].norm().clamp(min=1e-30)).item() for n in b)


class Repeats:
    """Steps and evaluations of two trainers, on running text and on packed documents, in a chosen number format."""

    def __init__(self, lab: Lab, kinds=("text", "documents")):
        self.trainers = {}
        for data in kinds:
            for dtype in TOLERANCE:
                trainer = lab.trainer("optimizer=adamw", "precision=fp32", data=data, save_interval=10**6)
                torch.manual_seed(1)
                for p in trainer.model.to(dtype).parameters():
                    torch.nn.init.normal_(p, std=0.2)
                self.trainers[data, dtype] = trainer

    def fresh(self, random: Random, data: str, dtype: torch.dtype):
        """The trainer at a random step with a random batch."""
        trainer = self.trainers[data, dtype]
        start_again(trainer)
        trainer.local_rows = random.randrange(2, 20)
        trainer.micro_batch = random.randrange(2, trainer.local_rows + 1)
        trainer.eval_batch = random.randrange(2, 20)
        trainer.progress.samples_seen = random.randrange(500)
        return trainer


def repeated_step(ledger: Ledger, repeats: Repeats, random: Random, data: str, dtype: torch.dtype, error: Exception) -> None:
    """A step fails at random micro-batches, once, twice or until the rows fit."""
    trainer = repeats.fresh(random, data, dtype)
    rows, micro, seen = trainer.local_rows, trainer.micro_batch, trainer.progress.samples_seen
    expected = gradients(trainer)
    trainer.progress.samples_seen, trainer.progress.iteration = seen, 0
    place, parameter = random.choice(PLACES), random.choice(list(trainer.model.parameters()))
    if random.random() < 0.5:
        # 一直失败，直到够小，最小到一行
        plan = {"rows": random.randrange(1, micro)}
    else:
        first = random.randrange(-(-rows // micro))
        # 第二次尝试从头数起
        plan = {"calls": frozenset({first, first + 1 + random.randrange(2)} if micro > 3 else {first})}
    said = f"{data} {dtype}, {rows} rows in {micro}, {place}, {plan}, {error!r}"
    with Saboteur(trainer, error, place=place, **plan).at_work(parameter) as saboteur:
        try:
            found = gradients(trainer)
        except Exception as raised:
            ledger.breach(f"step, {data}", f"{said}: {raised!r}")
            return
    apart = farthest(found, expected)
    key = f"largest relative difference of a repeated step's gradients, {str(dtype)[6:]}"
    ledger.figures[key] = max(ledger.figures.get(key, 0.0), apart)
    after = (trainer.progress.samples_seen, trainer.progress.iteration, trainer.local_rows)
    wrong = None if saboteur.raised else "never failed"
    if apart > TOLERANCE[dtype]:
        wrong = f"gradients {apart:.2g} apart"
    elif after != (seen + rows, 1, rows):
        wrong = f"counters {after}"
    elif trainer.micro_batch >= micro or any(p.grad is not None for p in trainer.model.parameters()):
        wrong = f"micro-batch {trainer.micro_batch}, gradients left"
    ledger.breach(f"step, {data}", f"{said}: {wrong}") if wrong else ledger.count(f"step, {data}", f"same gradients after failing in: {place}")


def repeated_evaluation(ledger: Ledger, repeats: Repeats, random: Random, data: str, dtype: torch.dtype, error: Exception) -> None:
    """An evaluation fails for many rows, or at a random batch, the last short window included."""
    trainer = repeats.fresh(random, data, dtype)
    expected, batch = trainer.evaluate(), trainer.eval_batch
    place = random.choice([p for p in PLACES if p != "backward"])
    batches = -(-len(trainer.windows) // batch)
    moment = frozenset({random.choice((0, batches - 1, random.randrange(batches)))})
    plan = {"rows": random.randrange(1, batch)} if random.random() < 0.5 else {"calls": moment}
    with Saboteur(trainer, error, place=place, training=False, **plan).at_work() as saboteur:
        try:
            found = trainer.evaluate()
        except Exception as raised:
            ledger.breach("evaluation", f"{data} {dtype}, {place}, {plan}: {raised!r}")
            return
    apart = abs(found - expected) / abs(expected)
    # 损失按批平均后再加权相加，float32 的每一批各有舍入
    if apart > TOLERANCE[dtype] or not saboteur.raised:
        ledger.breach("evaluation", f"{data} {dtype}, {place}, {plan}: {found} instead of {expected}, failed {saboteur.raised} times")
    else:
        ledger.count("evaluation", "same value")


def passed_on(ledger: Ledger, repeats: Repeats, random: Random, error: Exception) -> None:
    """An error of another kind comes out of a step and of an evaluation as it went in."""
    for what in ("step", "evaluation"):
        trainer = repeats.fresh(random, "text", torch.float32)
        batches, place = (trainer.micro_batch, trainer.eval_batch), "forward" if what == "evaluation" else random.choice(PLACES)
        with Saboteur(trainer, error, place=place, calls={0}, training=what == "step").at_work(trainer.model.wte.weight):
            try:
                trainer.step() if what == "step" else trainer.evaluate()
                came = None
            except Exception as raised:
                came = raised
        if came is error and (trainer.micro_batch, trainer.eval_batch) == batches:
            ledger.count("another error", f"passed on by the {what}")
        else:
            ledger.breach("another error", f"{error!r} in {place} of the {what} became {came!r}")


# ---- 不能再分的地方 ----


def raising(error: Exception) -> Callable:
    """A function that raises."""

    def raise_it(*_, **__):
        raise error

    return raise_it


def until(trainer, iteration: int, error: Exception, real: Callable) -> Callable:
    """A function that raises before the trainer has come to `iteration`, and is `real` from then on."""
    return lambda *a, **k: real(*a, **k) if trainer.progress.iteration >= iteration else raising(error)()


@contextlib.contextmanager
def replaced(owner, name: str, value) -> Iterator[None]:
    """owner.name is `value` inside."""
    real = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, real)


class Endings:
    """Whole trainings in which memory runs out where nothing can be divided, and the clean one they are compared with."""

    def __init__(self, lab: Lab):
        self.lab = lab
        clean = lab.trainer("optimizer=muon")
        clean.fit()
        self.clean = snapshot(clean)

    def ends(self, ledger: Ledger, place: str, phase: str, error: Exception, at: int) -> None:
        """Memory runs out in `place` at iteration `at`: OutOfMemory, and the last checkpoint goes on to the end of the clean run."""
        rows = {"batch_size": 1, "gradient_accumulation_steps": 4} if place == "one row" else {}
        trainer = self.lab.trainer("optimizer=muon", **rows)
        if place == "first update":
            trainer.optimizer.prepare, at = raising(error), 0
        with self._armed(trainer, place, error, at):
            try:
                trainer.fit()
                ended = None
            except Exception as raised:
                ended = raised
        found = checkpoint.checkpoints(trainer.run_dir)
        wrong = checkpoint_fault(trainer.run_dir)
        if not isinstance(ended, OutOfMemory) or ended.phase != phase or "\n" in str(ended) or ended.detail != str(error):
            wrong = f"ended with {ended!r}"
        elif any(c.iteration > at for c in found) or len(found) != min(2, at // 4):
            wrong = f"checkpoints {[c.iteration for c in found]}"
        if found and not wrong and place != "one row":
            again = self.lab.resumed(trainer.run_dir)
            again.fit()
            wrong = difference(snapshot(again), self.clean)
        kind = f"out of memory in: {place}"
        ledger.breach(kind, f"at {at}, {error!r}: {wrong}") if wrong else ledger.count(kind, "one line, last checkpoint good")

    @contextlib.contextmanager
    def _armed(self, trainer, place: str, error: Exception, at: int) -> Iterator[None]:
        """Raise `error` in `place` from iteration `at` on."""
        group = trainer.optimizer.param_groups[1]
        targets = {
            "gradient sum": (distributed, "sum_gradients"), "update": (trainer.computation, "update"), "one row": (trainer.model, "loss"),
            "logging": (trainer.loggers, "log"), "choosing rows": (trainer.data, "starts"),
        }
        if place == "half of an update":
            # 第一组参数已经更新，第二组还没有
            real = group["update"]
            group["update"] = lambda *a, **k: real(*a, **k) if trainer.progress.iteration < at else raising(error)()
            yield
            return
        if place == "first update":
            yield
            return
        owner, name = targets[place]
        real = getattr(owner, name)

        def hit(*arguments, **settings):
            # 评估也算损失；日志则在一步之后、保存之前写
            spared = trainer.progress.iteration <= at if place == "logging" else trainer.progress.iteration < at or not trainer.model.training
            return real(*arguments, **settings) if spared else raising(error)()

        with replaced(owner, name, hit):
            yield


ENDINGS = {
    "gradient sum": "sum", "update": "update", "half of an update": "update", "first update": "update", "one row": "forward",
    "choosing rows": "training", "logging": "training",
}


def survived(ledger: Ledger, endings: Endings, error: Exception) -> None:
    """Saves and samples fail for want of memory; the training goes on to the same end."""
    for place, owner, name in (("save", checkpoint, "model_tensors"), ("sample", generate.Decoder, "step")):
        trainer = endings.lab.trainer("optimizer=muon", sample_tokens=4)
        # 最后一次能存下；样本一次也写不成
        with replaced(owner, name, raising(error) if place == "sample" else until(trainer, 12, error, getattr(owner, name))):
            try:
                trainer.fit()
                wrong = difference(snapshot(trainer), endings.clean) or checkpoint_fault(trainer.run_dir)
            except Exception as raised:
                wrong = repr(raised)
        last = [c.iteration for c in checkpoint.checkpoints(trainer.run_dir)][-1:]
        if wrong or last != [12]:
            ledger.breach(f"out of memory in: {place}", f"{error!r}: {wrong}, checkpoints {last}")
        else:
            ledger.count(f"out of memory in: {place}", "said, training went on to the same end")


# ---- 写作 ----


def requests(tokenizer, count: int) -> list[Request]:
    """Different texts, drawn with different seeds."""
    starts = ["the king", "q", "love", "no more words of", "speaks"]
    return [Request(starts[i % len(starts)], sampler(temperature=0.8), 12, seed=i) for i in range(count)]


@contextlib.contextmanager
def tight_decoder(error: Exception, calls: set[int], rows: int) -> Iterator[None]:
    """Decoder steps fail at these calls and with more than `rows` rows."""
    real, count = generate.Decoder.step, [-1]

    def step(self):
        count[0] += 1
        if count[0] in calls or len(self.rows) > rows:
            raise error
        return real(self)

    with replaced(generate.Decoder, "step", step):
        yield


def written(ledger: Ledger, model, tokenizer, random: Random, error: Exception) -> None:
    """A Writer and a server's worker run out of memory at random steps: every text is the one it would have been."""
    asked = requests(tokenizer, 6)
    calm = {p.key: p.result.text for p in Writer(model, tokenizer, capacity=6).write(asked) if p.result}
    calls, rows = {random.randrange(20) for _ in range(random.randrange(2))}, random.randrange(1, 6)
    with tight_decoder(error, calls, rows):
        try:
            found = {p.key: p.result.text for p in Writer(model, tokenizer, capacity=6).write(asked) if p.result}
        except Exception as raised:
            found = repr(raised)
    # 6 行减半到 1 行之后再失败，就是“一段也放不下”
    if found == calm or (calls and rows < 3 and "sample_oom" in str(found)):
        ledger.count("writing", "same texts" if found == calm else "one line")
    else:
        ledger.breach("writing", f"{error!r} at {calls}, {rows} rows: {found}")
    served = asyncio.run(_served(model, tokenizer, asked, error, rows))
    if served == ([calm[key] for key in range(6)], 6, True):
        ledger.count("server's worker", "same texts, then all rows again")
    else:
        ledger.breach("server's worker", f"{error!r}, {rows} rows: {served}")
    lost = asyncio.run(_served(model, tokenizer, asked, error, 0))
    if lost == ([None] * 6, 6, True):
        ledger.count("server's worker", "refused by name, lives on")
    else:
        ledger.breach("server's worker", f"{error!r}, no row fits: {lost}")


async def _served(model, tokenizer, asked: list[Request], error: Exception, rows: int) -> tuple[list[str | None], int, bool]:
    """(texts, None where the job was told that memory ran out; capacity afterwards; whether it still writes)."""
    worker = Worker(Writer(model, tokenizer, capacity=6), max_waiting=6)
    with tight_decoder(error, set(), rows):
        jobs = [worker.start([request]) for request in asked]
        texts = [await _text_of(job) for job in jobs]
    for job in jobs:
        worker.stop(job)
    last = worker.start(asked[:1])
    alive = isinstance(await _text_of(last), str) and worker.alive
    worker.begin_closing()
    await asyncio.to_thread(worker.join, 10)
    return texts, worker._writer.capacity, alive


async def _text_of(job) -> str | None:
    text = ""
    try:
        async for news in job.news():
            text += "".join(item.text for item in news)
    except ConfigError as error:
        return None if error.message == "sample_oom" else repr(error)
    return text


# ---- 命令行 ----

HUNGRY_MODEL = '''
import torch
from nanogpt.core.model import GPT

class Hungry(GPT):
    calls = 0

    def loss(self, idx, targets):
        Hungry.calls += self.training
        if self.training and Hungry.calls > self.config.extra["after"] and len(idx) > self.config.extra["rows"]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 12.00 GiB.")
        return super().loss(idx, targets)
'''


def commands(ledger: Ledger, lab: Lab) -> None:
    """From outside: the autopsy on the screen, one line at the end, exit code 2; and a real limit of memory, under which the batch shrinks."""
    (lab.folder / "hungry.py").write_text(HUNGRY_MODEL, encoding="utf-8")
    shape = [f"model.{key}={str(value).replace(' ', '')}" for key, value in SHAPE.items()]
    common = [
        sys.executable, str(ROOT / "run_train.py"), "dataset=text_file", f"dataset.dir={lab.data['text']}", "dataset.path=unused.txt", "logger=none",
        "device=cpu", "lang=en", "sample_tokens=0", "hardware.peak_tflops_fp32=1",
    ]
    tiny = ["max_iters=12", "batch_size=4", "eval_interval=4", *shape, "model._target_=hungry.Hungry", "+model.extra.after=5"]
    for name, rows, code in (("ended", 0, 2), ("shrunk", 1, 0)):
        run_dir = lab.folder / f"command_{name}"
        done = _run(lab, [*common, *tiny, f"+model.extra.rows={rows}", f"out_dir={run_dir}"])
        wrong = checkpoint_fault(run_dir)
        stderr = [line for line in done.stderr.splitlines() if line.strip()]
        if done.returncode != code or "Traceback" in done.stderr or (code and (len(stderr) != 1 or "---- out of memory" not in done.stdout)):
            wrong = f"exit code {done.returncode}: {done.stdout[-300:]} {done.stderr[-300:]}"
        ledger.breach("command", f"{name}: {wrong}") if wrong else ledger.count("command", f"{name}: exit code {code}")
    real_limit(ledger, lab, common)


def real_limit(ledger: Ledger, lab: Lab, common: list[str]) -> None:
    """The same training with and without a limit on the address space (Linux): the loss must be the same."""
    if sys.platform != "linux":
        return
    wide = [
        "model=tiny", "model.n_layer=2", "model.ngrams=[]", "max_iters=3", "batch_size=768", "eval_interval=3", "eval_batch_size=8",
        "eval_tokens=512",
    ]
    losses = []
    for name, limit in (("free", None), ("limited", 2600)):
        run_dir = lab.folder / f"limit_{name}"
        done = _run(lab, [*common, *wide, "model.block_size=64", f"out_dir={run_dir}"], limit)
        shrunk = done.stdout.count("out of memory; micro-batch")
        if done.returncode or bool(shrunk) != bool(limit):
            said = f"exit code {done.returncode}, shrunk {shrunk} times: {done.stdout[-300:]} {done.stderr[-300:]}"
            ledger.breach("real limit of memory", f"{name}: {said}")
            return
        losses.append(checkpoint.checkpoints(run_dir)[-1].val_loss)
    if abs(losses[0] - losses[1]) > 1e-4:
        ledger.breach("real limit of memory", f"validation losses {losses}")
    else:
        ledger.count("real limit of memory", f"micro-batch halved {shrunk} times, same validation loss")


def _run(lab: Lab, command: list[str], mib: int | None = None) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(lab.folder), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    if mib:
        command = ["sh", "-c", f'ulimit -v {mib * 1024}; exec "$@"', "sh", *command]
    return subprocess.run(command, cwd=lab.folder, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=600)


def attack(ledger: Ledger, *, folder: Path, cases: int, seed: int, errors=None, whole: bool = True) -> None:
    """`cases` random failures of each kind that can be repeated, with all messages in turn; whole=False leaves out whole trainings and writing."""
    random, lab = Random(seed), Lab(folder)
    known = errors or memory_errors()
    ledger.figures["messages of memory"] = len(known)
    for library, error in known:
        # 落网的也会被下面的每一步发现；这里说是哪一句
        if not is_out_of_memory(error):
            ledger.breach("message", f"{library}: {error!r}")
    with lab.quiet():
        repeats = Repeats(lab)
        for number in range(max(cases, len(known)) if errors is None else cases):
            # 每种说法至少一次
            error = known[number % len(known)][1]
            data, dtype = ("text", "documents")[number % 2], (torch.float64, torch.float32)[number // 2 % 2]
            repeated_step(ledger, repeats, random, data, dtype, error)
            if number < cases:
                repeated_evaluation(ledger, repeats, random, data, dtype, error)
        others = other_errors()
        for error in others if errors is None else others[:: max(1, len(others) // cases)]:
            passed_on(ledger, repeats, random, error)
        if whole:
            whole_runs(ledger, lab, random, cases, known)


def whole_runs(ledger: Ledger, lab: Lab, random: Random, cases: int, known: list) -> None:
    """Trainings that end or go on, and writing."""
    endings = Endings(lab)
    for number in range(max(1, cases // 12)):
        for place, phase in ENDINGS.items():
            endings.ends(ledger, place, phase, random.choice(known)[1], random.randrange(2, 12))
        survived(ledger, endings, known[number % len(known)][1])
    model = endings.lab.trainer("optimizer=muon")
    for _ in range(max(1, cases // 4)):
        written(ledger, model.model.eval(), model.data.tokenizer, random, random.choice(known)[1])


if __name__ == "__main__":
    sys.exit(main(Ledger("memory", PROMISE), __doc__, attack, commands, cases=300, of="failures of each kind that can be repeated"))
