"""A large corpus from its text to its batches: memory, restart and speed of preparing it, and of reading it.

    python benchmarks/corpus.py [--gb 1] [--tokenizer gpt2]

Makes a corpus of so many GB (jsonl, words of tiny-shakespeare drawn by their frequency), kills its preparation half-way,
goes on with it, and reads batches of the result: cold from the disk, warm, and through the cache of an address, beside the
steps of a small training on the same data. An eighth of the corpus shows whether memory grows. Speeds are per CPU second,
since others may use the machine. Everything lies in a temporary folder (--folder), which needs three times the size of the
corpus and is removed at the end. Adds to benchmarks/results/corpus.json.
"""

# 大语料从原文到一批批 token：准备的内存、快慢与中断后接着做，读的内存与快慢，旁边是训练一步要用掉多少
# 内存每隔一会儿看一次全部进程的 RSS：最大的一个与总和；八分之一的语料作对照，看它随不随语料变大
# 读之前让系统忘掉这些文件（posix_fadvise），才量得出硬盘与读在前面的线程
# 快慢按 CPU 时间算：机器上常有别的程序

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from vs_nanogpt import processor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nanogpt.data import assets  # noqa: E402 - 先把仓库根目录放进路径

# 一批这么多行、每行这么多 token：nanoGPT 训练 GPT-2 的一个微批
ROWS, BLOCK, STEPS = 12, 1024, 1000
WORDS_EACH, DIFFERENT = 300, 4000


def make(folder: Path, size: int) -> None:
    """Write `size` bytes of jsonl in files of up to 256 MB: each document has a number of its own."""
    words = np.array(assets.fetch(assets.TINY_SHAKESPEARE).read_text(encoding="utf-8").split())
    draw = np.random.default_rng(0)
    bodies = [json.dumps(" ".join(draw.choice(words, WORDS_EACH)))[1:] for _ in range(DIFFERENT)]
    folder.mkdir()
    number = written = 0
    while written < size:
        with (folder / f"{written // 2**28:05d}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            until = min(size, written + 2**28)
            while written < until:
                line = f'{{"text": "{number} {bodies[number * 7 % DIFFERENT]}}}\n'
                file.write(line)
                number, written = number + 1, written + len(line)


def cpu_seconds(who: int = resource.RUSAGE_SELF) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "NANOGPT_CACHE": str(folder / "cache")}


def running(command: list[str], folder: Path, stop_at: int | None = None) -> dict[str, float]:
    """Seconds, peak MiB of the largest process and of all; killed as soon as `stop_at` parts are finished."""
    began, before, largest, total = time.monotonic(), cpu_seconds(resource.RUSAGE_CHILDREN), 0, 0
    with (folder / "said.txt").open("w", encoding="utf-8") as said:
        process = subprocess.Popen([sys.executable, *command], cwd=folder, env=environment(folder), stdout=said, stderr=said)
    family = psutil.Process(process.pid)
    while process.poll() is None:
        sizes = []
        for one in [family, *family.children(recursive=True)]:
            try:
                sizes.append(one.memory_info().rss)
            except psutil.Error:
                # 刚好结束了
                pass
        largest, total = max([largest, *sizes]), max(total, sum(sizes))
        if stop_at and len(list(folder.glob(".prepared.parts/part-*.json"))) >= stop_at:
            process.kill()
        time.sleep(0.5)
    if process.returncode and not stop_at:
        sys.exit((folder / "said.txt").read_text(encoding="utf-8"))
    cpu = cpu_seconds(resource.RUSAGE_CHILDREN) - before
    return {"seconds": round(time.monotonic() - began, 1), "cpu_s": round(cpu, 1), "largest_mib": largest >> 20, "all_mib": total >> 20}


def prepare(folder: Path, source: Path, parts: int, tokenizer: str, *, kill: bool) -> dict:
    """What it took to prepare a corpus, perhaps killed when half of its parts were finished and gone on with."""
    each = shard_tokens(source)
    command = [str(ROOT / "data" / "hf" / "prepare.py"), f"path={source}", "dir=prepared", f"shard_tokens={each}", f"tokenizer={tokenizer}"]
    killed = running(command, folder, stop_at=parts // 2) if kill else None
    kept = len(list(folder.glob(".prepared.parts/part-*.json")))
    to_the_end = running(command, folder)
    # 被杀的那一次没有人等它的子进程：它们的 CPU 时间无从知道
    left = size_of(source) / 1e6 * (1 - kept / parts)
    return {"parts": parts, "killed": killed, "parts_kept": kept, "to_the_end": {**to_the_end, "mb_per_cpu_s": round(left / to_the_end["cpu_s"], 2)}}


def shard_tokens(source: Path) -> int:
    # 二十来个文件：够分成几组来读；语料再大，也不超过默认的一亿
    return min(10**8, max(10**5, size_of(source) // 100))


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def forget(folder: Path) -> bool:
    """Have the system drop what it holds of these files; whether it can be asked to."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def read(place: str) -> None:
    """Print the tokens per CPU second of batches from a prepared folder or address, and this process's memory."""
    from nanogpt.data import corpus
    from nanogpt.data.opening import open_data

    began = time.monotonic()
    data = open_data(corpus.prepare("hf", place, {}) if "://" in place else Path(place))
    opened, before, own, cpu = time.monotonic() - began, psutil.Process().memory_info(), 0, cpu_seconds()
    first = 0.0
    for step in range(STEPS):
        data.rows("train", data.starts(1, step * ROWS, ROWS, BLOCK), BLOCK)
        first = first or time.monotonic() - began
        if step % 20 == 0:
            # 映射的文件也算在 RSS 里，系统缺内存时随时收回：不算
            now = psutil.Process().memory_info()
            own = max(own, now.rss - getattr(now, "shared", 0))
    print(json.dumps({
        "tokens_per_cpu_s": round(STEPS * ROWS * BLOCK / (cpu_seconds() - cpu)), "open_s": round(opened, 2), "first_batch_s": round(first, 2),
        "own_mib_opened": before.rss - getattr(before, "shared", 0) >> 20, "own_mib_peak": own >> 20,
    }))


def train(place: str) -> None:
    """Print the tokens per CPU second of the steps of a small GPT on a prepared folder."""
    import torch

    import nanogpt

    data = nanogpt.TokenData(Path(place))
    model = nanogpt.tiny(vocab_size=data.vocab_size)
    fp32 = nanogpt.Precision(nanogpt.PrecisionConfig(dtype="fp32"), torch.device("cpu"))
    plan = nanogpt.Schedule(1e-3, min_lr=0.0, warmup_iters=5, lr_decay_iters=20, lr_schedule="cosine", decay_fraction=0.2)
    step = nanogpt.Step(model, torch.optim.AdamW(model.parameters()), fp32)
    trainer = nanogpt.Trainer(step, data, schedule=plan, seed=1, rows=4, eval_tokens=256)
    trainer.step()
    cpu = cpu_seconds()
    for _ in range(3):
        trainer.step()
    print(json.dumps({"tokens_per_cpu_s": round(3 * 4 * model.config.block_size / (cpu_seconds() - cpu)), "parameters": sum(p.numel() for p in model.parameters())}))


def child(folder: Path, *what: str) -> dict:
    command = [sys.executable, str(Path(__file__).resolve()), *what]
    done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measured(folder: Path, size: int, tokenizer: str, *, whole: bool) -> dict:
    """Everything about a corpus of `size` bytes; of the one that is only compared with, the preparation."""
    folder.mkdir()
    make(source := folder / "source", size)
    parts = -(-size_of(source) // (4 * shard_tokens(source)))
    result: dict = {"gb": round(size / 1e9, 3), "processes": min(os.cpu_count() or 1, parts)}
    result["prepare"] = prepare(folder, source, parts, tokenizer, kill=whole)
    shutil.rmtree(source)
    meta = json.loads((folder / "prepared" / "meta.json").read_text(encoding="utf-8"))
    result["tokens"], result["files"] = meta["tokens"]["train"], len(meta["shards"])
    if whole:
        result["train"] = child(folder, "--train", "prepared")
        cold = {"cold": child(folder, "--read", "prepared")} if forget(folder / "prepared") else {}
        result["read"] = {
            **cold, "warm": child(folder, "--read", "prepared"), "through_the_cache": child(folder, "--read", (folder / "prepared").as_uri()),
        }
        for one in result["read"].values():
            one["of_training"] = round(one["tokens_per_cpu_s"] / result["train"]["tokens_per_cpu_s"])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--tokenizer", default="gpt2", choices=("gpt2", "byte"))
    parser.add_argument("--folder", default=None)
    parser.add_argument("--read", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--train", default=None, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.read or asked.train:
        read(asked.read) if asked.read else train(asked.train)
        return
    free, need = shutil.disk_usage(asked.folder or tempfile.gettempdir()).free, 3 * asked.gb * 1e9
    # 原文、token 与它们在缓存里的一份，再留一半余地
    if free < need:
        sys.exit(f"{free / 1e9:.0f} GB are free, and --gb {asked.gb:g} needs {need / 1e9:.0f}: choose less, or another --folder")
    out, result = ROOT / "benchmarks" / "results" / "corpus.json", {"processor": processor()}
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        for part, size, whole in (("eighth", asked.gb / 8, False), ("whole", asked.gb, True)):
            result[part] = measured(Path(name, part), int(size * 1e9), asked.tokenizer, whole=whole)
            shutil.rmtree(Path(name, part))
    known = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    known[f"{asked.gb:g} GB, {asked.tokenizer}"] = result
    out.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8", newline="\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
