"""One text of all Tang and Song poems, for studies of texts larger than tiny-shakespeare (ablate.py large_texts).

    python benchmarks/poems.py CHECKOUT TEXT

CHECKOUT is one of github.com/chinese-poetry/chinese-poetry. The poems are shuffled by a fixed seed, so that any part of the
text is like any other; a line of theirs is a line of the text, and an empty line stands between two.
"""

import json
import random
import sys
from pathlib import Path


def poems(checkout: Path) -> list[str]:
    """The poems, title left out, always in the same order."""
    found = []
    for file in sorted((checkout / "全唐诗").glob("poet.*.json")):
        found += ["\n".join(poem["paragraphs"]) for poem in json.loads(file.read_text(encoding="utf-8"))]
    # 同一首收了两次的只留一次：不然验证部分的诗训练时已经读过
    found = sorted({poem for poem in found if poem})
    random.Random(1).shuffle(found)
    return found


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    text = "\n\n".join(poems(Path(sys.argv[1]))) + "\n"
    Path(sys.argv[2]).write_text(text, encoding="utf-8", newline="\n")
    print(f"{len(text):,} characters, {len(text.encode()) / 1e6:.1f} MB, {len(set(text)):,} different ones")


if __name__ == "__main__":
    main()
