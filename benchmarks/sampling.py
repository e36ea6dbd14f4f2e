"""Writing speed side by side: nanoGPT's generate, transformers' generate with its cache, and ours.

    python benchmarks/sampling.py --nanogpt PATH [--rounds 3] [--only NAME ...] [--device cpu|cuda]

PATH is a checkout of karpathy/nanoGPT. All programs hold the same random weights (the speed does not
depend on them) in the same number format, the one that precision=auto takes there, run one at a time in
a process of their own, and sample with temperature 0.8 and top-k 200, nanoGPT's defaults; its time for
1000 tokens is integrated from its cost at six lengths. That they compute the same function is checked by
greedy decoding in float32. Writes benchmarks/results/sampling.json (sampling_cuda.json on a GPU) after
every case; --only keeps the other cases.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# 与 nanoGPT 的 GPT-2 124M 和 shakespeare_char 的 GPU 配方同形；偏置全为 0，三个程序才能装同样的权重
SHAPES = {
    "gpt2_124m": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50257},
    "char_6_layers": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 65},
}
# 名字 -> (形状, 行数, 开头的 token 数, 新 token 数)
CASES = {
    "gpt2_124m, 250 tokens": ("gpt2_124m", 1, 1, 250),
    "gpt2_124m, 1000 tokens": ("gpt2_124m", 1, 1, 1000),
    "gpt2_124m, 32 rows, 32 tokens": ("gpt2_124m", 32, 1, 32),
    "gpt2_124m, first token behind 500": ("gpt2_124m", 1, 500, 1),
    "char_6_layers, 250 tokens": ("char_6_layers", 1, 1, 250),
    "char_6_layers, 1000 tokens": ("char_6_layers", 1, 1, 1000),
    "char_6_layers, 32 rows, 100 tokens": ("char_6_layers", 32, 1, 100),
}
PROGRAMS = ("nanogpt", "transformers", "ours", "ours without numba", "ours int8", "ours int8 without numba")
# 整段重算，一轮就够久；它也是波动最小的
ONE_ROUND = ("nanogpt",)
# nanoGPT 写更长的文字要一刻钟：它每个 token 的代价只取决于长度，量六个长度再积分
LONG = 500


def random_weights(shape: dict, device: str = "cpu") -> dict:
    """Random GPT-2 weights with zero biases in this project's names, float32."""
    import torch

    torch.manual_seed(0)
    width, tensors = shape["n_embd"], {}

    def matrix(name, rows, columns, bias=True):
        tensors[f"{name}.weight"] = torch.randn(rows, columns, device=device) * 0.05
        if bias:
            tensors[f"{name}.bias"] = torch.zeros(rows, device=device)

    def norm(name):
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = torch.ones(width, device=device), torch.zeros(width, device=device)

    matrix("wte", shape["vocab_size"], width, bias=False)
    matrix("wpe", shape["block_size"], width, bias=False)
    for i in range(shape["n_layer"]):
        norm(f"h.{i}.ln_1")
        norm(f"h.{i}.ln_2")
        matrix(f"h.{i}.attn.c_attn", 3 * width, width)
        matrix(f"h.{i}.attn.c_proj", width, width)
        matrix(f"h.{i}.mlp.c_fc", 4 * width, width)
        matrix(f"h.{i}.mlp.c_proj", width, 4 * width)
    norm("ln_f")
    return tensors


def half(device: str):
    """The number format that precision=auto takes for writing on this device."""
    import torch

    from nanogpt.core.precision import DTYPES, default_format

    return DTYPES[default_format(torch.device(device))]


# 三个程序：device 上以 dtype 存放同样的权重，generate(prompt (B, T), n, greedy) -> ids (B, n)


def open_nanogpt(shape: dict, tensors: dict, nanogpt: str, device: str, dtype):
    """generate of nanoGPT."""
    import torch

    sys.path.insert(0, nanogpt)
    from model import GPT, GPTConfig

    model = GPT(GPTConfig(**shape, dropout=0.0, bias=True))
    model.load_state_dict({**{f"transformer.{k}": v for k, v in tensors.items()}, "lm_head.weight": tensors["wte.weight"]})
    model.to(device, dtype).eval()

    def generate(prompt, n, greedy):
        with torch.no_grad():
            return model.generate(prompt, n, temperature=0.8, top_k=1 if greedy else 200)[:, prompt.size(1) :]

    return generate


def open_transformers(shape: dict, tensors: dict, name: str, device: str, dtype):
    """generate of transformers, key/value cache on; a static one where `name` says so."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, logging

    logging.set_verbosity_error()
    config = GPT2Config(
        n_layer=shape["n_layer"], n_head=shape["n_head"], n_embd=shape["n_embd"], n_positions=shape["block_size"],
        vocab_size=shape["vocab_size"], activation_function="gelu", bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    # 它的 Conv1D 存的是转置
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    state = {f"transformer.{k}": v.t().contiguous() if k.endswith(transposed) else v for k, v in tensors.items()}
    model.load_state_dict({**state, "lm_head.weight": tensors["wte.weight"]})
    model.to(device, dtype).eval()
    cache = {"cache_implementation": "static"} if "static" in name else {}

    def generate(prompt, n, greedy):
        # 超过上下文它不会自己滑动窗口：到头后取后一半接着写，与我们的规则相同
        ids, left = prompt, n
        while left:
            window = ids[:, -shape["block_size"] // 2 :] if ids.size(1) >= shape["block_size"] else ids
            count = min(left, shape["block_size"] - window.size(1))
            options = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 0.8, "top_k": 200}
            options |= {"max_new_tokens": count, "min_new_tokens": count, "use_cache": True, **cache}
            with torch.no_grad():
                out = model.generate(window, attention_mask=torch.ones_like(window), **options)
            ids, left = torch.cat((ids, out[:, window.size(1) :]), dim=1), left - count
        return ids[:, prompt.size(1) :]

    return generate


def open_ours(shape: dict, tensors: dict, name: str, device: str, dtype):
    """This project's decode loop."""
    import torch

    from nanogpt.core.generate import Decoder
    from nanogpt.core.machine import keep_freed_memory
    from nanogpt.core.sampling import sampler
    from nanogpt.weights.build import build_model, preset
    from nanogpt.write.speed import acceleration

    keep_freed_memory()
    model = build_model(preset("gpt2", activation="gelu", **shape), 0)
    model.load_state_dict(tensors, strict=False)
    if "without numba" in name:
        acceleration.find_spec = lambda package: None
    precision = "int8" if "int8" in name else {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    acceleration.accelerate(model.to(device).eval(), precision, fast="plain" not in name)

    def generate(prompt, n, greedy):
        chosen = sampler(temperature=0.0) if greedy else sampler(temperature=0.8, top_k=200)
        decoder = Decoder(model, capacity=len(prompt), max_length=prompt.size(1) + n)
        for key, row in enumerate(prompt):
            decoder.add(key, row, chosen, seed=key)
        # 每一步都取回主机，与边写边显示一样
        return torch.tensor([decoder.step().tolist() for _ in range(n)]).T

    return generate


def timed(generate, prompt, n: int) -> float:
    """Seconds until the last of n tokens is there."""
    import torch

    def wait():
        # GPU 上 generate 返回时，最后几个 token 可能还没算完
        if prompt.is_cuda:
            torch.cuda.synchronize()

    wait()
    start = time.perf_counter()
    generate(prompt, n, False)
    wait()
    return time.perf_counter() - start


def child(program: str, case: str, weights: str, nanogpt: str, device: str) -> None:
    """Measure one program in one case; print a json line."""
    import torch
    from safetensors.torch import load_file

    shape_name, rows, prompt_length, n = CASES[case]
    shape, tensors = SHAPES[shape_name], load_file(weights)
    opener = {"nanogpt": open_nanogpt, "transformers": open_transformers}.get(program, open_ours)
    given = nanogpt if program == "nanogpt" else program
    prompt = torch.randint(0, shape["vocab_size"], (rows, prompt_length), generator=torch.Generator().manual_seed(1)).to(device)
    dtype = half(device)
    generate = opener(shape, tensors, given, device, dtype)
    # 半精度下三个程序求和的次序不同，贪心也会分岔：是不是同一个函数，用 float32 看
    exact = generate if dtype == torch.float32 else opener(shape, tensors, given, device, torch.float32)
    greedy = exact(prompt[:1], min(n, 12), True)[0].tolist()
    del exact
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    # 预热：编译、线程池、缓存
    generate(prompt, min(n, 4), False)
    if program == "nanogpt" and n > LONG:
        seconds = integrated_seconds(generate, shape, n, device)
    else:
        seconds = timed(generate, prompt, n)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else peak_resident()
    print(json.dumps({"seconds": seconds, "tokens_per_s": rows * n / seconds, "peak_mib": peak / 2**20, "greedy": greedy}))


def integrated_seconds(generate, shape: dict, n: int, device: str) -> float:
    """Seconds for n tokens of a program whose token costs depend on the length alone: the area under the costs at six lengths."""
    import torch

    cuts, costs = [round(part * (n - 1) / 5) + 1 for part in range(6)], []
    for length in cuts:
        costs.append(timed(generate, torch.zeros(1, length, dtype=torch.long, device=device), 6) / 6)
    return sum((a + b) / 2 * (right - left) for a, b, left, right in zip(costs, costs[1:], cuts, cuts[1:]))


def peak_resident() -> int:
    """Largest resident memory of this process so far, bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        # getrusage 的峰值会带上父进程 fork 时的，这里的不会
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8"))[1]) * 1024
    import psutil

    memory = psutil.Process().memory_info()
    return getattr(memory, "peak_wset", memory.rss)


def read_bandwidth(device: str) -> float:
    """GB/s at which this machine reads a large float32 tensor, best of ten sums."""
    import torch

    from nanogpt.core.machine import use_large_pages

    x, best = torch.ones(2**27, device=device), float("inf")
    # 权重也放在大页里：4 KiB 一页时这样读只有七成快，量出的就不是极限
    use_large_pages(x)
    # 求和后取值：.item() 已经等到算完
    for _ in range(10):
        start = time.perf_counter()
        x.sum().item()
        best = min(best, time.perf_counter() - start)
    return x.numel() * 4 / best / 1e9


def int8_loss() -> dict:
    """Validation loss (whole split) of a freshly trained experiment=cpu_speedrun, float32 and int8."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "run_train.py"), "experiment=cpu_speedrun", f"out_dir={folder}/run", "logger=none", "device=cpu"]
        subprocess.run(command, check=True, cwd=folder, capture_output=True)
        return losses_of(Path(folder) / "run")


def losses_of(run: Path, other: str = "int8") -> dict:
    """Validation loss (whole split) of the last checkpoint of a run, float32 and another format."""
    import numpy as np
    import torch
    import yaml

    from nanogpt.data.tokens import TokenData
    from nanogpt.weights import checkpoint
    from nanogpt.write.loading import load
    from nanogpt.write.speed.acceleration import accelerate

    source, losses = checkpoint.find(run, "last", key="out_dir"), {}
    block = yaml.safe_load(source.config_text())["model"]["block_size"]
    data = TokenData(run / "data")
    starts = range(0, len(data.tokens["val"]) - block - 1, block)
    for precision in ("fp32", other):
        model = accelerate(load(source, torch.device("cpu"))[0], precision, fast=False)
        with torch.no_grad():
            total = 0.0
            for start in starts:
                x, y = data.rows("val", np.array([start]), block)
                logits = model(x)
                total += torch.nn.functional.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1)).item()
        losses[precision] = total / len(starts)
    return {**losses, "difference": losses[other] - losses["fp32"]}


def measure(args) -> Iterator[tuple[str, dict]]:
    """All programs in all cases, interleaved: (case, medians over the rounds), each as soon as it is there."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        for name, shape in SHAPES.items():
            save_file(random_weights(shape), Path(folder) / f"{name}.safetensors")
        for case, (shape_name, *_) in CASES.items():
            if args.only and not any(part in case for part in args.only):
                continue
            seen: dict[str, list[dict]] = {}
            for number in range(args.rounds):
                for program in PROGRAMS:
                    if (number and program in ONE_ROUND) or (args.device == "cuda" and "numba" in program):
                        continue
                    command = [sys.executable, __file__, "--child", program, case, f"{folder}/{shape_name}.safetensors", args.nanogpt, args.device]
                    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
                    assert done.returncode == 0, done.stderr
                    seen.setdefault(program, []).append(json.loads(done.stdout.splitlines()[-1]))
                    print(f"{case:38s} {program:26s} {seen[program][-1]['tokens_per_s']:10.1f} tokens/s", flush=True)
            yield case, summarise(seen)


def summarise(seen: dict[str, list[dict]]) -> dict:
    """Medians and ratios of one case; refuses to compare programs that compute different things."""
    reference = seen["nanogpt"][0]["greedy"]
    for program, runs in seen.items():
        assert "int8" in program or runs[0]["greedy"] == reference, f"{program} writes something else than nanoGPT"
    rates = {program: statistics.median(run["tokens_per_s"] for run in runs) for program, runs in seen.items()}
    return {
        program: {
            "tokens_per_s": round(rate, 2), "seconds": round(statistics.median(r["seconds"] for r in seen[program]), 3),
            "all_tokens_per_s": [round(r["tokens_per_s"], 2) for r in seen[program]],
            "times_nanogpt": round(rate / rates["nanogpt"], 2), "times_transformers": round(rate / rates["transformers"], 2),
            "peak_mib": round(statistics.median(r["peak_mib"] for r in seen[program])),
        }
        for program, rate in rates.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", help="checkout of karpathy/nanoGPT")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="parts of case names")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child)
        return
    if not args.nanogpt or not (Path(args.nanogpt) / "model.py").is_file():
        sys.exit("--nanogpt PATH: a checkout of https://github.com/karpathy/nanoGPT is wanted")
    import torch
    from vs_nanogpt import processor

    from nanogpt.base.files import write_text

    file = ROOT / "benchmarks" / "results" / ("sampling.json" if args.device == "cpu" else "sampling_cuda.json")
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() and args.only else {}
    cases, int8 = before.get("cases", {}), before.get("int8_loss")
    bandwidth = read_bandwidth(args.device)
    # 每个 token 要把全部权重（位置表除外）读一遍
    parameters, bytes_each = 123_653_376, {"ours": half(args.device).itemsize, "ours int8": 1}
    device = torch.cuda.get_device_name() if args.device == "cuda" else processor()

    def save() -> dict:
        ours = cases.get("gpt2_124m, 250 tokens", {})
        used = {p: round(ours[p]["tokens_per_s"] * parameters * size / 1e9 / bandwidth, 3) for p, size in bytes_each.items() if p in ours}
        record = {
            "command": "python benchmarks/sampling.py --nanogpt PATH", "device": device, "cores": os.cpu_count(), "torch": torch.__version__,
            "python": platform.python_version(), "rounds": args.rounds, "dtype": str(half(args.device)).removeprefix("torch."),
            "read_bandwidth_gb_per_s": round(bandwidth, 1), "fraction_of_read_bandwidth": used, "int8_loss": int8, "cases": cases,
        }
        write_text(file, json.dumps(record, indent=1) + "\n")
        return record

    for case, found in measure(args):
        cases[case] = found
        # 中途被打断，量过的还在
        save()
    if args.device == "cpu":
        int8 = int8_loss()
    print(json.dumps({k: v for k, v in save().items() if k != "cases"}, indent=1))


if __name__ == "__main__":
    main()
