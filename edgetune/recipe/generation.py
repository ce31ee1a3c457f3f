"""A recipe's `[generation]`: files found and read before training begins, and what of it goes with
the adapter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.core.errors import RecipeError
from edgetune.recipe.paths import absolute, expand

if TYPE_CHECKING:
    from edgetune.recipe.schema import Generation, Recipe


FORMS = ("schema", "regex", "grammar")


def resolve_generation(recipe: Recipe, folder: Path, *, where: str) -> Generation | None:
    """Absolute paths of its files, which are read once so that a typo is found now. RecipeError
    names the key.
    """
    generation = recipe.generation
    if generation is None:
        return None
    if recipe.task != "text-generation":
        raise RecipeError(
            f"[generation] has no meaning for {recipe.stage[-1].method}",
            where=where,
            fix="Remove it.",
        )
    given = [name for name in FORMS if getattr(generation, name) is not None]
    if len(given) > 1:
        raise RecipeError(
            "an answer has one form",
            where=where,
            expected=f"one of {', '.join(FORMS)}",
            got=" and ".join(given),
        )
    paths: dict[str, Any] = {
        name: absolute(folder, expand(value, path=f"generation.{name}", where=where))
        for name in ("schema", "grammar")
        if (value := getattr(generation, name)) is not None
    }
    resolved = replace(generation, **paths)
    _forms(resolved, where=where)
    return resolved


def generation_defaults(recipe: Recipe, max_new_tokens: int) -> dict[str, Any]:
    """What `edgetune_adapter.json` records: `max_new_tokens` where the recipe has none, and what it
    sets.
    """
    defaults: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    if recipe.generation is None:
        return defaults
    given = {f.name: getattr(recipe.generation, f.name) for f in fields(recipe.generation)}
    given["stop"] = list(recipe.generation.stop) or None
    given |= _forms(recipe.generation, where="recipe")
    return defaults | {name: value for name, value in given.items() if value is not None}


def shaping(generation: Mapping[str, Any]) -> list[str]:
    """Which of an adapter's generation defaults change a greedy answer beside its length and its
    stop texts.
    """
    forms = [name for name in ("schema", "regex", "grammar") if generation.get(name) is not None]
    neutral = {
        "logit_bias": {},
        "repetition_penalty": 1,
        "frequency_penalty": 0,
        "presence_penalty": 0,
    }
    return forms + [
        name for name, value in neutral.items() if generation.get(name, value) not in (None, value)
    ]


def _forms(generation: Generation, *, where: str) -> dict[str, Any]:
    """The content of the files: the schema as a JSON object, the grammar as text."""
    forms: dict[str, Any] = {}
    for name in ("schema", "grammar"):
        path = getattr(generation, name)
        if path is None:
            continue
        try:
            text = Path(path).read_text(encoding="utf-8")
            forms[name] = json.loads(text) if name == "schema" else text
        except (OSError, ValueError, RecursionError) as error:  # no text, no JSON, or beyond it
            expected = "a JSON schema file" if name == "schema" else "a Lark grammar file"
            raise RecipeError(
                f"generation.{name} cannot be read: {error}",
                where=where,
                expected=expected,
                got=path,
            ) from error
    if not isinstance(forms.get("schema", {}), dict):
        raise RecipeError(
            "generation.schema is no JSON object",
            where=where,
            expected="a JSON schema file",
            got=str(generation.schema),
        )
    return forms
