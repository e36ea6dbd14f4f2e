"""Train a GPT: python run_train.py model=small batch_size=8 (see conf/train.yaml for every key)."""

from nanogpt import rundir
from nanogpt.cli import run_script
from nanogpt.config import TrainConfig, check


def main(cfg: TrainConfig, overrides: list[str]) -> float | None:
    if cfg.plan.lower() != "false":
        from nanogpt.fit.command import run_plan

        run_plan(cfg, overrides)
        return None
    if cfg.trial.enabled:
        from nanogpt.fit.sweep import trial_job

        # 试跑在子进程里；返回的速度是扫描器的目标
        return trial_job(cfg, overrides)
    # 从这里到 import torch 之前，只做不花时间的检查：写错的命令一秒内就有答复
    if cfg.resume:
        run_dir = rundir.locate(cfg.resume)
    else:
        check(cfg)
        if cfg.init_from == "latest":
            # 记下真正的目录：latest 马上就指向这一次了
            cfg.init_from = str(rundir.locate(cfg.init_from, key="init_from"))
        run_dir = rundir.choose(cfg)

    from nanogpt.session import Session

    session = Session.resume(cfg, overrides, run_dir) if cfg.resume else Session.new(cfg, run_dir, overrides)
    session.run()
    return None


if __name__ == "__main__":
    run_script("train", main)
