"""One adapter a row: the group tensors of a mixed batch, kept between steps and written only where a row changes.

A step of n rows takes views on the front of preallocated tensors, A (rows, in, rank) and B (rows, rank, out). A row
that joins copies its adapter once (SmolLM2, r = 8 on all layers: 15 MB); a step copies nothing. Ranks differ, so a
tensor has the largest of its site and the rest is zeros, which add exactly nothing. Rows that all share one adapter
need none of this: they bind that adapter's own tensors as group 1 (`GraphSession.group`).
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.runtime.binding import BoundTensors, GraphSession, ort_value

Float32 = npt.NDArray[np.float32]
Shape = tuple[int, ...]


class AdapterRows:
    """Group tensors for up to `rows` rows; memory is touched by as many rows as were mixed at once."""

    def __init__(self, session: GraphSession, rows: int) -> None:
        self.session, self.rows = session, rows
        self._shapes: dict[str, Shape] = {}
        self._arrays: dict[str, Float32] = {}
        self._occupants: list[Any] = []  # weak references: an adapter that was unloaded goes although it was mixed

    @property
    def nbytes(self) -> int:
        """Memory of the rows written so far."""
        written = sum(occupant is not _nobody for occupant in self._occupants)
        return written * 4 * _elements(self._shapes)

    def bind(self, io: Any, adapters: Sequence[BoundTensors | None]) -> list[Any]:
        """Bind every adapter input for these rows; the caller keeps what is returned alive."""
        first = adapters[0]
        if all(adapter is first for adapter in adapters):
            bound = self.session.empty if first is None else first
            self.session.bind_adapters(io, bound)
            return [bound]
        self._write(adapters)
        values = []
        for name, array in self._arrays.items():
            value = ort_value(array[: len(adapters)])
            io.bind_ortvalue_input(name, value)
            values.append(value)
        return values

    def _write(self, adapters: Sequence[BoundTensors | None]) -> None:
        tensors = [self.session.empty.tensors if a is None else a.tensors for a in adapters]
        self._fit(tensors)
        for row, (adapter, given) in enumerate(zip(adapters, tensors, strict=True)):
            occupant = self.session.empty if adapter is None else adapter
            if self._occupants[row]() is occupant:
                continue
            for name, array in self._arrays.items():
                write_padded(array[row], given.get(name, self.session.empty.tensors[name])[0])
            self._occupants[row] = weakref.ref(occupant)

    def _fit(self, tensors: Sequence[Mapping[str, Float32]]) -> None:
        """Make the tensors large enough for these rows, and smaller when less than half of them is needed."""
        needed = {
            name: tuple(np.max([t.get(name, empty).shape[1:] for t in tensors], axis=0).tolist())
            for name, empty in self.session.empty.tensors.items()
        }
        small = any(n > have for name in needed for n, have in zip(needed[name], self._shapes.get(name, (0, 0)), strict=False))
        if self._shapes and not small and 2 * _elements(needed) >= _elements(self._shapes):
            return
        self._shapes = needed
        self._arrays = {name: np.zeros((self.rows, *shape), np.float32) for name, shape in needed.items()}
        self._occupants = [_nobody] * self.rows


def _nobody() -> None:
    """What a dead weak reference says, for a row that was never written."""


def write_padded(target: Float32, source: Float32) -> None:
    """Write an array into the corner of a larger one, the rest zeros."""
    if target.shape != source.shape:
        target[...] = 0
    target[tuple(slice(length) for length in source.shape)] = source


def _elements(shapes: Mapping[str, Shape]) -> int:
    return sum(int(np.prod(shape)) for shape in shapes.values())
