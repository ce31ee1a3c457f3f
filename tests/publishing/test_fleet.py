"""The benchmark of a fleet, on a small one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import fleet
from local_registry import INSTALL, is_installed


@pytest.mark.skipif(not is_installed(), reason=INSTALL)
def test_every_device_has_the_new_version_for_the_bytes_of_the_adapter(tmp_path: Path) -> None:
    options = argparse.Namespace(devices=6, processes=2, adapter_mb=0.2)
    found = fleet.measure(options, tmp_path)
    assert (found["on version 2"], found["failed"]) == (6, 0)
    assert 0.9 < found["most / adapter's"] <= 1.1
