"""From the sampling config to a model that is ready to write, and the settings and prompts of its texts."""

# 从 conf/sample.yaml 到可以写作的模型：载入权重与词表，选数字格式与最快的一步；还有每段文字的设置，开头从哪里来
# open_model 给出 Model，Settings.request 把一个开头变成 Request，Model.writer_of 收下许多 Request 造出 Writer
# run_sample.py、服务器、评估都从这里开始；开头的文件有大小上限，编码由 data/source_text 认

import contextlib
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from nanogpt.base.config import HardwareConfig
from nanogpt.base.language import ConfigError, say, text
from nanogpt.base.quoting import key_of_override
from nanogpt.base.sample_config import FROM_FILE, SampleConfig, file_of
from nanogpt.base.value_checks import unescaped
from nanogpt.core import machine
from nanogpt.core.ngrams import size_text
from nanogpt.core.precision import Precision
from nanogpt.core.rope import rope_table
from nanogpt.core.sampling import Sampler, sampler
from nanogpt.data import tokenizer as tokenizers
from nanogpt.data.source_text import iter_text, resolved
from nanogpt.data.tokenizer_files import advised
from nanogpt.weights import checkpoint
from nanogpt.weights.build import build_sampler, model_of
from nanogpt.weights.pretrained import build_pretrained, open_pretrained
from nanogpt.write.control import build_control, read_form, takes_forms
from nanogpt.write.engine import Writer
from nanogpt.write.request import Request, default_prompt
from nanogpt.write.speed.acceleration import accelerate
from nanogpt.write.speed.formats import CONVERTED, fill

# 再大就不是开头，而是一份语料：不整个读进内存
LARGEST_PROMPTS = 64 * 2**20
# generation_config.json 的名字 -> sampler 的
IMPORTED = {name: name for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")} | {
    "typical_p": "typical", "no_repeat_ngram_size": "no_repeat_ngram",
}


@dataclass
class Settings:
    """How to write; everything here may change between two texts."""

    # 配置里载入之后还能改的那一部分：/命令与 API 的请求各改各的一份

    sampler: dict[str, Any]
    max_new_tokens: int
    seed: int
    stop: list[str]
    stop_at_end_of_text: bool
    control: dict[str, Any] = field(default_factory=dict)
    unknown: str = "error"
    """What happens to characters that the vocabulary lacks: error | skip."""

    @classmethod
    def of(cls, cfg: SampleConfig) -> "Settings":
        """What conf/sample.yaml and the command line say."""
        stop = [unescaped(s) for s in cfg.stop]
        drawn, control = dict(cfg.sampler), dict(cfg.control)
        return cls(drawn, cfg.max_new_tokens, cfg.seed, stop, cfg.stop_at_end_of_text, control, cfg.unknown)

    def request(self, prompt: str, number: int = 0) -> Request:
        """The request for the number-th text behind a prompt, which may begin with a `style:…|` or `emotion:…|`."""
        control = self.control
        if takes_forms(control):
            form = read_form(prompt)
            control, prompt = {**control, **form.asked}, form.prompt
        return Request(
            prompt, _sampler(json.dumps(self.sampler)), self.max_new_tokens, self.seed + number,
            stop=tuple(self.stop), stop_at_end_of_text=self.stop_at_end_of_text,
            control=build_control(control) if control else None, skip_unknown=self.unknown == "skip",
        )


@lru_cache(maxsize=32)
def _sampler(node: str) -> Sampler:
    # 设置相同的文字共用一个采样器：Decoder 才能把它们的 logits 并在一起处理
    return build_sampler(json.loads(node))


@dataclass(frozen=True)
class Model:
    """A model in evaluation mode on its device, with its tokenizer; `name` says where it came from."""

    # context 是 CPU 上舍入到 16 位时要包住计算的那一层，别的情形什么也不做

    name: str
    network: torch.nn.Module
    tokenizer: tokenizers.Tokenizer
    context: Callable[[], contextlib.AbstractContextManager]
    source: checkpoint.Checkpoint | None = None
    """None for pretrained weights."""
    speculate: int | str = "auto"

    def announce(self) -> None:
        """Say on stderr what is written with."""
        size = size_text(self.network)
        if self.source is None:
            say("writing with {name} ({size})", name=self.name, size=size)
            return
        bits = self.source.val_bpb
        say(
            "writing with {run}: iter {iteration}, val loss {loss:.4f}{bits}, {model} ({size})",
            run=Path(self.name).parent, iteration=self.source.iteration, loss=self.source.val_loss,
            bits="" if bits is None else text("bits_beside", bits=bits), model=self.network.config.name, size=size,
        )

    @property
    def id(self) -> str:
        """What other programs call it: the name of its folder, the same whichever checkpoint is loaded."""
        path = Path(self.name).resolve()
        if checkpoint.NAME.fullmatch(path.name):
            path = path.parent
        return path.parent.name if path.name == "ckpt" else path.name

    @property
    def writes_documents(self) -> bool:
        """Whether every text begins with a separator, so that nothing need stand before it."""
        return self.network.config.separator is not None

    @property
    def default_prompt(self) -> str:
        """What start=null means."""
        return default_prompt(self.tokenizer, self.network.config.separator)

    def writer(self, *, capacity: int, max_length: int | None = None) -> Writer:
        """A Writer of `capacity` rows."""
        return Writer(
            self.network, self.tokenizer, capacity=capacity, max_length=max_length, context=self.context,
            speculate=self.speculate,
        )

    def writer_of(self, requests: list[Request], *, batch_size: int, skip: str | None = None) -> Writer:
        """A Writer to which all requests are submitted, with no more rows and no longer a cache than they need.

        `skip` is what a person would type to have unknown characters passed over.
        """
        writer = self.writer(capacity=min(batch_size, len(requests)))
        try:
            # 全部开头先编码：第 100 个里有词表没有的字，也在开写之前就说
            for request in requests:
                writer.submit(request)
        except tokenizers.UnknownCharacters as error:
            raise tokenizers.UnknownCharacters(error.characters, skip) from None
        writer.max_length = max(text.prompt_tokens + text.request.max_new_tokens for text in writer.texts.values())
        return writer


def load(source: checkpoint.Checkpoint, device: torch.device, code: str | None = None, *, precision: str = "auto"):
    """The model of a checkpoint in evaluation mode, and its tokenizer; `code` is the model class that was typed.

    In a smaller `precision` a model of ours on a CPU never lies in memory in float32.
    """
    model = model_of(source, code, _filling(device, precision)).to(device).eval()
    return model, tokenizers.load(source.folder / "tokenizer.json")


def _filling(device: torch.device, precision: str) -> Callable | None:
    """What loads a model of ours piece by piece in such a precision; None: it is loaded whole."""
    # 显卡上先以半精度搬过去，再在那里换算
    return partial(fill, precision=precision) if device.type == "cpu" and precision in CONVERTED else None


def take_defaults(cfg: SampleConfig, tokenizer: tokenizers.Tokenizer, overrides: list[str], *, quiet: bool) -> None:
    """Set in `cfg` how the model's generation_config.json says to draw, but for what the overrides say; say so."""
    typed = {*map(key_of_override, overrides)}
    if {"sampler", "sampler._target_"} & typed:
        # 人自己选了一种抽法
        return
    taken, passed = {}, []
    for theirs, value in advised(tokenizer.sampling).items():
        name = IMPORTED.get(theirs)
        key = name if name == "temperature" else f"sampler.{name}"
        if not typed.isdisjoint((key, f"sampler.{name}")):
            continue
        try:
            sampler(**{name or theirs: value})
            taken[name] = value
        except (ConfigError, TypeError):
            # 别人的建议写错了，或我们没有：不该让写作停下；关着的不必说
            passed += [f"{theirs}={value}"[:60]] if name or value not in (0, 1, []) else []
    cfg.sampler = cfg.sampler | taken
    cfg.temperature = taken.get("temperature", cfg.temperature)
    if taken and not quiet:
        words = [f"{'' if name == 'temperature' else 'sampler.'}{name}={value}" for name, value in taken.items()]
        say(
            "as the model's generation_config.json says: {words}; type such a key, or sampler=temperature, to overrule "
            "it", words=" ".join(words),
        )
    if passed and not quiet:
        say("passed over in the model's generation_config.json: {words}", words=" ".join(passed))


def refuse_unread(cfg: SampleConfig, overrides: list[str]) -> None:
    """Refuse a typed temperature that the chosen sampler does not take: sampler=greedy, or one of somebody's own."""
    typed = {*map(key_of_override, overrides)}
    if "temperature" in typed and "sampler.temperature" not in typed:
        if cfg.sampler.get("temperature") != cfg.temperature:
            raise ConfigError(
                "temperature={got} has no effect with sampler={name}; leave it out, or choose sampler=temperature",
                got=cfg.temperature, name=cfg.groups.get("sampler", cfg.sampler["_target_"]),
            )


def open_model(cfg: SampleConfig, run_dir: Path | None, overrides: list[str] | None = None) -> Model:
    """The model of a run folder, or, where that is None, the pretrained one that init_from names.

    With the `overrides` that were typed, what they leave open of how to draw is set in `cfg` as the model's
    generation_config.json says.
    """
    if overrides is not None:
        refuse_unread(cfg, overrides)
    model = _opened(cfg, run_dir)
    if overrides is not None:
        take_defaults(cfg, model.tokenizer, overrides, quiet=False)
    return model


def _opened(cfg: SampleConfig, run_dir: Path | None) -> Model:
    device = machine.choose_device(cfg.device, HardwareConfig())
    machine.set_up(device, deterministic=False, hardware=HardwareConfig(), threads=cfg.threads)
    if run_dir is None:
        filling = _filling(device, cfg.precision.dtype)
        pretrained = open_pretrained(
            cfg.init_from, which=cfg.checkpoint, code=cfg.model["_target_"], lazily=filling is not None
        )
        network = build_pretrained(pretrained, fill=filling).to(device)
        return ready(cfg, cfg.init_from, network, pretrained.tokenizer)

    def opened(source: checkpoint.Checkpoint):
        return (source, *load(source, device, cfg.model["_target_"], precision=cfg.precision.dtype))

    source, network, tokenizer = checkpoint.use(run_dir, cfg.checkpoint, opened, key="out_dir")
    return dataclasses.replace(ready(cfg, f"{run_dir}/{source.name}", network, tokenizer), source=source)


def ready(cfg: SampleConfig, name: str, network: torch.nn.Module, tokenizer: tokenizers.Tokenizer) -> Model:
    """A loaded model in the wanted number format, on its fastest path."""
    if cfg.block_size is not None:
        set_context(network, cfg.block_size)
    # CPU 上的 fp16 与训练时一样只做舍入；其余格式由权重自己的类型决定
    rounded = network.device.type == "cpu" and cfg.precision.dtype == "fp16"
    context = Precision(cfg.precision, network.device).context if rounded else contextlib.nullcontext
    accelerate(network.eval(), cfg.precision.dtype, fast=cfg.fast and not rounded)
    return Model(name, network, tokenizer, context, speculate=cfg.speculate)


def set_context(network: torch.nn.Module, block_size: int) -> None:
    """Let a loaded model read `block_size` tokens at a time; ConfigError where its positions end before."""
    config = network.config
    if block_size > config.block_size and config.position == "learned":
        raise ConfigError(
            "block_size={got}: this model has learned positions for {limit} tokens and none beyond; choose at most "
            "{limit}, or leave it out",
            got=block_size, limit=config.block_size,
        )
    if block_size > config.block_size:
        say(
            "block_size={got}, the model's own context is {have}: texts get worse beyond the lengths it was trained "
            "with, unless its rope scaling was trained for more", got=block_size, have=config.block_size,
        )
    network.config = dataclasses.replace(config, block_size=block_size)
    if config.position == "rope":
        # 角度表不是权重：照新的长度重算
        for name, table in zip(("rope_cos", "rope_sin"), rope_table(network.config), strict=True):
            network.register_buffer(name, table.to(getattr(network, name)), persistent=False)


def prompt_text(start: str) -> str:
    """The prompt itself, unescaped, or the content of the file that FILE:… names, without its last line break."""
    if not start.startswith(FROM_FILE):
        return unescaped(start)
    # 编辑器总在文件末尾添一个换行：它不是要写下去的开头
    return file_text(file_of(start), "start", start).removesuffix("\n")


def file_text(path: Path, key: str, got: str) -> str:
    """The content of a file of prompts; ConfigError where there is none or it is too large to be that."""
    if not path.is_file():
        raise ConfigError("missing_file", key=key, got=got)
    if (size := path.stat().st_size) > LARGEST_PROMPTS:
        raise ConfigError(
            "{key}={got}: {size:,.0f} MiB are too many for prompts (at most {most}); give a smaller file",
            key=key, got=got, size=size / 2**20, most=LARGEST_PROMPTS // 2**20,
        )
    return "".join(iter_text(*resolved([path], key=None)[0]))


def prompt_list(cfg: SampleConfig, default: str) -> list[str]:
    """All prompts that the config names, in order: those of prompts=FILE, of starts=[…], start=…, or the default."""
    if cfg.prompts is not None:
        return prompts_of_file(Path(cfg.prompts))
    starts = cfg.starts or ([] if cfg.start is None else [cfg.start])
    return [prompt_text(start) for start in starts] or [default]


def prompts_of_file(path: Path) -> list[str]:
    """The prompts of a file: one per line (empty lines are skipped), per json line, or per item of a .json list.

    A json item is a string or {"prompt": …}.
    """
    content, suffix = file_text(path, "prompts", str(path)), path.suffix.lower()
    prompts, number = [], 0
    try:
        # 不用 splitlines：开头里可以有 U+2028、U+0085 之类
        items = json.loads(content) if suffix == ".json" else content.split("\n")
        # 一个字典、一串文字也能一项一项地取：那不是一列开头
        for item in items if isinstance(items, list) else [None]:
            number += 1
            if isinstance(item, str) and not item.strip():
                continue
            record = json.loads(item) if suffix in (".jsonl", ".ndjson") else item
            prompt = record if isinstance(record, str) else record["prompt"]
            # 半个代理对（"\\ud800"）存不进文件，也编不成字节
            prompt.encode("utf-8")
            prompts.append(prompt)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        message = "bad_prompt_list" if suffix == ".json" else "bad_prompt_line"
        raise ConfigError(message, path=path, number=max(number, 1)) from None
    if not prompts:
        raise ConfigError("prompts={path} holds no prompt; give one per line", path=path)
    return prompts
