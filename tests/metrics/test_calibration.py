"""Temperature, expected calibration error, coverage and thresholds, against references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import binom

from edgetune.metrics.calibration import (
    SURE,
    Bin,
    Covered,
    best_labels,
    bins_of_rows,
    calibration_error,
    coverage_curve,
    fit_temperature,
    reliability,
    rows_needed,
    threshold_for,
    threshold_that_answers,
)


def overconfident(rows: int, *, sharpness: float, classes: int = 5) -> tuple[np.ndarray, ...]:
    """Logits `sharpness` times those that the targets were drawn from."""
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(rows, classes)) * 2
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return logits * sharpness, np.array([draw.choice(classes, p=row) for row in p])


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_the_temperature_is_the_one_a_minimiser_of_torchs_loss_finds(sharpness: float) -> None:
    logits, targets = overconfident(4000, sharpness=sharpness)
    rows, right = torch.from_numpy(logits), torch.from_numpy(targets)

    def loss(t: np.ndarray) -> float:
        return torch.nn.functional.cross_entropy(rows / float(t[0]), right).item()

    expected = minimize(loss, x0=[1.0], method="Nelder-Mead").x[0]
    found = fit_temperature(logits, targets)
    assert found == pytest.approx(expected, rel=2e-3)
    assert found == pytest.approx(sharpness, rel=0.1)


def test_rows_that_are_all_right_do_not_make_the_scores_sure_of_everything() -> None:
    logits = np.eye(3)[[0, 1, 2] * 10] * 4
    targets = np.array([0, 1, 2] * 10)
    _, scores = best_labels(logits, fit_temperature(logits, targets))
    assert scores.mean() == pytest.approx(31 / 32, abs=1e-4)


def test_calibration_error_by_hand() -> None:
    scores, right = [0.9, 0.8, 0.6, 0.55], [True, False, True, True]
    found = reliability(scores, right, bins=2)
    assert found == [Bin(4, pytest.approx(0.7125), 0.75)]
    assert calibration_error(found) == pytest.approx(0.0375)
    # four bins: (0.5, 0.75] holds 0.6 and 0.55, (0.75, 1] the others
    found = reliability(scores, right, bins=4)
    assert [one.rows for one in found] == [2, 2]
    assert calibration_error(found) == pytest.approx(0.5 * (1 - 0.575) + 0.5 * (0.85 - 0.5))


def test_bins_for_a_picture_hold_equally_many_rows() -> None:
    scores = np.random.default_rng(0).random(95)
    right = scores > 0.3
    found = bins_of_rows(scores, right)
    assert [one.rows for one in found] == [11] * 5 + [10] * 4
    assert sum(one.rows * one.right for one in found) == pytest.approx(right.sum())
    assert [one.score for one in found] == sorted(one.score for one in found)
    assert [one.rows for one in bins_of_rows([0.5] * 7, [True] * 7)] == [7]
    assert bins_of_rows([], []) == []


def test_a_score_of_one_is_in_the_last_bin_and_of_nought_in_the_first() -> None:
    assert [one.rows for one in reliability([0.0, 1.0, 1.0], [True] * 3)] == [1, 2]
    assert calibration_error([]) == 0.0


def test_coverage_answers_the_surest_first_and_equal_scores_together() -> None:
    scores, right = [0.9, 0.8, 0.8, 0.1], [True, False, True, False]
    assert coverage_curve(scores, right, coverages=(0.25, 0.5, 1.0)) == [
        Covered(0.25, 0.9, 1.0),
        Covered(0.75, 0.8, pytest.approx(2 / 3)),
        Covered(1.0, 0.1, 0.5),
    ]


def test_a_threshold_reaches_its_target_by_the_lower_end_of_clopper_and_pearson() -> None:
    scores = np.linspace(1, 0, 200)
    right = np.array([True] * 100 + [False, True] * 50)
    found = threshold_for(scores, right, 0.95)
    assert found is not None
    given = scores >= found.threshold
    # the lower end is the share at which so many right answers happen in one case of ten
    wrong, rows = int((~right[given]).sum()), int(given.sum())
    assert binom.cdf(wrong, rows, 1 - 0.95) <= 1 - SURE
    assert found.answered == given.mean() and found.right == right[given].mean()
    assert binom.cdf(wrong + 1, rows + 2, 1 - 0.95) > 1 - SURE  # two rows more are too many


def test_few_rows_promise_little() -> None:
    needed = rows_needed(0.95)
    assert needed == math.ceil(math.log(0.1) / math.log(0.95)) == 45
    all_right = lambda rows: threshold_for(np.linspace(1, 0.5, rows), [True] * rows, 0.95)  # noqa: E731
    assert all_right(needed - 1) is None and all_right(needed) is not None


def test_nothing_reaches_what_is_wrong_everywhere() -> None:
    assert threshold_for([0.9, 0.8] * 50, [False] * 100, 0.5) is None


def test_a_threshold_for_a_share_lies_between_two_rows() -> None:
    found = threshold_that_answers([0.9, 0.7, 0.5, 0.3], [True, True, False, True], 0.5)
    assert (found.threshold, found.answered, found.right) == (pytest.approx(0.6), 0.5, 1.0)
    assert threshold_that_answers([0.9, 0.7], [True, True], 1.0).threshold == 0.0
