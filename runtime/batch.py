"""Rows of the engine in one arena: they join by prefill, step together and leave, each with its own adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.errors import InputError
from edgetune.runtime.adapter_rows import AdapterRows
from edgetune.runtime.arena import new_arena
from edgetune.runtime.binding import BoundTensors, ort_value
from edgetune.runtime.engine import DecoderEngine

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
        self._step = _Binding(self)
        self._prefill = _Binding(self)

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
            self._prefill.bind_rows([row], mixed=None)
        except BaseException:
            self.leave(row)
            raise
        return row

    def prefill(self, piece: Sequence[int]) -> Float32:
        """Run a piece of the filling row's prompt; logits (vocab,) after its last token."""
        row = self.filling
        assert row is not None
        row.length += len(piece)
        return self._prefill.run(np.array([piece], np.int64), [row])[0]

    def join(self) -> None:
        """The filling row's prompt is complete: it is decoded with the others from the next step on."""
        row, self.filling = self.filling, None
        assert row is not None
        self._place(row, len(self.decoding))
        self.decoding.append(row)
        self._step.stale = True

    def step(self, tokens: Sequence[int]) -> Float32:
        """Append one token to every decoded row; logits (rows, vocab), valid until the next step."""
        if self._step.stale:
            self._step.bind_rows(self.decoding, mixed=self._adapters)
        for row in self.decoding:
            if row.length >= self.arena.capacity:
                raise InputError("the cache is full", expected=f"at most {self.arena.capacity} tokens", got="one more")
            row.length += 1
        return self._step.run(np.array(tokens, np.int64)[:, None], self.decoding)

    def check(self, tokens: Sequence[int]) -> Float32:
        """Append several tokens to the only decoded row; logits (tokens, vocab) after each, valid until the next step.

        Lower the row's `length` afterwards to take back the last ones.
        """
        (row,) = self.decoding
        if self._step.stale:
            self._step.bind_rows(self.decoding, mixed=self._adapters)
        row.length += len(tokens)
        return self._step.run(np.array([tokens], np.int64), self.decoding, every=True)[0]

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
        self._step.stale = True

    def _place(self, row: BatchRow, slot: int) -> None:
        if row.slot != slot:
            self.arena.move(row.slot, slot, tokens=row.length)
            row.slot = slot


class _Binding:
    """Inputs and outputs bound for one set of rows; running it only writes into them."""

    def __init__(self, batch: Batch) -> None:
        self.batch, self.stale = batch, True
        self._ids = np.zeros((0, 0), np.int64)

    def bind_rows(self, rows: Sequence[BatchRow], *, mixed: AdapterRows | None) -> None:
        """Bind what depends on which rows there are: cache, adapters, lengths."""
        engine = self.batch.engine
        self._io = engine.session.io_binding()
        self._kept = self.batch.arena.bind(self._io, rows[0].slot, len(rows))
        if mixed is not None:
            self._kept += mixed.bind(self._io, [row.adapter for row in rows])
        else:
            bound = engine.empty if rows[0].adapter is None else rows[0].adapter
            engine.bind_adapters(self._io, bound)
            self._kept.append(bound)
        self._seqlens, self._total = np.zeros(len(rows), np.int32), np.zeros((), np.int32)
        self._changing: dict[str, Any] = {}
        for name, array in (("seqlens_k", self._seqlens), ("total_sequence_length", self._total)):
            self._changing[name] = ort_value(array)
            self._io.bind_ortvalue_input(name, self._changing[name])
        self._ids = np.zeros((0, 0), np.int64)
        self.stale = False

    def run(self, ids: Int64, rows: Sequence[BatchRow], *, every: bool = False) -> Float32:
        """Run tokens (rows, k) that end at the rows' lengths; logits (rows, vocab) after each row's last, or with
        `every` (rows, k, vocab) after each."""
        wanted = ids.shape[1] if every else 1
        if ids.shape != self._ids.shape or wanted != self._logits.array.shape[1]:
            self._bind_shape(ids, wanted)
        self._ids[...] = ids
        lengths = [row.length for row in rows]
        self._seqlens[:] = np.array(lengths) - 1
        self._total[...] = max(lengths)
        self.batch.engine.run_bound(self._io, self._changing)
        logits = self._logits.read()
        return logits if every else logits[:, 0]

    def _bind_shape(self, ids: Int64, wanted: int) -> None:
        """Bind what depends on how many tokens go in and how many logits (the last ones') come out."""
        self._ids = ids.copy()
        places = np.arange(ids.shape[1] - wanted, ids.shape[1], dtype=np.int64)
        index = np.repeat(places[None], len(ids), axis=0)
        self._logits = self.batch.engine.output_buffer("logits", len(ids), wanted, self.batch.engine.graph.vocab_size)
        for name, array in (("input_ids", self._ids), ("logits_index", index)):
            self._changing[name] = ort_value(array)
            self._io.bind_ortvalue_input(name, self._changing[name])
        self._io.bind_ortvalue_output("logits", self._logits.value)
