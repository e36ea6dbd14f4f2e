"""Writes, lists, verifies and loads checkpoints: immutable folders <run>/ckpt/iter_NNNNNNNN, without a pickle.

Each holds model.safetensors, the optimizer, scaler and counters (state.json names the tensors in state.safetensors),
config.yaml, tokenizer.json and manifest.json: format, iteration, val_loss, val_bpb, the run's id, and the SHA-256 of
every file and of itself. `last` is the newest, `best` the one with the lowest val_loss; no pointer is stored that could
be wrong.
"""

# checkpoint：一个写完就不再改的文件夹，整个出现或不出现，用之前逐个文件核对
# 训练里由 run/ 调 save、prune；resume、写作、服务、导出由 find 或 use 取，坏了就说出下一个好的是哪个
# 没有指向 last、best 的链接：都从各自的 manifest 算出来，就不会指错；别的训练的混进来，凭编号认出
# 读的时候训练可能正删旧的：listed、find、use 各自再看一遍，而不是报错
# 只有张量与普通的值：文件里没有代码可以执行，旧格式的 state.pt 也只以 weights_only 读

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nanogpt.base import run_names
from nanogpt.base.files import (
    folder_aside,
    is_held_open,
    numbered,
    remove_leftovers,
    replace,
    sha256,
    sync,
    write_text,
)
from nanogpt.base.hashed_json import DamagedError, read_sealed, reason_of, write_sealed
from nanogpt.base.language import ConfigError, text
from nanogpt.base.quoting import typed_override
from nanogpt.core.sharding import ShardedModel
from nanogpt.weights.foreign_files import load_plain
from nanogpt.weights.tensors import (
    UNREADABLE,
    Readers,
    flatten,
    read_tensors,
    readers_of,
    restore,
    shapes_in,
    write_tensors,
)

# 1：优化器等在 state.pt 里，只以 weights_only 读；manifest 没有自己的摘要，也没有训练的编号
# 到 2 为止，状态里没有样本的次序；到 3 为止，张量总是存全部的行
FORMAT = 4
FILES = ("model.safetensors", "state.safetensors", "state.json", "config.yaml", "tokenizer.json")
FILES_1 = ("model.safetensors", "state.pt", "config.yaml", "tokenizer.json")
# nanogpt clean --optimizer 之后只剩这些：能写作，不能接着训
WITHOUT_STATE = ("model.safetensors", "config.yaml", "tokenizer.json")
NAME = re.compile(r"iter_(\d{8,12})")
# 内容合不上时，读的一方会抛出这些
UNFIT = (*UNREADABLE, KeyError, IndexError, AttributeError, RecursionError)


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint folder whose manifest has been read."""

    # 造它只读了几百字节的 manifest；核对内容要读完几百 MB，用到时才调 problem()

    folder: Path
    iteration: int
    val_loss: float | None
    sha256: dict[str, str]
    run: str | None = None
    """Id of the run that wrote it; None in format 1."""
    val_bpb: float | None = None
    """val_loss in bits per byte; None where that is not known, as in those of earlier versions."""

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def resumable(self) -> bool:
        """Whether training can go on from it; without its optimizer state one can only write with it."""
        return set(self.sha256) != set(WITHOUT_STATE)

    def drop_state(self) -> None:
        """Delete the optimizer, scaler and counters for good; the weights stay."""
        left = {file: self.sha256[file] for file in WITHOUT_STATE}
        # 先换清单再删文件：停在中间，多出来的文件没有登记，也就没有人用
        dataclasses.replace(self, sha256=left)._reseal()
        for file in set(self.sha256) - set(left):
            (self.folder / file).unlink(missing_ok=True)

    def evaluated(self, val_loss: float, val_bpb: float | None) -> "Checkpoint":
        """Note the loss of an evaluation that was made later; return the checkpoint that it is now."""
        # 只换清单：权重没有变，整份再写一遍，换上去的那一瞬间就没有 checkpoint
        noted = dataclasses.replace(self, val_loss=val_loss, val_bpb=val_bpb)
        noted._reseal()
        return noted

    def write_manifest(self, folder: Path) -> None:
        """Write what is known of it into the folder of its files."""
        values = {"iteration": self.iteration, "val_loss": self.val_loss, "val_bpb": self.val_bpb, "run": self.run}
        write_sealed(folder / "manifest.json", {"format": FORMAT, **values, "sha256": self.sha256})

    def _reseal(self) -> None:
        self.write_manifest(self.folder)
        sync(self.folder)

    def problem(self) -> str | None:
        """What is wrong with the files, or None; reads them all."""
        for file, expected in self.sha256.items():
            path = self.folder / file
            if not path.is_file():
                return f"{file}: missing"
            try:
                if sha256(path) != expected:
                    return f"{file}: SHA-256 differs"
            except OSError as error:
                # 坏扇区读不出来
                return f"{file}: {reason_of(error)}"
        return None

    def damaged(self, reason: str) -> ConfigError:
        """The error that says what is damaged and names the next older good checkpoint of the run."""
        return _unusable(self.folder, reason, listed(self.folder.parent.parent).good)

    def config_text(self) -> str:
        """The run's resolved config, yaml."""
        return self._text("config.yaml")

    def _text(self, file: str) -> str:
        try:
            return (self.folder / file).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise self.damaged(f"{file}: {reason_of(error)}") from None

    def data_fingerprint(self) -> str | None:
        """Fingerprint of the training data, without reading a tensor; None if the state is not in json."""
        if "state.json" not in self.sha256:
            return None
        try:
            return dict(json.loads(self._text("state.json"))["dict"])["fingerprint"]
        except (ValueError, KeyError, TypeError):
            # 坏在哪里，由 load_state 去说
            return None

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights, without reading them."""
        try:
            return shapes_in(self.folder / "model.safetensors")
        except UNREADABLE as error:
            raise self.damaged(f"model.safetensors: {reason_of(error)}") from None

    def load_model(self, model: torch.nn.Module) -> None:
        """Copy the weights into a model of the same shape."""
        try:
            # 分片的模型只取自己的行：不把别人的也读进内存
            tensors = read_tensors(self.folder / "model.safetensors", mapped=isinstance(model, ShardedModel))
            # 共享的权重只存了一份，装回时由模型自己的共享关系补上
            missing, unexpected = model.load_state_dict(tensors, strict=False)
        except UNREADABLE as error:
            raise self.damaged(f"model.safetensors: {reason_of(error)}") from None
        own = model.state_dict()
        loaded = {own[name].data_ptr() for name in tensors if name in own}
        shared = {name for name, p in own.items() if p.data_ptr() in loaded}
        if others := (set(missing) - shared) | set(unexpected):
            raise self.damaged(f"model.safetensors: other parameters: {sorted(others)[:3]}")

    def readers(self) -> Readers:
        """The weights, each read when it is asked for."""
        try:
            return readers_of(self.folder / "model.safetensors")
        except UNREADABLE as error:
            raise self.damaged(f"model.safetensors: {reason_of(error)}") from None

    def refuse_without_state(self) -> None:
        """ConfigError where its optimizer state was removed."""
        if not self.resumable:
            raise ConfigError(
                "{path}: its optimizer state was removed (nanogpt clean --optimizer), so that training cannot go on "
                "from where it was; begin a new training from its weights: {init_from}",
                path=self.folder, init_from=typed_override("init_from", self.folder.parent.parent),
            )

    def load_state(self, *, mapped: bool = False) -> dict:
        """Optimizer, scaler and counters; tensors and plain values only, no code is run; mapped: see read_tensors()."""
        self.refuse_without_state()
        try:
            if "state.pt" in self.sha256:
                return load_plain(self.folder / "state.pt")
            tensors = read_tensors(self.folder / "state.safetensors", mapped=mapped)
            state = restore(json.loads(self._text("state.json")), tensors)
            return state if isinstance(state, dict) else {}
        except ConfigError:
            raise
        except Exception as error:
            # 旧格式里夹带代码的文件各抛各的错误，结论相同：不用它
            raise self.damaged(f"state: {reason_of(error)}") from None


@dataclass
class Listing:
    """The checkpoints of a run, oldest first, and the folders that are not usable ones, with the reason."""

    # 坏的不丢开：它可能正是最新或最好的那个，悄悄换成别的会丢掉训练

    good: list[Checkpoint] = field(default_factory=list)
    """Their manifests are in order; the other files have not been read."""
    bad: dict[Path, str] = field(default_factory=dict)


def listed(run_dir: Path) -> Listing:
    """All checkpoint folders of a run; those that cannot be used are listed too, never skipped silently."""
    found = _looked_at(run_dir)
    while any(not folder.is_dir() for folder in found.bad):
        # 正在训练的那一方刚删了旧的，也就刚存下新的：再看一遍
        found = _looked_at(run_dir)
    return found


def _looked_at(run_dir: Path) -> Listing:
    found = Listing()
    for folder in sorted(p for p in (run_dir / "ckpt").glob("iter_*") if p.is_dir() and NAME.fullmatch(p.name)):
        try:
            found.good.append(read_manifest(folder))
        except DamagedError as error:
            found.bad[folder] = str(error)
    own = _own_run(run_dir, found.good)
    for strange in [c for c in found.good if c.run not in (None, own)]:
        found.good.remove(strange)
        found.bad[strange.folder] = text("it belongs to another run")
    return found


def _own_run(run_dir: Path, found: list[Checkpoint]) -> str | None:
    """The id that the checkpoints of this run carry."""
    try:
        return run_names.recorded(run_dir).id
    except DamagedError:
        # 早先的训练没有 run.json；没有它或它坏了，就看最早的那一个
        return next((c.run for c in found if c.run), None)


def read_manifest(folder: Path) -> Checkpoint:
    """The checkpoint in a folder; DamagedError says why it cannot be used."""
    manifest = read_sealed(folder / "manifest.json", FORMAT)
    try:
        iteration, loss, hashes = manifest["iteration"], manifest["val_loss"], manifest["sha256"]
        run, bits = manifest.get("run"), manifest.get("val_bpb")
        assert iteration == int(NAME.fullmatch(folder.name)[1]), "belongs to another folder"
        for name, value in (("val_loss", loss), ("val_bpb", bits)):
            assert value is None or (type(value) in (int, float) and math.isfinite(value)), name
        assert run is None or isinstance(run, str), "run"
        # 多一个、少一个文件名都不行：没登记的文件就没人核对
        allowed = [set(FILES if manifest["format"] > 1 else FILES_1)]
        allowed += [set(WITHOUT_STATE)] if manifest["format"] > 3 else []
        assert set(hashes) in allowed, "other files"
        return Checkpoint(folder, iteration, loss, dict(hashes), run, bits)
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        raise DamagedError(f"manifest.json: {reason_of(error)}") from None


def checkpoints(run_dir: Path) -> list[Checkpoint]:
    """The checkpoints of a run whose manifests are in order, oldest first."""
    return listed(run_dir).good


def best_of(found: list[Checkpoint]) -> Checkpoint | None:
    """The one with the lowest val_loss, the newest among equals; None when none was evaluated."""
    return next(iter(_by_loss(found)), None)


def _by_loss(found: list[Checkpoint]) -> list[Checkpoint]:
    """Those that were evaluated, best first, the newest first among equals."""
    return sorted((c for c in found if c.val_loss is not None), key=lambda c: (c.val_loss, -c.iteration))


def find(run_dir: Path, which: str, *, key: str = "resume") -> Checkpoint:
    """The checkpoint called last, best or iter_…, verified; ConfigError names damage and the next older good one."""
    found = listed(run_dir)
    if not found.good and not found.bad:
        raise ConfigError("no_run", key=key, path=run_dir)
    by_name = {c.name: c for c in found.good}
    for folder, reason in found.bad.items():
        # 读不懂的那个，可能正是最新的，也可能是最好的：不悄悄换成别的
        newest = which == "last" and all(folder.name > c.name for c in found.good)
        if which == folder.name or which == "best" or newest:
            raise _unusable(folder, reason, found.good, best=which == "best")
    chosen = found.good[-1] if which == "last" else best_of(found.good) if which == "best" else by_name.get(which)
    if chosen is None:
        raise ConfigError(
            "checkpoint={got}: {path} has no such checkpoint; choose one of: {have}",
            got=which, path=run_dir, have=", ".join(["last", "best", *by_name]),
        )
    if problem := chosen.problem():
        if not chosen.folder.is_dir():
            # 正在训练的那一方刚把它删了：再找一次
            return find(run_dir, which, key=key)
        raise chosen.damaged(problem)
    return chosen


def _unusable(folder: Path, reason: str, good: list[Checkpoint], *, best: bool = False) -> ConfigError:
    """The error for an unusable checkpoint; it names the next older good one, or with `best` the best other one."""
    newest_first = [c for c in reversed(good) if c.folder != folder and (best or c.name < folder.name)]
    # 逐个核对要读完所有文件：找到一个完好的就停
    offered = [*_by_loss(newest_first), *newest_first] if best else newest_first
    instead = next((c for c in offered if c.problem() is None), None)
    if instead is None:
        remedy = text("no_older_checkpoint")
    elif best:
        remedy = text("a good one is checkpoint={name}", name=instead.name)
    else:
        remedy = text("the next older good one is checkpoint={name}", name=instead.name)
    return ConfigError("damaged_checkpoint", file=folder, reason=reason, remedy=remedy)


def find_trained(run_dir: Path, which: str, *, key: str) -> Checkpoint:
    """Like find(), to write with or to start from: `best` of a run that was never evaluated is its last."""
    # 只训了几步、还没评估过的，没有 best
    found = listed(run_dir)
    if which == "best" and best_of(found.good) is None and not found.bad:
        which = "last"
    return find(run_dir, which, key=key)


def use(run_dir: Path, which: str, use_it: Callable[[Checkpoint], Any], *, key: str) -> Any:
    """use_it(the checkpoint of find_trained()), repeated if a training under way deletes that meanwhile."""
    while True:
        source = find_trained(run_dir, which, key=key)
        try:
            return use_it(source)
        except ConfigError:
            if source.folder.is_dir():
                raise


def model_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of a model, with tied tensors only once."""
    seen, tensors = set(), {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.detach()
    return tensors


def save(
    run_dir: Path, *, model, state: dict[str, Any], iteration: int, val_loss: float | None, config_text: str,
    tokenizer_text: str, keep: int, run: str | None, val_bpb: float | None = None,
) -> Checkpoint:
    """Write a checkpoint aside, sync it and rename it; then delete all but the newest `keep` and the best."""
    final = run_dir / "ckpt" / f"iter_{iteration:08d}"
    # 被杀的那次没写完的先清掉：磁盘快满时，正缺这点地方
    remove_leftovers(final.parent)
    with folder_aside(final) as aside:
        tensors: dict[str, torch.Tensor] = {}
        write_text(aside / "state.json", json.dumps(flatten(state, tensors), ensure_ascii=False, allow_nan=False))
        write_text(aside / "config.yaml", config_text)
        write_text(aside / "tokenizer.json", tokenizer_text)
        # 大文件的摘要取自要写的内容，不是写出来的：写坏了也看得出
        hashes = {
            "model.safetensors": write_tensors(aside / "model.safetensors", model_tensors(model)),
            "state.safetensors": write_tensors(aside / "state.safetensors", tensors),
            **{file: sha256(aside / file) for file in ("state.json", "config.yaml", "tokenizer.json")},
        }
        saved = Checkpoint(final, iteration, val_loss, hashes, run, val_bpb)
        saved.write_manifest(aside)
    # 新的完整落盘之后才删旧的
    prune(run_dir, keep)
    return saved


def set_aside_newer(run_dir: Path, iteration: int) -> None:
    """Rename checkpoints beyond `iteration` to replaced_…, so that the one that training resumes from is the last."""
    found = listed(run_dir)
    # 从最新的开始：中途被杀，剩下的仍是一段连续的历史
    for folder in sorted([*(c.folder for c in found.good), *found.bad], reverse=True):
        if int(NAME.fullmatch(folder.name)[1]) > iteration:
            # 同名的更早一次放弃过：编号，绝不覆盖
            names = numbered(folder.with_name(f"replaced_{folder.name}"))
            replace(folder, next(path for path in names if not path.exists()))
    if (run_dir / "ckpt").is_dir():
        # 断电后不能又回到放弃了的那一段
        sync(run_dir / "ckpt")


def prune(run_dir: Path, keep: int) -> None:
    """Delete all checkpoints but the newest `keep` and the best, and the remains of killed saves; damaged ones stay."""
    for old in superseded(checkpoints(run_dir), keep):
        try:
            remove(run_dir, [old])
        except PermissionError as error:
            # Windows：正在写作的人还读着它，下一次再删；刚存下的那个是好的
            if not is_held_open(error):
                raise
    remove_leftovers(run_dir / "ckpt")


def superseded(found: list[Checkpoint], keep: int) -> list[Checkpoint]:
    """Those of a run's checkpoints, oldest first, that are neither among the newest `keep` nor the best."""
    best = best_of(found)
    return [one for one in found[:-keep] if one is not best]


def remove(run_dir: Path, doomed: list[Checkpoint]) -> None:
    """Delete checkpoints of a run; killed at any moment, each is whole or gone."""
    for old in doomed:
        # 先改名再删：删到一半被杀、断电，留下的是临时文件夹而不是残缺的 checkpoint
        aside = old.folder.with_name(f".{old.name}.old.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        old.folder.rename(aside)
    if doomed:
        sync(run_dir / "ckpt")
        remove_leftovers(run_dir / "ckpt")
