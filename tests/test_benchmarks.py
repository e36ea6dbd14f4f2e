"""The programs under benchmarks/ that measure a card, tried without one."""

import importlib.util
import json
import sys
import warnings
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import composed

from nanogpt.base.config import ROOT


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


# ---- card.py ----

sys.path.append(str(ROOT / "benchmarks"))
card = program("card")
CHOSEN = {
    "smoke": ("gpt2 adamw lean8 fp16", "out of memory, injected", "out of memory in the update", "out of memory, real"),
    "writing": ("documents, guidance 2", "out of memory, rows halved", "rows that end one by one", "a request in the server's thread"),
    "memory": ("tiny bf16 2",), "speed": ("ours gpt2 16 eager", "nanogpt 16 eager", "update 8-bit"), "decoding": ("1 row, ours plain",),
}


@pytest.mark.parametrize("part", CHOSEN)
def test_a_rehearsal_of_the_card_program_finds_nothing_wrong(part, in_tmp, monkeypatch):
    from card_parts.kit import Lab, run

    # 各用例的组大多相同：拼一次就够
    monkeypatch.setattr(Lab, "_composed", lambda self, name, overrides: composed(name, list(overrides)))
    said, lab = [], Lab(in_tmp, device="cpu", pretend=True)
    lab.strict = True
    cases = list(importlib.import_module(f"card_parts.{part}").cases(lab))
    assert run(lab, [(name, case) for name, case in cases if name in CHOSEN[part]], said.append, set())
    found = {message["case"]: message for message in said if "case" in message}
    assert set(found) == set(CHOSEN[part]) and [message for message in found.values() if not message["ok"]] == []
    assert {name for name, message in found.items() if "skipped" in message} <= {"out of memory, real", "nanogpt 16 eager"}
    json.dumps(said, allow_nan=False)


def test_every_command_and_every_warning_of_the_card_program_is_judged(in_tmp):
    from card_parts.kit import Lab, run

    def missing():
        import no_such_package  # noqa: F401

    def renamed():
        import nanogpt.no_such_module  # noqa: F401

    def warned():
        warnings.warn("slow", UserWarning, stacklevel=1)
        warnings.warn_explicit("old", UserWarning, "/python/hydra/main.py", 1)
        return {"value": float("nan"), "nested": [torch.tensor(1.5), np.float32(2)]}

    def broken():
        raise RuntimeError("CUDA error: device-side assert triggered")

    said, lab = [], Lab(in_tmp, device="cpu", pretend=True)
    lab.strict = True
    cases = [("missing", missing), ("renamed", renamed), ("warned", warned), ("done before", broken), ("broken", broken), ("never", missing)]
    assert not run(lab, cases, said.append, {"done before"})
    found = {message["case"]: message for message in said if "case" in message}
    assert found["missing"]["ok"] and found["missing"]["skipped"] == "no_such_package is not installed"
    assert not found["renamed"]["ok"] and not found["warned"]["ok"] and found["warned"]["warnings"][0].startswith("UserWarning: slow (test_benchmarks.py:")
    assert found["warned"]["value"] == "nan" and not found["broken"]["ok"] and set(found) == {"missing", "renamed", "warned", "broken"}
    lab.until = 0.0
    assert run(lab, cases, said.append, set()) and said[-1] == {"case": "never", "ok": True, "skipped": "no time left", "seconds": 0.0}


class Scripted:
    """A child process that plays a list of messages; an exception in it is raised."""

    scripts: ClassVar[dict[str, list[list]]] = {}
    orders: ClassVar[list[dict]] = []

    def __init__(self, part, folder):
        self.script = self.scripts[part].pop(0)

    def go(self, order):
        self.orders.append(order)

    def messages(self, until):
        for message in self.script:
            if isinstance(message, BaseException):
                raise message
            yield dict(message)

    def end(self):
        return "Segmentation fault"


def test_what_was_measured_on_a_card_survives_dying_and_hanging_processes(tmp_path, monkeypatch, capsys):
    here, done = {"environment": {"device": "A Card (12 GB)", "torch": "2"}}, {"ok": True, "seconds": 1.0}
    monkeypatch.setattr(card, "Child", Scripted)
    monkeypatch.setattr(card, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["card.py", "--only", "smoke", "memory"])
    Scripted.orders.clear()
    Scripted.scripts = {
        "smoke": [[here, {"begin": "a"}, {"case": "a", **done}, {"begin": "b"}], [here, {"begin": "c"}, {"case": "c", **done}, {"end": True}]],
        "memory": [[here, {"begin": "d"}, TimeoutError()]],
    }
    assert card.main() == 1
    file = tmp_path / "benchmarks" / "results" / "card_a_card_12_gb.json"
    items = json.loads(file.read_text(encoding="utf-8"))["items"]
    assert {name: case["ok"] for name, case in items["smoke"]["cases"].items()} == {"a": True, "b": False, "c": True}
    assert "Segmentation fault" in items["smoke"]["cases"]["b"]["error"] and items["memory"]["cases"]["d"]["skipped"] == "its time was up"
    assert [order["done"] for order in Scripted.orders] == [[], ["a", "b"], []]
    assert 0 < Scripted.orders[0]["seconds"] < 480 < Scripted.orders[2]["seconds"] + 1
    # 只量一部分：别的部分还在
    monkeypatch.setattr(sys, "argv", ["card.py", "--only", "speed"])
    Scripted.scripts = {"speed": [[here, {"begin": "e"}, {"case": "e", **done}, {"end": True}]]}
    assert card.main() == 1 and set(json.loads(file.read_text(encoding="utf-8"))["items"]) == {"smoke", "memory", "speed"}
    assert "cases that failed" in capsys.readouterr().out


def test_without_a_gpu_the_card_program_says_so_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(card, "Child", Scripted)
    monkeypatch.setattr(sys, "argv", ["card.py"])
    Scripted.scripts = {"smoke": [[{"no_gpu": True}]]}
    assert card.main() == 2 and len(capsys.readouterr().out.splitlines()) == 1


def test_the_verdict_of_a_card_fits_on_a_screen():
    from card_parts.verdict import GOALS, table, verdict

    ok, fast, slow = {"ok": True}, {"ok": True, "tokens_per_s": 300.0, "mfu": 0.6, "allocated": 4}, {"ok": True, "tokens_per_s": 100.0, "allocated": 10}
    plan = {"ok": False, "ran": False, "expected": {"verdict": "fits"}}
    cases = {
        "smoke": {"bits fp32": ok, "bits bf16": {"ok": False}, "rates": {**ok, "read_gb_per_s": 2.0}, "x": {"ok": False, "warnings": ["slow"]}},
        "recording": {"bits muon, dropout": ok, "tiny, recorded": fast, "tiny, one by one": slow},
        "writing": {"1 row": ok}, "compiling": {"gpt2 default": {**ok, "graphs": 2, "graphs_after_halving": 5}},
        "memory": {"gpt2_xl minimal 1, 8 GB": {**fast, "ran": True, "expected": {"verdict": "tight"}, "error_reserved": -0.1}, "y": plan},
        "speed": {"ours gpt2 16 compiled": fast, "nanogpt 16 compiled": slow, "ours modern muon 16 compiled": slow, "ours gpt2 16 eager": slow},
        "decoding": {
            "1 row, ours": {**fast, "weights_gb_per_s": 1.0}, "1 row, transformers": slow, "32 rows, ours": fast, "32 rows, transformers": slow,
        },
        "commands": {"quality": {**ok, "best_val_loss": 1.4}, "z": {**ok, "skipped": "why"}},
    }
    items = {part: {"ok": True, "seconds": 100.0, "cases": found} for part, found in cases.items()}
    figures = verdict(items)
    assert set(figures) == set(GOALS) and verdict({}) == {}
    assert (figures["failed"], figures["bits_equal"], figures["false_fits"], figures["new_graphs"], figures["warnings"]) == (3, False, 1, 3, 1)
    assert (figures["vs_nanogpt_compiled"], figures["memory_vs_nanogpt"], figures["bandwidth"], figures["memory_worst_error"]) == (3.0, 0.4, 0.5, 0.1)
    lines = table({"device": "NVIDIA H100 80GB HBM3", "torch": "2.11.0+cu130"}, items, figures)
    assert len(lines) <= 30 and max(map(len, lines)) <= 80 and sum("<--" in line for line in lines) == 8


def test_the_start_program_times_commands_that_can_be_typed_beside_importing_torch(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    start = program("start")
    for name, (script, *typed) in start.COMMANDS.items():
        if script.endswith(".py") and name not in ("typo", "help"):
            assert composed(script.removeprefix("run_").removesuffix(".py"), typed)
    monkeypatch.setattr(start, "cpu_seconds", lambda arguments, folder: 2.0 if arguments[0] == "-c" else 3.0)
    measured = start.measure(tmp_path, 2, start.COMMANDS)
    assert measured["import torch"]["of_import_torch"] == 1 and measured["typo"] == {"cpu_s": 3.0, "of_import_torch": 1.5}
