"""Two texts in one row: their token ids, where the second begins, and how they are cut to a length.

Tokenizers of BERT's kind give the second text's tokens another type than the first's (0, then 1); others give none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from edgetune.errors import InputError

Text = str | tuple[str, str]
"""What a classifier reads: a text, or two that belong together."""


class PairIds(list[int]):
    """Token ids of two texts, special tokens included. From `second` on their type is 1."""

    def __init__(self, ids: Iterable[int], *, second: int) -> None:
        super().__init__(ids)
        self.second = second

    def within(self, count: int) -> PairIds:
        """The first `count` of them."""
        return PairIds(self[:count], second=min(self.second, count))


def typed(ids: Sequence[int], types: Sequence[int]) -> list[int]:
    """Ids with the place where their types change from 0 to 1, as it is in BERT's pairs; plain ids where none is 1."""
    if not any(types):
        return list(ids)
    second = list(types).index(1)
    if any(types[:second]) or not all(kind == 1 for kind in types[second:]):
        raise InputError("this tokenizer's types of tokens cannot be used", expected="0 up to the second text, then 1", got=str(sorted(set(types))))
    return PairIds(ids, second=second)


def first_tokens(ids: Sequence[int], count: int) -> list[int]:
    """The first `count` ids, their types kept."""
    return ids.within(count) if isinstance(ids, PairIds) else list(ids[:count])


def second_of(ids: Sequence[int]) -> int | None:
    """Where tokens of type 1 begin; None where there are none."""
    return ids.second if isinstance(ids, PairIds) else None


def typed_at(ids: Sequence[int], second: int | None) -> list[int]:
    """Ids whose second text begins there; plain ids for None."""
    return list(ids) if second is None else PairIds(ids, second=second)


def lengths_within(first: int, second: int, most: int) -> tuple[int, int]:
    """How many tokens of each text stay when both may have `most` together: the longer one is cut first.

    As the strategy `longest_first` of the tokenizers library, whose odd token goes to the longer text.
    """
    if first + second <= most:
        return first, second
    short, long = sorted((first, second))
    long = max(short, most - short) if short <= most else short
    if short + long > most:
        short, long = most // 2, most // 2 + most % 2
    return (long, short) if first > second else (short, long)
