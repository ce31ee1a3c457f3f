"""After training an adapter that writes text: how sure it is of an answer, by the held-out rows.

The answers of these rows are not written anew: where the likeliest token is the right one at every
place of the right answer, a greedy answer is this answer, and the score of both is the same. Where
it is not, the score is that of the likeliest tokens along the right answer. So one pass over the
rows says for each its score and whether it is answered right, token by token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from edgetune.data.batching import Batch, last_answer
from edgetune.metrics.confidence import WrittenAnswers
from edgetune.recipe.confidence import ConfidenceSettings
from edgetune.recipe.generation import FORMS
from edgetune.training.context import ResolvedStage
from edgetune.training.validation import outputs_of


def wants_confidence(
    stage: ResolvedStage, asked: ConfidenceSettings | None, generation: Mapping[str, Any] | None
) -> bool:
    """Whether answers of a form or a `[confidence]` ask for it, and the stage teaches answers."""
    bound = any((generation or {}).get(name) is not None for name in FORMS)
    wanted = bound if asked is None else asked.calibrate
    return stage.method == "sft" and stage.base.kind == "decoder" and wanted


def measure_answers(
    model: nn.Module, stage: ResolvedStage, held_out: Sequence[Batch]
) -> WrittenAnswers:
    """The last answer of every row."""
    found = list(_answers(model, stage, held_out))
    return WrittenAnswers(
        np.array([score for score, _ in found]), np.array([hit for _, hit in found], bool)
    )


def _answers(
    model: nn.Module, stage: ResolvedStage, held_out: Sequence[Batch]
) -> Iterator[tuple[float, bool]]:
    """(score, whether right) of the last answer of every row."""
    outputs = outputs_of(model, held_out, stage.outputs, precision=stage.precision)
    for batch, (logits, targets) in zip(held_out, outputs, strict=True):
        best = logits.float().log_softmax(-1).max(-1)
        hits, values = (best.indices == targets).cpu().numpy(), best.values.cpu().numpy()
        at = 0
        for labels in batch.labels[:, 1:].tolist():
            learned, last = last_answer(labels)
            places = slice(at + learned - len(last), at + learned)
            at += learned
            if last:
                yield float(values[places].astype(np.float64).sum()), bool(hits[places].all())
