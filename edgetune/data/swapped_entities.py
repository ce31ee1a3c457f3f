"""More sentences for a tagger from those that are there: entities change places with others of
their type, so that what a name may be is learned from every sentence that its type stands in.

Entity replacement as in Dai and Adel 2020 (arXiv:2010.11683), "mention replacement".
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

from edgetune.core.text import entities

STAYS = 0.3  # probability that an entity keeps its words
Sentence = tuple[list[str], list[str]]  # its words, and a tag for each


def swapped(sentences: Sequence[Sentence], copies: int, *, seed: int) -> list[Sentence]:
    """`copies` versions of every sentence, but for those that come out as one that is there.

    An entity is drawn from all of its type, as often as it occurs, and brings its own tags along.
    The same seed draws the same.
    """
    draw = random.Random(seed)
    known: dict[str, list[Sentence]] = defaultdict(list)
    for words, tags in sentences:
        for entity in entities(tags):
            span = slice(entity.start, entity.end)
            known[entity.type].append((words[span], tags[span]))
    there = {tuple(words) for words, _ in sentences}
    made = []
    for _ in range(copies):
        for words, tags in sentences:
            found = _version(words, tags, known, draw)
            if tuple(found[0]) not in there:
                there.add(tuple(found[0]))
                made.append(found)
    return made


def _version(
    words: list[str], tags: list[str], known: dict[str, list[Sentence]], draw: random.Random
) -> Sentence:
    """The sentence with most of its entities replaced."""
    new_words, new_tags, at = list[str](), list[str](), 0
    for entity in entities(tags):
        span = slice(entity.start, entity.end)
        stays = draw.random() < STAYS
        other = (words[span], tags[span]) if stays else draw.choice(known[entity.type])
        new_words += words[at : entity.start] + other[0]
        new_tags += tags[at : entity.start] + other[1]
        at = entity.end
    return new_words + words[at:], new_tags + tags[at:]
