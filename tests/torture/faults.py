"""Faults in files: accidents that happen to them, and files that agree with their own hashes but mean harm."""

# 意外：位翻转、截断、丢失、调换，摘要对不上；恶意：摘要全都重算过，只能靠每一处自己的检查
# 每种都从 chance（hypothesis 给的随机数）抽取，同一个案例可以重做

import io
import json
import os
import pickle
import re
import shutil
import struct
from pathlib import Path
from random import Random

import torch
from conftest import reseal

from nanogpt.base.files import sha256
from nanogpt.base.hashed_json import write_sealed
from nanogpt.weights import checkpoint

# ---- 意外 ----


def flip(chance: Random, file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def zero(chance: Random, file: Path) -> None:
    # 断电后常见：长度对，内容是一串 0
    content = bytearray(file.read_bytes())
    start = chance.randrange(len(content))
    content[start : start + 4096] = bytes(min(4096, len(content) - start))
    file.write_bytes(content)


def append(chance: Random, file: Path) -> None:
    file.write_bytes(file.read_bytes() + os.urandom(chance.randrange(1, 5000)))


def become_a_folder(_chance: Random, file: Path) -> None:
    file.unlink()
    file.mkdir()


def noise(chance: Random, file: Path) -> None:
    file.write_bytes(os.urandom(chance.choice([1, 7, file.stat().st_size, 100_000])))


def other_version(chance: Random, file: Path) -> None:
    """Another format number, without the digest that belongs to it; any other file gets its first number changed."""
    number = chance.choice(["3", "99", "0", "-1", "1", "null", '"2"', "2.5", "true", "[2]", "1" * 5000])
    text = file.read_bytes().decode("latin-1")
    wanted = f'"format": {number}' if '"format"' in text else number[:3]
    file.write_bytes(re.sub(r'"format": \d+|\d+', wanted, text, count=1).encode("latin-1"))


ACCIDENTS = {
    "flipped bit": flip, "truncated": lambda chance, file: os.truncate(file, chance.randrange(file.stat().st_size)), "zeros": zero,
    "appended": append, "lost": lambda _, file: file.unlink(), "a folder in its place": become_a_folder, "noise": noise,
    "another format": other_version,
}
SWAPS = ("files of two checkpoints", "folders of two checkpoints", "file of another run", "checkpoint of another run", "data of another run")


def swap(way: str, chance: Random, run: Path, other: Path, iterations: tuple[int, ...]) -> None:
    """Exchange files or folders inside a run, or with another run of the same shape."""
    name = chance.choice((*checkpoint.FILES, "manifest.json"))
    one, two = (f"ckpt/iter_{n:08d}" for n in chance.sample(iterations, 2))
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


def exchange(one: Path, two: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    two.rename(one)
    aside.rename(two)


# ---- 恶意 ----


class Planted:
    """A pickle that writes a file when it is loaded by anything that runs code."""

    # 文件一出现，就说明代码跑过了
    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self):
        return (os.system, (f"touch {self.sentinel}",))


def header(values: object, body: bytes = b"") -> bytes:
    """A safetensors file with this header."""
    head = values if isinstance(values, bytes) else json.dumps(values).encode("utf-8")
    return struct.pack("<Q", len(head)) + head + body


def tensors_that_lie(chance: Random) -> bytes:
    """A safetensors file whose header is not to be trusted."""
    huge = chance.choice([2**31, 2**40, 2**62, 2**63])

    def one(name: str, dtype: str, shape: list, begin: int, end: int, body: bytes = b"") -> bytes:
        return header({name: {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}, body)

    return chance.choice([
        struct.pack("<Q", huge) + b"{}", one("h.0.x", "F32", [huge], 0, 4 * huge), one("a", "F32", [huge, 0], 0, 0), header(b"[" * 100_000),
        header({n: {"dtype": "F32", "shape": [2], "data_offsets": [at, at + 8]} for n, at in (("a", 0), ("b", 4))}, bytes(12)),
        one("a", "F32", [2], 8, 0, bytes(8)), header({"a": {"dtype": "Q99", "shape": [1]}}, bytes(8)), one("../../x", "U8", [1], 0, 1, b"x"),
        header(b"\xff\xfe"), b"", one("wte.weight", "F32", [2, 2], 0, 16, bytes(16)),
        header({f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}),
    ])


def bombs(chance: Random) -> bytes:
    """Text that grows or nests when it is read."""
    laughs = "".join(f"{c}: &{c} [{','.join(['*' + p] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True))
    return chance.choice([
        b"[" * 200_000 + b"]" * 200_000, b'{"a":' * 100_000, b"9" * 100_000, b'{"n": 1e999999, "m": -1e999999}', b"{" * 50_000, b"NaN",
        b"\0" * 1000, b"a: &a [x,x,x,x,x,x,x,x,x]\n" + laughs.encode("utf-8"), b"a: ${oc.env:HOME}\n", b"- &x [*x]\n", b"'" * 9999,
        b"a: !!python/object/apply:os.system ['touch code-from-a-file-has-run']\n",
    ])


def changed_config(chance: Random, text: str) -> str:
    """The config of a run with something that it never had."""
    huge = chance.choice(["1000000000", "10000000000000", "-1", "0", "1e30", "nan", ".inf", "null", "many", "[1]", "{}", "9" * 400])
    key = chance.choice("n_layer n_embd n_head block_size vocab_size mlp_ratio ngram_buckets batch_size max_iters seed keep".split())
    lora = re.sub("method: full", "method: lora", text)
    return chance.choice([
        re.sub(rf"({key}: ).*", rf"\g<1>{huge}", text), re.sub(r"_target_: nanogpt\.[\w.]*GPT", "_target_: os.system", text),
        re.sub(r"(optimizer:\n  _target_: ).*", r"\g<1>builtins.exec", text), re.sub(r"ngrams:(\n  - \d+)+", "ngrams: [2, 99999999999]", text),
        text + "\nnew_key: 1\n", text.replace("lang: en", "lang: ${oc.env:HOME}"), re.sub(r"(?s)model:.*", "model: 5", text), lora,
        text[: len(text) // 2], re.sub("rank: 8", "rank: 999999999999", lora), re.sub(r"out_dir: .*", "out_dir: /etc", text),
        re.sub(r"path: .*\.txt", "path: ../../../../etc/passwd", text),
    ])


def changed_state(chance: Random, text: str) -> str:
    """The state of a run with something that it never had."""
    return chance.choice([
        text.replace('"tensor": "000001"', '"tensor": "999999"', 1), text.replace('"tensor": "000002"', '"tensor": "000001"', 1),
        text.replace('"samples_seen", ', '"samples_seen", -', 1), re.sub(r'\["iteration", \d+\]', '["iteration", 1e300]', text),
        re.sub(r'\["iteration", \d+\]', '["iteration", "x"]', text), re.sub(r'\["best_val_loss", [^]]*\]', '["surprise", 1]', text),
        '{"dict": []}', '{"tensor": "000000"}', "[]", '{"call": ["os.system", "id"]}', '{"dict": [[{"dict": []}, 1]]}', '{"dict": 5}', "{}",
        re.sub(r'\["fingerprint", "[^"]*"\]', '["fingerprint", "x"]', text),
    ])


def changed_tokenizer(chance: Random, text: str) -> str:
    """A vocabulary with something that it never had."""
    bpe = {"kind": "bpe", "name": "x", "pattern": "(a+)+$", "ranks": ["YQ=="], "special": {}}
    return chance.choice([
        json.dumps(bpe), '{"kind": "char"}', '{"kind": "char", "characters": 5}', '{"kind": "char", "characters": "ab"}', "[]",
        '{"kind": "pickle"}', '{"kind": "char", "characters": "", "special": ["<|endoftext|>"]}', text.replace('"kind"', '"sort"'),
        '{"kind": "library", "tokenizers": {"model": {}}, "end_of_text": null}', json.dumps({"kind": "byte", "special": ["x"] * 50_000}),
        json.dumps({**json.loads(text), "labels": {"style": {"x": [10**9]}}}), json.dumps({**bpe, "ranks": ["!!"]}),
    ])


def change(file: Path, how, chance: Random) -> None:
    file.write_text(how(chance, file.read_text(encoding="utf-8")), encoding="utf-8")


IN_A_CHECKPOINT = (
    "planted pickle", "planted pickle in format 1", "tensors that lie", "bomb", "changed config", "changed state", "changed vocabulary",
    "foreign tensors",
)


def in_a_checkpoint(way: str, chance: Random, folder: Path, sentinel: Path) -> None:
    """Change the checkpoint in a folder so that it agrees with its own hashes."""
    tensors = [name for name in checkpoint.FILES if name.endswith(".safetensors")]
    if way == "planted pickle":
        planted = chance.choice([pickle.dumps(Planted(sentinel)), saved_by_torch(Planted(sentinel), chance.choice([False, True]))])
        (folder / chance.choice(checkpoint.FILES)).write_bytes(planted)
    elif way == "planted pickle in format 1":
        return as_format_1(folder, Planted(sentinel))
    elif way == "tensors that lie":
        (folder / chance.choice(tensors)).write_bytes(tensors_that_lie(chance))
    elif way == "bomb":
        (folder / chance.choice(["state.json", "config.yaml", "tokenizer.json"])).write_bytes(bombs(chance))
    elif way == "foreign tensors":
        exchange(folder / tensors[0], folder / tensors[1])
    else:
        changes = {"config": ("config.yaml", changed_config), "state": ("state.json", changed_state)}
        name, how = changes.get(way.split()[1], ("tokenizer.json", changed_tokenizer))
        change(folder / name, how, chance)
    reseal(folder)


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


IN_DATA = ("ids beyond the vocabulary", "index that lies", "changed meta", "changed vocabulary", "planted pickle")


def in_data(way: str, chance: Random, folder: Path, sentinel: Path) -> None:
    """Change a data set so that it agrees with its own hashes."""
    values = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    split = chance.choice(["train", "val"])
    if way == "ids beyond the vocabulary":
        (folder / f"{split}.bin").write_bytes(b"\xff" * (folder / f"{split}.bin").stat().st_size)
    elif way == "index that lies" and (folder / "train.docs.bin").is_file():
        content = bytearray((folder / f"{split}.docs.bin").read_bytes())
        at = 8 * chance.randrange(len(content) // 8)
        content[at : at + 8] = struct.pack("<q", chance.choice([-1, -(2**62), 2**62, 10**6, 7]))
        (folder / f"{split}.docs.bin").write_bytes(content)
    elif way == "changed vocabulary":
        change(folder / "tokenizer.json", changed_tokenizer, chance)
    elif way == "planted pickle":
        (folder / chance.choice(sorted(values["sha256"]))).write_bytes(pickle.dumps(Planted(sentinel)))
    else:
        wrong = [None, -1, 10**30, "x", [], {}, {"train": 10**15, "val": -1}, {"../x": "0"}, {"train": 1.5}, ["uint8"], "uint64"]
        return write_sealed(folder / "meta.json", {**values, chance.choice(sorted(values)): chance.choice(wrong)})
    reseal(folder, "meta.json")


IN_WEIGHTS = (
    "nanoGPT checkpoint", "meta.pkl", "pytorch_model.bin", "shards elsewhere", "tensors that lie", "bomb", "changed config.json",
)


def in_weights(way: str, chance: Random, place: Path, sentinel: Path) -> Path:
    """Weights from elsewhere that mean harm; what to start from."""
    folder, payload = place / "folder", saved_by_torch(Planted(sentinel), chance.choice([False, True]))
    if way == "nanoGPT checkpoint":
        (place / "ckpt.pt").write_bytes(payload)
        return place / "ckpt.pt"
    if way == "meta.pkl":
        shape = {"n_layer": 1, "n_head": 1, "n_embd": 4, "block_size": 4, "vocab_size": 2, "bias": False}
        torch.save({"model_args": shape, "model": {}, "config": {}}, place / "ckpt.pt")
        (place / "meta.pkl").write_bytes(pickle.dumps({"itos": Planted(sentinel)}, protocol=chance.randrange(6)))
        return place / "ckpt.pt"
    if way == "tensors that lie":
        (folder / "model.safetensors").write_bytes(tensors_that_lie(chance))
    elif way == "bomb":
        (folder / chance.choice(["config.json", "tokenizer.json"])).write_bytes(bombs(chance))
    elif way == "changed config.json":
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        key = chance.choice(["n_layer", "n_head", "n_embd", "n_positions", "vocab_size", "n_inner", "model_type"])
        wrong = json.dumps({**values, key: chance.choice([10**9, -1, 0, None, "x", 1.5, []])})
        (folder / "config.json").write_text(wrong, encoding="utf-8")
    else:
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(payload)
        if way == "shards elsewhere":
            (place / "evil.bin").write_bytes(payload)
            (folder / "pytorch_model.bin").rename(folder / "part.bin")
            index = {"weight_map": {"x": chance.choice(["../evil.bin", "/etc/passwd", "part.bin", "", 5])}}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder
