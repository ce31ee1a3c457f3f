"""Texts become token ids to be scored; the choices of an item share its context. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from edgetune.core.errors import DataError, InputError

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class ChoiceItem:
    """`context` has one token at least, and so has each of `choices`."""

    context: list[int]
    choices: list[list[int]]

    @property
    def tokens(self) -> int:
        """Tokens when the context is computed once."""
        return len(self.context) + sum(map(len, self.choices))


@dataclass(frozen=True)
class Score:
    """Of one choice: the sum of its tokens' log-probabilities (nats), and whether each was the
    likeliest.
    """

    logprob: float
    greedy: bool


class ItemScorer(Protocol):
    """Something that scores: a model in torch or a bundle."""

    def __call__(self, items: Sequence[ChoiceItem]) -> list[list[Score]]:
        """A score for every choice of every item."""


def make_item(
    context: str, choices: Sequence[str], encode: Encode, *, start: Sequence[int], limit: int
) -> ChoiceItem:
    """An item of texts. `start`: ids that every sequence begins with (bos, or none); `limit`:
    positions of the model.

    DataError when there is no context to go on from.
    """
    stripped = context.rstrip()  # white space belongs to the token that follows
    ids = encode(stripped)
    encoded = [encode(context + choice)[len(ids) :] or encode(choice) for choice in choices]
    context_ids = [*start, *ids]
    if not context_ids or not all(encoded):
        raise DataError(
            "nothing to score",
            expected="a context and choices of one token at least",
            got=repr(context[:40]),
        )
    room = max(1, limit - max(map(len, encoded)))
    return ChoiceItem(context_ids[-room:], [choice[: limit - 1] for choice in encoded])


def goes_on_with_nothing(where: str) -> InputError:
    """The error for an encoder-decoder whose likelihood of a text is asked."""
    return InputError(
        "an encoder-decoder does not go on with a text, so what it forgot of texts is not measured",
        where=where,
        expected="a decoder or an encoder",
    )
