"""What a run records: metrics.jsonl, TensorBoard, wandb, SwanLab."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import (
    new_trainer,
    resumed_trainer,
    train,
)
from test_trainer import records

from nanogpt.base.language import ConfigError
from nanogpt.run.loggers import JsonlLogger, Loggers, SwanLabLogger, TensorBoardLogger, WandbLogger, history


def events_in(folder):
    """What TensorBoard reads in a run's logs."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "logs"))
    events.Reload()
    return events


CURVES = {
    "loss/train", "loss/val", "speed/tokens_per_s", "speed/mfu", "speed/tokens", "memory/allocated_gib", "memory/peak_gib",
    "optimizer/learning_rate", "optimizer/gradient_norm",
}


def test_tensorboard_holds_both_losses_in_one_chart_the_settings_the_samples_and_of_a_cpu_no_curves_of_a_card(in_tmp, tiny_overrides):
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    train(tiny_overrides, "logger=tensorboard")
    # 被杀之前多走的两步：接着训时不该留在曲线里
    (late := TensorBoardLogger()).open(in_tmp / "outputs/run", {"device": "cpu"}, 6)
    late.log(8, {"train/loss": 99.0})
    late.close()
    resumed_trainer("outputs/run", "max_iters=9").fit()
    events = events_in(in_tmp / "outputs/run")
    assert {tag for tag in events.Tags()["scalars"] if tag != "loss/val_bpb"} == CURVES
    assert [e.step for e in events.Scalars("loss/train")] == list(range(1, 10)) and max(e.value for e in events.Scalars("loss/train")) < 9
    assert {"config/text_summary", "sample/text_summary"} <= set(events.Tags()["tensors"])
    chart = Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]).category[0].chart[0].multiline
    drawn = [tag for tag in (*CURVES, "loss/val_bpb") if re.match(chart.tag[0], tag)]
    assert sorted(drawn) == ["loss/train", "loss/val"]
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["max_iters"].number_value == 6 and settings["model.name"].string_value == "tiny" and "optimizer.weight_decay" in settings


def test_a_run_of_an_earlier_version_or_without_tensorboard_goes_on_with_its_whole_curve(in_tmp, tiny_overrides):
    train(tiny_overrides)
    resumed_trainer("outputs/run", "max_iters=8", "logger=tensorboard").fit()
    events = events_in(in_tmp / "outputs/run")
    assert [e.step for e in events.Scalars("loss/train")] == list(range(1, 9)) and [e.step for e in events.Scalars("loss/val")] == [3, 6, 8]


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


def test_wandb_is_offline_by_default_and_goes_on_as_the_same_run(in_tmp, tiny_overrides, monkeypatch):
    import wandb

    train(tiny_overrides, "logger=wandb")
    run_id = (in_tmp / "outputs/run/logs/wandb_id").read_text(encoding="utf-8")
    folders = [p.name for p in (in_tmp / "outputs/run/wandb").glob("offline-run-*")]
    assert folders and all(name.endswith(run_id) for name in folders)
    # 再 init 一次要几秒，只看给了它什么
    given, run = {}, SimpleNamespace(log=lambda values, step: None, finish=lambda: None)
    monkeypatch.setattr(wandb, "init", lambda **options: given.update(options) or run)
    resumed_trainer("outputs/run", "max_iters=8").fit()
    assert (given["id"], given["resume"], given["mode"]) == (run_id, "allow", "offline")


def test_swanlab_gets_grouped_curves_the_samples_and_the_same_id_when_the_run_goes_on(in_tmp, tiny_overrides, monkeypatch):
    # 真的 swanlab 每次 init 要两秒去看机器：这里只看给了它什么
    calls, run = [], SimpleNamespace(log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("end"))
    fake = SimpleNamespace(init=lambda **options: calls.append(options) or run, Text=str)
    monkeypatch.setitem(sys.modules, "swanlab", fake)
    train(tiny_overrides, "logger=swanlab")
    first, *logged, end = calls
    assert first["mode"] == "offline" and first["config"]["model"]["n_embd"] == 16 and end == "end"
    assert {key for _, values in logged for key in values} - {"loss/val_bpb"} == CURVES | {"sample"} and logged[-1][0] == 6
    resumed_trainer("outputs/run", "max_iters=7").fit()
    again = calls[len(logged) + 2]
    assert again["id"] == first["id"] and again["resume"] == "allow" and Path(again["log_dir"]) == in_tmp / "outputs/run/swanlog"


def test_swanlab_that_is_not_installed_is_named_and_nothing_is_left(in_tmp, tiny_overrides, monkeypatch):
    monkeypatch.setitem(sys.modules, "swanlab", None)
    with pytest.raises(ConfigError, match=r"logger=swanlab needs the package swanlab; install it with: pip install swanlab"):
        new_trainer(tiny_overrides, "logger=swanlab")
    assert not (in_tmp / "outputs/run").exists()


@pytest.mark.parametrize("kind", [WandbLogger, SwanLabLogger])
def test_an_unknown_mode_is_named(kind):
    with pytest.raises(ConfigError, match=r"logger.(wandb|swanlab).mode=cloud is not known; choose one of: offline"):
        kind(project="p", mode="cloud")


def test_curves_on_a_full_disk_are_one_line_and_go_on_when_there_is_room(in_tmp, capfd, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    logger = TensorBoardLogger()
    (in_tmp / "metrics.jsonl").touch()
    logger.open(in_tmp, {"device": "cpu"}, 0)
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
    assert [e.step for e in events_in(in_tmp).Scalars("x")][-2:] == [3, 4]


def test_steps_of_an_attempt_that_never_saved_are_not_in_the_curve_of_the_next(tmp_path):
    for attempt, iterations in enumerate(([2, 4, 6], [5])):
        logger = JsonlLogger()
        logger.open(tmp_path, {}, 0)
        for iteration in iterations:
            logger.log(iteration, {"train/loss": float(attempt)})
        logger.close()
    assert history(tmp_path)[0] == [{"iteration": 5, "train/loss": 1.0}]
