"""What a recipe leaves to edgetune (`"auto"`), settled by a rule: learning rate and epochs.

The rule is a table, so that a reader can tell beforehand what a run will do. It was taken from the
settings of this repository's measured recipes; `edgetune train --search` measures instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgetune.core.settings import flat
from edgetune.recipe.schema import Recipe, Stage

# Peak learning rate of an adapter on a base of at most WIDTH.
RATES = {
    "sequence-classification": 1e-3,
    "token-classification": 1e-3,
    "sft": 5e-4,
    "causal-lm": 5e-4,
    "masked-lm": 5e-4,
    "reward": 2e-4,
    "dpo": 2e-4,
    "grpo": 1e-4,
}
OTHERS_RATE = 2e-4
WIDTH = 576  # wider bases learn with less: Adam's best rate falls with the width (muP, Yang 2022)
FULL = 0.1  # of an adapter's rate, where all weights learn
# (at most this many rows, epochs); methods without a line learn for one epoch
EPOCHS = {
    "sequence-classification": ((1_000, 10.0), (10_000, 5.0), (None, 3.0)),
    "token-classification": ((1_000, 10.0), (10_000, 5.0), (None, 3.0)),
    "sft": ((3_000, 3.0), (30_000, 2.0), (None, 1.0)),
}


def by_rule(recipe: Recipe, *, width: int, rows: list[int]) -> Recipe:
    """The recipe with a number for every rate, every stage's epochs and the adapter's rank that it
    leaves open. `width`: of the base's layers; `rows`: of each stage's training set.
    """
    parameters = recipe.parameters
    stages = tuple(
        replace(
            stage,
            learning_rate=(
                rate_of(stage, train=parameters.train, width=width)
                if stage.learning_rate == "auto"
                else stage.learning_rate
            ),
            epochs=epochs_of(stage, count) if stage.epochs == "auto" else stage.epochs,
        )
        for stage, count in zip(recipe.stage, rows, strict=True)
    )
    parameters = replace(parameters, rank=parameters.r, alpha=parameters.lora_alpha)
    return replace(recipe, parameters=parameters, stage=stages)


def with_settings(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """The recipe with other values of `parameters.KEY` and `stage.N.KEY`."""
    for key, value in settings.items():
        table, _, name = key.rpartition(".")
        if table == "parameters":
            recipe = replace(recipe, parameters=replace(recipe.parameters, **{name: value}))
        else:
            stages = list(recipe.stage)
            at = int(table.removeprefix("stage."))
            stages[at] = replace(stages[at], **{name: value})
            recipe = replace(recipe, stage=tuple(stages))
    return recipe


def rate_of(stage: Stage, *, train: str, width: int) -> float:
    """The rule's peak learning rate, to two digits."""
    rate = RATES.get(stage.method, OTHERS_RATE)
    if train == "head":
        return rate
    narrower = min(1.0, WIDTH / width) * (FULL if train == "full" else 1.0)
    return float(f"{rate * narrower:.1e}")


def epochs_of(stage: Stage, rows: int) -> float:
    """The rule's passes over so many rows."""
    steps = EPOCHS.get(stage.method, ((None, 1.0),))
    return next(epochs for most, epochs in steps if most is None or rows <= most)


def chosen(asked: Recipe, settled: Recipe) -> dict[str, Any]:
    """What was "auto" in the recipe and is a number now, by dotted key; of an adapter's settings
    only where there is one.
    """
    after, adapted = dict(flat(settled)), asked.parameters.train == "lora"
    return {
        key: after[key]
        for key, value in flat(asked)
        if value == "auto"
        and isinstance(after[key], int | float)
        and (adapted or not key.startswith("parameters."))
    }
