"""Schema and checks of run_sample.py's configuration: writing with a model and serving it."""

# 写作（run_sample.py）的配置：形状、默认值、范围，与不需要 torch 的检查
# conf/sample.yaml 按 SampleConfig 拼；check_sample 在载入模型之前跑，写错的键一秒内就说
# server 一节同时是 API 每个请求的上限；监听本机之外的地址必须有 token
# 两个 schema 由 register_schemas 交给 Hydra：拼写错的键、不对的类型在拼的时候就报

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from nanogpt.base.config import CHOICES, PrecisionConfig, TrainConfig, check_choices, check_device, check_ranges, check_start
from nanogpt.base.language import ConfigError
from nanogpt.base.value_checks import expanded


@dataclass
class ServerConfig:
    """Where run_sample.py serve=true listens, and what one request may ask for."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    token: str | None = None
    """Bearer token; required beyond loopback."""
    max_tokens: int = 4096
    max_prompt_chars: int = 20_000
    max_texts: int = 16
    """Prompts x n of one request."""
    max_waiting: int = 64
    """Texts that wait for a free row."""
    max_connections: int = 200
    max_body_kib: int = 1024
    request_seconds: float = 600.0
    read_seconds: float = 10.0
    """For the body of a request."""
    stall_seconds: float = 20.0
    """The text of a client that takes nothing for so long is stopped."""
    max_unread_chars: int = 20_000
    """The text of a client that leaves more than this unread is stopped."""


@dataclass
class SampleConfig:
    """Top level of conf/sample.yaml; the comments there say when to change what."""

    out_dir: str = "latest"
    init_from: str | None = None
    checkpoint: str = "best"
    device: str = "auto"
    start: str | None = None
    """A prompt; None: nothing where the model writes documents, else a line break, or what else begins a text in a
    vocabulary without one."""
    starts: list[str] = field(default_factory=list)
    """Several prompts."""
    prompts: str | None = None
    """A file of prompts."""
    num_samples: int = 1
    max_new_tokens: int = 500
    temperature: float = 0.8
    stop: list[str] = field(default_factory=list)
    stop_at_end_of_text: bool = True
    unknown: str = "error"
    seed: int = 1337
    batch_size: int = 8
    fast: bool = True
    output: str | None = None
    interactive: bool = False
    lang: str = "auto"
    serve: bool = False
    server: ServerConfig = field(default_factory=ServerConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    sampler: Any = MISSING
    control: Any = MISSING
    model: Any = field(default_factory=lambda: {"_target_": None})
    """Of it only the class is read: one's own is run only when it is named."""
    groups: dict[str, str] = field(default_factory=dict)
    """Filled in by the program."""


SAMPLE_CHOICES = {
    "lang": CHOICES["lang"],
    "unknown": ("error", "skip"),
    "precision.dtype": ("auto", "fp32", "fp16", "bf16", "int8"),
}

# 下限（含）与上限（含）：上限不是建议，只拦住会吃光内存的打字错误
SAMPLE_RANGES = {
    "num_samples": (1, 10**6),
    "max_new_tokens": (1, 10**7),
    "temperature": (0, 100),
    "seed": (0, 2**62),
    "batch_size": (1, 4096),
    "server.port": (0, 65535),
    "server.max_tokens": (1, 10**7),
    "server.max_prompt_chars": (1, 10**9),
    "server.max_texts": (1, 10**6),
    "server.max_waiting": (0, 10**6),
    "server.max_connections": (1, 10**6),
    "server.max_body_kib": (1, 10**7),
    "server.request_seconds": (0.1, 10**7),
    "server.read_seconds": (0.1, 10**7),
    "server.stall_seconds": (0.1, 10**7),
    "server.max_unread_chars": (1, 10**9),
}


def check_sample(cfg: SampleConfig) -> None:
    """Refuse every wrong value or combination that can be seen without torch or a model; one line each."""
    check_choices(cfg, SAMPLE_CHOICES)
    check_ranges(cfg, SAMPLE_RANGES)
    check_device(cfg.device)
    check_start(cfg.init_from)
    prompts = {"start": cfg.start, "starts": cfg.starts or None, "prompts": cfg.prompts}
    named = [key for key, value in prompts.items() if value is not None]
    if len(named) > 1:
        raise ConfigError(
            "{keys} name prompts twice; leave one out: start=TEXT, starts='[TEXT,TEXT]' and prompts=FILE are three "
            "ways to give them",
            keys=" ".join(f"{key}=…" for key in named),
        )
    if "" in cfg.stop:
        raise ConfigError("stop holds an empty string; give at least one character or leave it out")
    if cfg.serve:
        # 这些只属于命令行：悄悄忽略会让人以为写进了文件
        for key in ("interactive", "starts", "prompts", "output"):
            if getattr(cfg, key):
                raise ConfigError("serve=true writes for a browser or a program; leave out {key}=…", key=key)
    if cfg.interactive and named:
        raise ConfigError(
            "interactive=true reads its prompts from the terminal or a pipe; leave out {key}=…",
            key=named[0],
        )
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
    return Path(expanded(start.removeprefix(FROM_FILE)))


def check_files(cfg: SampleConfig) -> None:
    """Refuse missing files of prompts, and an output that is a folder."""
    starts = [("starts", start) for start in cfg.starts] + ([("start", cfg.start)] if cfg.start is not None else [])
    named = [(key, start, file_of(start)) for key, start in starts if start.startswith(FROM_FILE)]
    for key, got, path in [*named, *([("prompts", cfg.prompts, Path(cfg.prompts))] if cfg.prompts is not None else [])]:
        if not path.is_file():
            raise ConfigError("missing_file", key=key, got=got)
    if cfg.output and Path(cfg.output).is_dir():
        raise ConfigError(
            "output={got} cannot be written ({reason}); choose another file",
            got=cfg.output, reason="a folder",
        )


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


def register_schemas() -> None:
    """Make the schemas known to Hydra, so that a misspelt key or a wrong type fails while composing."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="train_schema", node=TrainConfig)
    ConfigStore.instance().store(name="sample_schema", node=SampleConfig)
