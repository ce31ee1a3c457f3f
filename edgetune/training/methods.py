"""What each method of a stage means to the loop: its objective and its validation. A new method is a new entry."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from edgetune.objectives import Objective, masked_lm, sequence_classification, sft
from edgetune.recipe import Stage
from edgetune.training.measure import (
    Logits,
    classes,
    masked_tokens,
    measure_classes,
    measure_completions,
    next_tokens,
)


@dataclass(frozen=True)
class Method:
    """The parts of training that depend on the method."""

    objective: Callable[[Stage], Objective]
    measure: Callable[..., dict[str, float]]  # (model, batches, *, precision) → validation metrics
    outputs: Logits


METHODS = {
    "causal-lm": Method(objective=lambda stage: sft, measure=measure_completions, outputs=next_tokens),
    "masked-lm": Method(
        objective=lambda stage: masked_lm,
        measure=functools.partial(measure_completions, outputs=masked_tokens),
        outputs=masked_tokens,
    ),
    "sft": Method(objective=lambda stage: sft, measure=measure_completions, outputs=next_tokens),
    "sequence-classification": Method(
        objective=lambda stage: functools.partial(sequence_classification, label_smoothing=stage.label_smoothing),
        measure=measure_classes,
        outputs=classes,
    ),
}
