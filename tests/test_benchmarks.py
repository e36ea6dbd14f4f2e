"""The programs under benchmarks/ that measure a card, tried without one."""

import importlib.util
import json

from nanogpt.config import ROOT


def program(name: str):
    """benchmarks/<name>.py as a module of a name of its own: some names occur twice there."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_memory_measurements_that_were_cut_off_go_on_where_they_stopped(tmp_path, monkeypatch):
    memory, out, seen = program("memory"), tmp_path / "memory.json", []
    grid = [("tiny", "fp32", "default", rows) for rows in range(1, 11)]

    def measure(setting, cuda):
        if len(seen) == 4:
            seen.append(None)
            raise KeyboardInterrupt
        seen.append(setting)
        return {**dict(zip(("model", "precision", "memory", "batch_size"), setting)), "error_resident": 0.1 * setting[3]}

    monkeypatch.setattr(memory, "measure", measure)
    here = {"device": "a card", "torch": "2"}
    try:
        memory.measure_all(grid, True, here, out, 1.0)
    except KeyboardInterrupt:
        pass
    cut = json.loads(out.read_text(encoding="utf-8"))
    assert (len(cut["rows"]), cut["missing"]) == (4, 6) and cut["rows"][0]["batch_size"] == 1
    assert memory.measure_all(grid, True, here, out, 0.0) == cut
    whole = memory.measure_all(grid, True, here, out, 1.0)
    assert [row["batch_size"] for row in whole["rows"]] == list(range(1, 11)) and whole["missing"] == 0
    assert len([s for s in seen if s]) == 10
    # 量完的再来一次，是从头量起；换了一台机器也是
    assert len(memory.measure_all(grid, True, here, out, 1.0)["rows"]) == 10 and len([s for s in seen if s]) == 20
