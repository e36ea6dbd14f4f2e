"""Tokens per second of writing, beside transformers and nanoGPT with the same random weights and number format."""

import functools
from collections.abc import Iterator

# benchmarks/sampling.py：三个程序都在那里打开
import sampling
import torch
from card_parts.kit import GIB, Case, Lab, profile

XL = {"n_layer": 48, "n_head": 25, "n_embd": 1600, "block_size": 1024, "vocab_size": 50257}
SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64, "vocab_size": 65}
# 名字 -> (形状, 行数, 开头的 token 数, 新 token 数)
TASKS = {
    "1 row": ("gpt2_124m", 1, 1, 256), "32 rows": ("gpt2_124m", 32, 1, 64),
    "first token behind 500": ("gpt2_124m", 1, 500, 1),
    "xl, 1 row": ("xl", 1, 1, 64), "xl, 32 rows": ("xl", 32, 1, 32),
}
# 按值得的次序：时间用完时，后面的不量
ORDER = (
    ("1 row", "ours"), ("32 rows", "ours"), ("xl, 1 row", "ours"), ("1 row", "transformers"),
    ("32 rows", "transformers"), ("1 row", "nanogpt"), ("1 row", "ours int8"), ("1 row", "ours plain"),
    ("xl, 1 row", "transformers"),
    ("32 rows", "nanogpt"), ("first token behind 500", "ours"), ("first token behind 500", "transformers"),
    ("1 row", "transformers static"), ("xl, 32 rows", "ours"), ("32 rows", "ours int8"),
    ("32 rows", "transformers static"),
)


def cases(lab: Lab) -> Iterator[Case]:
    """task, program."""
    chosen = (("1 row", "ours plain"), ("1 row", "transformers"), ("1 row", "nanogpt")) if lab.pretend else ORDER
    for task, program in chosen:
        yield f"{task}, {program}", functools.partial(speed, lab, task, program)


def shape_of(lab: Lab, task: str) -> dict:
    """The model of a task."""
    return SMALL if lab.pretend else XL if task.startswith("xl") else sampling.SHAPES[TASKS[task][0]]


@functools.lru_cache(maxsize=1)
def weights(lab: Lab, task: str) -> dict:
    """Random weights on the device; those of the task before are let go."""
    return sampling.random_weights(shape_of(lab, task), str(lab.device))


def speed(lab: Lab, task: str, program: str) -> dict:
    """Tokens/s, and the bytes of weights per second that are read for them at least."""
    if task.startswith("xl") and lab.total < 20 * GIB:
        return {"skipped": "for cards of 20 GiB and more"}
    if program == "nanogpt" and (lab.nanogpt is None or not (lab.nanogpt / "model.py").is_file()):
        return {"skipped": "no --nanogpt PATH with model.py"}
    shape, (_, rows, prompt_length, n) = shape_of(lab, task), TASKS[task]
    n, prompt_length = (min(n, 8), min(prompt_length, 8)) if lab.pretend else (n, prompt_length)
    openers = {"nanogpt": sampling.open_nanogpt, "transformers": sampling.open_transformers, "ours": sampling.open_ours}
    device, dtype = str(lab.device), sampling.half(str(lab.device))
    tensors = weights(lab, "xl, 1 row" if task.startswith("xl") else "1 row")
    # 模型直接建在卡上：XL 在 CPU 上建一次要十几秒
    with torch.device(lab.device):
        named = str(lab.nanogpt) if program == "nanogpt" else program
        generate = openers[program.partition(" ")[0]](shape, tensors, named, device, dtype)
    prompt = torch.randint(0, shape["vocab_size"], (rows, prompt_length)).to(device)
    generate(prompt, n if "static" in program or "ours" in program else min(n, 4), False)
    seconds = min(sampling.timed(generate, prompt, n) for _ in range(1 if lab.pretend else 2))
    size = 1 if "int8" in program else dtype.itemsize
    read = size * sum(t.numel() for name, t in tensors.items() if name != "wpe.weight")
    found = {"tokens_per_s": rows * n / seconds, "writing_s": seconds, "weights_gb_per_s": read * n / seconds / 1e9}
    if program != "ours":
        return found
    # n 个 token 合计：卡忙了多久，主机又让它等了多久
    return {**found, **profile(lab, lambda: generate(prompt, n, False), 1, top=12)}
