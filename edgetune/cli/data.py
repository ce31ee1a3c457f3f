"""`edgetune data`: what a data file, or the rows of a recipe, hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgetune.cli.init import reading_options

if TYPE_CHECKING:
    from edgetune.inspection.overview import Overview
    from edgetune.recipe.schema import Recipe

SHOWN = 20  # doubtful rows on the screen


@click.command()
@click.argument("source", metavar="RECIPE|DATA")
@reading_options
@click.option(
    "--run",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Also list the rows whose label this trained classifier doubts.",
)
@click.option(
    "--page",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write what is shown, and more of it, as an HTML page.",
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write what is shown, and all doubtful rows, as JSON.",
)
def command(
    source: str,
    task: str | None,
    base: str | None,
    run: Path | None,
    page: Path | None,
    json_file: Path | None,
    **columns: str | None,
) -> None:
    """Show what the rows of a RECIPE (a .toml file) or of DATA hold, and what is odd about them."""
    from edgetune.core.files import write_json, write_text
    from edgetune.inspection.screen import screen
    from edgetune.report.data_page import render_data

    given = {key: name for key, name in columns.items() if name is not None}
    recipe = _recipe_of(source, task, base, given)
    looks = _looks(recipe)
    found: dict[str, Any] = {"stages": [look.to_dict() for look in looks]}
    for number, look in enumerate(looks):
        if len(looks) > 1:
            click.echo(f"{'' if number == 0 else chr(10)}stage {number}")
        for line in screen(look):
            click.echo(line)
    if run is not None:
        found["doubts"] = _doubts(run, looks[-1], recipe)
    if json_file is not None:
        write_json(json_file, found)
    if page is not None:
        write_text(page, render_data(found))
        click.echo(f"{page} is written")


def _recipe_of(source: str, task: str | None, base: str | None, given: Mapping[str, str]) -> Recipe:
    """The recipe as it is, or the one that `edgetune init` would write for a data file."""
    from edgetune.core.errors import RecipeError
    from edgetune.inspection.starting import choices, draft, recipe_path, sources_of
    from edgetune.recipe.read import load_recipe

    if not source.endswith(".toml"):
        train, validation = sources_of(source, None)
        first, *others = choices(train, given, task, base)
        made = draft(first, others, train, validation, path=recipe_path(source), base=base)
        return made.recipe
    if given or task or base:
        raise RecipeError(
            "a recipe says itself how its rows are read",
            where=source,
            got="--task, --base or a column on the command line",
            fix="Leave them out, or give the data file.",
        )
    return load_recipe(Path(source))


def _looks(recipe: Recipe) -> list[Overview]:
    """A look at the rows of every stage."""
    from edgetune.inspection.overview import look_at
    from edgetune.models.load import load_tokenizer
    from edgetune.models.resolve import resolve_base

    base = resolve_base(recipe.base)
    tokenizer = load_tokenizer(base)
    looks = list["Overview"]()
    for stage in recipe.stage:
        names = next((look.names for look in looks if look.names is not None), None)
        looks.append(look_at(stage, tokenizer, base, names, seed=recipe.seed))
    return looks


def _doubts(run: Path, look: Overview, recipe: Recipe) -> dict[str, Any]:
    """The rows whose label the run doubts; said, and for JSON and the page."""
    from edgetune.evaluation.doubts import doubted_rows

    found = doubted_rows(run, recipe.stage[-1], seed=recipe.seed)
    click.echo("")
    click.echo(found.line)
    for one in found.rows[:SHOWN]:
        click.echo(f"  line {one.line}: {one.given} → {one.likely} ({one.score:.2f})  {one.shown}")
    if len(found.rows) > SHOWN:
        click.echo(f"  … {len(found.rows) - SHOWN} more, which --json and --page list")
    return found.to_dict()
