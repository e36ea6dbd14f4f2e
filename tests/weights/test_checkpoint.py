"""Checkpoints: whole or absent, verified, pruned without losing the best."""

import json
import math
import struct
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from conftest import GPT2_RECIPE, tiny_model_config
from safetensors.torch import load_file, save_file

from nanogpt.base.config import FinetuneConfig
from nanogpt.base.files import sha256
from nanogpt.base.hashed_json import DamagedError
from nanogpt.base.language import ConfigError
from nanogpt.base.saved_config import read_saved
from nanogpt.core.memory.lora import add_adapters
from nanogpt.weights import checkpoint
from nanogpt.weights import tensors as tensor_files
from nanogpt.weights.build import build_model, model_of, weight_shapes
from nanogpt.weights.foreign_files import read_safetensors


@pytest.fixture
def saver(tmp_path):
    model = build_model(tiny_model_config(), 0)

    def save(iteration, val_loss=None, keep=2, model=model, run="a"):
        return checkpoint.save(
            tmp_path, model=model, state={"n": iteration, "t": torch.arange(3)}, iteration=iteration, val_loss=val_loss,
            config_text="a: 1\n", tokenizer_text="{}", keep=keep, run=run,
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


def held_open(*_):
    """What Windows says of a folder in which somebody reads a file."""
    error = PermissionError(13, "the process cannot access the file")
    error.winerror = 32
    raise error


def test_a_checkpoint_that_somebody_reads_is_pruned_later(tmp_path, saver, monkeypatch):
    for iteration in (10, 20, 30):
        saver(iteration, 3.0 - iteration / 100, keep=9)
    with monkeypatch.context() as windows:
        windows.setattr(Path, "rename", held_open)
        checkpoint.prune(tmp_path, 1)
    assert len(checkpoint.checkpoints(tmp_path)) == 3
    checkpoint.prune(tmp_path, 1)
    assert [one.iteration for one in checkpoint.checkpoints(tmp_path)] == [30]


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
    (saver(1).folder / "state.json").write_bytes(b"")
    with pytest.raises(ConfigError, match="no older good one"):
        checkpoint.find(tmp_path, "last")


@pytest.mark.parametrize("step", ["write_tensors", "write_text", "sha256", "sync"])
def test_a_failed_save_keeps_the_older_ones_and_leaves_no_trace(tmp_path, saver, monkeypatch, step):
    from nanogpt.base import files

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


def as_format_1(folder, state):
    """Make a checkpoint folder what the first version wrote: the state as torch.save, a manifest without a digest."""
    for file in ("state.json", "state.safetensors"):
        (folder / file).unlink()
    torch.save(state, folder / "state.pt")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    old = {"format": 1, "iteration": manifest["iteration"], "val_loss": manifest["val_loss"]}
    hashes = {file: sha256(folder / file) for file in checkpoint.FILES_1}
    (folder / "manifest.json").write_text(json.dumps({**old, "sha256": hashes}), encoding="utf-8")


def test_the_first_format_is_still_read(tmp_path, saver):
    as_format_1(saver(1).folder, {"n": 5, "t": torch.arange(3)})
    saver(2)
    assert names(tmp_path) == ["iter_00000001", "iter_00000002"]
    assert checkpoint.find(tmp_path, "iter_00000001").load_state()["n"] == 5


def test_code_in_a_state_file_is_never_run(tmp_path, saver):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    as_format_1(saver(1).folder, {"x": Evil()})
    with pytest.raises(ConfigError, match="state: .*Weights only load failed"):
        checkpoint.find(tmp_path, "last").load_state()
    assert not (tmp_path / "pwned").exists()


def test_any_nested_state_comes_back_and_nothing_else_is_taken():
    state = {"a": [1, 2.5, None, True, "x"], 3: (torch.zeros(0), torch.tensor(1.0, dtype=torch.bfloat16)), "n": math.nan, "i": [-math.inf, {}]}
    tensors = {}
    back = tensor_files.restore(json.loads(json.dumps(tensor_files.flatten(state, tensors), allow_nan=False)), tensors)
    assert back["a"] == state["a"] and math.isnan(back["n"]) and back["i"] == state["i"] and isinstance(back[3], tuple)
    assert back[3][0].shape == (0,) and torch.equal(back[3][1], state[3][1]) and back[3][1].dtype == torch.bfloat16
    with pytest.raises(TypeError, match="a set cannot be saved"):
        tensor_files.flatten({"x": {1}}, {})
    for node in ({"call": 1}, {"tensor": "9"}, {"float": "1e9"}, {}, {"dict": [[1]]}):
        with pytest.raises((ValueError, KeyError)):
            tensor_files.restore(node, {})


def test_tensor_files_are_what_the_library_reads_and_their_hash_is_the_files(tmp_path):
    tensors = {
        "b": torch.randn(3, 5).T, "empty": torch.zeros(0, 4), "one": torch.tensor(7), "flag": torch.tensor([True, False]),
        "half": torch.randn(7).half(), "b16": torch.randn(2, 2).bfloat16(), "码": torch.arange(5, dtype=torch.uint8), "view": torch.randn(9)[::2],
    }
    path = tmp_path / "x.safetensors"
    assert tensor_files.write_tensors(path, tensors) == sha256(path)
    read = load_file(path)
    assert read.keys() == tensors.keys() and all(torch.equal(read[k], v) and read[k].dtype == v.dtype for k, v in tensors.items())
    assert tensor_files.shapes_in(path) == {name: tuple(t.shape) for name, t in tensors.items()}


@pytest.mark.parametrize("version", [7, 0, -1, 1.5, True, None, "2", [2]])
def test_a_newer_or_unknown_format_is_refused_by_name_and_an_older_one_offered(tmp_path, saver, version):
    saver(1)
    manifest = saver(2).folder / "manifest.json"
    values = json.loads(manifest.read_text(encoding="utf-8"))
    manifest.write_text(json.dumps({**values, "format": version}), encoding="utf-8")
    wanted = f"has format 7, this program reads up to {checkpoint.FORMAT}" if version == 7 else "no known format"
    with pytest.raises(ConfigError, match=rf"iter_00000002 .*{wanted}.*checkpoint=iter_00000001"):
        checkpoint.find(tmp_path, "last")


def test_no_digit_of_a_manifest_changes_unnoticed(tmp_path, saver):
    saver(1, 2.0)
    manifest = saver(2, 1.5).folder / "manifest.json"
    whole = manifest.read_bytes()
    for at in range(0, len(whole), 3):
        manifest.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        found = checkpoint.listed(tmp_path)
        # 空白变了样，内容没变
        assert found.bad or ((found.good[-1].iteration, found.good[-1].val_loss) == (2, 1.5) and whole[at : at + 1].isspace()), at
    for at in range(0, len(whole), 11):
        manifest.write_bytes(whole[:at])
        assert list(checkpoint.listed(tmp_path).bad) == [manifest.parent], at
    with pytest.raises(ConfigError, match="iter_00000002 is damaged .*a good one is checkpoint=iter_00000001"):
        checkpoint.find(tmp_path, "best")
    manifest.unlink()
    with pytest.raises(ConfigError, match="manifest.json: missing"):
        checkpoint.find(tmp_path, "last")


def test_a_checkpoint_of_another_run_or_of_another_iteration_is_refused(tmp_path, saver):
    saver(1)
    folder = saver(2, run="b").folder
    with pytest.raises(ConfigError, match="iter_00000002 is damaged .it belongs to another run.*checkpoint=iter_00000001"):
        checkpoint.find(tmp_path, "last")
    folder.rename(folder.with_name("iter_00000009"))
    with pytest.raises(ConfigError, match="iter_00000009 .*belongs to another folder"):
        checkpoint.find(tmp_path, "last")
    # 只看名字挪开它，更早的就又是最新的
    checkpoint.set_aside_newer(tmp_path, 1)
    assert checkpoint.find(tmp_path, "last").iteration == 1


def test_what_a_training_deletes_while_it_is_listed_is_no_damage(tmp_path, saver, monkeypatch):
    saver(1, keep=1)
    real = checkpoint.read_manifest

    def replaced_meanwhile(folder):
        if folder.name == "iter_00000001":
            monkeypatch.setattr(checkpoint, "read_manifest", real)
            saver(2, keep=1)
        return real(folder)

    monkeypatch.setattr(checkpoint, "read_manifest", replaced_meanwhile)
    assert checkpoint.find(tmp_path, "last").iteration == 2


def test_damaged_ones_are_never_pruned(tmp_path, saver):
    (saver(1).folder / "manifest.json").write_bytes(b"")
    for iteration in range(2, 6):
        saver(iteration, keep=1)
    assert sorted(p.name for p in (tmp_path / "ckpt").iterdir()) == ["iter_00000001", "iter_00000005"]


@pytest.mark.parametrize("loss", [math.nan, -math.inf])
def test_a_loss_that_is_no_number_is_damage_and_never_the_best(tmp_path, saver, loss):
    saver(1, 2.0)
    saver(2, loss, keep=9)
    saver(3, 3.0, keep=9)
    with pytest.raises(ConfigError, match="iter_00000002 is damaged .*val_loss.*a good one is checkpoint=iter_00000001"):
        checkpoint.find(tmp_path, "best")
    assert checkpoint.find(tmp_path, "last").iteration == 3


@pytest.mark.parametrize("change", [
    {"n_layer": 10**9}, {"n_embd": 10**12}, {"n_embd": 10**30}, {"vocab_size": 10**10}, {"block_size": 10**10}, {"n_head": 0}, {"n_layer": -1},
    {"ngrams": [2], "ngram_buckets": 10**12}, {"mlp_ratio": 10**9}, {"n_layer": "many"}, {"n_embd": None}, {"_target_": "os.system"}, {"extra": 5},
])
def test_a_config_that_contradicts_the_weights_allocates_nothing(tmp_path, saver, change):
    config = asdict(tiny_model_config())
    source = saver(1)
    (source.folder / "config.yaml").write_text(yaml.safe_dump({"model": {**config, **change}}), encoding="utf-8")
    with pytest.raises(ConfigError, match="is damaged|names code of its own"):
        model_of(source)
    (source.folder / "config.yaml").write_text(yaml.safe_dump({"model": config}), encoding="utf-8")
    assert model_of(source).parameter_count()


@pytest.mark.parametrize("changes", [{}, {"position": "learned", "tie_embeddings": True}, {"ngrams": [2]}, {"init": "gpt2"}])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_shapes_of_weights_are_known_without_drawing_any(monkeypatch, changes, method):
    config, finetune = tiny_model_config(**changes), FinetuneConfig(method=method)
    model = build_model(config, 0)
    if method == "lora":
        add_adapters(model, finetune)
    monkeypatch.setattr(torch.Tensor, "normal_", None)
    assert weight_shapes(config, finetune) == {name: tuple(p.shape) for name, p in model.state_dict().items()}


def test_rows_of_zeros_take_no_space_and_come_back_to_the_bit(tmp_path):
    table, full, empty = torch.zeros(4096, 128), torch.ones(4096, 128), torch.zeros(4096, 64, dtype=torch.int64)
    table[[0, 7, 4095]] = torch.randn(3, 128)
    # -0.0 不是零：它的行也要存
    table[9, 5] = -0.0
    tensors, path = {"table": table, "full": full, "empty": empty, "turned": table.T}, tmp_path / "x.safetensors"
    assert tensor_files.write_tensors(path, tensors) == sha256(path)
    assert path.stat().st_size < full.nbytes + table.nbytes + 10_000
    read = tensor_files.read_tensors(path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[k].contiguous().view(torch.uint8), v.contiguous().view(torch.uint8)) for k, v in tensors.items())
    assert tensor_files.shapes_in(path) == {name: tuple(t.shape) for name, t in tensors.items()}


@pytest.mark.parametrize(("rows", "numbers"), [
    ({"a": 2}, [0, 2]), ({"a": 9}, [0, -1]), ({"a": 9}, [0]), ({"a": 0}, [0, 1]), ({"a": "9"}, [0, 1]), ({"b": 9}, [0, 1]), (["a"], [0, 1]),
])
def test_rows_that_there_cannot_be_are_damage(tmp_path, rows, numbers):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2, 3), "a.filled": torch.tensor(numbers)}, path, metadata={"rows": json.dumps(rows)})
    with pytest.raises(tensor_files.UNREADABLE):
        tensor_files.read_tensors(path)


@pytest.mark.parametrize("shape", [[2**63, 0], [2**62], [-1], [1.5]])
def test_a_header_that_lies_about_sizes_is_one_line(tmp_path, saver, shape):
    head = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode("ascii")
    path = saver(1).folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(head)) + head)
    with pytest.raises(ConfigError, match="is damaged"):
        checkpoint.listed(tmp_path).good[0].load_model(build_model(tiny_model_config(), 0))
    with pytest.raises(ConfigError, match="cannot be used"):
        read_safetensors(path)


@pytest.mark.parametrize("content", [
    "a: [1", "- 1", "", "model: 3", "model: {n_layer: ${oc.env:HOME}}", "a: &a [x]\nmodel: {b: *a}", "model: !!python/object/apply:os.system [id]",
    "[" * 9000 + "]" * 9000,
])
def test_a_config_of_a_stranger_is_read_as_plain_values(content):
    with pytest.raises(DamagedError, match=r"config\.yaml: "):
        read_saved(content)


def test_a_folder_without_checkpoints_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="there is no checkpoint in it"):
        checkpoint.find(tmp_path, "last")


def test_a_checkpoint_of_another_shape_is_refused(tmp_path, saver):
    found = saver(1)
    with pytest.raises(ConfigError, match="other parameters"):
        found.load_model(build_model(tiny_model_config(n_layer=3), 0))
