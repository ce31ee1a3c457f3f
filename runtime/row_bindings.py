"""Inputs and outputs bound for rows of a batch, kept for the next rows that want the same.

Binding SmolLM2's 120 cache inputs and outputs and 240 adapter inputs takes about half a millisecond. Which memory they name depends on the
slots and on the adapter only, so a request whose adapter was in this slot before finds everything bound: a switch
between resident adapters is a look into a dictionary.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.runtime.adapter_rows import AdapterRows
from edgetune.runtime.arena import CacheArena
from edgetune.runtime.binding import BoundTensors, ort_value
from edgetune.runtime.engine import DecoderEngine

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

KEPT = 32
"""Bindings kept at most. One has room for a step's logits (SmolLM2: 0.2 MB a row) and no memory of an adapter's."""


class RowBindings:
    """The bindings of an arena's rows; the least recently used ones go first."""

    def __init__(self, engine: DecoderEngine, arena: CacheArena, mixed: AdapterRows) -> None:
        self._engine, self._arena, self._mixed = engine, arena, mixed
        self._kept: OrderedDict[tuple[int, int, int], tuple[weakref.ref[Any], RowBinding]] = OrderedDict()

    def of(self, adapters: Sequence[BoundTensors | None], *, first: int = 0) -> RowBinding:
        """Bound for the rows in slots first, first + 1, … with these adapters; the caller keeps the adapters alive."""
        source = self._mixed.source(adapters)
        key = (id(source), first, len(adapters))
        owner, binding = self._kept.pop(key, (None, None))
        if owner is None or binding is None or owner() is not source:  # an id may have had another owner
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

    def __init__(self, engine: DecoderEngine, arena: CacheArena, first: int, count: int) -> None:
        self._engine, self.io = engine, engine.session.io_binding()
        self._cache = arena.bind(self.io, first, count)
        self._seqlens, self._total = np.zeros(count, np.int32), np.zeros((), np.int32)
        self._changing: dict[str, Any] = {}
        for name, array in (("seqlens_k", self._seqlens), ("total_sequence_length", self._total)):
            self._changing[name] = ort_value(array)
            self.io.bind_ortvalue_input(name, self._changing[name])
        self._ids = np.zeros((0, 0), np.int64)

    def run(self, ids: Int64, lengths: Sequence[int], *, every: bool = False) -> Float32:
        """Run tokens (rows, k) that end at the rows' lengths; logits (rows, vocab) after each row's last, or with
        `every` (rows, k, vocab) after each."""
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
        """Bind what depends on how many tokens go in and how many logits (the last ones') come out."""
        self._ids = ids.copy()
        places = np.arange(ids.shape[1] - wanted, ids.shape[1], dtype=np.int64)
        index = np.repeat(places[None], len(ids), axis=0)
        self._logits = self._engine.output_buffer("logits", len(ids), wanted, self._engine.graph.vocab_size)
        for name, array in (("input_ids", self._ids), ("logits_index", index)):
            self._changing[name] = ort_value(array)
            self.io.bind_ortvalue_input(name, self._changing[name])
        self.io.bind_ortvalue_output("logits", self._logits.value)
