"""Short forms of benchmarks/torture/damage.py, kill.py and power.py."""

import os
import random
import subprocess
import sys

import pytest
from conftest import torture

from nanogpt import files
from nanogpt.config import ROOT

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the attacks fork")
# 各攻一小轮；一个进程里做完，torch 只导入一次
SHORT = """
import sys
sys.path.insert(0, "benchmarks/torture")
import damage, kill
from ledger import Ledger

def held(ledger, least):
    assert not ledger.broken and ledger.cases >= least, (ledger.broken, ledger.counts)

kill.TINY = damage.TINY = tuple("max_iters=12" if key.startswith("max_iters") else key for key in kill.TINY)
damage.ITERATIONS = (4, 8, 12)
ledger = Ledger("kill", "")
kill.attack(ledger, kills=1, seed=5, kinds=("fp16, adamw",), changes=150)
held(ledger, 2)
ledger = Ledger("damage", "")
damage.attack(ledger, cases=15, seed=3, whole=False)
held(ledger, 15)
print("done")
"""


def test_kills_and_damage_lose_nothing(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", SHORT], cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stdout + done.stderr


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
