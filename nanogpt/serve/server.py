"""run_sample.py serve=true: a page to write with the model, and an OpenAI-compatible API, from one loaded model."""

import asyncio
import socket
import sys
from pathlib import Path

from nanogpt.base.language import say
from nanogpt.base.sample_config import SampleConfig
from nanogpt.serve.connections import Server, bind, url_of


def serve(cfg: SampleConfig, run_dir: Path) -> None:
    """Load the model and serve it until Ctrl-C."""
    # 端口被占要在载入模型之前就说；还没 listen，这时来的连接会被拒绝
    with bind(cfg.server) as bound:
        from nanogpt.write.loading import open_model

        try:
            asyncio.run(run(cfg, open_model(cfg, run_dir), bound))
        except KeyboardInterrupt:
            # 还在载入模型就按了 Ctrl-C
            sys.exit(130)


async def run(cfg: SampleConfig, model, bound: socket.socket, *, on_start=None) -> None:
    """Serve an open model on a bound socket; `on_start(server)` is called once it listens."""
    from nanogpt.serve.api import Api
    from nanogpt.serve.completions import Reader
    from nanogpt.serve.worker import Worker
    from nanogpt.write.loading import Settings

    worker = Worker(model.writer(capacity=cfg.batch_size), max_waiting=cfg.server.max_waiting)
    reader = Reader(model.id, Settings.of(cfg), cfg.server, model.writes_documents, model.tokenizer)
    api = Api(worker, reader, announcement(cfg, model))
    server = Server(api, cfg.server, on_shutdown=worker.begin_closing)

    def started() -> None:
        say("serving", model=model.name, url=url_of(bound, cfg.server.host))
        if on_start:
            on_start(server)

    server.on_start = started
    try:
        await server.serve([bound])
    finally:
        worker.begin_closing()
        # 正在算的一步算完再走：解释器退出时 torch 不能还在跑
        await asyncio.to_thread(worker.join, 30)


def announcement(cfg: SampleConfig, model) -> dict:
    """What the page and other clients want to know of a model."""
    from nanogpt.write.control import build_control

    limits, sampler = cfg.server, {key: value for key, value in cfg.sampler.items() if key != "_target_"}
    known = build_control(dict(cfg.control)).known(model.tokenizer)
    labels = [label for listed in model.tokenizer.labels.values() for label in listed]
    controls = {"controls": {"styles": known["style"], "emotions": known["emotion"], "labels": labels}} if any(known.values()) else {}
    # 没有标签的模型拧不动它：页面不给这个旋钮
    guidance = {"guidance": cfg.control["guidance"]} if labels and "guidance" in cfg.control else {}
    return {
        **controls,
        # 只报最后一段：本机的目录结构与访客无关
        "checkpoint": Path(model.name).name, "parameters": model.network.parameter_count(),
        "block_size": model.network.config.block_size, "vocab_size": model.tokenizer.vocab_size,
        "limits": {"max_tokens": limits.max_tokens, "max_texts": limits.max_texts, "max_prompt_chars": limits.max_prompt_chars},
        "defaults": {
            **sampler, **guidance, "prompt": model.default_prompt, "max_tokens": min(cfg.max_new_tokens, limits.max_tokens), "seed": cfg.seed,
            "stop": cfg.stop, "unknown": cfg.unknown,
        },
    }
