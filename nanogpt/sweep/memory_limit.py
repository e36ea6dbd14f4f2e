"""A real memory limit on this very process, so that a CPU trial fails where the budget ends."""

import sys

from nanogpt.base.ram import GIB

# Windows：JOBOBJECT_EXTENDED_LIMIT_INFORMATION 的编号与标志（winnt.h）
EXTENDED_LIMIT_INFORMATION = 9
LIMIT_PROCESS_MEMORY, LIMIT_KILL_ON_JOB_CLOSE = 0x100, 0x2000


def limit_memory(gib: float) -> str | None:
    """Let allocations beyond `gib` fail in this process; returns how: rlimit, job, or None where the system has no such limit."""
    if sys.platform == "linux":
        import resource

        # RLIMIT_AS 会把只映射不用的地址也算上；DATA 只算可写的私有内存
        resource.setrlimit(resource.RLIMIT_DATA, (int(gib * GIB),) * 2)
        return "rlimit"
    if sys.platform == "win32":
        return "job" if _join_job(int(gib * GIB)) else None
    # macOS 不执行这类限额：只靠父进程看着
    return None


def _join_job(limit: int) -> bool:
    """Put this process into a Windows job object with a memory limit; False when the system refuses."""
    import ctypes
    from ctypes import wintypes

    class Basic(ctypes.Structure):
        _fields_ = (
            ("PerProcessUserTimeLimit", ctypes.c_int64), ("PerJobUserTimeLimit", ctypes.c_int64), ("LimitFlags", wintypes.DWORD),
            ("MinimumWorkingSetSize", ctypes.c_size_t), ("MaximumWorkingSetSize", ctypes.c_size_t), ("ActiveProcessLimit", wintypes.DWORD),
            ("Affinity", ctypes.c_size_t), ("PriorityClass", wintypes.DWORD), ("SchedulingClass", wintypes.DWORD),
        )

    class Extended(ctypes.Structure):
        _fields_ = (
            ("Basic", Basic), ("IoInfo", ctypes.c_uint64 * 6), ("ProcessMemoryLimit", ctypes.c_size_t), ("JobMemoryLimit", ctypes.c_size_t),
            ("PeakProcessMemoryUsed", ctypes.c_size_t), ("PeakJobMemoryUsed", ctypes.c_size_t),
        )

    kernel = ctypes.WinDLL("kernel32", use_last_error=True)
    # 句柄是指针大小，不声明会被截成 32 位
    kernel.CreateJobObjectW.restype = wintypes.HANDLE
    kernel.CreateJobObjectW.argtypes = (ctypes.c_void_p, wintypes.LPCWSTR)
    kernel.GetCurrentProcess.restype = wintypes.HANDLE
    kernel.SetInformationJobObject.argtypes = (wintypes.HANDLE, ctypes.c_int, ctypes.c_void_p, wintypes.DWORD)
    kernel.AssignProcessToJobObject.argtypes = (wintypes.HANDLE, wintypes.HANDLE)
    job = kernel.CreateJobObjectW(None, None)
    information = Extended()
    information.Basic.LimitFlags = LIMIT_PROCESS_MEMORY | LIMIT_KILL_ON_JOB_CLOSE
    information.ProcessMemoryLimit = limit
    # 不关句柄：它随进程一起关闭，子孙进程也就一起结束
    return bool(
        job and kernel.SetInformationJobObject(job, EXTENDED_LIMIT_INFORMATION, ctypes.byref(information), ctypes.sizeof(information))
        and kernel.AssignProcessToJobObject(job, kernel.GetCurrentProcess())
    )
