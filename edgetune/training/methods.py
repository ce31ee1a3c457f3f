"""What each method of a stage means to the loop: its objective and its validation. A new method is
a new entry.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from edgetune.data.batching import both_lengths, collate, collate_answers
from edgetune.data.labels import collate_targets
from edgetune.data.tagging import collate_tagged
from edgetune.models.base import Base
from edgetune.objectives.grpo import grpo
from edgetune.objectives.labels import (
    decisions,
    multi_label,
    regression,
    token_classification,
    values,
    word_logits,
)
from edgetune.objectives.language import Objective, masked_lm, sequence_classification, sft
from edgetune.objectives.preference import bradley_terry, collate_pairs, dpo
from edgetune.objectives.seq2seq import answer_logits, answer_loss
from edgetune.recipe.checks import KIND as SEQ2SEQ
from edgetune.recipe.schema import Stage
from edgetune.training.context import (
    Collate,
    Length,
    Measure,
    Prepare,
    nothing_to_prepare,
    padded_length,
    tokens_of,
)
from edgetune.training.dpo_stage import prepare_dpo
from edgetune.training.grpo_stage import (
    check_grpo,
    collate_prompts,
    first_answer_tokens,
    prepare_grpo,
)
from edgetune.training.validation import (
    Logits,
    classes,
    masked_tokens,
    measure_classes,
    measure_completions,
    measure_label_sets,
    measure_policy,
    measure_rewards,
    measure_values,
    next_tokens,
    preferences,
    prepare_tagging,
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
    check: Callable[[Stage, Base], None] = lambda stage, base: (
        None
    )  # of what the stage names, before anything is trained


METHODS = {
    "causal-lm": Method(
        objective=lambda stage: sft, measure=measure_completions, outputs=next_tokens
    ),
    "masked-lm": Method(
        objective=lambda stage: masked_lm,
        measure=functools.partial(measure_completions, outputs=masked_tokens),
        outputs=masked_tokens,
    ),
    "sft": Method(objective=lambda stage: sft, measure=measure_completions, outputs=next_tokens),
    "sequence-classification": Method(
        objective=lambda stage: functools.partial(
            sequence_classification, label_smoothing=stage.label_smoothing
        ),
        measure=measure_classes,
        outputs=classes,
    ),
    "multi-label": Method(
        objective=lambda stage: multi_label,
        measure=measure_label_sets,
        outputs=decisions,
        collate=collate_targets,
    ),
    "regression": Method(
        objective=lambda stage: regression,
        measure=measure_values,
        outputs=values,
        collate=collate_targets,
    ),
    "token-classification": Method(
        objective=lambda stage: functools.partial(
            token_classification, label_smoothing=stage.label_smoothing
        ),
        # the stage's own, which knows the sentences, takes its place
        measure=lambda model, batches, *, precision: {},
        outputs=word_logits,
        collate=collate_tagged,
        prepare=prepare_tagging,
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
            grpo,
            clip=stage.clip,
            kl=stage.kl,
            temperature=stage.temperature,
            loss_type=stage.loss_type,
        ),
        # the stage's own, which knows the rewards, takes its place
        measure=lambda model, batches, *, precision: {},
        outputs=first_answer_tokens,
        collate=collate_prompts,
        length=padded_length,
        prepare=prepare_grpo,
        check=check_grpo,
    ),
}
# What sft means to an encoder-decoder; no other method fits one.
ANSWERS = Method(
    objective=lambda stage: answer_loss,
    measure=functools.partial(measure_completions, outputs=answer_logits),
    outputs=answer_logits,
    collate=collate_answers,
    length=both_lengths,
)


def method_of(stage: Stage, kind: str) -> Method:
    """What the stage's method means to a base of this kind, and for sequence-classification its
    problem.
    """
    if kind == SEQ2SEQ:
        return ANSWERS
    return METHODS[stage.method if stage.problem == "single-label" else stage.problem]
