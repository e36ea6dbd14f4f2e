"""Faults in files: accidents that happen to them, and files that agree with their own hashes but mean harm.

All draw from the random.Random that they are given, so that a seed repeats an attack.
"""

import io
import json
import os
import pickle
import random
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import ledger  # noqa: F401 - 它把仓库根目录放进路径

# isort: split
import torch

from nanogpt.base.files import sha256
from nanogpt.base.hashed_json import write_sealed
from nanogpt.weights import checkpoint

# ---- 意外 ----


def flip(chance: random.Random, file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def truncate(chance: random.Random, file: Path) -> None:
    os.truncate(file, chance.randrange(file.stat().st_size))


def zero(chance: random.Random, file: Path) -> None:
    # 断电后常见：长度对，内容是一串 0
    content = bytearray(file.read_bytes())
    start = chance.randrange(len(content))
    content[start : start + 4096] = bytes(min(4096, len(content) - start))
    file.write_bytes(content)


def append(chance: random.Random, file: Path) -> None:
    with file.open("ab") as end:
        end.write(chance.randbytes(chance.randrange(1, 5000)))


def lose(_chance: random.Random, file: Path) -> None:
    file.unlink()


def become_a_folder(_chance: random.Random, file: Path) -> None:
    file.unlink()
    file.mkdir()


def noise(chance: random.Random, file: Path) -> None:
    file.write_bytes(chance.randbytes(chance.choice([1, 7, file.stat().st_size, 100_000])))


def other_version(chance: random.Random, file: Path) -> None:
    """Another format number, without the digest that belongs to it; any other file gets its first number changed."""
    number = chance.choice(["3", "99", "0", "-1", "1", "null", '"2"', "2.5", "true", "[2]", "1" * 5000])
    text = file.read_bytes().decode("latin-1")
    file.write_bytes(re.sub(r'"format": \d+|\d+', f'"format": {number}' if '"format"' in text else number[:3], text, count=1).encode("latin-1"))


ACCIDENTS: dict[str, Callable[[random.Random, Path], None]] = {
    "flipped bit": flip, "truncated": truncate, "zeros": zero, "appended": append, "lost": lose, "a folder in its place": become_a_folder,
    "noise": noise, "another format": other_version,
}


def swapped(chance: random.Random, run: Path, other: Path, iterations: tuple[int, ...]) -> str:
    """Exchange files or folders inside a run, or with another run of the same shape; says which."""
    name = chance.choice((*checkpoint.FILES, "manifest.json"))
    one, two = (f"ckpt/iter_{n:08d}" for n in chance.sample(iterations, 2))
    way = chance.choice([
        "files of two checkpoints", "folders of two checkpoints", "file of another run", "checkpoint of another run", "data of another run",
    ])
    if way == "files of two checkpoints":
        exchange(run / one / name, run / two / name)
    elif way == "folders of two checkpoints":
        exchange(run / one, run / two)
    elif way == "file of another run":
        shutil.copyfile(other / one / name, run / one / name)
    elif way == "checkpoint of another run":
        shutil.rmtree(run / one)
        shutil.copytree(other / one, run / one)
    else:
        shutil.copyfile(other.parent / "documents/data/train.bin", run / "data/train.bin")
    return way


def exchange(one: Path, two: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    two.rename(one)
    aside.rename(two)


# ---- 恶意 ----


class Planted:
    """A pickle that writes a file when it is loaded by anything that runs code."""

    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self):
        return (os.system, (f"touch {self.sentinel}",))


def reseal(folder: Path) -> None:
    """Make manifest.json or meta.json of a folder agree with its files again."""
    for name in ("manifest.json", "meta.json"):
        if (folder / name).is_file():
            values = json.loads((folder / name).read_text(encoding="utf-8"))
            write_sealed(folder / name, {**values, "sha256": {f: sha256(folder / f) for f in values["sha256"] if (folder / f).is_file()}})


def header(values: object, body: bytes = b"") -> bytes:
    """A safetensors file with this header."""
    head = values if isinstance(values, bytes) else json.dumps(values).encode("utf-8")
    return struct.pack("<Q", len(head)) + head + body


def tensors_that_lie(chance: random.Random) -> bytes:
    """A safetensors file whose header is not to be trusted."""
    huge = chance.choice([2**31, 2**40, 2**62, 2**63])
    return chance.choice([
        struct.pack("<Q", huge) + b"{}", header({"h.0.x": {"dtype": "F32", "shape": [huge], "data_offsets": [0, 4 * huge]}}),
        header({"a": {"dtype": "F32", "shape": [huge, 0], "data_offsets": [0, 0]}}), header(b"[" * 100_000),
        header({name: {"dtype": "F32", "shape": [2], "data_offsets": [at, at + 8]} for name, at in (("a", 0), ("b", 4))}, bytes(12)),
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, bytes(8)), header({"a": {"dtype": "Q99", "shape": [1]}}, bytes(8)),
        header({"../../x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"x"), header(b"\xff\xfe"), b"",
        header({f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}),
        header({"wte.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}, bytes(16)),
    ])


def bombs(chance: random.Random) -> bytes:
    """Text that grows or nests when it is read."""
    return chance.choice([
        b"[" * 200_000 + b"]" * 200_000, b'{"a":' * 100_000, b"9" * 100_000, b'{"n": 1e999999, "m": -1e999999}', b"{" * 50_000, b"NaN",
        b"\x00" * 1000,
        ("a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{c}: &{c} [{','.join(['*' + p] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi"))).encode("utf-8"),
        b"a: !!python/object/apply:os.system ['touch code-from-a-file-has-run']\n", b"a: ${oc.env:HOME}\n", b"- &x [*x]\n", b"'" * 9999,
    ])


def changed_config(chance: random.Random, text: str) -> str:
    """The config of a run with something that it never had."""
    huge = chance.choice(["1000000000", "10000000000000", "-1", "0", "1e30", "nan", ".inf", "null", "many", "[1]", "{}", "9" * 400])
    sizes = "n_layer n_embd n_head block_size vocab_size mlp_ratio ngram_buckets batch_size max_iters seed keep"
    key = chance.choice(sizes.split())
    return chance.choice([
        re.sub(rf"({key}: ).*", rf"\g<1>{huge}", text), re.sub(r"_target_: nanogpt\.model\.GPT", "_target_: os.system", text),
        re.sub(r"_target_: nanogpt\.optimizers\.\w+", "_target_: builtins.exec", text),
        re.sub(r"ngrams:(\n  - \d+)+", "ngrams: [2, 99999999999]", text),
        text + "\nnew_key: 1\n", text.replace("lang: en", "lang: ${oc.env:HOME}"), re.sub(r"(?s)model:.*", "model: 5", text), text[: len(text) // 2],
        re.sub(r"method: full", "method: lora", text), re.sub(r"rank: 8", "rank: 999999999999", re.sub(r"method: full", "method: lora", text)),
        re.sub(r"path: my\.txt", "path: ../../../../etc/passwd", text), re.sub(r"out_dir: .*", "out_dir: /etc", text),
    ])


def changed_state(chance: random.Random, text: str) -> str:
    """The state of a run with something that it never had."""
    return chance.choice([
        text.replace('"tensor": "000001"', '"tensor": "999999"', 1), text.replace('"tensor": "000002"', '"tensor": "000001"', 1),
        text.replace('"samples_seen", ', '"samples_seen", -', 1), re.sub(r'\["iteration", \d+\]', '["iteration", 1e300]', text),
        re.sub(r'\["iteration", \d+\]', '["iteration", "x"]', text), re.sub(r'\["best_val_loss", [^]]*\]', '["surprise", 1]', text),
        '{"dict": []}', '{"tensor": "000000"}', "[]", '{"call": ["os.system", "id"]}', '{"dict": [[{"dict": []}, 1]]}', '{"dict": 5}', "{}",
        re.sub(r'\["fingerprint", "[^"]*"\]', '["fingerprint", "x"]', text),
    ])


def changed_tokenizer(chance: random.Random, text: str) -> str:
    """A vocabulary with something that it never had."""
    bpe = {"kind": "bpe", "name": "x", "pattern": "(a+)+$", "ranks": ["YQ=="], "special": {}}
    return chance.choice([
        json.dumps(bpe), '{"kind": "char"}', '{"kind": "char", "characters": 5}', '{"kind": "char", "characters": "ab"}', '{"kind": "pickle"}', "[]",
        '{"kind": "char", "characters": "", "special": ["<|endoftext|>"]}', '{"kind": "library", "tokenizers": {"model": {}}, "end_of_text": null}',
        json.dumps({"kind": "byte", "special": ["x"] * 50_000}), json.dumps({**json.loads(text), "labels": {"style": {"x": [10**9]}}}),
        json.dumps({**bpe, "ranks": ["!!"]}), text.replace('"kind"', '"sort"'),
    ])


def malicious(chance: random.Random, folder: Path, sentinel: Path) -> str:
    """Change the checkpoint in a folder so that it agrees with its own hashes; says how."""
    way = chance.choice([
        "planted pickle", "planted pickle in format 1", "tensors that lie", "bomb", "changed config", "changed state", "changed vocabulary",
        "foreign tensors",
    ])
    file = chance.choice(checkpoint.FILES)
    if way == "planted pickle":
        payload = chance.choice([pickle.dumps(Planted(sentinel)), saved_by_torch(Planted(sentinel), chance.random() < 0.5)])
        (folder / file).write_bytes(payload)
    elif way == "planted pickle in format 1":
        as_format_1(folder, Planted(sentinel))
        return way
    elif way == "tensors that lie":
        (folder / chance.choice(["model.safetensors", "state.safetensors"])).write_bytes(tensors_that_lie(chance))
    elif way == "bomb":
        (folder / chance.choice(["state.json", "config.yaml", "tokenizer.json"])).write_bytes(bombs(chance))
    elif way == "foreign tensors":
        exchange(folder / "model.safetensors", folder / "state.safetensors")
    else:
        name, change = {
            "changed config": ("config.yaml", changed_config), "changed state": ("state.json", changed_state),
            "changed vocabulary": ("tokenizer.json", changed_tokenizer),
        }[way]
        (folder / name).write_text(change(chance, (folder / name).read_text(encoding="utf-8")), encoding="utf-8")
    reseal(folder)
    return way


def saved_by_torch(value: object, legacy: bool) -> bytes:
    file = io.BytesIO()
    torch.save({"model": value, "x": torch.zeros(2)}, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def as_format_1(folder: Path, value: object) -> None:
    """The folder as the first version wrote it, with `value` in its state.pt."""
    for name in ("state.json", "state.safetensors"):
        (folder / name).unlink()
    (folder / "state.pt").write_bytes(saved_by_torch(value, False))
    values = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    hashes = {file: sha256(folder / file) for file in checkpoint.FILES_1}
    old = {"format": 1, "iteration": values["iteration"], "val_loss": values["val_loss"], "sha256": hashes}
    (folder / "manifest.json").write_text(json.dumps(old), encoding="utf-8")


def malicious_data(chance: random.Random, folder: Path, sentinel: Path) -> str:
    """Change a data set so that it agrees with its own hashes; says how."""
    values = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    way = chance.choice(["ids beyond the vocabulary", "index that lies", "changed meta", "changed vocabulary", "planted pickle"])
    if way == "ids beyond the vocabulary":
        split = folder / f"{chance.choice(['train', 'val'])}.bin"
        split.write_bytes(b"\xff" * split.stat().st_size)
    elif way == "index that lies" and (folder / "train.docs.bin").is_file():
        index = folder / f"{chance.choice(['train', 'val'])}.docs.bin"
        content = bytearray(index.read_bytes())
        at = 8 * chance.randrange(len(content) // 8)
        content[at : at + 8] = struct.pack("<q", chance.choice([-1, -(2**62), 2**62, 10**6, 7]))
        index.write_bytes(content)
    elif way == "changed vocabulary":
        file = folder / "tokenizer.json"
        file.write_text(changed_tokenizer(chance, file.read_text(encoding="utf-8")), encoding="utf-8")
    elif way == "planted pickle":
        (folder / chance.choice(sorted(values["sha256"]))).write_bytes(pickle.dumps(Planted(sentinel)))
    else:
        key = chance.choice(sorted(values))
        values[key] = chance.choice([None, -1, 10**30, "x", [], {}, {"train": 10**15, "val": -1}, {"../x": "0"}, {"train": 1.5}, ["uint8"], "uint64"])
        write_sealed(folder / "meta.json", values)
        return f"{way}"
    reseal(folder)
    return way


def malicious_weights(chance: random.Random, place: Path, sentinel: Path) -> tuple[str, Path]:
    """Weights from elsewhere that mean harm: how, and what to start from."""
    folder = place / "folder"
    way = chance.choice([
        "nanoGPT checkpoint", "meta.pkl", "pytorch_model.bin", "shards elsewhere", "tensors that lie", "bomb", "changed config.json",
    ])
    if way == "nanoGPT checkpoint":
        (place / "ckpt.pt").write_bytes(saved_by_torch(Planted(sentinel), chance.random() < 0.5))
        return way, place / "ckpt.pt"
    if way == "meta.pkl":
        shape = {"n_layer": 1, "n_head": 1, "n_embd": 4, "block_size": 4, "vocab_size": 2, "bias": False}
        torch.save({"model_args": shape, "model": {}, "config": {}}, place / "ckpt.pt")
        (place / "meta.pkl").write_bytes(pickle.dumps({"itos": Planted(sentinel)}, protocol=chance.randrange(6)))
        return way, place / "ckpt.pt"
    if way == "tensors that lie":
        (folder / "model.safetensors").write_bytes(tensors_that_lie(chance))
    elif way == "bomb":
        (folder / chance.choice(["config.json", "tokenizer.json"])).write_bytes(bombs(chance))
    elif way == "changed config.json":
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        key = chance.choice(["n_layer", "n_head", "n_embd", "n_positions", "vocab_size", "n_inner", "model_type"])
        values[key] = chance.choice([10**9, -1, 0, None, "x", 1.5, []])
        (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    else:
        (folder / "model.safetensors").unlink()
        payload = saved_by_torch(Planted(sentinel), chance.random() < 0.5)
        (folder / "pytorch_model.bin").write_bytes(payload)
        if way == "shards elsewhere":
            (place / "evil.bin").write_bytes(payload)
            (folder / "pytorch_model.bin").rename(folder / "part.bin")
            index = {"weight_map": {"x": chance.choice(["../evil.bin", "/etc/passwd", "part.bin", "", 5])}}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
    return way, folder
