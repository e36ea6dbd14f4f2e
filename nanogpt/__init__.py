# import nanogpt 的入口：名字惰性导入，只查配置的命令不必等 torch
# 预设的名字就是 conf/model 里的 yaml，加一个文件就多一个函数
"""nanogpt: train, fit and write with a GPT on one consumer GPU or a CPU; docs/python.md has examples.

    import nanogpt
    model = nanogpt.create_model("tiny", vocab_size=65)   # or nanogpt.tiny(vocab_size=65)
    text = nanogpt.load("outputs/my-run").write("KING:")
    plan = nanogpt.plan_for("model=medium", "hardware=rtx3060_12gb")
"""

import os
import sys
from functools import partial
from importlib import import_module

from nanogpt.base.before_torch import spin_briefly
from nanogpt.base.moved import keep_earlier_names

# 名字 -> 所在的模块
PUBLIC = {
    "create_model": "weights.build", "GPT": "core.model", "ModelConfig": "base.config", "ConfigError": "base.language",
    "load": "write.python", "plan_for": "plan.plan",
    "Trainer": "core.trainer", "Step": "core.step", "Schedule": "base.config",
    "Precision": "core.precision", "PrecisionConfig": "base.config",
    "TokenData": "data.tokens", "write_dataset": "data.corpus", "ByteTokenizer": "data.tokenizer",
    "Decoder": "core.generate", "sampler": "core.sampling",
}

__all__ = [*PUBLIC]
__version__ = "0.1.0"

keep_earlier_names()
# 在 notebook 里也一样：晚于 torch 导入便来不及，写字时 OpenMP 空转的线程要与我们的抢核（2 核上慢四成）
spin_briefly(os.environ)
if sys.platform == "darwin":
    # MPS 还没有的运算改由 CPU 算；torch 在导入时读它
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")


def __getattr__(name: str):
    if name in PUBLIC:
        return getattr(import_module(f"nanogpt.{PUBLIC[name]}"), name)
    if not name.startswith("_"):
        from nanogpt.weights.build import create_model, preset_names

        if name in preset_names():
            return partial(create_model, name)
    raise AttributeError(f"module 'nanogpt' has no attribute {name!r}")


def __dir__() -> list[str]:
    from nanogpt.weights.build import preset_names

    return sorted({*globals(), *PUBLIC, *preset_names()})
