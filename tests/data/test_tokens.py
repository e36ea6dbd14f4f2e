"""Data set folders: prepared whole, verified, read deterministically from any position."""

import json
import os
import shutil

import numpy as np
import pytest
from conftest import make_config  # noqa: F401 - 保证 conf 可用
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.base.files import sha256
from nanogpt.base.hashed_json import write_sealed
from nanogpt.base.language import ConfigError
from nanogpt.core.distributed import share
from nanogpt.data import corpus, digests, shards
from nanogpt.data import tokenizer as tokenizers
from nanogpt.data.corpus import build_char_tokenizer, write_dataset
from nanogpt.data.tokenizer import ByteTokenizer
from nanogpt.data.tokens import TokenData, read_meta


def counting_dataset(folder, train=1000, val=100):
    """Tokens 0, 1, 2, … so that an offset can be read off the data."""
    tokenizer = build_char_tokenizer(chr(0x4E00 + i) for i in range(train + val))
    return write_dataset(folder, name="t", source="t", tokenizer=tokenizer, train=[np.arange(train)], val=[np.arange(train, train + val)])


def targets_of(data, starts, block_size):
    """How often each token of the training split is a target in these samples."""
    return np.bincount(data.rows("train", starts, block_size)[1].flatten().numpy(), minlength=len(data.tokens["train"]))


@pytest.mark.parametrize("block_size", [1, 7, 16, 100, 999])
def test_every_token_is_a_target_in_every_epoch(tmp_path, block_size):
    data = TokenData(counting_dataset(tmp_path / "d"))
    blocks, twice, phases = -(-1000 // block_size), [], set()
    for epoch in range(3):
        starts = data.starts(7, epoch * blocks, blocks, block_size)
        counts = targets_of(data, starts, block_size)
        # 补足最后一块的那些读两遍，别的恰好一遍
        assert len(set(starts)) == blocks and set(counts) <= {1, 2} and counts.sum() == blocks * block_size
        twice.append(np.flatnonzero(counts == 2).tolist())
        phases.update((starts % block_size).tolist())
    assert not twice[0] or twice[0] != twice[1] != twice[2]
    assert block_size == 1 or len(phases) > 2


@pytest.fixture(scope="module")
def one_of_every_length(tmp_path_factory):
    """A data set whose training split may be replaced."""
    return TokenData(counting_dataset(tmp_path_factory.mktemp("any") / "d"))


@settings(max_examples=40)
@given(sizes=st.integers(3, 60).flatmap(lambda length: st.tuples(st.just(length), st.integers(1, length - 1))), world=st.integers(1, 5), more_rows=st.integers(0, 9))
def test_processes_together_train_on_every_token_in_every_epoch(one_of_every_length, sizes, world, more_rows):
    (length, block_size), rows = sizes, world + more_rows
    data = one_of_every_length
    data.tokens["train"] = np.arange(length)
    blocks, read = -(-length // block_size), []
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("WORLD_SIZE", str(world))
        for step in range(-(-2 * blocks // rows)):
            starts = data.starts(3, step * rows, rows, block_size)
            for rank in range(world):
                patched.setenv("RANK", str(rank))
                read += starts[share(rows)].tolist()
    for epoch in range(2):
        counts = targets_of(data, np.array(read[epoch * blocks :][:blocks]), block_size)
        assert set(counts) <= {1, 2} and (counts == 2).sum() == blocks * block_size - length


def test_every_token_is_a_target_equally_often_in_the_long_run(tmp_path):
    data = TokenData(counting_dataset(tmp_path / "d", train=70, val=20))
    epochs = 4000
    counts = targets_of(data, data.starts(0, 0, epochs * 5, 16), 16)
    # 各 epoch 的相位互不相关：偏差不出几个标准差
    assert abs(counts / epochs - 80 / 70).max() < 4 * (10 / 70 * 60 / 70 / epochs) ** 0.5


def test_the_block_around_the_end_goes_on_at_the_beginning(tmp_path):
    data = TokenData(counting_dataset(tmp_path / "d"))
    x, y = data.rows("train", np.array([990]), 16)
    assert x[0].tolist() == [*range(990, 1000), *range(6)] and y[0].tolist() == [*range(991, 1000), *range(7)]


def test_the_order_of_earlier_versions_is_still_there(tmp_path):
    data = TokenData(counting_dataset(tmp_path / "d"))
    assert data.starts(7, 60, 8, 16, order=1).tolist() == [898, 747, 683, 459, 379, 251, 347, 859]
    assert data.starts(7, 60, 8, 16).tolist() == [371, 275, 59, 612, 468, 196, 116, 988] and data.starts(1, 5, 3, 999).tolist() == [707, 309, 308]


def test_a_batch_depends_only_on_seed_and_position(tmp_path):
    check_order_by_seed_and_position(TokenData(counting_dataset(tmp_path / "d")))


def check_order_by_seed_and_position(data):
    in_one = data.starts(1, 0, 300, 16)
    # 不同的切法、倒着读、跨 epoch，都得到同一串
    pieces = [TokenData(data.folder).starts(1, first, 25, 16) for first in reversed(range(0, 300, 25))]
    assert np.array_equal(np.concatenate(pieces[::-1]), in_one)
    assert not np.array_equal(data.starts(2, 0, 300, 16), in_one)


def test_targets_are_the_inputs_shifted_by_one(tmp_path):
    data = TokenData(counting_dataset(tmp_path / "d"))
    x, y = data.rows("train", np.array([0, 500]), 16)
    assert x.shape == y.shape == (2, 16) and (y - x == 1).all() and x[1, 0] == 500


@pytest.mark.parametrize("block_size", [1, 9, 16, 99])
def test_validation_windows_cover_every_target_once(tmp_path, block_size):
    data = TokenData(counting_dataset(tmp_path / "d"))
    seen = []
    for start, length in data.val_windows(block_size, None):
        seen += data.rows("val", np.array([start]), length)[1][0].tolist()
    assert seen == list(range(1001, 1100))


def test_a_limited_validation_is_a_fixed_spread_part(tmp_path):
    data = TokenData(counting_dataset(tmp_path / "d"))
    part = data.val_windows(8, 40)
    assert part == data.val_windows(8, 40) and len(part) == 5
    assert part[0][0] == 0 and part[-1][0] > 60
    assert data.val_windows(8, 10**9) == data.val_windows(8, None)


@pytest.mark.parametrize("stride", [1, 5, 16])
def test_windows_that_overlap_count_every_target_once_behind_enough_context(tmp_path, stride):
    data = TokenData(counting_dataset(tmp_path / "d"))
    plain, bits = data.val_windows(16, None), data.bits_per_byte(data.val_windows(16, None))
    data.slide(stride, 16)
    windows, seen = data.val_windows(16, None), []
    assert stride < 16 or windows == plain
    for start, length in windows:
        x, y = (one[0] for one in data.rows("val", np.array([start]), length))
        counted = y[y >= 0].tolist()
        assert counted and counted == (x[y >= 0] + 1).tolist() and (start == 0 or counted[0] - int(x[0]) > 16 - stride)
        seen += counted
    assert seen == list(range(1001, 1100)) and data.val_targets(windows) == 99
    assert data.bits_per_byte(windows) == bits
    # eval_tokens 说的是数几个目标，不是读几个
    assert 40 - stride < data.val_targets(data.val_windows(16, 40)) <= 40
    assert len(data.rows("train", np.array([1]), 16)[1].unique()) == 16


@pytest.mark.parametrize("file", ["train.bin", "val.bin", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "grow"])
def test_a_folder_that_differs_from_its_meta_is_refused_with_the_remedy(tmp_path, file, damage):
    folder = counting_dataset(tmp_path / "d")
    path = folder / file
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    path.unlink()
    if damage != "remove":
        path.write_bytes(content[:-3] if damage == "truncate" else content + b"xx" if damage == "grow" else content)
    with pytest.raises(ConfigError, match=r"does not match its meta.json .*delete the folder"):
        TokenData(folder)


@pytest.mark.parametrize("meta", ["", "[]", "{}", '{"format": 1}', "null", '{"format": 1, "sha256": {}}'])
def test_a_broken_meta_is_refused(tmp_path, meta):
    folder = counting_dataset(tmp_path / "d")
    (folder / "meta.json").write_text(meta, encoding="utf-8")
    with pytest.raises(ConfigError, match="no readable meta.json"):
        TokenData(folder)


def test_a_newer_format_is_named(tmp_path):
    folder = counting_dataset(tmp_path / "d")
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    (folder / "meta.json").write_text(json.dumps({**meta, "format": 99}), encoding="utf-8")
    with pytest.raises(ConfigError, match="format 99"):
        TokenData(folder)


@pytest.mark.parametrize("change", [
    {"tokens": {"train": 10**15, "val": 1}}, {"tokens": {"train": 1.5, "val": 1}}, {"tokens": {"train": -1, "val": 1}}, {"dtype": "float64"},
    {"vocab_size": 3}, {"vocab_size": None}, {"sha256": {"../x": "0"}}, {"sha256": {"train.bin": 1, "val.bin": 1, "tokenizer.json": 1}}, {"name": 5},
])
def test_a_meta_that_agrees_with_itself_but_not_with_the_files_is_refused(tmp_path, change):
    folder = counting_dataset(tmp_path / "d")
    write_sealed(folder / "meta.json", {**read_meta(folder), **change})
    with pytest.raises(ConfigError, match=r"meta\.json"):
        TokenData(folder)


def test_no_digit_of_meta_changes_unnoticed(tmp_path):
    folder = counting_dataset(tmp_path / "d")
    whole = (folder / "meta.json").read_text(encoding="utf-8")
    for key, value in (("tokens", 999), ("name", "u"), ("source", "u"), ("vocab_size", 9), ("format", 1)):
        values = json.loads(whole)
        (folder / "meta.json").write_text(json.dumps({**values, key: value}), encoding="utf-8")
        with pytest.raises(ConfigError, match="SHA-256 differs"):
            TokenData(folder)
    # 第一版没有摘要，照样能读
    del values["digest"]
    (folder / "meta.json").write_text(json.dumps({**values, "format": 1}), encoding="utf-8")
    assert TokenData(folder).fingerprint


def test_ids_beyond_the_vocabulary_are_refused(tmp_path):
    folder = counting_dataset(tmp_path / "d")
    meta = read_meta(folder)
    for split in ("train", "val"):
        path = folder / f"{split}.bin"
        before = path.read_bytes()
        path.write_bytes(before[:-2] + b"\xff\xff")
        write_sealed(folder / "meta.json", {**meta, "sha256": {file: sha256(folder / file) for file in meta["sha256"]}})
        with pytest.raises(ConfigError, match=rf"{split}\.bin does not match its meta\.json .id 65535"):
            TokenData(folder)
        path.write_bytes(before)


@pytest.mark.parametrize("content", [
    "", "[]", "{}", '{"kind": "x"}', '{"kind": "char"}', '{"kind": "char", "characters": 5}', '{"kind": "library", "tokenizers": {}, "end_of_text": null}',
    '{"kind": "bpe", "name": "x", "pattern": "(a+)+$", "ranks": ["YQ=="], "special": {}}', "[" * 99999,
])
def test_a_vocabulary_that_is_none_is_one_line(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"tokenizer\.json is not a vocabulary"):
        tokenizers.load(tmp_path / "tokenizer.json")


def test_a_block_longer_than_the_data_is_refused_and_the_limit_named_works(tmp_path):
    data = TokenData(counting_dataset(tmp_path / "d", train=50, val=20))
    with pytest.raises(ConfigError, match=r"model.block_size=64 is longer than the val split \(20 tokens\); choose model.block_size=19 or less"):
        data.check_block_size(64)
    data.check_block_size(19)
    data.starts(0, 0, 5, 19)
    with pytest.raises(ConfigError, match="the val split has 1 tokens, too few to train on: give more text"):
        TokenData(counting_dataset(tmp_path / "e", train=50, val=1)).check_block_size(64)


def test_small_vocabularies_take_one_byte_a_token(tmp_path):
    folder = write_dataset(tmp_path / "d", name="t", source="t", tokenizer=ByteTokenizer(), train=[np.arange(256)], val=[np.arange(9)])
    assert (folder / "train.bin").stat().st_size == 256
    assert TokenData(folder).tokens["train"][255] == 255


def test_a_failed_preparation_leaves_nothing(tmp_path):
    def broken():
        yield np.arange(5)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_dataset(tmp_path / "d", name="t", source="t", tokenizer=ByteTokenizer(), train=broken(), val=[])
    assert list(tmp_path.iterdir()) == []


def test_the_fingerprint_changes_with_any_token(tmp_path):
    one = TokenData(counting_dataset(tmp_path / "a"))
    same = TokenData(counting_dataset(tmp_path / "b"))
    other = TokenData(counting_dataset(tmp_path / "c", train=999))
    assert one.fingerprint == same.fingerprint != other.fingerprint


SCRIPT = """
from pathlib import Path
from nanogpt.data.corpus import build_char_tokenizer, write_dataset
def prepare(folder, source, repeat=1):
    files = [Path(source)] if Path(source).is_file() else sorted(Path(source).rglob("*.txt"))
    text = "".join(file.read_text(encoding="utf-8") for file in files) * repeat
    t = build_char_tokenizer([text])
    write_dataset(folder, name="mine", source=source, tokenizer=t, train=[t.encode(text)], val=[t.encode(text[:9])])
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A data set of one's own, one script: mine(source, dir, **options) -> its training text."""
    script = tmp_path / "data" / "mine" / "prepare.py"
    script.parent.mkdir(parents=True)
    script.write_text(SCRIPT, encoding="utf-8")
    monkeypatch.setattr("nanogpt.base.config.ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)

    def prepare(source, directory=None, **options):
        data = TokenData(corpus.prepare("mine", directory, {"source": source, **options}))
        return data.tokenizer.decode(data.tokens["train"])

    return prepare


def test_ones_own_data_set_follows_its_text_its_options_and_its_script(mine, tmp_path, capsys):
    (tmp_path / "songs.txt").write_text("la la land", encoding="utf-8")
    (tmp_path / "other.txt").write_text("something else", encoding="utf-8")
    assert mine("other.txt") == "something else" and mine("songs.txt") == "la la land" and mine("songs.txt", repeat=2) == "la la land" * 2
    capsys.readouterr()
    assert mine("other.txt") == "something else"
    assert "mine: uses " in (said := capsys.readouterr().err) and "prepared from other.txt (14 training and 9 validation tokens)" in said and "preparing" not in said
    (tmp_path / "songs.txt").write_text("la la love", encoding="utf-8")
    assert mine("songs.txt") == mine(str(tmp_path / "songs.txt")) == "la la love"
    (tmp_path / "data/mine/prepare.py").write_text(SCRIPT.replace("text = ", 'text = "!" + '), encoding="utf-8")
    assert mine("songs.txt") == "!la la love"
    assert len(list((tmp_path / "data/mine").glob("prepared-*"))) == 5


def test_ones_own_data_set_follows_every_file_of_a_folder(mine, tmp_path):
    for name, text in (("a/x.txt", "first text "), ("b/y.txt", "second text ")):
        (tmp_path / "texts" / name).parent.mkdir(parents=True)
        (tmp_path / "texts" / name).write_text(text, encoding="utf-8")
    assert mine("texts") == "first text second text "
    (tmp_path / "texts/b/y.txt").write_text("another text", encoding="utf-8")
    assert mine("texts") == "first text another text"
    (tmp_path / "texts/b/y.txt").rename(tmp_path / "texts/a/0.txt")
    assert mine("texts") == "another textfirst text "


def test_a_named_folder_made_from_something_else_is_used_and_said(mine, tmp_path, capsys):
    (tmp_path / "songs.txt").write_text("la la land", encoding="utf-8")
    assert mine("songs.txt", "d") == mine("songs.txt", "d") == "la la land" and "another text" not in capsys.readouterr().err
    assert mine("songs.txt", "d", repeat=2) == "la la land" and "dataset.dir=d was made from another text, with other options" in capsys.readouterr().err
    # 原文不在了：说不上同与不同
    (tmp_path / "songs.txt").unlink()
    assert mine("songs.txt", "d") == "la la land"


def test_what_an_earlier_version_prepared_is_left_alone(mine, tmp_path):
    (tmp_path / "songs.txt").write_text("la la land", encoding="utf-8")
    before = counting_dataset(tmp_path / "data/mine/prepared")
    assert mine("songs.txt") == "la la land" and (before / "meta.json").is_file()


def test_a_foreign_folder_is_never_replaced(tmp_path):
    (tmp_path / "precious.txt").write_text("mine", encoding="utf-8")
    # 也不能叫人删掉它
    with pytest.raises(ConfigError, match="has no meta.json and is no data set; name another folder"):
        corpus.prepare("text_file", str(tmp_path), {"path": "x", "tokenizer": "char", "encoding": "auto", "val_fraction": 0.1})
    assert (tmp_path / "precious.txt").read_text(encoding="utf-8") == "mine"


def test_copying_a_dataset_keeps_it_valid(tmp_path):
    from nanogpt.data.tokens import copy_dataset

    folder = counting_dataset(tmp_path / "d")
    copy_dataset(folder, tmp_path / "run" / "data")
    shutil.rmtree(folder)
    assert len(TokenData(tmp_path / "run" / "data").tokens["train"]) == 1000


def test_a_held_out_part_is_validated_on_and_never_trained_on(tmp_path):
    data = TokenData(counting_dataset(tmp_path / "d"))
    data.hold_out(0.1)
    held = set(data.tokens["val"].tolist())
    # 每五十个里的最后五个：散在整份文字里
    assert held == {n for n in range(1000) if n % 50 >= 45}
    assert set(data.rows("train", data.starts(1, 0, 60, 16), 16)[1].flatten().tolist()) == set(range(1000)) - held


def test_bits_per_byte_are_the_bits_of_the_text_over_its_bytes_whatever_the_vocabulary(tmp_path):
    text = "春眠不觉晓, spring sleep\n" * 8
    per_byte = {}
    for tokenizer in (build_char_tokenizer([text]), ByteTokenizer(), ByteTokenizer(("<|endoftext|>",))):
        ids = tokenizer.encode(text)
        data = TokenData(write_dataset(
            tmp_path / f"{tokenizer.kind}{tokenizer.vocab_size}", name="t", source="t", tokenizer=tokenizer, train=[ids], val=[ids]))
        counts = tokenizers.byte_counts(tokenizer)
        assert counts[ids].sum() == len(text.encode()) and (tokenizer.special == {} or counts[-1] == 0)
        # 第一个 token 不是目标：它的字节也不算
        targets, total = len(ids) - 1, len(text.encode()) - counts[ids[0]]
        bits = data.bits_per_byte(data.val_windows(16, None))
        assert bits == pytest.approx(targets / total / np.log(2))
        per_byte[tokenizer.kind] = bits * np.log(tokenizer.vocab_size)
        assert per_byte[tokenizer.kind] == pytest.approx(targets * np.log2(tokenizer.vocab_size) / total)
    assert per_byte["char"] < per_byte["byte"]


@pytest.fixture
def hashed_whole(tmp_path, monkeypatch):
    """The names of files that were read from end to end; files of any size are worth remembering."""
    monkeypatch.setenv("NANOGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "WORTH", 1)
    read = []
    for module in (shards, digests):
        name, original = ("sha256", sha256) if module is shards else ("digest", digests.digest)
        monkeypatch.setattr(module, name, lambda path, *look, original=original: read.append(path.name) or original(path, *look))
    return read


def aged(folder):
    """Files that were written a while ago."""
    for file in folder.iterdir():
        os.utime(file, (1e9, 1e9))
    return folder


def test_a_data_set_that_was_checked_is_not_read_again_unless_it_changed_or_verify_asks(tmp_path, hashed_whole):
    folder = aged(counting_dataset(tmp_path / "d"))
    first, second = TokenData(folder), TokenData(folder)
    assert len(hashed_whole) == 3 and second.fingerprint == first.fingerprint
    TokenData(folder, verify=True)
    assert len(hashed_whole) == 6
    content = bytearray((folder / "train.bin").read_bytes())
    content[4] ^= 1
    (folder / "train.bin").write_bytes(content)
    with pytest.raises(ConfigError, match="SHA-256 differs"):
        TokenData(folder)
    # 时间与大小都瞒过去了：只有 verify 看得出来
    aged(folder)
    assert TokenData(folder).fingerprint == first.fingerprint
    with pytest.raises(ConfigError, match="SHA-256 differs"):
        TokenData(folder, verify=True)


def test_what_was_just_written_or_cannot_be_remembered_is_read_again(tmp_path, hashed_whole):
    folder = counting_dataset(tmp_path / "d")
    for _ in range(2):
        TokenData(folder)
    assert len(hashed_whole) == 6
    (tmp_path / "cache").write_text("a file where the folder should be", encoding="utf-8")
    for _ in range(2):
        TokenData(aged(folder))
    assert len(hashed_whole) == 12


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 10**5, "null", '{"PATH": 1}', '{"PATH": [[], "x"]}'])
def test_a_memory_that_cannot_be_read_costs_a_reading_and_no_more(tmp_path, hashed_whole, content):
    text = tmp_path / "t" / "a.txt"
    text.parent.mkdir()
    text.write_text("abc", encoding="utf-8")
    aged(text.parent)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "hashed.json").write_text(content.replace("PATH", str(text)), encoding="utf-8")
    assert [digests.digest_of_text(text) for _ in range(2)] == [sha256(text)] * 2 and hashed_whole == ["a.txt"]
    assert digests.digest_of_text(text, verify=True) == sha256(text) and len(hashed_whole) == 2
