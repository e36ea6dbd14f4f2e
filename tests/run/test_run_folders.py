# nanogpt runs、clean 所见的训练目录：旧版本写的、手写的、坏了的
"""What is known of run folders from their small files, and what is done to those that exist."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import new_session, resume
from test_old_runs import greedy_text

from nanogpt.base import run_names
from nanogpt.base.config import ROOT
from nanogpt.base.console import file_size
from nanogpt.base.hashed_json import write_sealed
from nanogpt.base.language import ConfigError
from nanogpt.base.lock import Lock
from nanogpt.run import cleaning, folders
from nanogpt.run.saving import largest_bytes, state_of
from nanogpt.weights import checkpoint
from nanogpt.weights.export import export
from nanogpt.weights.tensors import flatten

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
    content = json.loads(summary.read_text(encoding="utf-8")) | {"best_val_bpb": 2.5, "best_val_loss": float("nan"), "tokens": "many", "iters": "x"}
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
    # 搜索淘汰的：权重删了，结果还在
    shutil.rmtree(outputs / "modern" / "ckpt")
    assert folders.look(outputs / "modern").state == "pruned"


@pytest.mark.parametrize(("words", "line"), [
    (["nowhere"], "nowhere: there is no such folder"), (["--filter", "model"], "--filter model: write it as key=value"),
    (["--filter", "modl=tiny"], "none of the runs has modl"), (["--sort", "age"], "invalid choice: 'age'"),
])
def test_a_mistake_in_a_command_about_runs_is_one_line(outputs, capsys, words, line):
    with pytest.raises(SystemExit) as stopped:
        folders.main(words)
    assert stopped.value.code == 2 and line in capsys.readouterr().err


def test_listing_never_imports_torch():
    code = "import sys; from nanogpt.run import folders, ray_cluster; folders.main(['tests/runs']); assert not {'torch', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)})


# ---- nanogpt clean ----


@pytest.fixture
def runs(own_run):
    """outputs/run with three checkpoints, of which the second is the best, and what else may lie there."""
    folder = own_run / "outputs"
    for copy, iteration in enumerate((4, 7), 1):
        # 第三个最新，却不是最好的
        source = checkpoint.checkpoints(folder / "run")[copy - 1].folder
        shutil.copytree(source, source.with_name(f"iter_{iteration:08}"))
        manifest = json.loads((source / "manifest.json").read_text(encoding="utf-8"))
        loss = 0.5 if iteration == 4 else 9.0
        write_sealed(source.with_name(f"iter_{iteration:08}") / "manifest.json", {**manifest, "iteration": iteration, "val_loss": loss})
    (folder / "begun" / "ckpt").mkdir(parents=True)
    run_names.write_record(folder / "begun", "a: 1")
    # 搜索淘汰的：权重删了，曲线要留着
    (folder / "pruned").mkdir()
    run_names.write_record(folder / "pruned", "a: 1")
    (folder / "pruned" / "summary.json").write_text("{}", encoding="utf-8")
    # 停在两次改名之间：接着训时，挪开的还会回来
    (folder / "moved" / "ckpt" / ".iter_00000004.0a1b2c3d.old.tmp").mkdir(parents=True)
    run_names.write_record(folder / "moved", "a: 1")
    for name, status in (("0", "ok"), ("1", "oom")):
        (folder / "fit" / "monday" / name).mkdir(parents=True)
        (folder / "fit" / "monday" / name / "trial.json").write_text(json.dumps({"status": status, "overrides": []}), encoding="utf-8")
    (folder / "fit" / "monday" / "trials.jsonl").touch()
    (folder / "sweeps" / "0").mkdir(parents=True)
    (folder / "sweeps" / "multirun.yaml").touch()
    return folder


def kept(folder) -> list[int]:
    return [one.iteration for one in checkpoint.checkpoints(folder / "run")]


def test_cleaning_shows_first_and_deletes_only_when_told(runs, capsys, monkeypatch):
    before = sorted(runs.rglob("*"))
    cleaning.main([])
    said = capsys.readouterr().out
    assert "nothing was deleted; add --yes" in said and "older checkpoints: 2" in said and sorted(runs.rglob("*")) == before
    monkeypatch.setattr(cleaning, "_agreed", lambda: False)
    cleaning.main([])
    assert sorted(runs.rglob("*")) == before
    cleaning.main(["--yes"])
    assert kept(runs) == [4, 7] and all(one.problem() is None and one.resumable for one in checkpoint.checkpoints(runs / "run"))
    assert not (runs / "begun").exists() and (runs / "pruned").is_dir() and (runs / "moved").is_dir() and not (runs / "sweeps" / "0").exists() and [path.name for path in (runs / "fit" / "monday").iterdir() if path.is_dir()] == ["0"]
    cleaning.main(["--yes"])
    assert "nothing to clean" in capsys.readouterr().out
    # 从更早的接着训，挪开的那个也占地方
    checkpoint.set_aside_newer(runs / "run", 4)
    assert kept(runs) == [4] and (runs / "run" / "ckpt" / "replaced_iter_00000007").is_dir()
    cleaning.main(["--yes"])
    assert "checkpoints set aside by a resume from an older one: 1" in capsys.readouterr().out
    assert [path.name for path in (runs / "run" / "ckpt").iterdir()] == ["iter_00000004"]


@pytest.mark.parametrize("reason", ["training", "last damaged", "best damaged", "manifest damaged", "strange file", "another program's", "changed meanwhile", "resumed from an older one"])
def test_cleaning_leaves_alone_what_is_in_use_damaged_or_strange(runs, capsys, reason):
    lock = Lock(runs / "run" / "lock")
    items = cleaning.everything(["run"], optimizer=False)
    if reason == "training":
        assert lock.take() and not cleaning.everything(["run"], optimizer=True) and "is being trained" in capsys.readouterr().out
    elif reason == "manifest damaged":
        (runs / "run" / "ckpt" / "iter_00000003" / "manifest.json").write_text("{", encoding="utf-8")
        assert not cleaning.everything(["run"], optimizer=True)
    elif reason == "strange file":
        (runs / "begun" / "novel.txt").touch()
        assert not cleaning.everything(["begun"], optimizer=True)
        (runs / "begun" / "novel.txt").rename(runs / "begun" / "ckpt" / "best.pt")
        assert not cleaning.everything(["begun"], optimizer=True)
        items = []
    elif reason == "another program's":
        for place in ("data/measured.json", "logs/a.log", "run.json"):
            (runs / "other" / place).parent.mkdir(parents=True, exist_ok=True)
            (runs / "other" / place).write_text('{"lr": 1}', encoding="utf-8")
        items = [item for item in cleaning.everything([], optimizer=True) if item.folder.name == "other"]
        assert not items
    elif reason == "resumed from an older one":
        checkpoint.set_aside_newer(runs / "run", 3)
        items = [cleaning.Item("old", runs / "run", ("iter_00000003",), 1)]
    elif reason == "changed meanwhile":
        shutil.rmtree(runs / "run" / "ckpt" / "iter_00000003")
    else:
        damaged = runs / "run" / "ckpt" / ("iter_00000004" if "best" in reason else "iter_00000007") / "model.safetensors"
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    before = sorted((runs / "run" / "ckpt").rglob("*"))
    assert cleaning.remove(items) == 0 and sorted((runs / "run" / "ckpt").rglob("*")) == before
    lock.release()


def test_without_its_optimizer_state_a_run_writes_as_before_and_says_why_it_cannot_go_on(in_tmp, capsys):
    shutil.copytree(RUNS / "modern_muon", "outputs/run")
    text = greedy_text("outputs/run", capsys, "fast=false")
    cleaning.main(["run", "--optimizer"])
    assert "can be written with, served and exported, but not resumed" in capsys.readouterr().out and checkpoint.find(Path("outputs/run"), "last").resumable
    cleaning.main(["run", "--optimizer", "--yes"])
    assert greedy_text("outputs/run", capsys, "fast=false") == text and not list(Path("outputs/run").rglob("state.*"))
    with pytest.raises(ConfigError, match=r"its optimizer state was removed .*: init_from=outputs/run$"):
        resume("outputs/run", "max_iters=50")
    export("outputs/run", Path("exported"), None)
    # 读得懂它的清单里，少一个文件仍然是损坏
    next(Path("outputs/run").rglob("model.safetensors")).unlink()
    assert "missing" in checkpoint.checkpoints(Path("outputs/run"))[0].problem()


# ---- 一次训练写多少 ----


@pytest.mark.parametrize("memory", ["default", "lean8", "minimal"])
def test_a_training_says_how_much_its_checkpoints_take_and_when_the_disk_is_too_small(in_tmp, tiny_overrides, monkeypatch, capsys, memory):
    session = new_session(tiny_overrides, f"memory={memory}")
    trainer = session._build()
    told = largest_bytes(trainer.computation)
    assert not trainer.optimizer.state
    session._announce(trainer)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(told * 9, told * 8, told))
    session._announce(trainer)
    said = capsys.readouterr().out
    # 六步，每三步一次：只会有两份
    assert said.count(f"up to {file_size(told)} each, at most 2 kept (keep=2 and the best): {file_size(2 * told)}") == 2
    assert said.count("the disk may become full") == 1 and f"can take {file_size(2 * told)}" in said
    trainer.prepare()
    tensors = checkpoint.model_tensors(trainer.model)
    flatten(state_of(trainer.computation, trainer.progress, trainer.data, trainer.order), tensors)
    assert told == sum(tensor.nbytes for tensor in tensors.values())
    session.lock.release()
