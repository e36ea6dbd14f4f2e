"""The documents: their code works as printed, the two languages match, their figures are those of the code."""

import importlib.util
import itertools
import json
import re
import shlex
import sys

import pytest
import torch
import yaml
from conftest import make_config, make_sample_config, shipped_options, shipped_yaml
from test_end_to_end import QUICK, TEXT
from typed import typed

import nanogpt
from nanogpt.base.cli import implied_dataset, searched
from nanogpt.base.config import ROOT
from nanogpt.base.language import ConfigError
from nanogpt.base.quoting import quoted
from nanogpt.core.ngrams import size_text
from nanogpt.data import corpus
from nanogpt.data.tokens import TokenData
from nanogpt.plan.show import run_plan
from nanogpt.sweep.search import check_search
from nanogpt.weights import build
from nanogpt.weights.build import build_sampler

# 每一页都有两种语言：写了一种，另一种也要有
PAGES = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md") if not path.name.endswith(".zh-CN.md"))
ENGLISH = ["README.md", "SECURITY.md", *PAGES]
PAIRS = [(name, name.replace(".md", ".zh-CN.md")) for name in ENGLISH]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name, language):
    if name.endswith(".ipynb"):
        cells = json.loads(read(name))["cells"] if language == "bash" else []
        return ["".join(line.removeprefix("!") for line in cell["source"] if line.startswith("!")) + "\n" for cell in cells]
    return re.findall(rf"```{language}\n(.*?)```", read(name), flags=re.DOTALL)


def commands(*names):
    """(script, its arguments) of every run_train.py and run_sample.py in the blocks for shells of these pages."""
    for line in "".join(block for name in names for shell in ("bash", "powershell") for block in blocks(name, shell)).splitlines():
        words = shlex.split(line, comments=True)
        for script in ("run_train.py", "run_sample.py"):
            if script in words:
                after = words[words.index(script) + 1 :]
                yield script, list(itertools.takewhile(lambda word: word not in ("&&", "|", "<", ">", "…"), after))


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_both_languages_show_the_same_code_tables_and_figures(english, chinese):
    def skeleton(text):
        # 次序不论：各语言的第一次训练不同
        code = re.findall(r"```\w+\n(.*?)```", text, flags=re.DOTALL)
        code = [sorted(re.sub(r"(^|\s)#.*", "", line).rstrip() for line in block.splitlines()) for block in code]
        heads = [len(re.findall(rf"^{'#' * n} ", text, flags=re.MULTILINE)) for n in (1, 2, 3)]
        return code, heads, len(re.findall(r"^\|", text, flags=re.MULTILINE))

    def figures(text):
        # 没有语言名的块是屏幕上的样子，各是各的；论文的编号不是数字
        text = re.sub(r"^```\n.*?^```$|arXiv:[\d.]+", "", text, flags=re.DOTALL | re.MULTILINE)
        return sorted(re.findall(r"\d+\.\d{2,}|\d{1,3}(?:,\d{3})+", text))

    assert skeleton(read(english)) == skeleton(read(chinese))
    assert figures(read(english)) == figures(read(chinese))


@pytest.mark.parametrize("name", [name for pair in PAIRS for name in pair])
def test_every_link_leads_somewhere_and_every_page_can_be_reached(name):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", re.sub(r"```.*?```", "", read(name), flags=re.DOTALL)):
        path, _, anchor = target.partition("#")
        place = (ROOT / name).parent / path if path else ROOT / name
        assert place.exists(), (name, target)
        if anchor:
            heads = re.findall(r"^#+ (.*)$", place.read_text(encoding="utf-8"), flags=re.MULTILINE)
            # GitHub 的锚：小写，去掉标点，空格变成连字符
            assert anchor in [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads], (name, target)
    readme = "README.zh-CN.md" if name.endswith(".zh-CN.md") else "README.md"
    assert name == readme or f"]({name}" in read(readme), name


def test_the_preset_table_is_what_the_code_reports():
    for name in shipped_options()["model"]:
        with torch.device("meta"):
            counts = [size_text(nanogpt.create_model(name, vocab_size=v)).partition(" in ")[0] for v in (76, 50257)]
        c = build.preset(name)
        for page in ("docs/models.md", "docs/models.zh-CN.md"):
            assert f"| `{name}` | {c.n_layer} | {c.n_head} | {c.n_embd} | {c.block_size} | {counts[0]} | {counts[1]} |" in read(page)


def test_the_plan_in_the_documents_is_what_is_printed(capsys):
    run_plan(make_config("plan=true", "model=medium", "precision=fp16", "hardware=rtx3060_12gb", "model.vocab_size=76"), [])
    printed = " ".join(capsys.readouterr().out.split())
    for page in ("README.md", "docs/fit.md"):
        shown = read(page).partition("$ python run_train.py plan=true model=medium")[2].partition("```")[0]
        lines = [" ".join(line.split()) for line in shown.splitlines()[1:] if not line.startswith("vocabulary")]
        assert len(lines) > 5 and [line for line in lines if line not in printed] == []


@pytest.mark.parametrize("page", ["docs/models.md", "docs/models.zh-CN.md"])
def test_every_option_of_every_group_is_documented(page):
    text = read(page)
    for group, options in shipped_options().items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{group}` |"))
        for option in options:
            assert re.search(rf"\b{option}\b", row), (group, option)


def test_every_command_of_the_documents_is_understood(in_tmp):
    for name in ("my.txt", "my.jsonl", "prompts.txt", "prompt.txt"):
        (in_tmp / name).write_text(TEXT, encoding="utf-8")
    checked = set()
    # docs/extend.md 用的是读者自己的 yaml：下面的测试照它写出来再敲
    for script, words in commands("docs/nanogpt.ipynb", *(name for name in ENGLISH if name != "docs/extend.md")):
        if any(word.startswith(("--", "hydra/")) for word in words):
            # Hydra 自己的选项，与读者自己的 yaml
            continue
        if "experiment=search" in words:
            searching = searched([quoted(word, sweep=True) for word in words if word != "-m"])
            check_search(make_config(*searching, *implied_dataset(words), checked=False))
            checked.add((script, *words))
            continue
        # 扫描：每一项取第一个值
        typed_words = [word for word in words if word != "-m"]
        if "-m" in words:
            typed_words = [re.sub(r"=([\w.-]+),.*", r"=\1", word) for word in typed_words]
        overrides = [quoted(word) for word in typed_words]
        if script == "run_train.py":
            resumed = any(word.startswith("resume=") for word in words)
            make_config(*overrides, *implied_dataset(typed_words), checked=not resumed)
        else:
            make_sample_config(*overrides)
        checked.add((script, *words))
    assert len(checked) > 60
    assert all('pip install -c constraints.txt -e ".[dev]" && pytest' in read(readme) for readme in PAIRS[0])
    # 文档里的 torch 版本就是 constraints 里的：否则后一条 pip install 又换一遍
    named = {version for pair in PAIRS for name in pair for version in re.findall(r"torch==[\d.]+", read(name))}
    assert named == set(re.findall(r"^torch==\S+", read("constraints.txt"), flags=re.MULTILINE))


# 试跑、测批量要起子进程，扫描要好几次，网页要浏览器，GPT-2 XL 太大：各有自己的测试
ELSEWHERE = {"-m", "batch_size=auto", "experiment=fit", "experiment=gpt2_xl_8gb", "serve=true"}


@pytest.fixture
def type_command(in_tmp, corpus_folder):
    """Types a command of a page to its end, with little data and a tiny model; returns whether it is one that is."""
    poem = "春天的花朵今天气很好，夏夜。"
    (in_tmp / "my.txt").write_text(TEXT, encoding="utf-8")
    texts = [{"text": f"{poem}{poem[i % 9 :]}", "style": "七言绝句"} for i in range(80)]
    (in_tmp / "my.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
    talk = '{"instruction": "What is 1 + %d?", "output": "%d"}\n'
    (in_tmp / "talks.jsonl").write_text("".join(talk % (i, i + 1) for i in range(40)), encoding="utf-8")
    (in_tmp / "prompts.txt").write_text("The fox\nThe dog\n", encoding="utf-8")
    own = ["dataset=labelled", "dataset.path=my.jsonl", "dataset.dir=labelled"]
    # 诗在 npm 上：换成带同样标签的几句；剧本换成准备好的文字
    data = {"experiment=poetry": own, "dataset.path=my.jsonl": own, "dataset.path=my.txt": ["dataset.dir=mine"],
            "dataset=chat": ["dataset.dir=talks", "model.block_size=48"]}

    def type_it(script, words):
        if ELSEWHERE & set(words):
            return False
        if script == "run_sample.py":
            more = ["max_new_tokens=4", "fast=false", "unknown=skip"]
        elif any(word.startswith("resume=") for word in words):
            more = ["max_iters=6"]
        else:
            more = [*QUICK, *next((data[word] for word in words if word in data), [f"dataset.dir={corpus_folder}"])]
        typed(script, in_tmp, *words, *more, lines="The\n")
        return True

    return type_it


def test_the_commands_of_the_readme_are_typed_to_their_end(type_command):
    assert sum(type_command(*command) for command in commands("README.md")) >= 12


def test_the_page_on_conversations_leads_from_a_file_to_an_answer(type_command):
    assert sum(type_command(script, words) for script, words in commands("docs/chat.md") if "experiment=finetune_qwen" not in words) == 3


def test_the_notebook_runs_cell_by_cell_in_both_languages(in_tmp, type_command, capsys):
    notebook, shells = json.loads(read("docs/nanogpt.ipynb")), []
    assert notebook["nbformat"] == 4 and all(cell["id"] for cell in notebook["cells"])
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            assert re.search(r"[一-鿿]", text) and re.search(r"[A-Za-z]{4}", text), text

    def shell(line):
        words = shlex.split(line)
        shells.append(words)
        # 其余的与 README 里的相同，那里敲过
        if "out_dir=outputs/first" in words or "resume=outputs/first" in words:
            assert type_command(words[1], words[2:])

    names = {"shell": shell}
    for cell in (cell for cell in notebook["cells"] if cell["cell_type"] == "code"):
        assert cell["outputs"] == [] and cell["execution_count"] is None
        exec(re.sub(r"^( *)[!%](.*)$", r"\1shell(r'''\2''')", "".join(cell["source"]).replace('", "max_new', '", "unknown=skip", "max_new'), flags=re.MULTILINE), names)
    assert [words[:2] for words in shells[:3]] == [["git", "clone"], ["cd", "nanogpt"], ["pip", "install"]]
    assert [tuple(words[1:]) for words in shells[3:]] == [(script, *words) for script, words in commands("docs/nanogpt.ipynb")]
    assert (in_tmp / "first.zip").is_file() and torch.__version__ in capsys.readouterr().out


def test_the_image_copies_what_is_there_and_installs_as_the_documents_say():
    lines = [line for line in read("docs/Dockerfile").splitlines() if not line.startswith("#")]
    copied = {name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]}
    assert {"conf", "data", "nanogpt", "run_train.py", "run_sample.py", "setup.cfg", "setup.py", "README.md", "LICENSE"} <= copied
    assert all((ROOT / name).exists() for name in copied)
    kept = {line[1:].partition("/")[0] for line in read("docs/Dockerfile.dockerignore").splitlines() if line.startswith("!")}
    assert kept == copied
    (pip,) = (line.removeprefix("RUN ") for line in lines if "pip install" in line)
    assert pip.replace(" .", " -e .").replace(' "', ' -e "') in read("docs/serve.md")
    # 不用 root，两个卷归那个用户
    assert lines.index("USER nanogpt") > lines.index(f"RUN {pip}") and 'VOLUME ["/work/data", "/work/outputs"]' in lines
    arguments = {line.split()[1].partition("=")[0] for line in lines if line.startswith("ARG ")}
    assert arguments == set(re.findall(r"--build-arg (\w+)=", read("docs/machines.md")))


def test_the_pages_of_settings_are_what_the_code_and_the_yaml_say():
    found = importlib.util.spec_from_file_location("settings", ROOT / "docs" / "settings.py")
    settings = importlib.util.module_from_spec(found)
    found.loader.exec_module(settings)
    for name, language in (("docs/settings.md", "en"), ("docs/settings.zh-CN.md", "zh")):
        assert read(name) == settings.page(language), "python docs/settings.py writes it anew"
    keys = re.findall(r"^\| `([\w.]+)`", read("docs/settings.md"), flags=re.MULTILINE)
    assert {"out_dir", "trial.margin", "memory.weights", "server.port", "finetune.rank", "optimizer.ns_steps", "sampler.min_p"} <= set(keys) and len(keys) > 100
    # 值由函数收的几组：schema 只说范围与意思，键要与 yaml 的一样
    for schema, file in (("AdamWConfig", "optimizer/adamw"), ("MuonConfig", "optimizer/muon"), ("SamplerConfig", "sampler/temperature")):
        named = yaml.safe_load(read(f"conf/{file}.yaml"))
        assert ["_target_", *getattr(settings, schema).__dataclass_fields__] == list(named)


def test_the_documented_python_runs_as_printed(own_run, capsys):
    (own_run / "my.txt").write_text(TEXT, encoding="utf-8")
    wrote, trained, model, planned = ({} for _ in range(4))
    for block, names in zip(blocks("docs/python.md", "python"), (wrote, trained, model, planned), strict=True):
        # 快速解码器第一次要编译几十秒
        exec(block.replace('("outputs/run")', '("outputs/run", "fast=false")'), names)
    said = capsys.readouterr().out
    keys = ("max_new_tokens=40", "seed=1", "fast=false")
    command = typed("run_sample.py", own_run, "start=the king", *keys).stdout
    assert command == "the king" + wrote["writer"].write("the king", *keys[:2]) + "\n"
    assert trained["losses"][-1] < trained["losses"][0] and model["logits"].shape == (1, 3, 65)
    assert planned["plan"].verdict == "fits" and "fits" in said
    assert set(nanogpt.__all__) <= set(dir(nanogpt)) and all(getattr(nanogpt, name).__doc__ for name in nanogpt.__all__)


def test_the_page_on_memory_shows_how_far_plans_are_from_what_a_card_measured():
    record = json.loads((ROOT / "benchmarks/results/card_nvidia_h100_80gb_hbm3.json").read_text(encoding="utf-8"))
    cases = list(record["items"]["memory"]["cases"].values())
    ran = [case for case in cases if case["ran"]]
    assert all((case["replanned"]["verdict"] != "does_not_fit") == case["ran"] for case in cases)
    for page in PAIRS[ENGLISH.index("docs/benchmarks.md")]:
        shown = read(page)
        for which, kind in (("replanned", "allocated"), ("replanned", "reserved"), ("expected", "reserved")):
            errors = sorted(abs(case[which][kind] / case[kind] - 1) for case in ran)
            assert f"{errors[len(errors) // 2]:.2%}" in shown and f"{errors[-1]:.2%}" in shown, (page, which, kind)
        counts = (len(cases), len(ran), *(len(record["items"][part]["cases"]) for part in ("smoke", "writing")))
        assert all(re.search(rf"\b{n}\b", shown) for n in counts) and record["items"]["smoke"]["ok"] and record["items"]["writing"]["ok"]


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
    assert "tokens/s" in run("run_train.py", *mine, "dataset=text_file", "dataset.path=my.txt", "dataset.dir=prepared", *quick, "plan=true").stdout
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
            # 承诺里说的次数：杀进程的按杀的次数
            shown = f"{record['figures'].get('kills', record['cases']) if name == 'kill' else record['cases']:,}"
            assert name == "sweeps" or shown in read(guide).partition("| test |")[0].partition("| 测试 |")[0], (name, shown)
