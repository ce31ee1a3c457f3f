"""Line charts as inline SVG, drawn with the page's own colours so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 260  # user units; the page scales the picture
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 14, 40
MARKED_POINTS = 40  # a series of at most this many points gets a dot at each


@dataclass(frozen=True)
class Series:
    """A named line; `color` is a number from 1, a colour of the page."""

    name: str
    points: Sequence[tuple[float, float]]
    color: int = 1


def line_chart(title: str, series: Sequence[Series], *, x_label: str = "step", from_zero: bool = False) -> str:
    """A figure with axes, grid, the lines and a legend when there is more than one."""
    series = [Series(s.name, [(x, y) for x, y in s.points if math.isfinite(y)], s.color) for s in series]
    series = [s for s in series if s.points]
    if not series:
        return ""
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    x_ticks = ticks(0 if min(xs) <= 0.2 * max(xs) else min(xs), max(xs), 5)
    y_ticks = ticks(0.0 if from_zero else min(ys), max(ys), 5)
    axes = _Axes(x_ticks[0], max(xs[-1], max(xs)), y_ticks[0], y_ticks[-1])
    body = _grid(axes, x_ticks, y_ticks, x_label) + "".join(_line(axes, s) for s in series)
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{body}</svg>'
    return f"<figure><figcaption>{escape(title)}{_legend(series)}</figcaption>{picture}</figure>"


@dataclass(frozen=True)
class Point:
    """A named place; `label` stands beside it."""

    name: str
    label: str
    x: float
    y: float
    color: int = 1


def scatter_chart(title: str, points: Sequence[Point], *, x_label: str, lines: Sequence[Series] = ()) -> str:
    """A figure of labelled points, x from 0, and lines behind them (a front, a bound: two points each)."""
    if not points:
        return ""
    ys = [p.y for p in points] + [y for line in lines for _, y in line.points]
    x_ticks, y_ticks = ticks(0.0, max(p.x for p in points) * 1.05, 5), ticks(min(ys), max(ys), 5)
    axes = _Axes(x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1])
    body = _grid(axes, x_ticks, y_ticks, x_label)
    for line in lines:
        path = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in line.points)
        body += f'<polyline class="line c{line.color}" points="{path}"><title>{escape(line.name)}</title></polyline>'
    for p in points:
        x, y = axes.x(p.x), axes.y(p.y)
        body += f'<circle class="dot c{p.color}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"><title>{escape(p.name)}: {number(p.y)} at {number(p.x)}</title></circle>'
        body += f'<text class="tick" x="{x + 7:.1f}" y="{y - 5:.1f}">{escape(p.label)}</text>'
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{body}</svg>'
    return f"<figure><figcaption>{escape(title)}{_legend(lines)}</figcaption>{picture}</figure>"


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers at equal distances that cover low … high: steps of 1, 2 or 5 times a power of ten."""
    if high <= low:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def number(value: float) -> str:
    """A tick's label."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e").replace(".0e", "e")
    return f"{value:,.10g}" if abs(value) >= 1000 else f"{value:.4g}"


@dataclass(frozen=True)
class _Axes:
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / ((self.x_high - self.x_low) or 1.0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)


def _grid(axes: _Axes, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str) -> str:
    parts = []
    for value in y_ticks:
        y = axes.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
    for value in x_ticks:
        if value <= axes.x_high:
            x = axes.x(value)
            parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{number(value)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="tick" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(parts)


def _line(axes: _Axes, series: Series) -> str:
    places = [(axes.x(x), axes.y(y)) for x, y in series.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    line = f'<polyline class="line c{series.color}" points="{path}"/>'
    if len(places) > MARKED_POINTS:
        return line
    dots = "".join(
        f'<circle class="dot c{series.color}" cx="{px:.1f}" cy="{py:.1f}" r="3.2"><title>{escape(series.name)}: '
        f"{number(y)} at {number(x)}</title></circle>"
        for (px, py), (x, y) in zip(places, series.points, strict=True)
    )
    return line + dots


def _legend(series: Sequence[Series]) -> str:
    if len(series) < 2:
        return ""
    return "".join(f'<span class="key"><i class="c{s.color}"></i>{escape(s.name)}</span>' for s in series)
