"""Pages of this process's memory: what is asked of Linux changes no content."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from edgetune.devices.paging import _region, large_page_bytes, read_once, regions, use_large_pages

linux = pytest.mark.skipif(sys.platform != "linux", reason="proc(5) is Linux's")


def resident_kb(address: int) -> int:
    """What of the mapping that begins at an address is in memory."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.startswith(f"{address:x}-") or line.startswith(f"{address:08x}-"):
            return int(next(found for found in lines if found.startswith("Rss:")).split()[1])
    raise AssertionError("not mapped")


def test_a_region_knows_its_file_even_with_spaces_in_its_name() -> None:
    assert _region("7f00-7f10 r--p 00001000 fd:00 42   /a folder/model.onnx.data").file == "/a folder/model.onnx.data"


def test_memory_of_the_process_itself_has_no_file() -> None:
    assert _region("7f00-7f10 rw-p 00000000 00:00 0   [heap]") == (0x7F00, 0x7F10, True, "")


@linux
def test_a_file_that_was_read_once_leaves_no_pages_behind(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx.data"
    file.write_bytes(bytes(range(256)) * 4096)
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        address = np.frombuffer(mapped, np.uint8).ctypes.data
        with read_once(file):
            assert sum(mapped[::4096]) >= 0
        assert resident_kb(address) == 0
        assert mapped[:] == file.read_bytes()


@linux
def test_other_files_stay_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "other"
    file.write_bytes(b"x" * 65536)
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        address = np.frombuffer(mapped, np.uint8).ctypes.data
        with read_once(tmp_path / "model.onnx.data"):
            assert sum(mapped[::4096]) > 0
        assert resident_kb(address) > 0


def test_without_a_file_nothing_is_done() -> None:
    with read_once(None):
        pass


@linux
def test_large_pages_hold_what_small_ones_held() -> None:
    size = large_page_bytes()
    if size is None or size > 1 << 22:
        pytest.skip("no large pages of a few megabytes here")
    array = np.arange(6 * size // 8)
    worker = use_large_pages()
    assert worker is not None
    worker.join()
    assert (array == np.arange(array.size)).all()


@linux
def test_this_process_is_mapped() -> None:
    assert any(region.file.endswith((".so", ".so.6")) or "python" in region.file for region in regions())
