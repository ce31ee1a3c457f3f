"""`edgetune train`: recipe → run folder."""

from __future__ import annotations

import math
from pathlib import Path

import click

from edgetune.cli.options import wait_briefly


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help=(
        "Change one setting of the recipe, e.g. stage.0.epochs=2 or parameters.rank=4; repeat for"
        " several."
    ),
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="The run folder, instead of the recipe's out."
)
@click.option(
    "--resume",
    is_flag=True,
    help="Continue an unfinished run of this recipe from its newest checkpoint.",
)
@click.option(
    "--replace",
    is_flag=True,
    help="Put the new run in the place of a finished one, once it is finished too.",
)
@click.option(
    "--search",
    metavar="TIME",
    help=(
        'First try settings for what is "auto" in RECIPE (rate, epochs, rank) for at most this'
        " long, e.g. 10m, 90s or 1h; the best trains the run."
    ),
)
@click.option(
    "--migrate",
    is_flag=True,
    help=(
        "Train nothing: rewrite a RECIPE of version 0.1, in place or as the file that --out names."
    ),
)
def command(
    recipe: Path,
    overrides: tuple[str, ...],
    out: Path | None,
    resume: bool,
    replace: bool,
    search: str | None,
    migrate: bool,
) -> None:
    """Train an adapter as RECIPE (a .toml file) says and write the run folder."""
    from edgetune.recipe.read import load_recipe

    if migrate:
        if overrides or resume or replace or search:
            raise click.UsageError("--migrate goes with --out alone")
        _migrate(recipe, out)
        return
    seconds = None if search is None else seconds_of(search)
    settings = load_recipe(
        recipe, overrides
    )  # before torch is imported: a typing error shows at once

    wait_briefly()
    from edgetune.metrics.statistics import headline
    from edgetune.report.run_page import write_report
    from edgetune.training import run_recipe
    from edgetune.training.parallel.distributed import launched

    if seconds is None:
        summary = run_recipe(
            settings, out=out, resume=resume, replace_finished=replace, write_more=write_report
        )
    else:
        from edgetune.training.search import find_settings

        found = find_settings(
            settings, seconds=seconds, out=out, resume=resume, replace_finished=replace
        )
        summary = run_recipe(
            found.recipe,
            out=out,
            resume=resume,
            replace_finished=replace,
            write_more=lambda partial, result: write_report(partial, result, trials=found.trials),
            searched=found.facts,
        )
    if not launched().leads:
        return  # of several processes one speaks
    numbers = summary.metrics or {"train_loss": summary.train_loss}
    click.echo(
        f"{summary.out}: "
        + ", ".join(f"{name} {value:.4g}" for name, value in headline(numbers).items())
    )


UNITS = {"s": 1, "m": 60, "h": 3600}


def seconds_of(text: str) -> float:
    """`10m`, `90s`, `1h` or plain seconds."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in UNITS else (text, "s")
    try:
        seconds = float(number) * UNITS[unit]
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise click.BadParameter(
            f"{text!r} is no time, such as 10m, 90s or 1h", param_hint="--search"
        )
    return seconds


def _migrate(recipe: Path, out: Path | None) -> None:
    from edgetune.core.files import write_text
    from edgetune.recipe.migrate import migrate_text
    from edgetune.recipe.read import read_toml

    text, moves = migrate_text(read_toml(recipe), where=str(recipe))
    if moves or out is not None:
        write_text((out or recipe).resolve(), text)
    for move in moves:
        click.echo(move)
    click.echo(
        f"{out or recipe} is written" if moves else f"{recipe} needs nothing: every key is in place"
    )
