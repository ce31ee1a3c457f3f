"""Rows of an encoder-decoder in one arena: each is read by the encoder when it begins, then stepped with the others.

To the loop a row's `length` is that of prompt and answer, as in a decoder; in the arena there is the answer alone. The
prompts' own keys and values lie beside it, padded to the longest of the rows that are decoded, and are put together anew
when a row joins or leaves: a copy of all of them, once in a row's life twice (T5-small: 25 kB a token of prompt).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgetune.errors import InputError
from edgetune.runtime.batch import Batch, BatchRow, Float32
from edgetune.runtime.binding import BoundTensors
from edgetune.runtime.counters import Counters
from edgetune.runtime.decode_loop import DecodeLoop
from edgetune.runtime.row_bindings import RowBinding
from edgetune.runtime.seq2seq import Seq2SeqEngine, Sources

__all__ = ["Seq2SeqBatch", "Seq2SeqLoop"]


class Seq2SeqBatch(Batch):
    """See `Batch`. Of the budget half at least is left for answers: a context is at most half of it."""

    engine: Seq2SeqEngine

    def __init__(self, engine: Seq2SeqEngine, *, rows: int, budget: int, max_context: int | None = None) -> None:
        context = max(1, min(max_context or engine.graph.max_length, budget // 2))
        super().__init__(engine, rows=rows, budget=budget, max_context=context)
        self.budget = budget
        self._promised: dict[BatchRow, int] = {}
        self._sources: dict[BatchRow, Sources] = {}
        self._written: dict[BatchRow, int] = {}
        """tokens of a row that are in the arena, the start token included"""
        self._together: Sources | None = None  # of the rows that are decoded, kept because it is bound

    def has_room(self, tokens: int) -> bool:
        """Whether a row with so many tokens of prompt and answer can begin now."""
        return self.filling is None and self.rows < self.arena.slots and self.promised + tokens <= self.budget

    @property
    def promised(self) -> int:
        """Tokens of prompts and answers that the rows may come to."""
        return sum(self._promised.values())

    def begin(self, adapter: BoundTensors | None, *, tokens: int) -> BatchRow:
        """Give a row the next slot; its prompt takes no place there."""
        row = super().begin(adapter, tokens=min(tokens, self.arena.capacity))
        self._promised[row] = tokens
        return row

    def prefill(self, piece: Sequence[int]) -> Float32:
        """Read the filling row's whole prompt; logits (vocab,) of its answer's first token."""
        row = self.filling
        assert row is not None and self._prefill is not None
        source = self.engine.read([list(piece)], [row.adapter])
        self._sources[row], self._written[row] = source, 1
        row.length += len(piece)
        source.bind(self._prefill.io)
        return self._prefill.run(np.array([[self.engine.start_token_id]], np.int64), [1])[0]

    def step(self, tokens: Sequence[int]) -> Float32:
        """Append one token to every decoded row; logits (rows, vocab), valid until the next step."""
        step = self._bound_step()
        for row in self.decoding:
            if self._written[row] >= self.arena.capacity:
                raise InputError("the cache is full", expected=f"at most {self.arena.capacity} tokens", got="one more")
            self._written[row] += 1
            row.length += 1
        return step.run(np.array(tokens, np.int64)[:, None], [self._written[row] for row in self.decoding])

    def check(self, tokens: Sequence[int]) -> Float32:
        """Not of an encoder-decoder."""
        raise InputError("an encoder-decoder guesses no tokens", fix="Set lookup = 0.")

    def leave(self, row: BatchRow) -> None:
        """End a row; the last one takes its slot."""
        super().leave(row)
        for known in (self._promised, self._sources, self._written):
            known.pop(row, None)  # type: ignore[attr-defined]

    def _bound_step(self) -> RowBinding:
        if self._step is None:
            together = put_together([self._sources[row] for row in self.decoding])
            step = super()._bound_step()
            together.bind(step.io)
            self._together = together
            return step
        return self._step


class Seq2SeqLoop(DecodeLoop):
    """See `DecodeLoop`. A prompt goes through the encoder in one piece, and none is shared: an adapter changes all of it."""

    def __init__(self, engine: Any, counters: Counters, *, lookup: int = 0, prefix_blocks: int = 0, **sizes: Any) -> None:
        if lookup:
            raise InputError("an encoder-decoder guesses no tokens", expected="lookup 0", got=str(lookup))
        super().__init__(engine, counters, lookup=0, prefix_blocks=0, **sizes)

    @property
    def cache_bytes(self) -> int:
        """Memory of keys and values in use, of prompts and of answers."""
        batch: Any = self.batch
        return int(batch.promised) * self.batch.arena.token_bytes

    def _new_batch(self, engine: Any, *, rows: int, budget: int, max_context: int | None) -> Batch:
        return Seq2SeqBatch(engine, rows=rows, budget=budget, max_context=max_context)

    def _prefill(self, tokens: int) -> None:
        assert self.filling is not None
        super()._prefill(max(tokens, len(self.filling.request.prompt_ids)))


def put_together(sources: Sequence[Sources]) -> Sources:
    """Prompts that were read one by one as rows of one batch, padded on the right to the longest."""
    if len(sources) == 1:
        return sources[0]
    arrays = {}
    for name in sources[0].arrays:
        rows = [source.arrays[name][0] for source in sources]
        shape = np.max([row.shape for row in rows], axis=0)
        stacked = np.zeros((len(rows), *shape), rows[0].dtype)
        for place, row in zip(stacked, rows, strict=True):
            place[tuple(slice(length) for length in row.shape)] = row
        arrays[name] = stacked
    return Sources(arrays)
