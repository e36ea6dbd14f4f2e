"""A server that answers as a broken, slow or hostile one would: raw sockets, one fault for each path."""

import contextlib
import re
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

# 127.0.0.1 的自签证书与私钥，只为测试：没有一台机器信它
CERTIFICATE = Path(__file__).with_name("self_signed.pem")
# 有上限的“无尽”：客户端没有拦住时，测试自己不至于写满内存
ENDLESS = 2**28


class Line:
    """One connection: what the client asked for, and how to answer it."""

    def __init__(self, connection: socket.socket, begin: int, over: threading.Event):
        self.connection, self.begin, self.over, self.sent = connection, begin, over, 0

    def send(self, *parts: bytes) -> None:
        """Send bytes."""
        for part in parts:
            self.connection.sendall(part)
            self.sent += len(part)

    def head(self, status: str = "200 OK", **headers: object) -> None:
        """Send the head of an answer."""
        lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        self.send(f"HTTP/1.1 {status}\r\n{lines}Connection: close\r\n\r\n".encode("latin-1"))

    def forever(self, piece: bytes) -> None:
        """Send a piece over and over until the client leaves."""
        while self.sent < ENDLESS and not self.over.is_set():
            self.send(piece)

    def reset(self) -> None:
        """End the connection with RST."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


Fault = Callable[[Line], None]


class BadServer:
    """Answers path -> fault on this machine, over TLS if asked; counts connections and bytes for each path."""

    def __init__(self, faults: dict[str, Fault], *, tls: bool = False):
        self.faults, self.connections, self.sent = faults, {}, {}
        self._over, self._listener = threading.Event(), socket.create_server(("127.0.0.1", 0))
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if tls else None
        if tls:
            self._context.load_cert_chain(CERTIFICATE)
        self.address = f"{'https' if tls else 'http'}://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> "BadServer":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        # 只关掉的话，等着 accept 的线程不会醒
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        connection.settimeout(20)
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stack.callback(connection.close)
            if self._context:
                connection = stack.enter_context(self._context.wrap_socket(connection, server_side=True))
            asked = b""
            while b"\r\n\r\n" not in asked:
                piece = connection.recv(4096)
                if not piece:
                    return
                asked += piece
            path = asked.split(b" ")[1].decode("ascii")
            resumed = re.search(rb"range: bytes=(\d+)-", asked, flags=re.IGNORECASE)
            line = Line(connection, int(resumed[1]) if resumed else 0, self._over)
            self.connections[path] = self.connections.get(path, 0) + 1
            try:
                self.faults.get(path, not_found)(line)
            finally:
                self.sent[path] = self.sent.get(path, 0) + line.sent


def not_found(line: Line) -> None:
    """404."""
    line.head("404 Not Found", Content_Length=0)


def plain(content: bytes) -> Fault:
    """What a good server answers, also when a download is taken up again."""

    def answer(line: Line) -> None:
        rest = content[line.begin :]
        line.head("206 Partial Content" if line.begin else "200 OK", Content_Length=len(rest))
        line.send(rest)

    return answer


def faults(content: bytes) -> Iterator[tuple[str, str, Fault]]:
    """(kind, case, fault) of every way in which an answer can be wrong; what only drips is left to the person."""
    size = len(content)
    for status in ("400 Bad", "401 Who", "403 No", "404 None", "407 Proxy", "416 Range", "429 Slow", "500 Oops", "502 Bad", "503 Busy"):
        yield "status", status[:3], lambda line, status=status: (line.head(status, Content_Length=4), line.send(b"oops"))
        yield "status", f"{status[:3]} endless", lambda line, status=status: (line.head(status), line.forever(b"x" * 65536))
    for wanted in (0, 1, size // 2, size - 1):
        yield "truncated", f"{wanted} bytes, and says so", lambda line, n=wanted: (line.head(Content_Length=n), line.send(content[:n]))
        yield "truncated", f"{wanted} bytes, length unsaid", lambda line, n=wanted: (line.head(), line.send(content[:n]))
        yield "truncated", f"{wanted} bytes of {size}", lambda line, n=wanted: (line.head(Content_Length=size), line.send(content[:n]))
    for more in (1, 1000, 10**6):
        yield "too long", f"{more} more, and says so", lambda line, n=more: (line.head(Content_Length=size + n), line.send(content, b"x" * n))
        yield "too long", f"{more} more, length unsaid", lambda line, n=more: (line.head(), line.send(content, b"x" * n))
    for length in ("-1", "x", "1e9", "9" * 30, f"{size}, {size}", ""):
        yield "odd length", repr(length[:9]), lambda line, n=length: (line.head(Content_Length=n), line.send(content[:-1]))
    yield "endless", "body", lambda line: (line.head(), line.forever(b"x" * 65536))
    yield "endless", "body behind the right length", lambda line: (line.head(), line.send(content), line.forever(b"x" * 65536))
    yield "endless", "one header line", lambda line: (line.send(b"HTTP/1.1 200 OK\r\nX: "), line.forever(b"x" * 65536))
    yield "endless", "header lines", lambda line: (line.send(b"HTTP/1.1 200 OK\r\n"), line.forever(b"X: y\r\n" * 999))
    yield "endless", "chunks", lambda line: (line.head(Transfer_Encoding="chunked"), line.forever(b"10000\r\n" + b"x" * 65536 + b"\r\n"))
    yield "endless", "chunk size", lambda line: (line.head(Transfer_Encoding="chunked"), line.forever(b"0" * 65536))
    yield "slow", "silent", lambda line: line.over.wait(20)
    yield "slow", "silent behind the head", lambda line: (line.head(Content_Length=size), line.over.wait(20))
    for begun in (0, 10, size // 3):
        yield "closed", f"after {begun} bytes", lambda line, n=begun: (line.head(Content_Length=size), line.send(content[:n])) if n else None
        yield "closed", f"reset after {begun} bytes", lambda line, n=begun: (line.head(Content_Length=size), line.send(content[:n]), line.reset())
    for place in ("http://example.invalid/a", "http://example.invalid:443/a", "file:///etc/passwd", "ftp://example.invalid/a", "data:text/plain,a",
                  "//[", "https://", "gopher://x", "\x1b[2J", "http://user:secret@example.invalid/", "https://exa mple/", "/" + "a" * 10**5, ""):
        yield "redirect", repr(place[:30]), lambda line, place=place: line.head("302 Found", Location=place, Content_Length=0)
    for code in ("300", "301", "303", "304", "307", "308"):
        yield "redirect", f"{code} to itself", lambda line, code=code: line.head(f"{code} x", Location="?again", Content_Length=0)
    yield "not http", "garbage", lambda line: line.send(bytes(range(256)) * 99)
    yield "not http", "nothing but line ends", lambda line: line.forever(b"\r\n" * 999)
    yield "not http", "terminal codes", lambda line: line.send(b"HTTP/1.1 500 \x1b]0;owned\x07\x1b[2J\r\n\r\n")
    yield "not http", "odd status", lambda line: line.send(b"HTTP/1.1 2e2 OK\r\n\r\n" + content)
    yield "encoded", "says gzip", lambda line: (line.head(Content_Length=size, Content_Encoding="gzip"), line.send(bytes(size)))
    yield "encoded", "huge chunk", lambda line: (line.head(Transfer_Encoding="chunked"), line.send(b"ffffffffffff\r\n", b"x" * 10**6))
    yield "encoded", "bad chunk", lambda line: (line.head(Transfer_Encoding="chunked"), line.send(b"zz\r\n", content))
    yield "encoded", "negative chunk", lambda line: (line.head(Transfer_Encoding="chunked"), line.send(b"-5\r\n", content))


def wrong_rest(content: bytes) -> Fault:
    """Half of the right bytes, then, when taken up again, other ones."""

    def answer(line: Line) -> None:
        half = len(content) // 2
        if not line.begin:
            line.head(Content_Length=len(content))
            line.send(content[:half])
            return
        line.head("206 Partial Content", Content_Length=len(content) - line.begin)
        line.send(bytes(len(content) - line.begin))

    return answer
