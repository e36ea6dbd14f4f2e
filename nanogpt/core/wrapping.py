# 省显存、编译、加速都不写进模型：它们在模型的某个方法外面再包一层
# 包法是给这一个对象换一个子类（fully_shard 也这样做）：参数的名字不变，没有成环的引用，deepcopy 出来的副本各归各
"""Put methods before those of one object, from outside of its class."""

import functools
from typing import Any


def mix_in(wrapped: Any, before: type) -> None:
    """Look methods of `wrapped` up in `before` first, whose super() is the class that it was built from."""
    if not isinstance(wrapped, before):
        wrapped.__class__ = _mixed(type(wrapped), before)


@functools.cache
def _mixed(kind: type, before: type) -> type:
    # 同样的两个类只合一次：各个 block 仍是同一个类，编译器不必逐个看
    return type(kind.__name__, (before, kind), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})
