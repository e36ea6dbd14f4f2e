"""Tokens per second of a server with many clients at once, beside the same texts written as one batch.

    python benchmarks/serving.py [--rounds 3] [--clients 32] [--tokens 200]

A model of 6 layers, 384 wide (weights as they are after one training step: the speed does not depend on them) writes the
same prompts with the same seeds: through `Writer` in a process of its own, and through run_sample.py serve=true to
clients that all ask at the same moment and read streams. The two take turns; the texts must be equal. Also the time to
the first token of a client, and the CPU seconds of the server per token. Writes benchmarks/results/serving.json.
"""

# 服务器比一批直接写慢多少：慢的只能是事件循环、JSON 与锁；客户端在自己的进程里，也占着同样的核
# 第一个 token 的时间含接请求、排队与读开头：同一圈事件循环里接到的一起读

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

from nanogpt.run.metrics import processor_name

ROOT = Path(__file__).resolve().parent.parent
TEXT = "To be, or not to be, that is the question.\n" * 200
TRAIN = [
    "model=tiny", "model.n_layer=6", "model.n_head=6", "model.n_embd=384", "model.block_size=256", "dataset=text_file", "dataset.path=text.txt",
    "logger=none", "sample_tokens=0", "device=cpu", "max_iters=1", "eval_tokens=256", "batch_size=1", "out_dir=run",
]
BATCH = """
import json, sys, time
from nanogpt.write.python import load
clients, tokens = int(sys.argv[1]), int(sys.argv[2])
run = load("run", "device=cpu", f"max_new_tokens={tokens}")
def written(count):
    from nanogpt.base.groups import sample_config
    from nanogpt.write.loading import Settings
    settings = Settings.of(sample_config(run.overrides))
    writer = run.model.writer_of([settings.request("To be", number) for number in range(count)], batch_size=count)
    return {piece.key: piece.result.text for piece in writer.write() if piece.result}
for line in sys.stdin:
    start = time.perf_counter()
    texts = written(int(line))
    print(json.dumps([time.perf_counter() - start, [texts[key] for key in sorted(texts)]]), flush=True)
"""


async def one_client(port: int, seed: int, tokens: int) -> tuple[float, str]:
    """(seconds to the first event, the whole text) of one streamed request."""
    body = json.dumps({"prompt": "To be", "max_tokens": tokens, "seed": seed, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    start, first, text = time.perf_counter(), None, []
    writer.write(head.encode() + body)
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            first = first or time.perf_counter() - start
            text.append(json.loads(line[6:])["choices"][0]["text"])
    writer.close()
    return first, "".join(text)


async def together(port: int, clients: int, tokens: int) -> tuple[float, list[float], list[str]]:
    """(seconds until all are done, seconds to each client's first token, texts)."""
    start = time.perf_counter()
    answers = await asyncio.gather(*(one_client(port, 1337 + number, tokens) for number in range(clients)))
    return time.perf_counter() - start, [first for first, _ in answers], [text for _, text in answers]


def measure(folder: Path, rounds: int, clients: int, tokens: int) -> dict:
    """The server's tokens per second as part of the batch's, and the times to the first token."""
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    # 两边的线程等法相同：run 脚本自己会设它，另一边要替它设
    environment = {"GOMP_SPINCOUNT": "20000", **os.environ, "PYTHONPATH": str(ROOT)}
    options = {"cwd": folder, "env": environment, "text": True, "encoding": "utf-8"}
    subprocess.run([sys.executable, str(ROOT / "run_train.py"), *TRAIN], check=True, capture_output=True, **options)
    serve = ["run_sample.py", "out_dir=run", "device=cpu", "serve=true", "server.port=0", f"batch_size={clients}", "lang=en"]
    server = subprocess.Popen([sys.executable, str(ROOT / serve[0]), *serve[1:]], stderr=subprocess.PIPE, stdout=subprocess.PIPE, **options)
    batch = subprocess.Popen([sys.executable, "-c", BATCH, str(clients), str(tokens)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)
    try:
        # 说到地址的那一行之前，还可能有一行“正在编译”
        line = next(line for line in server.stderr if "http://" in line)
        port, process = int(re.search(r":(\d+)/", line)[1]), psutil.Process(server.pid)
        ratios, firsts, rates, cpu = [], [], [], []
        for number in range(rounds + 1):
            print(clients, file=batch.stdin, flush=True)
            batch_s, wanted = json.loads(batch.stdout.readline())
            before = sum(process.cpu_times()[:2])
            served_s, first, got = asyncio.run(together(port, clients, tokens))
            cpu_s = sum(process.cpu_times()[:2]) - before
            assert got == wanted, "the texts differ"
            # 第一轮只是预热
            if number:
                ratios.append(batch_s / served_s)
                rates.append(clients * tokens / served_s)
                cpu.append(1e3 * cpu_s / (clients * tokens))
                firsts += first
                print(f"round {number}: {ratios[-1]:.2f} of the batch, first token after {statistics.median(first):.2f} s", flush=True)
    finally:
        batch.stdin.close()
        server.terminate()
        batch.wait()
        server.wait()
    firsts.sort()
    return {
        "of_batch": round(statistics.median(ratios), 3), "tokens_per_s": round(statistics.median(rates)),
        "cpu_ms_per_token": round(statistics.median(cpu), 3),
        "first_token_s": {"median": round(statistics.median(firsts), 3), "slowest": round(firsts[-1], 3)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("rounds", 3), ("clients", 32), ("tokens", 200)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), given.rounds, given.clients, given.tokens)
    record = {
        "command": "python benchmarks/serving.py", "device": processor_name(torch.device("cpu")), "torch": torch.__version__, "rounds": given.rounds,
        "clients": given.clients, "tokens": given.tokens, **found,
    }
    (ROOT / "benchmarks" / "results" / "serving.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
