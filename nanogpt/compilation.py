"""torch.compile where it works and pays; never a reason for a run to fail."""

import shutil

import torch


def unavailable(device: torch.device) -> str | None:
    """Why torch.compile cannot work here, or None."""
    if device.type == "cuda":
        try:
            import triton  # noqa: F401 - 只看装没装
        except ImportError:
            return "triton is not installed"
        return None
    if not any(shutil.which(name) for name in ("g++", "clang++", "cl")):
        return "no C++ compiler"
    return None


def compile_hidden(model, asked: str, device: torch.device, console, *, obstacle: str | None = None) -> None:
    """Compile model.hidden for training steps as compile=auto|true|false asks, where that works and nothing (`obstacle`) speaks against it."""
    asked = asked.lower()
    # CPU 上编译要一分钟，小模型短训练赚不回来；auto 只在 GPU 上开
    if asked == "false" or (asked == "auto" and device.type == "cpu"):
        return
    reason = obstacle or unavailable(device) or _trial(device)
    if reason:
        if asked == "true":
            console.line("compile_off", asked=asked, reason=reason)
        return
    console.line("compiling")
    # 编译中途出错时退回普通执行，而不是中断训练
    torch._dynamo.config.suppress_errors = True
    model.compiled_hidden = torch.compile(model.hidden)


def _trial(device: torch.device) -> str | None:
    """Compile one small function to find out whether the tool chain works; the reason if not."""
    try:
        torch.compile(lambda x: torch.sin(x) + 1)(torch.ones(8, device=device))
    except Exception as error:
        # 工具链的毛病五花八门，任何失败都等于不可用
        return str(error).strip().splitlines()[0][:120]
    return None
