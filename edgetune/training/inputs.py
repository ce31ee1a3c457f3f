"""What a recipe names, read and checked before anything is trained: base, examples, general text,
an adapter to go on from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgetune.adapters.warm_start import StartAdapter, read_start
from edgetune.core.errors import RecipeError
from edgetune.core.tasks import CLASSIFICATION
from edgetune.data.batching import steps_per_epoch
from edgetune.data.examples import ExampleSet
from edgetune.data.loaders import load_examples
from edgetune.data.out_of_scope import outside_label
from edgetune.models.base import Base
from edgetune.models.load import hidden_size, load_tokenizer
from edgetune.models.resolve import resolve_base
from edgetune.quantisation.blocks import ROUNDING
from edgetune.quantisation.precision import shipped_precision
from edgetune.recipe.checks import KIND as SEQ2SEQ
from edgetune.recipe.checks import check_recipe
from edgetune.recipe.judges import judges_of
from edgetune.recipe.schema import Recipe, Stage
from edgetune.training.answer_form import answer_form
from edgetune.training.automatic import by_rule, chosen
from edgetune.training.checkpoint import origin_of
from edgetune.training.methods import method_of, own_settings
from edgetune.training.reinforcement.rewards import reward_digests
from edgetune.training.replay import ReplayText, load_replay

UNMEASURED = 8  # rows of a step that is still to be measured


@dataclass(frozen=True)
class Inputs:
    """A list has one element per stage."""

    recipe: Recipe  # with numbers for rates, epochs and rank
    base: Base  # as training sees it
    tokenizer: Any
    sets: list[ExampleSet]
    replays: list[ReplayText | None]
    digests: list[dict[str, str]]  # of everything that a stage reads, by what it is for
    start: StartAdapter | None
    pad_id: int
    chosen: dict[str, Any]  # what the recipe had left open, by dotted key
    answer_schema: Mapping[str, Any] | None = None  # that `schema = "auto"` came to

    def origin(self, *, processes: int) -> dict[str, str]:
        """What a run that resumes must have in common with this one."""
        rounding = ROUNDING if self.base.precision else None
        return origin_of(
            self.recipe,
            base=self.base.digest,
            data=self.digests,
            processes=processes,
            rounding=rounding,
        )


def read_inputs(recipe: Recipe) -> Inputs:
    """Raises the errors of recipe, data, adapters and base."""
    base = _as_it_ships(resolve_base(recipe.base), recipe)
    if base.kind == SEQ2SEQ:
        check_recipe(recipe)
    if base.kind == "decoder" and recipe.task == CLASSIFICATION:
        _check_classifier(recipe)
    start = read_start(recipe, base)
    tokenizer = load_tokenizer(base)
    sets = _load_data(recipe, tokenizer, base, None if start is None else start.labels)
    form = answer_form(recipe, tokenizer, base)
    sets = form.noted(sets)
    asked, rows = _with_hold_outs(recipe, sets), [len(examples.train) for examples in sets]
    recipe = by_rule(asked, width=hidden_size(base), rows=rows)
    judges = judges_of(recipe)
    for stage in recipe.stage:
        method = method_of(stage, base.kind)
        own = own_settings(stage, method) if stage.grpo is None else stage.grpo.without(judges)
        method.check(own, base)
    pad_id = (
        tokenizer.pad_token_id
        if tokenizer.pad_token_id is not None
        else tokenizer.eos_token_id or 0
    )
    replays = _load_replays(recipe, tokenizer, sets, pad_id=pad_id, kind=base.kind)
    digests = [
        examples.digests
        | ({} if replay is None else {"replay": replay.digest})
        | ({} if stage.grpo is None else reward_digests(stage.grpo.without(judges)))
        for stage, examples, replay in zip(recipe.stage, sets, replays, strict=True)
    ]
    if start is not None:
        digests[0]["start"] = start.digest
    found = chosen(asked, recipe)
    return Inputs(
        recipe, base, tokenizer, sets, replays, digests, start, pad_id, found, form.schema
    )


def _check_classifier(recipe: Recipe) -> None:
    """RecipeError for what a classifier on a decoder has no place for."""
    if recipe.parameters.train == "full":
        raise RecipeError(
            'parameters.train = "full" does not fit sequence-classification on a decoder',
            expected="an adapter, which shares the base with those that generate",
            fix='Use parameters.train = "lora" or "head".',
        )
    if recipe.forgetting is not None:
        raise RecipeError(
            "[forgetting] has no meaning for sequence-classification on a decoder",
            expected="a decoder that predicts text, or an encoder",
            fix="Remove [forgetting].",
        )


def _as_it_ships(base: Base, recipe: Recipe) -> Base:
    """The base that training sees: with the bundle's weights where the recipe says so."""
    weights = recipe.parameters.base_precision
    return (
        base if weights is None else replace(base, precision=shipped_precision(weights, base.kind))
    )


def _load_data(
    recipe: Recipe, tokenizer: Any, base: Base, classes: tuple[str, ...] | None
) -> list[ExampleSet]:
    """Every stage's examples, so that a bad row of the last stage is found before the first one
    trains; `classes` are fixed.
    """
    sets: list[ExampleSet] = []
    for stage in recipe.stage:
        labels = next(
            (examples.labels for examples in sets if examples.labels is not None), classes
        )
        sets.append(
            load_examples(
                stage, tokenizer, base, labels, seed=recipe.seed, outside=outside_label(recipe)
            )
        )
    return sets


def _with_hold_outs(recipe: Recipe, sets: list[ExampleSet]) -> Recipe:
    """The recipe that says how many rows were held out, which draws the same ones again."""
    stages = [
        stage
        if examples.held_out is None
        else replace(stage, data=replace(stage.data, hold_out=examples.held_out))
        for stage, examples in zip(recipe.stage, sets, strict=True)
    ]
    return replace(recipe, stage=tuple(stages))


def _load_replays(
    recipe: Recipe, tokenizer: Any, sets: list[ExampleSet], *, pad_id: int, kind: str
) -> list[ReplayText | None]:
    """Every stage's general text; None for a stage without."""
    return [
        None
        if stage.replay is None
        else load_replay(
            stage.replay,
            tokenizer,
            step_tokens=step_tokens(stage, examples.train, kind=kind),
            limit=examples.max_length,
            pad_id=pad_id,
            seed=recipe.seed + index,
            skip_invalid=stage.data.skip_invalid,
        )
        for index, (stage, examples) in enumerate(zip(recipe.stage, sets, strict=True))
    ]


def rows_of_a_step(stage: Stage) -> int:
    """The stage's batch; while it is not measured yet, an ordinary one."""
    return UNMEASURED if isinstance(stage.batch_size, str) else stage.batch_size


def step_tokens(stage: Stage, examples: Sequence[Any], *, kind: str) -> float:
    """Tokens that an optimizer step learns from, on the mean; of grpo's answers as many as there
    may be.
    """
    length = method_of(stage, kind).length
    answers = 1 if stage.grpo is None else stage.grpo.group_size
    return (
        answers
        * sum(length(example) for example in examples)
        / steps_per_epoch(len(examples), rows_of_a_step(stage))
    )
