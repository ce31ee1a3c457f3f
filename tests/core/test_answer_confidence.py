"""From the score of an answer to the probability that it is right."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgetune.core.answer_confidence import (
    AnswerConfidence,
    answer_confidence_of,
    answer_confidence_problems,
)
from edgetune.metrics.calibration import calibration_error, reliability
from edgetune.metrics.platt import fit_platt


def test_a_calibration_reads_back_and_a_classifiers_is_none() -> None:
    found = AnswerConfidence(2.0, 1.0, rows=100)
    assert answer_confidence_of({"confidence": found.to_dict()}) == found
    assert answer_confidence_of({"confidence": {"temperature": 1.5}}) is None
    assert answer_confidence_of({}) is None
    assert found.of(-0.5) == pytest.approx(0.5) and found.of(-1e9) == 0.0


@pytest.mark.parametrize("wrong", [None, "1", True, math.nan, math.inf])
def test_a_number_that_is_none_is_named(wrong: object) -> None:
    given = {"kind": "generation", "slope": wrong, "intercept": 0.5}
    (problem,) = answer_confidence_problems(given)
    assert problem.startswith("confidence.slope: expected a number")


def test_platt_finds_the_curve_that_made_the_answers() -> None:
    draw = np.random.default_rng(0)
    scores = -draw.exponential(2.0, 20_000)
    truth = AnswerConfidence(1.5, 2.0)
    sure = np.array([truth.of(score) for score in scores])
    right = draw.random(len(scores)) < sure
    slope, intercept = fit_platt(scores, right)
    assert (slope, intercept) == (pytest.approx(1.5, abs=0.06), pytest.approx(2.0, abs=0.06))
    fitted = [AnswerConfidence(slope, intercept).of(score) for score in scores]
    assert calibration_error(reliability(fitted, right)) < 0.01


def test_answers_that_are_all_right_and_scores_that_say_nothing_stay_finite() -> None:
    slope, intercept = fit_platt([-0.1, -0.2, -0.3] * 20, [True] * 60)
    assert 0.97 < AnswerConfidence(slope, intercept).of(-0.2) < 1
    assert fit_platt([-1.0] * 40, [True, False] * 20) == (
        pytest.approx(0, abs=1.1),
        pytest.approx(0, abs=1.1),
    )
    slope, _ = fit_platt([-5.0, -0.1] * 30, [True, False] * 30)
    assert slope == 0, "a surer answer is never less right"
