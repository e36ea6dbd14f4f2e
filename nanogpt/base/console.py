"""What a person sees while the program works: lines, a progress bar on a terminal, and aligned tables."""

# 屏幕上看到的：一行行文字、终端里的进度条、对齐的表
# 训练、预测、评估的每一行都经过 Console；aligned 把表排成行
# rich 知道汉字占两列；没有终端、也没有表时不导入它，启动更快
# 读的人走了（… | head）或磁盘满了，训练都不能因此丢：见 plain

import atexit
import contextlib
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from time import monotonic, sleep
from typing import Any

from nanogpt.base.language import show, shown, text, wrapped

# 关窗口、注销、关机：CTRL_CLOSE_EVENT、CTRL_LOGOFF_EVENT、CTRL_SHUTDOWN_EVENT
CLOSING = (2, 5, 6)
# Windows 之后还会调用的函数，要留着
_handlers: list[Any] = []


def when_window_closes(stop: Callable[[], None]) -> None:
    """On Windows, call stop() when the console's window is closed, the person logs off or the machine shuts down.

    This process then goes on until it ends by itself, or for as long as Windows lets it: five seconds for a window.
    """
    if sys.platform != "win32":
        return
    import ctypes

    def handle(event: int) -> bool:
        if event not in CLOSING:
            return False
        stop()
        # 在一个自己的线程里；一返回，Windows 就结束整个进程：等主线程存完、自己退出
        sleep(3600)
        return True

    _handlers.append(ctypes.WINFUNCTYPE(ctypes.c_int, ctypes.c_uint)(handle))
    ctypes.windll.kernel32.SetConsoleCtrlHandler(_handlers[-1], True)


class Console:
    """Prints to stdout (or to stderr, if stdout belongs to the texts written); can be silent.

    Processes other than the first are made with quiet=True.
    """

    # 多进程训练时每个进程都跑同样的代码：只有第一个说话，调用的地方不必判断

    def __init__(self, *, quiet: bool = False, stream: str = "stdout"):
        self.quiet = quiet
        self._file = getattr(sys, stream)
        self._rich = self._bar = None
        self.gone = False
        """Whether nobody reads the output any more."""
        self.on_gone: Callable[[], None] = lambda: None
        if not quiet and self._file.isatty():
            # 没有终端时不导入 rich，启动更快
            from rich.console import Console as RichConsole

            self._rich = RichConsole(file=self._file, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def line(self, message: str, **values) -> None:
        """Print a message of nanogpt.base.language."""
        self.plain(wrapped(text(message, **values), self._file))

    def plain(self, line: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self.quiet or self.gone:
            return
        try:
            if self._rich:
                self._rich.print(shown(line, self._file))
            else:
                show(line, file=self._file)
        except BrokenPipeError:
            # … | head 走了：让训练存好再停
            self.gone = True
            self.on_gone()
        except OSError:
            # 日志所在的磁盘满了：少一行字，不值得停下训练
            pass

    @property
    def live(self) -> bool:
        """Whether there is a terminal, so that a bar is shown."""
        return self._rich is not None

    @contextlib.contextmanager
    def progress(self, total: int | None, done: int = 0, *, title: str = "progress") -> Iterator[Callable[..., None]]:
        """Show a bar on a terminal, below the one that is there; yields advance(done, note="", left=None).

        `note` stands behind the count; `left` are the seconds that remain, where the caller knows better than the bar.
        """
        if not self._rich:
            yield lambda done, note="", left=None: None
            return
        outermost = self._bar is None
        self._bar = bar = self._bar or _bars(self._rich)
        if outermost:
            # 生成器里的进度条，出错时未必轮得到收尾：光标不能一直藏着
            atexit.register(bar.stop)
        with bar if outermost else contextlib.nullcontext():
            task = bar.add_task(text(title), total=total, completed=done, note="", ends=None)

            def advance(done: int, note: str = "", left: float | None = None) -> None:
                bar.update(task, completed=done, note=note, ends=left if left is None else monotonic() + left)

            try:
                yield advance
            finally:
                bar.remove_task(task)
                if outermost:
                    self._bar = None
                    atexit.unregister(bar.stop)

    def iteration(self, iteration: int, record: dict[str, float], device_type: str) -> None:
        """The line of one log interval; it fits into 80 columns."""
        card = device_type != "cpu"
        held = record["memory/reserved_gib" if card else "memory/allocated_gib"]
        speed = text(
            "{speed:.0f} tok/s, MFU {mfu:.1%}, ",
            speed=record["tokens_per_s"], mfu=record["mfu"],
        ) if "tokens_per_s" in record else ""
        self.line(
            "iter {iteration}: loss {loss}, lr {lr:.2e}, {speed}{memory}",
            iteration=iteration, loss=f"{record['train/loss']:.4f}", lr=record["learning_rate"], speed=speed,
            memory=text("vram" if card else "ram", held=held),
        )

    def evaluation(
        self, iteration: int, record: dict[str, float], device_type: str, *, best: float, peak: float
    ) -> None:
        """The line of one evaluation; it fits into 80 columns. peak: GiB of memory."""
        # 一行放不下的宁可另起一行：折成两截的行，竖着看不出走势
        self.line(
            "iter {iteration}: val loss {val_loss:.4f}{bits}, best {best:.4f}, {memory}",
            iteration=iteration, val_loss=record["val/loss"], best=best,
            bits=text("bits_beside", bits=record["val/bpb"]) if "val/bpb" in record else "",
            memory=text("vram_peak" if device_type != "cpu" else "ram_peak", peak=peak),
        )


def in_sight(items: Iterable[Any], total: int | None) -> Iterator[Any]:
    """The items of a preparation, of which there are `total`, with a bar on a terminal for those that were taken."""
    with Console(stream="stderr").progress(total, title="progress_preparing") as advance:
        for number, item in enumerate(items, 1):
            yield item
            advance(number)


def _bars(console):
    """rich's display for bars, in at most 80 columns."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text

    # 写在函数里：它的基类要等 rich 导入之后才有
    class Left(TimeRemainingColumn):
        def render(self, task) -> Text:
            # 评估时外面这条不前进，剩下的时间照样一秒一秒地少
            ends = task.fields["ends"]
            return Text("ETA ") + (super().render(task) if ends is None else Text(clock(max(0, ends - monotonic()))))

    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=12), MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"), Left(),
    )
    # 正文走管道时不许进度条接管 stdout
    options = {"redirect_stdout": sys.stdout.isatty(), "transient": True, "refresh_per_second": 4}
    return Progress(*columns, console=console, **options)


def duration(seconds: float) -> str:
    """A time with two significant parts, the same in every language."""
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours / 24:.1f} d"


def aligned(heads: Sequence[str], rows: Sequence[Sequence[str]], *, sides: str = "lr") -> list[str]:
    """A table as lines; `sides` has l or r for each column, and its last letter holds for all further ones.

    On a terminal that is too narrow, the remaining columns follow below, with the first one repeated; elsewhere
    nothing is cut.
    """
    from rich.cells import cell_len
    from rich.console import Console as RichConsole
    from rich.table import Table

    found = io.StringIO()
    plain = {"markup": False, "highlight": False, "emoji": False, "color_system": None}
    # 宽度只用来分段：一段里还是太宽的，让终端去折，不截断
    console, width = RichConsole(file=found, width=10**4, **plain), 10**4
    if sys.stdout.isatty():
        width = RichConsole(**plain).width
    # rich 遇到窄终端会把格子截断：先按宽度分成几段，每段都从第一列（行名）开始
    widths = [max(map(cell_len, column)) + 2 for column in zip(heads, *rows)]
    parts: list[list[int]] = [[0]]
    for index in range(1, len(heads)):
        if len(parts[-1]) > 1 and sum(widths[i] for i in parts[-1]) + widths[index] > width:
            parts.append([0])
        parts[-1].append(index)
    for part in parts:
        table = Table(box=None, padding=(0, 0, 0, 2))
        for index in part:
            side = sides[min(index, len(sides) - 1)]
            table.add_column(heads[index], justify="left" if side == "l" else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(row[index] for index in part))
        console.print(table, crop=False)
    return [line.rstrip() for line in found.getvalue().rstrip("\n").split("\n")]


# ---- 数怎样给人看 ----


def file_size(size: float) -> str:
    """A number of bytes, such as 34 MB."""
    value, unit = scaled(size, ("B", "kB", "MB", "GB", "TB"))
    return f"{value:.0f} {unit}" if value >= 10 or unit == "B" else f"{value:.1f} {unit}"


def short(count: float | None) -> str:
    """A number of tokens, such as 512k, or a dash."""
    if count is None:
        return "–"
    value, unit = scaled(count, ("", "k", "M", "G", "T"))
    return f"{value:.0f}{unit}" if value >= 100 or not unit else f"{value:.3g}{unit}"


def rounded(value: float) -> str:
    """A number to two digits, such as 0.28 or 1,200."""
    return f"{float(f'{value:.2g}'):,g}"


def scaled(value: float, units: Sequence[str]) -> tuple[float, str]:
    """The value below 1000 and the unit that goes with it."""
    step = 0
    while value >= 999.5 and step < len(units) - 1:
        value, step = value / 1000, step + 1
    return value, units[step]


def clock(seconds: float | None) -> str:
    """A duration, such as 1:02:03, or a dash."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
