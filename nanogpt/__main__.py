# nanogpt 与 python -m nanogpt 的入口：train、sample 就是两个脚本，prepare 是 data/<名字>/prepare.py
# 脚本仍在仓库顶层，人们在那里读；装成 wheel 后它们在包内的 shipped/
"""nanogpt train | sample | prepare | runs …: the run scripts, and what manages runs, from any folder."""

import difflib
import importlib
import importlib.util
import os
import sys

from nanogpt.base.cli import HELP, run_script
from nanogpt.base.config import ROOT
from nanogpt.base.errors import EXIT_USER_ERROR, forgive_output
from nanogpt.base.help import versions
from nanogpt.base.language import language_from_arguments, say, set_language, show, text

SCRIPTS = ("train", "sample")
# 管理已有训练的命令：只在用到时导入
COMMANDS = {
    "runs": "nanogpt.run.folders", "compare": "nanogpt.sweep.compare", "clean": "nanogpt.run.cleaning",
    "export": "nanogpt.weights.export",
}


def main() -> None:
    """Run the program that the first argument names with the other arguments, as its script would."""
    program, sys.argv[1:] = "".join(sys.argv[1:2]), sys.argv[2:]
    # 自己的模型类在当前文件夹里也找得到；放在最后，不会遮住装好的包
    sys.path.append(os.getcwd())
    if program in SCRIPTS:
        wiring = _wiring(program)
        after_sweep = {"after_sweep": wiring.after_sweep} if program == "train" else {}
        run_script(program, wiring.main, wiring.before_sweep, **after_sweep)
    elif program in COMMANDS:
        importlib.import_module(COMMANDS[program]).main()
    elif program == "prepare" and len(sys.argv) > 1:
        from nanogpt.data.corpus import run_prepare

        run_prepare(sys.argv.pop(1))
    else:
        _explain(program)


def _wiring(program: str):
    """run_<program>.py as a module."""
    spec = importlib.util.spec_from_file_location(f"run_{program}", ROOT / f"run_{program}.py")
    module = importlib.util.module_from_spec(spec)
    # 不进 sys.modules：launcher 把任务交给别的进程时，cloudpickle 就连代码一起送去
    spec.loader.exec_module(module)
    return module


def _explain(program: str) -> None:
    """What there is; exit code 2 unless that was asked for."""
    forgive_output()
    set_language(language_from_arguments([program, *sys.argv]))
    if program == "--version":
        show(versions())
        return
    programs = {
        "train model=small …": text("train; the settings are in conf/train.yaml"),
        "sample start=…": text("write with a trained model; conf/sample.yaml"),
        "prepare NAME …": text("prepare a data set: data/NAME/prepare.py"),
        "export RUN FOLDER …": text("take a model to transformers, llama.cpp, Ollama"),
        "runs": text("list the trainings in outputs/"),
        "compare A B …": text("what differs between trainings, and their curves"),
        "clean": text("free disk space, after showing what would go"),
    }
    lines = [f"nanogpt {typed:<22} {what}" for typed, what in programs.items()]
    lines.append(text("every setting: nanogpt train --help, nanogpt sample --help; nanogpt --version"))
    if program in HELP:
        show("\n".join(lines))
        return
    if program:
        names = [typed.split()[0] for typed in programs]
        close = difflib.get_close_matches(program, names, n=1)
        guess = text("did_you_mean", guess=close[0]) if close else ""
        say("error", line=text("nanogpt {got}: there is no such command{guess}", got=program, guess=guess))
    show("\n".join(lines), file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)


if __name__ == "__main__":
    main()
