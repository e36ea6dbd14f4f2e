"""How much memory this process may still take."""

import contextlib
from pathlib import Path

GIB = 2**30
CGROUP = Path("/sys/fs/cgroup")


def free_ram() -> int:
    """Bytes that are free on this machine, or fewer where a container or ulimit allows this process fewer."""
    import psutil

    used = psutil.Process().memory_info()
    limits = [psutil.virtual_memory().available]
    with contextlib.suppress(OSError, ValueError):
        # 容器（cgroup v2）里看到的空闲是整台机器的；没有上限时写着 max
        most, taken = (int((CGROUP / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        limits.append(most - taken + _reclaimable())
    with contextlib.suppress(ImportError):
        # Windows 没有 ulimit
        import resource

        for name, taken in (("RLIMIT_AS", used.vms), ("RLIMIT_DATA", used.data)):
            most = resource.getrlimit(getattr(resource, name))[0]
            limits += [] if most == resource.RLIM_INFINITY else [most - taken]
    return max(0, min(limits))


def _reclaimable() -> int:
    """Bytes of files that the container's kernel keeps in memory and gives up when asked: data read once counts as taken."""
    with contextlib.suppress(OSError, ValueError):
        counts = dict(line.split() for line in (CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
        return int(counts.get("inactive_file", 0))
    return 0
