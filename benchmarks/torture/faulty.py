"""A model of the user's own that misbehaves at some batch sizes; benchmarks/torture/sweeps.py copies it beside its working folder."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from nanogpt.core.model import GPT

# 攻击程序盯着这个文件，看到新的进程号就从外面 SIGKILL
VICTIMS = Path("victims")


def crash_in_c() -> None:
    ctypes.string_at(0)


def abort() -> None:
    os.abort()


def leave_with_3() -> None:
    os._exit(3)


def leave_as_if_all_were_well() -> None:
    os._exit(0)


def raise_an_exception() -> None:
    raise RuntimeError("a bug in a model of my own")


def raise_system_exit() -> None:
    raise SystemExit("enough")


def hang() -> None:
    time.sleep(3600)


def hang_in_c() -> None:
    # PyDLL 不放 GIL：这个进程里再没有 Python 代码能跑
    ctypes.PyDLL(None).sleep(3600)


def be_killed() -> None:
    with VICTIMS.open("a", encoding="utf-8") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(3600)


def leave_a_grandchild() -> None:
    subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(3600)"])
    os.kill(os.getpid(), signal.SIGTERM)


# 微批 -> (它做什么, 结果的状态, 原因里的话)
FAULTS = {
    3: (crash_in_c, "crashed", "SIGSEGV"), 8: (abort, "crashed", "SIGABRT"), 13: (leave_with_3, "crashed", "exit code 3"),
    18: (leave_as_if_all_were_well, "crashed", "exit code 0"), 23: (raise_an_exception, "crashed", "RuntimeError: a bug in a model of my own"),
    28: (raise_system_exit, "crashed", "SystemExit: enough"), 33: (hang, "timeout", "not done after"), 38: (hang_in_c, "timeout", "not done after"),
    43: (be_killed, "crashed", "SIGKILL"), 48: (leave_a_grandchild, "crashed", "SIGTERM"),
}


class Faulty(GPT):
    """A GPT whose training step does what FAULTS says of its batch size."""

    def forward(self, idx, *arguments, **options):
        if self.training and idx.size(0) in FAULTS:
            FAULTS[idx.size(0)][0]()
        return super().forward(idx, *arguments, **options)

    def loss(self, x, *arguments, **options):
        if self.training and x.size(0) in FAULTS:
            FAULTS[x.size(0)][0]()
        return super().loss(x, *arguments, **options)
