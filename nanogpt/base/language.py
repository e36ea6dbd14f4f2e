"""Every line that a person reads on the console, in English and Chinese."""

import locale
import os
import re
import sys
import unicodedata
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
    """The message of that name in the current language, filled in."""
    return text_in(_language, message, **values)


def text_in(language: str | None, message: str, **values) -> str:
    """The same in a language of its own, None for the console's: a visitor of the page need not speak that."""
    line = MESSAGES[message][1 if (language or _language) == "zh" else 0]
    return line.format(**{key: NOTHING if value is None else value for key, value in values.items()})


class _Nothing:
    """None as a line shows it: a value that there is not has no decimals either."""

    def __format__(self, form: str) -> str:
        return "-" if form else "None"

    def __repr__(self) -> str:
        return "None"


# 还没评估过就没有验证损失：说完成的那一行不能因此出错
NOTHING = _Nothing()


# 终端会照做的：控制字符（换行与制表除外）、改变书写方向的符号；半个代理对打不出来
COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(written: str, file: TextIO) -> str:
    """A text as `file` may have it: on a terminal, what would command the terminal stands there as an escape; elsewhere unchanged."""
    return COMMANDS.sub(_escaped, written) if file.isatty() else written


def _escaped(found: re.Match) -> str:
    return found[0].encode("unicode_escape").decode("ascii")


def show(written: str, *, file: TextIO | None = None, end: str = "\n") -> None:
    """Print, to stdout if no file is named: the one way to the screen, since most texts hold something from a file of a stranger."""
    file = file or sys.stdout
    print(shown(written, file), file=file, end=end, flush=True)


def say(message: str, **values) -> None:
    """Print a message on stderr."""
    show(text(message, **values), file=sys.stderr)


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class ConfigError(ValueError):
    """A user's mistake; its text is one line in the console's language."""

    def __init__(self, message: str, **values):
        super().__init__(message, values)
        self.message, self.values = message, values

    def __str__(self) -> str:
        return text(self.message, **{name: presentable(value) for name, value in self.values.items()})


# 更长的值（一兆的参数、整行的 JSON）只给人看首尾
LONGEST = 500


def presentable(value):
    """A value for one line of a terminal: numbers as they are; text without control characters, its middle left out where it is long."""
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
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else c.encode("unicode_escape").decode("ascii") for c in line)


# 名字 -> (英文, 中文)；两种语言的占位符必须相同，有测试
MESSAGES = {
    "error": ("error: {line}", "错误：{line}"),
    # ---- 系统与内存 ----
    "system_refused": ("{path}: the system refuses ({reason}); {remedy}", "{path}：系统拒绝（{reason}）；{remedy}"),
    "remedy_space": ("free some disk space or choose another disk, then start again", "请腾出磁盘空间或换一个磁盘，再运行同一条命令"),
    "remedy_access": ("change its permissions or choose another place", "请改权限，或换一个位置"),
    "remedy_files": (
        "too many files are open: close other programs or raise the limit (ulimit -n)",
        "打开的文件太多：请关掉别的程序，或调高上限（ulimit -n）",
    ),
    "remedy_name": ("choose a shorter name", "请用短一些的名字"),
    "remedy_memory": ("close other programs or choose smaller settings", "请关掉别的程序，或调小设置"),
    "remedy_disk": ("the disk itself fails: copy what matters to another one", "磁盘本身出错：请把重要的东西拷到别处"),
    "remedy_path": ("check that path", "请检查这个路径"),
    "no_memory": (
        "out of memory ({reason}); choose a smaller model, batch_size or text, or close other programs",
        "内存不足（{reason}）；请用更小的模型、batch_size 或文本，或关掉别的程序",
    ),
    "not_deterministic": (
        "deterministic=true: {operation} has no deterministic implementation on this device; add deterministic=false",
        "deterministic=true：{operation} 在这个设备上没有确定性的实现；请加 deterministic=false",
    ),
    # ---- 配置 ----
    "compose": ("{line}", "{line}"),
    "unreadable_flag": ("{reason}; --help shows what there is", "{reason}；--help 可看到有哪些"),
    "sweep_without_m": (
        "{argument}: this means several values; add -m to try each; a list is written {listed}, a text {typed}",
        "{argument}：写了几个值；要逐个尝试请加 -m；列表请写 {listed}，文字请写 {typed}",
    ),
    "nothing_chosen": ("{group}: nothing is chosen; choose one of: {options}", "{group}：没有选；可选：{options}"),
    "one_option": (
        "{group}={got}: one option is wanted here, not several; choose one, or put both into a yaml of your own under conf/{group}",
        "{group}={got}：这里只能选一个；请只写一个，或在 conf/{group} 里自己写一份 yaml",
    ),
    "interpolation": ("{key}: {reason}; write the value itself", "{key}：{reason}；请直接写出值"),
    "unread_key": ("+{key}: nothing reads this key; correct its name or leave it out", "+{key}：没有地方会读这一项；请改正名字或去掉"),
    "removed_key": ("~{key}: this key is always needed; write {key}=VALUE instead", "~{key}：这一项不能去掉；请改写成 {key}=值"),
    "bad_yaml": ("{file}: this is no yaml that can be used ({reason}); correct it", "{file}：不是能用的 yaml（{reason}）；请改正"),
    "yaml_mapping": ("keys with values are wanted: key: value", "应为一列 键: 值"),
    "yaml_encoding": ("byte {offset} is not UTF-8; save it as UTF-8", "第 {offset} 个字节不是 UTF-8；请另存为 UTF-8"),
    "yaml_line": ("line {line}", "第 {line} 行"),
    "glob_of_a_value": ("only groups have options to go through", "只有配置组才有可以逐个取的选项"),
    "not_finite": ("{key}={got} is not a finite number; write one", "{key}={got} 不是有限的数；请改写"),
    "empty_value": ("{key} is empty; write a value, or {key}=null for none", "{key} 是空的；请写出值，没有就写 {key}=null"),
    "empty_flag": ("{flag}= is empty; write what it names, or leave it out", "{flag}= 是空的；请写出它所指的，或去掉它"),
    "no_hydra_key": ("Hydra has no key {key}", "Hydra 没有 {key} 这一项"),
    "unwritable_text": (
        "{key}={got}: this holds {what}, which no file of ours can hold; write it otherwise, or rename what it names",
        "{key}={got}：其中有{what}，存不进文件；请换个写法，或给它所指的文件改名",
    ),
    "what_control": ("a control character", "控制字符"),
    "what_reference": ("${{, which a config file takes for a reference", "${{（在配置文件里是引用）"),
    "what_nul": ("a NUL character", "NUL 字符"),
    "what_half": ("bytes that are no UTF-8, or half a character", "非 UTF-8 的字节或半个字符"),
    "large_number": ("{key}={got} is too large; write a smaller number", "{key}={got} 太大；请写小一些的数"),
    "missing_key": ("{key} is missing; write it into the yaml", "缺少 {key}；请在 yaml 里写出"),
    "not_a_part": ("{key}={got} is no {want}; name a class or function that is", "{key}={got} 不能用作 {want}；请改成合适的类或函数"),
    "model_too_large": (
        "model: its weights alone are {need:.1f} GiB ({parameters:.3g} parameters), {have:.1f} GiB are free; lower model.n_layer, model.n_embd or "
        "model.vocab_size, or use memory.weights=bf16",
        "model：只是权重就有 {need:.1f} GiB（{parameters:.3g} 个参数），而内存空闲 {have:.1f} GiB；请调小 model.n_layer、model.n_embd 或 "
        "model.vocab_size，或用 memory.weights=bf16",
    ),
    "unreadable": (
        "{argument}: this cannot be read ({reason}); {remedy}",
        "{argument}：无法解析（{reason}）；{remedy}",
    ),
    "remedy_quotes": ("put the value in quotes: {typed}", "请给值加引号：{typed}"),
    "remedy_key": ("write key=value", "请写成 键=值"),
    "remedy_one_by_one": ("write the values: {key}=a,b,c", "请逐个写出：{key}=a,b,c"),
    "unknown_key": (
        "{key}: there is no such key{guess}; see conf/{config}.yaml or run with --cfg job",
        "{key}：没有这个配置项{guess}；可查看 conf/{config}.yaml，或加 --cfg job 打印全部配置",
    ),
    "did_you_mean": (" (did you mean {guess}?)", "（是否想写 {guess}？）"),
    "unknown_option": (
        "{group}={got}: there is no such option; choose one of: {options}",
        "{group}={got}：没有这个选项；可选：{options}",
    ),
    "wrong_type": (
        "{key}={got} has the wrong type: {want} is wanted",
        "{key}={got} 类型不对，应为 {want}",
    ),
    "not_a_choice": ("{key}={got} is not known; choose one of: {allowed}", "{key}={got} 无法识别；可选：{allowed}"),
    "out_of_range": ("{key}={got} is out of range; it must be {wanted}", "{key}={got} 超出范围，应为 {wanted}"),
    "not_divisible": (
        "{key}={got} is not divisible by {other}={by}; choose a multiple of {by}",
        "{key}={got} 不能被 {other}={by} 整除；请改为 {by} 的倍数",
    ),
    "odd_head": (
        "model.n_embd={n_embd} / model.n_head={n_head} is odd, and RoPE turns pairs; choose an even head size or model.position=learned",
        "model.n_embd={n_embd} / model.n_head={n_head} 是奇数，而 RoPE 成对旋转；请让每个 head 的宽度为偶数，或用 model.position=learned",
    ),
    "above": (
        "{key}={got} is above {other}={limit}; lower {key} or raise {other}",
        "{key}={got} 大于 {other}={limit}；请调小 {key} 或调大 {other}",
    ),
    "warmup_too_long": (
        "warmup_iters={got} is not shorter than {other}={limit}; lower warmup_iters or train longer",
        "warmup_iters={got} 不短于 {other}={limit}；请调小 warmup_iters 或延长训练",
    ),
    "auto_needs_total": (
        "batch_size=auto needs global_batch_size: the rows of one optimizer step, for example global_batch_size=64",
        "batch_size=auto 需要 global_batch_size：每次更新的序列总条数，例如 global_batch_size=64",
    ),
    "two_totals": (
        "global_batch_size={total} is not batch_size={batch} x gradient_accumulation_steps={accum} = {product}; drop one of the two",
        "global_batch_size={total} 与 batch_size={batch} x gradient_accumulation_steps={accum} = {product} 不符；请去掉其中一个",
    ),
    "budget_pair": (
        "memory.activation_checkpointing={mode} with memory.activation_budget_mib={budget}; set the budget if and only if the mode is budget",
        "memory.activation_checkpointing={mode} 与 memory.activation_budget_mib={budget} 不配；只有 budget 模式才写预算，也必须写",
    ),
    "bf16_weights_precision": (
        "precision.dtype={got}: memory.weights=bf16 computes in bf16; choose precision=bf16 or memory.weights=fp32",
        "precision.dtype={got}：memory.weights=bf16 时用 bf16 计算；请用 precision=bf16，或 memory.weights=fp32",
    ),
    "in_backward_fp16": (
        "precision=fp16: memory.optimizer_in_backward=true has no loss scaling; choose precision=bf16, or memory.optimizer_in_backward=false",
        "precision=fp16：memory.optimizer_in_backward=true 时没有 loss scaling；请用 precision=bf16，或 memory.optimizer_in_backward=false",
    ),
    "in_backward_accumulation": (
        "memory.optimizer_in_backward=true frees gradients at once and cannot accumulate {rows} rows in pieces of batch_size={batch}; "
        "set gradient_accumulation_steps=1 and no global_batch_size, or memory.optimizer_in_backward=false",
        "memory.optimizer_in_backward=true 时梯度随到随放，不能把 {rows} 条按 batch_size={batch} 累积；"
        "请用 gradient_accumulation_steps=1 且不设 global_batch_size，或 memory.optimizer_in_backward=false",
    ),
    "in_backward_world": (
        "memory.optimizer_in_backward=true uses each gradient before {world} processes could add them up; start one process, "
        "or memory.optimizer_in_backward=false",
        "memory.optimizer_in_backward=true 时梯度来不及在 {world} 个进程之间求和；请只用一个进程，或 memory.optimizer_in_backward=false",
    ),
    "foreign_optimizer": (
        "{key}={got} works with optimizer=adamw and optimizer=muon, not with {kind}; choose one of them or leave {key} at its default",
        "{key}={got} 只能配 optimizer=adamw 或 muon，{kind} 不支持；请换成其中之一，或让 {key} 保持默认",
    ),
    "no_prepare": (
        "dataset.name={got}: there is no data/{got}/prepare.py; choose another dataset or write that script",
        "dataset.name={got}：找不到 data/{got}/prepare.py；请换一个 dataset，或写出这个脚本",
    ),
    "bad_part": ("{key}: {reason}", "{key}：{reason}"),
    "no_such_class": (
        "{key}={got} cannot be imported ({reason}); put its module beside run_train.py or correct the name",
        "{key}={got} 无法导入（{reason}）；请把模块放在 run_train.py 旁边，或改正名字",
    ),
    "untrusted": (
        "{path} names code of its own ({targets}); a checkpoint's code is run only when you name it: add {typed}",
        "{path} 指定了自带的代码（{targets}）；只有在命令行指名时才会执行：加 {typed}",
    ),
    "other_code": (
        "model: {got} was typed, but the model of {path} is {have}; leave model=… out or name that one",
        "model：写的是 {got}，而 {path} 的模型是 {have}；请去掉 model=…，或写那一个",
    ),
    # ---- 省显存的各部分 ----
    # ---- 设备 ----
    "no_device": (
        "device={got}: this machine offers {have}; choose device={have} or install the CUDA build of torch (README)",
        "device={got}：本机只有 {have}；请用 device={have}，或按 README 安装 CUDA 版 torch",
    ),
    "no_bf16": (
        "precision.dtype=bf16: {device} has no bf16; use precision=fp16",
        "precision.dtype=bf16：{device} 不支持 bf16；请用 precision=fp16",
    ),
    "card_is_smaller": (
        "hardware.vram_gib={vram}: this card has {total:.2f} GiB; the budget is that much less",
        "hardware.vram_gib={vram}：这张卡只有 {total:.2f} GiB，预算按差额减少",
    ),
    "world_batch": (
        "batch_size={batch} x gradient_accumulation_steps={accum} cannot be shared by {world} processes; make one of them a multiple of {world}",
        "batch_size={batch} × gradient_accumulation_steps={accum} 无法分给 {world} 个进程；请让其中一个是 {world} 的倍数",
    ),
    # ---- 数据 ----
    "missing_file": (
        "{key}={got}: there is no such file or folder; give the path of a text file",
        "{key}={got}：文件或文件夹不存在；请给出文本文件的路径",
    ),
    "no_text_path": (
        "dataset.path is not set; type dataset=text_file dataset.path=my.txt",
        "没有设置 dataset.path；请写 dataset=text_file dataset.path=my.txt",
    ),
    "no_labelled_path": (
        "dataset.path is not set; type dataset=labelled dataset.path=my.jsonl",
        "没有设置 dataset.path；请写 dataset=labelled dataset.path=my.jsonl",
    ),
    "records_no_text": (
        "dataset.path={got}: {file} holds records, no running text; type dataset=labelled dataset.path={got}, "
        "or rename it to .txt to learn it as it stands",
        "dataset.path={got}：{file} 里是一条条记录，不是连着的文字；请写 dataset=labelled dataset.path={got}，要照原样学就改名为 .txt",
    ),
    "labelled_chat": (
        "{file}, line {line}: this is a {kind} ({fields}), as chat models are tuned on, and a text is wanted; put all of a record into its text, "
        "this one for example: {example}",
        "{file} 第 {line} 行：这是{kind}（{fields}），供微调对话模型用，而这里要的是正文；请把一条记录的内容都写进 text，这一条例如 {example}",
    ),
    "kind_instruction": ("question with its answer", "一问一答"),
    "kind_conversation": ("conversation", "一段对话"),
    "labelled_array": (
        "{file}, line {line}: the list of records breaks off here ({reason}); correct it, or write one object in each line, for example {example}",
        "{file} 第 {line} 行：记录的列表到这里读不下去（{reason}）；请改正，或每行写一个对象，例如 {example}",
    ),
    "empty_labelled": (
        "dataset.path={got}: no texts in it; give a file with texts, or a folder with some of: {kinds}",
        "dataset.path={got}：里面没有文本；请给出有内容的文件，或含有 {kinds} 的文件夹",
    ),
    "labelled_json": (
        "{file}, line {line}: this is no JSON object ({reason}); write one in each line, for example {example}",
        "{file} 第 {line} 行：不是 JSON 对象（{reason}）；请每行写一个，例如 {example}",
    ),
    "labelled_text": (
        "{file}, line {line}: \"text\" is {got}, which is no text; write for example {example}",
        "{file} 第 {line} 行：\"text\" 是 {got}，不是正文；请写成例如 {example}",
    ),
    "labelled_label": (
        "{file}, line {line}: \"{kind}\" is {got}, which is no label; write a string in quotes without | and line breaks, at most {most} characters",
        "{file} 第 {line} 行：\"{kind}\" 是 {got}，不能作标签；请写成带引号的文字，不含 | 与换行，至多 {most} 个字符",
    ),
    "labelled_header": (
        "{file}, line {line}: the columns are {got}; the first line must name them, one of them text",
        "{file} 第 {line} 行：列名是 {got}；第一行应为列名，其中要有 text",
    ),
    "labelled_columns": (
        "{file}, line {line}: {got} fields where the first line names {want}; put a text with commas or line breaks in double quotes",
        "{file} 第 {line} 行：有 {got} 格，而第一行有 {want} 列；含逗号或换行的正文请用双引号括起来",
    ),
    "labelled_csv": (
        "{file}, line {line}: this is no table ({reason}); double the quotation marks inside of quoted fields, or use .jsonl",
        "{file} 第 {line} 行：表格格式不对（{reason}）；引号内的引号要写两个，或改用 .jsonl",
    ),
    "labelled_many": (
        "dataset.path: {labels} different values of {kind} for {documents} texts; a label is a word that many texts share (at most {most}), "
        "not a title or a number: rename that field or choose fewer",
        "dataset.path：{documents} 篇文本的 {kind} 有 {labels} 种；标签应是许多篇共有的词（至多 {most} 种），而不是标题或编号："
        "请改掉这个字段名，或合并标签",
    ),
    "labelled_long": (
        "{file}, line {line}: longer than {most:,} characters, which is no single text; put each text on a line of its own",
        "{file} 第 {line} 行：超过 {most:,} 个字符，不会是一篇文本；请每篇各占一行",
    ),
    "labelled_memory": (
        "dataset.path={got}: {size:,.0f} MiB of labelled texts are compared with each other in memory, which takes over {need:.1f} GiB, and "
        "{have:.1f} are free: give fewer texts, or use dataset=text_file, which needs no memory for them",
        "dataset.path={got}：{size:,.0f} MiB 带标签的文本要在内存里互相比较，需 {need:.1f} GiB 以上，现空闲 {have:.1f}；请少给一些，"
        "或用 dataset=text_file（不占内存）",
    ),
    "labelled_unused": ("not used: the fields {fields} (labels are {kinds})", "没有用到的字段：{fields}（标签是 {kinds}）"),
    "empty_text": ("{key}={got}: no text in it; give a file with text", "{key}={got}：没有文字；请换一个有内容的文件"),
    "undecodable": (
        "{path}: byte {offset} is not {encoding}; save the file as UTF-8 or set dataset.encoding",
        "{path}：第 {offset} 个字节不是 {encoding}；请另存为 UTF-8，或设置 dataset.encoding",
    ),
    "unknown_bytes": (
        "{path}: byte {offset} is not UTF-8, and the file is not plausible in any other encoding that is known here; {remedy}",
        "{path}：第 {offset} 个字节不是 UTF-8，按这里认得的其他编码读也不成文字；{remedy}",
    ),
    "name_encoding": ("save it as UTF-8, or name its encoding: {key}=…", "请另存为 UTF-8，或写明它的编码：{key}=…"),
    "save_as_utf8": ("save it as UTF-8 to be sure", "另存为 UTF-8 最稳妥"),
    "encoding_taken": ("{path}{more}: not UTF-8, read as {name}; {remedy}", "{path}{more}：不是 UTF-8，按 {name} 读；{remedy}"),
    "other_encoding": (
        "if that is wrong, name another encoding ({key}={got} is what was taken)",
        "若不对，请写明编码（这次相当于 {key}={got}）",
    ),
    "and_more": (" and {count} more", " 及另外 {count} 个文件"),
    "mixed_encodings": (
        "{path}: the lines up to {line} hold UTF-8, but byte {offset} is none: the file mixes encodings; save it whole as UTF-8",
        "{path}：第 {line} 行之前有 UTF-8 的文字，而第 {offset} 个字节不是：文件混用了几种编码；请整个另存为 UTF-8",
    ),
    "binary_file": ("{path} is a {kind} file, no text; save its text as UTF-8", "{path} 是 {kind} 文件，不是文本；请把文字另存为 UTF-8 的 .txt"),
    "half_character": (
        "{path}: as {encoding} it holds half a character; save the file as UTF-8 or set dataset.encoding",
        "{path}：按 {encoding} 读出半个字符；请另存为 UTF-8，或设置 dataset.encoding",
    ),
    "text_changed": ("{path} was changed while it was read; start again", "{path} 在读取时被改动了；请重新运行"),
    "text_too_short": (
        "dataset.path={got}: {tokens} tokens, {val} of them for validation, are too few (at least {least} each); give more text or another "
        "dataset.val_fraction",
        "dataset.path={got}：只有 {tokens} 个 token，其中验证 {val} 个，太少（各至少 {least} 个）；请给更多文字，或改 dataset.val_fraction",
    ),
    "not_an_option": ("{got}: there is no such option; choose from: {options}", "{got}：没有这个选项；可用：{options}"),
    "unknown_encoding": (
        "dataset.encoding={got} is not known; try utf-8, utf-16, gb18030, big5, cp1252 or auto",
        "dataset.encoding={got} 无法识别；可用 utf-8、utf-16、gb18030、big5、cp1252 或 auto",
    ),
    "unknown_tokenizer": (
        "dataset.tokenizer={got} is not known; choose one of: {allowed}",
        "dataset.tokenizer={got} 无法识别；可选：{allowed}",
    ),
    "unknown_characters": (
        "the vocabulary lacks {characters}; leave them out{skip}, or train on text that has them",
        "词表里没有 {characters}；请去掉这些字符{skip}，或用包含它们的文本训练",
    ),
    "way_to_skip": (", pass over them with {typed}", "，或用 {typed} 跳过"),
    "prompt_all_skipped": (
        "start={got!r}: the vocabulary has none of its characters, so that nothing of it is left; give others, or train on text that has them",
        "start={got!r}：词表里一个字也没有，跳过之后什么也不剩；请换别的字，或用包含它们的文本训练",
    ),
    "cannot_prepare": (
        "data set {name} could not be prepared: {path} ({reason}); mend that, or name another place with dataset.dir=…",
        "数据集 {name} 准备失败：{path}（{reason}）；请先解决它，或用 dataset.dir=… 换个地方",
    ),
    "preparing_elsewhere": ("another process is preparing data set {name}; waiting for it", "另一个进程正在准备数据集 {name}；等它做完"),
    "reused": (
        "{name}: uses {path} again, prepared from {source} ({train:,} training and {val:,} validation tokens)",
        "{name}：沿用 {path}，它由 {source} 准备而成（训练 {train:,} 个 token，验证 {val:,} 个）",
    ),
    "reused_other": (
        "the data in dataset.dir={path} was made from another text, with other options or by another version of the script, and is used as it is; "
        "leave dataset.dir out to have prepared what the options say",
        "dataset.dir={path} 里的数据出自另一份文字、别的选项或另一个版本的脚本，现在照原样使用；去掉 dataset.dir，就会按选项重新准备",
    ),
    "prepared_before": (
        "{path} is from an earlier version, which did not note what it was prepared from, and is left alone; dataset.dir={path} uses it all the same",
        "{path} 是早先的版本准备的，没有记下由什么准备而成，这次不用它；仍要用它，请写 dataset.dir={path}",
    ),
    "not_a_dataset": (
        "{path} has no readable meta.json ({reason}); delete the folder and start again to prepare it anew",
        "{path} 没有可用的 meta.json（{reason}）；删除该文件夹后重新运行即可重新准备",
    ),
    "damaged_tokenizer": (
        "{file} is no vocabulary ({reason}); get an undamaged copy or another model",
        "{file} 不是可用的词表（{reason}）；请换一份完好的，或换一个模型",
    ),
    "damaged_dataset": (
        "{path} does not match its meta.json ({reason}); delete the folder {folder} and start again to prepare it anew",
        "{path} 与 meta.json 不符（{reason}）；删除文件夹 {folder} 后重新运行即可重新准备",
    ),
    "block_too_short": (
        "model.block_size={got} leaves hardly any room behind the labels; choose model.block_size>={want}",
        "model.block_size={got} 放下标签后几乎没有余地；请用 model.block_size>={want}",
    ),
    "no_documents": (
        "{path} has no documents for {split}; give more texts or another dataset.val_fraction",
        "{path} 里没有 {split} 用的文章；请多给文本，或改 dataset.val_fraction",
    ),
    "documents_need_end": (
        "dataset: documents need a vocabulary with an end of text, this one ({kind}) has none; choose dataset.tokenizer=char, byte, gpt2 or bpe, "
        "or init_from a model that was trained on documents",
        "dataset：成篇的数据需要带结束符的词表，这个（{kind}）没有；请用 dataset.tokenizer=char、byte、gpt2 或 bpe，"
        "或让 init_from 用按篇训练过的模型",
    ),
    "label_unwritable": (
        "{kind}={got}: the model of init_from has no token for this label and no characters to write it with; use its own labels ({have}), or train "
        "without init_from",
        "{kind}={got}：init_from 的模型没有这个标签的 token，词表里也没有写出它的字符；请用它已有的标签（{have}），或不用 init_from",
    ),
    "split": (
        "{documents:,} texts: {dropped:,} duplicates dropped, {groups:,} groups with common passages kept together (the largest: {largest:,})",
        "{documents:,} 篇文本：去掉重复 {dropped:,} 篇，{groups:,} 组有相同段落的各放在一起（最大一组 {largest:,} 篇）",
    ),
    "dropped_rare": (
        "{dropped:,} texts left out: a character in them occurs fewer than {least} times in the training texts",
        "略去 {dropped:,} 篇：其中有字在训练文本里出现不到 {least} 次",
    ),
    "prepared_documents": (
        "{name}: {train:,} documents for training ({tokens:,} tokens), {val:,} for validation, vocabulary {vocab} -> {path}",
        "{name}：训练 {train:,} 篇（{tokens:,} 个 token），验证 {val:,} 篇，词表 {vocab} -> {path}",
    ),
    "block_too_long": (
        "model.block_size={got} is longer than the {split} split ({tokens} tokens); choose model.block_size<={limit} or give more text",
        "model.block_size={got} 比 {split} 数据（{tokens} 个 token）还长；请用 model.block_size<={limit} 或提供更多文本",
    ),
    "vocab_too_small": (
        "model.vocab_size={got} is smaller than the data set's vocabulary of {need}; leave it null or choose at least {need}",
        "model.vocab_size={got} 小于数据集的词表 {need}；请留空，或至少设为 {need}",
    ),
    "vocab_mismatch": (
        "dataset {name}: its data differs from what the checkpoint was trained on ({reason}); use the run's own data or start a new run",
        "数据集 {name} 与 checkpoint 训练时的数据不同（{reason}）；请用原来的数据，或新开一次训练",
    ),
    "asset_missing": (
        "{name} could not be had: {reasons}; put the file into the folder named by NANOGPT_ASSETS{hint}",
        "拿不到 {name}：{reasons}；请把文件放进环境变量 NANOGPT_ASSETS 指向的文件夹{hint}",
    ),
    "asset_hint": (", or use {instead}", "，或改用 {instead}"),
    "missing_package": (
        "{what} needs the package {package}; install it with: pip install {package}",
        "{what} 需要 {package}；请运行：pip install {package}",
    ),
    "source_failed": (
        "dataset.source={got} could not be read ({reason}); check the name, the network or HF_ENDPOINT, or give a local folder",
        "dataset.source={got} 无法读取（{reason}）；请检查名字、网络或 HF_ENDPOINT，或改用本地文件夹",
    ),
    "preparing": ("preparing the data set {name} …", "正在准备数据集 {name} …"),
    "fetching": ("fetching {name} from {place} …", "正在从 {place} 获取 {name} …"),
    "training_bpe": ("training a vocabulary of {vocab:,} tokens …", "正在训练 {vocab:,} 个 token 的词表 …"),
    "fetching_part": ("{name}: {have:.1f} of {total:.1f} MB", "{name}：{have:.1f} / {total:.1f} MB"),
    "dataset_ready": ("ready: {path}", "已就绪：{path}"),
    "prepared": (
        "{name}: {train:,} training and {val:,} validation tokens, vocabulary {vocab} -> {path}",
        "{name}：训练 {train:,} 个 token，验证 {val:,} 个，词表 {vocab} -> {path}",
    ),
    # ---- 预训练权重 ----
    "pretrained_missing": (
        "{key}={got}: there is no such folder or file here, and it is no name on the hub; give gpt2, gpt2-medium, gpt2-large, gpt2-xl, owner/name, "
        "a folder with config.json and model.safetensors, a run folder, or a nanoGPT ckpt.pt",
        "{key}={got}：本机没有这个文件夹或文件，也不是 hub 上的名字；可用 gpt2、gpt2-medium、gpt2-large、gpt2-xl、所有者/名字、"
        "含 config.json 与 model.safetensors 的文件夹、训练目录，或 nanoGPT 的 ckpt.pt",
    ),
    "hub_package": (
        "{key}={got}: there is no such folder here, and the hub needs the package huggingface_hub (pip install huggingface_hub; HF_ENDPOINT names a "
        "mirror); or give a local folder: {key}=FOLDER with config.json and model.safetensors",
        "{key}={got}：本机没有这个文件夹，而访问 hub 需要 huggingface_hub（pip install huggingface_hub；镜像用环境变量 HF_ENDPOINT 指定）；"
        "也可给出本地文件夹：{key}=文件夹，内含 config.json 与 model.safetensors",
    ),
    "hub_failed": (
        "{key}={got}: there is no such folder here, and {endpoint} did not give it ({reason}); check the name and the network, set the environment "
        "variable HF_ENDPOINT to a mirror, or give a local folder: {key}=FOLDER with config.json and model.safetensors",
        "{key}={got}：本机没有这个文件夹，{endpoint} 也取不到（{reason}）；请检查名字与网络，用环境变量 HF_ENDPOINT 指定镜像，"
        "或给出本地文件夹：{key}=文件夹，内含 config.json 与 model.safetensors",
    ),
    "run_links": (
        "{path}: {name} in it is a link, through which a run would write elsewhere; put what it points at in its place (the run folder itself may "
        "be a link)",
        "{path}：其中的 {name} 是链接，训练会经它写到别处；请换成它指向的内容（整个运行目录可以是链接）",
    ),
    "hub_not_https": (
        "{key}={got}: HF_ENDPOINT={endpoint} is not https, and weights have no hash known beforehand; name a mirror with https, or give a "
        "local folder: {key}=FOLDER",
        "{key}={got}：HF_ENDPOINT={endpoint} 不是 https，而权重没有事先知道的摘要；请换一个支持 https 的镜像，或给出本地文件夹：{key}=文件夹",
    ),
    "pretrained_damaged": (
        "{file} cannot be used ({reason}); get an undamaged copy or choose another model",
        "{file} 无法使用（{reason}）；请换一份完好的文件，或换一个模型",
    ),
    "pretrained_unsupported": (
        "{file}: {field}={got} is not GPT-2 as this program computes it (wanted: {want}); choose another model",
        "{file}：{field}={got}，本程序的 GPT-2 不支持（应为 {want}）；请换一个模型",
    ),
    "pretrained_no_tokenizer": (
        "{path} has no tokenizer for its vocabulary of {vocab}; put the tokenizer.json of the model (or of a run with the same characters) beside it",
        "{path} 没有与词表（{vocab}）对应的分词器；请把模型的（或字符相同的训练目录里的）tokenizer.json 放在它旁边",
    ),
    "pretrained_vocab": (
        "{path}: the tokenizer has {tokens} tokens, the embedding only {rows} rows; put the model's own tokenizer.json beside it",
        "{path}：分词器有 {tokens} 个 token，而 embedding 只有 {rows} 行；请放上模型自己的 tokenizer.json",
    ),
    "init_from_scratch": (
        "init_from=scratch: random weights need no key here; leave it out", "init_from=scratch：这里从随机权重开始不用写；请去掉它",
    ),
    "init_from_resume": (
        "init_from=resume: name the run: resume=outputs/my-run to train it on, out_dir=outputs/my-run to write with it",
        "init_from=resume：请写出训练目录：继续训练用 resume=outputs/my-run，写作用 out_dir=outputs/my-run",
    ),
    "init_from_shape": (
        "{key}={got} contradicts init_from={named}, whose weights have {want}; leave {key} out, or train without init_from",
        "{key}={got} 与 init_from={named} 的权重（{want}）矛盾；请去掉 {key}，或不用 init_from",
    ),
    "init_from_tokenizer": (
        "init_from={named}: its vocabulary ({want} tokens, {want_kind}) is not that of the data ({got} tokens, {got_kind}); use dataset=text_file, "
        "labelled, plays_char, chinese_poetry or chinese_reviews with dataset.tokenizer=auto, which takes the model's own",
        "init_from={named}：它的词表（{want} 个 token，{want_kind}）与数据的（{got} 个，{got_kind}）不同；请用 dataset=text_file、"
        "labelled、plays_char、chinese_poetry 或 chinese_reviews，并让 dataset.tokenizer=auto 取用模型自己的词表",
    ),
    "started_from": ("starting from the weights of {named}", "从 {named} 的权重开始"),
    "high_rate": (
        "learning_rate={rate:g} is high for trained weights and may wipe out what they know; experiment=finetune_gpt2 uses 5e-5 with adamw",
        "learning_rate={rate:g} 对训练好的权重偏大，可能冲掉已学到的东西；experiment=finetune_gpt2 用的是 adamw 与 5e-5",
    ),
    "lora": (
        "LoRA: {trained:,} of {total:,} parameters are trained, the others are frozen",
        "LoRA：训练 {total:,} 个参数中的 {trained:,} 个，其余冻结",
    ),
    "lora_scratch": (
        "finetune=lora without init_from: the frozen weights are random; type init_from=gpt2 (or a folder, or a run) to start from trained ones",
        "finetune=lora 而没有 init_from：被冻结的是随机权重；要从训练好的权重开始，请加 init_from=gpt2（或文件夹、训练目录）",
    ),
    "lora_linears": (
        "finetune.linears={got} does not fit the model; choose from: {have}",
        "finetune.linears={got} 与模型不符；可选：{have}",
    ),
    "export_exists": (
        "TARGET={target} already holds something; choose an empty or new folder",
        "TARGET={target} 里已有内容；请选空文件夹或新文件夹",
    ),
    "export_failed": (
        "TARGET={target} cannot be written ({reason}); choose another folder",
        "TARGET={target} 无法写入（{reason}）；请换一个文件夹",
    ),
    "exported": ("written: {target}; load it with {command}", "已写出：{target}；载入方法：{command}"),
    # ---- 运行目录与 checkpoint ----
    "out_dir_exists": (
        "out_dir={path} already holds a run; choose another out_dir, continue it with {resume}, or add overwrite=true",
        "out_dir={path} 里已有一次训练；请换 out_dir，用 {resume} 继续，或加 overwrite=true",
    ),
    "shared_folder": (
        "{key}={path}: several jobs of this sweep would train in this one folder; {remedy}",
        "{key}={path}：扫描里有几个任务要在同一个目录里训练；{remedy}",
    ),
    "remedy_shared_out_dir": (
        "leave out_dir out, which gives each a folder of its own, or write {apart}", "请去掉 out_dir（每个任务就各有目录），或写 {apart}",
    ),
    "remedy_shared_resume": ("start each from its weights instead: {apart}", "请改为各自从它的权重开始：{apart}"),
    "out_dir_foreign": (
        "out_dir={path} holds files that are not a run's; choose an empty or new folder",
        "out_dir={path} 里有不属于训练的文件；请选空文件夹或新文件夹",
    ),
    "not_writable": ("out_dir={path} cannot be written ({reason}); choose another out_dir", "out_dir={path} 无法写入（{reason}）；请换 out_dir"),
    "no_run": (
        "{key}={path}: there is no checkpoint in it; give a run folder, e.g. {key}=outputs/my-run",
        "{key}={path}：里面没有 checkpoint；请给出训练目录，例如 {key}=outputs/my-run",
    ),
    "empty_prompt": ("start={got!r} is empty; give at least one character", "start={got!r} 是空的；请至少给一个字"),
    # ---- 写作 ----
    "two_prompts": (
        "{keys} name prompts twice; leave one out: start=TEXT, starts='[TEXT,TEXT]' and prompts=FILE are three ways to give them",
        "{keys} 重复给了开头；请只留一个：start=文字、starts='[文字,文字]'、prompts=文件 是三种写法",
    ),
    "empty_stop": (
        "stop holds an empty string; give at least one character or leave it out",
        "stop 里有空字符串；请至少给一个字，或去掉它",
    ),
    "bad_prompt_line": (
        "prompts={path}: line {number} is neither a string nor an object with \"prompt\"; correct it",
        "prompts={path}：第 {number} 行既不是字符串，也不是带 \"prompt\" 的对象；请改正",
    ),
    "bad_prompt_list": (
        "prompts={path}: item {number} of what should be one list of strings, or of objects with \"prompt\", is neither; "
        "correct it, or give one prompt per line in a .txt file",
        "prompts={path}：整个文件应是一个列表，每项是字符串或带 \"prompt\" 的对象，而第 {number} 项不是；请改正，或在 .txt 里每行写一个开头",
    ),
    "large_prompts": (
        "{key}={got}: {size:,.0f} MiB are too many for prompts (at most {most}); give a smaller file",
        "{key}={got}：有 {size:,.0f} MiB，不会是开头（至多 {most} MiB）；请给小一些的文件",
    ),
    "no_prompts": ("prompts={path} holds no prompt; give one per line", "prompts={path} 里没有开头；请每行写一个"),
    "output_not_writable": (
        "output={got} cannot be written ({reason}); choose another file",
        "output={got} 无法写入（{reason}）；请换一个文件",
    ),
    "nonfinite_logits": (
        "the model's logits are not finite: its weights are damaged or precision is too small for them; try precision=fp32 or another checkpoint",
        "模型的 logits 不是有限数：权重已损坏，或当前 precision 装不下；请试 precision=fp32，或换一个 checkpoint",
    ),
    "sample_oom": (
        "out of memory even with one text at a time; choose a smaller model, fewer max_new_tokens, precision=int8 or device=cpu",
        "一次只写一段仍然显存不足；请选更小的模型、更少的 max_new_tokens，或用 precision=int8、device=cpu",
    ),
    "compiling_step": (
        "compiling the fast decoder for this processor, once …",
        "正在为本机处理器编译快速解码器，只需一次 …",
    ),
    "no_graph": (
        "this card records no CUDA graph ({reason}); writing goes on step by step, more slowly",
        "这块显卡无法录制 CUDA graph（{reason}）；改为逐步执行，会慢一些",
    ),
    "progress_writing": ("writing", "写作中"),
    # ---- 网页与 API ----
    "host_needs_token": (
        "server.host={got} can be reached from other machines; set server.token=… (or the environment variable NANOGPT_TOKEN), "
        "or use server.host=127.0.0.1",
        "server.host={got} 能被别的机器访问；请设置 server.token=…（或环境变量 NANOGPT_TOKEN），或用 server.host=127.0.0.1",
    ),
    "bad_token": (
        "server.token is too short or has other characters; give at least 8 of: A-Z a-z 0-9 . _ ~ + / -",
        "server.token 太短或含有别的字符；请用至少 8 个：A-Z a-z 0-9 . _ ~ + / -",
    ),
    "port_taken": (
        "server.port={got} cannot be used on {host} ({reason}); choose another port, or server.port=0 for a free one",
        "server.port={got} 在 {host} 上不可用（{reason}）；请换一个端口，或用 server.port=0 任选空闲端口",
    ),
    "bad_host": (
        "server.host={got} is not an address of this machine ({reason}); use 127.0.0.1, or 0.0.0.0 for every address",
        "server.host={got} 不是本机的地址（{reason}）；请用 127.0.0.1，或用 0.0.0.0 监听所有地址",
    ),
    "serving": (
        "writing with {model}; open {url} in a browser, or use {url}v1 as an OpenAI-compatible base URL (Ctrl-C stops)",
        "正在用 {model} 写作；请在浏览器打开 {url}，或把 {url}v1 当作 OpenAI 兼容的 base URL（Ctrl-C 结束）",
    ),
    "api_not_json": ("the body is not a JSON object in UTF-8 ({reason})", "正文不是 UTF-8 的 JSON 对象（{reason}）"),
    "api_two_lengths": (
        "the request names its length twice (Content-Length and Transfer-Encoding); send one of them",
        "请求用两种方式给出长度（Content-Length 与 Transfer-Encoding）；请只用一种",
    ),
    "api_content_type": ("the content type is {got}; send application/json", "内容类型是 {got}；请发送 application/json"),
    "api_unknown_field": (
        "{field}: there is no such field with the sampler and control that this server was started with; known fields: {known}",
        "{field}：这个服务器启动时选的 sampler 与 control 没有这个字段；可用的字段：{known}",
    ),
    "api_wrong_type": ("{field} has the wrong type; it must be {wanted}", "{field} 类型不对，应为 {wanted}"),
    "api_out_of_range": ("{field}={got} is out of range; it must be {wanted}", "{field}={got} 超出范围，应为 {wanted}"),
    "api_unknown_characters": (
        'the vocabulary lacks {characters}; leave them out, or have them passed over ("unknown": "skip")',
        '词表里没有 {characters}；请去掉这些字符，或让它们被跳过（"unknown": "skip"）',
    ),
    "api_no_prompt": ("prompt is missing, empty or wrong; it must be {wanted}", "没有 prompt、它是空的或写得不对；应为 {wanted}"),
    "api_too_many_texts": (
        "prompts x n = {got}; at most {limit} texts per request (server.max_texts)",
        "开头数 × n = {got}；一个请求最多 {limit} 段（server.max_texts）",
    ),
    "api_no_model": ("{got} is not loaded here; the model is called {have}", "这里没有载入 {got}；载入的模型叫 {have}"),
    "api_no_chat": (
        'this model goes on with a text and does not chat; POST {{"prompt": "…"}} to /v1/completions instead '
        "(clients call it text completion)",
        '这个模型只会接着写，不会对话；请改用 POST /v1/completions 与 {{"prompt": "…"}}（客户端里叫 text completion）',
    ),
    "api_best_of": (
        "best_of={got}: texts are not chosen among here, so best_of must equal n ({n}) or be left out",
        "best_of={got}：这里不从几段里挑选，best_of 须等于 n（{n}）或不写",
    ),
    "prompt_over_context": (
        "prompt has {got} tokens; scoring it (logprobs with echo) takes at most the model's context of {limit}",
        "prompt 有 {got} 个 token；给它评分（logprobs 加 echo）最多 {limit} 个，即模型的上下文长度",
    ),
    "api_too_large": ("the body is larger than {limit} KiB (server.max_body_kib)", "正文超过 {limit} KiB（server.max_body_kib）"),
    "api_slow_body": (
        "the body did not arrive within {seconds:g} s (server.read_seconds)", "正文没有在 {seconds:g} 秒内发完（server.read_seconds）",
    ),
    "api_busy": (
        "too many texts are waiting (server.max_waiting); try again in a few seconds", "排队的太多（server.max_waiting）；请过几秒再试",
    ),
    "api_time_limit": ("not finished within {seconds:g} s (server.request_seconds)", "没有在 {seconds:g} 秒内写完（server.request_seconds）"),
    "api_unread": (
        "too much was left unread, or for too long (server.max_unread_chars, server.stall_seconds); the text was stopped",
        "文字积下太多或太久没有取走（server.max_unread_chars、server.stall_seconds）；已停止写作",
    ),
    "api_stopping": ("the server is shutting down", "服务器正在关闭"),
    "api_internal": ("an error inside the server; its console says more", "服务器内部出错；详情见它的控制台"),
    "api_token": ("this server asks for its token: Authorization: Bearer …", "这个服务器需要口令：Authorization: Bearer …"),
    "api_host": (
        "Host: {got} is not this machine's own name; open the page through 127.0.0.1 or localhost",
        "Host: {got} 不是本机的名字；请用 127.0.0.1 或 localhost 打开",
    ),
    "api_origin": ("a page of another origin may not use this server", "别的网站的页面不能使用这个服务器"),
    "api_not_found": ("there is nothing at this address", "这个地址没有内容"),
    "api_method": ("this address does not take {got}", "这个地址不接受 {got}"),
    "no_such_checkpoint": (
        "checkpoint={got}: {path} has no such checkpoint; choose one of: {have}",
        "checkpoint={got}：{path} 里没有这个 checkpoint；可选：{have}",
    ),
    "damaged_checkpoint": (
        "{file} is damaged ({reason}); {remedy}",
        "{file} 已损坏（{reason}）；{remedy}",
    ),
    "older_checkpoint": ("the next older good one is checkpoint={name}", "更早的完好 checkpoint：checkpoint={name}"),
    "other_checkpoint": ("a good one is checkpoint={name}", "完好的有 checkpoint={name}"),
    "other_run": ("it belongs to another run", "属于另一次训练"),
    "update_program": ("update nanogpt", "请更新 nanogpt"),
    "record_damaged": (
        "{file} is damaged ({reason}); what it held is taken from the rest of the folder, and it is written anew",
        "{file} 已损坏（{reason}）；其中的内容取自目录里的其他文件，并重新写出",
    ),
    "nothing_begun": (
        "resume={path}: there is no checkpoint and no config that could be read ({reason}), so nothing trained can be lost; "
        "begin anew: type the first command again with out_dir={path} overwrite=true",
        "resume={path}：里面没有 checkpoint，也没有读得出的配置（{reason}），没有训练成果可丢；"
        "请重新开始：再敲一遍当初的命令，加 out_dir={path} overwrite=true",
    ),
    "two_checkpoints": (
        "checkpoint={got} is not the checkpoint {named} that was named; type one of them",
        "checkpoint={got} 与指名的 {named} 不是同一个 checkpoint；请只写其中一个",
    ),
    "checkpoint_of_nothing": (
        "checkpoint={got}: there is no run to take it from; add resume=<run folder> to go on from it, or init_from=<run folder> to start from it",
        "checkpoint={got}：没有说明是哪次训练的；接着训请加 resume=<训练目录>，从它开始请加 init_from=<训练目录>",
    ),
    "run_in_use": (
        "{path}: process {process} is training there; wait until it ends, or choose another out_dir",
        "{path}：进程 {process} 正在那里训练；请等它结束，或换 out_dir",
    ),
    "begun_again": ("{path} has no checkpoint yet: beginning again from iteration 0", "{path} 里还没有 checkpoint：从第 0 次迭代重新开始"),
    "no_older_checkpoint": ("there is no older good one; start a new run", "没有更早的完好 checkpoint；请重新训练"),
    "newer_format": (
        "{file}: has format {got}, this program reads up to {want}; update nanogpt",
        "{file}：格式版本是 {got}，本程序最高支持 {want}；请更新 nanogpt",
    ),
    "resume_changes": (
        "{key} cannot change on resume ({old} -> {new}); leave it out or start a new run",
        "继续训练时不能改 {key}（{old} -> {new}）；请去掉它，或新开一次训练",
    ),
    "already_done": (
        "the run already stands at iteration {iteration} of max_iters={max_iters}; add max_iters={more} to train on",
        "训练已到第 {iteration} 次迭代（max_iters={max_iters}）；加 max_iters={more} 可继续",
    ),
    "save_failed": (
        "could not save a checkpoint ({reason}); the older ones are kept, trying again in {seconds} s; free some disk space",
        "checkpoint 保存失败（{reason}）；旧的仍在，{seconds} 秒后重试；请腾出磁盘空间",
    ),
    "never_saved": (
        "the last checkpoint could not be saved ({reason}); the newest one is {checkpoint}; free some disk space and continue with {resume}",
        "最后的 checkpoint 没能保存（{reason}）；最新的完好 checkpoint 是 {checkpoint}；请腾出磁盘空间，再用 {resume} 继续",
    ),
    "logger_refused": (
        "logger: {name} refuses to begin ({reason}); mend that, or choose another: logger=tensorboard, logger=none",
        "logger：{name} 无法开始（{reason}）；请先解决它，或换一个：logger=tensorboard、logger=none",
    ),
    "logger_failed": (
        "{name} cannot write ({reason}); training goes on, metrics may be missing",
        "{name} 写不进去（{reason}）；训练继续，曲线可能缺一段",
    ),
    # ---- 训练过程 ----
    "start": (
        "{model}: {parameters} parameters ({arch}), {precision} on {device}, {tokens:,} tokens per iteration "
        "({batch} x {accum} x {block}{world})",
        "{model}：{parameters} 参数（{arch}），{precision}，{device}，每次迭代 {tokens:,} 个 token（{batch} × {accum} × {block}{world}）",
    ),
    "peak_of_card": ("the fastest matrix product seen on {name}", "{name} 上见过的最快的矩阵乘"),
    "peak_of_threads": (
        "{threads} x the fastest one-thread matrix product seen on {name}", "{threads} 个线程，各按 {name} 上见过的最快的单线程矩阵乘",
    ),
    "peak": ("MFU against {source}: {tflops:.2f} TFLOP/s", "MFU 基准：{source}，{tflops:.2f} TFLOP/s"),
    "eval_part": (
        "validation: {tokens:,} of {total:,} tokens, the same ones every time",
        "验证：{total:,} 个 token 中固定的 {tokens:,} 个",
    ),
    "resumed": ("continuing {path} at iteration {iteration}", "从第 {iteration} 次迭代继续 {path}"),
    "iter": (
        "iter {iteration}: train loss {train_loss}, {val}lr {lr:.2e}, {speed}{memory}",
        "迭代 {iteration}: 训练损失 {train_loss}, {val}学习率 {lr:.2e}, {speed}{memory}",
    ),
    "iter_speed": ("{speed:.0f} tokens/s, MFU {mfu:.2%}, ", "速度 {speed:.0f} tokens/s, MFU {mfu:.2%}, "),
    "iter_val": ("val loss {val_loss:.4f}, ", "验证损失 {val_loss:.4f}, "),
    "vram": (
        "VRAM {allocated:.2f}GB (reserved {reserved:.2f}, peak {peak:.2f})",
        "显存 {allocated:.2f}GB（保留 {reserved:.2f}，峰值 {peak:.2f}）",
    ),
    "ram": ("RAM {allocated:.2f}GB (peak {peak:.2f})", "内存 {allocated:.2f}GB（峰值 {peak:.2f}）"),
    "progress": ("training", "训练中"),
    "compile_off": (
        "compile={asked}: not available here ({reason}); going on without it",
        "compile={asked}：本机不可用（{reason}）；不编译，继续训练",
    ),
    "compile_failed": ("torch.compile failed ({reason}); going on without it", "torch.compile 失败（{reason}）；不编译，继续训练"),
    "compiling": ("compiling the model, the first iteration takes longer …", "正在编译模型，第一次迭代会慢一些 …"),
    "oom_shrink": (
        "iter {iteration}: out of memory; micro-batch {old} -> {new}, accumulation {accum}, same step again with the same data",
        "迭代 {iteration}: 显存不足；微批 {old} -> {new}，累积 {accum} 次，用同样的数据重做这一步",
    ),
    "oom_final": (
        "out of memory in the {phase} with {rows} rows at a time, which cannot be divided further; "
        "add memory=lean, or choose a smaller model or model.block_size",
        "{phase}时内存不足，每次 {rows} 条，不能再分了；请加 memory=lean，或选更小的 model 或 model.block_size",
    ),
    "nonfinite": (
        "iter {iteration}: {what} is not finite; step skipped ({count} in a row)",
        "迭代 {iteration}: {what} 不是有限数；跳过这一步（连续 {count} 次）",
    ),
    "nonfinite_partly": (
        "iter {iteration}: {what} is not finite; the parameters that it belongs to were left as they are ({count} in a row)",
        "迭代 {iteration}: {what} 不是有限数；对应的那些参数这一步不更新（连续 {count} 次）",
    ),
    "nonfinite_evaluation": (
        "iter {iteration}: the validation loss is not finite although every weight is; this evaluation does not count",
        "迭代 {iteration}: 验证损失不是有限数，而权重都是；这次评估不算",
    ),
    "diverged": ("{count} steps in a row were not finite; {remedy}", "连续 {count} 步不是有限数；{remedy}"),
    "broken": (
        "iter {iteration}: {tensor} is not finite any more and cannot recover; this state is not saved; {remedy}",
        "迭代 {iteration}: {tensor} 已不是有限数，不会自己恢复；这个状态不保存；{remedy}",
    ),
    "nan_weights": ("{tensor} holds NaN or Inf", "{tensor} 里有 NaN 或 Inf"),
    "broken_start": (
        "{tensor} is not finite in what this run starts from; choose another checkpoint=… (best, or an older iter_…) or another init_from",
        "这次训练的起点里，{tensor} 不是有限数；请换一个 checkpoint=…（best 或更早的 iter_…），或换 init_from",
    ),
    "runaway": (
        "{count} of the last {steps} steps had a training loss above that of guessing ({uniform:.2f}; now {loss:.2f}), which had been lower before: "
        "the run has diverged; {remedy}",
        "最近 {steps} 步里有 {count} 步的训练损失高于乱猜的水平（{uniform:.2f}，现为 {loss:.2f}），而此前更低：已经发散；{remedy}",
    ),
    "remedy_last": (
        "the last good checkpoint is {checkpoint}; continue from it with a lower rate: {resume}{which} learning_rate={rate:.1e}",
        "最后的完好 checkpoint 是 {checkpoint}；请降低学习率后继续：{resume}{which} learning_rate={rate:.1e}",
    ),
    "remedy_best": (
        "the best checkpoint is {checkpoint}; continue from it with a lower rate: {resume}{which} learning_rate={rate:.1e}",
        "最好的 checkpoint 是 {checkpoint}；请降低学习率后继续：{resume}{which} learning_rate={rate:.1e}",
    ),
    "remedy_again": (
        "nothing has been saved yet; start again with a lower rate: learning_rate={rate:.1e}",
        "还没有存过 checkpoint；请降低学习率重新开始：learning_rate={rate:.1e}",
    ),
    "early_stop": (
        "val loss has not improved for {count} evaluations; stopping (early_stop_evals)",
        "验证损失连续 {count} 次没有改善；提前停止（early_stop_evals）",
    ),
    "target_reached": (
        "val loss {loss:.4f} is at or below target_val_loss={target}; stopping",
        "验证损失 {loss:.4f} 已达到 target_val_loss={target}；停止",
    ),
    "interrupted": (
        "interrupted: saving after this step; once more to exit at once",
        "收到中断：做完这一步就保存；再按一次立即退出",
    ),
    "stopped": ("stopped at iteration {iteration}, saved; continue with: {command}", "已停在第 {iteration} 次迭代并保存；继续训练：{command}"),
    "sample_title": ("what it writes now:", "它现在写出来的："),
    "finished": (
        "done: val loss {val_loss:.4f} (best {best:.4f}) after {iteration} iterations in {wall}, {speed:.0f} tokens/s",
        "完成：{iteration} 次迭代，用时 {wall}，验证损失 {val_loss:.4f}（最好 {best:.4f}），{speed:.0f} tokens/s",
    ),
    "where": (
        "everything is in {path}: ckpt/ (weights), metrics.jsonl, {logs}config.yaml, summary.json",
        "结果都在 {path}：ckpt/（权重）、metrics.jsonl、{logs}config.yaml、summary.json",
    ),
    "where_logs": ("logs/ (TensorBoard), ", "logs/（TensorBoard）、"),
    "next": ("next:", "接下来可以："),
    "next_sample": ("write with it", "用它写作"),
    "next_longer": ("train longer", "继续训练"),
    "next_curves": ("see the curves", "看曲线"),
    "next_own": ("your own text", "用自己的文本"),
    # ---- 互动写作 ----
    "not_with_serve": (
        "serve=true writes for a browser or a program; leave out {key}=…",
        "serve=true 是给浏览器或程序写作；请去掉 {key}=…",
    ),
    "interactive_prompts": (
        "interactive=true reads its prompts from the terminal or a pipe; leave out {key}=…",
        "interactive=true 从终端或管道读开头；请去掉 {key}=…",
    ),
    "interactive_welcome": (
        "{model}\ntype a beginning and press Enter; /help shows the commands, Ctrl-C stops a text, Ctrl-D leaves",
        "{model}\n输入开头后回车；/help 看命令，Ctrl-C 停下这一段，Ctrl-D 离开",
    ),
    "interactive_help": (
        "  /temperature 0.5           lower is safer, 0 is greedy; other keys of the sampler: {sampler_keys}\n"
        "  /sampler top_p             another strategy; /tokens 200 /samples 3 /seed 7 /stop \\n\n"
        "  /style poetic  /emotion happy   for all texts from now on; nothing behind it clears it\n"
        "  style:poetic| emotion:happy| It was     for this text only\n"
        "  /control                   styles and emotions, the model's labels first; /control guidance 2, /control strength 3, /control none\n"
        "  /again  /more              the same beginning with the next seed; go on from the last text\n"
        "  /unknown skip              pass over characters that the vocabulary lacks; /unknown error names them\n"
        "  /save [all] FILE.txt|.jsonl     append the last text, or all texts, to a file\n"
        "  /settings  /help  /quit    Alt-Enter starts a new line, // begins a text with a slash",
        "  /temperature 0.5           越低越保守，0 为贪心；sampler 的其他设置：{sampler_keys}\n"
        "  /sampler top_p             换采样策略；/tokens 200 /samples 3 /seed 7 /stop \\n\n"
        "  /style 充满诗意  /emotion 开心    对之后所有文字有效；后面什么也不写即清除\n"
        "  style:充满诗意| emotion:开心| 春天    只对这一段有效\n"
        "  /control                   风格与情绪，模型的标签在前；/control guidance 2，/control strength 3，/control none\n"
        "  /again  /more              同一开头换下一个种子；接着上一段写\n"
        "  /unknown skip              跳过词表没有的字；/unknown error 则报错\n"
        "  /save [all] 文件.txt|.jsonl     把上一段或全部文字追加到文件\n"
        "  /settings  /help  /quit    Alt-Enter 换行；// 是以斜杠开头的文字",
    ),
    "toolbar_keys": ("/help", "/help 帮助"),
    "sample_stopped": ("[stopped]", "[已停下]"),
    "setting": ("{key}={value}", "{key}={value}"),
    "saved": ("{count} text(s) appended to {path}", "{count} 段文字已追加到 {path}"),
    "unknown_command": (
        "/{got}: there is no such command{guess}; /help shows them all",
        "/{got}：没有这个命令{guess}；/help 查看全部命令",
    ),
    "unknown_setting": (
        "{group}.{got}: there is no such setting; choose one of: {known}",
        "{group}.{got}：没有这项设置；可选：{known}",
    ),
    "unreadable_value": (
        "{key}={got!r} cannot be read; give one value, e.g. a number",
        "{key}={got!r} 无法解析；请给一个值，例如数字",
    ),
    "nothing_written": ("no text has been written yet; type a beginning first", "还没有写过文字；请先输入一个开头"),
    "save_suffix": (
        "/save {got}: the file's name must end in .txt or .jsonl",
        "/save {got}：文件名要以 .txt 或 .jsonl 结尾",
    ),
    "save_not_writable": ("/save {got}: cannot be written ({reason}); choose another file", "/save {got}：无法写入（{reason}）；请换一个文件"),
    "control_off": (
        "control={name} has no {kind}; type /control codes first",
        "control={name} 没有 {kind} 这一项；请先输入 /control codes",
    ),
    "control_knows": ("{kind}: {names} — or any other words", "{kind}：{names}，或任何文字"),
    "control_no_label": (
        "control.{kind}={got} is no label of this model (it knows {known}); a sentence and words ask for it as with control=prefix",
        "control.{kind}={got} 不是这个模型的标签（它认识 {known}）；像 control=prefix 那样用一句话和加分的词",
    ),
    "control_no_label_no_words": (
        "control.{kind}={got} is no label of this model (it knows {known}), whose vocabulary cannot write it either; left out",
        "control.{kind}={got} 不是这个模型的标签（它认识 {known}），用它的词表也写不出来；略去",
    ),
    "guidance_without_label": (
        "control.guidance={got} has no effect on a text without a label; the model knows {known}",
        "control.guidance={got} 对没有标签的文字不起作用；模型认识 {known}",
    ),
    "guidance_without_labels": (
        "control.guidance={got} has no effect: the model was trained without labels",
        "control.guidance={got} 不起作用：模型训练时没有标签",
    ),
    "control_no_words": (
        "control.{kind}={got} is used as it is written, without words to lead the text to; those with words: {known}",
        "control.{kind}={got} 照原文使用，没有可加分的词；有词的：{known}",
    ),
    "control_no_sentence": (
        "control.{kind}={got}: the vocabulary lacks {characters} of its sentence, which is left out",
        "control.{kind}={got}：词表里没有它那句话里的 {characters}，这句话略去",
    ),
    "control_unwritable": (
        "control.{kind}={got}: the vocabulary can write none of its words; no bias",
        "control.{kind}={got}：它的词用这个词表一个也写不出，不加分",
    ),
    "bad_label": (
        "{key} needs zh: [names], en: [names] and may have words: {{zh: [...], en: [...]}}",
        "{key} 要有 zh: [名字]、en: [名字]，可以有 words: {{zh: [...], en: [...]}}",
    ),
    # ---- 评估风格与情绪 ----
    "evaluate_no_labels": (
        "{model} knows no labels of style or emotion; train with dataset=chinese_poetry, chinese_reviews or labelled",
        "{model} 没有风格或情绪的标签；请用 dataset=chinese_poetry、chinese_reviews 或 labelled 训练",
    ),
    "evaluate_no_kind": ("--kind {got}: the model has labels for {have} only; choose that", "--kind {got}：模型只有 {have} 的标签；请改用它"),
    "evaluate_no_data": (
        "OUT_DIR={path}: its texts are neither in its data/ nor in {folder}; put the data set folder there, or train with a larger bundle_data_mib",
        "OUT_DIR={path}：它的文本既不在自己的 data/ 里，也不在 {folder}；请把数据集文件夹放回去，或训练时调大 bundle_data_mib",
    ),
    "evaluate_own_key": (
        "{key}=… is set by the evaluation itself; leave it out",
        "{key}=… 由评估自己决定；请去掉它",
    ),
    "judge_lacks_label": (
        "judge.jsonl of the data set has {count} texts labelled {label}, a judge needs {need}; prepare it with more texts or a larger judge part",
        "数据集的 judge.jsonl 里标为 {label} 的只有 {count} 篇，评判至少要 {need} 篇；请给更多文本，或调大 judge 的份额",
    ),
    "file_not_writable": ("{key} {got}: cannot be written ({reason}); choose another file", "{key} {got}：无法写入（{reason}）；请换一个文件"),
    "picture_suffix": ("--plot {got}: the file's name must end in .png or .svg", "--plot {got}：文件名要以 .png 或 .svg 结尾"),
    "not_an_evaluation": (
        "{got} is not what --output writes ({reason}); make it with: python -m nanogpt.control evaluate OUT_DIR --output {typed}",
        "{got} 不是 --output 写出的文件（{reason}）；请先运行：python -m nanogpt.control evaluate OUT_DIR --output {typed}",
    ),
    "evaluate_title": (
        "{run} ({checkpoint}) on {device}: {samples} texts for each {kind}, seeds from {seed}, {sampler}",
        "{run}（{checkpoint}，{device}）：每种{kind} 写 {samples} 篇，种子从 {seed} 起，{sampler}",
    ),
    "judge_form": (
        "judge: the form. Segments and their lengths decide, exactly for the four regular forms; 宋词, 元曲 or neither by a regression on them",
        "评判：形式。看句读的段数与每段字数：近体诗四种完全精确；宋词、元曲或都不是，由对段长的回归判定",
    ),
    "judge_text": (
        "judge: TF-IDF of 1 to 3 characters and logistic regression, trained on texts that the model has never seen",
        "评判：1 至 3 字的 TF-IDF 与逻辑回归，用模型从未见过的文本训练",
    ),
    "judge_accuracy": (
        "the judge itself is right on {rate:.1%} of real held-out texts (95%: {low:.1%} to {high:.1%}; mean over labels, {n:,} texts)",
        "评判自己在没见过的真实文本上的正确率：{rate:.1%}（95% 区间 {low:.1%} 至 {high:.1%}；各标签平均，共 {n:,} 篇）",
    ),
    "evaluate_real": (
        "real texts (hits: the judge on its held-out texts; the rest: validation texts)",
        "真实文本（命中：评判在留出文本上；其余：验证文本）",
    ),
    "setting_codes": ("control=codes control.guidance={guidance:g}", "control=codes control.guidance={guidance:g}"),
    "setting_prefix": (
        "control=prefix: the wish as on the command line, a sentence before the text and words raised (nothing trained in)",
        "control=prefix：与命令行上一样，前面加一句话、给词加分（没有训练）",
    ),
    "setting_none": (
        "control=none: nothing is asked (if every text had one of the labels, evenly: {chance:.1%})",
        "control=none：不作要求（若每篇都有一种标签且各占一份：{chance:.1%}）",
    ),
    "column_label": ("label", "标签"),
    "column_hits": ("hits", "命中"),
    "column_rate": ("hit rate", "命中率"),
    "column_interval": ("95%", "95% 区间"),
    "column_judge": ("real", "真实文本"),
    "column_distinct": ("distinct-1/2/3", "distinct-1/2/3"),
    "column_pairs": ("known pairs", "见过的字对"),
    "column_copies": ("copies", "照抄"),
    "column_length": ("length", "字数"),
    "column_finished": ("finished", "写完"),
    "column_perplexity": ("perplexity", "困惑度"),
    "row_total": ("mean", "平均"),
    "evaluate_missed": ("{label} missed: {found}", "{label} 未命中：{found}"),
    "evaluate_tunes": (
        "ci with exactly the segment lengths of a real one: {hits} of {n}, {rate:.1%} (95%: {low:.1%} to {high:.1%}; real validation ci: {real:.1%})",
        "各段字数与某首真实的词完全相同的词：{n} 首中 {hits} 首，{rate:.1%}（95% 区间 {low:.1%} 至 {high:.1%}；真实的验证词：{real:.1%}）",
    ),
    "evaluate_perplexity": (
        "perplexity of real validation texts at this guidance: {value:.2f} per token (without labels: {without:.2f})",
        "此 guidance 下真实验证文本的困惑度：每 token {value:.2f}（不带标签：{without:.2f}）",
    ),
    "evaluate_written": ("written: {path}", "已写出：{path}"),
    "miss_empty": ("empty", "空白"),
    "miss_repetitive": ("turning in circles", "反复打转"),
    "miss_formless": ("no form", "不成体"),
    "miss_unfinished": ("unfinished", "没写完"),
    "miss_repeated": ("written before", "与前面的相同"),
    # ---- 计划 ----
    "budget_spent": (
        "hardware.vram_gib={vram} leaves nothing after context_gib={context} and desktop_gib={desktop}; raise it or lower those",
        "hardware.vram_gib={vram} 减去 context_gib={context} 与 desktop_gib={desktop} 后没有剩余；请调大它，或调小后两项",
    ),
    "plan_untraceable": (
        "model._target_={target} cannot be planned ({reason}); its step may not depend on values: measure it with a small batch_size instead",
        "model._target_={target} 无法预测（{reason}）：训练步不能依赖张量的数值；请改用小的 batch_size 实际训练来测",
    ),
    "plan_init_from": (
        "init_from={got}: the plan needs a local copy or gpt2, gpt2-medium, gpt2-large, gpt2-xl; download it, or plan with model=… of its shape",
        "init_from={got}：预测需要本机的文件，或 gpt2、gpt2-medium、gpt2-large、gpt2-xl；请先下载，或用形状相同的 model=… 来预测",
    ),
    "plan_tracing": ("tracing {what} …", "正在追踪 {what} …"),
    "plan_title": (
        "plan: {model}, {parameters}, {precision}, memory={memory}, batch {batch} x {accum} x {block} tokens -> {device}",
        "预测：{model}，{parameters} 参数，{precision}，memory={memory}，批量 {batch} × {accum} × {block} token -> {device}",
    ),
    "plan_auto_batch": (
        "batch_size=auto: {batch} is the largest that fits by the model; the training itself measures which is fastest",
        "batch_size=auto：按模型推算，放得下的最大值是 {batch}；训练时再实测哪个最快",
    ),
    "plan_vocab": ("vocabulary {vocab} ({source})", "词表 {vocab}（{source}）"),
    "plan_vocab_model": ("model.vocab_size", "model.vocab_size"),
    "plan_vocab_data": ("the prepared data set", "已准备好的数据集"),
    "plan_vocab_init": ("init_from", "init_from"),
    "plan_vocab_tokenizer": ("the tokenizer", "分词器"),
    "plan_vocab_assumed": (
        "assumed, the data is not prepared yet; type model.vocab_size=… if you know better",
        "假定值，数据还没准备；若知道实际大小，请写 model.vocab_size=…",
    ),
    "plan_part": ("part", "部分"),
    "plan_share": ("of the budget", "占预算"),
    "plan_weights": ("weights", "权重"),
    "plan_gradients": ("gradients", "梯度"),
    "plan_optimizer": ("optimizer state", "优化器状态"),
    "plan_activations": ("activations", "激活"),
    "plan_temporaries": ("temporaries", "临时张量"),
    "plan_rounding": ("rounding, fragments", "取整与碎片"),
    "plan_workspace": ("cuBLAS workspace", "cuBLAS 工作区"),
    "plan_context": ("CUDA context", "CUDA 上下文"),
    "plan_process": ("the process itself", "进程本身"),
    "plan_desktop": ("desktop, others", "桌面与其他程序"),
    "plan_total": ("predicted peak", "预测峰值"),
    "plan_budget": ("budget", "预算"),
    "plan_ram": ("optimizer state in RAM: {gib:.2f} GiB", "放在内存里的优化器状态：{gib:.2f} GiB"),
    "plan_fits": ("FITS", "放得下"),
    "plan_tight": ("TIGHT", "勉强"),
    "plan_does_not_fit": ("DOES NOT FIT", "放不下"),
    "plan_verdict": (
        "{verdict}: {total:.2f} GiB of {budget:.2f} GiB (fits: within 95% of what the allocator may reserve)",
        "{verdict}：{total:.2f} / {budget:.2f} GiB（“放得下”指不超过分配器可用量的 95%）",
    ),
    "plan_speed": (
        "about {speed:,.0f} tokens/s, {step} per step, {wall} for {iters} iterations with evaluation",
        "约 {speed:,.0f} token/s，每步 {step}，{iters} 次迭代连同评估约 {wall}",
    ),
    "plan_assumptions": (
        "roofline: {half:.1f} (16-bit) and {fp32:.1f} (fp32) TFLOP/s, {bandwidth:.0f} GB/s [{source}], "
        "of which {products:.0%} and {passes:.0%} are reached, {launch:.0f} us per operation; without torch.compile",
        "按 roofline 估计：{half:.1f}（16 位）与 {fp32:.1f}（fp32）TFLOP/s，{bandwidth:.0f} GB/s［{source}］，"
        "各达到 {products:.0%} 与 {passes:.0%}，每个运算另计 {launch:.0f} us；未计 torch.compile",
    ),
    "plan_advice": ("to make it fit, fastest first (speed relative to the setting above):", "可以这样放下，最快的在前（速度相对于上面的设置）："),
    "plan_no_advice": (
        "no combination of batch_size, memory=… and block_size that was tried fits; choose a smaller model",
        "试过的 batch_size、memory=… 与 block_size 组合都放不下；请换小一些的模型",
    ),
    "plan_matrix_title": (
        "largest batch_size that fits, at the model's block_size, {optimizer}, vocabulary {vocab}; - : not even one row, + : more was not tried",
        "放得下的最大 batch_size（block_size 取各模型自己的，{optimizer}，词表 {vocab}）；- 表示一条也放不下，+ 表示没有再往上试",
    ),
    # ---- 试跑、扫描与报告 ----
    "trial_predicted": ("predicted {predicted:.1f} GiB > {budget:.1f}", "预测 {predicted:.1f} GiB > {budget:.1f}"),
    "trial_timeout": (
        "not done after {seconds:.0f} s (during: {phase}); raise trial.timeout_s if it was only slow",
        "{seconds:.0f} 秒内没有做完（阶段：{phase}）；若只是慢，可加大 trial.timeout_s",
    ),
    "trial_watched": ("ended at {rss:.2f} GiB, above the budget (during: {phase})", "用到 {rss:.2f} GiB，超出预算，已结束（阶段：{phase}）"),
    "trial_killed": ("killed by the system, which was out of memory (during: {phase})", "系统内存耗尽，被系统结束（阶段：{phase}）"),
    "trial_ended": (
        "SIGKILL (during: {phase}): ended by someone, or by a program that guards the memory; the system itself ended nothing for want of memory",
        "SIGKILL（阶段：{phase}）：被人或看守内存的程序结束；系统自己没有因内存不足结束过程序",
    ),
    "trial_crashed": ("{how} (during: {phase}): {line}", "{how}（阶段：{phase}）：{line}"),
    "trial_exit_code": ("exit code {code}", "退出码 {code}"),
    "trial_lock": (
        "the lock of trials {path} cannot be taken ({reason}); "
        "name a folder of your own with the environment variable NANOGPT_CACHE",
        "试跑的锁 {path} 拿不到（{reason}）；请用环境变量 NANOGPT_CACHE 指定一个你自己的目录",
    ),
    "trial_not_with": (
        "{key}={got} cannot be tried; leave it out, or give a number",
        "{key}={got} 不能试跑；请去掉，或给一个数",
    ),
    "trial_interrupted": (
        "interrupted; what is finished is kept, the same command goes on from there",
        "已中断；做完的都留着，再敲同一条命令会接着做",
    ),
    "trial_defaults": ("the defaults", "默认设置"),
    "trial_ok": (
        "trial {what}: {speed:,.0f} tokens/s, {held:.2f} of {budget:.2f} GiB",
        "试跑 {what}：{speed:,.0f} tokens/s，{held:.2f} / {budget:.2f} GiB",
    ),
    "trial_not_ok": ("trial {what}: {status}: {reason}", "试跑 {what}：{status}：{reason}"),
    "trial_known": (" (known from before)", "（以前测过）"),
    "spill_free": (
        "held {held:.1f} GiB, but only {free:.1f} were free before the run: the driver paged VRAM to RAM",
        "占用 {held:.1f} GiB，而运行前只空闲 {free:.1f}：驱动把显存换到了内存",
    ),
    "spill_slow": (
        "{speed:,.0f} tokens/s with nearly all VRAM in use, {predicted:,.0f} were predicted: the driver paged VRAM to RAM",
        "显存将满时只有 {speed:,.0f} tokens/s，预测是 {predicted:,.0f}：驱动把显存换到了内存",
    ),
    "spill_cliff": (
        "{speed:,.0f} tokens/s with nearly all VRAM in use, a smaller micro-batch made {smaller:,.0f}: the driver paged VRAM to RAM",
        "显存将满时只有 {speed:,.0f} tokens/s，更小的微批有 {smaller:,.0f}：驱动把显存换到了内存",
    ),
    "report_title": ("Which setting is the fastest that fits", "放得下的设置里哪个最快"),
    "report_subtitle": (
        "{device} · {created} · {count} trials, {known} of them known from before",
        "{device} · {created} · {count} 次试跑，其中 {known} 次以前测过",
    ),
    "report_known": (
        "{known} of {count} trials known from before; trial.again=true measures anew",
        "{count} 次试跑中 {known} 次以前测过；trial.again=true 重新测量",
    ),
    "report_where": ("the report is in {path}: report.html, trials.jsonl{pictures}", "报告在 {path}：report.html、trials.jsonl{pictures}"),
    "report_best": ("train with the fastest setting:\n  {command}", "用最快的设置训练：\n  {command}"),
    "report_none": (
        "no setting fits; try a smaller batch_size, memory=lean or a smaller model",
        "没有放得下的设置；请试更小的 batch_size、memory=lean 或更小的 model",
    ),
    "report_tight": ("leaves less than {margin:.0f}% of the budget free (trial.margin)", "预算余量不到 {margin:.0f}%（trial.margin）"),
    "report_use": ("Train with the fastest setting", "用最快的设置训练"),
    "report_chart": ("Memory against speed", "内存占用与速度"),
    "report_chart_note": (
        "Up and to the left is better. The ringed point is the recommendation, the grey band the Pareto front, numbers are batch_size; "
        "× failed, at the memory it was predicted to need or reached (far beyond the budget: at the right edge).",
        "越靠左上越好。圈出的是推荐设置，灰带是 Pareto 前沿，数字是 batch_size；× 是失败的设置，画在预测或已达到的占用处（超出很多的画在最右边）。",
    ),
    "report_loss": ("Loss", "损失"),
    "report_loss_note": ("Validation loss at the end of each trial; down and to the right is better.", "每次试跑结束时的验证损失；越靠右下越好。"),
    "report_ranking": ("Ranking", "排名"),
    "report_ranking_note": (
        "Best is the fastest trial that leaves {margin:.0f}% of the budget free; ⚠ leaves less.",
        "最佳是预算留有 {margin:.0f}% 余量的设置里最快的；⚠ 表示余量不足。",
    ),
    "report_failures": ("What did not work, and why", "没有成功的，以及原因"),
    "tile_speed": ("tokens/s, best", "最佳 tokens/s"),
    "tile_step": ("per optimizer step", "每次更新"),
    "tile_memory": ("peak / budget, GiB", "峰值 / 预算，GiB"),
    "tile_done": ("trials measured", "测出结果的试跑"),
    "column_setting": ("setting", "设置"),
    "column_status": ("status", "状态"),
    "column_step": ("step ms", "每步 ms"),
    "column_peak": ("peak / budget GiB", "峰值 / 预算 GiB"),
    "column_predicted": ("predicted GiB", "预测 GiB"),
    "column_batch": ("effective batch", "等效批量"),
    "column_reason": ("reason", "原因"),
    "chart_vram": ("peak VRAM, GiB", "显存峰值，GiB"),
    "chart_ram": ("peak RAM, GiB", "内存峰值，GiB"),
    "chart_budget": ("budget {gib:.1f} GiB", "预算 {gib:.1f} GiB"),
    "chart_loss": ("validation loss", "验证损失"),
    "best_header": (
        "The fastest setting of a sweep: {speed:,.0f} tokens/s, {held:.2f} GiB on {device}",
        "一次扫描里最快的设置：{speed:,.0f} tokens/s，{held:.2f} GiB，{device}",
    ),
    "status_ok": ("ok", "成功"),
    "status_spilled": ("spilled", "溢到内存"),
    "status_oom": ("out of memory", "内存不足"),
    "status_skipped": ("skipped", "跳过"),
    "status_timeout": ("timeout", "超时"),
    "status_crashed": ("crashed", "崩溃"),
    "status_invalid": ("invalid", "设置有误"),
    # ---- 自动批量与显存不足的诊断 ----
    "oom_in_forward": ("forward or backward pass", "前向或反向"),
    "oom_in_sum": ("sum of the gradients over the processes", "各进程的梯度求和"),
    "oom_in_training": ("training loop", "训练循环"),
    "oom_in_update": ("optimizer's update", "优化器更新"),
    "oom_in_evaluation": ("evaluation", "评估"),
    "sample_skipped": (
        "iter {iteration}: not enough memory to write a sample; training goes on (sample_tokens=0 writes none)",
        "迭代 {iteration}: 内存不足，这次不写样本；训练继续（sample_tokens=0 不再写）",
    ),
    "sample_nonfinite": (
        "iter {iteration}: the model's logits are not finite here, no sample is written; training goes on",
        "迭代 {iteration}: 模型在这里的 logits 不是有限数，不写样本；训练继续",
    ),
    "sample_failed": (
        "iter {iteration}: the sample could not be written ({reason}); training goes on (sample_tokens=0 writes none)",
        "迭代 {iteration}: 样本没有写成（{reason}）；训练继续（sample_tokens=0 不再写）",
    ),
    "oom_title": (
        "---- out of memory in the {phase}, with {rows} rows at a time: this cannot be divided further ----",
        "---- {phase}时显存或内存不足，每次 {rows} 条：不能再分了 ----",
    ),
    "oom_wanted": ("it asked for {wanted:.2f} GiB more while {free:.2f} GiB were free", "还想要 {wanted:.2f} GiB，而空闲只有 {free:.2f} GiB"),
    "oom_wanted_only": ("it asked for {wanted:.2f} GiB more", "还想要 {wanted:.2f} GiB"),
    "oom_no_plan": (
        "no prediction for this model ({reason}); try memory=lean, or a smaller model.block_size",
        "这个模型无法预测（{reason}）；可试 memory=lean，或更小的 model.block_size",
    ),
    "oom_largest": ("largest part: {part}, {gib:.2f} GiB", "占得最多的部分：{part}，{gib:.2f} GiB"),
    "oom_above": (
        "predicted peak {total:.2f} GiB, budget {budget:.2f} GiB: {over:.2f} GiB too much",
        "预测峰值 {total:.2f} GiB，预算 {budget:.2f} GiB：超出 {over:.2f} GiB",
    ),
    "oom_unexpected": (
        "predicted peak {total:.2f} GiB of {budget:.2f} GiB: it should fit; other programs seem to hold memory "
        "(close them, or say so with hardware.desktop_gib=…)",
        "预测峰值 {total:.2f} GiB，预算 {budget:.2f} GiB：本应放得下；可能是别的程序占着（请关掉，或用 hardware.desktop_gib=… 说明）",
    ),
    "oom_add": (
        "add this (predicted peak {peak:.2f} GiB, {speed:.2f}x the speed): {typed}",
        "请加上（预测峰值 {peak:.2f} GiB，速度 {speed:.2f} 倍）：{typed}",
    ),
    "oom_nothing": (
        "no memory=… that was tried makes it fit: choose a smaller model or model.block_size",
        "试过的 memory=… 都不够：请选更小的 model 或 model.block_size",
    ),
    "auto_start": (
        "batch_size=auto: looking for the fastest micro-batch for {rows} rows per step; candidates: {sizes}",
        "batch_size=auto：每次更新 {rows} 条，正在找最快的微批；候选：{sizes}",
    ),
    "auto_trial": (
        "  {batch} x {pieces}: {status}, {what}, peak {peak:.2f} GiB",
        "  {batch} x {pieces}：{status}，{what}，峰值 {peak:.2f} GiB",
    ),
    "auto_chosen": (
        "batch_size={batch}, {pieces} micro-batches for {rows} rows, {speed:.0f} tokens/s; remembered (trial.again=true measures anew)",
        "batch_size={batch}，{pieces} 个微批凑成 {rows} 条，{speed:.0f} tokens/s；已记住（trial.again=true 重测）",
    ),
    "auto_known": (
        "batch_size=auto: {batch}, measured before at {speed:.0f} tokens/s ({file}; trial.again=true measures anew)",
        "batch_size=auto：{batch}，以前测得 {speed:.0f} tokens/s（{file}；trial.again=true 重测）",
    ),
    "auto_nothing_fits": (
        "batch_size=auto: not even {size} rows fit (predicted {need:.1f} GiB, budget {budget:.1f} GiB); "
        "run the same with plan=true batch_size={size} for what to change",
        "batch_size=auto：{size} 条也放不下（预测 {need:.1f} GiB，预算 {budget:.1f} GiB）；同样的命令加 plan=true batch_size={size} 可看到该改什么",
    ),
}
