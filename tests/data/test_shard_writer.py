"""Large corpora: the same files for any number of processes, finished parts kept, every byte range read once."""

import gzip
import json
import os
import pickle
import random

import numpy as np
import pytest
from test_corpus import script

from nanogpt.base.language import ConfigError
from nanogpt.base.lock import only_one
from nanogpt.data import corpus, document_files, shard_writer
from nanogpt.data.document_files import find_corpus
from nanogpt.data.tokens import TokenData, read_meta

OPTIONS = {
    "tokenizer": "byte", "subset": None, "split": "train", "revision": None, "column": "text", "vocab_size": 300,
    "shard_tokens": 2000, "val_fraction": 0.1, "max_tokens": None, "processes": 1,
}


@pytest.fixture(autouse=True)
def nothing_is_flushed(monkeypatch):
    """Flushing a few hundred small files takes seconds and proves nothing here."""
    for module in ("nanogpt.base.files", "nanogpt.data.shard_writer"):
        monkeypatch.setattr(f"{module}.sync", lambda path: None)


def texts(count=120, seed=0):
    made = random.Random(seed)
    return [f"{n} " + "".join(made.choice("abc \n春é") for _ in range(made.randrange(1, 120))) for n in range(count)]


def write_jsonl(folder, documents, name="a.jsonl"):
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"text": text, "id": n}, ensure_ascii=n % 2 == 0) + "\n" for n, text in enumerate(documents)]
    (folder / name).write_text("".join(lines), encoding="utf-8", newline="\n")
    return folder


def write_parquet(folder, documents):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder.mkdir(exist_ok=True)
    table = pyarrow.table({"id": list(range(len(documents))), "text": documents})
    parquet.write_table(table, folder / "a.parquet", row_group_size=40)
    return folder


def prepare(folder, path, **options):
    script("hf").prepare(folder, str(path), **{**OPTIONS, **options})
    return folder


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def documents_in(data):
    """All documents of a prepared folder of bytes with nothing between them."""
    return data.tokenizer.decode(data.tokens["train"][:]), data.tokenizer.decode(data.tokens["val"])


def read(found, size):
    return ["".join(piece.text for piece in found.documents(part)) for part in found.parts(size)]


def test_any_number_of_processes_writes_the_same_files(tmp_path):
    source = write_jsonl(tmp_path / "texts", texts())
    write_jsonl(source, texts(seed=1), "b.jsonl")
    one, two = prepare(tmp_path / "one", source), prepare(tmp_path / "two", source, processes=2)
    assert content(one) == content(two) and not list(tmp_path.glob(".*"))
    meta = read_meta(one)
    assert len(meta["shards"]) > 5 and all(500 <= count <= 2500 for count in meta["shards"].values())
    train, val = documents_in(TokenData(one, verify=True))
    joined = "".join(texts() + texts(seed=1))
    assert sorted(train + val) == sorted(joined) and 0.03 < len(val) / len(joined) < 0.2


def test_one_file_is_prepared_as_before_and_holds_the_same_texts(tmp_path):
    source = write_jsonl(tmp_path / "texts", texts())
    many, one = TokenData(prepare(tmp_path / "many", source)), TokenData(prepare(tmp_path / "one", source, shard_tokens=None))
    assert "shards" not in one.meta and isinstance(one.tokens["train"], np.memmap)
    assert documents_in(many) == documents_in(one)


@pytest.mark.parametrize(("kind", "size"), [("jsonl", 16), ("jsonl", 500), ("jsonl", 10**6), ("parquet", 700), ("parquet", 10**6), ("txt", 7), ("txt", 100)])
def test_every_record_is_in_one_part_however_the_bytes_are_divided(tmp_path, kind, size):
    written = texts(80)
    if kind == "txt":
        (tmp_path / "t").mkdir()
        for number in range(0, 80, 8):
            (tmp_path / "t" / f"{number:02d}.txt").write_text("\n".join(written[number : number + 8]), encoding="utf-8", newline="")
        written = ["\n".join(written[number : number + 8]) for number in range(0, 80, 8)]
    else:
        {"jsonl": write_jsonl, "parquet": write_parquet}[kind](tmp_path / "t", written)
    found = find_corpus(str(tmp_path / "t"), None, "train", None, "text")
    pieces = [piece for part in found.parts(size) for piece in found.documents(part)]
    assert "".join(piece.text for piece in pieces) == "".join(written) and sum(piece.ends for piece in pieces) == len(written)


def test_text_files_end_where_they_end_and_long_lines_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(document_files, "PIECE", 16)
    monkeypatch.setattr(document_files, "MOST_PIECES", 2)
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\r\n".encode() + "春".encode() * 50)
    (tmp_path / "b.txt").write_bytes(b"last\n")
    found = find_corpus(str(tmp_path), None, "train", None, "text")
    pieces = list(found.documents(found.parts(10**6)[0]))
    assert "".join(piece.text for piece in pieces) == "one\ntwo\n" + "春" * 50 + "last\n" and len(pieces) > 4
    assert [piece.ends for piece in pieces].count(True) == 2 and pieces[-1].ends
    assert "".join(read(found, 20)) == "one\ntwo\n" + "春" * 50 + "last\n"


def test_a_preparation_that_ended_early_goes_on_with_what_is_whole(tmp_path, monkeypatch, capsys):
    source = write_jsonl(tmp_path / "texts", texts())
    whole, parts, did = content(prepare(tmp_path / "whole", source, shard_tokens=1000)), tmp_path / ".d.parts", []
    original = shard_writer.Job._written

    def written(self, number, aside, told):
        if len(did) == 3:
            raise OSError(28, "No space left on device")
        did.append(number)
        return original(self, number, aside, told)

    monkeypatch.setattr(shard_writer.Job, "_written", written)
    with pytest.raises(OSError, match="No space"):
        prepare(tmp_path / "d", source, shard_tokens=1000)
    assert did == [0, 1, 2] and not (tmp_path / "d").exists() and len(list(parts.glob("part-*.json"))) == 3
    # 其中一个的文件坏了：只有它重做
    damaged = next(parts.glob("part-00001-train-*.bin"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    did[:] = [None, None]
    monkeypatch.setattr(shard_writer.Job, "_written", lambda self, number, *rest: did.append(number) or original(self, number, *rest))
    capsys.readouterr()
    assert content(prepare(tmp_path / "d", source, shard_tokens=1000)) == whole and "going on where it was left: 3 of" in capsys.readouterr().err
    assert did[2:4] == [1, 3] and 0 not in did and 2 not in did and not parts.exists()


@pytest.mark.parametrize("name", ["_join", "write_meta", "new_dataset"])
@pytest.mark.parametrize("linked", [True, False])
def test_what_fails_at_the_very_end_keeps_every_part(tmp_path, monkeypatch, name, linked):
    if not linked:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(95, "Operation not supported")))
    source, count = write_jsonl(tmp_path / "texts", texts()), []
    whole, real = content(prepare(tmp_path / "whole", source, shard_tokens=1000)), getattr(shard_writer, name)

    def full(*asked, **how):
        count.append(name)
        if len(count) > (3 if name == "_join" else 0):
            raise OSError(28, "No space left on device")
        return real(*asked, **how)

    with monkeypatch.context() as changed:
        changed.setattr(shard_writer, name, full)
        with pytest.raises(OSError, match="No space"):
            prepare(tmp_path / "d", source, shard_tokens=1000)
    assert not (tmp_path / "d").exists()
    monkeypatch.setattr(shard_writer.Job, "_written", lambda *_: 1 / 0)
    assert content(prepare(tmp_path / "d", source, shard_tokens=1000)) == whole
    assert {path.name for path in tmp_path.iterdir()} == {"texts", "whole", "d"}


def test_parts_whose_data_set_is_whole_go_when_it_is_used_again(tmp_path):
    source = write_jsonl(tmp_path / "texts", texts())
    options = {**OPTIONS, "path": str(source)}
    folder = corpus.prepare("hf", str(tmp_path / "d"), options)
    corpus.parts_of(folder).mkdir()
    with only_one(tmp_path / ".d.lock"):
        corpus.prepare("hf", str(folder), options)
        assert corpus.parts_of(folder).is_dir()
    corpus.prepare("hf", str(folder), options)
    assert {path.name for path in tmp_path.iterdir()} == {"texts", "d"}


def test_parts_of_another_tokenizer_are_not_taken_for_ones_own(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "texts", texts())
    whole = content(prepare(tmp_path / "whole", source))
    with monkeypatch.context() as changed:
        changed.setattr(shard_writer, "_join", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(tmp_path / "d", source, tokenizer="bpe", vocab_size=300)
    assert (tmp_path / ".d.parts").is_dir() and content(prepare(tmp_path / "d", source)) == whole


def test_a_limit_takes_the_first_files_whatever_was_done_beyond_them(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "texts", texts())
    every = TokenData(prepare(tmp_path / "all", source, shard_tokens=1000))
    limited = prepare(tmp_path / "some", source, shard_tokens=1000, max_tokens=4000)
    train = TokenData(limited).tokens["train"]
    assert 4000 <= len(train) < 5500 and np.array_equal(train[:], every.tokens["train"][: len(train)])
    # 几个进程会多做几份，做完的次序也不定
    monkeypatch.setattr(shard_writer, "_in_turn", lambda job, advance: {n: job.do(n, advance) for n in reversed(range(len(job.parts)))})
    assert content(prepare(tmp_path / "beyond", source, shard_tokens=1000, max_tokens=4000)) == content(limited)


def test_text_for_validation_is_chosen_by_its_content_alone(tmp_path):
    source = write_jsonl(tmp_path / "texts", texts())
    write_jsonl(source, texts()[::-1], "b.jsonl")
    train, val = documents_in(TokenData(prepare(tmp_path / "d", source)))
    shared = [text for text in texts() if len(text) > 40 and text in val]
    assert shared and not any(text in train for text in shared)


def test_packed_files_and_addresses_are_read_like_local_ones(tmp_path):
    import fsspec

    source = write_jsonl(tmp_path / "texts", texts())
    plain = documents_in(TokenData(prepare(tmp_path / "plain", source)))
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "a.jsonl.gz").write_bytes(gzip.compress((source / "a.jsonl").read_bytes()))
    assert documents_in(TokenData(prepare(tmp_path / "unpacked", tmp_path / "packed"))) == plain
    fsspec.filesystem("memory").pipe("/raw/a.jsonl", (source / "a.jsonl").read_bytes())
    assert documents_in(TokenData(prepare(tmp_path / "far", "memory://raw"))) == plain


def test_a_data_set_of_the_hub_is_found_by_the_datasets_library(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    write_parquet(tmp_path / "pq", texts(90))
    # 本机的文件夹代替 hub：走的是同一个 load_dataset_builder
    [(file, size)] = document_files._hub_files(str(tmp_path / "pq"), None, "train", None)
    assert file.endswith("a.parquet") and size == os.path.getsize(tmp_path / "pq" / "a.parquet")
    with pytest.raises(ConfigError, match=r"cannot be read .*dataset.split=test: choose one of train"):
        document_files._hub_files(str(tmp_path / "pq"), None, "test", None)
    monkeypatch.setattr(document_files, "_hub_files", lambda *_: [(file, size)])
    folder = prepare(tmp_path / "d", "some/corpus", subset="sample")
    train, val = documents_in(TokenData(folder))
    assert sorted(train + val) == sorted("".join(texts(90))) and read_meta(folder)["source"] == "some/corpus sample"


@pytest.mark.parametrize(("change", "said"), [
    ({"path": None}, "dataset.path is not set"), ({"path": "nowhere"}, "dataset.path=nowhere: there is no such file"),
    ({"tokenizer": "char"}, "dataset.tokenizer=char is not for large corpora"), ({"column": "body"}, r"dataset.column=body: .*a.jsonl:1 has no such column; choose one of: text, id"),
    ({"column": "id"}, "holds a value of type int"), ({"val_fraction": 0}, "dataset.val_fraction=0"), ({"shard_tokens": 10}, "dataset.shard_tokens=10"),
    ({"val_fraction": 1e-9}, "0 for validation are too few"), ({"path": "s3://no/where"}, "dataset.path: s3://no/where cannot be read"),
    ({"path": "empty"}, "has no file with text in it"),
])
def test_what_cannot_be_prepared_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, change, said):
    write_jsonl(tmp_path / "texts", texts(20))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.pdf").write_bytes(b"%PDF")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=said) as error:
        script("hf").prepare(tmp_path / "d", **{"path": "texts", **OPTIONS, **change})
    assert "\n" not in str(error.value) and not (tmp_path / "d").exists() and pickle.loads(pickle.dumps(error.value)).args == error.value.args
    assert not (tmp_path / ".d.parts").exists() or change == {"val_fraction": 1e-9}


@pytest.mark.parametrize(("name", "written", "said"), [
    ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2: this is not a JSON object"), ("a.jsonl", b'{"text": "x"}\n[1]\n', "line 2: .*a list"),
    ("a.jsonl", b'{"text": "\xff"}\n', "line 1: this is not a JSON object"), ("a.txt", b"fine\n\xc3\x28", "byte 5 is not UTF-8"),
    ("a.parquet", b"PAR1 nothing", "a.parquet cannot be read"), ("a.jsonl.gz", b"nothing", "a.jsonl.gz cannot be read"),
])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, written, said):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / name).write_bytes(written)
    with pytest.raises(ConfigError, match=said):
        prepare(tmp_path / "d", tmp_path / "t")


def test_a_corpus_is_known_by_names_sizes_and_times_and_not_by_the_processes(tmp_path):
    source = write_jsonl(tmp_path / "texts", texts(20))
    module = script("hf")

    def identity(**options):
        return corpus.identity_of(module, {**OPTIONS, "path": str(source), **options})

    first = identity()
    assert identity(processes=7) == first != identity(shard_tokens=3000)
    os.utime(source / "a.jsonl", (1e9, 1e9))
    assert identity() != first
