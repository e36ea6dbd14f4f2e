"""Do other programs compute with an exported model what it computes here: transformers, llama.cpp and CTranslate2.

    python benchmarks/formats.py

Small random models of every architecture, exported in every format and number format, read back and written with: the largest
difference of a logit and of a log-probability, and how many of the first 24 greedy ids are equal. Writes benchmarks/results/formats.json.
"""

# 不计时，只看对不对：每一格都是 nanogpt export --check 所比的
# 随机的模型里常有几乎并列的 id：8 位的数（激活也舍入）会换它们的次序，差值在允许之内就是对的

import argparse
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402 - 要先找得到 nanogpt

from nanogpt.base.language import ConfigError  # noqa: E402
from nanogpt.data.tokenizer import ByteTokenizer  # noqa: E402
from nanogpt.weights.build import build_model, preset  # noqa: E402
from nanogpt.weights.checkpoint import model_tensors  # noqa: E402
from nanogpt.weights.export import FORMATS, check_format, writer  # noqa: E402
from nanogpt.weights.export_check import compared  # noqa: E402
from nanogpt.weights.pretrained import Pretrained  # noqa: E402

SIZE = {"n_layer": 3, "n_head": 4, "n_embd": 128, "block_size": 128, "vocab_size": 256}
GROUPED = {"n_kv_head": 2, "intermediate_size": 352}
ARCHS = {
    "gpt2": ("gpt2", {"bias": True}),
    "gpt2, untied, no bias, exact GELU": ("gpt2", {"bias": False, "activation": "gelu", "tie_embeddings": False}),
    "llama": ("llama", GROUPED),
    "llama 3, stretched": ("llama", {**GROUPED, "rope_scaling": "llama3", "rope_factor": 32.0, "rope_base": 500000.0}),
    "llama, stretched linearly, biases": ("llama", {**GROUPED, "rope_scaling": "linear", "rope_factor": 4.0, "bias": True}),
    "qwen2": ("llama", {**GROUPED, "qkv_bias": True}),
    "qwen3": ("qwen3", {**GROUPED, "head_dim": 64}),
    "modern": ("modern", {}),
}


def random_model(arch: str, changes: dict) -> Pretrained:
    """A model whose weights are all random and large enough that no part of it can be left out."""
    model = build_model(preset("tiny", arch, **SIZE, **changes), 0).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        gain = parameter.dim() == 1 and not name.endswith("bias")
        torch.nn.init.normal_(parameter, mean=float(gain), std=0.15)
    return Pretrained(model.config, model_tensors(model), ByteTokenizer())


def measure(pretrained: Pretrained, form: str, kind: str) -> dict:
    """One cell: an export, read back and written with."""
    try:
        check_format(pretrained.config, form)
    except ConfigError as error:
        return {"refused": str(error)}
    with tempfile.TemporaryDirectory() as folder:
        writer(form, kind)(Path(folder), pretrained)
        found = compared(Path(folder), pretrained, form, kind)
    return {
        "engine": found.engine, "largest_logit": round(found.scale, 3), "rounding": found.rounding, "difference": found.difference,
        "allowed": round(found.allowed, 5), "equal_greedy_ids": f"{found.equal} of {found.count}", "good": found.good,
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    cases = {}
    for name, (arch, changes) in ARCHS.items():
        pretrained = random_model(arch, changes)
        for form, kinds in FORMATS.items():
            for kind in kinds:
                cases[f"{name}, {form}, {kind}"] = found = measure(pretrained, form, kind)
                print(f"{name}, {form}, {kind}", found, flush=True)
    packages = ("torch", "transformers", "gguf", "xllamacpp", "ctranslate2")
    record = {"command": "python benchmarks/formats.py", "versions": {name: version(name) for name in packages}, "shape": SIZE, "cases": cases}
    path = ROOT / "benchmarks" / "results" / "formats.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if all(case.get("good", True) for case in cases.values()) else 1)


if __name__ == "__main__":
    main()
