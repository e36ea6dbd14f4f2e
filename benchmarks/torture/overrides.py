"""Bad overrides and config files: each must be answered by one clear line and a non-zero exit code, and leave nothing behind.

    python benchmarks/torture/overrides.py                    # every case, in real processes, two at a time: about half an hour
    python benchmarks/torture/overrides.py --cases 60 --seed 3

A case that is not refused would train for one iteration at most. Listings of the working folder (home, cache and temporary
folder included) and of the repository's data/ and outputs/ before and after each case must be the same.
"""

import argparse
import json
import os
import queue
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bad_overrides import Case, all_cases, furnish
from ledger import ROOT, Ledger

PROMISE = (
    "Whatever is typed or written into a config file, a wrong command is answered by one clear line and a non-zero exit code; nothing is written, "
    "and no traceback is shown."
)
PROGRAMS = {
    "train": ["run_train.py"], "sample": ["run_sample.py"], "evaluate": ["-m", "nanogpt.control", "evaluate"], "export": ["-m",
    "nanogpt.weights.huggingface", "export"],
    "prepare": ["data/text_file/prepare.py"], "prepare labelled": ["data/labelled/prepare.py"],
}
TINY = ("model.n_layer=1", "model.n_head=2", "model.n_embd=16", "model.block_size=16", "model.ngrams=[2]", "model.ngram_buckets=97")
# 万一没有拒绝：一步就结束，数据已经备好
SHORT = (*TINY, "dataset=text_file", "dataset.path=text.txt", "dataset.dir=prepared", "logger=none", "device=cpu", "max_iters=1", "batch_size=2",
    "eval_tokens=64", "sample_tokens=0")
# 命令行装不下的：NUL 与超长的参数由这个小程序放进 sys.argv
STUB = """
import json, runpy, sys
program, arguments = json.load(open(sys.argv[1], encoding="utf-8"))
root = sys.argv[2]
sys.path.insert(0, root)
sys.argv = [program[-1], *arguments]
if program[0] == "-m":
    sys.argv[1:1] = program[2:]
    runpy.run_module(program[1], run_name="__main__")
else:
    runpy.run_path(root + "/" + program[0], run_name="__main__")
"""
# 进程结束时记下有没有导入 torch
PROBE = """
import atexit, os, sys
atexit.register(lambda: os.environ.get("TORTURE_PROBE") and "torch" in sys.modules and open(os.environ["TORTURE_PROBE"], "w",
encoding="utf-8").close())
"""
# 说明正在做什么的行，不是错误
NOTES = ("preparing the data set", "fetching ", "not used: ", "[20", "training a vocabulary", "serving", "compiling the fast decoder")
COUNTED = re.compile(r"[\d,]+ texts: |\w+: uses ")
LIMIT_S = 120


@dataclass
class Answer:
    """What a program did."""

    code: int
    output: str
    seconds: float = 0.0
    torch: bool = False


def listing(*folders: Path) -> dict[str, tuple]:
    """Everything below some folders, files with size and time."""
    found = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            stat = path.lstat()
            # 文件夹的时间不算：锁来过又走了，也会改它；多了少了什么，名字上看得出
            found[str(path)] = (stat.st_mode, *((stat.st_size, stat.st_mtime_ns) if path.is_file() else ()))
    # 锁本身在系统里；lock 文件里只有进程号，早就在那里的会被改写
    return {name: state for name, state in found.items() if "__pycache__" not in name and Path(name).name != "lock"}


def repository() -> dict[str, tuple]:
    """What a program could leave in the repository itself."""
    return listing(ROOT / "data", ROOT / "outputs")


def complaint(case: Case, answer: Answer, changed: list[str]) -> str | None:
    """Why an answer breaks the promise, else None."""
    lines = [line for line in answer.output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    if "Traceback" in answer.output:
        return f"a traceback: {lines[-1]}"
    if answer.code == 0:
        return "was accepted"
    if answer.code < 0 or answer.code in (1, 124, 137, 139):
        return f"exit code {answer.code}: {lines[-1:]}"
    jobs = 2 if case.kind == "sweep" else 1
    if not 1 <= len(errors) <= jobs:
        return f"{len(errors)} lines: {answer.output[:200]!r}"
    # 扫描里的任务失败时，Hydra 自己还会加一行
    allowed = (*NOTES, "Error executing job with overrides") if case.kind == "sweep" else NOTES
    if noise := [line for line in lines if line not in errors and not line.startswith(allowed) and not COUNTED.match(line)]:
        return f"more than the line: {noise[0]!r}"
    if len(errors[0]) > 1500 or not all(c.isprintable() for c in errors[0]):
        return f"no clear line: {errors[0][:200]!r}"
    if case.names and case.names not in errors[0]:
        return f"does not name {case.names}: {errors[0]!r}"
    return f"left behind: {changed[:3]}" if changed else None


class Place:
    """A working folder with what cases name, renewed when a case has changed it."""

    def __init__(self, folder: Path, template: Path):
        self.folder, self.template, self.work = folder, template, folder / "work"
        self.renew()

    def renew(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.template, self.folder, symlinks=True)

    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if k in ("PATH", "NANOGPT_ASSETS", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "SYSTEMROOT")}
        return {
            **kept, "PYTHONPATH": f"{self.folder / 'probe'}{os.pathsep}{ROOT}", "TORTURE_PROBE": str(self.folder / "torch"), "OMP_NUM_THREADS": "1",
            "LANG": "C.UTF-8",
            "PYTHONDONTWRITEBYTECODE": "1", "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor"),
            "HOME": str(self.folder / "home"), "TMPDIR": str(self.folder / "tmp"), "HF_HUB_OFFLINE": "1",
            "PYTHONUTF8": "1",
        }

    def run(self, case: Case) -> Answer:
        """The case in a process of its own."""
        arguments = arguments_of(case)
        if any("\0" in a or len(a) > 100_000 for a in arguments) or any("\ud800" <= c < "\udc80" for a in arguments for c in a):
            (self.folder / "argv.json").write_text(json.dumps([PROGRAMS[case.program], arguments]), encoding="utf-8")
            command = [sys.executable, "-c", STUB, str(self.folder / "argv.json"), str(ROOT)]
        else:
            program = PROGRAMS[case.program]
            command = [sys.executable, *(program if program[0] == "-m" else [str(ROOT / program[0])]), *map(os.fsencode, arguments)]
        (self.folder / "torch").unlink(missing_ok=True)
        started = time.perf_counter()
        try:
            done = subprocess.run(
                command, cwd=self.work, env=self.environment(), capture_output=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL,
            )
            answer = Answer(done.returncode, (done.stdout + done.stderr).decode("utf-8", "replace"))
        except subprocess.TimeoutExpired:
            answer = Answer(124, "not done in time")
        answer.seconds, answer.torch = time.perf_counter() - started, (self.folder / "torch").exists()
        return answer

    def attack(self, case: Case) -> tuple[Case, Answer, str | None]:
        """(case, answer, complaint)."""
        for name, content in case.files.items():
            (self.work / name).parent.mkdir(parents=True, exist_ok=True)
            (self.work / name).write_bytes(content)
        watched = (self.work, self.folder / "home", self.folder / "tmp")
        before = {**listing(*watched), **repository()}
        answer = self.run(case)
        after = {**listing(*watched), **repository()}
        # 本机测出的峰值留给以后的训练，不是这条命令留下的痕迹
        peaks = self.folder / "home/.cache/nanogpt/peaks.json"
        measured = {str(path) for path in (peaks, *peaks.parents[:2])}
        changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name) and name not in measured)
        if changed or case.files:
            self.renew()
        return case, answer, complaint(case, answer, changed)


def arguments_of(case: Case) -> list[str]:
    """The whole command line of a case: short and harmless but for what is attacked."""
    if case.program == "sample" and "out_dir=run" not in case.arguments:
        # 采样与控制的设置要有模型才看得到；快速解码器要先编译，这里用不着
        own = any(a.lstrip("+~").startswith(("sampler", "control")) for a in case.arguments)
        return [*(("out_dir=run", "start=a", "max_new_tokens=2", "fast=false") if own else ()), *case.arguments]
    if case.program != "train" or "resume=run" in case.arguments:
        return [*case.arguments, "fast=false"] if case.program == "sample" else list(case.arguments)
    typed = {a.lstrip("+~").partition("=")[0] for a in case.arguments}
    own_data = any(key.partition(".")[0] == "dataset" for key in typed)
    base = [s for s in SHORT if s.partition("=")[0] not in typed and not (own_data and s.startswith("dataset.dir"))]
    if "dataset" in typed:
        base = [s for s in base if not s.startswith("dataset")]
    return [*base, *case.arguments]


def made_template(folder: Path) -> Path:
    """A working folder with a trained run, a prepared data set, an empty home and an empty temporary folder."""
    for name in ("home", "tmp", "probe"):
        (folder / name).mkdir(parents=True)
    (folder / "probe" / "sitecustomize.py").write_text(PROBE, encoding="utf-8")
    furnish(folder / "work")
    place = Place.__new__(Place)
    place.folder, place.template, place.work = folder, folder, folder / "work"
    command = [sys.executable, str(ROOT / "run_train.py"), *SHORT, "out_dir=run"]
    subprocess.run(command, cwd=place.work, env=place.environment(), check=True, capture_output=True)
    shutil.rmtree(place.work / "outputs", ignore_errors=True)
    for name in ("home", "tmp"):
        shutil.rmtree(folder / name)
        (folder / name).mkdir()
    return folder


def attack(ledger: Ledger, *, cases: int | None = None, seed: int = 0, workers: int = 2, kinds: list[str] | None = None) -> None:
    """Send `cases` cases (all of them if None) through real processes."""
    chosen = [case for case in all_cases(seed) if not kinds or case.kind in kinds]
    if cases is not None and cases < len(chosen):
        chosen = random.Random(seed).sample(chosen, cases)
    seconds = {"without torch": [], "with torch": []}
    with tempfile.TemporaryDirectory() as folder:
        template = made_template(Path(folder) / "template")
        places: queue.Queue[Place] = queue.Queue()
        for i in range(workers):
            places.put(Place(Path(folder) / f"place{i}", template))

        def one(case: Case):
            place = places.get()
            try:
                return place.attack(case)
            finally:
                places.put(place)

        with ThreadPoolExecutor(workers) as pool:
            for case, answer, wrong in pool.map(one, chosen):
                seconds["with torch" if answer.torch else "without torch"].append(answer.seconds)
                note(ledger, case, answer, wrong)
    for name, taken in seconds.items():
        if taken:
            ledger.figures[f"answers {name}"] = len(taken)
            ledger.figures[f"seconds {name}, median"] = round(statistics.median(taken), 2)
            ledger.figures[f"seconds {name}, max"] = round(max(taken), 2)


def note(ledger: Ledger, case: Case, answer: Answer, wrong: str | None) -> None:
    """Count one case."""
    if wrong:
        ledger.breach(case.kind, f"{case.program} {' '.join(a[:120] for a in case.arguments)!r} -> {wrong}")
    else:
        ledger.count(case.kind, f"one line, exit code {answer.code}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, help="how many (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    parser.add_argument("--kinds", nargs="+", help="only these")
    typed = parser.parse_args()
    ledger = Ledger("overrides", PROMISE)
    attack(ledger, cases=typed.cases, seed=typed.seed, workers=typed.workers, kinds=typed.kinds)
    return ledger.finish()


if __name__ == "__main__":
    sys.exit(main())
