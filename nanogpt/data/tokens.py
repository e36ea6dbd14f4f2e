"""Reads prepared token files as batches (x, y): memory-mapped, deterministic, seekable.

Sample number s is a pure function of (seed, s): the position in training is one integer, and any process can compute
any part of any batch.
"""

# 准备好的 token 文件 -> 一批批 (x, y)：连着的文字这一种，也是 DocumentData 的父类
# 第 s 个样本只由 (seed, s) 决定：训练到哪里只是一个整数，resume 不必重放，多进程各算各的份
# 打开时核对每个文件的大小、SHA-256 与最大的 id，核对过又没变的不再读（digests）；文件映射进来，几十 GB 也不占内存
# 每个 epoch 从随机的位置起把文字切成块、打乱，所以每个 token 每轮都是目标，块的边界却轮轮不同
# 分成许多文件（shards）时，文件的次序打乱，每 MIXED 个的块混在一起打乱：读盘大体顺着来，占的内存也有上限

import contextlib
import hashlib
import math
import os
import shutil
from pathlib import Path

import numpy as np
import torch

from nanogpt.base.config import check_stride
from nanogpt.base.files import folder_aside
from nanogpt.base.hashed_json import DamagedError, digest_of, read_sealed, reason_of
from nanogpt.base.language import ConfigError
from nanogpt.data import tokenizer as tokenizers
from nanogpt.data.corpus import FORMAT, home_of
from nanogpt.data.digests import Hashed
from nanogpt.data.remote import Cache, origin_of
from nanogpt.data.shards import Opener, Shards, verified

SPLITS = ("train", "val")
# 留出的部分分成这么多段；更大的文件只留末尾一段
HELD_SLICES, MOST_HELD_BYTES = 20, 2**28
# 这样的目标不算损失，见 model.loss
IGNORED = -1
# 训练样本的次序；1：文末不满一块的部分从不是目标，只为更早的 checkpoint 留着
ORDER = 2
ORDERS = (1, ORDER)
# 这么多个文件的块混在一起打乱；改了它，分成许多文件的数据的次序就变
MIXED = 4
# 放在别处的数据在本机缓存里至多占这么多
CACHE_GIB = 20.0


def read_meta(folder: Path) -> dict:
    """Read meta.json of a prepared folder; ConfigError if it is missing or does not fit."""
    if not (folder / "meta.json").is_file():
        # 多半是指错了文件夹：不能叫人把它删掉
        raise ConfigError("no_dataset", path=folder)
    try:
        meta = read_sealed(folder / "meta.json", FORMAT)
        files, shards = meta["sha256"], meta.get("shards")
        assert set(files) >= {*(shards or ["train.bin"]), "val.bin", "tokenizer.json"}, "files"
        # 文件名只能是同一个文件夹里的
        assert all(Path(file).name == file for file in files), "files"
        assert all(isinstance(digest, str) for digest in files.values()) and isinstance(meta["name"], str), "names"
        assert set(meta["tokens"]) == set(SPLITS) and meta["dtype"] in ("uint8", "uint16", "uint32"), "tokens"
        assert all(type(count) is int and count >= 0 for count in meta["tokens"].values()), "tokens"
        if shards is not None:
            assert shards and all(type(count) is int and count > 0 for count in shards.values()), "shards"
            assert sum(shards.values()) == meta["tokens"]["train"] and type(meta["vocab_size"]) is int, "shards"
        return meta
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        reason = str(error) if isinstance(error, DamagedError) else f"meta.json: {reason_of(error)}"
        raise ConfigError("not_a_dataset", path=folder, reason=reason) from None


def opener_of(folder: Path, meta: dict, *, verify: bool = False, cache_gib: float = CACHE_GIB) -> Opener:
    """What opens the files of a training split that has many, fetched where they lie elsewhere."""
    size = np.dtype(meta["dtype"]).itemsize
    if (address := origin_of(folder)) is None:
        return Opener(folder, meta, verify=verify)
    # 正用着的与接下来的两组都要放得下
    need = sum(sorted(meta["shards"].values())[-2 * MIXED :]) * size
    if cache_gib * 2**30 < need:
        raise ConfigError(
            "cache_data_gib={got} is too small for the {files} files of {path} that are needed at a time; choose "
            "cache_data_gib={want} or more",
            got=cache_gib, files=2 * MIXED, path=address, want=math.ceil(need / 2**30 * 10) / 10,
        )
    return Opener(folder, meta, verify=verify, bring=Cache(folder, address, meta, cache_gib * 2**30).bring)


def unchecked(folder: Path) -> "np.ndarray | Shards":
    """The training split of a prepared folder, whose file is not compared with meta.json: to look at its length."""
    meta = read_meta(folder)
    if "shards" in meta:
        return Shards(opener_of(folder, meta))
    return np.memmap(folder / "train.bin", dtype=meta["dtype"], mode="r")


def fingerprint_of(meta: dict) -> str:
    """One string that changes with any token or vocabulary entry."""
    each = "-".join(meta["sha256"][file][:16] for file in sorted(meta["sha256"]))
    # 几千个文件的摘要连起来太长
    return hashlib.sha256(each.encode("ascii")).hexdigest() if "shards" in meta else each


def find_prepared(name: str, fingerprint: str | None) -> Path | None:
    """The folder prepared by data set `name` that holds the data with this fingerprint, if any.

    A run resumes with it: its text or script may have changed since, and earlier versions named folders differently.
    """
    for meta in sorted(home_of(name).glob("*/meta.json")):
        with contextlib.suppress(ConfigError):
            if fingerprint_of(read_meta(meta.parent)) == fingerprint:
                return meta.parent
    return None


class TokenData:
    """A data set folder opened for reading; refuses files that differ from their meta.json."""

    # 训练只通过 starts、rows、targets 与 val_* 用它：换成文章（DocumentData），循环一行不改

    separator: int | None = None
    """Id between documents; None: the text runs on, or is `marked`."""
    marked = False
    """Whether rows hold conversations, the first id of each written as -1 - id."""
    question: str | None = None
    """A question of the validation part, where it holds conversations."""

    def __init__(self, folder: Path, *, verify: bool = False, cache_gib: float = CACHE_GIB):
        self.folder = Path(folder)
        self.meta = read_meta(self.folder)
        self._dtype = np.dtype(self.meta["dtype"])
        shards = self.meta.get("shards")
        opener = opener_of(self.folder, self.meta, verify=verify, cache_gib=cache_gib) if shards else None
        self.elsewhere = opener is not None and opener.bring is not None
        """Whether the files of the training split are fetched as they are needed."""
        largest = self._largest_ids(verify=verify)
        self.name: str = self.meta["name"]
        self.tokenizer = tokenizers.load(self.folder / "tokenizer.json")
        self.vocab_size = self.tokenizer.vocab_size
        self.tokens: dict[str, np.ndarray | Shards] = {split: self._opened(split, opener) for split in SPLITS}
        self._shuffle: tuple[tuple, np.ndarray, np.ndarray] | None = None
        self.overlap = 0
        """Tokens that a validation window shares with the one before it; see slide()."""
        self._check_ids({split: largest[f"{split}.bin"] for split in SPLITS if f"{split}.bin" in largest})
        if opener and verify and not self.elsewhere:
            for file in shards:
                opener.tokens(file)
                opener.ahead([])
            # 都核对过了：之后每个 epoch 再打开时不必重来
            opener.verify = False

    def _opened(self, split: str, opener: Opener | None) -> np.ndarray | Shards:
        if opener and split == "train":
            return Shards(opener)
        # 空文件不能映射，给一个空数组，让后面的长度检查去说明
        count, path = self.meta["tokens"][split], self.folder / f"{split}.bin"
        return np.memmap(path, dtype=self._dtype, mode="r") if count else np.zeros(0, self._dtype)

    def _largest_ids(self, *, verify: bool) -> dict[str, int]:
        """The largest id in each file but shards, after comparing it with meta.json; from memory if it was so."""
        shards = self.meta.get("shards", {})
        files = {file: digest for file, digest in self.meta["sha256"].items() if file not in shards}
        try:
            hashed = Hashed(self.folder / file for file in files)
        except OSError:
            # 少了一个：照常核对，说出是哪一个
            return {file: self._verify(self.folder / file, expected) for file, expected in files.items()}
        known = None if verify else hashed.recall()
        named = digest_of(self.meta)
        if isinstance(known, dict) and known.get("meta") == named and known["largest"].keys() == files.keys():
            return known["largest"]
        largest = {file: self._verify(self.folder / file, expected) for file, expected in files.items()}
        hashed.remember({"meta": named, "largest": largest})
        return largest

    def _check_ids(self, largest: dict[str, int]) -> None:
        """Refuse ids beyond the vocabulary: they would read past the embedding."""
        if self.meta.get("vocab_size") != self.vocab_size:
            path = self.folder / "tokenizer.json"
            raise ConfigError("damaged_dataset", path=path, reason="vocab_size", folder=self.folder)
        for split, id_ in largest.items():
            if id_ >= self.vocab_size:
                path = self.folder / f"{split}.bin"
                raise ConfigError("damaged_dataset", path=path, reason=f"id {id_}", folder=self.folder)

    def _verify(self, path: Path, expected: str) -> int:
        tokens = path.name in [f"{split}.bin" for split in SPLITS]
        if not tokens:
            return verified(path, expected, self.folder)
        return verified(path, expected, self.folder, self._dtype, self.meta["tokens"][path.stem])

    def hold_out(self, fraction: float) -> None:
        """Validate on slices of the training split from now on, spread over it, and train without them."""
        # 只留末尾一段不行：它离验证部分最近，没读过它的模型在验证部分上差得多
        # 莎士比亚：没读过的训 350 万 token 才到 1.77，读过的 160 万时已到 1.62
        # 大的语料不抄进内存：那里多半是打散的文章，末尾一段也就够好
        train = self.tokens["train"]
        if isinstance(train, Shards):
            cut = len(train) - round(len(train) * fraction)
            self.tokens = {"train": train.part(0, cut), "val": train.part(cut, len(train))}
            return
        count = HELD_SLICES if train.nbytes <= MOST_HELD_BYTES else 1
        edges = np.linspace(0, len(train), count + 1).astype(int)
        cuts = edges[1:] - np.round(np.diff(edges) * fraction).astype(int)
        parts = {
            "train": [train[start:cut] for start, cut in zip(edges, cuts)],
            "val": [train[cut:end] for cut, end in zip(cuts, edges[1:])],
        }
        self.tokens = {split: np.concatenate(part) if count > 1 else part[0] for split, part in parts.items()}

    def slide(self, stride: int, block_size: int) -> None:
        """Validate in windows that begin `stride` tokens apart from now on, and count each token once.

        Only the last `stride` targets of a window count, those of the first window all: every token behind the first
        window is predicted with block_size - stride to block_size - 1 tokens before it in sight.
        """
        check_stride(stride, block_size)
        # 算起来就是 block_size / stride 倍：每个 token 要读这么多遍
        self.overlap = block_size - stride

    @property
    def fingerprint(self) -> str:
        """One string that changes with any token or vocabulary entry."""
        return fingerprint_of(self.meta)

    def check_block_size(self, block_size: int) -> None:
        """Refuse a context that does not fit into a split once."""
        # 说较短的那一份：照着改了，另一份也放得下
        split = min(SPLITS, key=lambda split: len(self.tokens[split]))
        # 一条样本要 block_size + 1 个 token
        limit = len(self.tokens[split]) - 1
        if limit < 1:
            raise ConfigError(
                "the {split} split has {tokens} tokens, too few to train on: give more text",
                split=split, tokens=limit + 1,
            )
        if block_size > limit:
            raise ConfigError(
                "model.block_size={got} is longer than the {split} split ({tokens} tokens); choose "
                "model.block_size={limit} or less, or give more text",
                got=block_size, split=split, tokens=limit + 1, limit=limit,
            )
        # 个别文件短一点不要紧；多数都短，一行里就是同一段话反复几遍
        if block_size > (usual := len(self.tokens["train"]) // len(self._files()[1]) - 1):
            raise ConfigError(
                "model.block_size={got} is longer than the files of the training split, {tokens} tokens on average; "
                "choose model.block_size={limit} or less, or a larger dataset.shard_tokens",
                got=block_size, tokens=usual + 1, limit=max(usual, 0),
            )

    def targets(self, starts: np.ndarray, block_size: int) -> np.ndarray:
        """How many targets each training sample has, (len(starts),)."""
        return np.full(len(starts), block_size, dtype=np.int64)

    def starts(self, seed: int, first: int, count: int, block_size: int, *, order: int = ORDER) -> np.ndarray:
        """Offsets (count,) in the training split of samples first … first + count - 1, in one of ORDERS.

        Each epoch cuts the text into blocks from a random place on, wraps around from its end to its beginning, and
        shuffles the blocks. Every token is a target in every epoch; a few are so twice, where the last block overlaps
        the first one, which is elsewhere in every epoch.

        In a split of many files each is cut and wrapped around like a text of its own. An epoch takes the files in a
        random order and shuffles the blocks of MIXED of them at a time: what is near in training comes from MIXED
        random files, and only they and the next MIXED are read.
        """
        offsets, sizes = self._files()
        # 次序 1 少一块：它的相位小于一块，任何相位下都放得下这么多
        blocks = -(-sizes // block_size) if order > 1 else (sizes - block_size) // block_size
        phases = sizes if order > 1 else np.full_like(sizes, block_size)
        epochs, inside = np.divmod(np.arange(first, first + count), int(blocks.sum()))
        result, wanted = np.empty(count, dtype=np.int64), []
        for epoch in np.unique(epochs).tolist():
            dealt = self._dealt(seed, epoch, len(sizes))
            ends = blocks[dealt].cumsum()
            group = np.where(epochs == epoch, np.searchsorted(ends, inside, side="right") // MIXED, -1)
            for number in np.unique(group[group >= 0]).tolist():
                here, files = group == number, dealt[number * MIXED : (number + 1) * MIXED]
                phase, shuffled = self._shuffled(seed, epoch, number, blocks[files], phases[files])
                block = shuffled[inside[here] - (ends[number * MIXED - 1] if number else 0)].astype(np.int64)
                edges = blocks[files].cumsum()
                of = np.searchsorted(edges, block, side="right")
                block -= (edges - blocks[files])[of]
                result[here] = offsets[files][of] + (block * block_size + phase[of]) % sizes[files][of]
                wanted += [*files, *self._behind(seed, epoch, number, dealt)]
        if isinstance(train := self.tokens["train"], Shards):
            train.ahead(wanted)
        return result

    def _files(self, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
        """(offset, number of tokens) of each file of a split, in which rows wrap around."""
        tokens = self.tokens[split]
        if isinstance(tokens, Shards) and split == "train":
            return tokens.offsets, tokens.sizes
        # 验证的窗口首尾相接，连文件的边界也跨过去
        return np.zeros(1, dtype=np.int64), np.array([len(tokens)], dtype=np.int64)

    def _dealt(self, seed: int, epoch: int, files: int) -> np.ndarray:
        """The order of the files in an epoch."""
        return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, 1])).permutation(files)

    def _behind(self, seed: int, epoch: int, number: int, dealt: np.ndarray) -> np.ndarray:
        """The files of the group behind this one, which may be the first of the next epoch."""
        following = dealt[(number + 1) * MIXED : (number + 2) * MIXED]
        return following if len(following) else self._dealt(seed, epoch + 1, len(dealt))[:MIXED]

    def _shuffled(
        self, seed: int, epoch: int, number: int, blocks: np.ndarray, phases: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(where the blocks of each file of a group begin, the order of all their blocks)."""
        key = (seed, epoch, number, *blocks.tolist(), *phases.tolist())
        if self._shuffle is None or self._shuffle[0] != key:
            # 计数器式随机数：由 (seed, epoch, 组号) 直接算出，不依赖之前抽过什么
            random = np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, number, 0]))
            phase = np.array([int(random.integers(most)) for most in phases], dtype=np.int64)
            self._shuffle = (key, phase, random.permutation(int(blocks.sum())).astype(np.uint32))
        return self._shuffle[1], self._shuffle[2]

    def rows(self, split: str, starts: np.ndarray, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """x and y = x shifted by one, both (len(starts), block_size) int64; y is -1 where another window counts."""
        offsets, sizes = self._files(split)
        owner = np.searchsorted(offsets, starts, side="right") - 1
        offset, size = offsets[owner, None], sizes[owner, None]
        # 绕过文末的一块从文首接着读
        places = offset + (starts[:, None] - offset + np.arange(block_size + 1)) % size
        window = torch.from_numpy(self.tokens[split][places].astype(np.int64))
        x, y = window[:, :-1].contiguous(), window[:, 1:].contiguous()
        if split == "val" and self.overlap:
            # 前一个窗口数过的只作上文；第一个窗口之前没有别的，全数；只有一行时 x 与 y 是同一块内存
            y = y.clone()
            y[torch.from_numpy(starts > 0), : self.overlap] = IGNORED
        return x, y

    def val_targets(self, windows: list[tuple[int, int]]) -> int:
        """How many tokens are predicted in these windows of val_windows()."""
        return sum(length - self.overlap * (start > 0) for start, length in windows)

    def bits_per_byte(self, windows: list[tuple[int, int]]) -> float | None:
        """What a mean loss over these windows, nats per target, is multiplied by to be bits per byte of their text.

        The bytes are those of the text that the targets stand for: the ends of documents cost nats and add no bytes.
        None where the vocabulary has no fixed bytes for each token.
        """
        if (sizes := tokenizers.byte_counts(self.tokenizer)) is None:
            return None
        targets = total = 0
        for start, length in windows:
            y = self.rows("val", np.array([start]), length)[1].numpy()
            targets, total = targets + int((y >= 0).sum()), total + int(sizes[y[y >= 0]].sum())
        return targets / total / math.log(2) if total else None

    def val_windows(self, block_size: int, limit: int | None) -> list[tuple[int, int]]:
        """(start, length) of the windows to evaluate: all of the split, or `limit` tokens spread evenly over it."""
        total, stride = len(self.tokens["val"]) - 1, block_size - self.overlap
        # 末尾的窗口至少要有一个还没数过的目标
        windows = [(start, min(block_size, total - start)) for start in range(0, total - self.overlap, stride)]
        if limit is None or limit >= total:
            return windows
        # 均匀取样而不是只取开头：一部剧的开头不能代表整个验证集
        count = 1 + max(0, limit - block_size) // stride
        picked = np.linspace(0, len(windows) - 1, count, endpoint=False).astype(int)
        return [windows[i] for i in picked]


def copy_dataset(source: Path, target: Path) -> None:
    """Copy a prepared folder into a run folder, whole or not at all."""
    with folder_aside(target) as aside:
        for file in (*read_meta(source)["sha256"], "meta.json"):
            shutil.copyfile(source / file, aside / file)


def dataset_bytes(folder: Path) -> int:
    """Size of a prepared folder's files."""
    return sum(os.path.getsize(file) for file in folder.iterdir() if file.is_file())
