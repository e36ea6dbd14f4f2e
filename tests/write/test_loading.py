"""run_sample.py: from a run folder to text."""

import dataclasses
import re
import subprocess
import sys

import pytest
from conftest import make_sample_config
from typed import ENVIRONMENT, typed

from nanogpt.base.config import ROOT
from nanogpt.base.language import ConfigError
from nanogpt.base.sample_config import check_sample
from nanogpt.write import loading


def sample(folder, *overrides, expect=0, python_path=None):
    """python run_sample.py in this process."""
    return typed("run_sample.py", folder, *overrides, expect=expect, python_path=python_path)


def test_the_command_writes_text_and_only_text(own_run):
    # fast=false：第一次编译快速解码器时 stderr 会说一声
    arguments = ["start=the king and", "num_samples=2", "max_new_tokens=40", "fast=false"]
    # 一次在自己的进程里：stderr 上没有任何库的话
    done = subprocess.run([sys.executable, str(ROOT / "run_sample.py"), *arguments], cwd=own_run, env=ENVIRONMENT, capture_output=True, text=True, encoding="utf-8", timeout=90)
    one, two = done.stdout.split("-" * 40 + "\n")
    assert re.fullmatch(r"writing with \S+: iter \d+, val loss \d+\.\d{4} \(\d\.\d{3} bpb\), tiny \(\d\.\d\dM( \+ \d\.\d\dM in look-up tables)?\)\n", done.stderr) and one.startswith("the king and") and two.startswith("the king and")
    assert len(one) == len("the king and") + 41 and one != two
    assert done.returncode == 0 and sample(own_run, *arguments).stdout == done.stdout


def test_characters_that_the_vocabulary_lacks_are_one_line(own_run):
    done = sample(own_run, "start=春, x", "fast=false", expect=2)
    assert "the vocabulary lacks ',' 'x' '春'; leave them out, pass over them with unknown=skip, or" in done.stderr and done.stderr.count("\n") == 1
    skipped = sample(own_run, "start=春", "unknown=skip", "fast=false", expect=2).stderr
    assert "start='春': the vocabulary has none of its characters" in skipped and skipped.count("\n") == 1


@pytest.mark.parametrize(("change", "message"), [
    ({"num_samples": 0}, "num_samples=0"), ({"temperature": -1.0}, "temperature=-1.0"), ({"start": "a", "starts": ["b"]}, "name prompts twice"), ({"stop": [""]}, "stop holds"),
    ({"serve": True, "output": "a.jsonl"}, "leave out output"), ({"unknown": "maybe"}, "unknown=maybe"), ({"device": "tpu"}, "device=tpu"), ({"lang": "xx"}, "lang=xx"),
])
def test_bad_settings_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        check_sample(dataclasses.replace(make_sample_config(), **change))


def test_prompts_come_from_files_too(tmp_path):
    (tmp_path / "p.txt").write_text("春天\n", encoding="gb18030")
    assert loading.prompt_text(f"FILE:{tmp_path / 'p.txt'}") == "春天"
    with pytest.raises(ConfigError, match="start=FILE:nothing.txt"):
        loading.prompt_text("FILE:nothing.txt")


def test_mistakes_are_one_line(in_tmp):
    done = sample(in_tmp, expect=2)
    assert done.stderr.startswith("error: out_dir=") and done.stderr.count("\n") == 1
    done = sample(in_tmp, "max_new_token=3", expect=2)
    assert "did you mean max_new_tokens?" in done.stderr and "conf/sample.yaml" in done.stderr
