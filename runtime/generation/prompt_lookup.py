"""Speculative decoding by prompt lookup: what followed the same words before is a guess at what
follows now.

Answers that repeat their prompt (extraction, rewriting, JSON over given words) repeat it token by
token. A guess costs no draft model: the last three tokens are looked up in prompt and answer, and
what stood behind them is checked in one step (Saxena 2023, "Prompt Lookup Decoding"). Greedy choice
among the checked logits gives the tokens that one-by-one decoding gives. Guessing pauses while it
does not pay: a step of k tokens costs more than a step of one.
"""

from __future__ import annotations

from collections.abc import Sequence

NGRAM = 3
"""Tokens that must be the same."""
LOWEST_SHARE = 0.25
"""Below this share of right guesses (a moving mean) guessing pauses …"""
PAUSE = 32
"""… for so many tokens."""


class PromptLookup:
    """One row's tokens and where each three of them stood last."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        """n-gram → the place behind its last occurrence, but for the one at the very end"""
        self._end: tuple[int, ...] | None = None
        self._share, self._quiet = 0.5, 0
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """One more token."""
        if self._end is not None:
            self._after[self._end] = len(self._tokens)
        self._tokens.append(token)
        self._end = tuple(self._tokens[-NGRAM:]) if len(self._tokens) >= NGRAM else None
        self._quiet = max(0, self._quiet - 1)

    def guess(self, count: int) -> list[int]:
        """At most `count` tokens that may follow; empty when nothing is known or guessing
        pauses.
        """
        at = None if self._end is None or self._quiet else self._after.get(self._end)
        return [] if at is None else self._tokens[at : at + count]

    def tell(self, *, guessed: int, right: int) -> None:
        """How a guess turned out."""
        self._share += 0.2 * (right / guessed - self._share)
        if self._share < LOWEST_SHARE:
            self._share, self._quiet = 0.5, PAUSE
