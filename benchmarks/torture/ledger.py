"""What an attack counts: outcomes by kind of case, figures, and promises that were broken; one result file each."""

import json
import math
import os
import platform
import sys
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# 比这少的试跑不改动结果文件
RECORDED = {
    "kill": 250, "damage": 1000, "disk": 60, "power": 2000, "folders": 100, "numerics": 400, "memory": 300, "overrides": 500, "texts": 200,
    "server": 10_000, "sweeps": 150, "supply": 5000,
}
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from vs_nanogpt import processor  # noqa: E402 - 先把仓库根目录与 benchmarks 放进路径


class Ledger:
    """The cases of one program under benchmarks/torture/; `promise` is what must hold, in one sentence.

    Every case is counted once, under the kind of attack and what came of it. A case that breaks the promise is
    kept with what is needed to repeat it, and makes the program end with exit code 1.
    """

    def __init__(self, name: str, promise: str):
        self.name, self.promise = name, promise
        self.counts: dict[str, Counter] = defaultdict(Counter)
        self.figures: dict[str, object] = {}
        self.broken: list[str] = []

    def count(self, kind: str, outcome: str) -> None:
        """A case that ended as promised."""
        self.counts[kind][outcome] += 1

    def breach(self, kind: str, what: str) -> None:
        """A case that broke the promise; `what` says which and how, in one line."""
        self.counts[kind]["BROKEN"] += 1
        self.broken.append(f"{kind}: {' '.join(what.split())[:500]}")
        print("BROKEN", self.broken[-1], flush=True)

    @property
    def cases(self) -> int:
        """All cases so far."""
        return sum(outcomes.total() for outcomes in self.counts.values())

    def record(self) -> dict:
        """The content of the result file."""
        # 命令照原样记下：别人凭它就能重做
        command = " ".join(["python", f"benchmarks/torture/{self.name}.py", *sys.argv[1:]])
        return {
            "command": command, "promise": self.promise, "cases": self.cases, "broken": self.broken,
            "counts": {kind: dict(sorted(outcomes.items())) for kind, outcomes in self.counts.items()}, "figures": self.figures,
            "device": f"{processor()}, {os.cpu_count()} cores", "system": platform.system(), "python": platform.python_version(),
        }

    def finish(self) -> int:
        """Print the figures, write benchmarks/results/torture_<name>.json unless it was a short trial, return the exit code."""
        record = self.record()
        for kind, outcomes in record["counts"].items():
            print(f"  {kind}: " + ", ".join(f"{outcome} {number}" for outcome, number in outcomes.items()))
        for figure, value in self.figures.items():
            print(f"  {figure}: {value}")
        print(f"{self.name}: {self.cases} cases, {len(self.broken)} broken promises")
        if self.cases >= RECORDED.get(self.name, math.inf):
            path = RESULTS / f"torture_{self.name}.json"
            path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return int(bool(self.broken))
