"""Files over the network: where npm and PyPI keep an archive, and a download that shows how far it is and survives a poor line.

Neither npm nor a package's own code is run.
"""

import contextlib
import http.client
import os
import re
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from functools import cache
from html import unescape
from pathlib import Path

from nanogpt.messages import say

# 第二个是国内镜像
NPM_REGISTRIES = ("https://registry.npmjs.org", "https://registry.npmmirror.com")
PYPI_INDEX = "https://pypi.org/simple"
# 每次收发各自计时：慢不要紧，停了才算断
TIMEOUT_S = 20
# 没有进展的连接最多再试这么多次，每次先等几秒
RETRIES = 3
PAUSE_S = 2.0
REPORT_S = 10.0


# ---- 取文件 ----


def download(url: str, into: Path) -> None:
    """Write what a URL gives into a file; a connection that breaks is taken up again where it stopped."""
    have, furthest, idle = 0, 0, 0
    with into.open("wb") as file, _progress(into.name) as show:
        while True:
            try:
                with open_url(urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})) as response:
                    if have and response.status != 206:
                        # 服务器不会续传：从头来
                        have = 0
                        file.seek(0)
                        file.truncate()
                    total = have + int(response.headers["Content-Length"]) if response.headers["Content-Length"] else None
                    while piece := response.read(2**15):
                        have += file.write(piece)
                        show(have, total)
                if total is None or have >= total:
                    return
                # 提前断开时 read 只是返回空，不报错
                raise ConnectionError(f"the connection closed after {have} of {total} bytes")
            except (OSError, http.client.HTTPException) as error:
                idle = 0 if have > furthest else idle + 1
                furthest = max(have, furthest)
                if not have or idle >= RETRIES or isinstance(error, urllib.error.HTTPError):
                    raise
                time.sleep(PAUSE_S)


@contextlib.contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar on a terminal, elsewhere a line now and then; yields show(bytes so far, bytes in all)."""
    if not sys.stderr.isatty():
        said = time.monotonic()

        def line(have: int, total: int | None) -> None:
            nonlocal said
            if time.monotonic() - said > REPORT_S:
                said = time.monotonic()
                say("fetching_part", name=name, have=have / 1e6, total=f"{total / 1e6:.1f}" if total else "?")

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task(name, total=None)
        yield lambda have, total: bar.update(task, completed=have, total=total)


def open_url(request: urllib.request.Request):
    """urlopen with the proxy and the certificates that pip is set to, if any; the environment's otherwise."""
    settings = pip_settings()
    handlers: list[urllib.request.BaseHandler] = []
    if "proxy" in settings:
        handlers.append(urllib.request.ProxyHandler(dict.fromkeys(("http", "https"), settings["proxy"])))
    if Path(settings.get("cert", "")).is_file():
        handlers.append(urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=settings["cert"])))
    return urllib.request.build_opener(*handlers).open(request, timeout=TIMEOUT_S)


# ---- 在哪里 ----


def npm_urls(package: str) -> list[str]:
    """Addresses of the tarball of "name@version": the registry that npm is set to, then the public ones."""
    name, version = package.rsplit("@", 1)
    registries = [*_npm_settings(), *NPM_REGISTRIES]
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


def sdist_urls(file: str) -> list[str]:
    """Addresses of the source archive `file` on the indexes that pip is set to.

    pip itself downloads one only after it has run the package's setup.py; the index's own page does without.
    """
    settings = pip_settings()
    indexes = [settings.get("index-url", PYPI_INDEX), *settings.get("extra-index-url", "").split()]
    project = re.sub(r"[-_.]+", "-", file.rsplit("-", 1)[0]).lower()
    found, reasons = [], []
    for index in indexes:
        page = f"{index.rstrip('/')}/{project}/"
        try:
            with open_url(urllib.request.Request(page, headers={"Accept": "text/html"})) as response:
                links = re.findall(r"""href\s*=\s*["']([^"']+)["']""", response.read().decode("utf-8", errors="replace"))
                links = [urllib.parse.urldefrag(urllib.parse.urljoin(response.url, unescape(link))).url for link in links]
                found += [link for link in links if _file_of(link) == file]
        except (OSError, urllib.error.URLError) as error:
            reasons.append(f"{page}: {error}")
    if not found:
        raise OSError("; ".join(reasons) or f"{file} is not on {' '.join(indexes)}")
    return found


def _file_of(url: str) -> str:
    return urllib.parse.unquote(urllib.parse.urlsplit(url).path).rsplit("/", 1)[-1]
