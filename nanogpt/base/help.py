"""--help and --version of the run scripts: usage, groups, and every key with its default and meaning, in two pages."""

# 两个脚本的 --help：用法、配置组与选项、每个键的默认值与含义，按 conf/ 的 yaml 分节，两页之内
# 中文就是 yaml 里的注释，英文就是字段旁的说明：没有第三份文字，docs/settings.py 也从这里取
# 选项在运行时从 conf/ 与使用者自己的文件夹里数；不导入 torch，也不拼配置
# Hydra 自己的帮助在 --hydra-help

import ast
import functools
import importlib.metadata
import inspect
import platform
import re
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import yaml

from nanogpt.base.composing import SCHEMAS, options_of
from nanogpt.base.config import ROOT, keys
from nanogpt.base.language import current_language, text
from nanogpt.base.quoting import command

WIDTH, LEFT = 80, 26
# 一个键最多说两行：更长的在 docs/settings.md
LINES = 2
# 一项写在哪一节：yaml 里的中文 -> 英文
SECTIONS = {
    "在哪里、怎么跑": "where and how to run", "训练循环": "the training loop",
    "评估、日志、保存": "evaluation, log, saving", "试跑": "trials: experiment=fit with -m",
    "用哪个模型": "which model", "写什么": "what to write", "怎么写": "how to write",
    "网页与 API": "page and API", "监听的地址与每个请求的上限": "address of the server, and limits of a request",
}
CLOSING = "，。；：、）”》？！"
LINE = re.compile(
    r"^(?:# -+ (?P<section>.*?) *-+|(?P<indent> *)(?P<key>\w+):(?: +(?P<default>[^\s#].*?))?(?: +# (?P<comment>.*))?)$",
    flags=re.MULTILINE,
)


# ---- 每个键的说明 ----


@dataclass(frozen=True)
class Line:
    """A key of a yaml with its default, its Chinese comment and the section that it stands in."""

    # 次序与分节照 yaml：人们在那里读

    key: str
    default: str
    comment: str
    section: str


def commented(file: Path) -> dict[str, Line]:
    """Dotted key -> its line, for every key of a yaml that has a default; Hydra's own are left out."""
    found, section, prefix = {}, "", ""
    for line in LINE.finditer(file.read_text(encoding="utf-8")):
        key, default, comment = line["key"], line["default"], line["comment"]
        if line["section"]:
            section = re.sub(r"（.*）", "", line["section"])
            continue
        if not line["indent"]:
            prefix = ""
        if default is None and not line["indent"]:
            # 一组键的开头，它的注释是这一节的名字
            prefix, section = f"{key}.", re.split("：", comment or "")[0]
        elif default is not None and prefix != "hydra.":
            found[prefix + key] = Line(prefix + key, default, comment or "", section)
    return found


@functools.cache
def described(schema: type) -> dict[str, str]:
    """Field -> the sentences below it."""
    body = ast.parse(inspect.getsource(schema)).body[0].body
    pairs = ((a, b) for a, b in pairwise(body) if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr))
    return {a.target.id: " ".join(b.value.value.split()).replace("None", "null") for a, b in pairs}


def meaning(line: Line, schema: type, language: str) -> str:
    """What a key is for; `schema` is that of the key's file."""
    if language == "zh":
        return line.comment
    part, _, name = line.key.rpartition(".")
    return described(dict(keys(schema))[part].type if part else schema)[name]


# ---- 排版 ----


def columns(written: str) -> int:
    """The columns of a terminal that a text takes: two for each Chinese character."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in written)


def wrapped(written: str, width: int) -> list[str]:
    """Lines of at most `width` columns, broken at spaces and between Chinese characters."""
    lines = [""]
    # 逗号、句号不能排在行首：与前一个字绑在一起
    for piece in re.findall(rf"[（“《]?(?:[一-鿿]|[^\s一-鿿（“《{CLOSING}]+)?[{CLOSING}]*| +", written):
        if columns(lines[-1] + piece) > width and lines[-1]:
            lines.append(piece.lstrip())
        else:
            lines[-1] += piece
    return [line.rstrip() for line in lines]


def shortened(written: str, width: int) -> list[str]:
    """The whole of a text if it takes at most two lines, else as many of its clauses as do."""
    # 注释用；分句，英文用 ; 与句号
    ends = [found.start() for found in re.finditer(r"；|; |\. |$", written)]
    whole = [lines for end in ends if len(lines := wrapped(written[:end].rstrip("."), width)) <= LINES]
    return whole[-1] if whole else wrapped(written[: ends[0]], width)


def rows(left: str, lines: list[str]) -> Iterator[str]:
    """Lines of the right column, the first one behind what stands in the left one."""
    if columns(left) > LEFT - 4:
        yield f"  {left}"
        left = ""
    for line in lines:
        yield f"  {left}{' ' * (LEFT - 2 - columns(left))}{line}".rstrip()
        left = ""


# ---- 两页 ----


def help_page(config_name: str) -> str:
    """Usage, groups and keys of run_<config_name>.py in the console's language."""
    file = ROOT / "conf" / f"{config_name}.yaml"
    usage = text("usage: {command} [key=value …] [group=option …] [-m]", command=command(f"run_{config_name}.py"))
    said = [usage, "", *_examples(config_name), ""]
    said += [text("groups (--cfg job shows the keys of what is chosen):"), *_groups(file, SCHEMAS[config_name])]
    section = None
    # 没有注释的只是转交给 model
    for line in (line for line in commented(file).values() if line.comment):
        if line.section != section:
            section = line.section
            said += ["", f"{section}：" if current_language() == "zh" else f"{SECTIONS[section]}:"]
        default = re.sub(r"\$\{oc\.env:\w+,(\w+)\}", r"\1", line.default)
        right = shortened(meaning(line, SCHEMAS[config_name], current_language()), WIDTH - LEFT)
        said += rows(f"{line.key}={default}", right)
    more = text(
        "more: --cfg job (the whole configuration), --version, --hydra-help (flags of Hydra); docs/settings.md has the "
        "keys of the groups too"
    )
    return "\n".join([*said, "", *wrapped(more, WIDTH)])


def _examples(config_name: str) -> Iterator[str]:
    """What people type first, with what it does."""
    script = f"run_{config_name}.py"
    if config_name == "train":
        found = {
            (): text("a first run, a minute"),
            ("dataset.path=my.txt",): text("your own text"),
            ("model=medium", "plan=true"): text("does it fit? how long?"),
            ("-m", "learning_rate=5e-3,1e-2"): text("one training for each value"),
            ("resume=latest", "max_iters=1000"): text("train on, after a crash too"),
        }
    else:
        found = {
            ("start=Once",): text("write with the newest run"),
            ("num_samples=3", "sampler=top_p"): text("three texts"),
            ("interactive=true",): text("type a beginning and read on"),
            ("prompts=prompts.txt",): text("a text for each of its lines"),
            ("serve=true",): text("a page, and OpenAI's API"),
        }
    typed = {command(script, *words): what for words, what in found.items()}
    left = max(map(columns, typed)) + 2
    for line, what in typed.items():
        together = f"  {line}{' ' * (left - columns(line))}{what}"
        # nanogpt 不在 PATH 上时，命令里有整条路径
        yield from [together] if columns(together) <= WIDTH else [f"  {line}", f"      {what}"]


def _groups(file: Path, schema: type) -> Iterator[str]:
    """The groups of a yaml's defaults list, each with its default and all options, the user's own included."""
    for entry in yaml.safe_load(file.read_text(encoding="utf-8"))["defaults"]:
        if isinstance(entry, dict) and (options := options_of(schema, group := next(iter(entry)))):
            default = "null" if entry[group] is None else entry[group]
            yield from rows(f"{group}={default}", wrapped(" ".join(options), WIDTH - LEFT))


def versions() -> str:
    """The versions of nanogpt, torch and Python; torch is not imported for that."""
    # 写成 import，会连同它惰性导入的上层房间一起算进来
    own = sys.modules["nanogpt"].__version__
    return f"nanogpt {own}, torch {importlib.metadata.version('torch')}, Python {platform.python_version()}"
