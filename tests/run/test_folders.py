# nanogpt runs、clean 所见的训练目录：旧版本写的、手写的、坏了的
"""What is known of run folders from their small files, and what is done to those that exist."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nanogpt.base.config import ROOT
from nanogpt.base.lock import Lock
from nanogpt.run import folders

RUNS = Path(__file__).parents[1] / "runs"


@pytest.fixture
def outputs(in_tmp):
    """outputs/ with three runs of an earlier version, one of them from a sweep."""
    names = {"gpt2_adamw_labels": "labels", "lora_minimal": "sweeps/monday/0", "modern_muon": "modern"}
    for name, place in names.items():
        shutil.copytree(RUNS / name, in_tmp / "outputs" / place)
    return in_tmp / "outputs"


def said(capsys, *words: str) -> list[list[str]]:
    """The words of each line of `nanogpt runs`."""
    capsys.readouterr()
    folders.main(list(words))
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_runs_are_listed_with_what_their_small_files_say(outputs, capsys):
    rows = said(capsys)
    assert rows[0] == ["run", "val", "loss", "tokens", "took", "size", "state", "model", "data"]
    assert ["modern", "1.4636", "5.12k", "0:00", "100", "kB", "done", "tiny", "text_file"] in rows
    assert [row[0] for row in said(capsys, "--sort", "loss")[1:-1]] == ["sweeps/monday/0", "modern", "labels"]
    assert [row[0] for row in said(capsys, "--sort", "name")[1:-1]] == ["labels", "modern", "sweeps/monday/0"]
    assert [row[0] for row in said(capsys, "--sort", "size")[1:-1]] == ["labels", "modern", "sweeps/monday/0"]
    assert [row[0] for row in said(capsys, "sweeps")[1:-1]] == ["sweeps/monday/0"]


def test_runs_are_chosen_by_any_setting(outputs, capsys):
    found = {typed: [row[0] for row in said(capsys, "--filter", typed, "--sort", "name")[1:-1]] for typed in (
        "dataset=labelled", "model=tiny", "learning_rate=1e-2", "model.arch=modern", "finetune.method=lora", "global_batch_size=null",
    )}
    assert found == {
        "dataset=labelled": ["labels"], "model=tiny": ["labels", "modern", "sweeps/monday/0"], "learning_rate=1e-2": ["labels", "modern"],
        "model.arch=modern": ["modern", "sweeps/monday/0"], "finetune.method=lora": ["sweeps/monday/0"],
        "global_batch_size=null": ["labels", "modern", "sweeps/monday/0"],
    }


def test_what_is_damaged_running_or_unfinished_is_listed_with_what_is_known(outputs, capsys):
    summary = outputs / "modern" / "summary.json"
    content = json.loads(summary.read_text(encoding="utf-8")) | {"best_val_bpb": 2.5, "best_val_loss": float("nan"), "tokens": "many"}
    summary.write_text(json.dumps(content), encoding="utf-8")
    for name in ("config.yaml", "run.json"):
        (outputs / "labels" / name).write_text("a: [", encoding="utf-8")
    (outputs / "labels" / "summary.json").unlink()
    with (outputs / "labels" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"event": "resume", "iteration": 20}\n[]\n{"iteration": 30, "val/loss": 2.0, "tokens": 9e3}\n{"iteration": 35, "val')
    (outputs / "begun" / "ckpt").mkdir(parents=True)
    lock = Lock(outputs / "sweeps" / "monday" / "0" / "lock")
    assert lock.take()
    rows = {row[0]: row for row in said(capsys)}
    assert rows["labels"][:4] == ["labels", "2.0000", "9k", "0:00"] and rows["labels"][-4:] == ["damaged", "?", "?", "–"]
    assert rows["begun"][1:] == ["–", "–", "–", "0", "B", "empty", "?", "?", "–"] and rows["labels:"][1] == "config.yaml:"
    assert rows["modern"][1] == "1.4636" and rows["modern"][-1] == "2.500" and rows["sweeps/monday/0"][6] == "running"
    # 放弃了的那一段不算
    assert [at for at, _ in folders.look(outputs / "labels").values("val/loss")] == [20, 30]
    lock.release()
    assert folders.look(outputs / "sweeps" / "monday" / "0").state == "finished"


@pytest.mark.parametrize(("words", "line"), [
    (["nowhere"], "nowhere: there is no such folder"), (["--filter", "model"], "--filter model: write it as key=value"),
    (["--filter", "modl=tiny"], "none of the runs has modl"), (["--sort", "age"], "invalid choice: 'age'"),
])
def test_a_mistake_in_a_command_about_runs_is_one_line(outputs, capsys, words, line):
    with pytest.raises(SystemExit) as stopped:
        folders.main(words)
    assert stopped.value.code == 2 and line in capsys.readouterr().err


def test_listing_never_imports_torch():
    code = "import sys; from nanogpt.run import folders; folders.main(['tests/runs']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)})
