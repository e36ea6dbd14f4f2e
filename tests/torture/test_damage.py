"""Random faults in run folders, data sets and weights from elsewhere: each is named before anything is made of it."""

# 意外必须一行话拒绝，或者根本不碍事：装进来的与没受伤的逐位相同；还有更早的好 checkpoint 时，要提出来，而且真的能用
# 恶意的拒绝也好、装进来也好：不许运行代码，不许卡住，不许多占内存

import contextlib
import io
import json
import os
import re
import shutil
import signal
from pathlib import Path

import faults
import pytest
import torch
from attack import POSIX, cases
from conftest import TINY, corpus_text, resume, tiny, train
from hypothesis import given
from hypothesis import strategies as st

from nanogpt.base.language import ConfigError
from nanogpt.data.opening import open_data
from nanogpt.weights import checkpoint
from nanogpt.weights.export import export
from nanogpt.weights.pretrained import build_pretrained, open_pretrained
from nanogpt.write import loading

pytestmark = [pytest.mark.torture, POSIX]
ITERATIONS, HANG_S = (4, 8, 12), 30
# 这些模型只有几千个参数：正常装入，内存几乎不涨
MOST_GROWTH_MIB = 300
CHANCE = st.randoms(use_true_random=False)
QUIET = contextlib.redirect_stdout


# ---- 材料 ----


@pytest.fixture(scope="module")
def good(tmp_path_factory, corpus_folder) -> Path:
    """Two runs of equal shape (a, b), one run of documents, one of gpt2 with a folder in Hugging Face's format, and two data sets."""
    place = tmp_path_factory.mktemp("good")
    often = ["max_iters=12", "save_interval=4", "keep=3", "eval_interval=4", "sample_tokens=0", "optimizer=muon"]
    base = [*tiny(corpus_folder), *often]
    lines = [json.dumps({"text": line[:30], "style": ("plain", "grand")[i % 2]}) for i, line in enumerate(corpus_text(3000).splitlines())]
    (place / "my.jsonl").write_text("\n".join(lines), encoding="utf-8")
    labelled = [*TINY, "dataset=labelled", "dataset.path=my.jsonl", "dataset.dir=documents", "model.block_size=48"]
    with contextlib.chdir(place), QUIET(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train(base, out="runs/a")
        train(base, "seed=9", out="runs/b")
        train([*base, *labelled], out="runs/documents")
        train(base, "arch=gpt2", "model.ngrams=[]", out="runs/gpt2")
        export(place / "runs/gpt2", place / "folder", which="last")
    shutil.copytree(corpus_folder, place / "prepared")
    return place


@pytest.fixture
def here(good, tmp_path_factory) -> Path:
    """Work in a fresh place whose folder `here` every case fills anew."""
    place = tmp_path_factory.mktemp("damaged")
    with contextlib.chdir(place):
        yield place / "here"


def fresh(here: Path, good: Path, *parts: str) -> Path:
    """`here` with copies of these parts."""
    shutil.rmtree(here, ignore_errors=True)
    for part in parts:
        shutil.copytree(good / part, here / part)
    return here


# ---- 使用 ----


def go_on(run: Path, which: str = "last") -> tuple:
    """What a run goes on from, bit for bit."""
    session = resume(run, f"checkpoint={which}", "max_iters=99")
    try:
        trainer = session._build()
        trainer.loggers.close()
    finally:
        session.lock.release()
    tensors = [*trainer.model.state_dict().values(), *(t for s in trainer.optimizer.state_dict()["state"].values() for t in s.values())]
    progress = {key: value for key, value in vars(trainer.progress).items() if key not in ("train_s", "wall_s")}
    return tuple(t.cpu().numpy().tobytes() for t in tensors), json.dumps(progress), trainer.data.fingerprint


def write_with(run: Path) -> tuple:
    """What writing starts from: weights and vocabulary of the best checkpoint."""
    model, tokenizer = loading.load(checkpoint.find_trained(run, "best", key="out_dir"), torch.device("cpu"))
    return tuple(t.numpy().tobytes() for t in model.state_dict().values()), json.dumps(tokenizer.to_dict())


def read_data(folder: Path) -> tuple:
    """A batch of a data set."""
    data = open_data(folder, 0.1)
    data.check_block_size(16)
    return tuple(t.numpy().tobytes() for t in data.rows("train", data.starts(1, 0, 4, 16), 16)), data.fingerprint


def start_from(named: Path) -> tuple:
    """Weights and vocabulary from elsewhere."""
    found = open_pretrained(str(named))
    return tuple(t.numpy().tobytes() for t in build_pretrained(found).state_dict().values()), json.dumps(found.tokenizer.to_dict())


@pytest.fixture(scope="module")
def whole(good, tmp_path_factory) -> dict:
    """What each use comes to where nothing is damaged."""
    with contextlib.chdir(tmp_path_factory.mktemp("whole")), QUIET(io.StringIO()):
        here = fresh(Path("here"), good, "runs", "prepared", "documents")
        # 从旧的接着训会把更新的挪开：先新后旧
        found = {f"iter_{n:08d}": go_on(here / "runs/a", f"iter_{n:08d}") for n in reversed(ITERATIONS)}
        fresh(here, good, "runs")
        found |= {go_on: found[f"iter_{ITERATIONS[-1]:08d}"], write_with: write_with(here / "runs/a")}
        return found | {"prepared": read_data(good / "prepared"), "documents": read_data(good / "documents")}


# ---- 审判 ----


class HungError(BaseException):
    """A load took longer than HANG_S."""

    # 不是 Exception：程序自己的 except 接不住它


def attempt(use, path: Path) -> tuple[tuple | None, ConfigError | None]:
    """(what use(path) came to, its refusal in one line): no code was run, nothing hung, nothing large was allocated."""
    import resource

    def hung(*_):
        raise HungError

    before, got, refusal = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, None, None
    signal.signal(signal.SIGALRM, hung)
    signal.setitimer(signal.ITIMER_REAL, HANG_S)
    try:
        with QUIET(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            got = use(path)
    except ConfigError as error:
        refusal = error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < MOST_GROWTH_MIB
    assert not list(Path.cwd().rglob("code-from-a-file-has-run")), "code from a file has run"
    assert refusal is None or len(str(refusal).splitlines()) == 1
    return got, refusal


def judge(whole: dict, use, run: Path) -> ConfigError | None:
    """A damaged run is refused, and the older checkpoint that is offered works; or the damage does not matter."""
    got, refusal = attempt(use, run)
    assert refusal or got == whole[use], "used although damaged"
    if refusal and use is go_on and (found := re.search(r"checkpoint=(iter_\d+)", str(refusal))):
        with QUIET(io.StringIO()):
            assert go_on(run, found[1]) == whole[found[1]]
    return refusal


def files_of(folder: Path) -> list[Path]:
    """All files of a folder that hold something."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


@pytest.mark.parametrize("name", faults.ACCIDENTS)
@cases(1, 60)
@given(chance=CHANCE, newest=st.booleans(), use=st.sampled_from([go_on, write_with]))
def test_an_accident_in_a_run_is_named_or_does_not_matter(good, whole, here, name, chance, newest, use):
    run = fresh(here, good, "runs/a") / "runs/a"
    # 一半的伤落在最新的 checkpoint 上：那里最要紧
    part = run / f"ckpt/iter_{ITERATIONS[-1]:08d}" if newest else run
    faults.ACCIDENTS[name](chance, chance.choice(files_of(part)))
    refusal = judge(whole, use, run)
    assert not (refusal and newest and use is go_on) or "checkpoint=iter_" in str(refusal), f"no older one offered: {refusal}"


@pytest.mark.parametrize("way", faults.SWAPS)
@cases(1, 50)
@given(chance=CHANCE)
def test_files_that_belong_elsewhere_are_named(good, whole, here, way, chance):
    run = fresh(here, good, "runs/a", "runs/b", "runs/documents") / "runs/a"
    faults.swap(way, chance, run, here / "runs/b", ITERATIONS)
    judge(whole, go_on, run)


@pytest.mark.parametrize("name", faults.ACCIDENTS)
@cases(1, 25)
@given(chance=CHANCE, which=st.sampled_from(["prepared", "documents"]))
def test_an_accident_in_a_data_set_is_named_or_does_not_matter(good, whole, here, name, chance, which):
    folder = fresh(here, good, which) / which
    faults.ACCIDENTS[name](chance, chance.choice(files_of(folder)))
    got, refusal = attempt(read_data, folder)
    assert refusal or got == whole[which], "used although damaged"


@pytest.mark.parametrize("way", faults.IN_A_CHECKPOINT)
@cases(1, 60)
@given(chance=CHANCE, use=st.sampled_from([go_on, write_with]))
def test_malice_in_a_checkpoint_runs_no_code(good, here, way, chance, use):
    run = fresh(here, good, "runs/a") / "runs/a"
    faults.in_a_checkpoint(way, chance, run / f"ckpt/iter_{ITERATIONS[-1]:08d}", here.parent / "code-from-a-file-has-run")
    attempt(use, run)


@pytest.mark.parametrize("way", faults.IN_DATA)
@cases(1, 40)
@given(chance=CHANCE, which=st.sampled_from(["documents", "prepared"]))
def test_malice_in_a_data_set_runs_no_code(good, here, way, chance, which):
    folder = fresh(here, good, which) / which
    faults.in_data(way, chance, folder, here.parent / "code-from-a-file-has-run")
    attempt(read_data, folder)


@pytest.mark.parametrize("way", faults.IN_WEIGHTS)
@cases(1, 40)
@given(chance=CHANCE)
def test_malice_in_weights_from_elsewhere_runs_no_code(good, here, way, chance):
    attempt(start_from, faults.in_weights(way, chance, fresh(here, good, "folder"), here.parent / "code-from-a-file-has-run"))


def test_the_judge_sees_code_that_runs(here):
    import pickle

    here.mkdir()
    planted = faults.Planted(here.parent / "code-from-a-file-has-run")
    with pytest.raises(AssertionError, match="code from a file has run"):
        attempt(lambda path: pickle.loads(pickle.dumps(planted)), here)
    assert os.path.exists(planted.sentinel)
