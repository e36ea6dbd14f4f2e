"""python -m nanogpt.control: a run written, judged, tabled and drawn; every mistake is one line."""

import json
import shutil
import sys

import numpy as np
import pytest
import yaml
from conftest import TINY, make_config
from rich.cells import cell_len
from test_judges import poetry, reviews

from nanogpt.base import language
from nanogpt.base.cli import quoted
from nanogpt.base.config import ROOT
from nanogpt.base.console import aligned
from nanogpt.base.groups import sample_config
from nanogpt.data.corpus import build_char_tokenizer
from nanogpt.data.documents import Document, write_documents
from nanogpt.run.session import Session
from nanogpt.write.control.prefixes import writable
from nanogpt.write.judge import command, evaluate, picture
from nanogpt.write.judge.measures import TrainingTexts, wilson
from nanogpt.write.loading import open_model
from nanogpt.write.samples import write_samples

QUICK = [*TINY, "dataset=text_file", "dataset.path=unused.txt", "logger=none", "device=cpu", "batch_size=4", "log_interval=1", "sample_tokens=0",
         "warmup_iters=1", "model.block_size=48"]


def trained(folder, documents, *overrides, judge=()):
    """A run folder of a tiny model of these documents."""
    tokenizer = build_char_tokenizer(d.text for d in documents)
    parts = {"train": documents[: len(documents) * 2 // 3], "val": documents[len(documents) * 2 // 3 :], "judge": list(judge)}
    data = write_documents(folder / "prepared", name="text_file", source="test", tokenizer=tokenizer, parts=parts)
    cfg = make_config(*QUICK, f"dataset.dir={data}", "max_iters=2", "eval_interval=2", f"out_dir={folder / 'run'}", *overrides)
    Session.new(cfg, folder / "run").run()
    return folder / "run"


def mixed(texts, seed=0):
    random = np.random.default_rng(seed)
    return [texts[i] for i in random.permutation(len(texts))]


@pytest.fixture(scope="module")
def poems(tmp_path_factory):
    """A run with three styles; it is tiny and untrained, so its figures are small, but they must be right."""
    return trained(tmp_path_factory.mktemp("poems"), mixed(poetry(30)), judge=poetry(60, seed=1))


def run(*arguments, expect=0):
    """The command's exit code must be `expect`."""
    # 编译好的解码器按核数开线程：极小的模型上只是等待
    arguments = [*arguments, "device=cpu", "fast=false"] if arguments[0] == "evaluate" else arguments
    if not expect:
        return command.main([str(a) for a in arguments])
    with pytest.raises(SystemExit) as stopped:
        command.main([str(a) for a in arguments])
    assert stopped.value.code == expect


def test_a_run_is_evaluated_tabled_saved_and_drawn(poems, in_tmp, capsys):
    arguments = ["evaluate", poems, "--samples", 4, "--guidance", 1, 2, "--baseline", "--output", "out/e.json", "--plot", "out/e.png", "--texts",
                 "sampler=top_k", "sampler.top_k=9", "max_new_tokens=40", "seed=5", "batch_size=6"]
    run(*arguments)
    out = capsys.readouterr().out
    for expected in ("4 texts for each style", "judge: the form", "real texts", "control=codes control.guidance=2", "control=prefix", "control=none",
                     "宋词 missed: ", "ci with exactly the segment lengths of a real one", "perplexity of real validation texts", "written: out"):
        assert expected in out, expected
    record = json.loads((in_tmp / "out/e.json").read_text(encoding="utf-8"))
    assert record["labels"] == ["五言绝句", "元曲", "宋词"] and record["settings"]["sampler"]["top_k"] == 9 and record["versions"]["scikit-learn"]
    assert [(e["control"], e["guidance"]) for e in record["results"]] == [("codes", 1.0), ("codes", 2.0), ("prefix", None), ("none", None)]
    for entry in record["results"]:
        for label, row in entry["labels"].items():
            texts = entry["texts"][label]
            assert row["n"] == len(texts) == sum(row["judged"].values()) == 4 and row["hits"] == row["judged"].get(label, 0)
            assert [row["low"], row["high"]] == pytest.approx(wilson(row["hits"], 4))
            assert row["finished"] == sum(t["finish"] != "length" for t in texts) / 4 and row["judged"].get("unfinished", 0) == sum(t["finish"] == "length" for t in texts)
            assert all(5 <= t["seed"] < 17 for t in texts)
    # 不作要求时各标签问的是同一件事，文字却不是同一批
    silent = record["results"][3]["texts"]
    assert len({t["seed"] for texts in silent.values() for t in texts}) == 12
    assert record["results"][0]["perplexity"] > 1 and record["results"][2]["perplexity"] is None and record["perplexity_without_labels"] > 1
    assert (in_tmp / "out/e.png").read_bytes()[:4] == b"\x89PNG"
    run("plot", "out/e.json", "out/e.svg")
    drawn = (in_tmp / "out/e.svg").read_text(encoding="utf-8")
    run("plot", "out/e.json", "out/e.svg")
    assert drawn.startswith("<?xml") and (in_tmp / "out/e.svg").read_text(encoding="utf-8") == drawn


def test_the_same_seed_counts_the_same_whatever_is_written_beside(poems, in_tmp):
    run("evaluate", poems, "--samples", 3, "--output", "a.json", "max_new_tokens=20")
    run("evaluate", poems, "--samples", 3, "--output", "b.json", "max_new_tokens=20", "batch_size=2")
    a, b = (json.loads((in_tmp / name).read_text(encoding="utf-8")) for name in ("a.json", "b.json"))
    assert a["results"] == b["results"] and a["real"] == b["real"]


def test_copied_texts_are_counted(in_tmp, capsys):
    """A model of one text, learned by heart, writes it again."""
    text = "今天的天气非常好我们一起去公园里散步看花吧，大家都很高兴。"
    documents = [Document(text, emotion=label) for label in ("positive", "negative") for _ in range(12)]
    folder = trained(in_tmp, documents, "max_iters=60", "learning_rate=3e-2", "batch_size=8", judge=reviews(20))
    run("evaluate", folder, "--samples", 3, "--output", "e.json", "sampler=greedy")
    total = json.loads((in_tmp / "e.json").read_text(encoding="utf-8"))["results"][0]["total"]
    assert total["copies"]["rate"] == 1.0 and total["finished"] == 1.0 and total["distinct"][0] < 0.2
    assert "written before 2" in capsys.readouterr().out


def test_a_run_without_its_own_data_takes_the_folder_that_it_names(poems, in_tmp):
    moved = in_tmp / "moved"
    shutil.copytree(poems, moved)
    shutil.rmtree(moved / "data")
    run("evaluate", moved, "--samples", 1, "max_new_tokens=5")
    config = yaml.safe_load((moved / "config.yaml").read_text(encoding="utf-8"))
    for name, directory in (("text_file", "nowhere"), ("../evil", None), (None, None)):
        config["dataset"].update(name=name, dir=directory)
        (moved / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        run("evaluate", moved, expect=2)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, corpus_folder):
    folder = tmp_path_factory.mktemp("plain") / "run"
    Session.new(make_config(*QUICK, f"dataset.dir={corpus_folder}", "max_iters=2", f"out_dir={folder}"), folder).run()
    return folder


def one_line(capsys, *arguments):
    """What a refused command says, in the language of the arguments."""
    capsys.readouterr()
    run(*arguments, expect=2)
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and not said.out
    return said.err


MISTAKES = {
    "evaluate nowhere": "OUT_DIR=nowhere: there is no checkpoint in it",
    "evaluate RUN --kind emotion": "--kind emotion: the model has labels for style only",
    "evaluate PLAIN": "knows no labels of style or emotion; train with dataset=chinese_poetry, chinese_reviews or labelled",
    "evaluate RUN --samples 0": "--samples=0 is out of range",
    "evaluate RUN --guidance 1 99": "--guidance=99.0 is out of range",
    "evaluate RUN --plot a.gif": "--plot a.gif: the file's name must end in .png or .svg",
    "evaluate RUN --output .": "--output .: cannot be written",
    "evaluate RUN start=春": "start=… is set by the evaluation itself",
    "evaluate RUN control=prefix": "control=… is set by the evaluation itself",
    "evaluate RUN max_new_token=3": "max_new_token: there is no such key (did you mean max_new_tokens?)",
    "evaluate RUN sampler=best": "sampler=best: there is no such option",
    "evaluate RUN temperature=-1": "temperature=-1.0 is out of range",
    "evaluate RUN checkpoint=iter_9": "checkpoint=iter_9",
    "plot none.json a.png": "none.json is not what --output writes (FileNotFoundError)",
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_is_one_line(poems, plain, in_tmp, capsys, typed):
    arguments = [{"RUN": poems, "PLAIN": plain}.get(word, word) for word in typed.split()]
    assert MISTAKES[typed] in one_line(capsys, *arguments)


def test_a_run_without_texts_for_the_judge_and_a_missing_package_are_one_line(in_tmp, capsys, monkeypatch, poems):
    folder = trained(in_tmp, reviews(10))
    assert "judge.jsonl of the data set has 0 texts labelled negative" in one_line(capsys, "evaluate", folder)
    said = one_line(capsys, "evaluate", folder, "--lang", "zh")
    assert "标为 negative 的只有 0 篇" in said
    language.set_language("en")
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    assert "needs the package scikit-learn; install it with: pip install scikit-learn" in one_line(capsys, "evaluate", poems)


def test_the_text_prefix_asks_in_the_language_of_the_texts():
    for text, kind, label, typed in (
        ("很好", "emotion", "positive", "积极"), ("good", "emotion", "positive", "positive"),
        ("春眠不觉晓", "style", "七言绝句", "七言绝句"), ("a book", "style", "mystery", "mystery"),
    ):
        assert evaluate.in_words(evaluate.Reference(kind, [], None, {}, TrainingTexts([text]), set()), label)[kind] == typed


def test_a_baseline_is_what_the_command_line_writes_also_without_the_line_break_of_its_sentence(in_tmp):
    # 第一篇让词表写得出 control=prefix 的那句话，只缺它末尾的换行
    folder = trained(in_tmp, [Document("下面这段文字的情绪：积极。", emotion="positive"), *mixed(reviews(10))])
    typed = ["device=cpu", "fast=false", "max_new_tokens=12", "seed=5"]
    cfg = command.config_of(typed)
    model, reference = open_model(cfg, folder), evaluate.Reference("emotion", ["positive"], None, {}, TrainingTexts(["很好"]), set())
    assert writable(model.tokenizer, "下面这段文字的情绪：积极。") and not writable(model.tokenizer, "\n")
    for control, _, node in evaluate.settings_of(reference, evaluate.EvaluationOptions(3, [], baseline=True)):
        written = evaluate.write(model, cfg, reference.labels, node, 3)["positive"]
        wish = ["control.emotion=积极"] * (control == "prefix")
        overrides = [*typed, f"control={control}", *wish, "num_samples=3", f"output={control}.jsonl"]
        write_samples(sample_config([quoted(o) for o in overrides]), model)
        records = [json.loads(line) for line in (in_tmp / f"{control}.jsonl").read_text(encoding="utf-8").splitlines()]
        assert {r["seed"]: r["text"] for r in records} == {r.request.seed: r.text for r in written} and any(r.text for r in written)


def test_overrides_are_told_from_options_and_their_values():
    typed, overrides = command.split(["evaluate", "outputs/a=b", "--guidance", "1", "2", "sampler=top_p", "--output", "x=y.json", "sampler.top_p=0.5"])
    assert typed == ["evaluate", "outputs/a=b", "--guidance", "1", "2", "--output", "x=y.json"] and overrides == ["sampler=top_p", "sampler.top_p=0.5"]


def test_a_table_too_wide_for_the_terminal_goes_on_below_and_is_plain_elsewhere(monkeypatch):
    heads, rows = ["label", *("a column",) * 9], [["五言绝句", *("12.5%",) * 9], ["é👍x", *("-",) * 9]]
    plain = aligned(heads, rows)
    assert len(plain) == 3 and {cell_len(line) for line in plain} == {2 + 8 + 9 * 10}
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    folded = aligned(heads, rows)
    assert len(folded) == 6 and max(map(cell_len, folded)) <= 80 and folded[4].startswith("  五言绝句")
    assert " ".join(folded).split().count("12.5%") == 9


def test_the_picture_needs_no_chinese_font():
    assert all(name.isascii() or "×" in name for name in picture.ENGLISH.values()) and picture._english("开心", 1) == "label 2"
    assert picture._english("positive", 0) == "positive" and (ROOT / "nanogpt" / "write" / "judge" / "picture.py").is_file()
