"""Several runs on one plane: task gain up, general gain or loss to the right, a point each.

The general change of a run is the mean over the sets that all runs shown were measured on, one
metric a set; its interval takes the sets as independent: half width = √(Σ half widths²) / sets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from edgetune.core.tasks import lower_is_better
from edgetune.report.charts import (
    Scale,
    across,
    dot,
    framed,
    legend,
    number,
    text,
    ticks,
    upright,
)
from edgetune.report.forgetting import Gain, general_changes, task_changes

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = (
    460,
    320,
    56,
    16,
    26,
    60,
)  # user units
LINE, LETTER = 13, 6.4  # height of a name and width of its letters
Box = tuple[float, float, float]  # left, right and base of a name
UNITS = {"points": "accuracy", "%": "perplexity"}  # what is counted in a unit


@dataclass(frozen=True)
class ComparedRun:
    """A run to be placed: its name, its colour on the page (from 1), and its summary.json."""

    name: str
    color: int
    summary: Mapping[str, Any]

    @property
    def task(self) -> dict[str, Gain]:
        """Metric → the gain over the base, in the order of the summary."""
        changes = task_changes(self.summary["metrics"], self.summary.get("base_metrics"))
        return {
            change.name.removeprefix("task "): change
            for change in changes
            if math.isfinite(change.value)
        }

    @property
    def general(self) -> dict[str, Gain]:
        """Set and metric → the change for the better."""
        return {
            change.name: change
            for change in general_changes(self.summary.get("forgetting") or ())
            if math.isfinite(change.value)
        }


@dataclass(frozen=True)
class RunPoint:
    """Where a run lies: its gain on the task, its general change, and that one's 95 % interval."""

    name: str
    color: int
    gain: float
    change: float
    low: float
    high: float


def measured(subjects: Sequence[ComparedRun]) -> list[ComparedRun]:
    """Those whose general ability was measured before and after."""
    return [subject for subject in subjects if subject.general]


def task_metric(subjects: Sequence[ComparedRun]) -> str | None:
    """The first metric in which all of them can be compared with their base; None where there is
    none.
    """
    shared = (
        [name for name in subjects[0].task if all(name in subject.task for subject in subjects)]
        if subjects
        else []
    )
    return shared[0] if shared else None


def shared_sets(subjects: Sequence[ComparedRun], unit: str) -> list[str]:
    """The general metrics of a unit that all of them have, one a set."""
    found: dict[str, str] = {}
    for name in subjects[0].general if subjects else ():
        if unit_of(name) == unit and all(name in subject.general for subject in subjects):
            found.setdefault(name.partition(" ")[0], name)
    return list(found.values())


def unit_of(metric: str) -> str:
    """In what a metric's change is counted."""
    return "%" if lower_is_better(metric) else "points"


def places(subjects: Sequence[ComparedRun], unit: str) -> list[RunPoint]:
    """Every subject's place, where they share a task metric and general sets of this unit."""
    metric, sets = task_metric(subjects), shared_sets(subjects, unit)
    if metric is None or not sets:
        return []
    found = []
    for subject in subjects:
        changes = [subject.general[name] for name in sets]
        centre = sum(change.value for change in changes) / len(sets)
        below, above = (
            math.sqrt(sum(_width(change, end) ** 2 for change in changes)) / len(sets)
            for end in ("low", "high")
        )
        found.append(
            RunPoint(
                subject.name,
                subject.color,
                subject.task[metric].value,
                centre,
                centre - below,
                centre + above,
            )
        )
    return found


def _width(change: Gain, end: str) -> float:
    value = getattr(change, end)
    return 0.0 if value is None or not math.isfinite(value) else abs(value - change.value)


def plane(subjects: Sequence[ComparedRun], unit: str) -> str:
    """The figure as HTML; nothing where the subjects have nothing in common."""
    shown, metric = places(subjects, unit), task_metric(subjects)
    if not shown or metric is None:
        return ""
    along = ticks(min(0.0, *(p.low for p in shown)), max(0.0, *(p.high for p in shown)), 5)
    up = _range([p.gain for p in shown])

    x = Scale(along[0], along[-1], LEFT, WIDTH - RIGHT)
    y = Scale(up[0], up[-1], HEIGHT - BOTTOM, TOP)
    sets = [name.partition(" ")[0] for name in shared_sets(subjects, unit)]
    title = f"Task gain against general loss: {UNITS[unit]}"
    parts = [*_grid(along, up, x, y), _label(metric, sets, unit)]
    parts += [_dot(place, x, y) for place in shown]
    parts += _names(shown, x, y)
    keys = legend((place.name, place.color) for place in shown)
    return framed(title, "".join(parts), keys, width=WIDTH, height=HEIGHT)


def gain_table(subjects: Sequence[ComparedRun]) -> list[list[str]]:
    """A row of cells a metric, a cell a subject: the task's gain first, then every general change
    with its interval.
    """
    metric = task_metric(subjects)
    names = dict.fromkeys(name for subject in subjects for name in subject.general)
    task = (
        []
        if metric is None
        else [
            [
                f"task {_spoken(metric)}",
                *(_cell(subject.task[metric], metric) for subject in subjects),
            ]
        ]
    )
    return task + [
        [_spoken(name), *(_cell(subject.general.get(name), name) for subject in subjects)]
        for name in names
    ]


def _cell(change: Gain | None, name: str) -> str:
    if change is None:
        return "–"
    ends = (
        ""
        if change.low is None or change.high is None
        else f" ({change.low:+.2f} to {change.high:+.2f})"
    )
    return f"{change.value:+.2f}{_sign(name)}{ends}"


def _sign(metric: str) -> str:
    return " %" if unit_of(metric) == "%" else ""


def _spoken(metric: str) -> str:
    return metric.replace("_", " ")


def _grid(along: Sequence[float], up: Sequence[float], x: Scale, y: Scale) -> list[str]:
    """Lines at every tick, those through zero as axes."""
    kind = {True: "axis", False: "grid"}
    return [
        *(upright(x(v), TOP, HEIGHT - BOTTOM, number(v), kind=kind[v == 0]) for v in along),
        *(across(y(v), LEFT, WIDTH - RIGHT, number(v), kind=kind[v == 0]) for v in up),
    ]


def _label(metric: str, sets: Sequence[str], unit: str) -> str:
    below = f"{', '.join(sets)} ({'points' if unit == 'points' else '% of the perplexity'})"
    beside = f"↑ gain in {_spoken(metric)} ({'points' if unit_of(metric) == 'points' else '%'})"
    return (
        text(LEFT, HEIGHT - 24, "← lost in general")
        + text(WIDTH - RIGHT, HEIGHT - 24, "gained in general →", anchor="end")
        + text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, below, anchor="middle")
        + text(8, 15, beside)
    )


def _dot(place: RunPoint, x: Scale, y: Scale) -> str:
    at, height = x(place.change), y(place.gain)
    whisker = f"{x(place.low):.1f},{height:.1f} {x(place.high):.1f},{height:.1f}"
    words = (
        f"{place.name}: task {place.gain:+.2f}, general {place.change:+.2f} ({place.low:+.2f} to"
        f" {place.high:+.2f})"
    )
    line = f'<polyline class="line c{place.color}" points="{whisker}"/>'
    return line + dot(at, height, place.color, words, r=5)


def _names(shown: Sequence[RunPoint], x: Scale, y: Scale) -> list[str]:
    """Each name beside its point: above or below, to the right or the left, where it covers no
    other name or point.
    """
    dots = [(x(place.change), y(place.gain)) for place in shown]
    taken: list[Box] = []
    parts = []
    for place, (at, height) in zip(shown, dots, strict=True):
        width = LETTER * len(place.name)
        choices = [
            (side, height + below) for below in (-10, 20) for side in (at - 5, at + 5 - width)
        ]
        others = [
            *taken,
            *((dx - 6, dx + 6, dy + 6) for dx, dy in dots if (dx, dy) != (at, height)),
        ]
        free = [
            c
            for c in choices
            if c[0] >= LEFT
            and c[0] + width <= WIDTH
            and not any(_overlap((c[0], c[0] + width, c[1]), o) for o in others)
        ]
        left, base = (free or choices)[0]
        taken.append((left, left + width, base))
        parts.append(
            f'<text class="name c{place.color}" x="{left:.1f}" y="{base:.1f}"'
            f' textLength="{width:.1f}">{escape(place.name)}</text>'
        )
    return parts


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[1] and other[0] < one[1] and abs(one[2] - other[2]) < LINE


def _range(values: Sequence[float]) -> list[float]:
    """Ticks that cover the values with room above and below; zero too, unless all lie far to one
    side of it.
    """
    low, high = min(values), max(values)
    if abs(low + high) / 2 > 2 * (high - low) and high > low:
        return ticks(low - 0.3 * (high - low), high + 0.3 * (high - low), 5)
    return ticks(min(0.0, low * 1.15), max(0.0, high * 1.15), 5)
