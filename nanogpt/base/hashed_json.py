"""Small json files that carry their own SHA-256, so that a changed digit is noticed before the file is used."""

# 自带 SHA-256 的小 json：改了一个数字、断电写坏了，读的时候就知道
# manifest.json、run.json、meta.json、sweep 的结果都这样写；大文件的摘要记在里面，由它们自己的读者去核对
# 摘要按排好序的键算，与缩进、换行无关；读不了统一抛 DamagedError，怎么补救由读的一方说

import hashlib
import json
from pathlib import Path
from typing import Any

from nanogpt.base.files import write_text
from nanogpt.base.language import text


class DamagedError(ValueError):
    """Why a file cannot be used, in a few words."""

    # 不是 ConfigError：只有读的一方知道它是谁的文件、还能用什么代替


class NewerError(DamagedError):
    """The file has a format that this version does not know yet."""

    # 单独一类：文件没有坏，该更新的是程序，不能说“删掉重来”


def digest_of(values: dict[str, Any]) -> str:
    """Hex SHA-256 of the values, however a file spells them."""
    told = {key: value for key, value in values.items() if key != "digest"}
    canonical = json.dumps(told, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def write_sealed(path: Path, values: dict[str, Any]) -> None:
    """Replace a json file atomically, with its digest."""
    write_text(path, json.dumps({**values, "digest": digest_of(values)}, indent=2, ensure_ascii=False))


def read_sealed(path: Path, newest: int) -> dict[str, Any]:
    """The values of a file of format 1 … newest without their digest; DamagedError says what is wrong.

    Format 1 has no digest yet.
    """
    values = read_object(path)
    version = values.get("format")
    if type(version) is not int or version < 1:
        raise DamagedError(f"{path.name}: no known format")
    # 先看版本：更新的格式怎么算摘要，这里并不知道
    if version > newest:
        raise NewerError(text(
            "{file}: has format {got}, this program reads up to {want}; update nanogpt",
            file=path.name, got=version, want=newest,
        ))
    if ("digest" in values or version > 1) and values.get("digest") != digest_of(values):
        raise DamagedError(f"{path.name}: SHA-256 differs")
    return {key: value for key, value in values.items() if key != "digest"}


def read_object(path: Path) -> dict[str, Any]:
    """A json object; DamagedError says what is wrong."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedError(f"{path.name}: missing") from None
    except (OSError, ValueError, RecursionError) as error:
        # 嵌套几万层的 json 会用尽解释器的栈
        raise DamagedError(f"{path.name}: {reason_of(error)}") from None
    if not isinstance(values, dict):
        raise DamagedError(f"{path.name}: not an object")
    return values


def reason_of(error: BaseException) -> str:
    """What an error says in one short line."""
    said = getattr(error, "strerror", None) or " ".join(str(error).split())[:160]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
