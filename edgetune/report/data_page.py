"""The page of `edgetune data`: rows, lengths, labels, findings and doubtful labels of a recipe's
stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from edgetune.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Scale,
    across,
    framed,
    number,
    text,
    ticks,
    upright,
)
from edgetune.report.html import STYLE, html_table, raw_table

Look = Mapping[str, Any]
OWN_STYLE = """
.plots { max-width: 34rem; }
.share { display: inline-block; height: .7rem; border-radius: 2px; background: var(--c1); }
.bar { fill: currentColor; } .limit { stroke: var(--c2); stroke-width: 1.5; }
"""


def render_data(found: Look) -> str:
    """The page as HTML; `found` is what `edgetune data --json` writes."""
    stages: Sequence[Look] = found["stages"]
    title = f"Data: {stages[0]['source'].rpartition('/')[2]}"
    parts = [f"<h1>{escape(title)}</h1>"]
    for at, look in enumerate(stages):
        parts += [f"<h2>Stage {at}: {escape(look['method'])}</h2>"] if len(stages) > 1 else []
        parts += _stage(look)
    if "doubts" in found:
        parts += _doubts(found["doubts"])
    head = (
        '<meta charset="utf-8"><meta name="viewport"'
        f' content="width=device-width"><title>{escape(title)}</title>'
    )
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}{OWN_STYLE}</style></head>\n'
        "<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _stage(look: Look) -> Iterator[str]:
    notes = "; ".join(note for notes in look["taken_for"].values() for note in notes)
    reads = ", ".join(f"{key} {value}" for key, value in look["reads"].items())
    yield f"<p>{escape(look['source'])}</p><p>{escape(reads)}</p><p>{escape(notes)}</p>"
    tiles = [
        *((f"{count:,}", f"{name} rows") for name, count in look["rows"].items()),
        (f"{sum(look['unusable'].values()):,}", "rows that cannot be used"),
        (f"{look['max_length']:,}", "tokens at most (max_length)"),
    ]
    cells = "".join(
        f'<div class="tile"><b>{escape(big)}</b><span>{escape(small)}</span></div>'
        for big, small in tiles
    )
    yield f'<div class="tiles">{cells}</div>'
    yield "<h2>Findings</h2>" + _findings(look["findings"])
    yield "<h2>Tokens of a row</h2>" + '<div class="plots">' + _histogram(look) + "</div>"
    names = ("median", "90 %", "99 %", "longest")
    yield html_table(
        ("", *names),
        [(part, *(f"{of[name]:,}" for name in names)) for part, of in look["tokens"].items()],
    )
    if look["labels"]:
        yield f"<h2>{len(look['labels'])} labels</h2>" + _labels(look)


def _findings(findings: Sequence[Look]) -> str:
    if not findings:
        return "<p>Nothing odd is found.</p>"
    rows = [
        (
            f'<span class="{"changed" if one["matters"] else "good"}">'
            f"{'warning' if one['matters'] else 'note'}</span>",
            escape(one["line"]),
            escape(", ".join(str(line) for line in one["lines"])),
        )
        for one in findings
    ]
    return raw_table(("", "what", "first lines"), rows)


def _histogram(look: Look) -> str:
    """Rows by their length, and the limit as an upright line."""
    bins = look["histogram"]
    if not bins:
        return ""
    most, last = max(rows for _, _, rows in bins), bins[-1][1] + 1
    y_ticks = ticks(0.0, float(most), 4)
    x = Scale(0, max(last, look["max_length"]), LEFT, WIDTH - RIGHT)
    y = Scale(0, y_ticks[-1], HEIGHT - BOTTOM, TOP)
    body = [across(y(value), LEFT, WIDTH - RIGHT, number(value)) for value in y_ticks]
    for first, end, rows in bins:
        body.append(
            f'<rect class="bar c1" x="{x(first):.1f}" y="{y(rows):.1f}"'
            f' width="{max(0.5, x(end + 1) - x(first) - 1):.1f}"'
            f' height="{y(0) - y(rows):.1f}"><title>{first} to {end} tokens: {rows}</title></rect>'
        )
    bottom = HEIGHT - BOTTOM
    body += [
        text(x(value), bottom + 17, number(value), anchor="middle")
        for value in ticks(0.0, x.high, 5)
        if value <= x.high and abs(value - look["max_length"]) > x.high / 12
    ]
    body.append(upright(x(look["max_length"]), TOP, bottom, str(look["max_length"]), kind="limit"))
    body.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "tokens", anchor="middle"))
    return framed("Rows by length; the line is max_length", "".join(body), "")


def _labels(look: Look) -> str:
    labels: Mapping[str, Mapping[str, int]] = look["labels"]
    parts = list(look["rows"])
    most = max(sum(of.values()) for of in labels.values())
    rows = [
        (
            escape(label),
            *(f"{of.get(part, 0):,}" for part in parts),
            f'<span class="share" style="width: {12 * sum(of.values()) / most:.2f}rem"></span>',
        )
        for label, of in labels.items()
    ]
    return raw_table(("label", *parts, ""), rows)


def _doubts(doubts: Look) -> Iterator[str]:
    yield f"<h2>Doubtful labels</h2><p>{escape(doubts['line'])}</p>"
    yield html_table(
        ("line", "text", "given", "likely", "score"),
        [
            (str(one["line"]), one["text"], one["given"], one["likely"], f"{one['score']:.3f}")
            for one in doubts["rows"]
        ],
    )
