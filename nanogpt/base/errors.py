"""Turns what the system, the memory or the keyboard does to a program into one line and an exit code.

It also recognises an out-of-memory error, whichever library raised it.
"""

# 自己的检查之外还有三种结局：系统不肯、内存不够、人按了 Ctrl-C；都变成一行话和一个退出码
# 各个主程序都包在 one_line_each() 里；explained() 认得的才压成一行，认不得的是缺陷，留着 traceback
# 内存不足各库说法不一，认出来（is_out_of_memory）训练与写作才能减半重来
# 这里不导入 torch，查配置的命令不必等它

import argparse
import contextlib
import errno
import gc
import os
import re
import sys
from collections.abc import Callable, Iterator

from nanogpt.base.language import ConfigError, language_from_arguments, say, sentence, set_language, text

EXIT_USER_ERROR = 2
# 与被 SIGINT 结束的程序相同：128 + 2
EXIT_INTERRUPTED = 130
# 与被 SIGPIPE 结束的程序相同：128 + 13
EXIT_PIPE_CLOSED = 141
# 与被 SIGTERM 结束的程序相同：128 + 15；存好了，却没有训完：torchrun 会再启动，Slurm 等也看得出
EXIT_TERMINATED = 143

SPACE = sentence("free some disk space or choose another disk, then start again")
ACCESS = sentence("change its permissions or choose another place")
FILES = sentence("too many files are open: close other programs or raise the limit (ulimit -n)")
# errno -> 该怎么办；Windows 没有 EDQUOT
REMEDIES = {
    errno.ENOSPC: SPACE, getattr(errno, "EDQUOT", errno.ENOSPC): SPACE, errno.EROFS: ACCESS, errno.EACCES: ACCESS,
    errno.EPERM: ACCESS, errno.EMFILE: FILES, errno.ENFILE: FILES,
    errno.ENAMETOOLONG: sentence("choose a shorter name"),
    errno.ENOMEM: sentence("close other programs or choose smaller settings"),
    errno.EIO: sentence("the disk itself fails: copy what matters to another one"),
}

NOT_DETERMINISTIC = " does not have a deterministic implementation"


def forgive_output() -> None:
    """Print ? for a character that the terminal cannot show."""
    # 重定向到 GBK 终端时，打不出的字符也不该让程序崩溃
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")


def explained(error: BaseException) -> ConfigError | None:
    """The one line for a refusal of the system or for running out of memory; None for anything else."""
    if isinstance(error, ConfigError):
        return error
    if isinstance(error, OSError):
        remedy = text(REMEDIES[error.errno]) if error.errno in REMEDIES else text("check that path")
        named = [p for p in (error.filename, error.filename2) if isinstance(p, str | bytes | os.PathLike)]
        path = os.fsdecode(named[0]) if named else "-"
        return ConfigError(
            "{path}: the system refuses ({reason}); {remedy}",
            path=path, reason=error.strerror or str(error) or type(error).__name__, remedy=remedy,
        )
    if isinstance(error, MemoryError):
        return ConfigError("no_memory", reason=str(error) or "MemoryError")
    # 没有导入 torch，就不会是它的错
    if "torch" in sys.modules:
        if is_out_of_memory(error):
            return ConfigError("no_memory", reason=str(error).strip().partition("\n")[0])
        # 自己的模型里的运算、attention 的某种反向：torch 没有确定性的写法
        if isinstance(error, RuntimeError) and NOT_DETERMINISTIC in str(error):
            return ConfigError(
                "deterministic=true: {operation} has no deterministic implementation on this device; add "
                "deterministic=false",
                operation=str(error).partition(NOT_DETERMINISTIC)[0].strip(),
            )
    return None


def leave(error: ConfigError) -> None:
    """Say a mistake and end the program."""
    say("error", line=error)
    sys.exit(EXIT_USER_ERROR)


def leave_quietly() -> None:
    """End the program after the reader of its output has gone (… | head)."""
    # 不是错误；解释器退出时还会再刷一次 stdout
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(EXIT_PIPE_CLOSED)


class Arguments(argparse.ArgumentParser):
    """An argument parser that reports a mistake in one line instead of printing its whole usage."""

    # argparse 自己会打印用法并退出；抛出来，才和别的错误同一条路、同一种语言

    def error(self, message: str):
        raise ConfigError("unreadable_flag", reason=message)


@contextlib.contextmanager
def one_line_each() -> Iterator[None]:
    """Around a main program: a mistake, a refusal of the system or Ctrl-C ends it with at most one line.

    A bug keeps its traceback.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        leave_quietly()
    except Exception as error:
        if (line := explained(error)) is None:
            raise
        leave(line)


def run_command(
    parser: Callable[[], Arguments], run: Callable[[argparse.Namespace], None], arguments: list[str] | None,
) -> None:
    """Call run(what parser() reads) as a main program in the language that lang=… names; exit code 2 on a mistake.

    arguments: those of this process where None.
    """
    # 先定语言，再造 parser：它的说明也要用那种语言
    forgive_output()
    words = sys.argv[1:] if arguments is None else arguments
    set_language(language_from_arguments(words))
    with one_line_each():
        run(parser().parse_args([word for word in words if not word.startswith("lang=")]))


# ---- 内存不足 ----


# 各库的说法不同，都不分大小写；说法取自各库的源码与报错记录
PHRASES = (
    # CUDA、HIP、XPU、MPS 的分配器与驱动：CUDA out of memory、CUDA_ERROR_OUT_OF_MEMORY
    # Level Zero（XPU）：UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY
    r"out[ _]of[ _]((device|host|gpu|system|pinned)[ _])?memory",
    # hipErrorOutOfMemory、kIOGPUCommandBufferCallbackErrorOutOfMemory、cudaErrorMemoryAllocation
    r"outofmemory|errormemoryallocation",
    # Linux 与 Windows 的 CPU 分配器、oneMKL、页面文件
    r"(not enough|insufficient) memory|paging file is too small",
    r"(can'?t|cannot|could not|failed to|unable to) alloc(ate)? ((\w+ ){0,3}memory\b|[\d.]+ ?([kmgt]i?)?b)",
    # std::bad_alloc；MSVC 写作 bad allocation
    r"bad[_ ]alloc",
    # cuBLAS、cuBLASLt、cuDNN、cuSOLVER、cuSPARSE、cuFFT、cuRAND、hipBLAS、MIOpen、OpenCL
    r"_alloc(ation)?_fail(ed|ure)|statusallocfailed|rocblas_status_memory_error",
    # 显存满时这些库连句柄都建不出来，却只说没有初始化
    r"status_(not_initialized|internal_error)\b.*\b(cu|hip|roc)(blas|blaslt|solver|solverdn|sparse|rand)_?create",
    r"cudnn_status_not_initialized",
    # 要报显存不足时连显存用量也查不到：MIG、Jetson 上常见
    r"nvml_success == r internal assert failed",
    # NCCL 与 RCCL 自己的缓冲
    r"failed to cuda (\w+ )?[cm]?alloc",
    r"(ur_result|pi|ze_result|hsa_status)_error_out_of_resources",
    # MPS：一块缓冲就超过了上限
    r"invalid buffer size: ",
)
SAYS = re.compile("|".join(PHRASES), re.IGNORECASE)
# Windows：ERROR_NOT_ENOUGH_MEMORY、ERROR_OUTOFMEMORY、ERROR_COMMITMENT_LIMIT；文字随系统语言变，只认编号
WINDOWS_CODES = (8, 14, 1455)

# 在哪里发生的 -> 屏幕上的说法
PHASES = {
    "forward": sentence("forward or backward pass"), "sum": sentence("sum of the gradients over the processes"),
    "update": sentence("optimizer's update"), "evaluation": sentence("evaluation"),
    "training": sentence("training loop"),
}


def says_out_of_memory(words: str) -> bool:
    """Whether these words of some library mean that memory ran out."""
    return SAYS.search(words) is not None


def is_out_of_memory(error: BaseException) -> bool:
    """True for torch.OutOfMemoryError, MemoryError, and RuntimeErrors and OSErrors that say the same."""
    # 没有导入过 torch，就不会是它的错误；试跑的父进程不必为此等它
    known = getattr(sys.modules.get("torch"), "OutOfMemoryError", MemoryError)
    if isinstance(error, (MemoryError, known)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM or getattr(error, "winerror", None) in WINDOWS_CODES
    return isinstance(error, RuntimeError) and says_out_of_memory(str(error))


def release(device) -> None:
    """Free what a failed attempt has left: cycles first, then the allocator's cache. Call it outside of `except`."""
    import torch

    # 重算与 hook 会连成环，等垃圾回收才放开张量；在 except 里，异常还牵着那一帧的张量，收不走
    gc.collect()
    if device.type != "cpu":
        getattr(torch, device.type).empty_cache()


class OutOfMemory(ConfigError):  # noqa: N818 - 与 torch.OutOfMemoryError 区分
    """Raised when a part of training that cannot be divided further does not fit; `detail` is what the library said."""

    # 是 ConfigError：没有设错键，但要的也是一行话和补救，而不是 traceback

    def __init__(self, phase: str, *, rows: int, detail: str, line: str = "oom_final"):
        """phase: one of PHASES."""
        super().__init__(line, phase=text(PHASES[phase]), rows=rows)
        self.phase, self.rows, self.detail = phase, rows, detail


@contextlib.contextmanager
def not_divisible(phase: str, *, rows: int, line: str = "oom_final") -> Iterator[None]:
    """Turn running out of memory inside into OutOfMemory, where nothing can be halved or repeated."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(phase, rows=rows, detail=str(error), line=line) from None
