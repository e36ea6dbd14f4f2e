"""The record of an evaluation as a person reads it on the console."""

# 评估的记录（一个 JSON）变成屏幕上的行：heading 先印真实文本，result 每个设置一张表，summary 最后一设置一行
# command 每得到一部分就调用一次；这里只排版，不算任何数

from nanogpt.base.console import aligned
from nanogpt.base.language import joined, sentence, text

# 没有标签的原因 -> 消息
WHY = {
    "empty": sentence("empty"), "repetitive": sentence("turning in circles"), "formless": sentence("no form"),
    "unfinished": sentence("unfinished"), "repeated": sentence("written before"),
}
RATE, INTERVAL, DISTINCT, COPIES = (
    sentence("hit rate"), sentence("95%"), sentence("distinct-1/2/3"), sentence("copies"),
)
HEADS = (
    sentence("label"), sentence("hits"), RATE, INTERVAL, sentence("real"), DISTINCT,
    sentence("known pairs"), COPIES, sentence("length"), sentence("finished"),
)
"""Of the table of one setting."""


def heading(record: dict) -> list[str]:
    """What is evaluated, how, and the same measures of real texts."""
    judge = "judge_form" if record["judge"]["name"] == "form" else "judge_text"
    settings = record["settings"]
    numbers = {key: value for key, value in settings["sampler"].items() if isinstance(value, int | float)}
    sampler = ", ".join(f"{key}={value:g}" for key, value in numbers.items())
    said, real = {key: record[key] for key in ("run", "checkpoint", "kind", "samples", "device")}, record["real"]
    return [
        text(
            "{run} ({checkpoint}) on {device}: {samples} texts for each {kind}, seeds from {seed}, {sampler}",
            seed=settings["seed"], sampler=sampler, **said,
        ), text(judge),
        text(
            "the judge itself is right on {rate:.1%} of real held-out texts (95%: {low:.1%} to {high:.1%}; mean over "
            "labels, {n:,} texts)",
            **interval(record["judge"]["accuracy"]),
        ),
        "", text(
            "real texts (hits: the judge on its held-out texts; the rest: validation texts)",
        ), *rows(real, real), *tune_line(real["tunes"], real["tunes"]),
    ]


def result(record: dict) -> list[str]:
    """The newest setting of a record."""
    entry, real = record["results"][-1], record["real"]
    guidance = {"codes": "setting_codes", "prefix": "setting_prefix", "none": "setting_none"}[entry["control"]]
    lines = ["", text(guidance, guidance=entry["guidance"], chance=1 / len(record["labels"]))]
    lines += rows(entry, real)
    for label, row in entry["labels"].items():
        missed = {name: count for name, count in row["judged"].items() if name != label}
        if missed:
            found = joined(f"{why(name)} {count}" for name, count in missed.items())
            lines.append("  " + text("{label} missed: {found}", label=label, found=found))
    lines += tune_line(entry["tunes"], real["tunes"])
    if entry["perplexity"] is not None:
        without = record["perplexity_without_labels"]
        lines.append("  " + text(
            "perplexity of real validation texts at this guidance: {value:.2f} per token (without labels: "
            "{without:.2f})",
            value=entry["perplexity"], without=without,
        ))
    return lines


def summary(record: dict) -> list[str]:
    """One line per setting, where there are several."""
    if len(record["results"]) < 2:
        return []
    heads = ("column_setting", RATE, INTERVAL, sentence("perplexity"), DISTINCT, COPIES)
    table = []
    for entry in record["results"]:
        total, name = entry["total"], f"control={entry['control']}"
        if entry["guidance"] is not None:
            name += f" control.guidance={entry['guidance']:g}"
        perplexity = "-" if entry["perplexity"] is None else f"{entry['perplexity']:.2f}"
        copies = percent(total["copies"]["rate"])
        table.append([name, percent(total["rate"]), between(total), perplexity, distinct(total), copies])
    return ["", *aligned([text(head) for head in heads], table)]


def rows(part: dict, real: dict) -> list[str]:
    """The table of one setting (or of the real texts themselves)."""
    table = []
    for label, row in [*part["labels"].items(), (None, part["total"])]:
        accuracy = real["labels"][label] if label else real["total"]
        table.append([
            label or text("mean"), f"{row['hits']}/{row['n']}", percent(row["rate"]), between(row),
            percent(accuracy["rate"]), distinct(row), percent(row["known_pairs"]), percent(row["copies"]["rate"]),
            "-" if row["length"] is None else f"{row['length']:.1f}", percent(row["finished"]),
        ])
    return aligned([text(head) for head in HEADS], table)


def tune_line(found: dict | None, real: dict | None) -> list[str]:
    """How many ci have the exact lengths of a real one."""
    return ["  " + text(
        "ci with exactly the segment lengths of a real one: {hits} of {n}, {rate:.1%} (95%: {low:.1%} to {high:.1%}; "
        "real validation ci: {real:.1%})",
        **interval(found), real=real["rate"] if real else 0.0,
    )] if found else []


def why(name: str) -> str:
    """A label, or the reason for none."""
    return text(WHY[name]) if name in WHY else name


def interval(found: dict) -> dict:
    return {key: found[key] for key in ("hits", "n", "rate", "low", "high")}


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def between(found: dict) -> str:
    return f"{100 * found['low']:.1f}–{100 * found['high']:.1f}%"


def distinct(row: dict) -> str:
    return "/".join("-" if value is None else f"{value:.2f}" for value in row["distinct"])
