# nanogpt compare 与普通扫描的结尾：旧版本写下的几次训练放在一起比
"""Whole trainings are compared: what differs, what they reached, one page."""

import re
import shutil
from pathlib import Path

import pytest

from nanogpt.base.sweep_folder import Job, naming_jobs, swept_name
from nanogpt.sweep import compare

RUNS = Path(__file__).parents[1] / "runs"


def test_a_comparison_names_what_differs_and_nothing_else(in_tmp, capsys):
    for name, rate in (("a", "0.01"), ("b", "0.02")):
        shutil.copytree(RUNS / "modern_muon", in_tmp / "outputs" / name)
        config = in_tmp / "outputs" / name / "config.yaml"
        config.write_text(re.sub("(?m)^learning_rate: .*", f"learning_rate: {rate}", config.read_text(encoding="utf-8")), encoding="utf-8")
    compare.main(["a", "b", "--output", "new/c.html"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["learning_rate", "val", "loss", "last", "tokens/s", "took", "run"]
    assert [line[:2] + line[-1:] for line in lines[1:3]] == [["0.01", "1.4636", "a"], ["0.02", "1.4636", "b"]]
    page = Path("new/c.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2 and not re.findall(r"(?:src|href)=[^#]{2}", page) and "cannot be compared" not in page


def test_runs_of_other_data_get_a_table_of_settings_and_a_warning(in_tmp, capsys):
    compare.main([str(RUNS), "lang=zh"])
    said = capsys.readouterr().out
    assert "loss 不能相比" in said and re.search(r"(?m)^ *model.arch +gpt2 +modern +modern$", said)
    assert "loss 不能相比" in Path("outputs/compare.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("words", "line"), [
    ([str(RUNS / "modern_muon")], "at least two trainings"), ([str(RUNS), "--output", "x.txt"], "a name that ends in .html"), (["none", "b"], "there is no such folder"),
])
def test_a_mistake_in_a_comparison_is_one_line_and_leaves_nothing(in_tmp, capsys, words, line):
    with pytest.raises(SystemExit) as stopped:
        compare.main(words)
    assert stopped.value.code == 2 and line in capsys.readouterr().err and not list(in_tmp.iterdir())


def test_a_sweep_ends_with_every_job_and_the_best_first(in_tmp, capsys):
    jobs = [Job(("model=tiny", f"learning_rate={rate}"), in_tmp / "sweep" / f"{n}", reason) for n, (rate, reason) in enumerate(((1, "no"), (2, ""), (3, "")))]
    for job, name in zip(jobs[1:], ("modern_muon", "lora_minimal")):
        shutil.copytree(RUNS / name, job.folder)
    keys, rows = compare.swept(jobs)
    assert keys == ["learning_rate"] and [row.settings for row in rows] == [("3",), ("2",), ("1",)] and rows[2].figures()[-1] == "failed"
    compare.report_sweep(jobs)
    assert "0: no" in capsys.readouterr().out and (in_tmp / "sweep" / "compare.html").is_file()
    compare.report_sweep(jobs[:1])
    assert not capsys.readouterr().out


@pytest.mark.parametrize(("typed", "name"), [
    ("learning_rate=0.005", "_learning_rate=0.005"), ("", ""), ("dataset.path='C:\\\\a b/c.txt'", "_dataset.path=_C_a_b_c.txt"), ("a=[1,2]", "_a=_1_2"),
    ("k=" + "字" * 99, "_k=" + "字" * 58), ("a=b.", "_a=b"), ("...", ""),
])
def test_a_folder_is_named_by_what_every_system_takes(typed, name):
    assert swept_name(typed) == name


def test_what_all_jobs_share_stays_out_of_their_names():
    assert naming_jobs(["model=tiny", "seed=1,2", "seed=3"]) == ["hydra.job.config.override_dirname.exclude_keys=[model]"] and naming_jobs(["a=[1"]) == []
