"""Paired differences of a statistic with their 95 % intervals: the same items before and after."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from edgetune.intervals import Z

Values = npt.NDArray[np.float64]  # (items, columns): what a statistic is computed from
Statistic = Callable[[Values], float]
RESAMPLES = 2000


def mean(values: Values) -> float:
    """Of the first column."""
    return float(values[:, 0].mean())


def perplexity(values: Values) -> float:
    """exp of nats (first column) over tokens (second)."""
    return math.exp(min(float(values[:, 0].sum() / values[:, 1].sum()), 700.0))


def bits_per_byte(values: Values) -> float:
    """Nats (first column) over bytes (third), in bits."""
    return float(values[:, 0].sum() / values[:, 2].sum() / math.log(2))


def spearman(values: Values) -> float:
    """Rank correlation of the two columns, equal values sharing their mean rank."""
    x, y = (_ranks(values[:, column]) for column in (0, 1))
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt(float((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / size if size else 0.0


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    ranks: npt.NDArray[np.float64] = (last - (counts - 1) / 2)[group]
    return ranks


def paired_interval(before: Values, after: Values, statistic: Statistic) -> tuple[float, float]:
    """The 95 % interval of statistic(after) − statistic(before).

    Of a mean: the normal interval of the paired differences. Of anything else: the percentile bootstrap over items.
    """
    if statistic is mean:
        difference = after[:, 0] - before[:, 0]
        error = float(difference.std(ddof=1)) / math.sqrt(len(difference)) if len(difference) > 1 else math.inf
        centre = float(difference.mean())
        return centre - Z * error, centre + Z * error
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, len(before), (RESAMPLES, len(before)))
    changes = [statistic(after[rows]) - statistic(before[rows]) for rows in drawn]
    low, high = np.quantile(changes, [0.025, 0.975])
    return float(low), float(high)
