"""Does the card write what a CPU writes: with recorded graphs and without, in batches, in a server's thread?"""

import asyncio
import contextlib
import functools
import gc
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from card_parts.kit import GIB, Case, Lab, exact_products

from nanogpt.run.session import Session
from nanogpt.write.loading import Settings, open_model

SHAPE = (
    "model.n_layer=3", "model.n_head=4", "model.n_embd=128", "model.block_size=64", "batch_size=16", "eval_tokens=512",
)
TOY = ("model.n_layer=2", "model.n_head=2", "model.n_embd=32", "model.block_size=32")
PROMPTS = ["the king", "no more words than", "q"]


def cases(lab: Lab) -> Iterator[Case]:
    """All of them; greedy unless the name says otherwise."""
    wide = [f"{word} {PROMPTS[n % 3]}" for n, word in enumerate(("king", "love", "night", "words") * 8)]
    wide = wide[:8] if lab.pretend else wide
    greedy = ("sampler=greedy", "max_new_tokens=20")
    chosen = {
        "1 row": (PROMPTS[:1], greedy), "3 unequal rows": (PROMPTS, greedy), "32 rows": (wide, greedy),
        "past the context": (PROMPTS[:2], ("sampler=greedy", f"max_new_tokens={48 if lab.pretend else 150}")),
        "drawn with top_k": (PROMPTS, ("sampler=top_k", "max_new_tokens=20")),
    }
    for name, (prompts, overrides) in chosen.items():
        yield name, functools.partial(same_text, lab, "letters", prompts, overrides)
    for guidance in (1, 2):
        labels = ("control.style=gay", f"control.guidance={guidance}")
        prompts, overrides = ["", "the", "no"], (*greedy, *labels)
        yield f"documents, guidance {guidance}", functools.partial(same_text, lab, "documents", prompts, overrides)
    for precision in ("bf16", "fp16", "int8"):
        if lab.bf16 or precision != "bf16":
            overrides = (*greedy, f"precision={precision}")
            yield f"{precision}, graph and plain", functools.partial(graph_is_plain, lab, wide[:4], overrides)
    yield "rows that end one by one", lambda: ending(lab, wide)
    yield "out of memory, rows halved", lambda: halved(lab, wide[:4])
    yield "a request in the server's thread", lambda: in_thread(lab)


@functools.cache
def trained(lab: Lab, data: str) -> Path:
    """A run folder whose model is sure of its choices; another process of this lab takes the same."""
    folder = lab.folder / f"trained-{data}"
    if not (folder / "summary.json").is_file():
        iters = "max_iters=10" if lab.pretend else "max_iters=150"
        cfg = lab.config(*SHAPE, *(TOY if lab.pretend else ()), iters, f"out_dir={folder}", "overwrite=true", data=data)
        Session.new(cfg, folder, []).run()
    return folder


def opened(lab: Lab, data: str, *overrides: str):
    """(model as run_sample.py opens it, its settings)"""
    cfg = lab.sample_config(*overrides)
    model = open_model(cfg, trained(lab, data))
    exact_products()
    return model, Settings.of(cfg)


def texts(lab: Lab, data: str, prompts: list[str], *overrides: str) -> list[str]:
    """What is written behind each prompt, all rows together."""
    model, settings = opened(lab, data, *overrides)
    requests = [settings.request(prompt, number) for number, prompt in enumerate(prompts)]
    writer = model.writer_of(requests, batch_size=len(requests))
    found = {piece.key: piece.result.text for piece in writer.write() if piece.result}
    return [found[key] for key in range(len(prompts))]


def paths(lab: Lab) -> dict[str, str]:
    """The path with graphs and the plain one; in a rehearsal both are plain, for compiling the CPU's takes long."""
    return {"graph": f"fast={'false' if lab.pretend else 'true'}", "plain": "fast=false"}


def same_text(lab: Lab, data: str, prompts: list[str], overrides: tuple[str, ...]) -> dict:
    """In float32: with graphs, without, and on the CPU."""
    found = {name: texts(lab, data, prompts, *overrides, "precision=fp32", fast) for name, fast in paths(lab).items()}
    found["cpu"] = texts(lab, data, prompts, *overrides, "precision=fp32", "fast=false", "device=cpu")
    return judged(found)


def graph_is_plain(lab: Lab, prompts: list[str], overrides: tuple[str, ...]) -> dict:
    """In a format that a CPU computes otherwise: with graphs and without."""
    return judged({name: texts(lab, "letters", prompts, *overrides, fast) for name, fast in paths(lab).items()})


def judged(found: dict[str, list[str]]) -> dict:
    """Whether all wrote the same, else the first texts that differ."""
    for row in zip(*found.values(), strict=True):
        if len(set(row)) > 1:
            return {"ok": False, "error": "the texts differ", "texts": dict(zip(found, row))}
    return {"rows": len(next(iter(found.values()))), "characters": sum(map(len, found["graph"]))}


@contextlib.contextmanager
def recordings(seconds: list[float]) -> Iterator[None]:
    """Collects how long the recording of every CUDA graph takes."""
    if not torch.cuda.is_available():
        yield
        return

    class Timed(torch.cuda.graph):
        def __enter__(self):
            self.started = time.perf_counter()
            return super().__enter__()

        def __exit__(self, *error):
            super().__exit__(*error)
            seconds.append(time.perf_counter() - self.started)

    with mock.patch.object(torch.cuda, "graph", Timed):
        yield


def ending(lab: Lab, prompts: list[str]) -> dict:
    """Rows that end one after the other: recordings, their ms, GiB that the card holds then and without the writer."""
    model, settings = opened(lab, "letters", "sampler=greedy", paths(lab)["graph"])
    seconds: list[float] = []

    def requests():
        for number, prompt in enumerate(prompts):
            settings.max_new_tokens = 4 + 2 * number
            yield settings.request(prompt, number)

    def held() -> float:
        lab.forget_peak()
        return torch.cuda.memory_reserved() / GIB if lab.device.type == "cuda" else 0.0

    before = held()
    with recordings(seconds):
        writer = model.writer_of(list(requests()), batch_size=len(prompts))
        count = sum(piece.result is not None for piece in writer.write())
    while_there = held() - before
    del writer
    gc.collect()
    found = {"recordings": len(seconds), "recording_ms": 1e3 * sum(seconds) / max(1, len(seconds))}
    return {"ok": count == len(prompts), **found, "held_gib": while_there, "held_after_gib": held() - before}


def halved(lab: Lab, prompts: list[str]) -> dict:
    """Steps that fail above two rows go on with two, and write the same."""
    overrides = ("sampler=greedy", "max_new_tokens=20", "precision=fp32", paths(lab)["graph"])
    model, settings = opened(lab, "letters", *overrides)
    real, network = model.network.next_logits, model.network

    def next_logits(idx, cache):
        if len(idx) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(idx, cache)

    network.next_logits = next_logits
    requests = [settings.request(prompt, number) for number, prompt in enumerate(prompts)]
    writer = model.writer_of(requests, batch_size=len(requests))
    found = {piece.key: piece.result.text for piece in writer.write() if piece.result}
    got = {"graph": [found[key] for key in range(len(prompts))], "whole": texts(lab, "letters", prompts, *overrides)}
    return {**judged(got), "capacity": writer.capacity}


def in_thread(lab: Lab) -> dict:
    """What the server's worker writes in its own thread, and what is written here."""
    from nanogpt.serve.worker import Worker

    overrides = ("sampler=greedy", "max_new_tokens=20", "precision=fp32", paths(lab)["graph"])
    model, settings = opened(lab, "letters", *overrides)

    async def write() -> str:
        worker = Worker(model.writer(capacity=4), max_waiting=4)
        try:
            job = worker.start([settings.request(PROMPTS[0], 0)])
            await job.accepted()
            return "".join([update.text for fresh in [part async for part in job.updates()] for update in fresh])
        finally:
            worker.begin_closing()
            await asyncio.to_thread(worker.join, 30)

    return judged({"graph": [asyncio.run(write())], "here": texts(lab, "letters", PROMPTS[:1], *overrides)})
