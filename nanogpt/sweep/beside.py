"""Trials of a search beside each other, each at a place of its own: a card, or a share of a CPU's cores.

Needs no torch.
"""

# search.jobs：几个试跑并排。一张卡上只放一个，否则计时与显存互相弄坏；CPU 上只有比损失的才行，它们分着用核
# 每个线程守着一个子进程，真正的活都在子进程里；place 告诉 trial 这个线程的试跑在哪里
# 一批一批地走：等齐了，按提出的次序记下。结果与谁先做完无关，同样的 search.jobs 重放得到同样的搜索

import os
import platform
import queue
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

from nanogpt.base.config import TrainConfig
from nanogpt.base.language import ConfigError
from nanogpt.sweep import earlier_results, process
from nanogpt.sweep.process import place

Piece, Result = TypeVar("Piece"), TypeVar("Result")


def places(cfg: TrainConfig) -> list[str]:
    """A place for each of search.jobs trials; ConfigError where they would disturb each other."""
    jobs = cfg.search.jobs
    if jobs == 1 or cfg.launch.name == "ray":
        # 在集群上，由 ray 派到空着的卡
        return [""] * jobs
    cards = earlier_results.visible_cards(cfg)
    mac = sys.platform == "darwin" and platform.machine() == "arm64" and cfg.device == "auto"
    if cfg.hardware.name != "cpu" and (mac or cfg.device.startswith(("mps", "xpu"))):
        raise ConfigError(
            "search.jobs={got}: trials beside each other would share one GPU here and disturb each other's memory and "
            "timing; take search.jobs=1, or device=cpu",
            got=jobs,
        )
    if cards is None:
        if cfg.objective == "tokens_per_s":
            raise ConfigError(
                "search.jobs={got}: on a CPU, trials beside each other would disturb each other's timing; take "
                "search.jobs=1, or objective=val_loss",
                got=jobs,
            )
        return [f"cpu-{number}" for number in range(jobs)]
    if cfg.device not in ("auto", "cuda"):
        raise ConfigError(
            "search.jobs={got} takes a CUDA card for each trial; leave device={device} out, or take search.jobs=1",
            got=jobs, device=cfg.device,
        )
    if len(cards) < jobs:
        raise ConfigError(
            "search.jobs={got}, but {count} cards can be seen here, and two trials on one card would disturb each "
            "other; take search.jobs={count}",
            got=jobs, count=len(cards),
        )
    if len(kinds := earlier_results.kinds_of_cards()) > 1:
        # 步时与放不放得下都跟着卡变：名次会成了卡的名次
        raise ConfigError(
            "search.jobs={got}: the cards here differ ({kinds}), and so would what trials reach on them; take "
            "search.jobs=1",
            got=jobs, kinds="; ".join(kinds),
        )
    return cards[:jobs]


class Beside:
    """Does pieces of work beside each other, one at each place."""

    # 只有一个位置时就是普通的循环：不起线程，Ctrl-C 也与从前一样

    def __init__(self, places: Sequence[str]):
        self.count, self._free = len(places), queue.SimpleQueue[str]()
        for one in places:
            self._free.put(one)
        if places[0].startswith("cpu"):
            # 各用各的核；已经说了线程数的照旧
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // self.count)))

    def all(self, work: Callable[[Piece], Result], pieces: Sequence[Piece]) -> list[Result]:
        """The results in the order of the pieces, when all are done; an exception in one ends the others."""
        if self.count == 1:
            return [work(piece) for piece in pieces]

        def at_a_place(piece: Piece) -> Result:
            where = self._free.get()
            place.set(where)
            try:
                return work(piece)
            finally:
                self._free.put(where)

        with ThreadPoolExecutor(self.count) as pool:
            waiting = [pool.submit(at_a_place, piece) for piece in pieces]
            try:
                # 先看出错的：别的也许还要很久
                for one in wait(waiting, return_when=FIRST_EXCEPTION).done:
                    one.result()
                return [one.result() for one in waiting]
            except BaseException:
                # 线程收不到 Ctrl-C：让守着子进程的循环自己停下
                process.ending.set()
                pool.shutdown(cancel_futures=True)
                process.ending.clear()
                raise
