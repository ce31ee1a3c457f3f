"""Rows of the engine in one arena: they join by prefill, step together and leave, each with its own adapter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgetune.errors import InputError
from edgetune.runtime.adapter_rows import AdapterRows
from edgetune.runtime.arena import new_arena
from edgetune.runtime.binding import BoundTensors
from edgetune.runtime.engine import DecoderEngine
from edgetune.runtime.row_bindings import RowBinding, RowBindings

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]


class BatchRow:
    """One row: `length` tokens of it are in the cache; `slot` may change when another row leaves."""

    def __init__(self, slot: int, adapter: BoundTensors | None) -> None:
        self.slot, self.adapter, self.length = slot, adapter, 0


class Batch:
    """Rows 0…n-1 are decoded together; one more may be in prefill, alone, because grouped-query attention continues
    a prompt only in a batch of one. Not thread-safe: one thread steps."""

    def __init__(
        self, engine: DecoderEngine, *, rows: int, budget: int, max_context: int | None = None
    ) -> None:
        """`rows` at once at most; `budget`: tokens of cache over all of them; `max_context`: tokens of one."""
        self.engine = engine
        context = min(engine.graph.max_length, budget, max_context or budget)
        self.arena = new_arena(engine.graph, slots=rows, capacity=context, budget=budget, place=engine.place)
        self.decoding: list[BatchRow] = []
        self.filling: BatchRow | None = None
        self._adapters = AdapterRows(engine, rows)
        self._bindings = RowBindings(engine, self.arena, self._adapters)
        self._prefill: RowBinding | None = None
        self._step: RowBinding | None = None  # none: rows joined or left since the last step

    @property
    def rows(self) -> int:
        """Rows in decode and prefill."""
        return len(self.decoding) + (self.filling is not None)

    def has_room(self, tokens: int) -> bool:
        """Whether a row that may grow to so many tokens can begin its prefill now."""
        return self.filling is None and self.rows < self.arena.slots and self.arena.fits(tokens)

    def begin(self, adapter: BoundTensors | None, *, tokens: int) -> BatchRow:
        """Give a row the next slot and room for `tokens` tokens (prompt and answer); `has_room` must be true."""
        row = self.filling = BatchRow(len(self.decoding), adapter)
        try:
            self.arena.reserve(row.slot, tokens)
            self._prefill = self._bindings.of([adapter], first=row.slot)
        except BaseException:
            self.leave(row)
            raise
        return row

    def prefill(self, piece: Sequence[int]) -> Float32:
        """Run a piece of the filling row's prompt; logits (vocab,) after its last token."""
        row = self.filling
        assert row is not None and self._prefill is not None
        row.length += len(piece)
        return self._prefill.run(np.array([piece], np.int64), [row.length])[0]

    def join(self) -> None:
        """The filling row's prompt is complete: it is decoded with the others from the next step on."""
        row, self.filling = self.filling, None
        assert row is not None
        self._place(row, len(self.decoding))
        self.decoding.append(row)
        self._step = None

    def step(self, tokens: Sequence[int]) -> Float32:
        """Append one token to every decoded row; logits (rows, vocab), valid until the next step."""
        step = self._bound_step()
        for row in self.decoding:
            if row.length >= self.arena.capacity:
                raise InputError("the cache is full", expected=f"at most {self.arena.capacity} tokens", got="one more")
            row.length += 1
        return step.run(np.array(tokens, np.int64)[:, None], [row.length for row in self.decoding])

    def check(self, tokens: Sequence[int]) -> Float32:
        """Append several tokens to the only decoded row; logits (tokens, vocab) after each, valid until the next step.

        Lower the row's `length` afterwards to take back the last ones.
        """
        (row,) = self.decoding
        step = self._bound_step()
        row.length += len(tokens)
        return step.run(np.array([tokens], np.int64), [row.length], every=True)[0]

    def leave(self, row: BatchRow) -> None:
        """End a row; the last one takes its slot."""
        self.arena.free(row.slot)
        if row is self.filling:
            self.filling = None
            return
        place = self.decoding.index(row)
        last = self.decoding.pop()
        if last is not row:
            self.decoding[place] = last
            self._place(last, place)
        self._step = None

    def _bound_step(self) -> RowBinding:
        if self._step is None:
            self._step = self._bindings.of([row.adapter for row in self.decoding])
        return self._step

    def _place(self, row: BatchRow, slot: int) -> None:
        if row.slot != slot:
            self.arena.move(row.slot, slot, tokens=row.length)
            row.slot = slot
