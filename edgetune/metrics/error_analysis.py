"""Which rows are answered wrongly, and how: the classes' figures, the confusions, the worst rows,
and what the scores are worth. Plain data for JSON and for pages.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgetune.core.tasks import THRESHOLD
from edgetune.metrics.calibration import (
    bins_of_rows,
    calibration_error,
    coverage_curve,
    reliability,
    threshold_that_answers,
)
from edgetune.metrics.statistics import share

MATRIX_LABELS = 16
"""Of so many labels at most the whole confusion matrix is kept; of more the largest confusions."""
CONFUSIONS, WORST = 20, 25
MOSTLY_ANSWERED = 0.95


@dataclass(frozen=True)
class JudgedRow:
    """A row, what is right and what was answered; `score` None where an answer has none."""

    line: int
    text: str
    wanted: str
    got: str
    score: float | None = None
    rejected: bool = False

    @property
    def right(self) -> bool:
        """Whether the label is the right one, counted or not."""
        return self.got == self.wanted

    def to_dict(self) -> dict[str, Any]:
        """A line of an errors file: what was rejected is no answer."""
        found = asdict(self) | {"got": None if self.rejected else self.got}
        found["rejected"] = self.got if self.rejected else None
        return {name: value for name, value in found.items() if value is not None or name == "got"}


def wrong_first(answers: Sequence[JudgedRow]) -> list[JudgedRow]:
    """The wrong ones, the surest first; those without a score in the order of their lines."""
    wrong = [one for one in answers if not one.right]
    return sorted(wrong, key=lambda one: (-(one.score or 0.0), one.line))


def class_figures(answers: Sequence[JudgedRow]) -> list[dict[str, Any]]:
    """Precision, recall, F1 and support of every label that was wanted or answered, by name."""
    from sklearn.metrics import precision_recall_fscore_support

    labels = sorted({one.wanted for one in answers} | {one.got for one in answers})
    with warnings.catch_warnings():  # "more than half are classes": few rows of many labels
        warnings.simplefilter("ignore", UserWarning)
        columns = precision_recall_fscore_support(
            [one.wanted for one in answers],
            [one.got for one in answers],
            labels=labels,
            zero_division=0,
        )
    return [
        {
            "label": label,
            "precision": float(p),
            "recall": float(r),
            "f1": float(f1),
            "support": int(n),
        }
        for label, p, r, f1, n in zip(labels, *columns, strict=True)
    ]


def label_figures(
    predictions: Sequence[Collection[str]], references: Sequence[Collection[str]]
) -> list[dict[str, Any]]:
    """The same of rows that have several labels, each a decision of its own."""
    labels = sorted({label for row in [*predictions, *references] for label in row})
    return [{"label": label, **_figures(label, predictions, references)} for label in labels]


def _figures(
    label: str, predictions: Sequence[Collection[str]], references: Sequence[Collection[str]]
) -> dict[str, Any]:
    hits = sum(
        label in ours and label in theirs
        for ours, theirs in zip(predictions, references, strict=True)
    )
    given, support = (sum(label in row for row in rows) for rows in (predictions, references))
    return {
        "precision": hits / given if given else 0.0,
        "recall": hits / support if support else 0.0,
        "f1": 2 * hits / (given + support) if given + support else 0.0,
        "support": support,
    }


def confusions(answers: Sequence[JudgedRow]) -> list[dict[str, Any]]:
    """(wanted, got) of wrong answers with their number, the most frequent first."""
    counts = Counter((one.wanted, one.got) for one in answers if not one.right)
    order = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [{"wanted": wanted, "got": got, "rows": rows} for (wanted, got), rows in order]


def confusion_matrix(answers: Sequence[JudgedRow]) -> dict[str, Any]:
    """`labels`, and `rows[i][j]`: how many rows of label i were answered j."""
    counts = Counter((one.wanted, one.got) for one in answers)
    labels = sorted({label for pair in counts for label in pair})
    return {
        "labels": labels,
        "rows": [[counts[wanted, got] for got in labels] for wanted in labels],
    }


def error_analysis(answers: Sequence[JudgedRow]) -> dict[str, Any]:
    """Of one label a row: figures a class, confusions (the matrix of few labels), worst rows."""
    matrix = confusion_matrix(answers)
    few = len(matrix["labels"]) <= MATRIX_LABELS
    return {
        "classes": class_figures(answers),
        "confusions": confusions(answers)[:CONFUSIONS],
        "matrix": matrix if few else None,
        **worst(answers),
    }


Decided = tuple[int, str, Collection[str], Mapping[str, float]]
"""A row that has several labels: its line, text, right labels, and the probability of each."""


def label_decisions(rows: Sequence[Decided]) -> list[JudgedRow]:
    """Each label of each row as an answer of its own, yes or no."""
    return [
        JudgedRow(line, label, _yes(label in right), _yes(p >= THRESHOLD), max(p, 1 - p))
        for line, _, right, scores in rows
        for label, p in scores.items()
    ]


def whole_sets(rows: Sequence[Decided]) -> list[JudgedRow]:
    """Each row as one answer, as sure as its least certain label."""
    return [
        JudgedRow(
            line,
            text,
            _listed(right),
            _listed(set_of(scores)),
            min((max(p, 1 - p) for p in scores.values()), default=None),
        )
        for line, text, right, scores in rows
    ]


def set_analysis(rows: Sequence[Decided]) -> dict[str, Any]:
    """Of rows that have several labels: figures a label, worst rows, what the scores are worth."""
    figures = label_figures([set_of(row[3]) for row in rows], [row[2] for row in rows])
    return {"classes": figures, **worst(whole_sets(rows)), **score_curves(label_decisions(rows))}


def tag_analysis(words: Sequence[JudgedRow], sentences: Sequence[JudgedRow]) -> dict[str, Any]:
    """Of tagged words: figures and confusions of the words, the worst of the sentences."""
    seen = [one for one in words if one.score]
    return {**error_analysis(words), **worst(sentences), **score_curves(seen)}


def set_of(scores: Mapping[str, float]) -> tuple[str, ...]:
    """The labels that a row has: those of at least THRESHOLD."""
    return tuple(label for label, p in scores.items() if p >= THRESHOLD)


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def _listed(labels: Iterable[str]) -> str:
    return json.dumps(sorted(labels), ensure_ascii=False)


def worst(answers: Sequence[JudgedRow]) -> dict[str, Any]:
    """How many are wrong, and the surest of them."""
    wrong = wrong_first(answers)
    return {"wrong": len(wrong), "worst": [one.to_dict() for one in wrong[:WORST]]}


def score_metrics(
    answers: Sequence[JudgedRow], out_of_scope: Sequence[JudgedRow] = (), *, threshold: float | None
) -> dict[str, float]:
    """What the scores of in-scope answers are worth, and of rows that are none of the labels how
    many are rejected; `threshold` is the one that was in force, None for none.
    """
    scores = [one.score or 0.0 for one in answers]
    right = [one.right for one in answers]
    found = dict[str, float]()
    if answers:
        found["expected_calibration_error"] = calibration_error(reliability(scores, right))
    if answers and threshold is not None:
        given = [one for one in answers if not one.rejected]
        found["answered"] = len(given) / len(answers)
        found["accuracy_answered"] = share(one.right for one in given)
    if out_of_scope:
        if threshold is not None:
            found["out_of_scope_recall"] = share(one.rejected for one in out_of_scope)
        if answers:
            mostly = threshold_that_answers(scores, right, MOSTLY_ANSWERED).threshold
            found["out_of_scope_recall_at_95"] = share(
                (one.score or 0.0) < mostly for one in out_of_scope
            )
    return found


def score_curves(answers: Sequence[JudgedRow]) -> dict[str, Any]:
    """The reliability diagram's bins, of equally many rows, and the curve of right answers over
    answered rows.
    """
    scores = [one.score or 0.0 for one in answers]
    right = [one.right for one in answers]
    return {
        "reliability": [asdict(one) for one in bins_of_rows(scores, right)],
        "coverage": [asdict(one) for one in coverage_curve(scores, right)],
    }
