"""Attack what this program fetches, and list what it is installed with.

python benchmarks/torture/supply.py --flips 2000

Pins: everything that the project's requirements reach in this environment is in constraints.txt with the version installed.
Hashes: every asset at hand is the one that is pinned, and a flipped bit, a missing or an added byte is noticed.
Faults: a local server breaks every rule of HTTP, and nothing unverified is kept, no more is read than expected, nothing waits
for ever, one line says why. Certificates are checked. pip-audit, where it is installed and reaches its
service, says which versions have known holes.
"""

import argparse
import configparser
import contextlib
import dataclasses
import hashlib
import io
import json
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from bad_server import CERTIFICATE, BadServer, faults, plain, wrong_rest
from ledger import ROOT, Ledger
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from nanogpt.base.language import ConfigError
from nanogpt.data import assets
from nanogpt.data.assets import Asset

PROMISE = (
    "Every version that is installed is pinned and, where that can be asked, has no known hole; nothing that was fetched is used unless it is "
    "what was expected to the byte; whatever a server sends, no more is read than expected, no silence is waited for, and one line says why."
)
# 每次失败的获取最多这么久：时限都缩到一秒以内
LONGEST_S = 8.0
CONTENT = random.Random(0).randbytes(50_000)
# 套接字的缓冲里可以有几 MB 是客户端从未读过的
UNREAD_BYTES = 2**24


def judge(ledger: Ledger, kind: str, outcome: str, wrong: str | None) -> None:
    """Count a case: as promised, or `wrong`."""
    if wrong:
        ledger.breach(kind, wrong)
    else:
        ledger.count(kind, outcome)


# ---- 版本 ----


def pins(path: Path = ROOT / "constraints.txt") -> dict[str, str]:
    """Normalised name -> version of every line of constraints.txt; ValueError on a line that pins nothing, or twice."""
    found: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if pinned := line.partition("#")[0].strip():
            match = re.fullmatch(r"([\w.-]+)==([\w.+!]+)", pinned)
            if not match or canonicalize_name(match[1]) in found:
                raise ValueError(f"constraints.txt: {pinned}")
            found[canonicalize_name(match[1])] = match[2]
    return found


def required() -> list[Requirement]:
    """What setup.cfg asks for, all extras included."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    listed = [parser["options"]["install_requires"], *parser["options.extras_require"].values()]
    lines = [line.partition("#")[0].strip() for block in listed for line in block.splitlines()]
    return [Requirement(line) for line in lines if line]


def closure() -> tuple[dict[str, str], set[str]]:
    """({name: version} of all distributions that the requirements reach in this environment, names of those that are not installed)."""
    found: dict[str, str] = {}
    missing: set[str] = set()
    todo, seen = required(), set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        try:
            installed = distribution(requirement.name)
        except PackageNotFoundError:
            missing.add(name)
            continue
        found[name] = installed.version
        for line in installed.requires or []:
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras)):
                todo.append(needed)
    return found, missing


def attack_pins(ledger: Ledger) -> None:
    """Compare constraints.txt with what is installed."""
    pinned = pins()
    found, missing = closure()
    for name, version in found.items():
        # 本地版本号（+cpu、+cu130）是同一版的不同编译
        wrong = f"{name} {version} is installed, constraints.txt has {pinned.get(name, 'nothing')}"
        judge(ledger, "pins", "as installed", None if pinned.get(name) == version.partition("+")[0] else wrong)
    for name in missing:
        judge(ledger, "pins", "of an extra that is not installed", None if name in pinned else f"{name} is required and not pinned")
    ledger.figures["distributions pinned"] = len(pinned)


# ---- 哈希 ----


def built_in() -> list[Asset]:
    """All assets of nanogpt.data.assets."""
    return [value for value in vars(assets).values() if isinstance(value, Asset)]


def attack_hashes(ledger: Ledger, flips: int, generator: random.Random) -> None:
    """The assets at hand are whole; copies of them with one change are not."""
    for asset in built_in():
        judge(ledger, "assets", "pinned", None if re.fullmatch("[0-9a-f]{64}", asset.sha256) and asset.size > 0 else f"{asset.name} is not pinned")
        folder = next((f for f in (assets.mirror_folder(), assets.cache_folder()) if f and (f / asset.name).is_file()), None)
        if folder is None:
            ledger.count("assets", "not at hand: not checked")
            continue
        judge(ledger, "assets", "at hand and right", None if assets.is_whole(asset, folder / asset.name) else f"{asset.name} is another file")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        asset = Asset("a", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))
        for _ in range(flips):
            at, bit = generator.randrange(len(CONTENT)), 1 << generator.randrange(8)
            flipped = CONTENT[:at] + bytes([CONTENT[at] ^ bit]) + CONTENT[at + 1 :]
            changed = {"flipped": flipped, "shorter": CONTENT[:at], "longer": CONTENT + CONTENT[: at + 1]}
            kind = generator.choice(("flipped", "flipped", "shorter", "longer"))
            path.write_bytes(changed[kind])
            judge(ledger, "bytes", f"{kind}: noticed", f"{kind} at {at} was taken for the asset" if assets.is_whole(asset, path) else None)


# ---- 网络 ----


@contextlib.contextmanager
def impatient(timeout_s: float = 0.4, **settings: str) -> Iterator[Path]:
    """A fresh cache and no mirror; a short limit of time; pip set to `settings`. Yields the cache."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(assets, "TIMEOUT_S", timeout_s)
        patch.setattr(assets, "PAUSE_S", 0.0)
        patch.setattr(assets, "pip_settings", lambda: settings)
        patch.delenv("NANOGPT_ASSETS", raising=False)
        patch.setenv("NANOGPT_CACHE", folder)
        yield Path(folder)


def refusal(asset: Asset) -> str | None:
    """What is wrong with how an asset that cannot be had is refused; None if nothing is."""
    started, said = time.monotonic(), io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            path = assets.fetch(asset)
    except ConfigError as error:
        line = str(error)
        if "\n" in line or not line.isprintable():
            return f"not one printable line: {line!r}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    else:
        return None if assets.is_whole(asset, path) else "accepted something else"
    if time.monotonic() - started > LONGEST_S:
        return f"took {time.monotonic() - started:.1f} s"
    kept = list(assets.cache_folder().iterdir())
    return f"left {kept}" if kept else None


def attack_faults(ledger: Ledger, *, every: int = 1, tls: bool = False) -> None:
    """Every `every`-th fault that a server can show; over TLS with its certificate trusted."""
    listed = [fault for i, fault in enumerate(faults(CONTENT)) if i % every == 0]
    settings = {"cert": str(CERTIFICATE)} if tls else {}
    digest, longest, threads = hashlib.sha256(CONTENT).hexdigest(), 0.0, threading.active_count()
    with BadServer({f"/{i}": fault for i, (_, _, fault) in enumerate(listed)}, tls=tls) as server:
        for i, (kind, case, _) in enumerate(listed):
            with impatient(**settings):
                started = time.monotonic()
                wrong = refusal(Asset("a.bin", digest, len(CONTENT), urls=(f"{server.address}/{i}",)))
                longest = max(longest, time.monotonic() - started)
            time.sleep(0.01)
            sent = server.sent.get(f"/{i}", 0) / max(server.connections.get(f"/{i}", 1), 1)
            if wrong is None and sent > UNREAD_BYTES:
                wrong = f"{sent / 1e6:.0f} MB were taken for {len(CONTENT)} bytes"
            judge(ledger, kind, "refused in one line", wrong and f"{case}: {wrong}")
    time.sleep(1.0)
    ledger.figures[f"longest refusal{' over TLS' if tls else ''}"] = f"{longest:.1f} s, limit of time set to 0.4 s"
    if threading.active_count() > threads + 8:
        ledger.breach("threads", f"{threading.active_count() - threads} threads were left")


def attack_resuming(ledger: Ledger, times: int, generator: random.Random) -> None:
    """Connections that break at random places are taken up again and give the right bytes; a wrong rest is refused."""
    digest, asset = hashlib.sha256(CONTENT).hexdigest(), None
    for _ in range(times):
        cuts = sorted(generator.randrange(1, len(CONTENT)) for _ in range(2))

        def broken(line, cuts=cuts):
            rest, stop = CONTENT[line.begin :], next((cut for cut in cuts if cut > line.begin), len(CONTENT))
            line.head("206 Partial Content" if line.begin else "200 OK", Content_Length=len(rest))
            line.send(rest[: stop - line.begin])

        with BadServer({"/a": broken, "/b": wrong_rest(CONTENT)}) as server, impatient(timeout_s=5):
            asset = Asset("a.bin", digest, len(CONTENT), urls=(f"{server.address}/a",))
            with contextlib.redirect_stderr(io.StringIO()):
                right = assets.is_whole(asset, assets.fetch(asset))
            judge(ledger, "resumed", "right to the byte", None if right else f"cuts at {cuts}")
            (assets.cache_folder() / "a.bin").unlink()
            wrong = refusal(dataclasses.replace(asset, urls=(f"{server.address}/b",)))
            judge(ledger, "resumed", "wrong rest refused", wrong and f"a wrong rest: {wrong}")


def attack_certificates(ledger: Ledger) -> None:
    """What is not certified is not asked; the right answer is taken where it is."""
    asset = Asset("a-1.whl", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))
    page = b'<a href="/files/a-1.whl#sha256=0">a-1.whl</a>'
    with BadServer({"/a.bin": plain(CONTENT), "/s/a/": plain(page), "/files/a-1.whl": plain(CONTENT)}, tls=True) as server:
        direct = dataclasses.replace(asset, urls=(f"{server.address}/a.bin",))
        with impatient(timeout_s=5):
            wrong = refusal(direct) or (f"{server.sent} was read" if server.sent else None)
            judge(ledger, "certificates", "self-signed refused", wrong and f"self-signed: {wrong}")
        with impatient(timeout_s=5, cert=str(CERTIFICATE)):
            other = dataclasses.replace(asset, urls=(direct.urls[0].replace("127.0.0.1", "localhost"),))
            wrong = refusal(other) or (f"{server.sent} was read" if server.sent else None)
            judge(ledger, "certificates", "another host's refused", wrong and f"another host's: {wrong}")
        for trusted, settings in ((direct, {}), (dataclasses.replace(asset, pypi="a==1"), {"index-url": f"{server.address}/s"})):
            with impatient(timeout_s=5, cert=str(CERTIFICATE), **settings), contextlib.redirect_stderr(io.StringIO()):
                right = assets.is_whole(trusted, assets.fetch(trusted))
            judge(ledger, "certificates", "of a trusted authority accepted", None if right else "trusted: refused")


# ---- 已知的漏洞 ----


def audit(ledger: Ledger, program: str | None) -> None:
    """pip-audit over constraints.txt, if it is there and reaches its service."""
    found = program or shutil.which("pip-audit")
    if not found:
        ledger.figures["pip-audit"] = "not checked: it is not installed"
        return
    command = [found, "--no-deps", "--disable-pip", "-r", str(ROOT / "constraints.txt"), "--format", "json", "--progress-spinner", "off"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=540)
        listed = json.loads(done.stdout)["dependencies"]
    except (OSError, subprocess.SubprocessError, ValueError, KeyError) as error:
        said = "" if isinstance(error, (OSError, subprocess.SubprocessError)) else " ".join(done.stderr.split())[-200:]
        ledger.figures["pip-audit"] = f"not checked: {said or type(error).__name__}"
        return
    holes = {one["name"]: sorted(hole["id"] for hole in one["vulns"]) for one in listed if one.get("vulns")}
    skipped = sorted(one["name"] for one in listed if "skip_reason" in one)
    if len(skipped) == len(listed):
        # 连不上漏洞服务的包源，对每个包都答“没有”：不能当作没有漏洞
        ledger.figures["pip-audit"] = f"not checked: its service knows none of the {len(listed)} packages"
        return
    judge(ledger, "known holes", "none", "; ".join(f"{name}: {' '.join(ids)}" for name, ids in holes.items()) or None)
    ledger.figures["pip-audit"] = {"checked": len(listed) - len(skipped), "known holes": holes, "unknown to it": skipped}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=2000, help="changed copies of a file")
    parser.add_argument("--resumes", type=int, default=50, help="downloads whose connection breaks twice")
    parser.add_argument("--audit", metavar="PROGRAM", help="pip-audit, where it is not on the PATH")
    options = parser.parse_args()
    ledger, generator = Ledger("supply", PROMISE), random.Random(0)
    attack_pins(ledger)
    attack_hashes(ledger, options.flips, generator)
    attack_certificates(ledger)
    attack_resuming(ledger, options.resumes, generator)
    attack_faults(ledger)
    attack_faults(ledger, tls=True)
    audit(ledger, options.audit)
    ledger.figures["python"] = platform.python_version()
    return ledger.finish()


if __name__ == "__main__":
    sys.exit(main())
