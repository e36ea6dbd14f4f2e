"""Files over the network: where npm and PyPI keep an archive, and a download that shows how far it is and survives a poor line.

Neither npm nor a package's own code is run; pip is only asked for its settings.
"""

import contextlib
import http.client
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.parse
from collections.abc import Callable, Iterator
from functools import cache
from html import unescape
from pathlib import Path

from nanogpt.https import LEAST_BYTES, RefusedError, is_secure, open_url, without_password
from nanogpt.messages import say, shown

# 第二个是国内镜像
NPM_REGISTRIES = ("https://registry.npmjs.org", "https://registry.npmmirror.com")
PYPI_INDEX = "https://pypi.org/simple"
# 索引页最多读这么多，同一个文件最多试这么几处
MOST_PAGE, MOST_LINKS = 2**24, 4
# 没有进展的连接最多再试这么多次，每次先等几秒
RETRIES = 3
PAUSE_S = 2.0
REPORT_S = 10.0


# ---- 取文件 ----


def download(url: str, into: Path, size: int) -> None:
    """Write the `size` bytes that a URL gives into a file; a connection that breaks is taken up again where it stopped."""
    have, furthest, idle = 0, 0, 0
    with into.open("wb") as file, _progress(into.name) as show:
        while True:
            try:
                with opened(url, {"Range": f"bytes={have}-"} if have else {}) as answer:
                    if have and answer.status != 206:
                        # 服务器不会续传：从头来
                        have = 0
                        file.seek(0)
                        file.truncate()
                    if answer.length not in (None, size - have):
                        raise RefusedError(f"{have + answer.length} bytes, not {size}")
                    for piece in answer.pieces(size - have):
                        have += file.write(piece)
                        show(have, size)
                if have == size:
                    return
                # 提前断开时只是读到空，不报错
                raise ConnectionError(f"the connection closed after {have} of {size} bytes")
            except (OSError, http.client.HTTPException) as error:
                # 每次只来几个字节的不算进展，否则可以断上几万次
                idle = 0 if have - furthest >= LEAST_BYTES else idle + 1
                furthest = max(have, furthest)
                if not have or idle > RETRIES or isinstance(error, (urllib.error.HTTPError, RefusedError)):
                    raise
                time.sleep(PAUSE_S)


@contextlib.contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, elsewhere a line now and then; yields show(bytes so far, bytes in all)."""
    if not sys.stderr.isatty():
        said = time.monotonic()

        def line(have: int, total: int) -> None:
            nonlocal said
            if time.monotonic() - said > REPORT_S:
                said = time.monotonic()
                say("fetching_part", name=name, have=have / 1e6, total=total / 1e6)

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        # 文件名可能来自别人的清单
        task = bar.add_task(shown(name, sys.stderr), total=None)
        yield lambda have, total: bar.update(task, completed=have, total=total)


def opened(url: str, headers: dict[str, str]):
    """open_url with the proxy and the certificates that pip is set to, if any; the environment's otherwise."""
    settings = pip_settings()
    return open_url(url, headers=headers, proxy=settings.get("proxy"), certificates=settings.get("cert"))


# ---- 在哪里 ----


def npm_urls(package: str) -> list[str]:
    """Addresses of the tarball of "name@version": the registry that npm is set to, then the public ones."""
    name, version = package.rsplit("@", 1)
    registries = [*_secure("npm registry", _npm_settings()), *NPM_REGISTRIES]
    # @scope/name 的文件名里没有 @scope
    file = f"{name.rsplit('/', 1)[-1]}-{version}.tgz"
    return list(dict.fromkeys(f"{registry.rstrip('/')}/{name}/-/{file}" for registry in registries))


def _npm_settings() -> list[str]:
    """The registry of the environment or of ~/.npmrc, if any."""
    for name in ("npm_config_registry", "NPM_CONFIG_REGISTRY"):
        if os.environ.get(name):
            return [os.environ[name]]
    file = Path.home() / ".npmrc"
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    return [match[1] for line in lines if (match := re.fullmatch(r"""\s*registry\s*=\s*["']?([^"'\s]+)["']?\s*""", line))]


@cache
def pip_settings() -> dict[str, str]:
    """What pip's files and environment set, for example index-url, proxy, cert."""
    command = [sys.executable, "-m", "pip", "config", "list", "--disable-pip-version-check"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=60)
    except (OSError, subprocess.SubprocessError):
        # 没有 pip：用它的默认值
        return {}
    found: dict[str, str] = {}
    # pip 的次序：环境变量先于 download 一节，再先于 global
    for section in ("global", "download", ":env:"):
        for key, value in re.findall(rf"^{re.escape(section)}\.([\w-]+)='(.*)'$", done.stdout, flags=re.MULTILINE):
            found[key] = value.replace("\\n", " ").strip()
    return found


def index_urls(release: str, file: str) -> list[str]:
    """Addresses of `file` of the release "name==version" on the indexes that pip is set to.

    pip itself downloads a source archive only after it has run the package's setup.py, and anything without a bound on its size;
    the index's own page does without both.
    """
    settings = pip_settings()
    indexes = [settings.get("index-url", PYPI_INDEX), *settings.get("extra-index-url", "").split()]
    project = re.sub(r"[-_.]+", "-", release.partition("==")[0]).lower()
    found, reasons = [], []
    for index in _secure("pip index-url", indexes) or [PYPI_INDEX]:
        page = f"{index.rstrip('/')}/{project}/"
        try:
            found += [link for link in _links(page) if _file_of(link) == file]
        except (OSError, http.client.HTTPException) as error:
            reasons.append(f"{without_password(page)}: {error}")
    if not found:
        raise OSError("; ".join(reasons) or f"{file} is not on {' '.join(map(without_password, indexes))}")
    # 同一个文件列上一万遍的索引页，也只试这么几处
    return list(dict.fromkeys(found))[:MOST_LINKS]


def _links(page: str) -> list[str]:
    """The links of an index's page that can be asked for."""
    with opened(page, {"Accept": "text/html"}) as answer:
        content = answer.read(MOST_PAGE).decode("utf-8", errors="replace")
    hrefs = [unescape(link) for link in re.findall(r"""href\s*=\s*["']([^"']+)["']""", content)]
    # 方括号多半是坏地址，urljoin 会为它出错
    found = [urllib.parse.urljoin(answer.url, link) for link in hrefs if "[" not in link]
    user = urllib.parse.urlsplit(page).netloc.rpartition("@")[0]
    if user:
        # 要密码的索引，文件在同一台主机上时也要
        here = urllib.parse.urlsplit(answer.url).netloc
        found = [link.replace(f"//{here}/", f"//{user}@{here}/", 1) if urllib.parse.urlsplit(link).netloc == here else link for link in found]
    return [urllib.parse.urldefrag(link).url for link in found if link.isascii() and link.isprintable() and is_secure(link)]


def _secure(setting: str, urls: list[str]) -> list[str]:
    """Those of the addresses that are https; says which are passed over."""
    for url in urls:
        # file: 的索引是本机的文件夹，只有 pip 自己会读
        if not is_secure(url) and not url.startswith("file:"):
            say("not_https", setting=setting, url=without_password(url))
    return [url for url in urls if is_secure(url)]


def _file_of(url: str) -> str:
    return urllib.parse.unquote(urllib.parse.urlsplit(url).path).rsplit("/", 1)[-1]
