"""A server's life as its owner sees it: where it listens, who is let in, how it ends, what it prints."""

import contextlib
import http.client
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from ledger import ROOT, Ledger
from target import Target, stream_request

TOKEN = "a-token.that_nobody~sees/1"
TEXT = "The quick brown fox jumps over the lazy dog.\n" * 60
TINY = (
    "dataset=text_file", "dataset.path=my.txt", "dataset.dir=prepared", "dataset.tokenizer=byte", "model.n_layer=2", "model.n_head=2",
    "model.n_embd=16", "model.block_size=64", "model.ngrams=[2]", "model.ngram_buckets=97",
    "max_iters=20", "eval_interval=10", "eval_tokens=200", "sample_tokens=5",
    "logger=none", "device=cpu", "batch_size=4", "out_dir=outputs/served",
)
# 与默认相同的程序，只是时限短些：攻击者等得起，测试等不起
TIGHT = ("serve=true", "server.port=0", "device=cpu", "batch_size=8", "max_new_tokens=16", "server.read_seconds=1", "server.stall_seconds=2")
OTHER_HOSTS = ("0.0.0.0", "::", "192.168.1.2", "10.0.0.1")
STARTUP_S = 180


def environment(token: str | None = None) -> dict[str, str]:
    """An English console and one thread, whatever this process has."""
    kept = {name: value for name, value in os.environ.items() if name != "NANOGPT_TOKEN"}
    kept |= {"NANOGPT_TOKEN": token} if token else {}
    return {**kept, "OMP_NUM_THREADS": "1", "LANG": "en_US.UTF-8", "LC_ALL": "", "PYTHONUNBUFFERED": "1"}


def train(folder: Path) -> None:
    """A tiny model of bytes in `folder`."""
    (folder / "my.txt").write_text(TEXT, encoding="utf-8")
    subprocess.run([sys.executable, str(ROOT / "run_train.py"), *TINY], cwd=folder, env=environment(), check=True, capture_output=True)


@contextlib.contextmanager
def serving(ledger: Ledger, folder: Path, *overrides: str, token: str | None = None) -> Iterator[tuple[subprocess.Popen, int]]:
    """`python run_sample.py serve=true` and its port; ended afterwards, its console checked."""
    log = folder / "console.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "run_sample.py"), *TIGHT, *overrides], cwd=folder, env=environment(token), stdout=output, stderr=output,
        )
    try:
        yield process, _port(process, log)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            ledger.breach("end", "it did not end after SIGTERM")
    quiet(ledger, log.read_text(encoding="utf-8", errors="replace"))


def _port(process: subprocess.Popen, log: Path) -> int:
    end = time.monotonic() + STARTUP_S
    while time.monotonic() < end and process.poll() is None:
        if found := re.search(r"http://[^ /]+:(\d+)/", log.read_text(encoding="utf-8", errors="replace")):
            return int(found[1])
        time.sleep(0.1)
    raise RuntimeError(log.read_text(encoding="utf-8", errors="replace"))


def quiet(ledger: Ledger, console: str) -> None:
    """The console of an attacked server holds no traceback, no token, no control characters, and is short."""
    found = {
        "a traceback": "Traceback" in console or "Error" in console, "the token": TOKEN in console, "100 lines": console.count("\n") > 100,
        "control characters": re.search(r"[\x00-\x09\x0b-\x1f]", console),
    }
    wrong = [what for what, present in found.items() if present]
    ledger.breach("console", f"{wrong}: {console[-400:]}") if wrong else ledger.count("console", "quiet")


def attack(ledger: Ledger, folder: Path) -> None:
    """Everything about a server's life, each with a process of its own."""
    hosts(ledger, folder)
    with serving(ledger, folder) as (process, port):
        loopback_only(ledger, process, port)
        vanished_checkpoint(ledger, folder, port)
    train(folder)
    token(ledger, folder)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        ended_by(ledger, folder, number)


def hosts(ledger: Ledger, folder: Path) -> None:
    """An address that other machines reach is refused without a token: one line, exit code 2, nothing listens."""
    for host in OTHER_HOSTS:
        command = [sys.executable, str(ROOT / "run_sample.py"), "serve=true", f"server.host='{host}'", "server.port=0"]
        begun = time.monotonic()
        done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, encoding="utf-8", timeout=60)
        seconds = time.monotonic() - begun
        if done.returncode != 2 or done.stderr.count("\n") != 1 or "server.token" not in done.stderr:
            ledger.breach("another host without a token", f"{host}: exit {done.returncode}: {done.stderr}{done.stdout}")
        else:
            ledger.count("another host without a token", "refused in one line")
        ledger.figures["refusing another host, s"] = round(seconds, 2)


def loopback_only(ledger: Ledger, process: subprocess.Popen, port: int) -> None:
    """By default only 127.0.0.1 listens: every other address of this machine refuses."""
    listening = {one.laddr.ip for one in psutil.Process(process.pid).net_connections() if one.status == psutil.CONN_LISTEN}
    if listening != {"127.0.0.1"}:
        ledger.breach("loopback", f"it listens on {listening}")
    for address in _addresses():
        with contextlib.closing(socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)) as client:
            client.settimeout(2)
            code = client.connect_ex((address, port))
        ledger.count("loopback", "others refused") if code else ledger.breach("loopback", f"{address} can be connected to")


def _addresses() -> list[str]:
    own = [one.address for found in psutil.net_if_addrs().values() for one in found if one.family in (socket.AF_INET, socket.AF_INET6)]
    return [address for address in [*own, "127.0.0.2"] if address != "127.0.0.1" and "%" not in address]


def vanished_checkpoint(ledger: Ledger, folder: Path, port: int) -> None:
    """The checkpoint's files are cut to nothing, then removed, while the server goes on with what it has loaded."""
    target = Target(port, ledger)
    for file in (folder / "outputs").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    target.still_itself("files cut to nothing")
    shutil.rmtree(folder / "outputs")
    target.still_itself("run folder removed")


def token(ledger: Ledger, folder: Path) -> None:
    """With a token the server may listen everywhere; only who knows it gets in, and wrong ones all take the same time."""
    wrong = (TOKEN[:-1] + "2", "b" + TOKEN[1:], TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "", "\xff" * 8, "x" * 5000)
    with serving(ledger, folder, "server.host=0.0.0.0", token=TOKEN) as (_, port):
        address = next((address for address in _addresses() if "." in address and not address.startswith("127.")), "127.0.0.2")
        for given in (None, *wrong, TOKEN):
            status, body = _models(address, port, given)
            if (status == 200) != (given == TOKEN) or status not in (200, 401) or TOKEN.encode() in body:
                ledger.breach("token", f"{given!r:.60} from {address}: {status} {body[:100]!r}")
            else:
                ledger.count("token", str(status))
        times: dict[str, list[float]] = {name: [] for name in ("first character wrong", "last character wrong")}
        for _ in range(1500):
            for name, given in zip(times, (wrong[1], wrong[0])):
                begun = time.perf_counter()
                _models("127.0.0.1", port, given)
                times[name].append(time.perf_counter() - begun)
        ledger.figures["a wrong token is refused in, median ms"] = {name: round(1000 * statistics.median(found), 3) for name, found in times.items()}


def _models(address: str, port: int, given: str | None) -> tuple[int, bytes]:
    with contextlib.closing(http.client.HTTPConnection(address, port, timeout=30)) as connection:
        connection.request("GET", "/v1/models", headers={} if given is None else {"Authorization": f"Bearer {given}".encode("latin-1")})
        response = connection.getresponse()
        return response.status, response.read()


def ended_by(ledger: Ledger, folder: Path, number: signal.Signals) -> None:
    """The process is ended in the middle of streams: clients see the end at once, the port is free for the next server."""
    with serving(ledger, folder, "server.max_tokens=100000") as (process, port):
        clients = []
        for _ in range(5):
            client = socket.create_connection(("127.0.0.1", port))
            client.settimeout(30)
            client.sendall(stream_request(prompt="a", max_tokens=100_000))
            client.recv(2000)
            clients.append(client)
        process.send_signal(number)
        for client in clients:
            ended = _rest(client)
            told = b'"code": "stopping"' in ended
            if not told and number != signal.SIGKILL:
                ledger.breach(number.name, f"a client was not told: {ended[-100:]!r}")
            else:
                ledger.count(number.name, "client told that it stops" if told else "client sees the end")
        code = process.wait(30)
        wanted = -signal.SIGKILL if number == signal.SIGKILL else 0
        ledger.count(number.name, f"exit code {code}") if code == wanted else ledger.breach(number.name, f"exit code {code}")
    with serving(ledger, folder, f"server.port={port}") as (_, again):
        ledger.count(number.name, "port free again") if again == port else ledger.breach(number.name, f"port {port} became {again}")


def _rest(client: socket.socket) -> bytes:
    received = b""
    with contextlib.closing(client), contextlib.suppress(ConnectionError):
        while piece := client.recv(65536):
            received += piece
    return received
