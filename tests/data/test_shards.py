"""Training splits of many files: read as one array, shuffled by files and blocks, each file checked before its use."""

import shutil

import numpy as np
import pytest
from test_tokens import check_order_by_seed_and_position, counting_dataset, targets_of

from nanogpt.base.files import sha256
from nanogpt.base.hashed_json import write_sealed
from nanogpt.base.language import ConfigError
from nanogpt.data import digests, shards
from nanogpt.data.corpus import build_char_tokenizer, write_meta
from nanogpt.data.tokens import MIXED, TokenData, copy_dataset, read_meta, unchecked

SIZES = (100, 160, 90, 130, 110, 140, 120, 80, 95, 75)


def sharded_dataset(folder, sizes=SIZES, val=100):
    """Tokens 0, 1, 2, … in files of these sizes, so that an offset can be read off the data."""
    folder.mkdir()
    total, at, files = sum(sizes), 0, {}
    tokenizer = build_char_tokenizer(chr(0x4E00 + i) for i in range(total + val))
    for number, size in enumerate(sizes):
        files[f"train-{number:05d}.bin"] = size
        np.arange(at, at + size, dtype=np.uint16).tofile(folder / f"train-{number:05d}.bin")
        at += size
    np.arange(total, total + val, dtype=np.uint16).tofile(folder / "val.bin")
    write_meta(
        folder, name="t", source="t", tokenizer=tokenizer, dtype=np.dtype("uint16"), tokens={"train": total, "val": val}, shards=files)
    return folder


def test_many_files_read_like_one(tmp_path):
    whole = TokenData(sharded_dataset(tmp_path / "d")).tokens["train"]
    assert len(whole) == sum(SIZES) and whole.nbytes == 2 * sum(SIZES)
    assert whole[:].tolist() == list(range(sum(SIZES))) and whole[95:265].tolist() == list(range(95, 265)) and whole[:7].dtype == np.uint16
    places = np.array([[0, 99, 100], [1099, 259, 260]])
    assert np.array_equal(whole[places], places)
    part = whole.part(50, 300)
    assert len(part) == 250 and part[:].tolist() == list(range(50, 300)) and len(whole.part(3, 3)) == 0
    assert len(unchecked(tmp_path / "d")) == len(whole)


@pytest.mark.parametrize("block_size", [1, 7, 16, 75])
def test_every_token_of_every_file_is_a_target_in_every_epoch(tmp_path, block_size):
    data = TokenData(sharded_dataset(tmp_path / "d"))
    blocks = sum(-(-size // block_size) for size in SIZES)
    for epoch in range(2):
        starts = data.starts(7, epoch * blocks, blocks, block_size)
        counts = targets_of(data, starts, block_size)
        assert len(set(starts)) == blocks and set(counts) <= {1, 2} and counts.sum() == blocks * block_size


def test_the_order_of_many_files_depends_only_on_seed_and_position(tmp_path):
    check_order_by_seed_and_position(TokenData(sharded_dataset(tmp_path / "d")))


def test_one_file_has_the_order_that_it_always_had(tmp_path):
    one, same = TokenData(counting_dataset(tmp_path / "a")), TokenData(sharded_dataset(tmp_path / "b", (1000,)))
    assert np.array_equal(one.starts(3, 0, 400, 16), same.starts(3, 0, 400, 16))


def test_what_is_near_in_training_comes_from_a_few_random_files(tmp_path):
    data = TokenData(sharded_dataset(tmp_path / "d", (64,) * 12))
    owner = data.starts(5, 0, 2 * 12 * 8, 8) // 64
    groups = [set(owner[at : at + MIXED * 8].tolist()) for at in range(0, len(owner), MIXED * 8)]
    # 一轮里每组 MIXED 个、各组不重；两轮的分组不同；组内的块不是一个文件接一个文件
    assert [len(group) for group in groups] == [MIXED] * 6 and set().union(*groups[:3]) == set(range(12))
    assert sorted(map(sorted, groups[:3])) != sorted(map(sorted, groups[3:]))
    assert len(np.unique(owner[:8])) > 1 and groups[0] != set(range(MIXED))


def test_no_row_runs_from_one_file_into_another(tmp_path):
    data = TokenData(sharded_dataset(tmp_path / "d"))
    starts = data.starts(0, 0, 200, 16)
    x, y = data.rows("train", starts, 16)
    ends = np.cumsum(SIZES)
    for row in np.concatenate((x.numpy(), y.numpy()[:, -1:]), axis=1):
        assert len(np.unique(np.searchsorted(ends, row, side="right"))) == 1


def test_only_the_files_of_now_and_of_next_are_open(tmp_path):
    data = TokenData(sharded_dataset(tmp_path / "d", (64,) * 20))
    for first in range(0, 300, 10):
        data.rows("train", data.starts(5, first, 10, 8), 8)
        assert len(data.tokens["train"].opener._opened) <= 3 * MIXED


def test_a_held_out_end_of_many_files_is_validated_on_and_never_trained_on(tmp_path):
    data = TokenData(sharded_dataset(tmp_path / "d"))
    data.hold_out(0.1)
    seen = [data.rows("val", np.array([start]), length)[1][0] for start, length in data.val_windows(16, None)]
    assert np.array_equal(np.concatenate(seen), np.arange(991, 1100))
    counts = np.bincount(data.rows("train", data.starts(1, 0, 80, 16), 16)[1].flatten().numpy(), minlength=1100)
    assert (counts[:990] > 0).all() and not counts[990:].any()


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "another"])
def test_a_damaged_file_is_named_before_anything_is_learned_from_it(tmp_path, damage):
    folder = sharded_dataset(tmp_path / "d")
    path = folder / "train-00003.bin"
    content = bytearray(path.read_bytes())
    content[8] ^= 1
    path.unlink()
    if damage == "another":
        # 别的数据集的同名文件，恰好一样大
        content = (1000 - np.arange(130, dtype=np.uint16)).tobytes()
    if damage != "remove":
        path.write_bytes(content[:-2] if damage == "truncate" else content)
    with pytest.raises(ConfigError, match=r"train-00003\.bin does not match its meta\.json .*delete the folder"):
        data = TokenData(folder)
        # 大小一样的，用到它时才知道
        data.rows("train", data.starts(0, 0, 80, 16), 16)
    with pytest.raises(ConfigError, match=r"train-00003\.bin does not match"):
        TokenData(folder, verify=True)


def test_ids_beyond_the_vocabulary_are_refused_in_any_file(tmp_path):
    folder = sharded_dataset(tmp_path / "d")
    np.full(160, 60000, dtype=np.uint16).tofile(folder / "train-00001.bin")
    meta = read_meta(folder)
    write_sealed(folder / "meta.json", {**meta, "sha256": {file: sha256(folder / file) for file in meta["sha256"]}})
    with pytest.raises(ConfigError, match="id 60000"):
        TokenData(folder).tokens["train"][100:105]


@pytest.mark.parametrize("change", [{}, {"train-00000.bin": 99}, {"train-00000.bin": 0}, {"../x": 100}, [], {"train-00000.bin": "100"}])
def test_an_index_that_does_not_fit_is_refused(tmp_path, change):
    folder = sharded_dataset(tmp_path / "d")
    meta = read_meta(folder)
    write_sealed(folder / "meta.json", {**meta, "shards": {**meta["shards"], **change} if change else change})
    with pytest.raises(ConfigError, match=r"meta\.json"):
        TokenData(folder)


def test_a_checked_file_is_not_hashed_again(tmp_path, monkeypatch):
    from test_tokens import aged

    monkeypatch.setenv("NANOGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "WORTH", 1)
    hashed = []
    monkeypatch.setattr(shards, "sha256", lambda path, *look: hashed.append(path.name) or sha256(path, *look))
    folder = aged(sharded_dataset(tmp_path / "d"))
    for _ in range(2):
        assert TokenData(folder).tokens["train"][100:102].tolist() == [100, 101]
    assert hashed.count("train-00001.bin") == 1 and len(hashed) == 3


def test_a_copy_of_many_files_is_the_same_data(tmp_path):
    data = TokenData(sharded_dataset(tmp_path / "d"))
    copy_dataset(data.folder, tmp_path / "copy")
    fingerprint, other = data.fingerprint, TokenData(sharded_dataset(tmp_path / "other", SIZES[::-1])).fingerprint
    shutil.rmtree(data.folder)
    assert TokenData(tmp_path / "copy").fingerprint == fingerprint != other and len(fingerprint) == 64


def test_a_block_longer_than_the_files_is_refused(tmp_path):
    data = TokenData(sharded_dataset(tmp_path / "d", (30,) * 10))
    with pytest.raises(ConfigError, match=r"model.block_size=64 is longer than the files .* 30 tokens on average; choose model.block_size=29 or less"):
        data.check_block_size(64)
    data.check_block_size(29)
