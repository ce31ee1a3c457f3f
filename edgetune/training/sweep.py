"""The runs of a grid of settings, one after the other, and what came of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from edgetune.core.errors import DataError, EdgetuneError, RecipeError, TrainingError
from edgetune.core.progress import Progress
from edgetune.core.tasks import lower_is_better
from edgetune.recipe.grid import SEED, Combination, short_keys
from edgetune.training.run import WriteMore, run_recipe
from edgetune.training.summary import RunSummary


@dataclass(frozen=True)
class SweptRun:
    """What came of a combination: a summary, or the error that stopped its training."""

    combination: Combination
    summary: RunSummary | None
    error: str = ""

    @property
    def metric(self) -> str:
        """By which the runs are compared."""
        kept = None if self.summary is None else self.summary.stages[-1].get("kept")
        return "train_loss" if kept is None else str(kept["metric"])

    @property
    def value(self) -> float:
        """The metric of the weights that were kept; NaN for a run that failed."""
        if self.summary is None:
            return math.nan
        return float(self.summary.metrics.get(self.metric, self.summary.train_loss))


def run_all(
    made: Sequence[Combination], out: Path, *, progress: Progress, write_more: WriteMore
) -> Iterator[SweptRun]:
    """Train each in a folder of `out`; what is finished there is taken as it is, what is not goes
    on. A training that cannot go on is an outcome; any other error is raised.
    """
    for number, one in enumerate(made, start=1):
        progress.say(f"run {number} of {len(made)}: {one.name}")
        folder = out / one.name
        try:
            summary = run_recipe(
                one.recipe, out=folder, progress=progress, resume=True, write_more=write_more
            )
        except TrainingError as error:
            progress.say(f"{one.name} stopped: {error}")
            yield SweptRun(one, None, str(error))
        except (RecipeError, DataError) as error:
            raise _of_another_sweep(error, folder) from error
        else:
            yield SweptRun(one, summary)


def _of_another_sweep(error: EdgetuneError, folder: Path) -> EdgetuneError:
    """Where another recipe or other data filled the folder: with the way out of a sweep."""
    if "--resume" not in error.what:
        return error
    return type(error)(
        "this run is of another recipe or of other data",
        where=str(folder),
        expected=error.expected,
        got=error.got,
        fix="Name another --out, or remove that folder.",
    )


def best_first(outcomes: Sequence[SweptRun]) -> list[list[SweptRun]]:
    """The outcomes of each setting, over its seeds, the best mean first; what failed is last."""
    groups: dict[tuple[tuple[str, str], ...], list[SweptRun]] = {}
    for outcome in outcomes:
        of = tuple((k, v) for k, v in outcome.combination.settings.items() if k != SEED)
        groups.setdefault(of, []).append(outcome)

    def order(group: list[SweptRun]) -> float:
        mean = fmean(outcome.value for outcome in group)
        if not math.isfinite(mean):
            return math.inf
        return mean if lower_is_better(group[0].metric) else -mean

    return sorted(groups.values(), key=order)


def sweep_table(outcomes: Sequence[SweptRun]) -> str:
    """A line for each setting, the best first; mean and standard deviation over several seeds."""
    settings = outcomes[0].combination.settings
    keys, names = [key for key in settings if key != SEED], short_keys(settings)
    named = next((one.metric for one in outcomes if one.summary is not None), "result")
    rows = [[*(names[key] for key in keys), named, "runs", "steps"]]
    for group in best_first(outcomes):
        finished = [one for one in group if one.summary is not None]
        values = [one.value for one in finished]
        shown = f"{fmean(values):.4f}" if values else "failed"
        if len(values) > 1:
            shown += f" ± {stdev(values):.4f}"
        steps = [sum(s["steps"] for s in one.summary.stages) for one in finished if one.summary]
        chosen = group[0].combination.settings
        rows.append(
            [*(chosen[key] for key in keys), shown, f"{len(values)}", f"{max(steps, default=0):,}"]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def sweep_facts(outcomes: Sequence[SweptRun]) -> list[dict[str, Any]]:
    """For a file that scripts read: a run each, in the order of the grid."""
    return [
        {
            "run": one.combination.name,
            "settings": dict(one.combination.settings),
            "metric": one.metric,
            "value": one.value if math.isfinite(one.value) else None,
            "metrics": {} if one.summary is None else one.summary.metrics,
            "error": one.error,
        }
        for one in outcomes
    ]
