"""Short forms of benchmarks/torture/power.py."""

import os
import random

import pytest
from conftest import torture

from nanogpt.base import files

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the attacks fork")
# ---- 断电 ----


def test_after_a_loss_of_power_a_run_goes_on_from_what_was_saved():
    power, ledger = torture("power"), torture("ledger").Ledger("power", "short")
    power.attack(ledger, cases=6, seed=1, scenarios=(power.SCENARIOS[0], power.SCENARIOS[4]))
    assert ledger.cases == 6 and not ledger.broken


def test_the_judge_of_lost_power_sees_what_was_not_synced(monkeypatch):
    power, ledger = torture("power"), torture("ledger").Ledger("power", "short")
    monkeypatch.setattr(torture("filelog").FileLog, "_synced", lambda *_: None)
    power.attack(ledger, cases=2, seed=1, scenarios=power.SCENARIOS[3:4])
    assert ledger.broken


def test_a_file_is_the_old_or_the_new_one_whenever_the_power_goes(tmp_path):
    filelog, path = torture("filelog"), tmp_path / "a"

    def left(write) -> set:
        path.write_bytes(b"old")
        log = filelog.FileLog(tmp_path)
        with log.recording():
            write()
        moments = range(len(log.operations) + 1)
        return {log.state(at, kind, random.Random(n)).get("a") for at in moments for kind in filelog.KINDS for n in range(3)}

    assert left(lambda: files.write_text(path, "new")) == {b"old", b"new"}
    assert left(lambda: path.write_text("newer", encoding="utf-8")) >= {b"", b"\0" * 5, b"old"}


def test_a_ledger_tells_what_was_broken(capsys):
    ledger = torture("ledger").Ledger("x", "All is well.")
    ledger.count("kind", "kept")
    assert ledger.finish() == 0
    ledger.breach("kind", "two\nlines")
    assert ledger.finish() == 1 and ledger.record()["broken"] == ["kind: two lines"] and ledger.cases == 2
    assert "x: 2 cases, 1 broken promises" in capsys.readouterr().out
