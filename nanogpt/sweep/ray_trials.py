"""Trials as tasks of a Ray cluster, each on a node whose card its predicted memory fits.

Needs no torch.
"""

# launch=ray 加上试跑或搜索：一次试跑是一个 ray 任务，在节点上照样起它的子进程，结果照样写进共享的文件夹
# Ray 只数卡，不管卡有多大：先在每个节点上问一次是什么卡，集群里不止一种时，由规划说哪几种放得下，只派到那些节点
# 按时间比高低的搜索只用一种卡：步时是在一种卡上量的，换一种卡走同样的步，时间就不是一样多
# 节点没了，ray 把任务派到别处重来：占着的有人接手，训到一半的从 checkpoint 接着

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanogpt.base.config import HardwareConfig, TrainConfig
from nanogpt.base.hardware import GIB, known_card, reference
from nanogpt.base.language import ConfigError, current_language, set_language
from nanogpt.sweep import process
from nanogpt.sweep.result import TrialResult
from nanogpt.sweep.trial import run_trial

POLL_S = 0.3


class RayTrials:
    """Runs trials on the cluster that RAY_ADDRESS names, or on the one of this machine; called like run_trial."""

    # 问过的都记着：每个节点的卡，每种设置放不放得下

    def __init__(self, *, one_kind: bool):
        """With `one_kind` all trials go to one kind of card: the most frequent one that the first trial fits on."""
        self.ray, self.one_kind = connected(), one_kind
        self.cards: dict[str, HardwareConfig] | None = None
        self.kinds: list[str] | None = None
        self.answers: dict[tuple[str, str], bool] = {}

    def __call__(
        self, cfg: TrainConfig, overrides: list[str], folder: Path, *, run_dir: Path | None = None
    ) -> TrialResult:
        launch, resources = cfg.launch, {}
        if launch.gpus:
            resources = {"num_gpus": 1, "label_selector": selector(self.nodes(cfg))}
        elif cfg.hardware.ram_gib:
            resources = {"memory": int(cfg.hardware.ram_gib * GIB)}
        # 节点没了由 ray 重派；max_calls=1：一个进程只做一次，换过的当前文件夹不留给下一次
        task = self.ray.remote(max_calls=1)(_trial)
        task = task.options(num_cpus=launch.cpus or 1, max_retries=launch.restarts, **resources)
        waiting = [task.remote(_surroundings(), cfg, overrides, folder, run_dir)]
        while not self.ray.wait(waiting, timeout=POLL_S)[0]:
            if process.ending.is_set():
                self.ray.cancel(waiting[0], force=True)
                raise KeyboardInterrupt
        return self.ray.get(waiting[0])

    def nodes(self, cfg: TrainConfig) -> list[str]:
        """The nodes whose cards fit a trial by the plan; none where all cards are alike, or where none fits."""
        if self.cards is None:
            self.cards = self._cards()
        by_kind: dict[str, list[str]] = {}
        for node, card in self.cards.items():
            by_kind.setdefault(card.name, []).append(node)
        if len(by_kind) < 2:
            return []
        if self.kinds:
            return [node for kind in self.kinds for node in by_kind[kind]]
        # 哪一种都放不下的，派到哪里都会说是 skipped
        fitting = [kind for kind in by_kind if self._fits(cfg, self.cards[by_kind[kind][0]])]
        if self.one_kind and fitting:
            self.kinds = fitting = [max(fitting, key=lambda kind: (len(by_kind[kind]), kind))]
        return sorted(node for kind in fitting for node in by_kind[kind])

    def _cards(self) -> dict[str, HardwareConfig]:
        """The card of every node that has some."""
        asked = {}
        for node in self.ray.nodes():
            if node["Alive"] and node["Resources"].get("GPU"):
                task = self.ray.remote(_card).options(num_cpus=0, label_selector=selector([node["NodeID"]]))
                asked[node["NodeID"]] = task.remote()
        return {node: described(*self.ray.get(answer)) for node, answer in asked.items()}

    def _fits(self, cfg: TrainConfig, card: HardwareConfig) -> bool:
        """What the plan says, asked for in a task: the driver does not import torch."""
        if (asked := (needs(cfg), card.name)) not in self.answers:
            planned = replace(cfg, hardware=card, device="auto")
            task = self.ray.remote(_verdict).options(num_cpus=1)
            self.answers[asked] = self.ray.get(task.remote(_surroundings(), planned))
        return self.answers[asked]


def connected():
    """The module ray, connected to the cluster; ConfigError in one line where there is none."""
    try:
        import ray
    except ImportError:
        raise ConfigError("missing_package", what="launch=ray", package="ray") from None
    if not ray.is_initialized():
        try:
            ray.init(os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=False, logging_level="error")
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                "launch=ray: no Ray cluster answers ({reason}); start one with ray start --head, or name its address "
                "in RAY_ADDRESS",
                reason=str(error).partition("\n")[0],
            ) from None
    return ray


def selector(nodes: Sequence[str]) -> dict[str, str]:
    """What Ray calls any of these nodes; for none of them, any node at all."""
    return {"ray.io/node-id": f"in({','.join(nodes)})"} if nodes else {}


def described(name: str, gib: float) -> HardwareConfig:
    """A card as conf/hardware has it; one that is not there has its memory, and the speed of the reference card."""
    return known_card(name, gib) or replace(reference(), name=name, device_names=[], vram_gib=max(1.0, gib))


def needs(cfg: TrainConfig) -> str:
    """All that the memory of a trial depends on."""
    parts = (cfg.model, cfg.memory, cfg.precision, cfg.optimizer, cfg.finetune, cfg.batch_size, cfg.eval_batch_size)
    return repr((*parts, cfg.global_batch_size, cfg.gradient_accumulation_steps, cfg.sample_tokens, cfg.compile))


# ---- 在节点上 ----


def _surroundings() -> dict[str, Any]:
    return {"path": sys.path, "here": Path.cwd(), "language": current_language(), "arguments": sys.argv[1:]}


def _enter(surroundings: dict[str, Any]) -> None:
    """Let this process of Ray find what the driver finds."""
    sys.path[:], sys.argv[1:] = surroundings["path"], surroundings["arguments"]
    os.chdir(surroundings["here"])
    set_language(surroundings["language"])


def _trial(
    surroundings: dict[str, Any], cfg: TrainConfig, overrides: list[str], folder: Path, run_dir: Path | None
) -> TrialResult:
    _enter(surroundings)
    return run_trial(cfg, overrides, folder, run_dir=run_dir)


def _verdict(surroundings: dict[str, Any], cfg: TrainConfig) -> bool:
    _enter(surroundings)
    from nanogpt.sweep.child import prediction

    found = prediction(cfg, "cuda")
    # 规划说不出的，不拦着
    return found is None or found.fits


def _card() -> tuple[str, float]:
    """(name, GiB) of the first card of this node."""
    program = shutil.which("nvidia-smi")
    if not program:
        return "?", 0.0
    command = [program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stdout.strip()
    name, _, mib = said.partition("\n")[0].rpartition(",")
    return name.strip() or "?", float(mib or 0) / 1024
