"""Quoting for command lines: typed words for Hydra's grammar, and printed commands for the shell in use.

Needs no torch and no Hydra.
"""

# 命令行的两头：敲下的字怎样原样过 Hydra 的语法，打印的命令怎样粘贴进 shell 就能跑
# Hydra 把反斜杠当转义、逗号当扫描、引号吃掉，词法只认 ASCII：路径与文字在交给它之前由 quoted 加引号
# 反过来，补救与“下一步”里的命令由 command、override 写，再由 word 按 sh、PowerShell、cmd 各自的规矩加引号
# 两头要对得上：打印的再敲回去，得到同一个值（有测试）

import os
import re
import shutil
import sys
from pathlib import Path

from nanogpt.base.config import PATH_KEYS, ROOT, TEXT_KEYS

# 已经带引号的一段，照原样
QUOTED = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\""""
# -m 时逗号隔开的一个路径：加了引号的照 Hydra 读，其中可有逗号
SWEPT_PATH = rf"(?:^|(?<=,))\s*((?:{QUOTED})(?=\s*(?:,|$))|[^,]*)"
# -m 时路径也可以这样列出；glob 只认得配置组的选项
CHOSEN = re.compile(r"(choice|shuffle|sort|tag)\(.*\)")
# 列表或扫描里含有非 ASCII 字符的一项
NON_ASCII_ITEM = r"[^,\[\]{}()'\"]*[^\x00-\x7f][^,\[\]{}()'\"]*"
# 用不着引号的值；数与 true 一类照打，Hydra 自会认
PLAIN_VALUE = r"[\w.+-]+(?:/[\w.+-]+)*"
# 各 shell 里用不着引号的字
PLAIN_WORDS = {"sh": r"[\w@%+=:,./-]+", "powershell": r"[\w+=:./\\-]+", "cmd": r"[\w@+=:./\\-]+"}
SCRIPTS = ("run_train.py", "run_sample.py")


# ---- 敲下的 -> Hydra ----


def quoted(argument: str, *, sweep: bool = False) -> str:
    """A command-line argument as Hydra's grammar reads it, so that paths and texts arrive as they were typed.

    Unquoted, its lexer knows ASCII only, and takes commas for a sweep and backslashes for escapes. A path typed in
    quotes is left to it; in a sweep, commas separate paths. A text is never a sweep, and its quotes belong to it.
    """
    key, _, value = argument.partition("=")
    name = key.lstrip("+")
    # 说明里写的 null 是“没有”，不是文字
    if not value or value == "null":
        return argument
    if name in TEXT_KEYS:
        return f"{key}={in_quotes(literal(value))}"
    if name == "stop" and value[0] != "[":
        # 与互动写作的 /stop 一样：不是列表就是一个停止词
        return f"{key}=[{in_quotes(literal(value))}]"
    if name in PATH_KEYS and not (sweep and CHOSEN.fullmatch(value)):
        paths = [path.rstrip() for path in re.findall(SWEPT_PATH, value)] if sweep else [value]
        return f"{key}={','.join(p if re.fullmatch(QUOTED, p) else in_quotes(p) for p in paths)}"
    if value[0] in "'\"":
        return argument
    # 逗号与括号留给 Hydra：列表、扫描里的每个中文项分别加引号
    items = re.compile(f"({QUOTED})|{NON_ASCII_ITEM}")
    return f"{key}={items.sub(lambda item: item[1] or in_quotes(item[0]), value)}"


def in_quotes(value: str) -> str:
    """A value in quotes that Hydra's grammar reads back unchanged."""
    # 只有引号前的反斜杠是转义：它们双写
    return "'" + re.sub(r"(\\*)('|\Z)", _escape, value) + "'"


def _escape(found: re.Match) -> str:
    """Backslashes and the quote that may follow them, as they are written between quotes of that kind."""
    return found[1] * 2 + (f"\\{found[2]}" if found[2] else "")


def literal(value: str) -> str:
    """A text in which OmegaConf finds no reference: ${ stays as it is."""
    return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + "\\${", value)


# ---- 程序打印的 -> shell ----


def command(name: str, *words: str) -> str:
    """`python run_train.py …` with these words, to be pasted into the shell in use; overrides come from `override`.

    `nanogpt train …` or `python -m nanogpt train …` if this process was started that way.
    """
    said = " ".join(map(word, (*started(name), *words)))
    # PowerShell 把打头的引号当成一个值，要说 & 才运行它
    return f"& {said}" if shell_in_use() == "powershell" and said.startswith("'") else said


def started(name: str) -> list[str]:
    """The words that start a run script in the way this process was started."""
    typed, program = Path(sys.argv[0]), name.removeprefix("run_").removesuffix(".py")
    if typed.stem == "nanogpt":
        found = shutil.which("nanogpt")
        # 不在 PATH 上的要写全；Windows 的启动器时有 .exe、时无
        named = "nanogpt" if found and Path(found).with_suffix("") == typed.with_suffix("") else str(typed)
        return [named, program]
    if typed.parts[-2:] == ("nanogpt", "__main__.py"):
        return ["python", "-m", "nanogpt", program]
    return ["python", script(name)]


def script(name: str) -> str:
    """The path of a run script from here: beside the one that was typed, if one was."""
    if (typed := Path(sys.argv[0])).name in SCRIPTS:
        return str(typed.with_name(name))
    return name if Path(name).is_file() else str(ROOT / name)


def override(key: str, value: object) -> str:
    """key=value as it has to be typed to mean this value, not yet quoted for a shell."""
    if value is None:
        return f"{key}=null"
    typed = str(value)
    if key in PATH_KEYS:
        # 整个在引号里的、null、~/ 另有含义
        apart = typed == "null" or typed[:1] in ("'", '"', "~")
        return f"{key}={'./' if apart else ''}{literal(typed)}"
    if key in TEXT_KEYS or re.fullmatch(PLAIN_VALUE, typed, re.ASCII):
        return f"{key}={typed}"
    return f"{key}={in_quotes(literal(typed))}"


def key_of_override(override: str) -> str:
    """`+model.extra.x=1` -> `model.extra.x`."""
    return override.split("=", 1)[0].lstrip("+~").split("@")[0]


def typed_override(key: str, value: object) -> str:
    """The same, quoted for the shell in use: for a remedy within a sentence."""
    return word(override(key, value))


def word(typed: str, shell: str | None = None) -> str:
    """One word for sh, powershell or cmd (default: the shell in use)."""
    shell = shell or shell_in_use()
    if re.fullmatch(PLAIN_WORDS[shell], typed):
        return typed
    if shell == "sh":
        # 有单引号而没有别的讲究时，双引号好读
        readable = "'" in typed and not re.search(r'[$`"\\!]', typed)
        return f'"{typed}"' if readable else "'" + typed.replace("'", "'\"'\"'") + "'"
    if shell == "powershell":
        # 弯引号在 PowerShell 里也是引号
        return "'" + re.sub("(['\u2018\u2019\u201a\u201b])", r"\1\1", typed) + "'"
    # 里面的双引号写两个：写成 \" 的话，cmd 以为引号到此为止，后面的 & 与 > 就当真了
    # 引号里的 %名字% 仍会被换掉：把 % 放到引号外面
    return "^%".join(
        '"' + re.sub(r'(\\*)("|\Z)', lambda found: found[1] * 2 + found[2] * 2, part) + '"' for part in typed.split("%")
    )


def shell_in_use() -> str:
    """sh, powershell or cmd, as far as the environment tells."""
    if os.name != "nt":
        return "powershell" if "PSModulePath" in os.environ else "sh"
    if "MSYSTEM" in os.environ:
        # Git Bash
        return "sh"
    # cmd 把提示符放进环境，PowerShell 不放
    return "cmd" if "PROMPT" in os.environ else "powershell"
