"""Find and keep the results of earlier trials, so that a sweep typed again goes on where it stopped.

A result is found again by a hash over everything that it depends on: the resolved config, the versions,
the program's own code and the device.
"""

# 以前试跑的结果：同样的命令再敲一遍，测过的不再测，从停下的地方接着
# 凭据是一个 hash，凡是影响测量的都算进去：配置、torch 与本程序的代码、使用者自己的模块、设备与驱动、线程数
# trial 先 find 再测，测完 keep；auto_batch 借 key_of 给自己的结论起名；父进程不导入 torch，所以设备只按名字认

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import nanogpt
from nanogpt.base import run_names
from nanogpt.base.config import PACKAGE, TrainConfig, plain, targets
from nanogpt.base.files import remove_leftovers
from nanogpt.base.hashed_json import DamagedError, read_object
from nanogpt.base.language import ConfigError
from nanogpt.data import corpus
from nanogpt.data.source_text import state_of
from nanogpt.sweep import result as results
from nanogpt.sweep.process import place
from nanogpt.sweep.result import FIT, LASTING, TrialResult

FOLDER = FIT / "trials"
# 不影响测量的键
IRRELEVANT = ("out_dir", "overwrite", "lang", "logger", "groups", "plan", "search", "parallel", "launch")


def key_of(cfg: TrainConfig) -> str:
    """Hash of a trial's config, the versions and the device."""
    node = {name: value for name, value in plain(cfg).items() if name not in IRRELEVANT}
    node["trial"].pop("again")
    # 选配方的 margin 只在事后用，改它不必重测
    node["trial"].pop("margin")
    threads = os.environ.get("OMP_NUM_THREADS")
    facts = {"config": node, "versions": versions(), "device": device(cfg), "threads": threads}
    # 没有自己模块的设置，键与从前相同：测过的还认得
    facts |= {"own": own} if (own := own_code(node)) else {}
    if cfg.objective != "tokens_per_s":
        # 学得多好要看学的是什么：文字改了、起点又训过了，先前的损失就不算数
        facts |= {"data": data_of(cfg), "start": files_of(cfg.init_from) if cfg.init_from else None}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:20]


def data_of(cfg: TrainConfig) -> str | None:
    """What tells the text of a trial from another one at the same place; None where it cannot be told."""
    options = {key: value for key, value in cfg.dataset.items() if key not in ("name", "dir")}
    # 读不了的，试跑自己会说
    with contextlib.suppress(ConfigError, DamagedError, OSError):
        name, directory = cfg.dataset["name"], cfg.dataset["dir"]
        if directory and (meta := corpus.folder_of(name, directory, options) / "meta.json").is_file():
            # 别人写的没有这一项
            return read_object(meta).get("made_from") or hashlib.sha256(meta.read_bytes()).hexdigest()
        # 还没准备的，准备好之后也是这一份
        return corpus.identity_of_dataset(name, options)
    return None


def files_of(named: str) -> list[tuple] | None:
    """What tells the weights at a place from others that were there; None for a name that is no place."""
    with contextlib.suppress(ConfigError, OSError):
        path = run_names.locate(named) if run_names.names_run(named) else Path(named)
        files = [path] if path.is_file() else sorted(path.rglob("*.safetensors")) + sorted(path.rglob("*.bin"))
        return state_of(files) or None
    return None


def own_code(node: Any) -> dict[str, str]:
    """Hashes of the user's own modules that `_target_`s of a config name.

    A module that was mended must not be judged by what it did before.
    """
    names = {target.split(".")[0] for target in targets(node)} - {"nanogpt", "torch", "__main__"}
    found = {}
    for name in sorted(names):
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        # 装好的包有版本，不逐个文件去读
        if spec and spec.origin and Path(spec.origin).is_file() and "site-packages" not in Path(spec.origin).parts:
            folder = Path(spec.origin).parent
            files = sorted(folder.rglob("*.py")) if spec.submodule_search_locations else [Path(spec.origin)]
            found[name] = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    return found


def claim_of(key: str) -> Path:
    """The claim on a trial; see nanogpt.sweep.claims."""
    return FOLDER / f"{key}.claim"


def find(key: str) -> TrialResult | None:
    """The lasting result of that hash, if an earlier sweep left one."""
    found = results.read(FOLDER / f"{key}.json")
    return found if found and found.status in LASTING else None


def keep(result: TrialResult) -> None:
    """Remember a result for later sweeps, unless it may be different next time."""
    if result.status in LASTING:
        # 上次写到一半被杀留下的；同一个键只有拿着锁的人在写
        remove_leftovers(FOLDER, f"{result.key}.json")
        results.write(result, FOLDER / f"{result.key}.json")


@functools.cache
def versions() -> dict[str, str]:
    """Versions of torch and of this program, down to its code.

    A faster version must not be judged by an older one's figures.
    """
    try:
        torch_version = version("torch")
    except PackageNotFoundError:
        torch_version = "?"
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.read_bytes())
    code, python = digest.hexdigest()[:16], platform.python_version()
    return {"torch": torch_version, "nanogpt": nanogpt.__version__, "code": code, "python": python}


def device(cfg: TrainConfig) -> str:
    """The device of a trial with its driver, without importing torch."""
    if visible_cards(cfg) is None:
        return _processor()
    if len(kinds := kinds_of_cards()) == 1:
        # 同样的卡，哪一台的哪一张都一样：集群再派来的，多半是另一张
        return kinds[0]
    return f"{_cards()} {place.get() or os.environ.get('CUDA_VISIBLE_DEVICES', '')}"


def kinds_of_cards() -> list[str]:
    """Name and driver of every kind of NVIDIA card in this machine."""
    return sorted(set(_cards().splitlines()))


def visible_cards(cfg: TrainConfig) -> list[str] | None:
    """The NVIDIA cards that a trial may see, as CUDA_VISIBLE_DEVICES names them; None where it runs on the CPU."""
    if cfg.device == "cpu" or (cfg.device == "auto" and cfg.hardware.name == "cpu") or not _cards():
        return None
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(n) for n in range(len(_cards().splitlines()))] if named is None else [c for c in named.split(",") if c]


@functools.cache
def _processor() -> str:
    """The kind of processor; the machine's name is no part of it: nodes of a cluster, and containers, change theirs."""
    named = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), named)
    return f"{platform.machine()} {named} {os.cpu_count()}"


@functools.cache
def _cards() -> str:
    """Names and driver of the NVIDIA cards, or "" without any."""
    program = shutil.which("nvidia-smi")
    if not program:
        return ""
    try:
        command = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
        readable = {"capture_output": True, "text": True, "encoding": "utf-8", "errors": "replace"}
        return subprocess.run(command, **readable, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
