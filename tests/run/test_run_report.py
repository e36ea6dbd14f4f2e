"""report.html: what a run leaves to be read in a browser, offline."""

import json
import re
from html import escape
from html.parser import HTMLParser

import pytest
from conftest import make_config, new_session, resume

from nanogpt.base.language import set_language
from nanogpt.base.report import curves
from nanogpt.run import report
from nanogpt.run.report import MOST_SAMPLES, changed, write_report


class Tags(HTMLParser):
    """Counts on every closing tag that it closes the one that is open."""

    # HTMLParser 什么都放过去：这里要的是一一配对

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in ("meta", "line", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def finished(session):
    """What report.html says at the end of this training."""
    trainer = session._build()
    session._finish(trainer, trainer.fit())
    session.lock.release()
    html = (session.run_dir / "report.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(html)
    assert not tags.open and "script" not in tags.seen and "http" not in html
    assert not re.search(r"(?:src|href|url)\s*[=(]|@import", html)
    return html


def points(html):
    """How many points each curve has."""
    return [len(curve.split()) for curve in re.findall(r'points="([^"]*)"', html)]


def test_a_report_has_curves_samples_settings_and_commands_and_covers_the_whole_run_after_a_resume(in_tmp, tiny_overrides):
    html = finished(new_session(tiny_overrides, "sample_prompt=the king"))
    assert points(html) == [6, 2] and html.count('<pre class="text">') == 2 and 'lang="en"' in html
    # 走完了的只说一个数，不缩写
    assert "<b>6</b>" in html
    rows = changed(make_config(*tiny_overrides, "sample_prompt=the king"))
    assert len(rows) > 15 and ("model.n_embd", "16", "256") in rows and ("sample_prompt", "the king", "null") in rows
    for row in rows:
        assert "</td><td>".join(f"<code>{escape(cell)}</code>" for cell in row) in html
    assert "run_sample.py out_dir=outputs/run" in html and "run_train.py resume=outputs/run max_iters=12" in html
    set_language("zh")
    # 陌生人的样本里什么都可能有；多了就均匀取几段
    with open("outputs/run/metrics.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps({"iteration": 6, "sample": "<script>\x00&"}) + "\n" for _ in range(2))
    html = finished(resume("outputs/run", "max_iters=18"))
    assert points(html) == [18, 6] and 'lang="zh"' in html and escape("<script>?&") in html
    assert html.count('<pre class="text">') == MOST_SAMPLES and "迭代 18" in html and "与默认不同的设置" in html


def test_only_what_differs_from_the_defaults_is_listed(in_tmp):
    assert changed(make_config()) == []
    assert changed(make_config("batch_size=2", "out_dir=x")) == [("batch_size", "2", "16")]
    assert ("model.n_layer", "6", "4") in changed(make_config("model=small"))


def test_a_report_that_cannot_be_written_is_one_line_and_nothing_else_is_lost(in_tmp, tiny_overrides, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "write_text", full)
    session = new_session(tiny_overrides, "max_iters=3")
    trainer = session._build()
    session._finish(trainer, trainer.fit())
    out = capsys.readouterr().out
    assert "report.html is not written (" in out and "No space left" in out and "done: val loss" in out and "run: report.html, " not in out


def test_a_run_without_a_line_of_metrics_has_a_report_too(in_tmp):
    (in_tmp / "metrics.jsonl").touch()
    nothing = {"best_val_loss": None, "tokens_per_s": 0.0, "peak_vram_gib": None, "wall_s": 0.0, "train_s": 0.0, "iters": 0, "device": "cpu"}
    write_report(in_tmp, make_config(), nothing, model="m", commands={})
    assert "<svg" not in (in_tmp / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("most", [7, 980, 8000, 30_000, 12_000_000, 3_200_000_000])
def test_no_number_below_a_chart_is_cut_off_at_its_edge(most):
    drawn = curves({"a": [(0.0, 1.0), (most, 2.0)]}, "t", x_label="x", y_label="y")
    labels = re.findall(r'<text x="([\d.]+)" y="400.0"[^>]*>([^<]+)<', drawn)
    # 14 像素的字，一个至多 8 像素宽
    assert len(labels) > 2 and all(float(x) + 8 * len(words) / 2 <= 1000 for x, words in labels)
