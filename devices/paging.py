"""How the memory of this process lies in pages: large ones for weights that every token reads.

A request to Linux that changes no content and may be refused; elsewhere it does nothing. SmolLM2
int4 on two cores decodes 11 to 18 % faster on large pages (`docs/explanation/what-was-tried.md`).
Advice that drops pages (MADV_DONTNEED on the weights' file while it is read) has no place here:
ONNX Runtime unmaps pieces of the file meanwhile, and what comes to lie there would lose its
content.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
from pathlib import Path
from typing import NamedTuple

MAPS, LARGE_PAGE = (
    Path("/proc/self/maps"),
    Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size"),
)
COLLAPSE = 25  # of madvise(2), since Linux 6.1


class Region(NamedTuple):
    """A stretch of this process's addresses; `file` is empty where it is memory of its own."""

    start: int
    stop: int
    writable: bool
    file: str


def use_large_pages() -> threading.Thread | None:
    """Move this process's larger stretches of memory to large pages, in a thread; None where the
    system has none.
    """
    size = large_page_bytes()
    if size is None:
        return None

    def collapse() -> None:
        for region in regions():
            if region.writable and not region.file and region.stop - region.start >= 2 * size:
                _advise(region, COLLAPSE)

    worker = threading.Thread(target=collapse, name="edgetune-large-pages", daemon=True)
    worker.start()
    return worker


def large_page_bytes() -> int | None:
    """The size of a large page, or None where they are switched off or unknown."""
    try:
        if "[never]" in LARGE_PAGE.with_name("enabled").read_text():
            return None
        return int(LARGE_PAGE.read_text())
    except (OSError, ValueError):
        return None


def regions() -> list[Region]:
    """What is mapped into this process now; nothing where the system does not say."""
    try:
        lines = MAPS.read_text().splitlines()
    except OSError:
        return []
    return [_region(line) for line in lines]


def _region(line: str) -> Region:
    """`start-stop permissions offset device inode  name`, as proc(5) has it."""
    addresses, permissions, _, _, inode, *name = line.split(maxsplit=5)
    start, stop = (int(address, 16) for address in addresses.split("-"))
    return Region(start, stop, "w" in permissions, "" if inode == "0" or not name else name[0])


def _advise(region: Region, advice: int) -> None:
    """madvise; what the kernel refuses stays as it was."""
    if sys.platform != "linux":
        return
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(region.start), ctypes.c_size_t(region.stop - region.start), advice
        )
