"""The texts that docs/control.md shows, good and bad, by a rule and not by taste.

    python -m nanogpt.control evaluate outputs/poetry --samples 20 --guidance 1.5 --texts --output benchmarks/results/control_poetry_texts.json
    python -m nanogpt.control evaluate outputs/reviews --samples 20 --guidance 3 --texts --output benchmarks/results/control_reviews_texts.json
    python benchmarks/control_texts.py

Of each label: the text of the first seed that the judge gives this label, and that of the first seed that it does not, if
there is one among them. Prints the table as it stands in the guide; nothing is written.
"""

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
FILES = ("control_poetry_texts.json", "control_reviews_texts.json")


def rows(name: str) -> list[str]:
    """The table rows of one evaluation."""
    record = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    found = []
    for label, texts in record["results"][0]["texts"].items():
        for good in (True, False):
            # 第一个，不是最好的一个
            chosen = next((text for text in texts if (text["judged"] == label) == good), None)
            if chosen:
                shown = chosen["text"].replace("\n", " / ").replace("|", "\\|")
                found.append(f"| {label} | {chosen['seed']} | {'✓' if good else '✗ ' + chosen['judged']} | {shown} |")
    return found


if __name__ == "__main__":
    for file in FILES:
        print("\n".join(rows(file)))
