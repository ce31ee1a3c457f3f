"""How well embeddings find what belongs together: in numpy, rows of unit length."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
ROWS_AT_ONCE = 512


def find_own(
    anchors: Floats,
    others: Floats,
    *,
    anchor_keys: Sequence[Hashable],
    other_keys: Sequence[Hashable],
) -> tuple[Integers, Integers]:
    """Of each anchor the rank of the first right text among all, from 1, and the text that comes
    first.

    Row i of the others is what belongs to anchor i; a text equal to one that belongs to an equal
    anchor is right too. A text that is the anchor itself does not count.
    """
    own: dict[Hashable, set[Hashable]] = {}
    for anchor, other in zip(anchor_keys, other_keys, strict=True):
        own.setdefault(anchor, set()).add(other)
    ranks, firsts = list[int](), list[int]()
    for at in range(0, len(anchors), ROWS_AT_ONCE):
        scores = anchors[at : at + ROWS_AT_ONCE] @ others.T
        for row, anchor in zip(scores, anchor_keys[at : at + ROWS_AT_ONCE], strict=True):
            right = np.array([key in own[anchor] for key in other_keys])
            itself = np.array([key == anchor for key in other_keys]) & ~right
            row = np.where(itself, -np.inf, row)
            best = np.where(right, row, -np.inf)
            ranks.append(1 + int(np.sum((row > best.max()) & ~right)))
            firsts.append(int(best.argmax()) if ranks[-1] == 1 else int(row.argmax()))
    return np.array(ranks), np.array(firsts)


def retrieval_metrics(ranks: Integers) -> dict[str, float]:
    """Mean reciprocal rank, and how often the right text is first or among the ten first."""
    return {
        "recall_at_1": float((ranks <= 1).mean()),
        "recall_at_10": float((ranks <= 10).mean()),
        "mrr": float((1 / ranks).mean()),
    }


def nearest_other(embeddings: Floats) -> Integers:
    """Of each row the nearest other one. At least two rows."""
    found = []
    for at in range(0, len(embeddings), ROWS_AT_ONCE):
        scores = embeddings[at : at + ROWS_AT_ONCE] @ embeddings.T
        rows = np.arange(len(scores))
        scores[rows, at + rows] = -np.inf
        found.append(scores.argmax(axis=1))
    return np.concatenate(found)
