"""Task gain against general loss of one run: a row a metric, right is better, with its interval.

Accuracies, F1 and correlations change in points (0.01 each); losses, perplexities, bits per byte
and errors in per cent of what they were, with the sign turned, so that right is better everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from edgetune.core.tasks import lower_is_better
from edgetune.metrics.statistics import headline
from edgetune.report.charts import Scale, framed, legend, number, text, ticks, upright

WIDTH, ROW, LEFT, RIGHT, TOP, BOTTOM = 460, 24, 150, 20, 10, 44  # user units
# no share and no perplexity: nothing for these axes
OTHER_UNITS = ("reward", "margin", "completion_length")
NO_GAIN = ("length_baseline", "above_length", "ended")


@dataclass(frozen=True)
class Gain:
    """A bar of the picture, in the picture's unit; `low` and `high` are None where there is no
    interval.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None


def task_changes(
    metrics: Mapping[str, float], base_metrics: Mapping[str, float] | None
) -> list[Gain]:
    """What the task gained on its validation rows; the loss only where nothing else was
    measured.
    """
    base = base_metrics or {}
    left_out = (*OTHER_UNITS, *NO_GAIN)
    both = [
        (n, base[n], v)
        for n, v in headline(metrics).items()
        if n in base and n.partition("/")[0] not in left_out
    ]
    better = [entry for entry in both if entry[0] != "loss" or len(both) == 1]
    return [Gain(f"task {name}", _better(name, old, new)) for name, old, new in better]


def general_changes(results: Sequence[Mapping[str, Any]]) -> list[Gain]:
    """What general ability gained (or lost), from the dictionaries of `General`; those without an
    after are left out.
    """
    changes = []
    for result in results:
        if result["after"] is None:
            continue
        metric, before = result["metric"], result["before"]
        value, *ends = (
            _better(metric, before, before + result[key]) for key in ("change", "low", "high")
        )
        changes.append(Gain(f"{result['task']} {metric}", value, min(ends), max(ends)))
    return changes


def picture(
    task: Sequence[Gain],
    general: Sequence[Gain],
    *,
    title: str = "Task gain against general loss",
) -> str:
    """A figure as HTML; nothing when there is nothing to compare."""
    rows = [c for c in (*task, *general) if math.isfinite(c.value)]
    if not rows or not general:
        return ""
    ends = [
        end
        for c in rows
        for end in (c.value, c.low, c.high, 0.0)
        if end is not None and math.isfinite(end)
    ]
    marks = ticks(min(ends), max(ends), 5)
    height = TOP + ROW * len(rows) + BOTTOM

    scale = Scale(marks[0], marks[-1], LEFT, WIDTH - RIGHT)

    def x(value: float) -> float:  # an end that is infinite lies at the edge
        return scale(min(max(value, marks[0]), marks[-1]))

    parts = [upright(x(mark), TOP, height - BOTTOM, number(mark)) for mark in marks]
    parts += [
        _row(index, change, x, color=1 if index < len(task) else 2)
        for index, change in enumerate(rows)
    ]
    label = "change for the better: points, or % of a perplexity"
    parts.append(text(WIDTH / 2, height - 6, label, anchor="middle"))
    keys = legend([("task", 1), ("general, 95 % interval", 2)])
    return framed(title, "".join(parts), keys, width=WIDTH, height=height)


def _better(metric: str, before: float, after: float) -> float:
    if lower_is_better(metric):
        return 100 * (before - after) / before if before else 0.0
    return (after - before) * (1 if metric == "bleu" else 100)


def _row(index: int, change: Gain, x: Any, *, color: int) -> str:
    y = TOP + ROW * (index + 0.5)
    start, end = sorted((x(0.0), x(change.value)))
    parts = [
        text(LEFT - 8, y + 4, change.name, anchor="end"),
        (
            f'<rect class="dot c{color}" x="{start:.1f}" y="{y - 5:.1f}"'
            f' width="{max(end - start, 1):.1f}" height="10"><title>{escape(change.name)}:'
            f" {change.value:+.2f}</title></rect>"
        ),
    ]
    if change.low is not None and change.high is not None:
        points = f"{x(change.low):.1f},{y:.1f} {x(change.high):.1f},{y:.1f}"
        parts.append(f'<polyline class="line" points="{points}"/>')
    return "".join(parts)
