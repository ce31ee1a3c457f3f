"""One adapter a row: the group tensors of a mixed batch, kept between steps and written only where
a row changes.

A step of n rows takes views on the front of preallocated tensors, A (rows, in, rank) and B (rows,
rank, out). A row that joins copies its adapter once (SmolLM2, r = 8 on all layers: 15 MB); a step
copies nothing. Ranks differ, so a tensor has the largest of its site and the rest is zeros, which
add exactly nothing. Rows that all share one adapter need none of this: they bind that adapter's own
tensors as group 1 (`GraphSession.group`).

A step reads these tensors once, more bytes than the base's own weights, so what counts is how fast
they stream: all of them lie in one block in the order in which the graph reads them, which numpy
asks the system to hold in huge pages.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.core.arrays import Float32
from edgetune.runtime.engine.interface import BoundAdapter
from edgetune.runtime.engine.session import BoundTensors, GraphSession, ort_value, own

Sizes = npt.NDArray[np.int64]
LINE = 16
"""Tensors begin at multiples of this many floats: a cache line."""


class AdapterRows:
    """Group tensors for up to `rows` rows; memory is touched by as many rows as were mixed at
    once.
    """

    def __init__(self, session: GraphSession, rows: int) -> None:
        self.session, self.rows = session, rows
        self._axes = {name: array.ndim - 1 for name, array in session.empty.tensors.items()}
        self._sizes: Sizes = np.zeros((len(self._axes), 2), np.int64)
        self._known_sizes: weakref.WeakKeyDictionary[BoundTensors, Sizes] = (
            weakref.WeakKeyDictionary()
        )
        self._block = MixedBlock({})
        # rows that the tensors have: it doubles as it is needed, because a huge page is used whole
        self._room = 0
        self._occupants: list[
            Any
        ] = []  # weak references: an adapter that was unloaded goes although it was mixed

    @property
    def nbytes(self) -> int:
        """Memory of the rows written so far."""
        written = sum(occupant is not _nobody for occupant in self._occupants)
        return written * 4 * int(self._sizes.prod(axis=1).sum())

    def source(self, adapters: Sequence[BoundAdapter | None]) -> BoundTensors | MixedBlock:
        """Where these rows' tensors are: in the adapter that all share, or in the block, written
        for them here.
        """
        first = adapters[0]
        if all(adapter is first for adapter in adapters):
            return self.session.empty if first is None else own(first)
        self._write(adapters)
        return self._block

    def bind(self, io: Any, source: BoundTensors | MixedBlock, rows: int) -> None:
        """Bind every adapter input for so many rows; the caller keeps the adapter alive, and the
        block is kept here.
        """
        if isinstance(source, BoundTensors):
            self.session.bind_adapters(io, source)
            return
        for name, value in source.values(rows).items():
            io.bind_ortvalue_input(name, value)

    def _write(self, adapters: Sequence[BoundAdapter | None]) -> None:
        empty = self.session.empty
        wanted = [empty if adapter is None else own(adapter) for adapter in adapters]
        self._fit(wanted)
        for row, adapter in enumerate(wanted):
            if self._occupants[row]() is adapter:
                continue
            for name, array in self._block.arrays.items():
                write_padded(array[row], adapter.tensors.get(name, empty.tensors[name])[0])
            self._occupants[row] = weakref.ref(adapter)

    def _fit(self, adapters: Sequence[BoundTensors]) -> None:
        """Make the tensors large enough for these rows, and smaller when less than half of them is
        needed.
        """
        needed = np.max([self._sizes_of(adapter) for adapter in adapters], axis=0)
        fits = len(adapters) <= self._room and (needed <= self._sizes).all()
        if fits and 2 * needed.prod(axis=1).sum() >= self._sizes.prod(axis=1).sum():
            return
        self._sizes, arrays = needed, dict[str, Float32]()
        self._room = max(self._room, min(1 << (len(adapters) - 1).bit_length(), self.rows))
        self._occupants = [_nobody] * self._room
        shapes = [
            (self._room, *size[:axes])
            for size, axes in zip(needed.tolist(), self._axes.values(), strict=True)
        ]
        starts = np.cumsum([0, *(-(-math.prod(shape) // LINE) * LINE for shape in shapes)]).tolist()
        block = np.zeros(starts[-1], np.float32)
        for name, shape, start in zip(self._axes, shapes, starts, strict=False):
            arrays[name] = block[start : start + math.prod(shape)].reshape(shape)
        self._block = MixedBlock(arrays)

    def _sizes_of(self, adapter: BoundTensors) -> Sizes:
        """(inputs, 2): what an adapter needs of each input, without the group; 1 where an input has
        one axis.
        """
        if (known := self._known_sizes.get(adapter)) is None:
            empty = self.session.empty.tensors
            shapes = [adapter.tensors.get(name, array).shape[1:] for name, array in empty.items()]
            known = np.array([(*shape, 1)[:2] for shape in shapes], np.int64)
            self._known_sizes[adapter] = known
        return known


class MixedBlock:
    """Tensors (rows, …) of one allocation, and their fronts as OrtValues, made once for each number
    of rows.
    """

    def __init__(self, arrays: dict[str, Float32]) -> None:
        self.arrays = arrays
        self._values: dict[int, dict[str, Any]] = {}

    def values(self, rows: int) -> dict[str, Any]:
        """The first `rows` rows of every tensor."""
        if rows not in self._values:
            self._values[rows] = {
                name: ort_value(array[:rows]) for name, array in self.arrays.items()
            }
        return self._values[rows]


def _nobody() -> None:
    """What a dead weak reference says, for a row that was never written."""


def write_padded(target: Float32, source: Float32) -> None:
    """Write an array into the corner of a larger one, the rest zeros."""
    if target.shape != source.shape:
        target[...] = 0
    target[tuple(slice(length) for length in source.shape)] = source
