"""How the memory of this process lies in pages: large ones for weights that every token reads, none for a file read once.

Both are requests to Linux that change no content and may be refused; elsewhere they do nothing. SmolLM2 int4 on two cores decodes
11 to 18 % faster on large pages, and its peak of memory is 58 MB lower (`benchmarks/RESULTS.md`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MAPS, LARGE_PAGE = Path("/proc/self/maps"), Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
DONTNEED, COLLAPSE = 4, 25  # of madvise(2); COLLAPSE since Linux 6.1
PAUSE_S = 0.01


class Region(NamedTuple):
    """A stretch of this process's addresses; `file` is empty where it is memory of its own."""

    start: int
    stop: int
    writable: bool
    file: str


@contextlib.contextmanager
def read_once(file: Path | None) -> Iterator[None]:
    """Let go of the pages of a mapped file again and again while the block runs, and once more at its end.

    The engine maps its weights, rearranges them into memory of its own, and keeps the file's pages besides until all is done.
    A page that is read again comes back from the system's cache. The mapping must only be read: a private one that is written
    to would lose what was written (ONNX Runtime maps so, and writes nothing: `tests/test_paging.py`).
    """
    if file is None or not MAPS.exists():
        yield
        return
    name, done = os.path.realpath(file), threading.Event()

    def drop() -> None:
        for region in regions():
            if region.file == name:
                _advise(region, DONTNEED)

    def until_done() -> None:
        while not done.wait(PAUSE_S):
            drop()

    helper = threading.Thread(target=until_done, name="edgetune-read-once", daemon=True)
    helper.start()
    try:
        yield
    finally:
        done.set()
        helper.join()
        drop()


def use_large_pages() -> threading.Thread | None:
    """Move this process's larger stretches of memory to large pages, in a thread; None where the system has none."""
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
        ctypes.CDLL(None).madvise(ctypes.c_void_p(region.start), ctypes.c_size_t(region.stop - region.start), advice)
