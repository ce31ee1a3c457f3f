"""The most memory that this process ever held, as the operating system counts it."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def reset_peak_rss() -> None:
    """Let the peak begin anew at what is held now, so that a run's is its own in a process of
    several. Only Linux can; elsewhere the peak stays that of the process.
    """
    with contextlib.suppress(OSError):
        CLEAR.write_text("5")


def peak_rss_mb() -> float:
    """Peak resident memory of this process, MB (10^6 bytes).

    From VmHWM, which begins anew with each program. Where there is none (macOS), from getrusage's
    ru_maxrss, which on Linux would also count what the parent held at the time of the fork.
    """
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6  # in kB of 1024 bytes
    try:
        import resource
    except ImportError:  # Windows
        return _peak_working_set_mb()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def _peak_working_set_mb() -> float:
    """The same from Windows: `PeakWorkingSetSize` of PROCESS_MEMORY_COUNTERS."""
    import ctypes

    class Counters(ctypes.Structure):
        _fields_ = (
            ("cb", ctypes.c_uint32),
            ("faults", ctypes.c_uint32),
            *((f"size{index}", ctypes.c_size_t) for index in range(8)),  # the first is the peak
        )

    counters = Counters(cb=ctypes.sizeof(Counters))
    kernel: Any = getattr(ctypes, "windll").kernel32  # noqa: B009 - only Windows has it
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    process = ctypes.c_void_p(kernel.GetCurrentProcess())
    kernel.K32GetProcessMemoryInfo(process, ctypes.byref(counters), counters.cb)
    return float(counters.size0) / 1e6
