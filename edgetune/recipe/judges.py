"""The judges of a recipe: `reward` stages that train an adapter of their own, by whose scores the
grpo stages after them learn.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from edgetune.core.errors import RecipeError
from edgetune.core.settings import shown
from edgetune.recipe.paths import split_function
from edgetune.recipe.schema import Recipe, Stage

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")  # it becomes a folder of the run


def judges_of(recipe: Recipe) -> dict[str, int]:
    """The names of the recipe's judges and the numbers of the stages that train them."""
    return {
        stage.adapter: number
        for number, stage in enumerate(recipe.stage)
        if stage.adapter is not None
    }


def judge_recipe(recipe: Recipe, number: int, *, out: Path) -> Recipe:
    """The recipe that stage `number` would be by itself, with the same base and parameters."""
    return replace(
        recipe,
        stage=(replace(recipe.stage[number], adapter=None),),
        parameters=replace(recipe.parameters, start=None),
        forgetting=None,
        generation=None,
        out=str(out),
    )


def check_judges(recipe: Recipe, *, where: str) -> None:
    """RecipeError for a judge without a usable name of its own, one that no later grpo stage asks,
    and one that is asked before it is trained."""
    judges = judges_of(recipe)
    for number, stage in enumerate(recipe.stage):
        if stage.adapter is None:
            continue
        path = f"stage.{number}.adapter"
        if not NAME.fullmatch(stage.adapter):
            raise RecipeError(
                f"{path} cannot be an adapter's name",
                where=where,
                expected='letters, digits, - _ . such as "judge"',
                got=shown(stage.adapter),
            )
        if judges[stage.adapter] != number:
            raise RecipeError(
                f'two stages train the adapter "{stage.adapter}"',
                where=where,
                got=f"stage {number} and stage {judges[stage.adapter]}",
                fix="Give each its own name.",
            )
        users = [at for at, one in enumerate(recipe.stage) if stage.adapter in _rewards(one)]
        if not users:
            raise RecipeError(
                f'no grpo stage learns by the adapter "{stage.adapter}"',
                where=where,
                expected=f'reward = "{stage.adapter}" in a grpo stage after stage {number}',
                fix=f"Name it there, or remove {path}: a reward stage alone is a recipe.",
            )
        if users[0] < number:
            raise RecipeError(
                f'stage.{users[0]}.grpo.reward names "{stage.adapter}", which a later stage trains',
                where=where,
                got=f"stage {number} trains it",
                fix="Put the reward stage before the grpo stage.",
            )


def check_known(value: str, recipe: Recipe, folder: Path, *, path: str, where: str) -> None:
    """RecipeError for a reward that reads like a judge's name and is none, nor a folder, in a
    recipe that trains judges."""
    judges = judges_of(recipe)
    there = any((place / value).exists() for place in (folder, Path()))
    if judges and not there and split_function(value) is None and NAME.fullmatch(value):
        raise RecipeError(
            f"{path} names no adapter that this recipe trains, and no run folder",
            where=where,
            expected=f"one of {', '.join(judges)}, a run folder, or a function",
            got=shown(value),
        )


def _rewards(stage: Stage) -> tuple[str, ...]:
    return () if stage.grpo is None else stage.grpo.rewards
