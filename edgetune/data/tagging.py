"""Rows of words with a tag each become token ids, with a label at every word's first sub-word."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from edgetune.core.errors import DataError
from edgetune.core.settings import shown
from edgetune.core.text import first_subwords, join_words
from edgetune.data.batching import Batch, collate
from edgetune.data.examples import IGNORED, Example, ExampleSet, Loading, convert_rows, sample
from edgetune.data.prompts import PromptFormat
from edgetune.data.rows import Row, Rows

FIX = "Correct the row, or leave such rows out with data.skip_invalid = true."


@dataclass(frozen=True)
class TaggedRow:
    """A sentence: its words and a tag for each."""

    line: int
    words: list[str]
    tags: list[str]


@dataclass(slots=True)
class TaggedExample(Example):
    """`labels` is IGNORED except at a word's first sub-word; `tags` are all words', `first` their
    first sub-words.

    `features` are (words that are seen, hidden).
    """

    tags: tuple[str, ...] = ()
    first: tuple[int | None, ...] = ()  # None: the model never sees this word


def tagged_rows(
    source: Rows, form: PromptFormat, *, skip_invalid: bool = False
) -> tuple[list[TaggedRow], int]:
    """Words and tags of every row, and how many rows were left out. DataError for lists that do not
    fit each other.
    """
    words_column, tags_column = form.tokens or "tokens", form.tags or "tags"

    def convert(row: Row, where: str) -> TaggedRow:
        words = _texts(
            row.values, words_column, where=where, example='["New", "York"]', integers=False
        )
        tags = _texts(
            row.values, tags_column, where=where, example='["B-place", "I-place"]', integers=True
        )
        if len(tags) != len(words):
            raise DataError(
                f'the column "{tags_column}" has another length than "{words_column}"',
                where=where,
                expected=f"{len(words)} tags, one for each word",
                got=str(len(tags)),
                fix=FIX,
            )
        return TaggedRow(row.line, words, tags)

    return convert_rows(source, convert, skip_invalid=skip_invalid)


def load_tagged(loading: Loading) -> ExampleSet:
    """Tags come from the whole training file, so that `data.limit` never changes the head's
    shape.
    """
    stage = loading.stage
    examples: dict[str, list[Any]] = {}
    skipped, truncated, unseen = {}, {}, {}
    names = tuple(loading.labels) if loading.labels is not None else None
    for name, source in loading.sources.items():
        rows, unusable = tagged_rows(source, loading.form, skip_invalid=stage.data.skip_invalid)
        if names is None:
            names = _tag_names(rows, source=source.source)
        known = [row for row in rows if set(row.tags) <= set(names)]
        if len(known) < len(rows) and (not stage.data.skip_invalid or not known):
            raise unknown_tag(
                next(row for row in rows if not set(row.tags) <= set(names)), source.source, names
            )
        chosen = sample(known, stage.data.limit if name == "train" else None, seed=loading.seed)
        examples[name], truncated[name], unseen[name] = encode_tagged(
            chosen, names, loading.tokenizer, limit=loading.limit
        )
        skipped[name] = source.skipped + unusable + len(rows) - len(known)
        if not any(first is not None for example in examples[name] for first in example.first):
            raise DataError(
                "there is no word to tag",
                where=source.source,
                expected="at least one word that the tokenizer keeps",
            )
    found = loading.example_set(examples, labels=names, skipped=skipped, truncated=truncated)
    return replace(found, unseen_words=unseen)


def encode_tagged(
    rows: Sequence[TaggedRow], names: Sequence[str], tokenizer: Any, *, limit: int
) -> tuple[list[TaggedExample], int, dict[str, int]]:
    """Examples of at most `limit` tokens, how many rows were cut, and how many words the model
    never sees and why.
    """
    index = {name: number for number, name in enumerate(names)}
    texts, spans = zip(*(join_words(row.words) for row in rows), strict=True) if rows else ((), ())
    encoded = _encode(tokenizer, texts, truncation=True, max_length=limit)
    examples, cut_rows, unseen = [], 0, {"cut": 0, "no_sub_word": 0}
    for row, text, words, ids, offsets in zip(
        rows, texts, spans, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        first = first_subwords(text, offsets, words)
        labels = [IGNORED] * len(ids)
        for token, tag in zip(first, row.tags, strict=True):
            if token is not None:
                labels[token] = index[tag]
        examples.append(
            TaggedExample(ids, labels, row.line, tags=tuple(row.tags), first=tuple(first))
        )
        whole = first
        if len(ids) == limit:
            (whole_offsets,) = _encode(tokenizer, [text], truncation=False)["offset_mapping"]
            cut_rows += len(whole_offsets) > limit
            whole = first_subwords(text, whole_offsets, words)
        unseen["cut"] += first.count(None) - whole.count(None)
        unseen["no_sub_word"] += whole.count(None)
    return examples, cut_rows, unseen


def collate_tagged(examples: Sequence[Any], pad_id: int) -> Batch:
    """A batch whose targets are the labelled tokens; features (words, hidden) stand row after
    row.
    """
    features = [example.features for example in examples if example.features is not None]
    bare = [replace(example, features=None) for example in examples] if features else examples
    batch = collate(bare, pad_id)
    return replace(
        batch,
        targets=int((batch.labels != IGNORED).sum()),
        features=torch.cat(features) if features else None,
    )


def unknown_tag(
    row: TaggedRow,
    source: str,
    names: Sequence[str],
    *,
    what: str = "does not occur in the training rows",
) -> DataError:
    """The error for a tag that is not among `names`."""
    at = next(at for at, tag in enumerate(row.tags) if tag not in names)
    shown = ", ".join(names[:8]) + (f" … ({len(names)} tags)" if len(names) > 8 else "")
    return DataError(
        f'the tag "{row.tags[at]}" of word {at + 1}, "{row.words[at]}", {what}',
        where=f"{source}, line {row.line}",
        expected=f"one of {shown}",
        fix="Correct the tag or add training rows for it.",
    )


def _encode(tokenizer: Any, texts: Sequence[str], **how: Any) -> Any:
    if not texts:
        return {"input_ids": [], "offset_mapping": []}
    return tokenizer(list(texts), return_offsets_mapping=True, verbose=False, **how)


def _tag_names(rows: Iterable[TaggedRow], *, source: str) -> tuple[str, ...]:
    names = tuple(sorted({tag for row in rows for tag in row.tags}))
    if len(names) < 2:
        raise DataError(
            "there is nothing to tell apart",
            where=source,
            expected="at least two tags",
            got=f"only {names[0]!r}",
        )
    return names


def _texts(
    values: dict[str, Any], column: str, *, where: str, example: str, integers: bool
) -> list[str]:
    """A column that holds a list of strings that are not empty (tags: or integers)."""
    if column not in values:
        raise DataError(
            f'there is no column "{column}"',
            where=where,
            expected=f"a list such as {example}",
            got="the columns " + (", ".join(values) or "(none)"),
            fix="Set data.tokens and data.tags to the columns that hold words and tags.",
        )
    value = values[column]
    if not isinstance(value, list) or not value:
        got = "an empty list" if value == [] else f"{type(value).__name__} {shown(value)}"
        raise DataError(
            f'the column "{column}" is no list of {"tags" if integers else "words"}',
            where=where,
            expected=f"a list such as {example}",
            got=got,
            fix=FIX,
        )
    for at, item in enumerate(value):
        if not ((is_text(item) and (item or not integers)) or (integers and type(item) is int)):
            kinds = "a string or an integer" if integers else "a string"
            raise DataError(
                f"{column}[{at}] cannot be used",
                where=where,
                expected=kinds,
                got=f"{type(item).__name__} {shown(item)}",
                fix=FIX,
            )
    return [str(item) for item in value]


def is_text(item: Any) -> bool:
    """A string without halves of surrogate pairs, which JSON can spell and UTF-8 cannot."""
    return isinstance(item, str) and item.encode(errors="ignore").decode() == item
