"""Free disk space that trainings hold: `nanogpt clean` says what would go, and deletes it only when told to."""

# 腾出磁盘：先列出可以删的与各占多少，说了 yes 才动手
# 每次训练的最后一个与最好的 checkpoint 一定留下，而且删别的之前先逐个文件核对它们；坏的、看不懂的一概不碰
# 正在训练的不碰：动手时拿着它的锁，再看一遍，列表之后有了变化的就跳过
# --optimizer 另删优化器状态（占一多半），之后只能写作、导出、服务，不能接着训

import argparse
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nanogpt.base.console import Console, aligned, file_size
from nanogpt.base.errors import Arguments, run_command
from nanogpt.base.files import MOVED, is_litter
from nanogpt.base.hashed_json import DamagedError, read_object
from nanogpt.base.language import ConfigError, show, text
from nanogpt.base.lock import is_held
from nanogpt.base.run_names import OUTPUTS, recorded
from nanogpt.run import folders, rundir
from nanogpt.run.rundir import JOB, LOCK
from nanogpt.weights import checkpoint
from nanogpt.weights.checkpoint import Checkpoint

# 试跑的扫描写完报告才有它：里面有每次试跑的结果，失败的那几个的文件夹就没有用了
TRIALS = "trials.jsonl"


@dataclass(frozen=True)
class Item:
    """Something that may go."""

    # 只记名字，不记怎样删：动手时重新看过，才知道还是不是它

    kind: str
    """One of KINDS."""
    folder: Path
    """The run, or the trial."""
    names: tuple[str, ...]
    """The checkpoints that it is about."""
    size: int


# 种类 -> 列表里怎样说
KINDS = {
    "old": "clean_old", "replaced": "clean_replaced", "optimizer": "clean_optimizer", "unsaved": "clean_unsaved",
    "trial": "clean_trial", "empty": "clean_empty",
}


# ---- 可以删什么 ----


def proposed(run_dir: Path, *, optimizer: bool) -> Iterator[Item]:
    """What may go of a run that is not being trained."""
    found = checkpoint.listed(run_dir)
    if _unsaved(run_dir):
        yield Item("unsaved", run_dir, (), folders.size_of(run_dir))
    if found.bad or not found.good:
        # 看不懂的那个可能正是要紧的：这次训练的 checkpoint 一个也不动
        return
    old = checkpoint.superseded(found.good, 1)
    if old:
        yield Item("old", run_dir, tuple(one.name for one in old), sum(folders.size_of(one.folder) for one in old))
    if replaced := _replaced(run_dir):
        sizes = (folders.size_of(run_dir / "ckpt" / name) for name in replaced)
        yield Item("replaced", run_dir, tuple(replaced), sum(sizes))
    kept = [one for one in found.good if one not in old and one.resumable]
    if optimizer and kept:
        state = sum(path.stat().st_size for one in kept for path in one.folder.glob("state.*"))
        yield Item("optimizer", run_dir, tuple(one.name for one in kept), state)


def _replaced(run_dir: Path) -> list[str]:
    """Names of the checkpoints that a resume from an older one has set aside."""
    return sorted(path.name for path in (run_dir / "ckpt").glob("replaced_iter_*") if path.is_dir())


def _unsaved(run_dir: Path) -> bool:
    """Whether a run ended before its first checkpoint and holds nothing but what its start wrote."""
    inside = (run_dir / "ckpt").glob("*")
    # 挪开的那一份，接着训时还会回来
    saved = any(
        not is_litter(path) and (MOVED.fullmatch(path.name) or not re.fullmatch(r"\..+\.tmp", path.name))
        for path in inside
    )
    # 有总结的训完过：搜索淘汰的，权重删了，曲线要留着
    if saved or rundir.foreign(run_dir) or any((run_dir / name).exists() for name in (JOB, "summary.json")):
        return False
    try:
        # 名字像还不够：别的程序也写 run.json
        return bool(recorded(run_dir))
    except DamagedError:
        return False


def failed_trials(folder: Path) -> Iterator[Item]:
    """The folders below `folder` of trials that measured nothing, once the sweep has its report, and empty ones."""
    for sweep in sorted(folder.glob("**/multirun.yaml")):
        for job in sorted(path for path in sweep.parent.iterdir() if path.is_dir() and not path.is_symlink()):
            if not any(job.iterdir()):
                yield Item("empty", job, (), 0)
    for file in sorted(folder.glob("**/trial.json")):
        try:
            failed = read_object(file).get("status") in ("oom", "skipped", "diverged", "timeout", "crashed", "invalid")
        except DamagedError:
            continue
        if failed and (file.parent.parent / TRIALS).is_file():
            yield Item("trial", file.parent, (), folders.size_of(file.parent))


def everything(words: list[str], *, optimizer: bool) -> list[Item]:
    """What may go of the runs that a person named, or of all of outputs/."""
    items: list[Item] = []
    for run_dir in folders.named(words):
        if is_held(run_dir / LOCK):
            show(text("{run} is being trained: left alone", run=run_dir.as_posix()))
        else:
            items += proposed(run_dir, optimizer=optimizer)
    for word in words or [OUTPUTS]:
        items += failed_trials(Path(word))
    return items


# ---- 动手 ----


def remove(items: Iterable[Item]) -> int:
    """Delete what is still as it was listed; returns the bytes that this freed."""
    freed = 0
    for item in items:
        try:
            if item.kind == "trial":
                shutil.rmtree(item.folder)
            elif item.kind == "empty":
                # 列出之后若有任务开始往里写，就不再是空的，删不掉
                item.folder.rmdir()
            else:
                _remove_of_run(item)
        except (ConfigError, OSError) as error:
            # 正要删时有人接着训了、磁盘不让写：别的照删
            show(text("{run} is left as it is: {reason}", run=item.folder.as_posix(), reason=error))
        else:
            freed += item.size
    return freed


def _remove_of_run(item: Item) -> None:
    """Delete a part of a run with its lock held, so that no training begins meanwhile."""
    lock = rundir.hold(item.folder)
    try:
        if item.kind == "unsaved":
            if not _unsaved(item.folder):
                raise ConfigError("clean_changed")
            rundir.abandon(item.folder, lock)
            return
        found = checkpoint.listed(item.folder)
        if item.kind == "replaced":
            if found.bad or not {*item.names} <= {*_replaced(item.folder)}:
                raise ConfigError("clean_changed")
            _verify(found.good)
            for name in item.names:
                shutil.rmtree(item.folder / "ckpt" / name)
            return
        named = [one for one in found.good if one.name in item.names]
        # 从旧的接着训过，它就成了最后一个
        kept = [one for one in named if one not in checkpoint.superseded(found.good, 1)] if item.kind == "old" else []
        if found.bad or kept or len(named) < len(item.names):
            raise ConfigError("clean_changed")
        _verify(named if item.kind == "optimizer" else [one for one in found.good if one not in named])
        if item.kind == "optimizer":
            for one in named:
                one.drop_state()
        else:
            checkpoint.remove(item.folder, named)
    finally:
        lock.release(remove=lock.made)


def _verify(kept: list[Checkpoint]) -> None:
    """ConfigError unless every file of these checkpoints is as it was saved, and there is one."""
    for one in kept:
        if reason := one.problem():
            raise one.damaged(reason)
    if not kept:
        raise ConfigError("clean_changed")


# ---- nanogpt clean ----


def parser() -> Arguments:
    """The parser of `nanogpt clean`."""
    program = Arguments(prog="nanogpt clean", description=text("clean_about"))
    program.add_argument("runs", nargs="*", metavar="RUN", help=text("which_runs"))
    program.add_argument("--optimizer", action="store_true", help=text("clean_optimizer_help"))
    program.add_argument("--yes", action="store_true", help=text("delete without asking"))
    return program


def main(arguments: list[str] | None = None) -> None:
    """The command line of `nanogpt clean`; exit code 2 on a mistake."""
    run_command(parser, clean, arguments)


def clean(typed: argparse.Namespace) -> None:
    """List what may go, and delete it once that is agreed to."""
    items = everything(typed.runs, optimizer=typed.optimizer)
    if not items:
        show(text("nothing to clean: every run keeps only its last and its best checkpoint"))
        return
    for line in table(items):
        show(line)
    if any(item.kind == "optimizer" for item in items):
        Console().line("clean_optimizer_note")
    if typed.yes or _agreed():
        show(text("{size} freed", size=file_size(remove(items))))
    else:
        show(text("nothing was deleted; add --yes to delete this"))


def table(items: list[Item]) -> list[str]:
    """What would go, as lines."""
    rows = [
        [item.folder.as_posix(), text(KINDS[item.kind], count=len(item.names)), file_size(item.size)] for item in items
    ]
    rows.append([text("in all"), "", file_size(sum(item.size for item in items))])
    return aligned([text("column_run"), text("what would go"), text("column_size")], rows, sides="llr")


def _agreed() -> bool:
    """Whether a person at a terminal types yes."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    show(text("type yes to delete this:"), end=" ")
    try:
        return input().strip().lower() == "yes"
    except EOFError:
        return False
