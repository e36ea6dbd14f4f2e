"""best.yaml: the fastest setting of a sweep as a Hydra config that a normal training takes with +fit=best."""

from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from nanogpt.base import quoting
from nanogpt.base.files import write_text
from nanogpt.base.language import text
from nanogpt.base.user_yaml import conf_folders, is_group
from nanogpt.sweep.result import TrialResult

# 试跑自己的，或会拦住正常训练的键
LEFT_OUT = ("experiment", "trial", "hydra", "out_dir", "overwrite", "resume", "checkpoint", "plan", "lang")


def recipe(result: TrialResult) -> str:
    """The yaml of one result: group choices as overrides of the defaults list, everything else as plain keys."""
    groups, values = [], {}
    for override in OverridesParser.create().parse_overrides(list(result.overrides)):
        key = override.key_or_group
        if key.split(".")[0].split("/")[0] in LEFT_OUT or override.is_delete():
            continue
        if is_group(key):
            # 新加的组（+组=项）不在默认列表里，不能写成 override
            groups.append({key if override.is_add() else f"override /{key}": override.value()})
        else:
            _put(values, key.split("."), _plain(override.value()))
    if result.micro_batch:
        # 没有敲过的也写明：换了默认值，这份设置仍是测过的那个
        values["batch_size"] = result.micro_batch
    # 设备名里若有换行，注释就断成了配置
    header = " ".join(text(
        "The fastest setting of a sweep: {speed:,.0f} tokens/s, {held:.2f} GiB on {device}",
        speed=result.tokens_per_s or 0.0, held=result.held_gib or 0.0, device=result.device or "-",
    ).split())
    body = yaml.safe_dump({**({"defaults": groups} if groups else {}), **values}, allow_unicode=True, sort_keys=False)
    return f"# @package _global_\n# {header}\n{body}"


def _put(node: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        node = node.setdefault(part, {})
    node[path[-1]] = value


def _plain(value: Any) -> Any:
    """Hydra's own parsed types (quoted strings) as plain values."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value if isinstance(value, int | float | bool | None) else str(getattr(value, "text", value))


def write_recipe(result: TrialResult, folders: list[Path]) -> None:
    """Write <folder>/fit/best.yaml into every folder."""
    for folder in folders:
        (folder / "fit").mkdir(parents=True, exist_ok=True)
        write_text(folder / "fit" / "best.yaml", recipe(result))


def command(result: TrialResult, folder: Path) -> str:
    """What to type to train with the recipe in `folder`."""
    under = [quoting.override("experiment", result.experiment)] if result.experiment else []
    # --config-dir 只能写一个：自己的 yaml 所在的，另外给出
    own = [quoting.in_quotes(f"file://{own.absolute()}") for own in conf_folders()[1:] if own.resolve() != folder.resolve()]
    searched = [f"hydra.searchpath=[{','.join(own)}]"] if own else []
    return quoting.command("run_train.py", "--config-dir", folder.as_posix(), *searched, *under, "+fit=best")
