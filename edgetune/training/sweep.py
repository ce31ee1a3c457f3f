"""The runs of a grid of settings, compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from edgetune.core.tasks import WEIGHTED_BEST_BY, lower_is_better
from edgetune.recipe.grid import SEED, short_keys
from edgetune.training.many import TrainedRun, aligned


def compared_by(outcomes: Sequence[TrainedRun]) -> str:
    """The one metric that all runs are compared by. Where they kept their weights by several, as
    with class weights and without, it is one of these that all have, and counts rare labels.
    """
    finished = [one for one in outcomes if one.summary is not None]
    own = sorted({one.metric for one in finished}, key=lambda name: name not in WEIGHTED_BEST_BY)
    shared = (name for name in own if all(math.isfinite(one.by(name)) for one in finished))
    return next(shared, own[0] if own else "result")


def best_first(outcomes: Sequence[TrainedRun]) -> list[list[TrainedRun]]:
    """The outcomes of each setting, over its seeds, the best mean first; what failed is last."""
    groups: dict[tuple[tuple[str, str], ...], list[TrainedRun]] = {}
    for outcome in outcomes:
        of = tuple((k, v) for k, v in outcome.run.settings.items() if k != SEED)
        groups.setdefault(of, []).append(outcome)
    metric = compared_by(outcomes)

    def order(group: list[TrainedRun]) -> float:
        mean = fmean(outcome.by(metric) for outcome in group)
        if not math.isfinite(mean):
            return math.inf
        return mean if lower_is_better(metric) else -mean

    return sorted(groups.values(), key=order)


def sweep_table(outcomes: Sequence[TrainedRun]) -> str:
    """A line for each setting, the best first; mean and standard deviation over several seeds."""
    settings = outcomes[0].run.settings
    keys, names = [key for key in settings if key != SEED], short_keys(settings)
    metric = compared_by(outcomes)
    rows = [[*(names[key] for key in keys), metric, "runs", "steps"]]
    for group in best_first(outcomes):
        finished = [one for one in group if one.summary is not None]
        values = [one.by(metric) for one in finished]
        shown = f"{fmean(values):.4f}" if values else "failed"
        if len(values) > 1:
            shown += f" ± {stdev(values):.4f}"
        steps = [one.steps for one in finished]
        chosen = group[0].run.settings
        rows.append(
            [*(chosen[key] for key in keys), shown, f"{len(values)}", f"{max(steps, default=0):,}"]
        )
    return aligned(rows)
