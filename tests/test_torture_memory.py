"""A short attack on memory; benchmarks/torture/memory.py is the long one."""

import gc
from random import Random

import pytest
from conftest import torture

memory = torture("memory")
errors = torture("memory_errors")


@pytest.fixture(autouse=True)
def small_heap():
    """What is already there is not searched again by every collection of garbage."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def ledger():
    """Asserts at the end that no promise was broken."""
    ledger = memory.Ledger("memory", memory.PROMISE)
    yield ledger
    assert ledger.cases and not ledger.broken


def test_every_way_to_say_out_of_memory_is_known_and_no_other_error_is_taken_for_one():
    assert [error for _, error in errors.memory_errors() if not memory.is_out_of_memory(error)] == []
    assert [error for error in errors.other_errors() if memory.is_out_of_memory(error)] == []


def test_what_failed_for_want_of_memory_is_repeated_with_the_same_gradients_and_values(ledger, tmp_path):
    memory.attack(ledger, folder=tmp_path, cases=8, seed=2, errors=errors.memory_errors()[::12], whole=False)


def test_where_nothing_can_be_divided_the_run_ends_with_a_good_checkpoint(ledger, tmp_path):
    lab, known = memory.Lab(tmp_path), errors.memory_errors()
    with lab.quiet():
        endings = memory.Endings(lab)
        endings.ends(ledger, "half of an update", "update", known[7][1], 5)
        memory.survived(ledger, endings, known[20][1])
        model = lab.trainer("optimizer=muon")
        memory.written(ledger, model.model.eval(), model.data.tokenizer, Random(0), known[3][1])
