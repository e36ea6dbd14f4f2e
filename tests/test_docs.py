"""The documents: their code works as printed, the two languages match, their figures are those of the code."""

import json
import re
import shlex
import sys

import pytest
import torch
import yaml
from conftest import make_config, shipped_options, shipped_yaml
from test_end_to_end import QUICK, TEXT
from typed import typed

import nanogpt
from nanogpt.base.config import ROOT
from nanogpt.base.language import ConfigError
from nanogpt.data import corpus
from nanogpt.data.tokens import TokenData
from nanogpt.weights import build
from nanogpt.weights.build import build_sampler

PAIRS = [("README.md", "README.zh-CN.md"), ("docs/extend.md", "docs/extend.zh-CN.md"), ("docs/architecture.md", "docs/architecture.zh-CN.md"),
         ("docs/interactive.md", "docs/interactive.zh-CN.md"), ("docs/sweeps.md", "docs/sweeps.zh-CN.md"),
         ("docs/fit.md", "docs/fit.zh-CN.md"), ("docs/control.md", "docs/control.zh-CN.md"), ("docs/trust.md", "docs/trust.zh-CN.md"),
         ("SECURITY.md", "SECURITY.zh-CN.md")]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name, language):
    return re.findall(rf"```{language}\n(.*?)```", read(name), flags=re.DOTALL)


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_both_languages_show_the_same_code_tables_and_figures(english, chinese):
    def skeleton(text):
        code = ["\n".join(line.split("#")[0].rstrip() for line in block.splitlines()) for block in re.findall(r"```\w+\n(.*?)```", text, flags=re.DOTALL)]
        return code, [len(re.findall(rf"^{'#' * n} ", text, flags=re.MULTILINE)) for n in (1, 2, 3)], len(re.findall(r"^\|", text, flags=re.MULTILINE))

    assert skeleton(read(english)) == skeleton(read(chinese))
    figures = [sorted(re.findall(r"\d+\.\d{2,}|\d{1,3}(?:,\d{3})+", read(name))) for name in (english, chinese)]
    assert figures[0] == figures[1]


def test_the_preset_table_is_what_the_code_reports():
    for name in shipped_options()["model"]:
        with torch.device("meta"):
            counts = [f"{nanogpt.create_model(name, vocab_size=v).parameter_count():,}" for v in (76, 50257)]
        c = build.preset(name)
        for readme in ("README.md", "README.zh-CN.md"):
            assert f"| `{name}` | {c.n_layer} | {c.n_head} | {c.n_embd} | {c.block_size} | {counts[0]} | {counts[1]} |" in read(readme)


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_every_option_of_every_group_is_in_the_readme(readme):
    text = read(readme)
    for group, options in shipped_options().items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{group}` |"))
        for option in options:
            assert re.search(rf"\b{option}\b", row), (group, option)


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_every_command_in_the_readme_composes(readme):
    commands = [line.split("#")[0] for block in blocks(readme, "bash") for line in block.splitlines()]
    checked = 0
    for command in commands:
        match = re.search(r"run_train\.py ((?:[\w.]+=\S+ ?)+)", command)
        if match and "resume" not in command:
            make_config(*[o.replace("4,8,16", "4") for o in match[1].split()])
            checked += 1
    assert checked >= 3
    assert any('pip install -c constraints.txt -e ".[dev]" && pytest' in c for c in commands)


def test_the_documented_dataset_works(tmp_path, monkeypatch):
    folder = tmp_path / "data" / "my_songs"
    folder.mkdir(parents=True)
    (folder / "prepare.py").write_text(blocks("docs/extend.md", "python")[0], encoding="utf-8")
    (tmp_path / "songs.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    data = TokenData(corpus.prepare("my_songs", None, {"source": str(tmp_path / "songs.txt")}))
    assert data.tokenizer.decode(data.tokens["train"][:19]) == TEXT[:19]


def test_the_documented_model_optimizer_and_logger_train_resume_write_and_are_fine_tuned_as_printed(tmp_path):
    code, yamls = blocks("docs/extend.md", "python"), blocks("docs/extend.md", "yaml")
    (tmp_path / "my_model.py").write_text(code[1], encoding="utf-8")
    (tmp_path / "my_optimizer.py").write_text(code[2], encoding="utf-8")
    (tmp_path / "my_logger.py").write_text(
        "class MyLogger:\n"
        "    def open(self, run_dir, config, iteration): self.file = open(run_dir / 'logs', 'a', encoding='utf-8'); print(iteration, file=self.file)\n"
        "    def log(self, iteration, metrics): print(iteration, sorted(metrics), file=self.file)\n"
        "    def text(self, iteration, sample): pass\n"
        "    def close(self): self.file.close()\n",
        encoding="utf-8",
    )
    for path, content in zip(("model/wide", "model/gated", "optimizer/mine", "logger/mine"), yamls[1:]):
        (tmp_path / "conf" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "conf" / f"{path}.yaml").write_text(content, encoding="utf-8")
    (tmp_path / "my.txt").write_text(TEXT, encoding="utf-8")
    quick = [o for o in QUICK if o not in ("logger=none",)]

    def run(script, *arguments, expect=0):
        return typed(script, tmp_path, *arguments, python_path=tmp_path, expect=expect)

    def printed(done, script):
        # 屏幕上写的命令，照样敲一遍
        return next(shlex.split(line)[2:] for line in done.stdout.splitlines() if f"{script} --config-dir=conf" in line)

    mine = ["--config-dir=conf", "model=gated", "optimizer=mine", "logger=mine"]
    begun = run("run_train.py", *mine, "dataset=text_file", "dataset.path=my.txt", "dataset.dir=prepared", *quick, "out_dir=outputs/a")
    refused = run("run_train.py", "resume=outputs/a", "max_iters=6", expect=2)
    # 照着文档把 yaml 也放进了 conf/ 的人，那里写着的就是他自己的
    assert "names code of its own (" in refused.stderr and "my_model.GatedGPT" in refused.stderr
    run("run_train.py", *printed(begun, "run_train.py"), "max_iters=6")
    lines = (tmp_path / "outputs/a/logs").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "0" and "4" in lines and any(line.startswith("6 [") and "train/loss" in line for line in lines)
    assert json.loads((tmp_path / "outputs/a/summary.json").read_text(encoding="utf-8"))["iters"] == 6
    # 写作、微调都要指名；那一组里的形状（n_layer 等）不作数
    refused = run("run_sample.py", "out_dir=outputs/a", expect=2)
    assert refused.stderr.count("\n") == 1 and "add model._target_=my_model.GatedGPT" in refused.stderr
    assert run("run_sample.py", *printed(begun, "run_sample.py"), "max_new_tokens=5", "fast=false").stdout.strip()
    more = ["dataset=text_file", "dataset.path=my.txt", "dataset.dir=prepared", *[o for o in quick if not o.startswith("model.")]]
    run("run_train.py", *mine[:2], "init_from=outputs/a", *more, "logger=none", "out_dir=outputs/b")
    tuned = yaml.safe_load((tmp_path / "outputs/b/config.yaml").read_text(encoding="utf-8"))["model"]
    assert tuned == yaml.safe_load((tmp_path / "outputs/a/config.yaml").read_text(encoding="utf-8"))["model"]
    assert "n_embd: 768" in run("run_train.py", "--config-dir=conf", "model=wide", "--cfg", "job").stdout


def test_the_documented_sampler_writes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_sampler.py").write_text(blocks("docs/extend.md", "python")[3], encoding="utf-8")
    node = yaml.safe_load(blocks("docs/extend.md", "yaml")[5])
    fresh = build_sampler(node)
    logits = fresh(torch.zeros(1, 4), torch.tensor([[-1, 2, 0, 2]]))
    assert logits.tolist() == [[-1.0, 0.0, -2.0, 0.0]]
    with pytest.raises(ConfigError, match="windw"):
        build_sampler({**node, "windw": 3})


def test_chinese_comments_are_everywhere():
    for path in [*(ROOT / "nanogpt").rglob("*.py"), *(ROOT / "data").glob("*/prepare.py")]:
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > 25:
            assert re.search(r"#.*[一-鿿]", text), f"{path.name} has no Chinese comment"
    for path in shipped_yaml():
        assert re.search(r"#.*[一-鿿]", path.read_text(encoding="utf-8")), f"{path} has no Chinese comment"


def test_every_text_file_is_opened_with_its_encoding_named():
    for path in [*(ROOT / "nanogpt").rglob("*.py"), *(ROOT / "data").glob("*/*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        for line in path.read_text(encoding="utf-8").splitlines():
            if re.search(r"\.(read_text|write_text)\(|\.open\(\"[rwa]\"", line):
                assert "encoding=" in line, (path.name, line)

def test_the_guide_to_control_shows_what_was_measured():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import control_texts
    finally:
        sys.path.pop(0)
    results = {name: json.loads((ROOT / f"benchmarks/results/control_{name}.json").read_text(encoding="utf-8")) for name in ("poetry", "reviews")}
    for guide in ("docs/control.md", "docs/control.zh-CN.md"):
        shown = read(guide)
        for record in results.values():
            for entry in record["results"]:
                name = f"control.guidance={entry['guidance']:g}" if entry["control"] == "codes" else f"control={entry['control']}"
                rate, low, high = (f"{100 * entry['total'][key]:.1f}%" for key in ("rate", "low", "high"))
                perplexity = f"{entry['perplexity']:.2f}" if entry["perplexity"] else "-"
                assert f"| `{name}` | {rate} | {low} – {high} | {perplexity} |" in shown, (guide, name)
            assert f"{100 * record['judge']['accuracy']['rate']:.1f}%" in shown
        for file in control_texts.FILES:
            assert "\n".join(control_texts.rows(file)) in shown, (guide, file)
    best = {name: max(e["total"]["rate"] for e in record["results"]) for name, record in results.items()}
    # 目标：体裁 90%，情绪不低于评判看真实文本，照抄不超过 5%
    assert best["poetry"] >= 0.9 and best["reviews"] >= 0.84
    assert all(e["total"]["copies"]["rate"] <= 0.05 for record in results.values() for e in record["results"])


# 攻击（结果文件的名字）-> 测试文件的名字
ATTACKS = {
    "kill": "kill", "damage": "damage", "disk": "disk", "power": "power", "folders": "folders", "numerics": "numerics", "memory": "out_of_memory",
    "overrides": "commands", "texts": "texts", "server": "clients", "sweeps": "trials", "supply": "supply",
}


def test_the_page_on_trust_shows_what_was_counted_and_nothing_was_broken():
    for name, file in ATTACKS.items():
        record = json.loads((ROOT / f"benchmarks/results/torture_{name}.json").read_text(encoding="utf-8"))
        assert record["broken"] == [] and record["cases"] >= 50 and "BROKEN" not in json.dumps(record["counts"]), name
        assert (ROOT / f"tests/torture/test_{file}.py").is_file()
        for guide in ("docs/trust.md", "docs/trust.zh-CN.md"):
            row = next(line for line in read(guide).splitlines() if line.startswith(f"| [`test_{file}.py`](../tests/torture/test_{file}.py) |"))
            assert row.endswith(f"| {record['cases']:,} | 0 |")
        # README 说的次数：杀进程的按杀的次数
        shown = f"{record['figures'].get('kills', record['cases']) if name == 'kill' else record['cases']:,}"
        assert name == "sweeps" or all(shown in read(readme) for readme in ("README.md", "README.zh-CN.md")), (name, shown)
