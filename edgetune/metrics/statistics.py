"""Shares, correlations, and 95 % intervals of shares and of paired differences: the same items
before and after.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")
Z = 1.959963984540054  # the normal distribution's 97.5 % point


def share(hits: Iterable[bool]) -> float:
    """How many of these are true, of 1; 0 where there are none."""
    flags = list(hits)
    return sum(flags) / len(flags) if flags else 0.0


def wilson(share: float, rows: int) -> tuple[float, float]:
    """The 95 % score interval of a share over `rows` rows (Wilson 1927). Half counts (ties) make it
    a little wide.
    """
    if rows == 0:
        return 0.0, 1.0
    middle = (share + Z**2 / (2 * rows)) / (1 + Z**2 / rows)
    half = Z / (1 + Z**2 / rows) * math.sqrt(share * (1 - share) / rows + Z**2 / (4 * rows**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_bootstrap(
    differences: Sequence[float], *, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of paired differences, rows drawn with
    replacement.
    """
    values = np.asarray(differences, np.float64)
    chosen = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    low, high = np.percentile(values[chosen].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def headline(metrics: Mapping[str, T]) -> dict[str, T]:
    """The metrics without the ends of their intervals, for a line of text."""
    return {name: value for name, value in metrics.items() if not name.endswith(("_low", "_high"))}


def preference_metrics(right: Sequence[float], longer: Sequence[float]) -> dict[str, float]:
    """Preference accuracy beside "the longer answer wins", each with its interval, and their
    difference with one.

    `right` and `longer` hold 1, 0 or ½ (a tie) for each row.
    """
    rows = len(right)
    accuracy, baseline = sum(right) / rows, sum(longer) / rows
    metrics: dict[str, float] = {}
    for name, share in (("preference_accuracy", accuracy), ("length_baseline", baseline)):
        low, high = wilson(share, rows)
        metrics |= {name: share, f"{name}_low": low, f"{name}_high": high}
    low, high = paired_bootstrap([a - b for a, b in zip(right, longer, strict=True)])
    return metrics | {
        "above_length": accuracy - baseline,
        "above_length_low": low,
        "above_length_high": high,
    }


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


def correlation(values: Values) -> float:
    """Pearson's r of the two columns; 0 where one of them is constant."""
    x, y = values.T
    if len(values) < 2 or not (np.ptp(x) and np.ptp(y)):
        return 0.0
    r: Values = np.corrcoef(x, y)
    return float(r[0, 1])


def spearman(values: Values) -> float:
    """Rank correlation of the two columns, equal values sharing their mean rank.

    The p-value that scipy's `spearmanr` finds too would double a bootstrap's time.
    """
    from scipy.stats import rankdata

    return correlation(rankdata(values, axis=0))


def paired_interval(before: Values, after: Values, statistic: Statistic) -> tuple[float, float]:
    """The 95 % interval of statistic(after) − statistic(before).

    Of a mean: the normal interval of the paired differences. Of anything else: the percentile
    bootstrap over items.
    """
    if statistic is mean:
        difference = after[:, 0] - before[:, 0]
        error = (
            float(difference.std(ddof=1)) / math.sqrt(len(difference))
            if len(difference) > 1
            else math.inf
        )
        centre = float(difference.mean())
        return centre - Z * error, centre + Z * error
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, len(before), (RESAMPLES, len(before)))
    changes = [statistic(after[rows]) - statistic(before[rows]) for rows in drawn]
    low, high = np.quantile(changes, [0.025, 0.975])
    return float(low), float(high)
