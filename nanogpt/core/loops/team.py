"""Kernels that PyTorch's own threads run together, each taking its pieces of the work."""

# 训练的一步里，这些循环夹在 PyTorch 的运算之间：另开线程，会与空转着等的 OpenMP 线程抢核
# 所以借用同一池：GOMP_parallel 与 PyTorch 的并行区是同一个入口，叫醒、等齐只要三微秒
# 别的 OpenMP（Windows、Mac）没有这个入口：用一池自己的线程
# 每一块怎么算是固定的，所以结果与线程数无关；哪一块归第几个线程也是固定的：非正规数怎样舍入，各个线程自己记着

import ctypes
import functools
import sys
from pathlib import Path

import numpy as np
import torch
from numba import carray, types
from numba.core.ccallback import CFunc
from numba.extending import intrinsic

from nanogpt.base.language import say
from nanogpt.core.loops.compiled import REORDER, call, crew_of, is_kept, keep, part_of_kernel, share, threads

# 一份活是一段 int64：共几块；第几个线程、共几个，或者问 OpenMP 的那两个函数的地址；然后是各个地址与数
PIECES, PART, SIZE, ASK_PART, ASK_SIZE, GIVEN, LENGTH = 0, 1, 2, 3, 4, 5, 24
# 一段这么多个数，各段归谁都行
BLOCK = 2**14
# 数比这少时，一个线程走完比叫醒别的还快
ALONE = 2**14
CALL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
MAPS = Path("/proc/self/maps")
NUMBERS = {torch.float32: types.float32, torch.bfloat16: types.int16}


class TeamKernel:
    """A function of one job, compiled for numbers of a type when it is first needed for them.

    It goes through the pieces() and reads what it was given, counted from 0, with number(), real(), floats(), row() …
    Sums may be reordered unless that is forbidden.
    """

    # 它只有一个参数，OpenMP 就是这样叫的；指针的类型说活里的数是哪种，它真正指着的是 job

    def __init__(self, function, *, reorder: bool = True):
        self.function, self.reorder = function, reorder
        self.compiled: dict[torch.dtype, CFunc] = {}

    def __call__(self, dtype: torch.dtype, size: int, pieces: int, *given: torch.Tensor | float | None) -> None:
        """Do `pieces` pieces of work on `size` numbers of this dtype; tensors must be contiguous."""
        job = np.zeros(LENGTH, np.int64)
        job[PIECES], job[SIZE] = pieces, 1
        for i, one in enumerate(given, GIVEN):
            if isinstance(one, torch.Tensor):
                job[i] = one.data_ptr()
            elif one is not None:
                (job if isinstance(one, int) else job.view(np.float64))[i] = one
        run = CALL((self.compiled.get(dtype) or self._compile(dtype)).address)
        if size < ALONE or pieces == 1 or torch.get_num_threads() == 1:
            run(job.ctypes.data)
        elif openmp := _gnu_openmp():
            parallel, job[ASK_PART], job[ASK_SIZE] = openmp
            parallel(run, job.ctypes.data, torch.get_num_threads(), 0)
        else:
            crew_of(threads()).run(_part, run, job)

    def _compile(self, dtype: torch.dtype) -> CFunc:
        how = {"nopython": True, "fastmath": REORDER if self.reorder else False, "error_model": "numpy"}
        compiled = CFunc(self.function, ([types.CPointer(NUMBERS[dtype])], types.void), {}, how)
        try:
            compiled.enable_caching()
        except RuntimeError:
            # 程序的文件夹与主目录都不可写：每个进程编译一次
            pass
        else:
            keep(compiled._cache, self.function)
        if not is_kept(compiled):
            _say_once()
        compiled.compile()
        self.compiled[dtype] = compiled
        return compiled


@functools.cache
def _say_once() -> None:
    say("compiling small operations for this processor, once …")


def _part(part: int, crew: np.ndarray, size: int, run, job: np.ndarray) -> None:
    """What one of a crew does."""
    own = job.copy()
    own[PART], own[SIZE] = part, size
    run(own.ctypes.data)


@functools.cache
def _gnu_openmp() -> tuple | None:
    """GNU OpenMP's entry to a parallel region, in the library that PyTorch computes with, and the addresses of what
    tells a thread its number and how many there are; None: it is another OpenMP."""
    if sys.platform != "linux":
        return None
    try:
        lines = MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        # 第六栏是文件，路径里可以有空格
        files = {line.split(maxsplit=5)[-1] for line in lines}
        libraries = {file for file in files if "libgomp" in Path(file).name}
        # 载入过两份的，不知道 PyTorch 用的是哪一份
        (path,) = libraries
        library = ctypes.CDLL(path)
        parallel = library.GOMP_parallel
    except (ValueError, OSError, AttributeError):
        return None
    parallel.argtypes, parallel.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    ask = (library.omp_get_thread_num, library.omp_get_num_threads)
    return parallel, *(ctypes.cast(function, ctypes.c_void_p).value for function in ask)


def _pointer_to(dtype):
    @intrinsic
    def pointer(typing, address, offset):
        wanted = types.CPointer(dtype)

        def generate(context, builder, signature, arguments):
            change = builder.inttoptr if isinstance(address, types.Integer) else builder.bitcast
            start = change(arguments[0], context.get_value_type(wanted))
            return builder.gep(start, [arguments[1]])

        return wanted(address, offset), generate

    return pointer


_ints, _reals, _float32s, _bytes = map(_pointer_to, (types.int64, types.float64, types.float32, types.uint8))


@intrinsic
def _like(typing, job, address, offset):
    def generate(context, builder, signature, arguments):
        start = builder.inttoptr(arguments[1], context.get_value_type(job))
        return builder.gep(start, [arguments[2]])

    return job(job, address, offset), generate


@part_of_kernel
def number(job, i):
    """The i-th thing that was given, an integer."""
    return _ints(job, GIVEN + i)[0]


@part_of_kernel
def real(job, i):
    """The i-th thing that was given, a float."""
    return np.float32(_reals(job, GIVEN + i)[0])


# 每次只造一行，而不是从整个张量里切：切出来的要记引用，循环里有了那些调用就不向量化


@part_of_kernel
def floats(job, i, start, size):
    """`size` numbers of the i-th thing that was given, a tensor of float32."""
    return carray(_float32s(number(job, i), start), size)


@part_of_kernel
def floats_at(job, i, which, start, size):
    """`size` numbers of a float32 tensor whose address stands at `which` in the i-th thing that was given."""
    return carray(_float32s(integers(job, i, which, 1)[0], start), size)


@part_of_kernel
def integers(job, i, start, size):
    """`size` numbers of the i-th thing that was given, a tensor of int64."""
    return carray(_ints(number(job, i), start), size)


@part_of_kernel
def octets(job, i, start, size):
    """`size` numbers of the i-th thing that was given, a tensor of uint8."""
    return carray(_bytes(number(job, i), start), size)


@part_of_kernel
def row(job, i, start, size):
    """`size` numbers of the i-th thing that was given, a tensor of the job's dtype."""
    return carray(_like(job, number(job, i), start), size)


@part_of_kernel
def pieces(job):
    """The pieces of the work that are this thread's."""
    about = carray(_ints(job, 0), GIVEN)
    part, size = about[PART], about[SIZE]
    if about[ASK_PART]:
        # 来的线程可能比要的少：照真来了几个分
        part, size = call(about[ASK_PART]), call(about[ASK_SIZE])
    # 连着的一段：PyTorch 也这样分，要读的多半还在自己的缓存里
    first, last = share(about[PIECES], part, size)
    return range(first, last)


@part_of_kernel
def span(piece, size):
    """Where a piece of BLOCK numbers out of `size` begins, and how many it has."""
    return piece * BLOCK, min(BLOCK, size - piece * BLOCK)
