"""Line charts, scatter charts and grouped bars as inline SVG, in the page's own colours so that
they follow light and dark; and what every picture is made of: frame, scale, ticks, grid, keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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
    x = Scale(x_ticks[0], max(xs[-1], max(xs)), LEFT, WIDTH - RIGHT)
    y = Scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    body = _grid(x, y, x_ticks, y_ticks, x_label) + "".join(_line(x, y, s) for s in series)
    return framed(title, body, _legend(series))


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
    x = Scale(x_ticks[0], x_ticks[-1], LEFT, WIDTH - RIGHT)
    y = Scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    body = _grid(x, y, x_ticks, y_ticks, x_label)
    for line in lines:
        body += (
            f'<polyline class="line c{line.color}"'
            f' points="{_path(x, y, line)}"><title>{escape(line.name)}</title></polyline>'
        )
    for p in points:
        body += dot(x(p.x), y(p.y), p.color, _said(p.name, p.x, p.y), r=4.5)
        body += text(x(p.x) + 7, y(p.y) - 5, p.label)
    return framed(title, body, _legend(lines))


def framed(title: str, body: str, keys: str, *, width: int = WIDTH, height: float = HEIGHT) -> str:
    """A figure of a page: the title, `keys` beside it, and the picture drawn by `body` (SVG)."""
    return (
        f"<figure><figcaption>{escape(title)}{keys}</figcaption>"
        f'<svg viewBox="0 0 {width} {height:.0f}" role="img"'
        f' aria-label="{escape(title)}">{body}</svg></figure>'
    )


def legend(names: Iterable[tuple[str, int]]) -> str:
    """A key for each (name, colour)."""
    return "".join(
        f'<span class="key"><i class="c{color}"></i>{escape(name)}</span>' for name, color in names
    )


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` lie between two places of the picture, in user units."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return self.start + share * (self.stop - self.start)


def text(x: float, y: float, words: str, *, anchor: str = "", kind: str = "tick") -> str:
    """Words at a place; `anchor` is SVG's: where in the words x lies (their start)."""
    more = f' text-anchor="{anchor}"' if anchor else ""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}"{more}>{escape(words)}</text>'


def dot(x: float, y: float, color: int, title: str, *, r: float) -> str:
    """A point that says `title` when it is pointed at."""
    return (
        f'<circle class="dot c{color}" cx="{x:.1f}" cy="{y:.1f}"'
        f' r="{r:g}"><title>{escape(title)}</title></circle>'
    )


def upright(x: float, top: float, bottom: float, label: str, *, kind: str = "grid") -> str:
    """A line of the grid from top to bottom, with its label below."""
    return (
        f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>'
        + text(x, bottom + 17, label, anchor="middle")
    )


def across(y: float, left: float, right: float, label: str, *, kind: str = "grid") -> str:
    """A line of the grid from left to right, with its label on the left."""
    return (
        f'<line class="{kind}" x1="{left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        + text(left - 7, y + 4, label, anchor="end")
    )


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


def _grid(
    x: Scale, y: Scale, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str
) -> str:
    parts = [across(y(value), LEFT, WIDTH - RIGHT, number(value)) for value in y_ticks]
    parts += [
        text(x(value), HEIGHT - BOTTOM + 17, number(value), anchor="middle")
        for value in x_ticks
        if value <= x.high
    ]
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, anchor="middle"))
    return "".join(parts)


def _path(x: Scale, y: Scale, series: Series) -> str:
    return " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in series.points)


def _line(x: Scale, y: Scale, series: Series) -> str:
    line = f'<polyline class="line c{series.color}" points="{_path(x, y, series)}"/>'
    if len(series.points) > MARKED_POINTS:
        return line
    r = 5.0 if len(series.points) == 1 else 3.2  # a point by itself stands on another's line
    return line + "".join(
        dot(x(at), y(value), series.color, _said(series.name, at, value), r=r)
        for at, value in series.points
    )


def _said(name: str, x: float, y: float) -> str:
    return f"{name}: {number(y)} at {number(x)}"


def _legend(series: Sequence[Series]) -> str:
    names = dict.fromkeys((s.name, s.color) for s in series)
    return legend(names) if len(names) > 1 else ""


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
        body.append(text(BARS_LEFT - 12, y + height / 2 + 4, name, anchor="end", kind="name"))
        for bar in bars:
            body.append(_bar(name, bar, y))
            y += BAR + GAP
        y += GROUP_GAP - GAP
    bottom = y - GROUP_GAP + 8
    grid = [upright(_share(n / 4), 0, bottom, f"{n / 4:.0%}") for n in range(5)]
    names = {bar.name: bar.color for _, bars in groups for bar in bars}
    return framed(
        title,
        "".join(grid + body),
        legend(names.items()),
        width=BARS_WIDTH,
        height=bottom + AXIS,
    )


_share = Scale(0, 1, BARS_LEFT, BARS_WIDTH - BARS_RIGHT)


def _bar(group: str, bar: Bar, y: float) -> str:
    words, end = f"{100 * bar.share:.1f} %", _share(bar.share)
    return (
        f'<rect class="bar c{bar.color}" x="{BARS_LEFT}" y="{y:.1f}"'
        f' width="{end - BARS_LEFT:.1f}" height="{BAR}" rx="2"><title>{escape(group)},'
        f" {escape(bar.name)}: {words}</title></rect>"
    ) + text(end + 7, y + BAR - 4.5, words, kind="value")
