"""Which settings of a recipe mean something to its run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from edgetune.core.settings import flat
from edgetune.core.tasks import METHODS
from edgetune.recipe.schema import Recipe, Stage

ADAPTER = "lora"
ALWAYS = {"train", "start", "base_precision"}  # of [parameters], whatever learns
UNFINISHED = {"checkpoint_every", "keep_checkpoints"}  # for a run that is under way
COLUMNS = {key for method in METHODS.values() for key in method.columns}
VALIDATING = {"keep", "patience", "validate_every"}
LABELS = {"label_smoothing", "class_weights"}
HEAD = {"head_init", "head_learning_rate"}
STAGE = re.compile(r"stage\.(\d+)\.(data\.)?(\w+)")


def relevant(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every setting that is set and not switched off, but for what the
    stage's method, its data or what learns never looks at.
    """
    for key, value in flat(recipe):
        if not _off(value) and key not in UNFINISHED and _matters(recipe, key):
            yield key, value


def _off(value: Any) -> bool:
    """Not set, or switched off."""
    empty = value is None or value is False or value in ({}, (), "none")
    return empty or (isinstance(value, float) and value == 0.0)


def _matters(recipe: Recipe, key: str) -> bool:
    table, _, name = key.partition(".")
    if table == "parameters":
        lora = recipe.parameters.train == ADAPTER
        return name in ALWAYS or (lora and name != "shard") or recipe.parameters.train == name
    found = STAGE.fullmatch(key)
    if found is None:
        return True
    stage, of_data, name = recipe.stage[int(found[1])], found[2], found[3]
    return _data_matters(stage, name) if of_data else _stage_matters(stage, name)


def _data_matters(stage: Stage, name: str) -> bool:
    return name not in COLUMNS or name in METHODS[stage.method].columns


def _stage_matters(stage: Stage, name: str) -> bool:
    headed, validated = (
        METHODS[stage.method].has_head,
        (stage.data.validation is not None or stage.data.hold_out is not None),
    )
    if name in VALIDATING:
        return validated
    if name in LABELS:
        return headed and stage.problem != "regression"
    if name == "problem":
        return stage.method == "sequence-classification"
    return name not in HEAD or headed or stage.method == "reward"
