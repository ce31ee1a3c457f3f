"""Texts become token ids to be scored: a context and its possible continuations.

As lm-evaluation-harness does it: the continuation's ids are those of the joined text after the context's, and a
context that is too long loses its beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from edgetune.errors import DataError

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Item:
    """`context` has one token at least, and so has each of `choices`."""

    context: list[int]
    choices: list[list[int]]

    @property
    def tokens(self) -> int:
        """Tokens when the context is computed once."""
        return len(self.context) + sum(map(len, self.choices))


@dataclass(frozen=True)
class Score:
    """Of one choice: the sum of its tokens' log-probabilities (nats), and whether each was the likeliest."""

    logprob: float
    greedy: bool


class Scorer(Protocol):
    """Something that scores: a model in torch or a bundle."""

    def __call__(self, items: Sequence[Item]) -> list[list[Score]]:
        """A score for every choice of every item."""


def make_item(context: str, choices: Sequence[str], encode: Encode, *, start: Sequence[int], limit: int) -> Item:
    """An item of texts. `start`: ids that every sequence begins with (bos, or none); `limit`: positions of the model.

    DataError when there is no context to go on from.
    """
    stripped = context.rstrip()  # white space belongs to the token that follows
    ids = encode(stripped)
    encoded = [encode(context + choice)[len(ids) :] or encode(choice) for choice in choices]
    context_ids = [*start, *ids]
    if not context_ids or not all(encoded):
        raise DataError("nothing to score", expected="a context and choices of one token at least", got=repr(context[:40]))
    room = max(1, limit - max(map(len, encoded)))
    return Item(context_ids[-room:], [choice[: limit - 1] for choice in encoded])


def beginning(tokenizer: Any) -> list[int]:
    """The ids a tokenizer puts before every text: bos, or nothing."""
    bos = tokenizer.bos_token_id
    ids = tokenizer("a", verbose=False)["input_ids"]
    return [bos] if bos is not None and ids[:1] == [bos] else []
