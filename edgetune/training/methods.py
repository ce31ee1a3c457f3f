"""What each method of a stage means to the loop: its objective and its validation. A new method is a new entry."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from edgetune.bases import Base
from edgetune.batching import collate
from edgetune.objectives import Objective, masked_lm, sequence_classification, sft
from edgetune.policy import grpo
from edgetune.preference import bradley_terry, collate_pairs, dpo
from edgetune.recipe import Stage
from edgetune.training.grpo import check_grpo, collate_prompts, first_tokens, prepare_grpo
from edgetune.training.measure import (
    Logits,
    classes,
    masked_tokens,
    measure_classes,
    measure_completions,
    next_tokens,
)
from edgetune.training.preference import measure_policy, measure_rewards, preferences, prepare_dpo
from edgetune.training.stage import (
    Collate,
    Length,
    Measure,
    Prepare,
    nothing_to_prepare,
    padded_length,
    tokens_of,
)


@dataclass(frozen=True)
class Method:
    """The parts of training that depend on the method."""

    objective: Callable[[Stage], Objective]
    measure: Measure  # (model, batches, *, precision) → validation metrics
    outputs: Logits
    collate: Collate = collate  # examples → a batch
    length: Length = tokens_of  # padded tokens that an example takes in a batch
    prepare: Prepare = nothing_to_prepare  # before the stage's first step
    check: Callable[[Stage, Base], None] = lambda stage, base: None  # of what the stage names, before anything is trained


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
    "reward": Method(
        objective=lambda stage: bradley_terry,
        measure=measure_rewards,
        outputs=preferences,
        collate=collate_pairs,
        length=padded_length,
    ),
    "dpo": Method(
        objective=lambda stage: functools.partial(dpo, beta=stage.beta),
        measure=measure_policy,
        outputs=next_tokens,
        collate=collate_pairs,
        length=padded_length,
        prepare=prepare_dpo,
    ),
    "grpo": Method(
        objective=lambda stage: functools.partial(
            grpo, clip=stage.clip, kl=stage.kl, temperature=stage.temperature, loss_type=stage.loss_type
        ),
        measure=lambda model, batches, *, precision: {},  # the stage's own, which knows the rewards, takes its place
        outputs=first_tokens,
        collate=collate_prompts,
        length=padded_length,
        prepare=prepare_grpo,
        check=check_grpo,
    ),
}
