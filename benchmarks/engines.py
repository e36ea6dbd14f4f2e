"""Writing speed beside the engines that do nothing else: CTranslate2, OpenVINO and llama.cpp, where they are installed.

    python benchmarks/engines.py [--rounds 2] [--only ours ctranslate2 …] [--run FOLDER] [--out FILE]

All hold the same random weights of GPT-2 124M (speed does not depend on them), in float32, in 8 bits and, ours and llama.cpp, in 4 bits
(its Q4_0 is our format), and write the same greedy text; what they write in float32 is compared. One program at a time, in a process of its own, in turn: 1, 8 and 32 rows, the first
token behind a prompt of 500, peak memory, and the time from the start of the process to its first token. Ours writes without guessing
ahead (speculate=0). llama.cpp's server API is called in-process (xllamacpp). OpenVINO's int8 are 8-bit weights as ours are, written
as a graph. `bound` is what the machine allows: bytes of weights over the read rate for few rows, operations over the matrix rate
for many. What the formats change is shown by the loss of a small trained run (--run: one of yours) and by the divergence at
GPT-2's shape. Needs ctranslate2, openvino, xllamacpp and gguf, each optional. Writes benchmarks/results/engines.json.
"""

import argparse
import copy
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sampling import SHAPES, losses_of, peak_resident, random_weights, read_bandwidth  # noqa: E402

SHAPE = SHAPES["gpt2_124m"]
# 名字 -> (行数, 开头的 token 数, 新 token 数)
CASES = {"1 row": (1, 1, 48), "8 rows": (8, 1, 16), "32 rows": (32, 1, 12), "first token behind 500": (1, 500, 1)}
# 程序 -> 它要的包
PROGRAMS = {
    "ours fp32": None, "ours bf16": None, "ours int8": None, "ours int4": None, "ctranslate2 fp32": "ctranslate2", "ctranslate2 int8": "ctranslate2",
    "openvino fp32": "openvino", "openvino int8": "openvino", "llama.cpp fp32": "xllamacpp", "llama.cpp int8": "xllamacpp",
    "llama.cpp int4": "xllamacpp",
}
# 一个权重几个字节，乘积按哪种格式算
BYTES, PRODUCTS = {"fp32": 4, "bf16": 2, "int8": 1, "int4": 0.5625}, {"fp32": "fp32", "bf16": "fp32", "int8": "int8", "int4": "int8"}
# 每个 token 读的权重（位置表除外），与每个 token 的乘加
PARAMETERS = 123_653_376
BLOCKS = 84_934_656


# ---- 同样的权重，各写成各的格式 ----


def write_ctranslate2(tensors: dict, folder: Path) -> None:
    """Both formats of CTranslate2, through its own model specification."""
    from ctranslate2.specs import common_spec, transformer_spec

    def set_norm(spec, name):
        spec.gamma, spec.beta = (tensors[f"{name}.{part}"].numpy() for part in ("weight", "bias"))

    def set_linear(spec, name):
        spec.weight, spec.bias = (tensors[f"{name}.{part}"].numpy() for part in ("weight", "bias"))

    for kind in ("fp32", "int8"):
        spec = transformer_spec.TransformerDecoderModelSpec.from_config(
            SHAPE["n_layer"], SHAPE["n_head"], pre_norm=True, activation=common_spec.Activation.GELUTanh,
        )
        decoder = spec.decoder
        decoder.scale_embeddings = False
        decoder.embeddings.weight = decoder.projection.weight = tensors["wte.weight"].numpy()
        decoder.position_encodings.encodings = tensors["wpe.weight"].numpy()
        set_norm(decoder.layer_norm, "ln_f")
        for i, layer in enumerate(decoder.layer):
            set_norm(layer.self_attention.layer_norm, f"h.{i}.ln_1")
            set_linear(layer.self_attention.linear[0], f"h.{i}.attn.c_attn")
            set_linear(layer.self_attention.linear[1], f"h.{i}.attn.c_proj")
            set_norm(layer.ffn.layer_norm, f"h.{i}.ln_2")
            set_linear(layer.ffn.linear_0, f"h.{i}.mlp.c_fc")
            set_linear(layer.ffn.linear_1, f"h.{i}.mlp.c_proj")
        spec.register_vocabulary([f"t{i}" for i in range(SHAPE["vocab_size"])])
        spec.config.unk_token = spec.config.bos_token = spec.config.eos_token = "t0"
        spec.validate()
        spec.optimize(quantization="int8" if kind == "int8" else None)
        (folder / kind).mkdir(parents=True)
        spec.save(str(folder / kind))


def write_gguf(tensors: dict, folder: Path) -> None:
    """Three formats of llama.cpp: F32, and Q8_0 and Q4_0, its 8-bit and 4-bit weights."""
    import gguf

    folder.mkdir()
    names = {"wte.weight": "token_embd.weight", "wpe.weight": "position_embd.weight"}
    for part in ("weight", "bias"):
        names[f"ln_f.{part}"] = f"output_norm.{part}"
        for i in range(SHAPE["n_layer"]):
            for own, theirs in (
                ("ln_1", "attn_norm"), ("attn.c_attn", "attn_qkv"), ("attn.c_proj", "attn_output"), ("ln_2", "ffn_norm"),
                ("mlp.c_fc", "ffn_up"), ("mlp.c_proj", "ffn_down"),
            ):
                names[f"h.{i}.{own}.{part}"] = f"blk.{i}.{theirs}.{part}"
    for kind, packing in (("fp32", None), ("int8", "Q8_0"), ("int4", "Q4_0")):
        writer = gguf.GGUFWriter(str(folder / f"{kind}.gguf"), "gpt2")
        writer.add_context_length(SHAPE["block_size"])
        writer.add_embedding_length(SHAPE["n_embd"])
        writer.add_feed_forward_length(4 * SHAPE["n_embd"])
        writer.add_block_count(SHAPE["n_layer"])
        writer.add_head_count(SHAPE["n_head"])
        writer.add_layer_norm_eps(1e-5)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list([f"t{i}" for i in range(SHAPE["vocab_size"])])
        writer.add_token_types([gguf.TokenType.NORMAL] * SHAPE["vocab_size"])
        writer.add_token_merges(["t 0"])
        writer.add_eos_token_id(0)
        writer.add_bos_token_id(0)
        for own, theirs in names.items():
            data, packed = tensors[own].numpy(), None
            if packing and data.ndim == 2 and own != "wpe.weight":
                packed = gguf.GGMLQuantizationType[packing]
                data = gguf.quants.quantize(data, packed)
            writer.add_tensor(theirs, data, raw_dtype=packed)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def write_openvino(tensors: dict, folder: Path) -> None:
    """GPT-2 as a stateful OpenVINO graph; the 8-bit one holds int8 constants with a scale per row."""
    import numpy as np
    import openvino as ov
    import torch
    import torch.nn.functional as F
    from openvino import opset13
    from openvino._offline_transformations import apply_make_stateful_transformation

    heads, width, layers = SHAPE["n_head"], SHAPE["n_embd"], SHAPE["n_layer"]

    class Step(torch.nn.Module):
        """(logits behind the last id, new keys and values) of ids (B, T) behind the old ones."""

        def __init__(self, kind):
            super().__init__()
            self.int8 = kind == "int8"
            for name, tensor in tensors.items():
                own = name.replace(".", "_")
                if self.int8 and tensor.dim() == 2 and name != "wpe.weight":
                    from nanogpt.write.speed.int8 import quantize

                    tensor, scale = quantize(tensor)
                    self.register_buffer(own + "_scale", scale[:, None])
                self.register_buffer(own, tensor)

        def matrix(self, name):
            weight = getattr(self, name)
            return weight.float() * getattr(self, name + "_scale") if self.int8 else weight

        def linear(self, x, name):
            return F.linear(x, self.matrix(name + "_weight"), getattr(self, name + "_bias"))

        def norm(self, x, name):
            return F.layer_norm(x, (width,), getattr(self, name + "_weight"), getattr(self, name + "_bias"), 1e-5)

        def forward(self, ids, *past):
            B, T, P = ids.shape[0], ids.shape[1], past[0].shape[2]
            x = F.embedding(ids, self.matrix("wte_weight")) + self.wpe_weight[torch.arange(P, P + T)]
            # 每个位置看它之前的
            mask = torch.arange(P + T)[None, :] <= torch.arange(P, P + T)[:, None]
            new = []
            for i in range(layers):
                qkv = self.linear(self.norm(x, f"h_{i}_ln_1"), f"h_{i}_attn_c_attn")
                q, k, v = (part.view(B, T, heads, -1).transpose(1, 2) for part in qkv.split(width, dim=2))
                k, v = torch.cat((past[2 * i], k), 2), torch.cat((past[2 * i + 1], v), 2)
                new += [k, v]
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
                x = x + self.linear(y.transpose(1, 2).reshape(B, T, width), f"h_{i}_attn_c_proj")
                y = F.gelu(self.linear(self.norm(x, f"h_{i}_ln_2"), f"h_{i}_mlp_c_fc"), approximate="tanh")
                x = x + self.linear(y, f"h_{i}_mlp_c_proj")
            return F.linear(self.norm(x[:, -1], "ln_f"), self.matrix("wte_weight")), *new

    for kind in ("fp32", "int8"):
        past = [torch.zeros(2, heads, 3, width // heads) for _ in range(2 * layers)]
        shapes = [ov.PartialShape([-1, -1]), *[ov.PartialShape([-1, heads, -1, width // heads])] * (2 * layers)]
        with torch.no_grad():
            model = ov.convert_model(Step(kind).eval(), example_input=(torch.zeros(2, 4, dtype=torch.long), *past), input=shapes)
        for i in range(2 * layers):
            model.inputs[i + 1].get_tensor().set_names({f"in_{i}"})
            model.outputs[i + 1].get_tensor().set_names({f"out_{i}"})
        apply_make_stateful_transformation(model, {f"in_{i}": f"out_{i}" for i in range(2 * layers)})
        batch = opset13.gather(opset13.shape_of(model.inputs[0], output_type="i64"), opset13.constant([0]), opset13.constant(0))
        for op in model.get_ops():
            if op.get_type_name() == "ReadValue":
                # 一开始什么也没读过：长度为 0
                sizes = [batch, *(opset13.constant([n]) for n in (heads, 0, width // heads))]
                op.set_arguments([opset13.broadcast(opset13.constant(np.float32(0.0)), opset13.concat(sizes, axis=0))])
        model.validate_nodes_and_infer_types()
        folder.mkdir(exist_ok=True)
        ov.save_model(model, str(folder / f"{kind}.xml"), compress_to_fp16=False)


# ---- 各自写：generate(prompts (B, T), n) -> B 行 n 个 id，都是贪心 ----


def open_engine(program: str, folder: Path, threads: int):
    """generate of one program."""
    engine, kind = program.split()
    if engine == "ours":
        return open_own(folder, kind)
    opener = {"ctranslate2": open_ctranslate2, "openvino": open_openvino, "llama.cpp": open_llama}[engine]
    return opener(folder, kind, threads)


def open_own(folder: Path, kind: str):
    """generate of this project, loaded as a checkpoint is."""
    import nanogpt  # noqa: F401, I001 先于 torch：定下空闲的线程怎么等
    import torch

    from nanogpt.core.generate import Decoder
    from nanogpt.core.machine import keep_freed_memory
    from nanogpt.core.sampling import sampler
    from nanogpt.weights.build import build_undrawn, preset
    from nanogpt.weights.tensors import read_tensors, readers_of
    from nanogpt.write.speed.acceleration import accelerate
    from nanogpt.write.speed.formats import fill

    keep_freed_memory()
    model, file = build_undrawn(preset("gpt2", activation="gelu_tanh", **SHAPE)), folder / "weights.safetensors"
    if kind == "fp32":
        model.load_state_dict(read_tensors(file), strict=False)
    else:
        fill(model, readers_of(file).pieces(), kind)
    accelerate(model.eval(), kind)

    def generate(prompts, n):
        decoder = Decoder(model, capacity=len(prompts), max_length=len(prompts[0]) + n)
        for key, prompt in enumerate(prompts):
            decoder.add(key, prompt, sampler(temperature=0.0), seed=key)
        return torch.tensor([decoder.step().tolist() for _ in range(n)]).T.tolist()

    return generate


def open_ctranslate2(folder: Path, kind: str, threads: int):
    """generate of CTranslate2."""
    import ctranslate2

    kinds = {"fp32": "float32", "int8": "int8_float32"}
    model = ctranslate2.Generator(str(folder / "ctranslate2" / kind), device="cpu", compute_type=kinds[kind], intra_threads=threads)

    def generate(prompts, n):
        texts = [[f"t{i}" for i in prompt] for prompt in prompts]
        found = model.generate_batch(
            texts, max_length=n, min_length=n, sampling_topk=1, include_prompt_in_result=False, end_token=[], cache_static_prompt=False,
        )
        return [result.sequences_ids[0] for result in found]

    return generate


def open_openvino(folder: Path, kind: str, threads: int):
    """generate of OpenVINO."""
    import numpy as np
    import openvino as ov

    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "KV_CACHE_PRECISION": "f32"}
    request = ov.Core().compile_model(str(folder / "openvino" / f"{kind}.xml"), "CPU", options).create_infer_request()

    def generate(prompts, n):
        request.reset_state()
        ids, written = np.array(prompts), []
        for _ in range(n):
            ids = request.infer([ids])[0].argmax(-1)[:, None]
            written.append(ids[:, 0])
        return np.stack(written, axis=1).tolist()

    return generate


def open_llama(folder: Path, kind: str, threads: int):
    """generate of llama.cpp."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(folder / "llama" / f"{kind}.gguf")
    params.n_parallel, params.n_ctx, params.kv_unified, params.warmup = 32, 4096, True, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.verbosity = -1
    server = xllamacpp.Server(params)

    def generate(prompts, n):
        asked = {"prompt": prompts, "n_predict": n, "temperature": 0.0, "top_k": 1, "ignore_eos": True, "cache_prompt": False}
        choices = sorted(server.handle_completions(asked)["choices"], key=lambda choice: choice["index"])
        # 词表里第 i 个词就叫 ti
        return [[int(i) for i in re.findall(r"t(\d+)", choice["text"])] for choice in choices]

    return generate


# ---- 量 ----


def prompts_of(rows: int, length: int) -> list[list[int]]:
    """The same prompts for every program."""
    import random

    draw = random.Random(0)
    return [[draw.randrange(1, SHAPE["vocab_size"]) for _ in range(length)] for _ in range(rows)]


def child(program: str, folder: str, started: str) -> None:
    """Measure one program in all cases; print a json line."""
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count()))
    generate = open_engine(program, Path(folder), threads)
    greedy = generate(prompts_of(1, 1), 1)[0]
    found = {"start_s": time.time() - float(started), "tokens_per_s": {}}
    greedy = generate(prompts_of(1, 24), 6)[0]
    for case, (rows, length, n) in CASES.items():
        prompts = prompts_of(rows, length)
        generate(prompts, min(n, 2))
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            written = generate(prompts, n)
            seconds.append(time.perf_counter() - start)
            assert [len(row) for row in written] == [n] * rows, (case, [len(row) for row in written])
        found["tokens_per_s"][case] = rows * n / min(seconds)
    print(json.dumps({**found, "peak_mib": peak_resident() / 2**20, "greedy": [int(i) for i in greedy]}))


def changes(run: Path) -> dict:
    """What int8 and int4 change: the loss of a trained run, and the distributions of GPT-2's shape with random weights (nats)."""
    import torch

    from nanogpt.weights.build import build_model, preset
    from nanogpt.write.speed.acceleration import accelerate

    model = build_model(preset("gpt2", activation="gelu_tanh", **SHAPE), 0).eval()
    model.load_state_dict(random_weights(SHAPE), strict=False)
    found = {}
    with torch.no_grad():
        idx = torch.tensor(prompts_of(1, 64))
        before = model(idx).log_softmax(-1)
        for kind in ("int8", "int4"):
            after = accelerate(copy.deepcopy(model), kind, fast=False)(idx).log_softmax(-1)
            divergence = (before.exp() * (before - after)).sum(-1).mean().item()
            found[kind] = {"loss": losses_of(run, kind), "kl_at_gpt2_shape": divergence}
    return found


def matrix_rates() -> dict[str, float]:
    """Operations per second of a large product here: float32 and int8 x int8, best of five."""
    import torch

    x, w, best = torch.randn(512, 768), torch.randn(3072, 768), {}
    q, v = x.to(torch.int8), w.to(torch.int8)
    for kind, product in (("fp32", lambda: x @ w.t()), ("int8", lambda: torch._int_mm(q, v.t()))):
        product()
        times = []
        for _ in range(5):
            start = time.perf_counter()
            product()
            times.append(time.perf_counter() - start)
        best[kind] = 2 * x.numel() * len(w) / min(times)
    return best


def bound(kind: str, case: str, rate: float, bandwidth: float, rates: dict[str, float]) -> float:
    """Most tokens/s that the machine allows: the slower of reading the weights and multiplying with them."""
    rows, length, n = CASES[case]
    size, kind = PARAMETERS * BYTES[kind] / (bandwidth * 1e9), PRODUCTS[kind]
    if n == 1:
        # 词表那一层只算最后一个位置
        return 1 / max(size, 2 * (BLOCKS * length + PARAMETERS - BLOCKS) / rates[kind])
    return rows / max(size, 2 * PARAMETERS * rows / rates[kind])


def summarised(seen: dict[str, list[dict]], bandwidth: float, rates: dict[str, float]) -> dict:
    """Medians by program, each with its fraction of the bound; ours also as a multiple of the best of the others."""
    result = {}
    for program, runs in seen.items():
        kind = program.split()[1]
        speeds = {case: statistics.median(run["tokens_per_s"][case] for run in runs) for case in CASES}
        result[program] = {
            "tokens_per_s": {case: round(rate, 2) for case, rate in speeds.items()},
            "fraction_of_bound": {case: round(rate / bound(kind, case, rate, bandwidth, rates), 3) for case, rate in speeds.items()},
            "peak_mib": round(statistics.median(run["peak_mib"] for run in runs)),
            "start_s": round(statistics.median(run["start_s"] for run in runs), 2), "greedy": runs[0]["greedy"],
        }
    for kind in BYTES:
        others = [p for p in result if p.endswith(kind) and not p.startswith("ours")]
        if others and (ours := result.get(f"ours {kind}")):
            best = {case: max(result[p]["tokens_per_s"][case] for p in others) for case in CASES}
            ours["times_the_best_other"] = {case: round(ours["tokens_per_s"][case] / best[case], 2) for case in CASES}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="parts of program names")
    parser.add_argument("--run", type=Path, default=ROOT / "tests" / "runs" / "modern_muon")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "engines.json")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child)
        return
    import torch
    from safetensors.torch import save_file
    from vs_nanogpt import processor

    from nanogpt.base.files import write_text

    programs = [
        name for name, package in PROGRAMS.items()
        if (package is None or find_spec(package)) and (not args.only or any(part in name for part in args.only))
    ]
    packages = sorted({"torch", *(PROGRAMS[name] for name in programs if PROGRAMS[name])})
    limits, seen = [], {}
    with tempfile.TemporaryDirectory() as name:
        folder, tensors = Path(name), random_weights(SHAPE)
        save_file(tensors, folder / "weights.safetensors")
        for package, write in (("ctranslate2", write_ctranslate2), ("openvino", write_openvino), ("xllamacpp", write_gguf)):
            if package in packages:
                # CTranslate2 就地改写交给它的数组：各家一份
                write({name: tensor.clone() for name, tensor in tensors.items()}, folder / package.removeprefix("x").removesuffix("cpp"))
        del tensors
        for _ in range(args.rounds):
            # 极限也一轮量一次，取最高的：别的程序只会使它显得低
            limits.append((read_bandwidth("cpu"), matrix_rates()))
            for program in programs:
                command = [sys.executable, __file__, "--child", program, name, str(time.time())]
                done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
                if done.returncode:
                    # 一个引擎跑不了，别的照量
                    print(f"{program}: {done.stderr.strip().splitlines()[-1:]}", flush=True)
                    continue
                seen.setdefault(program, []).append(json.loads(done.stdout.splitlines()[-1]))
                print(f"{program:18s}", {case: round(rate, 1) for case, rate in seen[program][-1]["tokens_per_s"].items()}, flush=True)
    bandwidth, rates = max(read for read, _ in limits), {kind: max(rate[kind] for _, rate in limits) for kind in limits[0][1]}
    result = summarised(seen, bandwidth, rates)
    texts = {tuple(found["greedy"]) for program, found in result.items() if program.endswith("fp32")}
    record = {
        "command": "python benchmarks/engines.py", "device": processor(), "cores": os.cpu_count(), "python": platform.python_version(),
        "versions": {package: importlib.metadata.version(package) for package in packages}, "rounds": args.rounds,
        "read_bandwidth_gb_per_s": round(bandwidth, 1), "gop_per_s": {kind: round(rate / 1e9) for kind, rate in rates.items()},
        "equal_greedy_ids_in_fp32": len(texts) == 1, "torch_threads": torch.get_num_threads(), "changes": changes(args.run),
        "programs": result,
    }
    write_text(args.out, json.dumps(record, indent=1) + "\n")
    print(json.dumps({program: found.get("times_the_best_other") for program, found in result.items() if "ours" in program}, indent=1))


if __name__ == "__main__":
    main()
