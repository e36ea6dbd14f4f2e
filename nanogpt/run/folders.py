"""What is known of run folders, from their small files alone, and the list of them: `nanogpt runs`.

Needs no torch.
"""

# 已有的训练：看 config.yaml、summary.json、metrics.jsonl 与占的地方，不看权重，所以几十个目录也只要一会儿
# look 读一个目录，find 找出一个文件夹里的全部，main 就是 nanogpt runs；compare 与 clean 也由此认识目录
# 坏了的、早先版本的、正在训练的都列出来，知道多少说多少：列表是人去找丢了的东西的地方，不能自己先停下
# 正在写的一方不受打扰：只读，锁只问一下

import argparse
import contextlib
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nanogpt.base.console import aligned, clock, file_size, short
from nanogpt.base.errors import Arguments, run_command
from nanogpt.base.groups import leaves
from nanogpt.base.hashed_json import DamagedError, read_object
from nanogpt.base.language import ConfigError, sentence, show, text
from nanogpt.base.lock import is_held
from nanogpt.base.quoting import command
from nanogpt.base.report import formatted
from nanogpt.base.run_names import OUTPUTS, is_latest, locate, recorded
from nanogpt.base.saved_config import read_saved, saved_in
from nanogpt.run.launching import FAILED, QUEUED, RUNNING, states
from nanogpt.run.loggers import history, number, points
from nanogpt.run.rundir import JOB, LOCK

# 扫描的训练在 outputs/sweeps/<时间>/<任务> 里
DEPTH = 3
# 没有走完也没有坏的，都叫停下的
STATES = {
    "queued": sentence("queued"), "failed": "state_failed", "running": "state_running", "finished": "state_finished",
    "stopped": "state_stopped", "empty": "state_empty", "damaged": "state_damaged",
    "pruned": "state_pruned",
}
ENDED = ("finished", "max_tokens", "max_minutes", "early_stop", "target_reached")
COLUMNS = (
    "column_run", "column_loss", "column_tokens", "column_took", "column_size", "column_state", "column_model",
    "column_data", "column_bpb",
)


@dataclass(frozen=True, eq=False)
class Run:
    """A run folder as its small files describe it; None where they say nothing."""

    # 数都来自文件，文件可能坏了、旧了、是陌生人的：不是有限数的就当没有

    path: Path
    settings: dict[str, Any]
    """The saved config: dotted key -> value; empty where it cannot be read."""
    summary: dict[str, Any]
    """summary.json; empty before the run has ended once."""
    curve: list[dict[str, float]] = field(repr=False)
    """The records of metrics.jsonl by iteration; those that a resume has given up are left out."""
    running: bool
    size: int
    """Bytes on the disk."""
    changed: float
    """When it was written to last, seconds since 1970."""
    checkpoints: int
    problem: str = ""
    job: str = ""
    """What Slurm says of the job that was launched for it, if anything."""

    @property
    def model(self) -> str:
        return str(self.settings.get("model.name", "?"))

    @property
    def data(self) -> str:
        return str(self.settings.get("dataset.name", "?"))

    @property
    def state(self) -> str:
        """One of STATES."""
        if self.running or self.job in RUNNING:
            return "running"
        if self.job in QUEUED:
            return "queued"
        if not self.checkpoints:
            # 有总结的训完过，权重删了：搜索淘汰的
            return "failed" if self.job in FAILED else "pruned" if self.summary else "empty"
        if self.problem:
            return "damaged"
        # 后来又接着训、没走完的，summary 是从前的
        reached = number(self.summary.get("iters"), 0)
        over = self.summary.get("stopped_by") in ENDED and reached >= self.last("iteration", 0)
        return "finished" if over else "stopped"

    def last(self, name: str, nothing: float | None = None) -> float | None:
        """The latest value of a metric."""
        return next((record[name] for record in reversed(self.curve) if name in record), nothing)

    def values(self, name: str) -> list[tuple[float, float]]:
        """(iteration, value) of a metric."""
        return points(self.curve, name)

    @property
    def tokens(self) -> float | None:
        return self.last("tokens", number(self.summary.get("tokens")))

    @property
    def loss(self) -> float | None:
        """The best validation loss."""
        return self._best("val/loss", "best_val_loss")

    @property
    def bpb(self) -> float | None:
        """The best validation loss in bits per byte."""
        return self._best("val/bpb", "best_val_bpb")

    def _best(self, metric: str, summed_up: str) -> float | None:
        told = number(self.summary.get(summed_up))
        return min([value for _, value in self.values(metric)] + [told] * (told is not None), default=None)

    @property
    def tokens_per_s(self) -> float | None:
        return number(self.summary.get("tokens_per_s"), self.last("tokens_per_s"))

    @property
    def seconds(self) -> float | None:
        """How long it trained, evaluations left out where it was resumed or never ended."""
        told = [number(self.summary.get(name)) for name in ("wall_s", "train_s")]
        counted, before = 0.0, 0.0
        for record in self.curve:
            if record.get("tokens_per_s") and "tokens" in record:
                counted += max(0.0, record["tokens"] - before) / record["tokens_per_s"]
                before = record["tokens"]
        return max([counted or None, *told], key=lambda value: value or 0.0)


# ---- 读一个目录 ----


def is_run(path: Path) -> bool:
    """Whether a folder is that of a run."""
    return (path / "run.json").is_file() or (path / "ckpt").is_dir() or (path / JOB / "id").is_file() or (
        (path / "config.yaml").is_file() and (path / "metrics.jsonl").is_file()
    )


def look(path: Path) -> Run:
    """What the small files of a run folder say; never raises for what is in them."""
    settings, problem = _settings(path)
    try:
        summary = read_object(path / "summary.json")
    except DamagedError:
        # 还没走完的没有它；坏了的，数都在 metrics.jsonl 里
        summary = {}
    # 锁不算：问它一下也会改动时间
    found = [stat for file, stat in _files(path) if file != path / LOCK]
    named = [p for p in (path / "ckpt").glob("iter_*") if re.fullmatch(r"iter_\d+", p.name)]
    return Run(
        path, settings, summary, _curve(path), running=is_held(path / LOCK),
        size=sum(stat.st_size for stat in found), changed=max((stat.st_mtime for stat in found), default=0.0),
        checkpoints=len(named), problem=problem,
    )


def _files(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for folder, _, names in os.walk(path):
        for name in names:
            # 训练着的随时在删：看到时还在的才算
            with contextlib.suppress(OSError):
                yield Path(folder, name), os.lstat(Path(folder, name))


def size_of(path: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(stat.st_size for _, stat in _files(path))


def _settings(path: Path) -> tuple[dict[str, Any], str]:
    """(the saved config by dotted keys, why it cannot be read)."""
    try:
        return leaves(saved_in(path)), ""
    except (OSError, ValueError) as error:
        problem = str(error) if isinstance(error, DamagedError) else f"config.yaml: {type(error).__name__}"
    try:
        return leaves(read_saved(recorded(path).config_text)), ""
    except DamagedError:
        return {}, problem


def _curve(path: Path) -> list[dict[str, float]]:
    try:
        return history(path)[0]
    except OSError:
        return []


def with_jobs(runs: Iterable[Run]) -> list[Run]:
    """The same with what Slurm says of their jobs, asked once for all."""
    found = list(runs)
    said = states(run.path for run in found)
    return [replace(run, job=said.get(run.path, "")) for run in found]


# ---- 找目录 ----


def find(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    """The run folders in `folder`, itself included, not deeper than `depth`."""
    if is_run(folder):
        yield folder
    elif depth:
        try:
            inside = sorted(p for p in folder.iterdir() if p.is_dir() and not p.is_symlink() and p.name[0] != ".")
        except OSError:
            return
        for path in inside:
            yield from find(path, depth - 1)


def named(words: Sequence[str]) -> list[Path]:
    """The run folders that a person means: folders of runs, `latest`, runs themselves; all of outputs/ for none."""
    found: dict[Path, None] = {}
    for word in words or [str(OUTPUTS)]:
        if is_latest(word):
            found[locate(word, key="runs")] = None
            continue
        # 只写名字的，多半在 outputs/ 里
        path = next((p for p in (Path(word).expanduser(), OUTPUTS / word) if p.is_dir()), None)
        if path is None and words:
            raise ConfigError("{path}: there is no such folder; `nanogpt runs` lists those in outputs/", path=word)
        found |= dict.fromkeys(find(path) if path else ())
    return list(found)


# ---- 列出来 ----


def matching(runs: Iterable[Run], filters: Sequence[str]) -> list[Run]:
    """The runs whose settings are as every key=value says; model and dataset mean their names."""
    chosen = list(runs)
    for typed in filters:
        key, equals, wanted = typed.partition("=")
        if not equals:
            raise ConfigError("--filter {got}: write it as key=value, for example model=tiny", got=typed)
        keys = {run: _key(run, key) for run in chosen}
        if chosen and not any(keys.values()):
            raise ConfigError(
                "--filter {got}: none of the runs has {key}; take a key of config.yaml, for example model, dataset, "
                "learning_rate or model.n_layer",
                got=typed, key=key,
            )
        chosen = [run for run, own in keys.items() if own and _same(run.settings[own], wanted)]
    return chosen


def _key(run: Run, typed: str) -> str | None:
    """The key of the saved config that is meant, or None where the run has none."""
    name = {"model": "model.name", "dataset": "dataset.name"}.get(typed, typed)
    return next((key for key in (name, f"groups.{name}") if key in run.settings), None)


def _same(value: Any, wanted: str) -> bool:
    try:
        return math.isclose(float(wanted), value)
    except (TypeError, ValueError):
        return str("null" if value is None else value).lower() == wanted.lower()


ORDERS = {
    "time": lambda run: (-run.changed,),
    "loss": lambda run: (run.loss is None, run.loss),
    "size": lambda run: (-run.size,),
    "name": lambda run: (run.path.as_posix(),),
}


def table(runs: Sequence[Run]) -> list[str]:
    """The runs as the lines of a table; columns of which a name says everything are left out."""
    rows = [[
        shown_name(run), formatted(run.loss, ".4f"), short(run.tokens), clock(run.seconds), file_size(run.size),
        text(STATES[run.state]), run.model, run.data, formatted(run.bpb, ".3f"),
    ] for run in runs]
    kept = list(range(len(COLUMNS)))
    if all(run.path.name.startswith(f"{run.data}-{run.model}-") for run in runs):
        # 默认的名字就是这两样：80 列才放得下其余的
        kept = [i for i in kept if COLUMNS[i] not in ("column_model", "column_data")]
    if not any(run.bpb for run in runs):
        kept.remove(COLUMNS.index("column_bpb"))
    heads = [text(COLUMNS[i]) for i in kept]
    return aligned(heads, [[row[i] for i in kept] for row in rows], sides="lrrrrl")


def shown_name(run: Run) -> str:
    """The path as it may be typed again, without the outputs/ that is understood."""
    return (run.path.relative_to(OUTPUTS) if run.path.is_relative_to(OUTPUTS) else run.path).as_posix()


def parser() -> Arguments:
    """The parser of `nanogpt runs`."""
    program = Arguments(prog="nanogpt runs", description=text("List the trainings in outputs/ or in other folders"))
    program.add_argument("folders", nargs="*", metavar="FOLDER", help=text("which_runs"))
    program.add_argument("--sort", choices=ORDERS, default="time", help=text("time: the newest first"))
    program.add_argument(
        "--filter", action="append", default=[], metavar="KEY=VALUE", help=text("such as model=tiny or dataset=NAME")
    )
    return program


def main(arguments: list[str] | None = None) -> None:
    """The command line of `nanogpt runs`; exit code 2 on a mistake."""
    run_command(parser, list_runs, arguments)


def list_runs(typed: argparse.Namespace) -> None:
    """Show the runs that were asked for."""
    runs = matching(with_jobs(map(look, named(typed.folders))), typed.filter)
    if not runs:
        show(text("no runs here; begin with: {command}", command=command("run_train.py")))
        return
    for line in table(sorted(runs, key=ORDERS[typed.sort])):
        show(line)
    show(text("{count} found, {size}", count=len(runs), size=file_size(sum(run.size for run in runs))))
    for run in runs:
        if run.state == "damaged":
            show(f"{shown_name(run)}: {run.problem}")
