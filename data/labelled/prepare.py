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
import re
from collections.abc import Iterator
from pathlib import Path

from nanogpt.base.config import RECORD_SUFFIXES, check_range
from nanogpt.base.hardware import free_ram
from nanogpt.base.language import ConfigError, say
from nanogpt.data.conversations import chat_fields
from nanogpt.data.corpus import check_tokenizer, tokenizer_for
from nanogpt.data.documents import Document, label_names, write_documents
from nanogpt.data.labels import LABEL_KINDS
from nanogpt.data.records import LONGEST_TEXT, lines_of, rows_of_json
from nanogpt.data.source_text import check_encoding, iter_text, own_source, resolved, text_files, unchanged
from nanogpt.data.splitting import split_documents
from nanogpt.data.tokenizer import Tokenizer

# 欧洲的 Excel 存的 .csv 用分号
DELIMITERS = {".csv": ",;\t", ".tsv": "\t"}
EXAMPLE = '{"text": "春眠不觉晓", "style": "五言绝句"}'
LONGEST_LABEL = 64
# 标签要写成 <|style:…|>，也要显示在一行里
NO_LABEL = re.compile(r"[|\x00-\x1f\x7f\u2028\u2029\ud800-\udfff]")
# 每字节文件至少要这么多内存：正文两份，查重时每字再记一个 hash 与归属（实测中文 20、英文 45 上下）
BYTES_EACH = 12
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


def document(file: Path, line: int, row: dict) -> Document:
    """One text with its labels, checked."""
    text = row.get("text")
    if text is None and (fields := chat_fields(row)):
        raise ConfigError(
            "{file}, line {line}: this is a conversation ({fields}), as chat models are trained on, and a text is "
            "wanted; type dataset=chat",
            file=file, line=line, fields=", ".join(fields),
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
        table = file.suffix.lower() in DELIMITERS
        for line, row in rows_of_table(file, found) if table else rows_of_json(file, found, EXAMPLE):
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
