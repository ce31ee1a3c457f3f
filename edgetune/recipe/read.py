"""A TOML file → a checked recipe with absolute paths, and back; `--set key.path=value` changes one
setting.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from edgetune.core import settings
from edgetune.core.errors import RecipeError
from edgetune.core.settings import key_of, shortened
from edgetune.core.tasks import METHODS
from edgetune.recipe.checks import (
    _check_stage,
    check_confidence,
    check_forgetting,
    check_own_settings,
    check_parameters,
    check_trained,
)
from edgetune.recipe.generation import resolve_generation
from edgetune.recipe.judges import check_judges, check_known, judges_of
from edgetune.recipe.migrate import check_places, migrated, new_place
from edgetune.recipe.own_settings import with_own_tables
from edgetune.recipe.paths import (
    absolute,
    base_path,
    data_path,
    expand,
    from_here,
    locate_reward,
)
from edgetune.recipe.schema import (
    Data,
    Forgetting,
    Generation,
    Parameters,
    Recipe,
    Replay,
    Stage,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file; each override is `key.path=value`, e.g. `stage.0.epochs=2`."""
    values = parse_toml(read_toml(path), where=str(path))
    for setting in overrides:
        override(values, setting)
    return recipe_from_dict(values, folder=path.parent, where=str(path))


def load_run_recipe(path: Path) -> Recipe:
    """Read the recipe.toml of a run, which may be of version 0.1."""
    values = migrated(parse_toml(read_toml(path), where=str(path)), where=str(path))
    return recipe_from_dict(values, folder=path.parent, where=str(path))


def read_toml(path: Path) -> str:
    """The text of a recipe file as it stands. RecipeError where it is no valid TOML."""
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise RecipeError(
            "there is no such recipe file", where=str(path), fix="Give the path of a .toml file."
        ) from None
    except IsADirectoryError:
        raise RecipeError("this is a folder", where=str(path), expected="a .toml file") from None
    except OSError as error:
        raise RecipeError(f"cannot read the recipe: {error.strerror}", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise RecipeError(
            "not UTF-8 text", where=str(path), got=f"byte {error.start} is invalid"
        ) from error
    parse_toml(text, where=str(path))
    return text


def parse_toml(text: str, *, where: str) -> dict[str, Any]:
    """The values of a TOML text. RecipeError where it is none, or beyond what the parser takes."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"not valid TOML: {error}", where=where) from error
    except RecursionError:
        raise RecipeError(
            "lists or tables are nested too deeply", where=where, fix="Take some levels out."
        ) from None
    except ValueError:  # Python reads integers of at most 4,300 digits
        raise RecipeError("an integer has too many digits", where=where) from None


def recipe_from_dict(
    values: Mapping[str, Any], *, folder: Path | None = None, where: str = "recipe"
) -> Recipe:
    """Build a recipe from plain values; relative data paths are taken from `folder` (default: the
    current one).
    """
    folder = folder if folder is not None else Path()
    check_places(values, where=where)
    check_own_settings(values, where=where)
    recipe = settings.from_dict(Recipe, with_own_tables(values), where=where)
    if not recipe.stage:
        raise RecipeError("there is no stage", where=where, expected="at least one [[stage]]")
    check_parameters(recipe.parameters, where=where)
    check_forgetting(recipe, where=where)
    check_confidence(recipe, where=where)
    previous: Stage | None = None
    for index, stage in enumerate(recipe.stage):
        check_trained(recipe.parameters, stage, path=f"stage.{index}", where=where)
        is_judge = stage.adapter is not None
        _check_stage(stage, None if is_judge else previous, path=f"stage.{index}", where=where)
        previous = previous if is_judge else stage
    check_judges(recipe, where=where)
    stages = tuple(
        replace(
            _resolve_reward(stage, recipe, folder, path=f"stage.{index}.grpo.reward", where=where),
            data=_resolve_data(stage.data, folder=folder, path=f"stage.{index}.data", where=where),
            replay=_resolve_replay(stage, folder=folder, path=f"stage.{index}.replay", where=where),
        )
        for index, stage in enumerate(recipe.stage)
    )
    out = expand(recipe.out, path="out", where=where)
    forgetting = recipe.forgetting
    if forgetting is not None:
        general = absolute(
            folder, expand(forgetting.general, path="forgetting.general", where=where)
        )
        forgetting = replace(forgetting, general=general)
    generation = resolve_generation(recipe, folder, where=where)
    base = base_path(recipe.base, folder, where=where)
    parameters = recipe.parameters
    if parameters.start is not None:
        parameters = replace(
            parameters,
            start=absolute(folder, expand(parameters.start, path="parameters.start", where=where)),
        )
    return replace(
        recipe,
        base=base,
        parameters=parameters,
        out=out,
        forgetting=forgetting,
        generation=generation,
        stage=stages,
    )


def recipe_to_toml(recipe: Recipe) -> str:
    """The recipe with every default written out; reading it again gives an equal recipe."""
    return settings.to_toml(recipe)


def _resolve_reward(stage: Stage, recipe: Recipe, folder: Path, *, path: str, where: str) -> Stage:
    """Absolute paths of reward runs and of the files that hold reward functions; the recipe's own
    judges keep their names.
    """
    grpo, judges = stage.grpo, judges_of(recipe)
    if grpo is None:
        return stage

    def located(value: str) -> str:
        value = expand(value, path=path, where=where)
        check_known(value, recipe, folder, path=path, where=where)
        return locate_reward(value, folder)

    found = tuple(value if value in judges else located(value) for value in grpo.rewards)
    reward = found[0] if isinstance(grpo.reward, str) else found
    return replace(stage, grpo=replace(grpo, reward=reward))


def _resolve_data(data: Data, *, folder: Path, path: str, where: str) -> Data:
    """Absolute data paths; what looks like a hub id and is no file stays as it is."""

    def resolve(key: str, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if isinstance(value, str):
            return data_path(value, folder=folder, path=f"{path}.{key}", where=where)
        if not value:
            raise RecipeError(
                f"{path}.{key} is empty", where=where, expected="at least one data file"
            )
        return tuple(
            data_path(one, folder=folder, path=f"{path}.{key}", where=where) for one in value
        )

    validation = None if data.validation is None else resolve("validation", data.validation)
    return replace(data, train=resolve("train", data.train), validation=validation)


def _resolve_replay(stage: Stage, *, folder: Path, path: str, where: str) -> Replay | None:
    if stage.replay is None:
        return None
    if stage.task != "text-generation":
        fix = "Remove replay" + (
            "; masked-lm may come before this stage instead."
            if "encoder" in METHODS[stage.method].kinds
            else "."
        )
        raise RecipeError(
            f"{path} has no meaning for {stage.method}",
            where=where,
            expected="a decoder that predicts text",
            fix=fix,
        )
    return replace(
        stage.replay,
        data=data_path(stage.replay.data, folder=folder, path=f"{path}.data", where=where),
    )


def override(values: dict[str, Any], setting: str) -> None:
    """Put one `key.path=value` into the plain values; the value is TOML, or else a string."""
    key, equals, text = setting.partition("=")
    where = f"--set {shortened(setting)}"
    if not equals or not key.strip():
        raise RecipeError(
            "not a setting", where=where, expected="KEY=VALUE such as stage.0.epochs=2"
        )
    value = _value(text, where=where)
    if (new := new_place(key.strip())) is not None:
        raise RecipeError(
            f"{key.strip()} is {new} now", where=where, fix=f"Write --set {new}={text}."
        )
    *parents, last = key.strip().split(".")
    if not parents and (inner := _inner_key(last)):
        fix = f'Did you mean "{inner}"?'
        raise RecipeError(f'unknown key "{shortened(last)}"', where=where, fix=fix)
    place: Any = values
    for part in parents:
        place = _step(place, part, where=where)
    if isinstance(place, list):
        raise RecipeError(
            f'"{last}" is not a setting',
            where=where,
            expected="a key inside it, e.g. stage.0.epochs",
        )
    if not isinstance(place, dict):
        raise RecipeError(f'"{parents[-1]}" has no settings inside', where=where)
    place[last] = from_here(key.strip(), value)


def _inner_key(word: str) -> str | None:
    """The whole name of a setting inside a table, for a word that is near to no key of the top."""
    top = [key_of(field) for field in fields(Recipe)]
    tables = {"stage.0": Stage, "parameters": Parameters, "generation": Generation}
    tables |= {"stage.0.data": Data, "forgetting": Forgetting}
    inner: dict[str, str] = {}
    for table, cls in tables.items():
        for field in fields(cls):
            inner.setdefault(key_of(field), f"{table}.{key_of(field)}")
    if difflib.get_close_matches(word, top, n=1):
        return None
    return next((inner[near] for near in difflib.get_close_matches(word, inner, n=1)), None)


def _value(text: str, *, where: str) -> Any:
    """TOML, or else the text itself."""
    try:
        values = parse_toml(f"value = {text}", where=where)
    except RecipeError as error:
        if isinstance(error.__cause__, tomllib.TOMLDecodeError):
            return text
        raise
    if len(values) > 1:
        raise RecipeError(
            "one --set changes one setting, and a line follows this one",
            where=where,
            fix="Repeat --set for each of them.",
        )
    return values["value"]


def _step(place: Any, part: str, *, where: str) -> Any:
    if isinstance(place, list):
        if not part.isdecimal() or len(part) > 9 or int(part) >= len(place):
            raise RecipeError(
                f'no stage "{shortened(part)}"',
                where=where,
                expected=f"a number from 0 to {len(place) - 1}",
            )
        return place[int(part)]
    if not isinstance(place, dict):
        raise RecipeError(f'"{part}" has no settings inside', where=where)
    return place.setdefault(part, {})
