"""`edgetune train`: recipe → run folder; several recipes → a folder each, compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import click

from edgetune.cli.options import wait_briefly
from edgetune.cli.train_many import Workers, compare, ray_training, train_all
from edgetune.core.errors import EdgetuneError


@click.command()
@click.argument(
    "recipes", nargs=-1, required=True, metavar="RECIPE…", type=click.Path(path_type=Path)
)
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
    "--out",
    type=click.Path(path_type=Path),
    help=(
        "The run folder, instead of the recipe's out; of several recipes, and with --ray, the"
        " folder of all runs, each named as its recipe is."
    ),
)
@click.option(
    "--resume",
    is_flag=True,
    help=(
        "Continue an unfinished run of this recipe from its newest checkpoint; several recipes"
        " always go on."
    ),
)
@click.option(
    "--replace",
    is_flag=True,
    help=(
        "Put the new run in the place of a finished one, once it is finished too; of several"
        " recipes, where that one is of another recipe or of other data."
    ),
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
@ray_training
def command(
    recipes: tuple[Path, ...],
    overrides: tuple[str, ...],
    out: Path | None,
    resume: bool,
    replace: bool,
    search: str | None,
    migrate: bool,
    ray: str | None,
    workers: int | None,
) -> int:
    """Train an adapter as RECIPE (a .toml file) says and write the run folder.

    Several recipes, or --ray: each becomes a run of its own, one that fails does not stop the
    others, and a page compares them. Given again, what is finished stays and the rest goes on.
    """
    from edgetune.recipe.read import load_recipe

    by = Workers(ray, workers)
    if len(recipes) > 1 or ray is not None:
        if migrate or search is not None:
            raise click.UsageError("--migrate and --search go with one RECIPE, without --ray")
        return _train_many(recipes, overrides, out, by, replace=replace)
    (recipe,) = recipes
    if migrate:
        if overrides or resume or replace or search:
            raise click.UsageError("--migrate goes with --out alone")
        _migrate(recipe, out)
        return 0
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
        return 0  # of several processes one speaks
    numbers = summary.metrics or {"train_loss": summary.train_loss}
    click.echo(
        f"{summary.out}: "
        + ", ".join(f"{name} {value:.4g}" for name, value in headline(numbers).items())
    )
    return 0


def _train_many(
    recipes: Sequence[Path],
    overrides: Sequence[str],
    out: Path | None,
    by: Workers,
    *,
    replace: bool,
) -> int:
    """Several recipes, or one by Ray."""
    from edgetune.recipe.runs import common_folder, plan_runs

    runs = plan_runs(recipes, overrides=overrides, out=out)  # before torch is imported
    folder = out if out is not None else common_folder(runs)
    wait_briefly()
    from edgetune.training.many import runs_table
    from edgetune.training.parallel.distributed import launched

    if launched().size > 1:
        raise click.UsageError("torchrun and the like train one RECIPE; several go without")
    done = train_all(runs, folder, by, replace=replace, one_runs_own=EdgetuneError)
    return compare(done, folder, "runs.json", table=runs_table)


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
