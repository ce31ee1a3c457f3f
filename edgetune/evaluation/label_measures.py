"""Answers of adapters with labels → metrics, what their scores are worth, and which rows are
wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from edgetune.core.confidence import ScoredLabel
from edgetune.core.errors import DataError
from edgetune.core.settings import some_of
from edgetune.core.text import Text
from edgetune.data.labels import labelled_rows
from edgetune.data.out_of_scope import out_of_scope_rows
from edgetune.data.rows import Rows
from edgetune.data.tagging import tagged_rows, unknown_tag
from edgetune.data.targets import multi_label_rows, unknown_labels
from edgetune.evaluation.answers import Advance, Answers, HeadAnswers
from edgetune.metrics.error_analysis import (
    JudgedRow,
    error_analysis,
    label_decisions,
    score_curves,
    score_metrics,
    set_analysis,
    set_of,
    tag_analysis,
    whole_sets,
    wrong_first,
)
from edgetune.metrics.labels import accuracy, macro_f1, multi_label_metrics, tag_metrics

UNKNOWN = "is not known to the adapter"
ROWS_AT_ONCE = 16
Q = TypeVar("Q")  # a question
A = TypeVar("A")  # the answer to it


@dataclass(frozen=True)
class Measured:
    """What came of a file's rows."""

    metrics: dict[str, float]
    predictions: list[dict[str, Any]]
    skipped: int
    analysis: dict[str, Any] = field(default_factory=dict)
    errors: list[dict[str, Any]] = field(default_factory=list)


def answered(
    answer: Callable[[Sequence[Q]], list[A]], questions: Sequence[Q], advance: Advance
) -> list[A]:
    """The answers to all questions, ROWS_AT_ONCE at a time."""
    found: list[A] = []
    for at in range(0, len(questions), ROWS_AT_ONCE):
        found += answer(questions[at : at + ROWS_AT_ONCE])
        advance(len(found), len(questions))
    return found


def measure_classification(
    answers: Answers, source: Rows, skip_invalid: bool, advance: Advance
) -> Measured:
    """Accuracy and macro-F1 of rows that are one of the labels, whatever their score; beside them
    what the scores are worth, and how rows fare that are none of the labels.
    """
    confidence = answers.confidence
    outside, source = out_of_scope_rows(
        source,
        answers.prompt_format,
        confidence.out_of_scope,
        empty=confidence.threshold is not None,
    )
    rows, skipped = (
        labelled_rows(source, answers.prompt_format, skip_invalid=skip_invalid)
        if source.rows or not outside
        else ([], 0)
    )
    known = set(answers.labels or ())
    for row in rows:
        if row.label not in known:
            raise DataError(
                f'the adapter does not know the label "{row.label}"',
                where=f"{source.source}, line {row.line}",
                expected=f"one of {', '.join(sorted(known)[:8])}{' …' if len(known) > 8 else ''}",
            )
    found = answered(answers.scored, [row.text for row in [*rows, *outside]], advance)
    judged = [
        JudgedRow(row.line, shown_text(row.text), row.label, one.label, one.score, one.rejected)
        for row, one in zip([*rows, *outside], found, strict=True)
    ]
    inside, others = judged[: len(rows)], judged[len(rows) :]
    predicted, expected = [one.got for one in inside], [one.wanted for one in inside]
    metrics, analysis, errors = dict[str, float](), dict[str, Any](), wrong_first(inside)
    if inside:
        metrics |= {
            "accuracy": accuracy(predicted, expected),
            "macro_f1": macro_f1(predicted, expected),
        }
        analysis |= error_analysis(inside)
    if all(one.score is not None for one in judged):
        metrics |= score_metrics(inside, others, threshold=confidence.threshold)
        analysis |= score_curves(inside) if inside else {}
        errors = wrong_first([*inside, *(one for one in others if not one.rejected)])
    if not metrics:
        raise DataError(
            "no row has a label, and no threshold rejects any",
            where=source.source,
            expected=f"rows with {some_of(sorted(known))}",
        )
    return Measured(
        metrics,
        [_prediction(one) for one in judged],
        skipped,
        analysis,
        [one.to_dict() for one in errors],
    )


def measure_words(
    answers: HeadAnswers, source: Rows, skip_invalid: bool, advance: Advance
) -> Measured:
    """Entity F1 and accuracy over the words of all rows."""
    rows, skipped = tagged_rows(
        source, answers.prompt_format, skip_invalid=skip_invalid, labels=answers.labels
    )
    known = sorted(answers.labels or ())
    for row in rows:
        if error := unknown_tag(row, source.source, known, what=UNKNOWN):
            raise error
    found = answered(answers.scored_tags, [row.words for row in rows], advance)
    predicted = [[one.label for one in tags] for tags in found]
    metrics = tag_metrics(predicted, [row.tags for row in rows], answers.labels or ())
    words = [
        JudgedRow(row.line, word, wanted, one.label, one.score)
        for row, tags in zip(rows, found, strict=True)
        for word, wanted, one in zip(row.words, row.tags, tags, strict=True)
    ]
    metrics |= score_metrics([one for one in words if one.score], threshold=None)
    sentences = [
        JudgedRow(row.line, " ".join(row.words), " ".join(row.tags), " ".join(tags), _least(scores))
        for row, tags, scores in zip(rows, predicted, found, strict=True)
    ]
    return Measured(
        metrics,
        [
            {"line": row.line, "tokens": row.words, "prediction": tags, "tags": row.tags}
            for row, tags in zip(rows, predicted, strict=True)
        ],
        skipped,
        tag_analysis(words, sentences),
        [one.to_dict() for one in wrong_first(sentences)],
    )


def _least(tags: Sequence[ScoredLabel]) -> float | None:
    """A sentence is as sure as its least certain word that was seen."""
    return min((one.score for one in tags if one.score), default=None)


def measure_sets(
    answers: HeadAnswers, source: Rows, skip_invalid: bool, advance: Advance
) -> Measured:
    """Micro and macro F1, and the share of rows with exactly the right labels."""
    rows, skipped = multi_label_rows(source, answers.prompt_format, skip_invalid=skip_invalid)
    labels = answers.labels or ()
    for row in rows:
        if error := unknown_labels(row, source.source, sorted(labels), what=UNKNOWN):
            raise error
    found = answered(answers.scored_sets, [row.text for row in rows], advance)
    decided = [
        (row.line, shown_text(row.text), row.target, scores)
        for row, scores in zip(rows, found, strict=True)
    ]
    predicted = [set_of(scores) for scores in found]
    metrics = multi_label_metrics(predicted, [row.target for row in rows])
    return Measured(
        metrics | score_metrics(label_decisions(decided), threshold=None),
        [
            {"line": row.line, "prediction": list(ours), "labels": list(row.target)}
            for row, ours in zip(rows, predicted, strict=True)
        ],
        skipped,
        set_analysis(decided),
        [one.to_dict() for one in wrong_first(whole_sets(decided))],
    )


def _prediction(one: JudgedRow) -> dict[str, Any]:
    plain = {"line": one.line, "prediction": one.got, "label": one.wanted}
    scored = {} if one.score is None else {"score": round(one.score, 6)}
    return plain | scored | ({"rejected": True} if one.rejected else {})


def shown_text(text: Text) -> str:
    """A text, or two with a bar between them, for people."""
    return text if isinstance(text, str) else " | ".join(text)
