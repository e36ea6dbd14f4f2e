"""Turns text into a data set folder: chooses the tokenizer, writes the token files, prepares each data set once.

A data set folder holds train.bin (or many train-*.bin, see nanogpt.data.shard_writer), val.bin, tokenizer.json and
meta.json. The scripts data/<name>/prepare.py are
written with these functions; so is a script of your own.
"""

# 从文字到数据集文件夹：选词表、写 train.bin 与 val.bin、同样的选项只准备一次
# data/<名字>/prepare.py 用这里的零件写各自的数据集；训练开始时由 prepare() 找到或做好那个文件夹
# 文件夹的名字由脚本、选项与原文内容的摘要而来（identity_of）：改了哪一样都另做一份，不会用错旧的
# 写在旁边、整个改名到位；同时启动的两次训练由锁排队，后来的直接用先做好的

import contextlib
import hashlib
import importlib.util
import inspect
import json
import os
import shutil
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nanogpt.base.config import INSTALLED, PATH_KEYS, ROOT, prepare_script
from nanogpt.base.errors import forgive_output, one_line_each
from nanogpt.base.files import (
    folder_aside,
    folders_around,
    is_litter,
    refuse_file,
    remove_empty,
    remove_leftovers,
    sha256,
)
from nanogpt.base.hashed_json import DamagedError, read_sealed, write_sealed
from nanogpt.base.language import ConfigError, say
from nanogpt.base.lock import if_free, only_one, remove_stale
from nanogpt.base.value_checks import check_types, check_value, expanded
from nanogpt.data import tokenizer as tokenizers
from nanogpt.data.bpe import check_vocab_size, train_bpe
from nanogpt.data.digests import digest_of_text
from nanogpt.data.remote import fetch_small, folder_of_address, is_address
from nanogpt.data.source_text import stem_of, text_files

# 1：meta.json 没有自己的摘要
FORMAT = 2
# 读法（编码、换行、分词、切分）变了就加一：早先准备好的便不再沿用
READING = 1
# 只管怎么准备、不管准备成什么的选项
HOW = {"processes"}
# 每个线程手里一段文字与它的 id，约 25 MiB
MOST_THREADS = 8


def build_char_tokenizer(pieces: Iterable[str]) -> tokenizers.CharTokenizer:
    """A character tokenizer over all characters that occur."""
    seen: set[str] = set()
    for piece in pieces:
        seen.update(piece)
    return tokenizers.CharTokenizer("".join(sorted(seen)))


def tokenizer_for(
    wanted: str | tokenizers.Tokenizer, pieces: Callable[[], Iterable[str]], vocab_size: int | None = None
) -> tokenizers.Tokenizer:
    """The tokenizer that dataset.tokenizer names, or the one given; char and bpe are made from the text in pieces()."""
    check_tokenizer(wanted, vocab_size)
    if not isinstance(wanted, str):
        return wanted
    if wanted == "byte":
        return tokenizers.ByteTokenizer()
    if wanted == "bpe":
        return train_bpe(pieces(), vocab_size)
    # auto 而没有 init_from：从零训练用字符
    return tokenizers.gpt2_tokenizer() if wanted == "gpt2" else build_char_tokenizer(pieces())


def check_tokenizer(wanted: str | tokenizers.Tokenizer, vocab_size: int | None = None) -> None:
    """Refuse a dataset.tokenizer that tokenizer_for() cannot make."""
    if isinstance(wanted, str) and wanted not in tokenizers.KINDS:
        raise ConfigError(
            "dataset.tokenizer={got} is not known; choose one of: {allowed}",
            got=wanted, allowed=" | ".join(tokenizers.KINDS),
        )
    if wanted == "bpe":
        check_vocab_size(vocab_size)


class TokenWriter:
    """Appends ids to a .bin file as the smallest unsigned integers that hold the vocabulary."""

    # 小词表一个 id 一字节，文件就小；用了哪种整数记在 meta.json 里

    def __init__(self, path: Path, vocab_size: int):
        self.vocab_size, self.dtype = vocab_size, self.dtype_of(vocab_size)
        self.count = 0
        self._file = path.open("wb")

    @staticmethod
    def dtype_of(vocab_size: int) -> np.dtype:
        """The smallest unsigned integers that hold the ids of a vocabulary."""
        return np.dtype(np.uint8 if vocab_size <= 2**8 else np.uint16 if vocab_size <= 2**16 else np.uint32)

    def write(self, ids: np.ndarray) -> None:
        """Append ids (n,), whole numbers of an array, a list or a tensor; ConfigError if the vocabulary lacks one."""
        ids = np.asarray(ids)
        if ids.size:
            # 宽的整数换成窄的会绕回来：词表外的 id 会变成别的词，训练照样跑完
            _check_ids(ids, self.vocab_size)
            self._file.write(ids.astype(self.dtype).tobytes())
        self.count += len(ids)

    def close(self) -> None:
        self._file.close()


def _check_ids(ids: np.ndarray, vocab_size: int) -> None:
    """Refuse what is no row of ids of a vocabulary."""
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ConfigError(
            "a data set is written from rows of whole numbers, not from {shape} of {kind}; tokenizer.encode(text) "
            "gives such a row",
            shape=ids.shape, kind=ids.dtype,
        )
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= vocab_size:
        raise ConfigError(
            "a data set with the id {id} cannot be written: its tokenizer has {size} ids, from 0 on; write what this "
            "tokenizer's encode() gives",
            id=least if least < 0 else most, size=vocab_size,
        )


@contextlib.contextmanager
def new_dataset(folder: Path) -> Iterator[Path]:
    """A folder aside that becomes a data set's; ConfigError if there is anything in its place but a data set."""
    # 整个换上去的：里面若有别人的文件，就跟着旧的那份一起没了
    folder = Path(folder).resolve()
    if folder.is_dir():
        try:
            known = {*read_sealed(folder / "meta.json", FORMAT)["sha256"], "meta.json"}
        except (DamagedError, KeyError):
            known = set()
        others = sorted(path.name for path in folder.iterdir() if path.name not in known and not is_litter(path))
        if others:
            raise ConfigError(
                "{path} holds {other}, which is no file of a data set; name an empty or a new folder",
                path=folder, other=others[0],
            )
    with folder_aside(folder) as aside:
        yield aside


def write_dataset(
    folder: Path, *, name: str, source: str, tokenizer, train: Iterable[np.ndarray], val: Iterable[np.ndarray]
) -> Path:
    """Write a data set folder from two streams of id arrays; it appears whole or not at all.

    A data set that lies there is replaced; a folder with anything else in it is a ConfigError.
    """

    def tagged():
        for split, stream in (("train", train), ("val", val)):
            for ids in stream:
                yield split, ids

    return write_tagged(folder, name=name, source=source, tokenizer=tokenizer, stream=tagged())


def write_tagged(folder: Path, *, name: str, source: str, tokenizer, stream: Iterable[tuple[str, np.ndarray]]) -> Path:
    """Like write_dataset, from one stream of (split, ids): nothing has to be held or read twice."""
    with new_dataset(folder) as aside:
        dtype, counts = write_tokens(aside, tokenizer, stream)
        write_meta(aside, name=name, source=source, tokenizer=tokenizer, dtype=dtype, tokens=counts)
    return say_written(folder, name, tokenizer, counts)


def say_written(folder: Path, name: str, tokenizer, tokens: dict[str, int]) -> Path:
    """Say what was written; the folder."""
    say(
        "{name}: {train:,} training and {val:,} validation tokens, vocabulary {vocab} -> {path}",
        name=name, train=tokens["train"], val=tokens["val"], vocab=tokenizer.vocab_size, path=folder,
    )
    return folder


def encoded(tokenizer: tokenizers.Tokenizer, pieces: Iterable[str]) -> Iterator[np.ndarray]:
    """The ids of each piece of a text, byte-pair encoding on all cores; only a few pieces are held at a time."""
    if not isinstance(tokenizer, tokenizers.BPETokenizer):
        # 字符只是查表；tokenizers 库编码一段要几百 MB，不能几段一起
        yield from map(tokenizer.encode, pieces)
        return
    # tiktoken 编码时放开 GIL：线程就够，不必另开进程
    workers = min(os.cpu_count() or 1, MOST_THREADS)
    waiting: deque[Future] = deque()
    own = threading.local()

    def begin() -> None:
        own.tokenizer = tokenizer.for_a_thread()

    with ThreadPoolExecutor(workers, initializer=begin) as pool:
        for piece in pieces:
            waiting.append(pool.submit(lambda piece: own.tokenizer.encode(piece), piece))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def write_split(
    folder: Path, *, name: str, source: str, tokenizer, stream: Iterable[np.ndarray],
    train_tokens: Callable[[int], int],
) -> Path:
    """Like write_dataset, from one stream of which the first train_tokens(number of all ids) are for training."""
    # 总数写完才知道：先写成一个文件，再把末尾搬出去，文字只编码一遍
    with new_dataset(folder) as aside:
        dtype, counts = write_tokens(aside, tokenizer, (("train", ids) for ids in stream))
        counts["val"] = (total := counts["train"]) - train_tokens(total)
        counts["train"] = total - counts["val"]
        with (aside / "train.bin").open("r+b") as whole, (aside / "val.bin").open("wb") as rest:
            whole.seek(counts["train"] * dtype.itemsize)
            shutil.copyfileobj(whole, rest, 2**22)
            whole.truncate(counts["train"] * dtype.itemsize)
        write_meta(aside, name=name, source=source, tokenizer=tokenizer, dtype=dtype, tokens=counts)
    return say_written(folder, name, tokenizer, counts)


def write_tokens(folder: Path, tokenizer, stream: Iterable[tuple[str, np.ndarray]]) -> tuple[np.dtype, dict[str, int]]:
    """Write train.bin and val.bin from one stream of (split, ids); return their number format and lengths."""
    writers = {split: TokenWriter(folder / f"{split}.bin", tokenizer.vocab_size) for split in ("train", "val")}
    try:
        for split, ids in stream:
            writers[split].write(ids)
    finally:
        for writer in writers.values():
            writer.close()
    return writers["train"].dtype, {split: writer.count for split, writer in writers.items()}


def write_meta(
    folder: Path, *, name: str, source: str, tokenizer, dtype: np.dtype, tokens: dict[str, int],
    known: dict[str, str] | None = None, **more,
) -> dict:
    """Write tokenizer.json, and meta.json with the SHA-256 of every file in the folder; return the latter.

    `known` are digests that need no reading of their files.
    """
    tokenizers.save(tokenizer, folder / "tokenizer.json")
    meta = {
        "format": FORMAT, "name": name, "source": source, "tokenizer": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size, "dtype": str(dtype), "tokens": tokens, **more,
        "sha256": {file.name: (known or {}).get(file.name) or sha256(file) for file in sorted(folder.iterdir())},
    }
    write_sealed(folder / "meta.json", meta)
    return meta


def _script(name: str):
    """data/<name>/prepare.py as a module."""
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", prepare_script(name))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "prepare", None)):
        raise ConfigError("{script}: there is no function prepare(folder, …) in it", script=module.__file__)
    return module


def check_options(prepare: Callable, options: dict) -> None:
    """Refuse options of dataset=… that its script does not take, or whose type it does not take."""
    parameters = inspect.signature(prepare).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key, got in options.items():
        if key not in parameters and not open_ended:
            raise ConfigError("unread_key", key=f"dataset.{key}")
        check_value(f"dataset.{key}", got)
    check_types(prepare, "dataset", options)
    for key, parameter in list(parameters.items())[1:]:
        if key not in options and parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            raise ConfigError("missing_key", key=f"dataset.{key}")


def home_of(name: str) -> Path:
    """The folder for the prepared data of `name`: beside its script, or in ./data if that is installed."""
    # 不往 site-packages 里写：那里可能只读，升级时也会被清掉
    return Path("data", name) if INSTALLED else prepare_script(name).parent


def folder_of(name: str, directory: str | None, options: dict, module=None, *, verify: bool = False) -> Path:
    """Where data set `name` lies once it is prepared: any change of script, options or text gives another folder.

    Fetches and prepares nothing; a text that was read before is read again only with `verify`. The script may have
    `sources(**options) -> list[Path]`, which refuses wrong options and returns the files that it reads; without it,
    these are all files that the options name or that lie below folders that they name. `facts(**options) -> list` are
    further plain values by which the data is told from other data.
    """
    module = module or _script(name)
    check_options(module.prepare, options)
    if is_address(directory):
        return folder_of_address(directory.rstrip("/"))
    if directory:
        return Path(directory)
    stem = stem_of(Path(options["path"])) if options.get("path") else "prepared"
    return home_of(name) / f"{stem}-{identity_of(module, options, verify=verify)[:12]}"


def identity_of(module, options: dict, *, verify: bool = False) -> str:
    """Hex SHA-256 over a script, its options and the contents of what they name."""
    # autocrlf 检出的脚本是同一份
    parts: list = [READING, hashlib.sha256(Path(module.__file__).read_bytes().replace(b"\r\n", b"\n")).hexdigest()]
    for key in sorted(options.keys() - HOW):
        # 同一份文字，从哪个文件夹里说都一样
        parts.append([key, Path(options[key]).name if _names_path(key, options[key]) else options[key]])
    if hasattr(module, "sources"):
        groups = [module.sources(**options)]
    else:
        groups = [text_files(Path(value), None) for key, value in sorted(options.items()) if _names_path(key, value)]
    # 几百 GB 的原文不为认出它而读一遍：脚本自己说凭什么认
    parts += module.facts(**options) if hasattr(module, "facts") else []
    for files in groups:
        around = os.path.commonpath([file.absolute().parent for file in files]) if files else ""
        places = [os.path.relpath(file.absolute(), around).replace(os.sep, "/") for file in files]
        parts += [[place, digest_of_text(file, verify=verify)] for place, file in zip(places, files)]
    return hashlib.sha256(json.dumps(parts, default=lambda coder: coder.to_dict()).encode("ascii")).hexdigest()


def _names_path(key: str, value) -> bool:
    # 名叫 gpt2 的文件夹多半是权重，与 dataset.tokenizer=gpt2 无关
    return key not in ("tokenizer", "encoding") and isinstance(value, str) and os.path.exists(value)


def prepare(name: str, directory: str | None, options: dict, *, verify: bool = False) -> Path:
    """Return the prepared folder of data set `name`; if it is missing, data/<name>/prepare.py makes it first.

    The script's function is `prepare(folder, **options)`. Says which folder is used again. A directory that is an
    address of fsspec gives its folder in the local cache.
    """
    if is_address(directory):
        return fetch_small(directory.rstrip("/"), FORMAT)
    module, folder = _script(name), Path(directory or name)
    try:
        folder = folder_of(name, directory, options, module, verify=verify)
        lock = folder.with_name(f".{folder.name}.lock")
        if (folder / "meta.json").is_file():
            _remove_parts(folder, lock)
            say_reused(name, folder, _identity_or_none(module, options) if directory else None)
            return folder
        refuse_file(folder)
        # 同时启动的两次训练只准备一次：另一个等着，等到了就有
        with folders_around(folder), only_one(lock, waiting=lambda: say(
            "another process is preparing data set {name}; waiting for it",
            name=name,
        )):
            if not (folder / "meta.json").is_file():
                if not directory:
                    _remove_abandoned(folder.parent)
                _prepare_in(folder, name, module, options)
    except OSError as error:
        # 磁盘满、目录只读、原文读不出来
        raise ConfigError(
            "data set {name} could not be prepared: {path} ({reason}); mend that, or name another place with "
            "dataset.dir=…",
            name=name, path=error.filename or folder, reason=error.strerror or error,
        ) from None
    return folder


def parts_of(folder: Path) -> Path:
    """Where the parts of a data set lie until it is whole."""
    # 名字固定、不是 .tmp：中断之后要找得到
    return folder.with_name(f".{folder.name}.parts")


def _remove_parts(folder: Path, lock: Path) -> None:
    """Delete what a process left that was killed when its data set was whole already."""
    if not parts_of(folder).is_dir():
        remove_stale(lock)
        return
    with if_free(lock) as free:
        if free:
            shutil.rmtree(parts_of(folder), ignore_errors=True)


def _remove_abandoned(home: Path) -> None:
    """Delete what killed preparations left in a folder of our own, whatever text they were of."""
    # 被杀之后原文又改过：旧的名字再也没有人来用，也就没有人来清；活着的那些拿着自己的锁
    for path in home.glob(".*.lock"):
        with contextlib.suppress(OSError), if_free(path) as free:
            if free:
                remove_leftovers(home, path.stem.removeprefix("."))


def identity_of_dataset(name: str, options: dict) -> str:
    """What meta.json will say that data set `name` was made from."""
    return identity_of(_script(name), options)


def _identity_or_none(module, options: dict) -> str | None:
    # 指名了文件夹：原文可能早已不在这台机器上
    with contextlib.suppress(ConfigError, OSError):
        return identity_of(module, options)
    return None


def say_reused(name: str, folder: Path, wanted: str | None = None) -> None:
    """Say which prepared folder is used again, with a warning if it was not made from what is `wanted`."""
    try:
        meta = read_sealed(folder / "meta.json", FORMAT)
        numbers = {"train": meta["tokens"]["train"], "val": meta["tokens"]["val"], "source": meta["source"]}
    except (DamagedError, KeyError, TypeError):
        # 打开它的一方会说坏在哪里
        return
    say(
        "{name}: uses {path} again, prepared from {source} ({train:,} training and {val:,} validation tokens)",
        name=name, path=folder, **numbers,
    )
    if wanted and meta.get("made_from", wanted) != wanted:
        say(
            "the data in dataset.dir={path} was made from another text, with other options or by another version of "
            "the script, and is used as it is; leave dataset.dir out to have prepared what the options say",
            path=folder,
        )


def _prepare_in(folder: Path, name: str, module, options: dict) -> None:
    if folder.is_dir() and not all(map(is_litter, folder.iterdir())):
        raise ConfigError("no_dataset", path=folder)
    say("preparing the data set {name} …", name=name)
    if folder.is_dir():
        remove_empty(folder)
    # 只清这个数据集自己的：旁边可能是使用者的文件
    remove_leftovers(folder.parent, folder.name)
    identity = identity_of(module, options)
    module.prepare(folder, **options)
    if not (folder / "meta.json").is_file():
        raise ConfigError(
            "{script}: prepare() has left no data set in its folder; let it end with write_dataset(folder, …)",
            script=module.__file__,
        )
    with contextlib.suppress(DamagedError):
        write_sealed(folder / "meta.json", {**read_sealed(folder / "meta.json", FORMAT), "made_from": identity})


def run_prepare(name: str) -> None:
    """Main program of data/<name>/prepare.py: key=value arguments over the defaults of conf/dataset/<name>.yaml."""
    forgive_output()
    with one_line_each():
        options = typed_options(name, sys.argv[1:])
        options.pop("name")
        folder = prepare(name, options.pop("dir"), options)
        say("ready: {path}", path=folder)


def typed_options(name: str, arguments: list[str]) -> dict:
    """The options of conf/dataset/<name>.yaml with key=value arguments laid over them."""
    if not (file := ROOT / "conf" / "dataset" / f"{name}.yaml").is_file():
        options = sorted(path.stem for path in file.parent.glob("*.yaml"))
        raise ConfigError("unknown_option", group="dataset", got=name, options=", ".join(options))
    node = OmegaConf.load(file)
    OmegaConf.set_struct(node, True)
    known = [key for key in node if key != "name"]
    for argument in arguments:
        key, equals, value = argument.partition("=")
        check_value(f"dataset.{key}", value or "-")
        if not equals or key not in known:
            raise ConfigError(
                "{got}: there is no such option; choose from: {options}",
                got=argument, options=" ".join(f"{key}=" for key in known),
            )
    # 路径照敲下的原文：yaml 会把 [、#、: 当成语法
    paths = [argument for argument in arguments if f"dataset.{argument.partition('=')[0]}" in PATH_KEYS]
    try:
        others = [argument for argument in arguments if argument not in paths]
        node = OmegaConf.merge(node, OmegaConf.from_dotlist(others))
        typed = OmegaConf.to_container(node, resolve=True)
        named = dict(argument.split("=", 1) for argument in paths)
        return typed | {key: None if path in ("", "null") else expanded(path) for key, path in named.items()}
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError) as error:
        key = getattr(error, "full_key", None) or "?"
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ConfigError("bad_part", key=f"dataset.{key}", reason=reason) from None
