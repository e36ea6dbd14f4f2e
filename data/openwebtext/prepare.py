"""OpenWebText in GPT-2's byte-pair encoding, streamed to disk through the `datasets` library."""

# OpenWebText（dataset=openwebtext）：用 datasets 库流式读取，边读边编码边写盘，几十 GB 不进内存
# 也可以指一个本机文件夹（parquet、jsonl、json），断网时用；每篇之后接一个结尾 token
# 流式读取不知道总数，所以每 N 篇取一篇作验证，每次都切得一样

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from nanogpt.base.language import ConfigError, say
from nanogpt.data.corpus import write_tagged
from nanogpt.data.tokenizer import gpt2_tokenizer


def documents(source: str) -> Iterable[dict]:
    """The rows of a hub data set or of a local folder of parquet, jsonl or json files, streamed."""
    try:
        import datasets
    except ImportError:
        raise ConfigError("missing_package", what="dataset=openwebtext", package="datasets") from None
    try:
        return datasets.load_dataset(source, split="train", streaming=True)
    except Exception as error:
        # 网络与格式的错误类型由库决定，都意味着读不到
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError("source_failed", got=source, reason=reason) from None


def prepare(folder: Path, source: str, val_every: int, max_documents: int | None) -> None:
    """Tokenise and write document by document, each followed by the end-of-text token."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    if val_every < 2:
        raise ConfigError("out_of_range", key="dataset.val_every", got=val_every, wanted=">= 2")
    tokenizer = gpt2_tokenizer()
    rows = documents(source)
    # hub 的说明里写着全部有多大、多少篇；本机的文件夹没有说明
    size, splits = rows.info.download_size, rows.info.splits or {}
    total = max_documents or ("train" in splits and splits["train"].num_examples) or None
    if size and not Path(source).exists():
        say("fetching", name=source, size=size / 1e6, place="Hugging Face")

    def stream(advance) -> Iterator[tuple[str, np.ndarray]]:
        for number, row in enumerate(rows):
            if number == max_documents:
                return
            if "text" not in row:
                raise ConfigError("source_failed", got=source, reason="no column named text")
            # 每 N 篇取一篇作验证：流式读取时不知道总数，这样切分也固定
            split = "val" if number % val_every == val_every - 1 else "train"
            yield split, np.append(tokenizer.encode(row["text"]), tokenizer.end_of_text)
            advance()

    columns = (TextColumn("openwebtext"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("documents", total=total)
        written = stream(lambda: bar.advance(task))
        write_tagged(folder, name="openwebtext", source=source, tokenizer=tokenizer, stream=written)


if __name__ == "__main__":
    from nanogpt.data.corpus import run_prepare

    run_prepare("openwebtext")
