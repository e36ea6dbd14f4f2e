"""run_train.py as a person types it: processes, signals, exit codes, folders."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY
from typed import ENVIRONMENT, typed

from nanogpt.base import quoting
from nanogpt.base.config import ROOT
from nanogpt.base.errors import EXIT_TERMINATED
from nanogpt.run.loop import Training

RUN = [sys.executable, str(ROOT / "run_train.py")]
QUICK = [*TINY, "max_iters=4", "eval_interval=2", "eval_tokens=200", "log_interval=1", "sample_tokens=5", "logger=none", "device=cpu", "hardware.peak_tflops_fp32=0.1"]
TEXT = "The quick brown fox jumps over the lazy dog.\n" * 60


def run(folder, *overrides, expect=0):
    """python run_train.py in this process."""
    return typed("run_train.py", folder, *overrides, expect=expect)


def run_alone(folder, *overrides, expect=0):
    """python run_train.py in a process of its own."""
    done = subprocess.run([*RUN, *overrides], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


@pytest.fixture
def own_text(tmp_path):
    """A folder with a text, and the overrides that train on it without touching the repository's data/."""
    (tmp_path / "my.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path, ["dataset=text_file", "dataset.path=my.txt", "dataset.dir=prepared", *QUICK]


def test_train_then_resume_then_move_to_another_machine(own_text):
    folder, overrides = own_text
    out, text = folder / "outputs/it's [1], a=b 小", folder / "novel (1), it's #2.txt"
    (folder / "my.txt").rename(text)
    done = run(folder, *overrides, f"dataset.path={text.name}", f"out_dir={out.relative_to(folder)}", "logger=tensorboard")
    for expected in ("iter 4: loss", "val loss", "lr ", "tok/s, MFU", "RAM", "done: val loss", "logs/ (TensorBoard)"):
        assert expected in done.stdout
    assert done.stderr.count("\n") == 2 and "preparing the data set text_file" in done.stderr
    # 打印出来的命令，贴到 sh 里就能用
    write, longer, curves = [shlex.split(line)[1:] for line in done.stdout.partition("next:\n")[2].splitlines()[1::2]]
    assert len(typed(Path(write[0]).name, folder, *write[1:], "fast=false").stdout) > 400 and curves == ["--logdir", "outputs"]
    refused = run(folder, *overrides, f"dataset.path={text.name}", f"out_dir={out.relative_to(folder)}", expect=2).stderr
    assert f"continue it with {quoting.word(longer[1])}, or" in refused
    assert {p.name for p in out.iterdir()} == {*"run.json lock config.yaml tokenizer.json metrics.jsonl summary.json report.html logs ckpt data".split()}
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    for key in ("val_loss", "best_val_loss", "iters", "tokens_per_s", "mfu", "peak_vram_gib", "wall_s", "parameters", "device", "versions"):
        assert key in summary
    assert summary["iters"] == 4 and summary["tokens_per_s"] > 0
    # 把运行目录拷到“另一台机器”：没有原文，也没有准备好的数据
    moved = folder / "elsewhere"
    shutil.copytree(out, moved / "outputs" / "b")
    done = run(moved, "resume=outputs/b", "max_iters=6", "logger=none")
    assert "continuing outputs/b at iteration 4" in done.stdout and "iter 6:" in done.stdout
    assert json.loads((moved / "outputs/b/summary.json").read_text(encoding="utf-8"))["iters"] == 6
    done = run(moved, "resume=latest", "max_iters=7")
    assert "iter 7:" in done.stdout
    assert "iter 8:" in run(folder, *longer[1:]).stdout


def test_an_existing_run_is_kept_unless_told_otherwise(own_text):
    folder, overrides = own_text
    run(folder, *overrides, "out_dir=outputs/a")
    before = (folder / "outputs/a/metrics.jsonl").read_bytes()
    refused = run(folder, *overrides, "out_dir=outputs/a", expect=2)
    assert refused.stderr.startswith("error: out_dir=outputs/a already holds a run") and refused.stderr.count("\n") == 1
    assert (folder / "outputs/a/metrics.jsonl").read_bytes() == before
    for litter in (".DS_Store", "ckpt/.DS_Store", "data/desktop.ini", "._run.json"):
        # 在 Finder 或资源管理器里打开过
        (folder / "outputs/a" / litter).write_bytes(b"")
    run(folder, *overrides, "out_dir=outputs/a", "overwrite=true", "max_iters=2")
    assert json.loads((folder / "outputs/a/summary.json").read_text(encoding="utf-8"))["iters"] == 2
    (folder / "outputs/precious").mkdir()
    (folder / "outputs/precious/thesis.txt").write_text("years of work", encoding="utf-8")
    (folder / "outputs/mine/logs").mkdir(parents=True)
    for mine in ("logs/mine.txt", "config.yaml"):
        # 名字与训练写的一样，却不是训练
        (folder / "outputs/mine" / mine).write_text("a: 1", encoding="utf-8")
    assert "holds files that are not a run's" in run(folder, *overrides, "out_dir=outputs/mine", "overwrite=true", expect=2).stderr
    assert len([path for path in (folder / "outputs/mine").rglob("*") if path.is_file()]) == 2
    refused = run(folder, *overrides, "out_dir=outputs/precious", "overwrite=true", expect=2)
    assert "not a run's" in refused.stderr and (folder / "outputs/precious/thesis.txt").exists()


def check_interrupted(folder, out):
    assert "interrupted" in out and re.search(r"continue with:\n  python \S*run_train.py resume=outputs/a\n", out)
    stopped = json.loads((folder / "outputs/a/summary.json").read_text(encoding="utf-8"))
    assert stopped["stopped_by"] == "interrupted" and stopped["iters"] >= 3
    assert "run_train.py resume=outputs/a" in (folder / "outputs/a/report.html").read_text(encoding="utf-8")
    done = run(folder, "resume=outputs/a", f"max_iters={stopped['iters'] + 2}", "logger=none")
    assert f"continuing outputs/a at iteration {stopped['iters']}" in done.stdout


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, EXIT_TERMINATED)])
def test_ctrl_c_and_a_launcher_that_ends_the_run_save_and_resume_goes_on(own_text, monkeypatch, number, code):
    folder, overrides = own_text
    step = Training.step

    def interrupted(trainer):
        if trainer.progress.iteration == 3 and trainer.cfg.resume is None:
            signal.raise_signal(number)
        return step(trainer)

    monkeypatch.setattr(Training, "step", interrupted)
    check_interrupted(folder, run(folder, *overrides, "out_dir=outputs/a", "max_iters=100000", "eval_interval=100000", expect=code).stdout)


def test_two_processes_train_like_one(own_text):
    folder, overrides = own_text
    batch = ["batch_size=2", "gradient_accumulation_steps=2", "max_iters=5"]
    run(folder, *overrides, *batch, "out_dir=outputs/one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "run_train.py")]
    done = subprocess.run(
        [*torchrun, *overrides, *batch, "out_dir=outputs/two"], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, encoding="utf-8", timeout=180
    )
    assert done.returncode == 0, done.stderr

    def losses(name):
        lines = [json.loads(line) for line in (folder / f"outputs/{name}/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        return [record["train/loss"] for record in lines if "train/loss" in record]

    assert losses("two") == pytest.approx(losses("one"), abs=2e-3) and len(losses("two")) == 5
    summary = json.loads((folder / "outputs/two/summary.json").read_text(encoding="utf-8"))
    assert summary["processes"] == 2 and summary["tokens"] == 5 * 4 * 16
    assert done.stdout.count("iter 5: loss") == 1


def test_a_sweep_runs_every_job_in_its_own_folder(own_text):
    folder, overrides = own_text
    # 换了目录，写下的相对路径仍从敲命令的地方算起
    done = run(folder, "-m", *overrides, "max_iters=2", "batch_size=2,4", "hydra.job.chdir=true")
    runs = sorted((folder / "outputs" / "sweeps").glob("*/*/summary.json"))
    assert [p.parent.name for p in runs] == ["0_batch_size=2", "1_batch_size=4"] and "done: val loss" in done.stdout
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["batch_size", "val", "loss", "last", "bpb", "tokens", "tokens/s", "took", "run"] in lines
    assert sorted(line[0] + line[-1] for line in lines if line[-1:] in (["0_batch_size=2"], ["1_batch_size=4"])) == ["20_batch_size=2", "41_batch_size=4"]
    assert (runs[0].parents[1] / "compare.html").is_file()
    assert [json.loads(p.read_text(encoding="utf-8"))["tokens"] for p in runs] == [2 * 2 * 16, 2 * 4 * 16]


def test_one_bad_job_does_not_stop_a_sweep_and_the_exit_code_tells(own_text):
    folder, overrides = own_text
    # 写错的值开跑之前就查得出；与数据合不上的，轮到它时才知道
    done = run(folder, "-m", *overrides, "max_iters=2", "model.block_size=100000,16", expect=2)
    assert done.stderr.count("error: model.block_size=100000") == 1 and "Traceback" not in done.stderr
    assert len(list((folder / "outputs" / "sweeps").glob("*/*/summary.json"))) == 1
    rows = [line.split() for line in done.stdout.splitlines()[-4:] if line.endswith(("=16", "=100000"))]
    assert [(row[0], row[-2], row[-1]) for row in rows] == [("16", "done", "1_model.block_size=16"), ("100000", "failed", "0_model.block_size=100000")]
    assert "0_model.block_size=100000: model.block_size=100000 is longer" in done.stdout


BAD_COMMANDS = {
    "model=huge": "model=huge: there is no such option; choose one of: gpt2, gpt2_large",
    "model.n_layr=3": "model.n_layr: there is no such key (did you mean model.n_layer?)",
    "max_iter=3": "max_iter: there is no such key (did you mean max_iters?)",
    "max_iters=many": "max_iters=many has the wrong type: int is wanted",
    "model.n_embd=100 model.n_head=12": "model.n_embd=100 is not divisible by model.n_head=12; choose a multiple of 12",
    "batch_size=": "batch_size",
    "batch_size=[1": "batch_size=[1: this cannot be read",
    "resume=outputs/none": "resume=outputs/none: there is no checkpoint in it",
    "resume=latest": "resume=",
    "dataset=text_file": "dataset.path is not set",
    "dataset=text_file dataset.path=nothing.txt": "dataset.path=nothing.txt: there is no such file or folder",
    "dataset=text_file dataset.path=bad.txt": "byte 4 is not UTF-8",
    "dataset=text_file dataset.path=empty.txt": "no text in it",
    "dataset=text_file dataset.path=short.txt": "model.block_size=128 is longer than the val split",
    "out_dir=file.txt": "out_dir=file.txt cannot be written",
    "device=cuda:9": "device=cuda:9: this machine offers",
    "model._target_=no.such.Class dataset=text_file dataset.path=ok.txt": "no.such.Class cannot be imported",
    "optimizer.beta1=2 dataset=text_file dataset.path=ok.txt": "optimizer.beta1=2",
    "sample_prompt=中 dataset=text_file dataset.path=ok.txt": "the vocabulary lacks '中'",
    "model.vocab_size=3 dataset=text_file dataset.path=ok.txt": "model.vocab_size=3 is smaller than",
}


@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "bad.txt").write_bytes(b"good\xff\xff")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "short.txt").write_text("too short " * 3, encoding="utf-8")
    (folder / "ok.txt").write_text(TEXT, encoding="utf-8")
    (folder / "file.txt").write_text("x", encoding="utf-8")
    return folder


@pytest.mark.parametrize("command", BAD_COMMANDS)
def test_a_wrong_command_is_one_line_on_stderr_and_leaves_no_run(bad_folder, command):
    arguments = command.split(" ")
    if any(a.startswith("dataset.path=") and a.endswith(("short.txt", "ok.txt")) for a in arguments):
        arguments.append("dataset.dir=prepared-" + ("short" if "short" in command else "ok"))
    done = run(bad_folder, *arguments, expect=2)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and BAD_COMMANDS[command] in last, done.stderr
    # 准备数据的两行说明之外，只有这一行
    assert len([line for line in done.stderr.splitlines() if not line.startswith(("preparing", "text_file:"))]) == 1
    assert not (bad_folder / "outputs").exists()


def test_errors_speak_chinese_when_asked(bad_folder):
    done = run_alone(bad_folder, "lang=zh", "model.n_embd=100", "model.n_head=12", expect=2)
    assert done.stderr == "错误：model.n_embd=100 不能被 model.n_head=12 整除；请改为 12 的倍数\n"


def test_the_chinese_log_line_has_the_promised_form(own_text):
    folder, overrides = own_text
    done = run(folder, *overrides, "max_iters=2", "lang=zh", "out_dir=outputs/zh")
    pattern = r"迭代 2：损失 \d\.\d{4}，lr \d\.\d\de[-+]\d\d，\d+ tok/s，MFU \d+\.\d%，内存 \d+\.\d\dGB\n迭代 2：验证损失 \d\.\d{4}（\d\.\d{3} bpb），最好 \d\.\d{4}，内存峰值 "
    assert re.search(pattern, done.stdout), done.stdout


def test_prepare_scripts_work_alone(tmp_path):
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    script = ROOT / "data" / "text_file" / "prepare.py"
    done = subprocess.run(
        [sys.executable, str(script), f"path={tmp_path / 't.txt'}", f"dir={tmp_path / 'p'}"], cwd=tmp_path, env=ENVIRONMENT,
        capture_output=True, text=True, encoding="utf-8", timeout=60,
    )
    assert done.returncode == 0 and (tmp_path / "p" / "meta.json").is_file(), done.stderr
    done = subprocess.run([sys.executable, str(script), "pth=x"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, encoding="utf-8", timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_compile_true_without_a_compiler_goes_on(own_text, monkeypatch):
    folder, overrides = own_text
    empty = folder / "no-tools"
    empty.mkdir()
    environment = {**ENVIRONMENT, "PATH": str(empty), "CXX": "no-such-compiler"}
    done = subprocess.run(
        [*RUN, *overrides, "compile=true", "out_dir=outputs/c"], cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=120
    )
    assert done.returncode == 0 and "compile=true: not available here" in done.stdout and "done: val loss" in done.stdout


def test_a_terminal_shows_a_progress_bar(own_text):
    pty = pytest.importorskip("pty")
    folder, overrides = own_text
    master, slave = pty.openpty()
    process = subprocess.Popen([*RUN, *overrides, "out_dir=outputs/tty"], cwd=folder, env={**ENVIRONMENT, "TERM": "xterm-256color"}, stdout=slave, stderr=slave)
    os.close(slave)
    shown = b""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        try:
            piece = os.read(master, 65536)
        except OSError:
            break
        if not piece:
            break
        shown += piece
    assert process.wait(30) == 0
    assert b"ETA" in shown and b"4/4" in shown and b"iter 4: loss" in shown


def test_the_package_is_importable_without_the_repository_as_working_folder(tmp_path):
    code = "import nanogpt; print(nanogpt.create_model('tiny', vocab_size=65).parameter_count())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0 and int(done.stdout) > 3_000_000, done.stderr
    assert Path(ROOT / "conf").is_dir()
