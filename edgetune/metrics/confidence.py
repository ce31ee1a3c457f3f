"""How sure an adapter is of its answers, by rows whose right answers are known: one fit for a run,
a compressed adapter and a bundle. Pure functions of logits and of scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.core.answer_confidence import AnswerConfidence
from edgetune.core.confidence import Confidence
from edgetune.metrics.calibration import (
    SURE,
    Floats,
    best_labels,
    calibration_error,
    fit_temperature,
    probabilities_of,
    reliability,
    rows_needed,
    threshold_for,
    threshold_that_answers,
)
from edgetune.metrics.platt import fit_platt
from edgetune.metrics.statistics import share
from edgetune.recipe.confidence import ConfidenceSettings

FEWEST_ROWS = 30
"""Of fewer rows a temperature says more about them than about the model."""
TORCH = "torch"


@dataclass(frozen=True)
class Fitted:
    """What came of the rows: `confidence` goes with the adapter, `figures` are what it gives on
    them, `before` what scores as the model gives them would; `warnings` are for a person.
    """

    confidence: Confidence | AnswerConfidence | None = None
    figures: Mapping[str, Any] | None = None
    before: float | None = None
    warnings: tuple[str, ...] = ()

    @property
    def facts(self) -> dict[str, Any] | None:
        """For summary.json."""
        if self.confidence is None:
            return None
        return {
            **self.confidence.to_dict(),
            **(self.figures or {}),
            "expected_calibration_error_before": self.before,
        }


@dataclass(frozen=True)
class LabelledLogits:
    """Logits (rows, classes) with the right classes (rows,), and logits of rows that are none of
    the classes. `chosen` (rows,): the classes that are answered, where these are not each row's
    likeliest, as of tags that a sentence chooses together.
    """

    logits: npt.NDArray[Any]
    targets: npt.NDArray[Any]
    outside: npt.NDArray[Any]
    chosen: npt.NDArray[Any] | None = None

    def answers(self, temperature: float) -> tuple[npt.NDArray[np.int64], Floats]:
        """The class that each row is answered with, and its calibrated probability."""
        if self.chosen is None:
            return best_labels(self.logits, temperature)
        return self.chosen, probabilities_of(self.logits, self.chosen, temperature)

    def figures(self, confidence: Confidence) -> dict[str, Any]:
        """What a temperature and a threshold give on these rows."""
        best, scores = self.answers(confidence.temperature)
        right, least = best == self.targets, confidence.threshold
        given = scores >= (least or 0.0)
        recall = None
        if least is not None and len(self.outside):
            recall = float((best_labels(self.outside, confidence.temperature)[1] < least).mean())
        return {
            "expected_calibration_error": calibration_error(reliability(scores, right)),
            "accuracy_answered": None if least is None else share(right[given].tolist()),
            "share_answered": None if least is None else float(given.mean()),
            "out_of_scope_rows": len(self.outside),
            "out_of_scope_recall": recall,
        }

    def fit(self, asked: ConfidenceSettings | None, *, fitted_on: str = TORCH) -> Fitted:
        """Temperature and threshold; nothing where the rows are fewer than FEWEST_ROWS, or where a
        logit is not finite.
        """
        settings = asked or ConfidenceSettings()
        if not settings.calibrate:
            return Fitted()
        if len(self.targets) < FEWEST_ROWS:
            return Fitted(warnings=too_few(len(self.targets), asked))
        if lines := not_finite(np.concatenate([self.logits, self.outside])):
            return Fitted(warnings=lines)
        temperature = fit_temperature(self.logits, self.targets)
        best, scores = self.answers(temperature)
        unknown = best_labels(self.outside, temperature)[1]
        threshold, warnings = _threshold(scores, best == self.targets, unknown, settings)
        fitted = Confidence(
            temperature=temperature,
            threshold=None if threshold is None else _short(threshold, [*scores, *unknown]),
            target=None if threshold is None else settings.target,
            answered=None if threshold is None else settings.answered,
            out_of_scope=settings.out_of_scope,
            rows=len(self.targets),
            fitted_on=fitted_on,
        )
        plain = self.figures(Confidence())["expected_calibration_error"]
        return Fitted(fitted, self.figures(fitted), plain, warnings)


@dataclass(frozen=True)
class WrittenAnswers:
    """Of answers that are text: the sums of their tokens' log-probabilities (rows,), and which are
    right.
    """

    scores: npt.NDArray[Any]
    right: npt.NDArray[Any]

    def figures(self, confidence: AnswerConfidence) -> dict[str, Any]:
        """What a calibration gives on these rows."""
        sure = [confidence.of(float(score)) for score in self.scores]
        return {"expected_calibration_error": calibration_error(reliability(sure, self.right))}

    def fit(self, *, fitted_on: str = TORCH) -> Fitted:
        """The calibration; nothing where there are fewer than FEWEST_ROWS, or a score that is not
        finite.
        """
        if len(self.right) < FEWEST_ROWS:
            return Fitted()
        if lines := not_finite(self.scores[:, None]):
            return Fitted(warnings=lines)
        slope, intercept = fit_platt(self.scores, self.right)
        fitted = AnswerConfidence(slope, intercept, rows=len(self.right), fitted_on=fitted_on)
        plain = calibration_error(reliability(np.exp(self.scores), self.right))
        return Fitted(fitted, self.figures(fitted), plain)


def too_few(rows: int, asked: ConfidenceSettings | None) -> tuple[str, ...]:
    """A line where a recipe asks for what so few rows do not give."""
    if asked is None:
        return ()
    kept = ", and no threshold is kept" if asked.has_threshold else ""
    return (
        f"[confidence]: {rows} validation rows are too few to calibrate on, {FEWEST_ROWS} are"
        f" needed{kept}",
    )


def not_finite(values: npt.NDArray[Any]) -> tuple[str, ...]:
    """A line where some rows of (rows, n) are none that anything can be fitted on."""
    wrong = int((~np.isfinite(values)).any(-1).sum())
    if not wrong:
        return ()
    return (
        f"[confidence]: the logits of {wrong} of {len(values)} validation rows are not finite, so"
        " nothing is fitted",
    )


def _threshold(
    scores: Floats, right: npt.NDArray[Any], unknown: Floats, settings: ConfidenceSettings
) -> tuple[float | None, tuple[str, ...]]:
    """The higher of both thresholds, and a line where none reaches the target: an answer to a row
    of `unknown` label is wrong.
    """
    found: list[float] = []
    warnings: tuple[str, ...] = ()
    if settings.answered is not None:
        found.append(threshold_that_answers(scores, right, settings.answered).threshold)
    if settings.target is not None:
        every = np.concatenate([scores, unknown])
        hits = np.concatenate([right, np.zeros(len(unknown), bool)])
        reached = threshold_for(every, hits, settings.target)
        if reached is None:
            warnings = (_unreached(hits, settings.target, kept=bool(found)),)
        else:
            found.append(reached.threshold)
    return max(found, default=None), warnings


def _short(threshold: float, scores: npt.ArrayLike) -> float:
    """To six decimals, unless these let other scores through, as they do among scores near 1."""
    short, values = round(threshold, 6), np.asarray(scores)
    return short if np.array_equal(values >= short, values >= threshold) else threshold


def _unreached(right: npt.NDArray[Any], target: float, *, kept: bool) -> str:
    rows = len(right)
    needed = rows_needed(target)
    why = (
        f"the validation has {rows} rows, and it takes {needed} right answers in succession"
        if rows < needed
        else f"{int(np.sum(right))} of all {rows} validation rows are right"
    )
    return (
        f"[confidence]: no threshold gives {target:.0%} right answers with {SURE:.0%} certainty"
        f" ({why}), so " + ("answered alone sets it" if kept else "no threshold is kept")
    )
