"""Real fine-tuning steps of Qwen3-0.6B's exact shape on the CPU, with random weights, under a limit of memory.

    python benchmarks/qwen_step.py [--limit-gib 8] [--block-size 128] [way …]

Each way (lora, lora4, full) is `run_train.py experiment=finetune_qwen` in a process of its own whose private memory may
not pass the limit: it opens the folder of bf16 weights, takes two steps, evaluates and saves. What it printed, the
largest resident memory and the limit are written to benchmarks/results/qwen_step.json.
"""

# 权重是随机的，形状、格式、文件都与发布的一样：量的是放不放得下、走不走得完，不是学得好不好
# 上限由操作系统管（RLIMIT_DATA：可写的私有内存）；越过了就分配失败，这一程序也就失败

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from vs_nanogpt import processor

from nanogpt.base.hardware import GIB
from nanogpt.data.tokenizer_files import to_library_json
from nanogpt.weights.build import weight_shapes
from nanogpt.weights.families import published, read_family, their_tensors

ROOT = Path(__file__).resolve().parent.parent
NAME = "Qwen/Qwen3-0.6B-Base"
WAYS = {
    "lora": [], "lora4": ["memory=lora4"], "full": ["finetune=full", "memory=minimal", "learning_rate=1e-5"],
}
QUICK = [
    "device=cpu", "max_iters=2", "batch_size=1", "eval_batch_size=1", "eval_interval=2", "eval_tokens=128", "log_interval=1", "sample_tokens=0",
    "logger=none", "dataset=text_file", "dataset.path=text.txt", "dataset.dir=prepared", "out_dir=run", "overwrite=true", "lang=en", "compile=false",
]


def write_model(folder: Path) -> None:
    """config.json, model.safetensors and tokenizer.json as they are published, the weights random."""
    from nanogpt.base.config import FinetuneConfig
    from nanogpt.data.tokenizer import gpt2_tokenizer

    folder.mkdir()
    described = published(NAME)
    config = read_family(folder / "config.json", described, NAME)
    (folder / "config.json").write_text(json.dumps(described), encoding="utf-8")
    shapes = {name: shape for name, shape in weight_shapes(config, FinetuneConfig()).items() if name != "lm_head.weight"}
    torch.manual_seed(0)
    tensors = {name: torch.empty(shape, dtype=torch.bfloat16).normal_(float(len(shape) == 1), 0.02) for name, shape in shapes.items()}
    save_file({name: t.contiguous() for name, t in their_tensors(config, tensors).items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.json").write_text(json.dumps(to_library_json(gpt2_tokenizer())), encoding="utf-8")


def step(way: str, folder: Path, limit_gib: float, block_size: int) -> dict:
    """What came of one way: exit code, largest resident memory, its last lines."""
    limit = (int(limit_gib * GIB),) * 2
    command = [sys.executable, str(ROOT / "run_train.py"), "experiment=finetune_qwen", "init_from=model", f"model.block_size={block_size}", *QUICK, *WAYS[way]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, limit),
    )
    shown = []
    for line in process.stdout:
        print(line, end="", flush=True)
        shown.append(line.rstrip())
    _, status, usage = os.wait4(process.pid, 0)
    return {"exit_code": os.waitstatus_to_exitcode(status), "peak_resident_gib": round(usage.ru_maxrss * 1024 / GIB, 2), "shown": shown[-12:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ways", nargs="*", default=list(WAYS), metavar="way")
    parser.add_argument("--limit-gib", type=float, default=8.0)
    parser.add_argument("--block-size", type=int, default=128)
    typed = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "text.txt").write_text("To be, or not to be, that is the question.\n" * 400, encoding="utf-8")
        write_model(folder / "model")
        results = {way: step(way, folder, typed.limit_gib, typed.block_size) for way in typed.ways}
    file = ROOT / "benchmarks" / "results" / "qwen_step.json"
    here = {"processor": processor(), "torch": torch.__version__, "limit_gib": typed.limit_gib, "block_size": typed.block_size}
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    # 同样的机器与设置，别的走法留着
    known = before["ways"] if {key: before.get(key) for key in here} == here else {}
    file.write_text(json.dumps({**here, "ways": known | results}, indent=1) + "\n", encoding="utf-8")
    sys.exit(any(result["exit_code"] for result in results.values()))


if __name__ == "__main__":
    main()
