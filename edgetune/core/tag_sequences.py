"""The tags of a sentence's words, chosen together: the likeliest sequence that marks entities."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.core.text import has_entities

IOB2 = "IOB2"  # B-x begins an entity, I-x continues it
FORBIDDEN = -np.inf  # there is always another path: what may not be continued may be begun


def scheme_of_labels(labels: Sequence[str]) -> str | None:
    """IOB2 for tags that training has brought into that form; None for others, whose words are
    tagged one by one.
    """
    prefixes = {label[:1] for label in labels}
    return IOB2 if has_entities(labels) and not prefixes & set("ESLU") else None


def likeliest_tags(
    logits: Sequence[npt.ArrayLike | None], labels: Sequence[str], *, scheme: str | None
) -> list[int | None]:
    """The number of each word's tag, by its logits (labels,); None for a word without.

    IOB2: the tags of the largest sum in which every I-x stands after B-x or I-x (Viterbi), for the
    words between two that have no logits. Otherwise each word's own largest.
    """
    found: list[int | None] = [None] * len(logits)
    seen: list[int] = []
    for at, row in enumerate([*logits, None]):
        if row is not None:
            seen.append(at)
            continue
        if seen:
            rows = np.asarray([logits[place] for place in seen], np.float64)  # (words, labels)
            tags = _path(rows, *_rules(tuple(labels))) if scheme == IOB2 else rows.argmax(-1)
            for place, tag in zip(seen, tags, strict=True):
                found[place] = int(tag)
        seen = []
    return found


def _path(
    rows: npt.NDArray[np.float64], first: npt.NDArray[np.float64], after: npt.NDArray[np.float64]
) -> list[int]:
    """Viterbi over logits (words, labels)."""
    sums, came_from = rows[0] + first, []
    for row in rows[1:]:
        reached = sums[:, None] + after  # (label before, label)
        best = reached.argmax(0)
        came_from.append(best)
        sums = reached[best, np.arange(len(best))] + row
    path = [int(sums.argmax())]
    for best in reversed(came_from):
        path.append(int(best[path[-1]]))
    return path[::-1]


@lru_cache(maxsize=64)
def _rules(labels: tuple[str, ...]) -> tuple[Any, Any]:
    """0 or FORBIDDEN: for a sentence's first label (labels,), and for one label after another
    (before, after). A type without B- is begun by I-, as nothing else could.
    """
    known = set(labels)
    first = np.zeros(len(labels))
    after = np.zeros((len(labels), len(labels)))
    for at, label in enumerate(labels):
        begin = "B" + label[1:]
        if label[:1] == "I" and begin in known:
            first[at] = FORBIDDEN
            after[:, at] = [0.0 if one in (begin, label) else FORBIDDEN for one in labels]
    return first, after
