"""Run one child process bounded in time and memory, and say what it reported and how it ended."""

# 一个受限的子进程：试跑在里面，卡死、耗尽内存、被系统杀掉，都伤不到扫描
# run_child 由 trial 调用：任务经 stdin 送进去，等它结束、超时、或内存越界，再把整组进程一起结束，读出它的报告
# 内存有两道：子进程自己用 limit_memory 请操作系统封顶（Linux），父进程再从外面看着常驻内存

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from nanogpt.base.hardware import GIB

POLL_S = 0.1
TORCHRUN = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
    "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT",
)
# 子进程沿用父进程的 sys.path 与命令行：run_train.py 旁边自己的模块、--config-dir 里自己的 yaml 也找得到
BOOT = (
    "import json, sys; job = json.loads(sys.stdin.readline()); "
    "sys.path[:], sys.argv[1:] = job['path'], job['arguments']; "
    "from nanogpt.base.before_torch import importing_torch\n"
    "with importing_torch():\n    from nanogpt.sweep.child import run\nrun(job)"
)
CHILD = (sys.executable, "-c", BOOT)
# 并排的试跑（beside）：这个线程的在哪里，一张卡的编号或 cpu-0、cpu-1 …；空的就是这台机器
place: ContextVar[str] = ContextVar("place", default="")
# 线程收不到 Ctrl-C：设了它，守着子进程的都停下
ending = threading.Event()


@dataclass
class Ended:
    """How a child ended."""

    # 只记看到的，不下结论：是不是显存不足由 trial.classified 说

    returncode: int
    """Negative: ended by that signal (POSIX)."""
    killed: str | None = None
    """timeout or memory, when this process ended it."""
    values: dict[str, Any] = field(default_factory=dict)
    """Everything that it reported, later lines over earlier ones."""
    last_line: str = ""
    """Of what it printed."""
    log: str = ""
    """The end of what it printed."""
    rss_gib: float = 0.0
    """Largest resident size seen from outside."""
    oom_kills: int | None = None
    """Processes that the kernel ended for want of memory meanwhile; None where it does not say."""


def run_child(
    job: dict[str, Any], folder: Path, *, timeout_s: float, signs: Sequence[Path] = (), command: Sequence[str] = CHILD
) -> Ended:
    """Run `command` with the job on its stdin until it ends or has to be ended; an exception here ends it too.

    With `signs` of life, the time counts from the latest change of one of these files.
    """
    report, log = folder / "report.jsonl", folder / "trial.log"
    # 排队等设备的时候，空的文件夹可能被清掉了
    folder.mkdir(parents=True, exist_ok=True)
    report.write_bytes(b"")
    # 自成一组：Ctrl-C 只到父进程，结束时连同孙进程一起
    windows = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt" else None
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=environment(),
            **(windows or {"start_new_session": True}),
        )
    ended, before = Ended(0), oom_kills()
    try:
        inherited = {"path": [str(Path(p).absolute()) for p in sys.path], "arguments": sys.argv[1:]}
        _send(process, {**job, **inherited, "parent": os.getpid(), "report": str(report.absolute())})
        ended.killed = _wait(process, report, timeout_s, signs, ended)
    finally:
        # 正常结束、超时、Ctrl-C 都走这里
        kill_group(process)
        with contextlib.suppress(OSError):
            # 它没读完就结束时，缓冲里还有剩的
            process.stdin.close()
    ended.returncode, ended.values = process.returncode, read_report(report)
    after = oom_kills()
    ended.oom_kills = None if before is None or after is None else after - before
    tail = end_of(log, 20_000).decode("utf-8", errors="replace")
    ended.log = tail
    ended.last_line = next((line.strip() for line in reversed(tail.splitlines()) if line.strip()), "")
    return ended


def wait_for_end_of(parent: int | None) -> None:
    """Wait until the process that holds the other end of stdin, whose id this is, has ended."""
    if sys.platform == "win32" and parent:
        # Windows：一个线程正读着管道，别的线程载入 numpy、torch 的库，或起一个 Python，都会卡在它后面
        with contextlib.suppress(psutil.Error):
            psutil.Process(parent).wait()
    else:
        # 父进程一走，那一头就断了
        sys.stdin.buffer.read()


def end_of(path: Path, count: int) -> bytes:
    """The last bytes of a file, which may be huge."""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - count))
        return file.read()


def oom_kills() -> int | None:
    """How many processes the kernel has ended for want of memory, in every container (Linux).

    None where it does not say.
    """
    try:
        lines = Path("/proc/vmstat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


def environment() -> dict[str, str]:
    """This process's environment for a child that is on its own, also where torchrun started this one."""
    # 带着 torchrun 的变量，子进程会去等永远不来的伙伴
    kept = {k: v for k, v in os.environ.items() if k not in TORCHRUN and not k.startswith("TORCHELASTIC_")}
    card = place.get() if not place.get().startswith("cpu") else ""
    return {**kept, "PYTHONIOENCODING": "utf-8", **({"CUDA_VISIBLE_DEVICES": card} if card else {})}


def _send(process: subprocess.Popen, job: dict[str, Any]) -> None:
    try:
        # stdin 开着不关：它一断，子进程就知道父进程没了
        process.stdin.write(json.dumps(job).encode("ascii") + b"\n")
        process.stdin.flush()
    except (BrokenPipeError, OSError):
        # 还没读就结束了；稍后由退出码说明
        pass


def _wait(
    process: subprocess.Popen, report: Path, timeout_s: float, signs: Sequence[Path], ended: Ended
) -> str | None:
    """Watch the child until it ends by itself (None) or has to be killed (timeout, memory)."""
    started = seen = time.monotonic()
    latest = 0
    while process.poll() is None:
        if ending.is_set():
            raise KeyboardInterrupt
        # 学的试跑有多长由预算定：卡住，是很久没有新的一行
        if signs and (changed := max(map(changed_ns, (report, *signs)))) > latest:
            seen, latest = time.monotonic(), changed
        if time.monotonic() > (seen if signs else started) + timeout_s:
            return "timeout"
        rss = resident(process.pid)
        ended.rss_gib = max(ended.rss_gib, rss / GIB)
        # 第二道：没有 RLIMIT 的系统上全靠它
        allowed = read_report(report).get("watch_gib")
        if isinstance(allowed, int | float) and rss > allowed * GIB:
            return "memory"
        try:
            process.wait(POLL_S)
        except subprocess.TimeoutExpired:
            continue
    return None


def changed_ns(path: Path) -> int:
    """When a file was written last, ns; 0 where there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def resident(pid: int) -> int:
    """Resident bytes of a process and its descendants; 0 when it is gone."""
    try:
        parent = psutil.Process(pid)
        return sum(p.memory_info().rss for p in [parent, *parent.children(recursive=True)])
    except psutil.Error:
        return 0


def kill_group(process: subprocess.Popen) -> None:
    """End the child and everything that it started, and nothing else."""
    if os.name == "nt":
        if process.poll() is None:
            with contextlib.suppress(psutil.Error):
                for one in psutil.Process(process.pid).children(recursive=True):
                    one.kill()
            process.kill()
    else:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            # 它自己退出之后，孙进程可能还在组里
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read_report(path: Path) -> dict[str, Any]:
    """All complete lines of a report merged; what cannot be read is passed over."""
    merged: dict[str, Any] = {}
    for line in path.read_bytes().splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            # 写到一半被杀，或者不是我们写的
            continue
        if isinstance(values, dict):
            merged.update(values)
    return merged


# ---- 真的内存上限 ----


def limit_memory(gib: float) -> None:
    """Let allocations beyond `gib` fail in this process (Linux only)."""
    # Windows 没有、macOS 不执行这类限额：只靠父进程看着，十分之一秒里越不出多少
    if sys.platform == "linux":
        import resource

        # RLIMIT_AS 会把只映射不用的地址也算上；DATA 只算可写的私有内存
        resource.setrlimit(resource.RLIMIT_DATA, (int(gib * GIB),) * 2)
