"""What has to be settled before torch is imported: how its idle threads wait, and that nobody collects its garbage."""

# 导入 torch 之前要定的事：OpenMP 只在载入时看一次环境变量，垃圾回收只在导入时值得关
# 运行脚本与试跑的子进程都从这里过；这里不导入 torch

import atexit
import contextlib
import gc
import sys
from collections.abc import Iterator, MutableMapping

SPINS = "20000"


def spin_briefly(environment: MutableMapping[str, str]) -> None:
    """Let OpenMP's waiting threads sleep soon (GNU OpenMP, on Linux), unless the environment says how they wait.

    To be called before torch is imported.
    """
    # 默认的空转很久，别的程序要核时也不让；转这么多次，独占时不慢
    # 光靠它，两次训练同机并不更快（benchmarks/busy.py）：机器忙不忙要到跑起来才知道，那时由 core/waiting 再减
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", SPINS)


@contextlib.contextmanager
def importing_torch() -> Iterator[None]:
    """Around the import of torch and of what is built on it: nothing of that is ever garbage, so nobody looks for any.

    Nothing where torch is imported already.
    """
    # 几十万个对象都留到最后：不去数它们，导入快一成，退出快半秒，训练中的每次回收也少看这么多
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        # 此后才导入的（追踪用的 sympy 等），退出时也不去数
        atexit.register(gc.freeze)
