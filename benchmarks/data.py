"""Preparing a text beside what the tokenizer libraries alone take: MB per CPU second, and peak memory.

    python benchmarks/data.py [--copies 3 9]

The text is tiny-shakespeare, so many times over. Each measurement is a process of its own; the libraries get the text as
one string in memory and write nothing, which is the bound. Writes benchmarks/results/data.json.
"""

# 准备数据的快慢与内存，旁边是 tiktoken、tokenizers 自己的：它们整篇读进内存、什么也不写，是上限
# 两种长度：内存不该随文本变大

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from vs_nanogpt import processor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nanogpt.data import assets  # noqa: E402 - 先把仓库根目录放进路径

OURS = """
from nanogpt.data import corpus
corpus.prepare("text_file", "prepared", dict(path={path!r}, tokenizer={kind!r}, encoding="auto", val_fraction=0.1, vocab_size=2000))
"""
# 各自最直接的用法
LIBRARY = {
    "gpt2": """
from nanogpt.data.tokenizer import gpt2_tokenizer
gpt2_tokenizer()._encoding.encode_ordinary(open({path!r}, encoding="utf-8").read())
""",
    "bpe": """
import tokenizers
library = tokenizers.ByteLevelBPETokenizer()
library.train([{path!r}], vocab_size=2000, min_frequency=2, show_progress=False)
library.encode(open({path!r}, encoding="utf-8").read())
""",
}
# ru_maxrss：Linux 是 KiB，Mac 是字节
MEASURED = """
import resource, sys
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime, used.ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10))
"""


def measure(code: str, path: Path, kind: str, folder: Path) -> dict[str, float]:
    """MB of text per CPU second and peak MiB of a process that runs the code."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NANOGPT_CACHE": str(folder / "cache")}
    command = [sys.executable, "-c", code.format(path=str(path), kind=kind) + MEASURED]
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        done = subprocess.run(command, cwd=inside, env=environment, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        sys.exit(done.stderr)
    seconds, peak = map(float, done.stdout.split()[-2:])
    return {"mb_per_cpu_s": round(path.stat().st_size / 1e6 / seconds, 2), "peak_mib": int(peak)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--copies", type=int, nargs="+", default=[3, 9])
    text = assets.fetch(assets.TINY_SHAKESPEARE).read_text(encoding="utf-8")
    result: dict = {"processor": processor(), "texts": {}}
    with tempfile.TemporaryDirectory() as folder:
        for copies in parser.parse_args().copies:
            path = Path(folder) / "text.txt"
            path.write_text(text * copies, encoding="utf-8", newline="\n")
            found: dict = {"mb": round(path.stat().st_size / 1e6, 1)}
            for kind in ("char", "gpt2", "bpe"):
                found[kind] = {"prepared": measure(OURS, path, kind, Path(folder))}
                if kind in LIBRARY:
                    found[kind]["library"] = measure(LIBRARY[kind], path, kind, Path(folder))
            result["texts"][str(copies)] = found
    (ROOT / "benchmarks" / "results" / "data.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8", newline="\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
