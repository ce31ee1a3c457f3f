"""Rows in one arena of keys and values: they join by prefill, step together and leave. What an
engine adds is how tokens are run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence

from edgetune.core.arrays import Float32
from edgetune.core.errors import InputError
from edgetune.runtime.engine.interface import BatchRow, BoundAdapter
from edgetune.runtime.engine.kv_cache import CacheArena, PrefixCache


class ArenaBatch(ABC):
    """Rows 0…n-1 are decoded together; one more may be in prefill. See `DecoderBatch`. Not
    thread-safe: one thread steps.
    """

    prefills_in_pieces = checks_guesses = checks_together = True

    def __init__(self, arena: CacheArena, *, prefix_blocks: int) -> None:
        """`prefix_blocks`: blocks of shared prefixes, where the cache can share any."""
        self.arena = arena
        self.prefixes = PrefixCache(arena, blocks=prefix_blocks if arena.shares_prefixes else 0)
        self.decoding: list[BatchRow] = []
        self.filling: BatchRow | None = None

    @abstractmethod
    def run_piece(self, row: BatchRow, piece: Sequence[int]) -> Float32:
        """Run a piece of the filling row's prompt, which ends at its length; logits (vocab,)."""

    @abstractmethod
    def run_step(
        self, rows: Sequence[BatchRow], tokens: Sequence[int], lengths: Sequence[int]
    ) -> Float32:
        """Run one token of each of `rows`: all that are decoded, or one of them. They come to
        `lengths` tokens with it; logits (rows, vocab).
        """

    @abstractmethod
    def run_guesses(self, tokens: Sequence[Sequence[int]]) -> Float32:
        """Run the tokens of every decoded row, which end at its length; logits (all tokens,
        vocab).
        """

    def begun(self, row: BatchRow) -> None:  # noqa: B027  as `rows_changed`
        """A row got its slot, and its prompt comes next."""

    def rows_changed(self) -> None:  # noqa: B027  for engines that keep something for their rows
        """Rows joined, left or moved since the last step."""

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
            self.begun(row)
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
        assert row is not None
        row.length += len(piece)
        return self.run_piece(row, piece)

    def join(self) -> None:
        """The filling row's prompt is complete: it is decoded with the others from the next step
        on.
        """
        row, self.filling = self.filling, None
        assert row is not None
        self._place(row, len(self.decoding))
        self.decoding.append(row)
        self.rows_changed()

    def step(self, tokens: Sequence[int]) -> Float32:
        """Append one token to every decoded row; logits (rows, vocab), valid until the next
        step.
        """
        return self.append(self.decoding, tokens)

    def step_alone(self, row: BatchRow, token: int) -> Float32:
        """Append one token to this decoded row; logits (vocab,), valid until the next step."""
        return self.append([row], [token])[0]

    def append(self, rows: Sequence[BatchRow], tokens: Sequence[int]) -> Float32:
        """One token more in each row. Where it raises, all rows are as they were."""
        written = [self.written(row) for row in rows]
        if max(written) >= self.arena.capacity:
            raise InputError(
                "the cache is full",
                expected=f"at most {self.arena.capacity} tokens",
                got="one more",
            )
        logits = self.run_step(rows, tokens, [length + 1 for length in written])
        for row in rows:
            row.length += 1
        return logits

    def written(self, row: BatchRow) -> int:
        """Tokens of a row that are in the arena."""
        return row.length

    def check(self, tokens: Sequence[Sequence[int]]) -> Float32:
        """Append one token or more to every decoded row; see `DecoderBatch`."""
        for row, own in zip(self.decoding, tokens, strict=True):
            row.length += len(own)
        try:
            return self.run_guesses(tokens)
        except BaseException:
            for row, own in zip(self.decoding, tokens, strict=True):
                row.length -= len(own)
            raise

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
        self.rows_changed()

    def _place(self, row: BatchRow, slot: int) -> None:
        if row.slot != slot:
            self.arena.move(row.slot, slot, tokens=row.length)
            row.slot = slot
