"""Everything that a recipe leaves open, settled in one place before the model is built."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from edgetune.core.settings import settled
from edgetune.core.tasks import EMBEDDING
from edgetune.data.batching import steps_per_epoch
from edgetune.models.load import hidden_size, new_head
from edgetune.models.torch_device import Precision, choose_precision
from edgetune.recipe.generation import generation_defaults
from edgetune.recipe.schema import DeviceChoice, Stage
from edgetune.training.batches import MAX_TOKENS_AT_ONCE, Batching
from edgetune.training.class_weights import weighing, weights_of
from edgetune.training.context import ResolvedRun, ResolvedStage
from edgetune.training.inputs import Inputs, rows_of_a_step, step_tokens
from edgetune.training.keeping import steps_between_validations
from edgetune.training.methods import method_of, own_settings
from edgetune.training.parallel.distributed import Group
from edgetune.training.validation import tokens_to_measure

STEPS_BETWEEN, PARTS_OF_A_STAGE = 50, 10  # of checkpoints, where the recipe does not say


def resolve(
    inputs: Inputs,
    *,
    device: torch.device,
    group: Group,
    precisions: Sequence[str] | None = None,
    batch_sizes: Sequence[int] | None = None,
    judges: Mapping[str, str] | None = None,
) -> ResolvedRun:
    """The run that a recipe asks for, on this machine; alike in every process.

    `precisions` and `batch_sizes`: those that a resumed run began with, which to measure again
    might change. `judges`: the run folders of those that are trained, by name.
    """
    recipe = inputs.recipe
    sizes = batch_sizes or [rows_of_a_step(stage) for stage in recipe.stage]
    measured = [
        not isinstance(stage.batch_size, int) and batch_sizes is not None for stage in recipe.stage
    ]
    recipe = replace(
        recipe,
        stage=tuple(
            replace(stage, batch_size=size) for stage, size in zip(recipe.stage, sizes, strict=True)
        ),
    )
    inputs = replace(inputs, recipe=recipe)
    asked = precisions or [stage.precision for stage in recipe.stage]
    chosen = group.from_leader(_precisions(inputs, asked, device))
    stages = tuple(
        resolve_stage(
            inputs,
            index,
            precision=precision,
            in_one_pass=measured[index],
            judges=judges or {},
        )
        for index, precision in enumerate(chosen)
    )
    return ResolvedRun(
        recipe=replace(
            recipe,
            stage=tuple(
                replace(stage, precision=precision)
                for stage, precision in zip(recipe.stage, chosen, strict=True)
            ),
            device=cast(DeviceChoice, device.type),
            threads=torch.get_num_threads(),
        ),
        base=inputs.base,
        tokenizer=inputs.tokenizer,
        pad_id=inputs.pad_id,
        device=device,
        threads=torch.get_num_threads(),
        seed=recipe.seed,
        task=recipe.task,
        train=recipe.parameters.train,
        shard=recipe.parameters.shard,
        parameters=recipe.parameters,
        start=inputs.start,
        head=(new_head(inputs.base, recipe.task) if inputs.start is None else inputs.start.head),
        generation=_generation(inputs),
        forgetting=recipe.forgetting,
        chosen={
            **inputs.chosen,
            **{f"stage.{at}.batch_size": sizes[at] for at, auto in enumerate(measured) if auto},
        },
        stages=stages,
    )


def resolve_stage(
    inputs: Inputs,
    index: int,
    *,
    precision: Precision,
    in_one_pass: bool = False,
    judges: Mapping[str, str] | None = None,
) -> ResolvedStage:
    """Stage `index` of the recipe; `in_one_pass`: its batch was measured to fit as it is;
    `judges`: see `resolve`.
    """
    stage, examples = inputs.recipe.stage[index], inputs.sets[index]
    method = method_of(stage, inputs.base.kind)
    rows, size = len(examples.train), rows_of_a_step(stage)
    total, per_epoch = (
        total_steps(stage, rows),
        steps_per_epoch(rows, size) * stage.iterations,
    )
    objective, collate = method.objective(stage), method.collate
    weights = weights_of(
        stage.class_weights,
        examples,
        several=stage.problem == "multi-label",
        path=f"stage.{index}",
    )
    if weights is not None:
        objective = functools.partial(cast(Any, objective), weights=weights)
        if stage.problem == "single-label":
            collate = weighing(collate, weights)
    longest = max(map(method.length, examples.train)) if in_one_pass else 0
    batching = Batching(
        inputs.pad_id,
        collate,
        method.length,
        examples.mask,
        whole=method.whole,
        at_once=max(MAX_TOKENS_AT_ONCE, size * longest),
    )
    return ResolvedStage(
        index=index,
        method=stage.method,
        task=stage.task,
        problem=stage.problem,
        learned=stage.learned,
        settings=(
            own_settings(stage, method) if stage.grpo is None else stage.grpo.reading(judges or {})
        ),
        adapter=stage.adapter,
        precision=precision,
        seed=inputs.recipe.seed + index,
        examples=examples,
        digests=inputs.digests[index],
        max_length=stage.max_length,
        replay=inputs.replays[index],
        tokenizer=inputs.tokenizer,
        base=inputs.base,
        batching=batching,
        objective=objective,
        measure=method.measure,
        outputs=method.outputs,
        prepare=method.prepare,
        batch_size=size,
        iterations=stage.iterations,
        total_steps=total,
        validate_every=stage.validate_every
        or steps_between_validations(
            total,
            per_epoch,
            measured=tokens_to_measure(examples.validation, batching),
            learned_in_a_step=step_tokens(stage, examples.train, kind=inputs.base.kind)
            / stage.iterations,
        ),
        keep=stage.keep,
        patience=stage.patience,
        save_every=inputs.recipe.checkpoint_every or steps_between(total),
        learning_rate=settled(stage.learning_rate),
        head_learning_rate=stage.head_learning_rate,
        weight_decay=stage.weight_decay,
        warmup_ratio=stage.warmup_ratio,
        max_grad_norm=stage.max_grad_norm,
        fit_head=stage.head_init == "probe" and stage.task != EMBEDDING,
        class_weights=weights,
    )


def total_steps(stage: Stage, rows: int) -> int:
    """Optimizer steps of a stage over this many rows."""
    passes = settled(stage.epochs) * steps_per_epoch(rows, rows_of_a_step(stage))
    planned = max(1, math.ceil(passes)) * stage.iterations
    return min(planned, stage.max_steps or planned)


def steps_between(total: int) -> int:
    """Optimizer steps between two checkpoints of a stage of `total` steps."""
    return max(STEPS_BETWEEN, -(-total // PARTS_OF_A_STAGE))


def _precisions(inputs: Inputs, asked: Sequence[str], device: torch.device) -> list[Precision]:
    """Every stage's number format; "auto" is measured, once."""
    hidden = hidden_size(inputs.base) if "auto" in asked else 0
    chosen = {
        setting: choose_precision(setting, hidden=hidden, device=device) for setting in set(asked)
    }
    return [chosen[setting] for setting in asked]


def _generation(inputs: Inputs) -> dict[str, Any] | None:
    """How the adapter answers; None for one that does not.

    As many tokens as the longest answer that was learned and a few more; packed text is as long as
    it can be, answers need not be.
    """
    recipe, examples = inputs.recipe, inputs.sets[-1]
    if recipe.task != "text-generation":
        return None
    longest = 16 + max(
        (_completion_length(e.labels) for e in examples.train + examples.validation), default=0
    )
    if recipe.stage[-1].method == "causal-lm":
        longest = min(longest, 256)
    return generation_defaults(
        recipe, examples.max_new_tokens or longest, derived=inputs.answer_schema
    )


def _completion_length(labels: list[int] | int) -> int:
    return sum(label >= 0 for label in labels) if isinstance(labels, list) else 0
