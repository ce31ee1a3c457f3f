"""Several recipes, or a recipe's grid: one after the other or by tasks of Ray, and compared."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgetune.cli.options import ray_options
from edgetune.core.errors import EdgetuneError, OutputError

if TYPE_CHECKING:
    from edgetune.recipe.runs import PlannedRun
    from edgetune.training.many import TrainedRun

PAGE = "comparison.html"


@dataclass(frozen=True)
class Workers:
    """Who trains: tasks of Ray at an address, so many at a time, or this process."""

    ray: str | None
    workers: int | None

    def __post_init__(self) -> None:
        if self.workers is not None and self.ray is None:
            raise click.UsageError("--workers belongs to --ray")


ray_training = ray_options(
    ray=(
        "Train by tasks of Ray (the extra `ray`), here or on the cluster at ADDRESS, where files"
        " must lie at the same paths; a run takes one processor, or its `threads`."
    ),
    workers="With --ray: at most so many runs at a time (default: as many as fit).",
)
"""Of a command that trains."""


def train_all(
    runs: Sequence[PlannedRun],
    folder: Path,
    by: Workers,
    *,
    replace: bool,
    one_runs_own: type[EdgetuneError],
) -> list[TrainedRun]:
    """What comes of each run, in their order; an error that is not `one_runs_own` ends them all.
    OutputError before the first of them where `folder`, for the page, cannot be written.
    """
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise OutputError(
            "cannot write the comparison there",
            where=str(folder),
            expected="a folder that is writable",
            fix="Choose another --out.",
        )
    from edgetune.core.progress import Progress
    from edgetune.report.run_page import write_report

    if by.ray is None:
        from edgetune.training.many import train_here

        coming = train_here(runs, progress=Progress(), write_more=write_report, replace=replace)
    else:
        from edgetune.bulk.ray_trainings import train_by_ray

        coming = train_by_ray(
            runs,
            address=by.ray,
            workers=by.workers,
            write_more=write_report,
            replace_others=replace,
        )
    done = {}
    with contextlib.redirect_stdout(sys.stderr):  # where Ray tells of a worker that died
        for one in coming:
            if one.error is not None and not isinstance(one.error, one_runs_own):
                raise one.error
            done[one.run.name] = one
    return [done[run.name] for run in runs]


def compare(
    outcomes: Sequence[TrainedRun],
    folder: Path,
    name: str,
    *,
    table: Callable[[Sequence[TrainedRun]], str],
) -> int:
    """Show the table, and write the file for scripts and the page; the exit code."""
    from edgetune.core.files import write_json, write_text
    from edgetune.report.comparison import read_runs, render_comparison
    from edgetune.training.many import runs_facts

    click.echo(table(outcomes))
    write_json(folder / name, runs_facts(outcomes))
    finished = [one.run.out for one in outcomes if one.summary is not None]
    if finished:
        write_text(folder / PAGE, render_comparison(read_runs(finished)))
        click.echo(f"compared in {folder / PAGE}")
    if failed := len(outcomes) - len(finished):
        click.echo(f"{failed} of {len(outcomes)} runs failed: see {folder / name}", err=True)
    return 1 if failed else 0
