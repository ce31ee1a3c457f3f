"""Words, their sub-words and the entities that their tags mark: one rule for training and for the device.

Nothing but the standard library: the runtime imports this file too.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

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

    White space separates words; a punctuation mark or symbol (Unicode categories P and S) is a word of its own; marks
    and format characters (M, Cf: accents, emoji joiners) stay with what stands before them.
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


def join_words(words: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """The words with a space between each two, and where each stands: what a tagger reads.

    The space gives byte-level BPE the form it has seen words in; WordPiece splits there anyway.
    """
    spans, start = [], 0
    for word in words:
        spans.append((start, start + len(word)))
        start += len(word) + 1
    return " ".join(words), spans


def first_subwords(text: str, offsets: Spans, words: Spans) -> list[int | None]:
    """The first token with a character of each word; None where there is none (cut off, or nothing the tokenizer keeps).

    `offsets` are the characters of each token, (0, 0) for special ones; white space at a token's ends is no part of a
    word. A token over several words is the first one's.
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
    """Whether the tags are entities (B-person, I-person, O) and not classes of words, such as parts of speech."""
    others = [label for label in labels if label != OUTSIDE]
    return bool(others) and all(PREFIXED.fullmatch(label) for label in others)


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of a sentence, counted as conlleval does (and seqeval by default).

    B- begins one, and so does I- (or E-, L-) after O or after another type; S- and U- are whole ones, E- and L- end
    theirs. So IOB1, IOB2, IOBES and BILOU are all read.
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
