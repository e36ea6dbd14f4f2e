"""Data of separate documents with labels: the folder's format, and packing whole documents into rows.

A folder of documents has the files of running text (train.bin, val.bin, tokenizer.json, meta.json); its .bin files
hold the texts one after the other with nothing between them. Beside each lies <split>.docs.bin: int64
(documents, 1 + kinds), the end of each text and the index of its label of each kind, -1 for none. judge.jsonl holds
texts that no training sees.

A row of training is [separator, label ids …, text …] of as many whole documents as fit. Attention, positions and
n-grams stay inside a document (GPT.visible, GPT.inside). Labels are read and never predicted: their targets are -1,
like those of the unfilled end of a row. A document longer than a row continues at the beginning of another row, again
behind its labels.
"""

# 一篇一篇、带标签的数据：文件夹的格式，以及把整篇文章装进训练的行
# 写：write_documents 写出 .bin 与每篇的结尾、标签；读：DocumentData 切块、装箱、取批
# 一行里有几篇，互相看不见（注意力、位置、n-gram 都不跨篇）；标签只读不预测，目标是 -1
# 装箱的结构只由长度决定，每个 epoch 只是同样长的块互换、行打乱：样本仍是 (seed, 序号) 的函数，resume 接得上
# TokenData 是连着的文字那一种；两者给训练的接口相同

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from nanogpt.base.console import in_sight
from nanogpt.base.hashed_json import reason_of
from nanogpt.base.language import ConfigError, say
from nanogpt.data.corpus import new_dataset, write_meta, write_tokens
from nanogpt.data.labels import LABEL_KINDS, with_labels
from nanogpt.data.tokenizer import Tokenizer
from nanogpt.data.tokens import IGNORED, ORDER, SPLITS, TokenData

JUDGE = "judge.jsonl"


@dataclass(frozen=True)
class Document:
    """One text and its labels."""

    # 字段名就是 LABEL_KINDS 里的种类：读写处用 getattr 一视同仁

    text: str
    style: str | None = None
    emotion: str | None = None


# ---- 写 ----


def label_names(documents: Iterable[Document]) -> dict[str, list[str]]:
    """The labels that occur, sorted, of each kind that occurs."""
    seen = {kind: set() for kind in LABEL_KINDS}
    for document in documents:
        for kind in LABEL_KINDS:
            if label := getattr(document, kind):
                seen[kind].add(label)
    return {kind: sorted(labels) for kind, labels in seen.items() if labels}


def write_documents(
    folder: Path, *, name: str, source: str, tokenizer: Tokenizer, parts: dict[str, list[Document]], grow: bool = True
) -> Path:
    """Write a folder of documents from the parts "train", "val" and perhaps "judge"; it appears whole or not at all.

    The tokenizer gets a token for each label in "train"; with grow=False it keeps its size (see with_labels).
    """
    names = label_names(parts["train"])
    tokenizer = with_labels(tokenizer, names, grow=grow)
    with new_dataset(folder) as aside:
        columns = {split: [] for split in SPLITS}
        dtype, counts = write_tokens(aside, tokenizer, _tokens(parts, tokenizer, names, columns))
        for split in SPLITS:
            rows = np.array(columns[split], dtype="<i8").reshape(-1, 1 + len(names))
            rows[:, 0] = rows[:, 0].cumsum()
            (aside / f"{split}.docs.bin").write_bytes(rows.tobytes())
        if parts.get("judge"):
            lines = (json.dumps(asdict(document), ensure_ascii=False) + "\n" for document in parts["judge"])
            (aside / JUDGE).write_text("".join(lines), encoding="utf-8", newline="\n")
        write_meta(
            aside, name=name, source=source, tokenizer=tokenizer, dtype=dtype, tokens=counts,
            documents={part: len(listed) for part, listed in parts.items()}, labels=names,
        )
    say(
        "{name}: {train:,} documents for training ({tokens:,} tokens), {val:,} for validation, vocabulary {vocab} -> "
        "{path}",
        name=name, train=len(parts["train"]), val=len(parts["val"]), tokens=counts["train"], vocab=tokenizer.vocab_size,
        path=folder,
    )
    return folder


def _tokens(
    parts, tokenizer, names: dict[str, list[str]], columns: dict[str, list]
) -> Iterator[tuple[str, np.ndarray]]:
    """(split, ids) of every document; notes its length and labels in columns[split]."""
    index = {kind: {label: i for i, label in enumerate(listed)} for kind, listed in names.items()}
    for split in SPLITS:
        for document in in_sight(parts[split], len(parts[split])):
            # 词表只取自训练部分：验证文本里的生字略过
            ids = tokenizer.encode(document.text, skip_unknown=split != "train")
            columns[split].append([len(ids), *(index[kind].get(getattr(document, kind), -1) for kind in names)])
            yield split, ids


# ---- 读 ----


def read_judge_part(folder: Path) -> list[Document]:
    """The texts of a data set that no training sees."""
    path = folder / JUDGE
    if not path.is_file():
        return []
    return [Document(**json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]


@dataclass
class Pieces:
    """What a split is cut into for one block_size, and how rows are filled.

    Arrays over pieces: document, first and last text token, number of ids in the row (labels included), number of
    targets, and whether the piece continues a document and so must open its row. rows: the slots of each row of the
    packing, in their order (see pack).
    """

    # 一列一个数组而不是一块一个对象：几百万块时省内存，切块也能整个向量化

    document: np.ndarray
    first: np.ndarray
    last: np.ndarray
    length: np.ndarray
    targets: np.ndarray
    goes_on: np.ndarray
    rows: list[np.ndarray]


class DocumentData(TokenData):
    """A folder of documents; a training sample is a row of packed documents.

    Every epoch deals the documents anew to slots of their length and shuffles the rows. A document loses all its labels
    with probability label_dropout; if there are several kinds, each label alone is dropped with the same probability.
    """

    # 略去标签是为了写作时的 guidance：模型也要会没有标签的写法

    def __init__(self, folder: Path, label_dropout: float = 0.0, *, verify: bool = False):
        super().__init__(folder, verify=verify)
        self.label_dropout = label_dropout
        self.separator = None if self.marked else self.tokenizer.end_of_text
        self.each_id = [self.tokens]
        """What there is for each id, of each split."""
        try:
            self._read_index()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            # 摘要对得上、内容却合不上：不是这个程序写的
            raise ConfigError(
                "damaged_dataset", path=self.folder / "*.docs.bin", reason=reason_of(error), folder=self.folder,
            ) from None
        self._cut: dict[tuple[str, int], Pieces] = {}
        self._dealt: dict[str, tuple[tuple, list[np.ndarray], np.ndarray]] = {}

    def _read_index(self) -> None:
        self.labels: dict[str, list[str]] = self.meta["labels"]
        assert self.separator is not None or self.marked, "no separator"
        self._index = {}
        for split in SPLITS:
            index = np.fromfile(self.folder / f"{split}.docs.bin", dtype="<i8").reshape(-1, 1 + len(self.labels))
            ends = index[:, 0]
            # 首尾相接、恰好盖满，取文章时才不会越界
            filled = ends[-1:].sum() == len(self.tokens[split])
            assert filled and (np.diff(ends, prepend=0) >= 0).all(), f"{split}: ends"
            for column, names in enumerate(self.labels.values(), 1):
                assert ((index[:, column] >= -1) & (index[:, column] < len(names))).all(), f"{split}: labels"
            self._index[split] = index
        # 名字 -> id，按种类、按编号排好；-1（没有标签）取到最后的空元组
        self._ids = [
            [*(self.tokenizer.labels[kind][name] for name in names), ()] for kind, names in self.labels.items()
        ]

    def hold_out(self, fraction: float) -> None:
        """Validate on every so many-th document of the training split from now on, and train without it."""
        # 隔几篇取一篇，而不是取末尾：文件里同一种标签的文章常在一起
        index = self._index["train"]
        places = np.arange(len(index)) * fraction
        held = np.floor(places + fraction) > np.floor(places)
        lengths = np.diff(index[:, 0], prepend=0)
        ids = np.repeat(held, lengths)
        for each in self.each_id:
            whole = each["train"]
            each["train"], each["val"] = whole[~ids], whole[ids]
        for split, chosen in (("train", ~held), ("val", held)):
            ends = np.cumsum(lengths[chosen]).reshape(-1, 1)
            self._index[split] = np.concatenate((ends, index[chosen, 1:]), axis=1)

    def slide(self, stride: int, block_size: int) -> None:
        """Refuse to slide: a document begins its row, and is all the context that there is."""
        # 只有比 block_size 长的文章会切开，切口后缺的上文要另一种装箱
        raise ConfigError(
            "eval_stride={got} slides over running text, and {name} holds documents that stand alone; leave it out, or "
            "eval_stride=null",
            got=stride, name=self.name,
        )

    def documents(self, split: str) -> Iterator[Document]:
        """The documents of a split with their labels, decoded."""
        names = [[*names, None] for names in self.labels.values()]
        start = 0
        for end, *labels in self._index[split].tolist():
            # 先成普通的整数：逐个从 memmap 取要慢十倍
            text = self.tokenizer.decode(self.tokens[split][start:end].tolist())
            yield Document(text, **{kind: listed[label] for kind, listed, label in zip(self.labels, names, labels)})
            start = end

    # ---- 切块与装箱 ----

    def _header(self) -> int:
        """Ids before the text, at most: the separator and one label of each kind."""
        return 1 + sum(max(map(len, ids)) for ids in self._ids)

    def pieces(self, split: str, block_size: int) -> Pieces:
        """The split cut and packed for rows of block_size ids; remembered."""
        if (split, block_size) not in self._cut:
            self._cut[split, block_size] = self._cut_up(split, block_size)
        return self._cut[split, block_size]

    def _cut_up(self, split: str, block_size: int) -> Pieces:
        index = self._index[split]
        ends = index[:, 0]
        starts = np.concatenate(([0], ends[:-1])).astype(np.int64)
        # 标签按各自的长度留位；被略去时空着，装箱的结构就不随 epoch 变
        header = 1 + sum(np.array([len(i) for i in ids])[index[:, 1 + kind]] for kind, ids in enumerate(self._ids))
        header = np.broadcast_to(header, ends.shape)
        first_room, later_room = block_size - header, block_size - (header - 1)
        beyond = np.maximum(ends - starts - first_room, 0)
        count = 1 + -(-beyond // later_room)
        document = np.repeat(np.arange(len(index)), count)
        number = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
        goes_on = number > 0
        first = starts[document] + np.where(goes_on, first_room[document] + (number - 1) * later_room[document], 0)
        last = np.minimum(first + np.where(goes_on, later_room[document], first_room[document]), ends[document])
        length = last - first + header[document] - goes_on
        # 开头的块还要从标签预测第一个字，所以多一个目标
        targets = last - first + ~goes_on
        row, place, count = pack(length, goes_on, block_size)
        # 装箱的结构每个 epoch 都一样，只算一次
        rows = np.split(np.lexsort((place, row)), np.cumsum(np.bincount(row, minlength=count))[:-1])
        return Pieces(document, first, last, length, targets, goes_on, rows)

    def _deal(self, split: str, block_size: int, seed: int | None, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """(pieces of each row, dropped labels (documents, kinds) bool) of one epoch; seed None shuffles nothing."""
        key = (block_size, seed, epoch)
        if split not in self._dealt or self._dealt[split][0] != key:
            cut = self.pieces(split, block_size)
            documents, kinds = len(self._index[split]), len(self.labels)
            if seed is None:
                ties, shuffled = np.arange(len(cut.length)), np.arange(len(cut.rows))
                dropped = np.zeros((documents, kinds), dtype=bool)
            else:
                # 计数器式随机数：由 (seed, epoch) 直接算出
                random = np.random.Generator(np.random.Philox(key=[seed, epoch]))
                ties, shuffled = random.random(len(cut.length)), random.permutation(len(cut.rows))
                chances = random.random((documents, 1 + kinds)) < self.label_dropout
                # 单独略去只在有几种标签时才另算
                dropped = chances[:, :1] | (chances[:, 1:] if kinds > 1 else False)
            # 同样长的块互换位置，装箱的结构不变
            slots = np.lexsort((ties, -cut.length, ~cut.goes_on))
            rows = [slots[cut.rows[i]] for i in shuffled]
            self._dealt[split] = (key, rows, np.broadcast_to(dropped, (documents, kinds)))
        return self._dealt[split][1:]

    # ---- 取批 ----

    def check_block_size(self, block_size: int) -> None:
        """Refuse a context with hardly more room than the labels take, and a split without a document."""
        for split in SPLITS:
            if not len(self._index[split]):
                raise ConfigError("no_documents", split=split, path=self.folder)
        if block_size < 2 * self._header():
            raise ConfigError(
                "model.block_size={got} leaves hardly any room behind the labels; choose model.block_size>={want}",
                got=block_size, want=2 * self._header(),
            )

    def starts(self, seed: int, first: int, count: int, block_size: int, *, order: int = ORDER) -> np.ndarray:
        """(seed, epoch, row) of samples first … first + count - 1, (count, 3); documents have only one order."""
        epoch, row = np.divmod(np.arange(first, first + count), len(self.pieces("train", block_size).rows))
        return np.stack((np.full(count, seed), epoch, row), axis=1)

    def targets(self, starts: np.ndarray, block_size: int) -> np.ndarray:
        """How many targets each training sample has, (len(starts),)."""
        cut = self.pieces("train", block_size)
        rows = (self._deal("train", block_size, int(seed), int(epoch))[0][row] for seed, epoch, row in starts)
        return np.array([cut.targets[row].sum() for row in rows])

    def rows(
        self, split: str, starts: np.ndarray, block_size: int, *, labelled: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x and y, both (len(starts), block_size) int64; y is -1 where nothing is to be predicted.

        With labelled=False no document has its labels; the targets are the same in the same order.
        """
        x = np.full((len(starts), block_size), self.separator or 0, dtype=np.int64)
        y = np.full((len(starts), block_size), IGNORED, dtype=np.int64)
        for i, start in enumerate(starts):
            seed, epoch, row = (int(n) for n in start) if split == "train" else (None, 0, int(start))
            rows, dropped = self._deal(split, block_size, seed, epoch)
            dropped = dropped if labelled else np.broadcast_to(True, dropped.shape)
            at = 0
            for piece in rows[row]:
                at = self._put(split, block_size, piece, dropped, x[i], y[i], at)
        return torch.from_numpy(x), torch.from_numpy(y)

    def _put(
        self, split: str, block_size: int, piece: int, dropped: np.ndarray, x: np.ndarray, y: np.ndarray, at: int
    ) -> int:
        """Write a piece at position `at` of a row; return where the next one begins."""
        cut = self.pieces(split, block_size)
        document, first, last = cut.document[piece], cut.first[piece], cut.last[piece]
        end, *labels = self._index[split][document]
        header = [] if cut.goes_on[piece] else [self.separator]
        for kind, label in enumerate(labels):
            if not dropped[document, kind]:
                header += self._ids[kind][label]
        text = self.tokens[split][first:last].astype(np.int64)
        begin = at + len(header)
        x[at:begin] = header
        x[begin : begin + len(text)] = text
        y[begin : begin + len(text) - 1] = text[1:]
        if not cut.goes_on[piece] and len(text):
            y[begin - 1] = text[0]
        # 最后一个字之后：文章的下一个字，或者结束
        y[begin + len(text) - 1] = self.separator if last == end else self.tokens[split][last]
        return at + int(cut.length[piece])

    def val_targets(self, windows: list[tuple[int, int]]) -> int:
        """How many tokens are predicted in these windows of val_windows(); labels and unfilled ends do not count."""
        rows = ((T, self._deal("val", T, None, 0)[0][row]) for row, T in windows)
        return int(sum(self.pieces("val", T).targets[row].sum() for T, row in rows))

    def val_windows(self, block_size: int, limit: int | None) -> list[tuple[int, int]]:
        """(row, block_size) of the rows to evaluate: all, or as many as hold `limit` tokens, spread evenly."""
        count = len(self.pieces("val", block_size).rows)
        wanted = count if limit is None else max(1, min(count, limit // block_size))
        return [(int(row), block_size) for row in np.linspace(0, count, wanted, endpoint=False).astype(int)]


# ---- 装箱 ----


def pack(lengths: np.ndarray, opens: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(row of each slot, place of each slot, number of rows) for pieces of `lengths` <= capacity.

    Slots are in the order of descending length; first come those that `opens` marks, which begin a row each. The result
    depends only on the multiset of (opens, length), so that pieces of equal length can trade slots without repacking.
    """
    # best-fit decreasing：长的先放，放进剩得最少又放得下的行
    order = np.lexsort((-lengths, ~opens))
    ordered, opening = lengths[order].tolist(), opens[order].tolist()
    row, place = np.empty(len(ordered), dtype=np.int64), np.empty(len(ordered), dtype=np.int64)
    # 剩余空间 -> 还剩这么多的行；位图的第 n 位说明剩 n 的行有没有
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    bitmap, rows = 0, 0
    for slot, length in enumerate(ordered):
        # 位图右移之后的最低位，就是放得下的行里剩得最少的
        candidates = 0 if opening[slot] else bitmap >> length
        if candidates:
            room = length + (candidates & -candidates).bit_length() - 1
            into = with_room[room].pop()
            if not with_room[room]:
                bitmap &= ~(1 << room)
        else:
            into, room, rows = rows, capacity, rows + 1
        row[slot], place[slot] = into, capacity - room
        with_room[room - length].append(into)
        bitmap |= 1 << (room - length)
    return row, place, rows
