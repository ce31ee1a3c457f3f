"""Token ids → logits over ONNX Runtime: the cache in place, adapters as bound inputs, a decode step
without copies.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgetune.core.arrays import Float32, Int64
from edgetune.core.errors import InputError
from edgetune.core.text import second_of
from edgetune.devices.host import saturates_int8
from edgetune.runtime.engine.device_memory import DeviceKVCache, OutputBuffer
from edgetune.runtime.engine.session import (
    AdapterRow,
    BoundTensors,
    GraphSession,
    KVCache,
    ort_value,
)

log = logging.getLogger("edgetune.runtime")
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
        if not rows:
            raise InputError("no rows", expected="one prompt at least")
        for i, row in enumerate(rows):
            if not row:
                raise InputError("an empty prompt", where=f"row {i}", expected="one token at least")
            if len(row) > self.graph.max_length:
                limit = f"at most {self.graph.max_length} tokens"
                raise InputError(
                    "the prompt is longer than the context",
                    where=f"row {i}",
                    expected=limit,
                    got=str(len(row)),
                )
            if min(row) < 0 or max(row) >= self.graph.vocab_size:
                limit = f"ids below {self.graph.vocab_size}"
                raise InputError(
                    "a token id outside the vocabulary",
                    where=f"row {i}",
                    expected=limit,
                    got=str(max(row)),
                )


class EncoderEngine(GraphSession):
    """An encoder graph: texts in, pooled states and the head's logits out."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.manifest.precision.activations == "int8" and saturates_int8():
            log.warning(
                "this processor has no VNNI: products of 8-bit integers saturate, and answers are"
                " less exact than where it has; export without --activations int8 for it"
            )
        self._last: list[tuple[BoundTensors, Any]] = []
        """the last run's adapter and what it was bound to: binding fifty inputs anew takes a tenth
        of a short text's time
        """

    def run(
        self,
        rows: Sequence[Sequence[int]],
        adapters: Sequence[AdapterRow] | None = None,
        *,
        pad_token_id: int = 0,
    ) -> tuple[list[Float32], Float32]:
        """Logits (labels of the row's head,) a row, and pooled states (rows, hidden), not
        normalised.

        InputError when a row is empty or longer than the graph's positions.
        """
        chosen = adapter_per_row(rows, adapters)
        logits, pooled = self._run(self._padded(rows, pad_token_id), chosen, ("logits", "pooled"))
        return [
            logits[i, : self._labels(adapter, logits)] for i, adapter in enumerate(chosen)
        ], pooled

    def tokens(
        self,
        rows: Sequence[Sequence[int]],
        adapters: Sequence[AdapterRow] | None = None,
        *,
        pad_token_id: int = 0,
    ) -> tuple[list[Float32], list[Float32]]:
        """The head's logits of every token (tokens, labels), and the tokens' states (tokens,
        hidden), a row each.

        The head is applied here: one graph serves heads that read a text and heads that read its
        tokens. A merged bundle that tags holds it in the graph. InputError as in `run`.
        """
        chosen, head = adapter_per_row(rows, adapters), self.manifest.head
        inputs = self._padded(rows, pad_token_id)
        wanted = ("last_hidden_state",) if head is not None else ("last_hidden_state", "logits")
        found = self._run(inputs, chosen, wanted)
        states = [found[0][i, : len(row)] for i, row in enumerate(rows)]
        if head is None:
            return [found[1][i, : len(row)] for i, row in enumerate(rows)], states
        logits = []
        for adapter, row in zip(chosen, states, strict=True):
            tensors = self._bound(adapter).tensors
            weight, bias = (
                tensors.get(name, self.empty.tensors[name])[0] for name in (head.weight, head.bias)
            )
            logits.append(row @ weight + bias)
        return logits, states

    def _padded(self, rows: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, Int64]:
        """Ids, mask and, where the graph takes them, types (1 in the second text of a row), (rows,
        longest), right-padded.
        """
        limit = self.graph.max_length
        for i, row in enumerate(rows):
            if not 0 < len(row) <= limit:
                raise InputError(
                    "a text of a length the model cannot take",
                    where=f"row {i}",
                    expected=f"1 to {limit} tokens",
                    got=str(len(row)),
                )
        width = max(map(len, rows))
        ids = np.full((len(rows), width), pad_token_id, np.int64)
        mask, types = np.zeros_like(ids), np.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
            if (second := second_of(row)) is not None:
                types[i, second : len(row)] = 1
        return {"input_ids": ids, "attention_mask": mask} | (
            {"token_type_ids": types} if "token_type_ids" in self.inputs else {}
        )

    def _run(
        self, inputs: Mapping[str, Int64], adapters: Sequence[AdapterRow], outputs: Sequence[str]
    ) -> list[Float32]:
        bound = self.group(adapters)
        io = self._binding_of(bound)
        values = {name: ort_value(array) for name, array in inputs.items()}
        for name, value in values.items():
            io.bind_ortvalue_input(name, value)
        for name in outputs:
            io.bind_output(name, "cpu")
        self.run_io(io)
        arrays = [value.numpy() for value in io.get_outputs()]
        io.clear_binding_outputs()
        if bound is self.empty or bound is adapters[0]:  # not what was stacked for this batch alone
            self._last = [(bound, io)]
        del values
        return arrays

    def _binding_of(self, bound: BoundTensors) -> Any:
        """A binding whose adapter inputs are these: the last run's where it used the same, and no
        other thread has it now.
        """
        with contextlib.suppress(IndexError):
            last, io = self._last.pop()
            if last is bound:
                return io
        io = self.session.io_binding()
        self.bind_adapters(io, bound)
        return io

    def _labels(self, adapter: AdapterRow, logits: Float32) -> int:
        """How many of the padded logits belong to this row's head."""
        head = self.manifest.head
        if head is None:
            return int(logits.shape[1])
        tensors = (
            {}
            if adapter is None
            else adapter.tensors
            if isinstance(adapter, BoundTensors)
            else adapter
        )
        bias = tensors.get(head.bias)
        return 0 if bias is None else int(bias.shape[1])


def adapter_per_row(rows: Sequence[Any], adapters: Sequence[AdapterRow] | None) -> list[AdapterRow]:
    """One entry a row; None for all when none are given."""
    chosen: list[AdapterRow] = [None] * len(rows) if adapters is None else list(adapters)
    if len(chosen) != len(rows):
        raise InputError(
            "one adapter (or None) for each row", expected=str(len(rows)), got=str(len(chosen))
        )
    return chosen


def round_up(value: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-value // step) * step
