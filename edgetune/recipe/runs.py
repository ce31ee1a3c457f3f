"""Several recipes as runs to come, each with a name and a folder of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgetune.core.errors import RecipeError, listed
from edgetune.recipe.read import load_recipe
from edgetune.recipe.schema import Recipe


@dataclass(frozen=True)
class PlannedRun:
    """A recipe, and where its run goes."""

    name: str
    recipe: Recipe
    out: Path
    settings: Mapping[str, str] = field(default_factory=dict)
    """of a sweep: what this run sets, by dotted key, as TOML"""


def plan_runs(
    paths: Sequence[Path], *, overrides: Sequence[str] = (), out: Path | None = None
) -> list[PlannedRun]:
    """The runs of recipe files, each in its recipe's own `out`, or in a folder of `out` that is
    named as its file is; `overrides` are for all. RecipeError, before anything trains, for all
    files that are no recipes, and where a recipe or a folder stands there twice.
    """
    if not paths:
        return []
    _check_distinct([path.resolve() for path in paths])
    recipes, problems = list[Recipe](), list[str]()
    for path in paths:
        try:
            recipes.append(load_recipe(path, overrides))
        except RecipeError as error:
            problems.append(_with_file(path, str(error)))
    if problems:
        raise RecipeError(listed(list(dict.fromkeys(problems)), "recipes are refused"))
    if out is None:
        folders = [Path(recipe.out) for recipe in recipes]
    else:
        names = short_names([path.with_suffix("") for path in paths])
        folders = [out / name for name in names]
    _check_apart(paths, folders)
    names = short_names(folders)
    return [PlannedRun(*each) for each in zip(names, recipes, folders, strict=True)]


def short_names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, or more of them where that is the same for two."""
    paths = [folder.resolve() for folder in folders]
    length, longest = 1, max(len(path.parts) for path in paths)
    while length < longest and len({path.parts[-length:] for path in paths}) < len(paths):
        length += 1
    return ["/".join(path.parts[-length:]) for path in paths]


def common_folder(runs: Sequence[PlannedRun]) -> Path:
    """The deepest folder that all runs lie in; the current one where they have none in common."""
    parents = [str(run.out.resolve().parent) for run in runs]
    try:
        common = Path(os.path.commonpath(parents))
    except ValueError:  # drives of Windows
        return Path.cwd()
    return Path.cwd() if common == Path(common.anchor) else common


def check_independent(runs: Sequence[PlannedRun]) -> None:
    """RecipeError where a run needs what another one trains, so that they cannot go on together."""
    trained = {run.out.resolve(): run for run in runs}
    for run in runs:
        rewards = [place for one in run.recipe.stage if one.grpo for place in one.grpo.rewards]
        for needed in [run.recipe.base, run.recipe.parameters.start, *rewards]:
            place = Path(needed or ".").resolve()
            other = next((trained[up] for up in (place, *place.parents) if up in trained), None)
            if needed and other is not None:
                raise RecipeError(
                    f"{run.name} begins with what {other.name} trains",
                    where=str(other.out),
                    fix=f"Train {other.name} first, or leave --ray out and name it first.",
                )


def _with_file(path: Path, line: str) -> str:
    """A line that names its file; those of `--set` name the option, for all files alike."""
    return line if line.startswith((str(path), "--set ")) else f"{path}: {line}"


def _check_distinct(files: Sequence[Path]) -> None:
    for at, path in enumerate(files):
        if path in files[:at]:
            raise RecipeError("this recipe is given twice", where=str(path), fix="Name it once.")


def _check_apart(paths: Sequence[Path], folders: Sequence[Path]) -> None:
    """No run may lie where another one does, or inside of it."""
    places = {folder.resolve(): path for folder, path in zip(folders, paths, strict=True)}
    seen: dict[Path, Path] = {}
    for path, folder in zip(paths, folders, strict=True):
        place = folder.resolve()
        other = seen.get(place) or next((places[up] for up in place.parents if up in places), None)
        if other is not None:
            raise RecipeError(
                "its run folder is the one of another recipe, or lies in it",
                where=str(path),
                got=f"{folder}, and {other} has {'the same' if place in seen else 'one above'}",
                fix="Give each recipe an out of its own, or --out FOLDER for all of them.",
            )
        seen[place] = path
