"""Where metrics go: metrics.jsonl always, TensorBoard, wandb and SwanLab when configured.

A logger of your own is a class with open, log, text and close, named in a yaml under conf/logger.
"""

# 指标写到哪里：metrics.jsonl 总有，TensorBoard、wandb 与 SwanLab 配置了才有
# loop 只面对 Loggers：它把每次调用转给各个后端，谁写不了就说一次，训练照走；自己的后端只要有 open、log、text、close
# 磁盘满、被杀在半行、续训：三种情形下 metrics.jsonl 的每一行都要是完整的；history 把它读回来
# metrics.jsonl 里的名字是文件格式，不改；TensorBoard 与 SwanLab 按斜线前的一截分组，用 GROUPED 里的

import contextlib
import json
import math
import os
import threading
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanogpt.base.config import check_choice
from nanogpt.base.files import own_content, write_text
from nanogpt.base.groups import leaves
from nanogpt.base.hashed_json import reason_of
from nanogpt.base.language import ConfigError, say

# 磁盘满时记在内存里的上限：几千行
MOST_PENDING = 2**20
# metrics.jsonl 里的名字 -> 分了组的曲线名；自己加的指标用原名
GROUPED = {
    "train/loss": "loss/train", "val/loss": "loss/val", "val/bpb": "loss/val_bpb",
    "tokens_per_s": "speed/tokens_per_s", "mfu": "speed/mfu", "mfu_rtx3060": "speed/mfu_rtx3060",
    "tokens": "speed/tokens", "learning_rate": "optimizer/learning_rate", "gradient_norm": "optimizer/gradient_norm",
    "loss_scale": "optimizer/loss_scale",
}
# TensorBoard 当作正则，从头匹配：没有 $，loss/val_bpb 也会画进来
BOTH_LOSSES = "loss/(train|val)$"
# CPU 上没有意义的：与显卡比的利用率；“已预留”在 CPU 上只是虚拟内存
OF_A_CARD = {"mfu_rtx3060", "memory/reserved_gib"}
# 比较几次训练时要看的设置；优化器的键随它而变，全要。HPARAMS 按字母只先显示前几个，多了就看不到学习率
COMPARED = {
    "model.name", "model.arch", "model.n_layer", "model.n_head", "model.n_embd", "model.block_size", "model.dropout",
    "dataset.name", "batch_size", "gradient_accumulation_steps", "global_batch_size", "learning_rate", "lr_schedule",
    "warmup_iters", "max_iters", "precision.name", "seed",
}


def history(run_dir: Path) -> tuple[list[dict[str, float]], dict[int, str]]:
    """What metrics.jsonl tells of a whole run: its records in order, and the samples by iteration.

    What a killed training did behind the checkpoint from which it went on is left out, and so is a torn line.
    """
    records: dict[int, dict[str, float]] = {}
    samples: dict[int, str] = {}
    for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            # 被杀在半行的，正写着的
            continue
        if not isinstance(record, dict) or not isinstance(at := record.get("iteration"), int):
            continue
        if record.get("event") == "resume":
            # 从更早的接着训：之后的那一段已放弃
            records, samples = ({i: kept for i, kept in one.items() if i <= at} for one in (records, samples))
        elif "sample" in record:
            samples[at] = str(record["sample"])
        else:
            records.setdefault(at, {}).update((k, v) for k, v in record.items() if number(v) is not None)
    return [records[i] for i in sorted(records)], samples


def points(records: Iterable[dict[str, float]], metric: str) -> list[tuple[float, float]]:
    """(iteration, value) of a metric in the records of a history, where it was logged."""
    return [(record["iteration"], record[metric]) for record in records if metric in record]


def number(value: Any, nothing: float | None = None) -> float | None:
    """A finite number as it is; anything else counts as none."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if usable else nothing


def grouped(metrics: dict[str, float], device: str) -> dict[str, float]:
    """The curves of a record by their grouped names; a CPU has none of a card's."""
    return {GROUPED.get(k, k): value for k, value in metrics.items() if device != "cpu" or k not in OF_A_CARD}


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
        # 没存过就被杀的从头来过，先前的几步也不算
        if iteration or size:
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
    """Scalars in groups, both losses in one chart, sampled text, the settings under HPARAMS, in <run>/logs."""

    # dataclass：conf/logger 的 yaml 用 _target_ 把它造出来，这里没有参数

    def open(self, run_dir: Path, config: dict, iteration: int) -> None:
        self._folder, self._device = run_dir / "logs", config["device"]
        threading.excepthook = _without_full_disks
        begun = any(_begins_with_layout(file) for file in sorted(self._folder.glob("events.*")))
        # purge_step：接着训时，被杀之前多写的点不再显示
        self._start(purge_step=iteration + 1)
        if not begun:
            self._introduce(config)
            # 旧版本的曲线叫别的名字，或者以前没有开 TensorBoard：从 metrics.jsonl 补齐，曲线才是完整的一条
            for record in history(run_dir)[0]:
                self.log(record.pop("iteration"), record)

    def _start(self, **options) -> None:
        # 导入要 1 秒以上，用到才导入
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), **options)

    def _introduce(self, config: dict) -> None:
        """What stands once at the beginning: the chart of both losses, the settings."""
        from torch.utils.tensorboard.summary import hparams

        self._writer.add_custom_scalars({"loss": {"train / val": ["Multiline", [BOTH_LOSSES]]}})
        chosen = {
            key: value for key, value in leaves(config).items()
            if (key in COMPARED or key.startswith("optimizer.")) and isinstance(value, str | bool | int | float)
        }
        # add_hparams 会另开一个以时间命名的子目录，指标在那里只有一个点；这里写进同一次训练，表里就是曲线的末值
        for summary in hparams(chosen, {"loss/train": 0.0, "loss/val": 0.0}):
            self._writer.file_writer.add_summary(summary)
        self._writer.add_text("config", f"```\n{json.dumps(config, indent=2, ensure_ascii=False)}\n```", 0)

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
            for name, value in grouped(metrics, self._device).items():
                writer.add_scalar(name, value, iteration)

    def text(self, iteration: int, sample: str) -> None:
        with self._writing() as writer:
            # 四个空格缩进成代码块，换行与空格原样显示
            writer.add_text("sample", "\n".join("    " + line for line in sample.splitlines()), iteration)

    def close(self) -> None:
        if self._writer:
            self._writer.close()


def _begins_with_layout(file: Path) -> bool:
    """Whether an event file begins with the layout of _introduce(); those of earlier versions have none."""
    with file.open("rb") as events:
        return BOTH_LOSSES.encode() in events.read(4096)


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
        check_choice("logger.wandb.mode", self.mode, ("offline", "online", "disabled"))

    def open(self, run_dir: Path, config: dict, iteration: int) -> None:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=self.project, name=run_dir.name, id=_own_id(run_dir, "wandb_id"), dir=str(run_dir),
            config=config, mode=self.mode.lower(), resume="allow",
        )

    def log(self, iteration: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=iteration)

    def text(self, iteration: int, sample: str) -> None:
        self._run.log({"sample": self._wandb.Html(f"<pre>{_escape(sample)}</pre>")}, step=iteration)

    def close(self) -> None:
        self._run.finish()


@dataclass
class SwanLabLogger:
    """SwanLab (extra swanlab); a run that is resumed keeps its id."""

    # 与 wandb 同样的形状；没有账号也能用：默认离线，之后 swanlab sync 上传，或 local 用 swanlab watch 看

    project: str
    mode: str

    def __post_init__(self):
        check_choice("logger.swanlab.mode", self.mode, ("offline", "local", "online", "disabled"))

    def open(self, run_dir: Path, config: dict, iteration: int) -> None:
        try:
            import swanlab
        except ImportError:
            raise ConfigError("missing_package", what="logger=swanlab", package="swanlab") from None
        self._swanlab, self._device = swanlab, config["device"]
        self._run = swanlab.init(
            project=self.project, name=run_dir.name, id=_own_id(run_dir, "swanlab_id"),
            log_dir=str((run_dir / "swanlog").absolute()), config=config, mode=self.mode.lower(), resume="allow",
        )

    def log(self, iteration: int, metrics: dict[str, float]) -> None:
        self._run.log(grouped(metrics, self._device), step=iteration)

    def text(self, iteration: int, sample: str) -> None:
        self._run.log({"sample": self._swanlab.Text(sample)}, step=iteration)

    def close(self) -> None:
        self._run.finish()


def _own_id(run_dir: Path, name: str) -> str:
    """The id under which a service knows this run: drawn once, kept in logs/<name>."""
    file = run_dir / "logs" / name
    if not file.is_file():
        file.parent.mkdir(exist_ok=True)
        write_text(file, uuid.uuid4().hex[:12])
    return file.read_text(encoding="utf-8")


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
                    "logger: {name} refuses to begin ({reason}); mend that, or choose another: logger=jsonl, "
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
