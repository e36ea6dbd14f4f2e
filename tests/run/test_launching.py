"""Trainings that run elsewhere: what is written for Slurm, what travels, what is said of jobs, and what is refused."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import make_config, new_session
from hypothesis import given, settings
from hypothesis import strategies as st
from typed import typed

from nanogpt.base.language import ConfigError
from nanogpt.run import folders, launching, rundir

POSIX = pytest.mark.skipif(os.name == "nt", reason="Slurm runs on POSIX alone")
GOLDEN = """\
#!/bin/bash
# nanogpt train launch=slurm; `sbatch` with this file submits it again, and the training goes on
#SBATCH --job-name="my run"
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=96
#SBATCH --time=60
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output="HERE/my run/job/slurm-%j.log"
#SBATCH --requeue
#SBATCH --partition=gpu --account=me

cd HERE || exit 1
echo "$SLURM_JOB_ID" > 'HERE/my run/job/id'
module load cuda
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 --cpus-per-task=96 PYTHON -m torch.distributed.run \\
  --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node=8 --max-restarts=3 \\
  --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$first:$((10000 + SLURM_JOB_ID % 20000))" \\
  ROOT/run_train.py \\
  model=small \\
  dataset=text_file \\
  'dataset.path=my, text.txt' \\
  'out_dir=my run' \\
  resume=auto \\
  launch.name=none &
step=$!
# the time is nearly up: the processes save and end, and the job queues again
trap 'over=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
wait "$step"
code=$?
if [ -n "$over" ]; then
  wait "$step"
  code=$?
  [ "$code" = 0 ] || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""
WORDS = (
    "launch=slurm", "launch.nodes=4", "launch.gpus=8", "launch.cpus=12", "launch.minutes=60", "launch.options=--partition=gpu --account=me",
    "launch.setup=module load cuda", "model=small", "dataset=text_file", "dataset.path=my, text.txt", "out_dir=my run", "overwrite=true",
)


def launched(*words):
    cfg = make_config(*(word.replace("=", "='", 1) + "'" if " " in word else word for word in words))
    return launching.batch_file(cfg.launch, Path(cfg.out_dir), ["ROOT/run_train.py", *launching.passed_on(cfg, Path(cfg.out_dir), words)])


@POSIX
def test_the_file_for_slurm_is_as_it_was_looked_at_once(in_tmp, monkeypatch):
    monkeypatch.setattr(sys, "executable", "PYTHON")
    assert launched(*WORDS).replace(str(in_tmp), "HERE") == GOLDEN


# 每个字至少一个字符；键不是 launch、out_dir 这些由程序定的
WORD = st.tuples(st.sampled_from(["dataset.path", "sample_prompt", "+model.extra.x", "learning_rate"]), st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))


@POSIX
@settings(max_examples=20)
@given(st.lists(WORD.map("=".join), max_size=4), st.text(st.sampled_from("a '\"\\$%,`#é"), min_size=1))
def test_every_word_comes_out_of_the_shell_as_it_was_typed(words, name):
    cfg = make_config("launch=slurm", "launch.nodes=2")
    folder = Path(name.replace("/", "_"))
    told = launching.passed_on(cfg, folder, ["--config-dir=a b", "launch=slurm", *words, "launch.nodes=2", "resume=auto", "~launch.cpus"])
    assert told[: len(words) + 1] == ["--config-dir=a b", *words] and told[-2:] == ["resume=auto", "launch.name=none"] and len(told) == len(words) + 4
    content = launching.batch_file(cfg.launch, folder, told).replace("cd ", "true ", 1).replace("echo ", "true ", 1).replace("> ", "# ")
    shell = subprocess.run(
        ["bash", "-c", "scontrol() { echo host; }; srun() { printf '%s\\0' \"$@\"; }\n" + content], capture_output=True, check=True, env={"SLURM_JOB_ID": "7"},
    )
    assert shell.stdout.decode("utf-8").split("\0")[-len(told) - 1 : -1] == told


def test_what_means_something_else_tomorrow_is_pinned_today(own_run):
    cfg = make_config("launch=slurm", "init_from=latest", checked=False)
    cfg.init_from = "outputs/run"
    assert launching.passed_on(cfg, Path("new"), ["init_from=latest", "launch=slurm"]) == ["init_from=outputs/run", "out_dir=new", "resume=auto", "launch.name=none"]
    cfg = make_config("launch=slurm", "resume=latest", checked=False)
    told = launching.passed_on(cfg, Path("outputs/run"), ["resume=latest", "max_iters=9"])
    assert told == ["max_iters=9", "resume=outputs/run", "launch.name=none"]


# ---- 提交，与假的 sbatch、squeue、sacct ----


@pytest.fixture
def slurm(in_tmp, monkeypatch):
    """A folder, and a function that puts a program with this shell code on the PATH."""
    bin = in_tmp / "bin"
    bin.mkdir()

    def program(name, code):
        (bin / name).write_text(f"#!/bin/sh\n{code}\n", encoding="utf-8")
        (bin / name).chmod(0o755)

    monkeypatch.setenv("PATH", f"{bin}{os.pathsep}{os.environ['PATH']}")
    # 这台机器自己的 Slurm 不算
    monkeypatch.setattr(launching.shutil, "which", lambda name: str(bin / name) if (bin / name).exists() else None)
    return in_tmp, program


def state_of(folder):
    (run,) = folders.with_jobs([folders.look(folder)])
    return run.state


@POSIX
def test_a_job_is_submitted_shown_and_not_submitted_twice(slurm, capsys, tiny_overrides):
    folder, program = slurm
    typed_words = ["launch=slurm", "launch.nodes=2", "out_dir=outputs/it", *tiny_overrides]
    done = typed("run_train.py", folder, *typed_words)
    assert "no sbatch on this machine" in done.stdout and "\n  sbatch outputs/it/job/job.sbatch\n" in done.stdout
    program("sbatch", 'echo "$@" > submitted; echo "123;cluster"')
    done = typed("run_train.py", folder, *typed_words)
    assert "submitted as job 123" in done.stdout and "outputs/it/job/slurm-123.log" in done.stdout
    assert (folder / "submitted").read_text(encoding="utf-8").split() == ["--parsable", "outputs/it/job/job.sbatch"]
    run = folder / "outputs" / "it"
    assert sorted(path.name for path in run.rglob("*")) == ["id", "job", "job.sbatch"] and state_of(run) == "empty"
    program("squeue", "echo 123 PENDING")
    folders.main([])
    assert any(line.split()[0] == "it" and "queued" in line for line in capsys.readouterr().out.splitlines())
    assert "job 123 is PENDING for it" in typed("run_train.py", folder, *typed_words, expect=2).stderr
    program("squeue", "echo 123 RUNNING")
    assert state_of(run) == "running"
    program("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    program("sacct", "echo '        123               NODE_FAIL  '")
    assert state_of(run) == "failed"
    # 任务里敲的就是这些：同一个目录，从头开始，日志还在
    session = new_session(tiny_overrides, out=run)
    session._build()
    session.lock.release()
    assert (run / "run.json").is_file() and (run / "job" / "id").is_file()


def test_a_run_that_is_there_goes_on_elsewhere(slurm, own_run):
    for words in (["resume=outputs/run/ckpt"], ["out_dir=outputs/run", "resume=auto"]):
        done = typed("run_train.py", own_run, "launch=slurm", *words, "max_iters=9")
        assert "no sbatch on this machine" in done.stdout
        told = [line.strip(" \\&") for line in (own_run / "outputs/run/job/job.sbatch").read_text(encoding="utf-8").splitlines()]
        begin = told.index("max_iters=9")
        where = ["resume=outputs/run"] if len(words) == 1 else words
        assert told[begin : begin + len(where) + 2] == ["max_iters=9", *where, "launch.name=none"]
    refused = typed("run_train.py", own_run, "launch=slurm", f"resume={next((own_run / 'outputs/run/ckpt').glob('iter_*0003'))}", expect=2)
    assert "a job that is started again would go back to it each time" in refused.stderr


@POSIX
def test_a_job_that_sbatch_refuses_leaves_nothing(slurm):
    folder, program = slurm
    program("sbatch", "echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1")
    done = typed("run_train.py", folder, "launch=slurm", "launch.options=--partition=gpu", expect=2)
    assert "error: launch=slurm: sbatch refuses the job (invalid partition specified: gpu)" in done.stderr
    assert not (folder / "outputs").exists() or not list((folder / "outputs").iterdir())


@POSIX
def test_a_run_is_not_cleared_for_a_job_that_sbatch_refuses(slurm, own_run):
    _, program = slurm
    program("sbatch", "echo 'sbatch: error: no' >&2; exit 1")
    before = sorted((own_run / "outputs" / "run").rglob("*"))
    assert "sbatch refuses the job (no)" in typed("run_train.py", own_run, "launch=slurm", "out_dir=outputs/run", "overwrite=true", expect=2).stderr
    assert len(before) > 5 and sorted((own_run / "outputs" / "run").rglob("*")) == before


@pytest.mark.skipif(not shutil.which("sinfo") or subprocess.run(["sinfo"], capture_output=True).returncode != 0, reason="no Slurm answers here")
def test_slurm_itself_takes_the_file():
    cfg = make_config("launch=slurm", "launch.gpus=0", "launch.minutes=5", "launch.options='--comment=mine'")
    content = launching.batch_file(cfg.launch, Path("it's 100% \"mine\""), ["run_train.py"])
    done = subprocess.run(["sbatch", "--test-only"], input=content, capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr


def test_a_folder_that_is_cleared_keeps_its_job(own_run):
    job = own_run / "outputs" / "run" / rundir.JOB
    job.mkdir()
    (job / "id").write_text("7\n", encoding="ascii")
    with pytest.raises(ConfigError, match="already holds a run"):
        rundir.claim(job.parent, overwrite=False)
    rundir.claim(job.parent, overwrite=True).release(remove=True)
    assert [path.name for path in job.parent.iterdir()] == ["job"] and (job / "id").is_file()


def test_without_ray_its_package_is_named(in_tmp, monkeypatch):
    monkeypatch.setattr(launching.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="launch=ray needs the package ray; install it with: pip install ray"):
        launching.launch(make_config("launch=ray"), Path("new"), ["launch=ray"])
    assert not list(in_tmp.iterdir())


@pytest.mark.parametrize(("words", "line"), [
    (["launch.nodes=0"], "launch.nodes=0 is out of range; it must be >= 1"),
    (["launch.options=gpu"], "launch.options='gpu': options of sbatch begin with -"),
    (["experiment=fit"], "launch=slurm starts one training; trials go to a cluster by launch=ray"),
    (["resume=outputs/run", "checkpoint=best"], "checkpoint=best: a job that is started again would go back to it each time"),
])
def test_what_cannot_be_launched_is_refused_in_one_line(words, line):
    with pytest.raises(ConfigError) as refused:
        make_config("launch=slurm", *words)
    assert line in str(refused.value) and "\n" not in str(refused.value)


def test_a_sweep_is_not_launched_but_its_jobs_are_handed_out():
    import run_train

    with pytest.raises(ConfigError, match="launch=slurm starts one training, not a sweep; .* hydra/launcher=submitit_slurm"):
        run_train.before_sweep(make_config("launch=slurm"))


def test_a_plan_is_for_all_the_machines(monkeypatch):
    import run_train
    from nanogpt.plan import show

    planned = []
    monkeypatch.setattr(show, "run_plan", lambda cfg, overrides: planned.append(cfg.parallel))
    run_train.main(make_config("plan=true", "launch=slurm", "launch.nodes=4", "launch.gpus=8"), [])
    assert (planned[0].world, planned[0].nodes) == (32, 4)


def test_a_signal_that_torchrun_passes_on_again_does_not_cut_the_save_short(monkeypatch):
    said, trainer = [], SimpleNamespace(stop_requested=False)
    console = SimpleNamespace(line=lambda *words, **values: said.append(words), gone=False)
    before = {name: signal.getsignal(getattr(signal, name)) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)}
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    try:
        from nanogpt.run.session import Session

        Session._catch_signals(SimpleNamespace(console=console), trainer)
        handle = signal.getsignal(signal.SIGTERM)
        for _ in range(3):
            # 第二次曾是“立刻走”：没有存完
            handle(signal.SIGTERM, None)
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)
    assert trainer.stop_requested and len(said) == 1
