"""kill -9 at any moment: the run goes on bit-exactly, repeats at most one checkpoint interval, and leaves no litter."""

# 每个案例是一次训练的一生：开始，在随机的时刻被杀几次，最后走完；结果必须与从未被杀的那一次逐位相同
# 时刻有五种：任意时刻、正在保存、正在删旧的、刚开始、某一次改动文件之前

import functools
import json
from pathlib import Path

import pytest
from attack import LONG, POSIX, RUN, SAVE_INTERVAL, TINY, cases, empty, finished, litter, new_place, outcome, train
from hypothesis import given
from hypothesis import strategies as st

from nanogpt.weights import checkpoint

pytestmark = [pytest.mark.torture, POSIX]
KINDS = {
    "fp16-adamw": ("precision=fp16", "optimizer=adamw"), "fp32-muon": (), "minimal": ("memory=minimal",),
    "lean8": ("memory=lean8", "gradient_accumulation_steps=2"),
}
# 盯着哪些文件出现
WATCHED = {"inside a save": "ckpt/.iter_*.tmp", "while old ones are deleted": "ckpt/.iter_*.old.tmp", "at the start": "lock"}
# machine 会让进程把次正规数当零，那时 hypothesis 抽不了浮点数
SHARE = st.integers(0, 1000).map(lambda n: n / 1000)
KILLS = st.one_of(
    st.tuples(st.sampled_from(["before a change of a file", "any moment"]), SHARE),
    st.tuples(st.sampled_from(list(WATCHED)), SHARE.map(lambda share: share * 0.01)),
)


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    """never_killed(kind) -> (folder, what the run came to, its seconds, its changes of files)."""

    @functools.cache
    def of(kind: str) -> tuple:
        folder = new_place(tmp_path_factory.mktemp(kind))
        ended = train([*TINY, *KINDS[kind], f"out_dir={RUN}"], folder, kill_at_change=10**9)
        assert ended.code == 0, ended.output
        return folder, outcome(folder / RUN), ended.seconds, ended.changes

    return of


def how(name: str, share: float, run: Path, seconds: float, changes: int) -> dict:
    """What train() has to do for a kill."""
    if name == "any moment":
        return {"kill_after_s": share * seconds}
    if name == "before a change of a file":
        return {"kill_at_change": 1 + int(share * (changes - 1))}
    return {"watch": lambda: any(run.glob(WATCHED[name])), "kill_after_s": share}


def logged(run: Path) -> int:
    """The last iteration in metrics.jsonl, whose last line may be torn."""
    path, last = run / "metrics.jsonl", 0
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        last = last if "event" in record else record["iteration"]
    return last


@cases(1, 120)
@given(kind=st.sampled_from(list(KINDS) if LONG else ["fp16-adamw"]), kills=st.lists(KILLS, min_size=1, max_size=3 if LONG else 1))
def test_a_killed_run_goes_on_bit_exactly_and_repeats_at_most_one_interval(never_killed, kind, kills):
    folder, whole, seconds, changes = never_killed(kind)
    run = folder / RUN
    empty(folder)

    def arguments():
        # 还没有 run.json：照它自己说的，把命令再敲一遍
        return [f"resume={RUN}", "lang=en"] if (run / "run.json").is_file() else [*TINY, *KINDS[kind], f"out_dir={RUN}"]

    for name, share in kills:
        ended = train(arguments(), folder, **how(name, share, run, seconds, changes))
        if not ended.killed:
            assert finished(ended), ended.output
            break
        found = checkpoint.listed(run).good if run.is_dir() else []
        assert logged(run) - (found[-1].iteration if found else 0) <= SAVE_INTERVAL
    if not (run / "summary.json").is_file():
        ended = train(arguments(), folder)
        assert finished(ended), ended.output
    assert outcome(run) == whole and not litter(folder)
