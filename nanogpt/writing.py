"""From a run folder to text on stdout."""

import sys
from pathlib import Path

import torch

from nanogpt import checkpoint, machine
from nanogpt import tokenizer as tokenizers
from nanogpt.build import model_of
from nanogpt.config import HardwareConfig, SampleConfig
from nanogpt.corpus import iter_text
from nanogpt.generate import generate, sample_tempered
from nanogpt.messages import ConfigError

FROM_FILE = "FILE:"


def load(source: checkpoint.Checkpoint, device: torch.device):
    """The model of a checkpoint in evaluation mode, and its tokenizer."""
    return model_of(source).to(device).eval(), tokenizers.load(source.folder / "tokenizer.json")


def prompt_text(start: str) -> str:
    """The prompt itself, or the content of the file that FILE:… names."""
    if not start.startswith(FROM_FILE):
        return start
    path = Path(start.removeprefix(FROM_FILE))
    if not path.is_file():
        raise ConfigError("missing_file", key="start", got=start)
    return "".join(iter_text(path))


def write(cfg: SampleConfig, run_dir: Path) -> None:
    """Print num_samples texts, each token as soon as its characters are whole."""
    device = machine.choose_device(cfg.device, HardwareConfig())
    found = checkpoint.checkpoints(run_dir)
    # 只训了几步、还没评估过的，没有 best，用 last
    which = "last" if cfg.checkpoint == "best" and checkpoint.best_of(found) is None else cfg.checkpoint
    model, tokenizer = load(checkpoint.find(run_dir, which, key="out_dir"), device)
    prompt = prompt_text(cfg.start)
    ids = tokenizer.encode(prompt)
    if not len(ids):
        raise ConfigError("empty_prompt", got=cfg.start)
    idx = torch.tensor(ids, device=device)[None]
    for number in range(cfg.num_samples):
        generator = torch.Generator(device=device).manual_seed(cfg.seed + number)
        if number:
            print("-" * 40)
        print(prompt, end="", flush=True)
        stream(generate(model, idx, cfg.max_new_tokens, lambda logits, g=generator: sample_tempered(logits, cfg.temperature, g)), tokenizer)
        print()


def stream(steps, tokenizer) -> None:
    """Print ids as they come; a character split over several tokens is held back until it is whole."""
    ids: list[int] = []
    shown = ""
    for chosen in steps:
        ids.append(int(chosen))
        whole = tokenizer.decode(ids)
        if whole.endswith("�"):
            # 汉字的几个字节可能分在几个 token 里，等齐了再显示
            continue
        sys.stdout.write(whole[len(shown) :])
        sys.stdout.flush()
        if whole.endswith("\n"):
            # 换行后从头计，解码的代价不随长度增长
            ids, whole = [], ""
        shown = whole
    sys.stdout.write(tokenizer.decode(ids)[len(shown) :])
