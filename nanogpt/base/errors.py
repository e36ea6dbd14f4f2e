"""What stops a program from outside of its own checks - the system, the memory, the keyboard - as one line and an exit code."""

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Iterator

from nanogpt.base.language import ConfigError, say, text

EXIT_USER_ERROR = 2
# 与被 SIGINT 结束的程序相同：128 + 2
EXIT_INTERRUPTED = 130
# 与被 SIGPIPE 结束的程序相同：128 + 13
EXIT_PIPE_CLOSED = 141

# errno -> 该怎么办；Windows 没有 EDQUOT
REMEDIES = {
    errno.ENOSPC: "remedy_space", getattr(errno, "EDQUOT", errno.ENOSPC): "remedy_space", errno.EROFS: "remedy_access", errno.EACCES: "remedy_access",
    errno.EPERM: "remedy_access", errno.EMFILE: "remedy_files", errno.ENFILE: "remedy_files", errno.ENAMETOOLONG: "remedy_name",
    errno.ENOMEM: "remedy_memory", errno.EIO: "remedy_disk",
}

NOT_DETERMINISTIC = " does not have a deterministic implementation"


def forgive_output() -> None:
    """Print ? for a character that the terminal cannot show."""
    # 重定向到 GBK 终端时，打不出的字符也不该让程序崩溃
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")


def explained(error: BaseException) -> ConfigError | None:
    """The one line for what the system refused or for memory that ran out; None for anything else."""
    if isinstance(error, ConfigError):
        return error
    if isinstance(error, OSError):
        remedy = text(REMEDIES[error.errno]) if error.errno in REMEDIES else text("check that path")
        path = next((os.fsdecode(p) for p in (error.filename, error.filename2) if isinstance(p, str | bytes | os.PathLike)), "-")
        return ConfigError(
            "{path}: the system refuses ({reason}); {remedy}",
            path=path, reason=error.strerror or str(error) or type(error).__name__, remedy=remedy,
        )
    if isinstance(error, MemoryError):
        return ConfigError(
            "out of memory ({reason}); choose a smaller model, batch_size or text, or close other programs",
            reason=str(error) or "MemoryError",
        )
    # 没有导入 torch，就不会是它的错
    if "torch" in sys.modules:
        from nanogpt.base.out_of_memory import is_out_of_memory

        if is_out_of_memory(error):
            return ConfigError(
                "out of memory ({reason}); choose a smaller model, batch_size or text, or close other programs",
                reason=str(error).strip().partition("\n")[0],
            )
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
    """A parser whose mistakes are one line instead of its whole usage."""

    def error(self, message: str):
        raise ConfigError("{reason}; --help shows what there is", reason=message)


@contextlib.contextmanager
def one_line_each() -> Iterator[None]:
    """Around a main program: mistakes, the system's refusals and Ctrl-C end it with one line at most; a bug keeps its traceback."""
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
