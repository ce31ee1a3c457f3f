"""What a training step frees is kept for the next one, and given back in the end."""

from __future__ import annotations

import resource
import sys

import pytest
import torch

from edgetune.training import memory
from edgetune.training.memory import freed_memory_kept


def faults_of_a_second_allocation() -> int:
    """Pages that the kernel must find when 16 MB are freed and asked for again."""
    torch.ones(4 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(4 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(memory._glibc() is None, reason="only under glibc")
def test_the_second_allocation_finds_its_memory_there() -> None:
    assert faults_of_a_second_allocation() > 1000
    with freed_memory_kept():
        assert faults_of_a_second_allocation() < 1000
    assert faults_of_a_second_allocation() > 1000


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with freed_memory_kept():
        assert memory._glibc() is None
