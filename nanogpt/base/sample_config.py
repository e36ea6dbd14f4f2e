"""Schema and checks of run_sample.py's configuration: writing with a model and serving it."""

# 写作（run_sample.py）的配置：形状、默认值、范围，与不需要 torch 的检查
# conf/sample.yaml 按 SampleConfig 拼；check_sample 在载入模型之前跑，写错的键一秒内就说
# server 一节同时是 API 每个请求的上限；监听本机之外的地址必须有 token
# 两个 schema 由 register_schemas 交给 Hydra：拼写错的键、不对的类型在拼的时候就报

import functools
import ipaddress
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanogpt.base.config import (
    PrecisionConfig,
    TrainConfig,
    check_device,
    check_keys,
    check_range,
    check_start,
    choice,
    number,
)
from nanogpt.base.language import ConfigError, text


@dataclass(kw_only=True)
class SamplerConfig:
    """The settings of conf/sampler: what may be drawn next; nanogpt.core.sampling.sampler takes them."""

    # 只为范围与说明，API 的字段也由它得出：sampler 是可换的组，值在 yaml 里，由 _target_ 的函数收

    temperature: float = number(0, 100)
    """What logits are divided by; 0 is greedy. It follows the key temperature, except in sampler=greedy."""
    top_k: int = number(0, math.inf)
    """Only so many of the likeliest tokens; 0: all. Usually 20 … 200."""
    top_p: float = number(0, 1)
    """Only the likeliest tokens that together have this probability; 1: all. Usually 0.8 … 0.95."""
    min_p: float = number(0, 1)
    """Only tokens that are at least this part as likely as the likeliest one; 0: all. Usually 0.02 … 0.1."""
    typical: float = number(0, 1)
    """Only the tokens whose surprise is nearest to the expected one, with this probability together; 1: all. Usually
    0.9."""
    repetition_penalty: float = number(0.01, 100)
    """What the logits of tokens that occurred are divided by, or multiplied by where they are negative; 1: nothing.
    Usually 1.05 … 1.3."""
    no_repeat_ngram: int = number(0, math.inf)
    """No run of so many tokens occurs twice; 0: any may. Usually 3 … 6."""


@dataclass(kw_only=True)
class ServerConfig:
    """Where run_sample.py serve=true listens, and what one request may ask for."""

    # 地址与 token 之外都是上限：一个请求再大，也吃不光别人的内存与时间

    host: str
    """Address; only this machine reaches 127.0.0.1."""
    port: int = number(0, 65535)
    """Port; 0 takes a free one."""
    token: str | None
    """Bearer token; required beyond loopback."""
    max_tokens: int = number(1, 10**7)
    """Longest text."""
    max_prompt_chars: int = number(1, 10**9)
    """Characters, or ids, of each prompt."""
    max_texts: int = number(1, 10**6)
    """Prompts x n of one request."""
    max_waiting: int = number(0, 10**6)
    """Texts that wait for a free row."""
    max_connections: int = number(1, 10**6)
    """Clients at a time."""
    max_body_kib: int = number(1, 10**7)
    """Body of a request, KiB."""
    request_seconds: float = number(0.1, 10**7)
    """From the first byte of a request to its last text, waiting included."""
    read_seconds: float = number(0.1, 10**7)
    """For the body of a request."""
    stall_seconds: float = number(0.1, 10**7)
    """The text of a client that takes nothing for so long is stopped."""
    max_unread_chars: int = number(1, 10**9)
    """The text of a client that leaves more than this unread is stopped."""


@dataclass
class SamplePrecisionConfig(PrecisionConfig):
    """Number format of the weights that write."""

    # 只有写作能用 int8、int4：训练的格式里没有它们
    dtype: str = choice("auto", "fp32", "fp16", "bf16", "int8", "int4", default="auto")
    """Format of the weights; auto takes the fastest that loses nothing here, int4 the least memory."""


@dataclass(kw_only=True)
class SampleConfig:
    """Top level of conf/sample.yaml, which has the defaults."""

    # 网页、API、互动与批量写作用同一份配置，所以界面换了，写法不变

    out_dir: str
    """Run folder, or latest."""
    init_from: str | None
    """Pretrained weights instead of a run: gpt2 … gpt2-xl, owner/name, modelscope:owner/name, a folder or ckpt.pt."""
    checkpoint: str
    """best | last | iter_00001000 …"""
    device: str
    """auto | cpu | cuda | cuda:0 … | xpu (Intel's GPU) | mps (a Mac's GPU)."""
    threads: int | None = number(1, 4096)
    """Threads of a CPU; None: one for each core, or OMP_NUM_THREADS."""
    block_size: int | None = number(1, 10**6)
    """Context to write with; None: the model's own, which learned positions cannot exceed. Beyond the lengths that were
    trained texts get worse, unless the model's rope scaling was trained for it."""
    start: str | None
    """A prompt; None: nothing where the model writes documents, else a line break, or what else begins a text in a
    vocabulary without one."""
    starts: list[str]
    """Several prompts."""
    prompts: str | None
    """A file of prompts, read as they stand."""
    num_samples: int = number(1, 10**6)
    """Texts behind each prompt."""
    max_new_tokens: int = number(1, 10**7)
    """Length of each text."""
    temperature: float = number(0, 100)
    """What logits are divided by; 0 is greedy."""
    stop: list[str]
    """Texts end before the first of these."""
    stop_at_end_of_text: bool
    """End a text at <|endoftext|>, where the vocabulary has it."""
    unknown: str = choice("error", "skip")
    """What happens to characters of a prompt that the vocabulary lacks."""
    seed: int = number(0, 2**62)
    """Of the first text; the n-th one behind a prompt takes seed + n."""
    batch_size: int = number(1, 4096)
    """Texts at a time; halved where memory runs out."""
    fast: bool
    """Take the fastest decoding path of this machine; false: plain PyTorch."""
    speculate: int | str
    """How many ids one text guesses from itself, 0 … 16, and checks in one pass of the model; auto: as many as pay, on
    the CPU's compiled path alone, where the same seed gives the same text with it and without. Elsewhere a number gives
    the same text up to rounding."""
    output: str | None
    """A .jsonl file to which every text is appended with its settings."""
    interactive: bool
    """A prompt per line, from a person or a pipe."""
    chat: bool
    """Answer questions instead of going on with a text; without one a conversation begins."""
    system: str | None
    """What a model that answers is told first."""
    lang: str = choice("auto", "zh", "en")
    """Language of the console; auto takes the system's."""
    serve: bool
    """A page and an OpenAI-compatible API instead of texts."""
    server: ServerConfig
    precision: SamplePrecisionConfig = field(default_factory=SamplePrecisionConfig)
    sampler: Any
    """A `_target_` and its settings."""
    control: Any
    """Style and emotion: a `_target_` and its settings."""
    model: Any = field(default_factory=lambda: {"_target_": None})
    """Of it only the class is read: one's own is run only when it is named."""
    groups: dict[str, str] = field(default_factory=dict)
    """Filled in by the program."""


def prompts_named(cfg: SampleConfig) -> list[str]:
    """The keys that name prompts."""
    prompts = {"start": cfg.start, "starts": cfg.starts or None, "prompts": cfg.prompts}
    return [key for key, value in prompts.items() if value is not None]


def check_sample(cfg: SampleConfig) -> None:
    """Refuse every wrong value or combination that can be seen without torch or a model; one line each."""
    check_keys(cfg)
    check_device(cfg.device)
    check_start(cfg.init_from)
    if cfg.init_from and cfg.out_dir != "latest":
        raise ConfigError(
            "out_dir={run} init_from={got}: these are two models; leave one out", run=cfg.out_dir, got=cfg.init_from,
        )
    named = prompts_named(cfg)
    if len(named) > 1:
        raise ConfigError(
            "{keys} name prompts twice; leave one out: start=TEXT, starts='[TEXT,TEXT]' and prompts=FILE are three "
            "ways to give them",
            keys=" ".join(f"{key}=…" for key in named),
        )
    if isinstance(cfg.speculate, int):
        check_range("speculate", cfg.speculate, 0, 16)
    elif cfg.speculate != "auto":
        raise ConfigError("not_a_choice", key="speculate", got=cfg.speculate, allowed="auto | 0 1 … 16")
    if "" in cfg.stop:
        raise ConfigError("empty_stop")
    if cfg.serve:
        # 这些只属于命令行：悄悄忽略会让人以为写进了文件
        refused = [*named, *(key for key in ("interactive", "chat", "output") if getattr(cfg, key))]
        refused += ["num_samples"] if cfg.num_samples > 1 else []
        if refused:
            raise ConfigError("serve=true writes for a browser or a program; leave out {key}=…", key=refused[0])
    if cfg.interactive and named:
        raise ConfigError(
            "interactive=true reads its prompts from the terminal or a pipe; leave out {key}=…",
            key=named[0],
        )
    if cfg.system is not None and not (cfg.chat or cfg.serve):
        raise ConfigError("system=… is told to a model that answers; add chat=true or serve=true")
    if cfg.chat and isinstance(cfg.control, dict):
        for key in ("style", "emotion"):
            if cfg.control.get(key):
                raise ConfigError("chat=true takes no control.{key}; ask for it in system=… or in a question", key=key)
    check_server(cfg.server)
    for key, node in {"sampler": cfg.sampler, "control": cfg.control}.items():
        if not isinstance(node, dict):
            raise ConfigError("wrong_type", key=key, got=node, want="{_target_: …}")
        if not isinstance(node.get("_target_"), str):
            raise ConfigError("missing_key", key=f"{key}._target_")
    check_files(cfg)


FROM_FILE = "FILE:"


def file_of(start: str) -> Path:
    """The file named by a prompt FILE:…"""
    return Path(os.path.expanduser(start.removeprefix(FROM_FILE)))


def check_files(cfg: SampleConfig) -> None:
    """Refuse missing files of prompts, and an output that is a folder."""
    starts = [("starts", start) for start in cfg.starts] + ([("start", cfg.start)] if cfg.start is not None else [])
    named = [(key, start, file_of(start)) for key, start in starts if start.startswith(FROM_FILE)]
    for key, got, path in [*named, *([("prompts", cfg.prompts, Path(cfg.prompts))] if cfg.prompts is not None else [])]:
        if path.exists() and not path.is_file():
            raise ConfigError(
                "{key}={got} is no file to read a text from; give the path of a text file", key=key, got=got,
            )
        if not path.exists():
            raise ConfigError("missing_file", key=key, got=got)
    if cfg.output and Path(cfg.output).is_dir():
        raise ConfigError("output_not_writable", got=cfg.output, reason=text("a folder"))


def is_loopback(host: str) -> bool:
    """True for addresses that only this machine reaches."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_server(server: ServerConfig) -> None:
    """Rules for the server's address and token."""
    # 值不进消息：错误行会留在终端记录里
    if server.token is not None and not re.fullmatch(r"[A-Za-z0-9._~+/-]{8,}", server.token):
        raise ConfigError(
            "server.token is too short or has other characters; give at least 8 of: A-Z a-z 0-9 . _ ~ + / -",
        )
    if server.token is None and not is_loopback(server.host):
        raise ConfigError(
            "server.host={got} can be reached from other machines; set server.token=… (or the environment variable "
            "NANOGPT_TOKEN), or use server.host=127.0.0.1",
            got=server.host,
        )


@functools.cache
def register_schemas() -> None:
    """Make the schemas known to Hydra, so that a misspelt key or a wrong type fails while composing."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="train_schema", node=TrainConfig)
    ConfigStore.instance().store(name="sample_schema", node=SampleConfig)
