"""Rows of ONNX Runtime's engine, bound: inputs and outputs that a run only writes into."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgetune.core.arrays import Float32, Int64
from edgetune.runtime.engine.arena_batch import ArenaBatch
from edgetune.runtime.engine.interface import BatchRow, BoundAdapter
from edgetune.runtime.engine.kv_cache import CacheArena, new_arena
from edgetune.runtime.engine.mixed_adapters import AdapterRows
from edgetune.runtime.engine.session import GraphSession, ort_value


class Batch(ArenaBatch):
    """Rows of ONNX Runtime's engine. One row at a time is in prefill, alone, because grouped-query
    attention continues a prompt only in a batch of one.
    """

    checks_together = False

    def __init__(
        self,
        engine: GraphSession,
        *,
        rows: int,
        budget: int,
        max_context: int | None = None,
        prefix_blocks: int = 0,
    ) -> None:
        """`rows` at once at most; `budget`: tokens of cache over all of them; `max_context`: tokens
        of one; `prefix_blocks`: blocks of shared prefixes, where the cache can share any.
        """
        self.engine = engine
        context = min(engine.graph.max_length, budget, max_context or budget)
        arena = new_arena(
            engine.graph, slots=rows, capacity=context, budget=budget, place=engine.place
        )
        super().__init__(arena, prefix_blocks=prefix_blocks)
        self._adapters = AdapterRows(engine, rows)
        self._bindings = RowBindings(engine, arena, self._adapters)
        self._prefill: RowBinding | None = None
        self._step: RowBinding | None = None  # none: rows joined or left since the last step

    def begun(self, row: BatchRow) -> None:
        """Bind the row that is in prefill."""
        self._prefill = self._bindings.of([row.adapter], first=row.slot)

    def rows_changed(self) -> None:
        """The rows of the next step are bound anew."""
        self._step = None

    def run_piece(self, row: BatchRow, piece: Sequence[int]) -> Float32:
        """See `ArenaBatch`."""
        assert self._prefill is not None
        return self._prefill.run(np.array([piece], np.int64), [row.length])[0]

    def run_step(
        self, rows: Sequence[BatchRow], tokens: Sequence[int], lengths: Sequence[int]
    ) -> Float32:
        """See `ArenaBatch`."""
        together = rows is self.decoding
        binding = self._bound_step() if together else self._bound_alone(rows[0])
        return binding.run(np.array(tokens, np.int64)[:, None], lengths)

    def run_guesses(self, tokens: Sequence[Sequence[int]]) -> Float32:
        """See `ArenaBatch`; of one row."""
        (row,), (own,) = self.decoding, tokens
        return self._bound_step().run(np.array([own], np.int64), [row.length], every=True)[0]

    def _bound_alone(self, row: BatchRow) -> RowBinding:
        return self._bindings.of([row.adapter], first=row.slot)

    def _bound_step(self) -> RowBinding:
        if self._step is None:
            self._step = self._bindings.of([row.adapter for row in self.decoding])
        return self._step


KEPT = 32
"""Bindings kept at most. One has room for a step's logits (SmolLM2: 0.2 MB a row) and no memory of
an adapter's.
"""


class RowBindings:
    """The bindings of an arena's rows; the least recently used ones go first."""

    def __init__(self, engine: GraphSession, arena: CacheArena, mixed: AdapterRows) -> None:
        self._engine, self._arena, self._mixed = engine, arena, mixed
        self._kept: OrderedDict[tuple[int, int, int], tuple[weakref.ref[Any], RowBinding]] = (
            OrderedDict()
        )

    def of(self, adapters: Sequence[BoundAdapter | None], *, first: int = 0) -> RowBinding:
        """Bound for the rows in slots first, first + 1, … with these adapters; the caller keeps the
        adapters alive.
        """
        source = self._mixed.source(adapters)
        key = (id(source), first, len(adapters))
        owner, binding = self._kept.pop(key, (None, None))
        if (
            owner is None or binding is None or owner() is not source
        ):  # an id may have had another owner
            binding = RowBinding(self._engine, self._arena, first, len(adapters))
            self._mixed.bind(binding.io, source, len(adapters))
            self._forget_the_dead()
        self._kept[key] = (weakref.ref(source), binding)
        return binding

    def _forget_the_dead(self) -> None:
        """Bindings of adapters that were unloaded, and the oldest beyond `KEPT`."""
        for key in [key for key, (owner, _) in self._kept.items() if owner() is None]:
            del self._kept[key]
        while len(self._kept) >= KEPT:
            self._kept.popitem(last=False)


class RowBinding:
    """Inputs and outputs bound for `count` slots from `first`; running it only writes into them.

    The memory of the adapters it names is not its own: it runs only while they live.
    """

    def __init__(self, engine: GraphSession, arena: CacheArena, first: int, count: int) -> None:
        self._engine, self.io = engine, engine.session.io_binding()
        self._cache = arena.bind(self.io, first, count)
        self._seqlens, self._total = np.zeros(count, np.int32), np.zeros((), np.int32)
        self._changing: dict[str, Any] = {}
        for name, array in (("seqlens_k", self._seqlens), ("total_sequence_length", self._total)):
            self._changing[name] = ort_value(array)
            self.io.bind_ortvalue_input(name, self._changing[name])
        self._ids = np.zeros((0, 0), np.int64)

    def run(self, ids: Int64, lengths: Sequence[int], *, every: bool = False) -> Float32:
        """Run tokens (rows, k) that end at the rows' lengths; logits (rows, vocab) after each row's
        last, or with `every` (rows, k, vocab) after each."""
        wanted = ids.shape[1] if every else 1
        if ids.shape != self._ids.shape or wanted != self._logits.array.shape[1]:
            self._bind_shape(ids, wanted)
        self._ids[...] = ids
        self._seqlens[:] = np.array(lengths) - 1
        self._total[...] = max(lengths)
        self._engine.run_bound(self.io, self._changing)
        logits = self._logits.read()
        return logits if every else logits[:, 0]

    def _bind_shape(self, ids: Int64, wanted: int) -> None:
        """Bind what depends on how many tokens go in and how many logits (the last ones')
        come out.
        """
        self._ids = ids.copy()
        places = np.arange(ids.shape[1] - wanted, ids.shape[1], dtype=np.int64)
        index = np.repeat(places[None], len(ids), axis=0)
        self._logits = self._engine.output_buffer(
            "logits", len(ids), wanted, self._engine.graph.vocab_size
        )
        for name, array in (("input_ids", self._ids), ("logits_index", index)):
            self._changing[name] = ort_value(array)
            self.io.bind_ortvalue_input(name, self._changing[name])
        self.io.bind_ortvalue_output("logits", self._logits.value)
