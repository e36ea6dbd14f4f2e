"""run_train.py and run_sample.py as a person types them, in this process: a new one takes seconds only to import torch."""

import contextlib
import copy
import io
import logging
import os
import pathlib
import runpy
import signal
import sys
import traceback
from dataclasses import dataclass

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from nanogpt.base.config import ROOT

# 子进程与本进程里的命令看见同样的环境
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "LANG": "en_US.UTF-8", "LANGUAGE": "", "LC_ALL": ""}


@dataclass(frozen=True)
class Done:
    """What a command left: its exit code and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def typed(script: str, folder, *arguments: str, expect: int = 0, python_path=None, lines: str = "") -> Done:
    """Run `python <script> <arguments>` in `folder`, in this process, with `lines` on its stdin; what it changes here is put back.

    What a process of its own would prove (signals, pipes, terminals, what is imported when) is not proved by this.
    """
    # 先用真的 TextIOWrapper：命令会对它 reconfigure
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    with _put_back(folder, python_path), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        sys.stdin = io.TextIOWrapper(io.BytesIO(lines.encode("utf-8")), encoding="utf-8")
        sys.argv[:] = [str(ROOT / script), *map(str, arguments)]
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
            code = 0
        except SystemExit as stopped:
            code = stopped.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
    done = Done(code, *(stream.buffer.getvalue().decode("utf-8") for stream in (out, err)))
    assert done.returncode == expect, done.stdout + done.stderr
    return done


@contextlib.contextmanager
def _put_back(folder, python_path):
    """Enter the folder with the environment of a new process; afterwards put back what a command changes in its process."""
    caught = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in caught}
    # 别的测试导入过的同名模块：新的进程里没有
    for path in pathlib.Path(python_path).glob("*.py") if python_path else ():
        sys.modules.pop(path.stem, None)
    stdin, root, here = sys.stdin, logging.getLogger(), os.getcwd()
    loggers, level = root.handlers[:], root.level
    before = {"argv": sys.argv[:], "path": sys.path[:], "modules": set(sys.modules), "environment": dict(os.environ)}
    hydra = copy.copy(HydraConfig.instance().cfg)
    try:
        os.chdir(folder)
        os.environ.update(ENVIRONMENT)
        sys.path[:0] = [str(python_path), str(ROOT)] if python_path else [str(ROOT)]
        yield
    finally:
        sys.stdin = stdin
        os.chdir(here)
        os.environ.clear()
        os.environ.update(before["environment"])
        sys.argv[:], sys.path[:] = before["argv"], before["path"]
        # 使用者自己的模块：下一次测试可能有同名的另一个
        for name in set(sys.modules) - before["modules"]:
            if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]
        for number, handler in handlers.items():
            signal.signal(number, handler)
        root.handlers[:], root.level = loggers, level
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = hydra
