"""How kernels are compiled with numba, kept on disk, and run on all cores at once."""

# 编译、缓存与多核，三件事都只在这里：kernel 是装饰器，Crew 是一组线程，meet 让它们在一处等齐
# 不用 numba 自己的并行（prange）：每个并行区要几十微秒叫醒、等齐，一个 token 有上百个，比读权重还久；编译也慢一倍
# 这里一个 token 只叫醒一次，中间由 meet 空转着等，等不到就让出核：别的程序占着核时不与它争
# 缓存认得的是整个文件夹（和这一个）的摘要：numba 只看函数自己的文件，改了它调用的就会用上旧的机器码

import contextlib
import ctypes
import functools
import hashlib
import os
import threading
import weakref
from pathlib import Path
from queue import SimpleQueue

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import config, njit, types
from numba.core.caching import IndexDataCacheFile
from numba.extending import intrinsic

INT32, INT64 = ir.IntType(32), ir.IntType(64)
# 只许重排加法（SIMD 需要）、合并乘加；不假设没有 NaN 与无穷
REORDER = {"reassoc", "contract", "nsz"}
# 空转这么多次才让出核：约几十微秒，比醒来一次短
SPINS = 1000
# meet 数到的人数从不到这里：有人来不了时写上它，谁也不必再等
NOBODY_WAITS = 2**40
# meet 用的数：来过几人、让出核的函数的地址，各占一条缓存线
ARRIVED, YIELD = 0, 16


def kernel(function=None, *, reorder: bool = False):
    """Compile a function; sums may be reordered only if that is said, or its bits would depend on what surrounds it."""
    if function is None:
        return lambda function: kernel(function, reorder=reorder)
    # fastmath=False 要写明：不写就随第一个编译它的调用者
    # 一层调一层，每层都把里面的机器码重新生成一遍：只隔一层的用 part_of_kernel
    # 除以 0 照 IEEE 得无穷：要报错的除法，每个都是循环的一个出口，LLVM 就不向量化了，慢近二十倍
    how = {"nogil": True, "fastmath": REORDER if reorder else False, "error_model": "numpy"}
    try:
        compiled = njit(cache=True, **how)(function)
    except RuntimeError:
        # 程序的文件夹与主目录都不可写（换了用户的容器）：每个进程编译一次
        return njit(**how)(function)
    keep(compiled._cache, function)
    return compiled


def keep(cache, function) -> None:
    """Let a function's cache never fail, and count as empty once any file of kernels beside it or here has changed."""
    file = cache._cache_file
    file.__class__, file._source_stamp = _Kept, _stamp(Path(function.__code__.co_filename).parent)


class _Kept(IndexDataCacheFile):
    """Code on disk; what cannot be read counts as not there, and what cannot be written is compiled again next time."""

    # 缓存坏了、磁盘满了，都只是慢一点，不该写不出字来；numba 自己只容得下“没有这个文件”

    def _load_index(self) -> dict:
        try:
            return super()._load_index()
        except Exception:
            return {}

    def _load_data(self, name: str):
        try:
            return super()._load_data(name)
        except Exception as error:
            raise OSError from error

    def save(self, key, data) -> None:
        with contextlib.suppress(OSError):
            super().save(key, data)


# 抄进调用它的 kernel 里：少一层
part_of_kernel = njit(inline="always", fastmath=False, error_model="numpy")


@functools.cache
def _stamp(folder: Path) -> str:
    """Digest of all files of kernels in a folder, and of those here."""
    files = sorted({*folder.glob("*.py"), *Path(__file__).parent.glob("*.py")})
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def is_kept(compiled) -> bool:
    """Whether code of a kernel as it is now lies on disk, for whatever types."""
    return hasattr(compiled._cache, "_cache_file") and bool(compiled._cache._cache_file._load_index())


def threads() -> int:
    """How many threads compute: as many as PyTorch's."""
    import torch

    # 它只数物理核：超线程抢的是同一条内存通道
    return min(torch.get_num_threads(), config.NUMBA_NUM_THREADS)


class Crew:
    """Some threads that run one kernel together, each its part."""

    # 自己的线程，而不是 OpenMP 的：几个人就是几个线程，谁也不会排在另一个后面等，meet 就不会死等
    # 也不是 ThreadPoolExecutor：它交一份活、等一份活各要十几微秒，小模型的一个 token 才几百

    def __init__(self, size: int):
        self.size, self._lock = size, threading.Lock()
        self._tasks = [SimpleQueue() for _ in range(size - 1)]
        for part, tasks in enumerate(self._tasks, 1):
            # 没做完就退出的程序不等它
            threading.Thread(target=_works, args=(part, tasks), daemon=True).start()
            weakref.finalize(self, tasks.put, None)

    def run(self, compiled, *arguments) -> None:
        """compiled(part, crew, size, *arguments) for every part < size; returns when all are done."""
        with self._lock:
            crew, done, failures = np.zeros(2 * YIELD, np.int64), SimpleQueue(), []
            crew[YIELD] = _yield_address()
            task, given = (compiled, crew, self.size, arguments), 0
            try:
                for tasks in self._tasks:
                    tasks.put((done, *task))
                    given += 1
                failures.append(_failure(0, *task))
            except BaseException:
                # Ctrl-C 落在这里：自己那一份没有算，别人不能一直等
                crew[ARRIVED] = NOBODY_WAITS
                raise
            finally:
                failures += [done.get() for _ in range(given)]
        try:
            for failure in filter(None, failures):
                raise failure
        finally:
            # 错误记着这里的变量：变量不记着错误，就不成环，模型立即放得掉
            failure = failures = None


def _works(part: int, tasks: SimpleQueue) -> None:
    """Do this part of every task until there is none any more."""
    while task := tasks.get():
        done, *task = task
        failure = _failure(part, *task)
        # 等下一份活时不占着这一份的张量，出了错的也不占着：错误记着它
        del task
        done.put(failure)
        failure = done = None


def _failure(part: int, compiled, crew, size: int, arguments: tuple) -> BaseException | None:
    """Do one part of a task; what went wrong, or None."""
    try:
        compiled(part, crew, size, *arguments)
    except BaseException as error:
        # 这一份没有算完，别人不能一直等
        crew[ARRIVED] = NOBODY_WAITS
        return error
    return None


crew_of = functools.cache(Crew)


@functools.cache
def _yield_address() -> int:
    """Address of the system's function that lets another thread have this core."""
    function = ctypes.windll.kernel32.SwitchToThread if os.name == "nt" else ctypes.CDLL(None).sched_yield
    return ctypes.cast(function, ctypes.c_void_p).value


@kernel
def meet(crew, size):
    """Wait until all of a crew are here."""
    if size == 1:
        return
    here = _arrive(crew)
    wanted = (here + size - 1) // size * size
    for _ in range(SPINS):
        if _arrived(crew) >= wanted:
            return
        _pause()
    while _arrived(crew) < wanted and _arrived(crew) < NOBODY_WAITS:
        call(crew[YIELD])


@kernel
def share(count, part, size, unit=1):
    """First and last + 1 of the `count` items that are this part's; borders are multiples of `unit`."""
    units = (count + unit - 1) // unit
    return min(count, units * part // size * unit), min(count, units * (part + 1) // size * unit)


@intrinsic
def _arrive(typing, crew):
    def generate(context, builder, signature, arguments):
        place = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        one = ir.Constant(INT64, 1)
        return builder.add(builder.atomic_rmw("add", place, one, "seq_cst"), one)

    return types.int64(crew), generate


@intrinsic
def _arrived(typing, crew):
    def generate(context, builder, signature, arguments):
        place = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.load_atomic(place, "acquire", 8)

    return types.int64(crew), generate


@intrinsic
def _pause(typing):
    def generate(context, builder, signature, arguments):
        if llvmlite.binding.get_process_triple().startswith(("x86_64", "i686", "amd64")):
            name, nothing = "llvm.x86.sse2.pause", ir.FunctionType(ir.VoidType(), [])
            builder.call(builder.module.globals.get(name) or ir.Function(builder.module, nothing, name), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def call(typing, address):
    """What the C function `int f(void)` at an address returns."""
    def generate(context, builder, signature, arguments):
        function = ir.FunctionType(INT32, []).as_pointer()
        return builder.sext(builder.call(builder.inttoptr(arguments[0], function), []), INT64)

    return types.int64(types.int64), generate
