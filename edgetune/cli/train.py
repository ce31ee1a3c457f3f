"""`edgetune train`: recipe → run folder."""

from __future__ import annotations

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
    migrate: bool,
) -> None:
    """Train an adapter as RECIPE (a .toml file) says and write the run folder."""
    from edgetune.recipe.read import load_recipe

    if migrate:
        if overrides or resume or replace:
            raise click.UsageError("--migrate goes with --out alone")
        _migrate(recipe, out)
        return
    settings = load_recipe(
        recipe, overrides
    )  # before torch is imported: a typing error shows at once

    wait_briefly()
    from edgetune.metrics.statistics import headline
    from edgetune.report.run_page import write_report
    from edgetune.training import run_recipe
    from edgetune.training.parallel.distributed import launched

    summary = run_recipe(
        settings, out=out, resume=resume, replace_finished=replace, write_more=write_report
    )
    if not launched().leads:
        return  # of several processes one speaks
    numbers = summary.metrics or {"train_loss": summary.train_loss}
    click.echo(
        f"{summary.out}: "
        + ", ".join(f"{name} {value:.4g}" for name, value in headline(numbers).items())
    )


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
