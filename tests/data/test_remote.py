"""Prepared data sets behind an address: the same data through a cache of limited size, each file checked."""

import os

import fsspec
import numpy as np
import pytest
from test_shards import SIZES, sharded_dataset
from test_tokens import counting_dataset

from nanogpt.base.hashed_json import write_sealed
from nanogpt.base.language import ConfigError
from nanogpt.data import corpus, remote
from nanogpt.data.opening import open_data
from nanogpt.data.tokens import TokenData, read_meta, unchecked

OPTIONS = {"path": None}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSE_S", 0)
    monkeypatch.setattr(remote, "sync", lambda path: None)


@pytest.fixture
def bucket(tmp_path):
    """upload(folder) -> the address that it has then; a file of it is taken away by calling the address's own pipe."""
    memory = fsspec.filesystem("memory")

    def upload(folder):
        for file in folder.iterdir():
            memory.pipe(f"/bucket/{folder.name}/{file.name}", file.read_bytes())
        return f"memory://bucket/{folder.name}"

    yield upload
    memory.rm("/bucket", recursive=True)


def opened(address, **how):
    return open_data(corpus.prepare("hf", address, OPTIONS), **how)


def test_data_behind_an_address_is_the_same_data_and_only_what_is_needed_is_fetched(tmp_path, bucket):
    local = TokenData(sharded_dataset(tmp_path / "d", (640,) * 20))
    data = opened(bucket(local.folder))
    assert data.elsewhere and data.fingerprint == local.fingerprint and not list(data.folder.glob("train-*.bin"))
    for first in (0, 40, 900):
        starts = data.starts(3, first, 40, 16)
        assert np.array_equal(starts, local.starts(3, first, 40, 16))
        assert all(map(np.array_equal, data.rows("train", starts, 16), local.rows("train", starts, 16)))
    assert 0 < len(list(data.folder.glob("train-*.bin"))) < 20 and np.array_equal(data.tokens["val"], local.tokens["val"])


def test_one_file_behind_an_address_is_fetched_whole(tmp_path, bucket):
    local = TokenData(counting_dataset(tmp_path / "d"))
    data = opened(bucket(local.folder) + "/")
    assert np.array_equal(data.tokens["train"], local.tokens["train"]) and data.fingerprint == local.fingerprint


def test_a_local_address_works_like_a_far_one(tmp_path):
    data = opened(sharded_dataset(tmp_path / "d").resolve().as_uri())
    assert data.tokens["train"][95:105].tolist() == list(range(95, 105)) and data.folder.is_relative_to(tmp_path / "cache")


def test_the_cache_keeps_its_size_and_lets_go_of_what_was_used_longest_ago(tmp_path, bucket):
    data = opened(bucket(sharded_dataset(tmp_path / "d", (128,) * 20)))
    train, seen = data.tokens["train"], set()
    train.opener.bring.__self__.limit = 10 * 256
    for first in range(0, 320, 16):
        starts = data.starts(5, first, 16, 32)
        x, _ = data.rows("train", starts, 32)
        assert np.array_equal(x[:, 0].numpy(), starts)
        files = sorted(data.folder.glob("train-*.bin"))
        seen.update(files)
        # 同时要的至多三组，还有一个正取着；其余的按上限删
        assert len(files) <= 13
    assert len(seen) == 20


def test_a_small_cache_is_refused_with_the_size_that_does(tmp_path, bucket):
    address = bucket(sharded_dataset(tmp_path / "d"))
    with pytest.raises(ConfigError, match=r"cache_data_gib=1e-09 is too small for the 8 files of memory://bucket/d .*cache_data_gib=0.1"):
        opened(address, cache_gib=1e-9)
    assert opened(address, cache_gib=0.1).elsewhere


def test_a_file_that_is_missing_or_another_one_is_one_line(tmp_path, bucket):
    memory, address = fsspec.filesystem("memory"), bucket(sharded_dataset(tmp_path / "d", SIZES[:3]))
    memory.rm("/bucket/d/train-00001.bin")
    with pytest.raises(ConfigError, match=r"dataset.dir: memory://bucket/d/train-00001.bin cannot be read .FileNotFoundError"):
        opened(address).tokens["train"][120:130]
    memory.pipe("/bucket/d/train-00001.bin", bytes(320))
    with pytest.raises(ConfigError, match=r"memory://bucket/d/train-00001.bin is not what meta.json beside it says") as error:
        opened(address).tokens["train"][120:130]
    assert "\n" not in str(error.value) and not list((tmp_path / "cache").rglob("train-00001.bin*"))


@pytest.mark.parametrize("address", ["memory://bucket/none", "nope://bucket/d", "s3://bucket/d"])
def test_an_address_that_cannot_be_reached_is_one_line(address):
    with pytest.raises(ConfigError, match=rf"dataset.dir: {address}/meta.json cannot be read") as error:
        opened(address)
    assert "\n" not in str(error.value)


def test_a_network_that_comes_back_is_waited_for(tmp_path, bucket, monkeypatch):
    address, original, failed = bucket(sharded_dataset(tmp_path / "d")), remote._copied, []

    def copied(where, write):
        if "train" in where and len(failed) < 3:
            failed.append(where)
            write(b"half")
            raise ConnectionError("gone")
        return original(where, write)

    monkeypatch.setattr(remote, "_copied", copied)
    assert opened(address).tokens["train"][0:3].tolist() == [0, 1, 2] and failed == [f"{address}/train-00000.bin"] * 3


def test_what_is_cached_is_used_where_there_is_no_network(tmp_path, bucket, monkeypatch, capsys):
    address = bucket(sharded_dataset(tmp_path / "d"))
    before = opened(address)
    assert before.tokens["train"][0:1].tolist() == [0]
    monkeypatch.setattr(remote, "_copied", lambda *_: (_ for _ in ()).throw(ConnectionError("no network")))
    assert opened(address).tokens["train"][0:3].tolist() == [0, 1, 2]
    assert "no network" in (said := capsys.readouterr().err) and "what is cached in" in said
    with pytest.raises(ConfigError, match="no network"):
        opened(address).tokens["train"][1000:1001]


def test_data_that_changed_at_its_address_is_fetched_anew(tmp_path, bucket):
    address = bucket(sharded_dataset(tmp_path / "d"))
    before = opened(address)
    fingerprint = before.fingerprint
    del before
    os.rename(tmp_path / "d", tmp_path / "old")
    bucket(sharded_dataset(tmp_path / "d", SIZES[::-1]))
    after = opened(address)
    assert after.fingerprint != fingerprint and after.tokens["train"].sizes.tolist() == list(SIZES[::-1])


def test_an_index_cannot_name_files_outside_its_folder(tmp_path, bucket):
    folder = counting_dataset(tmp_path / "d")
    meta = read_meta(folder)
    write_sealed(folder / "meta.json", {**meta, "sha256": {**meta["sha256"], "../../x": "0"}})
    with pytest.raises(ConfigError, match="memory://bucket/d"):
        opened(bucket(folder))


def test_a_plan_knows_the_length_of_data_of_which_nothing_is_fetched_yet(tmp_path, bucket):
    folder = opened(bucket(sharded_dataset(tmp_path / "d"))).folder
    assert len(unchecked(folder)) == sum(SIZES) and not list(folder.glob("train-*.bin"))
