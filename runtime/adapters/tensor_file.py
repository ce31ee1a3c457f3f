"""A safetensors file read at once: every tensor as float32, and whether all of them are finite.

The library checks the file (its header, that the offsets cover it without a gap); the tensors of
float32 are then views of one buffer, which for the several hundred small tensors of an adapter
takes half the time of asking for one after the other.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.core.arrays import Array

NUMPY_TYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}


class TensorFile:
    """The bytes of one file, read at once; what is made of them comes from these very bytes.

    `tensors` raises ValueError where the file is damaged, or holds anything but floating-point
    numbers.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: npt.NDArray[np.uint8] = np.fromfile(path, np.uint8)

    def digest(self) -> str:
        """Hex sha256 of the bytes."""
        return hashlib.sha256(self.data.data).hexdigest()

    @cached_property
    def tensors(self) -> dict[str, Array]:
        """name → float32 tensor, in the order of the header; fp16, bf16 and fp64 are converted."""
        return {name: _tensor(name, entry, self._body) for name, entry in self._header.items()}

    def not_finite(self) -> set[str]:
        """Names of the tensors that hold NaN or infinite values."""
        if all(entry["dtype"] == "F32" for entry in self._header.values()) and _sum_is_finite(
            self._body.view("<f4")
        ):
            return set()
        return {
            name
            for name, tensor in self.tensors.items()
            if not (_sum_is_finite(tensor) or np.isfinite(tensor).all())
        }

    @cached_property
    def _header(self) -> dict[str, dict[str, Any]]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(
                self.path, framework="numpy"
            ):  # checks the header, and that the offsets cover the file
                header: dict[str, dict[str, Any]] = json.loads(self.data[8 : self._start].tobytes())
        except SafetensorError as error:
            raise ValueError(f"truncated or damaged, {self.data.size} bytes ({error})") from error
        return {name: entry for name, entry in header.items() if name != "__metadata__"}

    @property
    def _start(self) -> int:
        return 8 + int(self.data[:8].view("<u8")[0])

    @property
    def _body(self) -> npt.NDArray[np.uint8]:
        return self.data[self._start :]


def _tensor(name: str, entry: Mapping[str, Any], body: npt.NDArray[np.uint8]) -> Array:
    kind, (begin, end) = entry["dtype"], entry["data_offsets"]
    bits = body[begin:end]
    if kind == "BF16":  # the upper half of a float32, which numpy does not know
        tensor: Array = (bits.view("<u2").astype(np.uint32) << 16).view(np.float32)
    elif kind in NUMPY_TYPES:
        tensor = bits.view(NUMPY_TYPES[kind]).astype(np.float32, copy=False)
    else:
        raise ValueError(f"{name}: expected a floating-point tensor, got {kind}")
    return tensor.reshape(entry["shape"])


def _sum_is_finite(values: Array) -> bool:
    """Quicker than looking at each value; False also where finite values add up beyond float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        return math.isfinite(float(values.sum()))
