"""Runs one training on a Ray cluster: a task for each process, all of them begun again when one of them vanishes."""

# launch=ray：一个进程一个 ray 任务，在 ray 的 worker 里直接跑训练的脚本：worker 没了，训练也就没了，不留孤儿
# 几个进程怎样找到彼此，用 torchrun 的那几个环境变量；不用 Ray Train：它的重启、存取与配置，这里都已经有了
# 有一个死了就全部停下，等 placement group 在活着的节点上重新凑齐，再起一次：resume=auto 从存下的接着
# 训练目录要在每台机器都看得见的地方；每个进程打印的在 job/ray-<编号>.log 里，第一个的同时给人看

import contextlib
import os
import runpy
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from nanogpt.base.config import LaunchConfig
from nanogpt.base.console import Console
from nanogpt.base.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR
from nanogpt.base.language import ConfigError, show
from nanogpt.run.rundir import JOB

POLL_S = 0.3
# 资源一时不够，等这么久（秒）说一声
WORTH_SAYING_S = 10


def train(launch: LaunchConfig, run_dir: Path, command: Sequence[str], console: Console) -> None:
    """Run the training that `command` (the words behind `python`) begins or goes on with, to its end.

    SystemExit with its exit code where it fails.
    """
    import ray

    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, logging_level="error", include_dashboard=False)
    try:
        for attempt in range(launch.restarts + 1):
            codes = _attempt(launch, run_dir, command, console)
            if codes is not None:
                break
            if attempt < launch.restarts:
                console.line(
                    "a process or its node is gone; all begin again from what is saved ({attempt} of {restarts})",
                    attempt=attempt + 1, restarts=launch.restarts,
                )
        else:
            raise ConfigError(
                "launch.restarts={got} are used up; what is saved is kept, the same command with resume=auto goes on; "
                "{logs} say why",
                got=launch.restarts, logs=(run_dir / JOB / "ray-*.log").as_posix(),
            )
    finally:
        if started:
            ray.shutdown()
    if any(codes):
        sys.exit(max(codes))


def _attempt(launch: LaunchConfig, run_dir: Path, command: Sequence[str], console: Console) -> list[int] | None:
    """The exit codes of all processes, or None where one vanished or failed in a way that another try may mend."""
    import ray
    from ray.exceptions import RayError
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    each, cpus = launch.processes_each, launch.cpus or 1
    bundle = {"CPU": cpus * each, **({"GPU": launch.gpus} if launch.gpus else {})}
    group = placement_group([bundle] * launch.nodes, strategy="STRICT_SPREAD")
    log, world = (run_dir / JOB).absolute(), launch.nodes * each
    seen = log / "ray-0.log"
    shown = seen.stat().st_size if seen.is_file() else 0
    tasks: list = []
    try:
        if not group.wait(WORTH_SAYING_S):
            console.line("waiting for {nodes} nodes, each with {bundle}", nodes=launch.nodes, bundle=bundle)
            ray.get(group.ready())

        def placed(function, rank: int, **resources):
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank // each)
            return ray.remote(max_calls=1)(function).options(scheduling_strategy=strategy, max_retries=0, **resources)

        address = ray.get(placed(_address, 0, num_cpus=0).remote())
        for rank in range(world):
            told = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, **address}
            # 每个任务只看得见自己的那张卡
            task = placed(_process, rank, num_cpus=cpus, num_gpus=launch.gpus / each)
            tasks.append(task.remote(told, sys.path, Path.cwd(), [*command], log / f"ray-{rank}.log"))
        left = tasks
        while left:
            done, left = ray.wait(left, num_returns=len(left), timeout=POLL_S)
            shown = _show(seen, shown, console)
            # 一个没了，其余的等不到它：不必等它们自己发觉
            codes = ray.get(done)
        return None if any(code not in (0, EXIT_USER_ERROR) for code in codes) else codes
    except RayError:
        return None
    except KeyboardInterrupt:
        _end(tasks, launch.grace_s)
        sys.exit(EXIT_INTERRUPTED)
    finally:
        _end(tasks, 0)
        _show(seen, shown, console)
        remove_placement_group(group)


def _end(tasks: list, grace_s: float) -> None:
    """Ask the processes to save and end, wait for at most so long, then end them."""
    import ray

    with contextlib.suppress(ray.exceptions.RayError):
        if grace_s:
            for task in tasks:
                ray.cancel(task)
            ray.wait(tasks, num_returns=len(tasks), timeout=grace_s)
        for task in tasks:
            ray.cancel(task, force=True)


def _show(file: Path, shown: int, console: Console) -> int:
    """Print what the first process has printed since; where that ends."""
    try:
        with file.open("rb") as opened:
            opened.seek(shown)
            new = opened.read()
    except OSError:
        # 还没有，或者网络盘一时读不到
        return shown
    # 只印整行
    whole = new[: new.rfind(b"\n") + 1]
    for line in whole.decode("utf-8", errors="replace").splitlines():
        console.plain(line)
    return shown + len(whole)


# ---- 在节点上 ----


def _address() -> dict[str, str | int]:
    """Where the first process will listen, asked for on its node."""
    import ray

    with socket.socket() as free:
        free.bind(("", 0))
        return {"MASTER_ADDR": ray.util.get_node_ip_address(), "MASTER_PORT": free.getsockname()[1]}


def _process(told: dict, path: list[str], here: Path, command: list[str], log: Path) -> int:
    """Train in this process, which Ray made for it, as a command of its own would; its exit code."""
    os.environ.update({name: str(value) for name, value in told.items()})
    sys.path[:] = path
    os.chdir(here)
    with log.open("ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    # 人敲的命令印在文件里时也是这样
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", buffering=1, closefd=False) for number in (1, 2))
    now, host = time.strftime("%Y-%m-%d %H:%M:%S"), socket.gethostname()
    show(f"--- {now}, process {told['RANK']} of {told['WORLD_SIZE']} on {host}, pid {os.getpid()}")
    try:
        if command[0] == "-m":
            sys.argv[:] = [command[1], *command[2:]]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv[:] = command
            sys.path.insert(0, str(Path(command[0]).parent))
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0
