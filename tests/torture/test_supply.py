"""What comes from elsewhere: pinned versions, hashes of files, servers that answer wrongly, endlessly, never or not at all."""

# 装着的版本必须与 constraints.txt 一致；下载的东西一个字节不对就不用，也不留下；服务器怎样作怪，都是一行话
# 坏服务器是本机上的裸 socket：一条路径一种毛病；时限在测试里缩短

import configparser
import contextlib
import dataclasses
import hashlib
import io
import json
import random
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from attack import LONG, cases
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from nanogpt.base.config import trusted_targets
from nanogpt.base.language import ConfigError
from nanogpt.data import assets
from nanogpt.data.assets import Asset
from nanogpt.weights import checkpoint

pytestmark = pytest.mark.torture
CONTENT = random.Random(0).randbytes(50_000)
SIZE = len(CONTENT)
WANTED = Asset("a-1.whl", hashlib.sha256(CONTENT).hexdigest(), SIZE)
# 127.0.0.1 的自签证书与私钥，只为测试：没有一台机器信它
CERTIFICATE = Path(__file__).with_name("self_signed.pem")
# 每次失败的获取最多这么久；套接字的缓冲里可以有几 MB 是客户端从未读过的
LONGEST_S, UNREAD_BYTES = 8.0, 2**24
# 有上限的“无尽”：客户端没有拦住时，测试自己不至于写满内存
ENDLESS = 2**28


# ---- 版本 ----


def pins() -> dict[str, str]:
    """Normalised name -> version of every line of constraints.txt."""
    found: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if pinned := line.partition("#")[0].strip():
            match = re.fullmatch(r"([\w.-]+)==([\w.+!]+)", pinned)
            assert match and canonicalize_name(match[1]) not in found, pinned
            found[canonicalize_name(match[1])] = match[2]
    return found


def required() -> list[Requirement]:
    """What setup.cfg asks for, all extras included."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    listed = [parser["options"]["install_requires"], *parser["options.extras_require"].values()]
    lines = [line.partition("#")[0].strip() for block in listed for line in block.splitlines()]
    return [Requirement(line) for line in lines if line]


def test_every_distribution_that_the_requirements_reach_is_pinned_to_the_version_installed():
    pinned, todo, seen = pins(), required(), set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        assert name in pinned, f"{name} is required and not pinned"
        with contextlib.suppress(PackageNotFoundError):
            installed = distribution(requirement.name)
            # 本地版本号（+cpu、+cu130）是同一版的不同编译
            assert pinned[name] == installed.version.partition("+")[0], name
            needed = [Requirement(line) for line in installed.requires or []]
            extras = ("", *requirement.extras)
            todo += [one for one in needed if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in extras)]
    assert len({name for name, _ in seen}) > 60


def test_what_security_says_is_what_the_program_and_its_figures_say():
    record = json.loads((ROOT / "benchmarks/results/torture_supply.json").read_text(encoding="utf-8"))
    assert not record["broken"] and len(trusted_targets()) == 6
    assert assets.TIMEOUT_S == 20 and assets.MOST_PAGE == 16 * 2**20
    for name in ("SECURITY.md", "SECURITY.zh-CN.md"):
        said = (ROOT / name).read_text(encoding="utf-8")
        assert f"{record['cases']:,}" in said
        for file in (*checkpoint.FILES, *checkpoint.FILES_1, "manifest.json", "run.json"):
            assert f"`{file}`" in said, file


# ---- 摘要 ----


def test_the_files_that_the_program_fetches_are_pinned_and_those_at_hand_are_whole():
    for asset in [value for value in vars(assets).values() if isinstance(value, Asset)]:
        assert re.fullmatch("[0-9a-f]{64}", asset.sha256) and asset.size > 0
        for folder in (assets.mirror_folder(), assets.cache_folder()):
            assert not folder or not (folder / asset.name).is_file() or assets.is_whole(asset, folder / asset.name)


@cases(20, 5000)
@given(at=st.integers(0, SIZE - 1), bit=st.integers(0, 7), kind=st.sampled_from(["flipped", "shorter", "longer"]))
def test_a_changed_byte_is_noticed(tmp_path, at, bit, kind):
    flipped = CONTENT[:at] + bytes([CONTENT[at] ^ 1 << bit]) + CONTENT[at + 1 :]
    (tmp_path / "a").write_bytes({"flipped": flipped, "shorter": CONTENT[:at], "longer": CONTENT + CONTENT[: at + 1]}[kind])
    assert not assets.is_whole(WANTED, tmp_path / "a")


# ---- 坏服务器 ----


class Line:
    """One connection: where the client wants to go on, and how to answer it."""

    # 每种毛病就是对它做几件事
    def __init__(self, connection: socket.socket, begin: int, over: threading.Event):
        self.connection, self.begin, self.over, self.sent = connection, begin, over, 0

    def send(self, *parts: bytes) -> None:
        for part in parts:
            self.connection.sendall(part)
            self.sent += len(part)

    def head(self, status: str = "200 OK", **headers: object) -> None:
        lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        self.send(f"HTTP/1.1 {status}\r\n{lines}Connection: close\r\n\r\n".encode("latin-1"))

    def forever(self, piece: bytes) -> None:
        while self.sent < ENDLESS and not self.over.is_set():
            self.send(piece)

    def reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


Fault = Callable[[Line], object]


@contextlib.contextmanager
def bad_server(faults: dict[str, Fault], *, tls: bool = False) -> Iterator[tuple[str, list[int]]]:
    """(address, bytes sent in each connection) of a server on this machine that answers path -> fault."""
    over, listener, sent = threading.Event(), socket.create_server(("127.0.0.1", 0)), []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)

    def answer(connection: socket.socket) -> None:
        connection.settimeout(20)
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stack.callback(connection.close)
            connection = stack.enter_context(context.wrap_socket(connection, server_side=True)) if tls else connection
            asked = b""
            while b"\r\n\r\n" not in asked:
                piece = connection.recv(4096)
                if not piece:
                    return
                asked += piece
            resumed = re.search(rb"range: bytes=(\d+)-", asked, flags=re.IGNORECASE)
            line = Line(connection, int(resumed[1]) if resumed else 0, over)
            try:
                faults.get(asked.split(b" ")[1].decode("ascii"), lambda line: line.head("404 Not Found", Content_Length=0))(line)
            finally:
                sent.append(line.sent)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"{'https' if tls else 'http'}://127.0.0.1:{listener.getsockname()[1]}", sent
    finally:
        over.set()
        # 只关掉的话，等着 accept 的线程不会醒
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def plain(content: bytes, *, rest: bytes | None = None) -> Fault:
    """What a good server answers, also when a download is taken up again; with `rest` it breaks off at the half, and has another rest."""

    def answer(line: Line) -> None:
        right = content[line.begin :]
        line.head("206 Partial Content" if line.begin else "200 OK", Content_Length=len(right))
        line.send(right if rest is None else rest[line.begin :] if line.begin else right[: SIZE // 2])

    return answer


STATUSES = ("400 Bad", "401 Who", "403 No", "404 None", "407 Proxy", "416 Range", "429 Slow", "500 Oops", "502 Bad", "503 Busy")
LOCATIONS = (
    "http://example.invalid/a", "file:///etc/passwd", "ftp://example.invalid/a", "data:text/plain,a", "//[", "https://", "gopher://x", "\x1b[2J",
    "http://user:secret@example.invalid/", "https://exa mple/", "/" + "a" * 10**5, "", "?again",
)
FAULTS: dict[str, list[Fault]] = {
    "status": [
        *(lambda line, s=s: (line.head(s, Content_Length=4), line.send(b"oops")) for s in STATUSES),
        *(lambda line, s=s: (line.head(s), line.forever(b"x" * 65536)) for s in STATUSES),
    ],
    "truncated": [
        *(lambda line, n=n: (line.head(Content_Length=n), line.send(CONTENT[:n])) for n in (0, 1, SIZE // 2, SIZE - 1)),
        *(lambda line, n=n: (line.head(), line.send(CONTENT[:n])) for n in (0, 1, SIZE // 2, SIZE - 1)),
        *(lambda line, n=n: (line.head(Content_Length=SIZE), line.send(CONTENT[:n])) for n in (0, 1, SIZE // 2, SIZE - 1)),
    ],
    "too long": [
        *(lambda line, n=n: (line.head(Content_Length=SIZE + n), line.send(CONTENT, b"x" * n)) for n in (1, 1000, 10**6)),
        *(lambda line, n=n: (line.head(), line.send(CONTENT, b"x" * n)) for n in (1, 1000, 10**6)),
    ],
    "odd length": [lambda line, n=n: (line.head(Content_Length=n), line.send(CONTENT[:-1])) for n in ("-1", "x", "1e9", "9" * 30, f"{SIZE}, {SIZE}", "")],
    "endless": [
        lambda line: (line.head(), line.forever(b"x" * 65536)), lambda line: (line.head(), line.send(CONTENT), line.forever(b"x" * 65536)),
        lambda line: (line.send(b"HTTP/1.1 200 OK\r\nX: "), line.forever(b"x" * 65536)),
        lambda line: (line.send(b"HTTP/1.1 200 OK\r\n"), line.forever(b"X: y\r\n" * 999)),
        lambda line: (line.head(Transfer_Encoding="chunked"), line.forever(b"10000\r\n" + b"x" * 65536 + b"\r\n")),
        lambda line: (line.head(Transfer_Encoding="chunked"), line.forever(b"0" * 65536)),
    ],
    "silent": [lambda line: line.over.wait(20), lambda line: (line.head(Content_Length=SIZE), line.over.wait(20))],
    "closed": [
        lambda line: None, *(lambda line, n=n: (line.head(Content_Length=SIZE), line.send(CONTENT[:n]), line.reset()) for n in (0, 10, SIZE // 3)),
    ],
    "redirect": [
        *(lambda line, to=to: line.head("302 Found", Location=to, Content_Length=0) for to in LOCATIONS),
        *(lambda line, code=code: line.head(f"{code} x", Location="?again", Content_Length=0) for code in (300, 301, 303, 304, 307, 308)),
    ],
    "no http": [
        lambda line: line.send(bytes(range(256)) * 99), lambda line: line.forever(b"\r\n" * 999), lambda line: line.send(b"HTTP/1.1 2e2 OK\r\n\r\n" + CONTENT),
        lambda line: line.send(b"HTTP/1.1 500 \x1b]0;owned\x07\x1b[2J\r\n\r\n"),
    ],
    "encoded": [
        lambda line: (line.head(Content_Length=SIZE, Content_Encoding="gzip"), line.send(bytes(SIZE))),
        *(lambda line, c=c: (line.head(Transfer_Encoding="chunked"), line.send(c + b"\r\n", CONTENT)) for c in (b"ffffffffffff", b"zz", b"-5")),
    ],
    "other bytes": [plain(bytes([CONTENT[0] ^ 1]) + CONTENT[1:]), plain(CONTENT, rest=bytes(SIZE))],
}


@contextlib.contextmanager
def impatient(folder: Path, timeout_s: float = 5, **settings: str) -> Iterator[None]:
    """A fresh cache and no mirror; a short limit of time; pip set to `settings`."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()):
        patch.setattr(assets, "TIMEOUT_S", timeout_s)
        patch.setattr(assets, "PAUSE_S", 0.0)
        patch.setattr(assets, "pip_settings", lambda: settings)
        patch.delenv("NANOGPT_ASSETS", raising=False)
        patch.setenv("NANOGPT_CACHE", str(folder))
        yield


def assert_refused(asset: Asset, folder: Path, timeout_s: float = 5, **settings: str) -> None:
    """One printable line in time, and nothing is kept."""
    started = time.monotonic()
    with impatient(folder, timeout_s, **settings), pytest.raises(ConfigError) as error:
        assets.fetch(asset)
    line = str(error.value)
    assert "\n" not in line and line.isprintable() and time.monotonic() - started < LONGEST_S and not list(folder.iterdir())


@pytest.mark.parametrize("tls", [False, True] if LONG else [False])
@pytest.mark.parametrize("kind", FAULTS)
@cases(2, 40)
@given(data=st.data())
def test_whatever_a_server_sends_is_refused_in_one_line_and_not_kept(tmp_path_factory, kind, tls, data):
    folder, fault = tmp_path_factory.mktemp("cache"), data.draw(st.sampled_from(FAULTS[kind]))
    with bad_server({"/a": fault}, tls=tls) as (address, sent):
        assert_refused(dataclasses.replace(WANTED, urls=(f"{address}/a",)), folder, 0.4, **({"cert": str(CERTIFICATE)} if tls else {}))
    assert max(sent, default=0) <= UNREAD_BYTES


@cases(2, 60)
@given(cuts=st.lists(st.integers(1, SIZE - 1), min_size=1, max_size=2).map(sorted))
def test_a_connection_that_breaks_is_taken_up_again_and_gives_the_right_bytes(tmp_path_factory, cuts):
    def broken(line: Line) -> None:
        stop = next((cut for cut in cuts if cut > line.begin), SIZE)
        line.head("206 Partial Content" if line.begin else "200 OK", Content_Length=SIZE - line.begin)
        line.send(CONTENT[line.begin : stop])

    with bad_server({"/a": broken}) as (address, _), impatient(tmp_path_factory.mktemp("cache")):
        assert assets.is_whole(WANTED, assets.fetch(dataclasses.replace(WANTED, urls=(f"{address}/a",))))


def test_a_server_without_a_trusted_certificate_is_not_asked(tmp_path):
    page = b'<a href="/files/a-1.whl#sha256=0">a-1.whl</a>'
    with bad_server({"/a": plain(CONTENT), "/s/a/": plain(page), "/files/a-1.whl": plain(CONTENT)}, tls=True) as (address, sent):
        direct = dataclasses.replace(WANTED, urls=(f"{address}/a",))
        assert_refused(direct, tmp_path)
        other = dataclasses.replace(WANTED, urls=(f"{address.replace('127.0.0.1', 'localhost')}/a",))
        assert_refused(other, tmp_path, cert=str(CERTIFICATE))
        assert not sent
        for trusted, settings in ((direct, {}), (dataclasses.replace(WANTED, pypi="a==1"), {"index-url": f"{address}/s"})):
            with impatient(tmp_path, cert=str(CERTIFICATE), **settings):
                assert assets.is_whole(WANTED, assets.fetch(trusted))
            (tmp_path / WANTED.name).unlink()
