"""Texts of your own with labels, from JSON lines, a JSON list, or tables (CSV, TSV).

Objects {"text": …, "style": …, "emotion": …}, or columns of these names; one file, or all such files of a folder.
Labels may be missing; other fields are not used.
"""

# 使用者自己的、带标签的文字（dataset=labelled）：JSON Lines、一个 JSON 列表、CSV 或 TSV
# 读（逐条，错在第几行说得准）-> 检查标签 -> 去重切分 -> 写成文章的数据集
# 多数错误是格式的误会：对话数据、标题当标签、少了换行；各有各的一句话与怎么改
# 查重要把全部文字放进内存：放不下的先拒绝，不等系统来杀

import csv
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from nanogpt.base.config import RECORD_SUFFIXES, check_range
from nanogpt.base.hardware import free_ram
from nanogpt.base.language import ConfigError, say
from nanogpt.base.language import text as translated
from nanogpt.data.corpus import check_tokenizer, tokenizer_for
from nanogpt.data.documents import Document, label_names, write_documents
from nanogpt.data.labels import LABEL_KINDS
from nanogpt.data.source_text import HALF, check_encoding, iter_text, own_source, resolved, text_files, unchanged
from nanogpt.data.splitting import split_documents
from nanogpt.data.tokenizer import Tokenizer

# 欧洲的 Excel 存的 .csv 用分号
DELIMITERS = {".csv": ",;\t", ".tsv": "\t"}
EXAMPLE = '{"text": "春眠不觉晓", "style": "五言绝句"}'
LONGEST_LABEL = 64
# 标签要写成 <|style:…|>，也要显示在一行里
NO_LABEL = re.compile(r"[|\x00-\x1f\x7f\u2028\u2029\ud800-\udfff]")
BLANK = re.compile(r"[ \t\n\r]*")
# 一篇至多这么多字：十部长篇小说；再长就不是一篇，而是少了换行或引号
LONGEST_TEXT = 2**25
# 每字节文件至少要这么多内存：正文两份，查重时每字再记一个 hash 与归属（实测中文 20、英文 45 上下）
BYTES_EACH = 12
# 对话数据的常见写法：问的一边，答的一边
QUESTIONS = ("instruction", "prompt", "question", "query", "input")
ANSWERS = ("output", "response", "answer", "completion", "chosen")
# 标签多于这些，或者篇数的一半，多半是把标题、编号当成了标签
MOST_LABELS, FEW_LABELS = 1000, 20


def sources(
    path: str | None, tokenizer: str | Tokenizer, vocab_size: int | None, encoding: str, val_fraction: float,
    judge_fraction: float,
) -> list[Path]:
    """The files to read; ConfigError for options that cannot be right, and for more text than the memory holds."""
    source = own_source(path, unnamed="no_labelled_path")
    check_tokenizer(tokenizer, vocab_size)
    check_encoding(encoding)
    if not 0 < val_fraction < 1:
        raise ConfigError("out_of_range", key="dataset.val_fraction", got=val_fraction, wanted="> 0, < 1")
    check_range("dataset.judge_fraction", judge_fraction, 0, 1)
    if val_fraction + judge_fraction >= 1:
        wanted = f"< 1 - val_fraction = {1 - val_fraction:g}"
        raise ConfigError("out_of_range", key="dataset.judge_fraction", got=judge_fraction, wanted=wanted)
    files = text_files(source, RECORD_SUFFIXES)
    size = sum(file.stat().st_size for file in files)
    if not size:
        raise ConfigError("empty_labelled", got=path, kinds=" ".join(RECORD_SUFFIXES))
    if size * BYTES_EACH > (free := free_ram()):
        raise ConfigError(
            "dataset.path={got}: {size:,.0f} MiB of labelled texts are compared with each other in memory, which "
            "takes over {need:.1f} GiB, and {have:.1f} are free: give fewer texts, or use dataset=text_file, which "
            "needs no memory for them",
            got=path, size=size / 2**20, need=size * BYTES_EACH / 2**30, have=free / 2**30,
        )
    return files


# ---- 读 ----


def lines_of(file: Path, pieces: Iterable[str]) -> Iterator[str]:
    """The lines of a file's text with their ends."""
    pending, number = "", 1
    for piece in pieces:
        # 不用 splitlines：JSON 字符串里可以有 U+2028 之类
        *whole, pending = (pending + piece).split("\n")
        yield from (line + "\n" for line in whole)
        number += len(whole)
        if len(pending) > LONGEST_TEXT:
            # 多半是整个文件没有换行：再读下去只会吃光内存
            raise ConfigError(
                "{file}, line {line}: longer than {most:,} characters, too many for a single text; put each text on "
                "a line of its own",
                file=file, line=number, most=LONGEST_TEXT,
            )
    if pending:
        yield pending


def rows_of_json(file: Path, encoding: str) -> Iterator[tuple[int, dict]]:
    """(line number, object) of each line that is not blank, or of each item where the whole file is one list."""
    pieces = iter_text(file, encoding)
    first = next(pieces, "")
    if first.lstrip().startswith("["):
        yield from rows_of_list(file, first + "".join(pieces))
        return
    for number, line in enumerate(lines_of(file, itertools.chain([first], pieces)), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=without_repeats)
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                "labelled_json", file=file, line=number, reason=str(error).partition("\n")[0], example=EXAMPLE,
            ) from None
        yield number, as_object(file, number, row)


def rows_of_list(file: Path, content: str) -> Iterator[tuple[int, dict]]:
    """(line number, object) of each item of a JSON list."""
    # 一项一项地解：错在第几行说得准
    decoder = json.JSONDecoder(object_pairs_hook=without_repeats)
    at, line, counted = content.index("[") + 1, 1, 0
    while True:
        at = BLANK.match(content, at).end()
        line, counted = line + content.count("\n", counted, at), at
        try:
            if content[at : at + 1] == "]":
                if content[at + 1 :].strip():
                    raise ValueError("there is more behind the list")
                return
            row, at = decoder.raw_decode(content, at)
            at = BLANK.match(content, at).end()
            if content[at : at + 1] not in ("]", ","):
                raise ValueError("no comma, no ]")
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                "{file}, line {line}: the list of records breaks off here ({reason}); correct it, or write one object "
                "in each line, for example {example}",
                file=file, line=line, reason=getattr(error, "msg", error), example=EXAMPLE,
            ) from None
        yield line, as_object(file, line, row)
        at += content[at] == ","


def as_object(file: Path, line: int, row) -> dict:
    """The row, if it is an object."""
    if not isinstance(row, dict):
        raise ConfigError("labelled_json", file=file, line=line, reason=f"a {type(row).__name__}", example=EXAMPLE)
    return row


def without_repeats(pairs: list[tuple[str, object]]) -> dict:
    """The object of these pairs; ValueError if a name occurs twice, since one of its values would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(n for n in names if names.count(n) > 1)!r} stands twice")
    return found


def rows_of_table(file: Path, encoding: str) -> Iterator[tuple[int, dict]]:
    """(number of its last line, fields) of each row below the header; rows of empty fields are skipped."""
    lines, before = lines_of(file, iter_text(file, encoding)), 0
    first = next(lines, "")
    if marked := re.fullmatch(r"sep=(.)\n?", first, re.IGNORECASE):
        # Excel 写在第一行，说明用什么分隔
        first, before = next(lines, ""), 1
    delimiter = marked[1] if marked else delimiter_of(first, DELIMITERS[file.suffix.lower()])
    reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
    # 长文章也是一格；引号没有配对时，整个文件都是一格
    csv.field_size_limit(LONGEST_TEXT)
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        if "text" not in header:
            raise ConfigError(
                "{file}, line {line}: the columns are {got}; the first line must name them, one of them text",
                file=file, line=before + 1, got=", ".join(header)[:80],
            )
        for fields in reader:
            if not any(field.strip() for field in fields):
                continue
            number = before + reader.line_num
            if len(fields) != len(header):
                raise ConfigError(
                    "{file}, line {line}: {got} fields where the first line names {want}; put a text with commas or "
                    "line breaks in double quotes",
                    file=file, line=number, got=len(fields), want=len(header),
                )
            yield number, dict(zip(header, fields))
    except csv.Error as error:
        raise ConfigError(
            "{file}, line {line}: this is not a table ({reason}); double the quotation marks inside of quoted fields, "
            "or use .jsonl",
            file=file, line=before + reader.line_num, reason=error,
        ) from None


def delimiter_of(header: str, delimiters: str) -> str:
    """The first delimiter with which one of the columns is called text, else the first one."""
    names = {d: [name.strip().strip('"').lower() for name in header.split(d)] for d in delimiters}
    return next((d for d in delimiters if "text" in names[d]), delimiters[0])


def chat_of(row: dict) -> tuple[str, list[str], str] | None:
    """(name of its kind, its fields, all of it as one text) of a record for chat models, else None."""
    for field in ("conversations", "messages", "conversation"):
        if isinstance(turns := row.get(field), list) and turns and all(isinstance(turn, dict) for turn in turns):
            said = [turn.get("content", turn.get("value")) for turn in turns]
            return "kind_conversation", [field], "\n".join(part for part in said if isinstance(part, str))
    asked, answered = ([name for name in names if isinstance(row.get(name), str)] for names in (QUESTIONS, ANSWERS))
    if asked and answered:
        said = [*asked, *answered]
        return "kind_instruction", said, "\n".join(row[field] for field in said if row[field].strip())
    return None


def document(file: Path, line: int, row: dict) -> Document:
    """One text with its labels, checked."""
    text = row.get("text")
    if text is None and (chat := chat_of(row)):
        kind, fields, whole = chat
        example = json.dumps({"text": whole[:80]}, ensure_ascii=bool(HALF.search(whole)))
        raise ConfigError(
            "{file}, line {line}: this is a {kind} ({fields}), as chat models are tuned on, and a text is wanted; put "
            "all of a record into its text, this one for example: {example}",
            file=file, line=line, kind=translated(kind), fields=", ".join(fields), example=example,
        )
    if not isinstance(text, str) or not text.strip() or re.search("[\ud800-\udfff]", text):
        raise ConfigError(
            '{file}, line {line}: "text" is {got}, which is not a text; write for example {example}',
            file=file, line=line, got=_short(text), example=EXAMPLE,
        )
    labels = {}
    for kind in LABEL_KINDS:
        label = row.get(kind)
        if label is None or (isinstance(label, str) and not label.strip()):
            continue
        if not isinstance(label, str) or len(label.strip()) > LONGEST_LABEL or NO_LABEL.search(label.strip()):
            raise ConfigError(
                '{file}, line {line}: "{kind}" is {got}, which is not a label; write a string in quotes without | and '
                "line breaks, at most {most} characters",
                file=file, line=line, kind=kind, got=_short(label), most=LONGEST_LABEL,
            )
        labels[kind] = label.strip()
    return Document(text.replace("\r\n", "\n").replace("\r", "\n").strip(), **labels)


def _short(value) -> str:
    return ascii(value) if isinstance(value, str) and re.search("[\ud800-\udfff]", value) else repr(value)[:60]


def documents(files: list[Path], encoding: str = "auto") -> Iterator[Document]:
    """All texts of the files; says once which fields are not used."""
    unused: set[str] = set()
    for file, found in resolved(files, encoding):
        rows = rows_of_table if file.suffix.lower() in DELIMITERS else rows_of_json
        for line, row in rows(file, found):
            unused.update(row)
            yield document(file, line, row)
    if unused := sorted(unused - {"text", *LABEL_KINDS}):
        say(
            "not used: the fields {fields} (labels are {kinds})",
            fields=", ".join(unused[:10])[:200], kinds=", ".join(LABEL_KINDS),
        )


def check_labels(listed: list[Document]) -> None:
    """Refuse labels most of which occur only once."""
    for kind, names in label_names(listed).items():
        labelled = sum(getattr(document, kind) is not None for document in listed)
        if len(names) > MOST_LABELS or (len(names) > FEW_LABELS and 2 * len(names) > labelled):
            raise ConfigError(
                "dataset.path: {labels} different values of {kind} for {documents} texts; a label is a word that many "
                "texts share (at most {most}), not a title or a number: rename that field or choose fewer",
                kind=kind, labels=len(names), documents=labelled, most=MOST_LABELS,
            )


def prepare(
    folder: Path, path: str | None, tokenizer: str | Tokenizer, vocab_size: int, encoding: str,
    val_fraction: float, judge_fraction: float,
) -> None:
    """Read, check, split and write the data set folder."""
    # 给了 dataset.dir 就没有人替它核对过
    files = sources(path, tokenizer, vocab_size, encoding, val_fraction, judge_fraction)
    with unchanged(files) as check:
        listed = list(documents(files, encoding))
        check()
    if not listed:
        raise ConfigError("empty_labelled", got=path, kinds=" ".join(RECORD_SUFFIXES))
    check_labels(listed)
    fractions = {"train": 1 - val_fraction - judge_fraction, "val": val_fraction, "judge": judge_fraction}
    parts = split_documents(listed, fractions)
    for split in ("train", "val"):
        if not parts[split]:
            raise ConfigError("no_documents", split=split, path=path)
    coder = tokenizer_for(tokenizer, lambda: (document.text for document in parts["train"]), vocab_size)
    write_documents(
        folder, name="labelled", source=Path(path).name, tokenizer=coder, parts=parts, grow=isinstance(tokenizer, str),
    )


if __name__ == "__main__":
    from nanogpt.data.corpus import run_prepare

    run_prepare("labelled")
