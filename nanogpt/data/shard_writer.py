"""Prepares a large corpus in parallel processes: many files of tokens (shards) with an index, or one.

A corpus is cut into parts by the sizes of its files alone, and each part is tokenised by one process into files of its
own: the result is the same for any number of processes. A preparation that ended early goes on: parts that are finished
and whole are kept. Which texts are for validation follows from a hash of each text.
"""

# 大语料的准备：原文按字节切成 part，每个进程一次做一个 part：读、编码、写成自己的文件、记下摘要
# 切法只看文件大小，一篇归训练还是验证只看它的内容：几个进程做、先做哪一个，结果都一样
# 做好的 part 有一个带摘要的 json：中断之后同一条命令接着做，核对过的不再做；内存只有每个进程手里的一篇
# 都做完才改名到位：先训练着、边写边读不行，样本的次序要等全部文件的长度都知道才定得下来
# 这里不导入 torch：每个进程都要重新导入一遍

import contextlib
import functools
import hashlib
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt.base.console import Console
from nanogpt.base.files import make_folder, refuse_file, remove_leftovers, replace, sha256, sync
from nanogpt.base.hashed_json import DamagedError, digest_of, read_sealed, write_sealed
from nanogpt.base.language import ConfigError, current_language, say, set_language
from nanogpt.data import tokenizer as tokenizers
from nanogpt.data.corpus import TokenWriter, new_dataset, parts_of, say_written, write_meta
from nanogpt.data.document_files import Corpus, Range

FORMAT = 1
# 一个 part 有每个 shard 的 token 数的这么多倍字节：英文的 GPT-2 词表每个 token 约 4.5 字节，大致一个 part 一个 shard
BYTES_EACH = 4
# 不分 shard 时，一个 part 按这么多 token 算
UNDIVIDED = 10**8
# 比 shard_tokens 的这么多分之一还短的，并到前一个里
SHORT = 4
# 每读这么多字节说一次读到哪里，也看一次要不要停；这么久（秒）看一次各进程读到哪里
TOLD, LOOK_S = 2**20, 0.5
# 一个输入加一个目标：再少就没有可学、可验证的
SHORTEST = 2
# 一个文件的名字、token 数与 SHA-256
File = tuple[str, int, str]


class StoppedError(Exception):
    """Another part failed, there are tokens enough, or a person stopped the preparation."""

    # 只在进程之间用，不给人看


class _Files:
    """Writes ids of one split into files of at most `most` ids, unless a single document is longer."""

    # 在文章之间换文件：一篇不分在两处

    def __init__(self, folder: Path, stem: str, vocab_size: int, most: float):
        self.folder, self.stem, self.vocab_size, self.most = folder, stem, vocab_size, most
        self.done: list[tuple[str, int]] = []
        self.count = 0
        self._writer: TokenWriter | None = None

    def write(self, ids: np.ndarray) -> None:
        if self._writer and self._writer.count + len(ids) > self.most:
            self.close()
        if not self._writer:
            self._writer = TokenWriter(self.folder / self._name(), self.vocab_size)
        self._writer.write(ids)
        self.count += len(ids)

    def close(self) -> None:
        if self._writer:
            self._writer.close()
            self.done.append((self._name(), self._writer.count))
            self._writer = None

    def _name(self) -> str:
        return f"{self.stem}-{len(self.done):03d}.bin"


@dataclass(frozen=True)
class Job:
    """What a process needs to know to do any part of a preparation in `folder`."""

    # 词表从文件夹里读，不随任务传：GPT-2 的一份有几 MB

    folder: Path
    corpus: Corpus
    shard_tokens: int | None
    val_fraction: float
    max_tokens: int | None

    @functools.cached_property
    def tokenizer(self) -> tokenizers.Tokenizer:
        return tokenizers.load(self.folder / "tokenizer.json")

    @functools.cached_property
    def parts(self) -> list[list[Range]]:
        return self.corpus.parts(BYTES_EACH * (self.shard_tokens or UNDIVIDED))

    def do(self, number: int, told: Callable[[int], None]) -> dict[str, list[File]]:
        """Tokenise a part, unless it is done and whole; its files of each split, in order.

        told(bytes) is called as it is read.
        """
        if (files := self._kept(number)) is not None:
            told(sum((span.end or span.begin) - span.begin for span in self.parts[number]))
            return files
        # 被杀的上一次可能还有一个进程在写：名字各不相同，写完才改名
        aside = self.folder / f".part-{number:05d}.{os.getpid()}.tmp"
        aside.mkdir(exist_ok=True)
        try:
            files = {}
            for split, written in self._written(number, aside, told).items():
                for name, _ in written:
                    sync(aside / name)
                files[split] = [(name, count, sha256(aside / name)) for name, count in written]
                for name, _ in written:
                    replace(aside / name, self.folder / name)
            write_sealed(self._record(number), {"format": FORMAT, "files": files})
            return files
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _record(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.json"

    def _kept(self, number: int) -> dict[str, list[File]] | None:
        with contextlib.suppress(DamagedError, OSError):
            files = read_sealed(self._record(number), FORMAT)["files"]
            if all(sha256(self.folder / name) == digest for split in files.values() for name, _, digest in split):
                return files
        return None

    def _written(self, number: int, aside: Path, told: Callable[[int], None]) -> dict[str, list[tuple[str, int]]]:
        coder, read = self.tokenizer, 0
        end = [] if coder.end_of_text is None else [coder.end_of_text]
        most = {"train": min(self.shard_tokens or math.inf, self.max_tokens or math.inf), "val": math.inf}
        splits = {
            split: _Files(aside, f"part-{number:05d}-{split}", coder.vocab_size, most[split]) for split in most
        }
        for found in self.corpus.documents(self.parts[number]):
            read += found.size
            if read >= TOLD:
                told(read)
                read = 0
            if found.text:
                split, ids = split_of(found.text, self.val_fraction), _ids(coder, found.text)
                splits[split].write(np.append(ids, end).astype(ids.dtype) if found.ends else ids)
            if self.max_tokens and splits["train"].count >= self.max_tokens:
                break
        told(read)
        for files in splits.values():
            files.close()
        return {split: files.done for split, files in splits.items()}

    def enough(self, done: dict[int, dict[str, list[File]]]) -> int | None:
        """After how many parts from the first on there are max_tokens; None: not yet, or there is no limit."""
        total = 0
        for number in range(len(self.parts) if self.max_tokens else 0):
            if number not in done:
                break
            total += sum(count for _, count, _ in done[number]["train"])
            if total >= self.max_tokens:
                return number + 1
        return None


def split_of(text: str, val_fraction: float) -> str:
    """The split that a text falls into, by its content alone."""
    # 别处再出现的同一篇也落在同一份里
    place = hashlib.blake2b(text.encode("utf-8", errors="surrogatepass"), digest_size=8).digest()
    return "val" if int.from_bytes(place, "big") < val_fraction * 2**64 else "train"


def _ids(coder: tokenizers.Tokenizer, text: str) -> np.ndarray:
    try:
        return coder.encode(text, skip_unknown=True)
    except UnicodeEncodeError:
        # JSON 里可以写出半个代理对
        return coder.encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), skip_unknown=True)


# ---- 各个进程 ----

_here: tuple[Job, Callable[[int], None]] | None = None


def _begin(job: Job, stop: Any, read: Any, language: str) -> None:
    """Make a new process ready for any part."""
    global _here
    # Ctrl-C 由主进程收，再让大家停
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_language(language)

    def told(size: int) -> None:
        if stop.is_set():
            raise StoppedError
        with read.get_lock():
            read.value += size

    _here = (job, told)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # 主进程被杀时，等任务的子进程不会自己发觉，会一直占着内存
    multiprocessing.parent_process().join()
    os._exit(1)


def _do(number: int) -> dict[str, list[File]]:
    job, told = _here
    return job.do(number, told)


def _in_processes(job: Job, processes: int, advance: Callable[[int], None]) -> dict[int, dict[str, list[File]]]:
    """The files of each part, from that many processes."""
    context = multiprocessing.get_context("spawn")
    stop, read = context.Event(), context.Value("q", 0)
    initial = (job, stop, read, current_language())
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_begin, initargs=initial)
    done, waiting, left = {}, {}, iter(range(len(job.parts)))
    try:
        while job.enough(done) is None:
            while len(waiting) < processes and (number := next(left, None)) is not None:
                waiting[pool.submit(_do, number)] = number
            if not waiting:
                break
            for future in wait(waiting, timeout=LOOK_S, return_when=FIRST_COMPLETED).done:
                done[waiting.pop(future)] = future.result()
            advance(read.value)
    except BrokenProcessPool:
        raise ConfigError(
            "a process that prepared the data was ended from outside, perhaps for want of memory; type the same "
            "command again, with fewer of them (dataset.processes={fewer}): what is finished is kept",
            fewer=max(1, processes // 2),
        ) from None
    finally:
        # 正在做的看到它就停，不等一个 part 做完
        stop.set()
        pool.shutdown(cancel_futures=True)
    return done


def _in_turn(job: Job, advance: Callable[[int], None]) -> dict[int, dict[str, list[File]]]:
    done, read = {}, 0

    def told(size: int) -> None:
        nonlocal read
        read += size
        advance(read)

    for number in range(len(job.parts)):
        done[number] = job.do(number, told)
        if job.enough(done):
            break
    return done


# ---- 整个数据集 ----


def write_shards(
    folder: Path, *, name: str, source: str, tokenizer: tokenizers.Tokenizer, corpus: Corpus,
    shard_tokens: int | None = None, val_fraction: float, max_tokens: int | None = None, processes: int | None = None,
    check: Callable[[], None] = lambda: None,
) -> Path:
    """Prepare a data set folder from a corpus; it appears whole or not at all, and goes on where it was left.

    shard_tokens: tokens in a file of the training split at most (a longer document aside); None: one file.
    max_tokens: how many training tokens suffice; the files up to there are taken whole. check() is called before the
    folder appears.
    """
    refuse_file(folder)
    job = Job(parts_of(folder), corpus, shard_tokens, val_fraction, max_tokens)
    _open(job, tokenizer)
    try:
        # Windows 一次等不了更多的进程
        most = 61 if sys.platform == "win32" else len(job.parts)
        count = min(processes or os.cpu_count() or 1, len(job.parts), most)
        with Console(stream="stderr").progress(corpus.size // 10**6, title="progress_preparing") as bar:

            def advance(size: int) -> None:
                bar(size // 10**6, note="MB")

            done = _in_turn(job, advance) if count == 1 else _in_processes(job, count, advance)
        check()
        tokens = _finish(job, done, folder, name, source, tokenizer)
    except BaseException:
        if not any(job.folder.glob("part-*.json")):
            # 还没有一个做好的：不留痕迹
            shutil.rmtree(job.folder, ignore_errors=True)
        raise
    shutil.rmtree(job.folder, ignore_errors=True)
    return say_written(folder, name, tokenizer, tokens)


def _open(job: Job, tokenizer: tokenizers.Tokenizer) -> None:
    """Make the folder of the parts ready; what is there from another corpus, tokenizer or division is removed."""
    files = [[file, size, 0 if "://" in file else os.stat(file).st_mtime_ns] for file, size in job.corpus.files]
    meant = digest_of({
        "corpus": [job.corpus.kind, job.corpus.column, files], "tokenizer": tokenizer.to_dict(),
        "how": [FORMAT, job.shard_tokens, job.val_fraction, job.max_tokens],
    })
    try:
        begun = read_sealed(job.folder / "job.json", FORMAT)["of"]
    except (DamagedError, KeyError):
        begun = None
    if begun != meant and job.folder.is_dir():
        shutil.rmtree(job.folder)
    make_folder(job.folder)
    remove_leftovers(job.folder)
    tokenizers.save(tokenizer, job.folder / "tokenizer.json")
    write_sealed(job.folder / "job.json", {"format": FORMAT, "of": meant})
    if there := len(list(job.folder.glob("part-*.json"))):
        say("going on where it was left: {done:,} of {total:,} parts are there", done=there, total=len(job.parts))


def _finish(
    job: Job, done: dict[int, dict[str, list[File]]], folder: Path, name: str, source: str,
    tokenizer: tokenizers.Tokenizer,
) -> dict[str, int]:
    """Make a data set folder of the parts, which stay as they are; tokens of each split."""
    # 到这里被杀，几个小时的 part 也还在：数据集就位之后才删它们
    files: dict[str, list[File]] = {"train": [], "val": []}
    for number in range(job.enough(done) or len(job.parts)):
        for split in files:
            files[split] += [(str(file), int(count), str(digest)) for file, count, digest in done[number][split]]
    counts = np.cumsum([count for _, count, _ in files["train"]])
    if job.max_tokens and len(counts):
        files["train"] = files["train"][: int(np.searchsorted(counts, job.max_tokens)) + 1]
    tokens = {split: sum(count for _, count, _ in listed) for split, listed in files.items()}
    if min(tokens.values()) < SHORTEST:
        raise ConfigError(
            "dataset.path={got}: {train} tokens for training and {val} for validation are too few (at least {least} "
            "each); give more text or another dataset.val_fraction",
            got=job.corpus.named, least=SHORTEST, **tokens,
        )
    least = job.shard_tokens // SHORT if job.shard_tokens else math.inf
    joined: list[list[File]] = []
    for one in files["train"]:
        if joined and min(one[1], sum(count for _, count, _ in joined[-1])) < least:
            joined[-1].append(one)
        else:
            joined.append([one])
    stems = [f"train-{number:05d}.bin" if job.shard_tokens else "train.bin" for number in range(len(joined))]
    shards = {stem: sum(count for _, count, _ in listed) for stem, listed in zip(stems, joined)}
    with new_dataset(folder) as aside:
        known = {stem: _join(job.folder, listed, aside / stem) for stem, listed in zip(stems, joined)}
        known["val.bin"] = _join(job.folder, files["val"], aside / "val.bin")
        write_meta(
            aside, name=name, source=source, tokenizer=tokenizer, dtype=TokenWriter.dtype_of(tokenizer.vocab_size),
            tokens=tokens, known=known, **({"shards": shards} if job.shard_tokens else {}),
        )
    return tokens


def _join(folder: Path, files: list[File], whole: Path) -> str:
    """Put files of a folder one behind the other into a new file; the SHA-256."""
    paths = [folder / name for name, _, _ in files]
    if len(paths) == 1:
        # 同一个文件的第二个名字，不占地方；有的文件系统没有
        with contextlib.suppress(OSError):
            os.link(paths[0], whole)
            return files[0][2]
    with whole.open("wb") as joined:
        for path in paths:
            with path.open("rb") as more:
                shutil.copyfileobj(more, joined, 2**22)
    return sha256(whole)
