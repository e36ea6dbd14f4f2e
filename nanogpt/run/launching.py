"""Starts one training on the nodes of a cluster, through Slurm or Ray, and asks Slurm what became of it.

Needs no torch.
"""

# 一次训练，在别的机器上跑：launch=slurm 写出 sbatch 文件并提交，launch=ray 交给 ray_cluster
# 敲下的每个字原样传过去，只换掉训练目录与 launch 自己；任务里总是 resume=auto，重新排队、换了节点都从存下的接着
# Slurm 只做它自己会的：分节点、限时、排队；几个进程怎样找到彼此、死了再起，由 torchrun 管
# job/ 在训练目录里：job.sbatch、编号 id 与每次的日志；nanogpt runs 由编号问 squeue，问不到再问 sacct

import contextlib
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from nanogpt.base.config import LaunchConfig, TrainConfig, check_keys, check_launch
from nanogpt.base.console import Console
from nanogpt.base.files import write_text
from nanogpt.base.language import ConfigError
from nanogpt.base.quoting import override, word
from nanogpt.base.run_names import is_latest
from nanogpt.run import rundir
from nanogpt.run.rundir import JOB

# 由这里决定的键；其余的照敲下的传
OWN = ("launch", "resume", "out_dir", "overwrite")
# 问一次 Slurm 至多等这么久（秒）：列表不能停在那里
ASKING_S = 10
# Slurm 的说法 -> 还在排队的、在跑的、没做成的
QUEUED = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SUSPENDED", "RESV_DEL_HOLD")
RUNNING = ("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "RESIZING", "STOPPED")
FAILED = ("FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "TIMEOUT", "LAUNCH_FAILED", "REVOKED")

SCRIPT = """\
#!/bin/bash
# nanogpt train launch=slurm; `sbatch` with this file submits it again, and the training goes on
{options}

cd {here} || exit 1
echo "$SLURM_JOB_ID" > {id}
{setup}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={grace}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1{cpus} {python} -m torch.distributed.run \\
  --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node={processes} --max-restarts={restarts} \\
  --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$first:$((10000 + SLURM_JOB_ID % 20000))" \\
  {command} &
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


def launch(cfg: TrainConfig, run_dir: Path, typed: Sequence[str]) -> None:
    """Start the training in run_dir elsewhere, as cfg.launch says; `typed` is the command line as it was typed."""
    check_keys(cfg)
    check_launch(cfg)
    if cfg.launch.name == "ray" and not importlib.util.find_spec("ray"):
        raise ConfigError("missing_package", what="launch=ray", package="ray")
    command = [*program(), *passed_on(cfg, run_dir, typed)]
    if (state := states([run_dir]).get(run_dir)) in (*QUEUED, *RUNNING):
        raise ConfigError(
            "{path}: job {id} is {state} for it; wait until it ends, or end it with scancel {id}",
            path=run_dir, id=_id(run_dir), state=state,
        )
    content = batch_file(cfg.launch, run_dir, command) if cfg.launch.name == "slurm" else ""
    if content and cfg.overwrite and shutil.which("sbatch"):
        # 要清掉旧的：先问它收不收
        _sbatch("--test-only", content=content)
    # 占一下：别的训练在里面、目录写不了、要清掉旧的，都在提交之前
    lock = rundir.hold(run_dir) if cfg.resume else rundir.claim(run_dir, overwrite=cfg.overwrite)
    try:
        (run_dir / JOB).mkdir(exist_ok=True)
        if content:
            submit(content, run_dir, Console())
    except BaseException:
        if not cfg.resume:
            shutil.rmtree(run_dir / JOB, ignore_errors=True)
            rundir.abandon(run_dir, lock)
        raise
    finally:
        lock.release(remove=lock.made)
    if cfg.launch.name == "ray":
        from nanogpt.run.ray_cluster import train

        train(cfg.launch, run_dir, command, Console())


def program() -> list[str]:
    """The words behind `python` that start a training as this process was started, from any folder."""
    script = Path(sys.argv[0])
    return [str(script.absolute())] if script.name == "run_train.py" else ["-m", "nanogpt", "train"]


def passed_on(cfg: TrainConfig, run_dir: Path, typed: Sequence[str]) -> list[str]:
    """What the training is told: every word as it was typed, but for where it runs and for its folder."""
    given = [typed_word.partition("=") for typed_word in typed]
    named = {key: value for key, _, value in given}
    own, pinned = [*OWN], []
    if is_latest(named.get("init_from", "")):
        # 到那时 latest 也许是另一次了
        own.append("init_from")
        pinned.append(override("init_from", cfg.init_from))
    if cfg.resume and named.get("resume") != "auto":
        where = [override("resume", run_dir)]
    else:
        where = [override("out_dir", run_dir), "resume=auto"]
    kept = [
        key + equals + value for key, equals, value in given
        if not (equals or key[:1] == "~") or not re.match(rf"[+~]*({'|'.join(own)})([.@]|$)", key)
    ]
    # 选了 launch 的也许是自己的配方：任务里不能再提交一次
    return [*kept, *pinned, *where, "launch.name=none"]


# ---- Slurm ----


def batch_file(launch: LaunchConfig, run_dir: Path, command: Sequence[str]) -> str:
    """The file that sbatch takes."""
    here, folder, each = Path.cwd(), (run_dir / JOB).absolute(), launch.processes_each
    options = {
        "job-name": run_dir.absolute().name, "nodes": launch.nodes, "ntasks-per-node": 1,
        "gres": f"gpu:{launch.gpus}" if launch.gpus else None, "cpus-per-task": launch.cpus and launch.cpus * each,
        "time": launch.minutes, "signal": f"B:USR1@{launch.grace_s}", "open-mode": "append",
        # 名字里的 % 不是记号
        "output": str(folder).replace("%", "%%") + "/slurm-%j.log",
    }
    lines = [f"#SBATCH --{name}={for_sbatch(str(value))}" for name, value in options.items() if value is not None]
    lines += ["#SBATCH --requeue", *(f"#SBATCH {launch.options}" for _ in launch.options[:1])]
    return SCRIPT.format(
        options="\n".join(lines), here=word(str(here), "sh"), id=word(str(folder / "id"), "sh"), setup=launch.setup,
        grace=launch.grace_s, cpus=f" --cpus-per-task={launch.cpus * each}" if launch.cpus else "",
        python=word(sys.executable, "sh"), processes=each, restarts=launch.restarts,
        command=" \\\n  ".join(word(one, "sh") for one in command),
    )


def for_sbatch(value: str) -> str:
    """A value as sbatch reads it in a file."""
    return value if re.fullmatch(r"[\w.,:@%+=/-]+", value) else '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def submit(content: str, run_dir: Path, console: Console) -> None:
    """Write the batch file and hand it to sbatch; where there is none, say what to type."""
    file = run_dir / JOB / "job.sbatch"
    write_text(file, content)
    typed = f"sbatch {word(file.as_posix(), 'sh')}"
    if not shutil.which("sbatch"):
        console.line(
            "no sbatch on this machine: {file} is written; where Slurm is, type:\n  {command}", file=file, command=typed
        )
        return
    number = _sbatch("--parsable", str(file)).strip().partition(";")[0]
    write_text(run_dir / JOB / "id", number + "\n")
    console.line(
        "submitted as job {id}; `nanogpt runs` shows it, what it prints comes into {log}",
        id=number, log=(run_dir / JOB / f"slurm-{number}.log").as_posix(),
    )


def _sbatch(*arguments: str, content: str = "") -> str:
    """What sbatch prints; `content` is a batch file for its stdin."""
    done = subprocess.run([shutil.which("sbatch"), *arguments], **READABLE, input=content, check=False)
    if done.returncode:
        reason = " ".join(done.stderr.replace("sbatch: error:", "").split())
        raise ConfigError(
            "launch=slurm: sbatch refuses the job ({reason}); change launch.nodes, launch.gpus or launch.options",
            reason=reason or done.returncode,
        )
    return done.stdout


READABLE = {"capture_output": True, "text": True, "encoding": "utf-8", "errors": "replace"}


def states(run_dirs: Iterable[Path]) -> dict[Path, str]:
    """What Slurm says of the jobs of these run folders; those of which it knows nothing are left out."""
    ids = {run_dir: number for run_dir in run_dirs if (number := _id(run_dir))}
    if not ids:
        return {}
    listed = ",".join(sorted(set(ids.values())))
    # 结束了几分钟的，squeue 就不认得；一个都不认得时它报错
    found = _asked("squeue", "--noheader", "--states=all", "--format=%i %T", f"--jobs={listed}")
    if set(ids.values()) - found.keys():
        found = _asked("sacct", "--noheader", "--allocations", "--format=JobID,State%30", f"--jobs={listed}") | found
    return {run_dir: found[number] for run_dir, number in ids.items() if number in found}


def _id(run_dir: Path) -> str:
    """The number of the job of a run folder, or nothing."""
    with contextlib.suppress(OSError, ValueError):
        # 目录可能来自陌生人：只认数字
        found = (run_dir / JOB / "id").read_text(encoding="ascii").strip()
        return found if re.fullmatch(r"\d{1,20}", found) else ""
    return ""


def _asked(program: str, *arguments: str) -> dict[str, str]:
    """Job -> state, of the lines that a program prints."""
    if not (path := shutil.which(program)):
        return {}
    try:
        said = subprocess.run([path, *arguments], **READABLE, input="", check=False, timeout=ASKING_S).stdout
    except (OSError, subprocess.TimeoutExpired):
        # Slurm 不应答，列表照样要有
        return {}
    rows = [line.split() for line in said.splitlines()]
    # CANCELLED by 1000、CANCELLED+
    return {row[0]: row[1].rstrip("+") for row in rows if len(row) > 1}
