"""The sections of a run's page on its answers: how far their scores can be believed, and which rows
are wrong. The figures are `metrics.error_analysis`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from edgetune.core.tasks import TAGGING
from edgetune.report.charts import Series, line_chart
from edgetune.report.html import html_table, raw_table

TEXT = 160
CLASSES = 20
"""Rows of the table of labels: of more, those with the lowest F1."""
OWN_STYLE = """
p.above { margin-top: 1.4rem; }
table.wrong td:nth-child(3), table.wrong td:nth-child(4) { min-width: 9rem; }
table.wrong td:last-child { white-space: nowrap; }
table.matrix td, table.matrix th { padding: .2rem .35rem; text-align: right; }
table.matrix { width: auto; }
table.matrix td:first-child { text-align: left; white-space: normal; max-width: 20rem; }
"""


def confidence_section(summary: Mapping[str, Any]) -> Iterable[str]:
    """Reliability diagram, right answers over answered rows, and what was fitted."""
    analysis, found = summary.get("analysis") or {}, summary.get("confidence")
    if not analysis.get("reliability"):
        return
    yield "<h2>How sure the answers are</h2>"
    if found:
        yield f"<p>{escape(_fitted(found, summary))}</p>"
    bins, curve = analysis["reliability"], analysis["coverage"]
    drawn = [
        line_chart(
            "Right answers at each score",
            [
                Series("answers", [(one["score"], one["right"]) for one in bins], 1),
                Series("calibrated", [(0.0, 0.0), (1.0, 1.0)], 3),
            ],
            x_label="score",
            from_zero=True,
        ),
        line_chart(
            "Right answers where only the surest are given",
            [Series("right", [(one["answered"], one["right"]) for one in curve], 1)],
            x_label="share of the rows that is answered",
        ),
    ]
    yield f'<div class="plots">{"".join(drawn)}</div>'
    yield html_table(
        ("rows answered", "least score", "right"),
        ((f"{one['answered']:.1%}", f"{one['score']:.3f}", f"{one['right']:.1%}") for one in curve),
    )


def _fitted(found: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    measured = summary["data"][-1]["rows"]["validation"]
    what = "validation rows"
    if summary["task"] == TAGGING:
        what = "words of the validation rows"
    elif found["rows"] > measured:
        what = f"answers to {measured:,} validation rows, a yes or no for each label"
    line = (
        f"On {found['rows']:,} {what}: logits divided by {found['temperature']:.3g}, which takes"
        f" the expected calibration error from {found['expected_calibration_error_before']:.1%} to"
        f" {found['expected_calibration_error']:.1%}."
    )
    if found["threshold"] is None:
        return f"{line} There is no threshold: every row is answered."
    return (
        f"{line} Below a score of {found['threshold']:.3f} no label is given: of these rows"
        f" {found['share_answered']:.1%} are answered, {found['accuracy_answered']:.1%} of them"
        " right."
    )


def errors_section(summary: Mapping[str, Any]) -> Iterable[str]:
    """The labels' figures, what is taken for what, and the worst validation rows."""
    analysis = summary.get("analysis") or {}
    if not analysis.get("classes"):
        return
    yield "<h2>Errors on the validation rows</h2>"
    if not analysis["wrong"]:
        yield "<p>None of them is answered wrongly.</p>"
    yield f"<style>{OWN_STYLE}</style>"
    if matrix := analysis.get("matrix"):
        yield _matrix(matrix["labels"], matrix["rows"])
    elif pairs := analysis.get("confusions"):
        yield html_table(
            ("wanted", "got", "rows"),
            ((one["wanted"], one["got"], str(one["rows"])) for one in pairs),
        )
    yield from _classes(analysis["classes"])
    if analysis["worst"]:
        yield f'<p class="above">{analysis["wrong"]:,} wrong rows, the surest first:</p>'
        yield raw_table(
            ("line", "text, as the model read it", "wanted", "got", "score"),
            ([escape(cell) for cell in _wrong(one)] for one in analysis["worst"]),
            kind="wrong",
        )


def _classes(classes: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    shown = [one for one in classes if one["support"]]
    if len(shown) > CLASSES:
        yield f'<p class="above">The {CLASSES} of {len(shown)} labels with the lowest F1:</p>'
        shown = sorted(shown, key=lambda one: (one["f1"], one["label"]))[:CLASSES]
    else:
        yield '<p class="above">The labels:</p>'
    yield html_table(
        ("label", "precision", "recall", "F1", "rows"),
        (
            (
                one["label"],
                *(f"{one[name]:.1%}" for name in ("precision", "recall", "f1")),
                f"{one['support']:,}",
            )
            for one in shown
        ),
    )


def _matrix(labels: Sequence[str], rows: Sequence[Sequence[int]]) -> str:
    """A row for each label that was wanted, a numbered column for each that was got."""
    head = ("wanted \\ got", *(str(at) for at in range(1, len(labels) + 1)))
    cells = []
    for at, (label, row) in enumerate(zip(labels, rows, strict=True)):
        most = max(1, *row)
        cells.append((f"{at + 1} {escape(label)}", *(_shaded(n, n / most) for n in row)))
    return raw_table(head, cells, kind="matrix")


def _shaded(count: int, share: float) -> str:
    if not count:
        return "·"
    strength = round(100 * (0.08 + 0.42 * share))
    return (
        f'<span style="background: color-mix(in srgb, var(--c1) {strength}%, transparent);'
        f' padding: .1rem .35rem; border-radius: 4px">{count}</span>'
    )


def _wrong(one: Mapping[str, Any]) -> tuple[str, ...]:
    got = one["got"] if one["got"] is not None else f"no label (rejected: {one['rejected']})"
    score = one.get("score")
    return (
        str(one["line"]),
        *(_cut(text) for text in (one["text"], one["wanted"], got)),
        "" if score is None else f"{score:.1%}",
    )


def _cut(text: str) -> str:
    return text if len(text) <= TEXT else f"{text[:TEXT]}…"
