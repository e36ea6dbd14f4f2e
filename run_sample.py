"""Write with a trained model: python run_sample.py start="Once upon a time" (see conf/sample.yaml for every key)."""

# 写作的命令：一次写几段、一问一答（interactive=true）、或开一个网页与 API（serve=true），三条路从 main 分开
# 不需要 torch 的检查先做完，再去载入模型

import sys
from pathlib import Path

from nanogpt.base import run_names
from nanogpt.base.before_torch import importing_torch
from nanogpt.base.cli import run_script
from nanogpt.base.sample_config import SampleConfig, check_sample, prompts_named


def checked(cfg: SampleConfig) -> Path | None:
    """The run folder to write with, None for pretrained weights, after every check that needs no torch."""
    check_sample(cfg)
    if cfg.init_from:
        return None
    run_dir = run_names.locate(cfg.out_dir, key="out_dir")
    cfg.checkpoint = run_names.checkpoint_in(cfg.out_dir, cfg.checkpoint, "best")
    return run_dir


def before_sweep(cfg: SampleConfig) -> None:
    """Check a job of a sweep before the first begins."""
    checked(cfg)


def main(cfg: SampleConfig, overrides: list[str]) -> None:
    run_dir = checked(cfg)

    if cfg.serve:
        with importing_torch():
            from nanogpt.serve.server import serve
        serve(cfg, run_dir, overrides)
        return

    with importing_torch():
        from nanogpt.write.loading import open_model
        from nanogpt.write.samples import write_samples

    # 没有写下问题的对话，就在这里问
    if cfg.interactive or (cfg.chat and not prompts_named(cfg)):
        from nanogpt.write.terminal import converse

        sys.exit(converse(cfg, open_model(cfg, run_dir, overrides)))
    write_samples(cfg, open_model(cfg, run_dir, overrides))


if __name__ == "__main__":
    run_script("sample", main, before_sweep)
