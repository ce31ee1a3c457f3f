"""Token ids → logits by the native engine; to its callers it is a `Decoder` like ONNX Runtime's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from edgetune.core.arrays import Float32, Int64
from edgetune.core.errors import AdapterError, InputError
from edgetune.devices.host import usable_cores
from edgetune.runtime.bundle.manifest import Manifest
from edgetune.runtime.engine.arena_batch import ArenaBatch
from edgetune.runtime.engine.interface import (
    AdapterRow,
    BatchRow,
    BoundAdapter,
    Tensors,
    adapter_per_row,
    check_prompts,
)
from edgetune.runtime.engine.kv_cache import plan_cache
from edgetune.runtime.engine.native.cache import NativeArena, native_graph
from edgetune.runtime.engine.native.model import Memory, NativeAdapter, NativeModel, Piece
from edgetune.runtime.engine.providers import CPU, ProvidersInUse

ROOM = 64
"""Tokens of answer that a row has room for where nobody says how many."""


class NativeDecoder:
    """The native engine over one bundle."""

    def __init__(
        self,
        folder: str | Path,
        manifest: Manifest,
        *,
        threads: int | None = None,
        cache_precision: str = "fp16",
        instructions: str | None = None,
    ) -> None:
        """`threads` None takes every core that this process may use; `cache_precision`: of keys and
        values, fp16 or int8; `instructions`: an instruction set, None: the best that this processor
        has.

        NoLibraryError where the library is missing; BundleError for a plan that it does not take.
        """
        self.manifest, self.graph = manifest, manifest.graph
        self.model = NativeModel(
            Path(folder),
            manifest,
            threads=threads or usable_cores(),
            cache_precision=cache_precision,
            instructions=instructions,
        )
        self.providers_in_use = ProvidersInUse((CPU,))

    def bind(self, tensors: Tensors) -> NativeAdapter:
        """Make an adapter ready for this engine: in half precision."""
        return NativeAdapter(self.model, tensors, self.manifest)

    def swapper(self) -> Callable[[AdapterRow], None]:
        """Nothing is put in place: a row names its adapter. See `Engine`."""

        def swap(adapter: AdapterRow) -> None:
            if adapter is not None:
                self._own(adapter)

        return swap

    def long_lived(self) -> None:
        """Memory is in order from the start."""

    def check(self, rows: Sequence[Sequence[int]]) -> None:
        """InputError when a prompt is empty, holds an unknown id, or is longer than the context."""
        check_prompts(rows, self.graph)

    def start(
        self,
        rows: Sequence[Sequence[int]],
        adapters: Sequence[AdapterRow] | None = None,
        *,
        capacity: int | None = None,
    ) -> tuple[NativeState, Float32]:
        """Read prompts; see `Decoder`."""
        self.check(rows)
        longest = max(map(len, rows))
        limit = max(min(capacity or longest + ROOM, self.graph.max_length), longest)
        state = NativeState(self, self._owned(rows, adapters), limit)
        return state, state.read(rows)

    def logits(
        self,
        rows: Sequence[Sequence[int]],
        adapters: Sequence[AdapterRow] | None = None,
        *,
        positions: Sequence[Sequence[int]] | None = None,
    ) -> list[Float32]:
        """Logits of every position (len, vocab), or of `positions` a row (k, vocab)."""
        self.check(rows)
        results = []
        for i, (row, adapter) in enumerate(zip(rows, self._owned(rows, adapters), strict=True)):
            wanted = range(len(row)) if positions is None else positions[i]
            order = sorted(set(wanted))
            memory = self.model.new_memory(1, len(row))
            out = np.empty((len(order), self.graph.vocab_size), np.float32)
            self._read(memory, row, adapter, order, logits=out)
            places = [order.index(at) for at in wanted] if list(wanted) != order else None
            results.append(out if places is None else out[places])
        return results

    def begin_scores(
        self, rows: Sequence[Sequence[int]], adapters: Sequence[AdapterRow]
    ) -> NativeScoreReading:
        """Read answers for their scores by the adapters' heads. InputError as in `check`."""
        self.check(rows)
        return NativeScoreReading(self, rows, self._owned(rows, adapters))

    def new_batch(
        self, *, rows: int, cache_mb: float | None = None, max_context: int | None = None
    ) -> NativeBatch:
        """See `Decoder`; a quarter of the memory is for shared prefixes."""
        sizes = self.model.sizes
        graph = native_graph(self.graph, sizes)
        plan = plan_cache(graph, rows=rows, cache_mb=cache_mb)
        context = min(graph.max_length, plan.tokens, max_context or plan.tokens)
        arena = NativeArena(
            graph, slots=rows, capacity=context, budget=plan.tokens, step=sizes.cache_step
        )
        return NativeBatch(self, arena, prefix_blocks=plan.prefix_blocks)

    def score_of(self, state: Float32, adapter: NativeAdapter | None) -> float:
        """A reward adapter's head on a token's state (hidden,); InputError for an adapter without
        one.
        """
        head = self.manifest.head
        if head is None or adapter is None or head.weight not in adapter.head:
            raise InputError("this adapter has no score", expected="a reward adapter")
        return float((state @ adapter.head[head.weight][0] + adapter.head[head.bias][0])[0])

    def _read(
        self,
        memory: Memory,
        row: Sequence[int],
        adapter: NativeAdapter | None,
        wanted: Sequence[int],
        *,
        logits: Float32,
    ) -> None:
        """Run a prompt in pieces; write the logits of the positions in `wanted` (ascending)."""
        most, done = self.model.sizes.most_tokens, 0
        for start in range(0, len(row), most):
            piece = row[start : start + most]
            here = [at - start for at in wanted if start <= at < start + len(piece)]
            self.model.run(
                memory,
                [Piece(piece, 0, start, adapter)],
                here,
                logits=logits[done : done + len(here)],
            )
            done += len(here)

    def _owned(
        self, rows: Sequence[Sequence[int]], adapters: Sequence[AdapterRow] | None
    ) -> list[NativeAdapter | None]:
        bound: dict[int, NativeAdapter] = {}
        owned = []
        for adapter in adapter_per_row(rows, adapters):
            if adapter is not None and not isinstance(adapter, BoundAdapter):
                # one and the same tensors are bound once
                adapter = bound.setdefault(id(adapter), self._own(adapter))
            owned.append(None if adapter is None else self._own(adapter))
        return owned

    def _own(self, adapter: AdapterRow) -> NativeAdapter:
        if isinstance(adapter, NativeAdapter):
            if adapter.model is self.model:
                return adapter
        elif adapter is not None and not isinstance(adapter, BoundAdapter):
            return self.bind(adapter)
        raise AdapterError("this adapter was bound for another engine", fix="Bind it again.")


class NativeState:
    """A fixed set of rows that are generated together; see `DecoderState`."""

    def __init__(
        self,
        engine: NativeDecoder,
        adapters: Sequence[NativeAdapter | None],
        limit: int,
        memory: Memory | None = None,
        lengths: Sequence[int] = (),
    ) -> None:
        self.engine, self.adapters, self.limit = engine, list(adapters), limit
        self.memory = engine.model.new_memory(len(adapters), limit) if memory is None else memory
        self.lengths = list(lengths) or [0] * len(adapters)
        self._slots = list(range(len(adapters)))
        self._logits = np.empty((len(adapters), engine.graph.vocab_size), np.float32)

    @property
    def rows(self) -> int:
        """How many rows are still generated."""
        return len(self.adapters)

    def read(self, rows: Sequence[Sequence[int]]) -> Float32:
        """Run the prompts; logits (rows, vocab) after each."""
        model = self.engine.model
        most = model.sizes.most_tokens
        for i, row in enumerate(rows):
            for start in range(0, len(row), most):
                piece = row[start : start + most]
                last = [len(piece) - 1] if start + most >= len(row) else []
                model.run(
                    self.memory,
                    [Piece(piece, self._slots[i], start, self.adapters[i])],
                    last,
                    logits=self._logits[i : i + 1],
                )
            self.lengths[i] = len(row)
        return self._logits

    def step(self, tokens: Sequence[int] | Int64) -> Float32:
        """Append one token to every row; logits (rows, vocab), valid until the next step."""
        if max(self.lengths) >= self.limit:
            raise InputError(
                "the cache is full", expected=f"at most {self.limit} tokens", got="one more"
            )
        ids = tokens.tolist() if isinstance(tokens, np.ndarray) else tokens
        most = self.engine.model.sizes.most_tokens
        for first in range(0, self.rows, most):
            rows = range(first, min(first + most, self.rows))
            self.engine.model.run(
                self.memory,
                [Piece([ids[i]], self._slots[i], self.lengths[i], self.adapters[i]) for i in rows],
                range(len(rows)),
                logits=self._logits[first : first + len(rows)],
            )
        self.lengths = [length + 1 for length in self.lengths]
        return self._logits[: self.rows]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only (ascending)."""
        self._slots = [self._slots[i] for i in rows]
        self.adapters = [self.adapters[i] for i in rows]
        self.lengths = [self.lengths[i] for i in rows]

    def repeat(self, count: int) -> NativeState:
        """A new state in which each row stands `count` times, its prompt already read."""
        rows = [i for i in range(self.rows) for _ in range(count)]
        memory = np.ascontiguousarray(self.memory[:, [self._slots[i] for i in rows]])
        return NativeState(
            self.engine,
            [self.adapters[i] for i in rows],
            self.limit,
            memory,
            [self.lengths[i] for i in rows],
        )


class NativeScoreReading:
    """Answers on their way to their scores, one row after the other; see `ScoreReading`."""

    def __init__(
        self,
        engine: NativeDecoder,
        rows: Sequence[Sequence[int]],
        adapters: Sequence[NativeAdapter | None],
    ) -> None:
        self._engine, self._rows, self._adapters = engine, rows, adapters
        longest = max(map(len, rows))
        self._memory = engine.model.new_memory(1, longest)
        self.tokens = self._memory.shape[3]
        """tokens of cache that it holds until its scores are there"""
        self._states = np.empty((len(rows), engine.graph.hidden_size), np.float32)
        self._row = self._done = 0

    def step(self) -> tuple[Float32, Float32] | None:
        """Read one piece. None before the last; then scores (rows,) and states (rows, hidden)."""
        row, model = self._rows[self._row], self._engine.model
        piece = row[self._done : self._done + model.sizes.most_tokens // 2]
        last = self._done + len(piece) == len(row)
        model.run(
            self._memory,
            [Piece(piece, 0, self._done, self._adapters[self._row])],
            [len(piece) - 1] if last else [],
            states=self._states[self._row : self._row + 1],
        )
        self._done += len(piece)
        if last:
            self._row, self._done = self._row + 1, 0
        if self._row < len(self._rows):
            return None
        scores = [
            self._engine.score_of(state, adapter)
            for state, adapter in zip(self._states, self._adapters, strict=True)
        ]
        return np.array(scores, np.float32), self._states


class NativeBatch(ArenaBatch):
    """Rows of the native engine, each with its own adapter or none."""

    def __init__(self, engine: NativeDecoder, arena: NativeArena, *, prefix_blocks: int) -> None:
        super().__init__(arena, prefix_blocks=prefix_blocks)
        self.engine = engine
        self._logits = np.empty((arena.slots, engine.graph.vocab_size), np.float32)

    def run_piece(self, row: BatchRow, piece: Sequence[int]) -> Float32:
        """See `ArenaBatch`."""
        most, start = self.engine.model.sizes.most_tokens, row.length - len(piece)
        logits = self._logits[:1]
        for at in range(0, len(piece), most):
            part = piece[at : at + most]
            last = [len(part) - 1] if at + most >= len(piece) else []
            self._run([self._piece(row, part, start + at)], last, logits)
        return logits[0]

    def run_step(
        self, rows: Sequence[BatchRow], tokens: Sequence[int], lengths: Sequence[int]
    ) -> Float32:
        """See `ArenaBatch`."""
        pieces = [
            self._piece(row, [token], length - 1)
            for row, token, length in zip(rows, tokens, lengths, strict=True)
        ]
        most = self.engine.model.sizes.most_tokens
        for first in range(0, len(pieces), most):
            part = pieces[first : first + most]
            self._run(part, range(len(part)), self._logits[first : first + len(part)])
        return self._logits[: len(pieces)]

    def run_guesses(self, tokens: Sequence[Sequence[int]]) -> Float32:
        """See `ArenaBatch`."""
        pieces = [
            self._piece(row, own, row.length - len(own))
            for row, own in zip(self.decoding, tokens, strict=True)
        ]
        count = sum(map(len, tokens))
        logits = np.empty((count, self.engine.graph.vocab_size), np.float32)
        self._run(pieces, range(count), logits)
        return logits

    def _piece(self, row: BatchRow, ids: Sequence[int], length: int) -> Piece:
        adapter = row.adapter
        if adapter is not None and not isinstance(adapter, NativeAdapter):
            raise AdapterError("this adapter was bound for another engine", fix="Bind it again.")
        return Piece(ids, row.slot, length, adapter)

    def _run(self, pieces: Sequence[Piece], wanted: Sequence[int], logits: Float32) -> None:
        self.engine.model.run(self.arena.memory, pieces, wanted, logits=logits)
