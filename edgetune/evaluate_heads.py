"""Task metrics of heads that give several labels, a number, or a tag for every word."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from edgetune.data import Rows
from edgetune.examples.tagging import tagged_rows, unknown_tag
from edgetune.examples.targets import multi_label_rows, unknown_label, value_rows
from edgetune.problems import multi_label_metrics, regression_metrics
from edgetune.tag_metrics import tag_metrics
from edgetune.token_classifier import TAGGING

ROWS_AT_ONCE = 16
UNKNOWN = "is not known to the adapter"
Advance = Callable[[int, int], None]
Measured = tuple[dict[str, float], list[dict[str, Any]], int]  # metrics, predictions, rows left out
T = TypeVar("T")


def measurements_of(task: str, problem: str | None) -> Callable[[Any, Rows, bool, Advance], Measured] | None:
    """How such a head is measured; None for one that gives a single label."""
    if task == TAGGING:
        return measure_tags
    return {"multi-label": measure_label_sets, "regression": measure_values}.get(problem or "")


def measure_tags(answers: Any, source: Rows, skip_invalid: bool, advance: Advance) -> Measured:
    """Entity F1 and accuracy over the words of all rows."""
    rows, skipped = tagged_rows(source, answers.prompt_format, skip_invalid=skip_invalid)
    known = set(answers.labels or ())
    for row in rows:
        if not set(row.tags) <= known:
            raise unknown_tag(row, source.source, sorted(known), what=UNKNOWN)
    predicted = _answered(answers.tag, [row.words for row in rows], advance)
    metrics = tag_metrics(predicted, [row.tags for row in rows], answers.labels or ())
    predictions = [
        {"line": row.line, "tokens": row.words, "prediction": tags, "tags": row.tags} for row, tags in zip(rows, predicted, strict=True)
    ]
    return metrics, predictions, skipped


def measure_label_sets(answers: Any, source: Rows, skip_invalid: bool, advance: Advance) -> Measured:
    """Micro and macro F1, and the share of rows with exactly the right labels."""
    rows, skipped = multi_label_rows(source, answers.prompt_format, skip_invalid=skip_invalid)
    known = set(answers.labels or ())
    for row in rows:
        if not set(row.target) <= known:
            raise unknown_label(row, source.source, sorted(known), what=UNKNOWN)
    predicted = _answered(answers.label_sets, [row.text for row in rows], advance)
    predictions = [
        {"line": row.line, "prediction": list(labels), "labels": list(row.target)} for row, labels in zip(rows, predicted, strict=True)
    ]
    return multi_label_metrics(predicted, [row.target for row in rows]), predictions, skipped


def measure_values(answers: Any, source: Rows, skip_invalid: bool, advance: Advance) -> Measured:
    """Pearson and Spearman correlation, and the mean squared error."""
    rows, skipped = value_rows(source, answers.prompt_format, skip_invalid=skip_invalid)
    predicted = _answered(answers.values, [row.text for row in rows], advance)
    predictions = [{"line": row.line, "prediction": value, "value": row.target} for row, value in zip(rows, predicted, strict=True)]
    return regression_metrics(predicted, [row.target for row in rows]), predictions, skipped


def _answered(answer: Callable[[Sequence[Any]], list[T]], rows: Sequence[Any], advance: Advance) -> list[T]:
    found: list[T] = []
    for at in range(0, len(rows), ROWS_AT_ONCE):
        found += answer(rows[at : at + ROWS_AT_ONCE])
        advance(len(found), len(rows))
    return found
