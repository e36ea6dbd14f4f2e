"""The command line of python -m nanogpt.control: evaluate writes texts and judges them, plot draws the record."""

# 评估的命令行：evaluate 写、判、数，plot 照存下的记录重画
# 能马上查的都先查：参数、输出写不写得进、图的后缀，几小时的写作之后才不会白费
# key=value 的参数是 conf/sample.yaml 的覆盖，与 --选项混着写也分得开；评估自己决定的键不许写
# 真正的入口是 nanogpt/control.py，名字不随模块搬家而变

import argparse
import json
import re
import sys
from pathlib import Path

from nanogpt.base import run_names
from nanogpt.base.config import check_range
from nanogpt.base.errors import Arguments, forgive_output, one_line_each
from nanogpt.base.files import check_writable, folders_around, write_text
from nanogpt.base.groups import sample_config
from nanogpt.base.language import ConfigError, language_from_arguments, set_language, show, text
from nanogpt.base.quoting import key_of_override, quoted, word
from nanogpt.base.sample_config import SampleConfig, check_sample
from nanogpt.base.value_checks import check_path
from nanogpt.data.labels import LABEL_KINDS
from nanogpt.write.control.codes import GUIDANCE

# 评估自己决定的键
OWN_KEYS = (
    "out_dir", "init_from", "start", "prompts", "num_samples", "stop_at_end_of_text", "output", "interactive", "serve",
    "server", "control",
)
# 与 conf/sample.yaml 不同的默认值：诗都不长，并排多写几段
DEFAULTS = {"max_new_tokens": 300, "batch_size": 64}
DIAL = (1.0, 1.5, 2.0, 3.0, 4.0)
OVERRIDE = re.compile(r"[+~]{0,2}[a-z_][\w.]*=")

DESCRIPTION = (
    "Does the control work? Write texts of every style or emotion that a model knows, have a judge count the hits, "
    "draw the dial."
)
EPILOG = """\
columns: hits and hit rate: texts that the judge gives the label that was asked for; 95%: Wilson interval;
real: the same judge on real texts that it has not seen; distinct-n: different n-grams of characters / all of them
(white space left out); known pairs: share of neighbouring Chinese characters that stand side by side in the training
texts too (characters at random have few); copies: texts that share 20 characters in a row with a training text
(white space left out); length: characters; finished: ended by themselves before max_new_tokens. Other arguments are
overrides of conf/sample.yaml, for example: sampler=top_p temperature=0.9 seed=1 max_new_tokens=200 batch_size=64
device=cpu checkpoint=last
"""


def main(arguments: list[str] | None = None) -> None:
    """The command line; exit code 2 on a mistake."""
    forgive_output()
    options, overrides = split(sys.argv[1:] if arguments is None else arguments)
    set_language(language_from_arguments(overrides))
    # 被 Ctrl-C 打断时，写完的设置都已在 --output 里
    with one_line_each():
        typed = parser().parse_args(options)
        set_language(typed.lang if typed.lang != "auto" else language_from_arguments(overrides))
        (run_plot if typed.command == "plot" else run_evaluate)(typed, overrides)


def parser() -> argparse.ArgumentParser:
    """The parser of evaluate and plot."""
    top = Arguments(prog="python -m nanogpt.control", description=DESCRIPTION)
    commands = top.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "evaluate", help="write, judge, count", epilog=EPILOG, usage="%(prog)s OUT_DIR [options] [key=value …]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("out_dir", metavar="OUT_DIR", help="run folder, or latest")
    command.add_argument("--samples", type=int, default=100, help="texts for each label (default 100)")
    first_kind = "which labels (default: the first kind that the model has)"
    command.add_argument("--kind", choices=LABEL_KINDS, help=first_kind)
    dial = "values of control.guidance (default 1; with --plot 1 1.5 2 3 4)"
    command.add_argument("--guidance", type=float, nargs="+", help=dial)
    baseline = "also control=prefix and control=none, as run_sample.py writes with them"
    command.add_argument("--baseline", action="store_true", help=baseline)
    command.add_argument("--output", type=Path, metavar="FILE.json", help="everything as json")
    command.add_argument("--texts", action="store_true", help="keep the texts in --output")
    drawn = "draw hit rate and perplexity against guidance"
    command.add_argument("--plot", type=Path, metavar="FILE.png|.svg", help=drawn)
    drawing = commands.add_parser("plot", help="draw what evaluate --output wrote")
    drawing.add_argument("source", metavar="FILE.json", type=Path)
    drawing.add_argument("target", metavar="FILE.png|.svg", type=Path)
    command.add_argument("--config-dir", help="folder with yamls of your own")
    for one in (command, drawing):
        one.add_argument("--lang", default="auto", choices=("auto", "zh", "en"))
    return top


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """(options and positionals, overrides of conf/sample.yaml).

    What follows an option that takes a file is its value, even if it looks like an override.
    """
    values = ("--output", "--plot", "--config-dir")
    is_override = [bool(OVERRIDE.match(a)) and not (i and arguments[i - 1] in values) for i, a in enumerate(arguments)]
    return [a for a, o in zip(arguments, is_override) if not o], [a for a, o in zip(arguments, is_override) if o]


def config_of(overrides: list[str]) -> SampleConfig:
    """The checked configuration of the texts."""
    typed = [*map(key_of_override, overrides)]
    for key in typed:
        if key.split(".")[0] in OWN_KEYS:
            raise ConfigError("evaluate_own_key", key=key)
    defaults = [f"{key}={value}" for key, value in DEFAULTS.items() if key not in typed]
    cfg = sample_config([*defaults, *map(quoted, overrides)])
    check_sample(cfg)
    return cfg


def run_evaluate(typed: argparse.Namespace, overrides: list[str]) -> None:
    """Check everything that can be checked at once, then write and judge."""
    guidance = list(dict.fromkeys(typed.guidance or (DIAL if typed.plot else (1.0,))))
    check_range("--samples", typed.samples, 1, 10**6)
    for key, value in (("OUT_DIR", typed.out_dir), ("--output", typed.output), ("--plot", typed.plot)):
        check_path(key, str(value or "-"))
    for value in guidance:
        check_range("--guidance", value, *GUIDANCE)
    cfg, run_dir = config_of(overrides), run_names.locate(typed.out_dir, key="OUT_DIR")
    if typed.plot:
        check_target(typed.plot, "--plot")
        _picture().check_picture(typed.plot)
    if typed.output:
        check_target(typed.output, "--output")
    from nanogpt.write.judge import evaluate, table
    from nanogpt.write.judge.judges import check_package

    check_package()

    def tell(part: str, record: dict) -> None:
        show("\n".join(table.heading(record) if part == "real" else table.result(record)))
        if typed.output:
            # 每个设置一写完就存：中途停下也不白等
            with folders_around(typed.output):
                write_text(typed.output, json.dumps(record, indent=1, ensure_ascii=False) + "\n")

    asked = evaluate.EvaluationOptions(typed.samples, guidance, baseline=typed.baseline, keep_texts=typed.texts)
    record = evaluate.evaluate(cfg, run_dir, asked, typed.kind, tell)
    show("\n".join(table.summary(record)))
    if typed.plot:
        _picture().draw(record, typed.plot)
    for path in (typed.output, typed.plot):
        if path:
            show(text("evaluate_written", path=path))


def run_plot(typed: argparse.Namespace, overrides: list[str]) -> None:
    """Draw a record anew."""
    if overrides:
        raise ConfigError("evaluate_own_key", key=overrides[0].partition("=")[0])
    _picture().check_picture(typed.target)
    check_target(typed.target, "plot")
    try:
        record = json.loads(typed.source.read_text(encoding="utf-8"))
        _picture().draw(record, typed.target)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason, source = type(error).__name__, word(str(typed.source))
        raise ConfigError(
            "{got} is not what --output writes ({reason}); make it with: python -m nanogpt.control evaluate OUT_DIR "
            "--output {typed}",
            got=typed.source, reason=reason, typed=source,
        ) from None
    show(text("evaluate_written", path=typed.target))


def check_target(path: Path, key: str) -> None:
    """Say before the work that its result could not be kept."""
    try:
        check_writable(path)
    except OSError as error:
        raise ConfigError(
            "{key} {got}: cannot be written ({reason}); choose another file",
            key=key, got=path, reason=error.strerror,
        ) from None


def _picture():
    # 只有要图时才导入
    from nanogpt.write.judge import picture

    return picture


