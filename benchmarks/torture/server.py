"""Attack serve=true with malformed, slow, vanishing and too many clients, and watch its memory.

python benchmarks/torture/server.py --rounds 20
"""

import argparse
import contextlib
import json
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import psutil
import server_life
import server_schema
from ledger import Ledger
from raw_requests import GET, SMALL, Case, cases, post
from target import SEEDED, Target, replies, reset, stream_request

PROMISE = (
    "No request, however malformed, slow or abandoned, and no number of them makes the server crash, answer with its own fault, grow, "
    "tell what it should not, or write a different text afterwards."
)
CLIENTS = 24
MIB = 2**20
# 预热之后，内存还能比中位数多出多少：测量本身的噪声
GROWTH_MIB = 12


def attack(ledger: Ledger, target: Target, *, size: int, random: Random, every: int = 1) -> None:
    """Every attack on a listening server once; `size` random cases of each random kind, and about as many clients.

    `every` > 1 takes only every so-many-th of the fixed requests, and none of the huge ones.
    """
    raw(ledger, target, size, random, every)
    target.still_itself("raw requests")
    for name, one in (("slow clients", slow), ("clients that read nothing", deaf), ("clients that vanish", vanishing),
                      ("a crowd", crowd), ("too many connections", overfull), ("one after another", sequence)):
        one(ledger, target, size, random)
        target.still_itself(name)


def raw(ledger: Ledger, target: Target, size: int, random: Random, every: int) -> None:
    """What no HTTP library would send."""
    with ThreadPoolExecutor(CLIENTS) as pool:
        book(ledger, pool.map(target.try_case, cases(random, size, every=every)))


def book(ledger: Ledger, outcomes: Iterable[tuple[str, str, str | None]]) -> None:
    """Count (kind, outcome, what is wrong or None), in one thread."""
    for kind, outcome, wrong in outcomes:
        ledger.breach(kind, wrong) if wrong else ledger.count(kind, outcome)


def slow(ledger: Ledger, target: Target, size: int, random: Random) -> None:
    """Slow-loris: heads and bodies byte by byte, and silence; others are served meanwhile."""
    body, large = post(SMALL), post(b" " * 1_000_000)
    # 名字 -> (全部字节, 其中一开始就发的)；后面的逐字节发，发不完
    kinds = {
        "silence": (b"", 0), "a slow head": (GET, 0), "a slow body": (body[:-1], len(body) - len(SMALL)), "a slow second head": (GET * 2, len(GET)),
        "a large body without its end": (large[:-1], len(large) - 9),
    }
    begun, waits = time.monotonic(), []
    clients = [(kind, target.connect()) for kind in kinds for _ in range(max(2, size // 8))]
    for kind, client in clients:
        data, count = kinds[kind]
        with contextlib.suppress(ConnectionError):
            client.sendall(data[:count])
    for step in range(4):
        asked = time.monotonic()
        target.ask("GET", "/health")
        waits.append(time.monotonic() - asked)
        for kind, client in clients:
            data, count = kinds[kind]
            with contextlib.suppress(OSError):
                client.sendall(data[count + step: count + step + 1])
        time.sleep(target.read_seconds / 8)
    for kind, client in clients:
        with contextlib.closing(client):
            how = _until_end(client)
        if time.monotonic() - begun > target.read_seconds * 2 + 5:
            ledger.breach("slow-loris", f"{kind} was not cut off after {time.monotonic() - begun:.1f} s")
        else:
            ledger.count("slow-loris", f"{kind}: {how}")
    ledger.figures["slowest /health beside slow clients, ms"] = round(1000 * max(waits), 1)


def _until_end(client) -> str:
    received = b""
    try:
        while piece := client.recv(65536):
            received += piece
    except TimeoutError:
        return "open"
    except ConnectionError:
        pass
    return "408" if b" 408 " in received else "cut off"


def deaf(ledger: Ledger, target: Target, size: int, random: Random) -> None:
    """Clients that start a long stream, or many pages, and never read: cut off, their rows free again."""
    clients = [target.connect(receive_buffer=2048) for _ in range(max(3, size // 8))]
    for number, client in enumerate(clients):
        # 一部分流水线式地要很多页
        client.sendall(stream_request(prompt="a", max_tokens=800) if number % 3 else b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 200)
    if target.ask("POST", "/v1/completions", SEEDED)[0] not in (200, 503) or not target.until_idle():
        ledger.breach("never reading", "their texts are never let go")
    for client in clients:
        with contextlib.closing(client):
            ended = _until_end(client)
        ledger.count("never reading", ended) if ended != "open" else ledger.breach("never reading", "not cut off")


def vanishing(ledger: Ledger, target: Target, size: int, random: Random) -> None:
    """Clients that reset the connection in the middle of a head, a body or a stream."""
    def vanish(number: int) -> None:
        request = stream_request(prompt=["a", "b"], max_tokens=1000)
        client = target.connect()
        client.sendall(request[: random.randrange(len(request))] if number % 3 == 0 else request)
        if number % 3 == 1:
            client.recv(random.randrange(1, 2000))
        time.sleep(random.random() * 0.1)
        reset(client)

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(vanish, range(size)))
    ledger.count("vanishing", "let go") if target.until_idle() else ledger.breach("vanishing", "their texts are never let go")


def crowd(ledger: Ledger, target: Target, size: int, random: Random) -> None:
    """Many completions at the same moment: each the text that it would be alone, or 503 and when to come back."""
    tokens, seeds = 8, range(4)
    alone = {seed: target.ask("POST", "/v1/completions", {"prompt": "a", "max_tokens": tokens, "seed": seed})[2] for seed in seeds}
    together = threading.Barrier(size)

    def one(number: int) -> tuple[str, str, str | None]:
        seed, received = number % len(seeds), b""
        body = json.dumps({"prompt": "a", "max_tokens": tokens, "seed": seed, "stream": bool(number % 2)})
        request = post(body.encode(), "Connection: close")
        try:
            with contextlib.closing(target.connect()) as client:
                together.wait()
                client.sendall(request)
                while piece := client.recv(65536):
                    received += piece
            (reply,) = replies(received)
            wrong = target.wrong_with_reply(reply, frozenset({200, 503}))
            if reply.status == 503:
                wrong = wrong or (None if int(reply.headers.get("retry-after", 0)) > 0 else "503 without Retry-After")
            elif _text(reply.body) != _text(alone[seed]) or (number % 2 and not reply.body.endswith(b"data: [DONE]\n\n")):
                wrong = wrong or "another text than alone"
        except (OSError, ValueError) as error:
            return "crowd", "", repr(error)
        return "crowd", str(reply.status), wrong

    started = time.monotonic()
    with ThreadPoolExecutor(size) as pool:
        book(ledger, pool.map(one, range(size)))
    ledger.figures[f"{size} completions at once, all answered after s"] = round(time.monotonic() - started, 2)


def overfull(ledger: Ledger, target: Target, size: int, random: Random) -> None:
    """More connections than the server takes: those beyond are told so when they ask, and when to come back."""
    with contextlib.ExitStack() as stack:
        for _ in range(target.max_connections):
            stack.enter_context(contextlib.closing(target.connect()))
        for _ in range(size):
            outcome = "cut off"
            try:
                received, how = target.exchange(Case("too many connections", GET))
                for reply in replies(received):
                    late = reply.status == 503 and int(reply.headers.get("retry-after", 0)) <= 0
                    outcome, wrong = str(reply.status), target.wrong_with_reply(reply, frozenset({200, 503})) or (late and "503 without Retry-After")
                if how == "open" or not received:
                    wrong = f"not answered ({how})"
            except (OSError, ValueError) as error:
                wrong = repr(error)
            book(ledger, [("too many connections", outcome, wrong or None)])


def _text(body: bytes) -> str:
    """All the text of an answer or a stream, still escaped."""
    return "".join(re.findall(r'"text": ?"((?:[^"\\]|\\.)*)"', body.decode("utf-8")))


def sequence(ledger: Ledger, target: Target, size: int, random: Random) -> None:
    """Many ordinary requests, one after another on one connection."""
    with contextlib.closing(target.connect()) as client:
        for number in range(size * 10):
            client.sendall(post(SMALL) if number % 10 == 0 else GET)
            received = b""
            while not (received and replies(received)[-1].whole):
                piece = client.recv(65536)
                if not piece:
                    ledger.breach("sequence", f"the connection ended at request {number}")
                    return
                received += piece
            wrong = target.wrong_with_reply(replies(received)[-1], frozenset({200}))
            ledger.breach("sequence", wrong) if wrong else ledger.count("sequence", "200")


# ---- 真的进程：内存、线程、文件描述符 ----


def resources(process: psutil.Process) -> dict[str, float]:
    """What a process holds now."""
    return {"rss": process.memory_info().rss / MIB, "threads": process.num_threads(), "fds": process.num_fds() if hasattr(process, "num_fds") else 0}


def rounds(ledger: Ledger, target: Target, *, count: int, size: int, seed: int) -> None:
    """The attacks over and over; after the first round nothing may grow."""
    held = []
    for number in range(count):
        attack(ledger, target, size=size, random=Random(seed + number))
        # 空闲的保持连接过几秒才关
        time.sleep(6)
        held.append(resources(target.process))
        print(f"  round {number}: {held[-1]}, {ledger.cases} cases", flush=True)
    first, last = held[0], held[-1]
    half = len(held) // 2
    rss = [one["rss"] for one in held]
    growth = statistics.median(rss[-half:]) - statistics.median(rss[1:half + 1]) if half > 1 else 0.0
    ledger.figures |= {"memory after each round, MiB": [round(one, 1) for one in rss], "growth, second half over first, MiB": round(growth, 1),
                       "threads": [first["threads"], last["threads"]], "file descriptors": [first["fds"], last["fds"]]}
    if growth > GROWTH_MIB or last["rss"] - first["rss"] > 3 * GROWTH_MIB:
        ledger.breach("memory", f"it grew by {growth:.1f} MiB, from {first['rss']:.1f} to {last['rss']:.1f}")
    else:
        ledger.count("memory", "bounded")
    if last["threads"] > first["threads"] or last["fds"] > first["fds"]:
        ledger.breach("handles", f"{first} became {last}")
    else:
        ledger.count("handles", "returned")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--size", type=int, default=100, help="random cases of each kind, and clients at once, in every round")
    parser.add_argument("--examples", type=int, default=400, help="cases that schemathesis makes for every address")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    ledger = Ledger("server", PROMISE)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server_life.train(folder)
        with server_life.serving(ledger, folder) as (process, port):
            target = Target(port, ledger, process=psutil.Process(process.pid), secrets=[name.encode()])
            started = resources(target.process)
            rounds(ledger, target, count=asked.rounds, size=asked.size, seed=asked.seed)
            ledger.figures["memory before the first attack, MiB"] = round(started["rss"], 1)
        for token in (None, server_life.TOKEN):
            with server_life.serving(ledger, folder, "server.max_tokens=24", token=token) as (_, port):
                target = Target(port, ledger, token=token, secrets=[name.encode()])
                server_schema.fuzz(ledger, f"http://127.0.0.1:{port}/openapi.json", examples=asked.examples, seed=asked.seed, token=token)
                target.still_itself("schemathesis")
        server_life.attack(ledger, folder)
    return ledger.finish()


if __name__ == "__main__":
    sys.exit(main())
