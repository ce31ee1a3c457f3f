"""What the machine does beside a measurement: a fixed job as a yardstick, clock and throttling,
energy, and busy neighbours that are asked for.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.devices.host import clocks_of_cpuinfo

READ_MB = 32
"""Of the yardstick's read: more than a small machine's caches hold."""
PRODUCT = 192
"""Rows and columns of the yardstick's matrix product."""
CLOCKS = "devices/system/cpu/cpu*/cpufreq/scaling_cur_freq"
THROTTLES = "devices/system/cpu/cpu*/thermal_throttle/core_throttle_count"
ZONES = "class/thermal/thermal_zone*/temp"
COUNTERS = "class/powercap/*/energy_uj"
SENSORS = "class/hwmon/hwmon*/power*_input"
SYS = Path("/sys")


class Yardstick:
    """A fixed job that is timed between requests: memory read by every thread, then a product by
    one. A machine that slows down slows it down, too.
    """

    def __init__(self, threads: int) -> None:
        share = READ_MB * (1 << 20) // 8 // threads
        self._parts = [np.ones(share, np.int64) for _ in range(threads)]
        self._matrix = np.random.default_rng(0).random((PRODUCT, PRODUCT), np.float32)
        self._out = np.empty_like(self._matrix)
        self._pool = ThreadPoolExecutor(threads)

    def times(self) -> dict[str, float]:
        """`read_ms` and `product_ms`, each the better of two, in ms."""
        return {
            "read_ms": min(self._read() for _ in range(2)),
            "product_ms": min(self._product() for _ in range(2)),
        }

    def close(self) -> None:
        """Let go of threads and memory."""
        self._pool.shutdown()
        self._parts = []

    def _read(self) -> float:
        start = time.perf_counter()
        list(self._pool.map(np.sum, self._parts))
        return (time.perf_counter() - start) * 1e3

    def _product(self) -> float:
        start = time.perf_counter()
        np.einsum("ij,jk->ik", self._matrix, self._matrix, out=self._out)  # by one thread
        return (time.perf_counter() - start) * 1e3


@dataclass(frozen=True)
class Conditions:
    """The machine at one moment; what a system does not tell is None."""

    clock_mhz: float | None
    """mean of the cores"""
    throttled: int | None
    """how often cores were slowed because of heat, since the start of the system"""
    celsius: float | None
    """the hottest zone"""
    yardstick: dict[str, float] = field(default_factory=dict)


def conditions(yardstick: Yardstick, *, system: Path = SYS) -> Conditions:
    """Clock, throttling and temperature as the kernel tells them, and the yardstick's time."""
    clocks = [value / 1e3 for value in _numbers(system, CLOCKS)] or clocks_of_cpuinfo()
    counts = _numbers(system, THROTTLES)
    zones = [value / 1e3 for value in _numbers(system, ZONES)]
    return Conditions(
        clock_mhz=sum(clocks) / len(clocks) if clocks else None,
        throttled=int(sum(counts)) if counts else None,
        celsius=max((value for value in zones if 0 < value < 150), default=None),
        yardstick=yardstick.times(),
    )


class EnergyMeter:
    """Joules since it was made, from a processor's counter or a board's power sensor; `source` None
    where the system has neither or does not let this user read it.
    """

    def __init__(self, *, system: Path = SYS) -> None:
        self._counters = [
            path
            for path in sorted(system.glob(COUNTERS))
            if re.fullmatch(r".*-rapl:\d+", path.parent.name) and _number(path) is not None
        ]
        self._sensors = [] if self._counters else sorted(system.glob(SENSORS))
        self._sensors = [path for path in self._sensors if _number(path) is not None]
        self.source = "RAPL" if self._counters else f"{self._sensors[0]}" if self._sensors else None
        self._begun, self._first = time.perf_counter(), self._read()
        self._watts = [self._power()] if self._sensors else []

    def look(self) -> None:
        """Read a power sensor once more: what it says is averaged over the looks."""
        if self._sensors:
            self._watts.append(self._power())

    def joules(self) -> float | None:
        """Since the start; None where nothing can be read, or a counter wrapped."""
        if self._counters:
            spent = sum(self._read()) - sum(self._first)
            return spent / 1e6 if spent >= 0 else None
        if not self._sensors:
            return None
        return sum(self._watts) / len(self._watts) * (time.perf_counter() - self._begun)

    def _read(self) -> list[float]:
        return [_number(path) or 0.0 for path in self._counters]

    def _power(self) -> float:
        return sum(_number(path) or 0.0 for path in self._sensors) / 1e6


@contextlib.contextmanager
def busy_neighbours(count: int) -> Iterator[None]:
    """So many processes that compute and read memory until the block ends."""
    job = "import numpy as n\na = n.ones(1 << 21)\nwhile True: (a * 1.1).sum()"
    others = [subprocess.Popen([sys.executable, "-c", job]) for _ in range(count)]
    try:
        yield
    finally:
        for process in others:
            process.kill()
            process.wait()


def drift(before: Conditions, after: Conditions) -> dict[str, float]:
    """How much longer each of the yardstick's jobs took after a measurement than before it, as a
    share of before.
    """
    return {
        name: after.yardstick[name] / took - 1
        for name, took in before.yardstick.items()
        if name in after.yardstick
    }


def _numbers(system: Path, pattern: str) -> list[float]:
    found = [_number(path) for path in sorted(system.glob(pattern))]
    return [value for value in found if value is not None]


def _number(path: Path) -> float | None:
    try:
        return float(path.read_text())
    except (OSError, ValueError):
        return None


def notes_of(before: Conditions, after: Conditions) -> list[str]:
    """What a reader of the figures should know of the machine, a line each."""
    lines = []
    if (
        before.throttled is not None
        and after.throttled is not None
        and after.throttled > before.throttled
    ):
        lines.append(
            f"the processor was slowed because of heat {after.throttled - before.throttled} times"
            " while it was measured"
        )
    worst: Any = max(drift(before, after).items(), key=lambda pair: abs(pair[1]), default=None)
    if worst is not None and abs(worst[1]) > 0.15:
        name = worst[0].removesuffix("_ms")
        lines.append(
            f"the machine changed while it was measured: a fixed {name} took {worst[1]:+.0%}"
            " afterwards"
        )
    return lines
