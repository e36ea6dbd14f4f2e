"""What every part of benchmarks/card.py needs: configs, data, trainings, clocks, and the running of one case.

A part is a function of a Lab that yields cases: (name, function without arguments that returns a dict of plain values).
"ok": False in it, an exception and, in a strict part, any warning make the case a failure; {"skipped": why} does not.
"""

import contextlib
import gc
import logging
import math
import re
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

# 先 nanogpt 后 torch：它可能要在 torch 读环境变量之前设好分配器
from nanogpt.base.config import ROOT, TrainConfig, check  # isort: skip
from nanogpt.base.errors import is_out_of_memory
from nanogpt.base.sample_config import SampleConfig, check_sample, register_schemas
from nanogpt.data.corpus import write_dataset
from nanogpt.data.documents import Document, write_documents
from nanogpt.data.tokenizer import ByteTokenizer, CharTokenizer
from nanogpt.run.loop import Training
from nanogpt.run.session import Session

import torch  # isort: skip

Case = tuple[str, Callable[[], dict]]
LETTERS = "\nabcdefghijklmnopqrstuvwxyz ,."
GPT2_VOCAB = 50257
GIB = 2**30
# 这些与结果无关：几类，和配置库对它们自己的用法说的
QUIET = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)
QUIET_SOURCES = re.compile(r"[/\\](hydra|omegaconf)[/\\]")
# 之后这个进程里的 CUDA 调用都会失败
BROKEN = re.compile("CUDA error|device-side assert|illegal memory access|CUBLAS_STATUS_EXECUTION|launch failure", re.I)


class Lab:
    """One device, one folder for runs and data, and the time that is left; with `pretend` all is of toy size."""

    def __init__(
        self, folder: Path, *, device: str, pretend: bool, nanogpt: Path | None = None, plans: dict | None = None,
        until: float = math.inf,
    ):
        """`until` is on the clock of time.monotonic()."""
        self.folder, self.pretend, self.nanogpt, self.plans, self.until = folder, pretend, nanogpt, plans or {}, until
        self.device, on_cpu = torch.device(device), device == "cpu"
        self.bf16 = on_cpu or torch.cuda.is_bf16_supported(including_emulation=False)
        self.total = math.inf if on_cpu else torch.cuda.get_device_properties(self.device).total_memory
        self.strict = False
        self.log: Path | None = None
        self._runs = 0
        register_schemas()

    def left(self) -> float:
        """Seconds."""
        return self.until - time.monotonic()

    # ---- 配置与数据 ----

    def config(self, *overrides: str, data: str = "letters") -> TrainConfig:
        """The checked config of run_train.py with these overrides, on this lab's device; writes no samples."""
        # 两处抽的随机数不同，默认的 dropout（合成的文字要读很多遍）会让损失没法比
        cfg = self._composed("train", (
            "dataset=text_file", "dataset.path=unused.txt", f"dataset.dir={self.data(data)}", "logger=none",
            "compile=false", "sample_tokens=0", f"device={self.device}", "dropout=0", *overrides,
        ))
        check(cfg)
        return cfg

    def sample_config(self, *overrides: str) -> SampleConfig:
        """The same of run_sample.py."""
        cfg = self._composed("sample", (f"device={self.device}", *overrides))
        check_sample(cfg)
        return cfg

    def _composed(self, name: str, overrides: tuple[str, ...]):
        with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
            return OmegaConf.to_object(compose(config_name=name, overrides=list(overrides)))

    def data(self, kind: str) -> Path:
        """A folder of tokens: "letters" or labelled "documents" to learn, or "gpt2", random ids below 50257."""
        folder, random = self.folder / "data" / kind, np.random.default_rng(0)
        if folder.exists():
            return folder
        named = {"name": "card", "source": "synthetic"}
        if kind == "documents":
            labels = (("plain", "gay"), ("happy", "sad"))
            texts = [Document(sentence(random) + "\n", *map(random.choice, labels)) for _ in range(120)]
            parts = {"train": texts[:100], "val": texts[100:]}
            write_documents(folder, **named, tokenizer=CharTokenizer(LETTERS), parts=parts)
        elif kind == "letters":
            tokenizer = CharTokenizer(LETTERS)
            ids = tokenizer.encode("\n".join(sentence(random) for _ in range(400)))
            write_dataset(folder, **named, tokenizer=tokenizer, train=[ids[2000:]], val=[ids[:2000]])
        else:
            # 真的 GPT-2 词表要另外下载；这里只要同样大小
            tokenizer = ByteTokenizer(tuple(f"<|{n}|>" for n in range(GPT2_VOCAB - 256)))
            ids = random.integers(0, GPT2_VOCAB, 2**19)
            write_dataset(folder, **named, tokenizer=tokenizer, train=[ids[2**16 :]], val=[ids[: 2**16]])
        return folder

    # ---- 训练 ----

    def run_folder(self) -> Path:
        """A new folder name for a run."""
        self._runs += 1
        return self.folder / f"run{self._runs}-{time.monotonic_ns()}"

    def trainer(self, cfg: TrainConfig, kind: type[Training] = Training, *, drawn_on: str | None = None) -> Training:
        """A trainer that writes nothing; weights are drawn on its device or, the same for all devices, on the CPU."""
        session = Session.new(cfg, self.run_folder(), [])
        # 15 亿个随机数在 CPU 上要十几秒，在卡上一瞬间
        with torch.device(drawn_on or session.device):
            return session.build_trial(kind)

    def losses(self, cfg: TrainConfig, steps: int) -> list[float]:
        """Losses of the first steps, from the same weights on every device."""
        trainer = self.trainer(cfg, drawn_on="cpu")
        return [float(trainer.step().loss) for _ in range(steps)]

    # ---- 时间与内存 ----

    def wait(self) -> None:
        """Until the card has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, function: Callable[[], object], *, count: int = 10, each: int = 1) -> float:
        """Median seconds of one call, over `count` groups of `each` calls, behind two to warm up."""
        found = []
        for _ in range(3 if self.pretend else count + 2):
            self.wait()
            started = time.perf_counter()
            for _call in range(each):
                function()
            self.wait()
            found.append((time.perf_counter() - started) / each)
        return statistics.median(found[2:])

    def forget_peak(self) -> None:
        """Begin the peak of memory anew, with nothing kept for later."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peaks(self) -> dict[str, int | None]:
        """Peak bytes since then, as PyTorch's allocator counts them; None on a CPU."""
        on_card = self.device.type == "cuda"
        allocated = torch.cuda.max_memory_allocated(self.device) if on_card else None
        return {"allocated": allocated, "reserved": torch.cuda.max_memory_reserved(self.device) if on_card else None}

    def clean(self) -> None:
        """Leave nothing of the case before."""
        if torch.are_deterministic_algorithms_enabled():
            torch.use_deterministic_algorithms(False)
        if (dynamo := sys.modules.get("torch._dynamo")) is not None:
            dynamo.reset()
        if self.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)
            if hasattr(torch._C, "_cuda_clearCublasWorkspaces"):
                torch._C._cuda_clearCublasWorkspaces()
        self.forget_peak()


def sentence(random: np.random.Generator) -> str:
    """Words in an order that a tiny model can learn."""
    words = ("the", "king", "and", "queen", "speak", "of", "love", "no", "more", "words", "than", "night")
    start = random.integers(len(words))
    return " ".join(words[(start + step * (1 + start % 3)) % len(words)] for step in range(8)) + "."


# ---- 一个用例 ----


def attempt(lab: Lab, case: Callable[[], dict]) -> dict:
    """Run one case; what it found, never an exception (but KeyboardInterrupt)."""
    lab.clean()
    started, said = time.monotonic(), []
    try:
        with listening(lab.log, said):
            found = {"ok": True, **case()}
    except ModuleNotFoundError as error:
        missing = (error.name or "?").partition(".")[0]
        # 自己的模块改了名字不是“没有安装”
        own = missing in ("nanogpt", "card_parts", "sampling")
        found = {"ok": False, "error": str(error)} if own else {"ok": True, "skipped": f"{missing} is not installed"}
    except Exception as error:
        said_it = f"{type(error).__name__}: {first_line(error)}"
        found = {"ok": False, "error": said_it, "where": traceback.format_exc()[-3000:]}
        if is_out_of_memory(error):
            found["out_of_memory"] = True
    if said:
        found["warnings"] = said[:20]
        found["ok"] = found["ok"] and not lab.strict
    return plain({**found, "seconds": time.monotonic() - started})


def first_line(error: BaseException) -> str:
    """Of what an error says."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "-")[:300]


@contextlib.contextmanager
def listening(log: Path | None, said: list[str]) -> Iterator[None]:
    """Put every warning into `said`: Python's, the logging module's, those of C++ in `log`, where stderr goes."""
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(f"log {record.name}: {record.getMessage()}"[:300])
    loggers = (logging.getLogger(), logging.getLogger("torch"))
    size = log.stat().st_size if log else 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for logger in loggers:
            logger.addHandler(handler)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeHandler(handler)
            heard = (w for w in caught if not issubclass(w.category, QUIET) and not QUIET_SOURCES.search(w.filename))
            said += [f"{w.category.__name__}: {w.message}"[:300] + f" ({Path(w.filename).name}:{w.lineno})" for w in heard]
            if log:
                sys.stderr.flush()
                fresh = log.read_bytes()[size:].decode("utf-8", errors="replace").splitlines()
                said += [line[:300] for line in fresh if re.match(r"\[?W\d{4}|.*\bWarning: ", line)]
            said[:] = dict.fromkeys(said)


def plain(value):
    """The same as JSON holds it: tensors' and numpy's numbers as floats of six digits, NaN and infinity as words."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, bool | int | str | None):
        return value
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return int(value) if isinstance(value, np.integer) else str(value)


def run(lab: Lab, cases: Iterable[Case], emit: Callable[[dict], None], done: set[str]) -> bool:
    """Run the cases that are not done, while there is time: {"begin": name} before, {"case": name, …} behind each.

    False behind a case that has left CUDA unusable: another process has to go on.
    """
    for name, case in cases:
        if name in done:
            continue
        if lab.left() <= 0:
            emit({"case": name, "ok": True, "skipped": "no time left", "seconds": 0.0})
            continue
        emit({"begin": name})
        found = attempt(lab, case)
        emit({"case": name, **found})
        if BROKEN.search(found.get("error", "")) and not found.get("out_of_memory"):
            return False
    return True


def profile(lab: Lab, function: Callable[[], object], count: int, top: int = 15) -> dict:
    """The slowest kernels of a call with their ms, all its launches, and the part of its time with none running."""
    on_card = lab.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_card else torch.profiler.ProfilerActivity.CPU
    # 墙钟另量：剖析器自己也拖慢主机
    wall = lab.seconds(function, count=count)
    with torch.profiler.profile(activities=[activity], acc_events=True) as profiler:
        for _ in range(count):
            function()
        lab.wait()
    rows = [row for row in profiler.key_averages() if not on_card or row.device_type == torch.autograd.DeviceType.CUDA]

    def spent(row) -> float:
        return (row.self_device_time_total if on_card else row.self_cpu_time_total) / 1e6 / count

    rows.sort(key=spent, reverse=True)
    busy = sum(map(spent, rows))
    kernels = [{"name": row.key[:90], "ms": spent(row) * 1e3, "count": row.count / count} for row in rows]
    return {
        "wall_ms": wall * 1e3, "busy_ms": busy * 1e3, "idle": max(0.0, 1 - busy / wall),
        "launches": sum(k["count"] for k in kernels),
        "kernels": kernels[:top],
    }


def exact_products() -> None:
    """Float32 products in float32, as on a CPU."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
