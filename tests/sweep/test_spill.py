"""The spill guard, by injected timings: a throughput cliff near the budget is no success."""

import pytest

from nanogpt.sweep.result import TrialResult
from nanogpt.sweep.spill import judge_all, spill_reason

FULL = {"reserved_gib": 11.0, "budget_gib": 12.0, "free_gib": 11.8, "predicted_tokens_per_s": 8000.0}


@pytest.mark.parametrize(("change", "expected"), [
    ({"tokens_per_s": 6000.0}, None),
    ({"tokens_per_s": 2001.0}, None),
    ({"tokens_per_s": 1999.0}, "8,000 were predicted"),
    # 占用不高：慢是别的缘故，不是溢出
    ({"tokens_per_s": 1000.0, "reserved_gib": 6.0}, None),
    # 实测不高，但预测的峰值已近预算
    ({"tokens_per_s": 1000.0, "reserved_gib": 6.0, "predicted_gib": 11.5}, "8,000 were predicted"),
    # 占用多于开始时空闲的：不可能都在显存里
    ({"tokens_per_s": 7900.0, "free_gib": 10.5}, "only 10.5 were free"),
    ({"tokens_per_s": 2900.0, "smaller": 6000.0}, "a smaller micro-batch made 6,000"),
    ({"tokens_per_s": 3100.0, "smaller": 6000.0}, None),
    ({"tokens_per_s": 10.0, "budget_gib": None, "free_gib": None}, None),
    ({"tokens_per_s": None}, None),
])
def test_the_rule(change, expected):
    change = FULL | change
    got = spill_reason(smaller=change.pop("smaller", None), result=TrialResult((), "ok", **change))
    assert got is None if expected is None else expected in got


def made(batch, speed, reserved, *, memory="default", **more):
    return TrialResult(
        (f"batch_size={batch}", f"memory={memory}"), "ok", micro_batch=batch, tokens_per_s=speed,
        **{"reserved_gib": reserved, "budget_gib": 12.0, "free_gib": 11.9, **more},
    )


def test_a_cliff_within_one_sweep_is_found_and_other_settings_do_not_count():
    sweep = [made(4, 6000.0, 5.0), made(8, 6400.0, 8.0), made(16, 900.0, 11.5), made(16, 2500.0, 11.5, memory="lean"), made(32, 5000.0, 11.6, memory="lean")]
    assert [r.status for r in judge_all(sweep)] == ["ok", "ok", "spilled", "ok", "ok"]
    spilled = judge_all(sweep)[2]
    assert spilled.score == 0.0 and spilled.tokens_per_s == 900.0


def test_a_cpu_and_a_failure_are_left_alone():
    cpu = made(16, 1.0, None, peak_gib=11.9, predicted_tokens_per_s=1e6)
    failed = TrialResult(("batch_size=32",), "oom", reserved_gib=12.0, budget_gib=12.0, free_gib=1.0)
    assert judge_all([cpu, failed]) == [cpu, failed]
