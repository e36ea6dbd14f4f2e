"""Data of conversations: records as people have them, the folder's format, and packing whole conversations into rows.

A folder of conversations is one of documents (nanogpt.data.documents) without labels. Beside each .bin lies
<split>.answers.bin, one byte for each id: 1 where it belongs to an answer. A row of training is as many conversations
as fit, one behind the other with nothing between them, for their ids are those of the model's chat template and hold no
other: the first id of each is written as ~id (-1 - id), by which GPT.visible and GPT.inside tell them apart. Only
answers are targets. A conversation longer than a row loses its end.
"""

# 对话的数据：认得 messages、conversations（ShareGPT）与 alpaca 三种写法；写出文件夹；装箱取批
# 与文章（documents）同一套装箱与次序，三处不同：一行里没有分隔符，目标只有回答，超长的截去末尾而不另起一行
# 没有分隔符：模型读到的要与写作时、导出之后读到的逐字相同，而 <|im_end|> 之类在一段对话里出现许多次
# 末尾截去而不接着写：没有问题在前面的回答，学了没有用

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanogpt.base.console import in_sight
from nanogpt.base.language import ConfigError, say
from nanogpt.data.chat import ROLES, Message, samples, written_with
from nanogpt.data.corpus import new_dataset, write_meta, write_tokens
from nanogpt.data.documents import DocumentData, Pieces, pack
from nanogpt.data.records import rows_of_json
from nanogpt.data.source_text import HALF, resolved
from nanogpt.data.tokenizer import Tokenizer
from nanogpt.data.tokens import IGNORED, SPLITS

EXAMPLE = '{"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]}'
LISTS = ("messages", "conversations", "conversation")
# alpaca 与它的亲戚：问的一边，答的一边
QUESTIONS, ANSWERS = ("instruction", "prompt", "question", "query"), ("output", "response", "answer", "completion")
# 各家数据里角色的别名
SAME = {"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
        "bot": "assistant", "developer": "system"}

# 训练中的样本回答一个问题：再长就不像样本了
LONGEST_QUESTION = 200


@dataclass(frozen=True)
class Conversation:
    """What was said, up to the last answer, and where it stands."""

    # 模板不接受它时，要说得出是哪个文件的哪一行

    messages: list[Message]
    file: Path
    line: int


# ---- 读 ----


def chat_fields(row: dict) -> list[str]:
    """The fields in which a record holds a conversation; none: it is no conversation."""
    if listed := [name for name in LISTS if isinstance(row.get(name), list) and row[name]]:
        return listed[:1]
    asked, answered = ([name for name in names if isinstance(row.get(name), str)][:1] for names in (QUESTIONS, ANSWERS))
    return [*asked, *answered] if asked and answered else []


def conversations(files: list[Path], encoding: str = "auto") -> Iterator[Conversation]:
    """All conversations of the files that have an answer; says how many have none, and how many answers are empty."""
    empty = lost = 0
    for file, found in resolved(files, encoding):
        for line, row in rows_of_json(file, found, EXAMPLE):
            messages = messages_of(file, line, row)
            answers = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
            blank = next((k for k in answers if not messages[k]["content"].strip()), None)
            empty += blank is not None
            # 空的回答什么也教不了，它后面的又接在它后面：到它为止
            kept = [k for k in answers if blank is None or k < blank]
            if not kept:
                lost += 1
                continue
            yield Conversation(messages[: kept[-1] + 1], file, line)
    if empty or lost:
        say(
            "{lost:,} conversations without an answer are left out, {empty:,} end before an empty one",
            lost=lost, empty=empty,
        )


def messages_of(file: Path, line: int, row: dict) -> list[Message]:
    """The messages of a record, checked."""
    fields = chat_fields(row)
    if not fields:
        raise ConfigError(
            "{file}, line {line}: no conversation in it (its fields: {fields}); write for example {example}, "
            "conversations with from and value, or instruction and output",
            file=file, line=line, fields=", ".join(row)[:80] or "-", example=EXAMPLE,
        )
    if len(fields) == 1:
        turns = [one if isinstance(one, dict) else {"content": one} for one in row[fields[0]]]
    else:
        asked = "\n".join(part for part in (row[fields[0]], row.get("input") or "") if part)
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": row[fields[1]]}]
    found = [_message(file, line, number, turn) for number, turn in enumerate(turns, 1)]
    if isinstance(system := row.get("system"), str) and system.strip() and found[0]["role"] != "system":
        found.insert(0, {"role": "system", "content": _lines(system)})
    return found


def _message(file: Path, line: int, number: int, turn: dict) -> Message:
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    known = SAME.get(role, role) if isinstance(role, str) else None
    if known not in ROLES or turn.get("tool_calls") or turn.get("function_call"):
        raise ConfigError(
            "{file}, line {line}: message {number} has the role {got}; known are {known}: conversations with tools are "
            "not supported, leave this one out",
            file=file, line=line, number=number, known=", ".join((*ROLES, *SAME)),
            got="tool_calls" if known in ROLES else repr(role)[:40],
        )
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str) or HALF.search(content):
        raise ConfigError(
            "{file}, line {line}: message {number} holds {got}, which is not a text",
            file=file, line=line, number=number, got=ascii(content)[:60],
        )
    return {"role": known, "content": _lines(content)}


def _lines(content: str) -> str:
    return content.replace("\r\n", "\n").replace("\r", "\n")


def split_conversations(listed: Iterable[Conversation], val_fraction: float) -> dict[str, list[Conversation]]:
    """The parts "train" and "val", without repetitions; the same first question falls into the same part."""
    # 归哪一份由问题自己的 hash 决定：多几段、换个次序，别的不挪位；一问多答分落两边，验证损失就虚低
    groups: dict[bytes, dict[str, Conversation]] = {}
    count = 0
    for one in listed:
        question = next((m["content"] for m in one.messages if m["role"] == "user"), "").strip()
        place = hashlib.blake2b(question.encode("utf-8"), digest_size=8).digest()
        groups.setdefault(place, {}).setdefault(json.dumps(one.messages), one)
        count += 1
    kept = sum(map(len, groups.values()))
    if kept < count:
        say("{dropped:,} of {count:,} conversations repeat another and are left out", dropped=count - kept, count=count)
    held, val = set(), 0
    for place in sorted(groups)[:-1]:
        if val and val + len(groups[place]) / 2 > val_fraction * kept:
            break
        held.add(place)
        val += len(groups[place])
    parts = {split: [] for split in SPLITS}
    for place, group in groups.items():
        parts["val" if place in held else "train"] += group.values()
    return parts


# ---- 写 ----


def write_conversations(
    folder: Path, *, name: str, source: str, tokenizer: Tokenizer, parts: dict[str, list[Conversation]]
) -> Path:
    """Write a folder of conversations in the tokenizer's chat template; it appears whole or not at all."""
    with new_dataset(folder) as aside:
        lengths: dict[str, list[int]] = {split: [] for split in SPLITS}
        answers = {split: (aside / f"{split}.answers.bin").open("wb") for split in SPLITS}
        try:
            dtype, tokens = write_tokens(aside, tokenizer, _tokens(parts, tokenizer, lengths, answers))
        finally:
            for file in answers.values():
                file.close()
        for split in SPLITS:
            ends = np.array(lengths[split], dtype="<i8").cumsum()
            (aside / f"{split}.docs.bin").write_bytes(ends.tobytes())
        counts = {split: len(listed) for split, listed in parts.items()}
        asked = next((m["content"] for m in parts["val"][0].messages if m["role"] == "user"), "")
        write_meta(
            aside, name=name, source=source, tokenizer=tokenizer, dtype=dtype, tokens=tokens, conversations=counts,
            labels={}, question=asked[:LONGEST_QUESTION],
        )
    say(
        "{name}: {train:,} conversations for training ({tokens:,} tokens), {val:,} for validation, vocabulary {vocab} "
        "-> {path}",
        name=name, train=counts["train"], val=counts["val"], tokens=tokens["train"], vocab=tokenizer.vocab_size,
        path=folder,
    )
    return folder


def _tokens(parts, tokenizer, lengths: dict[str, list[int]], answers: dict) -> Iterator[tuple[str, np.ndarray]]:
    """(split, ids) of every sample; notes its length and writes which ids are answers."""
    for split in SPLITS:
        for one in in_sight(parts[split], len(parts[split])):
            # 词表只取自训练部分：验证里的生字略过
            messages = one.messages if split == "train" else written_with(tokenizer, one.messages)
            try:
                found = samples(tokenizer, messages)
            except ConfigError as error:
                if error.message != "chat_refused":
                    raise
                raise ConfigError("{file}, line {line}: {reason}", file=one.file, line=one.line, reason=error) from None
            for sample in found:
                lengths[split].append(len(sample.ids))
                answers[split].write(sample.answers.astype(np.uint8).tobytes())
                yield split, sample.ids


# ---- 取批 ----


class ConversationData(DocumentData):
    """A folder of conversations; a training sample is a row of packed conversations, of which answers are targets."""

    # 只换掉切块与填行：次序、打乱、按目标数计权、resume 都是文章那一套

    marked = True

    def _read_index(self) -> None:
        super()._read_index()
        self.question = str(self.meta["question"])
        self.answers = {}
        for split in SPLITS:
            self.answers[split] = np.fromfile(self.folder / f"{split}.answers.bin", dtype=np.uint8)
            assert len(self.answers[split]) == len(self.tokens[split]), f"{split}: answers"
        self.each_id.append(self.answers)

    def left_out(self, block_size: int) -> tuple[int, int, int]:
        """(samples for training, of these longer than a row, of these without an answer in it)."""
        index = self._index["train"]
        longer = int((np.diff(index[:, 0], prepend=0) > block_size + 1).sum())
        return len(index), longer, len(index) - len(self.pieces("train", block_size).document)

    def check_block_size(self, block_size: int) -> None:
        """Refuse a context in which no answer fits, and a split without a conversation."""
        for split in SPLITS:
            if not len(self._index[split]):
                raise ConfigError("no_documents", split=split, path=self.folder)
            if not len(self.pieces(split, block_size).document):
                raise ConfigError(
                    "model.block_size={got}: no conversation of the {split} part reaches its first answer in it; "
                    "choose a larger one",
                    got=block_size, split=split,
                )

    def _cut_up(self, split: str, block_size: int) -> Pieces:
        ends = self._index[split][:, 0]
        first = np.concatenate(([0], ends[:-1])).astype(np.int64)
        # 最后一个 id 只是目标
        length = np.minimum(ends - first - 1, block_size)
        bounds = np.stack((first + 1, first + 1 + length), axis=1).reshape(-1)
        inner = bounds[:-1] if len(bounds) and bounds[-1] == len(self.answers[split]) else bounds
        targets = np.add.reduceat(self.answers[split], inner, dtype=np.int64)[::2] if len(ends) else length
        kept = np.flatnonzero(targets)
        goes_on = np.zeros(len(kept), dtype=bool)
        row, place, count = pack(length[kept], goes_on, block_size)
        rows = np.split(np.lexsort((place, row)), np.cumsum(np.bincount(row, minlength=count))[:-1])
        return Pieces(kept, first[kept], (first + length)[kept], length[kept], targets[kept], goes_on, rows)

    def _put(
        self, split: str, block_size: int, piece: int, dropped: np.ndarray, x: np.ndarray, y: np.ndarray, at: int
    ) -> int:
        cut = self.pieces(split, block_size)
        first, last = cut.first[piece], cut.last[piece]
        ids = self.tokens[split][first : last + 1].astype(np.int64)
        end = at + len(ids) - 1
        x[at:end] = ids[:-1]
        x[at] = ~ids[0]
        y[at:end] = np.where(self.answers[split][first + 1 : last + 1], ids[1:], IGNORED)
        return end
