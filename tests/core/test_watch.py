"""The thread that looks after the other processes does not outlive the training."""

import subprocess
import sys

import pytest

# 一直待在 store 的 C++ 里的线程：解释器收尾时它还在，整个进程便以 abort 结束
BUSY = """
import time
from datetime import timedelta
import torch.distributed as dist
from nanogpt.core.watch import Watch

class Busy:
    store = dist.HashStore()

    def check(self, keys):
        try:
            self.store.wait(["never"], timedelta(milliseconds=20))
        except RuntimeError:
            pass
        return False

Watch(Busy(), 0, 2, timeout_s=1e-3)
time.sleep(0.2)
"""


@pytest.mark.parametrize("end, code", [("", 0), ("raise SystemExit(2)", 2)])
def test_a_process_ends_as_it_means_to_although_its_watch_is_asking(end, code):
    done = subprocess.run([sys.executable, "-c", BUSY + end], capture_output=True, text=True, encoding="utf-8")
    assert (done.returncode, done.stderr) == (code, "")
