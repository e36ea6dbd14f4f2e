"""Where metrics go: metrics.jsonl always, TensorBoard and wandb when configured.

A logger of your own is a class with open, log, text and close, named in a yaml under conf/logger.
"""

# 指标写到哪里：metrics.jsonl 总有，TensorBoard 与 wandb 配置了才有
# loop 只面对 Loggers：它把每次调用转给各个后端，谁写不了就说一次，训练照走；自己的后端只要有 open、log、text、close
# 磁盘满、被杀在半行、续训：三种情形下 metrics.jsonl 的每一行都要是完整的

import contextlib
import json
import os
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanogpt.base.files import own_content, write_text
from nanogpt.base.hashed_json import reason_of
from nanogpt.base.language import ConfigError, say

# 磁盘满时记在内存里的上限：几千行
MOST_PENDING = 2**20


class JsonlLogger:
    """One json object a line in metrics.jsonl, flushed at once.

    After a resume the lines continue behind a {"event": "resume"} mark; where an iteration occurs
    twice, the later line counts.
    """

    # 不靠任何库也读得了的一份；写不进去的先记在内存里，磁盘一有空就补上

    def open(self, run_dir: Path, config: dict, iteration: int) -> None:
        # 不用缓冲：磁盘满时写进去几个字节，要一清二楚
        path = run_dir / "metrics.jsonl"
        own_content(path)
        self._file = path.open("a+b", buffering=0)
        self._pending = b""
        size = self._file.seek(0, os.SEEK_END)
        if size:
            self._file.seek(size - 1)
            if self._file.read(1) != b"\n":
                # 上次被杀在半行：补一个换行，别把新的一行也毁了
                self._pending = b"\n"
        if iteration:
            self._write({"event": "resume", "iteration": iteration})

    def _write(self, record: dict) -> None:
        self._pending += json.dumps(record, ensure_ascii=False).encode("utf-8", errors="replace") + b"\n"
        if len(self._pending) > MOST_PENDING:
            # 磁盘一直满着：只留最近的，从整行开始
            self._pending = self._pending[-MOST_PENDING:].partition(b"\n")[2]
        self._flush()

    def _flush(self) -> None:
        while self._pending:
            # 写了一半就满了：剩下的等下次，行不会断
            self._pending = self._pending[self._file.write(self._pending) :]

    def log(self, iteration: int, metrics: dict[str, float]) -> None:
        self._write({"iteration": iteration, **metrics})

    def text(self, iteration: int, sample: str) -> None:
        self._write({"iteration": iteration, "sample": sample})

    def close(self) -> None:
        with self._file:
            self._flush()


@dataclass
class TensorBoardLogger:
    """Scalars, sampled text and the resolved config in <run>/logs."""

    # dataclass：conf/logger 的 yaml 用 _target_ 把它造出来，这里没有参数

    def open(self, run_dir: Path, config: dict, iteration: int) -> None:
        self._folder = str(run_dir / "logs")
        threading.excepthook = _without_full_disks
        # purge_step：接着训时，被杀之前多写的点不再显示
        self._start(purge_step=iteration + 1 if iteration else None)
        if not iteration:
            self._writer.add_text("config", f"```\n{json.dumps(config, indent=2, ensure_ascii=False)}\n```", 0)

    def _start(self, **options) -> None:
        # 导入要 1 秒以上，用到才导入
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(self._folder, **options)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Any]:
        """The writer; one that failed is dropped, because it never writes again, and the next call opens another."""
        if self._writer is None:
            self._start()
        try:
            yield self._writer
        except OSError:
            self._writer = None
            raise

    def log(self, iteration: int, metrics: dict[str, float]) -> None:
        with self._writing() as writer:
            for name, value in metrics.items():
                writer.add_scalar(name, value, iteration)

    def text(self, iteration: int, sample: str) -> None:
        with self._writing() as writer:
            # 四个空格缩进成代码块，换行与空格原样显示
            writer.add_text("sample", "\n".join("    " + line for line in sample.splitlines()), iteration)

    def close(self) -> None:
        if self._writer:
            self._writer.close()


def _without_full_disks(failed: threading.ExceptHookArgs) -> None:
    """Threads report as before, but for TensorBoard's writer on a full disk: the next log() says that in one line."""
    if not (isinstance(failed.exc_value, OSError) and type(failed.thread).__name__ == "_AsyncWriterThread"):
        threading.__excepthook__(failed)


@dataclass
class WandbLogger:
    """Weights & Biases; a run that is resumed keeps its id."""

    # wandb 只在 open 里导入：没用它的人不必等，也不必联网

    project: str
    mode: str

    def __post_init__(self):
        if self.mode not in ("offline", "online", "disabled"):
            allowed = "offline | online | disabled"
            raise ConfigError("not_a_choice", key="logger.wandb.mode", got=self.mode, allowed=allowed)

    def open(self, run_dir: Path, config: dict, iteration: int) -> None:
        import wandb

        id_file = run_dir / "logs" / "wandb_id"
        if not id_file.is_file():
            id_file.parent.mkdir(exist_ok=True)
            write_text(id_file, uuid.uuid4().hex[:12])
        self._wandb = wandb
        self._run = wandb.init(
            project=self.project, name=run_dir.name, id=id_file.read_text(encoding="utf-8"), dir=str(run_dir),
            config=config, mode=self.mode, resume="allow",
        )

    def log(self, iteration: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=iteration)

    def text(self, iteration: int, sample: str) -> None:
        self._run.log({"sample": self._wandb.Html(f"<pre>{_escape(sample)}</pre>")}, step=iteration)

    def close(self) -> None:
        self._run.finish()


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


class Loggers:
    """All loggers of a run as one; does nothing on processes other than the first."""

    # 其余进程的后端列表是空的，调用的地方因此不必分情形

    def __init__(self, backends: list):
        self._backends = backends
        self._failed: list = []

    def open(self, run_dir: Path, config: dict, iteration: int) -> None:
        """Open them all, or none: ConfigError names the first one that refuses, for whatever reason.

        OSError where metrics.jsonl cannot be written.
        """
        for number, backend in enumerate(self._backends):
            try:
                backend.open(run_dir, config, iteration)
            except Exception as error:
                for opened in self._backends[:number]:
                    with contextlib.suppress(Exception):
                        opened.close()
                # metrics.jsonl 写不了就是训练目录写不了；别人的库各抛各的
                if isinstance(error, ConfigError) or isinstance(backend, JsonlLogger):
                    raise
                raise ConfigError(
                    "logger: {name} refuses to begin ({reason}); mend that, or choose another: logger=tensorboard, "
                    "logger=none",
                    name=type(backend).__name__, reason=reason_of(error),
                ) from None

    def log(self, iteration: int, metrics: dict[str, float]) -> None:
        self._each("log", iteration, metrics)

    def text(self, iteration: int, sample: str) -> None:
        self._each("text", iteration, sample)

    def close(self) -> None:
        self._each("close")

    def _each(self, method: str, *arguments) -> None:
        for backend in self._backends:
            try:
                getattr(backend, method)(*arguments)
            except Exception as error:
                # 写不下曲线，不值得停下训练，无论那个库抛出什么；说一次就够
                if backend not in self._failed:
                    self._failed.append(backend)
                    say("logger_failed", name=type(backend).__name__, reason=reason_of(error))
