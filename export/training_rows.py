"""The rows that a run learned from, read again as training read them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgetune.adapters import METADATA, read_metadata
from edgetune.bases import Base
from edgetune.examples import ExampleSet, load_examples
from edgetune.export.sources import Source
from edgetune.layout import RECIPE
from edgetune.recipe_file import load_recipe


def has_recipe(sources: Sequence[Source]) -> bool:
    """Whether a recipe beside any of the adapters says what it was trained on."""
    return any((source.folder.parent / RECIPE).is_file() for source in sources)


def run_examples(adapter: Path, tokenizer: Any, base: Base) -> ExampleSet | None:
    """The examples of the last stage of the run that `adapter` lies in, with its labels, its rows held out by its seed.

    None where there is no recipe beside it; an EdgetuneError where its data has moved or cannot be read any more.
    """
    recipe_file = adapter.parent / RECIPE
    if not recipe_file.is_file():
        return None
    recipe = load_recipe(recipe_file)
    labels = read_metadata(adapter).get("labels") if (adapter / METADATA).is_file() else None
    return load_examples(recipe.stage[-1], tokenizer, base, labels, seed=recipe.seed)
