"""Grouped horizontal bars as inline SVG, drawn with the page's own colours so that they follow light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, LEFT, RIGHT = 940, 96, 64  # user units; the page scales the picture
BAR, GAP, GROUP_GAP, TOP, AXIS = 17, 4, 20, 8, 26


@dataclass(frozen=True)
class Bar:
    """One bar: a share of 1, and a number from 1, a colour of the page."""

    name: str
    share: float
    color: int


def bar_chart(title: str, groups: Sequence[tuple[str, Sequence[Bar]]]) -> str:
    """A figure with an axis from 0 to 100 %, a group of bars for each name, and a legend."""
    body, y = list[str](), float(TOP)
    for name, bars in groups:
        height = len(bars) * (BAR + GAP) - GAP
        body.append(f'<text class="name" x="{LEFT - 12}" y="{y + height / 2 + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        for bar in bars:
            body.append(_bar(name, bar, y))
            y += BAR + GAP
        y += GROUP_GAP - GAP
    bottom = y - GROUP_GAP + 8
    picture = _grid(bottom) + "".join(body)
    svg = f'<svg viewBox="0 0 {WIDTH} {bottom + AXIS:.0f}" role="img" aria-label="{escape(title)}">{picture}</svg>'
    return f"<figure><figcaption>{escape(title)}{_legend(groups)}</figcaption>{svg}</figure>"


def _x(share: float) -> float:
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _bar(group: str, bar: Bar, y: float) -> str:
    text = f"{100 * bar.share:.1f} %"
    return (
        f'<rect class="bar c{bar.color}" x="{LEFT}" y="{y:.1f}" width="{_x(bar.share) - LEFT:.1f}" height="{BAR}" rx="2">'
        f"<title>{escape(group)}, {escape(bar.name)}: {text}</title></rect>"
        f'<text class="value" x="{_x(bar.share) + 7:.1f}" y="{y + BAR - 4.5:.1f}">{text}</text>'
    )


def _grid(bottom: float) -> str:
    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = _x(share)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{bottom:.1f}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 17:.1f}" text-anchor="middle">{share:.0%}</text>')
    return "".join(parts)


def _legend(groups: Sequence[tuple[str, Sequence[Bar]]]) -> str:
    names = {bar.name: bar.color for _, bars in groups for bar in bars}
    return "".join(f'<span class="key"><i class="c{color}"></i>{escape(name)}</span>' for name, color in names.items())
