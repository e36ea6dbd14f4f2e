# 装好的包与仓库里的程序是同一个：这里真的打一个 wheel、装到别处、从另一个文件夹里用
"""The wheel: what it holds, and that it works without the repository."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY, corpus_text

from nanogpt.base import quoting
from nanogpt.base.config import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder in which the wheel is installed, without its dependencies."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for pattern in ("*.md", "*.cfg", "*.toml", "*.py", "LICENSE", "nanogpt/**/*.*", "conf/**/*.yaml", "data/*/prepare.py"):
        for file in (file for file in ROOT.glob(pattern) if file.suffix != ".pyc"):
            (source / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, source / file.relative_to(ROOT))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-compile", "--target", str(target), str(source)]
    subprocess.run(pip, check=True)
    return target


def run_elsewhere(installed: Path, folder: Path, *words: str) -> str:
    """What a program prints that knows only the installed package, started in `folder`."""
    found = {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "PATH": f"{installed / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(words, cwd=folder, env={**os.environ, **found}, capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_what_the_repository_has_at_its_top_level(installed):
    shipped = installed / "nanogpt" / "shipped"
    for file in [*ROOT.glob("conf/**/*.yaml"), *ROOT.glob("data/*/prepare.py"), ROOT / "run_train.py", ROOT / "run_sample.py"]:
        assert (shipped / file.relative_to(ROOT)).read_bytes() == file.read_bytes()
    for file in (file for file in (ROOT / "nanogpt").rglob("*.*") if file.parent.name != "__pycache__"):
        assert (installed / file.relative_to(ROOT)).is_file(), file
    assert not (installed / "conf").exists() and not (installed / "run_train.py").exists()


def test_an_installed_nanogpt_trains_and_writes_in_the_current_folder(installed, tmp_path):
    (tmp_path / "my.txt").write_text(corpus_text(), encoding="utf-8")
    here = ("dataset=text_file", "dataset.path=my.txt", "logger=none", "device=cpu", "max_iters=2", "batch_size=2", "sample_tokens=0", "lang=en")
    said = run_elsewhere(installed, tmp_path, "nanogpt", "train", *TINY, *here, "out_dir=outputs/run")
    assert "nanogpt sample out_dir=outputs/run" in said and "nanogpt train resume=outputs/run" in said
    assert {path.name for path in tmp_path.iterdir()} == {"my.txt", "data", "outputs"} and list(tmp_path.glob("data/text_file/my-*/meta.json"))
    code = "import sys, nanogpt; print(nanogpt.__file__); nanogpt.tiny(vocab_size=65); sys.argv[1:] = ['sample', 'max_new_tokens=4', 'fast=false', 'start=the', 'lang=en']"
    written = run_elsewhere(installed, tmp_path, sys.executable, "-c", f"{code}; from nanogpt.__main__ import main; main()")
    file, _, text = written.partition("\n")
    assert Path(file).is_relative_to(installed) and text.startswith("the") and len(text) == 8


@pytest.mark.parametrize(("typed", "expected"), [
    ("/usr/bin/nanogpt", "nanogpt sample top_k=3"), ("/other/bin/nanogpt", "/other/bin/nanogpt sample top_k=3"),
    ("/lib/nanogpt/__main__.py", "python -m nanogpt sample top_k=3"), ("../n/run_train.py", "python ../n/run_sample.py top_k=3"),
])
@pytest.mark.skipif(sys.platform == "win32", reason="paths of POSIX")
def test_a_printed_command_fits_the_way_in_which_the_program_was_started(monkeypatch, typed, expected):
    monkeypatch.setattr(sys, "argv", [typed])
    monkeypatch.setattr(quoting.shutil, "which", lambda name: "/usr/bin/nanogpt")
    assert quoting.command("run_sample.py", "top_k=3") == expected
