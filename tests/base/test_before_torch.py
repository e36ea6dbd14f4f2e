"""What is settled before torch is imported."""

import gc
import os
import subprocess
import sys

from nanogpt.base import before_torch


def test_waiting_threads_sleep_soon_unless_the_environment_says_how_they_wait():
    for given in ({}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}):
        environment = dict(given)
        before_torch.spin_briefly(environment)
        assert environment == (given or {"GOMP_SPINCOUNT": "20000"})


def test_importing_nanogpt_settles_it_as_the_commands_do():
    asked = "import nanogpt, os, sys; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", asked], env=environment, capture_output=True, text=True, encoding="utf-8", check=True)
    assert done.stdout.split() == ["20000", "False"]


def test_garbage_is_collected_again_once_torch_is_imported_and_never_stopped_where_it_was(monkeypatch):
    seen = []
    try:
        with before_torch.importing_torch():
            seen.append(gc.isenabled())
        monkeypatch.delitem(sys.modules, "torch", raising=False)
        with before_torch.importing_torch():
            seen.append(gc.isenabled())
        assert seen == [True, False] and gc.isenabled() and gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
