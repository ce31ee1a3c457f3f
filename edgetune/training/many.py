"""Many recipes, trained one after the other or by workers, and what came of each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.core.errors import DataError, EdgetuneError, RecipeError
from edgetune.core.layout import SUMMARY
from edgetune.core.progress import Progress, duration
from edgetune.metrics.statistics import headline
from edgetune.recipe.runs import PlannedRun
from edgetune.training.run import WriteMore, run_recipe
from edgetune.training.summary import RunSummary

LINE = 200  # characters of an error in the table; all of them are in the file


@dataclass(frozen=True)
class TrainedRun:
    """What came of a run: a summary, or the error that stopped it."""

    run: PlannedRun
    summary: RunSummary | None
    error: EdgetuneError | None = None
    was_there: bool = False
    """finished before, and taken as it is"""

    @property
    def metric(self) -> str:
        """By which runs are compared."""
        kept = None if self.summary is None else self.summary.stages[-1].get("kept")
        return "train_loss" if kept is None else str(kept["metric"])

    @property
    def value(self) -> float:
        """The metric of the weights that were kept; NaN for a run that failed."""
        return self.by(self.metric)

    def by(self, metric: str) -> float:
        """This metric of the weights that were kept; NaN where there is none."""
        if self.summary is None:
            return math.nan
        own = {self.metric: self.summary.train_loss} | self.summary.metrics
        return float(own.get(metric, math.nan))

    @property
    def steps(self) -> int:
        """Optimizer steps of all stages."""
        return 0 if self.summary is None else sum(s["steps"] for s in self.summary.stages)

    @property
    def line(self) -> str:
        """The result, or why there is none, in one line."""
        if self.summary is None:
            said = str(self.error).splitlines()[0]
            return f"failed: {said if len(said) <= LINE else said[:LINE] + '…'}"
        numbers = self.summary.metrics or {"train_loss": self.summary.train_loss}
        return ", ".join(f"{name} {value:.4g}" for name, value in headline(numbers).items())


def train_one(
    run: PlannedRun,
    *,
    progress: Progress,
    write_more: WriteMore | None = None,
    replace: bool = False,
) -> TrainedRun:
    """Train a run, go on with it where it was stopped, or take it as it is where it is finished;
    `replace`: train anew in a folder that has the run of another recipe or of other data. Whatever
    stops it is the outcome, but for a package that is missing.
    """
    before = _finished_at(run.out)
    try:
        try:
            summary = run_recipe(
                run.recipe,
                out=run.out,
                progress=progress,
                resume=run.out.exists(),
                replace_finished=replace,
                write_more=write_more,
            )
        except (RecipeError, DataError) as error:
            if "--resume" not in error.what:
                raise
            if not replace:
                raise _of_another(error, run.out) from error
            summary = run_recipe(run.recipe, out=run.out, progress=progress, write_more=write_more)
    except EdgetuneError as error:
        return TrainedRun(run, None, error)
    except ModuleNotFoundError:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        return TrainedRun(run, None, _unexpected(f"{type(error).__name__}: {first}"))
    return TrainedRun(
        run, summary, was_there=before is not None and before == _finished_at(run.out)
    )


def train_here(
    runs: Sequence[PlannedRun],
    *,
    progress: Progress,
    write_more: WriteMore | None = None,
    replace: bool = False,
) -> Iterator[TrainedRun]:
    """Train the runs one after the other in this process; one that fails does not stop the rest."""
    for number, run in enumerate(runs, start=1):
        progress.say(f"run {number} of {len(runs)}: {run.name}")
        done = train_one(run, progress=progress, write_more=write_more, replace=replace)
        if done.error is not None:
            progress.say(f"{run.name} failed: {done.error}")
        yield done


def runs_table(outcomes: Sequence[TrainedRun]) -> str:
    """A line for each run."""
    rows = [["run", "steps", "time", "result"]]
    for one in outcomes:
        time = "–" if one.summary is None else duration(one.summary.seconds)
        steps = "–" if one.summary is None else f"{one.steps:,}"
        rows.append([one.run.name, steps, time, one.line])
    return aligned(rows)


def runs_facts(outcomes: Sequence[TrainedRun]) -> list[dict[str, Any]]:
    """For a file that scripts read: a run each."""
    return [
        {
            "run": one.run.name,
            "out": str(one.run.out),
            "settings": dict(one.run.settings),
            "metric": one.metric,
            "value": one.value if math.isfinite(one.value) else None,
            "metrics": {} if one.summary is None else one.summary.metrics,
            "seconds": None if one.summary is None else one.summary.seconds,
            "error": "" if one.error is None else str(one.error),
        }
        for one in outcomes
    ]


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _finished_at(folder: Path) -> int | None:
    """When the finished run in a folder was written, in ns; None where there is none."""
    try:
        return (folder / SUMMARY).stat().st_mtime_ns
    except OSError:
        return None


def _of_another(error: EdgetuneError, folder: Path) -> EdgetuneError:
    """Where another recipe or other data filled the folder: with the ways out of many runs."""
    return type(error)(
        "this run is of another recipe or of other data",
        where=str(folder),
        expected=error.expected,
        got=error.got,
        fix="Name another --out, or add --replace.",
    )


def _unexpected(line: str) -> EdgetuneError:
    return EdgetuneError(line, fix="Train this recipe alone to see where that comes from.")
