"""Idle threads spin while the cores are free and sleep while others want them, and what is computed stays the same."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanogpt.base.config import HardwareConfig
from nanogpt.core import machine, waiting
from nanogpt.core.waiting import CROWDED, FREE, Waiting


def holding():
    return [thread for thread in threading.enumerate() if thread.name == "nanogpt-pool"]


def test_pools_are_held_while_the_machine_is_crowded_and_let_go_when_it_is_free_again():
    idle = Waiting(2, 4)
    for queued, asleep in ((CROWDED / 2, False), (1.0, True), (CROWDED / 2, True), (FREE * 2, True), (0.0, False), (0.0, False)):
        idle.look(queued)
        assert idle.asleep == asleep
        threads = holding()
        if asleep:
            assert len(threads) == idle.pools == 3
    for thread in threads:
        thread.join(10)
    assert not holding()


@given(st.integers(2, 64), st.integers(1, 64))
def test_the_pools_make_more_threads_than_there_are_cores(threads, cores):
    pools = Waiting(threads, cores).pools
    assert threads + pools * (threads - 1) > cores and (pools == 0 or threads + (pools - 1) * (threads - 1) <= cores)


@pytest.mark.skipif(not waiting.TASKS.is_dir(), reason="Linux tells it")
def test_time_in_the_queue_only_grows():
    first = waiting.queued_s()
    assert 0 <= first <= waiting.queued_s()


@pytest.mark.parametrize("name, value", [("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "7"), (None, None)])
def test_nobody_watches_where_a_person_says_how_threads_wait_or_there_is_one(name, value, monkeypatch):
    for known in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(known, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2 if name else 1)
    if name:
        monkeypatch.setenv(name, value)
    waiting.watch_the_machine()
    assert waiting._watching == []


def test_threads_says_how_many_a_cpu_uses():
    before = torch.get_num_threads()
    try:
        machine.set_up(torch.device("cpu"), deterministic=False, hardware=HardwareConfig(), threads=before + 2)
        assert torch.get_num_threads() == before + 2
    finally:
        torch.set_num_threads(before)
