"""Rows of words with a tag each (`token-classification`): token ids, with a label at every word's
first sub-word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgetune.core.errors import DataError, RecipeError
from edgetune.core.tag_sequences import scheme_of_labels
from edgetune.core.text import first_subwords, has_entities, join_words
from edgetune.data.batching import IGNORE
from edgetune.data.columns import FIX, as_lists, tags_in, words_in
from edgetune.data.examples import Example, ExampleSet, Labels, Loading, load
from edgetune.data.labels import NO_LINE, first_of, two_or_more
from edgetune.data.prompts import PromptFormat
from edgetune.data.row import Row
from edgetune.data.rows import Rows, convert_rows
from edgetune.data.sentences import scheme_of, sentences, to_iob2
from edgetune.data.swapped_entities import swapped


@dataclass(frozen=True)
class TaggedRow:
    """A sentence: its words and a tag for each."""

    line: int
    words: list[str]
    tags: list[str]


@dataclass(slots=True)
class TaggedExample(Example):
    """`labels` is IGNORE except at a word's first sub-word; `tags` are all words', `first` their
    first sub-words.

    `features` are (words that are seen, hidden).
    """

    tags: tuple[str, ...] = ()
    first: tuple[int | None, ...] = ()  # None: the model never sees this word


def tagged_rows(
    source: Rows,
    form: PromptFormat,
    *,
    skip_invalid: bool = False,
    labels: Sequence[str] | None = None,
) -> tuple[list[TaggedRow], int]:
    """Words and tags of every row, and how many rows were left out. DataError for lists that do not
    fit each other.

    Entities are turned into IOB2, unless the `labels` of an adapter are of another scheme.
    """
    source = sentences(source)
    words_column, tags_column = form.tokens or "tokens", form.tags or "tags"

    def convert(row: Row, where: str) -> TaggedRow:
        row = Row(row.line, {**as_lists(row.values, words_column, tags_column)})
        words = words_in(row, words_column, where=where)
        tags = tags_in(row, tags_column, where=where)
        if len(tags) != len(words):
            raise DataError(
                f'the column "{tags_column}" has another length than "{words_column}"',
                where=where,
                expected=f"{len(words)} tags, one for each word",
                got=str(len(tags)),
                fix=FIX,
            )
        return TaggedRow(row.line, words, tags)

    rows, skipped = convert_rows(source, convert, skip_invalid=skip_invalid)
    scheme = scheme_of([row.tags for row in rows])
    if scheme is not None and (labels is None or scheme_of([labels]) not in ("IOBES", "BILOU")):
        source.note(f"tags in {scheme}, turned into IOB2")
        rows = [replace(row, tags=to_iob2(row.tags)) for row in rows]
    if rows and all(tag.isdigit() for row in rows for tag in row.tags):
        source.note("tags that are numbers: no entities are counted, 0 is taken for the outside")
    return rows, skipped


def load_tagged(loading: Loading) -> ExampleSet:
    """Sentences, longer ones cut to `max_length` tokens; words that the model never sees are
    counted. RecipeError for `data.case_marks` with a tokenizer that has no use for them.
    """
    if loading.form.case_marks:
        check_case_marks(loading.tokenizer)
    truncated: dict[str, int] = {}
    unseen: dict[str, dict[str, int]] = {}
    labels = Labels(tuple(loading.labels or ()), tag_names, unknown_tag)

    def encoded(rows: list[TaggedRow]) -> tuple[list[TaggedExample], int, dict[str, int]]:
        return encode_tagged(
            rows,
            labels.names,
            loading.tokenizer,
            limit=loading.limit,
            case_marks=loading.form.case_marks,
        )

    def encode(name: str, rows: list[TaggedRow]) -> list[TaggedExample]:
        examples, truncated[name], unseen[name] = encoded(rows)
        if name == "train" and loading.stage.data.swap_entities:
            examples += encoded(swapped_rows(rows, loading))[0]
        if not any(first is not None for example in examples for first in example.first):
            raise DataError(
                "there is no word to tag",
                where=loading.sources[name].source,
                expected="at least one word that the tokenizer keeps",
            )
        return examples

    found = load(loading, tagged_rows, encode, labels=labels)
    form = replace(loading.form, tag_scheme=scheme_of_labels(labels.names))
    return replace(found, truncated=truncated, unseen_words=unseen, prompt_format=form)


def swapped_rows(rows: Sequence[TaggedRow], loading: Loading) -> list[TaggedRow]:
    """The rows that `data.swap_entities` adds, which stand at no line. RecipeError where the tags
    mark no entities.
    """
    if not has_entities(sorted({tag for row in rows for tag in row.tags})):
        raise RecipeError(
            "data.swap_entities has no use here: no words are marked as entities",
            where=loading.sources["train"].source,
            expected="tags such as B-person, I-person and O",
            got=first_of(sorted({tag for row in rows for tag in row.tags}), "tags"),
            fix="Remove swap_entities.",
        )
    found = swapped(
        [(row.words, row.tags) for row in rows],
        loading.stage.data.swap_entities,
        seed=loading.seed,
    )
    loading.sources["train"].note(f"{len(found)} rows more, whose entities come from other rows")
    return [TaggedRow(NO_LINE, *one) for one in found]


def check_case_marks(tokenizer: Any) -> None:
    """RecipeError where capitals are told without marks, or marks are not read as such."""
    one, two = (join_words([word], case_marks=True)[0] for word in ("A", "AA"))
    small, capital, *marked = tokenizer(["a", "A", one, two])["input_ids"]
    unknown = tokenizer.unk_token_id
    if small != capital:
        reason = "tells capitals from small letters by itself"
    elif marked[0] == capital:
        reason = "drops the marks"
    elif unknown is not None and unknown not in capital and unknown in [*marked[0], *marked[1]]:
        reason = f'has no token for "^", which is {tokenizer.unk_token} to it as every unknown word'
    else:
        return
    raise RecipeError(
        f"data.case_marks has no use here: the base's tokenizer {reason}",
        expected="a tokenizer that makes all letters small, such as MiniLM's",
        fix="Remove case_marks.",
    )


def tag_names(rows: Sequence[TaggedRow], source: str) -> tuple[str, ...]:
    """The sorted tags of a training file, of which there must be two."""
    return two_or_more({tag for row in rows for tag in row.tags}, "tags", source)


def unknown_tag(
    row: TaggedRow,
    source: str,
    names: Sequence[str],
    *,
    what: str = "does not occur in the training rows",
) -> DataError | None:
    """The error for the first tag of a row that is not among `names`; None where all are."""
    at = next((at for at, tag in enumerate(row.tags) if tag not in names), None)
    if at is None:
        return None
    return DataError(
        f'the tag "{row.tags[at]}" of word {at + 1}, "{row.words[at]}", {what}',
        where=f"{source}, line {row.line}",
        expected=f"one of {first_of(names, 'tags')}",
        fix="Correct the tag or add training rows for it.",
    )


def encode_tagged(
    rows: Sequence[TaggedRow],
    names: Sequence[str],
    tokenizer: Any,
    *,
    limit: int,
    case_marks: bool = False,
) -> tuple[list[TaggedExample], int, dict[str, int]]:
    """Examples of at most `limit` tokens, how many rows were cut, and how many words the model
    never sees and why.
    """
    index = {name: number for number, name in enumerate(names)}
    joined = [join_words(row.words, case_marks=case_marks) for row in rows]
    texts, spans = zip(*joined, strict=True) if rows else ((), ())
    encoded = _encode(tokenizer, texts, truncation=True, max_length=limit)
    examples, cut_rows, unseen = [], 0, {"cut": 0, "no_sub_word": 0}
    for row, text, words, ids, offsets in zip(
        rows, texts, spans, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        first = first_subwords(text, offsets, words)
        labels = [IGNORE] * len(ids)
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


def _encode(tokenizer: Any, texts: Sequence[str], **how: Any) -> Any:
    if not texts:
        return {"input_ids": [], "offset_mapping": []}
    return tokenizer(list(texts), return_offsets_mapping=True, verbose=False, **how)
