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
AUTO_SCHEMA = "auto"  # a schema that is derived from the training answers


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
        and (name, value) != ("schema", AUTO_SCHEMA)
    }
    resolved = replace(generation, **paths)
    forms_of(resolved, where=where)
    return resolved


def generation_defaults(
    recipe: Recipe, max_new_tokens: int, *, derived: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What `edgetune_adapter.json` records: `max_new_tokens` where the recipe has none, and what it
    sets; `derived` takes the place of `schema = "auto"`.
    """
    defaults: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    if recipe.generation is None:
        return defaults
    given = {f.name: getattr(recipe.generation, f.name) for f in fields(recipe.generation)}
    given["stop"] = list(recipe.generation.stop) or None
    given |= forms_of(recipe.generation, where="recipe")
    if given["schema"] == AUTO_SCHEMA:
        given["schema"] = derived
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


def forms_of(generation: Generation, *, where: str) -> dict[str, Any]:
    """What answers are bound to, by the form's name: the content of a file, which is a JSON object
    for the schema and a text for the grammar; the regular expression; or AUTO_SCHEMA.
    """
    forms = {name: text for name in FORMS if (text := getattr(generation, name)) is not None}
    for name in ("schema", "grammar"):
        path = getattr(generation, name)
        if path is None or (name, path) == ("schema", AUTO_SCHEMA):
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
    if forms.get("schema", {}) != AUTO_SCHEMA and not isinstance(forms.get("schema", {}), dict):
        raise RecipeError(
            "generation.schema is no JSON object",
            where=where,
            expected="a JSON schema file",
            got=str(generation.schema),
        )
    return forms
