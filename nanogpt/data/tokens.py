"""Reads prepared token files as batches (x, y): memory-mapped, deterministic, seekable.

Sample number s is a pure function of (seed, s): the position in training is one integer, and any process can compute
any part of any batch.
"""

# 准备好的 token 文件 -> 一批批 (x, y)：连着的文字这一种，也是 DocumentData 的父类
# 第 s 个样本只由 (seed, s) 决定：训练到哪里只是一个整数，resume 不必重放，多进程各算各的份
# 打开时核对每个文件的大小、SHA-256 与最大的 id，核对过又没变的不再读（digests）；文件映射进来，几十 GB 也不占内存
# 每个 epoch 从随机的位置起把文字切成块、打乱，所以每个 token 每轮都是目标，块的边界却轮轮不同

import contextlib
import math
import os
import shutil
from pathlib import Path

import numpy as np
import torch

from nanogpt.base.config import check_stride
from nanogpt.base.files import folder_aside, sha256
from nanogpt.base.hashed_json import DamagedError, digest_of, read_sealed, reason_of
from nanogpt.base.language import ConfigError
from nanogpt.data import tokenizer as tokenizers
from nanogpt.data.corpus import FORMAT, home_of
from nanogpt.data.digests import Hashed

SPLITS = ("train", "val")
# 留出的部分分成这么多段；更大的文件只留末尾一段
HELD_SLICES, MOST_HELD_BYTES = 20, 2**28
# 这样的目标不算损失，见 model.loss
IGNORED = -1
# 训练样本的次序；1：文末不满一块的部分从不是目标，只为更早的 checkpoint 留着
ORDER = 2
ORDERS = (1, ORDER)


def read_meta(folder: Path) -> dict:
    """Read meta.json of a prepared folder; ConfigError if it is missing or does not fit."""
    try:
        meta = read_sealed(folder / "meta.json", FORMAT)
        files = meta["sha256"]
        assert set(files) >= {"train.bin", "val.bin", "tokenizer.json"}, "files"
        # 文件名只能是同一个文件夹里的
        assert all(Path(file).name == file for file in files), "files"
        assert all(isinstance(digest, str) for digest in files.values()) and isinstance(meta["name"], str), "names"
        assert set(meta["tokens"]) == set(SPLITS) and meta["dtype"] in ("uint8", "uint16", "uint32"), "tokens"
        assert all(type(count) is int and count >= 0 for count in meta["tokens"].values()), "tokens"
        return meta
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        reason = str(error) if isinstance(error, DamagedError) else f"meta.json: {reason_of(error)}"
        raise ConfigError("not_a_dataset", path=folder, reason=reason) from None


def fingerprint_of(meta: dict) -> str:
    """One string that changes with any token or vocabulary entry."""
    return "-".join(meta["sha256"][file][:16] for file in sorted(meta["sha256"]))


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

    def __init__(self, folder: Path, *, verify: bool = False):
        self.folder = Path(folder)
        self.meta = read_meta(self.folder)
        largest = self._largest_ids(verify=verify)
        self.name: str = self.meta["name"]
        self.tokenizer = tokenizers.load(self.folder / "tokenizer.json")
        self.vocab_size = self.tokenizer.vocab_size
        dtype = np.dtype(self.meta["dtype"])
        # 空文件不能映射，给一个空数组，让后面的长度检查去说明
        self.tokens = {
            split: np.memmap(self.folder / f"{split}.bin", dtype=dtype, mode="r") if count else np.zeros(0, dtype)
            for split, count in self.meta["tokens"].items()
        }
        self._epoch: tuple[tuple, int, np.ndarray] | None = None
        self.overlap = 0
        """Tokens that a validation window shares with the one before it; see slide()."""
        self._check_ids({split: largest[f"{split}.bin"] for split in SPLITS})

    def _largest_ids(self, *, verify: bool) -> dict[str, int]:
        """The largest id in each file, after comparing it with meta.json; from memory if it was so before."""
        files = self.meta["sha256"]
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
        """Refuse a file that is not what meta.json says; return the largest id in a file of tokens."""
        dtype, largest = np.dtype(self.meta["dtype"]), [0]
        if not path.is_file():
            raise ConfigError("damaged_dataset", path=path, reason="missing", folder=self.folder)
        # 先看大小：几十 GB 的文件不必读完才知道不对
        tokens = path.name in [f"{split}.bin" for split in SPLITS]
        if tokens:
            wanted = self.meta["tokens"][path.stem] * dtype.itemsize
            if path.stat().st_size != wanted:
                reason = f"{path.stat().st_size} bytes, not {wanted}"
                raise ConfigError("damaged_dataset", path=path, reason=reason, folder=self.folder)

        def look(piece: bytes) -> None:
            # 几十 GB 只读一遍：边算摘要边看 id
            if tokens:
                largest.append(int(np.frombuffer(piece, dtype).max()))

        try:
            reason = "SHA-256 differs" if sha256(path, look) != expected else ""
        except (OSError, ValueError) as error:
            # 坏扇区读不出来；正被截短的，末尾不是整个的 id
            reason = reason_of(error)
        if reason:
            raise ConfigError("damaged_dataset", path=path, reason=reason, folder=self.folder)
        return max(largest)

    def hold_out(self, fraction: float) -> None:
        """Validate on slices of the training split from now on, spread over it, and train without them."""
        # 只留末尾一段不行：它离验证部分最近，没读过它的模型在验证部分上差得多
        # 莎士比亚：没读过的训 350 万 token 才到 1.77，读过的 160 万时已到 1.62
        # 大的语料不抄进内存：那里多半是打散的文章，末尾一段也就够好
        train = self.tokens["train"]
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
        if block_size > limit:
            raise ConfigError(
                "model.block_size={got} is longer than the {split} split ({tokens} tokens); choose "
                "model.block_size<={limit} or give more text",
                got=block_size, split=split, tokens=limit + 1, limit=max(limit, 0),
            )

    def targets(self, starts: np.ndarray, block_size: int) -> np.ndarray:
        """How many targets each training sample has, (len(starts),)."""
        return np.full(len(starts), block_size, dtype=np.int64)

    def starts(self, seed: int, first: int, count: int, block_size: int, *, order: int = ORDER) -> np.ndarray:
        """Offsets (count,) in train.bin of samples first … first + count - 1, in one of ORDERS.

        Each epoch cuts the text into blocks from a random place on, wraps around from its end to its beginning, and
        shuffles the blocks. Every token is a target in every epoch; a few are so twice, where the last block overlaps
        the first one, which is elsewhere in every epoch.
        """
        total = len(self.tokens["train"])
        # 次序 1 少一块：它的相位小于一块，任何相位下都放得下这么多
        blocks = -(-total // block_size) if order > 1 else (total - block_size) // block_size
        phases = total if order > 1 else block_size
        samples = np.arange(first, first + count)
        result = np.empty(count, dtype=np.int64)
        for epoch in np.unique(samples // blocks):
            here = samples // blocks == epoch
            phase, shuffled = self._shuffled(seed, int(epoch), blocks, phases)
            result[here] = (shuffled[samples[here] % blocks].astype(np.int64) * block_size + phase) % total
        return result

    def _shuffled(self, seed: int, epoch: int, blocks: int, phases: int) -> tuple[int, np.ndarray]:
        key = (seed, epoch, blocks, phases)
        if self._epoch is None or self._epoch[0] != key:
            # 计数器式随机数：由 (seed, epoch) 直接算出，不依赖之前抽过什么
            random = np.random.Generator(np.random.Philox(key=[seed, epoch]))
            phase = int(random.integers(phases))
            self._epoch = (key, phase, random.permutation(blocks).astype(np.uint32))
        return self._epoch[1], self._epoch[2]

    def rows(self, split: str, starts: np.ndarray, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """x and y = x shifted by one, both (len(starts), block_size) int64; y is -1 where another window counts."""
        # 绕过文末的一块从文首接着读
        places = (starts[:, None] + np.arange(block_size + 1)) % len(self.tokens[split])
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
