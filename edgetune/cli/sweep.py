"""`edgetune sweep`: a grid of settings → runs, compared."""

from __future__ import annotations

from pathlib import Path

import click

from edgetune.cli.options import wait_briefly
from edgetune.cli.train_many import Workers, compare, ray_training, train_all


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--grid",
    multiple=True,
    metavar="KEY=A,B,C",
    help="Values of one setting, e.g. stage.0.learning_rate=1e-4,1e-3; repeat for several.",
)
@click.option("--seeds", metavar="0,1,2", help="Train every combination with each of these seeds.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change one setting of the recipe for all runs; repeat for several.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The folder of all runs; default: the recipe's out with -sweep behind it.",
)
@click.option(
    "--replace",
    is_flag=True,
    help="Train anew where a folder holds the run of another recipe or of other data.",
)
@ray_training
def command(
    recipe: Path,
    grid: tuple[str, ...],
    seeds: str | None,
    overrides: tuple[str, ...],
    out: Path | None,
    replace: bool,
    ray: str | None,
    workers: int | None,
) -> int:
    """Train RECIPE once for each combination of settings and compare the runs in a table and on a
    page. Runs that are there already are taken as they are; one that was interrupted goes on.
    """
    from edgetune.recipe.grid import combinations

    by = Workers(ray, workers)
    made = combinations(recipe, grid, seeds, overrides=overrides, out=out)  # before torch is there

    wait_briefly()
    from edgetune.core.errors import TrainingError
    from edgetune.training.sweep import sweep_table

    folder = made[0].out.parent
    # an error of the recipe or of its rows would be one of every run
    outcomes = train_all(made, folder, by, replace=replace, one_runs_own=TrainingError)
    return compare(outcomes, folder, "sweep.json", table=sweep_table)
