"""The socket of serve=true, uvicorn on it, and the one loaded model behind them."""

# 服务的启动与结束：占端口，载入模型，在上面跑 uvicorn，Ctrl-C 时收尾
# 端口在载入模型之前就占住：被占用要马上知道，载入时来的客户端等着；结束时先停写作，再等各个连接
# announcement 是网页与客户端想知道的模型信息，随 GET /v1/models 给出

import asyncio
import logging
import socket
import sys
from pathlib import Path

from nanogpt.base.language import ConfigError, say
from nanogpt.base.sample_config import SampleConfig, ServerConfig
from nanogpt.core.ngrams import table_count

try:
    import fastapi
    import uvicorn
except ImportError:
    # 两个一起说：装好一个又缺一个，就要试两次
    raise ConfigError("missing_package", what="serve=true", package="fastapi uvicorn") from None

MAX_HEAD = 2**14
SHUTDOWN_SECONDS = 5
# 没有 CORS 头：别的网站发得出请求，却读不到回答；check_source 连请求也拒绝
HEADERS = {
    "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def bind(config: ServerConfig) -> socket.socket:
    """A socket that listens at host and port; ConfigError when the address cannot be had."""
    try:
        family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            "server.host={got} is not an address of this machine ({reason}); use 127.0.0.1, or 0.0.0.0 for every "
            "address",
            got=config.host, reason=getattr(error, "strerror", None) or error,
        ) from None
    # "::" 在能同时接 IPv4 的系统上两种都接
    both = config.host == "::" and socket.has_dualstack_ipv6()
    try:
        return socket.create_server((config.host, config.port), family=family, dualstack_ipv6=both)
    except OSError as error:
        # 它在原因后面又写了一遍地址
        reason = str(error.strerror).partition(" (while")[0]
        raise ConfigError(
            "server.port={got} cannot be used on {host} ({reason}); choose another port, or server.port=0 for a free "
            "one",
            got=config.port, host=config.host, reason=reason,
        ) from None


def url_of(bound: socket.socket, host: str) -> str:
    """What to type into a browser on this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{bound.getsockname()[1]}/"


class Server(uvicorn.Server):
    """uvicorn's server that ends the writing before it waits for its connections, and exits with 0 on Ctrl-C."""

    # uvicorn 关闭时只会等连接自己结束，而一个流可以写十分钟
    def __init__(self, app: fastapi.FastAPI, limits: ServerConfig):
        # 它的日志会混进控制台：自己的错误由 app 打印
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL + 1)
        super().__init__(uvicorn.Config(
            app, http="h11", ws="none", lifespan="off", log_config=None, access_log=False, server_header=False,
            proxy_headers=False, headers=list(HEADERS.items()), h11_max_incomplete_event_size=MAX_HEAD,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            # 它把刚连上的这一个也算在内
            limit_concurrency=limits.max_connections + 1,
        ))
        self.worker = app.state.worker

    def handle_exit(self, sig: int, frame) -> None:
        # 原来的做法会记下信号，收尾之后再发一次，退出码就不是 0 了
        self.should_exit, self.force_exit = True, self.should_exit

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.worker.begin_closing()
        await super().shutdown(sockets)


def serve(cfg: SampleConfig, run_dir: Path | None, overrides: list[str]) -> None:
    """Load the model and serve it until Ctrl-C."""
    with bind(cfg.server) as bound:
        from nanogpt.write.loading import open_model

        try:
            asyncio.run(run(cfg, open_model(cfg, run_dir, overrides), bound))
        except KeyboardInterrupt:
            # 还在载入模型就按了 Ctrl-C
            sys.exit(130)


async def run(cfg: SampleConfig, model, bound: socket.socket, *, on_start=None) -> None:
    """Serve an open model on a socket; `on_start(server)` is called before it answers."""
    from nanogpt.serve.api import create_app
    from nanogpt.serve.completions import Reader
    from nanogpt.serve.worker import Worker
    from nanogpt.write.chat import Chat
    from nanogpt.write.loading import Settings

    chat = None
    if model.tokenizer.chat_template:
        try:
            chat = Chat(model, cfg.system)
        except ConfigError as error:
            # 坏了的模板不妨碍续写
            say("error", line=error)
    if cfg.system is not None and chat is None:
        raise ConfigError("system=…: this model has no chat template that works; leave it out")
    reader = Reader(
        model.id, Settings.of(cfg), cfg.server, model.tokenizer, empty_prompts=model.writes_documents, chat=chat,
    )
    worker = Worker(model.writer(capacity=cfg.batch_size), max_waiting=cfg.server.max_waiting)
    server = Server(create_app(worker, reader, announcement(cfg, model)), cfg.server)
    say(
        "writing with {model}; open {url} in a browser, or use {url}v1 as an OpenAI-compatible base URL (Ctrl-C stops)",
        model=model.name, url=url_of(bound, cfg.server.host),
    )
    if on_start:
        on_start(server)
    try:
        await server.serve([bound])
    finally:
        worker.begin_closing()
        # 正在算的一步算完再走：解释器退出时 torch 不能还在跑
        await asyncio.to_thread(worker.join, 30)


def _labels(control, known: dict[str, list[str]], tokenizer) -> dict[str, dict]:
    """The labels that the model was trained with, of each kind, and which of them a known name means."""
    from nanogpt.write.control.codes import CodesControl

    # 学过的标签与只能请求的愿望要分得开；只有 codes 用得上标签，别名指的也是标签
    if not isinstance(control, CodesControl):
        return {"labels": {kind: [] for kind in known}, "names": {kind: {} for kind in known}}
    means = {kind: {name: control.label(kind, name, tokenizer) for name in names} for kind, names in known.items()}
    return {
        "labels": {kind: list(tokenizer.labels.get(kind, ())) for kind in known},
        "names": {
            kind: {name.lower(): label for name, label in names.items() if label} for kind, names in means.items()
        },
    }


def announcement(cfg: SampleConfig, model) -> dict:
    """What the page and other clients want to know of a model."""
    from nanogpt.write.control import build_control

    limits, sampler = cfg.server, {key: value for key, value in cfg.sampler.items() if key != "_target_"}
    control = build_control(dict(cfg.control))
    known = control.known(model.tokenizer)
    controls = {"styles": known["style"], "emotions": known["emotion"], **_labels(control, known, model.tokenizer)}
    # 没有标签的模型拧不动它：页面不给这个旋钮
    labelled = any(controls["labels"].values())
    guidance = {"guidance": cfg.control["guidance"]} if labelled else {}
    return {
        **({"controls": controls} if any(known.values()) else {}),
        # 只报最后一段：本机的目录结构与访客无关
        "checkpoint": Path(model.name).name, "chat": bool(model.tokenizer.chat_template),
        "parameters": model.network.parameter_count(), "table_parameters": table_count(model.network),
        "block_size": model.network.config.block_size, "vocab_size": model.tokenizer.vocab_size,
        "limits": {name: getattr(limits, name) for name in ("max_tokens", "max_texts", "max_prompt_chars")},
        "defaults": {
            **sampler, **guidance, "prompt": model.default_prompt, "seed": cfg.seed, "stop": cfg.stop,
            "max_tokens": min(cfg.max_new_tokens, limits.max_tokens), "unknown": cfg.unknown,
        },
    }
