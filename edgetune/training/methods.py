"""What each method of a stage means to the loop: its objective and its validation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edgetune.data.collation import collate, collate_tagged, collate_targets
from edgetune.data.seq2seq import both_lengths, collate_answers
from edgetune.models.base import Base
from edgetune.objectives.contrastive import collate_contrasts, contrastive, coordinates
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
from edgetune.recipe.own_settings import Contrastive, Dpo, Grpo
from edgetune.recipe.schema import Stage
from edgetune.training.batches import Collate, Length, padded_length, tokens_of
from edgetune.training.context import Logits, Measure, Prepare, nothing_to_prepare
from edgetune.training.dpo_stage import prepare_dpo
from edgetune.training.grpo_stage import (
    check_grpo,
    collate_prompts,
    first_answer_tokens,
    grpo_objective,
    prepare_grpo,
)
from edgetune.training.validation import (
    classes,
    masked_tokens,
    measure_classes,
    measure_completions,
    measure_contrasts,
    measure_label_sets,
    measure_policy,
    measure_rewards,
    measure_values,
    next_tokens,
    preferences,
    prepare_tagging,
)


@dataclass(frozen=True)
class Training:
    """The parts of training that depend on the method."""

    objective: Callable[[Stage], Objective]
    measure: Measure  # (model, batches, *, precision) → validation metrics
    outputs: Logits
    collate: Collate = collate  # examples → a batch
    length: Length = tokens_of  # padded tokens that an example takes in a batch
    whole: bool = False  # a step's examples are one batch, which is not split
    prepare: Prepare = nothing_to_prepare  # before the stage's first step
    settings: type[Any] | None = None  # the table of a stage that only this method has
    # of what that table names, before anything is trained
    check: Callable[[Any, Base], None] = lambda settings, base: None


# `learned` of a stage → its parts; see core/tasks.py for what else a method is entered with
TRAINING = {
    "causal-lm": Training(
        objective=lambda stage: sft, measure=measure_completions, outputs=next_tokens
    ),
    "masked-lm": Training(
        objective=lambda stage: masked_lm,
        measure=functools.partial(measure_completions, outputs=masked_tokens),
        outputs=masked_tokens,
    ),
    "sft": Training(objective=lambda stage: sft, measure=measure_completions, outputs=next_tokens),
    "contrastive": Training(
        objective=lambda stage: functools.partial(contrastive, scale=stage.own(Contrastive).scale),
        measure=measure_contrasts,
        outputs=coordinates,
        collate=collate_contrasts,
        length=padded_length,
        whole=True,
        settings=Contrastive,
    ),
    "sequence-classification": Training(
        objective=lambda stage: functools.partial(
            sequence_classification, label_smoothing=stage.label_smoothing
        ),
        measure=measure_classes,
        outputs=classes,
    ),
    "multi-label": Training(
        objective=lambda stage: multi_label,
        measure=measure_label_sets,
        outputs=decisions,
        collate=collate_targets,
    ),
    "regression": Training(
        objective=lambda stage: regression,
        measure=measure_values,
        outputs=values,
        collate=collate_targets,
    ),
    "token-classification": Training(
        objective=lambda stage: functools.partial(
            token_classification, label_smoothing=stage.label_smoothing
        ),
        # the stage's own, which knows the sentences, takes its place
        measure=lambda model, batches, *, precision: {},
        outputs=word_logits,
        collate=collate_tagged,
        prepare=prepare_tagging,
    ),
    "reward": Training(
        objective=lambda stage: bradley_terry,
        measure=measure_rewards,
        outputs=preferences,
        collate=collate_pairs,
        length=padded_length,
    ),
    "dpo": Training(
        objective=lambda stage: functools.partial(dpo, beta=stage.own(Dpo).beta),
        measure=measure_policy,
        outputs=next_tokens,
        collate=collate_pairs,
        length=padded_length,
        prepare=prepare_dpo,
        settings=Dpo,
    ),
    "grpo": Training(
        objective=lambda stage: grpo_objective(stage.own(Grpo)),
        # the stage's own, which knows the rewards, takes its place
        measure=lambda model, batches, *, precision: {},
        outputs=first_answer_tokens,
        collate=collate_prompts,
        length=padded_length,
        prepare=prepare_grpo,
        settings=Grpo,
        check=check_grpo,
    ),
}
# What sft means to an encoder-decoder; no other method fits one.
ANSWERS = Training(
    objective=lambda stage: answer_loss,
    measure=functools.partial(measure_completions, outputs=answer_logits),
    outputs=answer_logits,
    collate=collate_answers,
    length=both_lengths,
)


def own_settings(stage: Stage, method: Training) -> Any:
    """What only this method asks for; None where that is nothing."""
    return None if method.settings is None else stage.own(method.settings)


def method_of(stage: Stage, kind: str) -> Training:
    """What the stage's method means to a base of this kind, and for sequence-classification its
    problem.
    """
    if kind == SEQ2SEQ:
        return ANSWERS
    return TRAINING[stage.learned]
