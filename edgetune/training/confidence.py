"""After training: the temperature and the threshold that the held-out rows ask for, and which of
them are answered wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from edgetune.core.confidence import NONE, Confidence
from edgetune.core.tasks import TAGGING
from edgetune.data.batching import VALIDATION_TOKENS, Batch
from edgetune.metrics.confidence import Fitted, LabelledLogits, too_few
from edgetune.recipe.confidence import ConfidenceSettings, can_calibrate
from edgetune.training.answer_confidence import measure_answers, wants_confidence
from edgetune.training.context import ResolvedStage
from edgetune.training.held_out import analyse, sentence_tags
from edgetune.training.validation import batches_for_measuring, outputs_of


@dataclass(frozen=True)
class HeldOutFit:
    """What came of the held-out rows; `analysis` is for summary.json."""

    fitted: Fitted = field(default_factory=Fitted)
    analysis: dict[str, Any] | None = None


def measure_held_out(
    model: nn.Module,
    stage: ResolvedStage,
    held_out: Sequence[Batch],
    asked: ConfidenceSettings | None,
    generation: Mapping[str, Any] | None,
) -> HeldOutFit:
    """What `[confidence]` asks for, fitted on the last stage's validation rows, and which of them
    are answered wrongly; nothing where the answers are no labels and no text that wants it.
    """
    if wants_confidence(stage, asked, generation):
        return HeldOutFit(measure_answers(model, stage, held_out).fit())
    if not can_calibrate(stage.task, stage.problem):
        return HeldOutFit()
    if not held_out:
        return HeldOutFit(Fitted(warnings=too_few(0, asked)))
    found = _logits(model, stage, held_out)
    fitted = _together(model, stage, held_out, found).fit(asked)
    confidence = fitted.confidence if isinstance(fitted.confidence, Confidence) else NONE
    return HeldOutFit(fitted, analyse(stage, held_out, [one for one, _ in found], confidence))


def measure_labels(
    model: nn.Module, stage: ResolvedStage, held_out: Sequence[Batch]
) -> LabelledLogits:
    """Every row, word or label of several, and the rows that are none of the labels."""
    return _together(model, stage, held_out, _logits(model, stage, held_out))


BatchLogits = list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]
"""logits (rows, classes) and right classes (rows,) of each batch"""


def _together(
    model: nn.Module, stage: ResolvedStage, held_out: Sequence[Batch], found: BatchLogits
) -> LabelledLogits:
    logits, targets = (np.concatenate(column) for column in zip(*found, strict=True))
    others = batches_for_measuring(
        stage.examples.out_of_scope, stage.batching, tokens=VALIDATION_TOKENS
    )
    outside = [logits for logits, _ in _logits(model, stage, others)]
    chosen = _tags(stage, held_out, found) if stage.task == TAGGING else None
    return LabelledLogits(logits, targets, np.concatenate([logits[:0], *outside]), chosen)


def _tags(
    stage: ResolvedStage, held_out: Sequence[Batch], found: BatchLogits
) -> npt.NDArray[np.int64]:
    """The number of the tag of every word that is seen, as they are answered."""
    batches = sentence_tags(stage, held_out, [logits for logits, _ in found])
    sentences = [best for tags in batches for _, best in tags]
    return np.array([tag for best in sentences for tag in best if tag is not None], np.int64)


def _logits(model: nn.Module, stage: ResolvedStage, batches: Sequence[Batch]) -> BatchLogits:
    return [
        (logits.float().cpu().numpy(), targets.cpu().numpy())
        for logits, targets in outputs_of(model, batches, stage.outputs, precision=stage.precision)
    ]
