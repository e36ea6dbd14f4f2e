"""Run folders: one run in each, whole or not there, and able to go on from the first moment."""

import contextlib
import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_config, new_session, new_trainer, resume, resumed_trainer, train
from test_trainer import records, weights

from nanogpt.base import console, files, run_names
from nanogpt.base.config import ROOT
from nanogpt.base.language import ConfigError
from nanogpt.base.lock import Lock, only_one, remove_stale
from nanogpt.data import corpus
from nanogpt.run import loggers, rundir, saving
from nanogpt.weights import checkpoint

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail(*_, **__):
    raise FULL


# ---- 锁 ----


def test_a_lock_is_held_once_and_goes_with_its_holder(tmp_path):
    one, two = Lock(tmp_path / "lock"), Lock(tmp_path / "lock")
    assert one.take() and not two.take() and two.holder() == str(os.getpid())
    one.release()
    one.release()
    assert two.take()
    two.release(remove=True)
    assert not (tmp_path / "lock").exists()
    code = f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path; from nanogpt.base.lock import Lock; Lock(Path('lock')).take(); os._exit(9)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False)
    assert one.take()
    one.release()


@pytest.mark.skipif(os.name == "nt", reason="an open file cannot be removed there")
def test_a_lock_on_a_removed_file_is_none(tmp_path, monkeypatch):
    import fcntl

    one, two, real = Lock(tmp_path / "lock"), Lock(tmp_path / "lock"), fcntl.flock

    def removed_meanwhile(file, how):
        (tmp_path / "lock").unlink(missing_ok=True)
        return real(file, how)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", removed_meanwhile)
        assert not one.take()
    assert two.take()
    two.release()


def test_what_a_killed_holder_left_is_removed_and_what_is_held_stays(tmp_path):
    path = tmp_path / ".data.lock"
    path.write_bytes(b"1\n")
    remove_stale(path)
    assert not path.exists()
    with only_one(path):
        remove_stale(path)
        assert path.exists()
    assert not path.exists()
    remove_stale(path)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"no number", b"\x001", b"1" * 5000])
def test_whatever_a_lock_file_holds_blocks_nobody(tmp_path, content):
    (tmp_path / "lock").write_bytes(content)
    lock = Lock(tmp_path / "lock")
    assert lock.holder() == (content[1:21].decode("ascii") if content[-1:] == b"1" else "?") and lock.take()
    lock.release()


@pytest.mark.skipif(os.name == "nt", reason="file systems there need not know hard links")
def test_nothing_is_written_through_hard_links_in_a_run_folder(own_run):
    run, mine = own_run / "outputs/run", {}
    for name in ("lock", "metrics.jsonl", "run.json", "config.yaml", "tokenizer.json", "summary.json"):
        path = own_run / f"my-{name}"
        (run / name).touch()
        path.hardlink_to(run / name)
        mine[path] = path.read_bytes()
    resumed = resume("outputs/run", "max_iters=8")
    assert Lock(run / "lock").take() is False
    resumed.run()
    assert {path: path.read_bytes() for path in mine} == mine
    assert records()[-1]["iteration"] == 8
    assert (run / "metrics.jsonl").read_bytes().startswith(mine[own_run / "my-metrics.jsonl"])


# ---- 一个目录一次训练 ----


@pytest.mark.parametrize("file", ["notes.txt", "ckpt/best.pt", "ckpt/iter_3.pt", "data/measured.csv"])
def test_a_folder_that_holds_something_of_another_program_is_never_emptied(tmp_path, file):
    for name in ("config.yaml", "run.json", file):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="not a run's"):
        rundir.claim(tmp_path, overwrite=True)
    assert all((tmp_path / name).read_text(encoding="utf-8") == "mine" for name in ("config.yaml", "run.json", file))


def test_a_second_run_in_the_folder_is_refused_while_the_first_lives(in_tmp, tiny_overrides):
    first = new_session(tiny_overrides)
    trainer = first._build()
    for second in (lambda: new_trainer(tiny_overrides), lambda: new_trainer(tiny_overrides, "overwrite=true"), lambda: resume("outputs/run")):
        with pytest.raises(ConfigError, match=rf"outputs/run: process {os.getpid()} is training there"):
            second()
    trainer.fit()
    first.lock.release()
    assert resumed_trainer("outputs/run", "max_iters=8").fit()["iters"] == 8


def test_two_runs_that_took_the_same_name_get_a_folder_each(in_tmp, tiny_overrides):
    cfg = make_config(*tiny_overrides)
    from nanogpt.run.session import Session

    named = in_tmp / "outputs" / "same"
    sessions = [Session.new(cfg, named) for _ in range(2)]
    folders = [s._build().saver.run_dir for s in sessions]
    assert folders[0] == named != folders[1] and (folders[1] / "run.json").is_file()


def test_a_run_without_a_checkpoint_begins_again_and_ends_the_same(in_tmp, tiny_overrides, capsys):
    whole = train(tiny_overrides)
    new_trainer(tiny_overrides, out="outputs/killed")
    assert not checkpoint.checkpoints(Path("outputs/killed"))
    again = resume("outputs/killed")
    trainer = again._build()
    again._announce(trainer)
    trainer.fit()
    assert "outputs/killed has no checkpoint yet: beginning again" in capsys.readouterr().out
    assert (weights(trainer.model) == weights(whole.model)).all() and trainer.saver.run_id == rundir.read_record(Path("outputs/killed")).id


def test_a_run_of_an_earlier_version_gets_an_id_and_keeps_its_checkpoints(in_tmp, tiny_overrides):
    train(tiny_overrides, "keep=9")
    Path("outputs/run/run.json").unlink()
    resumed_trainer("outputs/run", "max_iters=8").fit()
    found = checkpoint.listed(Path("outputs/run"))
    assert not found.bad and {c.run for c in found.good} == {rundir.read_record(Path("outputs/run")).id}


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": 2, "id": "x", "config": "y"}', '{"format": 1, "id": 5}'])
def test_a_damaged_record_is_named_and_written_anew_from_the_rest(own_run, content, capsys):
    run = own_run / "outputs/run"
    known = rundir.read_record(run).id
    (run / "run.json").write_text(content, encoding="utf-8")
    held = resume("outputs/run", "max_iters=20")
    held._claim_folder("model: {}")
    assert "run.json is damaged" in capsys.readouterr().err and rundir.read_record(run).id == known
    held.lock.release()


def test_a_record_of_a_newer_version_is_kept_and_said(own_run):
    file = own_run / "outputs/run/run.json"
    file.write_text('{"format": 9}', encoding="utf-8")
    with pytest.raises(ConfigError, match="has format 9.*update nanogpt"):
        resume("outputs/run", "max_iters=20")
    assert file.read_text(encoding="utf-8") == '{"format": 9}'


@pytest.mark.parametrize("content", [None, '{"format": 2'])
def test_a_run_without_checkpoint_and_record_begins_again_and_has_one_way_out(in_tmp, tiny_overrides, content):
    new_trainer(tiny_overrides, "max_iters=3")
    run, config = Path("outputs/run"), Path("outputs/run/config.yaml").read_text(encoding="utf-8")
    (run / "run.json").unlink()
    if content:
        (run / "run.json").write_text(content, encoding="utf-8")
    again = resume("outputs/run")
    assert again.begun_again and again.cfg.max_iters == 3 and again._build().saver.run_id == rundir.read_record(run).id
    again.lock.release()
    for left in ("model: [", None):
        (run / "run.json").unlink(missing_ok=True)
        (run / "config.yaml").unlink()
        if left:
            (run / "config.yaml").write_text(left, encoding="utf-8")
        with pytest.raises(ConfigError, match="type the first command again with out_dir=outputs/run overwrite=true"):
            resume("outputs/run")
        (run / "config.yaml").write_text(config, encoding="utf-8")
    (run / "config.yaml").unlink()
    new_trainer(tiny_overrides, "overwrite=true")
    # 只剩一个名字相同的文件，认不出是训练：不劝人覆盖它
    Path("outputs/odd").mkdir()
    Path("outputs/odd/config.yaml").write_text("model: [", encoding="utf-8")
    with pytest.raises(ConfigError, match="type the first command again with another out_dir"):
        resume("outputs/odd")


def test_a_run_is_named_by_its_folder_by_what_is_in_it_and_by_latest(own_run):
    run_names.remember(Path("outputs/run"))
    for named, which in (
        ("outputs/run", "last"), ("outputs/run/ckpt", "last"), ("latest", "last"), ("outputs/latest", "last"), (str(run_names.LATEST.absolute()), "last"),
        ("outputs/run/ckpt/iter_00000003", "iter_00000003"), ("outputs/run/ckpt/iter_00000003/", "iter_00000003"),
    ):
        assert run_names.names_run(named) and run_names.locate(named).absolute() == Path("outputs/run").absolute(), named
        assert run_names.checkpoint_in(named, None, "last") == which
    assert run_names.checkpoint_in("outputs/run", "best", "last") == "best"
    with pytest.raises(ConfigError, match="checkpoint=best is not the checkpoint outputs/run/ckpt/iter_00000003"):
        run_names.checkpoint_in("outputs/run/ckpt/iter_00000003", "best", "last")
    with contextlib.chdir("outputs/run/ckpt"):
        assert run_names.locate("iter_00000003") == own_run / "outputs/run"


def test_groups_and_recipes_of_ones_own_folder_are_read_on_resume_and_for_fine_tuning(own_run, monkeypatch):
    for name, content in {
        "experiment/mine": "# @package _global_\nmax_iters: 3\nmodel:\n  dropout: 0.1\n",
        "tweak/low": "# @package _global_\ndefaults:\n  - override /memory: lean\nlearning_rate: 1e-4\ndropout: 0.2\n",
        "tweak/wide": "# @package _global_\nmodel:\n  n_embd: 32\n",
    }.items():
        (own_run / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (own_run / "conf" / f"{name}.yaml").write_text(content, encoding="utf-8")
    searched = f"hydra.searchpath=[file://{own_run / 'conf'}]"
    monkeypatch.setattr(sys, "argv", ["run_train.py", searched])
    source = checkpoint.find(Path("outputs/run"), "last")

    def resumed(*overrides):
        return rundir.resumed_config(source.config_text(), make_config(searched, *overrides, checked=False), list(overrides), source.folder)

    cfg = resumed("+tweak=low", "max_iters=9")
    assert (cfg.learning_rate, cfg.dropout, cfg.model.dropout, cfg.max_iters) == (1e-4, 0.2, 0.2, 9)
    assert cfg.memory.activation_checkpointing != "none" and cfg.groups["tweak"] == "low"
    # 换成默认的那一项，也是换
    assert resumed("memory=default", "arch=modern", "model=tiny").model == resumed().model
    for typed, said in (("+tweak=wide", r"model\.n_embd cannot change on resume \(16 -> 32\)"), ("experiment=mine", "experiment cannot change"),
                        ("model=small", "^model=small: model.block_size cannot change .*leave model=small out"), ("arch=gpt2", "^arch=gpt2: model.activation cannot change"),
                        ("seed=5", "^seed cannot change .*leave it out"), ("optimizer=adamw", r"^optimizer=adamw: optimizer\._target_ cannot change")):
        with pytest.raises(ConfigError, match=said):
            resumed(typed)
    # 同一种优化器可以调
    assert resumed("optimizer=muon", "optimizer.weight_decay=0.25").optimizer["weight_decay"] == 0.25
    fresh = make_config(searched, "experiment=mine", checked=False)
    assert rundir.typed_model_fields(["experiment=mine"], fresh.model) == {"dropout"}
    assert rundir.typed_model_fields(["model=tiny", "arch=gpt2", "model.n_head=2"], fresh.model) == {"_target_", "n_layer", "n_head", "n_embd", "arch"}


@pytest.mark.parametrize("there", [False, True])
def test_a_refused_resume_leaves_no_lock_that_was_not_there(own_run, there):
    lock = own_run / "outputs/run/lock"
    lock.unlink(missing_ok=True)
    if there:
        lock.touch()
    with pytest.raises(ConfigError, match="checkpoint=nope"):
        resume("outputs/run", "checkpoint=nope")
    assert lock.exists() == there


def test_latest_that_says_nothing_useful_is_one_line(in_tmp):
    Path("outputs").mkdir()
    # 空的名字就是当前文件夹：它恰好是训练目录，也不是 latest 的意思
    Path("ckpt").mkdir()
    for content in (b"", b"\0" * 40, b"\xff\xfe", b"nowhere\n"):
        run_names.LATEST.write_bytes(content)
        with pytest.raises(ConfigError, match="there is no checkpoint in it"):
            run_names.locate("latest")


def test_leftovers_of_killed_starts_do_not_keep_anyone_out(in_tmp, tiny_overrides):
    run = Path("outputs/run")
    run.mkdir(parents=True)
    (run / "lock").write_bytes(b"1\n")
    (run / ".config.yaml.abcd.tmp").write_bytes(b"half")
    (run / ".data.abcd.tmp").mkdir()
    (run / "ckpt").mkdir()
    rundir.choose(make_config(*tiny_overrides, "out_dir=outputs/run"))
    train(tiny_overrides)
    assert not list(run.rglob(".*.tmp"))


def test_what_a_kill_behind_the_last_save_left_is_removed_though_nothing_is_left_to_do(own_run):
    doomed = own_run / "outputs/run/ckpt/.iter_00000001.old.tmp"
    doomed.mkdir()
    done = checkpoint.find(Path("outputs/run"), "last").iteration
    with pytest.raises(ConfigError, match="already stands at"):
        resume("outputs/run", f"max_iters={done}")
    assert not doomed.exists()


def test_a_folder_that_cannot_be_synced_stops_nothing_but_a_file_does(tmp_path, monkeypatch):
    def refuse(_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    files.make_folder(tmp_path / "a/b")
    with pytest.raises(OSError, match="Invalid"):
        files.write_text(tmp_path / "a/b/c", "x")
    assert not list((tmp_path / "a/b").iterdir())


# ---- 写不下 ----


@pytest.mark.parametrize("place", ["only_one", "write_tokens"])
def test_a_data_set_that_cannot_be_written_is_one_line_and_leaves_nothing(in_tmp, monkeypatch, place):
    Path("my.txt").write_text("ab" * 500, encoding="utf-8")
    monkeypatch.setattr(corpus, place, fail)
    options = {"path": "my.txt", "tokenizer": "char", "encoding": "auto", "val_fraction": 0.1, "vocab_size": None}
    with pytest.raises(ConfigError, match=r"data set text_file could not be prepared: .*No space left"):
        corpus.prepare("text_file", str(in_tmp / "made" / "d"), options)
    assert not (in_tmp / "made").exists()


@pytest.mark.parametrize("target", [(run_names, "write_sealed"), (run_names, "remember"), (loggers.JsonlLogger, "open")])
def test_a_run_that_cannot_begin_leaves_nothing(in_tmp, tiny_overrides, monkeypatch, target):
    monkeypatch.setattr(*target, fail)
    with pytest.raises(ConfigError, match=r"out_dir=outputs/run cannot be written .*No space left"):
        new_trainer(tiny_overrides)
    assert not Path("outputs").exists()


def test_a_folder_below_a_file_is_refused_before_anything_is_built(in_tmp, tiny_overrides):
    Path("a_file").touch()
    with pytest.raises(ConfigError, match="out_dir=a_file/x cannot be written .*a_file is not a folder"):
        rundir.choose(make_config(*tiny_overrides, "out_dir=a_file/x"))


def test_a_run_whose_logger_refuses_leaves_nothing_and_a_resumed_one_as_it_was(own_run, tiny_overrides, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no key\nhere")

    monkeypatch.setattr(loggers.TensorBoardLogger, "open", refuse)
    others = [o for o in tiny_overrides if o != "logger=none"]
    kept = {path.name for path in Path("outputs/run/ckpt").iterdir()}
    latest = run_names.LATEST.read_text(encoding="utf-8")
    older = ("checkpoint=iter_00000003", "max_iters=9")
    for attempt in (
        lambda: new_session(others, "logger=tensorboard", out="a/b/c"),
        lambda: resume("outputs/run", "logger=tensorboard", *older),
    ):
        with pytest.raises(ConfigError, match=r"TensorBoardLogger refuses to begin \(RuntimeError: no key here\); .*=none"):
            attempt().run()
    assert not Path("a").exists() and {path.name for path in Path("outputs/run/ckpt").iterdir()} == kept
    assert run_names.LATEST.read_text(encoding="utf-8") == latest
    assert resumed_trainer("outputs/run", "max_iters=7").fit()["iters"] == 7


def test_a_logger_that_fails_later_is_one_line_and_the_run_goes_on(in_tmp, tiny_overrides, capsys):
    class Own:
        def open(self, *_):
            pass

        def log(self, *_):
            raise RuntimeError("the service is gone")

        text = close = log

    trainer = new_trainer(tiny_overrides)
    trainer.loggers._backends.insert(0, Own())
    assert trainer.fit()["iters"] == 6 and records()[-1]["iteration"] == 6
    assert capsys.readouterr().err.count("Own cannot write (RuntimeError: the service is gone)") == 1


def test_a_save_that_failed_is_tried_again_before_the_next_one_is_due(in_tmp, tiny_overrides, monkeypatch, capsys):
    real, fails = checkpoint.save, [1, 1]
    monkeypatch.setattr(saving, "RETRY_S", 0)
    monkeypatch.setattr(checkpoint, "save", lambda *a, **k: fail() if fails and fails.pop() else real(*a, **k))
    train(tiny_overrides, "save_interval=2", "max_iters=6", "keep=9")
    assert capsys.readouterr().out.count("could not save a checkpoint (No space left on device)") == 2
    # 第 2 步该存没存上，第 3 步重试又失败，第 4 步补上
    assert [c.iteration for c in checkpoint.checkpoints(Path("outputs/run"))] == [4, 6]


def test_a_save_that_failed_is_not_tried_at_every_interval_until_it_is_time(in_tmp, tiny_overrides, monkeypatch, capsys):
    real, tried = checkpoint.save, []
    monkeypatch.setattr(checkpoint, "save", lambda *a, **k: tried.append(k["iteration"]) or (fail() if len(tried) == 1 else real(*a, **k)))
    train(tiny_overrides, "save_interval=1", "max_iters=6")
    # 60 秒里到了间隔也不写；第 3 步评估出了最好的，不等
    assert tried == [1, 3, 4, 5, 6] and capsys.readouterr().out.count("could not save a checkpoint") == 1


def test_a_vocabulary_damaged_during_the_run_does_not_spread(in_tmp, tiny_overrides):
    trainer = new_trainer(tiny_overrides)
    (in_tmp / "outputs/run/tokenizer.json").write_text("rubbish", encoding="utf-8")
    trainer.fit()
    saved = checkpoint.find(Path("outputs/run"), "last").folder / "tokenizer.json"
    assert json.loads(saved.read_text(encoding="utf-8")) == trainer.data.tokenizer.to_dict()


def test_metrics_on_a_full_disk_wait_and_no_line_is_torn(in_tmp, tiny_overrides, monkeypatch, capsys):
    class Disk(io.RawIOBase):
        def __init__(self):
            self.written, self.room = b"", 10**6

        def write(self, content):
            if not self.room:
                raise FULL
            taken = content[: self.room]
            self.written += taken
            self.room -= len(taken)
            return len(taken)

    trainer = new_trainer(tiny_overrides)
    logger = trainer.loggers._backends[0]
    logger._file, disk = Disk(), None
    disk = logger._file
    for n in range(4):
        disk.room = (10**6, 7, 0, 10**6)[n]
        trainer.loggers.log(n, {"loss": 1.0})
    assert [json.loads(line)["iteration"] for line in disk.written.splitlines()] == [0, 1, 2, 3]
    assert capsys.readouterr().err.count("JsonlLogger cannot write") == 1
    disk.room = 0
    monkeypatch.setattr(loggers, "MOST_PENDING", 200)
    for n in range(50):
        trainer.loggers.log(n, {"loss": 1.0})
    disk.room = 10**6
    trainer.loggers.log(50, {})
    lines = [json.loads(line)["iteration"] for line in disk.written.splitlines()[4:]]
    assert lines == list(range(51 - len(lines), 51)) and 2 < len(lines) < 20


# ---- 没人看 ----


def test_when_nobody_reads_any_more_the_run_saves_and_stops(in_tmp, tiny_overrides, monkeypatch):
    held = new_session(tiny_overrides, "max_iters=500", "eval_interval=500")
    printed = []

    def write(line):
        printed.append(line)
        if len(printed) > 6:
            raise BrokenPipeError

    monkeypatch.setattr(held.console, "_file", type("Pipe", (io.StringIO,), {"write": staticmethod(write)})())
    with pytest.raises(BrokenPipeError):
        held.run()
    stopped = checkpoint.find(Path("outputs/run"), "last").iteration
    assert 0 < stopped < 500 and records()[-1]["iteration"] == stopped


def test_a_full_disk_under_the_log_costs_lines_only(monkeypatch):
    shown = console.Console()
    monkeypatch.setattr(shown, "_file", type("Full", (io.StringIO,), {"write": staticmethod(fail)})())
    shown.plain("x")
    assert not shown.gone


def test_folders_that_were_made_for_nothing_are_taken_away(in_tmp):
    (in_tmp / "there").mkdir()
    files.check_writable(Path("there/new/deep/x.txt"))
    with pytest.raises(OSError), files.folders_around(Path("new/../there/deep/x")):
        assert not Path("new").exists() and Path("there/deep").is_dir()
        raise OSError
    assert [path.name for path in in_tmp.rglob("*")] == ["there"]
    (in_tmp / "there" / "x.txt").write_text("kept", encoding="utf-8")
    files.check_writable(Path("there/x.txt"))
    with files.folders_around(Path("new/y.txt")):
        Path("new/y.txt").touch()
    assert Path("new/y.txt").is_file() and Path("there/x.txt").read_text(encoding="utf-8") == "kept"
    if os.name != "nt":
        Path("link").symlink_to("there/y.txt")
        files.check_writable(Path("link"))
        assert Path("link").is_symlink() and not Path("there/y.txt").exists()
    with pytest.raises(ConfigError, match="not a folder"):
        rundir.choose(make_config("out_dir=nope/../there/x.txt"))


def test_a_file_where_a_data_set_should_go_is_refused_and_kept(in_tmp):
    Path("a.txt").write_text("ab" * 500, encoding="utf-8")
    Path("mine").write_text("kept", encoding="utf-8")
    options = {"path": "a.txt", "tokenizer": "char", "encoding": "auto", "val_fraction": 0.1, "vocab_size": 300}
    with pytest.raises(ConfigError, match=r"could not be prepared: mine \(Not a directory\)"):
        corpus.prepare("text_file", "mine", options)
    with pytest.raises(NotADirectoryError), files.folder_aside(Path("mine")):
        raise AssertionError("no work is done first")
    assert Path("mine").read_text(encoding="utf-8") == "kept" and len(list(in_tmp.iterdir())) == 2


@pytest.mark.parametrize("text", ["", None])
def test_a_data_set_that_is_refused_leaves_no_folder_on_the_way(in_tmp, text):
    if text is not None:
        Path("a.txt").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="a.txt"):
        corpus.prepare("text_file", "new/deep/prepared", {"path": "a.txt", "tokenizer": "char", "encoding": "auto", "val_fraction": 0.1, "vocab_size": 300})
    assert not Path("new").exists()
