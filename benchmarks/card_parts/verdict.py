"""From the cases of all parts to a few figures and a table; needs no torch."""

import statistics

# 这些部分里，警告也算失败
STRICT = ("smoke", "writing", "recording", "compiling")
# 名字 -> (显示, 目标在哪一侧, 目标)
GOALS = {
    "failed": ("cases that failed", "<=", 0),
    "warnings": ("warnings in training and writing", "<=", 0),
    "bits_equal": ("repeated and resumed runs equal, bit for bit", ">=", 1),
    "memory_median_error": ("memory: median error of the plan", "<=", 0.03),
    "memory_worst_error": ("memory: worst error of the plan", "<=", 0.08),
    "false_fits": ("memory: called fits, did not", "<=", 0),
    "xl_tokens_per_s": ("memory: GPT-2 XL in 8 GB, tokens/s", ">=", 0),
    "vs_nanogpt_compiled": ("training: times nanoGPT compiled, same model", ">=", 1.15),
    "modern_vs_nanogpt": ("training: arch=modern, times nanoGPT compiled", ">=", 1.0),
    "mfu": ("training: MFU at 124M", ">=", 0.5),
    "nanogpt_mfu": ("training: nanoGPT's MFU", ">=", 0),
    "memory_vs_nanogpt": ("training: part of nanoGPT's memory", "<=", 0.45),
    "compiled_vs_eager": ("training: times the eager step", ">=", 1.0),
    "recorded_vs_launched": ("training: tiny recorded, times launched one by one", ">=", 2.0),
    "vs_transformers": ("writing, 1 row: times transformers", ">=", 3.0),
    "rows_vs_transformers": ("writing, 32 rows: times transformers", ">=", 3.0),
    "bandwidth": ("writing, 1 row: of the rate of reading", ">=", 0.6),
    "new_graphs": ("compiled: most graphs made after the first steps", "<=", 2),
    "best_val_loss": ("tiny-shakespeare, 6 x 384: best loss", "<=", 1.42),
}


def verdict(items: dict) -> dict:
    """The figures of GOALS that the cases yield; what was not measured is left out."""
    found = {part: item["cases"] for part, item in items.items()}

    def value(part: str, name: str, key: str):
        return found.get(part, {}).get(name, {}).get(key)

    def ratio(part: str, name: str, other: str, key: str = "tokens_per_s"):
        ours, theirs = value(part, name, key), value(part, other, key)
        return ours / theirs if ours and theirs else None

    every = [case for cases in found.values() for case in cases.values()]
    heard = [len(case.get("warnings", ())) for part in STRICT for case in found.get(part, {}).values()]
    repeated = {**found.get("smoke", {}), **found.get("recording", {})}
    bits = [case["ok"] for name, case in repeated.items() if name.startswith("bits ")]
    memory = [case for case in found.get("memory", {}).values() if "ran" in case]
    errors = [abs(case[key]) for case in memory for key in ("error_allocated", "error_reserved") if key in case]
    compiled = [case for case in found.get("compiling", {}).values() if "graphs_after_halving" in case]
    ours, nanogpt = "ours gpt2 16 compiled", "nanogpt 16 compiled"
    mfu, against = value("speed", ours, "mfu"), ratio("speed", ours, nanogpt)
    read, gigabytes = value("smoke", "rates", "read_gb_per_s"), value("decoding", "1 row, ours", "weights_gb_per_s")
    figures = {
        "failed": sum(not case["ok"] for case in every) if every else None, "warnings": sum(heard) if heard else None,
        "bits_equal": all(bits) if bits else None,
        "memory_median_error": statistics.median(errors) if errors else None,
        "memory_worst_error": max(errors, default=None),
        "false_fits": sum(c["expected"]["verdict"] == "fits" and not c["ran"] for c in memory) if memory else None,
        "xl_tokens_per_s": value("memory", "gpt2_xl minimal 1, 8 GB", "tokens_per_s"),
        "vs_nanogpt_compiled": against, "modern_vs_nanogpt": ratio("speed", "ours modern muon 16 compiled", nanogpt),
        "mfu": mfu, "nanogpt_mfu": mfu / against if mfu and against else None,
        "memory_vs_nanogpt": ratio("speed", ours, nanogpt, "allocated"),
        "compiled_vs_eager": ratio("speed", ours, "ours gpt2 16 eager"),
        "recorded_vs_launched": ratio("recording", "tiny, recorded", "tiny, one by one"),
        "vs_transformers": ratio("decoding", "1 row, ours", "1 row, transformers"),
        "rows_vs_transformers": ratio("decoding", "32 rows, ours", "32 rows, transformers"),
        "bandwidth": gigabytes / read if gigabytes and read else None,
        "new_graphs": max((case["graphs_after_halving"] - case["graphs"] for case in compiled), default=None),
        "best_val_loss": value("commands", "quality", "best_val_loss"),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def reached(name: str, figure: float) -> bool:
    """Whether a figure is where it should be."""
    _, direction, goal = GOALS[name]
    return figure <= goal if direction == "<=" else figure >= goal


def table(environment: dict, items: dict, figures: dict) -> list[str]:
    """At most 30 lines of at most 80 columns: the parts, then the figures beside their goals."""
    lines = [f"{environment.get('device', '?')}, torch {environment.get('torch', '?')}"]
    lines.append(f"{'part':12s} {'cases':>6s} {'failed':>7s} {'skipped':>8s} {'warned':>7s} {'s':>6s}")
    for part, item in items.items():
        cases = list(item["cases"].values())
        failed, skipped = sum(not case["ok"] for case in cases), sum("skipped" in case for case in cases)
        warned = sum("warnings" in case for case in cases)
        lines.append(f"{part:12s} {len(cases):6d} {failed:7d} {skipped:8d} {warned:7d} {item['seconds']:6.0f}")
    lines.append("")
    for name, (words, direction, goal) in GOALS.items():
        if name in figures:
            wanted = f"  {direction} {goal:<6g}" if goal or direction == "<=" else ""
            mark = "" if reached(name, figures[name]) else " <--"
            lines.append(f"{words:50s} {float(figures[name]):9.4g}{wanted}{mark}".rstrip())
    return [line[:80] for line in lines]
