"""Intervals against scipy, and the numbers of a preference evaluation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from edgetune.metrics.statistics import paired_bootstrap, preference_metrics, wilson


@pytest.mark.parametrize(("hits", "rows"), [(0, 10), (125, 200), (7, 7), (1, 3)])
def test_wilson_is_scipys(hits: int, rows: int) -> None:
    expected = binomtest(hits, rows).proportion_ci(method="wilson")
    assert wilson(hits / rows, rows) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_the_bootstrap_is_near_the_normal_interval() -> None:
    differences = np.random.default_rng(1).choice([-1.0, 0.0, 1.0], 1000, p=[0.2, 0.5, 0.3])
    half = 1.96 * differences.std() / 1000**0.5
    expected = (differences.mean() - half, differences.mean() + half)
    assert paired_bootstrap(differences.tolist()) == pytest.approx(expected, abs=0.005)
    assert paired_bootstrap(differences.tolist()) == paired_bootstrap(differences.tolist())


def test_accuracy_stands_beside_the_length_baseline() -> None:
    metrics = preference_metrics([1.0, 1.0, 0.5, 0.0], [1.0, 0.0, 0.5, 0.0])
    assert (
        metrics["preference_accuracy"],
        metrics["length_baseline"],
        metrics["above_length"],
    ) == (0.625, 0.375, 0.25)
    for name in ("preference_accuracy", "length_baseline", "above_length"):
        assert metrics[f"{name}_low"] <= metrics[name] <= metrics[f"{name}_high"]
