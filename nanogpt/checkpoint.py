"""Checkpoints: immutable folders <run>/ckpt/iter_NNNNNNNN, written whole, verified before use.

Each holds model.safetensors, state.pt (optimizer, scaler, counters; weights_only), config.yaml,
tokenizer.json and manifest.json (format, iteration, val_loss, SHA-256 of every file). `last` is the
newest, `best` the one with the lowest val_loss: no pointer that could be wrong.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from nanogpt.files import folder_aside, remove_leftovers, sha256, write_text
from nanogpt.messages import ConfigError, text

FORMAT = 1
FILES = ("model.safetensors", "state.pt", "config.yaml", "tokenizer.json")


@dataclass(frozen=True)
class Checkpoint:
    """One folder with its manifest read."""

    folder: Path
    iteration: int
    val_loss: float | None
    sha256: dict[str, str]

    @property
    def name(self) -> str:
        return self.folder.name

    def problem(self) -> str | None:
        """What is wrong with the files, or None; reads them all."""
        for file in FILES:
            path = self.folder / file
            if not path.is_file():
                return f"{file}: missing"
            if sha256(path) != self.sha256.get(file):
                return f"{file}: SHA-256 differs"
        return None

    def config_text(self) -> str:
        """The run's resolved config, yaml."""
        return (self.folder / "config.yaml").read_text(encoding="utf-8")

    def load_model(self, model: torch.nn.Module) -> None:
        """Copy the weights into a model of the same shape."""
        tensors = load_file(self.folder / "model.safetensors")
        # 共享的权重只存了一份，装回时由模型自己的共享关系补上
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        shared = {name for name, p in model.state_dict().items() if any(p.data_ptr() == q.data_ptr() for q in
                  (model.state_dict()[k] for k in tensors if k in model.state_dict()))}
        lacking = set(missing) - shared
        if lacking or unexpected:
            raise ConfigError("damaged_checkpoint", file=self.folder / "model.safetensors",
                              reason=f"other parameters: {sorted(lacking | set(unexpected))[:3]}", remedy=text("no_older_checkpoint"))

    def load_state(self) -> dict:
        """Optimizer, scaler and counters; tensors and plain values only, no code is run."""
        return torch.load(self.folder / "state.pt", map_location="cpu", weights_only=True)


def checkpoints(run_dir: Path) -> list[Checkpoint]:
    """All checkpoints of a run, oldest first; a folder without a readable manifest is passed over."""
    found = []
    for folder in sorted((run_dir / "ckpt").glob("iter_*")):
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            if manifest["format"] > FORMAT:
                raise ConfigError("newer_format", file=folder / "manifest.json", got=manifest["format"], want=FORMAT)
            found.append(Checkpoint(folder, int(manifest["iteration"]), manifest["val_loss"], manifest["sha256"]))
        except ConfigError:
            raise
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def best_of(found: list[Checkpoint]) -> Checkpoint | None:
    """The one with the lowest val_loss, the newest among equals; None when none was evaluated."""
    evaluated = [c for c in found if c.val_loss is not None]
    return min(evaluated, key=lambda c: (c.val_loss, -c.iteration)) if evaluated else None


def find(run_dir: Path, which: str, *, key: str = "resume") -> Checkpoint:
    """The checkpoint called last, best or iter_…, verified; ConfigError names damage and the next older good one."""
    found = checkpoints(run_dir)
    if not found:
        raise ConfigError("no_run", key=key, path=run_dir)
    by_name = {c.name: c for c in found}
    chosen = found[-1] if which == "last" else best_of(found) if which == "best" else by_name.get(which)
    if chosen is None:
        raise ConfigError("no_such_checkpoint", got=which, path=run_dir, have=", ".join(["last", "best", *by_name]))
    if problem := chosen.problem():
        older = next((c for c in reversed(found) if c.iteration < chosen.iteration and c.problem() is None), None)
        remedy = text("older_checkpoint", name=older.name) if older else text("no_older_checkpoint")
        raise ConfigError("damaged_checkpoint", file=chosen.folder, reason=problem, remedy=remedy)
    return chosen


def find_trained(run_dir: Path, which: str, *, key: str) -> Checkpoint:
    """What find() gives, to write with or to start from: `best` of a run that was never evaluated is its last."""
    # 只训了几步、还没评估过的，没有 best
    if which == "best" and best_of(checkpoints(run_dir)) is None:
        which = "last"
    return find(run_dir, which, key=key)


def model_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with tied tensors once, contiguous and on the CPU, as safetensors wants it."""
    seen, tensors = set(), {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.detach().cpu().contiguous()
    return tensors


def save(
    run_dir: Path, *, model, state: dict, iteration: int, val_loss: float | None, config_text: str, tokenizer_file: Path, keep: int,
) -> Checkpoint:
    """Write a checkpoint aside, sync it, rename it; then drop all but the newest `keep` and the best."""
    final = run_dir / "ckpt" / f"iter_{iteration:08d}"
    with folder_aside(final) as aside:
        save_file(model_tensors(model), aside / "model.safetensors", metadata={"format": "pt"})
        torch.save(state, aside / "state.pt")
        write_text(aside / "config.yaml", config_text)
        shutil.copyfile(tokenizer_file, aside / "tokenizer.json")
        hashes = {file: sha256(aside / file) for file in FILES}
        manifest = {"format": FORMAT, "iteration": iteration, "val_loss": val_loss, "sha256": hashes}
        write_text(aside / "manifest.json", json.dumps(manifest, indent=2))
    # 新的完整落盘之后才删旧的
    prune(run_dir, keep)
    return Checkpoint(final, iteration, val_loss, hashes)


def set_aside_newer(run_dir: Path, iteration: int) -> None:
    """Rename checkpoints beyond `iteration` to replaced_…, so that going on from an older one makes it the last."""
    for newer in checkpoints(run_dir):
        if newer.iteration > iteration:
            target = newer.folder.with_name(f"replaced_{newer.name}")
            # 同名的更早一次放弃过：编号，绝不覆盖
            numbered = (newer.folder.with_name(f"replaced_{newer.name}_{n}") for n in range(2, 10**6))
            newer.folder.rename(target if not target.exists() else next(p for p in numbered if not p.exists()))


def prune(run_dir: Path, keep: int) -> None:
    """Delete all checkpoints but the newest `keep` and the best, and what killed saves left behind."""
    found = checkpoints(run_dir)
    best = best_of(found)
    for old in found[:-keep]:
        if old is not best:
            # 先改名再删：删到一半被杀，留下的是临时文件夹而不是残缺的 checkpoint
            doomed = old.folder.with_name(f".{old.name}.old.tmp")
            shutil.rmtree(doomed, ignore_errors=True)
            old.folder.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
    remove_leftovers(run_dir / "ckpt")
