# 房间的规则写在 pyproject.toml 里；这里让它随测试一起跑，谁往上导入就在这里知道
"""The rooms of the package: each imports only those below it."""

import importlib.util
import re

from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

from nanogpt.base.config import ROOT


def test_a_room_imports_only_rooms_below_it(capsys):
    status = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert status == EXIT_STATUS_SUCCESS, capsys.readouterr().out


def test_the_core_can_be_read_in_one_sitting():
    files = ("model", "attention", "kv_cache", "loss", "sampling", "generate", "optimizers", "step", "trainer")
    texts = {name: (ROOT / "nanogpt" / "core" / f"{name}.py").read_text(encoding="utf-8") for name in files}
    assert sum(text.count("\n") for text in texts.values()) < 1500


def test_no_test_is_skipped_because_a_module_of_our_own_is_missing():
    # 搬了家的模块，importorskip 找不到就跳过：整个文件的测试从此不跑，谁也不知道；conftest.kernels 只为 numba 跳过
    skips = [path.name for path in (ROOT / "tests").rglob("*.py") if re.search(r"importorskip\(f?.nanogpt", path.read_text(encoding="utf-8"))]
    assert not skips


def test_the_map_of_the_code_says_what_the_files_say_of_themselves():
    spec = importlib.util.spec_from_file_location("code_map", ROOT / "docs" / "code_map.py")
    code_map = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code_map)
    for lang, page in code_map.PAGES.items():
        assert code_map.written(lang) == page.read_text(encoding="utf-8"), "run python docs/code_map.py"
        rows = [line for line in code_map.table(lang).splitlines() if line.startswith("| `")]
        assert len(rows) > 100 and all(len(row.split(" | ")[1]) > 10 for row in rows)
