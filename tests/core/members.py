"""Several processes of one training, forked from this one: torch need not be imported again."""

import functools
import multiprocessing
import os
import socket
import sys
import traceback

import torch
from attack import FORKS, GIVEN_UP_S, Running

from nanogpt.core import distributed


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def together(world: int, task, *arguments) -> list:
    """What task(*arguments) returns, raises (an Exception) or exits with (an int) in each of `world` gloo processes."""
    ends, port = [], free_port()
    for rank in range(world):
        here, there = multiprocessing.Pipe(duplex=False)
        process = FORKS.Process(target=_member, args=(there, rank, world, port, task, arguments), daemon=True)
        process.start()
        there.close()
        ends.append((process, here))
    results = []
    for process, here in ends:
        assert here.poll(GIVEN_UP_S), "a member hangs"
        try:
            results.append(here.recv())
        except EOFError:
            process.join()
            results.append(process.exitcode)
    for process, _ in ends:
        process.join()
    return results


def start_member(rank: int, world: int, port: int) -> None:
    """Make this process, just forked, one of several."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }


def commands(folder, words, world: int = 2, *, before=None) -> list[Running]:
    """run_train.py with words(rank) in each of `world` processes; before(rank) is called in it first."""
    port = free_port()

    def member(rank: int) -> None:
        start_member(rank, world, port)
        if before:
            before(rank)

    return [Running(words(rank), folder, before=functools.partial(member, rank)) for rank in range(world)]


def _member(pipe, rank: int, world: int, port: int, task, arguments) -> None:
    start_member(rank, world, port)
    torch.set_num_threads(1)
    try:
        pipe.send(task(*arguments))
        distributed.stop()
    except SystemExit as error:
        pipe.send(error.code)
    except Exception as error:
        traceback.print_exc()
        pipe.send(error)
    sys.stdout.flush()
    sys.stderr.flush()
    # 不做解释器的收尾：那是父进程的 pytest 的
    os._exit(0)
