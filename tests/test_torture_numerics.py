"""A short attack on the numbers; benchmarks/torture/numerics.py is the long one."""

from random import Random

import pytest
from conftest import torture

numerics = torture("numerics")
# memory=minimal 去掉重算：它要导入 torch._dynamo，几秒钟，而这里要攻击的不是它
MINIMAL = ("memory.weights=bf16", "memory.optimizer_state=int8", "memory.optimizer_in_backward=true")


@pytest.fixture
def ledger():
    """Asserts at the end that no promise was broken."""
    ledger = numerics.Ledger("numerics", numerics.PROMISE)
    yield ledger
    assert ledger.cases and not ledger.broken


def test_a_step_with_bad_numbers_is_skipped_and_all_else_is_equal_to_the_bit(ledger, tmp_path):
    variants = [("optimizer=muon", "precision.dtype=fp16"), ("optimizer=muon", "precision.dtype=bf16", *MINIMAL)]
    numerics.attack(ledger, folder=tmp_path, cases=1, seed=1, variants=variants, halvings=2, whole=False)


def test_a_run_with_bad_tensors_or_an_absurd_rate_ends_with_a_good_checkpoint(ledger, tmp_path):
    lab = numerics.Lab(tmp_path)
    with lab.quiet():
        numerics.whole_runs(ledger, lab, Random(4), 1, [("optimizer=muon", "memory.optimizer_state=int8")], iters=64)
