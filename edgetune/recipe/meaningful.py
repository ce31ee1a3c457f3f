"""Which of a recipe's settings mean something to its run: what a page shows of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edgetune.core.settings import flat
from edgetune.core.tasks import CLASSIFICATION, METHODS, REWARD, TAGGING
from edgetune.recipe.schema import Parameters, Recipe, Stage

OF_ANY_WEIGHTS = {
    "lora": frozenset(Parameters.__dataclass_fields__) - {"shard"},
    "head": frozenset({"train", "base_precision", "start"}),
    "full": frozenset({"train", "shard"}),
}
OF_SOME_METHODS = frozenset(key for method in METHODS.values() for key in method.columns)
HEADED = frozenset({CLASSIFICATION, TAGGING, REWARD})
OF_TASKS = {
    "head_init": HEADED,
    "head_learning_rate": HEADED,
    "label_smoothing": frozenset({CLASSIFICATION, TAGGING}),
    "problem": frozenset({CLASSIFICATION}),
}


def meaningful_settings(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of what is set, without what another method or other weights read."""
    for key, value in flat(recipe):
        if value in (None, {}, ()):
            continue
        room, _, rest = key.partition(".")
        if room == "parameters" and rest not in OF_ANY_WEIGHTS[recipe.parameters.train]:
            continue
        if room == "stage":
            number, _, setting = rest.partition(".")
            if not _read(recipe.stage[int(number)], setting):
                continue
        yield key, value


def _read(stage: Stage, setting: str) -> bool:
    """Whether the stage's method reads a setting: `label_smoothing`, `data.prompt`, `grpo.kl`."""
    table, _, key = setting.partition(".")
    if table == "data" and key in OF_SOME_METHODS:
        return key in METHODS[stage.method].columns
    return table not in OF_TASKS or stage.task in OF_TASKS[table]
