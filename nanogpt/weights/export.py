"""Take a model home: `nanogpt export RUN FOLDER format=hf|gguf|ct2` writes it for other programs, and checks it.

hf is a folder for transformers, gguf a file for llama.cpp, Ollama and LM Studio, ct2 a folder for CTranslate2.
"""

# 把训练好的模型带到别的程序里：transformers（huggingface.py）、llama.cpp（gguf_file.py）、CTranslate2（这里）
# 命令在这里：先看能不能写，再读权重，写在旁边的临时文件夹里，全写完才换成正式的名字；已有东西的文件夹一概不动
# LoRA 训的合并了再写；--adapter 只写那两个小矩阵（peft.py）
# --check 把写出的再读回来算一遍（export_check.py），不一样就以非零退出码结束，写出的留着给人看

import argparse
import contextlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from nanogpt.base import run_names
from nanogpt.base.config import ModelConfig
from nanogpt.base.errors import Arguments, run_command
from nanogpt.base.files import folder_aside, is_litter, remove_empty, write_json
from nanogpt.base.groups import sample_config
from nanogpt.base.language import ConfigError, say, set_language, text
from nanogpt.base.value_checks import check_path
from nanogpt.weights import checkpoint, families, gguf_file, huggingface, peft
from nanogpt.weights.pretrained import Pretrained, open_pretrained

# 格式 -> 它的数字格式，第一个是默认的
FORMATS = {"hf": ("f32",), "gguf": gguf_file.TYPES, "ct2": ("f32", "f16", "bf16", "int8")}
# CTranslate2 的叫法
QUANTIZATION = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "int8": "int8"}
# 写成 key=value 的；自己的模型类要指名才执行
KEYS = ("format", "type", "model", "model._target_")


def export(
    named: str, target: Path, which: str | None = None, *, form: str = "hf", kind: str | None = None,
    code: str | None = None,
) -> Pretrained:
    """Write the model that `named` means, usually a run folder, in the format `form`; return what was written.

    `kind` is the format of its numbers (None: the usual one); `code` is the model class that was typed; no other class
    that a checkpoint names is run.
    """
    refuse_used(target)
    write = writer(form, kind)
    pretrained = open_pretrained(named, key="RUN", which=which, code=code)
    # 写不下的，动笔之前就说
    check_format(pretrained.config, form)
    with new_folder(target) as aside:
        write(aside, pretrained)
    return pretrained


def export_adapter(named: str, target: Path, which: str | None = None) -> str:
    """Write the adapter of a run trained with finetune=lora as a folder for PEFT; return the name of its base."""
    refuse_used(target)
    run_dir, which = run_names.locate(named, key="RUN"), run_names.checkpoint_in(named, which, "best")

    def written(source: checkpoint.Checkpoint) -> str:
        with new_folder(target) as aside:
            return peft.write_adapter(source, aside)

    return checkpoint.use(run_dir, which, written, key="RUN")


def refuse_used(target: Path) -> None:
    """Refuse a target that holds something, before anything is read."""
    if target.exists() and not (target.is_dir() and all(map(is_litter, target.iterdir()))):
        raise ConfigError("FOLDER={target} already holds something; choose an empty or new folder", target=target)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside the target that becomes it; ConfigError where it cannot be written."""
    try:
        if target.is_dir():
            remove_empty(target)
        with folder_aside(target) as aside:
            yield aside
    except OSError as error:
        raise ConfigError(
            "FOLDER={target} cannot be written ({reason}); choose another folder",
            target=target, reason=error.strerror or error,
        ) from None


def writer(form: str, kind: str | None) -> Callable[[Path, Pretrained], None]:
    """What writes this format with these numbers; ConfigError if there is none or its package is missing."""
    if form not in FORMATS:
        raise ConfigError("format={got} is unknown; choose from {have}", got=form, have=", ".join(FORMATS))
    kind = kind or FORMATS[form][0]
    if kind not in FORMATS[form]:
        raise ConfigError(
            "type={got} is none of format={form}; choose from {have}", got=kind, form=form,
            have=", ".join(FORMATS[form]),
        )
    if form == "gguf":
        gguf_file.library()
        return partial(gguf_file.write_gguf, kind=kind)
    if form == "ct2":
        converter()
        return partial(write_ct2, kind=kind)
    return huggingface.write_folder


def check_format(config: ModelConfig, form: str) -> None:
    """ConfigError if a format has no model that computes what this config does."""
    huggingface.writer_of(config)
    if form == "hf":
        return
    if not huggingface.is_plain(config):
        raise ConfigError(
            "format={form} holds GPT-2, Llama, Qwen2 and Qwen3 alone, and this is arch={arch}; take format=hf, or "
            "train with arch=llama a model that can leave home",
            form=form, arch=config.arch,
        )
    # llama.cpp 里只有 llama 读得了 llama3 的缩放，CTranslate2 算出来的不一样；别的缩放还没有写法
    stretched = form == "gguf" and families.family_of(config) == "llama"
    strange = config.rope_scaling not in ("none", "linear", *(("llama3",) if stretched else ()))
    if strange or config.activation == "relu2":
        field = "rope_scaling" if strange else "activation"
        raise ConfigError(
            "format={form} has no model with model.{field}={got}; take format=hf",
            form=form, field=field, got=getattr(config, field),
        )


# ---- CTranslate2 ----


def converter():
    """The converter of CTranslate2, which reads with transformers."""
    try:
        from ctranslate2.converters import TransformersConverter
        from transformers import PreTrainedTokenizerFast
    except ImportError:
        raise ConfigError("missing_package", what="format=ct2", package="ctranslate2 transformers") from None

    class Converter(TransformersConverter):
        """Reads the vocabulary exactly as it stands in tokenizer.json."""

        # AutoTokenizer 按模型的家族另选一类，会替 Qwen 添上它自己的特殊 token，词表就多出一个

        def load_tokenizer(self, tokenizer_class, model_name_or_path, **kwargs):
            return super().load_tokenizer(PreTrainedTokenizerFast, model_name_or_path, **kwargs)

    return Converter


def write_ct2(folder: Path, pretrained: Pretrained, kind: str) -> None:
    """Write a folder for CTranslate2, by its own converter, with the tokenizer of transformers beside it."""
    source, made = folder / "hf", folder / "ct2"
    source.mkdir()
    huggingface.write_folder(source, pretrained)
    converter()(str(source)).convert(str(made), quantization=QUANTIZATION[kind])
    for path in (*made.iterdir(), *source.glob("tokenizer*")):
        path.rename(folder / path.name)
    shutil.rmtree(source)
    made.rmdir()
    # 没有的特殊 token，转换器写成 null，它自己却读不了：写上词表里没有的词
    told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    told = {key: value for key, value in told.items() if value is not None}
    write_json(folder / "config.json", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | told)


# ---- nanogpt export ----


def parser() -> Arguments:
    """The parser of `nanogpt export`."""
    program = Arguments(prog="nanogpt export", description=text("export_about"), epilog=text("export_keys"))
    program.add_argument("run", metavar="RUN", help=text("run folder, latest, or anything that init_from takes"))
    program.add_argument("folder", metavar="FOLDER", type=Path, help=text("new or empty folder"))
    program.add_argument("--checkpoint", metavar="NAME", help=text("best (default), last or iter_…"))
    program.add_argument("--check", action="store_true", help=text("compare what was written with the model"))
    program.add_argument(
        "--adapter", action="store_true", help=text("of a run with finetune=lora, its adapter alone (PEFT)")
    )
    program.add_argument("--config-dir", metavar="DIR", help=text("folder with yamls of your own"))
    program.add_argument("--lang", default="auto", choices=("auto", "zh", "en"), help=argparse.SUPPRESS)
    return program


def main(arguments: list[str] | None = None) -> None:
    """The command line of `nanogpt export`; exit code 2 on a mistake, 1 if --check finds a difference."""
    words = sys.argv[1:] if arguments is None else arguments
    settings = [word for word in words if re.fullmatch(r"(?!lang=)[a-z_]+(\.[a-z_]+)*=.*", word)]
    run_command(parser, partial(run, settings), [word for word in words if word not in settings])


def run(settings: list[str], typed: argparse.Namespace) -> None:
    """Export as typed, say what to do with it, and check it if asked to."""
    if typed.lang != "auto":
        set_language(typed.lang)
    if unknown := [word for word in settings if word.partition("=")[0] not in KEYS]:
        raise ConfigError(
            "{got}: nanogpt export knows {keys} alone; write ./{got} for a folder of that name",
            got=unknown[0], keys=" ".join(f"{key}=" for key in KEYS),
        )
    paths = {"RUN": typed.run, "FOLDER": str(typed.folder), "--checkpoint": typed.checkpoint or "best"}
    for key, value in paths.items():
        check_path(key, value)
    given = dict(word.split("=", 1) for word in settings)
    form, kind = given.pop("format", "hf"), given.pop("type", None)
    if typed.adapter:
        if form != "hf" or typed.check:
            raise ConfigError("--adapter writes for PEFT alone; leave out format= and --check")
        base = export_adapter(typed.run, typed.folder, typed.checkpoint)
        say("written: {target}, an adapter in PEFT's format beside {base}", target=typed.folder, base=base)
        return
    named = [word for word in settings if word.startswith("model")]
    code = sample_config(named).model["_target_"] if named else None
    pretrained = export(typed.run, typed.folder, typed.checkpoint, form=form, kind=kind, code=code)
    say_written(typed.folder, form, pretrained.config)
    if typed.check:
        from nanogpt.weights import export_check

        if not export_check.check(typed.folder, pretrained, form, kind or FORMATS[form][0]):
            sys.exit(1)


def say_written(target: Path, form: str, config: ModelConfig) -> None:
    """Say where the model is, how to load it, and where it cannot go."""
    plain = huggingface.is_plain(config)
    trust = "" if plain else ", trust_remote_code=True"
    command = {
        "hf": f"transformers.AutoModelForCausalLM.from_pretrained({str(target)!r}{trust})",
        "gguf": f"ollama create my-model -f {target / 'Modelfile'}", "ct2": f"ctranslate2.Generator({str(target)!r})",
    }[form]
    say("written: {target}; load it with {command}", target=target, command=command)
    if not plain:
        say(
            "arch={arch} is known to transformers alone, by the code in that folder; a model that shall also run in "
            "llama.cpp, Ollama or CTranslate2 is trained with arch=llama",
            arch=config.arch,
        )
