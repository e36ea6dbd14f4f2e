"""The FastAPI app of serve=true: who may come, its addresses, and one completion from its body to its last byte."""

# HTTP 这一面：FastAPI 管路由、依赖与 /openapi.json；这里只有本项目自己的规矩：谁可以来、正文多大多慢、错误怎么说
# 一个请求依次经过 check_source、check_token、read、writing；writing 把它交给 worker，响应发完或断了再收回
# 走掉的客户端让出位置：监听断开的任务让它的 Job 失败，行在这一步之后就空出来

import asyncio
import base64
import hashlib
import hmac
import json
import re
import sys
import time
import traceback
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from nanogpt import __version__
from nanogpt.base.language import ConfigError
from nanogpt.base.sample_config import is_loopback
from nanogpt.serve.completions import (
    ChatBody,
    ChatCompletion,
    Completion,
    CompletionBody,
    Reader,
    Refusal,
    TextCompletion,
    error_body,
    status_of,
)
from nanogpt.serve.worker import Job, Worker

PAGE = Path(__file__).resolve().parent / "page" / "index.html"
# 别的程序常先试的地址：说清楚这里该用哪个
CHAT = "/v1/chat/completions"
NO_CHAT = (CHAT, "/v1/responses")
# 断开：后面的字节是不是下一个请求，已经说不准了
HEADERS = {
    "api_token": {"WWW-Authenticate": "Bearer"}, "api_slow_body": {"Connection": "close"},
    "api_two_lengths": {"Connection": "close"}, 503: {"Retry-After": "5"},
}


def content_security_policy(page: str) -> str:
    """The page's own script and style by their hashes, requests to this server, nothing else."""
    def own(tag: str) -> str:
        code = re.search(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)[1]
        return f"'sha256-{base64.b64encode(hashlib.sha256(code.encode('utf-8')).digest()).decode('ascii')}'"

    return (
        f"default-src 'none'; script-src {own('script')}; style-src {own('style')}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )


def create_app(worker: Worker, reader: Reader, announced: dict[str, Any]) -> FastAPI:
    """The app; `announced` is what GET /v1/models tells about the one model."""
    app = FastAPI(
        title="nanogpt", version=__version__, dependencies=[Depends(check_source)],
        # 没有 openapi_url 就没有它的说明网页，那些网页从 CDN 取脚本；末尾斜杠的转向会照抄请求里的 Host：也不要
        openapi_url=None, redirect_slashes=False,
        responses={"default": {"model": Refusal, "description": "What is wrong, in OpenAI's form"}},
        exception_handlers={
            ConfigError: refuse, HTTPException: unrouted, ClientDisconnect: nobody, Exception: internal,
        },
    )
    text = PAGE.read_text(encoding="utf-8")
    app.state.page = HTMLResponse(text, headers={"Content-Security-Policy": content_security_policy(text)})
    app.state.worker, app.state.reader, app.state.schemas = worker, reader, {}
    model = {"id": reader.model, "object": "model", "created": int(time.time()), "owned_by": "nanogpt", **announced}
    app.state.announced = model
    # 看护程序常用 HEAD 来问
    app.add_api_route("/", page, methods=["GET", "HEAD"], include_in_schema=False)
    app.add_api_route("/openapi.json", description, include_in_schema=False)
    app.add_api_route("/health", health)
    app.add_api_route("/health", health, methods=["HEAD"], include_in_schema=False)
    v1 = APIRouter(prefix="/v1", dependencies=[Depends(check_token)] if reader.limits.token else [])
    v1.add_api_route("/models", models)
    v1.add_api_route("/models/{name:path}", one_model)
    form = {"required": True, "content": {"application/json": {"schema": reader.form.model_json_schema()}}}
    v1.add_api_route(
        "/completions", completions, methods=["POST"], openapi_extra={"requestBody": form},
        # 一个事件一份 JSON，末尾是 [DONE]：schema 说不了一串事件
        response_model=TextCompletion, responses={200: {"content": {"text/event-stream": {}}}},
    )
    if reader.chat:
        schema = reader.chat_form.model_json_schema(ref_template="#/components/schemas/{model}")
        parts = schema.pop("$defs", {})
        app.state.schemas = parts
        v1.add_api_route(
            CHAT.removeprefix("/v1"), completions, methods=["POST"], response_model=ChatCompletion,
            openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}},
            responses={200: {"content": {"text/event-stream": {}}}},
        )
    app.include_router(v1)
    return app


# ---- 错误 ----


def language_of(request: Request) -> str | None:
    """zh or en as the client asks for, None where it does not say."""
    wanted = request.headers.get("accept-language", "")[:2].lower()
    return wanted if wanted in ("zh", "en") else None


async def refuse(request: Request, error: ConfigError) -> JSONResponse:
    """An error as an answer."""
    status = status_of(error)
    headers = HEADERS.get(error.message, HEADERS.get(status))
    return JSONResponse(error_body(error, language_of(request)), status, headers)


async def unrouted(request: Request, error: HTTPException) -> JSONResponse:
    """No such address, or not this method."""
    if error.status_code != 405:
        chats = request.app.state.reader.chat
        named = "api_only_chat" if chats else "api_no_chat"
        return await refuse(request, ConfigError(named if request.url.path in NO_CHAT else "api_not_found"))
    response = await refuse(request, ConfigError("api_method", got=request.method))
    response.headers.update(error.headers)
    return response


async def nobody(request: Request, error: ClientDisconnect) -> Response:
    """The client left while it was sending: nothing is left to say."""
    return Response()


async def internal(request: Request, error: Exception) -> JSONResponse:
    """This program's own fault: all of it on the console, nothing of it in the answer."""
    traceback.print_exception(error, file=sys.stderr)
    return await refuse(request, ConfigError("api_internal"))


# ---- 谁可以来 ----


async def check_source(request: Request) -> None:
    """Refuse pages of other origins, names that are not this machine's, and bodies of two lengths."""
    headers, token = request.headers, request.app.state.reader.limits.token
    host, origin = headers.get("host", "").lower(), headers.get("origin")
    name = re.fullmatch(r"\[?([^\[\]]*?)\]?(:\d*)?", host)
    # DNS rebinding：别人的域名解析到 127.0.0.1，浏览器就当它是同源；有口令时它也进不来
    if token is None and not (name and is_loopback(name[1])):
        raise ConfigError("api_host", got=host)
    if origin is not None and origin.lower() not in (f"http://{host}", f"https://{host}"):
        raise ConfigError("api_origin")
    # 浏览器自己写的头，网页改不了；curl 之类没有它
    if request.url.path.startswith("/v1/") and headers.get("sec-fetch-site") not in (None, "same-origin", "none"):
        raise ConfigError("api_origin")
    # 两种长度并存时，前面的代理与这里会把不同的字节当作下一个请求
    if "transfer-encoding" in headers and "content-length" in headers:
        raise ConfigError("api_two_lengths")


Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]


async def check_token(request: Request, given: Bearer) -> None:
    """Refuse a request without the token."""
    token = request.app.state.reader.limits.token
    # 逐字节等时比较：从用时猜不出对了几个字符
    if given is None or not hmac.compare_digest(given.credentials.encode("latin-1"), token.encode("ascii")):
        raise ConfigError("api_token")


# ---- 几个地址 ----


async def page(request: Request) -> Response:
    """The page; it holds nothing secret and asks for the token itself."""
    return request.app.state.page


async def description(request: Request) -> dict[str, Any]:
    """The API's description for programs."""
    # 不用 FastAPI 自带的那个地址：它不经过 check_source
    described = request.app.openapi()
    described["components"]["schemas"].update(request.app.state.schemas)
    return described


async def health(request: Request) -> dict[str, Any]:
    """Whether it can write, and how much it has to do."""
    worker = request.app.state.worker
    if not worker.alive:
        raise ConfigError("api_stopping")
    return {"status": "ok", "texts": worker.texts, "capacity": worker.capacity}


async def models(request: Request) -> dict[str, Any]:
    """All models: the one that is loaded."""
    return {"object": "list", "data": [request.app.state.announced]}


async def one_model(request: Request, name: str) -> dict[str, Any]:
    """The one model that is loaded, alone."""
    if name != (have := request.app.state.reader.model):
        raise ConfigError("api_no_model", got=name, have=have)
    return request.app.state.announced


# ---- 写 ----


async def read(request: Request) -> Completion:
    """The checked body; it must be JSON, not too large, and come in time."""
    reader, headers, body, size = request.app.state.reader, request.headers, bytearray(), 0
    content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    # 别的网站的表单发得出 text/plain，发不出 application/json
    if content_type != "application/json":
        raise ConfigError("api_content_type", got=content_type or "-")
    limit = reader.limits.max_body_kib * 2**10
    try:
        async with asyncio.timeout(reader.limits.read_seconds):
            async for part in request.stream():
                size += len(part)
                # 太大的也收完、丢掉：对方才读得到回答，而不是连接被重置
                body += part if size <= limit else b""
    except TimeoutError:
        raise ConfigError("api_slow_body", seconds=reader.limits.read_seconds) from None
    if size > limit:
        raise ConfigError("api_too_large", limit=reader.limits.max_body_kib)
    return (reader.read_chat if request.url.path == CHAT else reader.read)(bytes(body))


CheckedCompletion = Annotated[Completion, Depends(read)]


async def writing(request: Request, asked: CheckedCompletion) -> AsyncIterator[tuple[Completion, Job]]:
    """What was asked and its job, whose rows are freed whatever happens to the client."""
    worker = request.app.state.worker
    job = worker.start(asked.requests, request.app.state.reader.limits)
    gone = asyncio.create_task(_until_gone(request, job))
    try:
        yield asked, job
    finally:
        gone.cancel()
        worker.stop(job)


async def _until_gone(request: Request, job: Job) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.fail(ConfigError("api_stopping"))


async def completions(request: Request, work: Annotated[tuple[Completion, Job], Depends(writing)]) -> Response:
    """Write behind a prompt, or answer a conversation."""
    (asked, job), language = work, language_of(request)
    # 开头里的错在这里就知道了：流式的请求也得到一个状态码，而不是一个事件
    answer = (ChatBody if asked.chat else CompletionBody)(asked, request.app.state.reader.model, await job.accepted())
    if asked.stream:
        return StreamingResponse(events(job, answer, language), media_type="text/event-stream")
    async for fresh in job.updates():
        answer.add(fresh)
    return JSONResponse(answer.whole())


async def events(job: Job, answer: CompletionBody, language: str | None) -> AsyncIterator[str]:
    """The answer as it is written, in server-sent events; an error is the last one."""
    def lines(listed: list[dict]) -> str:
        return "".join(f"data: {json.dumps(one, ensure_ascii=False)}\n\n" for one in listed)

    try:
        async for fresh in job.updates():
            yield lines(answer.add(fresh))
        yield lines([answer.usage_event()] if answer.asked.usage else []) + "data: [DONE]\n\n"
    except ConfigError as error:
        yield lines([error_body(error, language)])
