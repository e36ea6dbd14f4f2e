"""Several processes train like one: gradients summed beside the backward pass, uneven shares, one of them out of memory."""

# 几个进程由 fork 而来，一次起一对，许多断言共用

import signal
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from attack import POSIX
from conftest import new_trainer, tiny
from members import commands, together
from torch.distributed.rendezvous import rendezvous

from nanogpt.base.language import ConfigError
from nanogpt.core import distributed
from nanogpt.core.distributed import GradientSum
from nanogpt.run.loop import Training
from nanogpt.weights import checkpoint

pytestmark = POSIX
# 10 条分给 3 个进程：3、3、4 条；每份再切成微批，最后一个微批不满
ROWS = ("batch_size=2", "global_batch_size=10", "optimizer=adamw", "model.dropout=0", "overwrite=true")


class Counted:
    """all_reduce that writes down what it is asked to add up."""

    def __init__(self):
        self.real, self.sizes = dist.all_reduce, []

    def __call__(self, tensor, *rest, **how):
        self.sizes.append(tensor.numel())
        return self.real(tensor, *rest, **how)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def fail_once(trainer, *, at: int, backward: bool) -> None:
    """Let memory run out once in step `at` of rank 1: in its first forward, or deep in its last backward pass."""
    real, failed = trainer.model.loss, []

    def out_of_memory(*_):
        failed.append(True)
        raise torch.OutOfMemoryError("CUDA out of memory")

    def loss(x, y):
        if trainer.progress.iteration == at and not failed and distributed.rank() == 1:
            if not backward:
                out_of_memory()
            if trainer.gradients._left is not None:
                # 有的梯度已经发出去了，有的还没有
                handle = trainer.parameters[0].register_hook(lambda grad: (handle.remove(), out_of_memory()))
        return real(x, y)

    trainer.model.loss = loss


def three_steps(overrides, faults=()):
    """(weights behind three steps, tokens trained, micro-batch, what was summed in each step) of one member."""
    trainer = new_trainer(overrides, *ROWS, out=f"outputs/{distributed.world()}")
    for at, backward in faults:
        fail_once(trainer, at=at, backward=backward)
    sums = []
    for _ in range(3):
        dist.all_reduce = counted = Counted()
        trainer.step()
        dist.all_reduce = counted.real
        sums.append(counted.sizes)
    # 张量过管道要发送的一方还活着：换成数组
    return weights(trainer.model).numpy(), trainer.progress.tokens_trained, trainer.micro_batch, sums


def test_processes_with_uneven_shares_train_like_one_and_send_every_gradient_once_a_step(in_tmp, corpus_folder, monkeypatch):
    overrides = tiny(corpus_folder)
    alone, tokens, _, _ = three_steps(overrides)
    members = together(3, three_steps, overrides)
    for result in members:
        np.testing.assert_allclose(result[0], alone, atol=1e-4, rtol=1e-3)
        assert result[1] == tokens == 3 * 10 * 16
        # 累积的微批不通信；损失与“失败、停下”一共三个数，合成一次
        assert all(sum(sizes) == alone.size + 3 for sizes in result[3])
    assert all(np.array_equal(result[0], members[0][0]) for result in members)


def test_where_one_process_runs_out_of_memory_all_repeat_the_step_with_half_the_micro_batch(in_tmp, corpus_folder):
    overrides = tiny(corpus_folder)
    alone, *_ = three_steps(overrides)
    for faults in ([(0, False)], [(1, True)]):
        members = together(2, three_steps, overrides, faults)
        for weights_behind, tokens, micro_batch, _ in members:
            np.testing.assert_allclose(weights_behind, alone, atol=1e-4, rtol=1e-3)
            assert micro_batch == 1 and tokens == 3 * 10 * 16
        assert np.array_equal(members[0][0], members[1][0])


def stopped_by_itself(overrides):
    """(reason, steps) of a member on whose windows alone the loss would always fall (0), or rise at once (1)."""
    trainer = new_trainer(overrides, *ROWS, "max_iters=12", "eval_interval=1", "sample_tokens=0", out="outputs/run")
    step, rank = trainer.progress, distributed.rank()
    trainer._sums = lambda *_: torch.tensor([(1.0 if step.iteration == 1 else 5.0) if rank else 9 - 0.1 * step.iteration, 1.0], dtype=torch.float64)
    summary = trainer.fit()
    return summary["stopped_by"], summary["iters"]


def told_while_evaluating(overrides):
    """(reason, steps, validation loss) of a member of two, of which the second is told to end in the evaluation behind step 2."""
    trainer = new_trainer(overrides, *ROWS, "max_iters=6", "eval_interval=2", "eval_batch_size=1", "sample_tokens=0", out="outputs/run")
    loss = trainer.model.loss

    def told(x, y):
        trainer.stop_requested |= distributed.rank() == 1 and not trainer.model.training
        return loss(x, y)

    trainer.model.loss = told
    summary = trainer.fit()
    return summary["stopped_by"], summary["iters"], summary["val_loss"]


def test_a_process_told_to_end_does_not_wait_for_an_evaluation(in_tmp, corpus_folder):
    assert together(2, told_while_evaluating, tiny(corpus_folder)) == [("interrupted", 2, None)] * 2
    assert checkpoint.find(in_tmp / "outputs/run", "last").iteration == 2


def test_processes_stop_by_themselves_behind_the_same_step(in_tmp, corpus_folder):
    assert together(2, stopped_by_itself, tiny(corpus_folder)) == [("early_stop", 5)] * 2


def summed(unused: bool):
    """Gradients of a large, a small and a sometimes unused parameter, and how many sums had begun before the backward pass ended."""
    distributed.start(torch.device("cpu"), 60)
    rank = distributed.rank()
    large, small, last = (torch.nn.Parameter(torch.full(shape, 2.0 + rank)) for shape in ((600, 600), (3,), (5,)))
    sums = GradientSum([large, small, last])
    assert all((p == 2.0).all() for p in (large, small, last))
    for final in (False, True):
        if final:
            sums.begin()
        loss = (large.sum() + small.sum() * (1 + rank)) * (1 + rank)
        if not unused or rank == 1:
            loss = loss + last.sum() * 7
        loss.backward()
    early = len(sums._sent)
    sums.finish(failed=False)
    return large.grad[0, 0].item(), small.grad[0].item(), None if last.grad is None else last.grad[0].item(), early


@pytest.mark.parametrize("unused", [False, True])
def test_all_begin_with_the_first_ones_weights_and_a_gradient_that_one_process_lacks_counts_as_zero(unused):
    assert [result[:3] for result in together(2, summed, unused)] == [(6.0, 10.0, 14.0 if unused else 28.0)] * 2


def test_all_sums_of_a_backward_pass_have_begun_when_it_ends_and_large_gradients_are_not_copied():
    assert [result[3] for result in together(2, summed, False)] == [2, 2]


def meet_again():
    """Whether a member still sees the alarm of the start before, in a store that outlives a restart."""
    store, _, _ = next(rendezvous("env://"))
    if distributed.rank():
        for key in ("hello/1", "watch/alarm", "group/alarm"):
            store.set(key, "stale")
    here = distributed._met(store)
    seen = here.check(["watch/alarm"])
    if distributed.rank():
        here.set("seen", "1")
    else:
        # 别的看完了，才能带着 store 走
        here.wait(["seen"])
    return seen


def test_processes_that_torchrun_starts_again_do_not_see_what_those_before_them_left():
    assert together(2, meet_again) == [False, False]


def test_a_stated_number_of_processes_that_were_not_started_is_one_line(in_tmp, corpus_folder):
    with pytest.raises(ConfigError, match=r"parallel.world=2, but 1 processes .* torchrun --nproc_per_node=2"):
        new_trainer(tiny(corpus_folder), "parallel.world=2")


# ---- 不一样的、停住的、不在了的 ----


@pytest.fixture
def words(in_tmp, corpus_folder):
    """What each process is started with."""
    return [*tiny(corpus_folder), "lang=en", "max_iters=40", "eval_interval=10", "sample_tokens=0", "out_dir=outputs/a"]


def ends(running):
    """(exit code, its lines that begin with error:) of each process."""
    every = [one.wait() for one in running]
    assert not any(one.traced for one in every), "\n----\n".join(one.output for one in every)
    return [(one.code, [line for line in one.output.splitlines() if line.startswith("error:")]) for one in every]


def hurry(rank: int) -> None:
    distributed.PAUSE_S = 0.5


def test_processes_with_different_settings_say_one_line_before_anything_is_written(in_tmp, words):
    said = ends(commands(in_tmp, lambda rank: [*words, f"learning_rate=0.0{rank + 1}"], before=hurry))
    line = "error: learning_rate=0.02 in process 1, 0.01 in process 0: start all of them with the same command, files and versions"
    assert said == [(2, [line]), (2, [])] and not (in_tmp / "outputs/a").exists()


def stop_at(iteration: int, stop):
    """before(rank) that calls stop() in step `iteration` of process 1."""
    def before(rank: int) -> None:
        step = Training.step

        def stopped(trainer):
            # 从头就看得勤；时限到那一步才缩短：机器忙时，开头的几秒不算
            distributed._watch.every_s = 0.4
            if trainer.progress.iteration == iteration:
                distributed._watch.timeout_s = 1.5
                if rank == 1:
                    stop()
            return step(trainer)

        Training.step = stopped

    return before


def hang():
    time.sleep(60)


def test_a_process_that_hangs_is_named_with_where_it_is_and_the_run_goes_on_from_its_checkpoint(in_tmp, words):
    running = commands(in_tmp, lambda rank: words, before=stop_at(12, hang))
    running[0].process.join(60)
    running[1].process.kill()
    (code, said), (killed, nothing) = ends(running)
    assert (code, killed, nothing) == (2, -signal.SIGKILL, []) and len(said) == 1
    assert "process 1 has not answered for 1.5 s (parallel.timeout_s), it is in _timed_step, loop.py:" in said[0]
    assert said[0].endswith("resume=outputs/a") and checkpoint.find(in_tmp / "outputs/a", "last").iteration == 10
