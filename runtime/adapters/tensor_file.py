"""A safetensors file read at once: every tensor as float32, coded ones decoded, and whether all of
them are finite.

The library checks the file (its header, that the offsets cover it without a gap); the tensors of
float32 are then views of one buffer, which for the several hundred small tensors of an adapter
takes half the time of asking for one after the other.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from edgetune.core.adapter_codes import coded
from edgetune.core.arrays import Array
from edgetune.core.files import MAX_JSON_BYTES, parse_json

NUMPY_TYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}


MAX_TENSORS = 20_000
"""Of one adapter: two a module, and a hundred layers of seven modules have 1,400."""


class TensorFile:
    """The bytes of one file, read at once; what is made of them comes from these very bytes.

    OSError where it cannot be read; ValueError where it is no regular file or its header does not
    describe it, before anything of the body is read. `tensors` raises ValueError where it holds
    anything but floating-point numbers.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would block
            raise ValueError("not a regular file")
        with path.open("rb") as file:
            self._file_size = os.fstat(file.fileno()).st_size
            self._read_header(file)

    def read(self) -> None:
        """Have the bytes in memory, so that several threads look at the same ones."""
        _ = self.data

    def _read_header(self, file: BinaryIO) -> None:
        size = self._file_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, MAX_JSON_BYTES):
            raise ValueError(f"truncated or damaged, {size} bytes (its header has {length})")
        self._raw_header = file.read(length)
        header = parse_json(self._raw_header)
        if not isinstance(header, dict) or not all(map(_is_entry, header.items())):
            raise ValueError(f"truncated or damaged, {size} bytes (no header of safetensors)")
        header.pop("__metadata__", None)
        if len(header) > MAX_TENSORS:
            raise ValueError(f"expected at most {MAX_TENSORS} tensors, got {len(header)}")
        self._start, self._header = 8 + length, header
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if self._start + end != size:
            raise ValueError(
                f"truncated or damaged, {size} bytes (the header describes {self._start + end})"
            )
        self._codes = {
            name: one
            for name, entry in header.items()
            if entry["dtype"] == "U8" and (one := coded(name, entry["shape"])) is not None
        }
        self.shapes: dict[str, tuple[int, ...]] = {}
        """name → shape of every tensor that there will be"""
        self.nbytes = end
        """of the tensors, those that are coded as float32"""
        for name, entry in header.items():
            shape, one = tuple(entry["shape"]), self._codes.get(name)
            found = {name: shape} if one is None else one.shapes(shape[0])
            if twice := sorted(found.keys() & self.shapes.keys()):
                raise ValueError(f"{twice[0]:.200}: there twice, once in codes")
            self.shapes |= found
            if one is not None:
                self.nbytes += 4 * sum(map(math.prod, found.values())) - math.prod(shape)

    @cached_property
    def data(self) -> npt.NDArray[np.uint8]:
        """The whole file. ValueError where it is not the one any more whose header was read."""
        data: npt.NDArray[np.uint8] = np.fromfile(self.path, np.uint8, count=self._file_size)
        if data.size != self._file_size or data[8 : self._start].tobytes() != self._raw_header:
            raise ValueError("it was changed while it was read")
        return data

    def digest(self) -> str:
        """Hex sha256 of the bytes."""
        return hashlib.sha256(self.data.data).hexdigest()

    @cached_property
    def tensors(self) -> dict[str, Array]:
        """name → float32 tensor, in the order of the header; fp16, bf16, fp64 and codes are
        converted.
        """
        found: dict[str, Array] = {}
        for name, entry in self._header.items():
            one, (begin, end) = self._codes.get(name), entry["data_offsets"]
            if one is None:
                found[name] = _tensor(name, entry, self._body)
            else:
                found |= one.decode(self._body[begin:end].reshape(entry["shape"]))
        return found

    def not_finite(self) -> set[str]:
        """Names of the tensors that hold NaN or infinite values."""
        if all(entry["dtype"] == "F32" for entry in self._header.values()) and _sum_is_finite(
            self._body.view("<f4")
        ):
            return set()
        return {name for name, tensor in self.tensors.items() if not is_finite(tensor)}

    @cached_property
    def _body(self) -> npt.NDArray[np.uint8]:
        """The tensors' bytes; the library checks that the offsets cover them without a gap and fit
        the shapes.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, framework="numpy"):
                return self.data[self._start :]
        except SafetensorError as error:
            raise ValueError(f"truncated or damaged, {self.data.size} bytes ({error})") from error


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


def _is_entry(item: tuple[str, Any]) -> bool:
    """Whether an entry of the header says what is read of it."""
    name, entry = item
    if name == "__metadata__":
        return True
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("dtype"), str)
        and _are_sizes(entry.get("shape"))
        and _are_sizes(entry.get("data_offsets"))
        and len(entry["data_offsets"]) == 2
    )


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int and one >= 0 for one in value)


def is_finite(values: Array) -> bool:
    """Whether no value is NaN or infinite."""
    return _sum_is_finite(values) or bool(np.isfinite(values).all())


def _sum_is_finite(values: Array) -> bool:
    """Quicker than looking at each value; False also where finite values add up beyond float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        return math.isfinite(float(values.sum()))
