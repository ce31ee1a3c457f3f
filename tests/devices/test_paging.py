"""Pages of this process's memory: what is asked of Linux changes no content."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from runtime_helpers import decoder_bundle

from edgetune.devices.paging import _region, large_page_bytes, regions, use_large_pages
from edgetune.runtime import Runtime
from edgetune.runtime.engine.session import SETTLED

linux = pytest.mark.skipif(sys.platform != "linux", reason="proc(5) is Linux's")


def pages_kb(address: int, kind: str) -> int:
    """Of the mapping that begins at an address: what is in memory ("Rss"), what was written to
    ("Anonymous").
    """
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.startswith(f"{address:08x}-"):
            return int(next(found for found in lines if found.startswith(f"{kind}:")).split()[1])
    raise AssertionError("not mapped")


def test_a_region_knows_its_file_even_with_spaces_in_its_name() -> None:
    assert (
        _region("7f00-7f10 r--p 00001000 fd:00 42   /a folder/model.onnx.data").file
        == "/a folder/model.onnx.data"
    )


def test_memory_of_the_process_itself_has_no_file() -> None:
    assert _region("7f00-7f10 rw-p 00000000 00:00 0   [heap]") == (0x7F00, 0x7F10, True, "")


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
    assert any(
        region.file.endswith((".so", ".so.6")) or "python" in region.file for region in regions()
    )


@linux
def test_the_engine_writes_nothing_into_the_file_it_maps(tiny_decoder: Path) -> None:
    bundle = decoder_bundle(tiny_decoder)
    with Runtime.open(bundle) as runtime:
        data = str((bundle / str(runtime.manifest.graph.data)).resolve())
        mapped = [region for region in regions() if region.file == data]
        assert mapped
        assert all(pages_kb(region.start, "Anonymous") == 0 for region in mapped)


def test_answers_stay_the_same_when_memory_moves(tiny_decoder: Path) -> None:
    with Runtime.open(decoder_bundle(tiny_decoder)) as runtime:
        before, after = (
            runtime.generate(["dim the lights"], adapter="a", max_new_tokens=2 * SETTLED)[0]
            for _ in range(2)
        )
        assert before.token_ids == after.token_ids
