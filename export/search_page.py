"""What `--precision auto` tried, for people: a table in the terminal, and a page with plots beside
the bundle.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from edgetune.core.files import write_text
from edgetune.export.search import Found, Trial
from edgetune.report.charts import Point, Series, scatter_chart
from edgetune.report.html import STYLE

TRIED, CHOSEN, BOUND = 1, 2, 3  # the page's colours
SIZE = "MB on disk"
MORE_STYLE = (
    ".tried td:not(:nth-child(2)):not(:last-child), .tried th { white-space: nowrap; overflow-wrap:"
    " normal; }"
)
LONGEST = 76  # characters of a cell in the terminal


def trial_table(found: Found) -> list[tuple[str, ...]]:
    """Head and a row for each precision: number, name, MB, ms of a token or request, each adapter's
    metric, loss, remark.
    """
    metrics = list(found.metric)
    step = (
        "ms/token"
        if any(
            trial.latency is not None and trial.latency.tpot_ms is not None
            for trial in found.trials
        )
        else "ms/request"
    )
    cost = next((trial.cost for trial in found.trials if trial.cost is not None), None)
    general = () if cost is None else (f"{cost['task']} {cost['metric']}",)
    head = (
        "",
        "precision",
        "MB",
        step,
        *(f"{found.metric[name]} {name}" for name in metrics),
        "loss",
        *general,
        "",
    )
    base = () if cost is None else (f"{cost['torch']:.4g}",)
    reference = (
        "",
        "torch, fp32",
        "",
        "",
        *(f"{found.reference[name]:.4f}" for name in metrics),
        "",
        *base,
        "",
    )
    return [
        head,
        reference,
        *(
            _row(found, at, trial, metrics, general=bool(general))
            for at, trial in enumerate(found.trials)
        ),
    ]


def _row(
    found: Found, at: int, trial: Trial, metrics: Sequence[str], *, general: bool
) -> tuple[str, ...]:
    remark = (
        "chosen"
        if at == found.chosen
        else f"failed: {trial.failed}"
        if trial.failed
        else ""
        if at in found.front
        else "beaten"
    )
    return (
        str(at + 1),
        trial.name,
        "" if trial.mb is None else f"{trial.mb:.1f}",
        "" if trial.latency is None else f"{trial.latency.step_ms:.2f}",
        *(f"{trial.metrics[name]:.4f}" if name in trial.metrics else "" for name in metrics),
        "" if trial.loss is None else f"{trial.loss:+.2%}",
        *([f"{trial.cost['bundle']:.4g}" if trial.cost else ""] if general else []),
        remark,
    )


def trial_lines(found: Found) -> list[str]:
    """The table for a terminal."""
    rows = [
        tuple(cell if len(cell) <= LONGEST else f"{cell[: LONGEST - 1]}…" for cell in row)
        for row in trial_table(found)
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def page_beside(bundle: Path) -> Path:
    """`bundles/home` → `bundles/home.precision.html`."""
    return bundle.with_name(f"{bundle.name}.precision.html")


def write_page(found: Found, bundle: Path) -> Path:
    """Write the page, whole or not at all; where it is."""
    path = page_beside(bundle)
    write_text(path, render_search(found, bundle.name))
    return path


def render_search(found: Found, name: str) -> str:
    """The page as HTML."""
    title = f"{name}: which precision"
    note = (
        f"The smallest bundle that loses at most {found.max_loss:.2%} of every task metric against"
        f" torch in fp32, on {found.rows:,} rows, through the real engine. Precisions were tried"
        " from the smallest on until one held; fp32 is what they are seen against."
    )
    head, *rows = trial_table(found)
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    parts = [
        f"<h1>{escape(title)}</h1><p>{escape(note)}</p>",
        f'<h2>Loss of the task metric</h2><div class="plots">{"".join(_plots(found))}</div>',
        (
            '<h2>Tried</h2><div class="wide"><table'
            f' class="tried"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
        ),
    ]
    meta = (
        '<meta charset="utf-8"><meta name="viewport"'
        f' content="width=device-width"><title>{escape(title)}</title>'
    )
    return (
        "<!doctype html>\n<html"
        f' lang="en"><head>{meta}<style>{STYLE}{MORE_STYLE}</style></head>\n<body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _plots(found: Found) -> Iterator[str]:
    """Loss in per cent over size, and over time; the bound as a line, numbers as in the table."""
    for title, unit in (
        ("Loss over size", SIZE),
        ("Loss over time", "ms of a token (encoders: of a request)"),
    ):
        points = [
            Point(
                trial.name,
                str(at + 1),
                x,
                100 * trial.loss,
                CHOSEN if at == found.chosen else TRIED,
            )
            for at, trial in enumerate(found.trials)
            if trial.loss is not None
            and (x := trial.mb if unit == SIZE else _step_ms(trial)) is not None
        ]
        if points:
            bound = Series(
                "bound",
                [(0.0, 100 * found.max_loss), (max(p.x for p in points), 100 * found.max_loss)],
                BOUND,
            )
            yield scatter_chart(
                f"{title}, %",
                points,
                x_label=unit,
                lines=[Series("no other is better in both", _front(points), TRIED), bound],
            )


def _front(points: Sequence[Point]) -> list[tuple[float, float]]:
    """From the smallest on, every point that loses less than all before it."""
    front: list[tuple[float, float]] = []
    for x, y in sorted((p.x, p.y) for p in points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def _step_ms(trial: Trial) -> float | None:
    return None if trial.latency is None else trial.latency.step_ms
