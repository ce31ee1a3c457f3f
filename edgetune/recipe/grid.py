"""A grid of settings: every combination as a recipe of its own, read and checked."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgetune.core.errors import RecipeError
from edgetune.core.settings import shortened
from edgetune.recipe.read import load_recipe
from edgetune.recipe.runs import PlannedRun

SEED, MOST = "seed", 1_000  # runs of a sweep
QUOTES, OPENING, CLOSING = "\"'", "[{", "]}"


def combinations(
    path: Path,
    grid: Sequence[str],
    seeds: str | None,
    *,
    overrides: Sequence[str],
    out: Path | None = None,
) -> list[PlannedRun]:
    """Every combination of `key=a,b,c` and the seeds, in a folder of `out` (default: the recipe's
    with -sweep behind it). RecipeError for the first that is no recipe.
    """
    values = _values([*grid, *([f"{SEED}={seeds}"] if seeds is not None else [])])
    count = math.prod(map(len, values.values()))
    if not values or count > MOST:
        raise RecipeError(
            f"a sweep of {count:,} runs" if values else "nothing to vary",
            where=str(path),
            expected=f"at most {MOST:,} runs" if values else "--grid KEY=A,B or --seeds 0,1,2",
        )
    made, names = list[PlannedRun](), short_keys(values)
    for chosen in itertools.product(*values.values()):
        settings = dict(zip(values, chosen, strict=True))
        recipe = load_recipe(path, [*overrides, *(f"{k}={v}" for k, v in settings.items())])
        name = "_".join(f"{names[key]}={value}" for key, value in settings.items())
        folder = out or Path(f"{recipe.out.rstrip('/')}-sweep")
        name = re.sub(r"[^\w.=+-]", "-", name)[:120]
        made.append(PlannedRun(name, recipe, folder, settings))
    if len({one.name for one in made}) < len(made):  # alike but for signs that no folder has
        made = [replace(one, name=f"{number}_{one.name}") for number, one in enumerate(made)]
    return [replace(one, out=made[0].out / one.name) for one in made]


def short_keys(keys: Mapping[str, Any]) -> dict[str, str]:
    """The last part of each key, or the whole where two end alike."""
    ends = [key.rpartition(".")[2] for key in keys]
    return {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)}


def _values(grid: Sequence[str]) -> dict[str, list[str]]:
    """Key → its values, each once."""
    values: dict[str, list[str]] = {}
    for setting in grid:
        key, equals, text = setting.partition("=")
        key, where = key.strip(), f"--grid {shortened(setting)}"
        found = list(dict.fromkeys(_parts(text))) if equals else []
        if not key or not found or "" in found:
            raise RecipeError(
                "not a setting with its values",
                where=where,
                expected="KEY=A,B,C such as stage.0.learning_rate=1e-4,1e-3",
            )
        if key in values:
            raise RecipeError(f"{key} is varied twice", where=where, fix="Name its values once.")
        values[key] = found
    return values


def _parts(text: str) -> Iterator[str]:
    """The values between commas; a comma inside of quotes or brackets is part of a value."""
    part, depth, quote = "", 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in QUOTES:
            quote = sign
        else:
            depth += (sign in OPENING) - (sign in CLOSING)
        if sign == "," and not depth and not quote:
            yield part.strip()
            part = ""
        else:
            part += sign
    yield part.strip()
