"""Bad texts: each is either prepared, trained on and decoded back exactly, or refused by one clear line that leaves nothing behind.

    python benchmarks/torture/texts.py                        # the small cases, then 1 GB files and a million small files: about an hour
    python benchmarks/torture/texts.py --cases 40 --seed 1 --gib 0.05 --files 5000

Every case goes through data/<name>/prepare.py in a process of its own, whose memory is limited to 2 GiB (RLIMIT_DATA) and
measured; what it prepared is then decoded, compared and trained on for two iterations.
"""

import argparse
import contextlib
import copy
import functools
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bad_texts import EITHER, HAN, PLAIN, REFUSED, WORKS, Case, all_cases
from ledger import ROOT, Ledger

from nanogpt.base import language
from nanogpt.base.errors import explained
from nanogpt.data import corpus
from nanogpt.data.source_text import iter_text

PROMISE = (
    "Whatever text is given, it is prepared, trained on and decoded back exactly, or refused by one clear line naming the file; a refused text "
    "leaves nothing behind, nothing hangs, and memory stays below 2 GiB."
)
LIMIT_GIB = 2
OPTIONS = {
    "text_file": {"tokenizer": "char", "encoding": "auto", "val_fraction": 0.1, "vocab_size": 300},
    "labelled": {"tokenizer": "char", "encoding": "auto", "val_fraction": 0.2, "judge_fraction": 0.1, "vocab_size": 300},
}
# 大文件要读三四遍；比这久就算停不下来
LIMIT_S = 3600


@dataclass
class Answer:
    """What came of preparing a text."""

    code: int
    output: str
    peak_gib: float = 0.0
    seconds: float = 0.0


# ---- 两种做法：在这个进程里，或在自己的进程里 ----


def in_process(dataset: str, path: Path, prepared: Path, options: dict) -> Answer:
    """The same as data/<name>/prepare.py without a process of its own."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            if dataset in OPTIONS:
                corpus.prepare(dataset, str(prepared), {**OPTIONS[dataset], **options, "path": str(path)})
            else:
                _read_prompts(dataset, path)
            return Answer(0, said.getvalue())
        except Exception as error:
            if (line := explained(error)) is None:
                return Answer(1, f"Traceback: {type(error).__name__}: {error}")
            language.say("error", line=line)
            return Answer(2, said.getvalue())


def _read_prompts(dataset: str, path: Path) -> None:
    from nanogpt.write.loading import prompt_text, prompts_of_file

    prompts_of_file(path) if dataset == "prompts" else prompt_text(f"FILE:{path}")


def in_its_own(dataset: str, path: Path, prepared: Path, options: dict, during: Callable[[], None] | None = None, user: int | None = None) -> Answer:
    """data/<name>/prepare.py in a process whose private memory is limited; `during` runs beside it."""
    given = {**OPTIONS.get(dataset, {}), **options}
    if dataset in OPTIONS:
        # 值加引号：dotlist 按 yaml 读，路径里的方括号、井号都是内容
        arguments = [f"path={json.dumps(str(path), ensure_ascii=False)}", f"dir={prepared}", *(f"{key}={json.dumps(value)}" for key,
        value in given.items())]
        # 先导入再换用户：解释器本身往往在 root 的家里
        become = f"import os; os.setgroups([]); os.setuid({user}); " if user else ""
        code = f"from nanogpt.data import corpus; corpus._script({dataset!r}); {become}corpus.run_prepare({dataset!r})"
    else:
        arguments, code = [dataset, str(path)], PROMPTS
    started, output = time.perf_counter(), prepared.with_name("output")
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", LIMITED + code, *map(os.fsencode, arguments)], cwd=prepared.parent, stdout=file, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, env=environment(prepared.parent),
        )
        if during:
            threading.Thread(target=during, daemon=True).start()
        timer = threading.Timer(LIMIT_S, process.kill)
        timer.start()
        process.wait()
        timer.cancel()
    peak, text = prepared.with_name("peak"), output.read_text(encoding="utf-8", errors="replace")
    answer = Answer(process.returncode, text, int(peak.read_text(encoding="ascii") or 0) / 2**20, time.perf_counter() - started)
    peak.unlink()
    output.unlink()
    return answer


# 峰值由它自己在结束时说：wait4 给的还算着 fork 之前父进程的大小
LIMITED = f"""
import atexit, os, resource, sys
resource.setrlimit(resource.RLIMIT_DATA, ({LIMIT_GIB * 2**30},) * 2)
sys.path.insert(0, {str(ROOT)!r})
told = os.open("peak", os.O_WRONLY | os.O_CREAT, 0o666)
status = open("/proc/self/status", encoding="ascii")
atexit.register(lambda: os.write(told, status.read().partition("VmHWM:")[2].split()[0].encode()))
"""
PROMPTS = """
from nanogpt.base.errors import forgive_output, one_line_each
from nanogpt.write.loading import prompt_text, prompts_of_file
from pathlib import Path
forgive_output()
with one_line_each():
    prompts_of_file(Path(sys.argv[2])) if sys.argv[1] == "prompts" else prompt_text("FILE:" + sys.argv[2])
"""


def environment(folder: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "NANOGPT_ASSETS", "LD_LIBRARY_PATH", "VIRTUAL_ENV")}
    return {**kept, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(folder),
        "TMPDIR": str(folder), "PYTHONUTF8": "1"}


# ---- 判定 ----


def litter(folder: Path) -> list[str]:
    """What a refused text left beside it, and what is new in the repository's own data folders."""
    return [str(path) for path in folder.iterdir()] + [str(path) for name in ("text_file",
        "labelled") for path in (ROOT / "data" / name).iterdir() if path.name.startswith(".")]


def complaint(case: Case, answer: Answer, path: Path, work: Path) -> str | None:
    """Why an answer breaks the promise, else None."""
    lines = [line for line in answer.output.splitlines() if line.strip()]
    if "Traceback" in answer.output or answer.code not in (0, 2):
        return f"exit code {answer.code}: {lines[-1:]}"
    if answer.peak_gib > LIMIT_GIB:
        return f"{answer.peak_gib:.2f} GiB"
    if answer.code == 0:
        return "was accepted" if case.expect == REFUSED else wrong_data(case, work / "prepared")
    if case.expect == WORKS:
        return f"was refused: {lines[-1:]}"
    errors = [line for line in lines if line.startswith("error: ")]
    if len(errors) != 1 or len(errors[0]) > 1500 or not all(c.isprintable() for c in errors[0]):
        return f"no clear line: {answer.output[:300]!r}"
    if left := litter(work):
        return f"left behind: {left[:3]}"
    named = ("dataset.", "start=", "prompts=", path.name[:20], path.parent.name)
    return None if any(name and name in errors[0] for name in named) else f"names no file: {errors[0]}"


def wrong_data(case: Case, prepared: Path) -> str | None:
    """What is wrong with the prepared data of an accepted text, None if it decodes to the text."""
    if case.dataset not in OPTIONS:
        return None
    if case.dataset == "labelled":
        from nanogpt.data.documents import open_data

        found = [document for split in ("train", "val") for document in open_data(prepared).documents(split)]
        return None if found and all(document.text for document in found) else "no documents"
    from nanogpt.data.tokens import TokenData

    data = TokenData(prepared)
    # 字节词表：两部分可以从一个字的中间分开
    text = data.tokenizer.decode([token for split in ("train", "val") for token in data.tokens[split].tolist()])
    return f"decodes to {text[:60]!r}" if case.text is not None and text != case.text else None


@functools.cache
def tiny():
    """The configuration of two iterations of a tiny model; data and folder are filled in for each text."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from nanogpt.base.sample_config import register_schemas

    register_schemas()
    overrides = [
        "model.n_layer=1", "model.n_head=2", "model.n_embd=16", "model.block_size=4", "model.ngrams=[]", "dataset=text_file", "logger=none",
        "device=cpu", "max_iters=2", "batch_size=2", "eval_tokens=8", "sample_tokens=4",
    ]
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
        return OmegaConf.to_object(compose("train", overrides))


def trained(prepared: Path, work: Path) -> None:
    """Two iterations of a tiny model on the prepared data."""
    from nanogpt.base.config import check
    from nanogpt.run.session import Session

    cfg = copy.deepcopy(tiny())
    cfg.dataset["dir"], cfg.out_dir = str(prepared), str(work / "run")
    check(cfg)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), contextlib.chdir(work):
        Session.new(cfg, work / "run").run()


def judged(ledger: Ledger, case: Case, ask: Callable[..., Answer], *, train: bool = True, **more) -> Answer | None:
    """Prepare one case and count what came of it."""
    with tempfile.TemporaryDirectory() as name:
        source, work = Path(name) / "source", Path(name) / "work"
        source.mkdir()
        work.mkdir()
        try:
            path = case.make(source)
        except (OSError, ValueError) as error:
            # 有的文件系统写不下这样的名字
            ledger.count(case.kind, f"cannot be made here: {type(error).__name__}")
            return None
        answer = ask(case.dataset, path, work / "prepared", case.options, **more)
        wrong = complaint(case, answer, path, work)
        if wrong is None and answer.code == 0 and train and case.dataset == "text_file":
            try:
                trained(work / "prepared", work)
            except Exception as error:
                wrong = None if is_short(error) else f"cannot be trained on: {type(error).__name__}: {error}"
    if wrong:
        ledger.breach(case.kind, f"{case.dataset}, {case.what} -> {wrong}")
    else:
        ledger.count(case.kind,
        "decoded back exactly, trained" if answer.code == 0 and train else "decoded back exactly" if answer.code == 0 else "one line, nothing left")
    return answer


def is_short(error: Exception) -> bool:
    """A text that is fine but shorter than the tiny context."""
    return isinstance(error, language.ConfigError) and error.message == "block_too_long"


# ---- 大的、会变的、读不到的 ----


def gigabyte(folder: Path, gib: float, line: bytes, name: str = "big.txt") -> Path:
    """A file of so many GiB of repetitions."""
    path, piece = folder / name, line * (2**22 // len(line) + 1)
    with path.open("wb") as file:
        while file.tell() < gib * 2**30:
            file.write(piece)
    return path


def different(path: Path, gib: float) -> Path:
    """Labelled texts of which no two are alike."""
    with path.open("w", encoding="ascii") as file:
        for i in range(round(gib * 2**30 / 120)):
            file.write(f'{{"text": "{i * 7919 % 1000003} kings and {i * i} queens of {i:x} with {i * 31 % 9973} words", "style": "{"ab"[i % 2]}"}}\n')
    return path


def large(ledger: Ledger, gib: float, ask: Callable[..., Answer]) -> None:
    """Files larger than what the process may hold of them."""
    labelled = b'{"text": ' + json.dumps(PLAIN[:300] + "中文").encode() + b', "style": "a"}\n'
    # 全尺寸的几种；其余读法相同，十分之一就够
    cases = [
        ("plain lines, characters", PLAIN.encode(), {}, WORKS, "text_file", "big.txt", 1),
        ("labelled", labelled, {}, REFUSED, "labelled", "big.jsonl", 1),
        ("one line, bytes", PLAIN.replace("\n", " ").encode(), {"tokenizer": "byte"}, WORKS, "text_file", "big.txt", 1),
        ("labelled, all different", None, {}, EITHER, "labelled", "big.jsonl", 1 / 10),
        ("labelled in one line", b'{"text": "' + b"a" * 1000, {}, REFUSED, "labelled", "big.jsonl", 1 / 10),
        ("Chinese in GB18030", HAN.encode("gb18030"), {}, WORKS, "text_file", "big.txt", 1 / 10),
        ("NUL bytes", bytes(1000), {}, WORKS, "text_file", "big.txt", 1 / 10),
        ("a damaged end", PLAIN.encode(), {}, REFUSED, "text_file", "damaged.txt", 1 / 10),
    ]
    peak = slowest = 0.0
    for what, line, options, expect, dataset, name, part in cases:
        def make(folder: Path, line=line, name=name, part=part) -> Path:
            path = gigabyte(folder, gib * part, line, name) if line else different(folder / name, gib * part)
            if name.startswith("damaged"):
                with path.open("ab") as file:
                    file.write(b"\xff\xff")
            return path

        case = Case("a large file", f"{what}, {gib * part:g} GiB", make, expect, None, dataset, options)
        answer = judged(ledger, case, _undecoded(ask), train=False)
        if answer:
            peak, slowest = max(peak, answer.peak_gib), max(slowest, answer.seconds)
            # 小的同时在另一个线程里，sys.stdout 正被它接管
            print(f"{what}: {answer.seconds:.0f} s, {answer.peak_gib:.2f} GiB, exit code {answer.code}", file=sys.__stdout__, flush=True)
    ledger.figures |= {"large files, GiB": gib, "large files, peak RSS in GiB": round(peak, 2), "large files, slowest in s": round(slowest)}


def _undecoded(ask: Callable[..., Answer]) -> Callable[..., Answer]:
    def asked(dataset: str, path: Path, prepared: Path, options: dict) -> Answer:
        answer = ask(dataset, path, prepared, options)
        if answer.code == 0 and dataset == "text_file":
            check_large(path, prepared, options.get("tokenizer", "char"))
            # 判定只看这一小份
            shutil.rmtree(prepared)
            ask(dataset, _small(prepared.parent / "small.txt"), prepared, options)
        return answer

    return asked


def _small(path: Path) -> Path:
    path.write_text(PLAIN, encoding="utf-8")
    return path


def check_large(path: Path, prepared: Path, tokenizer: str) -> None:
    """Decode a large data set piece by piece and compare it with its file."""
    from nanogpt.data.tokens import TokenData

    data = TokenData(prepared)
    stream, pending = iter_text(path, "utf-8"), ""
    for split in ("train", "val"):
        tokens = data.tokens[split]
        table = None if tokenizer == "byte" else list(data.tokenizer.characters)
        for first in range(0, len(tokens), 2**22):
            ids = tokens[first : first + 2**22].tolist()
            text = bytes(ids).decode("ascii") if table is None else "".join(map(table.__getitem__, ids))
            while len(pending) < len(text) and (piece := next(stream, None)) is not None:
                pending += piece
            assert pending.startswith(text), f"{split} differs behind token {first}"
            pending = pending[len(text) :]
    assert not pending and next(stream, None) is None, "the end is missing"


def many_files(ledger: Ledger, count: int, ask: Callable[..., Answer]) -> None:
    """A folder of very many small files."""

    def make(folder: Path) -> Path:
        for i in range(count):
            if i % 1000 == 0:
                (folder / "many" / f"{i // 1000:04}").mkdir(parents=True)
            with open(folder / "many" / f"{i // 1000:04}" / f"{i}.txt", "wb") as file:
                file.write(b"%d times the king speaks\n" % i)
        return folder / "many"

    text = "".join(f"{i} times the king speaks\n" for block in range(0, count, 1000) for i in sorted(range(block, min(block + 1000, count)),
        key=lambda i: f"{i}.txt"))
    answer = judged(ledger, Case("many small files", f"{count} files", make, WORKS, text), ask, train=False)
    if answer:
        ledger.figures |= {"small files": count, "small files, s": round(answer.seconds), "small files, peak RSS in GiB": round(answer.peak_gib, 2)}


def changing(ledger: Ledger, repetitions: int, random: random.Random) -> None:
    """Files that are written to, cut, replaced or removed while they are read."""

    def appended(path: Path) -> None:
        with path.open("ab") as file:
            file.write("more 中文\n".encode())

    def replaced(path: Path) -> None:
        path.with_suffix(".new").write_bytes(PLAIN.encode() * 20_000)
        os.replace(path.with_suffix(".new"), path)

    ways = {"appended to": appended, "cut": lambda path: os.truncate(path, 2**20), "emptied": lambda path: os.truncate(path, 0),
    "removed": Path.unlink, "replaced": replaced}
    for i in range(repetitions):
        for what, change in ways.items():
            for dataset in ("text_file", "labelled") if i == 0 else ("text_file",):
                delay = random.uniform(0.3, 3.0)

                def make(folder: Path, dataset=dataset) -> Path:
                    row = b'{"text": "%d times the king speaks of love", "style": "a"}\n'
                    content = PLAIN.encode() * 10_000 if dataset == "text_file" else b"".join(row % i for i in range(200_000))
                    return _written(folder / ("a.txt" if dataset == "text_file" else "a.jsonl"), content)

                def ask(dataset, path, prepared, options, change=change, delay=delay):
                    def during() -> None:
                        time.sleep(delay)
                        with contextlib.suppress(OSError):
                            change(path)

                    return in_its_own(dataset, path, prepared, options, during)

                # 赶在读之前或读完之后改的，照常准备好
                judged(ledger, Case("changed while read", f"{what} after {delay:.1f} s", make, dataset=dataset), ask, train=False)


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def unreadable(ledger: Ledger) -> None:
    """Files and folders whose permissions shut the reader out."""
    if os.name == "nt" or os.geteuid() != 0:
        ledger.count("permissions", "skipped: needs root to become nobody")
        return
    for what, mode, folder_mode in (("a file", 0o000, 0o755), ("a file in a folder", 0o644, 0o700), ("a folder", 0o644, 0o000)):
        def make(folder: Path, mode=mode, folder_mode=folder_mode) -> Path:
            (folder / "private").mkdir()
            path = _written(folder / "private" / "a.txt", PLAIN.encode())
            path.chmod(mode)
            (folder / "private").chmod(folder_mode)
            return path if folder_mode != 0o000 else path.parent

        def ask(dataset, path, prepared, options):
            os.chmod(prepared.parent, 0o777)
            os.chmod(prepared.parent.parent, 0o755)
            os.chmod(path.parents[1] if path.suffix else path.parent, 0o755)
            return in_its_own(dataset, path, prepared, options, user=65534)

        judged(ledger, Case("permissions", what, make, REFUSED), ask, train=False)


# ---- 程序 ----


def attack(
    ledger: Ledger, *, cases: int | None = None, seed: int = 0, ask: Callable[..., Answer] = in_its_own, train: bool = True,
    kinds: list[str] | None = None,
) -> None:
    """The small cases, all of them or a sample."""
    for case in chosen_cases(cases, seed, kinds):
        judged(ledger, case, ask, train=train)


def chosen_cases(cases: int | None, seed: int, kinds: list[str] | None) -> Iterator[Case]:
    """The cases of these kinds, or a sample of so many."""
    chosen = [case for case in all_cases(seed) if not kinds or case.kind in kinds]
    return iter(chosen if cases is None or cases >= len(chosen) else random.Random(seed).sample(chosen, cases))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, help="small cases (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the large files; 0: none")
    parser.add_argument("--files", type=int, default=1_000_000, help="files of the large folder; 0: none")
    parser.add_argument("--changes", type=int, default=3, help="rounds of files that change while they are read")
    parser.add_argument("--kinds", nargs="+", help="only these kinds of small cases")
    typed = parser.parse_args()
    ledger = Ledger("texts", PROMISE)

    def enormous() -> None:
        if typed.gib:
            large(ledger, typed.gib, in_its_own)
        if typed.files:
            many_files(ledger, typed.files, in_its_own)

    # 大的主要在等另一个进程：与小的同时进行
    with ThreadPoolExecutor(1) as beside:
        waiting = beside.submit(enormous)
        attack(ledger, cases=typed.cases, seed=typed.seed, kinds=typed.kinds)
        changing(ledger, typed.changes, random.Random(typed.seed))
        unreadable(ledger)
        waiting.result()
    return ledger.finish()


if __name__ == "__main__":
    sys.exit(main())
