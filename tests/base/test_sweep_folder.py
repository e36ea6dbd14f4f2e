"""A sweep in which nothing was made leaves no folder; whatever was there before, or came to lie there, stays."""

import re
import shlex
from pathlib import Path

import pytest
from hydra.core.utils import setup_globals
from omegaconf import OmegaConf
from test_loading import sample
from typed import typed

from nanogpt.base.sweep_folder import SweepFolder, tidy_latest

REFUSED = ("-m", "dataset=text_file", "dataset.path=nope.txt", "logger=none", "lang=en")


@pytest.mark.parametrize("swept", [["batch_size=0,-1"], ["dataset.dir=a,b", "hydra.sweep.dir=new/deep"]])
def test_a_sweep_whose_every_job_is_refused_leaves_nothing(tmp_path, swept):
    done = typed("run_train.py", tmp_path, *REFUSED, *swept, expect=2)
    assert done.stderr.count("error: ") == 2 and not list(tmp_path.iterdir())


def test_a_sweep_that_would_train_in_one_folder_is_refused_before_its_first_job(tmp_path):
    (tmp_path / "my.txt").write_text("The quick brown fox.\n" * 60, encoding="utf-8")
    sweep = ["-m", "dataset=text_file", "dataset.path=my.txt", "lang=en", "learning_rate=1e-3,1e-2", "max_iters=1"]
    error = typed("run_train.py", tmp_path, *sweep, "out_dir=outputs/a b", expect=2).stderr
    assert error.count("error: ") == 1 and "several jobs of this sweep would train in this one folder" in error
    assert [path.name for path in tmp_path.iterdir()] == ["my.txt"]
    remedy = shlex.split(error.partition("or write ")[2])[0]
    asked = [*sweep, remedy, "dataset.val_fraction=5"]
    # 换成它就不再撞上，只剩后面的错
    assert "dataset.val_fraction=5" in typed("run_train.py", tmp_path, *asked, expect=2).stderr
    (tmp_path / "outputs/a/ckpt").mkdir(parents=True)
    error = typed("run_train.py", tmp_path, "-m", "resume=outputs/a", "max_iters=5,6", "lang=en", expect=2).stderr
    assert "resume=outputs/a: several jobs" in error


def test_one_wrong_job_of_a_sweep_is_found_before_the_first_is_trained(tmp_path):
    (tmp_path / "a, b.txt").write_text("The quick brown fox.\n" * 60, encoding="utf-8")
    wrong = [
        ["dataset.path='a, b.txt',no (1).txt"], ["dataset.path=a, b.txt", "learning_rate=1e-3,-1"],
        ["dataset.path='a, b.txt'", "dataset.val_fraction=0.1,5"],
    ]
    named = ["dataset.path=no (1).txt", "dataset.path=b.txt", "dataset.val_fraction=5"]
    for swept, name in zip(wrong, named):
        error = typed("run_train.py", tmp_path, "-m", "dataset=text_file", *swept, "lang=en", expect=2).stderr
        assert name in error and [path.name for path in tmp_path.iterdir()] == ["a, b.txt"], error


def test_what_lay_in_the_folder_of_a_refused_sweep_stays(tmp_path):
    kept = [tmp_path / "mine" / name for name in ("multirun.yaml", "empty", "0")]
    kept[0].parent.mkdir()
    kept[0].write_text("a: 1\n", encoding="utf-8")
    kept[1].mkdir()
    kept[2].mkdir()
    typed("run_train.py", tmp_path, *REFUSED, "hydra.sweep.dir=mine", "batch_size=0,-1", expect=2)
    assert sorted(tmp_path.rglob("*")) == sorted([tmp_path / "mine", *kept])


def test_a_sweep_that_hydra_itself_refuses_leaves_nothing(tmp_path):
    assert "batch_size" in typed("run_train.py", tmp_path, *REFUSED, "batch_size=2,four", expect=2).stderr
    assert not list(tmp_path.iterdir())


def test_a_sweep_over_samplers_writes_text_and_no_folder_and_one_that_made_something_keeps_it(own_run):
    before = sorted(own_run.rglob("*"))
    done = sample(own_run, "-m", "sampler=greedy,top_k", "start=the", "max_new_tokens=4", "fast=false")
    assert done.stdout.count("the") >= 2 and sorted(p for p in own_run.rglob("*") if p.name != "lock") == [p for p in before if p.name != "lock"]
    SweepFolder().on_multirun_start(sweep_config("mine"))
    (own_run / "mine" / "0").mkdir(parents=True)
    (own_run / "mine" / "multirun.yaml").touch()
    (own_run / "mine" / "0" / "log.txt").touch()
    tidy_latest()
    assert len(list((own_run / "mine").rglob("*"))) == 3


def sweep_config(folder):
    """What Hydra hands to a callback, as far as it is looked at; read-only as there."""
    made = OmegaConf.create({"hydra": {"sweep": {"dir": folder}, "overrides": {"hydra": []}}})
    OmegaConf.set_readonly(made, True)
    return made


@pytest.fixture
def always_now():
    """A clock that stands still."""
    setup_globals()
    OmegaConf.register_new_resolver("now", lambda pattern: "now", replace=True)
    yield
    setup_globals()


def test_two_sweeps_of_the_same_second_get_a_folder_each(in_tmp, always_now):
    first, second, third = (sweep_config("outputs/sweeps/${now:%H}") for _ in range(3))
    for config in (first, second, third):
        SweepFolder().on_multirun_start(config)
    assert [Path(config.hydra.sweep.dir).name for config in (first, second, third)] == ["now", "now-2", "now-3"]
    assert second.hydra.overrides.hydra == ["hydra.sweep.dir='outputs/sweeps/now-2'"]
    mine = sweep_config("outputs/sweeps/now")
    SweepFolder().on_multirun_start(mine)
    assert mine.hydra.sweep.dir == "outputs/sweeps/now" and not mine.hydra.overrides.hydra
    tidy_latest()
    assert sorted(path.name for path in Path("outputs/sweeps").iterdir()) == ["now", "now-2", "now-3"]


def test_the_jobs_of_a_sweep_go_to_the_folder_that_was_free(in_tmp):
    # Hydra 自己的 now 随时会变：占住接下来的每一秒
    for second in range(60):
        Path(f"taken-{second:02}").mkdir()
    sweep = ["-m", "experiment=fit", "hydra.sweep.dir='taken-${now:%S}'", "dataset=text_file", "dataset.path=nope.txt", "batch_size=0,-1"]
    typed("run_train.py", in_tmp, *sweep, expect=1)
    found = sorted(path.relative_to(in_tmp).as_posix() for path in in_tmp.rglob("trial.json"))
    assert len(found) == 2 and all(re.fullmatch(rf"taken-\d\d-2/{n}/trial.json", name) for n, name in enumerate(found))
