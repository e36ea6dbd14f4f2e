"""--help and --version: two readable pages that name everything, made from conf/ and the fields."""

import sys

import pytest
import yaml
from conftest import shipped_options
from rich.cells import cell_len

from nanogpt.__main__ import COMMANDS, SCRIPTS, main
from nanogpt.base.cli import run_script
from nanogpt.base.composing import SCHEMAS
from nanogpt.base.config import ROOT
from nanogpt.base.help import SECTIONS, commented


def asked(monkeypatch, capsys, *arguments, config_name="train"):
    """What run_<config_name>.py prints."""
    monkeypatch.setattr(sys, "argv", [f"run_{config_name}.py", *arguments])
    run_script(config_name, None)
    return capsys.readouterr().out


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("name", ["train", "sample"])
def test_help_fits_two_pages_and_names_every_key_group_and_option(name, language, monkeypatch, capsys):
    page = asked(monkeypatch, capsys, "--help", f"lang={language}", config_name=name)
    assert page.count("\n") <= 110 and max(map(cell_len, page.splitlines())) <= 80
    content = yaml.safe_load((ROOT / "conf" / f"{name}.yaml").read_text(encoding="utf-8"))
    keys = {key for key in content if key not in ("defaults", "hydra", "model", "trial", "server")}
    nested = {f"{part}.{key}" for part in ("trial", "server") for key in content.get(part, ())}
    groups = {group for entry in content["defaults"] if isinstance(entry, dict) for group in entry if " " not in group}
    assert keys <= set(SCHEMAS[name].__dataclass_fields__)
    for key in keys | nested | groups:
        assert f"\n  {key}=" in page, key
    options = shipped_options()
    # int8、int4 只有写作会
    assert {option for group in groups for option in options[group]} - set(page.split()) == ({"int8", "int4"} if name == "train" else set())


def test_every_key_stands_in_a_section_that_has_an_english_name():
    for name in SCHEMAS:
        assert {line.section for line in commented(ROOT / "conf" / f"{name}.yaml").values() if line.comment} <= set(SECTIONS)


def test_options_of_ones_own_are_in_the_help(tmp_path, monkeypatch, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "gated.yaml").write_text("name: gated\n", encoding="utf-8")
    assert " gated " in asked(monkeypatch, capsys, f"--config-dir={tmp_path}", "--help")


def test_the_version_is_ours_and_a_misspelt_flag_is_one_line(monkeypatch, capsys):
    said = asked(monkeypatch, capsys, "--version")
    assert said.startswith("nanogpt 0.1.0, torch 2.") and f"Python {sys.version_info.major}." in said
    # 缩写会落到 Hydra 自己的 --version、--help
    for typed, guess in (("--hlep", "--help"), ("--vers", "--version")):
        with pytest.raises(SystemExit, match="2"):
            asked(monkeypatch, capsys, typed)
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and typed in error and f"did you mean {guess}?" in error


@pytest.mark.parametrize(("typed", "said"), [("trian", "nanogpt trian: there is no such command (did you mean train?)"), ("foo", "nanogpt foo: there is no such command"), ("", "")])
def test_a_command_that_is_none_is_named_before_those_that_are(monkeypatch, capsys, typed, said):
    monkeypatch.setattr(sys, "argv", ["nanogpt", *typed.split()])
    with pytest.raises(SystemExit, match="2"):
        main()
    first, *rest = capsys.readouterr().err.splitlines()
    assert first == f"error: {said}" if typed else first.startswith("nanogpt train ")
    assert any(line.startswith("nanogpt sample ") for line in rest)


def test_the_program_names_what_it_can_do(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nanogpt", "--help"])
    main()
    said = capsys.readouterr().out
    assert all(f"nanogpt {program} " in said for program in ("prepare", *SCRIPTS, *COMMANDS))
    assert max(map(cell_len, said.splitlines())) <= 80
    monkeypatch.setattr(sys, "argv", ["nanogpt", "tarin"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "nanogpt train " in capsys.readouterr().err
