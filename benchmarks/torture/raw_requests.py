"""Requests that no HTTP library would send, as bytes, each with what may come of it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

REFUSED = frozenset({400, 401, 403, 404, 405, 408, 413, 415, 431})
ANY = REFUSED | {200}
OK = frozenset({200})
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
# 藏在正文后面的第二个请求：谁也不该回答它
HIDDEN = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
JSON = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
SMALL = b'{"prompt": "a", "max_tokens": 1}'
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "get", "X" * 2000, "!#$%&'*+-.^_`|~")
ADDRESSES = ("/", "/health", "/openapi.json", "/v1/models", "/v1/completions")
TRAVERSALS = (
    "/../setup.cfg", "/..%2fsetup.cfg", "/%2e%2e/setup.cfg", "/%2e%2e%2f%2e%2e%2fetc/passwd", "/..\\setup.cfg", "/..%5csetup.cfg", "/%252e%252e/setup.cfg",
    "/page/index.html", "/page/../api.py", "/docs", "/redoc", "/./index.html", "//etc/passwd", "/etc/passwd", "///", "/v1/../v1/../../conf/sample.yaml", "/outputs/", "/.env",
    "/.git/config", "/C:/Windows/win.ini", "/%00", "/index.html%00", "/health%00", "/health/", "/v1/models/..", "/v1/completions/../../api.py", "/%ff%fe",
    "/%zz", "/%", "/favicon.ico", "/v1", "/v1/", "/V1/models", "/nanogpt/serve/api.py", "/v1/models;x=1", "http://127.0.0.1/../setup.cfg", "file:///etc/passwd",
    "http://evil.example/", "evil.example:80", "*", "/" + "a" * 8000, "/" + "../" * 2000 + "etc/passwd", "/~root", "/con", "/NUL", "/\\\\server\\share",
)
STRANGERS = (
    "Host: evil.example", "Host: evil.example:8000", "Host: 127.0.0.1.evil.example", "Host: localhost.evil.example", "Host: 0.0.0.0", "Host: 10.0.0.1",
    "Host: 2130706433", "Host: 0x7f.1", "Host: localhost@evil.example", "Host: evil.example#localhost", "Host: [::ffff:8.8.8.8]", "Host: localhost evil.example",
    "Host: localhost,evil.example", "Host:", "Host: localhost\r\nOrigin: http://evil.example", "Host: localhost\r\nOrigin: null",
    "Host: localhost\r\nOrigin: http://localhost.evil.example", "Host: localhost\r\nOrigin: https://localhost:444", "Host: localhost\r\nOrigin: file://",
    "Host: localhost\r\nSec-Fetch-Site: cross-site", "Host: localhost\r\nSec-Fetch-Site: same-site", "Host: localhost\r\nSec-Fetch-Site: x",
)


@dataclass(frozen=True)
class Case:
    """Bytes for one connection, the statuses that may answer them, and how many answers there may be."""

    kind: str
    data: bytes
    allowed: frozenset[int] = REFUSED
    answers: int = 1
    may_cut: bool = True
    """Whether the connection may also end without an answer."""
    head_only: bool = False


def post(body: bytes, *more: str) -> bytes:
    """A completion with a right length."""
    return JSON + "".join(f"{line}\r\n" for line in more).encode("latin-1") + b"Content-Length: %d\r\n\r\n" % len(body) + body


def cases(random: Random, size: int, *, every: int = 1) -> list[Case]:
    """Every fixed case, and `size` random ones of each random kind, in random order; `every` > 1: every so-many-th of the small fixed ones."""
    fixed = [*heads(), *floods(), *lengths(), *smuggled(), *chunks(), *pipelines(), *paths(), *strangers(), *bodies()]
    if every > 1:
        fixed = [case for case in fixed if len(case.data) < 2**17]
    found = [*fixed[random.randrange(every)::every], *mutations(random, size), *noise(random, size), *random_bodies(random, size)]
    random.shuffle(found)
    return found


def heads() -> Iterator[Case]:
    """First lines and fields that are wrong."""
    lines = (
        b"", b"GET", b"GET /", b"GET / HTTP/9.9", b"GET / HTTP/1.1 more", b"GET  / HTTP/1.1", b" GET / HTTP/1.1", b"G@T / HTTP/1.1", b"\0GET / HTTP/1.1",
        b"GET /\0 HTTP/1.1", b"GET /\xff HTTP/1.1", "GET /春 HTTP/1.1".encode(), b"GET / http/1.1", b"GET / HTTP/1.1\r", b"GET\t/\tHTTP/1.1", b"HTTP/1.1 200 OK",
        b"PRI * HTTP/2.0", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"SSH-2.0-OpenSSH_9.9", b"EHLO localhost", b"GET / HTTP/1.1\nX: y",
    )
    for line in lines:
        yield Case("first line", line + b"\r\nHost: localhost\r\n\r\n", ANY)
    fields = (
        b"no colon", b": no name", b"Space : x", b"X: a\0b", b"X\0: a", b"X: \x01\x02", b"Host: localhost", b" folded: x", b"\xff: x", b"X: \xff\xfe", b"X:",
        b"Connection: close, keep-alive, upgrade\r\nUpgrade: websocket", b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABk",
        b"Range: bytes=0-1,2-3", b"If-None-Match: *", b"Accept-Language: \xff\xfe", b"Accept: " + b"x/" * 3000, b"Cookie: " + b"a=b; " * 2000,
    )
    for field in fields:
        yield Case("field", b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + field + b"\r\n\r\n", ANY)
    yield Case("field", b"GET /health HTTP/1.1\r\n\r\n")
    yield Case("field", b"GET /health HTTP/1.0\r\n\r\n")


def floods() -> Iterator[Case]:
    """Heads far beyond every limit."""
    for length in (2**14, 2**16, 2**20, 2**22):
        yield Case("huge head", b"GET /" + b"a" * length + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
        yield Case("huge head", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * length + b"\r\n\r\n")
        yield Case("huge head", b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * (length // 6) + b"\r\n")
        yield Case("huge head", b"A" * length)
        yield Case("huge head", b"\r\n" * (length // 2))


def lengths() -> Iterator[Case]:
    """Content-Length that is no length, or not that of the body."""
    for value in ("-1", "+32", "0x20", "1e3", "32 32", "32, 33", "32,", "", "٣٢", "9" * 19, "9" * 30, "9" * 5000, "32\r\nContent-Length: 33", "32.0", "NaN"):
        yield Case("content-length", JSON + f"Content-Length: {value}\r\n\r\n".encode() + SMALL)
    # 同一个数写两遍是合法的
    yield Case("content-length", JSON + b"Content-Length: 32\r\nContent-Length: 32\r\n\r\n" + SMALL, ANY)
    yield Case("body shorter than said", JSON + b"Content-Length: 33\r\n\r\n" + SMALL)
    yield Case("body shorter than said", JSON + b"Content-Length: 1000000\r\n\r\n" + SMALL)
    yield Case("body longer than said", JSON + b"Content-Length: 5\r\n\r\n" + SMALL, REFUSED, answers=2)
    yield Case("body too large", JSON + b"Content-Length: 3000000\r\n\r\n" + b" " * 3_000_000)
    yield Case("body too large", JSON + b"Expect: 100-continue\r\nContent-Length: 99999999999\r\n\r\n")
    yield Case("body where none belongs", b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 32\r\n\r\n" + SMALL, OK)
    yield Case("body where none belongs", b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n")


def smuggled() -> Iterator[Case]:
    """Two lengths, or a coding that one server knows and another does not, with a second request behind them."""
    encodings = (
        "Transfer-Encoding: chunked", "Transfer-Encoding: identity", "Transfer-Encoding: chunked, identity", "Transfer-Encoding: gzip, chunked",
        "Transfer-Encoding: xchunked", "Transfer-Encoding : chunked", "Transfer-Encoding: \x0bchunked", "Transfer-Encoding: chunked\r\nTransfer-Encoding: cow",
        "Transfer-Encoding:\r\n chunked", "transfer-encoding: CHUNKED", "X: y\nTransfer-Encoding: chunked", "Transfer-Encoding: \"chunked\"",
    )
    for encoding in encodings:
        for length in (4, 5, 6, 100):
            data = JSON + f"{encoding}\r\nContent-Length: {length}\r\n\r\n0\r\n\r\n".encode("latin-1") + HIDDEN
            yield Case("smuggling", data)
        if "chunked" not in encoding.lower() or " : " in encoding or "identity" in encoding:
            yield Case("smuggling", JSON + f"{encoding}\r\n\r\n0\r\n\r\n".encode("latin-1") + HIDDEN)
    yield Case("smuggling", b"GET /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN)


def chunks() -> Iterator[Case]:
    """Chunks that are not as they say."""
    head = JSON + b"Transfer-Encoding: chunked\r\n\r\n"
    ones = b"".join(b"1\r\n%c\r\n" % byte for byte in SMALL)
    for lie in (b"zz\r\n", b"-1\r\n", b"+20\r\n", b"0x20\r\n", b"f" * 30 + b"\r\n", b"ffffffffffffffff\r\n", b"20", b"5\r\n" + SMALL, b"\r\n\r\n", b"20\n" + SMALL,
                b"20;" + b"x" * 30_000 + b"\r\n" + SMALL + b"\r\n0\r\n\r\n", b"20\r\n" + SMALL + b"\r\n0\r\nX: " + b"y" * 30_000 + b"\r\n\r\n",
                b"20\r\n" + SMALL + b"\r\n", b"20\r\n" + SMALL + b"garbage", b" 20 \r\n" + SMALL + b"\r\n0\r\n\r\n", b"\0" * 100):
        yield Case("chunks that lie", head + lie, ANY)
    yield Case("chunks of one byte", head + ones + b"0\r\n\r\n", OK, may_cut=False)
    yield Case("chunks of one byte", head + b"1\r\n \r\n" * 5_000 + ones + b"0\r\n\r\n", OK, may_cut=False)
    # 太多太碎的会超时：也是答复
    yield Case("chunks of one byte", head + b"1\r\n \r\n" * 200_000 + ones + b"0\r\n\r\n", ANY)
    yield Case("chunks without end", head + b"fff\r\n" + b" " * 4095 + b"\r\n" * 1, ANY)


def pipelines() -> Iterator[Case]:
    """Many requests in one go are answered one by one, in order."""
    yield Case("pipelining", GET * 200, OK, answers=200, may_cut=False)
    yield Case("pipelining", (GET + post(SMALL)) * 10, OK, answers=20, may_cut=False)
    yield Case("pipelining", GET * 3 + b"garbage\r\n\r\n", ANY, answers=4, may_cut=False)
    yield Case("pipelining", post(SMALL) + b"GET / HT", OK)


def paths() -> Iterator[Case]:
    """Addresses that want files, and methods that nobody takes."""
    for path in TRAVERSALS:
        for method in (b"GET", b"POST"):
            yield Case("path", method + b" " + path.encode() + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    for path in ADDRESSES:
        for method in METHODS:
            taken = method in {"/v1/completions": ("POST",), "/v1/models": ("GET",)}.get(path, ("GET", "HEAD"))
            data = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
            yield Case("method", data, REFUSED if path == "/v1/completions" or not taken else OK, head_only=method == "HEAD", may_cut=False)


def strangers() -> Iterator[Case]:
    """Names and origins that are not this machine's."""
    for fields in STRANGERS:
        for line in ("GET /v1/models", "POST /v1/completions", *(["GET /", "GET /health"] if "Fetch" not in fields else [])):
            length = "" if line.startswith("GET") else f"Content-Type: application/json\r\nContent-Length: {len(SMALL)}\r\n"
            data = f"{line} HTTP/1.1\r\n{fields}\r\n{length}Connection: close\r\n\r\n".encode() + (SMALL if length else b"")
            yield Case("stranger", data, frozenset({400, 403}), may_cut=False)


def bodies() -> Iterator[Case]:
    """Bodies that are no JSON, or JSON that means harm."""
    deep = 100_000
    bad = [
        b"", b"{", b"\xff\xfe{\0}\0", '{"prompt": "a"}'.encode("utf-16"), '{"prompt": "a"}'.encode("utf-32"), b"\xef\xbb\xbf{}", b'{"prompt": "\xff"}', b'{"prompt": "\xc0\x80"}',
        b'{"prompt": "\xed\xa0\x80"}', b"[" * deep, b'{"a":' * deep, b'{"prompt":' + b"[" * 900 + b"]" * 900 + b"}", b"[" * 500_000 + b"]" * 500_000, b"nul", b"NaN", b"0", b'"a"', b"[]",
        b"null", b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "temperature": -Infinity}', b'{"prompt": "a", "temperature": 1e99999}', b'{"prompt": "a", "seed": -2}',
        b'{"prompt": "a", "n": ' + b"9" * 1_000_000 + b"}", b'{"prompt": "a", "temperature": 1.' + b"9" * 1_000_000 + b"e1000}", b'{"prompt": ["a", "a"], "n": ' + b"9" * 4300 + b"}",
        b'{"prompt": "a", "n": 1' + b"0" * 4290 + b"}", b'{"prompt": "a", "seed": 1e308}', b'{"prompt": "a", "max_tokens": 1e18}', b'{"prompt": "a", "\\ud800": 1}', b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "stop": "\\ud83d"}', b'{"prompt": "a", "style": "\\udc00"}', b'{"prompt": "a", "stream_options": {"\\ud800": true}}',
        b'{"prompt": "a", "max_tokens": true}', b'{"prompt": "a", "best_of": true}', b'{"prompt": "a", "logit_bias": {"1": 100}}', b'{"prompt": {"$ref": "file:///etc/passwd"}}', b'{"prompt": "a", "__proto__": {}}',
        b'{"prompt": "a", "_target_": "os.system"}', b'{"prompt": "a", "sampler": {"_target_": "os.system"}}', b'{"prompt": "a", "out_dir": "/etc"}', b'{"prompt": "a"} trailing', b'{"prompt": "a"}\0',
        b'{"prompt": [' + b'"a",' * 100_000 + b'"a"]}', b'{"prompt": "' + b"a" * 1_000_000 + b'"}', b'{"prompt": "a", "stop": [' + b'"x",' * 200_000 + b'"x"]}', b"{" + b'"k":1,' * 150_000 + b'"prompt":"a"}',
        b'{"prompt": "a", "' + b"k" * 1_000_000 + b'": 1}', b'{"prompt": "a", "n": 1, "n": 17}', b'{"prompt": "a", "stream": "true"}', b'{"prompt": "a", "temperature": "1"}', b"a=b&c=d", b"<xml/>",
    ]
    for body in bad:
        # 机器忙时，一兆的正文也可能没按时收完
        yield Case("body", post(body, "Connection: close"), frozenset({400, 404, 408}), may_cut=False)
    good = [
        b'{"prompt": "a", "max_tokens": 9, "max_tokens": 1}', b'{"prompt": "\\u0000", "max_tokens": 2}', b'{"prompt": "\\ud83d\\ude00", "max_tokens": 1}',
        b' \n\t{"prompt": "a", "max_tokens": 1}\r\n ', b'{"prompt": "a", "max_tokens": 2, "temperature": 1e-320}', b'{"prompt": "a", "max_tokens": 2, "repetition_penalty": 0.01}',
        b'{"prompt": "a", "max_tokens": 2.0, "seed": 0}', b'{"prompt": "a", "max_tokens": 2, "top_p": 0, "typical": 0, "min_p": 1}', b'{"prompt": "emotion:\\u001b]0;x\\u0007|a", "max_tokens": 1}',
        b'{"prompt": "a", "max_tokens": 2, "stop": ["\\u0000", "\\n"]}', b'{"prompt": "style:' + b"z" * 15_000 + b'|a", "max_tokens": 1}',
        b'{"prompt": "a", "model": "\\udfff", "max_tokens": 1}', b'{"prompt": [[97, 255], [10]], "max_tokens": 0, "echo": true, "logprobs": 20}',
    ]
    for body in good:
        yield Case("strange but right", post(body, "Connection: close"), frozenset({200, 400}), may_cut=False)
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/jsonx", "", "application/json\xff"):
        data = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n" + f"Content-Type: {content_type}\r\nContent-Length: 32\r\n\r\n".encode("latin-1") + SMALL
        yield Case("content type", data, frozenset({415, 400}))


def mutations(random: Random, size: int) -> Iterator[Case]:
    """A right request with a few bytes changed, lost, doubled or put in."""
    for _ in range(size):
        data = bytearray(random.choice((GET, post(SMALL, "Accept-Language: zh"), post(b'{"prompt": "a", "max_tokens": 2, "stream": true}'))))
        for _ in range(random.randint(1, 6)):
            at, what = random.randrange(len(data)), random.randrange(4)
            if what == 0:
                data[at] = random.randrange(256)
            elif what == 1:
                del data[at: at + random.randint(1, 8)]
            elif what == 2:
                data[at:at] = data[at: at + random.randint(1, 40)]
            else:
                data[at:at] = random.choice((b"\r\n", b"\0", b"\r\n\r\n", b":", b" ", b"\xff", b"HTTP/1.1"))
            data = data or bytearray(b"x")
        yield Case("mutation", bytes(data), ANY, answers=9)


def noise(random: Random, size: int) -> Iterator[Case]:
    """Bytes without any meaning."""
    for _ in range(size // 2):
        yield Case("noise", random.randbytes(random.randint(1, 3000)), ANY)
        yield Case("noise", bytes(random.choice(b"GET POST/HTTP1.:\r\n\r\n ") for _ in range(random.randint(1, 300))), ANY, answers=9)


def random_bodies(random: Random, size: int) -> Iterator[Case]:
    """Right JSON with any fields of any values."""
    values = (
        None, True, False, 0, 1, -1, 2**62, 2**63, 2**200, 0.5, -0.0, 1e-320, 1e308, "", "a", "春\0", "\x1b[2J", "x" * 300, [], ["a"], ["a", "b"], [[]], [None], {}, {"a": 1},
        {"include_usage": True}, ["a"] * 17, "\n", "emotion:happy|a",
    )
    names = (
        "model", "n", "stop", "seed", "stream", "style", "emotion", "guidance", "stream_options", "echo", "user", "temperature", "top_k", "top_p", "min_p", "typical",
        "repetition_penalty", "no_repeat_ngram", "unknown", "best_of", "logit_bias", "logprobs", "suffix", "metadata", "presence_penalty", "frequency_penalty", "unheard_of",
    )
    for _ in range(size):
        body = {"prompt": random.choice(("a", "the king", ["a", "b"], random.choice(values))), "max_tokens": random.choice((1, 2, 5, random.choice(values)))}
        body |= {name: random.choice(values) for name in random.sample(names, random.randint(0, 4))}
        yield Case("random fields", post(json.dumps(body).encode("utf-8"), "Connection: close"), ANY | {404}, may_cut=False)
