"""The sentences that a person reads on the console, in English and Chinese, and the error class ConfigError."""

# 屏幕上的每一句话都从这里出去，英文或中文；错误也是一句话（ConfigError）
# 英文就写在说它的地方（表里的写成 sentence(…)），中文在旁边的 zh.json，以英文句子为键；几处都说的在 NAMED 里起名
# show 是唯一的打印：文件里来的控制字符写成转义，指挥不了终端
# ConfigError 存的是句子与值，到 str() 时才译：语言可以在抛出之后才定下来

import functools
import json
import locale
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

_language = "en"


def set_language(lang: str) -> None:
    """Choose the console's language: en, zh, or auto (the system's)."""
    global _language
    _language = system_language() if lang == "auto" else lang


def current_language() -> str:
    """en or zh, as it is now; for a process that should speak like this one."""
    return "zh" if _language == "zh" else "en"


def system_language() -> str:
    """zh when the environment or the system's locale is Chinese, else en."""
    # 环境变量优先，与 gettext 的次序相同
    for name in ("LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG"):
        if os.environ.get(name):
            return "zh" if os.environ[name].lower().startswith("zh") else "en"
    # Windows 上没有 LANG，形如 "Chinese (Simplified)_China"
    return "zh" if (locale.getlocale()[0] or "").lower().startswith(("zh", "chinese")) else "en"


def language_from_arguments(arguments: list[str]) -> str:
    """lang=… as typed, else auto: errors while composing come before any config exists."""
    for argument in arguments:
        if argument in ("lang=zh", "lang=en"):
            return argument[5:]
    return "auto"


def text(message: str, **values) -> str:
    """A sentence, given in English or by its name in NAMED, in the current language and filled in."""
    return text_in(_language, message, **values)


def sentence(english: str) -> str:
    """A sentence that a table holds and text() says later, marked so that it is known to have its Chinese."""
    # gettext 的 N_()：什么也不做，只让测试在表里也找得到
    return english


def text_in(language: str | None, message: str, **values) -> str:
    """Like text(), in the given language or, for None, the console's: a visitor of the page may speak another one."""
    line = NAMED.get(message, message)
    if (language or _language) == "zh":
        # 没有译文的就用英文：别人写的数据准备、自己的 logger 也可以抛 ConfigError
        line = chinese().get(line, line)
    return line.format(**{key: NOTHING if value is None else value for key, value in values.items()})


@functools.cache
def chinese() -> dict[str, str]:
    """English sentence -> Chinese, as zh.json beside this file has them."""
    return json.loads(Path(__file__).with_name("zh.json").read_text(encoding="utf-8"))


class _Nothing:
    """How None is shown in a sentence: as None, or as - where the sentence asks for a number format."""

    # f"{None:.4f}" 会抛错：一句话不能因为少一个值就说不出来

    def __format__(self, form: str) -> str:
        return "-" if form else "None"

    def __repr__(self) -> str:
        return "None"


# 还没评估过就没有验证损失：说完成的那一行不能因此出错
NOTHING = _Nothing()


# 终端会照做的：控制字符（换行与制表除外）、改变书写方向的符号；半个代理对打不出来
COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(written: str, file: TextIO) -> str:
    """A text as it may be printed to `file`: escaped where it would command a terminal; unchanged elsewhere."""
    escaped = COMMANDS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), written)
    return escaped if file.isatty() else written


def show(written: str, *, file: TextIO | None = None, end: str = "\n") -> None:
    """Print to `file`, stdout by default; every other function prints through this one."""
    # 大多数句子里都有别人文件里的东西：只有一个出口，才不会漏了转义
    file = file or sys.stdout
    print(shown(written, file), file=file, end=end, flush=True)


def say(message: str, **values) -> None:
    """Print a message on stderr."""
    line = text(message, **values)
    # 错误里有可以照敲的命令：由终端自己折，复制出来才是一整行
    show(line if message == "error" else wrapped(line, sys.stderr), file=sys.stderr)


def joined(words: Iterable[str]) -> str:
    """Words of a person's own, such as labels, as a list within a sentence."""
    return ("、" if current_language() == "zh" else ", ").join(words)


# 可以折行的一段：一个汉字，或一串没有空格的别的字；开口的标点跟着后面，闭合的跟着前面
# 汉字的文件名（小说.txt）不从中间断：断了就复制不出来
WIDE = "\u2e80-\u9fff\uff00-\uffef"
NAMED_FILE = "[\u2e80-\u2fff\u3040-\u9fff]+\\.[A-Za-z0-9]+"
PIECE = re.compile(f"( *)([（“「《［]*(?:{NAMED_FILE}|[{WIDE}]|[^ {WIDE}]+)[，。；：、！？）”」》］…]*)")


def wrapped(written: str, file: TextIO) -> str:
    """A sentence as it stands on `file`: on a terminal broken between words, and indented from its second line on.

    A line that begins with a space is a command, a table or a text, and stays whole.
    """
    if not file.isatty():
        return written
    from rich.cells import cell_len

    # 正好写满一行时，老的 Windows 终端会多出一个空行
    width, lines = shutil.get_terminal_size().columns - 1, []
    for line in written.split("\n"):
        rest, line = ("", line) if line.startswith(" ") else (line, "")
        for space, piece in PIECE.findall(rest):
            if line.strip() and cell_len(line + space + piece) > width:
                lines.append(line)
                line = "  " + piece
            else:
                line += space + piece
        lines.append(line)
    return "\n".join(lines)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class ConfigError(ValueError):
    """A user's mistake; its text is one line in the console's language."""

    # 只存句子与值：译文、截短、转义都等到要显示时

    def __init__(self, message: str, **values):
        super().__init__(message, values)
        self.message, self.values = message, values

    def __reduce__(self):
        # 从子进程传回来：默认的做法不认按名字给的值
        return functools.partial(type(self), self.message, **self.values), ()

    def __str__(self) -> str:
        return text(self.message, **{name: presentable(value) for name, value in self.values.items()})


# 更长的值（一兆的参数、整行的 JSON）只给人看首尾
LONGEST = 500


def presentable(value):
    """A value for one line of a terminal: numbers as they are, text without control characters, shortened if long."""
    if isinstance(value, bool | float | None):
        return value
    try:
        line = str(value)
    except ValueError:
        # Python 不肯把几千位的整数写成十进制
        return hex(value)[:LONGEST] + "…"
    if isinstance(value, int):
        return value if len(line) < 60 else line[:40] + "…"
    if len(line) > LONGEST:
        line = f"{line[: LONGEST - 100]} … {line[-60:]} ({len(line):,})"
    # 换行、ESC、NUL、半个代理对：写成转义，一行仍是一行；全角空格照旧
    plain = (c.isprintable() or unicodedata.category(c) == "Zs" for c in line)
    return "".join(c if ok else c.encode("unicode_escape").decode("ascii") for c, ok in zip(line, plain))


# 几处都要说的在这里起个名字；其余的英文就写在说它的地方
NAMED = {
    "error": "error: {line}",
    "unread_key": "+{key}: nothing reads this key; correct its name or leave it out",
    "unwritable_text": (
        "{key}={got}: this holds {what}, which our files cannot hold; write it differently, or rename what it refers to"
    ),
    "missing_key": "{key} is missing; write it into the yaml",
    "not_a_part": "{key}={got} cannot be used as {want}; name a class or function that can",
    "did_you_mean": " (did you mean {guess}?)",
    "unknown_option": "{group}={got}: there is no such option; choose one of: {options}",
    "wrong_type": "{key}={got} has the wrong type: {want} is wanted",
    "not_a_choice": "{key}={got} is not known; choose one of: {allowed}",
    "not_sharded": "{key} does not go with parallel=fsdp; leave it out, or train with parallel=ddp",
    "out_of_range": "{key}={got} is out of range; it must be {wanted}",
    "above_other": "{key}={got} is above {other}={limit}; lower {key} or raise {other}",
    "bad_part": "{key}: {reason}",
    "missing_file": "{key}={got}: there is no such file or folder; give the path of a text file",
    "no_text_path": "dataset.path is not set; type dataset=text_file dataset.path=my.txt",
    "no_chat_path": "dataset.path is not set; type dataset=chat dataset.path=my.jsonl",
    "no_labelled_path": "dataset.path is not set; type dataset=labelled dataset.path=my.jsonl",
    "unknown_characters": "the vocabulary lacks {characters}; leave them out{skip}, or train on text that has them",
    "prompt_all_skipped": (
        "the prompt {got!r}: the vocabulary has none of its characters, so that nothing of it is left; give others, or "
        "train on text that has them"
    ),
    "damaged_dataset": (
        "{path} does not match its meta.json ({reason}); delete the folder {folder} and start again to prepare it anew"
    ),
    "missing_package": "{what} needs the package {package}; install it with: pip install {package}",
    "pretrained_damaged": "{file} cannot be used ({reason}); get an undamaged copy or choose another model",
    "pretrained_unsupported": (
        "{file}: {field}={got} is not supported (wanted: {want}); choose another model"
    ),
    "out_dir_exists": (
        "out_dir={path} already holds a run; choose another out_dir, continue it with {resume}, or add overwrite=true"
    ),
    "not_writable": "out_dir={path} cannot be written ({reason}); choose another out_dir",
    "no_run": "{key}={path}: there is no checkpoint in it; give a run folder, e.g. {key}=outputs/my-run",
    "empty_prompt": "a prompt is empty; give at least one character (start, starts, prompts)",
    "bad_prompt_line": 'prompts={path}: line {number} is neither a string nor an object with "prompt"; correct it',
    "bad_prompt_list": (
        'prompts={path}: item {number} of what should be one list of strings, or of objects with "prompt", is '
        "neither; correct it, or give one prompt per line in a .txt file"
    ),
    "nonfinite_logits": (
        "the model's logits are not finite: its weights are damaged or precision is too small for them; try "
        "precision=fp32 or another checkpoint"
    ),
    "sample_oom": (
        "out of memory even with one text at a time; choose a smaller model, fewer max_new_tokens, precision=int8 or "
        "device=cpu"
    ),
    "progress_writing": "writing",
    "api_two_lengths": "the request names its length twice (Content-Length and Transfer-Encoding); send one of them",
    "api_content_type": "the content type is {got}; send application/json",
    "api_wrong_type": "{field} has the wrong type; it must be {wanted}",
    "api_out_of_range": "{field}={got} is out of range; it must be {wanted}",
    "api_unknown_characters": (
        'the vocabulary lacks {characters}; leave them out, or have them passed over ("unknown": "skip")'
    ),
    "api_no_model": "{got} is not loaded here; the model is called {have}",
    "api_no_chat": (
        'this model goes on with a text and does not chat; POST {{"prompt": "…"}} to /v1/completions instead (clients '
        "call it text completion), or serve one that was trained with dataset=chat"
    ),
    "api_only_chat": "this address is not served here; POST messages to /v1/chat/completions",
    "prompt_over_context": (
        "prompt has {got} tokens; scoring it (logprobs with echo) takes at most the model's context of {limit}"
    ),
    "api_too_large": "the body is larger than {limit} KiB (server.max_body_kib)",
    "api_slow_body": "the body did not arrive within {seconds:g} s (server.read_seconds)",
    "api_busy": "too many texts are waiting (server.max_waiting); try again in a few seconds",
    "api_time_limit": "not finished within {seconds:g} s (server.request_seconds)",
    "api_unread": (
        "too much was left unread, or for too long (server.max_unread_chars, server.stall_seconds); the text was "
        "stopped"
    ),
    "api_stopping": "the server is shutting down",
    "api_internal": "an error inside the server; its console says more",
    "api_token": "this server asks for its token: Authorization: Bearer …",
    "api_host": "Host: {got} is not this machine's own name; open the page through 127.0.0.1 or localhost",
    "api_origin": "a page of another origin may not use this server",
    "api_not_found": "there is nothing at this address",
    "api_method": "this address does not take {got}",
    "damaged_checkpoint": "{file} is damaged ({reason}); {remedy}",
    "run_in_use": "{path}: process {process} is training there; wait until it ends, or choose another out_dir",
    "peak_of_card": "the fastest matrix product seen on {name}",
    "peak_of_threads": "{threads} x the fastest one-thread matrix product seen on {name}",
    "vram": "VRAM {held:.2f}GB",
    "ram": "RAM {held:.2f}GB",
    "vram_peak": "VRAM peak {peak:.2f}GB",
    "ram_peak": "RAM peak {peak:.2f}GB",
    "progress": "training",
    "progress_evaluating": "evaluating",
    "progress_trials": "trials",
    "progress_advice": "searching",
    "progress_preparing": "preparing",
    "so_far": "{done} of {count} done, about {time} more",
    "oom_final": (
        "out of memory in the {phase} with {rows} rows at a time, which cannot be divided further; add memory=lean, "
        "or choose a smaller model or model.block_size"
    ),
    "oom_sharded": (
        "out of memory in the {phase} with {rows} rows at a time, and parallel=fsdp can repeat no step; go on with "
        "resume=… and a smaller batch_size, or memory=lean"
    ),
    "nonfinite": "iter {iteration}: {what} is not finite; step skipped ({count} in a row)",
    "nonfinite_partly": (
        "iter {iteration}: {what} is not finite; the parameters that it belongs to were left as they are ({count} in "
        "a row)"
    ),
    "remedy_last": (
        "the last good checkpoint is {checkpoint}; continue from it with a lower rate: {resume}{which} "
        "learning_rate={rate:.1e}"
    ),
    "remedy_best": (
        "the best checkpoint is {checkpoint}; continue from it with a lower rate: {resume}{which} "
        "learning_rate={rate:.1e}"
    ),
    "early_stop": (
        "val loss has not improved for {count} evaluations; stopping (early_stop_evals); the best checkpoint is kept: "
        "{best:.4f}, of iteration {since}"
    ),
    "turned_for_good": (
        "val loss {loss:.4f} has risen for good while the training loss falls: the text is learned by heart; stopping "
        "(early_stop_evals); the best checkpoint is kept: {best:.4f}, of iteration {since}"
    ),
    "target_reached": "val loss {loss:.4f} is at or below target_val_loss={target}; stopping",
    "size_line": "{model} ({arch}), parameters: {size}",
    "run_line": "{precision} on {device}, {tokens:,} tokens/iter ({batch} x {accum} x {block}{world})",
    "next_sample": "write with it",
    "next_resume": "go on",
    "next_longer": "train longer",
    "next_curves": "see the curves, at http://localhost:6006/#custom_scalars",
    "next_own": "your own text",
    "judge_form": (
        "judge: the form. Segments and their lengths decide, exactly for the four regular forms; 宋词, 元曲 or neither "
        "by a regression on them"
    ),
    "judge_text": (
        "judge: TF-IDF of 1 to 3 characters and logistic regression, trained on texts that the model has never seen"
    ),
    "setting_codes": "control=codes control.guidance={guidance:g}",
    "setting_prefix": (
        "control=prefix: the wish as on the command line, a sentence before the text and words raised (nothing "
        "trained in)"
    ),
    "setting_none": "control=none: nothing is asked (if every text had one of the labels, evenly: {chance:.1%})",
    "column_run": "run",
    "column_loss": "val loss",
    "column_tokens": "tokens",
    "column_took": "took",
    "column_size": "size",
    "column_state": "state",
    "column_model": "model",
    "column_data": "data",
    "column_bpb": "bpb",
    "bits_beside": " ({bits:.3f} bpb)",
    "validation_loss": "validation loss",
    "column_last": "last",
    "column_speed": "tokens/s",
    "column_reached": "what they reached",
    "compare_data": (
        "These trainings were evaluated on different data or in different windows: their losses cannot be compared."
    ),
    "which_runs": "run folders, or folders of them",
    "export_about": "Write a trained model for transformers (hf), llama.cpp and Ollama (gguf) or CTranslate2 (ct2).",
    "export_keys": (
        "format=hf|gguf|ct2 (hf) and type=f32|f16|bf16|q8_0|int8 say what is written; model=NAME names a model class "
        "of your own, as for training: its code is run only then."
    ),
    "clean_about": (
        "Free disk space: old checkpoints (the last and the best of every run stay), runs that never saved one, failed "
        "trials of sweeps. Nothing is deleted before you agree."
    ),
    "clean_old": "older checkpoints: {count}",
    "clean_replaced": "checkpoints set aside by a resume from an older one: {count}",
    "clean_optimizer": "optimizer states: {count}",
    "clean_unsaved": "a run that never saved a checkpoint",
    "clean_trial": "a trial that failed or was skipped",
    "clean_empty": "an empty folder of a job",
    "clean_optimizer_help": "also delete optimizer states: one can then write with the run, but not train it further",
    "clean_optimizer_note": (
        "Without its optimizer state a run can be written with, served and exported, but not resumed (init_from= still "
        "begins a new training from its weights)."
    ),
    "clean_changed": "it is not as it was listed",
    "state_failed": "failed",
    "state_running": "running",
    "state_finished": "done",
    "state_stopped": "stopped",
    "state_empty": "empty",
    "state_damaged": "damaged",
    "state_pruned": "pruned",
    "plan_vocab_assumed": "assumed, the data is not prepared yet; type model.vocab_size=… if you know better",
    "plan_tight": "TIGHT",
    "segments_fixed": (
        "without growing segments, as on Windows, in WSL or with PYTORCH_ALLOC_CONF set: on native Linux a training "
        "usually takes less"
    ),
    "trial_defaults": "the defaults",
    "report_title": "Which setting is the fastest that fits",
    "report_use": "Train with the fastest setting",
    "report_chart": "Memory against speed",
    "report_chart_note": (
        "Up and to the left is better. The ringed point is the recommendation, the grey band the Pareto front, "
        "numbers are batch_size; × failed, at the memory it was predicted to need or reached (far beyond the budget: "
        "at the right edge)."
    ),
    "report_loss": "Loss",
    "report_loss_note": "Validation loss at the end of each trial; down and to the right is better.",
    "report_next": "What to do next",
    "report_samples": "What it wrote",
    "report_settings": "Settings that differ from the defaults",
    "curve_train": "training loss",
    "curve_val": "validation loss",
    "tile_loss": "best validation loss",
    "tile_bpb": "best bits per byte",
    "tile_time": "time",
    "tile_iterations": "iterations",
    "column_iteration": "iteration",
    "column_value": "value",
    "column_default": "default",
    "report_ranking": "Ranking",
    "report_ranking_note": "Best is the fastest trial that leaves {margin:.0f}% of the budget free; ⚠ leaves less.",
    "report_failures": "What did not work, and why",
    "tile_speed": "tokens/s, best",
    "tile_step": "per optimizer step",
    "tile_memory": "peak / budget, GiB",
    "tile_done": "trials measured",
    "column_setting": "setting",
    "column_reason": "reason",
    "column_status": "status",
    "column_spread": "spread",
    "column_seeds": "seeds",
    "column_minutes": "minutes",
    "column_rows": "rows",
    "learned_use": "Train with the best setting",
    "learned_keys": "Which key mattered",
    "learned_keys_note": "Share of each key in how far the settings lay apart after the first rung (fANOVA).",
    "none_trained": "no setting could be trained; the reasons are in the table above",
    "search_interrupted": "interrupted; what is finished is kept, the same command goes on from there",
    "chart_vram": "peak VRAM, GiB",
    "chart_ram": "peak RAM, GiB",
    "sample_skipped": (
        "iter {iteration}: not enough memory to write a sample; training goes on (sample_tokens=0 writes none)"
    ),
    "sample_nonfinite": (
        "iter {iteration}: the model's logits are not finite here, no sample is written; training goes on"
    ),
    "sample_failed": (
        "iter {iteration}: the sample could not be written ({reason}); training goes on (sample_tokens=0 writes none)"
    ),
    "oom_wanted": "it asked for {wanted:.2f} GiB more while {free:.2f} GiB were free",
    "oom_wanted_only": "it asked for {wanted:.2f} GiB more",
    "bad_label": "{key} needs zh: [names], en: [names] and may have words: {{zh: [...], en: [...]}}",
    "empty_labelled": "dataset.path={got}: no texts in it; give a file with texts, or a folder with some of: {kinds}",
    "empty_stop": "stop holds an empty string; give at least one character or leave it out",
    "empty_text": "{key}={got}: no text in it; give a file with text",
    "empty_value": "{key} is empty; write a value, or {key}=null for none",
    "evaluate_own_key": "{key}=… is set by the evaluation itself; leave it out",
    "evaluate_written": "written: {path}",
    "fetching": "fetching {name} ({size:.1f} MB) from {place} …",
    "fetched": "{name}: {size:.1f} MB in {seconds:.0f} s",
    "init_from_shape": (
        "{key}={got} contradicts init_from={named}, whose weights have {want}; leave {key} out, or train without "
        "init_from"
    ),
    "labelled_json": (
        "{file}, line {line}: this is not a JSON object ({reason}); write one in each line, for example {example}"
    ),
    "logger_failed": "{name} cannot write ({reason}); training goes on, metrics may be missing",
    "nan_weights": "{tensor} holds NaN or Inf",
    "chat_too_long": "the conversation has {got} tokens, more than the model's context of {limit}; say less",
    "chat_refused": "the chat template does not take this conversation ({reason})",
    "no_documents": "{path} has no documents for {split}; give more texts or another dataset.val_fraction",
    "no_memory": "out of memory ({reason}); choose a smaller model, batch_size or text, or close other programs",
    "no_older_checkpoint": "there is no older good one; start a new run",
    "not_a_multiple": "{key}={got} is not divisible by {other}={by}; choose a multiple of {by}",
    "not_a_dataset": (
        "{path} has no readable meta.json ({reason}); delete the folder and start again to prepare it anew"
    ),
    "no_dataset": (
        "{path} has no meta.json and is no data set; name another folder: one that is empty or not there yet is "
        "prepared"
    ),
    "nothing_chosen": "{group}: nothing is chosen; choose one of: {options}",
    "nothing_written": "no text has been written yet; type a beginning first",
    "python_command": "{key}=…: load() and write() return one text; this key is for the command line",
    "python_loaded": "{key}=…: the weights are loaded already; give this key to load()",
    "python_plan": "{key}=…: plan_for() plans one new training from its settings; leave it out",
    "python_prompt": "{key}=…: the prompt is given already; leave one of the two out",
    "unreadable_run": (
        "resume={path}: there is no checkpoint and no config that could be read ({reason}), so nothing trained can be "
        "lost; begin anew: type the first command again with out_dir={path} overwrite=true"
    ),
    "unreadable_foreign": (
        "resume={path}: there is no checkpoint and no config that could be read ({reason}), so nothing trained can be "
        "lost; begin anew: type the first command again with another out_dir"
    ),
    "output_not_writable": "output={got} cannot be written ({reason}); choose another file",
    "plan_vocab_tokenizer": "the tokenizer",
    "remedy_key": "write key=value",
    "removed_key": "~{key}: this key is always needed; write {key}=VALUE instead",
    "resume_changes": "{key} cannot change on resume ({old} -> {new}); leave it out or start a new run",
    "save_as_utf8": "save it as UTF-8 to be sure",
    "source_failed": (
        "dataset.source={got} could not be read ({reason}); check the name, the network or HF_ENDPOINT, or give a "
        "local folder"
    ),
    "trial_not_with": "{key}={got} cannot be tried; leave it out, or give a number",
    "undecodable": "{path}: byte {offset} is not {encoding}; save the file as UTF-8 or set dataset.encoding",
    "unknown_encoding": "dataset.encoding={got} is not known; try utf-8, utf-16, gb18030, big5, cp1252 or auto",
    "unreadable": "{argument}: this cannot be read ({reason}); {remedy}",
    "unreadable_flag": "{reason}; --help shows what there is",
    "vocab_mismatch": (
        "dataset {name}: its data differs from what the checkpoint was trained on ({reason}); use the run's own data "
        "or start a new run"
    ),
}
