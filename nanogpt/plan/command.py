"""plan=true and plan=matrix as run_train.py calls them: print, write nothing."""

import sys

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from nanogpt.base.config import TrainConfig, check
from nanogpt.base.console import Console
from nanogpt.plan import advice, matrix
from nanogpt.plan.plan import Planner
from nanogpt.plan.show import show
from nanogpt.run import rundir

EXIT_DOES_NOT_FIT = 1


def run_plan(cfg: TrainConfig, overrides: list[str]) -> None:
    """Print what cfg.plan asks for; exit code 1 when the setting does not fit."""
    if cfg.resume:
        saved, file = rundir.saved_settings(rundir.locate(cfg.resume))
        cfg = rundir.resumed_config(saved, cfg, overrides, file)
    check(cfg)
    console = Console()
    if cfg.plan.lower() == "matrix":
        matrix.show(cfg, console)
        return
    planner = Planner(cfg)
    plan = planner.predict(cfg, overrides)
    show(plan, console)
    if cfg.batch_size == "auto":
        console.line(
            "batch_size=auto: {batch} is the largest that fits by the model; the training itself measures which is "
            "fastest",
            batch=plan.batch_size,
        )
    if plan.verdict == "does_not_fit":
        advice.show(plan, planner, console)
        # -m 时别的设置还要接着看：退出码只对单个设置有意义
        if not (HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN):
            sys.exit(EXIT_DOES_NOT_FIT)
