"""Train a GPT: python run_train.py model=small batch_size=8 (see conf/train.yaml for every key)."""

# 训练的命令：main 决定这次是规划、试跑还是训练，再把上层的能力（选微批、解释显存不足、写样本）递给训练
# 不花时间的检查都在导入 torch 之前：写错一个键，一秒之内就知道
# before_sweep 在 -m 时先把每个任务查一遍，第九个写错不会等到八个训完才说

import sys
from dataclasses import replace
from pathlib import Path

from nanogpt.base import run_names
from nanogpt.base.before_torch import importing_torch
from nanogpt.base.cli import TYPED, run_script
from nanogpt.base.config import TrainConfig, check, check_launch
from nanogpt.base.errors import EXIT_TERMINATED
from nanogpt.base.language import ConfigError, show, text, wrapped
from nanogpt.base.sweep_folder import Job
from nanogpt.run import rundir


def run_folder(cfg: TrainConfig) -> Path:
    """The folder to train in, after every check that takes no time: mistakes are named before torch is imported."""
    if cfg.resume:
        run_dir = run_names.locate(cfg.resume)
        cfg.checkpoint = run_names.checkpoint_in(cfg.resume, cfg.checkpoint, "last")
        return run_dir
    check(cfg)
    if cfg.init_from and run_names.is_latest(cfg.init_from):
        # 记下真正的目录：latest 马上就指向这一次了
        cfg.init_from = str(run_names.locate(cfg.init_from, key="init_from"))
    return rundir.choose(cfg)


def before_sweep(cfg: TrainConfig) -> Path | None:
    """Check a job of a sweep before the first begins; the folder that it trains in, None for a plan or a trial."""
    if cfg.launch.name != "none" and not (cfg.trial.enabled or cfg.search.enabled):
        raise ConfigError(
            "launch={got} starts one training, not a sweep; leave out -m, or hand the jobs of the sweep to a cluster "
            "with hydra/launcher=submitit_slurm or hydra/launcher=ray",
            got=cfg.launch.name,
        )
    if cfg.search.enabled:
        from nanogpt.sweep.search import check_search

        check_search(cfg)
        return None
    if cfg.plan.lower() != "false" or cfg.trial.enabled:
        return None
    run_dir = run_folder(cfg)
    if not cfg.resume and not cfg.init_from:
        from nanogpt.data import corpus

        # 第九个任务的文本找不到，不要等八个训完才说
        options = {k: v for k, v in cfg.dataset.items() if k not in ("name", "dir")}
        corpus.folder_of(cfg.dataset["name"], cfg.dataset["dir"], options)
    return run_dir


def main(cfg: TrainConfig, overrides: list[str]) -> float | None:
    check_launch(cfg)
    if cfg.plan.lower() != "false":
        if cfg.launch.name != "none":
            world = cfg.launch.nodes * cfg.launch.processes_each
            cfg.parallel = replace(cfg.parallel, world=world, nodes=cfg.launch.nodes)
        with importing_torch():
            from nanogpt.plan.show import run_plan
        if cfg.search.enabled and cfg.plan.lower() == "true":
            show(wrapped(text(
                "planned is one training with the settings from which the search starts; the search itself takes "
                "search.minutes={minutes:g}",
                minutes=cfg.search.minutes,
            ), sys.stdout))
        run_plan(cfg, overrides)
        return None
    if cfg.search.enabled:
        from nanogpt.sweep.search import search_job

        return search_job(cfg, overrides)
    if cfg.trial.enabled:
        from nanogpt.sweep.jobs import trial_job

        # 试跑在子进程里；返回的速度是扫描器的目标
        return trial_job(cfg, overrides)
    run_dir = run_folder(cfg)
    if cfg.launch.name != "none":
        from nanogpt.run.launching import launch

        launch(cfg, run_dir, TYPED)
        return None

    with importing_torch():
        from nanogpt.run.session import Session

        above = hooks()
    if cfg.resume:
        session = Session.resume(cfg, overrides, run_dir, above)
    else:
        session = Session.new(cfg, run_dir, overrides, above)
    session.run()
    if session.told_to_end:
        sys.exit(EXIT_TERMINATED)
    return None


def hooks():
    """What a training asks of the rooms above it."""
    from nanogpt.run.session import Hooks
    from nanogpt.write.engine import write_sample

    return Hooks(
        choose_batch=choose_batch, choose_parallel=choose_parallel, count_steps=count_steps, explain=explain,
        write_sample=write_sample,
    )


def choose_batch(*asked, **how) -> int:
    """The micro-batch for batch_size=auto."""
    # 试跑与预测都不小：要用时才导入
    from nanogpt.sweep.auto_batch import choose

    return choose(*asked, **how)


def choose_parallel(*asked, **how):
    """What parallel=auto takes."""
    from nanogpt.plan.show import chosen_parallel

    return chosen_parallel(*asked, **how)


def count_steps(cfg: TrainConfig) -> int:
    """How many steps max_minutes is good for."""
    from nanogpt.plan.plan import Planner

    return Planner(cfg).steps(cfg)


def explain(*failed, **how) -> None:
    """One screen about what did not fit and what to type instead."""
    from nanogpt.plan import autopsy

    autopsy.show(*failed, **how)


def after_sweep(jobs: list[Job]) -> None:
    """Show and write what the trainings of a sweep reached."""
    from nanogpt.sweep.compare import report_sweep

    report_sweep(jobs)


if __name__ == "__main__":
    run_script("train", main, before_sweep, after_sweep)
