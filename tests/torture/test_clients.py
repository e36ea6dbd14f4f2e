"""Attack serve=true with malformed, abandoned and too many requests: no fault, no growth, nothing told, the same text afterwards."""

# HTTP 本身由 uvicorn 与 h11 管；这里攻击交到 app 手里的：地址、来源、正文、字段，半路走掉的与挤在一起的客户端
# 每个测试之后服务器必须闲下来，并且同一个种子写出同样的文字；长的形式另用 schemathesis 照它自己的 OpenAPI 说明来试

import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from attack import LONG, ONLY_LONG, cases
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from test_server import Served
from test_server import tiny as tiny_model

from nanogpt.data.tokenizer import ByteTokenizer
from nanogpt.serve.server import HEADERS

pytestmark = pytest.mark.torture
REFUSED = frozenset({400, 401, 403, 404, 405, 408, 413, 415, 431})
SEEDED = {"prompt": "the king", "seed": 7, "max_tokens": 12}
SECRETS = [str(ROOT), "Traceback", "site-packages", *([str(Path.home())] if len(str(Path.home())) > 1 else [])]
SMALL = b'{"prompt": "a", "max_tokens": 1}'
JSON = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"


# ---- 一问一答 ----


def post(body: bytes) -> bytes:
    """A completion with a right length."""
    return JSON + b"Content-Length: %d\r\n\r\n" % len(body) + body


def connect(port: int) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port))
    client.settimeout(60)
    return client


def exchange(port: int, data: bytes, *, leaves: bool = False) -> bytes:
    """What comes back for these bytes until the connection ends; a client that `leaves` says that nothing more will come."""
    received = b""
    with contextlib.closing(connect(port)) as client, contextlib.suppress(ConnectionError):
        client.sendall(data)
        if leaves:
            # 缺了尾巴的请求没有时限：不说完了，两边会一直等下去
            client.shutdown(socket.SHUT_WR)
        while piece := client.recv(2**18):
            received += piece
    return received


def assert_in_order(received: bytes, allowed: frozenset[int], *, head_only: bool = False) -> None:
    """One answer of an allowed status, with its headers and in its form, that tells nothing."""
    head, _, body = received.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    status, headers = int(first.split(" ")[1]), {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    assert status in allowed, received[:300]
    assert not [secret for secret in SECRETS if secret.encode() in received]
    if status == 400 and headers.get("content-type", "").startswith("text/plain"):
        # 不成 HTTP 的，h11 不交给 app 就拒绝了
        return
    assert not [name for name in HEADERS if name.lower() not in headers]
    assert not [name for name in headers if name.startswith("access-control") or name in ("server", "x-powered-by")]
    if status != 200 and not head_only:
        assert {"message", "code"} <= set(json.loads(body)["error"]) and len(body) < 3000


@pytest.fixture(scope="module")
def server():
    """A server in this process, which writes at the end what it wrote at the beginning."""
    served = Served(tiny_model(ByteTokenizer(), block_size=64), batch_size=8, max_waiting=64, read_seconds=2)
    served.wanted = served.write(**SEEDED)["choices"]
    yield served
    served.stop()


@pytest.fixture(autouse=True)
def still_itself(request, capfd):
    """After every attack: idle, healthy, the same text for the same seed, nothing but a word on the console."""
    yield
    if "server" in request.fixturenames:
        served = request.getfixturevalue("server")
        served.until_texts(0, 60)
        assert served.write(**SEEDED)["choices"] == served.wanted
        console = capfd.readouterr().err
        assert "Traceback" not in console and console.count("\n") < 100, console


# ---- 交到 app 手里的 ----

ADDRESSES = ("/", "/health", "/openapi.json", "/v1/models", "/v1/completions")
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "X" * 2000, "!#$%&'*+-.^_`|~")
TRAVERSALS = (
    "/../setup.cfg", "/..%2fsetup.cfg", "/%2e%2e%2f%2e%2e%2fetc/passwd", "/..\\setup.cfg", "/..%5csetup.cfg", "/%252e%252e/setup.cfg", "/docs",
    "/page/index.html", "/page/../api.py", "/redoc", "//etc/passwd", "///", "/v1/../v1/../../conf/sample.yaml", "/outputs/", "/.git/config",
    "/C:/Windows/win.ini", "/%00", "/health%00", "/health/", "/v1/models/..", "/v1/completions/../../api.py", "/%ff%fe", "/%zz", "/%", "/v1/",
    "/V1/models", "/v1/models;x=1", "file:///etc/passwd", "*", "/" + "a" * 8000, "/~root", "/" + "../" * 2000 + "etc/passwd", "/\\\\server\\share",
)
HOSTS = (
    "evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "0.0.0.0", "10.0.0.1", "2130706433", "0x7f.1", "",
    "localhost@evil.example", "evil.example#localhost", "[::ffff:8.8.8.8]", "localhost evil.example", "localhost,evil.example",
)
ORIGINS = ("http://evil.example", "null", "http://localhost.evil.example", "https://localhost:444", "file://")
STRANGERS = (
    *(f"Host: {host}" for host in HOSTS), *(f"Host: localhost\r\nOrigin: {origin}" for origin in ORIGINS),
    *(f"Host: localhost\r\nSec-Fetch-Site: {site}" for site in ("cross-site", "same-site", "x")),
)
# 不成 JSON 的、不是对象的、字段错得离谱的；余下的由 hypothesis 乱填
NO_JSON = (
    b"", b"{", b"\xff\xfe{\0}\0", '{"prompt": "a"}'.encode("utf-16"), b"\xef\xbb\xbf{}", b'{"prompt": "\xff"}', b'{"prompt": "\xed\xa0\x80"}',
    b"[" * 100_000, b'{"a":' * 100_000, b"nul", b"NaN", b"0", b'"a"', b"[]", b"null", b"a=b&c=d", b"<xml/>", b'{"prompt": "a"} x', b'{"prompt": "a"}\0',
    b'{"prompt": [' + b'"a",' * 100_000 + b'"a"]}', b'{"prompt": "' + b"a" * 1_000_000 + b'"}', b"{" + b'"k":1,' * 150_000 + b'"prompt":"a"}',
)
BAD_FIELDS = (
    '"temperature": NaN', '"temperature": -Infinity', '"temperature": 1e99999', '"seed": -2', '"seed": 1e308', '"max_tokens": 1e18', '"\\ud800": 1',
    '"n": ' + "9" * 1_000_000, '"n": ' + "9" * 4300, '"stop": "\\ud83d"', '"style": "\\udc00"', '"stream_options": {"\\ud800": true}',
    '"stream_options": {"include_usage": "no"}', '"max_tokens": true', '"best_of": true', '"logit_bias": {"1": 100}', '"__proto__": {}',
    '"_target_": "os.system"', '"sampler": {"_target_": "os.system"}', '"out_dir": "/etc"', '"stop": [' + '"x",' * 200_000 + '"x"]',
    '"' + "k" * 1_000_000 + '": 1', '"n": 1, "n": 17', '"stream": "true"', '"temperature": "1"', '"prompt": {"$ref": "file:///etc/passwd"}',
)
GOOD_FIELDS = (
    '"max_tokens": 9, "max_tokens": 1', '"max_tokens": 2.0, "seed": 0', '"max_tokens": 2, "temperature": 1e-320', '"max_tokens": 2, "top_p": 0, "min_p": 1',
    '"max_tokens": 2, "stop": ["\\u0000", "\\n"]', '"prompt": "emotion:\\u001b]0;x\\u0007|a", "max_tokens": 1', '"prompt": "\\ud83d\\ude00", "max_tokens": 1',
    '"prompt": [[97, 255], [10]], "max_tokens": 0, "echo": true, "logprobs": 20', '"prompt": "style:' + "z" * 15_000 + '|a", "max_tokens": 1',
)


def with_fields(fields: str) -> bytes:
    return f'{{"prompt": "a", {fields}}}'.encode()


def asked(line: str, fields: str = "Host: localhost", body: bytes = b"") -> bytes:
    more = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body else ""
    return f"{line} HTTP/1.1\r\n{fields}\r\nConnection: close\r\n{more}\r\n".encode() + body


def taken(method: str, path: str) -> bool:
    return method in {"/v1/completions": (), "/v1/models": ("GET",), "/openapi.json": ("GET",)}.get(path, ("GET", "HEAD"))


# 种类 -> (字节, 允许的状态)
REQUESTS: dict[str, list[tuple[bytes, frozenset[int]]]] = {
    "path": [(asked(f"{method} {path}"), REFUSED) for path in TRAVERSALS for method in ("GET", "POST")],
    "method": [(asked(f"{m} {a}"), frozenset({200}) if taken(m, a) else REFUSED) for a in ADDRESSES for m in METHODS],
    "stranger": [(asked("GET /v1/models", fields), frozenset({400, 403})) for fields in STRANGERS]
    + [(asked("POST /v1/completions", fields, SMALL), frozenset({400, 403})) for fields in STRANGERS],
    # 机器忙时，一兆的正文也可能没按时收完
    "body": [(post(body), frozenset({400, 404, 408})) for body in (*NO_JSON, *map(with_fields, BAD_FIELDS))]
    + [(post(with_fields(fields)), frozenset({200, 400})) for fields in GOOD_FIELDS],
    "length": [
        (JSON + b"Content-Length: 33\r\n\r\n" + SMALL, REFUSED), (JSON + b"Content-Length: 3000000\r\n\r\n" + b" " * 3_000_000, REFUSED),
        (JSON + b"Content-Length: 32\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMALL, REFUSED), (JSON + b"Content-Length: -1\r\n\r\n" + SMALL, REFUSED),
        *((post(SMALL).replace(b"application/json", kind), frozenset({400, 415})) for kind in (b"text/plain", b"", b"application/jsonx")),
    ],
}


@pytest.mark.parametrize("kind", REQUESTS)
@cases(20, 500)
@given(data=st.data())
def test_a_wrong_request_is_refused_in_openais_form_and_tells_nothing(server, kind, data):
    request, allowed = data.draw(st.sampled_from(REQUESTS[kind]))
    received = exchange(server.port, request, leaves=kind == "length")
    # 正文没发完就走的，连回答都可以没有
    assert received or kind == "length"
    if received:
        assert_in_order(received, allowed, head_only=request.startswith(b"HEAD"))


PIECES = st.sampled_from([b"", b"\r\n", b"\0", b"\r\n\r\n", b":", b" ", b"\xff", b"HTTP/1.1", b"{", b'"'])
EDITS = st.lists(st.tuples(st.integers(0, 400), PIECES, st.integers(0, 8)), min_size=1, max_size=6)
STREAM = b'{"prompt": "a", "max_tokens": 2, "stream": true}'


@cases(15, 1500)
@given(request=st.sampled_from([asked("GET /health"), post(SMALL), post(STREAM)]), edits=EDITS)
def test_a_request_with_bytes_changed_is_answered_in_order_or_cut_off(server, request, edits):
    data = bytearray(request)
    for at, put, lost in edits:
        at %= len(data) + 1
        data[at : at + lost] = put
    for answer in re.split(rb"(?=HTTP/1\.1 \d{3} )", exchange(server.port, bytes(data), leaves=True))[1:]:
        assert_in_order(answer, REFUSED | {200})


NAMES = (
    "model", "n", "stop", "seed", "stream", "style", "emotion", "guidance", "stream_options", "echo", "user", "temperature", "top_k", "top_p",
    "min_p", "typical", "repetition_penalty", "no_repeat_ngram", "unknown", "best_of", "logit_bias", "logprobs", "suffix", "unheard_of",
)
VALUES = st.sampled_from([
    None, True, False, 0, 1, -1, 2**62, 2**63, 2**200, 0.5, -0.0, 1e-320, 1e308, "", "a", "春\0", "\x1b[2J", "x" * 300, [], ["a"], ["a", "b"], [[]], [None], {},
    {"a": 1}, {"include_usage": True}, ["a"] * 17, "\n", "emotion:happy|a",
])


@cases(40, 3000)
@given(
    fields=st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4), prompt=st.sampled_from(["a", ["a", "b"]]) | VALUES,
    count=st.sampled_from([1, 2, 5]) | VALUES,
)
def test_any_fields_of_any_values_are_answered_or_refused(server, fields, prompt, count):
    body = json.dumps({"prompt": prompt, "max_tokens": count, **fields}).encode()
    assert_in_order(exchange(server.port, post(body)), REFUSED | {200})


# ---- 走掉的与挤在一起的 ----


@cases(1, 20)
@given(clients=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 2000), st.integers(0, 100)), min_size=4, max_size=60 if LONG else 6))
def test_clients_that_vanish_give_their_rows_back(server, clients):
    request = post(json.dumps({"prompt": ["a", "b"], "max_tokens": 1000, "stream": True}).encode())

    def vanish(how: tuple[int, int, int]) -> None:
        what, size, ms = how
        client = connect(server.port)
        client.sendall(request[: size % len(request)] if what == 0 else request)
        if what == 1:
            client.recv(size)
        time.sleep(ms / 1000)
        # 不打招呼就断（RST）
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()

    with ThreadPoolExecutor(24) as pool:
        list(pool.map(vanish, clients))
    server.until_texts(0, 60)


def text_of(body: bytes) -> str:
    """All the text of an answer or a stream, still escaped."""
    return "".join(re.findall(r'"text": ?"((?:[^"\\]|\\.)*)"', body.decode("utf-8")))


def test_a_crowd_gets_the_texts_that_each_would_get_alone_or_is_told_to_come_back(server):
    size, alone = 120 if LONG else 16, {}
    for seed in range(4):
        alone[seed] = text_of(exchange(server.port, post(json.dumps({"prompt": "a", "max_tokens": 8, "seed": seed}).encode())))
    together = threading.Barrier(size)

    def one(number: int) -> None:
        seed = number % 4
        body = post(json.dumps({"prompt": "a", "max_tokens": 8, "seed": seed, "stream": bool(number % 2)}).encode())
        together.wait()
        received = exchange(server.port, body)
        assert_in_order(received, frozenset({200, 503}))
        if b" 503 " in received.partition(b"\r\n")[0]:
            assert b"retry-after" in received.lower()
        else:
            assert text_of(received) == alone[seed] and (number % 2 == 0 or b"data: [DONE]" in received)

    with ThreadPoolExecutor(size) as pool:
        list(pool.map(one, range(size)))


def test_many_requests_on_one_connection_are_answered_one_by_one(server):
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection:
        for number in range(1000 if LONG else 40):
            if number % 10:
                connection.request("GET", "/health")
            else:
                connection.request("POST", "/v1/completions", SMALL, {"Content-Type": "application/json"})
            response = connection.getresponse()
            assert response.status == 200 and json.loads(response.read())


# ---- 真的进程 ----

TIGHT = (
    "serve=true", "server.port=0", "device=cpu", "batch_size=8", "max_new_tokens=16", "server.read_seconds=1", "server.stall_seconds=2",
    "out_dir=outputs/run", "lang=en",
)


@contextlib.contextmanager
def process(folder: Path, *overrides: str):
    """(process, port) of `python run_sample.py serve=true` with the run in a folder."""
    log, environment = folder / "console", {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(ROOT / "run_sample.py"), *TIGHT, *overrides]
    with log.open("wb") as output:
        running = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)
    try:
        while not (found := re.search(r"http://[^ /]+:(\d+)/", log.read_text(encoding="utf-8"))):
            assert running.poll() is None, log.read_text(encoding="utf-8")
            time.sleep(0.1)
        yield running, int(found[1])
    finally:
        running.terminate()
        running.wait(60)


def seeded(port: int) -> list:
    return json.loads(exchange(port, post(json.dumps(SEEDED).encode())).partition(b"\r\n\r\n")[2])["choices"]


@ONLY_LONG
def test_a_server_listens_on_this_machine_only_and_outlives_the_files_that_it_was_loaded_from(own_run):
    with process(own_run) as (running, port):
        listening = [one for one in psutil.Process(running.pid).net_connections() if one.status == psutil.CONN_LISTEN]
        assert {one.laddr.ip for one in listening} == {"127.0.0.1"}
        wanted = seeded(port)
        for file in [path for path in (own_run / "outputs").rglob("*") if path.is_file()]:
            file.write_bytes(b"")
        assert seeded(port) == wanted
        shutil.rmtree(own_run / "outputs")
        assert seeded(port) == wanted


@ONLY_LONG
def test_after_many_rounds_of_requests_no_memory_thread_or_descriptor_is_held(own_run):
    with process(own_run) as (running, port):
        server, held = psutil.Process(running.pid), []
        requests = [request for requests in REQUESTS.values() for request, _ in requests]
        for _ in range(8):
            with ThreadPoolExecutor(24) as pool:
                list(pool.map(lambda request: exchange(port, request), requests))
            # 空闲的保持连接过几秒才关
            time.sleep(6)
            held.append((server.memory_info().rss / 2**20, server.num_threads(), server.num_fds()))
        assert held[-1][0] - held[1][0] < 36 and held[-1][1:] <= held[1][1:], held


@ONLY_LONG
def test_schemathesis_finds_nothing_against_the_servers_own_description():
    schemathesis = pytest.importorskip("schemathesis", reason="pip install -e .[torture]")
    from schemathesis.config import SchemathesisConfig
    from schemathesis.engine import events, from_schema

    # 训练让这个进程把次正规数当零，那时 hypothesis 抽不了浮点数
    torch.set_flush_denormal(False)
    schemathesis.hook("filter_case")(sayable)
    generation = {"max-examples": 400, "mode": "all", "database": "none"}
    # 字节词表：什么字都读得了，照说明写的请求没有理由拒绝
    served = Served(tiny_model(ByteTokenizer(), block_size=64), batch_size=8, max_tokens=24)
    try:
        config = SchemathesisConfig.from_dict({"generation": generation, "request-timeout": 60, "continue-on-failure": True})
        schema, wrong, passed = schemathesis.openapi.from_url(f"http://127.0.0.1:{served.port}/openapi.json", config=config), [], Counter()
        for event in from_schema(schema).execute():
            if isinstance(event, events.NonFatalError | events.FatalError):
                wrong.append(str(getattr(event, "value", event)))
            elif isinstance(event, events.ScenarioFinished):
                for nodes in event.recorder.checks.values():
                    passed.update(node.name for node in nodes if not node.failure_info)
                    wrong += [f"{node.name}: {node.failure_info.failure}" for node in nodes if node.failure_info]
    finally:
        served.stop()
    assert not wrong and passed, wrong[:5]


def sayable(_context, case) -> bool:
    """Drop what only two fields together make wrong: a schema cannot say that prompts x n has a limit, or that best_of is n."""
    body = case.body
    if not isinstance(body, dict):
        return True
    prompt, n, echo, scored = body.get("prompt"), body.get("n") or 1, body.get("echo") is True, body.get("logprobs") is not None
    several = isinstance(prompt, list) and isinstance(n, int) and not all(isinstance(i, int) for i in prompt)
    if several and len(prompt) * n > 16:
        return False
    # 评分的开头不能长过上下文；JSON 的长度不会短于 token 数
    return body.get("best_of") in (None, n) and (body.get("max_tokens") != 0 or echo) and not (echo and scored and len(json.dumps(prompt)) > 60)
