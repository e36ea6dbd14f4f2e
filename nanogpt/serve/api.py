"""The ASGI app of serve=true: guards, six addresses, and one completion from its body to its last byte."""

import asyncio
import base64
import hashlib
import hmac
import json
import re
import sys
import time
import traceback
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanogpt.base.language import ConfigError
from nanogpt.base.sample_config import ServerConfig, is_loopback
from nanogpt.serve.completions import Answer, ApiError, Completion, Reader, as_api_error, error_body
from nanogpt.serve.connections import HEADERS, MAX_HEAD
from nanogpt.serve.openapi import document
from nanogpt.serve.worker import Job, Worker

PAGE = Path(__file__).resolve().parent / "page" / "index.html"
CLOSE = {"Connection": "close"}
# 别的程序常先试的地址：说清楚这里该用哪个
NO_CHAT = {"/v1/chat/completions": "api_no_chat", "/v1/responses": "api_no_chat"}
# 正文超限后最多再读多少倍丢掉，好让对方读到回答而不是连接被重置
DRAIN = 64


class ClientGoneError(Exception):
    """The client is no longer there: nothing is left to say."""


@dataclass
class Exchange:
    """One request and its answer on the wire."""

    scope: dict
    receive: Callable
    send: Callable
    started: bool = False
    streaming: bool = False

    def header(self, name: str) -> str | None:
        """A header of the request."""
        return next((value.decode("latin-1") for key, value in self.scope["headers"] if key == name.encode("ascii")), None)

    @property
    def language(self) -> str | None:
        """zh or en as the client asks for, None where it does not say."""
        wanted = (self.header("accept-language") or "")[:2].lower()
        return wanted if wanted in ("zh", "en") else None

    async def start(self, status: int, content_type: str, headers: dict[str, str] | None = None) -> None:
        """Send the head of the answer."""
        self.started = True
        fields = {**HEADERS, "Content-Type": content_type, **(headers or {})}
        encoded = [(key.lower().encode("ascii"), value.encode("latin-1")) for key, value in fields.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": encoded})

    async def answer(self, status: int, body: bytes, content_type: str, headers: dict[str, str] | None = None) -> None:
        """Send a whole answer."""
        await self.start(status, content_type, {"Content-Length": str(len(body)), **(headers or {})})
        await self.send({"type": "http.response.body", "body": body})

    async def json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Send a JSON answer."""
        await self.answer(status, _encoded(value), "application/json", headers)

    async def events(self, events: list[dict | str], *, last: bool = False) -> None:
        """Send server-sent events."""
        data = [event.encode("ascii") if isinstance(event, str) else _encoded(event) for event in events]
        body = b"".join(b"data: %s\n\n" % line for line in data)
        await self.send({"type": "http.response.body", "body": body, "more_body": not last})

    async def body(self, limits: ServerConfig) -> bytes:
        """The body of the request; ApiError when it is too large or too slow."""
        limit, body, size = limits.max_body_kib * 2**10, bytearray(), 0
        too_large = ApiError(413, "api_too_large", headers=CLOSE, limit=limits.max_body_kib)
        # 先问能不能发的客户端（Expect: 100-continue），不必让它发完
        if self.header("expect") and int(self.header("content-length") or 0) > limit:
            raise too_large
        try:
            async with asyncio.timeout(limits.read_seconds):
                more = True
                while more and size <= DRAIN * limit:
                    message = await self.receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError
                    more, size = message.get("more_body", False), size + len(message["body"])
                    if size <= limit:
                        body += message["body"]
                    else:
                        body.clear()
        except TimeoutError:
            raise ApiError(408, "api_slow_body", headers=CLOSE, seconds=limits.read_seconds) from None
        if size > limit:
            raise too_large
        return bytes(body)

    async def disconnected(self) -> None:
        """Return once the client has gone away; the body must have been read."""
        while (await self.receive())["type"] != "http.disconnect":
            pass


def _encoded(value: Any) -> bytes:
    # 错误里会照写请求的字段名，那里可能有半个代理对：UTF-8 里没有它
    return json.dumps(value, ensure_ascii=False).encode("utf-8", errors="replace")


def content_security_policy(page: str) -> str:
    """The page's own script and style by their hashes, requests to this server, nothing else."""
    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(code.encode('utf-8')).digest()).decode('ascii')}'" for code in found)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


class Api:
    """The ASGI app. `announced` is what GET /v1/models tells about the one model."""

    def __init__(self, worker: Worker, reader: Reader, announced: dict[str, Any]):
        self.worker, self.reader, self.limits = worker, reader, reader.limits
        self.announced = {"id": reader.model, "object": "model", "created": int(time.time()), "owned_by": "nanogpt", **announced}
        page = PAGE.read_text(encoding="utf-8")
        self.page_bytes, self.page_policy = page.encode("utf-8"), content_security_policy(page)
        self.addresses = {
            "/": {"GET": self.page}, "/health": {"GET": self.health}, "/openapi.json": {"GET": self.openapi},
            "/v1/models": {"GET": self.models}, f"/v1/models/{reader.model}": {"GET": self.model}, "/v1/completions": {"POST": self.completions},
        }

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        exchange = Exchange(scope, receive, send)
        try:
            await self.dispatch(exchange)
        except ClientGoneError:
            return
        except ConfigError as error:
            await self.refuse(exchange, as_api_error(error))
        except Exception:
            # 这是程序的错，不是请求的：控制台要看得到全部
            traceback.print_exc(file=sys.stderr)
            await self.refuse(exchange, ApiError(500, "api_internal"))

    async def dispatch(self, exchange: Exchange) -> None:
        """Guard, then hand over to the address."""
        self.guard(exchange)
        # 地址是写死的几个，请求里的路径不碰文件系统
        path = exchange.scope["path"]
        methods = self.addresses.get(path)
        if methods is None and path.startswith("/v1/models/"):
            raise ApiError(404, "api_no_model", got=path.removeprefix("/v1/models/")[:100], have=self.reader.model)
        if methods is None:
            raise ApiError(404, NO_CHAT.get(path, "api_not_found"))
        method = exchange.scope["method"]
        handler = methods.get("GET" if method == "HEAD" else method)
        if handler is None:
            raise ApiError(405, "api_method", headers={"Allow": ", ".join(methods)}, got=method[:20])
        await handler(exchange)

    async def refuse(self, exchange: Exchange, error: ApiError) -> None:
        """Answer with an error; inside a stream it is the last event."""
        body = error_body(error, exchange.language)
        if not exchange.started:
            await exchange.json(body, error.status, error.headers)
        elif exchange.streaming:
            await exchange.events([body], last=True)

    # ---- 谁可以来 ----

    def guard(self, exchange: Exchange) -> None:
        """Refuse heads that are too long, bodies of two lengths, pages of other origins, names that are not this machine's, and missing tokens."""
        # h11 的上限只管没收全的头：一次到齐的大得多也放行
        if sum(len(name) + len(value) + 4 for name, value in exchange.scope["headers"]) + len(exchange.scope["raw_path"]) > MAX_HEAD:
            raise ApiError(431, "api_long_head", headers=CLOSE, limit=MAX_HEAD // 2**10)
        # 两种长度并存时，前面的代理与这里会把不同的字节当作下一个请求
        if exchange.header("transfer-encoding") and exchange.header("content-length"):
            raise ApiError(400, "api_two_lengths", headers=CLOSE)
        host, origin = (exchange.header("host") or "").lower(), exchange.header("origin")
        name = re.fullmatch(r"\[?([^\[\]]*?)\]?(:\d*)?", host)
        # DNS rebinding：别人的域名解析到 127.0.0.1，浏览器就当它是同源；有口令时它也进不来
        if self.limits.token is None and not (name and is_loopback(name[1])):
            raise ApiError(403, "api_host", got=host[:100])
        if origin is not None and origin.lower() not in (f"http://{host}", f"https://{host}"):
            raise ApiError(403, "api_origin")
        if exchange.scope["path"].startswith("/v1/"):
            # 浏览器自己写的头，网页改不了；curl 之类没有它
            if exchange.header("sec-fetch-site") not in (None, "same-origin", "none"):
                raise ApiError(403, "api_origin")
            self.check_token(exchange.header("authorization") or "")

    def check_token(self, authorization: str) -> None:
        """Refuse a request without the token, if there is one."""
        if self.limits.token is None:
            return
        scheme, _, given = authorization.partition(" ")
        # 逐字节等时比较：从用时猜不出对了几个字符
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), self.limits.token.encode("ascii")):
            raise ApiError(401, "api_token", headers={"WWW-Authenticate": "Bearer"})

    # ---- 几个地址 ----

    async def page(self, exchange: Exchange) -> None:
        """The page; it holds nothing secret and asks for the token itself."""
        await exchange.answer(200, self.page_bytes, "text/html; charset=utf-8", {"Content-Security-Policy": self.page_policy})

    async def health(self, exchange: Exchange) -> None:
        """Whether it can write, and how much it has to do."""
        if not self.worker.alive:
            raise ConfigError("api_stopping")
        await exchange.json({"status": "ok", "texts": self.worker.texts, "capacity": self.worker.capacity})

    async def openapi(self, exchange: Exchange) -> None:
        """The API's description for programs."""
        reader = self.reader
        await exchange.json(document(
            self.limits, fields=reader.fields, empty_prompts=reader.empty_prompts, vocab_size=reader.tokenizer.vocab_size,
        ))

    async def models(self, exchange: Exchange) -> None:
        """All models: the one that is loaded."""
        await exchange.json({"object": "list", "data": [self.announced]})

    async def model(self, exchange: Exchange) -> None:
        """The one model that is loaded, alone."""
        await exchange.json(self.announced)

    async def completions(self, exchange: Exchange) -> None:
        """Write; the rows are freed whatever happens to the client or the time limit."""
        content_type = (exchange.header("content-type") or "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            raise ApiError(415, "api_content_type", headers=CLOSE, got=content_type[:100] or "-")
        asked = self.reader.read(await exchange.body(self.limits))
        job = self.worker.start(asked.requests, max_unread_chars=self.limits.max_unread_chars if asked.stream else None)
        try:
            async with asyncio.timeout(self.limits.request_seconds):
                await while_wanted((stream if asked.stream else whole)(exchange, asked, job, self.reader.model), exchange, job)
        except TimeoutError:
            raise ApiError(504, "api_time_limit", seconds=self.limits.request_seconds) from None
        finally:
            self.worker.stop(job)


async def whole(exchange: Exchange, asked: Completion, job: Job, model: str) -> None:
    """Answer once everything is written."""
    answer = Answer(asked, model, await job.accepted())
    async for fresh in job.news():
        answer.add(fresh)
    await exchange.json(answer.whole())


async def stream(exchange: Exchange, asked: Completion, job: Job, model: str) -> None:
    """Answer as it is written, in server-sent events."""
    answer = Answer(asked, model, await job.accepted())
    await exchange.start(200, "text/event-stream; charset=utf-8")
    exchange.streaming = True
    async for fresh in job.news():
        await exchange.events(answer.add(fresh))
    await exchange.events([*([answer.usage_event()] if asked.usage else []), "[DONE]"], last=True)


async def while_wanted(work: Coroutine, exchange: Exchange, job: Job) -> None:
    """Run `work` to its end; ClientGoneError when the client goes away first, the job's error when it fails first."""
    working, gone, failed = tasks = [asyncio.ensure_future(c) for c in (work, exchange.disconnected(), job.failed.wait())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
        elif failed.done():
            # work 可能正卡在送不出去的字节上，等不到它自己发现
            raise job.error
        elif gone.done():
            raise ClientGoneError
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
