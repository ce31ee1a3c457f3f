"""After training: the temperature and the threshold that the held-out rows ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from edgetune.core.confidence import NONE, Confidence
from edgetune.data.batching import Batch
from edgetune.metrics.calibration import (
    SURE,
    Floats,
    Reached,
    best_labels,
    calibration_error,
    fit_temperature,
    reliability,
    rows_needed,
    threshold_for,
    threshold_that_answers,
)
from edgetune.recipe.confidence import ConfidenceSettings, can_calibrate
from edgetune.training.context import ResolvedStage
from edgetune.training.held_out import analyse
from edgetune.training.validation import (
    VALIDATION_TOKENS,
    batches_for_measuring,
    outputs_of,
)

FEWEST_ROWS = 30
"""Of fewer rows a temperature says more about them than about the model."""


@dataclass(frozen=True)
class Fitted:
    """What came of the held-out rows; `facts` and `analysis` are for summary.json, `warnings` for a
    person."""

    confidence: Confidence | None = None
    facts: dict[str, Any] | None = None
    warnings: tuple[str, ...] = ()
    analysis: dict[str, Any] | None = None


def measure_scores(
    model: nn.Module,
    stage: ResolvedStage,
    held_out: Sequence[Batch],
    asked: ConfidenceSettings | None,
) -> Fitted:
    """What `[confidence]` asks for, fitted on the last stage's validation rows, and which of them
    are answered wrongly; nothing where the answers are no labels.
    """
    if not can_calibrate(stage.task, stage.problem):
        return Fitted()
    if not held_out:
        return Fitted(warnings=_too_few(0, asked))
    found = _logits(model, stage, held_out)
    logits, targets = (np.concatenate(column) for column in zip(*found, strict=True))
    others = batches_for_measuring(
        stage.examples.out_of_scope, stage.batching, tokens=VALIDATION_TOKENS
    )
    outside = [logits for logits, _ in _logits(model, stage, others)]
    fitted = fit_confidence(logits, targets, asked, outside=np.concatenate([logits[:0], *outside]))
    analysis = analyse(stage, held_out, [one for one, _ in found], fitted.confidence or NONE)
    return replace(fitted, analysis=analysis)


def _logits(
    model: nn.Module, stage: ResolvedStage, batches: Sequence[Batch]
) -> list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """Logits (rows, classes) and right classes (rows,) of each batch."""
    return [
        (logits.float().cpu().numpy(), targets.cpu().numpy())
        for logits, targets in outputs_of(model, batches, stage.outputs, precision=stage.precision)
    ]


def fit_confidence(
    logits: npt.NDArray[Any],
    targets: npt.NDArray[Any],
    asked: ConfidenceSettings | None,
    *,
    outside: npt.NDArray[Any],
) -> Fitted:
    """Temperature and threshold by logits (rows, classes) and right classes (rows,), and the logits
    of rows that are none of the classes; nothing where the rows are fewer than FEWEST_ROWS.
    """
    settings = asked or ConfidenceSettings()
    if not settings.calibrate:
        return Fitted()
    if len(targets) < FEWEST_ROWS:
        return Fitted(warnings=_too_few(len(targets), asked))
    temperature = fit_temperature(logits, targets)
    best, scores = best_labels(logits, temperature)
    right = best == targets
    _, unknown = best_labels(outside, temperature)
    threshold, warnings = _threshold(scores, right, unknown, settings)
    fitted = Confidence(
        temperature=temperature,
        threshold=None if threshold is None else round(threshold.threshold, 6),
        target=None if threshold is None else settings.target,
        answered=None if threshold is None else settings.answered,
        out_of_scope=settings.out_of_scope,
        rows=len(targets),
    )
    _, before = best_labels(logits, 1.0)
    facts = {
        **fitted.to_dict(),
        "expected_calibration_error": calibration_error(reliability(scores, right)),
        "expected_calibration_error_before": calibration_error(reliability(before, right)),
        "accuracy_answered": None if threshold is None else threshold.right,
        "share_answered": None if threshold is None else threshold.answered,
        "out_of_scope_rows": len(unknown),
        "out_of_scope_recall": (
            float((unknown < threshold.threshold).mean())
            if threshold is not None and len(unknown)
            else None
        ),
    }
    return Fitted(fitted, facts, warnings)


def _too_few(rows: int, asked: ConfidenceSettings | None) -> tuple[str, ...]:
    if asked is None:
        return ()
    kept = ", and no threshold is kept" if asked.has_threshold else ""
    return (
        f"[confidence]: {rows} validation rows are too few to calibrate on, {FEWEST_ROWS} are"
        f" needed{kept}",
    )


def _threshold(
    scores: Floats, right: npt.NDArray[Any], unknown: Floats, settings: ConfidenceSettings
) -> tuple[Reached | None, tuple[str, ...]]:
    """The higher of both thresholds with what it gives on rows that have a label, and a line where
    no threshold reaches the target: an answer to a row of `unknown` label is wrong.
    """
    found: list[Reached] = []
    warnings: tuple[str, ...] = ()
    if settings.answered is not None:
        found.append(threshold_that_answers(scores, right, settings.answered))
    if settings.target is not None:
        every = np.concatenate([scores, unknown])
        hits = np.concatenate([right, np.zeros(len(unknown), bool)])
        reached = threshold_for(every, hits, settings.target)
        if reached is None:
            warnings = (_unreached(hits, settings.target, kept=bool(found)),)
        else:
            found.append(reached)
    if not found:
        return None, warnings
    highest = max(one.threshold for one in found)
    given = right[scores >= highest]
    return Reached(highest, len(given) / len(right), float(given.mean()) if len(given) else 1.0), (
        warnings
    )


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
