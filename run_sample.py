"""Write with a trained model: python run_sample.py start="Once upon a time" (see conf/sample.yaml for every key)."""

import sys
from pathlib import Path

from nanogpt import rundir
from nanogpt.cli import run_script
from nanogpt.sample_config import SampleConfig, check_sample


def checked(cfg: SampleConfig) -> Path | None:
    """The run folder to write with, None for pretrained weights, after every check that needs no torch."""
    check_sample(cfg)
    if cfg.init_from:
        return None
    run_dir, cfg.checkpoint = rundir.locate(cfg.out_dir, key="out_dir"), rundir.checkpoint_in(cfg.out_dir, cfg.checkpoint, "best")
    return run_dir


def before_sweep(cfg: SampleConfig) -> None:
    """Check a job of a sweep before the first begins."""
    checked(cfg)


def main(cfg: SampleConfig, overrides: list[str]) -> None:
    run_dir = checked(cfg)

    if cfg.serve:
        from nanogpt.server import serve

        serve(cfg, run_dir)
        return

    from nanogpt.samples import write_samples
    from nanogpt.writing import open_model

    if cfg.interactive:
        from nanogpt.interactive import converse

        sys.exit(converse(cfg, open_model(cfg, run_dir)))
    write_samples(cfg, open_model(cfg, run_dir))


if __name__ == "__main__":
    run_script("sample", main, before_sweep)
