"""Every place where memory can run out, in the words of every library: repeated with the same result, or one line and a good checkpoint."""

# 前向、反向、评估、写作减半重来，等效批量与梯度不变：float64 下只剩求和次序之差
# 不能再分的地方（求和、更新、只剩一行）以一行话结束，最后的 checkpoint 接着训到与没出过事的同一终点；别的错误原样抛出

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from attack import LONG, ONLY_LONG, assert_equal, assert_good_checkpoints, cases, fit, quick, raising, snapshot
from conftest import ROOT, new_trainer, resumed_trainer
from hypothesis import assume, given
from hypothesis import strategies as st
from memory_messages import memory_errors, other_errors
from torch.utils._python_dispatch import TorchDispatchMode

from nanogpt.base.errors import OutOfMemory, is_out_of_memory
from nanogpt.base.language import ConfigError
from nanogpt.core import generate
from nanogpt.core.sampling import sampler
from nanogpt.data.documents import Document, write_documents
from nanogpt.data.tokenizer import CharTokenizer
from nanogpt.serve.worker import Worker
from nanogpt.weights import checkpoint
from nanogpt.write.engine import Writer
from nanogpt.write.request import Request

pytestmark = pytest.mark.torture
PLACES = ("forward", "late in the forward", "backward", "copy to the device", "reading the rows")
# 相对误差：float64 只剩求和次序之差；float32 是它的舍入
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
ERRORS = st.sampled_from(memory_errors())
FORMATS = st.sampled_from(list(TOLERANCE))


def test_every_way_to_say_out_of_memory_is_known_and_no_other_error_is_taken_for_one():
    assert [error for error in memory_errors() if not is_out_of_memory(error)] == []
    assert [error for error in other_errors() if is_out_of_memory(error)] == []


@pytest.fixture(scope="module")
def data(corpus_folder, tmp_path_factory) -> dict[str, Path]:
    """The data set of running text, and one of short documents with labels, which fill their rows unevenly."""
    random, documents = np.random.default_rng(0), []
    for _ in range(212):
        text = "".join(random.choice(list("abcdefghij"), random.integers(1, 31)))
        documents.append(Document(text, *(str(random.choice(names)) for names in (["verse", "prose"], ["glad", "sad"]))))
    parts = {"train": documents[:200], "val": documents[200:]}
    folder = tmp_path_factory.mktemp("documents") / "prepared"
    return {"text": corpus_folder, "documents": write_documents(folder, name="labelled", source="attack", tokenizer=CharTokenizer("abcdefghij"), parts=parts)}


@contextlib.contextmanager
def failing(trainer, error: Exception, place: str, *, calls=frozenset(), above: int | None = None, training: bool = True) -> Iterator[list]:
    """Fail in `place` of a step (or an evaluation) at these calls, counted over all attempts, or with more than `above` rows; yields what failed."""
    model, real_rows, real_copy, real_loss = trainer.model, trainer.data.rows, trainer.to_device, trainer.model.loss
    count, armed, failed = [-1], [False], []

    def now(here: str) -> None:
        if armed[0] and here == place:
            armed[0] = False
            failed.append(here)
            raise error

    def rows(split, starts, block_size, **more):
        count[0] += 1
        hit = count[0] in calls or (above is not None and len(starts) > above)
        armed[0] = hit and (split == "train") == training
        now("reading the rows")
        return real_rows(split, starts, block_size, **more)

    def copy(x, y):
        now("copy to the device")
        return real_copy(x, y)

    def loss(x, y):
        now("forward")
        result = real_loss(x, y)
        now("late in the forward")
        return result

    def arrived(gradient):
        now("backward")
        return gradient

    trainer.data.rows, trainer.to_device, model.loss = rows, copy, loss
    hooks = [p.register_hook(arrived) for p in list(model.parameters())[1:2]]
    try:
        yield failed
    finally:
        del trainer.data.rows, trainer.to_device, model.loss
        [hook.remove() for hook in hooks]


def made(data, kind: str, dtype: torch.dtype, *, rows: int = 4, micro: int = 4, evaluated: int = 4, at: int = 0):
    """A trainer in a number format, at some place of the data, whose steps take `rows` rows in micro-batches."""
    sizes = [f"batch_size={micro}", f"global_batch_size={rows}", f"eval_batch_size={evaluated}", "grad_clip=0", "overwrite=true"]
    trainer = new_trainer(quick(data[kind], "optimizer=adamw", "precision.dtype=fp32", "max_iters=999", "dropout=0", *sizes))
    torch.manual_seed(1)
    for p in trainer.model.to(dtype).parameters():
        torch.nn.init.normal_(p, std=0.2)
    trainer.progress.samples_seen = at
    return trainer


def gradients(trainer) -> dict[str, torch.Tensor]:
    """What one step hands to the optimizer."""
    found = {}

    def update():
        found.update({name: p.grad.detach().clone() for name, p in trainer.model.named_parameters() if p.grad is not None})

    trainer.computation.update = update
    trainer.step()
    del trainer.computation.update
    return found


KINDS = st.sampled_from(["documents", "text"])
SIZES = st.tuples(st.integers(2, 19), st.integers(2, 19)).map(lambda pair: (max(pair), min(pair)))


@cases(4, 300)
@given(kind=KINDS, dtype=FORMATS, sizes=SIZES, at=st.integers(0, 500), place=st.sampled_from(PLACES), error=ERRORS, plan=st.integers(0, 40))
def test_a_step_that_fails_is_repeated_with_the_same_gradients(data, in_tmp, kind, dtype, sizes, at, place, error, plan):
    rows, micro = sizes
    batches = -(-rows // micro)
    # 一直失败直到够小，或只在某一两次失败；第二次尝试从头数起
    how = {"above": 1 + plan % (micro - 1)} if plan % 2 else {"calls": {plan % batches, plan % batches + 1} if micro > 3 else {plan % batches}}
    expected = gradients(made(data, kind, dtype, rows=rows, micro=micro, at=at))
    trainer = made(data, kind, dtype, rows=rows, micro=micro, at=at)
    with failing(trainer, error, place, **how) as failed:
        found = gradients(trainer)
    assert failed and set(found) == set(expected)
    apart = max(((found[n] - g).norm() / g.norm().clamp(min=1e-30)).item() for n, g in expected.items())
    assert apart <= TOLERANCE[dtype]
    assert (trainer.progress.samples_seen, trainer.progress.iteration, trainer.local_rows) == (at + rows, 1, rows)
    assert trainer.micro_batch < micro and all(p.grad is None for p in trainer.model.parameters())


@cases(3, 300)
@given(kind=KINDS, dtype=FORMATS, rows=st.integers(2, 19), place=st.sampled_from([p for p in PLACES if p != "backward"]), error=ERRORS, plan=st.integers(0, 40))
def test_an_evaluation_that_fails_gives_the_same_value(data, in_tmp, kind, dtype, rows, place, error, plan):
    trainer = made(data, kind, dtype, evaluated=rows)
    expected, batches = trainer.evaluate(), -(-len(trainer.windows) // rows)
    # 末尾那个不满的窗口也要轮到
    how = {"above": 1 + plan % (rows - 1)} if plan % 2 else {"calls": {(0, batches - 1, plan % batches)[plan // 2 % 3]}}
    assume("calls" in how or len(trainer.windows) > how["above"])
    with failing(trainer, error, place, training=False, **how) as failed:
        found = trainer.evaluate()
    assert failed and abs(found - expected) <= TOLERANCE[dtype] * abs(expected)


@cases(2, 60)
@given(error=st.sampled_from(other_errors()), what=st.sampled_from(["step", "evaluate"]), place=st.sampled_from(PLACES[:3]))
def test_another_error_comes_out_as_it_went_in(data, in_tmp, error, what, place):
    assume(what == "step" or place != "backward")
    trainer = made(data, "text", torch.float32)
    with failing(trainer, error, place, calls={0}, training=what == "step"), pytest.raises(type(error)) as came:
        getattr(trainer, what)()
    assert came.value is error and (trainer.micro_batch, trainer.eval_batch) == (4, 4)


# ---- 不能再分的地方 ----


@pytest.fixture(scope="module")
def clean(corpus_folder, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The tensors at the end of a training that never fails."""
    with contextlib.chdir(tmp_path_factory.mktemp("clean")):
        trainer = new_trainer(quick(corpus_folder, "optimizer=muon"))
        assert fit(trainer) is None
        return snapshot(trainer)


class FailsAt(TorchDispatchMode):
    """Raises an error instead of the n-th operation on tensors."""

    # 更新做到一半：前面的参数已经改了，后面的还没有
    def __init__(self, error: Exception, left: int):
        super().__init__()
        self.error, self.left = error, left

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        if not self.left:
            raise self.error
        return func(*args, **(kwargs or {}))


def half(update, error: Exception, operations: int):
    def partly():
        with FailsAt(error, operations):
            update()

    return partly


ENDINGS = {
    "half of an update": "update", "gradient sum": "sum", "update": "update", "first update": "update", "one row": "forward",
    "choosing rows": "training", "logging": "training",
}


@contextlib.contextmanager
def broken(trainer, place: str, error: Exception, at: int, operations: int) -> Iterator[None]:
    """Let memory run out in `place` from iteration `at` on."""
    owner, name = {
        "gradient sum": (trainer.gradients, "finish"), "update": (trainer.computation, "update"), "one row": (trainer.model, "loss"),
        "logging": (trainer.loggers, "log"), "choosing rows": (trainer.data, "starts"), "half of an update": (trainer.computation, "update"),
        "first update": (trainer.computation, "prepare"),
    }[place]
    real = getattr(owner, name)
    fails = half(real, error, operations) if place == "half of an update" else raising(error)

    def hit(*arguments, **settings):
        # 评估也算损失；日志则在一步之后、保存之前写
        iteration = trainer.progress.iteration
        spared = iteration <= at if place == "logging" else iteration < at or not trainer.model.training
        return real(*arguments, **settings) if spared and place != "first update" else fails(*arguments, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, hit)
        yield


@pytest.mark.parametrize("place", ENDINGS if LONG else list(ENDINGS)[:3])
@cases(1, 15)
@given(error=ERRORS, at=st.integers(5, 11) | st.integers(2, 11), operations=st.integers(1, 60))
def test_where_nothing_can_be_divided_the_run_ends_with_one_line_and_a_good_checkpoint(corpus_folder, in_tmp, clean, place, error, at, operations):
    rows = ["batch_size=1", "gradient_accumulation_steps=4"] if place == "one row" else []
    trainer = new_trainer(quick(corpus_folder, "optimizer=muon", "overwrite=true", *rows))
    with broken(trainer, place, error, at, operations):
        ended = fit(trainer)
    found = assert_good_checkpoints(trainer.saver.run_dir)
    assert isinstance(ended, OutOfMemory) and (ended.phase, ended.detail) == (ENDINGS[place], str(error))
    assert len(found) == (0 if place == "first update" else min(2, at // 4)) and all(one.iteration <= at for one in found)
    if found and place != "one row":
        again = resumed_trainer(trainer.saver.run_dir)
        assert fit(again) is None
        assert_equal(snapshot(again), clean)


@pytest.mark.parametrize("place", ["save", "sample"])
@cases(1, 30)
@given(error=ERRORS)
def test_a_save_or_a_sample_that_fails_is_survived(corpus_folder, in_tmp, clean, place, error):
    trainer = new_trainer(quick(corpus_folder, "optimizer=muon", "sample_tokens=4", "overwrite=true"))
    real = checkpoint.model_tensors
    with pytest.MonkeyPatch.context() as patch:
        if place == "sample":
            patch.setattr(generate.Decoder, "step", raising(error))
        else:
            # 最后一次能存下
            patch.setattr(checkpoint, "model_tensors", lambda *a: real(*a) if trainer.progress.iteration >= 12 else raising(error)())
        assert fit(trainer) is None
    assert_equal(snapshot(trainer), clean)
    assert [one.iteration for one in assert_good_checkpoints(trainer.saver.run_dir)][-1:] == [12]


# ---- 写作 ----


@contextlib.contextmanager
def tight_decoder(error: Exception, calls: set[int], rows: int) -> Iterator[None]:
    """Decoder steps fail at these calls and with more than `rows` rows."""
    real, count = generate.Decoder.step, [-1]

    def step(self):
        count[0] += 1
        if count[0] in calls or len(self.rows) > rows:
            raise error
        return real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate.Decoder, "step", step)
        yield


@pytest.fixture(scope="module")
def asked(corpus_folder, tmp_path_factory) -> tuple:
    """(model, tokenizer, six requests, the texts that come of them)."""
    with contextlib.chdir(tmp_path_factory.mktemp("asked")):
        trainer = new_trainer(quick(corpus_folder))
    model, tokenizer = trainer.model.eval(), trainer.data.tokenizer
    starts = ["the king", "q", "love", "no more words of", "speaks", "the king"]
    requests = [Request(start, sampler(temperature=0.8), 12, seed=i) for i, start in enumerate(starts)]
    return model, tokenizer, requests, written(model, tokenizer, requests)


def written(model, tokenizer, requests) -> dict[int, str]:
    return {p.key: p.result.text for p in Writer(model, tokenizer, capacity=6).write(requests) if p.result}


@cases(2, 80)
@given(error=ERRORS, calls=st.sets(st.integers(0, 19), max_size=1), rows=st.integers(1, 5))
def test_writing_that_fails_gives_the_same_texts(asked, error, calls, rows):
    model, tokenizer, requests, calm = asked
    with tight_decoder(error, calls, rows):
        try:
            assert written(model, tokenizer, requests) == calm
        except ConfigError as line:
            # 减半到一行之后再失败，就是“一段也放不下”
            assert line.message == "sample_oom" and calls and rows < 3


@cases(1, 40)
@given(error=ERRORS, rows=st.integers(0, 5))
def test_a_server_that_fails_gives_the_same_texts_or_refuses_by_name_and_lives_on(asked, error, rows):
    model, tokenizer, requests, calm = asked
    served = asyncio.run(through_a_worker(model, tokenizer, requests, error, rows))
    assert served == ([calm[key] if rows else None for key in range(6)], 6, True)


async def through_a_worker(model, tokenizer, requests, error: Exception, rows: int) -> tuple[list[str | None], int, bool]:
    """(texts, None where the job was told that memory ran out; capacity afterwards; whether it still writes)."""
    worker = Worker(Writer(model, tokenizer, capacity=6), max_waiting=6)
    with tight_decoder(error, set(), rows):
        jobs = [worker.start([request]) for request in requests]
        texts = [await text_of(job) for job in jobs]
    for job in jobs:
        worker.stop(job)
    alive = isinstance(await text_of(worker.start(requests[:1])), str) and worker.alive
    worker.begin_closing()
    await asyncio.to_thread(worker.join, 10)
    return texts, worker._writer.capacity, alive


async def text_of(job) -> str | None:
    text = ""
    try:
        async for updates in job.updates():
            text += "".join(item.text for item in updates)
    except ConfigError as error:
        return None if error.message == "sample_oom" else repr(error)
    return text


# ---- 真的不够 ----


@ONLY_LONG
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_under_a_real_limit_the_batch_shrinks_and_the_loss_is_the_same(corpus_folder, in_tmp):
    wide = ["model.ngrams=[]", "model.n_embd=256", "model.n_head=4", "model.block_size=64", "max_iters=3", "batch_size=768", "eval_batch_size=8"]
    losses = []
    for name, mib in (("free", None), ("limited", 2600)):
        typed = [sys.executable, str(ROOT / "run_train.py"), "lang=en", *quick(corpus_folder, *wide, "eval_tokens=512", f"out_dir={name}")]
        limited = ["sh", "-c", f'ulimit -v {mib * 1024}; exec "$@"', "sh", *typed] if mib else typed
        done = subprocess.run(limited, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, encoding="utf-8", timeout=600)
        assert done.returncode == 0 and ("out of memory; micro-batch" in done.stdout) == bool(mib), done.stdout + done.stderr
        losses.append(checkpoint.checkpoints(in_tmp / name)[-1].val_loss)
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
