"""How often the words of an emotion are written, at each strength of control=prefix.

    python benchmarks/control.py --run outputs/my-run [--texts 8] [--tokens 400] [--prompt KING:] [--emotions sad loving]

English words are counted whole, in texts of the same seeds. Writes benchmarks/results/control.json.
"""

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402 - 先把仓库根目录放进路径

from nanogpt.base.groups import sample_config  # noqa: E402
from nanogpt.base.quoting import override  # noqa: E402
from nanogpt.write.loading import Model, Settings, open_model  # noqa: E402

# None 是完全不控制；0 只有那句话
STRENGTHS = (None, 0.0, 1.0, 2.0, 3.0, 4.0)


def share(model: Model, settings: Settings, words: list[str], arguments: argparse.Namespace) -> dict:
    """Share of `words` among all words of the texts, and of different words among all."""
    writer = model.writer(capacity=arguments.texts)
    requests = [settings.request(arguments.prompt, number) for number in range(arguments.texts)]
    found = [w.lower() for p in writer.write(requests) if p.result for w in re.findall(r"[A-Za-z]+", p.result.text)]
    return {"words": len(found), "share": round(sum(w in words for w in found) / len(found), 4), "distinct": round(len(set(found)) / len(found), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--prompt", default="KING:\n")
    parser.add_argument("--emotions", nargs="+", default=["sad", "loving"])
    arguments = parser.parse_args()
    typed = [override("out_dir", arguments.run), "device=cpu", f"max_new_tokens={arguments.tokens}", "sampler=temperature"]
    cfg = sample_config([*typed, "control=prefix", "temperature=0.8"])
    model, base = open_model(cfg, Path(cfg.out_dir)), Settings.of(cfg)
    results = {}
    for emotion in arguments.emotions:
        words = cfg.control["emotions"][emotion]["words"]["en"]
        for strength in STRENGTHS:
            wish = {"emotion": emotion if strength is not None else None, "strength": strength or 0.0}
            measured = share(model, dataclasses.replace(base, control={**base.control, **wish}), words, arguments)
            results.setdefault(emotion, []).append({"strength": strength, **measured})
            print(emotion, strength, measured, flush=True)
    record = {"torch": torch.__version__, "device": "cpu", "settings": vars(arguments) | {"temperature": 0.8}, "results": results}
    path = ROOT / "benchmarks" / "results" / "control.json"
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
