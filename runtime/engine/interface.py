"""What an engine is to everyone who uses one; scheduler and tasks know nothing else of it.

ONNX Runtime (`decoder.py`, `encoder.py`, `seq2seq.py`) is one engine behind this interface. Token
ids go in, logits come out; every row of a batch has an adapter of its own, or none.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Protocol

from edgetune.core.arrays import Float32, Int64
from edgetune.core.errors import InputError
from edgetune.runtime.bundle.manifest import GraphInfo, Manifest
from edgetune.runtime.engine.providers import ProvidersInUse

Tensors = Mapping[str, Float32]
"""An adapter's graph inputs, as `pack_adapter(...).tensors`."""


class BoundAdapter:
    """An adapter's tensors in the form that one engine reads, made once by that engine's `bind`."""

    own_bytes: int | None = None
    """memory of a copy that the engine made; None: it holds the tensors themselves"""


AdapterRow = BoundAdapter | Tensors | None
"""What one row of a batch uses: a bound adapter, packed tensors, or None for the base model."""


class Engine(Protocol):
    """A model that is loaded."""

    @property
    def manifest(self) -> Manifest:
        """The manifest of the bundle it was opened from."""

    @property
    def graph(self) -> GraphInfo:
        """The model's sizes: context, vocabulary, layers, widths."""

    @property
    def providers_in_use(self) -> ProvidersInUse:
        """What it runs on."""

    def bind(self, tensors: Tensors) -> BoundAdapter:
        """Make an adapter ready for this engine, which then uses it for any number of rows."""

    def swapper(self) -> Callable[[AdapterRow], None]:
        """What puts another adapter in place for the next run, and does nothing else: to time a
        swap.
        """

    def long_lived(self) -> None:
        """It will answer for some time: memory may be put in better order after a few runs."""


class Encoder(Engine, Protocol):
    """A model that reads texts: pooled states and the logits of a head."""

    def run(
        self,
        rows: Sequence[Sequence[int]],
        adapters: Sequence[AdapterRow] | None = None,
        *,
        pad_token_id: int = 0,
    ) -> tuple[list[Float32], Float32]:
        """Logits (labels,) of each row's head, and pooled states (rows, hidden), not normalised.

        InputError when a row is empty or longer than the model's positions.
        """

    def tokens(
        self,
        rows: Sequence[Sequence[int]],
        adapters: Sequence[AdapterRow] | None = None,
        *,
        pad_token_id: int = 0,
    ) -> tuple[list[Float32], list[Float32]]:
        """Each row's logits (tokens, labels) and states (tokens, hidden). InputError as in
        `run`.
        """


class DecoderState(Protocol):
    """A fixed set of rows that are generated together, with their cache."""

    @property
    def rows(self) -> int:
        """How many rows are still generated."""

    @property
    def limit(self) -> int:
        """Tokens that a row may come to, its prompt included."""

    def step(self, tokens: Sequence[int] | Int64) -> Float32:
        """Append one token to every row; logits (rows, vocab), valid until the next step.

        InputError when the cache is full.
        """

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only (ascending)."""

    def repeat(self, count: int) -> DecoderState:
        """A new state in which each row stands `count` times, its prompt already read."""


class ScoreReading(Protocol):
    """Answers of which the last tokens' states are wanted, read piece by piece."""

    @property
    def tokens(self) -> int:
        """Tokens of cache that it holds until it is finished."""

    def step(self) -> tuple[Float32, Float32] | None:
        """Read one piece. None before the last; then scores (rows,) and states (rows, hidden)."""


class BatchRow:
    """One row of a `DecoderBatch`: `length` tokens of it are in the cache; `slot` may change when
    another row leaves.
    """

    def __init__(self, slot: int, adapter: BoundAdapter | None) -> None:
        self.slot, self.adapter, self.length = slot, adapter, 0


class DecoderBatch(Protocol):
    """Rows that join by prefill, step together and leave, each with its own adapter.

    One row at a time is in prefill (`begin`, `restore`, `prefill` …, `join`); all that joined take
    part in `step`. Not thread-safe: one thread steps.
    """

    @property
    def rows(self) -> int:
        """Rows in prefill and decode."""

    @property
    def decoding(self) -> Sequence[BatchRow]:
        """The rows that take part in `step`, in the order of its logits."""

    @property
    def context(self) -> int:
        """Tokens of prompt and answer that one row may have."""

    @property
    def prefills_in_pieces(self) -> bool:
        """Whether a prompt may come in several pieces; else `prefill` wants all of it at once."""

    @property
    def checks_guesses(self) -> bool:
        """Whether `check` works here."""

    @property
    def checks_together(self) -> bool:
        """Whether `check` takes more than one row."""

    @property
    def cache_bytes(self) -> int:
        """Memory of keys and values in use: those promised to rows, and shared prefixes."""

    @property
    def cache_bytes_total(self) -> int:
        """Memory that keys and values may come to."""

    @property
    def prefix_hit_tokens(self) -> int:
        """Tokens of prompts that were copied instead of computed, since the start."""

    @property
    def prefix_evictions(self) -> int:
        """Blocks of shared prefixes that were forgotten to make room, since the start."""

    def lend(self, tokens: int) -> None:
        """So many tokens of the memory are in use elsewhere, by a `ScoreReading`; 0: none."""

    def has_room(self, tokens: int) -> bool:
        """Whether a row that may come to so many tokens can begin its prefill now."""

    def begin(self, adapter: BoundAdapter | None, *, tokens: int) -> BatchRow:
        """A row for a prompt and its answer of at most `tokens` tokens; `has_room` must be true."""

    def restore(self, key: Hashable, prompt: Sequence[int]) -> int:
        """Take what the cache knows of the beginning of the filling row's prompt; how many tokens.

        `key` names the adapter: equal for the same content only. At least one token is left for
        `prefill`.
        """

    def prefill(self, piece: Sequence[int]) -> Float32:
        """Append a piece of the filling row's prompt; logits (vocab,) after its last token."""

    def join(self) -> None:
        """The filling row's prompt is complete: it takes part from the next step on."""

    def step(self, tokens: Sequence[int]) -> Float32:
        """Append one token to every decoding row; logits (rows, vocab), valid until the next step.

        InputError when the cache is full. Where it raises, the rows are as they were.
        """

    def step_alone(self, row: BatchRow, token: int) -> Float32:
        """`step` for one of the decoding rows; logits (vocab,). A batch that failed goes through it
        row by row, so that the error meets the row that causes it.
        """

    def check(self, tokens: Sequence[Sequence[int]]) -> Float32:
        """Append one token or more to every decoding row; logits (all tokens, vocab) after each, in
        the order of the rows, valid until the next step.

        Lower a row's `length` afterwards to take back its last ones.
        """

    def remember(self, row: BatchRow, key: Hashable, tokens: Sequence[int]) -> None:
        """Keep the beginning of a row, which is `tokens`, for prompts that begin alike."""

    def leave(self, row: BatchRow) -> None:
        """End a row and free its memory."""


class Decoder(Engine, Protocol):
    """A model that generates text; an encoder-decoder is one, too."""

    def check(self, rows: Sequence[Sequence[int]]) -> None:
        """InputError when a prompt is empty, holds an unknown id, or is longer than the context."""

    def start(
        self,
        rows: Sequence[Sequence[int]],
        adapters: Sequence[AdapterRow] | None = None,
        *,
        capacity: int | None = None,
    ) -> tuple[DecoderState, Float32]:
        """Read prompts; the state for `step`, and the logits (rows, vocab) after each prompt.

        `capacity`: tokens a row may reach, prompt included; None: a little more than the longest.
        InputError as in `check`.
        """

    def logits(
        self,
        rows: Sequence[Sequence[int]],
        adapters: Sequence[AdapterRow] | None = None,
        *,
        positions: Sequence[Sequence[int]] | None = None,
    ) -> list[Float32]:
        """Logits of every position (len, vocab), or of `positions` a row (k, vocab).

        InputError as in `check`, and from an encoder-decoder, which does not predict its prompt.
        """

    def begin_scores(
        self, rows: Sequence[Sequence[int]], adapters: Sequence[AdapterRow]
    ) -> ScoreReading:
        """Read answers for their scores by the adapters' heads. InputError as in `check`."""

    def new_batch(
        self, *, rows: int, cache_mb: float | None = None, max_context: int | None = None
    ) -> DecoderBatch:
        """A batch of at most `rows` rows. `cache_mb` (10⁶ bytes): memory of keys and values (None:
        what such rows usually need); `max_context`: tokens of one row (None: what fits).
        """


def adapter_per_row(
    rows: Sequence[Sequence[int]], adapters: Sequence[AdapterRow] | None
) -> list[AdapterRow]:
    """One entry a row; None for all when none are given. InputError when their numbers differ."""
    chosen: list[AdapterRow] = [None] * len(rows) if adapters is None else list(adapters)
    if len(chosen) != len(rows):
        raise InputError(
            "one adapter (or None) for each row", expected=str(len(rows)), got=str(len(chosen))
        )
    return chosen


def check_prompts(rows: Sequence[Sequence[int]], graph: GraphInfo) -> None:
    """InputError when there is no prompt, or one is empty, holds an unknown id, or is longer than
    the context.
    """
    if not rows:
        raise InputError("no rows", expected="one prompt at least")
    for i, row in enumerate(rows):
        if not row:
            raise InputError("an empty prompt", where=f"row {i}", expected="one token at least")
        if len(row) > graph.max_length:
            limit = f"at most {graph.max_length} tokens"
            raise InputError(
                "the prompt is longer than the context",
                where=f"row {i}",
                expected=limit,
                got=str(len(row)),
            )
        if min(row) < 0 or max(row) >= graph.vocab_size:
            limit = f"ids from 0 to {graph.vocab_size - 1}"
            raise InputError(
                "a token id outside the vocabulary",
                where=f"row {i}",
                expected=limit,
                got=str(min(row) if min(row) < 0 else max(row)),
            )
