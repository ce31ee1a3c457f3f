"""This machine as a device: cores, memory, processor and its instruction sets, from the operating
system alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
from pathlib import Path

USEFUL_FLAGS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "asimdhp",
    "i8mm",
    "bf16",
    "sve",
    "sve2",
)
M_ARENA_MAX = -8  # of mallopt(3)
CPUINFO, MEMINFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")


def probe_host() -> dict[str, object]:
    """The figures a profile has, as far as this system tells: arch, cpu, cores, threads, memory_mb,
    features.
    """
    cores = usable_cores()
    return {
        "arch": platform.machine(),
        "cpu": cpu_model(),
        "cores": cores,
        "threads": cores,
        "memory_mb": memory_mb(),
        "features": cpu_features(),
        "system": f"{platform.system()} {platform.release()}",
    }


def usable_cores() -> int:
    """Cores this process may run on: its affinity, and a container's CPU quota."""
    affinity = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    quota = cpu_quota(Path("/sys/fs/cgroup/cpu.max"))
    return max(1, affinity if quota is None else min(affinity, int(quota)))


def threads_to_ask_for() -> int:
    """Threads for an engine: 0, its own choice (one a physical core), unless this process may use
    some of the cores only.

    ONNX Runtime looks at neither affinity nor quota: it starts a thread for every core of the
    machine and pins it there.
    """
    cores = usable_cores()
    return cores if cores < (os.cpu_count() or 1) else 0


def cpu_quota(path: Path) -> float | None:
    """Cores a control group allows ("max" or absent: no limit)."""
    try:
        quota, period = path.read_text().split()
        return None if quota == "max" else float(quota) / float(period)
    except (OSError, ValueError):
        return None


def memory_mb() -> int | None:
    """Installed memory in MB, or None where the system does not say."""
    match = re.search(r"^MemTotal:\s+(\d+) kB", _read(MEMINFO), re.MULTILINE)
    if match:
        return int(match[1]) // 1024
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    except (AttributeError, OSError, ValueError):
        return None


def release_free_memory() -> None:
    """Give memory that was freed back to the system, where the C library keeps it for later
    (glibc's malloc_trim).
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library; Windows
        ctypes.CDLL(None).malloc_trim(0)


def share_memory_between_threads() -> None:
    """Let all threads allocate from two arenas, where the C library would give each its own
    (glibc's mallopt).

    What a thread frees stays in its arena: of a server's six workers each kept 9 MB from the first
    adapter that it read.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)


def saturates_int8() -> bool:
    """Whether sums of 8-bit products saturate here: ONNX Runtime on x86 without VNNI adds pairs of
    them in 16 bits.
    """
    features = set(cpu_features())
    return "avx2" in features and not features & {"avx512_vnni", "avx_vnni", "amx_int8"}


def cpu_model() -> str:
    """The processor's name."""
    match = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", _read(CPUINFO), re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def clocks_of_cpuinfo() -> list[float]:
    """MHz of each core, where Linux says it there."""
    return [float(found) for found in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", _read(CPUINFO), re.M)]


def cpu_features() -> list[str]:
    """Instruction sets that matter to inference."""
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _read(CPUINFO), re.MULTILINE)
    found = set(match[1].split()) if match else set()
    return [flag for flag in USEFUL_FLAGS if flag in found]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
