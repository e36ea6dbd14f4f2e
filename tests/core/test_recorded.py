"""Recorded training steps, without a card: a replay is the work done again, written to the same places."""

import contextlib
import copy
import math

import pytest
import torch
from conftest import new_trainer
from test_memory_parts import preset_parts, step_of

from nanogpt.base.console import Console
from nanogpt.core import recorded
from nanogpt.core.compilation import launch_bound
from nanogpt.core.recorded import Graphs, Recorded, can_record
from nanogpt.core.wrapping import mix_in

ROOM = 2**40


@pytest.fixture
def recording(monkeypatch):
    """Replays of a card that are done on the CPU; the list says how often each was launched."""
    launches = []

    def record(work, device, pool):
        number, result = len(launches), work()
        launches.append(0)

        def replay():
            launches[number] += 1
            again = work()
            if result is not None:
                result.copy_(again)

        return replay, result

    monkeypatch.setattr(recorded, "record", record)
    monkeypatch.setattr(recorded, "aside", lambda device: contextlib.nullcontext())
    return launches


def with_graphs(step, capacity):
    """The step as on a card; on a CPU tables have gradients of their own."""
    for p in step.parameters:
        vars(p).pop("row_gradient", None)
    step.graphs = Graphs(step, Console(), capacity=capacity)
    mix_in(step, Recorded)
    return step


def steps_of(step, *, bad=(), rows=((4, 0.5), (4, 0.25), (3, 0.25)), count=5):
    """Losses of so many steps of some micro-batches each, whose last one may be smaller, and all weights and states."""
    step.prepare()
    found = []
    for number in range(count):
        torch.manual_seed(number)
        loss = torch.zeros(())
        for group in step.optimizer.param_groups:
            group["lr"] = 0.01 * group["lr_scale"] / (number + 1)
        for n, share in rows:
            idx = torch.randint(0, 30, (n, step.model.config.block_size))
            loss += step.micro_batch(idx, idx.roll(1, 0), math.nan if number in bad else share)
        reading, _ = step.finish(loss, 1.0, late=True)
        found.append(reading.read())
    states = [t for state in step.optimizer.state.values() for t in state.values()]
    return found, [t.detach().clone() for t in (*step.model.parameters(), *states)]


@pytest.mark.parametrize("settings", [["optimizer=adamw", "dropout=0.2"], [], ["arch=gpt2"], ["precision=bf16"]])
@pytest.mark.parametrize("bad", [(), (0, 2)])
def test_a_replayed_step_changes_what_the_plain_one_changes_in_every_bit(recording, settings, bad):
    (_, here), (_, there) = step_of(*settings), step_of(*settings)
    (losses, tensors), (wanted, plain) = (
        steps_of(with_graphs(step, room), bad=bad) for step, room in ((here, ROOM), (there, None))
    )
    assert torch.equal(torch.tensor(losses).nan_to_num(), torch.tensor(wanted).nan_to_num())
    assert all(torch.equal(a, b) for a, b in zip(tensors, plain, strict=True))
    # 两种形状各一张，更新一张；一步里前一种回放两次
    assert len(recording) == 3 and min(recording) >= 5


def test_rates_on_the_device_move_the_weights_as_those_on_the_host(recording):
    (_, here), (_, there) = step_of(), step_of()
    for p in there.parameters:
        vars(p).pop("row_gradient", None)
    _, tensors = steps_of(with_graphs(here, ROOM))
    _, plain = steps_of(there)
    for a, b in zip(tensors, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("broken", ["raises", "raises in the update", "does nothing", "wrong"])
def test_a_card_that_cannot_record_is_one_line_and_no_bit_changes(recording, monkeypatch, broken, capsys):
    working = recorded.record

    def record(work, device, pool):
        if broken == "raises" or (broken == "raises in the update" and len(recording) == 2):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        replay, result = working(work, device, pool)
        if broken == "wrong":
            return lambda: (replay(), result is not None and result.mul_(2)), result
        return (lambda: None) if broken == "does nothing" else replay, result

    monkeypatch.setattr(recorded, "record", record)
    (_, here), (_, there) = step_of("dropout=0.2"), step_of("dropout=0.2")
    losses, tensors = steps_of(with_graphs(here, ROOM))
    said = capsys.readouterr().out.splitlines()
    wanted, plain = steps_of(with_graphs(there, None))
    assert losses == wanted and all(torch.equal(a, b) for a, b in zip(tensors, plain, strict=True))
    assert len(said) == 1 and "cannot be recorded" in said[0] and not here.graphs.gradients
    assert not capsys.readouterr().out


def test_a_recording_that_is_cut_off_leaves_stream_and_allocator_as_they_were(monkeypatch):
    told = []

    @contextlib.contextmanager
    def entered(name):
        told.append(f"in {name}")
        yield
        # 与 torch.cuda.graph 一样没有 finally
        told.append(f"out {name}")

    @contextlib.contextmanager
    def stream(_):
        try:
            yield
        finally:
            told.append("stream back")

    for name in ("CUDAGraph", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _: entered("device"))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: entered("graph"))
    for name in ("endAllocateToPool", "releasePool"):
        monkeypatch.setattr(torch._C, f"_cuda_{name}", lambda index, pool, name=name: told.append((name, index, pool)), raising=False)
    with pytest.raises(RuntimeError, match="capturing"):
        recorded.record(lambda: exec("raise RuntimeError('not permitted when stream is capturing')"), torch.device("cuda:1"), "pool")
    recorded.side_stream.cache_clear()
    assert told == ["in device", "in graph", ("endAllocateToPool", 1, "pool"), ("releasePool", 1, "pool"), "stream back"]


def test_what_a_replay_writes_is_kept(recording, monkeypatch):
    working, marks = recorded.record, []

    def record(work, device, pool):
        marks.extend(cell.cell_contents for name, cell in zip(work.__code__.co_freevars, work.__closure__) if name == "ran")
        return working(work, device, pool)

    monkeypatch.setattr(recorded, "record", record)
    _, step = step_of()
    steps_of(with_graphs(step, ROOM), count=1)
    assert len(marks) == 1 and any(kept is marks[0] for kept in step.graphs._update)


def test_a_step_that_runs_out_of_memory_gives_back_what_was_recorded(recording):
    _, step = step_of()
    steps_of(with_graphs(step, ROOM), count=1)
    graphs, real = step.graphs, step.model.loss

    def loss(x, y):
        if len(x) == 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(x, y)

    step.model.loss = loss
    with pytest.raises(torch.OutOfMemoryError):
        steps_of(step, rows=((8, 1.0),), count=1)
    assert not graphs.recorded and not graphs.has_update and not graphs.gradients
    step.drop_gradients()
    launched = list(recording)
    steps_of(step, count=1)
    assert recording == launched


def test_a_training_that_fills_the_card_is_not_recorded(recording, monkeypatch):
    monkeypatch.setattr(recorded, "peak_bytes", lambda device: ROOM // 2)
    _, step = step_of()
    steps_of(with_graphs(step, ROOM))
    assert not recording


def test_a_step_recorded_anew_goes_on_as_the_one_that_was_not_interrupted(recording):
    _, whole = step_of("dropout=0.1")
    _, first = step_of("dropout=0.1")
    steps_of(with_graphs(first, ROOM), count=2)
    # 续训：同样的权重与状态，图要重新录
    _, second = step_of("dropout=0.1")
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    _, plain = steps_of(with_graphs(whole, ROOM), count=2)
    mine = {n: t.clone() for n, t in second.model.state_dict().items()}
    assert all(torch.equal(mine[n], t) for n, t in whole.model.state_dict().items())
    assert steps_of(whole, count=3)[0] == steps_of(with_graphs(second, ROOM), count=3)[0]
    assert plain


class Odd(torch.nn.Module):
    """A user's own layer."""


def test_only_our_own_parts_are_recorded_and_only_on_a_card(in_tmp, tiny_overrides):
    step = new_trainer(tiny_overrides).computation
    assert can_record(step) and not isinstance(step, Recorded)
    for memory in ("lean8", "minimal"):
        assert not can_record(step_of("optimizer=adamw", **preset_parts(memory))[1])
    assert can_record(step_of("optimizer=adamw", lora=True)[1])
    step.model.odd = Odd()
    assert not can_record(step)
    _, step = step_of()
    step.optimizer.__class__ = type("Theirs", (type(step.optimizer),), {"__module__": "mine"})
    assert not can_record(step)


def test_small_models_wait_for_their_launches_and_large_ones_for_their_products():
    # tiny 的一个微批与 GPT-2 的一个，在 RTX 3060 上
    assert launch_bound(4, 20e6, 16 * 128, 25.5) and not launch_bound(12, 860e6, 8 * 1024, 25.5)
