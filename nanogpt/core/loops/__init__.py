"""Loops compiled with numba (extra `fast`): what PyTorch does in a string of small operations, in one pass."""

# 用 numba 编译的循环：compiled 管编译与缓存，team 让 PyTorch 自己的线程一起跑，numbers 读写 bf16
# training 是一步训练里的那些小运算；写作的在 write/speed
# 没有装 numba 时一个也不用，结果只差舍入

from nanogpt.base.language import first_line


def failure() -> str | None:
    """What keeps the loops from working where numba is installed, or None."""
    try:
        import numba
        import torch

        if numba.config.DISABLE_JIT:
            return "NUMBA_DISABLE_JIT=1"
        from nanogpt.core.loops import training, updates  # noqa: F401 - 只看载不载得进

        # 一个最小的：编译不了的在这里就知道
        training.squared_relu(torch.ones(2))
    except Exception as error:
        # numba 装坏了、与 numpy 合不来、被环境变量关掉：都只该慢一点
        return first_line(error)
    return None
