"""Token ids → logits over ONNX Runtime: the cache in place, adapters as bound inputs, a decode step
without copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgetune.core.arrays import Float32, Int64
from edgetune.core.errors import InputError
from edgetune.runtime.bundle.manifest import SCORE_OUTPUT, STATES
from edgetune.runtime.engine.batch import Batch
from edgetune.runtime.engine.device_memory import DeviceKVCache, OutputBuffer
from edgetune.runtime.engine.interface import AdapterRow, adapter_per_row, check_prompts
from edgetune.runtime.engine.kv_cache import plan_cache
from edgetune.runtime.engine.session import GraphSession, KVCache, ort_value

CACHE_STEP = 64
"""Cache capacity is a multiple of this many tokens."""
PREFILL_CHUNK = 128
"""Tokens of a prompt that go through the graph at once: activations do not grow with the prompt."""


class DecodeState:
    """Rows being decoded: their cache, their lengths, and the bound arrays that a step only writes
    into.
    """

    def __init__(
        self,
        engine: DecoderEngine,
        adapters: Sequence[AdapterRow],
        *,
        capacity: int,
        outputs: Mapping[str, int] | None = None,
    ) -> None:
        """`outputs`: the graph outputs that runs give, by their width; None: the logits."""
        self.engine, self.adapters = engine, list(adapters)
        self._widths = outputs or {"logits": engine.graph.vocab_size}
        self._buffers: dict[str, OutputBuffer] = {}
        self.results: dict[str, Float32] = {}
        """of the last run, (rows, k, width), valid until the next"""
        self.cache: Any = engine.new_cache(slots=len(adapters), capacity=capacity)
        self.limit = min(capacity, engine.graph.max_length)
        self.lengths: Int64 = np.zeros(len(adapters), np.int64)
        self._bind_rows()

    @property
    def rows(self) -> int:
        """How many rows are still being decoded."""
        return len(self.adapters)

    def prefill(self, rows: Sequence[Sequence[int]], *, index: Int64) -> Float32:
        """Run the prompts (right-padded) into the empty cache; logits (rows, k, vocab) at `index`
        (rows, k).
        """
        ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
        self.lengths[:] = [len(row) for row in rows]
        self._bind_shape(ids, np.ascontiguousarray(index))
        return self._run()

    def extend(self, row: Sequence[int]) -> Float32:
        """Append a piece of the only row's prompt after another; logits (1, vocab) after the last
        token.

        One row, because grouped-query attention continues a prompt only in a batch of one.
        """
        for start in range(0, len(row), PREFILL_CHUNK):
            piece = np.array([row[start : start + PREFILL_CHUNK]], np.int64)
            self.lengths += piece.shape[1]
            self._bind_shape(piece, np.full((1, 1), piece.shape[1] - 1, np.int64))
            logits = self._run()
        return logits[:, 0]

    def step(self, tokens: Sequence[int] | Int64) -> Float32:
        """Append one token to every row; logits (rows, vocab), valid until the next step."""
        if self._ids.shape[1] != 1 or self._index.shape[1] != 1:
            self._bind_shape(np.zeros((self.rows, 1), np.int64), np.zeros((self.rows, 1), np.int64))
        if int(self.lengths.max()) >= self.limit:
            raise InputError(
                "the cache is full", expected=f"at most {self.limit} tokens", got="one more"
            )
        self._ids[:, 0] = tokens
        self._index[:] = 0
        self.lengths += 1
        return self._run()[:, 0]

    def repeat(self, count: int) -> DecodeState:
        """A new state in which each row stands `count` times, one after the other, its prompt
        already read.
        """
        state = DecodeState(
            self.engine,
            [a for a in self.adapters for _ in range(count)],
            capacity=self.cache.capacity,
        )
        state.cache.take(self.cache, [row for row in range(self.rows) for _ in range(count)])
        state.lengths[:] = np.repeat(self.lengths, count)
        return state

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only (ascending); the others' slots are free."""
        if len(rows) == self.rows:
            return
        self.cache.keep(rows)
        self.adapters = [self.adapters[i] for i in rows]
        self.lengths = self.lengths[list(rows)]
        self._bind_rows()

    def _bind_rows(self) -> None:
        """Bind what depends on which rows there are: cache, adapters, lengths."""
        self._io = self.engine.session.io_binding()
        self._bound = self.engine.group(self.adapters)
        self.engine.bind_adapters(self._io, self._bound)
        self.cache.bind(self._io, self.rows)
        self._seqlens, self._total = np.zeros(self.rows, np.int32), np.zeros((), np.int32)
        self._changing = {
            "seqlens_k": ort_value(self._seqlens),
            "total_sequence_length": ort_value(self._total),
        }
        for name, value in self._changing.items():
            self._io.bind_ortvalue_input(name, value)
        self._ids = self._index = np.zeros((0, 0), np.int64)

    def _bind_shape(self, ids: Int64, index: Int64) -> None:
        """Bind what depends on how many tokens go in and how many logits come out."""
        self._ids, self._index = ids, index
        self._changing |= {"input_ids": ort_value(ids), "logits_index": ort_value(index)}
        for name in ("input_ids", "logits_index"):
            self._io.bind_ortvalue_input(name, self._changing[name])
        rows, wanted = index.shape
        self._buffers = {
            name: self.engine.output_buffer(name, rows, wanted, width)
            for name, width in self._widths.items()
        }
        for name, buffer in self._buffers.items():
            self._io.bind_ortvalue_output(name, buffer.value)

    def _run(self) -> Float32:
        self._seqlens[:] = self.lengths - 1
        self._total[...] = self.lengths.max()
        self.engine.run_bound(self._io, self._changing)
        self.results = {name: buffer.read() for name, buffer in self._buffers.items()}
        return next(iter(self.results.values()))


class DecoderEngine(GraphSession):
    """A decoder graph: prompts in, logits out, then one token a row and step."""

    def new_cache(self, *, slots: int, capacity: int) -> KVCache | DeviceKVCache:
        """Keys and values where this session wants them."""
        if self.place is not None:
            return DeviceKVCache(self.place, self.graph, slots=slots, capacity=capacity)
        return KVCache(self.graph, slots=slots, capacity=capacity)

    def start(
        self,
        rows: Sequence[Sequence[int]],
        adapters: Sequence[AdapterRow] | None = None,
        *,
        capacity: int | None = None,
    ) -> tuple[DecodeState, Float32]:
        """Prefill a batch; the state for `step` and the logits (rows, vocab) after each prompt's
        last token.

        `capacity`: tokens a row may reach, prompt included; None: up to the next multiple of 64
        with room for 64. InputError when a prompt is empty, holds an unknown id, or is longer than
        the graph's context.
        """
        self.check(rows)
        longest = max(map(len, rows))
        wanted = min(capacity or longest + CACHE_STEP, self.graph.max_length)
        state = DecodeState(
            self,
            adapter_per_row(rows, adapters),
            capacity=round_up(max(wanted, longest), CACHE_STEP),
        )
        if len(rows) == 1:
            return state, state.extend(rows[0])
        last = np.array([[len(row) - 1] for row in rows], np.int64)
        return state, state.prefill(rows, index=last)[:, 0]

    def logits(
        self,
        rows: Sequence[Sequence[int]],
        adapters: Sequence[AdapterRow] | None = None,
        *,
        positions: Sequence[Sequence[int]] | None = None,
    ) -> list[Float32]:
        """Logits of every position (len, vocab), or of `positions` a row (k, vocab), by one
        prefill.
        """
        self.check(rows)
        wanted = (
            [list(range(len(row))) for row in rows]
            if positions is None
            else [list(p) for p in positions]
        )
        index = np.zeros((len(rows), max(map(len, wanted))), np.int64)
        for i, row in enumerate(wanted):
            index[i, : len(row)] = row
        capacity = round_up(max(map(len, rows)), CACHE_STEP)
        state = DecodeState(self, adapter_per_row(rows, adapters), capacity=capacity)
        logits = state.prefill(rows, index=index)
        return [logits[i, : len(row)].copy() for i, row in enumerate(wanted)]

    def begin_scores(
        self, rows: Sequence[Sequence[int]], adapters: Sequence[AdapterRow]
    ) -> GraphScoreReading:
        """Read answers for their scores; InputError as in `check`, and for a graph that gives
        none.
        """
        return GraphScoreReading(self, rows, adapters)

    def new_batch(
        self, *, rows: int, cache_mb: float | None = None, max_context: int | None = None
    ) -> Batch:
        """See `Decoder`; a quarter of the memory is for shared prefixes."""
        plan = plan_cache(self.graph, rows=rows, cache_mb=cache_mb)
        return Batch(
            self,
            rows=rows,
            budget=plan.tokens,
            max_context=max_context,
            prefix_blocks=plan.prefix_blocks,
        )

    def score_of(self, state: Float32, adapter: AdapterRow) -> float:
        """A reward adapter's head on a token's state (hidden,); InputError for an adapter without
        one.
        """
        head, tensors = self.manifest.head, self._bound(adapter).tensors
        if head is None or head.weight not in tensors:
            raise InputError("this adapter has no score", expected="a reward adapter")
        return float((state @ tensors[head.weight][0] + tensors[head.bias][0])[0])

    def check(self, rows: Sequence[Sequence[int]]) -> None:
        """InputError when a prompt is empty, holds an unknown id, or is longer than the graph's
        context.
        """
        check_prompts(rows, self.graph)


class GraphScoreReading:
    """Answers on their way to their scores; see `ScoreReading`.

    Several rows are read at once; a row that stands alone goes through in pieces, so that others
    need not wait for all of it.
    """

    def __init__(
        self, engine: DecoderEngine, rows: Sequence[Sequence[int]], adapters: Sequence[AdapterRow]
    ) -> None:
        engine.check(rows)
        self._engine, self._rows, self._adapters = engine, rows, adapter_per_row(rows, adapters)
        outputs = {STATES: engine.graph.hidden_size} | (
            {} if engine.manifest.head is not None else {SCORE_OUTPUT: 1}
        )
        if missing := [name for name in outputs if name not in engine.outputs]:
            raise InputError(
                f"this bundle's graph gives no {missing[0]}, so nothing can be scored",
                fix="Export it again.",
            )
        capacity = round_up(max(map(len, rows)), CACHE_STEP)
        self.tokens = capacity * len(rows)
        """tokens of cache that it holds until its scores are there"""
        self._state = DecodeState(engine, self._adapters, capacity=capacity, outputs=outputs)
        self._done = 0

    def step(self) -> tuple[Float32, Float32] | None:
        """Read one piece. None before the last; then scores (rows,) and states (rows, hidden)."""
        if len(self._rows) > 1:
            last = np.array([[len(row) - 1] for row in self._rows], np.int64)
            self._state.prefill(self._rows, index=last)
        else:
            piece = self._rows[0][self._done : self._done + PREFILL_CHUNK]
            self._state.extend(piece)
            self._done += len(piece)
            if self._done < len(self._rows[0]):
                return None
        states = self._state.results[STATES][:, 0]
        if self._engine.manifest.head is None:
            return self._state.results[SCORE_OUTPUT][:, 0, 0].copy(), states.copy()
        scores = [
            self._engine.score_of(row, adapter)
            for row, adapter in zip(states, self._adapters, strict=True)
        ]
        return np.array(scores, np.float32), states.copy()


def round_up(value: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-value // step) * step
