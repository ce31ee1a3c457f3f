"""Words with tags: texts or ready-made words → what the tagger reads → a tag, a score and a place
for every word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.core.errors import InputError
from edgetune.core.tag_sequences import likeliest_tags
from edgetune.core.text import entities, first_subwords, join_words, outside_tag, split_words
from edgetune.runtime.adapters.packing import PackedAdapter
from edgetune.runtime.generation.sampling import softmax
from edgetune.runtime.tasks.open_bundle import OpenBundle

Words = str | Sequence[str]
"""A plain text, which `edgetune.core.text.split_words` cuts into words, or words."""


@dataclass(frozen=True)
class TaggedWord:
    """A word, its tag, the tag's probability, and its characters `start` … `end - 1` of the text.

    A word that the model never sees (cut off, or of characters its tokenizer drops) has the tag O
    and the score 0.
    """

    word: str
    tag: str
    score: float
    start: int
    end: int


@dataclass(frozen=True)
class TaggedSpan:
    """An entity: its type, and its characters `start` … `end - 1` of the text. `score`: its least
    certain word's.
    """

    type: str
    text: str
    start: int
    end: int
    score: float


@dataclass(frozen=True)
class Tagging:
    """A text's words with their tags. `text` is the one that was given, or the given words with a
    space between.
    """

    text: str
    words: tuple[TaggedWord, ...]

    @property
    def tags(self) -> list[str]:
        """A tag for each word."""
        return [word.tag for word in self.words]

    @property
    def entities(self) -> list[TaggedSpan]:
        """What the tags mark by B- and I-, counted as conlleval does; none where tags are classes
        of words.
        """
        found = []
        for kind, first, end in entities(self.tags):
            words = self.words[first:end]
            start, stop = words[0].start, words[-1].end
            found.append(
                TaggedSpan(
                    kind, self.text[start:stop], start, stop, min(word.score for word in words)
                )
            )
        return found


@dataclass(frozen=True)
class WordReading:
    """A row made ready: its text, its words' places there, its token ids and the tokens that begin
    the words.
    """

    text: str
    spans: list[tuple[int, int]]
    ids: list[int]
    first: list[int | None]

    def tagging(self, logits: npt.NDArray[np.float32], packed: PackedAdapter) -> Tagging:
        """The words' tags by the logits (tokens, labels), with calibrated scores."""
        labels, words = packed.labels or (), []
        chosen = likeliest_tags(
            [None if token is None else logits[token] for token in self.first],
            labels,
            scheme=(packed.prompt_format or {}).get("tag_scheme"),
        )
        for (start, end), token, best in zip(self.spans, self.first, chosen, strict=True):
            tag, score = outside_tag(labels), 0.0
            if token is not None and best is not None:
                scores = softmax(packed.confidence.scaled(logits[token]))
                tag, score = labels[best], float(scores[best])
            words.append(TaggedWord(self.text[start:end], tag, score, start, end))
        return Tagging(self.text, tuple(words))


def read_words(
    opened: OpenBundle,
    row: Words,
    adapter: str | None,
    *,
    truncate: bool,
    control_tokens: str | None = None,
) -> WordReading:
    """Token ids of a row as it was trained: its words with a space between each two.

    InputError when it is longer than the model's positions; `truncate` cuts it to what the adapter
    was trained with. `control_tokens`: see `Runtime.prompt_ids`.
    """
    spans = split_words(row) if isinstance(row, str) else []
    words = [row[start:end] for start, end in spans] if isinstance(row, str) else check_words(row)
    packed = None if adapter is None else opened.adapter(adapter)
    joined, places = join_words(words, case_marks=packed is not None and packed.reads_case_marks)
    text, shown = (row, spans) if isinstance(row, str) else join_words(words)
    if not words:
        return WordReading(text, [], [], [])
    limit = opened.manifest.graph.max_length
    trained = None if packed is None else packed.metadata.get("max_length")
    most = min(limit, trained or limit) if truncate else None
    tokenizer = opened.tokenizer_of(adapter, control_tokens)
    ids, offsets = tokenizer.encode_with_offsets(joined, max_tokens=most)
    if len(ids) > limit:
        raise InputError(
            "the text is longer than the model's positions",
            expected=f"at most {limit} tokens",
            got=f"{len(ids)} tokens",
            fix="Shorten it, or pass truncate=True (`--truncate`).",
        )
    return WordReading(text, list(shown), ids, first_subwords(joined, offsets, places))


def check_words(value: Any, *, where: str = "") -> list[str]:
    """A row's words: a list of strings."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(word, str) for word in value):
        raise InputError(
            "these are no words",
            where=where,
            expected='a list of strings such as ["New", "York"]',
            got=repr(value)[:60],
        )
    return list(value)
