"""How time grows: a bundle measured over several prompt lengths, batches or threads."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgetune.core.errors import DeviceError
from edgetune.core.settings import nearest
from edgetune.runtime.check.latency import TIMES, Workload
from edgetune.runtime.check.rounds import Measuring

AXES = {
    "prompt": "prompt_tokens",
    "new": "new_tokens",
    "batch": "batch",
    "threads": "threads",
    "beside": "beside",
}
"""What `--sweep` calls it, and the workload's field."""
MOST = 64
"""Points of a sweep: each is measured in a process of its own."""
Axes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class SweepPoint:
    """One combination: `at` by the axes' names, and what was measured of one adapter."""

    at: Mapping[str, int]
    adapter: str | None
    figures: Mapping[str, Mapping[str, float]]
    peak_rss_mb: float

    def to_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        return {
            "at": dict(self.at),
            "adapter": self.adapter,
            **self.figures,
            "peak_rss_mb": self.peak_rss_mb,
        }


def parse_sweep(asked: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """`--sweep` values, each `axis=1,2,3`; DeviceError for what is none."""
    axes: dict[str, tuple[int, ...]] = {}
    for text in asked:
        name, separator, values = text.partition("=")
        name = name.strip()
        if not separator or name in axes:
            what = f"{name} is given twice" if name in axes else "a sweep is axis=numbers"
            fix = "For example --sweep prompt=64,256,1024."
            raise DeviceError(what, where="--sweep", got=text, fix=fix)
        if name not in AXES:
            raise DeviceError(f"unknown axis {name!r}", where="--sweep", **nearest(name, [*AXES]))
        axes[name] = tuple(_number(name, value) for value in values.split(","))
    points = len(list(itertools.product(*axes.values())))
    if points > MOST:
        raise DeviceError(
            "the sweep has too many points",
            where="--sweep",
            expected=f"at most {MOST}",
            got=str(points),
        )
    return axes


def _number(name: str, text: str) -> int:
    least = {"new": 2, "beside": 0}.get(name, 1)
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise DeviceError(
            f"a value of {name} is wrong",
            where="--sweep",
            expected=f"whole numbers from {least} on, commas between",
            got=text,
        )
    return value


def sweep(workload: Workload, axes: Axes, measure: Measuring) -> Iterator[SweepPoint]:
    """Measure every combination; yields as soon as one is there."""
    for values in itertools.product(*axes.values()):
        at = dict(zip(axes, values, strict=True))
        own: dict[str, Any] = {AXES[name]: number for name, number in at.items()}
        measured = measure(replace(workload, **own))
        for row in measured["adapters"]:
            figures = {key: row[key] for key in TIMES if key in row}
            yield SweepPoint(at, row["adapter"], figures, measured["peak_rss_mb"])


def sweep_line(point: SweepPoint) -> str:
    """A point for a person."""
    at = ", ".join(f"{name} {value}" for name, value in point.at.items())
    figures = "; ".join(
        f"{key.removesuffix('_ms').upper()} p50 {row['p50']:.3g} p95 {row['p95']:.3g} ms"
        for key, row in point.figures.items()
    )
    return f"{at} ({point.adapter or 'base model'}): {figures}; peak {point.peak_rss_mb:.0f} MB"
