"""One fit of temperature and threshold, whoever's logits they are, and what they give on rows."""

from __future__ import annotations

import numpy as np
import pytest

from edgetune.core.answer_confidence import AnswerConfidence
from edgetune.core.confidence import Confidence
from edgetune.metrics.confidence import LabelledLogits, WrittenAnswers
from edgetune.recipe.confidence import ConfidenceSettings

SURE, UNSURE = [np.log(9.0), 0.0], [np.log(1.5), 0.0]  # scores 0.9 and 0.6


def rows(wrong: int = 6) -> LabelledLogits:
    """40 rows, half of them less sure, of which so many are wrong; and four that are neither."""
    logits = np.array([SURE] * 20 + [UNSURE] * 20)
    targets = np.array([0] * (40 - wrong) + [1] * wrong)
    return LabelledLogits(logits, targets, np.array([UNSURE] * 3 + [SURE]))


def test_figures_by_hand() -> None:
    found = rows().figures(Confidence(threshold=0.7))
    assert found["share_answered"] == 0.5 and found["accuracy_answered"] == 1.0
    assert found["out_of_scope_recall"] == 0.75 and found["out_of_scope_rows"] == 4
    # 0.9 against 20 of 20, 0.6 against 14 of 20
    assert found["expected_calibration_error"] == pytest.approx((0.1 + 0.1) / 2)
    assert rows().figures(Confidence(threshold=0.95))["share_answered"] == 0.0
    assert rows().figures(Confidence())["share_answered"] is None


def test_answers_that_are_not_the_likeliest_have_their_own_scores() -> None:
    logits = np.array([SURE] * 40)
    right = np.array([1] * 10 + [0] * 30)
    found = LabelledLogits(logits, right, logits[:0], right).figures(Confidence())
    # 0.1 against 10 of 10, 0.9 against 30 of 30
    assert found["expected_calibration_error"] == pytest.approx((10 * 0.9 + 30 * 0.1) / 40)
    alone = LabelledLogits(logits, right, logits[:0]).figures(Confidence())
    assert alone["expected_calibration_error"] == pytest.approx(0.9 - 30 / 40)


def test_the_figures_of_a_fit_are_those_of_what_it_found() -> None:
    fitted = rows().fit(ConfidenceSettings(answered=0.5), fitted_on="int8")
    assert isinstance(fitted.confidence, Confidence) and fitted.confidence.fitted_on == "int8"
    assert fitted.figures == rows().figures(fitted.confidence)
    assert fitted.figures["share_answered"] == 0.5
    assert fitted.before == rows().figures(Confidence())["expected_calibration_error"]


def test_a_threshold_among_scores_near_1_lets_through_what_was_asked_for() -> None:
    margins = np.concatenate([np.full(100, 1.0), np.linspace(16, 20, 900)])
    logits = np.stack([margins, np.zeros(1000)], axis=-1)
    targets = np.concatenate([np.ones(27, int), np.zeros(973, int)])
    fitted = LabelledLogits(logits, targets, logits[:0]).fit(ConfidenceSettings(answered=0.25))
    assert fitted.figures is not None and fitted.figures["share_answered"] == 0.25


def test_logits_that_are_not_finite_fit_nothing_and_are_counted() -> None:
    found = rows()
    found.logits[3, 0] = np.nan
    fitted = found.fit(ConfidenceSettings(answered=0.5))
    assert fitted.confidence is None and fitted.facts is None
    assert fitted.warnings == (
        "[confidence]: the logits of 1 of 44 validation rows are not finite, so nothing is fitted",
    )


def test_written_answers_by_hand() -> None:
    answers = WrittenAnswers(np.log([0.9] * 30 + [0.5] * 10), np.array([True] * 30 + [False] * 10))
    plain = answers.figures(AnswerConfidence(0.0, 0.0))  # one half, whatever the score
    assert plain["expected_calibration_error"] == pytest.approx(0.75 - 0.5)
    fitted = answers.fit(fitted_on="int4")
    assert fitted.confidence is not None and fitted.confidence.fitted_on == "int4"
    assert fitted.before == pytest.approx(0.75 * 0.1 + 0.25 * 0.5)
    assert fitted.figures is not None
    assert fitted.figures["expected_calibration_error"] < 0.1
