"""Around a training step: the format of its products, its fused functions, and memory that is kept
for the next step.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from typing import Any

from edgetune.data.batching import Batch
from edgetune.models.torch_device import Precision, autocast, device_of
from edgetune.training.fast.fused_layers import fused_ops
from edgetune.training.fast.lora_products import fused_lora
from edgetune.training.fast.shared_prefix import prefixes_shared

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt's parameters, from glibc's malloc.h
LARGE = 32 << 20  # bytes; the largest threshold that glibc takes for MMAP_THRESHOLD
KEPT = 1 << 30
DEFAULT = 128 << 10  # glibc's own for both


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """While this lasts, glibc does not give a freed tensor's memory back to the system; afterwards
    it does at once.

    Without it every step of a small model asks for the same gigabyte anew, and the kernel clears it
    page by page. Elsewhere than under glibc nothing changes.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(MMAP_THRESHOLD, LARGE)
    libc.mallopt(TRIM_THRESHOLD, KEPT)
    try:
        yield
    finally:
        libc.mallopt(MMAP_THRESHOLD, DEFAULT)
        libc.mallopt(TRIM_THRESHOLD, DEFAULT)
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return libc if hasattr(libc, "gnu_get_libc_version") else None


@contextlib.contextmanager
def computing(model: Any, batch: Batch, precision: Precision) -> Iterator[None]:
    """For forward passes over `batch`, which is on the model's device."""
    with (
        autocast(precision, device_of(model)),
        fused_lora(model, precision),
        fused_ops(model),
        prefixes_shared(model, batch),
    ):
        yield
