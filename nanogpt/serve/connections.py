"""The HTTP layer under the server: its socket, and connections that nobody can keep open by being slow."""

import asyncio
import contextlib
import json
import logging
import signal
import socket
import threading

from nanogpt.base.language import ConfigError
from nanogpt.base.sample_config import ServerConfig

try:
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError:
    raise ConfigError("missing_package", what="serve=true", package="uvicorn") from None

# 内核替慢客户端存多少字节：小，才看得出它不收
SEND_BUFFER = 2**15
MAX_HEAD = 2**14
KEEP_ALIVE_SECONDS = 5
# 连接数超过上限的这么多倍，就不再逐个解释为什么拒绝
CROWD = 2
SHUTDOWN_SECONDS = 5
# 没有 CORS 头：别的网站发得出请求，却读不到回答；Guard 连请求也拒绝
HEADERS = {
    "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin", "Cross-Origin-Opener-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}


def refusal(status: str, code: str, message: str, **headers: str) -> bytes:
    """A whole answer to a client that the app never sees: the same headers and form of error as the app's."""
    kind = "server_error" if status.startswith("5") else "invalid_request_error"
    body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}})
    fields = {**HEADERS, "Content-Type": "application/json", "Content-Length": len(body), "Connection": "close", **headers}
    return (f"HTTP/1.1 {status}\r\n" + "".join(f"{name.lower()}: {value}\r\n" for name, value in fields.items()) + "\r\n" + body).encode("ascii")


TOO_MANY = refusal("503 Service Unavailable", "connections", "too many connections", **{"Retry-After": "5"})
NO_HTTP = refusal("400 Bad Request", "bad_request", "this is no HTTP request, or its head is too long")


def bind(config: ServerConfig) -> socket.socket:
    """A socket at host and port that does not listen yet; ConfigError when the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError("bad_host", got=config.host, reason=getattr(error, "strerror", None) or error) from None
    bound = socket.socket(family, kind, protocol)
    try:
        # Windows 上 REUSEADDR 会让两个程序占同一端口，别处它只是跳过 TIME_WAIT
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise ConfigError("port_taken", got=config.port, host=config.host, reason=error.strerror) from None
    return bound


def url_of(bound: socket.socket, host: str) -> str:
    """What to type into a browser on this machine."""
    port = bound.getsockname()[1]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{port}/"


class Connection(H11Protocol):
    """uvicorn's connection with three limits: how many, how long a head may take, how long a client may take nothing."""

    limits: ServerConfig
    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        # 用户态不留余量：有一个字节送不出去就开始计时
        transport.set_write_buffer_limits(high=0)
        self._refused = len(self.connections) > self.limits.max_connections
        if len(self.connections) > CROWD * self.limits.max_connections:
            transport.abort()
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._refused:
            # 收到请求才回答并断开：一连上就断，对方看到的是连接被重置
            self._end(TOO_MANY)
            return
        super().data_received(data)
        if self.cycle and not self.cycle.response_complete:
            self._cancel("_head_timer")
        elif not self._head_timer:
            # 空闲连接上来了半个请求头：从第一个字节起计时，一点点地发也没用
            self._await_head()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP; behind an answer that has begun, the connection just ends."""
        under_way = self.cycle and not self.cycle.response_complete
        if under_way:
            # app 还在算的回答已经没有去处：它再写，h11 就会抛错
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._end(b"" if under_way and self.cycle.response_started else NO_HTTP)

    def _end(self, last: bytes) -> None:
        self.transport.write(last)
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._cancel("_stall_timer")
        self._stall_timer = self.loop.call_later(self.limits.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel("_stall_timer")

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._cancel("_head_timer")
        self._cancel("_stall_timer")

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.limits.read_seconds, self.transport.abort)

    def _cancel(self, name: str) -> None:
        if timer := getattr(self, name):
            timer.cancel()
            setattr(self, name, None)


class Server(uvicorn.Server):
    """uvicorn's server that ends the writing before it waits for its connections, and exits with 0 on Ctrl-C."""

    def __init__(self, app, limits: ServerConfig, *, on_shutdown):
        # 它的日志会混进控制台：自己的错误由 app 打印
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL + 1)
        super().__init__(uvicorn.Config(
            app, http=type("LimitedConnection", (Connection,), {"limits": limits}), ws="none", lifespan="off", log_config=None, access_log=False,
            server_header=False, proxy_headers=False, timeout_keep_alive=KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            h11_max_incomplete_event_size=MAX_HEAD,
        ))
        self._on_shutdown = on_shutdown
        self.on_start = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.on_start:
            self.on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._on_shutdown()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self):
        # uvicorn 收尾之后会再发一次信号，退出码就不是 0 了
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
