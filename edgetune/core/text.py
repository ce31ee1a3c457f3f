"""Words and pairs of texts: how they are cut into tokens, one rule for training and for the
device.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from edgetune.core.errors import InputError

OUTSIDE = "O"  # the tag of a word in no entity, and of a word that the model never sees
PREFIXED = re.compile(r"[BIESLU][-_].+", re.DOTALL)
Spans = Sequence[tuple[int, int]]  # first character and the one after the last


class Entity(NamedTuple):
    """Words `start` … `end - 1` together are something of this type."""

    type: str
    start: int
    end: int


def split_words(text: str) -> list[tuple[int, int]]:
    """The spans of a plain text's words.

    White space separates words; a punctuation mark or symbol (Unicode categories P and S) is a word
    of its own; marks and format characters (M, Cf: accents, emoji joiners) stay with what stands
    before them.
    """
    spans: list[tuple[int, int]] = []
    joins = False  # whether the next letter continues the last word
    for at, character in enumerate(text):
        category = unicodedata.category(character)
        if character.isspace() or category == "Cc":
            joins = False
        elif spans and spans[-1][1] == at and (category[0] == "M" or category == "Cf"):
            spans[-1] = (spans[-1][0], at + 1)
        elif category[0] in "PS":
            spans.append((at, at + 1))
            joins = False
        elif joins:
            spans[-1] = (spans[-1][0], at + 1)
        else:
            spans.append((at, at + 1))
            joins = True
    return spans


def join_words(
    words: Sequence[str], *, case_marks: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    """The words with a space between each two, and where each stands: what a tagger reads.

    The space gives byte-level BPE the form it has seen words in; WordPiece splits there anyway.
    `case_marks`: the `case_mark` of a word stands before it, and is no part of it.
    """
    spans, start, parts = [], 0, []
    for word in words:
        mark = case_mark(word) if case_marks else ""
        if mark:
            parts.append(mark)
            start += len(mark) + 1
        parts.append(word)
        spans.append((start, start + len(word)))
        start += len(word) + 1
    return " ".join(parts), spans


def case_mark(word: str) -> str:
    """What tells a tokenizer that makes all letters small of a word's capitals: "^" where there is
    one, "^^" where all of two or more letters are; "" where there is none.
    """
    letters = [letter for letter in word if letter.isupper() or letter.islower()]
    capitals = sum(map(str.isupper, letters))
    return "" if not capitals else "^^" if 1 < capitals == len(letters) else "^"


def first_subwords(text: str, offsets: Spans, words: Spans) -> list[int | None]:
    """The first token with a character of each word; None where there is none (cut off, or nothing
    the tokenizer keeps).

    `offsets` are the characters of each token, (0, 0) for special ones; white space at a token's
    ends is no part of a word. A token over several words is the first one's.
    """
    first: list[int | None] = [None] * len(words)
    at = 0
    for token, (start, end) in enumerate(offsets):
        while start < end and text[start].isspace():
            start += 1
        if start == end:
            continue
        while at < len(words) and words[at][1] <= start:
            at += 1
        if at < len(words) and words[at][0] < end and first[at] is None:
            first[at] = token
    return first


def has_entities(labels: Sequence[str]) -> bool:
    """Whether the tags are entities (B-person, I-person, O) and not classes of words, such as parts
    of speech.
    """
    others = [label for label in labels if label != OUTSIDE]
    return bool(others) and all(PREFIXED.fullmatch(label) for label in others)


def outside_tag(labels: Sequence[str]) -> str:
    """The tag of words that the model never sees: O, or 0 where tags are numbers."""
    numbers = OUTSIDE not in labels and all(label.isdigit() for label in labels)
    return "0" if numbers and "0" in labels else OUTSIDE


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of a sentence, counted as conlleval does (and seqeval by default).

    B- begins one, and so does I- (or E-, L-) after O or after another type; S- and U- are whole
    ones, E- and L- end theirs. So IOB1, IOB2, IOBES and BILOU are all read.
    """
    found: list[Entity] = []
    open_entity: Entity | None = None
    for at, tag in enumerate([*tags, OUTSIDE]):
        prefix, kind = (tag[0], tag[2:]) if PREFIXED.fullmatch(tag) else (OUTSIDE, "")
        continues = open_entity is not None and prefix in "IEL" and kind == open_entity.type
        if continues and open_entity is not None:
            open_entity = open_entity._replace(end=at + 1)
        elif open_entity is not None:
            found.append(open_entity)
            open_entity = None
        if not continues and prefix != OUTSIDE:
            open_entity = Entity(kind, at, at + 1)
        if open_entity is not None and prefix in "ESLU":
            found.append(open_entity)
            open_entity = None
    return found


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
    """Ids with the place where their types change from 0 to 1, as it is in BERT's pairs; plain ids
    where none is 1.
    """
    if not any(types):
        return list(ids)
    second = list(types).index(1)
    if any(types[:second]) or not all(kind == 1 for kind in types[second:]):
        raise InputError(
            "this tokenizer's types of tokens cannot be used",
            expected="0 up to the second text, then 1",
            got=str(sorted(set(types))),
        )
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
    """How many tokens of each text stay when both may have `most` together: the longer one is cut
    first.

    As the strategy `longest_first` of the tokenizers library, whose odd token goes to the longer
    text.
    """
    if first + second <= most:
        return first, second
    short, long = sorted((first, second))
    long = max(short, most - short) if short <= most else short
    if short + long > most:
        short, long = most // 2, most // 2 + most % 2
    return (long, short) if first > second else (short, long)
