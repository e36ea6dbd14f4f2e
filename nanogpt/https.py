"""Requests whose answer cannot be changed on the way and cannot go on for ever: https, certificates checked, bounded in time.

Plain http is for this machine only, as pip has it: a registry's mirror may run here.
"""

import base64
import contextlib
import http.client
import re
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

# 每次收发的时限：慢不要紧，停了才算断
TIMEOUT_S = 20.0
# 每个字节都赶在时限之前的一方，可以拖上几天：这么久之内至少要来这么多
PATIENCE_S, LEAST_BYTES = 60.0, 2**14


class RefusedError(OSError):
    """An address or an answer that another attempt would not make better."""


def is_here(url: str) -> bool:
    """Whether the address is on this machine."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or bool(re.fullmatch(r"127(\.\d{1,3}){3}", host))


def is_secure(url: str) -> bool:
    """https, or http to this machine."""
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and (parts.scheme == "https" or (parts.scheme == "http" and is_here(url)))
    except ValueError:
        # 方括号不成对之类
        return False


def without_password(url: str) -> str:
    """The address without user and password, to be shown or asked for."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


@contextlib.contextmanager
def open_url(url: str, *, headers: dict[str, str] | None = None, proxy: str | None = None, certificates: str | None = None) -> Iterator["Answer"]:
    """Yield the answer to a GET; HTTPError for 4xx and 5xx, RefusedError for what is not https or takes too long.

    `proxy` and `certificates` (a file of authorities) replace the environment's.
    """
    if not is_secure(url):
        raise RefusedError(f"{without_password(url)} is not https")
    request = urllib.request.Request(without_password(url), headers=headers or {})
    if "@" in urlsplit(url).netloc:
        # 不随重定向转给别的主机
        request.add_unredirected_header("Authorization", _basic(url))
    context = ssl.create_default_context(cafile=certificates if certificates and Path(certificates).is_file() else None)
    with _Patience() as patience:
        # 本机的镜像不经代理
        proxies = {} if is_here(url) else dict.fromkeys(("http", "https"), proxy) if proxy else None
        try:
            with _open(request, [urllib.request.ProxyHandler(proxies), patience.http(), patience.https(context)]) as response:
                yield Answer(response, patience)
        except (OSError, http.client.HTTPException):
            # 看守关掉连接之后，读的一方看到的是各种断线
            if patience.over:
                raise RefusedError(f"too slow: fewer than {LEAST_BYTES} bytes in {PATIENCE_S:g} s") from None
            raise


def _open(request: urllib.request.Request, transports: list[urllib.request.BaseHandler]) -> http.client.HTTPResponse:
    opener = urllib.request.OpenerDirector()
    # 只装这几个：file:、ftp:、data: 的地址没有人接
    for handler in (*transports, urllib.request.HTTPDefaultErrorHandler(), urllib.request.HTTPErrorProcessor(), _Redirects()):
        opener.add_handler(handler)
    try:
        return opener.open(request, timeout=TIMEOUT_S)
    except ValueError as error:
        # 头里的地址、数字写得不对
        raise RefusedError(str(error)) from None


class Answer:
    """A response of which no more is read than is wanted."""

    def __init__(self, response: http.client.HTTPResponse, patience: "_Patience"):
        self._response, self._patience = response, patience
        self.status, self.url = response.status, response.url
        announced = response.headers["Content-Length"]
        self.length = int(announced) if announced and announced.isdecimal() else None
        """Bytes that the server announces, if it does."""

    def pieces(self, most: int) -> Iterator[bytes]:
        """The body as it comes; RefusedError once it is longer than `most` bytes."""
        have = 0
        # read1：read 会等到凑满，滴水的连接就永远等下去
        while piece := self._response.read1(2**15):
            have += len(piece)
            if have > most:
                raise RefusedError(f"more than {most} bytes")
            self._patience.came(len(piece))
            yield piece
        if self._patience.over:
            raise ConnectionError("closed")

    def read(self, most: int) -> bytes:
        """The whole body; RefusedError where it is longer than `most` bytes."""
        return b"".join(self.pieces(most))


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https only; from the network none to this machine's http."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        # 上一层接着会把它读完；重定向的正文没有用，却可以没有尽头
        fp.close()
        if not is_secure(newurl) or (urlsplit(newurl).scheme == "http" and not is_here(req.full_url)):
            raise RefusedError(f"redirects to {without_password(newurl)}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Patience:
    """Closes the connections of a request that brings too little for too long, also within the head of an answer."""

    def __init__(self):
        self._sockets: list[socket.socket] = []
        self._done, self.over, self._fresh = threading.Event(), False, 0
        self._deadline = time.monotonic() + PATIENCE_S
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "_Patience":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()

    def came(self, count: int) -> None:
        """Bytes of the body came."""
        self._fresh += count
        if self._fresh >= LEAST_BYTES:
            self._fresh, self._deadline = 0, time.monotonic() + PATIENCE_S

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, PATIENCE_S / 4)):
            if time.monotonic() > self._deadline:
                self.over = True
                for one in self._sockets:
                    with contextlib.suppress(OSError):
                        # 不经 SSLSocket：它会先把加密层拆掉，读的一方就读到密文
                        socket.socket.shutdown(one, socket.SHUT_RDWR)

    def _watched(self, connection: type, **options) -> type:
        """A kind of connection that tells its socket."""
        patience = self

        class Watched(connection):
            def __init__(self, host, **given):
                super().__init__(host, **given, **options)

            def connect(self):
                super().connect()
                patience._sockets.append(self.sock)

        return Watched

    def http(self) -> urllib.request.BaseHandler:
        """The handler of http, for this machine."""
        handler, kind = urllib.request.HTTPHandler(), self._watched(http.client.HTTPConnection)
        handler.http_open = lambda request: handler.do_open(kind, request)
        return handler

    def https(self, context: ssl.SSLContext) -> urllib.request.BaseHandler:
        """The handler of https."""
        handler, kind = urllib.request.HTTPSHandler(context=context), self._watched(http.client.HTTPSConnection, context=context)
        handler.https_open = lambda request: handler.do_open(kind, request)
        return handler


def _basic(url: str) -> str:
    user, _, password = urlsplit(url).netloc.rpartition("@")[0].partition(":")
    return "Basic " + base64.b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode("ascii")
