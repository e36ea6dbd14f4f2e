"""Recognising out-of-memory errors, whichever library raised them, and the error that ends a run."""

import contextlib
from collections.abc import Iterator

from nanogpt.messages import ConfigError, text

# 各库的说法不同：CUDA 分配器、cuBLAS、cuDNN、CPU 分配器
PHRASES = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "can't allocate memory",
    "not enough memory",
)


# 在哪里发生的 -> 屏幕上的说法
PHASES = {"forward": "oom_in_forward", "update": "oom_in_update", "evaluation": "oom_in_evaluation"}


def is_out_of_memory(error: BaseException) -> bool:
    """True for torch.OutOfMemoryError, MemoryError and RuntimeErrors that say the same."""
    # 到这里才导入：试跑的父进程只要上面的说法
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in PHRASES)


class OutOfMemory(ConfigError):  # noqa: N818 - 与 torch.OutOfMemoryError 区分
    """A part of training that cannot be divided further does not fit; `detail` is what the library said."""

    def __init__(self, phase: str, *, rows: int, detail: str):
        """phase: one of PHASES."""
        super().__init__("oom_final", phase=text(PHASES[phase]), rows=rows)
        self.phase, self.rows, self.detail = phase, rows, detail


@contextlib.contextmanager
def not_divisible(phase: str, *, rows: int) -> Iterator[None]:
    """Turn running out of memory inside into OutOfMemory: nothing can be halved there, and nothing repeated."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(phase, rows=rows, detail=str(error)) from None
