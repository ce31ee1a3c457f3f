"""Scores that can be believed: a temperature for logits, a threshold below which nothing is
answered, and what both are worth. Pure functions of scores and of which answers are right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgetune.core.confidence import LARGEST_TEMPERATURE, LEAST_TEMPERATURE

Floats = npt.NDArray[np.float64]
BINS = 15
"""Of equal width, as most publications have them (Guo et al. 2017, section 2)."""
SURE = 0.9
"""How sure the share of right answers reaches its target: one-sided, by Clopper and Pearson."""
FEW_WRONG = 10
BINS_DRAWN, LEAST_ROWS = 10, 10
COVERAGES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)


def fit_temperature(logits: npt.ArrayLike, targets: npt.ArrayLike) -> float:
    """The T that makes softmax(logits / T) of (rows, classes) likeliest to give `targets` (rows,).

    Where fewer than FEW_WRONG rows are answered wrongly that T is theirs alone, and 0 where none
    is: the mean score is then held to (right + 1) / (rows + 2), the rule of succession.
    """
    from scipy.optimize import brentq, minimize_scalar

    rows, right = np.asarray(logits, np.float64), np.asarray(targets)

    def loss(log_t: float) -> float:
        return float(-_log_softmax(rows / math.exp(log_t))[np.arange(len(right)), right].mean())

    low, high = math.log(LEAST_TEMPERATURE), math.log(LARGEST_TEMPERATURE)
    log_t = float(
        minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6}).x
    )
    hits = int((rows.argmax(-1) == right).sum())

    def too_sure(log_t: float) -> float:
        mean = best_labels(rows, math.exp(log_t))[1].mean()
        return float(mean - (hits + 1) / (len(right) + 2))

    if len(right) - hits < FEW_WRONG and too_sure(log_t) > 0 > too_sure(high):
        log_t = float(brentq(too_sure, log_t, high))
    return round(float(np.clip(math.exp(log_t), LEAST_TEMPERATURE, LARGEST_TEMPERATURE)), 4)


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(-1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def best_labels(logits: npt.ArrayLike, temperature: float) -> tuple[npt.NDArray[np.int64], Floats]:
    """The best class of each row of logits (rows, classes), and its calibrated probability."""
    p = np.exp(_log_softmax(np.asarray(logits, np.float64) / temperature))
    return p.argmax(-1), p.max(-1)


def probabilities_of(logits: npt.ArrayLike, classes: npt.ArrayLike, temperature: float) -> Floats:
    """The calibrated probability that each row of logits (rows, classes) gives its own class of
    `classes` (rows,).
    """
    p = np.exp(_log_softmax(np.asarray(logits, np.float64) / temperature))
    found: Floats = p[np.arange(len(p)), np.asarray(classes, np.int64)]
    return found


@dataclass(frozen=True)
class Bin:
    """The answers whose score lies in one part of 0 … 1: how many, their mean score, and the share
    of them that is right.
    """

    rows: int
    score: float
    right: float


def reliability(scores: npt.ArrayLike, right: npt.ArrayLike, *, bins: int = BINS) -> list[Bin]:
    """The bins (low, high] that hold answers, from low to high."""
    values, hits = np.asarray(scores, np.float64), np.asarray(right, np.float64)
    places = np.clip(np.ceil(values * bins).astype(int) - 1, 0, bins - 1)
    return [
        Bin(int(mask.sum()), float(values[mask].mean()), float(hits[mask].mean()))
        for at in range(bins)
        if (mask := places == at).any()
    ]


def bins_of_rows(scores: npt.ArrayLike, right: npt.ArrayLike) -> list[Bin]:
    """Bins of equally many answers, for a picture: BINS_DRAWN, or fewer of LEAST_ROWS each
    (adaptive binning, Nguyen and O'Connor 2015).
    """
    values, hits = _surest_first(scores, right)
    parts = max(1, min(BINS_DRAWN, len(values) // LEAST_ROWS))
    return [
        Bin(len(part), float(values[part].mean()), float(hits[part].mean()))
        for part in np.array_split(np.arange(len(values))[::-1], parts)
        if len(part)
    ]


def calibration_error(found: Sequence[Bin]) -> float:
    """Expected calibration error: the bins' mean distance between score and share of right answers,
    each weighing as many rows as it has (Naeini et al. 2015).
    """
    rows = sum(one.rows for one in found)
    return sum(one.rows * abs(one.score - one.right) for one in found) / rows if rows else 0.0


@dataclass(frozen=True)
class Covered:
    """Where only the surest share of the rows is answered: that share, the least score among them,
    and the share of right answers.
    """

    answered: float
    score: float
    right: float


def coverage_curve(
    scores: npt.ArrayLike,
    right: npt.ArrayLike,
    *,
    coverages: Sequence[float] = COVERAGES,
) -> list[Covered]:
    """The share of right answers over the share of rows that is answered, the surest ones first;
    rows of one score are answered together.
    """
    values, hits = _surest_first(scores, right)
    if not len(values):
        return []
    found = []
    for share in coverages:
        least = values[max(1, math.ceil(share * len(values))) - 1]
        count = int((values >= least).sum())
        found.append(Covered(count / len(values), float(least), float(hits[:count].mean())))
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Reached:
    """A threshold, and what it gives on the rows it was chosen on."""

    threshold: float
    answered: float
    right: float


def threshold_for(scores: npt.ArrayLike, right: npt.ArrayLike, target: float) -> Reached | None:
    """The threshold that answers most rows while the share of right answers among them is at least
    `target` with `SURE`; None where no threshold does.

    Of `given` answers with `wrong` ones among them the lower end of their one-sided Clopper-Pearson
    interval counts, so few rows never promise much.
    """
    from scipy.stats import beta

    values, hits = _surest_first(scores, right)
    given, rights = np.arange(1, len(values) + 1), hits.cumsum()
    low = beta.ppf(1 - SURE, np.maximum(rights, 1), given - rights + 1)
    ends = np.append(values[:-1] > values[1:], True)  # rows of one score are answered together
    reached = np.flatnonzero(ends & (rights > 0) & (low >= target))
    return _at(values, hits, int(reached[-1])) if len(reached) else None


def threshold_that_answers(scores: npt.ArrayLike, right: npt.ArrayLike, answered: float) -> Reached:
    """The threshold that lets at least this share of the rows through, and as few more as can
    be.
    """
    values, hits = _surest_first(scores, right)
    least = values[max(1, math.ceil(answered * len(values) - 1e-9)) - 1]
    return _at(values, hits, int((values >= least).sum()) - 1)


def rows_needed(target: float) -> int:
    """How many answers, all right, show a share of at least `target`."""
    return math.ceil(math.log(1 - SURE) / math.log(target) - 1e-9)


def _at(values: Floats, hits: Floats, last: int) -> Reached:
    """The threshold half-way between the last row that is answered and the next; 0 after the last
    of all.
    """
    threshold = 0.0 if last + 1 == len(values) else float(values[last] + values[last + 1]) / 2
    return Reached(threshold, (last + 1) / len(values), float(hits[: last + 1].mean()))


def _surest_first(scores: npt.ArrayLike, right: npt.ArrayLike) -> tuple[Floats, Floats]:
    values, hits = np.asarray(scores, np.float64), np.asarray(right, np.float64)
    order = np.argsort(-values, kind="stable")
    return values[order], hits[order]
