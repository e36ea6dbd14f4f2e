"""Everything that only a graphics card can tell, in minutes: is it right, do the plans hold, how fast is it?

    python benchmarks/card.py [--minutes 8] [--only smoke memory …] [--nanogpt PATH] [--plans plans.json]
    python benchmarks/card.py --make-plans --plans plans.json     # beforehand, on any machine: saves minutes there
    python benchmarks/card.py --pretend                           # every part on the CPU, toy size: tries this program

Needs one NVIDIA GPU, no network and no text. The parts come in the order of their worth, each in a process of its own
that ends when its share of the minutes is spent; benchmarks/results/card_<device>.json is written after every case, so
that nothing that was measured is lost. --only measures some parts and keeps the others of that file. PATH is a checkout
of karpathy/nanoGPT, of which model.py is enough. The parts:

    smoke      losses as on a CPU, runs repeated and resumed bit for bit, out of memory; any warning counts as a failure
    writing    texts as on a CPU, with recorded graphs and without, in batches, served; the same
    recording  training steps recorded as CUDA graphs beside steps launched one by one; the same
    memory     plans against measured peaks under a 12 GB card's cap, GPT-2 XL in 8 GB, a 3 B model in 12 GB
    speed      training beside nanoGPT, where a step's time goes, what updates cost
    decoding   writing beside transformers and nanoGPT
    compiling  torch.compile's seconds, graphs and new compilations
    commands   the commands as typed, an aborted trial, tiny-shakespeare where its text is at hand

What is not installed is skipped and named. Exit code 0, 1 where a case failed, 2 without a GPU.
"""

import argparse
import contextlib
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from card_parts.verdict import STRICT, table, verdict  # noqa: E402 - 先把仓库根目录放进路径

from nanogpt.base.files import write_text  # noqa: E402
from nanogpt.sweep.process import kill_group, wait_for_end_of  # noqa: E402

# 部分 -> 在 8 分钟里分到几秒
PARTS = {
    "smoke": 85, "writing": 35, "recording": 40, "memory": 80, "speed": 105, "decoding": 45, "compiling": 40, "commands": 50,
}
# 到时间后，正在量的那个用例还可以再用几秒
GRACE_S = 8.0
# 一个部分的进程死几次之后放弃它
MOST_DEATHS = 4
NO_GPU = 2


# ---- 子进程 ----


def child(part: str) -> None:
    """Import, wait for the order on stdin, run the part's cases, and report in lines of JSON on stdout."""
    # 别的输出都到 stderr，也就是日志
    reports = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def emit(message: dict) -> None:
        print(json.dumps(message), file=reports, flush=True)

    import importlib

    from card_parts.kit import Lab, run

    import torch  # isort: skip

    cases = importlib.import_module(f"card_parts.{part}").cases
    line = sys.stdin.readline()
    if not line:
        return
    order = json.loads(line)
    threading.Thread(target=end_with_parent, args=(order["parent"],), daemon=True).start()
    if not order["pretend"] and not torch.cuda.is_available():
        emit({"no_gpu": True})
        return
    emit({"environment": environment(torch, order["pretend"])})
    os.chdir(order["folder"])
    lab = Lab(
        Path(order["folder"]), device="cpu" if order["pretend"] else "cuda:0", pretend=order["pretend"],
        nanogpt=Path(order["nanogpt"]) if order["nanogpt"] else None, plans=order["plans"],
        until=time.monotonic() + order["seconds"],
    )
    lab.strict, lab.log = part in STRICT, Path(order["log"])
    if run(lab, cases(lab), emit, set(order["done"])):
        emit({"end": True})
    # 坏掉的 CUDA 在收尾时可能卡住
    os._exit(0)


def end_with_parent(parent: int) -> None:
    """End this process when its parent has ended."""
    wait_for_end_of(parent)
    os._exit(1)


def environment(torch, pretend: bool) -> dict:
    """The machine, and the versions of what is measured."""
    from importlib.metadata import PackageNotFoundError, version

    def of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    found = {name: of(name) for name in ("transformers", "triton", "numpy", "hydra-core", "uvicorn")}
    found |= {"torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0]}
    found |= {"cores": os.cpu_count(), "device": "pretend"}
    if not pretend:
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name, "total_gib": round(properties.total_memory / 2**30, 2),
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}", "cards": torch.cuda.device_count(),
        }
    return found


# ---- 父进程 ----


class Child:
    """A process that runs one part once it is told to."""

    def __init__(self, part: str, folder: Path):
        self.log = folder / f"{part}-{time.monotonic_ns()}.log"
        with self.log.open("wb") as output:
            # 自成一组：它起的命令也跟着一起结束
            windows = os.name == "nt"
            own = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if windows else {"start_new_session": True}
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve()), "--child", part], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output, env={**os.environ, "PYTHONIOENCODING": "utf-8"}, **own,
            )
        self._lines: queue.Queue = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def go(self, order: dict) -> None:
        """Let it begin."""
        with contextlib.suppress(OSError):
            self.process.stdin.write(json.dumps({**order, "log": str(self.log)}).encode("ascii") + b"\n")
            self.process.stdin.flush()

    def messages(self, until: float) -> Iterator[dict]:
        """What it reports until it ends; TimeoutError when it has not by then."""
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                raise TimeoutError from None
            if line is None:
                return
            yield json.loads(line)

    def end(self) -> str:
        """End it and all that it started; the last line of its log."""
        kill_group(self.process)
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        lines = [line for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return (lines or ["-"])[-1][:300]


class Results:
    """The file, and what it holds so far."""

    def __init__(self, out: Path | None, keep: bool):
        self.out, self.keep, self.environment, self.items = out, keep, {}, {}

    def open(self, found: dict) -> None:
        """Now the device is known: choose the file, and take over the parts that are not measured anew."""
        if self.environment:
            return
        self.environment, name = found, re.sub(r"[^a-z0-9]+", "_", found["device"].lower()).strip("_")
        self.out = self.out or ROOT / "benchmarks" / "results" / f"card_{name}.json"
        if self.keep and self.out.is_file():
            self.items = json.loads(self.out.read_text(encoding="utf-8"))["items"]

    def begin(self, part: str) -> dict:
        """An empty item."""
        self.items[part] = {"ok": True, "seconds": 0.0, "cases": {}}
        return self.items[part]

    def add(self, part: str, name: str, found: dict) -> None:
        """One case, at once in the file."""
        item = self.items[part]
        item["cases"][name] = found
        item["seconds"] = sum(case["seconds"] for case in item["cases"].values())
        item["ok"] = all(case["ok"] for case in item["cases"].values())
        mark = "skipped" if "skipped" in found else "ok" if found["ok"] else "FAILED"
        print(f"{part:10s} {name[:44]:44s} {mark:8s}{found['seconds']:6.1f} s", flush=True)
        if why := found.get("skipped") or found.get("error") or (found.get("warnings") or [""])[0]:
            print(f"           {why}"[:80], flush=True)
        self.save()

    def save(self) -> None:
        """Write the file, whole or not at all."""
        record = {"environment": self.environment, "verdict": verdict(self.items), "items": self.items}
        self.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.out, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


class NoGpuError(Exception):
    """There is no card that PyTorch can use."""


def measure(parts: list[str], arguments: argparse.Namespace, results: Results, folder: Path) -> None:
    """Run the parts one after the other; the next one's process imports meanwhile what it needs."""
    order = {
        "pretend": arguments.pretend, "folder": str(folder), "parent": os.getpid(),
        "nanogpt": arguments.nanogpt and str(arguments.nanogpt.resolve()),
        "plans": json.loads(arguments.plans.read_text(encoding="utf-8")) if arguments.plans else {},
    }
    started, share = time.monotonic(), 60 * arguments.minutes / sum(PARTS[part] for part in parts)
    until, waiting = started, None
    try:
        for number, part in enumerate(parts):
            # 前面省下的时间归后面，前面拖的也由后面来还
            until += share * PARTS[part]
            first, waiting = waiting or Child(part, folder), None
            following = parts[number + 1] if number + 1 < len(parts) else None

            def prepare(following=following) -> None:
                nonlocal waiting
                if following and waiting is None:
                    waiting = Child(following, folder)

            run_part(part, first, order, until, results, folder, prepare)
    finally:
        if waiting:
            waiting.end()


def run_part(part: str, process: Child, order: dict, until: float, results: Results, folder: Path, prepare) -> None:
    """Run one part; where its process dies in a case, that case has failed and another process goes on behind it."""
    cases, deaths = None, 0
    while True:
        process.go({**order, "seconds": until - time.monotonic(), "done": list(cases or ())})
        begun, finished, begun_at, late = None, False, time.monotonic(), False
        try:
            for message in process.messages(until + GRACE_S):
                if message.get("no_gpu"):
                    raise NoGpuError
                if "environment" in message:
                    results.open(message["environment"])
                    cases = results.begin(part)["cases"] if cases is None else cases
                    prepare()
                elif "begin" in message:
                    begun, begun_at = message["begin"], time.monotonic()
                elif "case" in message:
                    results.add(part, message.pop("case"), message)
                    begun = None
                finished = finished or message.get("end", False)
        except TimeoutError:
            late = True
        finally:
            last = process.end()
        if cases is None:
            if not results.environment:
                sys.exit(f"the process of {part} did not start: {last}")
            # 这一部分不行，别的还要量
            results.begin(part)
            results.add(part, "start", {"ok": False, "error": f"the process did not start: {last}", "seconds": 0.0})
            return
        if begun:
            why = {"skipped": "its time was up"} if late else {"error": f"the process ended: {last}"}
            results.add(part, begun, {"ok": late, **why, "seconds": time.monotonic() - begun_at})
        deaths += 1
        if finished or late or deaths > MOST_DEATHS:
            return
        process = Child(part, folder)


def make_plans(path: Path, pretend: bool) -> None:
    """Write the plans of the memory part."""
    from card_parts import memory
    from card_parts.kit import Lab

    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder), device="cpu", pretend=pretend)
        write_text(path, json.dumps(memory.make_plans(lab), indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--nanogpt", type=Path, help="folder with nanoGPT's model.py")
    parser.add_argument("--plans", type=Path, help="plans made beforehand")
    parser.add_argument("--make-plans", action="store_true", help="write --plans and end")
    parser.add_argument("--pretend", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--out", type=Path, help="instead of benchmarks/results/card_<device>.json")
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child)
        return 0
    if arguments.make_plans:
        if not arguments.plans:
            parser.error("--make-plans needs --plans FILE, where they go")
        make_plans(arguments.plans, arguments.pretend)
        return 0
    parts = [part for part in PARTS if part in arguments.only]
    results = Results(arguments.out, keep=len(parts) < len(PARTS))
    with tempfile.TemporaryDirectory(prefix="nanogpt-card-", ignore_cleanup_errors=True) as folder:
        try:
            measure(parts, arguments, results, Path(folder))
        except NoGpuError:
            print("no NVIDIA GPU that PyTorch can use is here: card.py measures one (--pretend tries the program)")
            return NO_GPU
    figures = verdict(results.items)
    print("\n" + "\n".join(table(results.environment, results.items, figures)) + f"\n{results.out}")
    return int(bool(figures.get("failed")))


if __name__ == "__main__":
    sys.exit(main())
