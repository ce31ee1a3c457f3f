"""Labels that spread from the texts that have one along neighbours in an embedding (Zhou et al.
2003, "Learning with local and global consistency"), and how they join those of a head.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.sparse import coo_matrix, diags

from edgetune.metrics.retrieval import Floats, Integers

NEIGHBOURS, TEMPERATURE = 10, 0.1  # of a text, and of the similarities between them
STAY = 0.05  # of a text's labels that stay with it in a step of spreading
STEPS = 30
ROWS_AT_ONCE = 1024
LEAST = 1e-6  # a probability that a voice does not go below, so that it cannot forbid


def spread_labels(
    known: Floats, classes: Integers, unknown: Floats, *, labels: int, neighbours: int = NEIGHBOURS
) -> Floats:
    """Probabilities (unknown, labels) of texts by their unit-length embeddings (unknown, hidden)
    and those of the labelled ones (known, hidden) with `classes` (known,).
    """
    points = np.concatenate([known, unknown])
    edges = _edges(points, min(neighbours, len(points) - 1))
    start = np.zeros((len(points), labels), np.float32)
    start[np.arange(len(known)), classes] = 1.0
    flow = start
    for _ in range(STEPS):
        flow = (1.0 - STAY) * (edges @ flow) + STAY * start
    found: Floats = flow[len(known) :]
    totals = found.sum(axis=1, keepdims=True)
    # a text that no label reaches may have any
    return np.where(totals > 0, found / np.maximum(totals, 1e-30), np.float32(1 / labels))


def together(voices: list[tuple[Floats, float]]) -> Floats:
    """The weighted geometric mean of tables of probabilities (texts, labels), each row of sum 1."""
    total = sum(weight for _, weight in voices)
    logs = sum(weight / total * np.log(np.maximum(table, LEAST)) for table, weight in voices)
    product = np.exp(logs)
    normed: Floats = (product / product.sum(axis=1, keepdims=True)).astype(np.float32)
    return normed


def surest(probabilities: Floats, share: float) -> Integers:
    """The surest `share` of the rows, in their order."""
    order = np.argsort(-probabilities.max(axis=1), kind="stable")
    kept: Integers = np.sort(order[: round(share * len(probabilities))])
    return kept


def _edges(points: Floats, count: int) -> Any:
    """The symmetric matrix (points, points) of each one's nearest others, normalised by both."""
    rows, columns, weights = list[Integers](), list[Integers](), list[Floats]()
    for at in range(0, len(points), ROWS_AT_ONCE):
        part = points[at : at + ROWS_AT_ONCE]
        similar = part @ points.T
        own = np.arange(len(part))
        similar[own, at + own] = -np.inf
        nearest = np.argpartition(-similar, count - 1, axis=1)[:, :count]
        rows.append(np.repeat(at + own, count))
        columns.append(nearest.ravel())
        near = np.take_along_axis(similar, nearest, axis=1).ravel()
        weights.append(np.exp((near - 1.0) / TEMPERATURE))
    where = (np.concatenate(rows), np.concatenate(columns))
    one_way = coo_matrix((np.concatenate(weights), where), shape=(len(points),) * 2).tocsr()
    edges = one_way.maximum(one_way.T)
    scale = diags(1.0 / np.sqrt(np.asarray(edges.sum(axis=1)).ravel()))
    return (scale @ edges @ scale).astype(np.float32)
