"""One-shot and batch writing: texts on stdout in the order of the prompts, records in a jsonl file."""

# 一次写几段，或照一份开头的文件写一批：文字按开头的次序印到 stdout，output= 的文件里一段一条记录
# write_samples 由 run_sample.py 调用；许多段一起写，先写完的先记下，但按次序显示，所以后面的要先扣住
# Records、in_order、recorded 也给一问一答用

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from nanogpt.base.console import Console
from nanogpt.base.files import check_writable, folders_around
from nanogpt.base.language import ConfigError, show
from nanogpt.base.sample_config import SampleConfig
from nanogpt.write.chat import Chat
from nanogpt.write.engine import Writer
from nanogpt.write.loading import Model, Settings, prompt_list
from nanogpt.write.request import Piece, Request, Result

# 与 nanoGPT 相近的分隔线；输出给程序读时请用 output=
SEPARATOR = "-" * 40


class Records:
    """Appends one json line per finished text to a file; what is there stays. Without a path it does nothing."""

    # 写完一段就写下一行：中途停下，写完的都在

    def __init__(self, path: str | None, model_name: str):
        self.path = Path(path) if path else None
        self.model_name = model_name
        if self.path:
            try:
                # 写不进去要在开始写作之前就知道
                check_writable(self.path)
            except OSError as error:
                raise ConfigError("output_not_writable", got=path, reason=error.strerror) from None

    def add(self, result: Result, settings: Settings) -> None:
        """Append one text, how it was written and how long it took."""
        if not self.path:
            return
        writing = result.seconds - result.seconds_to_first_token
        record = {
            "prompt": result.request.prompt, "text": result.text, "finish": result.finish, "seed": result.request.seed,
            "tokens": result.tokens, "prompt_tokens": result.prompt_tokens,
            "seconds_to_first_token": round(result.seconds_to_first_token, 4), "seconds": round(result.seconds, 4),
            "tokens_per_s": round((result.tokens - 1) / writing, 2) if result.tokens > 1 and writing > 0 else None,
            "model": self.model_name, "settings": settings_record(result, settings),
        }
        with folders_around(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def settings_record(result: Result, settings: Settings) -> dict:
    """The settings as json: of the control its plain values, with this text's own style, emotion and labels."""
    record, control = dataclasses.asdict(settings), result.request.control
    own = {"style": control.style, "emotion": control.emotion, "labels": result.request.labels} if control else {}
    # 模板与词表几十行，不必每条记录都抄一遍
    plain = {key: value for key, value in record["control"].items() if not isinstance(value, dict | list)}
    record["control"] = plain | own
    return record


def in_order(pieces: Iterator[Piece], count: int) -> Iterator[Piece]:
    """Pieces of texts 0, 1, …, count - 1 one text after the other; what comes early is held back."""
    early: dict[int, list[Piece]] = {key: [] for key in range(count)}
    current = 0
    for piece in pieces:
        early[piece.key].append(piece)
        while current < count and early[current]:
            ready, early[current] = early[current], []
            yield from ready
            if not ready[-1].result:
                break
            current += 1


def requests_of(cfg: SampleConfig, model: Model, asked: list[tuple[str, int]]) -> list[Request]:
    """The requests for the number-th text behind a prompt, or with chat=true answer to it, for each of `asked`."""
    settings = Settings.of(cfg)
    if not cfg.chat:
        return [settings.request(prompt, number) for prompt, number in asked]
    chat = Chat(model, cfg.system)
    talks = [([{"role": "user", "content": prompt}], number) for prompt, number in asked]
    return [chat.request(settings, messages, number, skip="unknown=skip") for messages, number in talks]


def write_samples(cfg: SampleConfig, model: Model) -> None:
    """Print num_samples texts behind every prompt, in order; the first unfinished one is streamed."""
    settings = Settings.of(cfg)
    prompts = prompt_list(cfg, model.default_prompt)
    asked = [(prompt, number) for prompt in prompts for number in range(cfg.num_samples)]
    requests = requests_of(cfg, model, asked)
    writer = model.writer_of(requests, batch_size=cfg.batch_size, skip="unknown=skip")
    records = Records(cfg.output, model.name)
    model.announce()
    # 一个开头是在看它写，许多开头是在等它写完；文字就印在终端上的，也看得见写到哪里，进度条只会把它拆开
    bar = Console(stream="stderr", quiet=len(prompts) == 1 or sys.stdout.isatty())
    with bar.progress(len(requests), 0, title="progress_writing") as advance:
        _print(recorded(writer, records, settings, advance), len(requests), echo=not cfg.chat)


def recorded(writer: Writer, records: Records, settings: Settings, advance) -> Iterator[Piece]:
    """The writer's pieces; every finished text is recorded and counted on the way."""
    done = 0
    for piece in writer.write():
        if piece.result:
            try:
                records.add(piece.result, settings)
            except OSError as error:
                # 写好的先给人看
                yield piece
                raise ConfigError("output_not_writable", got=records.path, reason=error.strerror) from None
            done += 1
            advance(done)
        yield piece


def _print(pieces: Iterator[Piece], count: int, *, echo: bool = True) -> None:
    opened = -1
    for piece in in_order(pieces, count):
        if piece.key != opened:
            if opened >= 0:
                show(SEPARATOR)
            opened = piece.key
            show(piece.prompt if echo else "", end="")
        show(piece.text, end="\n" if piece.result else "")
