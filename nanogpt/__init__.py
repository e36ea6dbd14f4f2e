"""nanogpt: train, fit and write with a GPT on one consumer GPU or a CPU.

    import nanogpt
    model = nanogpt.create_model("tiny", vocab_size=65)   # or nanogpt.tiny(vocab_size=65)
"""

from functools import partial

from nanogpt.base.moved import keep_earlier_names

PRESETS = ("tiny", "small", "medium", "large", "gpt2", "gpt2_medium", "gpt2_large", "gpt2_xl", "gpt_3b")

__all__ = ["create_model", *PRESETS]
__version__ = "0.1.0"

keep_earlier_names()


def __getattr__(name: str):
    # 惰性导入：只查配置的命令不必等 torch
    if name in __all__:
        from nanogpt.weights.build import create_model

        return create_model if name == "create_model" else partial(create_model, name)
    raise AttributeError(f"module 'nanogpt' has no attribute {name!r}")
