"""The page of `edgetune check --sweep`: a picture for each figure, and all of it as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from edgetune.report.charts import Series, line_chart
from edgetune.report.html import STYLE, html_table

TITLES = {
    "ttft_ms": "time to first token, ms (p50)",
    "tpot_ms": "time per further token, ms (p50)",
    "request_ms": "request, ms (p50)",
}
COLOURS = 3
Point = Mapping[str, Any]


def render_sweep(points: Sequence[Point], *, title: str, about: Sequence[str] = ()) -> str:
    """The page as HTML. A point: `at` (axis → number), `adapter`, percentiles by figure,
    `peak_rss_mb`; the axis with most values lies along the pictures, the others are lines.
    """
    axes = {name: sorted({point["at"][name] for point in points}) for name in points[0]["at"]}
    along = max(axes, key=lambda name: len(axes[name]))
    others = [name for name in axes if name != along]
    pictures = [
        line_chart(text, _lines(points, figure, along, others), x_label=along, from_zero=True)
        for figure, text in TITLES.items()
        if any(figure in point for point in points)
    ]
    head = ("adapter", *axes, *(TITLES[figure] for figure in TITLES if figure in points[0]), "MB")
    table = html_table(head, [_row(point, list(axes)) for point in points])
    lines = "".join(f"<p>{escape(line)}</p>" for line in about)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>{lines}"
        f'<h2>Times</h2><div class="plots">{"".join(pictures)}</div>'
        f"<h2>All points</h2>{table}</body></html>\n"
    )


def _lines(points: Sequence[Point], figure: str, along: str, others: Sequence[str]) -> list[Series]:
    found: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        if figure in point:
            apart = [point["adapter"] or "base model"]
            apart += [f"{name} {point['at'][name]}" for name in others]
            found.setdefault(", ".join(apart), []).append(
                (point["at"][along], point[figure]["p50"])
            )
    return [
        Series(name, sorted(line), at % COLOURS + 1)
        for at, (name, line) in enumerate(found.items())
    ]


def _row(point: Point, axes: Sequence[str]) -> list[str]:
    return [
        point["adapter"] or "base model",
        *(str(point["at"][name]) for name in axes),
        *(f"{point[figure]['p50']:.4g}" for figure in TITLES if figure in point),
        f"{point['peak_rss_mb']:.0f}",
    ]
