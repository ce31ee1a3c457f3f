"""What a training step frees is kept for the next one, and given back in the end."""

from __future__ import annotations

import subprocess
import sys

import pytest

from edgetune.training.fast import memory
from edgetune.training.fast.memory import freed_memory_kept

FAULTS = """
import resource
import torch
from edgetune.training.fast.memory import freed_memory_kept

def faults_of_a_second_allocation():
    torch.ones(4 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(4 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults_of_a_second_allocation()
with freed_memory_kept():
    kept = faults_of_a_second_allocation()
print(before, kept, faults_of_a_second_allocation())
"""
"""pages that the kernel must find when 16 MB are freed and asked for again; in a process of its
own, whose heap no other test has shaped
"""


@pytest.mark.skipif(memory._glibc() is None, reason="only under glibc")
def test_the_second_allocation_finds_its_memory_there() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, timeout=300
    )
    before, kept, after = map(int, done.stdout.split())
    assert before > 1000 and kept < 1000 and after > 1000


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with freed_memory_kept():
        assert memory._glibc() is None
