"""Rows of the engine in one arena: they join by prefill, step together and leave, each with its own
adapter.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from edgetune.core.arrays import Float32, Int64
from edgetune.core.errors import InputError
from edgetune.runtime.engine.interface import BatchRow, BoundAdapter
from edgetune.runtime.engine.kv_cache import CacheArena, PrefixCache, new_arena
from edgetune.runtime.engine.mixed_adapters import AdapterRows
from edgetune.runtime.engine.session import GraphSession, ort_value


class Batch:
    """Rows 0…n-1 are decoded together; one more may be in prefill, alone, because grouped-query
    attention continues a prompt only in a batch of one. Not thread-safe: one thread steps."""

    prefills_in_pieces = checks_guesses = True

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
        self.arena = new_arena(
            engine.graph, slots=rows, capacity=context, budget=budget, place=engine.place
        )
        self.prefixes = PrefixCache(
            self.arena, blocks=prefix_blocks if self.arena.shares_prefixes else 0
        )
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

    @property
    def context(self) -> int:
        """Tokens of prompt and answer that one row may have."""
        return self.arena.capacity

    @property
    def cache_bytes(self) -> int:
        """Memory of keys and values in use: those promised to rows, and shared prefixes."""
        return self.arena.reserved * self.arena.token_bytes + self.prefixes.nbytes

    @property
    def cache_bytes_total(self) -> int:
        """Memory that keys and values may come to."""
        return self.arena.budget * self.arena.token_bytes + self.prefixes.limit_bytes

    @property
    def prefix_hit_tokens(self) -> int:
        """Tokens of prompts that were copied instead of computed, since the start."""
        return self.prefixes.hit_tokens

    @property
    def prefix_evictions(self) -> int:
        """Blocks of shared prefixes that were forgotten to make room, since the start."""
        return self.prefixes.evictions

    def lend(self, tokens: int) -> None:
        """So many tokens of the budget are held by a cache beside the arena; 0: none."""
        self.arena.lent = tokens

    def has_room(self, tokens: int) -> bool:
        """Whether a row that may grow to so many tokens can begin its prefill now."""
        return self.filling is None and self.rows < self.arena.slots and self.arena.fits(tokens)

    def begin(self, adapter: BoundAdapter | None, *, tokens: int) -> BatchRow:
        """Give a row the next slot and room for `tokens` tokens (prompt and answer); `has_room`
        must be true.
        """
        row = self.filling = BatchRow(len(self.decoding), adapter)
        try:
            self.arena.reserve(row.slot, tokens)
            self._prefill = self._bindings.of([adapter], first=row.slot)
        except BaseException:
            self.leave(row)
            raise
        return row

    def restore(self, key: Hashable, prompt: Sequence[int]) -> int:
        """Copy what is known of the beginning of the filling row's prompt; how many tokens."""
        row = self.filling
        assert row is not None
        row.length = self.prefixes.restore(row.slot, key, prompt)
        return row.length

    def prefill(self, piece: Sequence[int]) -> Float32:
        """Run a piece of the filling row's prompt; logits (vocab,) after its last token."""
        row = self.filling
        assert row is not None and self._prefill is not None
        row.length += len(piece)
        return self._prefill.run(np.array([piece], np.int64), [row.length])[0]

    def join(self) -> None:
        """The filling row's prompt is complete: it is decoded with the others from the next step
        on.
        """
        row, self.filling = self.filling, None
        assert row is not None
        self._place(row, len(self.decoding))
        self.decoding.append(row)
        self._step = None

    def step(self, tokens: Sequence[int]) -> Float32:
        """Append one token to every decoded row; logits (rows, vocab), valid until the next
        step.
        """
        return self._append(self._bound_step(), self.decoding, tokens)

    def step_alone(self, row: BatchRow, token: int) -> Float32:
        """Append one token to this decoded row; logits (vocab,), valid until the next step."""
        return self._append(self._bound_alone(row), [row], [token])[0]

    def check(self, tokens: Sequence[int]) -> Float32:
        """Append several tokens to the only decoded row; logits (tokens, vocab) after each, valid
        until the next step.

        Lower the row's `length` afterwards to take back the last ones.
        """
        (row,) = self.decoding
        step = self._bound_step()
        row.length += len(tokens)
        return step.run(np.array([tokens], np.int64), [row.length], every=True)[0]

    def remember(self, row: BatchRow, key: Hashable, tokens: Sequence[int]) -> None:
        """Keep the beginning of a row, which is `tokens`, for prompts that begin alike."""
        self.prefixes.store(row.slot, key, tokens)

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

    def _append(
        self, binding: RowBinding, rows: Sequence[BatchRow], tokens: Sequence[int]
    ) -> Float32:
        """One token more in each row. Where it raises, all rows are as they were."""
        written = [self._written_of(row) for row in rows]
        if max(written) >= self.arena.capacity:
            raise InputError(
                "the cache is full",
                expected=f"at most {self.arena.capacity} tokens",
                got="one more",
            )
        logits = binding.run(np.array(tokens, np.int64)[:, None], [n + 1 for n in written])
        for row in rows:
            row.length += 1
        return logits

    def _written_of(self, row: BatchRow) -> int:
        """Tokens of a row that are in the arena."""
        return row.length

    def _bound_alone(self, row: BatchRow) -> RowBinding:
        return self._bindings.of([row.adapter], first=row.slot)

    def _bound_step(self) -> RowBinding:
        if self._step is None:
            self._step = self._bindings.of([row.adapter for row in self.decoding])
        return self._step

    def _place(self, row: BatchRow, slot: int) -> None:
        if row.slot != slot:
            self.arena.move(row.slot, slot, tokens=row.length)
            row.slot = slot


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
