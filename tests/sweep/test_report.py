"""The report of a sweep: order, pictures, page and the recipe of the fastest setting."""

import dataclasses
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import yaml
from conftest import composed, make_config
from rich.cells import cell_len

from nanogpt.base import language as messages
from nanogpt.base import report
from nanogpt.base.config import check
from nanogpt.sweep.chart import figure, loss_chart, memory_chart, save, svg
from nanogpt.sweep.report import command, page, print_table, recipe, write_report
from nanogpt.sweep.result import TrialResult, best_of, names, pareto, ranked

NASTY = "<script>alert('x')</script> & \"quotes\" [/b]"


def made(batch, status="ok", speed=None, peak=None, precision="fp16", **more):
    values = {"budget_gib": 12.0, "micro_batch": batch, "effective_batch": batch, "device": "card", "tokens_per_s": speed, "peak_gib": peak, "reserved_gib": peak}
    overrides = ("experiment=fit", "model=medium", f"batch_size={batch}", f"precision={precision}")
    return TrialResult(overrides, status, **{**values, "step_ms": 10.0 if speed else None, "key": f"{batch}{precision}{status}", **more})


SWEEP = [
    made(1, speed=1000.0, peak=3.0), made(2, speed=1900.0, peak=4.0), made(4, speed=3000.0, peak=6.0, val_loss=2.5), made(8, speed=5000.0, peak=11.9),
    made(4, speed=2900.0, peak=6.5, precision="bf16", val_loss=2.4), made(16, "oom", reason=NASTY, predicted_gib=12.5), made(8, "crashed", reason="SIGABRT", precision="bf16"),
    made(32, "skipped", reason="predicted 200.0 GiB > 12.0", predicted_gib=200.0), made(16, "spilled", speed=300.0, peak=11.8, precision="bf16"),
]


def test_best_is_the_fastest_within_the_margin():
    assert best_of(SWEEP, 0.05) is SWEEP[2] and best_of(SWEEP, 0.0) is SWEEP[3] and best_of(SWEEP[5:], 0.0) is None
    order = ranked(SWEEP, 0.05)
    assert [r.tokens_per_s for r in order[:6]] == [3000.0, 2900.0, 1900.0, 1000.0, 5000.0, 300.0] and len(order) == len(SWEEP)


def test_names_tell_only_what_differs():
    assert names(SWEEP)[:2] == ["batch_size=1, precision=fp16", "batch_size=2, precision=fp16"]
    assert names(SWEEP[:1]) == ["model=medium, batch_size=1, precision=fp16"]


def test_the_pareto_front_is_what_no_other_point_beats():
    points = [(3.0, 10.0), (4.0, 9.0), (4.0, 12.0), (6.0, 12.0), (7.0, 20.0)]
    assert pareto(points) == [(3.0, 10.0), (4.0, 12.0), (7.0, 20.0)]
    for x, y in points:
        assert any(fx <= x and fy >= y for fx, fy in pareto(points))


def test_a_failure_far_beyond_the_budget_does_not_squeeze_the_chart():
    drawn = memory_chart(SWEEP, SWEEP[2])
    ax = figure(drawn).axes[0]
    assert 12.0 < ax.get_xlim()[1] <= 20 and any(p.x == 200.0 for p in drawn.points)
    # 没有预测也没有占用的失败画不出来，只在表里
    assert len(drawn.points) == len(SWEEP) - 1
    labels = [text.get_text() for text in ax.texts if "GiB" not in text.get_text()]
    assert labels[0] == "4" and set(labels) == {"1", "2", "4", "8", "16", "32"}


AWKWARD = [made(n, speed=10.0 * n, peak=1.0, precision=f"$x^$\x01<{n % 2}>字") for n in range(1, 12)]


@pytest.mark.parametrize("found", [
    SWEEP, SWEEP[5:6], [made(1, "crashed", reason="x")], AWKWARD,
    [made(n, speed=10.0 * n, peak=1.0, precision=f"p{n}") for n in range(1, 12)],
])
@pytest.mark.filterwarnings("error")
def test_svg_is_well_formed_every_mark_has_a_title(found):
    drawn = memory_chart(found, best_of(found, 0.05))
    written = svg(drawn, NASTY)
    root = ElementTree.fromstring(written)
    assert sorted(title.text for title in root.iter("title")) == sorted(p.title for p in drawn.points)
    assert not re.search(r"\bnan\b|\binf\b", written)


def test_the_same_results_draw_the_same_bytes(tmp_path):
    drawn = memory_chart(AWKWARD, AWKWARD[2])
    for name in ("a.png", "b.png"):
        save(drawn, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes() and svg(drawn, "x") == svg(drawn, "x")


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_page_is_self_contained_escaped_and_in_the_consoles_language(language):
    messages.set_language(language)
    html = page(SWEEP, margin=0.05, command=NASTY, created="2026-01-01")
    assert "<script" not in html and "&lt;script&gt;" in html
    assert not re.search(r"(?:src|href|url)\s*[=(](?!['\"]?#)|https?://|@import", html)
    # 名字要译成词，标题与表头也在内
    assert not re.search("(report|column|tile|status)_", html) and ("每步 ms" if language == "zh" else "step ms") in html
    assert f'lang="{language}"' in html and f"<h1>{messages.text('report_title')}</h1>" in html and ("内存占用与速度" in html) == (language == "zh")
    assert html.count("<svg") == 2 and "prefers-color-scheme: dark" in html
    assert all(f"{r.tokens_per_s:,.0f}" in html for r in SWEEP if r.tokens_per_s)


@pytest.mark.filterwarnings("error")
def test_curves_of_any_name_and_number_are_drawn_as_the_same_text_every_time():
    lines = {f"$x^{n}$\x01<{NASTY}>字": [(float(x), x / (n + 1)) for x in range(1, 2 + 9 * n)] for n in range(9)}
    lines["long"] = [(float(x), x / 1e5) for x in range(10**4)]
    drawn = [report.curves(lines, NASTY, x_label="iteration", y_label="loss") for _ in range(2)]
    assert drawn[0] == drawn[1] and ElementTree.fromstring(drawn[0]).tag == "svg" and "--c6" in drawn[0]
    places = [tuple(map(float, place.split(","))) for points in re.findall(r'points="([^"]*)"', drawn[0]) for place in points.split()]
    assert 500 < len(places) < 1100 and all(70 <= x <= 980 and 20 <= y <= 370 for x, y in places)


def test_losses_are_drawn_only_where_there_are_some():
    assert len(loss_chart(SWEEP, SWEEP[2]).points) == 2 and loss_chart(SWEEP[:3], None) is None


def test_a_report_has_every_file_and_says_how_to_go_on(in_tmp, capsys):
    folder = in_tmp / "sweep"
    folder.mkdir()
    write_report(SWEEP, folder, margin=0.05)
    out = capsys.readouterr().out
    assert "run_train.py --config-dir outputs/fit +fit=best" in out and NASTY.split()[0] in out
    rows = [json.loads(line) for line in (folder / "trials.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len(SWEEP) and rows[0]["tokens_per_s"] == 3000.0
    assert (folder / "report.html").is_file()
    assert (folder / "fit/best.yaml").read_bytes() == (in_tmp / "outputs/fit/fit/best.yaml").read_bytes()
    for name in ("report.png", "loss.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_80_columns_show_every_setting_and_reason_whole(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_table(ranked(SWEEP, 0.05), 0.05)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and lines[2].split() == ["1", "batch_size=4,", "precision=fp16", "ok", "3,000", "6.00", "/", "12.00"]
    assert all(any(name in line for line in lines) for name in names(SWEEP)) and "predicted 200.0 GiB > 12.0" in "".join(lines)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_table_of_large_values_fits_into_80_columns_and_is_wrapped_at_commas(language, monkeypatch, capsys):
    messages.set_language(language)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    more = ("memory=lean", "precision=bf16", "model.block_size=1024", "optimizer.weight_decay=0.1")
    found = [
        TrialResult((*more, f"batch_size={size}", f"learning_rate={size}e-4", f"dropout=0.{size}", f"model=m{size}"), "ok",
                    tokens_per_s=1234567.0, peak_gib=99.99, budget_gib=99.99, step_ms=12345.6, predicted_gib=99.99, effective_batch=1000000)
        for size in range(1, 4)
    ]
    print_table(found, 0.0)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(cell_len, lines)) <= 80 and not any(shared in line for shared in more for line in lines)
    settings = " ".join(re.sub(r"  +.*", "", line[3:]) for line in lines[2:])
    assert settings == " ".join(names(found)) and all(line.endswith((",", "1", "2", "3")) for line in re.findall(r"^.. (\S.*?)(?:  |$)", "\n".join(lines[2:]), re.MULTILINE))


def test_without_a_success_the_report_says_so(in_tmp, capsys):
    for status, said in (("oom", "no setting fits"), ("invalid", "no setting could be trained; the reasons are in the table")):
        write_report([dataclasses.replace(SWEEP[6], status=status)], in_tmp, margin=0.05)
        assert said in capsys.readouterr().out
    assert not list(in_tmp.rglob("best.yaml")) and not list(in_tmp.glob("*.png")) and "<svg" not in (in_tmp / "report.html").read_text(encoding="utf-8")


# ---- best.yaml ----

TYPED = [
    "model=gpt2", "arch=gpt2", "precision=bf16", "memory=lean", "optimizer=adamw", "optimizer.weight_decay=0.2", "hardware=rtx3060_8gb", "batch_size=4",
    "gradient_accumulation_steps=8", "model.n_layer=2", "model.ngrams=[2,3]", "sample_prompt='To be, or: not # \"x\"'", "dataset=text_file", "dataset.path='我 的.txt'",
    "eval_tokens=null", "learning_rate=3e-4", "compile=false", "+model.extra.window=7", "dropout=0.1",
]
OF_THE_TRIAL = ["experiment=fit", "trial.steps=9", "lang=zh", "out_dir=x", "trial.margin=0.1", "overwrite=true"]


@pytest.fixture
def with_best(tmp_path):
    """Compose with a best.yaml of the given overrides, as `--config-dir … +fit=best` would."""

    def compose(result, *more):
        (tmp_path / "fit").mkdir(exist_ok=True)
        (tmp_path / "fit" / "best.yaml").write_text(recipe(result), encoding="utf-8")
        return composed("train", [f"hydra.searchpath=[file://{tmp_path.as_posix()}]", "+fit=best", *more])

    return compose


def test_the_recipe_composes_to_what_was_tried_and_is_a_normal_training(with_best):
    cfg = with_best(TrialResult((*OF_THE_TRIAL, *TYPED), "ok", micro_batch=4, tokens_per_s=1.0, device="a\nb: {card}"))
    wanted = make_config(*TYPED)
    cfg.groups.pop("fit")
    assert dataclasses.asdict(cfg) == dataclasses.asdict(wanted)
    check(cfg)
    assert not cfg.trial.enabled and cfg.out_dir is None


def test_a_user_may_still_override_everything_in_the_recipe(with_best):
    result = TrialResult(tuple(TYPED), "ok", micro_batch=4)
    cfg = with_best(result, "precision=fp32", "batch_size=2", "optimizer=muon", "model=tiny", "max_iters=7", "model.n_layer=3")
    assert (cfg.precision.dtype, cfg.batch_size, cfg.max_iters, cfg.model.n_layer) == ("fp32", 2, 7, 3) and "muon" in cfg.optimizer["_target_"]


def test_an_untyped_micro_batch_is_written_and_other_recipes_are_named():
    assert yaml.safe_load(recipe(TrialResult(("experiment=fit",), "ok", micro_batch=16))) == {"batch_size": 16}
    result = TrialResult(("experiment=cpu_speedrun",), "ok", micro_batch=16, experiment="cpu_speedrun")
    assert command(result, Path("outputs/fit")) .endswith("run_train.py --config-dir outputs/fit experiment=cpu_speedrun +fit=best")
    assert len(recipe(result).splitlines()) == 3
