"""An encoder-decoder over ONNX Runtime: the prompt is read once, then a decoder writes the answer
with a cache of its own.

To its callers it is a decoder (`DecoderEngine`): prompts in, logits out, then one token a row and
step. What differs is that a prompt is no part of the decoder's text: a row of its cache begins with
the start token, whatever the prompt's length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.core.arrays import Float32
from edgetune.core.errors import BundleError, InputError
from edgetune.runtime.bundle.manifest import Manifest
from edgetune.runtime.engine.batch import Batch, RowBinding
from edgetune.runtime.engine.decoder import CACHE_STEP, DecoderEngine, DecodeState, round_up
from edgetune.runtime.engine.interface import AdapterRow, BatchRow, BoundAdapter, adapter_per_row
from edgetune.runtime.engine.kv_cache import plan_cache
from edgetune.runtime.engine.providers import CPU
from edgetune.runtime.engine.session import GraphSession, ort_value

PRESENT, CROSS, MASK = "cross_present", "cross_past", "encoder_attention_mask"


class Sources:
    """Prompts that were read: for each layer of the decoder keys and values (rows, heads, longest,
    head_dim), and the mask (rows, longest) of their tokens."""

    def __init__(
        self, arrays: Mapping[str, npt.NDArray[Any]], values: Mapping[str, Any] | None = None
    ) -> None:
        self.arrays = dict(arrays)
        self.values = dict(values or {name: ort_value(array) for name, array in arrays.items()})

    def take(self, rows: Sequence[int]) -> Sources:
        """These rows, in this order."""
        return Sources(
            {name: np.ascontiguousarray(array[list(rows)]) for name, array in self.arrays.items()}
        )

    def bind(self, io: Any) -> None:
        """Bind all of it as inputs of the decoder; whoever runs it keeps this object."""
        for name, value in self.values.items():
            io.bind_ortvalue_input(name, value)


class SourceEncoder(GraphSession):
    """The graph that reads prompts."""

    def read(self, rows: Sequence[Sequence[int]], adapters: Sequence[AdapterRow]) -> Sources:
        """Right-padded to the longest; padding is seen by nobody."""
        ids = np.full(
            (len(rows), max(map(len, rows))), self.manifest.tokenizer.pad_token_id or 0, np.int64
        )
        mask = np.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        io, bound = self.session.io_binding(), self.group(adapters)
        inputs = {"input_ids": ort_value(ids), "attention_mask": ort_value(mask)}
        for name, value in inputs.items():
            io.bind_ortvalue_input(name, value)
        self.bind_adapters(io, bound)
        for name in self.outputs:
            io.bind_output(name, "cpu")
        self.session.run_with_iobinding(io)
        found = dict(
            zip(
                (name.replace(PRESENT, CROSS, 1) for name in self.outputs),
                io.get_outputs(),
                strict=True,
            )
        )
        arrays = {name: value.numpy() for name, value in found.items()}
        return Sources(arrays | {MASK: mask}, found | {MASK: inputs["attention_mask"]})


class Seq2SeqState(DecodeState):
    """Answers being written: a decoder's rows, each with the prompt that it answers."""

    engine: Seq2SeqEngine

    def __init__(
        self,
        engine: Seq2SeqEngine,
        adapters: Sequence[AdapterRow],
        *,
        sources: Sources,
        capacity: int,
    ) -> None:
        self.sources = sources
        super().__init__(engine, adapters, capacity=capacity)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only (ascending); the others' prompts are forgotten."""
        if len(rows) < self.rows:
            self.sources = self.sources.take(rows)
        super().keep(rows)

    def repeat(self, count: int) -> Seq2SeqState:
        """A new state in which each row stands `count` times, one after the other, its prompt
        already read.
        """
        places = [row for row in range(self.rows) for _ in range(count)]
        adapters = [self.adapters[row] for row in places]
        state = Seq2SeqState(
            self.engine, adapters, sources=self.sources.take(places), capacity=self.cache.capacity
        )
        state.cache.take(self.cache, places)
        state.lengths[:] = self.lengths[places]
        return state

    def _bind_rows(self) -> None:
        super()._bind_rows()
        self.sources.bind(self._io)


class Seq2SeqEngine(DecoderEngine):
    """Two graphs over the same weights. Rows of a batch may use different adapters, in both."""

    def __init__(
        self,
        folder: str | Path,
        manifest: Manifest,
        *,
        threads: int | None = None,
        providers: Sequence[str] = (),
    ) -> None:
        """As any engine; InputError for another execution provider than the CPU, BundleError for a
        manifest without its parts.
        """
        graph = manifest.graph
        if graph.encoder is None or graph.start_token_id is None:
            raise BundleError(
                "the manifest of an encoder-decoder lacks its encoder or start token",
                where=str(folder),
                fix="Export it again.",
            )
        inside = tuple(site for site in manifest.sites if site.graph is None)
        super().__init__(
            folder, replace(manifest, sites=inside), threads=threads, providers=providers
        )
        outside = tuple(site for site in manifest.sites if site.graph is not None)
        reads = replace(manifest, sites=outside, graph=replace(graph, engine=graph.encoder))
        self.encoder = SourceEncoder(folder, reads, threads=threads, providers=providers)
        self.manifest, self.start_token_id = manifest, graph.start_token_id
        if {*self.providers_in_use.names, *self.encoder.providers_in_use.names} != {CPU}:
            raise InputError(
                "an encoder-decoder bundle runs on the CPU only",
                expected="no --provider",
                got=", ".join(providers),
            )
        for session in (
            self,
            self.encoder,
        ):  # an adapter's tensors come in one piece; each graph takes its own
            session._known |= {name for site in manifest.sites for name in (site.A, site.B)}

    def read(self, rows: Sequence[Sequence[int]], adapters: Sequence[AdapterRow]) -> Sources:
        """Prompts as the decoder attends to them. InputError for one that is empty, too long or
        holds an unknown id.
        """
        self.check(rows)
        return self.encoder.read(rows, adapters)

    def start(
        self,
        rows: Sequence[Sequence[int]],
        adapters: Sequence[AdapterRow] | None = None,
        *,
        capacity: int | None = None,
    ) -> tuple[Seq2SeqState, Float32]:
        """Read a batch of prompts; the state for `step`, and the logits (rows, vocab) of each
        answer's first token.

        `capacity`: tokens of an answer, its start token included; None: 64. InputError as in
        `read`.
        """
        state = self._state(rows, adapters, capacity=capacity or CACHE_STEP)
        begin = [[self.start_token_id]] * len(rows)
        return state, state.prefill(begin, index=np.zeros((len(rows), 1), np.int64))[:, 0]

    def swapper(self) -> Callable[[AdapterRow], None]:
        """What binds another adapter in both graphs; see `Engine`."""
        halves = [super().swapper(), self.encoder.swapper()]

        def swap(adapter: AdapterRow) -> None:
            for half in halves:
                half(adapter)

        return swap

    def answer_logits(
        self,
        rows: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        adapters: Sequence[AdapterRow] | None = None,
    ) -> tuple[Seq2SeqState, list[Float32]]:
        """Logits (len + 1, vocab) of each token of given answers and of the one after: all go
        through the decoder at once, and the state goes on after them."""
        longest = max(map(len, answers)) + 1
        state = self._state(rows, adapters, capacity=longest + CACHE_STEP)
        index = np.tile(np.arange(longest), (len(rows), 1))
        logits = state.prefill([[self.start_token_id, *answer] for answer in answers], index=index)
        return state, [logits[i, : len(answer) + 1].copy() for i, answer in enumerate(answers)]

    def logits(
        self,
        rows: Sequence[Sequence[int]],
        adapters: Sequence[AdapterRow] | None = None,
        *,
        positions: Sequence[Sequence[int]] | None = None,
    ) -> list[Float32]:
        """Not of an encoder-decoder: the tokens of a prompt have no logits. See `answer_logits`."""
        raise InputError(
            "an encoder-decoder does not predict its prompt",
            expected="a decoder",
            fix="Measure its answers.",
        )

    def new_batch(
        self, *, rows: int, cache_mb: float | None = None, max_context: int | None = None
    ) -> Seq2SeqBatch:
        """See `Decoder`. A row is two texts, each as long as the context at most, and no prefix is
        shared: an adapter changes all of a prompt.
        """
        budget = plan_cache(self.graph, rows=2 * rows, cache_mb=cache_mb).tokens
        return Seq2SeqBatch(self, rows=rows, budget=budget, max_context=max_context)

    def _state(
        self, rows: Sequence[Sequence[int]], adapters: Sequence[AdapterRow] | None, *, capacity: int
    ) -> Seq2SeqState:
        chosen = adapter_per_row(rows, adapters)
        room = round_up(min(capacity, self.graph.max_length), CACHE_STEP)
        return Seq2SeqState(self, chosen, sources=self.read(rows, chosen), capacity=room)


def decoder_engine(
    folder: str | Path,
    manifest: Manifest,
    *,
    threads: int | None = None,
    providers: Sequence[str] = (),
) -> DecoderEngine:
    """The engine of a bundle that generates text; see `GraphSession` for the arguments."""
    if manifest.graph.encoder is not None:
        return Seq2SeqEngine(folder, manifest, threads=threads, providers=providers)
    return DecoderEngine(folder, manifest, threads=threads, providers=providers)


class Seq2SeqBatch(Batch):
    """See `Batch`. Of the budget half at least is left for answers: a context is at most half of
    it.
    """

    engine: Seq2SeqEngine
    prefills_in_pieces = checks_guesses = False

    def __init__(
        self, engine: Seq2SeqEngine, *, rows: int, budget: int, max_context: int | None = None
    ) -> None:
        context = max(1, min(max_context or engine.graph.max_length, budget // 2))
        super().__init__(engine, rows=rows, budget=budget, max_context=context)
        self.budget = budget
        self._promised: dict[BatchRow, int] = {}
        self._sources: dict[BatchRow, Sources] = {}
        self._written: dict[BatchRow, int] = {}
        """tokens of a row that are in the arena, the start token included"""
        # of the rows that are decoded, kept because it is bound
        self._together: Sources | None = None

    def has_room(self, tokens: int) -> bool:
        """Whether a row with so many tokens of prompt and answer can begin now."""
        return (
            self.filling is None
            and self.rows < self.arena.slots
            and self.promised + tokens <= self.budget
        )

    @property
    def cache_bytes(self) -> int:
        """Memory of keys and values in use, of prompts and of answers."""
        return self.promised * self.arena.token_bytes

    @property
    def promised(self) -> int:
        """Tokens of prompts and answers that the rows may come to."""
        return sum(self._promised.values())

    def begin(self, adapter: BoundAdapter | None, *, tokens: int) -> BatchRow:
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

    def check(self, tokens: Sequence[Sequence[int]]) -> Float32:
        """Not of an encoder-decoder."""
        raise InputError("an encoder-decoder guesses no tokens", fix="Set lookup = 0.")

    def leave(self, row: BatchRow) -> None:
        """End a row; the last one takes its slot."""
        super().leave(row)
        for known in (self._promised, self._sources, self._written):
            known.pop(row, None)  # type: ignore[attr-defined]

    def append(self, rows: Sequence[BatchRow], tokens: Sequence[int]) -> Float32:
        """One token more in each row; see `ArenaBatch`."""
        logits = super().append(rows, tokens)
        for row in rows:
            self._written[row] += 1
        return logits

    def written(self, row: BatchRow) -> int:
        """Tokens of a row's answer that are in the arena."""
        return self._written[row]

    def _bound_alone(self, row: BatchRow) -> RowBinding:
        alone = super()._bound_alone(row)
        self._sources[row].bind(alone.io)
        return alone

    def _bound_step(self) -> RowBinding:
        if self._step is None:
            together = put_together([self._sources[row] for row in self.decoding])
            step = super()._bound_step()
            together.bind(step.io)
            self._together = together
            return step
        return self._step


def put_together(sources: Sequence[Sources]) -> Sources:
    """Prompts that were read one by one as rows of one batch, padded on the right to the
    longest.
    """
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
