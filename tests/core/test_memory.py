"""Peak memory: a process reports its own, whatever its parent held."""

from __future__ import annotations

from pathlib import Path

import pytest
from process_helpers import python

from edgetune.core import memory
from edgetune.core.memory import peak_rss_mb

LARGE_PARENT = """
import subprocess, sys
from edgetune.core.memory import peak_rss_mb
held = bytearray(b"1") * 600_000_000
child = "from edgetune.core.memory import peak_rss_mb; print(peak_rss_mb())"
print(peak_rss_mb(), subprocess.check_output([sys.executable, "-c", child], text=True))
"""


@pytest.mark.skipif(not memory.STATUS.exists(), reason="needs /proc")
def test_a_child_of_a_large_parent_reports_its_own_peak() -> None:
    parent, child = map(float, python(LARGE_PARENT).stdout.split())
    assert parent > 600
    assert 1 < child < 100


def test_memory_that_was_given_back_still_counts() -> None:
    bytearray(b"1") * 50_000_000
    before = peak_rss_mb()
    bytearray(b"1") * (int(before * 1e6) + 50_000_000)
    assert peak_rss_mb() > before + 40


def test_where_there_is_no_proc_the_system_call_answers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own = peak_rss_mb()
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    assert peak_rss_mb() > 0.9 * own
