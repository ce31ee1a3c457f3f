"""What an embedding adapter is worth: it finds the text that belongs to another, the nearest row
has the same label, or its cosines are ordered as people's scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.core.errors import DataError
from edgetune.data.contrasts import ContrastRow, contrast_rows
from edgetune.data.rows import Rows
from edgetune.evaluation.answers import Advance, HeadAnswers
from edgetune.evaluation.label_measures import Measured
from edgetune.metrics.labels import accuracy, regression_metrics
from edgetune.metrics.retrieval import find_own, nearest_other, retrieval_metrics

TEXTS_AT_ONCE = 32


def measure_embeddings(
    answers: HeadAnswers, source: Rows, skip_invalid: bool, advance: Advance
) -> Measured:
    """Spearman and Pearson of cosines with scores; or recall and reciprocal rank of each text's
    own among all; or the accuracy of the nearest other row's label.
    """
    rows, skipped = contrast_rows(source, answers.prompt_format, skip_invalid=skip_invalid)
    if len(rows) < 2:
        raise DataError(
            "embeddings are compared with those of other rows",
            where=source.source,
            expected="at least 2 rows",
            got=str(len(rows)),
        )
    if answers.prompt_format.positive is None:
        metrics, predictions = _by_labels(answers, rows, advance)
    else:
        first, second = (_embedded(answers, rows, at, advance) for at in (0, 1))
        measure = _by_scores if answers.prompt_format.label is not None else _by_texts
        metrics, predictions = measure(rows, first, second)
    return Measured(metrics, predictions, skipped)


def _by_labels(
    answers: HeadAnswers, rows: Sequence[ContrastRow], advance: Advance
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    labels = [row.label or "" for row in rows]
    found = [labels[at] for at in nearest_other(_embedded(answers, rows, 0, advance))]
    predictions = [
        {"line": row.line, "prediction": label, "label": row.label}
        for row, label in zip(rows, found, strict=True)
    ]
    return {"accuracy": accuracy(found, labels)}, predictions


def _by_scores(
    rows: Sequence[ContrastRow], first: npt.NDArray[np.float32], second: npt.NDArray[np.float32]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    cosines = (first * second).sum(axis=1).tolist()
    scores = [row.score or 0.0 for row in rows]
    metrics = regression_metrics(cosines, scores)
    predictions = [
        {"line": row.line, "prediction": cosine, "value": row.score}
        for row, cosine in zip(rows, cosines, strict=True)
    ]
    return {name: metrics[name] for name in ("spearman", "pearson")}, predictions


def _by_texts(
    rows: Sequence[ContrastRow], first: npt.NDArray[np.float32], second: npt.NDArray[np.float32]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    own = [row.texts[1] for row in rows]
    ranks, found = find_own(
        first, second, anchor_keys=[row.texts[0] for row in rows], other_keys=own
    )
    predictions = [
        {"line": row.line, "prediction": wanted if rank == 1 else own[at], "label": wanted}
        for row, wanted, rank, at in zip(rows, own, ranks.tolist(), found.tolist(), strict=True)
    ]
    return retrieval_metrics(ranks), predictions


def _embedded(
    answers: HeadAnswers, rows: Sequence[ContrastRow], column: int, advance: Advance
) -> npt.NDArray[np.float32]:
    """The unit-length embeddings of one text of every row."""
    texts = [row.texts[column] for row in rows]
    parts = []
    for at in range(0, len(texts), TEXTS_AT_ONCE):
        parts.append(answers.embed(texts[at : at + TEXTS_AT_ONCE]))
        advance(min(at + TEXTS_AT_ONCE, len(texts)), len(texts))
    return np.concatenate(parts)
