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
from edgetune.report.charts import number, ticks
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
    across = ticks(min(0.0, *(p.low for p in shown)), max(0.0, *(p.high for p in shown)), 5)
    up = _range([p.gain for p in shown])

    def x(value: float) -> float:
        return LEFT + (value - across[0]) / (across[-1] - across[0]) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - up[0]) / (up[-1] - up[0]) * (HEIGHT - TOP - BOTTOM)

    sets = [name.partition(" ")[0] for name in shared_sets(subjects, unit)]
    title = f"Task gain against general loss: {UNITS[unit]}"
    parts = [_grid(across, up, x, y), _label(metric, sets, unit)]
    parts += [_dot(place, x, y) for place in shown]
    parts += _names(shown, x, y)
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        f' aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )
    keys = "".join(
        f'<span class="key"><i class="c{place.color}"></i>{escape(place.name)}</span>'
        for place in shown
    )
    return f"<figure><figcaption>{escape(title)}{keys}</figcaption>{svg}</figure>"


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


def _grid(across: Sequence[float], up: Sequence[float], x: Any, y: Any) -> str:
    parts = []
    for value in across:
        kind = "axis" if value == 0 else "grid"
        parts.append(
            f'<line class="{kind}" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{TOP}"'
            f' y2="{HEIGHT - BOTTOM}"/>'
        )
        parts.append(
            f'<text class="tick" x="{x(value):.1f}" y="{HEIGHT - BOTTOM + 17}"'
            f' text-anchor="middle">{number(round(value, 9))}</text>'
        )
    for value in up:
        kind = "axis" if value == 0 else "grid"
        parts.append(
            f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}"'
            f' y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
        )
        parts.append(
            f'<text class="tick" x="{LEFT - 7}" y="{y(value) + 4:.1f}"'
            f' text-anchor="end">{number(round(value, 9))}</text>'
        )
    return "".join(parts)


def _label(metric: str, sets: Sequence[str], unit: str) -> str:
    below = f"{', '.join(sets)} ({'points' if unit == 'points' else '% of the perplexity'})"
    beside = f"↑ gain in {_spoken(metric)} ({'points' if unit_of(metric) == 'points' else '%'})"
    middle = (LEFT + WIDTH - RIGHT) / 2
    return (
        f'<text class="tick" x="{LEFT}" y="{HEIGHT - 24}">← lost in general</text><text'
        f' class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 24}" text-anchor="end">gained'
        f' in general →</text><text class="tick" x="{middle}" y="{HEIGHT - 6}"'
        f' text-anchor="middle">{escape(below)}</text><text class="tick" x="8"'
        f' y="15">{escape(beside)}</text>'
    )


def _dot(place: RunPoint, x: Any, y: Any) -> str:
    at, height = x(place.change), y(place.gain)
    whisker = f"{x(place.low):.1f},{height:.1f} {x(place.high):.1f},{height:.1f}"
    words = (
        f"{place.name}: task {place.gain:+.2f}, general {place.change:+.2f} ({place.low:+.2f} to"
        f" {place.high:+.2f})"
    )
    return (
        f'<polyline class="line c{place.color}" points="{whisker}"/><circle class="dot'
        f' c{place.color}" cx="{at:.1f}" cy="{height:.1f}"'
        f' r="5"><title>{escape(words)}</title></circle>'
    )


def _names(shown: Sequence[RunPoint], x: Any, y: Any) -> list[str]:
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
