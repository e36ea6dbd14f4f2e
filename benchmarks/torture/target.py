"""A server under attack, seen from outside: what it answers, whether every answer is in order, whether it is still itself."""

import contextlib
import http.client
import json
import socket
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from ledger import ROOT, Ledger
from raw_requests import JSON, Case

from nanogpt.serve.server import HEADERS

SECONDS = 60
SEEDED = {"prompt": "the king", "seed": 7, "max_tokens": 12}


@dataclass(frozen=True)
class Reply:
    """One answer on the wire."""

    status: int
    headers: dict[str, str]
    body: bytes
    whole: bool


def replies(data: bytes, *, head_only: bool = False) -> list[Reply]:
    """The answers in what was received, strictly read; ValueError where it is no HTTP."""
    found = []
    while data:
        head, end, rest = data.partition(b"\r\n\r\n")
        if not end:
            return [*found, Reply(0, {}, b"", False)]
        first, *lines = head.decode("latin-1").split("\r\n")
        version, status, _ = first.split(" ", 2)
        if version != "HTTP/1.1":
            raise ValueError(first)
        headers = {name.strip().lower(): value.strip() for name, value in (line.split(":", 1) for line in lines)}
        if status == "100":
            data = rest
            continue
        if headers.get("transfer-encoding") == "chunked" and not head_only:
            body, data, whole = _chunked(rest)
        else:
            # uvicorn 自己的拒绝不写长度：说完就断开
            length = 0 if head_only else int(headers.get("content-length", len(rest)))
            body, data, whole = rest[:length], rest[length:], len(rest) >= length
        found.append(Reply(int(status), headers, body, whole))
    return found


def _chunked(data: bytes) -> tuple[bytes, bytes, bool]:
    body = b""
    while True:
        size, end, rest = data.partition(b"\r\n")
        if not end or len(rest) < (length := int(size, 16)) + 2:
            return body, b"", False
        body, data = body + rest[:length], rest[length + 2:]
        if not length:
            return body, data, True


@dataclass
class Target:
    """Where the server listens, and what its answers must never hold."""

    port: int
    ledger: Ledger
    token: str | None = None
    process: psutil.Process | None = None
    read_seconds: float = 1.0
    max_connections: int = 200
    secrets: list[bytes] = field(default_factory=list)
    wanted: bytes = b""

    def __post_init__(self) -> None:
        home = str(Path.home())
        self.secrets += [str(ROOT).encode(), b"Traceback", b"site-packages", *([home.encode()] if len(home) > 1 else [])]
        self.secrets += [self.token.encode()] if self.token else []
        self.wanted = self.seeded()

    def connect(self, *, receive_buffer: int | None = None) -> socket.socket:
        """A new connection."""
        client = socket.socket()
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(SECONDS)
        client.connect(("127.0.0.1", self.port))
        return client

    def ask(self, method: str, path: str, body: dict | None = None) -> tuple[int, dict[str, str], bytes]:
        """One ordinary request."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)) as connection:
            headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.token}"} if self.token else {})}
            connection.request(method, path, None if body is None else json.dumps(body).encode(), headers)
            response = connection.getresponse()
            return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()

    def seeded(self) -> bytes:
        """The text of a fixed seed."""
        status, _, body = self.ask("POST", "/v1/completions", SEEDED)
        return json.dumps(json.loads(body)["choices"]).encode() if status == 200 else body

    def texts(self) -> int:
        """Texts that it is busy with, -1 where it does not say."""
        status, _, body = self.ask("GET", "/health")
        return json.loads(body)["texts"] if status == 200 else -1

    def until_idle(self, seconds: float = 60) -> bool:
        """Wait until it has nothing left to write."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.texts() == 0:
                return True
            time.sleep(0.05)
        return False

    def still_itself(self, attack: str) -> None:
        """After an attack: idle, healthy, and it writes what it wrote at the beginning."""
        try:
            if not self.until_idle():
                self.ledger.breach("afterwards", f"{attack}: texts are never let go")
            elif (written := self.seeded()) != self.wanted:
                self.ledger.breach("afterwards", f"{attack}: it wrote {written[:100]!r}, at the beginning {self.wanted[:100]!r}")
            else:
                self.ledger.count("afterwards", "healthy, the same text")
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.ledger.breach("afterwards", f"{attack}: {error!r}")

    def exchange(self, case: Case) -> tuple[bytes, str]:
        """Send a case and read until all its answers are there or the connection ends; ("received", "whole" | "cut" | "open")."""
        received, end = b"", time.monotonic() + self.read_seconds * 3 + 20
        with contextlib.closing(self.connect()) as client:
            with contextlib.suppress(ConnectionError):
                client.sendall(case.data)
            client.settimeout(0.5)
            while time.monotonic() < end:
                try:
                    piece = client.recv(2**18)
                except TimeoutError:
                    continue
                except ConnectionError:
                    return received, "cut"
                if not piece:
                    return received, "cut"
                received += piece
                if received.count(b"HTTP/1.1 ") >= case.answers and self._all_whole(received, case):
                    return received, "whole"
        return received, "open"

    @staticmethod
    def _all_whole(received: bytes, case: Case) -> bool:
        got = replies(received, head_only=case.head_only)
        return len(got) >= case.answers and all(reply.whole for reply in got)

    def try_case(self, case: Case) -> tuple[str, str, str | None]:
        """Send a case; (its kind, what came of it, what is wrong with that)."""
        try:
            received, how = self.exchange(case)
            got = replies(received, head_only=case.head_only)
        except (OSError, ValueError, KeyError) as error:
            return case.kind, "", f"{error!r} after {case.data[:300]!r}"
        wrong = self.wrong_with(case, got, how)
        # 数百个相同的状态只记一次
        outcome = " ".join(dict.fromkeys(str(reply.status) for reply in got)) or "cut off"
        return case.kind, outcome, wrong and f"{wrong} after {case.data[:300]!r}"

    def wrong_with(self, case: Case, got: list[Reply], how: str) -> str | None:
        """What is not as promised, if anything."""
        if how == "open":
            return "neither answered nor cut off"
        if len(got) > case.answers:
            return f"{len(got)} answers where {case.answers} may be"
        if not case.may_cut and (len(got) < case.answers or not got[-1].whole):
            return f"{len(got)} answers where {case.answers} must be"
        return next((problem for reply in got if (problem := self.wrong_with_reply(reply, case.allowed))), None)

    def wrong_with_reply(self, reply: Reply, allowed: frozenset[int]) -> str | None:
        """What is not in order about one answer: its status, headers, form, or what it tells."""
        if reply.status not in allowed:
            return f"status {reply.status} ({reply.body[:100]!r})"
        if reply.status in (400, 503) and reply.headers.get("content-type", "").startswith("text/plain"):
            # 不是 HTTP 的、连接太多的，uvicorn 不交给 app 就拒绝了
            return None
        missing = [name for name in HEADERS if name.lower() not in reply.headers]
        if missing or any(name.startswith("access-control") or name in ("server", "x-powered-by") for name in reply.headers):
            return f"headers of a {reply.status}: {missing or list(reply.headers)}"
        if reply.status != 200 and reply.body and reply.whole and not {"message", "code"} <= set(json.loads(reply.body)["error"]):
            return f"form of a {reply.status}: {reply.body[:100]!r}"
        told = [secret for secret in self.secrets if secret in reply.body or secret.decode() in str(reply.headers)]
        return f"it tells {told[0]!r}" if told else None


def stream_request(**body) -> bytes:
    """A streamed completion as bytes."""
    data = json.dumps({"stream": True, **body}).encode()
    return JSON + b"Content-Length: %d\r\n\r\n" % len(data) + data


def reset(client: socket.socket) -> None:
    """Drop a connection without a word (RST)."""
    with contextlib.suppress(OSError):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
