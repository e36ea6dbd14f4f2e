"""Checkpoints: whole or absent, verified, pruned without losing the best."""

import pytest
import torch
from conftest import GPT2_RECIPE, tiny_model_config

from nanogpt import checkpoint
from nanogpt.build import build_model
from nanogpt.messages import ConfigError


@pytest.fixture
def saver(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    model = build_model(tiny_model_config(), 0)

    def save(iteration, val_loss=None, keep=2, model=model):
        return checkpoint.save(
            tmp_path, model=model, state={"n": iteration, "t": torch.arange(3)}, iteration=iteration, val_loss=val_loss,
            config_text="a: 1\n", tokenizer_file=tmp_path / "tokenizer.json", keep=keep,
        )

    return save


def names(run):
    return [c.name for c in checkpoint.checkpoints(run)]


@pytest.mark.parametrize("recipe", [{}, GPT2_RECIPE])
def test_what_is_saved_is_loaded_to_the_bit(tmp_path, saver, recipe):
    model = build_model(tiny_model_config(**recipe), 1)
    saver(7, model=model)
    other = build_model(tiny_model_config(**recipe), 2)
    found = checkpoint.find(tmp_path, "last")
    found.load_model(other)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    assert found.load_state()["n"] == 7 and found.config_text() == "a: 1\n"
    if recipe:
        assert other.lm_head.weight.data_ptr() == other.wte.weight.data_ptr()


def test_pruning_keeps_the_newest_and_the_best(tmp_path, saver):
    for iteration, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, 2.5), (50, 2.2)):
        saver(iteration, loss)
    assert names(tmp_path) == ["iter_00000020", "iter_00000040", "iter_00000050"]
    assert checkpoint.find(tmp_path, "best").iteration == 20 and checkpoint.find(tmp_path, "last").iteration == 50


def test_an_older_checkpoint_can_be_named(tmp_path, saver):
    saver(1)
    saver(2)
    assert checkpoint.find(tmp_path, "iter_00000001").iteration == 1
    with pytest.raises(ConfigError, match=r"checkpoint=iter_9: .* choose one of: last, best, iter_00000001, iter_00000002"):
        checkpoint.find(tmp_path, "iter_9")
    with pytest.raises(ConfigError, match="checkpoint=best"):
        checkpoint.find(tmp_path, "best")


@pytest.mark.parametrize("file", checkpoint.FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_named_and_the_next_older_good_one_offered(tmp_path, saver, file, damage):
    saver(1)
    newest = saver(2).folder / file
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 4
    newest.unlink()
    if damage != "remove":
        newest.write_bytes(content if damage == "flip" else content[:-1])
    with pytest.raises(ConfigError, match=rf"{file}.*checkpoint=iter_00000001"):
        checkpoint.find(tmp_path, "last")
    assert checkpoint.find(tmp_path, "iter_00000001").load_state()["n"] == 1


def test_only_damaged_ones_left_is_said(tmp_path, saver):
    (saver(1).folder / "state.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match="no older good one"):
        checkpoint.find(tmp_path, "last")


@pytest.mark.parametrize("step", ["save_file", "write_text", "sha256", "sync"])
def test_a_failed_save_keeps_the_older_ones_and_leaves_no_trace(tmp_path, saver, monkeypatch, step):
    from nanogpt import files

    saver(1, 1.0)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files if step == "sync" else checkpoint, step, fail)
    with pytest.raises(OSError, match="No space"):
        saver(2, 0.5)
    monkeypatch.undo()
    assert names(tmp_path) == ["iter_00000001"] and checkpoint.find(tmp_path, "last").iteration == 1
    assert [p.name for p in (tmp_path / "ckpt").iterdir()] == ["iter_00000001"]


def test_what_a_killed_save_leaves_is_ignored_and_swept_up(tmp_path, saver):
    saver(1)
    torn = tmp_path / "ckpt" / ".iter_00000002.abcd.tmp"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    assert checkpoint.find(tmp_path, "last").iteration == 1
    saver(3)
    assert not torn.exists()


def test_saving_the_same_iteration_again_replaces_it(tmp_path, saver):
    saver(5, 2.0)
    saver(5, 1.0)
    assert names(tmp_path) == ["iter_00000005"] and checkpoint.find(tmp_path, "last").val_loss == 1.0


def test_going_on_from_an_older_one_keeps_the_newer_aside(tmp_path, saver):
    saver(1)
    saver(2)
    checkpoint.set_aside_newer(tmp_path, 1)
    assert names(tmp_path) == ["iter_00000001"]
    assert (tmp_path / "ckpt" / "replaced_iter_00000002" / "model.safetensors").is_file()


def test_code_in_a_state_file_is_never_run(tmp_path, saver):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    folder = saver(1).folder
    torch.save({"x": Evil()}, folder / "state.pt")
    with pytest.raises(Exception, match="Weights only load failed|Unsupported"):
        checkpoint.Checkpoint(folder, 1, None, {}).load_state()
    assert not (tmp_path / "pwned").exists()


def test_a_newer_format_is_refused_by_name(tmp_path, saver):
    manifest = saver(1).folder / "manifest.json"
    manifest.write_text(manifest.read_text(encoding="utf-8").replace('"format": 1', '"format": 7'), encoding="utf-8")
    with pytest.raises(ConfigError, match="has format 7, this program reads up to 1"):
        checkpoint.find(tmp_path, "last")


def test_a_folder_without_checkpoints_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="there is no checkpoint in it"):
        checkpoint.find(tmp_path, "last")


def test_a_checkpoint_of_another_shape_is_refused(tmp_path, saver):
    found = saver(1)
    with pytest.raises(ConfigError, match="other parameters"):
        found.load_model(build_model(tiny_model_config(n_layer=3), 0))
