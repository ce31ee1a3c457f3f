"""`edgetune sweep`: a grid of settings → runs, compared."""

from __future__ import annotations

from pathlib import Path

import click

from edgetune.cli.options import wait_briefly


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
def command(
    recipe: Path,
    grid: tuple[str, ...],
    seeds: str | None,
    overrides: tuple[str, ...],
    out: Path | None,
) -> int:
    """Train RECIPE once for each combination of settings and compare the runs in a table and on a
    page. Runs that are there already are taken as they are; one that was interrupted goes on.
    """
    from edgetune.recipe.grid import combinations

    made = combinations(recipe, grid, seeds, overrides=overrides)  # before torch is imported

    wait_briefly()
    from edgetune.core.files import write_json, write_text
    from edgetune.core.progress import Progress
    from edgetune.report.comparison import read_runs, render_comparison
    from edgetune.report.run_page import write_report
    from edgetune.training.sweep import run_all, sweep_facts, sweep_table

    folder = out if out is not None else Path(f"{made[0].recipe.out.rstrip('/')}-sweep")
    outcomes = list(run_all(made, folder, progress=Progress(), write_more=write_report))
    finished = [folder / one.combination.name for one in outcomes if one.summary is not None]
    write_json(folder / "sweep.json", sweep_facts(outcomes))
    click.echo(sweep_table(outcomes))
    if finished:
        write_text(folder / "comparison.html", render_comparison(read_runs(finished)))
        click.echo(f"compared in {folder / 'comparison.html'}")
    return 0 if len(finished) == len(outcomes) else 1
