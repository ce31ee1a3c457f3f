"""Keys, values and logits in a device's own memory, where the session's attention runs on one
(CUDA, DirectML).

ONNX Runtime copies an input that is bound on another device once, when it is bound. So what a step
only appends to, the cache, has to lie on the device, where grouped-query attention finds past and
present in the same memory; the few numbers that change with each step are bound again for each.
Rows of the cache are views through DLPack, and move inside the device.

Tested on the processor's memory (an OrtValue there goes the same ways); not yet on a GPU.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgetune.core.arrays import Float32
from edgetune.runtime.bundle.manifest import GraphInfo

DEVICES = {"Cuda": "cuda", "DML": "dml"}
"""ONNX Runtime's name of a memory → its name of the device"""
TYPES: dict[str, type[np.floating[Any]]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}


@dataclass(frozen=True)
class Place:
    """A device, its number, and the type its cache has."""

    device: str
    index: int = 0
    dtype: type[np.floating[Any]] = np.float32

    def new(self, shape: Sequence[int], dtype: Any = None) -> Any:
        """An OrtValue there."""
        import onnxruntime

        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(
            list(shape), dtype or self.dtype, self.device, self.index
        )


def cache_place(session: Any) -> Place | None:
    """Where this session wants its cache; None in the processor's memory, also where ONNX Runtime
    (before 1.23) does not tell.
    """
    if not hasattr(session, "get_input_memory_infos"):
        return None
    for value, memory in zip(session.get_inputs(), session.get_input_memory_infos(), strict=True):
        if value.name.startswith("past_key_values.") and memory.name in DEVICES:
            return Place(DEVICES[memory.name], memory.device_id, TYPES[value.type])
    return None


class DeviceBlock:
    """Keys and values (sides, slots, kv_heads, capacity, head_dim) on a device: one OrtValue a
    layer and side.
    """

    def __init__(self, place: Place, shape: Sequence[int]) -> None:
        self.shape, self.dtype = tuple(shape), np.dtype(place.dtype)
        self.itemsize = self.dtype.itemsize
        self._sides = [place.new(shape[1:]) for _ in range(shape[0])]

    def views(self, first: int, count: int) -> list[Any]:
        """Slots first…first+count-1 of every side, on the same memory."""
        return [view(side, first, count) for side in self._sides]

    def copy(self, source: int, to: int, *, of: DeviceBlock | None = None) -> None:
        """Copy a slot (of another block) over another one, inside the device."""
        for old, new in zip((of or self).views(source, 1), self.views(to, 1), strict=True):
            new.update_inplace(old)


class DeviceKVCache:
    """As `KVCache`, on a device."""

    def __init__(self, place: Place, graph: GraphInfo, *, slots: int, capacity: int) -> None:
        self.capacity = capacity
        self.names = [
            f"{layer}.{side}" for layer in range(graph.layers or 0) for side in ("key", "value")
        ]
        self._block = DeviceBlock(
            place, (len(self.names), slots, graph.kv_heads or 0, capacity, graph.head_dim or 0)
        )
        self._values: list[Any] = []

    def bind(self, io: Any, rows: int) -> None:
        """Bind the first `rows` slots as past and as present."""
        self._values = self._block.views(0, rows)
        bind_cache(io, self.names, self._values)

    def keep(self, rows: Sequence[int]) -> None:
        """Move the given rows to the front (ascending order)."""
        for to, source in enumerate(rows):
            if to != source:
                self._block.copy(source, to)

    def take(self, other: DeviceKVCache, rows: Sequence[int]) -> None:
        """Copy rows of another cache of the same capacity into slots 0, 1, …"""
        for to, source in enumerate(rows):
            self._block.copy(source, to, of=other._block)


class OutputBuffer:
    """Where an output of a run arrives: an array of ours, or a device's memory that is read after
    the run.
    """

    def __init__(self, place: Place | None, shape: Sequence[int], kind: str) -> None:
        """`kind`: the output's type as the session says it, such as tensor(float16)."""
        import onnxruntime

        self.array = np.empty(tuple(shape), np.float32)
        self._on_device = place is not None
        self.value = (
            place.new(shape, TYPES[kind])
            if place is not None
            else onnxruntime.OrtValue.ortvalue_from_numpy(self.array)
        )

    def read(self) -> Float32:
        """The output in float32, valid until the next run."""
        if self._on_device:
            self.array[...] = self.value.numpy()
        return self.array


def bind_cache(io: Any, names: Sequence[str], values: Sequence[Any]) -> None:
    """The same memory as past and as present: attention appends in place."""
    for name, value in zip(names, values, strict=True):
        io.bind_ortvalue_input(f"past_key_values.{name}", value)
        io.bind_ortvalue_output(f"present.{name}", value)


class _DLTensor(ctypes.Structure):
    """The head of DLPack's DLManagedTensor (dmlc/dlpack, include/dlpack/dlpack.h)."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


def view(value: Any, first: int, count: int) -> Any:
    """Rows first…first+count-1 of an OrtValue's first axis as an OrtValue on the same memory, which
    it keeps alive.
    """
    import onnxruntime

    shape = value.shape()
    if not 0 <= first <= first + count <= shape[0]:
        raise IndexError(f"rows {first} to {first + count} of {shape[0]}")
    capsule = value.__dlpack__()
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    tensor = _DLTensor.from_address(pointer(capsule, b"dltensor"))
    tensor.data += first * math.prod(shape[1:]) * tensor.bits // 8
    tensor.shape = (ctypes.c_int64 * len(shape))(
        count, *shape[1:]
    )  # not written over: it is the whole value's own
    return onnxruntime.OrtValue.from_dlpack(capsule)
