"""What a run records: metrics.jsonl, TensorBoard, wandb."""

import json

import pytest
from conftest import (
    make_config,  # noqa: F401 - 先登记 schema, resumed_trainer, train
    resumed_trainer,
    train,
)
from test_trainer import records

from nanogpt.base.language import ConfigError
from nanogpt.run.loggers import JsonlLogger, Loggers, TensorBoardLogger, WandbLogger


def test_tensorboard_holds_every_curve_the_sample_and_the_config_also_after_a_resume(in_tmp, tiny_overrides):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train([o for o in tiny_overrides if o != "logger=none"], "logger=tensorboard")
    trainer = resumed_trainer("outputs/run", "max_iters=9")
    trainer.fit()
    events = EventAccumulator(str(in_tmp / "outputs/run/logs"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "val/loss", "learning_rate", "mfu", "tokens_per_s", "memory/allocated_gib", "memory/reserved_gib", "memory/peak_gib"} <= tags
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 10))
    assert {"config/text_summary", "sample/text_summary"} <= set(events.Tags()["tensors"])


def test_metrics_go_on_behind_a_mark_and_a_torn_line_hurts_no_other(in_tmp, tiny_overrides):
    train(tiny_overrides)
    path = in_tmp / "outputs/run/metrics.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write('{"iteration": 7, "train/lo')
    resumed_trainer("outputs/run", "max_iters=8").fit()
    lines = path.read_text(encoding="utf-8").splitlines()
    torn = [line for line in lines if not line.endswith("}")]
    assert len(torn) == 1
    good = [json.loads(line) for line in lines if line not in torn]
    assert {"event": "resume", "iteration": 6} in good and good[-1]["iteration"] == 8


def test_not_a_number_never_reaches_the_json(in_tmp):
    logger = JsonlLogger()
    logger.open(in_tmp, {}, 0)
    logger.log(1, {"a": 1.0})
    logger.close()
    assert json.loads((in_tmp / "metrics.jsonl").read_text(encoding="utf-8")) == {"iteration": 1, "a": 1.0}


def test_every_log_line_carries_the_promised_figures(in_tmp, tiny_overrides):
    train(tiny_overrides)
    rows = [r for r in records() if "train/loss" in r]
    assert [r["iteration"] for r in rows] == [1, 2, 3, 4, 5, 6] and [r["iteration"] for r in rows if "val/loss" in r] == [3, 6]
    for key in ("learning_rate", "tokens_per_s", "mfu", "mfu_rtx3060", "memory/allocated_gib", "memory/peak_gib", "gradient_norm", "tokens"):
        assert all(r[key] > 0 for r in rows)


def test_wandb_is_offline_by_default_and_goes_on_as_the_same_run(in_tmp, tiny_overrides):
    train([o for o in tiny_overrides if o != "logger=none"], "logger=wandb")
    resumed_trainer("outputs/run", "max_iters=8").fit()
    run_id = (in_tmp / "outputs/run/logs/wandb_id").read_text(encoding="utf-8")
    folders = [p.name for p in (in_tmp / "outputs/run/wandb").glob("offline-run-*")]
    assert folders and all(name.endswith(run_id) for name in folders)


def test_an_unknown_wandb_mode_is_named():
    with pytest.raises(ConfigError, match=r"logger.wandb.mode=cloud is not known; choose one of: offline"):
        WandbLogger(project="p", mode="cloud")


def test_curves_on_a_full_disk_are_one_line_and_go_on_when_there_is_room(in_tmp, capfd, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def full(*_):
        raise OSError(28, "No space left on device")

    logger = TensorBoardLogger()
    logger.open(in_tmp, {}, 0)
    both, worker = Loggers([logger]), logger._writer.file_writer.event_writer._async_writer._worker
    monkeypatch.setattr(worker._record_writer, "write", full)
    both.log(1, {"x": 1.0})
    # 写的是另一个线程：等它撞上满磁盘
    worker.join(5)
    for iteration in (2, 3, 4):
        both.log(iteration, {"x": 1.0})
    both.close()
    said = capfd.readouterr().err
    assert said.count("TensorBoardLogger cannot write") == 1 and "Traceback" not in said
    events = EventAccumulator(str(in_tmp / "logs"))
    events.Reload()
    assert [e.step for e in events.Scalars("x")][-2:] == [3, 4]
