"""Line charts and grouped bars as inline SVG, in the page's own colours so that they follow light
and dark.
"""

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


def line_chart(
    title: str, series: Sequence[Series], *, x_label: str = "step", from_zero: bool = False
) -> str:
    """A figure with axes, grid, the lines and a legend when there is more than one."""
    series = [
        Series(s.name, [(x, y) for x, y in s.points if math.isfinite(y)], s.color) for s in series
    ]
    series = [s for s in series if s.points]
    if not series:
        return ""
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    x_ticks = ticks(0 if min(xs) <= 0.2 * max(xs) else min(xs), max(xs), 5)
    y_ticks = ticks(0.0 if from_zero else min(ys), max(ys), 5)
    axes = _Axes(x_ticks[0], max(xs[-1], max(xs)), y_ticks[0], y_ticks[-1])
    body = _grid(axes, x_ticks, y_ticks, x_label) + "".join(_line(axes, s) for s in series)
    picture = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{body}</svg>'
    )
    return f"<figure><figcaption>{escape(title)}{_legend(series)}</figcaption>{picture}</figure>"


@dataclass(frozen=True)
class Point:
    """A named place; `label` stands beside it."""

    name: str
    label: str
    x: float
    y: float
    color: int = 1


def scatter_chart(
    title: str, points: Sequence[Point], *, x_label: str, lines: Sequence[Series] = ()
) -> str:
    """A figure of labelled points, x from 0, and lines behind them (a front, a bound: two points
    each).
    """
    if not points:
        return ""
    ys = [p.y for p in points] + [y for line in lines for _, y in line.points]
    x_ticks, y_ticks = ticks(0.0, max(p.x for p in points) * 1.05, 5), ticks(min(ys), max(ys), 5)
    axes = _Axes(x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1])
    body = _grid(axes, x_ticks, y_ticks, x_label)
    for line in lines:
        path = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in line.points)
        body += (
            f'<polyline class="line c{line.color}"'
            f' points="{path}"><title>{escape(line.name)}</title></polyline>'
        )
    for p in points:
        x, y = axes.x(p.x), axes.y(p.y)
        body += (
            f'<circle class="dot c{p.color}" cx="{x:.1f}" cy="{y:.1f}"'
            f' r="4.5"><title>{escape(p.name)}: {number(p.y)} at {number(p.x)}</title></circle>'
        )
        body += f'<text class="tick" x="{x + 7:.1f}" y="{y - 5:.1f}">{escape(p.label)}</text>'
    picture = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{body}</svg>'
    )
    return f"<figure><figcaption>{escape(title)}{_legend(lines)}</figcaption>{picture}</figure>"


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers at equal distances that cover low … high: steps of 1, 2 or 5 times a power of
    ten.
    """
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
        return LEFT + (value - self.x_low) / ((self.x_high - self.x_low) or 1.0) * (
            WIDTH - LEFT - RIGHT
        )

    def y(self, value: float) -> float:
        return (
            HEIGHT
            - BOTTOM
            - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)
        )


def _grid(axes: _Axes, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str) -> str:
    parts = []
    for value in y_ticks:
        y = axes.y(value)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(
            f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}"'
            f' text-anchor="end">{number(value)}</text>'
        )
    for value in x_ticks:
        if value <= axes.x_high:
            x = axes.x(value)
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}"'
                f' text-anchor="middle">{number(value)}</text>'
            )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="tick" x="{middle}" y="{HEIGHT - 6}"'
        f' text-anchor="middle">{escape(x_label)}</text>'
    )
    return "".join(parts)


def _line(axes: _Axes, series: Series) -> str:
    places = [(axes.x(x), axes.y(y)) for x, y in series.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    line = f'<polyline class="line c{series.color}" points="{path}"/>'
    if len(places) > MARKED_POINTS:
        return line
    dots = "".join(
        f'<circle class="dot c{series.color}" cx="{px:.1f}" cy="{py:.1f}"'
        f' r="3.2"><title>{escape(series.name)}: {number(y)} at {number(x)}</title></circle>'
        for (px, py), (x, y) in zip(places, series.points, strict=True)
    )
    return line + dots


def _legend(series: Sequence[Series]) -> str:
    if len(series) < 2:
        return ""
    return "".join(
        f'<span class="key"><i class="c{s.color}"></i>{escape(s.name)}</span>' for s in series
    )


BARS_WIDTH, BARS_LEFT, BARS_RIGHT = 940, 96, 64  # user units; the page scales the picture
BAR, GAP, GROUP_GAP, BARS_TOP, AXIS = 17, 4, 20, 8, 26


@dataclass(frozen=True)
class Bar:
    """One bar: a share of 1, and a number from 1, a colour of the page."""

    name: str
    share: float
    color: int


def bar_chart(title: str, groups: Sequence[tuple[str, Sequence[Bar]]]) -> str:
    """A figure with an axis from 0 to 100 %, a group of bars for each name, and a legend."""
    body, y = list[str](), float(BARS_TOP)
    for name, bars in groups:
        height = len(bars) * (BAR + GAP) - GAP
        body.append(
            f'<text class="name" x="{BARS_LEFT - 12}" y="{y + height / 2 + 4:.1f}"'
            f' text-anchor="end">{escape(name)}</text>'
        )
        for bar in bars:
            body.append(_bar(name, bar, y))
            y += BAR + GAP
        y += GROUP_GAP - GAP
    bottom = y - GROUP_GAP + 8
    picture = _bar_grid(bottom) + "".join(body)
    svg = (
        f'<svg viewBox="0 0 {BARS_WIDTH} {bottom + AXIS:.0f}" role="img"'
        f' aria-label="{escape(title)}">{picture}</svg>'
    )
    return f"<figure><figcaption>{escape(title)}{_bar_legend(groups)}</figcaption>{svg}</figure>"


def _x(share: float) -> float:
    return BARS_LEFT + share * (BARS_WIDTH - BARS_LEFT - BARS_RIGHT)


def _bar(group: str, bar: Bar, y: float) -> str:
    text = f"{100 * bar.share:.1f} %"
    return (
        f'<rect class="bar c{bar.color}" x="{BARS_LEFT}" y="{y:.1f}"'
        f' width="{_x(bar.share) - BARS_LEFT:.1f}" height="{BAR}" rx="2"><title>{escape(group)},'
        f' {escape(bar.name)}: {text}</title></rect><text class="value" x="{_x(bar.share) + 7:.1f}"'
        f' y="{y + BAR - 4.5:.1f}">{text}</text>'
    )


def _bar_grid(bottom: float) -> str:
    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = _x(share)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{bottom:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{bottom + 17:.1f}"'
            f' text-anchor="middle">{share:.0%}</text>'
        )
    return "".join(parts)


def _bar_legend(groups: Sequence[tuple[str, Sequence[Bar]]]) -> str:
    names = {bar.name: bar.color for _, bars in groups for bar in bars}
    return "".join(
        f'<span class="key"><i class="c{color}"></i>{escape(name)}</span>'
        for name, color in names.items()
    )
